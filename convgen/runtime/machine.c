/* Measures the machine it runs on; not part of exported libraries.

   machine THREADS [NAME BYTES]...

   prints "peak X", f32 operations per second with every thread at fused multiply-adds; "peak_i8 X" and
   "peak_bf16 X", the same of the instruction that adds most products of bytes or of bf16 at once, where
   there is one; and for each NAME "NAME X", bytes per second that the threads read, each over its own
   buffer of BYTES.
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
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif
typedef float vec __attribute__((vector_size(VECTOR)));
typedef int ivec __attribute__((vector_size(VECTOR)));

enum { STEP_REPEATS = 24, READ_REPEATS = 12, STEPS = 4 << 20, READ = 64 << 20, HUGE_PAGE = 2 << 20 };

static volatile float factor = 0.5f, addend = 1.0f; /* the compiler must not know them */
static volatile int sink;

/* Sums of f32, of four products of bytes, of two of 16-bit integers or bf16: their vector, how many f32
   or words it has, products of a word, and what adds to it. */
typedef vec f32_sums;
#define F32_STEP(sums) ((sums) * a + b)

#if defined(__AVX512VNNI__)
typedef __m512i i8_sums;
#define I8_DEPTH 4
#define I8_STEP(sums) _mm512_dpbusd_epi32(sums, (__m512i)a, (__m512i)b)
#elif defined(__AVXVNNI__)
typedef __m256i i8_sums;
#define I8_DEPTH 4
#define I8_STEP(sums) _mm256_dpbusd_avx_epi32(sums, (__m256i)a, (__m256i)b)
#elif defined(__AVX512BW__)
typedef __m512i i8_sums;
#define I8_DEPTH 2
#define I8_STEP(sums) _mm512_add_epi32(sums, _mm512_madd_epi16((__m512i)a, sums))
#elif defined(__AVX2__)
typedef __m256i i8_sums;
#define I8_DEPTH 2
#define I8_STEP(sums) _mm256_add_epi32(sums, _mm256_madd_epi16((__m256i)a, sums))
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t i8_sums;
#define I8_DEPTH 4
#define I8_STEP(sums) vdotq_s32(sums, (int8x16_t)a, (int8x16_t)b)
#endif

#if defined(__AVX512BF16__)
typedef __m512 bf16_sums;
#define BF16_DEPTH 2
#define BF16_STEP(sums) _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b)
#endif

/* N independent chains: enough of them hide the latency of a step, too many spill. */
#define CHAINS(KIND, STEP, N)                                                                      \
    static void KIND##_chains##N(const void *buffer, size_t bytes) {                               \
        (void)buffer, (void)bytes;                                                                 \
        vec a = (vec){0} + factor, b = (vec){0} + addend, sum = {0};                               \
        KIND##_sums acc[N];                                                                        \
        for (int i = 0; i < N; i++) acc[i] = (KIND##_sums)(b * (float)i);                          \
        for (int round = 0; round < STEPS / N; round++)                                            \
            _Pragma("GCC unroll 32") for (int i = 0; i < N; i++) acc[i] = STEP(acc[i]);            \
        for (int i = 0; i < N; i++) sum += (vec)acc[i];                                            \
        sink = sum[0] > 0;                                                                         \
    }
#define ALL_CHAINS(KIND, STEP)                                                                     \
    CHAINS(KIND, STEP, 6) CHAINS(KIND, STEP, 8) CHAINS(KIND, STEP, 10)                             \
    CHAINS(KIND, STEP, 12) CHAINS(KIND, STEP, 16) CHAINS(KIND, STEP, 24)                           \
    static const chains KIND##_work[] = {{KIND##_chains6, 6}, {KIND##_chains8, 8},                 \
        {KIND##_chains10, 10}, {KIND##_chains12, 12}, {KIND##_chains16, 16}, {KIND##_chains24, 24}};

typedef struct { void (*work)(const void *, size_t); int number; } chains;
ALL_CHAINS(f32, F32_STEP)
#ifdef I8_DEPTH
ALL_CHAINS(i8, I8_STEP)
#endif
#ifdef BF16_DEPTH
ALL_CHAINS(bf16, BF16_STEP)
#endif

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
    double taken[STEP_REPEATS];
} worker;

/* The time that this thread has had of a core: other programs' turns do not count, waiting for memory does. */
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
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
        double begin = now();
        of->work(buffer, of->bytes);
        self->taken[repeat] = now() - begin;
    }
    free(buffer);
    return NULL;
}

/* The shortest repeat, of the slowest thread. */
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
        double taken = 0;
        for (int i = 0; i < of->threads; i++)
            if (workers[i].taken[repeat] > taken) taken = workers[i].taken[repeat];
        if (taken < best) best = taken;
    }
    free(workers);
    return best;
}

/* Prints the operations per second of the fastest number of chains. */
static void print_peak(const char *name, const chains *work, int count, int products, int threads) {
    double peak = 0;
    for (int i = 0; i < count; i++) {
        phase steps = {.work = work[i].work, .threads = threads, .repeats = STEP_REPEATS};
        double made = (double)(STEPS / work[i].number) * work[i].number * threads;
        double rate = made * 2 * products / seconds(&steps);
        if (rate > peak) peak = rate;
    }
    printf("%s %.0f\n", name, peak);
}

#define COUNT(work) (int)(sizeof work / sizeof *work)

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    print_peak("peak", f32_work, COUNT(f32_work), VECTOR / sizeof(float), threads);
#ifdef I8_DEPTH
    print_peak("peak_i8", i8_work, COUNT(i8_work), sizeof(i8_sums) / 4 * I8_DEPTH, threads);
#endif
#ifdef BF16_DEPTH
    print_peak("peak_bf16", bf16_work, COUNT(bf16_work), sizeof(bf16_sums) / 4 * BF16_DEPTH, threads);
#endif
    for (int i = 2; i + 1 < argc; i += 2) {
        phase reading = {.work = read_all, .threads = threads, .repeats = READ_REPEATS};
        reading.bytes = strtoull(argv[i + 1], NULL, 10) / (8 * VECTOR) * (8 * VECTOR);
        printf("%s %.0f\n", argv[i], (double)reading.bytes * passes(reading.bytes) * threads / seconds(&reading));
    }
    return 0;
}
