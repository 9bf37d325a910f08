/* A CUDA driver whose devices are this CPU: modules are shared libraries of kernels that emulate.cpp runs.
 *
 * For tests of what calls the driver, and strict as the driver is or more: it takes no pointer that it did not
 * give, no handle of another context, and after a kernel's fault a context refuses everything. Device memory is
 * host memory that ends at a page which may not be touched. Everything is done when a call returns.
 *
 * CONVGEN_EMULATED_ORDER: -1 ascending, -2 descending, or a seed. Compiled with MAJOR, MINOR and DEVICES.
 *
 * Source: CUDA Driver API, whose numbers and signatures these are.
 */
#define CONVGEN_OLD_DRIVER /* 12.9: see cuDriverGetVersion */
#include "emulated_map.h"
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <elf.h>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_FAILED = 719,
    CONTEXT_IS_DESTROYED = 709,
};

const std::map<int, const char *> NAMES = {
    {SUCCESS, "CUDA_SUCCESS"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
    {CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED"},
};

struct Context {
    int device;
    uint64_t id;
    int retained = 0;
    Result fault = SUCCESS; /* of a kernel: for good */
};

struct Module {
    Context *context;
    void *library;
    int file; /* stays open: its number is part of the library's name */
};

struct Function {
    Module *module;
    const char *(*launch)(const unsigned *, const unsigned *, size_t, void *const *, long long);
    int parameters;
    int shared = 48 << 10; /* it may have dynamically */
};

struct Stream {
    Context *context;
};

struct Event {
    Context *context;
    std::chrono::steady_clock::time_point at;
    bool recorded = false;
};

struct Block {
    char *map;
    size_t mapped, size;
};

std::recursive_mutex lock;
bool initialized;
uint64_t contexts_made;
std::map<int, Context *> primary;
std::set<Context *> contexts;
std::set<Module *> modules;
std::set<Function *> functions;
std::set<Stream *> streams;
std::set<Event *> events;
std::map<uint64_t, Block> blocks; /* device memory by its address */
thread_local std::vector<Context *> stack;

int shared_limit()
{
    switch (MAJOR * 10 + MINOR) {
    case 70: return 96 << 10;
    case 75: return 64 << 10;
    case 86: case 89: case 120: return 99 << 10;
    case 80: case 87: return 163 << 10;
    default: return 227 << 10;
    }
}

Context *current() { return stack.empty() ? nullptr : stack.back(); }

/* Whether calls may be made at all. */
Result ready()
{
    if (!initialized)
        return NOT_INITIALIZED;
    if (!current())
        return INVALID_CONTEXT;
    if (!contexts.count(current()))
        return CONTEXT_IS_DESTROYED;
    return current()->fault;
}

bool is_device(uint64_t address, size_t size)
{
    auto after = blocks.upper_bound(address);
    if (after == blocks.begin())
        return false;
    const auto &[begin, block] = *--after;
    return address + size <= begin + block.size;
}

Result close_module(Module *module)
{
    for (auto at = functions.begin(); at != functions.end();)
        if ((*at)->module == module) {
            delete *at;
            at = functions.erase(at);
        } else {
            ++at;
        }
    modules.erase(module);
    dlclose(module->library);
    close(module->file);
    delete module;
    return SUCCESS;
}

void destroy(Context *context)
{
    for (Module *module : std::set<Module *>(modules))
        if (module->context == context)
            close_module(module);
    contexts.erase(context);
    delete context;
}

Context *make_context(int device)
{
    Context *context = new Context{device, ++contexts_made};
    contexts.insert(context);
    return context;
}

} // namespace

#define API extern "C" __attribute__((visibility("default"))) int
#define HOLD std::lock_guard<std::recursive_mutex> hold(lock)
#define NEED(condition, error)                                                                                 \
    if (!(condition))                                                                                          \
        return error;
#define NEED_CONTEXT                                                                                           \
    HOLD;                                                                                                      \
    if (Result result = ready())                                                                               \
        return result;

/* ---- devices and contexts ------------------------------------------------------------------------ */

API cuInit(unsigned flags)
{
    HOLD;
    NEED(!flags, INVALID_VALUE)
    initialized = true;
    return SUCCESS;
}

API cuDriverGetVersion(int *version) { return *version = 12090, SUCCESS; }

API cuDeviceGetCount(int *count)
{
    NEED(initialized, NOT_INITIALIZED)
    return *count = DEVICES, SUCCESS;
}

API cuDeviceGet(int *device, int ordinal)
{
    NEED(initialized, NOT_INITIALIZED)
    NEED(0 <= ordinal && ordinal < DEVICES, INVALID_DEVICE)
    return *device = ordinal, SUCCESS;
}

API cuDeviceGetName(char *name, int size, int device)
{
    NEED(initialized, NOT_INITIALIZED)
    NEED(0 <= device && device < DEVICES, INVALID_DEVICE)
    return snprintf(name, size, "Emulated sm_%d%d", MAJOR, MINOR), SUCCESS;
}

API cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    NEED(0 <= device && device < DEVICES, INVALID_DEVICE)
    return *bytes = size_t(1) << 32, SUCCESS;
}

API cuDeviceGetUuid_v2(void *uuid, int device)
{
    NEED(0 <= device && device < DEVICES, INVALID_DEVICE)
    return memset(uuid, device + 1, 16), SUCCESS;
}

API cuDeviceGetAttribute(int *value, int attribute, int device)
{
    NEED(initialized, NOT_INITIALIZED)
    NEED(0 <= device && device < DEVICES, INVALID_DEVICE)
    const std::map<int, int> values = {
        {1, 1024},                /* MAX_THREADS_PER_BLOCK */
        {2, 1024},                /* MAX_BLOCK_DIM_X */
        {3, 1024},                /* MAX_BLOCK_DIM_Y */
        {4, 64},                  /* MAX_BLOCK_DIM_Z */
        {5, 0x7fffffff},          /* MAX_GRID_DIM_X */
        {6, 65535},               /* MAX_GRID_DIM_Y */
        {7, 65535},               /* MAX_GRID_DIM_Z */
        {8, 48 << 10},            /* MAX_SHARED_MEMORY_PER_BLOCK */
        {10, 32},                 /* WARP_SIZE */
        {12, 1 << 16},            /* MAX_REGISTERS_PER_BLOCK */
        {13, 1000000},            /* CLOCK_RATE, kHz */
        {16, 8},                  /* MULTIPROCESSOR_COUNT */
        {33, 0},                  /* PCI_BUS_ID */
        {34, device},             /* PCI_DEVICE_ID */
        {36, 1000000},            /* MEMORY_CLOCK_RATE, kHz */
        {37, 256},                /* GLOBAL_MEMORY_BUS_WIDTH */
        {38, 4 << 20},            /* L2_CACHE_SIZE */
        {39, 1024},               /* MAX_THREADS_PER_MULTIPROCESSOR */
        {41, 1},                  /* UNIFIED_ADDRESSING */
        {75, MAJOR},              /* COMPUTE_CAPABILITY_MAJOR */
        {76, MINOR},              /* COMPUTE_CAPABILITY_MINOR */
        {81, shared_limit()},     /* MAX_SHARED_MEMORY_PER_MULTIPROCESSOR */
        {82, 1 << 16},            /* MAX_REGISTERS_PER_MULTIPROCESSOR */
        {97, shared_limit()},     /* MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
    };
    const auto found = values.find(attribute);
    return *value = found == values.end() ? 0 : found->second, SUCCESS;
}

API cuDevicePrimaryCtxRetain(Context **context, int device)
{
    HOLD;
    NEED(initialized, NOT_INITIALIZED)
    NEED(0 <= device && device < DEVICES, INVALID_DEVICE)
    Context *&own = primary[device];
    if (!own)
        own = make_context(device);
    ++own->retained;
    return *context = own, SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int device)
{
    HOLD;
    NEED(primary[device], INVALID_CONTEXT)
    if (!--primary[device]->retained) {
        destroy(primary[device]);
        primary[device] = nullptr;
    }
    return SUCCESS;
}

API cuCtxCreate_v2(Context **context, unsigned, int device)
{
    HOLD;
    NEED(initialized, NOT_INITIALIZED)
    NEED(0 <= device && device < DEVICES, INVALID_DEVICE)
    stack.push_back(*context = make_context(device));
    return SUCCESS;
}

API cuCtxDestroy_v2(Context *context)
{
    HOLD;
    NEED(contexts.count(context), INVALID_CONTEXT)
    if (current() == context)
        stack.pop_back();
    destroy(context);
    return SUCCESS;
}

API cuCtxGetCurrent(Context **context)
{
    NEED(initialized, NOT_INITIALIZED)
    return *context = current(), SUCCESS;
}

API cuCtxSetCurrent(Context *context)
{
    HOLD;
    NEED(initialized, NOT_INITIALIZED)
    NEED(!context || contexts.count(context), INVALID_CONTEXT)
    if (!stack.empty())
        stack.pop_back();
    if (context)
        stack.push_back(context);
    return SUCCESS;
}

API cuCtxPushCurrent_v2(Context *context)
{
    HOLD;
    NEED(initialized, NOT_INITIALIZED)
    NEED(contexts.count(context), INVALID_CONTEXT)
    stack.push_back(context);
    return SUCCESS;
}

API cuCtxPopCurrent_v2(Context **context)
{
    NEED(current(), INVALID_CONTEXT)
    if (context)
        *context = current();
    stack.pop_back();
    return SUCCESS;
}

API cuCtxGetDevice(int *device)
{
    HOLD;
    NEED(initialized, NOT_INITIALIZED)
    NEED(contexts.count(current()), INVALID_CONTEXT)
    return *device = current()->device, SUCCESS;
}

API cuCtxGetId(Context *context, unsigned long long *id)
{
    HOLD;
    context = context ? context : current();
    NEED(contexts.count(context), INVALID_CONTEXT)
    return *id = context->id, SUCCESS;
}

API cuCtxSynchronize()
{
    NEED_CONTEXT
    return SUCCESS;
}

/* ---- memory -------------------------------------------------------------------------------------- */

API cuMemAlloc_v2(uint64_t *address, size_t size)
{
    NEED_CONTEXT
    NEED(size, INVALID_VALUE)
    const size_t page = 4096, inner = (size + page - 1) / page * page, mapped = inner + page;
    char *map = (char *)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return OUT_OF_MEMORY;
    mprotect(map + inner, page, PROT_NONE);
    memset(map, 0xff, inner); /* NaN */
    *address = (uint64_t)(map + inner - (size + 63) / 64 * 64); /* less than the driver's 256: closer to the page */
    blocks[*address] = {map, mapped, size};
    return SUCCESS;
}

API cuMemFree_v2(uint64_t address)
{
    NEED_CONTEXT
    NEED(address, SUCCESS)
    const auto found = blocks.find(address);
    NEED(found != blocks.end(), INVALID_VALUE)
    munmap(found->second.map, found->second.mapped);
    blocks.erase(found);
    return SUCCESS;
}

API cuMemGetInfo_v2(size_t *available, size_t *total)
{
    NEED_CONTEXT
    return *available = *total = size_t(1) << 32, SUCCESS;
}

API cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size)
{
    NEED_CONTEXT
    NEED(!size || is_device(to, size), INVALID_VALUE)
    return memcpy((void *)to, from, size), SUCCESS;
}

API cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size)
{
    NEED_CONTEXT
    NEED(!size || is_device(from, size), INVALID_VALUE)
    return memcpy(to, (const void *)from, size), SUCCESS;
}

API cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t size)
{
    NEED_CONTEXT
    NEED(!size || (is_device(to, size) && is_device(from, size)), INVALID_VALUE)
    return memcpy((void *)to, (const void *)from, size), SUCCESS;
}

API cuMemsetD8_v2(uint64_t to, unsigned char value, size_t size)
{
    NEED_CONTEXT
    NEED(!size || is_device(to, size), INVALID_VALUE)
    return memset((void *)to, value, size), SUCCESS;
}

static int check_stream(Stream *stream)
{
    /* 0, 1 and 2 are the default stream, of all threads or of each */
    return (uintptr_t)stream <= 2 || (streams.count(stream) && stream->context == current()) ? SUCCESS : INVALID_HANDLE;
}

#define NEED_STREAM                                                                                            \
    NEED_CONTEXT                                                                                               \
    if (int result = check_stream(stream))                                                                     \
        return result;

API cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, Stream *stream)
{
    NEED_STREAM
    return cuMemcpyHtoD_v2(to, from, size);
}

API cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, Stream *stream)
{
    NEED_STREAM
    return cuMemcpyDtoH_v2(to, from, size);
}

API cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, Stream *stream)
{
    NEED_STREAM
    return cuMemsetD8_v2(to, value, size);
}

API cuPointerGetAttribute(void *data, int attribute, uint64_t address)
{
    HOLD;
    NEED(initialized, NOT_INITIALIZED)
    NEED(is_device(address, 1), INVALID_VALUE)
    switch (attribute) {
    case 2: return *(unsigned *)data = 2, SUCCESS;      /* MEMORY_TYPE: device */
    case 3: return *(uint64_t *)data = address, SUCCESS; /* DEVICE_POINTER */
    case 9: return *(int *)data = 0, SUCCESS;           /* DEVICE_ORDINAL */
    default: return INVALID_VALUE;
    }
}

/* ---- streams and events -------------------------------------------------------------------------- */

API cuStreamCreate(Stream **stream, unsigned)
{
    NEED_CONTEXT
    streams.insert(*stream = new Stream{current()});
    return SUCCESS;
}

API cuStreamDestroy_v2(Stream *stream)
{
    HOLD;
    NEED(streams.erase(stream), INVALID_HANDLE)
    delete stream;
    return SUCCESS;
}

API cuStreamSynchronize(Stream *stream)
{
    NEED_STREAM
    return SUCCESS;
}

API cuStreamQuery(Stream *stream) { return cuStreamSynchronize(stream); }

API cuStreamGetCtx(Stream *stream, Context **context)
{
    NEED_STREAM
    return *context = current(), SUCCESS;
}

API cuEventCreate(Event **event, unsigned)
{
    NEED_CONTEXT
    events.insert(*event = new Event{current()});
    return SUCCESS;
}

API cuEventDestroy_v2(Event *event)
{
    HOLD;
    NEED(events.erase(event), INVALID_HANDLE)
    delete event;
    return SUCCESS;
}

API cuEventRecord(Event *event, Stream *stream)
{
    NEED_STREAM
    NEED(events.count(event) && event->context == current(), INVALID_HANDLE)
    event->at = std::chrono::steady_clock::now();
    event->recorded = true;
    return SUCCESS;
}

API cuStreamWaitEvent(Stream *stream, Event *event, unsigned)
{
    NEED_STREAM
    NEED(events.count(event), INVALID_HANDLE)
    return SUCCESS;
}

API cuEventSynchronize(Event *event)
{
    NEED_CONTEXT
    NEED(events.count(event), INVALID_HANDLE)
    return SUCCESS;
}

API cuEventQuery(Event *event) { return cuEventSynchronize(event); }

API cuEventElapsedTime(float *milliseconds, Event *start, Event *end)
{
    NEED_CONTEXT
    NEED(events.count(start) && events.count(end) && start->recorded && end->recorded, INVALID_HANDLE)
    *milliseconds = std::chrono::duration<float, std::milli>(end->at - start->at).count();
    return SUCCESS;
}

/* ---- modules and launches ------------------------------------------------------------------------ */

API cuModuleLoadData(Module **module, const void *image)
{
    NEED_CONTEXT
    NEED(image, INVALID_VALUE)
    const auto *header = (const Elf64_Ehdr *)image;
    if (memcmp(image, ELFMAG, SELFMAG))
        return INVALID_IMAGE;
    if (header->e_machine == 190) /* EM_CUDA */
        return NO_BINARY_FOR_GPU;
    /* The table of sections ends the file. */
    const size_t size = header->e_shoff + size_t(header->e_shnum) * header->e_shentsize;
    const int file = memfd_create("kernels", 0);
    const std::string path = "/proc/self/fd/" + std::to_string(file);
    void *library = nullptr;
    if (file >= 0 && write(file, image, size) == (ssize_t)size)
        library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "cuModuleLoadData: %s\n", dlerror());
        close(file);
        return INVALID_IMAGE;
    }
    modules.insert(*module = new Module{current(), library, file});
    return SUCCESS;
}

API cuModuleLoadDataEx(Module **module, const void *image, unsigned, int *, void **)
{
    return cuModuleLoadData(module, image);
}

API cuModuleUnload(Module *module)
{
    NEED_CONTEXT
    NEED(modules.count(module) && module->context == current(), INVALID_HANDLE)
    return close_module(module);
}

API cuModuleGetFunction(Function **function, Module *module, const char *name)
{
    NEED_CONTEXT
    NEED(modules.count(module) && module->context == current(), INVALID_HANDLE)
    const std::string base = name;
    auto launch = (decltype(Function::launch))dlsym(module->library, (base + "_launch").c_str());
    auto parameters = (int (*)())dlsym(module->library, (base + "_parameters").c_str());
    NEED(launch && parameters, NOT_FOUND)
    functions.insert(*function = new Function{module, launch, parameters()});
    return SUCCESS;
}

API cuFuncSetAttribute(Function *function, int attribute, int value)
{
    NEED_CONTEXT
    NEED(functions.count(function), INVALID_HANDLE)
    if (attribute == 8) { /* MAX_DYNAMIC_SHARED_SIZE_BYTES */
        NEED(0 <= value && value <= shared_limit(), INVALID_VALUE)
        function->shared = value;
    }
    return SUCCESS;
}

API cuFuncGetAttribute(int *value, int attribute, Function *function)
{
    NEED_CONTEXT
    NEED(functions.count(function), INVALID_HANDLE)
    return *value = attribute == 8 ? function->shared : 0, SUCCESS;
}

API cuLaunchKernel(Function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, Stream *stream, void **arguments, void **)
{
    NEED_STREAM
    NEED(functions.count(function) && function->module->context == current(), INVALID_HANDLE)
    const unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
    NEED(grid_x && grid_y && grid_z && grid_x < 1u << 31 && grid_y < 1 << 16 && grid_z < 1 << 16, INVALID_VALUE)
    NEED(block_x && block_y && block_z && block_x <= 1024 && block_y <= 1024 && block_z <= 64, INVALID_VALUE)
    NEED(block_x * block_y * block_z <= 1024, INVALID_VALUE)
    NEED(shared <= (unsigned)function->shared, INVALID_VALUE)
    for (int i = 0; i < function->parameters; ++i) {
        const uint64_t address = *(uint64_t *)arguments[i];
        if (address && !is_device(address, 1)) {
            fprintf(stderr, "cuLaunchKernel: argument %d is no device memory\n", i);
            current()->fault = ILLEGAL_ADDRESS;
            return SUCCESS; /* a launch is asynchronous: what comes after it tells */
        }
    }
    const char *order = getenv("CONVGEN_EMULATED_ORDER");
    const char *fault = function->launch(grid, block, shared, arguments, order ? atoll(order) : -1);
    if (fault) {
        fprintf(stderr, "cuLaunchKernel: %s\n", fault);
        current()->fault = LAUNCH_FAILED;
    }
    return SUCCESS;
}

/* ---- errors and entry points ---------------------------------------------------------------------- */

API cuGetErrorName(int error, const char **name)
{
    const auto found = NAMES.find(error);
    *name = found == NAMES.end() ? nullptr : found->second;
    return *name ? SUCCESS : INVALID_VALUE;
}

API cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }

/* The newest of a function's versions, as callers that pass a version of CUDA 12 mean. */
API cuGetProcAddress_v2(const char *name, void **function, int, uint64_t, int *status)
{
    Dl_info self;
    dladdr((void *)cuInit, &self);
    void *library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *function = nullptr;
    for (const char *version : {"_v2", ""})
        if (!*function)
            *function = dlsym(library, (std::string(name) + version).c_str());
    dlclose(library);
    if (status)
        *status = *function ? 0 : 1; /* SYMBOL_NOT_FOUND */
    return *function ? SUCCESS : NOT_FOUND;
}

API cuGetProcAddress(const char *name, void **function, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}

/* What NVIDIA's compiler asks of a driver that it finds loaded; it does without. */
API cuGetExportTable(const void **table, const void *) { return *table = nullptr, NOT_FOUND; }
