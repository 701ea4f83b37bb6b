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

enum { MAX_THREADS = 256, PASSES = 12, WINDOWS = 8, BATCHES = 20, ROUNDS = 200 };
static const double GIVE_UP_S = 0.5;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A pass is read in windows that all readers begin together, and the best tenth's least counts: what else runs
 * disturbs most of a busy machine's windows, and a few of any are quicker than steps, which last longer, can be. */
typedef struct {
    uint64_t *words;
    size_t count;
    uint64_t sum;
    /* by the reader's own clock: another thread may be told of either too late */
    double begin_s[PASSES * WINDOWS], end_s[PASSES * WINDOWS];
    pthread_barrier_t *start;
} Reader;

static void *read_all(void *argument) {
    Reader *reader = argument;
    size_t each = reader->count / WINDOWS;
    for (int window = 0; window < PASSES * WINDOWS; window++) {
        const uint64_t *words = reader->words + (size_t)(window % WINDOWS) * each;
        uint64_t sums[8] = {0};
        pthread_barrier_wait(reader->start);
        reader->begin_s[window] = now_s();
        for (size_t i = 0; i < each; i += 8)
            for (int lane = 0; lane < 8; lane++) sums[lane] += words[i + (size_t)lane];
        reader->end_s[window] = now_s();
        for (int lane = 0; lane < 8; lane++) reader->sum += sums[lane];
    }
    return NULL;
}

static int descending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

static double bandwidth_gb_s(Reader *readers, int threads) {
    pthread_t ids[MAX_THREADS];
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, (unsigned)threads);
    for (int i = 0; i < threads; i++) {
        readers[i].start = &start;
        if (pthread_create(&ids[i], NULL, read_all, &readers[i])) exit(3);
    }
    for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
    pthread_barrier_destroy(&start);
    double bytes = (double)threads * (double)(readers[0].count / WINDOWS) * sizeof(uint64_t);
    double rates[PASSES * WINDOWS];
    for (int window = 0; window < PASSES * WINDOWS; window++) {
        double begin = readers[0].begin_s[window], end = readers[0].end_s[window];
        for (int i = 1; i < threads; i++) {
            if (readers[i].begin_s[window] < begin) begin = readers[i].begin_s[window];
            if (readers[i].end_s[window] > end) end = readers[i].end_s[window];
        }
        rates[window] = bytes / (end - begin) / 1e9;
    }
    qsort(rates, PASSES * WINDOWS, sizeof rates[0], descending);
    return rates[PASSES * WINDOWS / 10];
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
    static Reader readers[MAX_THREADS];
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
