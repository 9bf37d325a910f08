/* Between the runtime and the entry points of one network on a GPU; not installed. */
#ifndef CONVGEN_NETWORK_CUDA_H
#define CONVGEN_NETWORK_CUDA_H

#include "launch.h"
#include "network.h"

#include "network_cuda_types.h"

/* Where a buffer of a step lies. */
typedef struct {
    convgen_place place;
    int number; /* of the input or output */
    size_t offset;
} convgen_device_place;

/* One function's launches. Its buffers have the numbers of their places; the one after them is the workspace. */
typedef struct {
    const convgen_cuda_code *code;
    const convgen_device_place *places;
    int count;
} convgen_device_step;

typedef struct {
    convgen_network_code host;               /* its tensors, sizes and weights; its steps are those below */
    const convgen_device_step *const *steps; /* of each size */
    const convgen_cuda_code *const *functions;
    int function_count;
} convgen_device_network;

int convgen_device_network_load(const convgen_device_network *network);
int convgen_device_network_unload(const convgen_device_network *network);
int convgen_device_network_sizes(const convgen_device_network *network, int size, convgen_network_sizes *sizes);
int convgen_device_network_find_size(const convgen_device_network *network, const int64_t *const *shapes, int *size);
int convgen_device_network_verify(const convgen_device_network *network, const void *weights, size_t size);
int convgen_device_network_run(const convgen_device_network *network, const convgen_network_cuda_args *args);
const char *convgen_device_network_status_text(int status);

/* The exported functions of one network. */
#define CONVGEN_DEVICE_NETWORK_ENTRY_POINTS(name, network)                                                         \
    CONVGEN_EXPORT int name##_sizes(int size, convgen_network_sizes *sizes)                                        \
    {                                                                                                              \
        return convgen_device_network_sizes(&network, size, sizes);                                                \
    }                                                                                                              \
    CONVGEN_EXPORT const convgen_value *name##_inputs(int size)                                                    \
    {                                                                                                              \
        return convgen_network_inputs(&network.host, size);                                                        \
    }                                                                                                              \
    CONVGEN_EXPORT const convgen_value *name##_outputs(int size)                                                   \
    {                                                                                                              \
        return convgen_network_outputs(&network.host, size);                                                       \
    }                                                                                                              \
    CONVGEN_EXPORT int name##_find_size(const int64_t *const *shapes, int *size)                                   \
    {                                                                                                              \
        return convgen_device_network_find_size(&network, shapes, size);                                           \
    }                                                                                                              \
    CONVGEN_EXPORT int name##_verify_weights(const void *weights, size_t size)                                     \
    {                                                                                                              \
        return convgen_device_network_verify(&network, weights, size);                                             \
    }                                                                                                              \
    CONVGEN_EXPORT int name##_seal(void *weights, size_t size)                                                     \
    {                                                                                                              \
        return convgen_network_seal(&network.host, weights, size);                                                 \
    }                                                                                                              \
    CONVGEN_EXPORT int name##_load(void) { return convgen_device_network_load(&network); }                         \
    CONVGEN_EXPORT int name##_unload(void) { return convgen_device_network_unload(&network); }                     \
    CONVGEN_EXPORT int name##_run(const convgen_network_cuda_args *args)                                           \
    {                                                                                                              \
        return convgen_device_network_run(&network, args);                                                         \
    }                                                                                                              \
    CONVGEN_EXPORT const char *name##_version(void) { return network.host.version; }                               \
    CONVGEN_EXPORT const char *name##_error(int status) { return convgen_device_network_status_text(status); }     \
    CONVGEN_EXPORT const char *name##_driver_error(void) { return convgen_cuda_driver_error(); }

#endif
