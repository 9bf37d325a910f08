/* Measures the machine it runs on; not part of exported libraries.

   machine THREADS [NAME BYTES]...

   prints "peak X", f32 operations per second with every thread at fused multiply-adds, and for each
   NAME "NAME X", bytes per second that the threads read, each over its own buffer of BYTES.
   Every number is the best of some repeats: noise only ever takes away. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif
typedef float vec __attribute__((vector_size(VECTOR)));
typedef int ivec __attribute__((vector_size(VECTOR)));

enum { FMA_REPEATS = 24, READ_REPEATS = 12, FMAS = 4 << 20, READ = 64 << 20, HUGE_PAGE = 2 << 20 };

static volatile float factor = 0.5f, addend = 1.0f; /* the compiler must not know them */
static volatile int sink;

/* N independent chains: enough of them hide the latency of an FMA, too many spill. */
#define FMA(N)                                                                                     \
    static void fma##N(const void *buffer, size_t bytes) {                                         \
        (void)buffer, (void)bytes;                                                                 \
        vec a = (vec){0} + factor, b = (vec){0} + addend, acc[N], sum = {0};                       \
        for (int i = 0; i < N; i++) acc[i] = b * (float)i;                                         \
        for (int round = 0; round < FMAS / N; round++)                                             \
            _Pragma("GCC unroll 32") for (int i = 0; i < N; i++) acc[i] = acc[i] * a + b;          \
        for (int i = 0; i < N; i++) sum += acc[i];                                                 \
        sink = (int)sum[0];                                                                        \
    }
FMA(6) FMA(8) FMA(10) FMA(12) FMA(16) FMA(24)

static size_t passes(size_t bytes) { return bytes < READ ? READ / bytes : 1; }

static void read_all(const void *buffer, size_t bytes) {
    const ivec *p = buffer;
    ivec acc[8] = {{0}};
    for (size_t pass = passes(bytes); pass--;) {
        for (size_t i = 0; i < bytes / VECTOR; i += 8)
            _Pragma("GCC unroll 8") for (int j = 0; j < 8; j++) acc[j] ^= p[i + j];
        __asm__ volatile("" ::: "memory"); /* every pass reads again */
    }
    for (int j = 1; j < 8; j++) acc[0] ^= acc[j];
    sink = acc[0][0];
}

typedef struct {
    void (*work)(const void *, size_t);
    size_t bytes;
    int threads, repeats;
    atomic_int arrived;
} phase;

typedef struct {
    pthread_t thread;
    phase *of;
    double begin[FMA_REPEATS], end[FMA_REPEATS];
} worker;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void *run(void *argument) {
    worker *self = argument;
    phase *of = self->of;
    void *buffer = NULL;
    if (of->bytes) {
        buffer = aligned_alloc(HUGE_PAGE, (of->bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
        if (!buffer) fail("a buffer");
        madvise(buffer, of->bytes, MADV_HUGEPAGE);
        memset(buffer, 1, of->bytes); /* by its reader, so that it lies in memory near it */
    }
    for (int repeat = 0; repeat < of->repeats; repeat++) {
        atomic_fetch_add(&of->arrived, 1);
        while (atomic_load(&of->arrived) < (repeat + 1) * of->threads) sched_yield();
        self->begin[repeat] = now();
        of->work(buffer, of->bytes);
        self->end[repeat] = now();
    }
    free(buffer);
    return NULL;
}

/* The shortest repeat, from the first thread's begin to the last one's end. */
static double seconds(phase *of) {
    worker *workers = calloc(of->threads, sizeof *workers);
    if (!workers) fail("workers");
    for (int i = 0; i < of->threads; i++) {
        workers[i].of = of;
        if (pthread_create(&workers[i].thread, NULL, run, &workers[i])) fail("a thread");
    }
    for (int i = 0; i < of->threads; i++) pthread_join(workers[i].thread, NULL);
    double best = 1e30;
    for (int repeat = 0; repeat < of->repeats; repeat++) {
        double begin = workers[0].begin[repeat], end = workers[0].end[repeat];
        for (int i = 1; i < of->threads; i++) {
            if (workers[i].begin[repeat] < begin) begin = workers[i].begin[repeat];
            if (workers[i].end[repeat] > end) end = workers[i].end[repeat];
        }
        if (end - begin < best) best = end - begin;
    }
    free(workers);
    return best;
}

int main(int argc, char **argv) {
    static const struct { void (*work)(const void *, size_t); int chains; } kernels[] = {
        {fma6, 6}, {fma8, 8}, {fma10, 10}, {fma12, 12}, {fma16, 16}, {fma24, 24}};
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    double peak = 0;
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
        phase fma = {.work = kernels[i].work, .threads = threads, .repeats = FMA_REPEATS};
        double fmas = (double)(FMAS / kernels[i].chains) * kernels[i].chains * threads;
        double rate = fmas * 2 * (VECTOR / sizeof(float)) / seconds(&fma);
        if (rate > peak) peak = rate;
    }
    printf("peak %.0f\n", peak);
    for (int i = 2; i + 1 < argc; i += 2) {
        phase reading = {.work = read_all, .threads = threads, .repeats = READ_REPEATS};
        reading.bytes = strtoull(argv[i + 1], NULL, 10) / (8 * VECTOR) * (8 * VECTOR);
        printf("%s %.0f\n", argv[i], (double)reading.bytes * passes(reading.bytes) * threads / seconds(&reading));
    }
    return 0;
}
