/* A libcuda.so.1 that executes nothing: device memory is the CPU's, and what matters is written to a log.
 *
 * Two devices, whose compute capability a test sets; contexts that tests make, besides the devices' primary ones.
 */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { DEVICES = 2, CONTEXTS = 16, RULES = 16, INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_FOUND = 500 };

typedef struct {
    int device, used;
    unsigned long long id;
} context;

typedef struct {
    context *owner;
} module;

typedef struct {
    char name[64];
} function;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char text[1 << 16];
static size_t length;
static int capability[DEVICES][2] = {{9, 0}, {9, 0}};
static context contexts[CONTEXTS] = {{0, 1, 1}, {1, 1, 2}}; /* the first are primary */
static unsigned long long last_id = 2;
static _Thread_local context *current[8];
static _Thread_local int depth;
static struct {
    char name[64];
    int value;
} failing, parameters[RULES];
static int rules;

static void note(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    pthread_mutex_lock(&lock);
    length += (size_t)vsnprintf(text + length, sizeof text - length, format, arguments);
    pthread_mutex_unlock(&lock);
    va_end(arguments);
}

static void give_time(void) { nanosleep(&(struct timespec){0, 200000}, NULL); }

#define FAIL_IF_TOLD(what)                                                                                             \
    do {                                                                                                               \
        if (strcmp(failing.name, what) == 0)                                                                           \
            return failing.value;                                                                                      \
    } while (0)

/* ---- for tests --------------------------------------------------------------------------------- */

const char *fake_log(void) { return text; }

void fake_reset(void)
{
    text[length = 0] = failing.name[0] = 0;
    rules = depth = 0;
    for (int i = DEVICES; i < CONTEXTS; ++i)
        contexts[i].used = 0;
    for (int i = 0; i < DEVICES; ++i)
        capability[i][0] = 9, capability[i][1] = 0;
}

void fake_capability(int device, int major, int minor) { capability[device][0] = major, capability[device][1] = minor; }
void fake_fail(const char *name, int error) { snprintf(failing.name, sizeof failing.name, "%s", name), failing.value = error; }

void fake_parameters(const char *name, int count) /* of a device function: cuLaunchKernel is not told */
{
    snprintf(parameters[rules].name, sizeof parameters[rules].name, "%s", name);
    parameters[rules++].value = count;
}

int fake_context(int device) /* its number; that of one that was destroyed is used again */
{
    int i = DEVICES;
    while (contexts[i].used)
        ++i;
    contexts[i] = (context){device, 1, ++last_id};
    return i;
}

void fake_destroy(int number) { contexts[number].used = 0; }
void fake_current(int number) { depth = number >= 0, current[0] = number >= 0 ? &contexts[number] : NULL; }

/* ---- the driver -------------------------------------------------------------------------------- */

int cuInit(unsigned flags)
{
    FAIL_IF_TOLD("cuInit");
    return flags != 0;
}

int cuDriverGetVersion(int *version) { return *version = 12090, 0; }
int cuDeviceGetCount(int *count) { return *count = DEVICES, 0; }
int cuDeviceGet(int *device, int number) { return number < DEVICES ? *device = number, 0 : INVALID_VALUE; }
int cuDeviceGetName(char *name, int size, int device) { return snprintf(name, (size_t)size, "Fake %d", device), 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { return *size = (size_t)(device + 1) << 30, 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    switch (attribute) {
    case 16: return *value = 132, 0;
    case 38: return *value = 50 << 20, 0;
    case 75: return *value = capability[device][0], 0;
    case 76: return *value = capability[device][1], 0;
    default: return INVALID_VALUE;
    }
}

int cuDevicePrimaryCtxRetain(void **made, int device) { return *made = &contexts[device], 0; }
int cuCtxGetCurrent(context **found) { return *found = depth ? current[depth - 1] : NULL, 0; }
int cuCtxSetCurrent(context *set) { return current[0] = set, depth = set != NULL, 0; }
int cuCtxPushCurrent_v2(context *pushed) { return current[depth++] = pushed, 0; }
int cuCtxPopCurrent_v2(context **popped) { return *popped = current[--depth], 0; }
int cuCtxGetDevice(int *device) { return depth ? *device = current[depth - 1]->device, 0 : INVALID_CONTEXT; }
int cuCtxGetId(context *of, unsigned long long *id) { return *id = of->id, 0; }
int cuCtxSynchronize(void) { return note("synchronize context\n"), 0; }

int cuModuleLoadData(module **loaded, const void *image)
{
    FAIL_IF_TOLD("cuModuleLoadData");
    give_time(); /* what must not happen meanwhile gets the time to */
    *loaded = malloc(sizeof **loaded);
    (*loaded)->owner = current[depth - 1];
    note("load %.32s into %d\n", (const char *)image, (int)((*loaded)->owner - contexts));
    return 0;
}

int cuModuleUnload(module *loaded)
{
    note("unload from %d\n", (int)(loaded->owner - contexts));
    free(loaded);
    return 0;
}

int cuModuleGetFunction(function **found, module *loaded, const char *name)
{
    FAIL_IF_TOLD("cuModuleGetFunction");
    if (loaded->owner != current[depth - 1])
        return INVALID_CONTEXT;
    *found = malloc(sizeof **found);
    snprintf((*found)->name, sizeof (*found)->name, "%s", name);
    return 0;
}

int cuFuncSetAttribute(function *of, int attribute, int value)
{
    FAIL_IF_TOLD("cuFuncSetAttribute");
    note("attribute %d of %s = %d\n", attribute, of->name, value);
    return 0;
}

int cuLaunchKernel(function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra)
{
    FAIL_IF_TOLD("cuLaunchKernel");
    give_time();
    char list[1024] = "";
    size_t end = 0;
    for (int i = 0; i < rules; ++i)
        for (int j = 0; strcmp(parameters[i].name, f->name) == 0 && j < parameters[i].value; ++j)
            end += (size_t)snprintf(list + end, sizeof list - end, " %#llx", *(unsigned long long *)arguments[j]);
    note("launch %s grid %u %u %u block %u %u %u shared %u stream %#lx:%s%s\n", f->name, gx, gy, gz, bx, by, bz, shared,
         (unsigned long)(uintptr_t)stream, list, extra != NULL ? " extra" : "");
    return 0;
}

int cuMemAlloc_v2(unsigned long long *address, size_t size)
{
    FAIL_IF_TOLD("cuMemAlloc_v2");
    void *memory = aligned_alloc(256, (size + 255) / 256 * 256);
    note("allocate %zu\n", size);
    return memory == NULL ? 2 : (*address = (uintptr_t)memory, 0);
}

int cuMemFree_v2(unsigned long long address)
{
    free((void *)(uintptr_t)address);
    return note("free\n"), 0;
}

int cuMemcpyHtoD_v2(unsigned long long to, const void *from, size_t size)
{
    memcpy((void *)(uintptr_t)to, from, size);
    return note("upload %zu\n", size), 0;
}

int cuMemcpyDtoH_v2(void *to, unsigned long long from, size_t size)
{
    memcpy(to, (void *)(uintptr_t)from, size);
    return note("download %zu\n", size), 0;
}

int cuMemsetD8_v2(unsigned long long at, unsigned char byte, size_t size)
{
    return memset((void *)(uintptr_t)at, byte, size), 0;
}

int cuStreamCreate(void **stream, unsigned flags) { return *stream = malloc(1), note("stream %u\n", flags), 0; }
int cuStreamDestroy_v2(void *stream) { return free(stream), 0; }
int cuStreamSynchronize(void *stream) { return note(stream ? "synchronize stream\n" : "synchronize default\n"), 0; }
int cuEventCreate(double **event, unsigned flags) { return *event = calloc(1, sizeof(double)), (int)flags; }
int cuEventDestroy_v2(double *event) { return free(event), 0; }

int cuEventRecord(double *event, void *stream)
{
    static double now;
    (void)stream;
    return *event = now += 2.5, 0;
}

int cuEventSynchronize(double *event) { return event == NULL; }
int cuEventElapsedTime(float *milliseconds, double *start, double *end) { return *milliseconds = (float)(*end - *start), 0; }

int cuGetErrorName(int error, const char **name)
{
    *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 200 ? "CUDA_ERROR_INVALID_IMAGE"
            : error == 100 ? "CUDA_ERROR_NO_DEVICE" : error == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : NULL;
    return *name == NULL ? INVALID_VALUE : 0;
}
