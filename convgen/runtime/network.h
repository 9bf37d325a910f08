/* Between the runtime and the entry points of one network; not installed. */
#ifndef CONVGEN_NETWORK_H
#define CONVGEN_NETWORK_H

#include "runtime.h"

#include "network_types.h"

/* Where a tensor lies. */
typedef enum { CONVGEN_ARENA, CONVGEN_WEIGHTS, CONVGEN_INPUT, CONVGEN_OUTPUT } convgen_place;

/* An argument of a step. */
typedef struct {
    int32_t ndim;
    convgen_dtype dtype;
    const int64_t *shape;
    convgen_place place;
    int number; /* of the input or output */
    size_t offset;
} convgen_argument;

typedef struct {
    convgen_function function;
    const convgen_argument *arguments;
    int count;
} convgen_step;

/* One of the sizes that a network was made for: its tensors, and the steps that compute with them. */
typedef struct {
    const convgen_value *inputs, *outputs;
    const convgen_step *steps;
    int step_count;
    size_t arena, workspace_main, workspace_task; /* parts of the workspace, multiples of 64 */
} convgen_network_size;

typedef struct {
    const convgen_network_size *sizes;
    int size_count, input_count, output_count;
    size_t weights;       /* bytes, header included */
    uint64_t identity[2]; /* what the weights are tied to */
    int (*cpu_supported)(void);
    const char *version;
} convgen_network_code;

/* The buffers of a run, be they the CPU's or a device's. */
typedef struct {
    const void *const *inputs;
    const size_t *input_sizes;
    void *const *outputs;
    const size_t *output_sizes;
    const void *weights;
    size_t weights_size;
    void *workspace;
    size_t workspace_size;
} convgen_network_buffers;

int convgen_network_sizes_of(const convgen_network_code *code, int size, int threads, convgen_network_sizes *sizes);
const convgen_value *convgen_network_inputs(const convgen_network_code *code, int size);
const convgen_value *convgen_network_outputs(const convgen_network_code *code, int size);
int convgen_network_find_size(const convgen_network_code *code, const int64_t *const *shapes, int *size);
int convgen_network_open(const convgen_network_code *code, const char *path, convgen_network **network);
int convgen_network_open_memory(const convgen_network_code *code, const void *weights, size_t size,
                                convgen_network **network);
/* A status: whether weights are the network's own, and whole. */
int convgen_network_check_weights(const convgen_network_code *code, const void *weights, size_t size);
/* A status: whether buffers are what a run needs, of a workspace so many bytes, and what it writes lies apart from all
 * else. alignment: of inputs and outputs; 0: that of their elements. */
int convgen_network_check_buffers(const convgen_network_code *code, const convgen_network_size *size,
                                  const convgen_network_buffers *buffers, size_t workspace, size_t alignment);
/* Write the header of weights that are complete but for it: for whoever compiles the library. */
int convgen_network_seal(const convgen_network_code *code, void *weights, size_t size);
void convgen_network_close(convgen_network *network);
int convgen_network_run(const convgen_network_code *code, const convgen_network *network,
                        const convgen_network_args *args);
const char *convgen_network_status_text(int status);
/* The words for a status that kernels have others for, of networks on CPUs and GPUs; NULL of all others. */
const char *convgen_network_shared_text(int status);

/* The exported functions of one network. */
#define CONVGEN_NETWORK_ENTRY_POINTS(name, code)                                                                \
    CONVGEN_EXPORT int name##_sizes(int size, int threads, convgen_network_sizes *sizes)                        \
    {                                                                                                           \
        return convgen_network_sizes_of(&code, size, threads, sizes);                                           \
    }                                                                                                           \
    CONVGEN_EXPORT const convgen_value *name##_inputs(int size) { return convgen_network_inputs(&code, size); } \
    CONVGEN_EXPORT const convgen_value *name##_outputs(int size)                                                \
    {                                                                                                           \
        return convgen_network_outputs(&code, size);                                                            \
    }                                                                                                           \
    CONVGEN_EXPORT int name##_find_size(const int64_t *const *shapes, int *size)                                \
    {                                                                                                           \
        return convgen_network_find_size(&code, shapes, size);                                                  \
    }                                                                                                           \
    CONVGEN_EXPORT int name##_open(const char *path, convgen_network **network)                                 \
    {                                                                                                           \
        return convgen_network_open(&code, path, network);                                                      \
    }                                                                                                           \
    CONVGEN_EXPORT int name##_open_memory(const void *weights, size_t size, convgen_network **network)          \
    {                                                                                                           \
        return convgen_network_open_memory(&code, weights, size, network);                                      \
    }                                                                                                           \
    CONVGEN_EXPORT int name##_seal(void *weights, size_t size)                                                  \
    {                                                                                                           \
        return convgen_network_seal(&code, weights, size);                                                      \
    }                                                                                                           \
    CONVGEN_EXPORT void name##_close(convgen_network *network) { convgen_network_close(network); }              \
    CONVGEN_EXPORT int name##_run(const convgen_network *network, const convgen_network_args *args)             \
    {                                                                                                           \
        return convgen_network_run(&code, network, args);                                                       \
    }                                                                                                           \
    CONVGEN_COMMON_ENTRY_POINTS(name, code, convgen_network_status_text)

#endif
