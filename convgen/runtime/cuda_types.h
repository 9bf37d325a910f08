/* What convgen libraries for NVIDIA GPUs share besides. */
#ifndef CONVGEN_CUDA_ABI
#define CONVGEN_CUDA_ABI 1

#ifdef __cplusplus
extern "C" {
#endif

/* What their functions return besides enum convgen_status. */
enum convgen_cuda_status {
    CONVGEN_NO_DRIVER = 32, /* there is no CUDA driver, or it lacks a function: see <name>_load() */
    CONVGEN_NO_CONTEXT,     /* no CUDA context is current on the thread that calls */
    CONVGEN_NO_IMAGE,       /* the library has no code for the context's device */
    CONVGEN_DRIVER_ERROR    /* the driver refused; <name>_driver_error() tells what it said */
};

/* Device memory of tensors is aligned to this. */
enum { CONVGEN_TENSOR_ALIGNMENT = 16 };

struct CUstream_st; /* CUstream and cudaStream_t are pointers to it */

/* All pointers are addresses in the memory of the current context's device. */
typedef struct {
    const void *src;
    size_t src_size;
    const void *packed; /* a copy of all that <name>_pack() wrote, aligned to 64 bytes */
    size_t packed_size;
    const void *residual;
    size_t residual_size;
    void *dst; /* out */
    size_t dst_size;
    void *workspace; /* scratch, aligned to 64 bytes; may be NULL where its size is 0 */
    size_t workspace_size;
    struct CUstream_st *stream; /* NULL: the default stream */
} convgen_cuda_run_args;

#ifdef __cplusplus
}
#endif

#elif CONVGEN_CUDA_ABI != 1
#error "headers of convgen libraries with different CUDA ABI versions are included together"
#endif
