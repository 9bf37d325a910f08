/* Loads a kernel's device code through the CUDA driver and launches it.
 *
 * The driver is opened when it is first needed, so that a library loads, and packs weights, on machines
 * without one.
 */
#define _GNU_SOURCE /* secure_getenv */
#include "launch.h"

#include <dlfcn.h>
#include <stdlib.h>

/* ---- the driver -------------------------------------------------------------------------------- */

/* Of cuda.h, whose numbers are fixed. */
enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    CU_TENSOR_MAP_INTERLEAVE_NONE = 0,
    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 /* zeros */
};

/* Drivers up to CUDA 13.1 tell the copy engine that every tensor is large; of one below 128 KiB, architectures after
 * Hopper then compute wrong addresses outside of it. Source: CUTLASS, copy_traits_sm90_tma.hpp and _im2col.hpp. */
enum { LAST_WITH_LARGE_MAPS = 13010, LARGE_MAP = 1 << 17, LARGE_MAP_WORD = 1, LARGE_MAP_BIT = 21 };

typedef struct {
    _Alignas(64) uint64_t opaque[16];
} CUtensorMap;

typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

static struct {
    int (*cuCtxGetCurrent)(CUcontext *context);
    int (*cuCtxGetDevice)(int *device);
    int (*cuDeviceGetAttribute)(int *value, int attribute, int device);
    int (*cuModuleLoadData)(CUmodule *module, const void *image);
    int (*cuModuleUnload)(CUmodule module);
    int (*cuModuleGetFunction)(CUfunction *function, CUmodule module, const char *name);
    int (*cuFuncSetAttribute)(CUfunction function, int attribute, int value);
    int (*cuLaunchKernel)(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments,
                          void **extra);
    int (*cuGetErrorName)(int error, const char **name);
    int (*cuDriverGetVersion)(int *version);
    /* NULL before CUDA 12: */
    int (*cuCtxGetId)(CUcontext context, unsigned long long *id);
    int (*cuTensorMapEncodeTiled)(CUtensorMap *map, int type, unsigned rank, void *address, const uint64_t *dims,
                                  const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                                  int swizzle, int promotion, int fill);
    int (*cuTensorMapEncodeIm2col)(CUtensorMap *map, int type, unsigned rank, void *address, const uint64_t *dims,
                                   const uint64_t *strides, const int *lower, const int *upper, unsigned channels,
                                   unsigned pixels, const uint32_t *steps, int interleave, int swizzle, int promotion,
                                   int fill);
} driver;

static int has_driver, driver_version;

static int find(void *library, const char *name, void *function) /* a pointer to a pointer to a function */
{
    return (*(void **)function = dlsym(library, name)) != NULL;
}

#define FIND(name) find(library, #name, &driver.name)

static void open_driver(void)
{
    const char *named = secure_getenv("CONVGEN_CUDA_DRIVER");
    void *library = dlopen(named != NULL && *named ? named : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return;
    has_driver = FIND(cuCtxGetCurrent) && FIND(cuCtxGetDevice) && FIND(cuDeviceGetAttribute) &&
                 FIND(cuModuleLoadData) && FIND(cuModuleUnload) && FIND(cuModuleGetFunction) &&
                 FIND(cuFuncSetAttribute) && FIND(cuLaunchKernel) && FIND(cuGetErrorName) &&
                 FIND(cuDriverGetVersion);
    if (has_driver && driver.cuDriverGetVersion(&driver_version) != CUDA_SUCCESS)
        driver_version = 0; /* as an old one */
    FIND(cuCtxGetId);
    FIND(cuTensorMapEncodeTiled);
    FIND(cuTensorMapEncodeIm2col);
}

/* What the driver last said to this thread's calls. */
static _Thread_local int last_error;

static int checked(int result)
{
    if (result == CUDA_SUCCESS)
        return CONVGEN_OK;
    last_error = result;
    return CONVGEN_DRIVER_ERROR;
}

const char *convgen_cuda_driver_error(void)
{
    const char *name = NULL;
    if (last_error == CUDA_SUCCESS || driver.cuGetErrorName(last_error, &name) != CUDA_SUCCESS || name == NULL)
        return last_error == CUDA_SUCCESS ? "CUDA_SUCCESS" : "an error of the CUDA driver that it has no name for";
    return name;
}

#define RETURN_UNLESS_OK(expression)                                                                                   \
    do {                                                                                                               \
        const int status_ = (expression);                                                                              \
        if (status_ != CONVGEN_OK)                                                                                     \
            return status_;                                                                                            \
    } while (0)

/* What tells the current context from all others. A handle may be that of an earlier context that was destroyed;
 * the numbers of newer drivers are given once. */
static int current_context(unsigned long long *id)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_driver);
    if (!has_driver)
        return CONVGEN_NO_DRIVER;
    CUcontext context = NULL;
    const int result = driver.cuCtxGetCurrent(&context);
    if (result == CUDA_ERROR_NOT_INITIALIZED || (result == CUDA_SUCCESS && context == NULL))
        return CONVGEN_NO_CONTEXT;
    RETURN_UNLESS_OK(checked(result));
    *id = (uintptr_t)context;
    return driver.cuCtxGetId != NULL ? checked(driver.cuCtxGetId(context, id)) : CONVGEN_OK;
}

/* ---- loading ------------------------------------------------------------------------------------ */

struct convgen_cuda_loaded {
    convgen_cuda_loaded *next;
    unsigned long long context;
    CUmodule module;
    CUfunction functions[]; /* of the launches */
};

static int fits(const convgen_cuda_image *image, int major, int minor)
{
    if (image->exact)
        return image->major == major && image->minor == minor;
    if (image->ptx)
        return image->major < major || (image->major == major && image->minor <= minor);
    return image->major == major && image->minor <= minor;
}

static int choose_image(const convgen_cuda_code *code, const convgen_cuda_image **image)
{
    int device, major, minor;
    RETURN_UNLESS_OK(checked(driver.cuCtxGetDevice(&device)));
    RETURN_UNLESS_OK(
        checked(driver.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)));
    RETURN_UNLESS_OK(
        checked(driver.cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)));
    for (int i = 0; i < code->image_count; ++i)
        if (fits(&code->images[i], major, minor)) {
            *image = &code->images[i];
            return CONVGEN_OK;
        }
    return CONVGEN_NO_IMAGE;
}

static int find_functions(const convgen_cuda_code *code, convgen_cuda_loaded *loaded)
{
    for (int i = 0; i < code->launch_count; ++i) {
        const convgen_cuda_launch *launch = &code->launches[i];
        for (int k = 0; k < launch->argument_count; ++k)
            if (launch->arguments[k].map != NULL &&
                (driver.cuTensorMapEncodeTiled == NULL || driver.cuTensorMapEncodeIm2col == NULL))
                return CONVGEN_NO_DRIVER;
        CUfunction *function = &loaded->functions[i];
        RETURN_UNLESS_OK(checked(driver.cuModuleGetFunction(function, loaded->module, launch->function)));
        /* Needed above 48 KiB, which a function's static shared memory counts towards as well. */
        if (launch->shared > 0)
            RETURN_UNLESS_OK(checked(driver.cuFuncSetAttribute(
                *function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)launch->shared)));
    }
    return CONVGEN_OK;
}

static int load_into(const convgen_cuda_code *code, unsigned long long context)
{
    const convgen_cuda_image *image;
    RETURN_UNLESS_OK(choose_image(code, &image));
    convgen_cuda_loaded *loaded = malloc(sizeof *loaded + (size_t)code->launch_count * sizeof *loaded->functions);
    if (loaded == NULL)
        return CONVGEN_NO_MEMORY;
    int status = checked(driver.cuModuleLoadData(&loaded->module, image->data));
    if (status == CONVGEN_OK && (status = find_functions(code, loaded)) != CONVGEN_OK)
        driver.cuModuleUnload(loaded->module);
    if (status != CONVGEN_OK) {
        free(loaded);
        return status;
    }
    loaded->context = context;
    loaded->next = code->state->loaded;
    code->state->loaded = loaded;
    return CONVGEN_OK;
}

/* The link of the list that points to what is loaded into a context; the last one, NULL, where nothing is. */
static convgen_cuda_loaded **find_loaded(convgen_cuda_state *state, unsigned long long context)
{
    convgen_cuda_loaded **link = &state->loaded;
    while (*link != NULL && (*link)->context != context)
        link = &(*link)->next;
    return link;
}

/* What is loaded into the current context; it stays in its place until it is unloaded. */
static int ensure_loaded(const convgen_cuda_code *code, const convgen_cuda_loaded **loaded)
{
    unsigned long long context;
    RETURN_UNLESS_OK(current_context(&context));
    convgen_cuda_state *state = code->state;
    pthread_mutex_lock(&state->lock);
    const int status = *find_loaded(state, context) != NULL ? CONVGEN_OK : load_into(code, context);
    *loaded = *find_loaded(state, context);
    pthread_mutex_unlock(&state->lock);
    return status;
}

int convgen_cuda_load_code(const convgen_cuda_code *code)
{
    const convgen_cuda_loaded *loaded;
    return ensure_loaded(code, &loaded);
}

int convgen_cuda_unload_code(const convgen_cuda_code *code)
{
    unsigned long long context;
    RETURN_UNLESS_OK(current_context(&context));
    pthread_mutex_lock(&code->state->lock);
    convgen_cuda_loaded **link = find_loaded(code->state, context), *loaded = *link;
    if (loaded != NULL)
        *link = loaded->next;
    pthread_mutex_unlock(&code->state->lock);
    const int result = loaded != NULL ? driver.cuModuleUnload(loaded->module) : CUDA_SUCCESS;
    free(loaded);
    return checked(result);
}

int convgen_cuda_load(const convgen_cuda_kernel *kernel) { return convgen_cuda_load_code(&kernel->code); }

int convgen_cuda_unload(const convgen_cuda_kernel *kernel) { return convgen_cuda_unload_code(&kernel->code); }

/* ---- running ------------------------------------------------------------------------------------ */

typedef struct {
    const void *data;
    size_t size;
} buffer;

static int check(buffer b, size_t expected, size_t alignment)
{
    if (expected == 0)
        return b.data == NULL && b.size == 0 ? CONVGEN_OK : CONVGEN_WRONG_SIZE;
    if (b.data == NULL)
        return CONVGEN_NULL_POINTER;
    if (b.size != expected)
        return CONVGEN_WRONG_SIZE;
    return (uintptr_t)b.data % alignment ? CONVGEN_MISALIGNED : CONVGEN_OK;
}

static int overlap(buffer a, buffer b)
{
    const uintptr_t x = (uintptr_t)a.data, y = (uintptr_t)b.data;
    return x < y ? y - x < a.size && b.size > 0 : x - y < b.size && a.size > 0;
}

static int check_buffers(const convgen_kernel *host, const buffer buffers[CONVGEN_BUFFERS])
{
    RETURN_UNLESS_OK(check(buffers[CONVGEN_SRC], host->src.bytes, CONVGEN_TENSOR_ALIGNMENT));
    RETURN_UNLESS_OK(check(buffers[CONVGEN_PACKED], host->packed_size, CONVGEN_ALIGNMENT));
    RETURN_UNLESS_OK(check(buffers[CONVGEN_RESIDUAL], host->residual.bytes, CONVGEN_TENSOR_ALIGNMENT));
    RETURN_UNLESS_OK(check(buffers[CONVGEN_DST], host->dst.bytes, CONVGEN_TENSOR_ALIGNMENT));
    RETURN_UNLESS_OK(check(buffers[CONVGEN_WORKSPACE], buffers[CONVGEN_WORKSPACE].size, CONVGEN_ALIGNMENT));
    for (int i = 0; i < CONVGEN_BUFFERS; ++i) {
        if (i != CONVGEN_DST && overlap(buffers[CONVGEN_DST], buffers[i]))
            return CONVGEN_OVERLAP;
        if (i != CONVGEN_WORKSPACE && overlap(buffers[CONVGEN_WORKSPACE], buffers[i]))
            return CONVGEN_OVERLAP;
    }
    return CONVGEN_OK;
}

static int encode_mode(const convgen_cuda_map *m, void *at, CUtensorMap *map)
{
    if (m->im2col)
        return checked(driver.cuTensorMapEncodeIm2col(map, m->type, m->rank, at, m->dims, m->strides, m->lower, m->upper,
                                                      m->box[0], m->box[1], m->steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                                      m->swizzle, m->promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return checked(driver.cuTensorMapEncodeTiled(map, m->type, m->rank, at, m->dims, m->strides, m->box, m->steps,
                                                 CU_TENSOR_MAP_INTERLEAVE_NONE, m->swizzle, m->promotion,
                                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

static int encode(const convgen_cuda_map *m, const void *address, CUtensorMap *map)
{
    RETURN_UNLESS_OK(encode_mode(m, (void *)(uintptr_t)address /* its type has no const */, map));
    const uint64_t bytes = m->dims[m->rank - 1] * m->strides[m->rank - 2]; /* maps have two axes and more */
    if (driver_version <= LAST_WITH_LARGE_MAPS && bytes < LARGE_MAP)
        map->opaque[LARGE_MAP_WORD] &= ~(UINT64_C(1) << LARGE_MAP_BIT);
    return CONVGEN_OK;
}

static int launch(const convgen_cuda_launch *l, CUfunction function, const void *const *buffers, CUstream stream)
{
    const void *values[CONVGEN_MAX_LAUNCH_ARGUMENTS];
    void *arguments[CONVGEN_MAX_LAUNCH_ARGUMENTS];
    CUtensorMap maps[CONVGEN_MAX_LAUNCH_MAPS];
    int mapped = 0;
    for (int i = 0; i < l->argument_count; ++i) {
        values[i] = (const char *)buffers[l->arguments[i].buffer] + l->arguments[i].offset;
        arguments[i] = &values[i];
        if (l->arguments[i].map != NULL) {
            RETURN_UNLESS_OK(encode(l->arguments[i].map, values[i], &maps[mapped]));
            arguments[i] = &maps[mapped++];
        }
    }
    return checked(driver.cuLaunchKernel(function, l->grid[0], l->grid[1], l->grid[2], l->block[0], l->block[1],
                                         l->block[2], l->shared, stream, arguments, NULL));
}

int convgen_cuda_start(const convgen_cuda_code *code, const void *const *buffers, CUstream stream)
{
    const convgen_cuda_loaded *loaded;
    RETURN_UNLESS_OK(ensure_loaded(code, &loaded));
    for (int i = 0; i < code->launch_count; ++i)
        RETURN_UNLESS_OK(launch(&code->launches[i], loaded->functions[i], buffers, stream));
    return CONVGEN_OK;
}

int convgen_cuda_run(const convgen_cuda_kernel *kernel, const convgen_cuda_run_args *args)
{
    if (args == NULL)
        return CONVGEN_NULL_POINTER;
    const convgen_kernel *host = &kernel->host;
    if (host->empty)
        return CONVGEN_OK;
    const convgen_cuda_run_args a = *args;
    const size_t workspace = host->workspace_main;
    if (a.workspace_size < workspace) /* more is welcome: layers share one */
        return a.workspace == NULL ? CONVGEN_NULL_POINTER : CONVGEN_WRONG_SIZE;
    const buffer buffers[CONVGEN_BUFFERS] = {
        [CONVGEN_SRC] = {a.src, a.src_size},
        [CONVGEN_PACKED] = {a.packed, a.packed_size},
        [CONVGEN_RESIDUAL] = {a.residual, a.residual_size},
        [CONVGEN_DST] = {a.dst, a.dst_size},
        [CONVGEN_WORKSPACE] = {workspace > 0 ? a.workspace : NULL, workspace},
    };
    RETURN_UNLESS_OK(check_buffers(host, buffers));
    const void *data[CONVGEN_BUFFERS];
    for (int i = 0; i < CONVGEN_BUFFERS; ++i)
        data[i] = buffers[i].data;
    return convgen_cuda_start(&kernel->code, data, a.stream);
}

const char *convgen_cuda_status_text(int status)
{
    switch (status) {
    case CONVGEN_MISALIGNED: return "packed or workspace is not aligned to 64 bytes, or a tensor not to 16";
    case CONVGEN_NO_DRIVER: return "there is no CUDA driver (libcuda.so.1, or what CONVGEN_CUDA_DRIVER names), or an old one";
    case CONVGEN_NO_CONTEXT: return "no CUDA context is current on this thread";
    case CONVGEN_NO_IMAGE: return "the library has no code for this device";
    case CONVGEN_DRIVER_ERROR: return "the CUDA driver reported an error";
    default: return convgen_status_text(status);
    }
}
