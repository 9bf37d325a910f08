/* Between the runtime and the entry points of one GPU kernel; not installed. */
#ifndef CONVGEN_LAUNCH_H
#define CONVGEN_LAUNCH_H

#include "runtime.h"

#include <pthread.h>

#include "cuda_types.h"

/* What a launch's pointer points into. */
enum convgen_cuda_buffer { CONVGEN_SRC, CONVGEN_PACKED, CONVGEN_RESIDUAL, CONVGEN_DST, CONVGEN_WORKSPACE, CONVGEN_BUFFERS };

/* How the device's copy engine reads or writes a tensor: what cuTensorMapEncodeTiled is told, or cuTensorMapEncodeIm2col, whose
 * box is of channels and pixels. Axes are innermost first. */
typedef struct {
    int im2col, type, swizzle, promotion; /* CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion */
    unsigned rank;
    uint64_t dims[5], strides[4];
    uint32_t box[5], steps[5];
    int lower[3], upper[3];
} convgen_cuda_map;

typedef struct {
    int buffer; /* its number: of a kernel, one of enum convgen_cuda_buffer */
    size_t offset;
    const convgen_cuda_map *map; /* what the function is given of it instead of a pointer; or NULL */
} convgen_cuda_argument;

typedef struct {
    const char *function;
    unsigned grid[3], block[3], shared;
    const convgen_cuda_argument *arguments;
    int argument_count;
} convgen_cuda_launch;

enum { CONVGEN_MAX_LAUNCH_ARGUMENTS = 64, CONVGEN_MAX_LAUNCH_MAPS = 4 };

/* Machine code for a compute capability's major number from a minor one on, or PTX for all from a capability on;
 * either for exactly that capability where it uses instructions of an "a" architecture. */
typedef struct {
    int major, minor, exact, ptx;
    const unsigned char *data;
} convgen_cuda_image;

/* What is loaded into one context. */
typedef struct convgen_cuda_loaded convgen_cuda_loaded;

typedef struct {
    pthread_mutex_t lock;
    convgen_cuda_loaded *loaded;
} convgen_cuda_state;

/* Launches that follow one another on one stream, and the code of their functions. */
typedef struct {
    const convgen_cuda_image *images; /* the best first */
    int image_count;
    const convgen_cuda_launch *launches;
    int launch_count;
    convgen_cuda_state *state;
} convgen_cuda_code;

typedef struct {
    convgen_kernel host; /* its tensors and pack; workspace_main is the device's workspace */
    convgen_cuda_code code;
} convgen_cuda_kernel;

/* Load code into the current context, where it is not yet, and undo that. */
int convgen_cuda_load_code(const convgen_cuda_code *code);
int convgen_cuda_unload_code(const convgen_cuda_code *code);
/* Put the launches on a stream, loading their code where nothing has yet; `buffers` are addresses by their numbers. */
int convgen_cuda_start(const convgen_cuda_code *code, const void *const *buffers, struct CUstream_st *stream);

int convgen_cuda_load(const convgen_cuda_kernel *kernel);
int convgen_cuda_unload(const convgen_cuda_kernel *kernel);
int convgen_cuda_run(const convgen_cuda_kernel *kernel, const convgen_cuda_run_args *args);
const char *convgen_cuda_status_text(int status);
const char *convgen_cuda_driver_error(void);

/* The exported functions of one kernel. */
#define CONVGEN_CUDA_ENTRY_POINTS(name, kernel)                                                              \
    CONVGEN_EXPORT int name##_sizes(convgen_sizes *sizes) { return convgen_kernel_sizes(&kernel.host, 1, sizes); } \
    CONVGEN_EXPORT int name##_pack(const convgen_pack_args *args)                                            \
    {                                                                                                        \
        return convgen_kernel_pack(&kernel.host, args);                                                      \
    }                                                                                                        \
    CONVGEN_EXPORT int name##_repack(const convgen_pack_args *args)                                          \
    {                                                                                                        \
        return convgen_kernel_repack(&kernel.host, args);                                                    \
    }                                                                                                        \
    CONVGEN_EXPORT int name##_verify_packed(const void *packed, size_t size)                                 \
    {                                                                                                        \
        return convgen_kernel_verify(&kernel.host, packed, size);                                            \
    }                                                                                                        \
    CONVGEN_EXPORT int name##_load(void) { return convgen_cuda_load(&kernel); }                              \
    CONVGEN_EXPORT int name##_unload(void) { return convgen_cuda_unload(&kernel); }                          \
    CONVGEN_EXPORT int name##_run(const convgen_cuda_run_args *args) { return convgen_cuda_run(&kernel, args); } \
    CONVGEN_EXPORT const char *name##_version(void) { return kernel.host.version; }                          \
    CONVGEN_EXPORT const char *name##_error(int status) { return convgen_cuda_status_text(status); }         \
    CONVGEN_EXPORT const char *name##_driver_error(void) { return convgen_cuda_driver_error(); }

#endif
