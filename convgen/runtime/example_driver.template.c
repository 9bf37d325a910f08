/* ---- the CUDA driver --------------------------------------------------------------------------- */

/* A program of its own would include cuda.h and link with -lcuda, or use CUDA's runtime. Here the few functions are
 * found at run time, so that this compiles without CUDA. */
#include <dlfcn.h>

typedef unsigned long long device_memory; /* CUdeviceptr */

static int (*cuInit)(unsigned flags);
static int (*cuDeviceGet)(int *device, int number);
static int (*cuDevicePrimaryCtxRetain)(void **context, int device);
static int (*cuCtxSetCurrent)(void *context);
static int (*cuMemAlloc)(device_memory *memory, size_t size);
static int (*cuMemFree)(device_memory memory);
static int (*cuMemcpyHtoD)(device_memory to, const void *from, size_t size);
static int (*cuMemcpyDtoH)(void *to, device_memory from, size_t size);
static int (*cuStreamCreate)(struct CUstream_st **stream, unsigned flags);
static int (*cuStreamSynchronize)(struct CUstream_st *stream);
static int (*cuGetErrorName)(int error, const char **name);

static void driver_must(const char *what, int result)
{
    if (result != 0) {
        const char *name = "an unknown error";
        cuGetErrorName(result, &name);
        fprintf(stderr, "%s: %s\n", what, name);
        exit(1);
    }
}

static void find(void *driver, const char *name, void *function)
{
    if ((*(void **)function = dlsym(driver, name)) == NULL) {
        fprintf(stderr, "the CUDA driver has no %s\n", name);
        exit(1);
    }
}

/* Makes the first device's primary context current: the one CUDA's runtime uses. */
static void open_device(void)
{
    const char *named = getenv("CONVGEN_CUDA_DRIVER"); /* as the library has it */
    void *driver = dlopen(named != NULL && *named ? named : "libcuda.so.1", RTLD_NOW), *context;
    int device;
    if (driver == NULL) {
        fprintf(stderr, "no CUDA driver: %s\n", dlerror());
        exit(1);
    }
    find(driver, "cuInit", &cuInit);
    find(driver, "cuDeviceGet", &cuDeviceGet);
    find(driver, "cuDevicePrimaryCtxRetain", &cuDevicePrimaryCtxRetain);
    find(driver, "cuCtxSetCurrent", &cuCtxSetCurrent);
    find(driver, "cuMemAlloc_v2", &cuMemAlloc);
    find(driver, "cuMemFree_v2", &cuMemFree);
    find(driver, "cuMemcpyHtoD_v2", &cuMemcpyHtoD);
    find(driver, "cuMemcpyDtoH_v2", &cuMemcpyDtoH);
    find(driver, "cuStreamCreate", &cuStreamCreate);
    find(driver, "cuStreamSynchronize", &cuStreamSynchronize);
    find(driver, "cuGetErrorName", &cuGetErrorName);
    driver_must("cuInit", cuInit(0));
    driver_must("cuDeviceGet", cuDeviceGet(&device, 0));
    driver_must("cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain(&context, device));
    driver_must("cuCtxSetCurrent", cuCtxSetCurrent(context));
}

/* Device memory with a copy of these bytes; without one where there are none. */
static void *upload(const void *from, size_t size)
{
    device_memory memory = 0;
    if (size > 0) {
        driver_must("cuMemAlloc", cuMemAlloc(&memory, size));
        if (from != NULL)
            driver_must("cuMemcpyHtoD", cuMemcpyHtoD(memory, from, size));
    }
    return (void *)(size_t)memory;
}

static device_memory address(const void *memory) { return (device_memory)(size_t)memory; }

static void release(const void *memory)
{
    if (memory != NULL)
        driver_must("cuMemFree", cuMemFree(address(memory)));
}

static void must_on_device(const char *what, int status)
{
    if (status == CONVGEN_DRIVER_ERROR)
        fprintf(stderr, "%s\n", ${name}_driver_error());
    must(what, status);
}
