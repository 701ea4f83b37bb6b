// Persistent workers: the calling thread is worker 0, the others sleep between steps.
#pragma once

#include <pthread.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/barrier.h"

namespace headrace {

constexpr size_t kErrorBytes = 512;

// The first thing that went wrong. A failed crew runs nothing any more.
class Failure {
   public:
    bool is_set() const { return state_.load(std::memory_order_acquire) == 2; }
    const char* message() const { return is_set() ? message_ : ""; }

    template <class... Parts>
    void set(const char* format, Parts... parts) {
        int none = 0;
        if (!state_.compare_exchange_strong(none, 1)) return;
        snprintf(message_, sizeof message_, format, parts...);
        state_.store(2, std::memory_order_release);
    }

   private:
    std::atomic<int> state_{0};  // 0 none, 1 being written, 2 set
    char message_[kErrorBytes] = "";
};

// When an instruction was reached, when its waits were over, and when it was done; monotonic nanoseconds.
struct Stamp {
    int64_t reached_ns, started_ns, ended_ns;
};

// What instructions of one worker see of the world. `Step` is the run-time data all workers share.
template <class Step>
struct Worker {
    int index;
    Step* step;
    Counter* counters;
    uint32_t epoch;  // steps of this bucket before this one
    std::byte* scratch;
    Failure* failure;
    Patience patience;
    Stamp* stamps;  // null: nobody traces
    std::atomic<int32_t>* at;

    void reach(int instruction) {
        at->store(instruction, std::memory_order_relaxed);
        if (stamps) stamps[instruction].reached_ns = now_ns();
    }

    void start(int instruction) {
        if (stamps) stamps[instruction].started_ns = now_ns();
    }

    void end(int instruction) {
        if (stamps) stamps[instruction].ended_ns = now_ns();
    }

    // Fetches `ahead`, the weights to come, for as long as it spins. False: the step has failed.
    bool wait(int counter, uint32_t target, uint32_t arrivals_a_step, const std::byte* ahead, int ahead_lines) {
        Counter& awaited = counters[counter];
        const uint32_t base = epoch * arrivals_a_step;
        const bool has_come = await(
            awaited, base + target, patience,
            [=](int spin) {
                if (spin < ahead_lines) __builtin_prefetch(ahead + 64 * spin, 0, 2);
            },
            [this] { return failure->is_set(); });
        if (!has_come)
            failure->set("worker %d, instruction %d: counter %d has %u of %u arrivals after %.1f s", index,
                         at->load(), counter, awaited.arrivals.load() - base, target, patience.limit_ns * 1e-9);
        return has_come;
    }

    void signal(int counter) { arrive(counters[counter]); }
};

template <class Step>
using Body = bool (*)(Worker<Step>&);

// One thread a worker, and what they share. `run` is called by one thread at a time.
template <class Step>
class Crew {
   public:
    Crew(int num_workers, size_t scratch_bytes, int num_counters, Patience patience)
        : num_workers_(num_workers),
          patience_(patience),
          counters_(new Counter[num_counters]),
          desks_(new Desk[num_workers]) {
        for (int i = 0; i < num_workers; i++)
            desks_[i].scratch = static_cast<std::byte*>(aligned_alloc(4096, (scratch_bytes + 4095) / 4096 * 4096));
        for (int i = 1; i < num_workers; i++) hire(i);
    }

    // Joins the workers. Where one is stuck for longer than a wait may last, it is left behind: false, and
    // then nothing it may touch can be freed.
    bool close() {
        is_closing_.store(true, std::memory_order_release);
        arrive(start_);
        timespec deadline;
        clock_gettime(CLOCK_REALTIME, &deadline);
        deadline.tv_sec += 2 + patience_.limit_ns / 1000000000;
        bool is_clean = true;
        for (pthread_t thread : threads_)
            if (pthread_timedjoin_np(thread, nullptr, &deadline) != 0) {
                pthread_detach(thread);
                is_clean = false;
            }
        threads_.clear();
        if (is_clean)
            for (int i = 0; i < num_workers_; i++) free(desks_[i].scratch);
        return is_clean;
    }

    // False: the step failed, see `failure`.
    bool run(Step& step, const Body<Step>* bodies, int first_counter, uint32_t epoch, Stamp* const* stamps) {
        if (failure.is_set()) return false;
        step_ = &step;
        bodies_ = bodies;
        first_counter_ = first_counter;
        epoch_ = epoch;
        stamps_ = stamps;
        steps_++;
        arrive(start_);
        work(0);
        await_others();
        return !failure.is_set();
    }

    Failure failure;

   private:
    struct alignas(64) Desk {
        std::atomic<int32_t> at{-1};
        std::byte* scratch = nullptr;
        Counter done;
    };

    struct Seat {
        Crew* crew;
        int index;
    };

    void hire(int index) {
        Seat* seat = new Seat{this, index};
        const auto enter = [](void* argument) -> void* {
            const std::unique_ptr<Seat> seat(static_cast<Seat*>(argument));
            seat->crew->serve(seat->index);
            return nullptr;
        };
        pthread_t thread;
        if (pthread_create(&thread, nullptr, enter, seat) == 0) {
            threads_.push_back(thread);
        } else {
            delete seat;
            failure.set("cannot start worker thread %d", index);
        }
    }

    void work(int index) {
        Desk& desk = desks_[index];
        Worker<Step> worker{index,        step_,     counters_.get() + first_counter_,
                            epoch_,       desk.scratch, &failure,
                            patience_,    stamps_ ? stamps_[index] : nullptr, &desk.at};
        bodies_[index](worker);
    }

    void serve(int index) {
        char name[16];
        snprintf(name, sizeof name, "headrace-%d", index);
        pthread_setname_np(pthread_self(), name);
        // A step follows the one before within a host's turn: spinning that long saves the wake-up.
        constexpr int kTurns = 3;  // as long as so many waits of a step
        const Patience idle{kTurns * patience_.spins, int64_t{1000000000}};
        for (uint32_t next = 1;; next++) {
            while (!await(start_, next, idle, [](int) {}, [] { return false; })) {
            }
            if (is_closing_.load(std::memory_order_acquire)) return;
            work(index);
            arrive(desks_[index].done);
        }
    }

    void await_others() {
        // A worker that gave up reports after its own patience; it gets as much again to do so.
        const Patience patience{patience_.spins, 2 * patience_.limit_ns};
        for (int i = 1; i < num_workers_; i++)
            if (!await(desks_[i].done, steps_, patience, [](int) {}, [] { return false; }))
                failure.set("worker %d has not finished the step: it is at instruction %d after %.1f s", i,
                            desks_[i].at.load(), patience.limit_ns * 1e-9);
    }

    const int num_workers_;
    const Patience patience_;
    std::unique_ptr<Counter[]> counters_;
    std::unique_ptr<Desk[]> desks_;
    Counter start_;
    std::atomic<bool> is_closing_{false};
    uint32_t steps_ = 0;
    Step* step_ = nullptr;
    const Body<Step>* bodies_ = nullptr;
    int first_counter_ = 0;
    uint32_t epoch_ = 0;
    Stamp* const* stamps_ = nullptr;
    std::vector<pthread_t> threads_;
};

}  // namespace headrace
