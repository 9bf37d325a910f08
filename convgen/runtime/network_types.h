/* What all libraries of whole networks share, besides what all convgen libraries do. */
#ifndef CONVGEN_NETWORK_ABI
#define CONVGEN_NETWORK_ABI 3

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Further values of convgen_status. */
enum convgen_network_status {
    CONVGEN_CANNOT_READ = 32, /* the file of weights is not there, or cannot be read */
    CONVGEN_WRONG_WEIGHTS,    /* the weights are another library's, or damaged */
    CONVGEN_NO_SUCH_SIZE,     /* the network was not made for tensors of such sizes */
    CONVGEN_WRONG_NETWORK     /* the network was opened by another library */
};

/* A network with its weights. Any number of threads may run one at once. */
typedef struct convgen_network convgen_network;

/* One of a network's inputs or outputs: dense, row-major. Its elements are of type f32 (float), u8 (uint8_t), i8 (int8_t),
 * i32 (int32_t), i64 (int64_t), f16 or bf16 (uint16_t, its bits), or bool (a byte that is 0 or not). */
typedef struct {
    const char *name;
    int rank;
    const int64_t *shape;
    size_t bytes;
    const char *dtype;
} convgen_value;

typedef struct {
    int inputs, outputs; /* how many there are */
    int steps;           /* that a run makes */
    int sizes;           /* how many sizes the network was made for */
    size_t weights;      /* bytes of the weights */
    size_t workspace;    /* bytes of scratch memory of a run */
} convgen_network_sizes;

/* The arrays have an element for each input, and for each output, in their order. What is not named is 0 and NULL. */
typedef struct {
    const void *const *inputs;
    const size_t *input_sizes; /* in bytes */
    void *const *outputs;
    const size_t *output_sizes;
    void *workspace; /* aligned to 64 bytes; may be larger than it must be */
    size_t workspace_size;
    convgen_pool *pool; /* NULL: on the thread that calls, alone */
    int size;           /* which of the sizes that the network was made for; 0, the first, where there is one */
    double *seconds;    /* out, where not NULL: what each step took, in their order */
} convgen_network_args;

#ifdef __cplusplus
}
#endif

#elif CONVGEN_NETWORK_ABI != 3
#error "headers of convgen networks with different ABI versions are included together"
#endif
