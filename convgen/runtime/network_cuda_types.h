/* What libraries of whole networks for NVIDIA GPUs share besides. */
#ifndef CONVGEN_NETWORK_CUDA_ABI
#define CONVGEN_NETWORK_CUDA_ABI 1

#ifdef __cplusplus
extern "C" {
#endif

/* What their functions return besides enum convgen_status and enum convgen_cuda_status. Not those of enum
 * convgen_network_status, whose numbers the latter has. */
enum convgen_network_cuda_status {
    CONVGEN_DEVICE_WRONG_WEIGHTS = 48, /* the weights are another library's, or damaged */
    CONVGEN_DEVICE_NO_SUCH_SIZE        /* the network was not made for tensors of such sizes */
};

/* All pointers but those of the arrays are addresses in the memory of the current context's device. The arrays have an
 * element for each input, and for each output, in their order. What is not named is 0 and NULL. */
typedef struct {
    const void *const *inputs; /* each aligned to 16 bytes */
    const size_t *input_sizes; /* in bytes */
    void *const *outputs;      /* each aligned to 16 bytes */
    const size_t *output_sizes;
    const void *weights; /* a copy of the file of weights, aligned to 64 bytes */
    size_t weights_size;
    void *workspace; /* aligned to 64 bytes; may be larger than it must be */
    size_t workspace_size;
    struct CUstream_st *stream; /* NULL: the default stream */
    int size;                   /* which of the sizes that the network was made for; 0, the first, where there is one */
} convgen_network_cuda_args;

#ifdef __cplusplus
}
#endif

#elif CONVGEN_NETWORK_CUDA_ABI != 1
#error "headers of convgen networks for GPUs with different ABI versions are included together"
#endif
