/* Hopper's part of device.h: products of warpgroups, tiles that the copy engine fetches and stores, clusters of blocks.
 *
 * Sources: PTX ISA 8.8, "Asynchronous Warpgroup Level Matrix Instructions", "Parallel Synchronization and
 * Communication Instructions: mbarrier", "barrier.cluster", "mapa", "cp.async.bulk.tensor", "cp.async.bulk.commit_group",
 * "cp.async.bulk.wait_group", "setmaxnreg", "Strides and swizzling modes", "Async proxy".
 */
/* ---- Hopper: a warpgroup's tile ---------------------------------------------------------------- */

#if defined CONVGEN_EMULATE || defined __CUDA_ARCH_FEAT_SM90_ALL
/* Of a tile whose rows follow one another: 1024 bytes from 8 rows to the next 8, 128-byte swizzle. */
CG_DEVICE uint64_t cg_descriptor(const void *tile)
{
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 16 | (cg_shared_address(tile) >> 4 & 0x3fff);
}

template <class T, int COLS> struct cg_wgmma; /* defined where it is used: its operands are a list as long as COLS */

#ifdef CONVGEN_EMULATE
/* Every thread computes its own sums: what it reads of shared memory is what the instruction reads. */
template <class T, int COLS> struct cg_wgmma {
    using Stored = std::conditional_t<T::bytes == 1, int8_t, uint16_t>;
    using Sum = std::conditional_t<T::bytes == 1, int, float>;

    /* It reads from now on, until it is waited for. */
    static void mma(Sum *acc, uint64_t a, uint64_t b)
    {
        const void *read[COLS / 16 + 3];
        int count = 0;
        read[count++] = at(a, threadIdx.y % 4 * 16 + cg_lane() / 2, cg_lane() % 2 * (16 / T::bytes));
        for (int row = cg_lane(); row < COLS; row += 32)
            read[count++] = at(b, row, 0), read[count++] = at(b, row, 16 / T::bytes);
        emulation::multiply_later(sum, (float *)acc, a, b, read, count);
    }

    static void sum(float *sums, uint64_t a, uint64_t b)
    {
        Sum *const acc = (Sum *)sums;
        const int lane = cg_lane(), warp = threadIdx.y % 4;
        for (int i = 0; i < COLS / 2; ++i) {
            const int row = warp * 16 + i / 2 % 2 * 8 + lane / 4, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 32 / T::bytes; ++k)
                acc[i] += T::value(*at(a, row, k)) * T::value(*at(b, col, k));
        }
    }

    static const Stored *at(uint64_t descriptor, int row, int k)
    {
        if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0 || (descriptor & 0x3f) * 16 % 1024 >= 128)
            __builtin_trap(); /* another layout, or a tile that starts elsewhere */
        const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4, start = (descriptor & 0x3fff) << 4;
        uint32_t address = start + row / 8 * stride + row % 8 * 128 + k * T::bytes;
        address ^= address >> 3 & 0x70;
        return (const Stored *)((const char *)emulation::dynamic_shared() + address);
    }
};

CG_DEVICE void cg_wgmma_begin() {}
CG_DEVICE void cg_wgmma_commit() { emulation::commit_products(); }
template <int PENDING> CG_DEVICE void cg_wgmma_wait() { emulation::wait_products(PENDING); }
template <class Sum> CG_DEVICE void cg_settled(Sum &) {}
CG_DEVICE void cg_fence_async() { emulation::fence_async(); }
#else
/* Sums in registers and what this thread wrote to shared memory are the instruction's from here on. */
CG_DEVICE void cg_wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
CG_DEVICE void cg_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Waits until at most so many of the latest groups of products are under way. */
template <int PENDING> CG_DEVICE void cg_wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/* A sum is read after this, not before: the compiler does not know that products that are waited for change it. */
CG_DEVICE void cg_settled(float &sum) { asm volatile("" : "+f"(sum)::"memory"); }
CG_DEVICE void cg_settled(int &sum) { asm volatile("" : "+r"(sum)::"memory"); }
/* What this thread wrote to shared memory becomes visible to wgmma and the copy engine, which read through another
 * proxy than threads write. */
CG_DEVICE void cg_fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

/* acc += a b^T over 128 bytes of the reduction. The warpgroup's tile is 64 rows; a points to this warp's 16. */
template <class T, int COLS, class Sum>
CG_DEVICE void cg_wgmma_tile(Sum *acc, const void *a, int /* 128 */, const void *b, int /* 128 */)
{
    const uint64_t x = cg_descriptor((const char *)a - threadIdx.y % 4 * (16 * 128)), y = cg_descriptor(b);
    cg_wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) /* 32 bytes further within the swizzled rows */
        cg_wgmma<T, COLS>::mma(acc, x + k * 2, y + k * 2);
    cg_wgmma_commit();
    cg_wgmma_wait<0>();
}

/* ---- Hopper: tiles fetched by the copy engine (TMA) --------------------------------------------- */

/* CUtensorMap of cuda.h. */
struct __align__(64) cg_tensor_map {
    uint64_t opaque[16];
};

#ifndef CONVGEN_EMULATE
/* Barriers in shared memory: a phase ends when `count` threads have arrived, and all bytes that they expect. */
CG_DEVICE void cg_barrier_init(uint64_t *barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cg_shared_address(barrier)), "r"(count) : "memory");
}

/* Ones that were made become visible to other threads, after their next __syncthreads, and to the copy engine. */
CG_DEVICE void cg_barrier_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

CG_DEVICE void cg_barrier_expect(uint64_t *barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(cg_shared_address(barrier)), "r"(bytes)
                 : "memory");
}

/* Waits for the end of a phase, of even number or of odd, to which blocks of a cluster of so many have arrived. */
template <int CLUSTER = 1> CG_DEVICE void cg_barrier_wait(uint64_t *barrier, int parity)
{
#define CG_TRY_WAIT(scope)                                                                                     \
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity" scope ".shared::cta.b64 p, [%1], %2; "             \
                 "selp.u32 %0, 1, 0, p; }"                                                                     \
                 : "=r"(over)                                                                                  \
                 : "r"(cg_shared_address(barrier)), "r"(parity)                                                \
                 : "memory")
    uint32_t over;
    do
        if constexpr (CLUSTER > 1)
            CG_TRY_WAIT(".acquire.cluster");
        else
            CG_TRY_WAIT("");
    while (!over);
#undef CG_TRY_WAIT
}

/* What it was is memory for other things. */
CG_DEVICE void cg_barrier_end(uint64_t *barrier)
{
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(cg_shared_address(barrier)) : "memory");
}

/* The map is on its way to where copies look for it. */
CG_DEVICE void cg_prefetch_map(const cg_tensor_map &map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/* Rows from (x, y) on, as many as the map says, to shared memory. */
CG_DEVICE void cg_copy_rows(void *to, const cg_tensor_map &map, uint64_t *barrier, int x, int y)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(cg_shared_address(to)), "l"(&map), "r"(cg_shared_address(barrier)), "r"(x), "r"(y)
                 : "memory");
}

/* Boxes of three and four axes. */
CG_DEVICE void cg_copy_rows(void *to, const cg_tensor_map &map, uint64_t *barrier, int x, int y, int z)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(cg_shared_address(to)),
                 "l"(&map), "r"(cg_shared_address(barrier)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
CG_DEVICE void cg_copy_rows(void *to, const cg_tensor_map &map, uint64_t *barrier, int x, int y, int z, int w)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(cg_shared_address(to)),
                 "l"(&map), "r"(cg_shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}

/* Rows to the same place of every block of the cluster whose bit is set, each of which its barrier tells. */
CG_DEVICE void cg_share_rows(void *to, const cg_tensor_map &map, uint64_t *barrier, int x, int y, uint16_t blocks)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(cg_shared_address(to)),
                 "l"(&map), "r"(cg_shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
                 : "memory");
}

/* Pixels from where (w, h, d) of image n are on, each by its tap (ow, oh, od), from channel c on. */
template <int RANK>
CG_DEVICE void cg_copy_patches(void *to, const cg_tensor_map &map, uint64_t *barrier, int c, int w, int h, int d, int n,
                               uint16_t ow, uint16_t oh, uint16_t od)
{
#define CG_IM2COL(rank, at, by, ...)                                                                           \
    asm volatile("cp.async.bulk.tensor." rank "d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "  \
                 "[%0], [%1, {" at "}], [%2], {" by "};" ::"r"(cg_shared_address(to)), "l"(&map),              \
                 "r"(cg_shared_address(barrier)), __VA_ARGS__ : "memory")
    if constexpr (RANK == 1)
        CG_IM2COL("3", "%3, %4, %5", "%6", "r"(c), "r"(w), "r"(n), "h"(ow));
    else if constexpr (RANK == 2)
        CG_IM2COL("4", "%3, %4, %5, %6", "%7, %8", "r"(c), "r"(w), "r"(h), "r"(n), "h"(ow), "h"(oh));
    else
        CG_IM2COL("5", "%3, %4, %5, %6, %7", "%8, %9, %10", "r"(c), "r"(w), "r"(h), "r"(d), "r"(n), "h"(ow), "h"(oh),
                  "h"(od));
#undef CG_IM2COL
}
#else
CG_DEVICE void cg_barrier_init(uint64_t *barrier, int count) { emulation::barrier_init(barrier, count); }
CG_DEVICE void cg_barrier_fence() {}
CG_DEVICE void cg_prefetch_map(const cg_tensor_map &) {}
CG_DEVICE void cg_barrier_expect(uint64_t *barrier, int bytes) { emulation::barrier_expect(barrier, bytes); }
template <int CLUSTER = 1> CG_DEVICE void cg_barrier_wait(uint64_t *barrier, int parity, CG_LINE)
{
    emulation::barrier_wait(line, barrier, parity);
}
CG_DEVICE void cg_barrier_end(uint64_t *barrier) { emulation::barrier_end(barrier); }
CG_DEVICE void cg_copy_rows(void *to, const cg_tensor_map &map, uint64_t *barrier, int x, int y)
{
    const int at[] = {x, y};
    emulation::copy_tile(to, &map, barrier, 2, at, nullptr);
}
CG_DEVICE void cg_copy_rows(void *to, const cg_tensor_map &map, uint64_t *barrier, int x, int y, int z)
{
    const int at[] = {x, y, z};
    emulation::copy_tile(to, &map, barrier, 3, at, nullptr);
}
CG_DEVICE void cg_copy_rows(void *to, const cg_tensor_map &map, uint64_t *barrier, int x, int y, int z, int w)
{
    const int at[] = {x, y, z, w};
    emulation::copy_tile(to, &map, barrier, 4, at, nullptr);
}
CG_DEVICE void cg_share_rows(void *to, const cg_tensor_map &map, uint64_t *barrier, int x, int y, uint16_t blocks)
{
    const int at[] = {x, y};
    emulation::copy_tile(to, &map, barrier, 2, at, nullptr, blocks);
}
template <int RANK>
CG_DEVICE void cg_copy_patches(void *to, const cg_tensor_map &map, uint64_t *barrier, int c, int w, int h, int d, int n,
                               uint16_t ow, uint16_t oh, uint16_t od)
{
    const int at[] = {c, w, RANK > 1 ? h : n, RANK > 2 ? d : n, n};
    const uint16_t by[] = {ow, oh, od};
    emulation::copy_tile(to, &map, barrier, RANK + 2, at, by);
}
#endif

/* Along the spatial axes. */
template <int D, int H, int W> struct cg_axes {
    static constexpr int d = D, h = H, w = W;
};

/* A block's tile, GROUPS warpgroups of 64 pixels x COLS channels, is block_n + blocks_n * (block_m + blocks_m *
 * (g + groups * part)), which sums the steps of one of the parts; each is `chunks` times 128 bytes of a tap. */
template <class T, int COLS, int GROUPS, int STAGES, int RANK, class OUT, class TAPS, class STRIDE, class DILATION,
          class PADDING, class Sum>
CG_DEVICE void cg_tma_tile(Sum *acc, void *memory, const cg_tensor_map &src, const cg_tensor_map &weights,
                           int blocks_m, int blocks_n, int groups, int channels, int chunks, int part)
{
    constexpr int PATCHES = GROUPS * 64 * 128, BYTES = PATCHES + COLS * 128;
    char *const stages = (char *)memory;
    uint64_t *const full = (uint64_t *)(stages + STAGES * BYTES);
    const int block = blockIdx.x / blocks_n, g = block / blocks_m % groups;
    const int row = (g * blocks_n + blockIdx.x % blocks_n) * COLS;
    const int pixel = block % blocks_m * (GROUPS * 64), line = pixel / OUT::w, plane = line / OUT::h;
    const int w = pixel % OUT::w * STRIDE::w - PADDING::w, h = line % OUT::h * STRIDE::h - PADDING::h;
    const int d = plane % OUT::d * STRIDE::d - PADDING::d, n = plane / OUT::d;
    const int first = block / blocks_m / groups * part;
    const int steps = cg_min(part, TAPS::d * TAPS::h * TAPS::w * chunks - first);

    const auto fetch = [&](int k) {
        char *const stage = stages + k % STAGES * BYTES;
        uint64_t *const barrier = full + k % STAGES;
        const int step = first + k, tap = step / chunks, c = g * channels + step % chunks * (128 / T::bytes);
        cg_barrier_expect(barrier, BYTES);
        cg_copy_patches<RANK>(stage, src, barrier, c, w, h, d, n, tap % TAPS::w * DILATION::w,
                              tap / TAPS::w % TAPS::h * DILATION::h, tap / (TAPS::w * TAPS::h) * DILATION::d);
        cg_copy_rows(stage + PATCHES, weights, barrier, step * (128 / T::bytes), row);
    };

    const bool leads = threadIdx.x == 0 && threadIdx.y == 0;
    if (leads) {
        for (int k = 0; k < STAGES; ++k)
            cg_barrier_init(full + k, 1);
        cg_barrier_fence();
        cg_prefetch_map(src), cg_prefetch_map(weights);
    }
    cg_clear_tile<16, COLS>(acc);
    __syncthreads();
    if (leads)
        for (int k = 0; k < STAGES && k < steps; ++k)
            fetch(k);
    for (int k = 0; k < steps; ++k) {
        const char *const stage = stages + k % STAGES * BYTES;
        cg_barrier_wait(full + k % STAGES, k / STAGES % 2);
        const uint64_t x = cg_descriptor(stage + threadIdx.y / 4 * (64 * 128)), y = cg_descriptor(stage + PATCHES);
        cg_wgmma_begin();
#pragma unroll
        for (int i = 0; i < 4; ++i)
            cg_wgmma<T, COLS>::mma(acc, x + i * 2, y + i * 2);
        cg_wgmma_commit();
        cg_wgmma_wait<1>(); /* the products of step k - 1 have ended, */
        __syncthreads();    /* in all warpgroups */
        if (leads && 0 < k && k - 1 + STAGES < steps)
            fetch(k - 1 + STAGES);
    }
    if (leads)
        for (int k = 0; k < STAGES; ++k)
            cg_barrier_end(full + k);
    cg_wgmma_wait<0>();
    __syncthreads();
}

/* ---- Hopper: tiles one after another, fetched by a warp of their own ------------------------------ */

#ifndef CONVGEN_EMULATE
CG_DEVICE void cg_barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(cg_shared_address(barrier)) : "memory");
}

/* Arrives at a barrier of a block of the cluster, which is where this block has one. */
CG_DEVICE void cg_barrier_arrive_at(uint64_t *barrier, int block)
{
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(cg_shared_address(barrier)),
                 "r"(block)
                 : "memory");
}

/* Four words to a place in shared memory of another block of the cluster. */
CG_DEVICE void cg_put_at(void *to, int block, const void *words)
{
    const uint4 x = *(const uint4 *)words;
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
                 "st.shared::cluster.v4.b32 [there], {%2, %3, %4, %5}; }" ::"r"(cg_shared_address(to)),
                 "r"(block), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

/* A barrier of all threads of a cluster. */
CG_DEVICE void cg_cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

/* Rows from shared memory to where (x, y, z) on are; what of them is outside of the tensor goes nowhere. */
CG_DEVICE void cg_store_rows(const cg_tensor_map &map, const void *from, int x, int y, int z)
{
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(cg_shared_address(from)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
CG_DEVICE void cg_store_rows(const cg_tensor_map &map, const void *from, int x, int y, int z, int w)
{
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(cg_shared_address(from)), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}
CG_DEVICE void cg_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* Waits until at most so many of this thread's latest groups of stores still read shared memory. */
template <int PENDING> CG_DEVICE void cg_store_wait()
{
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

/* A barrier of some of a block's warps; number 0 is __syncthreads'. */
template <int THREADS> CG_DEVICE void cg_sync(int number)
{
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(THREADS) : "memory");
}

/* Four 8x8 matrices of 16-bit elements to the rows that cg_ldmatrix reads them from; and each transposed. */
CG_DEVICE void cg_stmatrix(void *row, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(cg_shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
CG_DEVICE void cg_stmatrix_trans(void *row, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(cg_shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* Registers of each thread of a warpgroup from here on, all of whose warps say so: fewer, or more. */
template <int COUNT> CG_DEVICE void cg_fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> CG_DEVICE void cg_more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
#else
CG_DEVICE void cg_barrier_arrive(uint64_t *barrier) { emulation::barrier_arrive(barrier); }
CG_DEVICE void cg_barrier_arrive_at(uint64_t *barrier, int block) { emulation::barrier_arrive(barrier, block); }
CG_DEVICE void cg_put_at(void *to, int block, const void *words) { emulation::put_at(to, block, words, 16); }
CG_DEVICE void cg_cluster_sync(CG_LINE) { emulation::cluster_barrier(line); }
CG_DEVICE void cg_store_rows(const cg_tensor_map &map, const void *from, int x, int y, int z)
{
    const int at[] = {x, y, z};
    emulation::store_tile(&map, from, 3, at);
}
CG_DEVICE void cg_store_rows(const cg_tensor_map &map, const void *from, int x, int y, int z, int w)
{
    const int at[] = {x, y, z, w};
    emulation::store_tile(&map, from, 4, at);
}
CG_DEVICE void cg_store_commit() { emulation::commit_stores(); }
template <int PENDING> CG_DEVICE void cg_store_wait() { emulation::wait_stores(PENDING); }
CG_DEVICE void cg_stmatrix(void *row, const uint32_t (&r)[4], CG_LINE)
{
    emulation::store_rows(line, r, row, 4, false);
}
CG_DEVICE void cg_stmatrix_trans(void *row, const uint32_t (&r)[4], CG_LINE)
{
    emulation::store_rows(line, r, row, 4, true);
}
template <int THREADS> CG_DEVICE void cg_sync(int number, CG_LINE) { emulation::barrier(line, number, THREADS); }
template <int COUNT> CG_DEVICE void cg_fewer_registers() { static_assert(COUNT % 8 == 0 && 24 <= COUNT, ""); }
template <int COUNT> CG_DEVICE void cg_more_registers() { static_assert(COUNT % 8 == 0 && COUNT <= 256, ""); }
#endif

/* Of a layer's product: tiles along pixels and channels, groups, channels of a group, steps of 128 bytes in a tap,
 * steps of a part, parts. */
template <int M, int N, int G, int CHANNELS, int CHUNKS, int PART, int PARTS> struct cg_sizes {
    static constexpr int m = M, n = N, g = G, channels = CHANNELS, chunks = CHUNKS, part = PART, parts = PARTS;
};

/* What a block does that takes one tile after another. Its first GROUPS warpgroups multiply: each has TALL times 64
 * pixels x COLS channels of a tile, in pieces of 64 x PIECE. A warpgroup more has the thread that fetches, as many
 * steps ahead as there are stages, over the ends of tiles too: while sums are stored, the next tile's operands come.
 * Of a stage, `full` counts the bytes that arrive, `empty` the warps that have multiplied.
 *
 * The blocks of a cluster either take tiles of the same channels: each of SHARES fetches a part of the weights, for all
 * of them, and so must know that all have multiplied what was there before. Or they take one tile: each of SPLITS sums
 * some of its steps, and adds up what all have of some of its pieces. */
template <class T, int COLS, int PIECE, int GROUPS, int TALL, int STAGES, int RESIDENT, int SHARES, int SPLITS, int RANK,
          class OUT, class TAPS, class STRIDE, class DILATION, class PADDING, class SIZES>
struct cg_persistent {
    static constexpr int WARPS = 4 * GROUPS, ROWS = 64 * GROUPS * TALL, WIDE = COLS / PIECE;
    static constexpr int PATCHES = ROWS * 128, BYTES = PATCHES + COLS * 128, SHARE = COLS / SHARES;
    static constexpr int HIGH = SIZES::m / SHARES, TURNS = HIGH * SIZES::n * SIZES::g * SIZES::parts;
    static constexpr int PIECES = TALL * WIDE, SUMS = COLS / 2, BAND = 8 / SHARES, CLUSTER = SHARES * SPLITS;
    /* Sums of a piece that a thread has; pieces that a block adds up; from one of these to the next; bytes of what others
     * send it. */
    static constexpr int HELD = PIECE / 2, OWN = (PIECES + SPLITS - 1) / SPLITS, NEXT = SPLITS;
    static constexpr int EXCHANGED = GROUPS * OWN * (SPLITS - 1) * HELD * 128 * 4;
    /* Registers that a thread begins with, keeps to fetch, and has to multiply. */
    static constexpr int BEGIN = 65536 / (RESIDENT * 128 * (GROUPS + 1)) / 8 * 8, FETCH = RESIDENT > 1 ? 24 : 40;
    static constexpr int LEFT = (BEGIN * (GROUPS + 1) - FETCH) / GROUPS / 8 * 8, MULTIPLY = LEFT < 240 ? LEFT : 240;
    static_assert(SIZES::m % SHARES == 0 && SHARE % 8 == 0 && (SHARES == 1 || SPLITS == 1), "");

    char *const exchanged, *const stages;
    uint64_t *const full, *const empty, *const sent, *const taken; /* of sums: they are here; they were added up */
    const cg_tensor_map &src, &weights;
    const int group = threadIdx.y / 4, rank = blockIdx.x % CLUSTER;
    int next = blockIdx.x / CLUSTER, stage = 0, phase = 0, turn = 0;
    int m, n, rest; /* the tile's: along pixels, along channels, group + groups * part */

    CG_DEVICE cg_persistent(void *memory, const cg_tensor_map &src, const cg_tensor_map &weights)
        : exchanged((char *)memory), stages(exchanged + EXCHANGED), full((uint64_t *)(stages + STAGES * BYTES)),
          empty(full + STAGES), sent(empty + STAGES), taken(sent + 1), src(src), weights(weights)
    {
        if (threadIdx.x == 0 && threadIdx.y == WARPS) {
            for (int k = 0; k < STAGES; ++k)
                cg_barrier_init(full + k, 1), cg_barrier_init(empty + k, SHARES * WARPS);
            if constexpr (SPLITS > 1)
                cg_barrier_init(sent, (SPLITS - 1) * WARPS), cg_barrier_init(taken, (SPLITS - 1) * WARPS);
            cg_barrier_fence();
            cg_prefetch_map(src), cg_prefetch_map(weights);
        }
        if constexpr (CLUSTER > 1)
            cg_cluster_sync();
        else
            __syncthreads();
    }

    /* No block of a cluster ends before the others do: they write to its shared memory. */
    CG_DEVICE void end() const
    {
        if constexpr (CLUSTER > 1)
            cg_cluster_sync();
    }

    /* The next tile, if there is one. Tiles that blocks take at a time form a band of the matrix, nearly square: L2
     * has the operands of those. */
    CG_DEVICE bool take()
    {
        if (next >= TURNS)
            return false;
        rest = next / (HIGH * SIZES::n);
        const int turn = next % (HIGH * SIZES::n), first = turn / (BAND * SIZES::n) * BAND;
        const int height = cg_min(BAND, HIGH - first), within = turn - first * SIZES::n;
        m = (first + within % height) * SHARES + rank % SHARES, n = within / height;
        next += gridDim.x / CLUSTER;
        return true;
    }

    CG_DEVICE int first_step() const { return (rest / SIZES::g * SPLITS + rank / SHARES) * SIZES::part; }
    CG_DEVICE int steps() const /* none, where those before have all */
    {
        return cg_max(0, cg_min(SIZES::part, TAPS::d * TAPS::h * TAPS::w * SIZES::chunks - first_step()));
    }
    CG_DEVICE void advance()
    {
        if (++stage == STAGES)
            stage = 0, phase ^= 1;
    }

    /* Whether this thread's warp multiplies; if not, what it does instead is over. */
    CG_DEVICE bool multiplies()
    {
        if (threadIdx.y < WARPS) {
            if constexpr (MULTIPLY > BEGIN)
                cg_more_registers<MULTIPLY>();
            return true;
        }
        if constexpr (MULTIPLY > BEGIN)
            cg_fewer_registers<FETCH>();
        if (threadIdx.y == WARPS && threadIdx.x == 0)
            while (take())
                fetch();
        return false;
    }

    CG_DEVICE void fetch()
    {
        const int g = rest % SIZES::g, pixel = m * ROWS, line = pixel / OUT::w, plane = line / OUT::h;
        const int w = pixel % OUT::w * STRIDE::w - PADDING::w, h = line % OUT::h * STRIDE::h - PADDING::h;
        const int d = plane % OUT::d * STRIDE::d - PADDING::d, image = plane / OUT::d;
        const int row = (g * SIZES::n + n) * COLS, first = first_step(), end = first + steps();
        int chunk = first % SIZES::chunks, tap = first / SIZES::chunks;
        for (int step = first; step < end; ++step) {
            char *const to = stages + stage * BYTES;
            cg_barrier_wait<SHARES>(empty + stage, phase ^ 1); /* of a new one, the phase before the first is over */
            cg_barrier_expect(full + stage, BYTES);
            cg_copy_patches<RANK>(to, src, full + stage, g * SIZES::channels + chunk * (128 / T::bytes), w, h, d, image,
                                  tap % TAPS::w * DILATION::w, tap / TAPS::w % TAPS::h * DILATION::h,
                                  tap / (TAPS::w * TAPS::h) * DILATION::d);
            if constexpr (SHARES > 1)
                cg_share_rows(to + PATCHES + rank * (SHARE * 128), weights, full + stage, step * (128 / T::bytes),
                              row + rank * SHARE, (1 << SHARES) - 1);
            else
                cg_copy_rows(to + PATCHES, weights, full + stage, step * (128 / T::bytes), row);
            if (++chunk == SIZES::chunks)
                chunk = 0, ++tap;
            advance();
        }
    }

    /* The sums of a warpgroup's part of a tile, TALL times 64 x COLS. */
    template <class Sum> CG_DEVICE void multiply(Sum *acc)
    {
        cg_clear_tile<16 * TALL, COLS>(acc);
        uint64_t *before = nullptr;
        for (int k = steps(); k; --k) {
            char *const operands = stages + stage * BYTES;
            cg_barrier_wait<SHARES>(full + stage, phase);
            const uint64_t x = cg_descriptor(operands + group * TALL * (64 * 128)), y = cg_descriptor(operands + PATCHES);
            cg_wgmma_begin();
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int t = 0; t < TALL; ++t)
                    cg_wgmma<T, COLS>::mma(acc + t * SUMS, x + i * 2 + t * (64 * 128 >> 4), y + i * 2);
            cg_wgmma_commit();
            cg_wgmma_wait<1>();
            release(before); /* the products of the step before have ended */
            before = empty + stage;
            advance();
        }
        cg_wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < TALL * SUMS; ++i)
            cg_settled(acc[i]);
        release(before);
    }

    CG_DEVICE void release(uint64_t *barrier)
    {
        __syncwarp();
        if (barrier && cg_lane() < SHARES) {
            if constexpr (SHARES > 1)
                cg_barrier_arrive_at(barrier, cg_lane());
            else
                cg_barrier_arrive(barrier);
        }
    }

    /* Whether this block finishes a piece; the first that it does. */
    CG_DEVICE bool owns(int piece) const { return SPLITS == 1 || piece % SPLITS == rank; }
    CG_DEVICE int first() const { return SPLITS == 1 ? 0 : rank; }

    /* Of the pieces it finishes, the sums of all steps: those of the other blocks are added in their order. */
    template <class Sum> CG_DEVICE void add_up(Sum *acc)
    {
        if constexpr (SPLITS > 1) {
            cg_barrier_wait<SPLITS>(taken, turn ^ 1);
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) {
                const int owner = piece % SPLITS;
                if (owner != rank)
#pragma unroll
                    for (int i = 0; i < HELD; i += 4)
                        cg_put_at(place<Sum>(piece / SPLITS, rank - (rank > owner), i), owner, acc + piece * HELD + i);
            }
            tell_others(sent);
            cg_barrier_wait<SPLITS>(sent, turn);
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece)
                if (owns(piece))
#pragma unroll
                    for (int other = 0; other < SPLITS - 1; ++other)
#pragma unroll
                        for (int i = 0; i < HELD; ++i)
                            acc[piece * HELD + i] += place<Sum>(piece / SPLITS, other, i / 4 * 4)[i % 4];
            tell_others(taken);
            turn ^= 1;
        }
    }

    /* Where four of a thread's sums are that another block has sent. */
    template <class Sum> CG_DEVICE Sum *place(int piece, int other, int i) const
    {
        const int thread = threadIdx.y % 4 * 32 + threadIdx.x;
        return (Sum *)exchanged + (((group * OWN + piece) * (SPLITS - 1) + other) * HELD + i) * 128 + thread * 4;
    }

    CG_DEVICE void tell_others(uint64_t *barrier) const
    {
        __syncwarp();
        if (cg_lane() < SPLITS && cg_lane() != rank)
            cg_barrier_arrive_at(barrier, cg_lane());
    }

    /* Where a piece begins: its pixel, and its channel of the group. */
    CG_DEVICE int pixel(int piece) const { return ((m * GROUPS + group) * TALL + piece / WIDE) * 64; }
    CG_DEVICE int channel(int piece) const { return n * COLS + piece % WIDE * PIECE; }

    /* The block that a piece would be if each had one of its own. */
    CG_DEVICE int block(int piece) const
    {
        constexpr int rows = SIZES::m * GROUPS * TALL, columns = SIZES::n * WIDE;
        const int row = (m * GROUPS + group) * TALL + piece / WIDE, column = n * WIDE + piece % WIDE;
        return column + columns * (row + rows * rest);
    }

    /* Of the warpgroup. */
    CG_DEVICE void sync() const { cg_sync<128>(1 + group); }
};

/* What a thread has of a piece of 64 x COLS, COLS / 2 values, wherever the code that finishes them counts from. */
template <class T, int COLS> struct cg_held {
    T *const values;
    CG_DEVICE T &operator[](int i) const { return values[i & (COLS / 2 - 1)]; }
    CG_DEVICE T *operator+(int i) const { return values + (i & (COLS / 2 - 1)); }
};

/* A piece on its way between threads and memory: 64 pixels x COLS channels as the copy engine has them in shared memory,
 * swizzled so that no two threads of a warp meet at a bank. It is channels last; or, where the map is of NCHW, a box of
 * BOX pixels of one image after the other, each channel's BOX together. IMAGE: pixels of an image there, else 0. */
template <class T, int COLS, int IMAGE, int BOX> struct cg_staged {
    static constexpr int SIZE = sizeof(T), ROW = (IMAGE ? BOX : COLS) * SIZE, BYTES = 64 * COLS * SIZE;
    static_assert(SIZE <= 2 && 16 <= ROW && ROW <= 128 && COLS % 16 == 0, "");

    static CG_DEVICE int at(int pixel, int channel)
    {
        const int place = IMAGE ? (pixel / BOX * COLS + channel) * ROW + pixel % BOX * SIZE : pixel * ROW + channel * SIZE;
        return place ^ (place >> 3 & (ROW - 16));
    }

    /* Where a thread's value is; of two bytes, where the row is that this lane points to of matrices 4 i to 4 i + 3. */
    static CG_DEVICE int value(int i)
    {
        const int lane = cg_lane();
        return at(threadIdx.y % 4 * 16 + i / 2 % 2 * 8 + lane / 4, i / 4 * 8 + lane % 4 * 2 + i % 2);
    }
    static CG_DEVICE int matrix(int i)
    {
        const int lane = cg_lane(), pixel = threadIdx.y % 4 * 16 + lane / 8 % 2 * 8, channel = i * 16 + lane / 16 * 8;
        return IMAGE ? at(pixel, channel + lane % 8) : at(pixel + lane % 8, channel);
    }

    static CG_DEVICE void write(char *to, const T *values)
    {
        if constexpr (SIZE == 2) {
#pragma unroll
            for (int i = 0; i < COLS / 16; ++i) {
                const uint32_t *const four = (const uint32_t *)values + i * 4;
                const uint32_t r[] = {four[0], four[1], four[2], four[3]};
                if constexpr (IMAGE)
                    cg_stmatrix_trans(to + matrix(i), r);
                else
                    cg_stmatrix(to + matrix(i), r);
            }
        } else if constexpr (IMAGE) {
#pragma unroll
            for (int i = 0; i < COLS / 2; ++i)
                *(T *)(to + value(i)) = values[i];
        } else { /* two channels at a time */
#pragma unroll
            for (int i = 0; i < COLS / 2; i += 2)
                *(uint16_t *)(to + value(i)) = *(const uint16_t *)(values + i);
        }
    }

    static CG_DEVICE void read(T *values, const char *from)
    {
        static_assert(SIZE == 2, "");
#pragma unroll
        for (int i = 0; i < COLS / 16; ++i) {
            uint32_t r[4];
            if constexpr (IMAGE)
                cg_ldmatrix_trans(r, from + matrix(i));
            else
                cg_ldmatrix(r, from + matrix(i));
#pragma unroll
            for (int k = 0; k < 4; ++k)
                ((uint32_t *)values)[i * 4 + k] = r[k];
        }
    }
};

/* Pieces of a warpgroup on their way to dst: one after the other through PLACES places in shared memory. The copy engine
 * reads one while the next is finished, and the next tile's products begin while it reads the last.
 *
 * What is added, if it ADDS, comes to the place of the sums it is added to, by a map that is as dst's: as early as the
 * place can be free without waiting, the first pieces' while their tile is multiplied. `here` counts its bytes. */
template <class TILES, class T, int COLS, int IMAGE, int BOX, int PLACES, bool ADDS> struct cg_stores {
    using Staged = cg_staged<T, COLS, IMAGE, BOX>;
    static constexpr int BYTES = Staged::BYTES, AHEAD = PLACES - 2;
    static_assert(PLACES >= 2, "");
    const TILES &tiles;
    const int group = threadIdx.y / 4;
    const bool leads = threadIdx.x == 0 && threadIdx.y % 4 == 0;
    char *const places;
    uint64_t *const here;
    const cg_tensor_map &dst, &added;
    int place = 0, phase = 0, coming = 0;

    CG_DEVICE cg_stores(const TILES &tiles, void *memory, void *barriers, const cg_tensor_map &dst,
                        const cg_tensor_map &added)
        : tiles(tiles), places((char *)memory + group * (PLACES * BYTES)), here((uint64_t *)barriers + group * PLACES),
          dst(dst), added(added)
    {
        if (leads) {
            cg_prefetch_map(dst);
            if constexpr (ADDS) {
                for (int k = 0; k < PLACES; ++k)
                    cg_barrier_init(here + k, 1);
                cg_barrier_fence();
                cg_prefetch_map(added);
            }
        }
        if constexpr (ADDS)
            cg_sync<128>(1 + group);
    }

    /* Of a tile that is about to be multiplied, what is added to the first pieces comes. */
    CG_DEVICE void ahead()
    {
        if (leads) {
            cg_store_wait<1>();
#pragma unroll
            for (int k = 0; k <= AHEAD; ++k)
                fetch(tiles.first() + k * TILES::NEXT);
        }
    }

    /* What is added to a piece, to a place that all stores but the latest have left. */
    CG_DEVICE void fetch(int piece)
    {
        if (piece >= TILES::PIECES)
            return;
        char *const to = places + coming * BYTES;
        uint64_t *const barrier = here + coming;
        const int pixel = tiles.pixel(piece), channel = tiles.channel(piece);
        cg_barrier_expect(barrier, BYTES);
        if constexpr (IMAGE)
            for (int i = 0; i < 64; i += BOX)
                cg_copy_rows(to + i * (COLS * Staged::SIZE), added, barrier, (pixel + i) % IMAGE, channel, tiles.rest,
                             (pixel + i) / IMAGE);
        else
            cg_copy_rows(to, added, barrier, channel, tiles.rest, pixel);
        coming = (coming + 1) % PLACES;
    }

    /* What is added to this thread's sums of a piece, in their order. */
    CG_DEVICE void take(int piece, T *values)
    {
        if (leads && piece >= TILES::NEXT) {
            cg_store_wait<1>();
            fetch(piece + AHEAD * TILES::NEXT);
        }
        cg_barrier_wait(here + place, phase);
        Staged::read(values, places + place * BYTES);
    }

    /* A piece is finished: it goes where it belongs. */
    CG_DEVICE void send(int piece, const T *values)
    {
        char *const from = places + place * BYTES;
        if constexpr (ADDS) {
            __syncwarp(); /* its threads have read what was there for each other */
        } else {
            if (leads)
                cg_store_wait<PLACES - 1>();
            cg_sync<128>(1 + group);
        }
        Staged::write(from, values);
        cg_fence_async();
        cg_sync<128>(1 + group);
        if (leads) {
            const int pixel = tiles.pixel(piece), channel = tiles.channel(piece);
            if constexpr (IMAGE)
                for (int i = 0; i < 64; i += BOX)
                    cg_store_rows(dst, from + i * (COLS * Staged::SIZE), (pixel + i) % IMAGE, channel, tiles.rest,
                                  (pixel + i) / IMAGE);
            else
                cg_store_rows(dst, from, channel, tiles.rest, pixel);
            cg_store_commit();
        }
        if (++place == PLACES)
            place = 0, phase ^= 1;
    }

    /* Shared memory is this block's until all has been read. */
    CG_DEVICE void end() const
    {
        if (leads)
            cg_store_wait<0>();
    }
};
#endif
