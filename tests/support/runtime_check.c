/* Runs the C runtime under functions that behave as generated code does. Built with the runtime's
 * sources, plain and under sanitizers; prints what failed and returns non-zero then. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime.h"

extern int (*__TVMBackendParallelLaunch)(convgen_lambda, void *, int);
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void *);
extern int (*__TVMFFIFunctionCall)(void);

static int failures;

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition)) {                                                    \
            printf("line %d: %s\n", __LINE__, #condition);                     \
            ++failures;                                                        \
        }                                                                      \
    } while (0)

enum { COUNT = 1000, MAIN = 4096, TASK = 1024, THREADS = 4, CALLERS = 8 };

/* dst = 2 * src + packed[0], through a copy of src in the workspace and a scratch per task. */
static uint64_t main_request = 4000, task_request = 1000;
static int fail_task = -1, call_service;
static atomic_int most_tasks, hold, held;

typedef struct {
    float *copy;
    const convgen_any *args;
} closure;

static convgen_dltensor *tensor(const convgen_any *args, int i) { return args[i].value.v_ptr; }

static int half_region(int task, convgen_group *group, void *data)
{
    closure *c = data;
    float *dst = tensor(c->args, 2)->data;
    const float bias = *(const float *)tensor(c->args, 1)->data;
    if (task == fail_task)
        return -1;
    while (task == 0 && atomic_load(&hold))
        atomic_store(&held, 1);
    if (group->num_task > atomic_load(&most_tasks))
        atomic_store(&most_tasks, group->num_task);
    float *scratch = __TVMBackendAllocWorkspace(1, 0, task_request, 2, 32);
    if (scratch == NULL)
        return -1;
    CHECK((uintptr_t)scratch % 64 == 0);
    memset(scratch, task + 1, task_request); /* a share of its own: the sanitizers see a clash */
    const int part = (COUNT + group->num_task - 1) / group->num_task;
    for (int i = task * part; i < COUNT && i < (task + 1) * part; ++i)
        dst[i] = 2 * c->copy[i] + bias;
    for (uint64_t i = 0; i < task_request; ++i)
        CHECK(((char *)scratch)[i] == (char)(task + 1));
    return __TVMBackendFreeWorkspace(1, 0, scratch);
}

static int nested(int task, convgen_group *group, void *data)
{
    (void)task, (void)group, (void)data;
    CHECK(group->num_task == 1);
    return 0;
}

static int outer(int task, convgen_group *group, void *data)
{
    const int failed = __TVMBackendParallelLaunch(nested, NULL, 0);
    return failed ? failed : half_region(task, group, data);
}

static int fake_main(void *self, const convgen_any *args, int32_t count, convgen_any *result)
{
    (void)self, (void)result;
    CHECK(count == 3 && args[0].type_index == 7 && tensor(args, 0)->ndim == 1 && tensor(args, 0)->shape[0] == COUNT);
    if (call_service)
        return __TVMFFIFunctionCall();
    closure c = {__TVMBackendAllocWorkspace(1, 0, main_request, 2, 32), args};
    if (c.copy == NULL)
        return -1;
    memcpy(c.copy, tensor(args, 0)->data, COUNT * sizeof(float));
    if (__TVMBackendParallelLaunch(half_region, &c, 0) != 0 || __TVMBackendParallelLaunch(outer, &c, 0) != 0)
        return -1; /* without freeing, as generated code does */
    return __TVMBackendFreeWorkspace(1, 0, c.copy);
}

static int fail_pack;

static int pack_region(int task, convgen_group *group, void *data)
{
    (void)task, (void)data;
    CHECK(group->num_task == 1);
    void *scratch = __TVMBackendAllocWorkspace(1, 0, 100, 2, 32);
    memset(scratch, 1, 100);
    return __TVMBackendFreeWorkspace(1, 0, scratch);
}

static int fake_pack(void *self, const convgen_any *args, int32_t count, convgen_any *result)
{
    (void)self, (void)result;
    CHECK(count == 2);
    void *a = __TVMBackendAllocWorkspace(1, 0, 1 << 20, 2, 32), *b = __TVMBackendAllocWorkspace(1, 0, 4, 2, 32);
    if (a == NULL || b == NULL || fail_pack || __TVMBackendAllocWorkspace(1, 0, UINT64_MAX, 2, 32) != NULL)
        return -1; /* a and b are left behind */
    CHECK((uintptr_t)a % 64 == 0 && (uintptr_t)b % 64 == 0);
    memset(a, 1, 1 << 20);
    *(float *)tensor(args, 1)->data = *(float *)tensor(args, 0)->data;
    return __TVMBackendParallelLaunch(pack_region, NULL, 0) || __TVMBackendFreeWorkspace(1, 0, b) ||
           __TVMBackendFreeWorkspace(1, 0, a);
}

static int cpu = 1;

static int cpu_supported(void) { return cpu; }

#define F32 {2, 32, 1}
static const int64_t shape[] = {COUNT}, one[] = {1};
static const convgen_tensor packed_tensors[] = {{1, F32, one, 4, 64}};
static const convgen_kernel kernel = {
    .src = {1, F32, shape, COUNT * 4, 0},
    .weights = {1, F32, one, 4, 0},
    .dst = {1, F32, shape, COUNT * 4, 0},
    .packed = packed_tensors,
    .packed_count = 1,
    .packed_size = 128,
    .workspace_main = MAIN,
    .workspace_task = TASK,
    .identity = {1, 2},
    .pack = fake_pack,
    .main = fake_main,
    .cpu_supported = cpu_supported,
    .version = "test",
};

static _Alignas(64) char packed[128];
static float src[COUNT];

static convgen_run_args arguments(float *dst, void *workspace, convgen_pool *pool)
{
    const int threads = pool ? pool->threads : 1;
    return (convgen_run_args){src, sizeof src,        packed,    sizeof packed, NULL,
                              0,   dst,  COUNT * sizeof(float), workspace, MAIN + TASK * (size_t)threads, pool};
}

static int right(const float *dst)
{
    for (int i = 0; i < COUNT; ++i)
        if (dst[i] != 2 * src[i] + 5)
            return 0;
    return 1;
}

static int run(convgen_pool *pool)
{
    float *dst = calloc(COUNT, sizeof(float));
    void *workspace = aligned_alloc(64, MAIN + TASK * THREADS);
    const convgen_run_args args = arguments(dst, workspace, pool);
    const int status = convgen_kernel_run(&kernel, &args);
    CHECK(status != CONVGEN_OK || right(dst));
    free(workspace);
    free(dst);
    return status;
}

static void *call_repeatedly(void *pool)
{
    for (int i = 0; i < 200; ++i)
        CHECK(run(pool) == CONVGEN_OK);
    return NULL;
}

static void check_callers(convgen_pool *pool)
{
    pthread_t callers[CALLERS];
    for (int i = 0; i < CALLERS; ++i)
        pthread_create(&callers[i], NULL, call_repeatedly, i % 4 == 3 ? NULL : pool);
    for (int i = 0; i < CALLERS; ++i)
        pthread_join(callers[i], NULL);
}

static void check_packing(void)
{
    const float weight = 5;
    convgen_pack_args args = {.weights = &weight, .weights_size = 4, .packed = packed, .packed_size = sizeof packed};
    fail_pack = 1;
    CHECK(convgen_kernel_pack(&kernel, &args) == CONVGEN_NO_MEMORY);
    CHECK(convgen_kernel_verify(&kernel, packed, sizeof packed) == CONVGEN_WRONG_PACKED);
    CHECK(run(NULL) == CONVGEN_WRONG_PACKED);
    fail_pack = 0;
    CHECK(convgen_kernel_pack(&kernel, &args) == CONVGEN_OK);
    CHECK(convgen_kernel_verify(&kernel, packed, sizeof packed) == CONVGEN_OK);
    packed[127] ^= 1;
    CHECK(convgen_kernel_verify(&kernel, packed, sizeof packed) == CONVGEN_WRONG_PACKED);
    packed[127] ^= 1;
    char stored[sizeof packed];
    memcpy(stored, packed, sizeof packed);
    CHECK(convgen_kernel_repack(&kernel, &args) == CONVGEN_OK);
    CHECK(memcmp(stored, packed, 40) == 0 && memcmp(stored + 48, packed + 48, sizeof packed - 48) == 0);
    CHECK(run(NULL) == CONVGEN_OK);
    CHECK(convgen_kernel_verify(&kernel, packed, sizeof packed) == CONVGEN_WRONG_PACKED);
    CHECK(convgen_kernel_pack(&kernel, &args) == CONVGEN_OK);
    CHECK(convgen_kernel_verify(&kernel, packed, sizeof packed) == CONVGEN_OK);
}

static void check_failures(convgen_pool *pool)
{
    task_request = TASK + 1; /* more than its share */
    CHECK(run(pool) == CONVGEN_INTERNAL);
    task_request = 1000;
    main_request = MAIN + 1;
    CHECK(run(pool) == CONVGEN_INTERNAL);
    main_request = UINT64_MAX;
    CHECK(run(pool) == CONVGEN_INTERNAL);
    main_request = 4000;
    fail_task = pool ? THREADS - 1 : 0;
    CHECK(run(pool) == CONVGEN_INTERNAL);
    fail_task = -1;
    call_service = 1;
    CHECK(run(pool) == CONVGEN_INTERNAL);
    call_service = 0;
    cpu = 0;
    CHECK(run(pool) == CONVGEN_UNSUPPORTED_CPU);
    cpu = 1;
    CHECK(run(pool) == CONVGEN_OK); /* none of it sticks */
}

static void *run_once(void *pool)
{
    CHECK(run(pool) == CONVGEN_OK);
    return NULL;
}

static atomic_int destroyed;

static void *destroy(void *pool)
{
    convgen_destroy_pool(pool);
    destroyed = 1;
    return NULL;
}

/* A pool that is destroyed during a call: the call ends first. */
static void check_destroy_waits(void)
{
    convgen_pool *pool = NULL;
    pthread_t caller, destroyer;
    CHECK(convgen_create_pool(THREADS, &pool) == CONVGEN_OK);
    hold = 1;
    pthread_create(&caller, NULL, run_once, pool);
    while (!atomic_load(&held))
        usleep(100);
    pthread_create(&destroyer, NULL, destroy, pool);
    usleep(20000);
    CHECK(!destroyed);
    hold = 0;
    pthread_join(caller, NULL);
    pthread_join(destroyer, NULL);
    CHECK(destroyed);
}

/* No memory for the stacks of so many threads: those that were made are gone again. */
static void check_limit(void)
{
    struct rlimit before, little;
    convgen_pool *pool = NULL;
    CHECK(getrlimit(RLIMIT_AS, &before) == 0);
    little = before;
    little.rlim_cur = 200 << 20;
    CHECK(setrlimit(RLIMIT_AS, &little) == 0);
    CHECK(convgen_create_pool(CONVGEN_MAX_THREADS, &pool) == CONVGEN_NO_MEMORY && pool == NULL);
    CHECK(setrlimit(RLIMIT_AS, &before) == 0);
    CHECK(convgen_create_pool(THREADS, &pool) == CONVGEN_OK && run(pool) == CONVGEN_OK);
    convgen_destroy_pool(pool);
}

static void check_fork(convgen_pool *pool)
{
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        convgen_pool *own = NULL;
        most_tasks = 0;
        CHECK(run(pool) == CONVGEN_OK && most_tasks == 1); /* the parent's threads are not here */
        convgen_destroy_pool(pool);
        CHECK(convgen_create_pool(THREADS, &own) == CONVGEN_OK);
        CHECK(run(own) == CONVGEN_OK && most_tasks == THREADS);
        convgen_destroy_pool(own);
        fflush(stdout);
        _exit(failures != 0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* ---- a program's own threads ------------------------------------------------------------------- */

typedef struct {
    void (*body)(void *, int);
    void *data;
    int i;
} part;

typedef struct {
    void (*body)(void *, int);
    void *data;
} region_mode;

static void *run_part(void *argument)
{
    const part *p = argument;
    p->body(p->data, p->i);
    return NULL;
}

/* The last part first; every second one on a thread of its own. */
static void own_loop(void *context, int count, void (*body)(void *, int), void *data)
{
    pthread_t threads[THREADS];
    part parts[THREADS];
    CHECK(count == THREADS);
    atomic_fetch_add((atomic_int *)context, 1);
    for (int i = count - 1; i >= 0; --i) {
        parts[i] = (part){body, data, i};
        if (i % 2)
            pthread_create(&threads[i], NULL, run_part, &parts[i]);
        else
            run_part(&parts[i]);
    }
    for (int i = 1; i < count; i += 2)
        pthread_join(threads[i], NULL);
}

#ifdef __x86_64__
enum { FLUSH = 0x8000 }; /* denormal results to zero */

static void check_mode(void *data, int i)
{
    region_mode *m = data;
    __builtin_ia32_ldmxcsr(0x1f80 | FLUSH); /* as a program may have set it on its threads */
    m->body(m->data, i);
    CHECK((__builtin_ia32_stmxcsr() & ~0x3fu) == (0x1f80 | FLUSH));
    __builtin_ia32_ldmxcsr(0x1f80);
}

static void flushing_loop(void *context, int count, void (*body)(void *, int), void *data)
{
    (void)context;
    region_mode m = {body, data};
    for (int i = 0; i < count; ++i)
        check_mode(&m, i);
}
#endif

static void check_borrowed(void)
{
    convgen_pool *pool = NULL;
    atomic_int loops = 0;
    CHECK(convgen_borrow_pool(0, own_loop, &loops, &pool) == CONVGEN_BAD_ARGUMENT && pool == NULL);
    CHECK(convgen_borrow_pool(THREADS, NULL, &loops, &pool) == CONVGEN_NULL_POINTER);
    CHECK(convgen_borrow_pool(THREADS, own_loop, &loops, NULL) == CONVGEN_NULL_POINTER);
    CHECK(convgen_borrow_pool(THREADS, own_loop, &loops, &pool) == CONVGEN_OK);
    most_tasks = 0;
    CHECK(run(pool) == CONVGEN_OK && most_tasks == THREADS && loops == 2);
    check_failures(pool);
    loops = 0;
    check_callers(pool);
    CHECK(loops == 2 * 200 * (CALLERS - CALLERS / 4)); /* nobody was turned away */
    convgen_destroy_pool(pool);
#ifdef __x86_64__
    CHECK(convgen_borrow_pool(THREADS, flushing_loop, NULL, &pool) == CONVGEN_OK);
    CHECK(run(pool) == CONVGEN_OK);
    convgen_destroy_pool(pool);
#endif
}

/* ---- threads that are lent for a while --------------------------------------------------------- */

typedef struct {
    convgen_pool *pool;
    int number;
} lent;

static void *lend(void *argument)
{
    const lent *l = argument;
    convgen_lent_work(l->pool, l->number);
    return NULL;
}

/* So many threads come at once, another one between two runs, the last one when all is over. */
static void check_lent(int at_once)
{
    static _Alignas(CONVGEN_ALIGNMENT) char memory[1 << 14];
    CHECK(convgen_lent_size(THREADS) <= sizeof memory);
    convgen_pool *pool = convgen_lend(memory, THREADS);
    pthread_t threads[THREADS];
    lent given[THREADS];
    for (int i = 1; i < THREADS; ++i)
        given[i] = (lent){pool, i};
    for (int i = 1; i <= at_once; ++i)
        pthread_create(&threads[i], NULL, lend, &given[i]);
    for (int i = 0; i < 40; ++i) {
        if (i == 20)
            pthread_create(&threads[at_once + 1], NULL, lend, &given[at_once + 1]);
        if (i == 30)
            usleep(2000); /* those that came are asleep by now */
        most_tasks = 0;
        CHECK(run(pool) == CONVGEN_OK && most_tasks == THREADS);
    }
    check_failures(pool);
    convgen_lent_stop(pool);
    for (int i = 1; i <= at_once + 1; ++i)
        pthread_join(threads[i], NULL);
    lend(&given[THREADS - 1]);
    convgen_lent_end(pool);
}

int main(int argc, char **argv)
{
    const int forks = argc > 1 && strcmp(argv[1], "fork") == 0, limits = argc > 2 && strcmp(argv[2], "limits") == 0;
    for (int i = 0; i < COUNT; ++i)
        src[i] = (float)(i % 17);
    check_packing();

    convgen_pool *pool = NULL;
    CHECK(convgen_create_pool(0, &pool) == CONVGEN_BAD_ARGUMENT && pool == NULL);
    CHECK(convgen_create_pool(CONVGEN_MAX_THREADS + 1, &pool) == CONVGEN_BAD_ARGUMENT);
    CHECK(convgen_create_pool(2, NULL) == CONVGEN_NULL_POINTER);
    convgen_destroy_pool(NULL);

    for (int threads = 1; threads <= THREADS; ++threads)
        for (int i = 0; i < 20; ++i) {
            CHECK(convgen_create_pool(threads, &pool) == CONVGEN_OK);
            for (int j = 0; j < i; ++j)
                CHECK(run(pool) == CONVGEN_OK);
            if (i == 10)
                usleep(2000); /* the workers are asleep by now */
            CHECK(i == 0 || run(pool) == CONVGEN_OK);
            convgen_destroy_pool(pool);
        }

    CHECK(convgen_create_pool(THREADS, &pool) == CONVGEN_OK);
    most_tasks = 0;
    CHECK(run(NULL) == CONVGEN_OK && most_tasks == 1);
    CHECK(run(pool) == CONVGEN_OK && most_tasks == THREADS);
    check_failures(NULL);
    check_failures(pool);
    check_callers(pool);
    check_borrowed();
    for (int at_once = 0; at_once < THREADS - 2; ++at_once)
        check_lent(at_once);
    if (forks)
        check_fork(pool);
    if (limits)
        check_limit();
    check_destroy_waits();
    CHECK(run(pool) == CONVGEN_OK);
    convgen_destroy_pool(pool);
    printf("%d failures\n", failures);
    return failures != 0;
}
