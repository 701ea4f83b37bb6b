// Counters that workers signal and wait for. A wait spins a bounded time, sleeps on a futex, and gives up.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace headrace {

// Arrivals are never reset: a step's targets count from what all earlier steps have left, modulo 2^32.
struct alignas(64) Counter {
    std::atomic<uint32_t> arrivals{0};
    std::atomic<uint32_t> sleepers{0};
};

inline bool has_reached(uint32_t arrivals, uint32_t target) {
    return static_cast<int32_t>(arrivals - target) >= 0;
}

inline int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

inline void wake_sleepers(Counter& counter) {
    syscall(SYS_futex, &counter.arrivals, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Everything this thread wrote before is visible to whoever waits for the arrival.
inline void arrive(Counter& counter) {
    counter.arrivals.fetch_add(1, std::memory_order_seq_cst);
    if (counter.sleepers.load(std::memory_order_seq_cst) != 0) wake_sleepers(counter);
}

// Returns after at most `limit_ns`, or earlier for no reason at all: the caller looks again.
inline void sleep_while_equal(Counter& counter, uint32_t seen, int64_t limit_ns) {
    const timespec limit{limit_ns / 1000000000, limit_ns % 1000000000};
    counter.sleepers.fetch_add(1, std::memory_order_seq_cst);
    if (counter.arrivals.load(std::memory_order_seq_cst) == seen)
        syscall(SYS_futex, &counter.arrivals, FUTEX_WAIT_PRIVATE, seen, &limit, nullptr, 0);
    counter.sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

// How long a wait spins before it sleeps, and how long it lasts altogether.
struct Patience {
    int spins;
    int64_t limit_ns;
};

// True once `counter` has reached `target`; false where it is out of patience or `is_given_up()` says so.
// `while_spinning(i)` is called once a spin, to put the time to use.
template <class WhileSpinning, class IsGivenUp>
bool await(Counter& counter, uint32_t target, const Patience& patience, WhileSpinning while_spinning,
           IsGivenUp is_given_up) {
    for (int i = 0; i < patience.spins; i++) {
        if (has_reached(counter.arrivals.load(std::memory_order_acquire), target)) return true;
        while_spinning(i);
        pause_briefly();
    }
    constexpr int64_t kNapNs = 20000000;  // a lost wake-up or a failure elsewhere costs one nap
    const int64_t deadline_ns = now_ns() + patience.limit_ns;
    while (true) {
        const uint32_t seen = counter.arrivals.load(std::memory_order_acquire);
        if (has_reached(seen, target)) return true;
        const int64_t left_ns = deadline_ns - now_ns();
        if (left_ns <= 0 || is_given_up()) return false;
        sleep_while_equal(counter, seen, left_ns < kNapNs ? left_ns : kNapNs);
    }
}

}  // namespace headrace
