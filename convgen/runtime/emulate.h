/* What device.h takes from NVRTC, for g++: CUDA's words, types and functions, and the operations of warps.
 *
 * Sources: CUDA C++ Programming Guide, "Built-in Vector Types", "Synchronization Functions", "Warp Shuffle
 * Functions", "Mathematical Functions"; PTX ISA 8.8, "cvt".
 */
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <math.h>
#include <sys/types.h>
#include <type_traits>
#include <utility>

#define CG_DEVICE inline
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_assume(condition)

/* ---- vector types ------------------------------------------------------------------------------ */

#define CG_VECTORS(T, name)                                                                                    \
    struct alignas(sizeof(T)) name##1 { T x; };                                                                \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                         \
    struct name##3 { T x, y, z; };                                                                             \
    struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };                              \
    inline name##1 make_##name##1(T x) { return {x}; }                                                         \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                 \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                         \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CG_VECTORS(signed char, char)
CG_VECTORS(unsigned char, uchar)
CG_VECTORS(short, short)
CG_VECTORS(unsigned short, ushort)
CG_VECTORS(int, int)
CG_VECTORS(unsigned, uint)
CG_VECTORS(long long, longlong)
CG_VECTORS(unsigned long long, ulonglong)
CG_VECTORS(float, float)
CG_VECTORS(double, double)

using dim3 = uint3;
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

/* ---- the machine: emulate.cpp ------------------------------------------------------------------- */

namespace emulation {

/* A barrier of the block, in a line of the source; of the cluster. */
void barrier(int line);
void cluster_barrier(int line);
/* One of `count` threads, which come to the barrier of a number. */
void barrier(int line, int number, int count);
/* One of the warp's lanes in `mask`, which orders their accesses. */
void warp_barrier(int line, uint32_t mask);
/* Fills `result` with what lane `source` passes as `value`, with NaN where it takes no part. */
void shuffle(const char *name, int line, uint32_t mask, const void *value, void *result, int bytes, int source);
int lane();
/* Lanes the warp has. */
int lanes();
/* One to four 8x8 matrices, as ldmatrix does, and with .trans each transposed. */
void load_rows(int line, uint32_t *r, const void *row, int matrices, bool transposed);
/* The other way, as stmatrix does. */
void store_rows(int line, const uint32_t *r, void *row, int matrices, bool transposed);
/* D += A B of fragments. */
void multiply_f16(int line, float *d, const uint32_t *a, const uint32_t *b);
void multiply_bf16(int line, float *d, const uint32_t *a, const uint32_t *b);
void multiply_i8(int line, int *d, const uint32_t *a, const uint32_t *b);
void multiply_tf32(int line, float *d, const uint32_t *a, const uint32_t *b);
void copy_async(void *to, const void *from, int bytes, bool valid);
void commit();
void wait(size_t pending);
/* A thread's share of the products that a warpgroup starts: done by the wait that covers their group. `read` are
 * places that are read until then. */
void multiply_later(void (*multiply)(float *, uint64_t, uint64_t), float *d, uint64_t a, uint64_t b,
                    const void *const *read, int count);
void commit_products();
void wait_products(size_t pending);
void barrier_init(void *barrier, int count);
/* Arrives, and makes the phase wait for so many bytes. */
void barrier_expect(void *barrier, int bytes);
void barrier_arrive(void *barrier);
/* The same, where a block of the cluster has it. */
void barrier_arrive(void *barrier, int block);
/* Bytes to a place in shared memory, as a block of the cluster has it. */
void put_at(void *to, int block, const void *from, int bytes);
void barrier_wait(int line, void *barrier, int parity);
void barrier_end(void *barrier);
/* By a map, from `at` on; in im2col mode (`by` is not null) each pixel by an offset. To this block, or to all of the
 * cluster whose bits are set. */
void copy_tile(void *to, const void *map, void *barrier, int rank, const int *at, const uint16_t *by, int blocks = 0);
/* What this thread wrote to shared memory is the copy engine's to read. */
void fence_async();
/* By a map, to `at` on; read and written by the wait that covers its group. */
void store_tile(const void *map, const void *from, int rank, const int *at);
void commit_stores();
void wait_stores(size_t pending);
void *dynamic_shared();
/* A shared array, made when first met. */
void *shared_array(size_t bytes);
float of_half(uint16_t bits);
/* Null, or what was wrong. `order`: -1 ascending, -2 descending, or the seed of a random one; `cluster`: blocks of one,
 * along x. */
const char *launch(void (*body)(void *const *), void *const *arguments, const unsigned *grid, const unsigned *block,
                   size_t shared, long long order, int cluster);

template <class... A> constexpr int parameters(void (*)(A...)) { return sizeof...(A); }
template <class... A, size_t... I>
void call(void (*kernel)(A...), void *const *arguments, std::index_sequence<I...>)
{
    kernel(*(A *)arguments[I]...);
}
template <class... A> void call(void (*kernel)(A...), void *const *arguments)
{
    call(kernel, arguments, std::index_sequence_for<A...>());
}

} // namespace emulation

/* What a library of kernels exports of each, whose clusters have so many blocks. */
#define CG_EMULATE_KERNEL(name, cluster)                                                                       \
    extern "C" int name##_parameters() { return emulation::parameters(name); }                                 \
    extern "C" const char *name##_launch(const unsigned *grid, const unsigned *block, size_t shared,           \
                                         void *const *arguments, long long order)                              \
    {                                                                                                          \
        return emulation::launch([](void *const *taken) { emulation::call(name, taken); }, arguments, grid,    \
                                 block, shared, order, cluster);                                               \
    }

/* ---- what CUDA defines --------------------------------------------------------------------------- */

#define CG_LINE int line = __builtin_LINE()

inline void __syncthreads(CG_LINE) { emulation::barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, CG_LINE) { emulation::warp_barrier(line, mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int cg_lane() { return emulation::lane(); }

/* The lanes there are; which of them are active is for hardware to say. */
inline unsigned __activemask() { return ~0u >> (32 - emulation::lanes()); }

template <class T> T cg_shuffle(const char *name, int line, unsigned mask, T value, int source)
{
    T result;
    emulation::shuffle(name, line, mask, &value, &result, sizeof(T), source);
    return result;
}
/* A shuffle stays within groups of `width` lanes: one that would leave gets its own value. */
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, CG_LINE)
{
    const int lane = cg_lane();
    return cg_shuffle("__shfl_sync", line, mask, value, lane / width * width + (source & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CG_LINE)
{
    const int lane = cg_lane(), source = lane ^ bits;
    const bool inside = source < (lane / width + 1) * width;
    return cg_shuffle("__shfl_xor_sync", line, mask, value, inside ? source : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CG_LINE)
{
    const int lane = cg_lane(), source = lane + int(by);
    return cg_shuffle("__shfl_down_sync", line, mask, value, source / width == lane / width ? source : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CG_LINE)
{
    const int lane = cg_lane(), source = lane - int(by);
    return cg_shuffle("__shfl_up_sync", line, mask, value, source >= lane / width * width ? source : lane);
}

template <class T> __attribute__((no_sanitize("thread"))) T atomicAdd(T *p, T value)
{
    const T before = *p;
    *p += value;
    return before;
}
template <class T> T __ldg(const T *p) { return *p; }

template <class To, class From> To cg_same_bits(From from)
{
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline uint32_t __float_as_uint(float x) { return cg_same_bits<uint32_t>(x); }
inline int __float_as_int(float x) { return cg_same_bits<int>(x); }
inline float __uint_as_float(uint32_t x) { return cg_same_bits<float>(x); }
inline float __int_as_float(int x) { return cg_same_bits<float>(x); }

#define CG_EXTREMA(T)                                                                                          \
    inline T max(T a, T b) { return a < b ? b : a; }                                                           \
    inline T min(T a, T b) { return b < a ? b : a; }
CG_EXTREMA(int)
CG_EXTREMA(unsigned)
CG_EXTREMA(long)
CG_EXTREMA(unsigned long)
CG_EXTREMA(long long)
CG_EXTREMA(unsigned long long)
inline float max(float a, float b) { return fmaxf(a, b); } /* the number, of it and NaN */
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }

#define __fmul_rn(x, y) ((float)(x) * (float)(y))
#define __expf expf /* glibc declares some of these, for itself */
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __powf powf
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0), 1); }

/* ---- what device.h defines for devices ------------------------------------------------------------ */

inline uint16_t cg_to_f16(float x) { return cg_same_bits<uint16_t>(_Float16(x)); }
inline float cg_of_f16(uint16_t bits) { return emulation::of_half(bits); }

inline uint16_t cg_to_bf16(float x)
{
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* ties go to even */
}

inline uint32_t cg_to_tf32(uint32_t f32)
{
    const float x = __uint_as_float(f32);
    if (x != x)
        return 0x7fffffff;
    return isinf(x) ? f32 : (f32 + 0x1000) & ~0x1fffu; /* adding to the magnitude: ties go away from zero */
}

inline void cg_ldmatrix(uint32_t (&r)[4], const void *row, CG_LINE) { emulation::load_rows(line, r, row, 4, false); }
inline void cg_ldmatrix(uint32_t (&r)[2], const void *row, CG_LINE) { emulation::load_rows(line, r, row, 2, false); }
inline void cg_ldmatrix_trans(uint32_t (&r)[4], const void *row, CG_LINE)
{
    emulation::load_rows(line, r, row, 4, true);
}
inline void cg_ldmatrix_trans(uint32_t (&r)[2], const void *row, CG_LINE)
{
    emulation::load_rows(line, r, row, 2, true);
}
inline void cg_mma_f16(float *d, const uint32_t (&a)[4], const uint32_t *b, CG_LINE)
{
    emulation::multiply_f16(line, d, a, b);
}
inline void cg_mma_bf16(float *d, const uint32_t (&a)[4], const uint32_t *b, CG_LINE)
{
    emulation::multiply_bf16(line, d, a, b);
}
inline void cg_mma_i8(int *d, const uint32_t (&a)[4], const uint32_t *b, CG_LINE)
{
    emulation::multiply_i8(line, d, a, b);
}
inline void cg_mma_tf32(float *d, const uint32_t (&a)[4], const uint32_t *b, CG_LINE)
{
    emulation::multiply_tf32(line, d, a, b);
}

template <int BYTES> void cg_copy_async(void *shared, const void *global, bool valid = true)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    emulation::copy_async(shared, global, BYTES, valid);
}
inline void cg_commit() { emulation::commit(); }
template <int PENDING> void cg_wait() { emulation::wait(PENDING); }
