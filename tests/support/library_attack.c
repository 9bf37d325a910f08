/* A hostile caller of an exported library: the kernel of planted.py, behind its generated header.
 *
 *   library_attack SEED COUNT [fork]
 *
 * makes COUNT calls with arguments that are wrong in one to three ways, then a thousand right ones
 * from many threads at once. Prints what was not as it should be and returns non-zero then. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "planted.h"
#include "runtime.h" /* a pool from inside: none of its library's making */

static atomic_int failures;

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition) && atomic_fetch_add(&failures, 1) < 20) {                                 \
            printf("line %d: %s: ", __LINE__, #condition);                                         \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
        }                                                                                          \
    } while (0)

static uint64_t state;

static uint64_t random_bits(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static size_t below(size_t end) { return random_bits() % end; }

/* ---- buffers ----------------------------------------------------------------------------------- */

enum { THREADS = 3, CALLERS = 40, CALLS = 26 };

typedef struct {
    void *start;
    size_t size, alignment;
    void *before; /* what it held before the call */
} buffer;

/* As many bytes as are needed and not one more, so that the address sanitizer sees each access beyond. */
static buffer make(size_t size, size_t alignment)
{
    buffer made = {NULL, size, alignment, malloc(size)};
    if (made.before == NULL || posix_memalign(&made.start, alignment < 8 ? 8 : alignment, size) != 0)
        abort();
    for (size_t i = 0; i < size; ++i)
        ((unsigned char *)made.start)[i] = (unsigned char)(0xA5 ^ i);
    return made;
}

static void fill(buffer b, int seed)
{
    for (size_t i = 0; i < b.size / sizeof(float); ++i)
        ((float *)b.start)[i] = (float)((int)(i * 7 + (size_t)seed * 5) % 9 - 4);
}

static void remember(buffer *buffers, int count)
{
    for (int i = 0; i < count; ++i)
        memcpy(buffers[i].before, buffers[i].start, buffers[i].size);
}

static int unchanged(const buffer *buffers, int count)
{
    for (int i = 0; i < count; ++i)
        if (memcmp(buffers[i].before, buffers[i].start, buffers[i].size) != 0)
            return 0;
    return 1;
}

static void discard(buffer *buffers, int count)
{
    for (int i = 0; i < count; ++i) {
        free(buffers[i].start);
        free(buffers[i].before);
    }
}

/* ---- what can be wrong -------------------------------------------------------------------------- */

/* An argument of a call: where its pointer and its size are, and which buffer it should be. */
typedef struct {
    const void **pointer;
    size_t *size;
    buffer right;
    int written, at_least; /* more than its size is welcome */
    int touched;
} argument;

#define BIT(status) (1u << (status))

/* Make one argument wrong that is still right; returns the statuses that tell of it, 0 where it stays right. */
static unsigned corrupt(argument *arguments, int count)
{
    argument *a = &arguments[below((size_t)count)];
    if (a->touched)
        return 0;
    a->touched = 1;
    switch (below(6)) {
    case 0: /* nothing */
        *a->pointer = NULL;
        return BIT(CONVGEN_NULL_POINTER);
    case 1: /* nothing, and it says so */
        *a->pointer = NULL;
        *a->size = 0;
        return BIT(CONVGEN_NULL_POINTER);
    case 2: /* short */
        *a->size = below(a->right.size);
        return BIT(CONVGEN_WRONG_SIZE);
    case 3: /* another layer's, or nonsense */
        *a->size = a->right.size + 1 + (below(2) ? below(4096) : SIZE_MAX / 2 + below(SIZE_MAX / 4));
        return a->at_least ? 0 : BIT(CONVGEN_WRONG_SIZE);
    case 4: /* misaligned */
        *a->pointer = (char *)a->right.start + 1 + below(a->right.alignment - 1);
        return BIT(CONVGEN_MISALIGNED);
    default: { /* overlapping: a written one moves onto another one */
        argument *other = &arguments[below((size_t)count)];
        if (!a->written || other == a || other->touched)
            return 0;
        other->touched = 1;
        const size_t steps = other->right.size / 64 + 1;
        const char *start = (char *)other->right.start + 64 * below(steps);
        if (start >= (char *)other->right.start + other->right.size)
            start = other->right.start;
        *a->pointer = start - (uintptr_t)start % a->right.alignment;
        if ((char *)*a->pointer + a->right.size <= (char *)other->right.start)
            *a->pointer = other->right.start; /* rounded down to before it */
        return BIT(CONVGEN_OVERLAP) | ((uintptr_t)*a->pointer % a->right.alignment ? BIT(CONVGEN_MISALIGNED) : 0);
    }
    }
}

static void judge(const char *what, int status, unsigned expected, buffer *buffers, int count)
{
    if (expected == 0) {
        CHECK(status == CONVGEN_OK, "%s: %s", what, planted_error(status));
        return;
    }
    CHECK(status > 0 && status < 32 && (expected & BIT(status)), "%s: status %d, expected one of %#x", what, status, expected);
    CHECK(unchanged(buffers, count), "%s: a refused call wrote", what);
}

/* ---- packing ------------------------------------------------------------------------------------ */

static convgen_sizes sizes;

static void attack_pack(void)
{
    buffer b[] = {make(sizes.weights, 4), make(sizes.bias, 4), make(sizes.packed, 64)};
    fill(b[0], 1), fill(b[1], 2);
    convgen_pack_args args = {.weights = b[0].start, .weights_size = b[0].size, .bias = b[1].start,
                              .bias_size = b[1].size, .packed = b[2].start, .packed_size = b[2].size};
    argument arguments[] = {
        {&args.weights, &args.weights_size, b[0], 0, 0, 0},
        {&args.bias, &args.bias_size, b[1], 0, 0, 0},
        {(const void **)&args.packed, &args.packed_size, b[2], 1, 0, 0},
    };
    unsigned expected = 0;
    for (size_t i = below(4); i > 0; --i)
        expected |= corrupt(arguments, 3);
    if (below(8) == 0) { /* a tensor that the layer does not have */
        args.slope = below(2) ? b[1].start : NULL;
        args.slope_size = args.slope == NULL ? 20 : below(2) * 20;
        expected |= BIT(CONVGEN_WRONG_SIZE);
    }
    convgen_pool foreign = {.abi = CONVGEN_ABI + 1, .threads = 1 << 30};
    if (below(8) == 0) {
        args.pool = &foreign;
        expected |= BIT(CONVGEN_BAD_ARGUMENT);
    }
    remember(b, 3);
    const int is_stored = below(2) == 0, status = is_stored ? planted_pack(&args) : planted_repack(&args);
    judge("pack", status, expected, b, 3);
    if (expected == 0)
        CHECK((planted_verify_packed(b[2].start, b[2].size) == CONVGEN_OK) == is_stored, "what was packed");
    discard(b, 3);
}

/* Of the header's 64 bytes a run reads all but the checksum, at 40. */
static void attack_verify(const void *packed)
{
    buffer b = make(sizes.packed, 64);
    memcpy(b.start, packed, b.size);
    convgen_run_args args = {0};
    args.packed_size = b.size;
    argument whole = {&args.packed, &args.packed_size, b, 0, 0, 0};
    args.packed = b.start;
    unsigned expected = below(2) ? corrupt(&whole, 1) : 0;
    if (below(2)) {
        ((unsigned char *)b.start)[below(b.size)] ^= 1u << below(8);
        expected |= BIT(CONVGEN_WRONG_PACKED);
    }
    remember(&b, 1);
    judge("verify", planted_verify_packed(args.packed, args.packed_size), expected, &b, 1);
    discard(&b, 1);
}

/* ---- running ------------------------------------------------------------------------------------ */

static buffer inputs[3]; /* src, packed, residual */
static float *result;

static void attack_run(convgen_pool *pool)
{
    convgen_sizes needed;
    CHECK(planted_sizes(pool != NULL ? THREADS : 1, &needed) == CONVGEN_OK, "sizes");
    buffer b[] = {make(sizes.src, 4), make(sizes.packed, 64), make(sizes.residual, 4), make(sizes.dst, 4),
                  make(needed.workspace, 64)};
    for (int i = 0; i < 3; ++i)
        memcpy(b[i].start, inputs[i].start, b[i].size);
    convgen_run_args args = {b[0].start, b[0].size, b[1].start, b[1].size, b[2].start, b[2].size, b[3].start, b[3].size,
                             b[4].start, b[4].size, pool};
    argument arguments[] = {
        {&args.src, &args.src_size, b[0], 0, 0, 0},
        {&args.packed, &args.packed_size, b[1], 0, 0, 0},
        {&args.residual, &args.residual_size, b[2], 0, 0, 0},
        {(const void **)&args.dst, &args.dst_size, b[3], 1, 0, 0},
        {(const void **)&args.workspace, &args.workspace_size, b[4], 1, 1, 0},
    };
    unsigned expected = 0;
    for (size_t i = below(4); i > 0; --i)
        expected |= corrupt(arguments, 5);
    if (below(4) == 0) { /* the weights of another layer, another version, or damaged ones */
        size_t at = below(56);
        at += at >= 40 ? 8 : 0;
        ((unsigned char *)b[1].start)[at] ^= 1u << below(8);
        expected |= BIT(CONVGEN_WRONG_PACKED);
    }
    convgen_pool foreign = {.abi = CONVGEN_ABI + 1, .threads = 1 << 30};
    if (below(8) == 0) {
        args.pool = &foreign;
        expected |= BIT(CONVGEN_BAD_ARGUMENT);
    }
    remember(b, 5);
    const int status = planted_run(&args);
    judge("run", status, expected, b, 5);
    if (expected == 0) {
        CHECK(memcmp(b[3].start, result, b[3].size) == 0, "another result");
        CHECK(unchanged(b, 3), "an input was written");
    }
    discard(b, 5);
}

static void attack_the_rest(void)
{
    convgen_sizes found;
    memset(&found, 0xA5, sizeof found);
    const int threads = (int)random_bits() >> below(32);
    const int right = threads >= 1 && threads <= CONVGEN_MAX_THREADS;
    CHECK(planted_sizes(threads, &found) == (right ? CONVGEN_OK : CONVGEN_BAD_ARGUMENT), "%d threads", threads);
    CHECK(right ? found.src == sizes.src : found.src == (size_t)0xA5A5A5A5A5A5A5A5, "%d threads", threads);
    CHECK(planted_sizes(threads, NULL) == CONVGEN_NULL_POINTER, "no sizes");
    if (!right) {
        convgen_pool *pool = (convgen_pool *)&found;
        CHECK(planted_pool_create(threads, &pool) == CONVGEN_BAD_ARGUMENT && pool == NULL, "%d threads", threads);
        CHECK(planted_pool_create(threads, NULL) == CONVGEN_NULL_POINTER, "no pool");
    }
    CHECK(strlen(planted_error(threads)) > 5, "status %d has no text", threads);
    CHECK(planted_run(NULL) == CONVGEN_NULL_POINTER, "no arguments");
    CHECK(planted_pack(NULL) == CONVGEN_NULL_POINTER && planted_repack(NULL) == CONVGEN_NULL_POINTER, "no arguments");
    CHECK(planted_verify_packed(NULL, sizes.packed) == CONVGEN_NULL_POINTER, "no packed weights");
    CHECK(planted_check_cpu() == CONVGEN_OK, "this CPU");
}

/* ---- many callers ------------------------------------------------------------------------------- */

static pthread_barrier_t together;
static convgen_pool *shared;

static int run_once(convgen_pool *pool)
{
    buffer b[] = {make(sizes.dst, 4), make(sizes.workspace, 64)};
    const convgen_run_args args = {inputs[0].start, inputs[0].size, inputs[1].start, inputs[1].size,
                                   inputs[2].start, inputs[2].size, b[0].start,      b[0].size,
                                   b[1].start,      b[1].size,      pool};
    const int right = planted_run(&args) == CONVGEN_OK && memcmp(b[0].start, result, b[0].size) == 0;
    discard(b, 2);
    return right;
}

static void *call_often(void *number)
{
    const size_t kind = (size_t)number % 4; /* half of them share a pool, others have their own or none */
    convgen_pool *pool = kind < 2 ? shared : NULL;
    if (kind == 2)
        CHECK(planted_pool_create(2, &pool) == CONVGEN_OK, "a pool");
    pthread_barrier_wait(&together);
    for (int i = 0; i < CALLS; ++i)
        CHECK(run_once(pool), "caller %zu, call %d", (size_t)number, i);
    if (kind == 2)
        planted_pool_destroy(pool);
    return NULL;
}

static void child(void)
{
    convgen_pool *own = NULL;
    failures = 0;
    alarm(60);
    CHECK(run_once(shared), "on the parent's pool");
    CHECK(run_once(NULL), "on no pool");
    planted_pool_destroy(shared);
    CHECK(planted_pool_create(THREADS, &own) == CONVGEN_OK && run_once(own), "on its own pool");
    planted_pool_destroy(own);
    fflush(stdout);
    _exit(failures != 0);
}

/* With `forks`, while they call: a child has one thread, and pools that may have been in use. */
static void call_from_many_threads(int forks)
{
    pthread_t callers[CALLERS];
    pthread_barrier_init(&together, NULL, CALLERS + 1);
    for (size_t i = 0; i < CALLERS; ++i)
        if (pthread_create(&callers[i], NULL, call_often, (void *)i) != 0)
            abort();
    pthread_barrier_wait(&together);
    for (int i = 0; i < forks; ++i) {
        fflush(stdout);
        const pid_t pid = fork();
        if (pid == 0)
            child();
        int status = -1;
        CHECK(waitpid(pid, &status, 0) == pid && status == 0, "a child's status is %#x", status);
    }
    for (int i = 0; i < CALLERS; ++i)
        pthread_join(callers[i], NULL);
    pthread_barrier_destroy(&together);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    state = strtoull(argv[1], NULL, 10) * 2654435769u + 1;
    const long count = strtol(argv[2], NULL, 10);
    CHECK(planted_sizes(THREADS, &sizes) == CONVGEN_OK, "sizes");
    inputs[0] = make(sizes.src, 4), inputs[1] = make(sizes.packed, 64), inputs[2] = make(sizes.residual, 4);
    fill(inputs[0], 3), fill(inputs[2], 4);
    buffer weights = make(sizes.weights, 4), bias = make(sizes.bias, 4), dst = make(sizes.dst, 4);
    fill(weights, 1), fill(bias, 2);
    const convgen_pack_args pack = {.weights = weights.start, .weights_size = weights.size, .bias = bias.start,
                                    .bias_size = bias.size, .packed = inputs[1].start, .packed_size = inputs[1].size};
    CHECK(planted_pack(&pack) == CONVGEN_OK, "pack");
    buffer workspace = make(sizes.workspace, 64);
    const convgen_run_args run = {inputs[0].start, inputs[0].size, inputs[1].start, inputs[1].size,
                                  inputs[2].start, inputs[2].size, dst.start,       dst.size,
                                  workspace.start, workspace.size, NULL};
    CHECK(planted_run(&run) == CONVGEN_OK, "run");
    result = dst.start;
    CHECK(planted_pool_create(THREADS, &shared) == CONVGEN_OK, "pool");

    for (long i = 0; i < count; ++i) {
        attack_run(i % 2 ? shared : NULL);
        attack_pack();
        attack_verify(inputs[1].start);
        attack_the_rest();
    }
    call_from_many_threads(argc > 3 ? 6 : 0);
    CHECK(run_once(shared), "in the end");

    planted_pool_destroy(shared);
    discard(inputs, 3), discard(&weights, 1), discard(&bias, 1), discard(&dst, 1), discard(&workspace, 1);
    printf("%d failures\n", failures);
    return failures != 0;
}
