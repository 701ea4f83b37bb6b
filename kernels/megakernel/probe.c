/* Measures what a machine description needs of a CPU: read bandwidth of one thread and of all, and how long
 * an arrival takes to reach another thread. Prints three numbers: GB/s, GB/s, microseconds.
 * usage: probe THREADS MEGABYTES_A_THREAD */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_THREADS = 256, PASSES = 4, BATCHES = 20, ROUNDS = 200 };
static const double GIVE_UP_S = 0.5;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
    uint64_t *words;
    size_t count;
    uint64_t sum;
    double begin_s, end_s; /* by the reader's own clock: another thread may be told of either too late */
    pthread_barrier_t *start;
} Reader;

static void *read_all(void *argument) {
    Reader *reader = argument;
    uint64_t sums[8] = {0};
    pthread_barrier_wait(reader->start);
    reader->begin_s = now_s();
    for (size_t i = 0; i < reader->count; i += 8)
        for (int lane = 0; lane < 8; lane++) sums[lane] += reader->words[i + (size_t)lane];
    reader->end_s = now_s();
    for (int lane = 0; lane < 8; lane++) reader->sum += sums[lane];
    return NULL;
}

static double bandwidth_gb_s(Reader *readers, int threads) {
    double best = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        pthread_t ids[MAX_THREADS];
        pthread_barrier_t start;
        pthread_barrier_init(&start, NULL, (unsigned)threads);
        for (int i = 0; i < threads; i++) {
            readers[i].start = &start;
            if (pthread_create(&ids[i], NULL, read_all, &readers[i])) exit(3);
        }
        double begin = 0, end = 0;
        for (int i = 0; i < threads; i++) {
            pthread_join(ids[i], NULL);
            if (i == 0 || readers[i].begin_s < begin) begin = readers[i].begin_s;
            if (i == 0 || readers[i].end_s > end) end = readers[i].end_s;
        }
        double bytes = (double)threads * (double)readers[0].count * sizeof(uint64_t);
        double rate = bytes / (end - begin) / 1e9;
        if (rate > best) best = rate;
        pthread_barrier_destroy(&start);
    }
    return best;
}

static _Alignas(128) atomic_int ping;
static _Alignas(128) atomic_int pong;

/* Spins until the flag has the value; 0 when that took too long. */
static int await(atomic_int *flag, int value) {
    double give_up = now_s() + GIVE_UP_S;
    for (unsigned spins = 1; atomic_load_explicit(flag, memory_order_acquire) != value; spins++)
        if (spins % 4096 == 0 && now_s() > give_up) return 0;
    return 1;
}

static void *answer(void *unused) {
    (void)unused;
    for (int i = 1; i <= BATCHES * ROUNDS; i++) {
        if (!await(&ping, i)) break;
        atomic_store_explicit(&pong, i, memory_order_release);
    }
    return NULL;
}

/* Half of the quickest batch's round trip: what an undisturbed pair of cores needs. */
static double sync_us(void) {
    pthread_t id;
    double best = 1e9;
    int round = 0;
    if (pthread_create(&id, NULL, answer, NULL)) exit(3);
    for (int batch = 0; batch < BATCHES; batch++) {
        double begin = now_s();
        for (int i = 0; i < ROUNDS; i++) {
            atomic_store_explicit(&ping, ++round, memory_order_release);
            if (!await(&pong, round)) goto done;
        }
        double each = (now_s() - begin) * 1e6 / (2.0 * ROUNDS);
        if (each < best) best = each;
    }
done:
    pthread_join(id, NULL);
    return best < 1e9 ? best : 0;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    int threads = atoi(argv[1]);
    size_t bytes = (size_t)atoi(argv[2]) << 20;
    if (threads < 1 || threads > MAX_THREADS || bytes == 0) return 2;
    Reader readers[MAX_THREADS];
    memset(readers, 0, sizeof readers);
    for (int i = 0; i < threads; i++) {
        readers[i].words = aligned_alloc(4096, bytes);
        if (!readers[i].words) return 3;
        memset(readers[i].words, i + 1, bytes);
        readers[i].count = bytes / sizeof(uint64_t);
    }
    double one = bandwidth_gb_s(readers, 1);
    double all = bandwidth_gb_s(readers, threads);
    uint64_t sum = 0;
    for (int i = 0; i < threads; i++) sum += readers[i].sum;
    fprintf(stderr, "%llu\n", (unsigned long long)sum);
    printf("%.3f %.3f %.4f\n", one, all, threads > 1 ? sync_us() : 0.0);
    return 0;
}
