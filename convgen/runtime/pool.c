/* A pool of threads that stays hot between launches.
 *
 * A launch has one task per thread. Worker i takes task i, so that a part of a tensor stays in one
 * core's cache from layer to layer; the caller takes task 0 and then every task whose worker has not
 * turned up, so that a worker that sleeps or is not scheduled delays nobody.
 *
 * Workers spin for a moment before they sleep: back-to-back layers find them awake. With more
 * threads than CPUs spinning would only keep the others from running, so there they sleep at once.
 */
#define _GNU_SOURCE
#include "runtime.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { SPIN_NANOSECONDS = 100000 };

typedef struct pool pool;

typedef struct {
    _Alignas(CONVGEN_ALIGNMENT) atomic_uint claimed; /* the last epoch whose task somebody took */
    pool *pool;
    int task;
    pthread_t thread;
} worker;

struct pool {
    convgen_pool head;
    unsigned forks;
    int spin;
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    _Alignas(CONVGEN_ALIGNMENT) atomic_int busy;
    convgen_task task; /* of the current epoch, with its context; stable until all its tasks are done */
    void *context;
    _Alignas(CONVGEN_ALIGNMENT) atomic_uint epoch; /* counts launches */
    atomic_int stop;
    atomic_int sleeping; /* workers that need `wake` */
    _Alignas(CONVGEN_ALIGNMENT) atomic_int pending; /* tasks of workers that are not done */
    atomic_int waiting; /* the caller needs `done` */
    worker workers[];
};

/* Threads do not survive fork(). A child knows its pools by a count that differs from theirs. */
static atomic_uint forks;
static pthread_once_t forks_counted = PTHREAD_ONCE_INIT;

static void count_fork(void) { atomic_fetch_add(&forks, 1); }

static void count_forks(void) { pthread_atfork(NULL, NULL, count_fork); }

static void pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static long long nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Wait a moment for condition(p, value); returns whether it came true. */
static int spin_until(pool *p, int (*condition)(pool *, unsigned), unsigned value)
{
    if (condition(p, value))
        return 1;
    if (!p->spin)
        return 0;
    for (const long long end = nanoseconds() + SPIN_NANOSECONDS; nanoseconds() < end;)
        for (int i = 0; i < 32; ++i) {
            pause_cpu();
            if (condition(p, value))
                return 1;
        }
    return 0;
}

static int launched(pool *p, unsigned seen) { return atomic_load(&p->epoch) != seen; }

static int finished(pool *p, unsigned unused)
{
    (void)unused;
    return atomic_load(&p->pending) == 0;
}

/* Exactly one of worker and caller gets a task: every epoch moves `claimed` on by one. */
static int claim(worker *w, unsigned epoch)
{
    unsigned previous = epoch - 1;
    return atomic_compare_exchange_strong(&w->claimed, &previous, epoch);
}

static void *work(void *argument)
{
    worker *w = argument;
    pool *p = w->pool;
    for (unsigned seen = 0;;) {
        if (!spin_until(p, launched, seen)) {
            pthread_mutex_lock(&p->mutex);
            atomic_fetch_add(&p->sleeping, 1); /* before looking at epoch: see launch() */
            while (!launched(p, seen))
                pthread_cond_wait(&p->wake, &p->mutex);
            atomic_fetch_sub(&p->sleeping, 1);
            pthread_mutex_unlock(&p->mutex);
        }
        seen = atomic_load(&p->epoch);
        if (atomic_load(&p->stop))
            return NULL;
        if (!claim(w, seen))
            continue; /* the caller was faster, or this launch is over */
        p->task(p->context, w->task, p->head.threads);
        if (atomic_fetch_sub(&p->pending, 1) == 1 && atomic_load(&p->waiting)) {
            pthread_mutex_lock(&p->mutex);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->mutex);
        }
    }
}

static unsigned announce(pool *p)
{
    const unsigned epoch = atomic_fetch_add(&p->epoch, 1) + 1;
    if (atomic_load(&p->sleeping)) { /* after moving epoch: a worker that falls asleep now has seen it */
        pthread_mutex_lock(&p->mutex);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->mutex);
    }
    return epoch;
}

static void launch(convgen_pool *head, convgen_task task, void *context)
{
    pool *p = (pool *)head;
    const int threads = head->threads, workers = threads - 1;
    if (workers == 0) {
        task(context, 0, 1);
        return;
    }
    p->task = task;
    p->context = context;
    atomic_store(&p->pending, workers);
    const unsigned epoch = announce(p);
    task(context, 0, threads);
    for (int i = 0; i < workers && !finished(p, 0); ++i)
        if (claim(&p->workers[i], epoch)) {
            task(context, i + 1, threads);
            atomic_fetch_sub(&p->pending, 1);
        }
    if (spin_until(p, finished, 0))
        return;
    pthread_mutex_lock(&p->mutex);
    atomic_store(&p->waiting, 1);
    while (!finished(p, 0))
        pthread_cond_wait(&p->done, &p->mutex);
    atomic_store(&p->waiting, 0);
    pthread_mutex_unlock(&p->mutex);
}

static int acquire(convgen_pool *head)
{
    pool *p = (pool *)head;
    return p->forks == atomic_load(&forks) && atomic_exchange(&p->busy, 1) == 0;
}

static void release(convgen_pool *head) { atomic_store(&((pool *)head)->busy, 0); }

static void stop(pool *p)
{
    atomic_store(&p->stop, 1);
    announce(p);
}

static void taken_down(pool *p)
{
    pthread_cond_destroy(&p->done);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->mutex);
}

/* Stop and join the first `count` workers. */
static void join(pool *p, int count)
{
    stop(p);
    for (int i = 0; i < count; ++i)
        pthread_join(p->workers[i].thread, NULL);
}

static void destroy(convgen_pool *head)
{
    pool *p = (pool *)head;
    if (p->forks == atomic_load(&forks)) {
        while (!acquire(head)) /* a call that has the threads ends first */
            sched_yield();
        join(p, head->threads - 1);
        taken_down(p);
    }
    free(p);
}

static int available_cpus(void)
{
#ifdef CPU_COUNT
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

/* A pool in memory that is aligned and large enough; its workers have no threads yet. */
static pool *made_in(void *memory, int threads)
{
    pthread_once(&forks_counted, count_forks);
    pool *p = memory;
    *p = (pool){
        .head = {CONVGEN_ABI, threads, acquire, release, launch, destroy},
        .forks = atomic_load(&forks),
        .spin = threads <= available_cpus(),
    };
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->done, NULL);
    for (int i = 0; i < threads - 1; ++i) {
        worker *w = &p->workers[i];
        atomic_init(&w->claimed, 0);
        w->pool = p;
        w->task = i + 1;
    }
    return p;
}

size_t convgen_lent_size(int threads) { return sizeof(pool) + (size_t)(threads - 1) * sizeof(worker); }

int convgen_create_pool(int threads, convgen_pool **out)
{
    if (out == NULL)
        return CONVGEN_NULL_POINTER;
    *out = NULL;
    if (threads < 1 || threads > CONVGEN_MAX_THREADS)
        return CONVGEN_BAD_ARGUMENT;
    void *memory = aligned_alloc(CONVGEN_ALIGNMENT, convgen_lent_size(threads));
    if (memory == NULL)
        return CONVGEN_NO_MEMORY;
    pool *p = made_in(memory, threads);

    /* Signals are the program's business: its own threads handle them. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int started = 0;
    while (started < threads - 1) {
        worker *w = &p->workers[started];
        if (pthread_create(&w->thread, NULL, work, w) != 0)
            break;
        ++started;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (started < threads - 1) {
        p->head.threads = started + 1;
        destroy(&p->head);
        return CONVGEN_NO_MEMORY;
    }
    *out = &p->head;
    return CONVGEN_OK;
}

/* ---- threads that are lent for a while --------------------------------------------------------- */

convgen_pool *convgen_lend(void *memory, int threads) { return &made_in(memory, threads)->head; }

void convgen_lent_work(convgen_pool *head, int number) { work(&((pool *)head)->workers[number - 1]); }

void convgen_lent_stop(convgen_pool *head) { stop((pool *)head); }

void convgen_lent_end(convgen_pool *head) { taken_down((pool *)head); }

/* ---- a program's own threads ------------------------------------------------------------------- */

/* A pool that runs on a program's own threads. */
typedef struct {
    convgen_pool head;
    convgen_parallel_for loop;
    void *context;
} borrowed_pool;

typedef struct {
    convgen_task task;
    void *context;
    int tasks;
} borrowed_launch;

static void run_borrowed(void *data, int i)
{
    const borrowed_launch *launched = data;
    launched->task(launched->context, i, launched->tasks);
}

static void launch_borrowed(convgen_pool *head, convgen_task task, void *context)
{
    const borrowed_pool *p = (borrowed_pool *)head;
    borrowed_launch launched = {task, context, head->threads};
    p->loop(p->context, head->threads, run_borrowed, &launched);
}

static int acquire_borrowed(convgen_pool *head) { return head != NULL; } /* nobody waits for anybody */

static void release_borrowed(convgen_pool *head) { (void)head; }

static void destroy_borrowed(convgen_pool *head) { free(head); }

int convgen_borrow_pool(int threads, convgen_parallel_for loop, void *context, convgen_pool **out)
{
    if (out == NULL || loop == NULL)
        return CONVGEN_NULL_POINTER;
    *out = NULL;
    if (threads < 1 || threads > CONVGEN_MAX_THREADS)
        return CONVGEN_BAD_ARGUMENT;
    borrowed_pool *p = malloc(sizeof *p);
    if (p == NULL)
        return CONVGEN_NO_MEMORY;
    *p = (borrowed_pool){
        .head = {CONVGEN_ABI, threads, acquire_borrowed, release_borrowed, launch_borrowed, destroy_borrowed},
        .loop = loop,
        .context = context,
    };
    *out = &p->head;
    return CONVGEN_OK;
}

void convgen_destroy_pool(convgen_pool *pool)
{
    if (pool != NULL)
        pool->destroy(pool);
}
