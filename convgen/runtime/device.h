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

/* The same matrices, each transposed. */
CG_DEVICE void cg_ldmatrix_trans(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(cg_shared_address(row))
                 : "memory");
}

CG_DEVICE void cg_ldmatrix_trans(uint32_t (&r)[2], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
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
#define CUDART_INF_F __uint_as_float(0x7f800000u)
#define CUDART_NAN_F __uint_as_float(0x7fffffffu)

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

/* acc += a^T b, the reduction going down; a is 32 / T::bytes rows of ROWS elements, b as many of COLS, which are lda
 * and ldb bytes apart. Where that is 16 more than whole 128 bytes, of elements of four bytes 32 more, no bank is met
 * twice. */
template <class T, int ROWS, int COLS, class Sum>
CG_DEVICE void cg_mma_across(Sum *acc, const void *a, int lda, const void *b, int ldb)
{
    constexpr int M = ROWS / 16, N = COLS / 8;
    const int lane = cg_lane();
    uint32_t x[M][4], y[N][2];
    if constexpr (T::bytes == 2) {
        const char *left = (const char *)a + (lane / 16 * 8 + lane % 8) * lda + lane / 8 % 2 * 16;
        const char *right = (const char *)b + lane % 16 * ldb + lane / 16 * 16;
#pragma unroll
        for (int i = 0; i < M; ++i)
            cg_ldmatrix_trans(x[i], left + i * 32);
#pragma unroll
        for (int j = 0; j + 1 < N; j += 2) {
            uint32_t both[4];
            cg_ldmatrix_trans(both, right + j * 16);
            y[j][0] = both[0], y[j][1] = both[1], y[j + 1][0] = both[2], y[j + 1][1] = both[3];
        }
        if constexpr (N % 2)
            cg_ldmatrix_trans(y[N - 1], (const char *)b + lane % 16 * ldb + (N - 1) * 16);
    } else { /* ldmatrix transposes elements of two bytes only */
        static_assert(T::bytes == 4, "elements of two or four bytes");
        const char *left = (const char *)a + lane % 4 * lda + lane / 4 * 4;
        const char *right = (const char *)b + lane % 4 * ldb + lane / 4 * 4;
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                x[i][r] = *(const uint32_t *)(left + i * 64 + r % 2 * 32 + r / 2 * 4 * lda);
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                y[j][r] = *(const uint32_t *)(right + j * 32 + r * 4 * ldb);
    }
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

#include "hopper.h"
