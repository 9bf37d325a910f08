/* What generated device code needs: its types, and the operations a thread cannot do alone.
 *
 * Precedes every CUDA source. Compiled by NVRTC the operations are instructions; with CONVGEN_EMULATE,
 * emulate.h defines the same ones for a C++ compiler, and a kernel runs on the CPU.
 *
 * Sources: PTX ISA 8.8, sections "Matrix multiply-accumulate operation using mma instruction" (fragment
 * layouts) and "Data Movement and Conversion Instructions: cp.async".
 */
#ifdef CONVGEN_EMULATE
#include "emulate.h"
inline uint32_t cg_shared_address(const void *p)
{
    return (uint32_t)((const char *)p - (const char *)emulation::dynamic_shared());
}

#else

#define CG_DEVICE __device__ __forceinline__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

CG_DEVICE uint16_t cg_to_f16(float x)
{
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

CG_DEVICE float cg_of_f16(uint16_t bits)
{
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

#if __CUDA_ARCH__ >= 800
CG_DEVICE uint16_t cg_to_bf16(float x)
{
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

CG_DEVICE uint32_t cg_shared_address(const void *p)
{
    uint32_t address;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(address) : "l"(p));
    return address;
}

CG_DEVICE int cg_lane()
{
    int lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

#if __CUDA_ARCH__ >= 750
/* Four 8x8 matrices of 16-bit elements; lane i points to row i % 8 of matrix i / 8 (16 bytes). */
CG_DEVICE void cg_ldmatrix(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(cg_shared_address(row))
                 : "memory");
}

/* Two of them: lanes 0 to 15 point. */
CG_DEVICE void cg_ldmatrix(uint32_t (&r)[2], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(cg_shared_address(row))
                 : "memory");
}
#endif

#if __CUDA_ARCH__ >= 800
#define CG_MMA(shape, types)                                                                                   \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." types ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "   \
                 "{%8, %9}, {%0, %1, %2, %3};"                                                                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

CG_DEVICE void cg_mma_f16(float *d, const uint32_t (&a)[4], const uint32_t *b) { CG_MMA("m16n8k16", "f16.f16"); }
CG_DEVICE void cg_mma_bf16(float *d, const uint32_t (&a)[4], const uint32_t *b) { CG_MMA("m16n8k16", "bf16.bf16"); }
CG_DEVICE void cg_mma_tf32(float *d, const uint32_t (&a)[4], const uint32_t *b) { CG_MMA("m16n8k8", "tf32.tf32"); }

CG_DEVICE void cg_mma_i8(int *d, const uint32_t (&a)[4], const uint32_t *b)
{
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Rounded to nearest, ties away from zero, to 11 bits. */
CG_DEVICE uint32_t cg_to_tf32(uint32_t f32)
{
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(__uint_as_float(f32)));
    return r;
}

/* Copies 16, 8 or 4 bytes to shared memory, or zeros; arrives by the cg_wait that covers its cg_commit. */
template <int BYTES> CG_DEVICE void cg_copy_async(void *shared, const void *global, bool valid = true)
{
    const int bytes = valid ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(cg_shared_address(shared)), "l"(global),
                     "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(cg_shared_address(shared)), "l"(global),
                     "n"(BYTES), "r"(bytes)
                     : "memory");
}

CG_DEVICE void cg_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Waits until at most so many of this thread's latest groups are under way. */
template <int PENDING> CG_DEVICE void cg_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
#elif __CUDA_ARCH__ >= 750
/* Turing's shape is half as deep. */
CG_DEVICE void cg_mma_f16(float *d, const uint32_t (&a)[4], const uint32_t *b)
{
    for (int k = 0; k < 2; ++k)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
}
#endif
#endif

/* ---- what TVM's code names --------------------------------------------------------------------- */

#define uchar unsigned char
#define ushort unsigned short
#define uint unsigned int

/* NaN where either is, as ONNX has it; CUDA's own take the other one. */
#if __CUDA_ARCH__ >= 800
CG_DEVICE float cg_max(float x, float y)
{
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}
CG_DEVICE float cg_min(float x, float y)
{
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}
#else
CG_DEVICE float cg_max(float x, float y) { return x != x ? x : x > y ? x : y; }
CG_DEVICE float cg_min(float x, float y) { return x != x ? x : x < y ? x : y; }
#endif
CG_DEVICE int cg_max(int x, int y) { return x > y ? x : y; }
CG_DEVICE int cg_min(int x, int y) { return x < y ? x : y; }

struct __align__(2) half {
    uint16_t bits;
    half() = default;
    CG_DEVICE half(float x) : bits(cg_to_f16(x)) {}
    CG_DEVICE operator float() const { return cg_of_f16(bits); }
};

struct __align__(4) half2 {
    half x, y;
};

struct __align__(8) half4 {
    half x, y, z, w;
};

#if defined CONVGEN_EMULATE || __CUDA_ARCH__ >= 800
struct __align__(2) nv_bfloat16 {
    uint16_t bits;
    nv_bfloat16() = default;
    CG_DEVICE nv_bfloat16(float x) : bits(cg_to_bf16(x)) {}
    CG_DEVICE operator float() const { return __uint_as_float((uint32_t)bits << 16); }
};

CG_DEVICE nv_bfloat16 __float2bfloat16_rn(float x) { return nv_bfloat16(x); }

struct __align__(4) nv_bfloat162 {
    nv_bfloat16 x, y;
};

struct __align__(8) nv_bfloat164 {
    nv_bfloat16 x, y, z, w;
};
#endif

CG_DEVICE half __float2half_rn(float x) { return half(x); }
CG_DEVICE float __half2float(half x) { return float(x); }
CG_DEVICE uint32_t __pack_half2(half x, half y) { return (uint32_t)y.bits << 16 | x.bits; }

/* An element of so many bytes in shared memory. */
template <int BYTES> CG_DEVICE void *cg_at(void *shared, int offset) { return (char *)shared + offset * BYTES; }

/* ---- rows in shared memory --------------------------------------------------------------------- */

/* Rows of 32, 64 or 128 bytes follow one another; 16-byte chunks trade places within every 128 bytes, so that a
 * chunk of each of 8 rows meets every bank once. Where one goes is told by its address alone, and is where wgmma
 * and TMA have it (PTX ISA, "Swizzling Modes"). Tiles start at multiples of 8 rows. */
CG_DEVICE int cg_swizzle(const void *shared, int row)
{
    const uint32_t address = cg_shared_address(shared);
    return (int)((address ^ (address >> 3 & (row - 16))) - address);
}

#if defined CONVGEN_EMULATE || __CUDA_ARCH__ >= 800
template <int ROW> CG_DEVICE void cg_copy_swizzled(void *shared, const void *global, bool valid = true)
{
    cg_copy_async<16>((char *)shared + cg_swizzle(shared, ROW), global, valid);
}
#endif

/* ---- a warp's tile of a matrix product --------------------------------------------------------- */

/* 32 bytes of the reduction at a time, whatever the type: 32 elements of one byte, 16 of two, 8 of four. The tile is
 * rows x cols, in fragments of 16 x 8: of fragment (i, j), acc[(i * cols / 8 + j) * 4 + 0..3] are
 * rows lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) and the next. */
#if defined CONVGEN_EMULATE || __CUDA_ARCH__ >= 750
struct cg_f16 {
    static constexpr int bytes = 2;
    static CG_DEVICE float value(uint16_t bits) { return cg_of_f16(bits); }
    static CG_DEVICE void mma(float *d, const uint32_t (&a)[4], const uint32_t *b) { cg_mma_f16(d, a, b); }
};
#endif

#if defined CONVGEN_EMULATE || __CUDA_ARCH__ >= 800
struct cg_bf16 {
    static constexpr int bytes = 2;
    static CG_DEVICE float value(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }
    static CG_DEVICE void mma(float *d, const uint32_t (&a)[4], const uint32_t *b) { cg_mma_bf16(d, a, b); }
};

struct cg_i8 { /* its sums are int */
    static constexpr int bytes = 1;
    static CG_DEVICE int value(int8_t x) { return x; }
    static CG_DEVICE void mma(int *d, const uint32_t (&a)[4], const uint32_t *b) { cg_mma_i8(d, a, b); }
};

struct cg_tf32 { /* f32 in memory */
    static constexpr int bytes = 4;
    static CG_DEVICE void mma(float *d, const uint32_t (&a)[4], const uint32_t *b)
    {
        const uint32_t x[4] = {cg_to_tf32(a[0]), cg_to_tf32(a[1]), cg_to_tf32(a[2]), cg_to_tf32(a[3])};
        const uint32_t y[2] = {cg_to_tf32(b[0]), cg_to_tf32(b[1])};
        cg_mma_tf32(d, x, y);
    }
};

/* Nearly f32: each operand is the sum of two of 11 bits, and three of the four products count (Ootomo and
 * Yokota, Int. J. High Perform. Comput. Appl. 36(4), 2022). */
struct cg_tf32x3 {
    static constexpr int bytes = 4;
    static CG_DEVICE uint32_t rest(uint32_t x, uint32_t high)
    {
        return cg_to_tf32(__float_as_uint(__uint_as_float(x) - __uint_as_float(high)));
    }
    static CG_DEVICE void mma(float *d, const uint32_t (&a)[4], const uint32_t *b)
    {
        uint32_t x[4], dx[4], y[2], dy[2];
        for (int i = 0; i < 4; ++i)
            x[i] = cg_to_tf32(a[i]), dx[i] = rest(a[i], x[i]);
        for (int i = 0; i < 2; ++i)
            y[i] = cg_to_tf32(b[i]), dy[i] = rest(b[i], y[i]);
        cg_mma_tf32(d, dx, y);
        cg_mma_tf32(d, x, dy);
        cg_mma_tf32(d, x, y);
    }
};
#endif

#if defined CONVGEN_EMULATE || __CUDA_ARCH__ >= 750
/* acc += a b^T; a is ROWS x 32 bytes, b is COLS x 32 bytes, of swizzled rows of lda and ldb bytes. */
template <class T, int ROWS, int COLS, class Sum>
CG_DEVICE void cg_mma_tile(Sum *acc, const void *a, int lda, const void *b, int ldb)
{
    constexpr int M = ROWS / 16, N = COLS / 8;
    const int lane = cg_lane();
    uint32_t x[M][4], y[N][2];
    /* The swizzle is the same for every 8 rows. */
    const char *left = (const char *)a + lane % 16 * lda + lane / 16 * 16;
    const char *right = (const char *)b + (lane / 16 * 8 + lane % 8) * ldb + lane / 8 % 2 * 16;
    left += cg_swizzle(left, lda), right += cg_swizzle(right, ldb);
#pragma unroll
    for (int i = 0; i < M; ++i)
        cg_ldmatrix(x[i], left + i * 16 * lda);
#pragma unroll
    for (int j = 0; j + 1 < N; j += 2) {
        uint32_t both[4];
        cg_ldmatrix(both, right + j * 8 * ldb);
        y[j][0] = both[0], y[j][1] = both[1], y[j + 1][0] = both[2], y[j + 1][1] = both[3];
    }
    if constexpr (N % 2)
        cg_ldmatrix(y[N - 1], right + (N - 1) * 8 * ldb);
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
            T::mma(acc + (i * N + j) * 4, x[i], y[j]);
}
#endif

/* ---- sums in and out --------------------------------------------------------------------------- */

template <int ROWS, int COLS, class Sum> CG_DEVICE void cg_clear_tile(Sum *acc)
{
#pragma unroll
    for (int i = 0; i < ROWS * COLS / 32; ++i)
        acc[i] = 0;
}

CG_DEVICE void cg_put(float *c, float x, float y) { *(float2 *)c = make_float2(x, y); }
CG_DEVICE void cg_put(int *c, int x, int y) { *(int2 *)c = make_int2(x, y); }

/* The tile as a matrix in memory, its rows ldc sums apart (even). */
template <int ROWS, int COLS, class Sum> CG_DEVICE void cg_store_tile(void *c, int ldc, const Sum *acc)
{
    const int lane = cg_lane();
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i)
#pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            const Sum *from = acc + (i / 2 * (COLS / 8) + j) * 4 + i % 2 * 2;
            cg_put((Sum *)c + (i * 8 + lane / 4) * ldc + j * 8 + lane % 4 * 2, from[0], from[1]);
        }
}

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
CG_DEVICE void cg_fence_async() {}
#else
/* Sums in registers and what this thread wrote to shared memory are the instruction's from here on. */
CG_DEVICE void cg_wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
CG_DEVICE void cg_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Waits until at most so many of the latest groups of products are under way. */
template <int PENDING> CG_DEVICE void cg_wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/* Copies that have arrived become visible to wgmma, which reads through another proxy than threads write. */
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

/* Waits for the end of a phase, of even number or of odd. */
CG_DEVICE void cg_barrier_wait(uint64_t *barrier, int parity)
{
    uint32_t over;
    do
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(over)
                     : "r"(cg_shared_address(barrier)), "r"(parity)
                     : "memory");
    while (!over);
}

/* What it was is memory for other things. */
CG_DEVICE void cg_barrier_end(uint64_t *barrier)
{
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(cg_shared_address(barrier)) : "memory");
}

/* Rows from (x, y) on, as many as the map says, to shared memory. */
CG_DEVICE void cg_copy_rows(void *to, const cg_tensor_map &map, uint64_t *barrier, int x, int y)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(cg_shared_address(to)), "l"(&map), "r"(cg_shared_address(barrier)), "r"(x), "r"(y)
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
CG_DEVICE void cg_barrier_expect(uint64_t *barrier, int bytes) { emulation::barrier_expect(barrier, bytes); }
CG_DEVICE void cg_barrier_wait(uint64_t *barrier, int parity, CG_LINE)
{
    emulation::barrier_wait(line, barrier, parity);
}
CG_DEVICE void cg_barrier_end(uint64_t *barrier) { emulation::barrier_end(barrier); }
CG_DEVICE void cg_copy_rows(void *to, const cg_tensor_map &map, uint64_t *barrier, int x, int y)
{
    const int at[] = {x, y};
    emulation::copy_tile(to, &map, barrier, 2, at, nullptr);
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
#endif
