/* Runs CUDA kernels on the CPU, so that wrong ones fail.
 *
 * The threads of a block are fibers; one runs at a time, until a barrier or an operation of its warp, in an order
 * that is the caller's choice. Two threads that touch the same shared memory with no barrier between are a fault
 * in any order, unless both store the same. Shared memory begins as NaN and ends where nothing may be touched.
 * What an asynchronous copy goes to is NaN, and a fault to touch, until its thread has waited for it: copies end,
 * and products of warpgroups read, as late as they may. What CUDA leaves undefined is a fault: it ends the launch
 * and names the thread.
 *
 * Where some threads wait for some others, by numbered barriers or mbarriers, every thread has a vector clock: what it
 * knows to be over, of each other thread (Flanagan and Freund, "FastTrack", PLDI 2009). In a random order, what is
 * waited for comes late, and threads stop before they arrive.
 *
 * Blocks of a cluster run at a time, as threads of one: each has a part of one shared memory, and may touch that of
 * others only by what is made for it.
 *
 * Kernels are compiled apart from this file, with the compiler's checks, whose calls arrive here.
 *
 * Sources: PTX ISA 8.8, "Matrix Fragments for mma.m16n8k16 with floating point type", "... mma.m16n8k8",
 * "ldmatrix", "stmatrix", "cp.async", "mbarrier", "Tensors", "cp.async.bulk.tensor", "wgmma", "barrier.cluster", "mapa",
 * "Async proxy"; CUDA C++ Programming Guide, "Synchronization Functions".
 */
#include "emulate.h"
#include "emulated_map.h"
#include <algorithm>
#include <bitset>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <numeric>
#include <random>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum { WARP = 32, PAGE = 4096, GUARD = 1 << 20, STACK = 256 << 10 };
enum { ASCENDING = -1, DESCENDING = -2 };
enum class State { ready, collective, phase, named, paused, barrier, done };

/* What the lanes of a warp do together, from their data: null of a lane that takes no part. */
struct Collective {
    const char *name;
    int line;
    uint32_t mask;
    void *data;
    void (*all)(void *const *lanes);
};

struct Copy {
    unsigned char *to;
    const void *from; /* null: zeros */
    int bytes;
    unsigned char data[16];
};

/* acc += a b^T of a warpgroup, this thread's share. */
struct Product {
    void (*multiply)(float *, uint64_t, uint64_t);
    float *d;
    uint64_t a, b;
    std::vector<struct Shadow *> read;
};

/* A store by a map: what is read of shared memory until it is over, and where that goes. */
struct Store {
    struct Piece {
        const unsigned char *from;
        char *to; /* null: outside of the tensor */
        int bytes;
    };
    std::vector<Piece> pieces;
};

using Clock = std::vector<uint32_t>;

/* A phase ends when all threads have arrived that are to, and all bytes. */
struct Barrier {
    int count, arrivals; /* of a phase, and still to come */
    long long bytes;     /* still to come */
    uint32_t phase;
    Clock arrived, released[2]; /* of who arrived, ever and by the end of the last even and odd phase */
};

struct Thread {
    uint3 index;
    jmp_buf context;
    ucontext_t first;
    bool started;
    State state;
    int line; /* of the barrier */
    Collective collective;
    std::vector<Copy> open; /* copies that belong to no group yet */
    std::deque<std::vector<Copy>> groups;
    std::vector<Product> begun; /* that belong to no group yet */
    std::deque<std::vector<Product>> products;
    std::vector<Store> sent; /* that belong to no group yet */
    std::deque<std::vector<Store>> stores;
    Barrier *phase_of; /* what it waits for */
    uint32_t parity;
    int number, wanted; /* of the numbered barrier that it waits at */
    Clock clock;
    uint32_t fenced; /* what it wrote before, by its clock, the copy engine sees */
};

struct Access {
    int thread = -1;
    uint32_t barriers, warp_barriers;
    uint32_t time; /* by its thread's clock */
};

/* The accesses to a byte of shared memory that a later one may conflict with. */
struct Shadow {
    Access writer, reader;
    bool lanes, warps;  /* other threads of the reader's warp, or of other warps, have read it as well */
    const char *source; /* of the asynchronous copy that is under way to it, if any */
    uint32_t reading;   /* products and stores under way that do */
    uint32_t tile;      /* number of the tile that was copied to it, from 1, if any */
    std::vector<Access> others; /* reads beside the reader's that are unordered, where there are clocks */
};

/* A copy by a map. */
struct Tile {
    Barrier *barrier;
    uint32_t phase;
    unsigned char *to;
    std::vector<unsigned char> data;
    const void *from;
    bool landed;
    std::bitset<2048> seen; /* threads that have waited for it */
    uint32_t barriers;      /* met when one had, first */
    int first;              /* the thread that had, or -1; and when by its clock */
    uint32_t time;
};

/* A stretch of memory before one that may not be touched. */
struct Memory {
    char *map;
    size_t mapped;
    char *begin;
    size_t size;
    std::vector<Shadow> shadow;
};

/* A second thread stores what is there already, or it is a fault. */
struct Rewrite {
    char *at;
    size_t bytes;
    char before[16];
    int other;
};

static std::vector<Memory> shared; /* dynamic, then static arrays by when they are first met */
static std::vector<Thread> threads;
static Thread *self, *running; /* whom a fault names; whose code runs, if any's */
static uint32_t barriers;      /* so many have been met */
static std::vector<uint32_t> warp_barriers;
static bool clocks; /* some threads wait for some others: there are clocks */
static int blocks;  /* of a cluster */
static uint3 first_block;
static Rewrite rewrite;
static std::map<void *, Barrier> phased; /* by where they are */
static std::vector<Tile> tiles;
static void (*body)(void *const *);
static void *const *arguments;
static jmp_buf scheduler, escape;
static char message[1024];

static int number(const Thread &thread) { return &thread - threads.data(); }

/* A thread's block of the cluster; threads of a block, and its bytes of dynamic shared memory. */
static int per_block() { return threads.size() / blocks; }
static int block_of(const Thread &thread) { return number(thread) / per_block(); }
static size_t window() { return shared[0].size / blocks; }

static uint3 index_of(int block) { return {first_block.x + block, first_block.y, first_block.z}; }

[[noreturn]] __attribute__((format(printf, 1, 2))) static void fault(const char *format, ...)
{
    const uint3 block = index_of(self ? block_of(*self) : 0);
    int n = snprintf(message, sizeof message, "block (%u, %u, %u)", block.x, block.y, block.z);
    if (self)
        n += snprintf(message + n, sizeof message - n, ", thread (%u, %u, %u)", self->index.x, self->index.y,
                      self->index.z);
    n += snprintf(message + n, sizeof message - n, ": ");
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message + n, sizeof message - n, format, arguments);
    va_end(arguments);
    _longjmp(escape, 1);
}

static Memory guarded(size_t size, bool watched = true)
{
    const size_t inner = (size + PAGE - 1) / PAGE * PAGE, mapped = inner + GUARD;
    void *map = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED || mprotect(map, inner, PROT_READ | PROT_WRITE))
        fault("no memory for %zu bytes", size);
    return {(char *)map, mapped, (char *)map + inner - (size + 15) / 16 * 16, size,
            std::vector<Shadow>(watched ? size : 0)};
}

static void poison(Memory &memory)
{
    memset(memory.map, 0xff, memory.mapped - GUARD);
    std::fill(memory.shadow.begin(), memory.shadow.end(), Shadow());
}

static Memory *find_shared(const void *p, size_t bytes)
{
    for (Memory &memory : shared)
        if (p >= memory.begin && (const char *)p + bytes <= memory.begin + memory.size)
            return &memory;
    return nullptr;
}

void *shared_array(size_t bytes)
{
    if (blocks > 1)
        fault("has static shared memory in a cluster: not emulated");
    shared.push_back(guarded(bytes));
    poison(shared.back());
    return shared.back().begin;
}

void *dynamic_shared() { return shared[0].begin + block_of(*self) * window(); }

/* A place of this block's shared memory as it is in another block of the cluster, which has not ended. */
static char *in_block(const void *p, int block)
{
    if (block < 0 || block >= blocks)
        fault("reaches for block %d of a cluster of %d", block, blocks);
    const Thread *const begin = &threads[block * per_block()], *const end = begin + per_block();
    if (std::all_of(begin, end, [](const Thread &thread) { return thread.state == State::done; }))
        fault("reaches for block %d of its cluster, which has ended", block);
    return (char *)p + (block - block_of(*self)) * (ptrdiff_t)window();
}

/* ---- unordered accesses ------------------------------------------------------------------------ */

static void join(Clock &clock, const Clock &other)
{
    clock.resize(threads.size());
    for (size_t i = 0; i < other.size(); ++i)
        clock[i] = std::max(clock[i], other[i]);
}

/* From here on there are clocks. */
static void start_clocks()
{
    if (clocks)
        return;
    clocks = true;
    for (Thread &thread : threads) {
        thread.clock.assign(threads.size(), 0);
        thread.clock[number(thread)] = 1;
    }
}

/* What any of these threads did comes before what each does from here on. */
static void synchronise(const std::vector<Thread *> &all)
{
    if (!clocks)
        return;
    Clock latest;
    for (Thread *thread : all)
        join(latest, thread->clock);
    for (Thread *thread : all)
        thread->clock = latest, ++thread->clock[number(*thread)];
}

/* Whether no barrier, nor one of their warp, lies between an earlier access and one of this thread now. */
static bool unordered(const Access &earlier)
{
    const int thread = number(*self);
    if (clocks)
        return earlier.thread >= 0 && earlier.thread != thread && self->clock[earlier.thread] < earlier.time;
    if (earlier.thread < 0 || earlier.thread == thread || earlier.barriers != barriers)
        return false;
    return earlier.thread / WARP != thread / WARP || earlier.warp_barriers == warp_barriers[thread / WARP];
}

static void check_rewrite()
{
    if (rewrite.bytes && memcmp(rewrite.at, rewrite.before, rewrite.bytes)) {
        const uint3 other = threads[rewrite.other].index;
        fault("stores to shared memory other than thread (%u, %u, %u) did, with no barrier between", other.x, other.y,
              other.z);
    }
    rewrite.bytes = 0;
}

static const char ZERO[16] = {};
static const char BARRIER[16] = {};

/* Whether this thread has waited for what came to a byte, or knows that the first to do so has. */
static bool seen(Shadow &byte)
{
    const Tile &tile = tiles[byte.tile - 1];
    if (tile.first >= 0 && (clocks ? self->clock[tile.first] >= tile.time : tile.barriers < barriers))
        byte.tile = 0;
    return !byte.tile || tile.seen[number(*self)];
}

/* A read that a later write may conflict with, and those before it that may still. */
static void note_read(Shadow &byte, const Access &now)
{
    if (unordered(byte.reader))
        byte.others.push_back(byte.reader);
    if (!byte.others.empty()) {
        const auto over = [&](const Access &other) { return other.thread == now.thread || !unordered(other); };
        byte.others.erase(std::remove_if(byte.others.begin(), byte.others.end(), over), byte.others.end());
    }
    byte.reader = now;
}

/* `source`: of an asynchronous copy that begins; `landing`: it ends. */
static void access(const void *p, size_t bytes, bool write, const char *source = nullptr, bool landing = false)
{
    Memory *const memory = running ? find_shared(p, bytes) : nullptr;
    if (!memory)
        return;
    check_rewrite();
    const bool foreign = memory == &shared[0] && size_t((const char *)p - memory->begin) / window() != size_t(block_of(*self));
    if (blocks > 1 && foreign && !source && !landing)
        fault("%s shared memory of another block of its cluster", write ? "writes" : "reads");
    const int thread = number(*self), warp = thread / WARP;
    const Access now = {thread, barriers, warp_barriers[warp], clocks ? self->clock[thread] : 0};
    const size_t offset = (const char *)p - memory->begin;
    for (size_t i = offset; i < offset + bytes; ++i) {
        Shadow &byte = memory->shadow[i];
        const Access &reader = byte.reader, &writer = byte.writer;
        const bool read = reader.thread >= 0 && reader.barriers == barriers;
        const char *const from = source ? source + (i - offset) : nullptr;
        if (byte.source >= BARRIER && byte.source < BARRIER + sizeof BARRIER && byte.source != from)
            fault("%s byte %zu of %zu of shared memory, which is an mbarrier", write ? "writes" : "reads", i,
                  memory->size);
        if (byte.tile && !seen(byte))
            fault("%s byte %zu of %zu of shared memory, to which a copy from %p is under way",
                  write ? "writes" : "reads", i, memory->size, tiles[byte.tile - 1].from);
        if (byte.source && !landing && byte.source != from)
            fault("%s byte %zu of %zu of shared memory, to which a copy from %p is under way",
                  write ? "writes" : "reads", i, memory->size, byte.source);
        if (write && byte.reading)
            fault("writes byte %zu of %zu of shared memory, which products under way read, or stores", i, memory->size);
        const bool beside = read && byte.lanes && reader.warp_barriers == now.warp_barriers;
        const bool other = clocks ? std::any_of(byte.others.begin(), byte.others.end(), unordered)
                                  : (read && byte.warps) || beside;
        if (write && (unordered(reader) || other))
            fault("writes byte %zu of %zu of shared memory, which others read, with no barrier between", i,
                  memory->size);
        if (unordered(writer)) {
            const uint3 other = threads[writer.thread].index;
            if (!write)
                fault("reads byte %zu of %zu of shared memory, which thread (%u, %u, %u) wrote, "
                      "with no barrier between",
                      i, memory->size, other.x, other.y, other.z);
            if (!source && !landing && bytes <= sizeof rewrite.before) {
                rewrite = {(char *)p, bytes, {}, writer.thread};
                memcpy(rewrite.before, p, bytes);
            }
        }
        if (write) {
            byte = {now, {}, false, false, from, 0, 0, {}};
        } else if (clocks) {
            if (source != BARRIER) /* which nothing overwrites while it is one */
                note_read(byte, now);
        } else {
            const bool same = read && reader.thread / WARP == warp;
            byte.warps = read && (byte.warps || !same);
            byte.lanes = same && reader.warp_barriers == now.warp_barriers && (byte.lanes || reader.thread != thread);
            byte.reader = now;
        }
    }
}

/* ---- fibers ------------------------------------------------------------------------------------ */

struct Order {
    long long way;
    std::mt19937 random;

    std::vector<int> of(int count)
    {
        std::vector<int> order(count);
        std::iota(order.begin(), order.end(), 0);
        if (way == DESCENDING)
            std::reverse(order.begin(), order.end());
        else if (way != ASCENDING)
            std::shuffle(order.begin(), order.end(), random);
        return order;
    }

    /* In a random order, every other time. */
    bool late() { return way >= 0 && random() % 2; }
};

static Order *order_now;

static void suspend(State state)
{
    check_rewrite();
    self->state = state;
    if (!_setjmp(self->context))
        _longjmp(scheduler, 1);
}

static void fiber()
{
    for (;;) {
        body(arguments);
        if (!self->products.empty() || !self->begun.empty())
            fault("ends while its products are under way");
        if (!self->stores.empty() || !self->sent.empty())
            fault("ends while its stores read shared memory");
        self->line = 0;
        suspend(State::done);
    }
}

static void resume(Thread &thread)
{
    self = running = &thread;
    threadIdx = thread.index, blockIdx = index_of(block_of(thread));
    if (!_setjmp(scheduler)) {
        if (thread.started)
            _longjmp(thread.context, 1);
        thread.started = true;
        setcontext(&thread.first);
    }
    running = nullptr;
}

static const char SYNCWARP[] = "__syncwarp";

static void together(const char *name, int line, uint32_t mask, void *data, void (*all)(void *const *))
{
    self->collective = {name, line, mask, data, all};
    suspend(State::collective);
}

/* The first lane that `wanted` takes and that has not come to it; null where all have. */
static Thread *absent(const Collective &wanted, Thread *lanes, int count, void **data)
{
    for (int lane = 0; lane < count; ++lane) {
        const Collective &found = lanes[lane].collective;
        if (!(wanted.mask >> lane & 1))
            continue;
        if (lanes[lane].state != State::collective || found.name != wanted.name || found.line != wanted.line ||
            found.mask != wanted.mask)
            return &lanes[lane];
        data[lane] = found.data;
    }
    return nullptr;
}

/* Ends a phase that lacks nothing. */
static void end_phase(Barrier &barrier)
{
    if (barrier.arrivals || barrier.bytes)
        return;
    barrier.released[barrier.phase % 2] = barrier.arrived;
    barrier.arrivals = barrier.count, ++barrier.phase;
}

/* Whether the phase that a thread waits for has ended; of those under way, the copies land. */
static bool phase_over(const Thread &thread)
{
    Barrier &barrier = *thread.phase_of;
    if (barrier.phase % 2 != thread.parity)
        return true;
    for (Tile &tile : tiles)
        if (tile.barrier == &barrier && !tile.landed) {
            tile.landed = true;
            memcpy(tile.to, tile.data.data(), tile.data.size());
            barrier.bytes -= tile.data.size();
            std::vector<unsigned char>().swap(tile.data);
        }
    end_phase(barrier);
    return barrier.phase % 2 != thread.parity;
}

/* Does what lanes of a warp wait for, once all that it takes have come; false where none waits. */
static bool collect(Thread *lanes, int count)
{
    Thread *waiting = nullptr, *missing = nullptr;
    for (int lane = 0; lane < count; ++lane) {
        if (lanes[lane].state != State::collective)
            continue;
        const Collective wanted = lanes[lane].collective;
        void *data[WARP] = {};
        self = &lanes[lane];
        if (!(wanted.mask >> lane & 1))
            fault("%s (line %d): its mask %08x lacks its own lane", wanted.name, wanted.line, wanted.mask);
        if (Thread *thread = absent(wanted, lanes, count, data)) {
            if (thread->state == State::phase || thread->state == State::named || thread->state == State::paused)
                return false; /* it may come yet */
            if (!missing)
                waiting = self, missing = thread;
            continue;
        }
        if (wanted.all)
            wanted.all(data);
        warp_barriers[number(*lanes) / WARP] += wanted.name == SYNCWARP;
        std::vector<Thread *> met;
        for (int other = 0; other < count; ++other)
            if (wanted.mask >> other & 1)
                lanes[other].state = State::ready, met.push_back(&lanes[other]);
        if (wanted.name == SYNCWARP)
            synchronise(met);
        return true;
    }
    if (!missing)
        return false;
    self = waiting;
    const Collective &wanted = waiting->collective, &found = missing->collective;
    const char *at = missing->state == State::collective ? found.name : "a barrier";
    const int line = missing->state == State::collective ? found.line : missing->line;
    const uint3 other = missing->index;
    if (missing->state == State::done)
        fault("%s (line %d) takes thread (%u, %u, %u), which has ended", wanted.name, wanted.line, other.x, other.y,
              other.z);
    fault("%s (line %d) takes thread (%u, %u, %u), which waits in %s (line %d)", wanted.name, wanted.line, other.x,
          other.y, other.z, at, line);
}

/* Every thread waits at a barrier or has ended: whether all wait, at one. */
static bool meet()
{
    Thread &one = threads[0];
    for (Thread &thread : threads) {
        if (thread.state == one.state && thread.line == one.line)
            continue;
        Thread &other = one.state == State::barrier ? thread : one;
        self = &other == &thread ? &one : &thread;
        fault("waits at the barrier in line %d, which thread (%u, %u, %u) %s", self->line, other.index.x, other.index.y,
              other.index.z, other.state == State::done ? "ends without" : "does not wait at");
    }
    return one.state == State::barrier;
}

/* Those who wait at numbered barriers that all have come to are ready. */
static void release_named()
{
    std::map<std::pair<int, int>, std::vector<Thread *>> met;
    for (Thread &thread : threads)
        if (thread.state == State::named)
            met[{block_of(thread), thread.number}].push_back(&thread);
    for (auto &[place, all] : met) {
        self = all[0];
        for (Thread *thread : all)
            if (thread->wanted != self->wanted || thread->line != self->line || int(all.size()) > self->wanted)
                fault("waits for %d threads at barrier %d, in line %d; %zu wait, in line %d too", self->wanted,
                      place.second, self->line, all.size(), thread->line);
        if (int(all.size()) < self->wanted)
            continue;
        for (Thread *thread : all)
            thread->state = State::ready;
        synchronise(all);
    }
}

/* Whether a thread that waits for others goes on. */
static bool goes_on(Thread &thread)
{
    if (thread.state == State::phase && phase_over(thread))
        thread.state = State::ready;
    if (thread.state == State::paused)
        thread.state = State::ready;
    return thread.state == State::ready;
}

/* The warps of threads that no longer wait for others; a fault where threads wait and none goes on. In a random order
 * most wait longer than they have to, unless none would go on. */
static bool wake(std::vector<int> &warps, const std::vector<int> &all)
{
    self = nullptr;
    release_named();
    for (bool patient : {true, false}) {
        self = nullptr;
        for (int warp : all) {
            bool any = false;
            for (size_t i = warp * WARP; i < threads.size() && i < (warp + 1u) * WARP; ++i) {
                const State state = threads[i].state;
                if (state == State::ready || (patient && order_now->late()))
                    any = any || state == State::ready;
                else if (goes_on(threads[i]))
                    any = true;
                else if (state == State::phase || state == State::named)
                    self = &threads[i];
            }
            if (any)
                warps.push_back(warp);
        }
        if (!warps.empty())
            return true;
    }
    if (self && self->state == State::named)
        fault("waits in line %d for %d threads at barrier %d, which do not all come", self->line, self->wanted,
              self->number);
    if (self)
        fault("waits in line %d for a phase of an mbarrier that does not end: %d arrivals and %lld bytes are missing",
              self->line, self->phase_of->arrivals, self->phase_of->bytes);
    return false;
}

/* One block, or those of a cluster. */
static void run_blocks(Order &order)
{
    for (Memory &memory : shared)
        poison(memory);
    const int count = threads.size();
    clocks = false, order_now = &order;
    if (blocks > 1)
        start_clocks();
    do {
        for (Thread &thread : threads)
            thread.state = State::ready, thread.line = 0;
        std::vector<int> warps = order.of((count + WARP - 1) / WARP);
        while (!warps.empty() || wake(warps, order.of((count + WARP - 1) / WARP))) {
            const auto warp = warps.begin() + (order.way < 0 ? 0 : order.random() % warps.size());
            Thread *const lanes = &threads[*warp * WARP];
            const int here = std::min<int>(WARP, count - *warp * WARP);
            for (int lane : order.of(here))
                if (lanes[lane].state == State::ready)
                    resume(lanes[lane]);
            if (!collect(lanes, here))
                warps.erase(warp);
        }
        ++barriers;
        std::vector<Thread *> all;
        for (Thread &thread : threads)
            all.push_back(&thread);
        synchronise(all);
    } while (meet());
    for (const Tile &tile : tiles)
        if (!tile.landed)
            fault("ends while a copy from %p is under way", tile.from);
    for (Thread &thread : threads)
        thread.groups.clear(), thread.open.clear(), thread.fenced = 0;
    tiles.clear(), phased.clear();
}

/* ---- launches ---------------------------------------------------------------------------------- */

static void on_signal(int number, siginfo_t *info, void *)
{
    if (number == SIGILL || number == SIGFPE)
        fault("%s", number == SIGILL ? "traps" : "divides by zero");
    const char *const p = (const char *)info->si_addr;
    for (const Memory &memory : shared)
        if (p >= memory.map && p < memory.map + memory.mapped)
            fault("touches byte %td of %zu of shared memory", p - memory.begin, memory.size);
    fault("touches address %p, which it may not", info->si_addr);
}

const char *launch(void (*kernel)(void *const *), void *const *taken, const unsigned *grid, const unsigned *block,
                   size_t bytes, long long way, int cluster)
{
    const int count = block[0] * block[1] * block[2], turns = grid[0] * grid[1] * grid[2] / cluster;
    static std::vector<Memory> stacks;
    static char signal_stack[64 << 10];
    stack_t own = {}, previous;
    own.ss_sp = signal_stack, own.ss_size = sizeof signal_stack;
    static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction action = {}, actions[4];
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER; /* the handler leaves by longjmp */
    sigaltstack(&own, &previous);
    for (int i = 0; i < 4; ++i)
        sigaction(signals[i], &action, &actions[i]);

    body = kernel, arguments = taken;
    *message = 0;
    self = running = nullptr;
    rewrite.bytes = 0;
    tiles.clear(), phased.clear();
    blocks = cluster, first_block = {0, 0, 0};
    blockIdx = {0, 0, 0}, blockDim = {block[0], block[1], block[2]}, gridDim = {grid[0], grid[1], grid[2]};
    if (!_setjmp(escape)) {
        if (shared.empty())
            shared.emplace_back();
        if (grid[0] % blocks || (blocks > 1 && (count % WARP || bytes % 128 || blocks * count > 2048)))
            fault("expected whole clusters of %d, of whole warps, up to 2048 threads, memory a multiple of 128", blocks);
        shared[0] = guarded(blocks * bytes);
        threads = std::vector<Thread>(blocks * count);
        warp_barriers.assign((threads.size() + WARP - 1) / WARP, 0);
        for (int k = 0; k < blocks * count; ++k) {
            stacks.push_back(guarded(STACK, false));
            Thread &thread = threads[k];
            const unsigned i = k % count;
            thread.index = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
            getcontext(&thread.first);
            thread.first.uc_stack.ss_sp = stacks.back().begin;
            thread.first.uc_stack.ss_size = STACK;
            makecontext(&thread.first, fiber, 0);
        }
        Order order{way, std::mt19937(way)};
        for (unsigned i : order.of(turns)) {
            const unsigned x = grid[0] / blocks;
            first_block = {i % x * blocks, i / x % grid[1], i / x / grid[1]};
            run_blocks(order);
        }
    }
    for (const Memory &memory : stacks)
        munmap(memory.map, memory.mapped);
    stacks.clear(), threads.clear();
    if (shared[0].map)
        munmap(shared[0].map, shared[0].mapped);
    shared[0] = {};
    for (int i = 0; i < 4; ++i)
        sigaction(signals[i], &actions[i], nullptr);
    sigaltstack(&previous, nullptr);
    return *message ? message : nullptr;
}

/* ---- warps ------------------------------------------------------------------------------------- */

int lane() { return number(*self) % WARP; }

int lanes() { return std::min<int>(WARP, threads.size() - number(*self) / WARP * WARP); }

static void wait_named(int line, int number, int count)
{
    self->line = line, self->number = number, self->wanted = count;
    suspend(State::named);
}

void barrier(int line)
{
    if (blocks > 1) {
        wait_named(line, 0, per_block());
        return;
    }
    cluster_barrier(line);
}

void cluster_barrier(int line)
{
    self->line = line;
    suspend(State::barrier);
}

void barrier(int line, int number, int count)
{
    if (number < 1 || number > 15 || count < WARP || count % WARP)
        fault("waits for %d threads at barrier %d in line %d: expected whole warps, and 1 to 15", count, number, line);
    start_clocks();
    wait_named(line, number, count);
}

void warp_barrier(int line, uint32_t mask) { together(SYNCWARP, line, mask, nullptr, nullptr); }

struct Shuffle {
    const void *value;
    void *result;
    int bytes, source;
};

void shuffle(const char *name, int line, uint32_t mask, const void *value, void *result, int bytes, int source)
{
    Shuffle data = {value, result, bytes, source};
    memset(result, 0xff, bytes);
    together(name, line, mask, &data, [](void *const *lanes) {
        for (int lane = 0; lane < WARP; ++lane)
            if (auto *to = (Shuffle *)lanes[lane])
                if (auto *from = (Shuffle *)lanes[to->source])
                    memcpy(to->result, from->value, to->bytes);
    });
}

static void whole_warp(void *const *lanes, const char *name)
{
    for (int lane = 0; lane < WARP; ++lane)
        if (!lanes[lane])
            fault("%s takes 32 lanes, found fewer", name);
}

/* One to four 8x8 matrices of 16-bit elements, each row 16 bytes that one lane points to. Lane l has
 * elements 2 (l % 4) and the next of row l / 4; of a matrix that is transposed, these of column l / 4. */
struct Rows {
    uint32_t *r;
    char *row;
    int matrices;
    bool transposed;
};

/* Between rows in shared memory and the lanes' registers. */
template <bool STORE> static void move_rows(void *const *lanes)
{
    const char *const name = STORE ? "stmatrix" : "ldmatrix";
    whole_warp(lanes, name);
    Thread *const first = self - number(*self) % WARP;
    const Rows all = *(Rows *)lanes[0];
    for (int i = 0; i < 8 * all.matrices; ++i) {
        char *const row = ((Rows *)lanes[i])->row;
        self = running = first + i;
        if ((uintptr_t)row % 16)
            fault("%s of row %p: expected a multiple of 16", name, row);
        if (!find_shared(row, 16))
            fault("%s of row %p: expected shared memory", name, row);
        access(row, 16, STORE);
        for (int column = 0; column < 8; ++column) {
            const int down = all.transposed ? column : i % 8, along = all.transposed ? i % 8 : column;
            char *const held = (char *)&((Rows *)lanes[down * 4 + along / 2])->r[i / 8] + along % 2 * 2;
            memcpy(STORE ? row + 2 * column : held, STORE ? held : row + 2 * column, 2);
        }
        check_rewrite();
    }
    running = nullptr;
}

void load_rows(int line, uint32_t *r, const void *row, int matrices, bool transposed)
{
    Rows rows = {r, (char *)row, matrices, transposed};
    const char *const plain = matrices == 4 ? "ldmatrix.x4" : "ldmatrix.x2";
    const char *const trans = matrices == 4 ? "ldmatrix.x4.trans" : "ldmatrix.x2.trans";
    together(transposed ? trans : plain, line, ~0u, &rows, move_rows<false>);
}

void store_rows(int line, const uint32_t *r, void *row, int matrices, bool transposed)
{
    Rows rows = {(uint32_t *)r, (char *)row, matrices, transposed};
    together(transposed ? "stmatrix.trans" : "stmatrix", line, ~0u, &rows, move_rows<true>);
}

struct Fragments {
    void *d;
    const uint32_t *a, *b;
};

float of_half(uint16_t bits)
{
    _Float16 x;
    memcpy(&x, &bits, 2);
    return x;
}

static float of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static float of_bfloat(uint16_t bits) { return of_bits(uint32_t(bits) << 16); }

/* An operand that is no tf32 is cut by hardware: rounding it is the kernel's to do. */
static float of_tf32(uint32_t bits)
{
    const float x = of_bits(bits);
    if (bits & 0x1fff && x == x)
        fault("mma: expected an operand rounded to tf32, found %a", x);
    return x;
}

/* D += A B of the warp, from and to its fragments: A is 16 x K, B is K x 8. */
template <int K, class Value = float, class Gather> static void multiply(void *const *lanes, Gather gather)
{
    whole_warp(lanes, "mma");
    Thread *const first = self - number(*self) % WARP;
    Value a[16][K], b[K][8], d[16][8];
    for (int lane = 0; lane < WARP; ++lane) {
        self = first + lane;
        gather(*(Fragments *)lanes[lane], lane >> 2, lane % 4, a, b);
    }
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) {
            Value *const c = (Value *)((Fragments *)lanes[i % 8 * 4 + j / 2])->d + (i >= 8) * 2 + j % 2;
            d[i][j] = *c;
            for (int k = 0; k < K; ++k)
                d[i][j] += a[i][k] * b[k][j];
            *c = d[i][j];
        }
}

template <float (*VALUE)(uint16_t)> static void m16n8k16(void *const *lanes)
{
    multiply<16>(lanes, [](const Fragments &from, int group, int member, float (*a)[16], float (*b)[8]) {
        for (int i = 0; i < 8; ++i) {
            const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
            const int column = i < 4 ? member * 2 + (i & 1) : member * 2 + (i & 1) + 8;
            a[row][column] = VALUE(from.a[i / 2] >> i % 2 * 16);
        }
        for (int i = 0; i < 4; ++i)
            b[i < 2 ? member * 2 + (i & 1) : member * 2 + (i & 1) + 8][group] = VALUE(from.b[i / 2] >> i % 2 * 16);
    });
}

static void m16n8k8(void *const *lanes)
{
    multiply<8>(lanes, [](const Fragments &from, int group, int member, float (*a)[8], float (*b)[8]) {
        for (int i = 0; i < 4; ++i)
            a[i == 0 || i == 2 ? group : group + 8][i < 2 ? member : member + 4] = of_tf32(from.a[i]);
        for (int i = 0; i < 2; ++i)
            b[i < 1 ? member : member + 4][group] = of_tf32(from.b[i]);
    });
}

static void m16n8k32(void *const *lanes)
{
    multiply<32, int>(lanes, [](const Fragments &from, int group, int member, int (*a)[32], int (*b)[8]) {
        for (int i = 0; i < 16; ++i) {
            const int row = (0 <= i && i < 4) || (8 <= i && i < 12) ? group : group + 8;
            const int column = i < 8 ? member * 4 + (i & 3) : member * 4 + (i & 3) + 16;
            a[row][column] = (int8_t)(from.a[i / 4] >> i % 4 * 8);
        }
        for (int i = 0; i < 8; ++i)
            b[i < 4 ? member * 4 + (i & 3) : member * 4 + (i & 3) + 16][group] = (int8_t)(from.b[i / 4] >> i % 4 * 8);
    });
}

void multiply_f16(int line, float *d, const uint32_t *a, const uint32_t *b)
{
    Fragments fragments = {d, a, b};
    together("mma.f16", line, ~0u, &fragments, m16n8k16<of_half>);
}

void multiply_bf16(int line, float *d, const uint32_t *a, const uint32_t *b)
{
    Fragments fragments = {d, a, b};
    together("mma.bf16", line, ~0u, &fragments, m16n8k16<of_bfloat>);
}

void multiply_i8(int line, int *d, const uint32_t *a, const uint32_t *b)
{
    Fragments fragments = {d, a, b};
    together("mma.i8", line, ~0u, &fragments, m16n8k32);
}

void multiply_tf32(int line, float *d, const uint32_t *a, const uint32_t *b)
{
    Fragments fragments = {d, a, b};
    together("mma.tf32", line, ~0u, &fragments, m16n8k8);
}

/* ---- asynchronous copies ----------------------------------------------------------------------- */

void copy_async(void *to, const void *from, int bytes, bool valid)
{
    if ((uintptr_t)to % bytes || (uintptr_t)from % bytes)
        fault("copies %d bytes from %p to %p: expected multiples of %d", bytes, from, to, bytes);
    if (!find_shared(to, bytes))
        fault("copies %d bytes to %p: expected shared memory", bytes, to);
    if (valid && find_shared(from, 1))
        fault("copies %d bytes from %p: expected global memory", bytes, from);
    Copy copy = {(unsigned char *)to, valid ? from : nullptr, bytes, {}};
    if (valid)
        memcpy(copy.data, from, bytes);
    access(to, bytes, true, valid ? (const char *)from : ZERO);
    memset(to, 0xff, bytes);
    self->open.push_back(copy);
}

void commit()
{
    self->groups.push_back(std::move(self->open));
    self->open.clear();
}

void wait(size_t pending)
{
    for (; self->groups.size() > pending; self->groups.pop_front())
        for (const Copy &copy : self->groups.front()) {
            if (copy.from && memcmp(copy.data, copy.from, copy.bytes))
                fault("the source of an asynchronous copy, %p, changes under way", copy.from);
            access(copy.to, copy.bytes, true, nullptr, true);
            memcpy(copy.to, copy.data, copy.bytes);
        }
}

/* ---- warpgroups -------------------------------------------------------------------------------- */

void multiply_later(void (*multiply)(float *, uint64_t, uint64_t), float *d, uint64_t a, uint64_t b,
                    const void *const *read, int count)
{
    self->begun.push_back({multiply, d, a, b, {}});
    for (int i = 0; i < count; ++i) {
        Memory *const memory = find_shared(read[i], 2);
        if (!memory)
            fault("multiplies what is at %p: expected shared memory", read[i]);
        access(read[i], 2, false);
        Shadow &byte = memory->shadow[(const char *)read[i] - memory->begin];
        ++byte.reading;
        self->begun.back().read.push_back(&byte);
    }
}

void commit_products()
{
    self->products.push_back(std::move(self->begun));
    self->begun.clear();
}

void wait_products(size_t pending)
{
    for (; self->products.size() > pending; self->products.pop_front())
        for (const Product &product : self->products.front()) {
            product.multiply(product.d, product.a, product.b);
            for (Shadow *byte : product.read) {
                --byte->reading;
                if (clocks) /* it is read until now */
                    note_read(*byte, {number(*self), barriers, 0, self->clock[number(*self)]});
            }
        }
}

/* ---- barriers that count bytes, and copies by maps ---------------------------------------------- */

static Barrier &barrier_at(void *p)
{
    const auto found = phased.find(p);
    if (found == phased.end())
        fault("takes %p for an mbarrier: expected one that was initialised", p);
    return found->second;
}

void barrier_init(void *p, int count)
{
    if ((uintptr_t)p % 8 || !find_shared(p, 8) || count < 1 || phased.count(p))
        fault("initialises an mbarrier at %p for %d: expected a multiple of 8 in shared memory, a count, none before", p,
              count);
    access(p, 8, true, BARRIER);
    phased[p] = {count, count, 0, 0, {}, {}};
    if (count > 1)
        start_clocks();
}

void barrier_end(void *p)
{
    Barrier &barrier = barrier_at(p);
    for (Thread &thread : threads)
        if (thread.state == State::phase && thread.phase_of == &barrier)
            fault("ends an mbarrier that others wait for");
    access(p, 8, true, BARRIER);
    Memory *memory = find_shared(p, 8);
    for (size_t i = (char *)p - memory->begin, end = i + 8; i < end; ++i)
        memory->shadow[i].source = nullptr;
    for (Tile &tile : tiles) /* its address may be another's */
        if (tile.barrier == &barrier)
            tile.barrier = nullptr;
    phased.erase(p);
}

static void arrive(Barrier &barrier)
{
    if (clocks) {
        join(barrier.arrived, self->clock);
        ++self->clock[number(*self)];
    }
    --barrier.arrivals;
    end_phase(barrier);
}

void barrier_expect(void *p, int bytes)
{
    Barrier &barrier = barrier_at(p);
    access(p, 8, false, BARRIER);
    if (bytes < 0 || bytes >= 1 << 20 || !barrier.arrivals)
        fault("expects %d bytes at an mbarrier with %d arrivals to come", bytes, barrier.arrivals);
    barrier.bytes += bytes;
    arrive(barrier);
}

void barrier_arrive(void *p) { barrier_arrive(p, block_of(*self)); }

void barrier_arrive(void *p, int block)
{
    if (order_now->late())
        suspend(State::paused);
    p = in_block(p, block);
    Barrier &barrier = barrier_at(p);
    access(p, 8, false, BARRIER);
    if (!barrier.arrivals)
        fault("arrives at an mbarrier that no more are to arrive at");
    start_clocks();
    arrive(barrier);
}

void put_at(void *to, int block, const void *from, int bytes)
{
    char *const there = in_block(to, block);
    if (!find_shared(to, bytes) || (uintptr_t)to % bytes)
        fault("writes %d bytes to %p of block %d: expected shared memory, at a multiple of these", bytes, to, block);
    access(there, bytes, true, nullptr, true);
    memcpy(there, from, bytes);
}

void barrier_wait(int line, void *p, int parity)
{
    Barrier &barrier = barrier_at(p);
    access(p, 8, false, BARRIER);
    self->line = line, self->phase_of = &barrier, self->parity = parity;
    if (order_now->late())
        suspend(State::phase);
    while (!phase_over(*self))
        suspend(State::phase);
    if (clocks)
        join(self->clock, barrier.released[parity]);
    for (Tile &tile : tiles)
        if (tile.barrier == &barrier && tile.phase < barrier.phase) {
            if (tile.first < 0) {
                tile.barriers = barriers, tile.first = number(*self);
                tile.time = clocks ? self->clock[tile.first] : 0;
            }
            tile.seen.set(number(*self));
        }
}

/* The pixels of a copy in im2col mode: the box is walked along w, then h, d and the images; or its rows. */
struct Walk {
    const Map &map;
    const int *first;
    int at[MOST_AXES];

    bool within(int axis) const
    {
        return map.lower[axis - 1] <= at[axis] && at[axis] <= (int64_t)map.last[axis] + map.upper[axis - 1];
    }

    void step()
    {
        for (int axis = 1; axis < map.rank - 1; ++axis) {
            at[axis] += map.steps[axis];
            if (within(axis))
                return;
            at[axis] = map.lower[axis - 1];
        }
        ++at[map.rank - 1];
    }

    void next_row()
    {
        for (int axis = 1; axis < map.rank; ++axis) {
            if (++at[axis] < first[axis] + map.box[axis])
                return;
            at[axis] = first[axis];
        }
    }
};

/* A row of a tile: elements that follow one another, zeros outside of the tensor. */
static void read_row(const Map &map, const int *at, unsigned char *to)
{
    const char *from = (const char *)map.address;
    for (int axis = 1; axis < map.rank; ++axis) {
        if (at[axis] < 0 || (uint32_t)at[axis] > map.last[axis])
            return;
        from += at[axis] * map.strides[axis - 1];
    }
    for (int i = 0; i < map.box[0]; ++i)
        if (at[0] + i >= 0 && (uint32_t)(at[0] + i) <= map.last[0])
            memcpy(to + i * map.bytes, from + (int64_t)(at[0] + i) * map.bytes, map.bytes);
}

/* The map that a copy or a store is given. */
static Map map_at(const void *opaque, int rank, bool im2col)
{
    Map map;
    memcpy(&map, opaque, sizeof map);
    if ((uintptr_t)opaque % 64 || map.magic != MAP_MAGIC || map.rank != rank || map.im2col != im2col)
        fault("copies by what is no map of %d axes in this mode", rank);
    if (map.flags & LARGE && (map.last[rank - 1] + uint64_t(1)) * map.strides[rank - 2] < LARGE_BYTES)
        fault("copies by a map that says of a tensor below %d bytes that it is large", LARGE_BYTES);
    return map;
}

/* Where in a tile of rows, in shared memory, a chunk of 16 bytes is that would be at `place` if it were not swizzled. */
static size_t swizzled(const Map &map, size_t place)
{
    return map.swizzle ? place ^ (place >> 3 & (map.swizzle - 16)) : place;
}

static void check_tile(const Map &map, const void *tile, size_t bytes)
{
    const uint32_t offset = (const char *)tile - (const char *)dynamic_shared();
    if (!find_shared(tile, bytes) || offset + bytes > window() || offset % 128 ||
        (map.swizzle && offset % (8 * map.swizzle)))
        fault("copies a tile at %p: expected shared memory, at a multiple of %d", tile,
              map.swizzle ? 8 * map.swizzle : 128);
}

/* A tile is on its way to a place in shared memory, whose barrier it will tell. */
static void send_tile(char *to, const std::vector<unsigned char> &data, void *p, const Map &map)
{
    Barrier &barrier = barrier_at(p);
    access(to, data.size(), true, ZERO);
    tiles.push_back({&barrier, barrier.phase, (unsigned char *)to, data, (const void *)map.address, false, {}, 0, -1, 0});
    Memory *const memory = find_shared(to, data.size());
    for (size_t i = to - memory->begin, end = i + data.size(); i < end; ++i) {
        Shadow &byte = memory->shadow[i];
        byte.writer = {}, byte.source = nullptr, byte.tile = tiles.size();
    }
    memset(to, 0xff, data.size());
}

void copy_tile(void *to, const void *opaque, void *p, int rank, const int *first, const uint16_t *by, int to_blocks)
{
    const Map map = map_at(opaque, rank, by != nullptr);
    barrier_at(p);
    access(p, 8, false, BARRIER);
    const size_t row = map.box[0] * map.bytes;
    size_t rows = map.box[1];
    for (int axis = 2; !by && axis < rank; ++axis)
        rows *= map.box[axis];
    check_tile(map, to, rows * row);
    for (int axis = 1; !by && axis < rank; ++axis)
        if (map.steps[axis] != 1)
            fault("copies every other element along axis %d: not emulated", axis);
    Walk walk = {map, first, {}};
    std::copy(first, first + rank, walk.at);
    for (int axis = 1; by && axis < rank - 1; ++axis) {
        const int limit = 1 << 16 / (rank - 2);
        if (!walk.within(axis) || by[axis - 1] >= limit)
            fault("copies pixels from %d on, by %d, along axis %d: expected one of the box, by less than %d", walk.at[axis],
                  by[axis - 1], axis, limit);
    }
    std::vector<unsigned char> data(rows * row);
    for (size_t i = 0; i < rows; ++i) {
        int at[MOST_AXES];
        std::copy(walk.at, walk.at + rank, at);
        for (int axis = 1; by && axis < rank - 1; ++axis)
            at[axis] += by[axis - 1];
        std::vector<unsigned char> bytes(row);
        read_row(map, at, bytes.data());
        for (size_t chunk = 0; chunk < row; chunk += 16)
            memcpy(&data[swizzled(map, i * row + chunk)], &bytes[chunk], 16);
        if (by)
            walk.step();
        else
            walk.next_row();
    }
    if (to_blocks >> blocks)
        fault("copies to blocks %x of a cluster of %d", to_blocks, blocks);
    for (int block = 0; block < blocks; ++block)
        if (to_blocks ? to_blocks >> block & 1 : block == block_of(*self))
            send_tile(in_block(to, block), data, in_block(p, block), map);
}

/* ---- stores by maps ----------------------------------------------------------------------------- */

void fence_async()
{
    if (clocks)
        self->fenced = ++self->clock[number(*self)];
}

/* Whether the copy engine would see what is there: its writer has fenced since. */
static bool is_fenced(const Shadow &byte)
{
    const Access &writer = byte.writer;
    return writer.thread < 0 || !writer.time || writer.time < threads[writer.thread].fenced;
}

void store_tile(const void *opaque, const void *from, int rank, const int *first)
{
    const Map map = map_at(opaque, rank, false);
    const size_t row = map.box[0] * map.bytes;
    size_t rows = 1;
    for (int axis = 1; axis < rank; ++axis)
        rows *= map.box[axis];
    check_tile(map, from, rows * row);
    start_clocks();
    access(from, rows * row, false);
    Memory *const memory = find_shared(from, rows * row);
    for (size_t i = (const char *)from - memory->begin, end = i + rows * row; i < end; ++i) {
        if (!is_fenced(memory->shadow[i])) {
            const uint3 other = threads[memory->shadow[i].writer.thread].index;
            fault("stores byte %zu of %zu of shared memory, which thread (%u, %u, %u) wrote with no fence for the copy "
                  "engine since",
                  i, memory->size, other.x, other.y, other.z);
        }
        ++memory->shadow[i].reading;
    }
    Store store;
    for (size_t i = 0; i < rows; ++i) {
        char *to = (char *)map.address;
        bool inside = true;
        size_t left = i;
        for (int axis = 1; axis < rank; left /= map.box[axis++]) {
            const int64_t at = first[axis] + int64_t(left % map.box[axis]);
            inside = inside && 0 <= at && at <= map.last[axis];
            to += at * (int64_t)map.strides[axis - 1];
        }
        for (size_t byte = 0; byte < row; byte += map.bytes) {
            const int64_t at = first[0] + int64_t(byte / map.bytes);
            const bool kept = inside && 0 <= at && at <= map.last[0];
            const size_t place = swizzled(map, i * row + byte / 16 * 16) + byte % 16;
            store.pieces.push_back({(const unsigned char *)from + place, kept ? to + at * map.bytes : nullptr, map.bytes});
        }
    }
    self->sent.push_back(store);
}

void commit_stores()
{
    self->stores.push_back(std::move(self->sent));
    self->sent.clear();
}

void wait_stores(size_t pending)
{
    for (; self->stores.size() > pending; self->stores.pop_front())
        for (const Store &store : self->stores.front())
            for (const Store::Piece &piece : store.pieces) {
                if (piece.to)
                    memcpy(piece.to, piece.from, piece.bytes);
                Memory *const memory = find_shared(piece.from, piece.bytes);
                for (int i = 0; i < piece.bytes; ++i) {
                    Shadow &byte = memory->shadow[(const char *)piece.from - memory->begin + i];
                    --byte.reading;
                    note_read(byte, {number(*self), barriers, 0, self->clock[number(*self)]}); /* until now */
                }
            }
}

} // namespace emulation

/* ---- what the compiler calls -------------------------------------------------------------------- */

/* g++ -fsanitize=thread announces every access so. */
#define CG_ACCESS(bytes)                                                                                       \
    void __tsan_read##bytes(void *p) { emulation::access(p, bytes, false); }                         \
    void __tsan_write##bytes(void *p) { emulation::access(p, bytes, true); }                         \
    void __tsan_unaligned_read##bytes(void *p) { emulation::access(p, bytes, false); }               \
    void __tsan_unaligned_write##bytes(void *p) { emulation::access(p, bytes, true); }

extern "C" {
CG_ACCESS(1)
CG_ACCESS(2)
CG_ACCESS(4)
CG_ACCESS(8)
CG_ACCESS(16)
void __tsan_read_range(void *p, unsigned long bytes) { emulation::access(p, bytes, false); }
void __tsan_write_range(void *p, unsigned long bytes) { emulation::access(p, bytes, true); }
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_init() {}

/* -fsanitize=alignment,bounds,object-size: LLVM's compiler-rt, ubsan_handlers.h. */
struct cg_location {
    const char *file;
    uint32_t line, column;
};
struct cg_mismatch {
    cg_location where;
    const void *type;
    unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1_abort(const cg_mismatch *data, void *p)
{
    if ((uintptr_t)p & ((1u << data->log_alignment) - 1))
        emulation::fault("line %u: touches address %p, expected a multiple of %u", data->where.line, p,
                         1u << data->log_alignment);
    emulation::fault("line %u: touches address %p, outside its object", data->where.line, p);
}
void __ubsan_handle_out_of_bounds_abort(const cg_location *where, unsigned long index)
{
    emulation::fault("line %u: index %ld is outside its array", where->line, (long)index);
}
}
