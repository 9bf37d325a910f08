/* What all convgen libraries share. Several of their headers can be included together. */
#ifndef CONVGEN_ABI
#define CONVGEN_ABI 4

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What every function that returns int returns; <name>_error() puts it into words. */
enum convgen_status {
    CONVGEN_OK = 0,
    CONVGEN_NULL_POINTER,    /* a pointer that the call needs is NULL */
    CONVGEN_WRONG_SIZE,      /* a size is not what <name>_sizes() tells, or there is no such tensor */
    CONVGEN_MISALIGNED,      /* packed, workspace or a network's weights are not at a multiple of 64, or a tensor not of
                              * its element */
    CONVGEN_WRONG_PACKED,    /* packed was not written by this library's <name>_pack(): a call looks at its first 64 bytes,
                              * <name>_verify_packed() at all of it */
    CONVGEN_UNSUPPORTED_CPU, /* this CPU lacks instructions the library was compiled for */
    CONVGEN_OVERLAP,         /* a buffer that is written overlaps another one */
    CONVGEN_NO_MEMORY,       /* memory or threads ran out */
    CONVGEN_BAD_ARGUMENT,    /* a thread count out of range, or a pool of another ABI */
    CONVGEN_INTERNAL         /* a fault in the library itself; what it writes is then unspecified */
};

enum { CONVGEN_ALIGNMENT = 64, CONVGEN_MAX_THREADS = 1024 };

/* A pool of threads. One pool serves the kernels of all convgen libraries, whichever created it.
 * Of several calls at once on one pool, one gets its threads; the others run on the thread that
 * calls, with the same result. So does a child after fork(). A pool is destroyed once, before the
 * library that created it is unloaded. That waits for the call that has the threads; no other call
 * may use the pool from then on. A library that has no pool of its own may be unloaded at any time. */
typedef struct convgen_pool convgen_pool;

/* A program's own loop over threads that it has: calls body(data, i) once for every i from 0 to count - 1, in any order
 * and on any threads, and returns when all of that is done. `context` is what the program gave with it. Several threads
 * may call it at once where they call convgen libraries at once. */
typedef void (*convgen_parallel_for)(void *context, int count, void (*body)(void *data, int i), void *data);

/* Bytes of every buffer; 0 where the layer has no such tensor. */
typedef struct {
    size_t src, weights, bias, slope, scale, src_zero, weights_zero, dst_zero, sum, residual, dst, packed, workspace;
} convgen_sizes;

/* Tensors are dense, row-major, of the element type that <name>.h states. Those the layer does not
 * have are NULL and of size 0. */
typedef struct {
    const void *weights;
    size_t weights_size;
    const void *bias;
    size_t bias_size;
    const void *slope;
    size_t slope_size;
    const void *scale;
    size_t scale_size;
    const void *src_zero;
    size_t src_zero_size;
    const void *weights_zero;
    size_t weights_zero_size;
    const void *dst_zero;
    size_t dst_zero_size;
    const void *sum;
    size_t sum_size;
    void *packed; /* out: aligned to 64 bytes */
    size_t packed_size;
    convgen_pool *pool; /* NULL: on the thread that calls, alone */
} convgen_pack_args;

typedef struct {
    const void *src;
    size_t src_size;
    const void *packed; /* as <name>_pack() wrote it, aligned to 64 bytes; may be copied, saved and mapped */
    size_t packed_size;
    const void *residual;
    size_t residual_size;
    void *dst; /* out */
    size_t dst_size;
    void *workspace; /* scratch, aligned to 64 bytes; may be NULL where its size is 0 */
    size_t workspace_size;
    convgen_pool *pool; /* NULL: on the thread that calls, alone */
} convgen_run_args;

#ifdef __cplusplus
}
#endif

#elif CONVGEN_ABI != 4
#error "headers of convgen libraries with different ABI versions are included together"
#endif
