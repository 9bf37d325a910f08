/* Between the runtime and the entry points of one kernel; not installed. */
#ifndef CONVGEN_RUNTIME_H
#define CONVGEN_RUNTIME_H

/* What asks the CPU for instructions must do without them, whatever the compiler is set to by CC or, in some
 * distributions, from the start. It comes before all else: functions of system headers count, too. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64")
#endif

#include <stdint.h>

#include "types.h"

/* The part of DLPack's and tvm-ffi's C ABI that generated code uses, layout for layout. */
typedef struct {
    int32_t device_type; /* 1: CPU */
    int32_t device_id;
} convgen_device;

typedef struct {
    uint8_t code; /* 1: unsigned integer (bfloat16 is handled as its bits), 2: floating point */
    uint8_t bits;
    uint16_t lanes;
} convgen_dtype;

typedef struct {
    void *data;
    convgen_device device;
    int32_t ndim;
    convgen_dtype dtype;
    const int64_t *shape;
    const int64_t *strides; /* NULL: dense, row-major */
    uint64_t byte_offset;
} convgen_dltensor; /* DLTensor */

typedef struct {
    int32_t type_index; /* 7: DLTensor * */
    uint32_t zero_padding;
    union {
        int64_t v_int64;
        void *v_ptr;
    } value;
} convgen_any; /* TVMFFIAny */

typedef int (*convgen_function)(void *self, const convgen_any *args, int32_t count, convgen_any *result);

typedef struct {
    void *sync_handle;
    int32_t num_task;
} convgen_group; /* TVMParallelGroupEnv */

typedef int (*convgen_lambda)(int task, convgen_group *group, void *closure); /* FTVMParallelLambda */

/* One tensor of a kernel. ndim 0: the kernel has no such tensor. */
typedef struct {
    int32_t ndim;
    convgen_dtype dtype;
    const int64_t *shape;
    size_t bytes;
    size_t offset; /* of a packed tensor, in the packed buffer */
} convgen_tensor;

enum { CONVGEN_MAX_PACKED = 16 };

typedef struct {
    convgen_tensor src, weights, bias, slope, scale, src_zero, weights_zero, dst_zero, sum, residual, dst;
    const convgen_tensor *packed;
    int packed_count;
    int empty; /* batch 0: nothing to compute */
    size_t packed_size, workspace_main, workspace_task;
    uint64_t identity[2]; /* what a packed buffer is tied to */
    convgen_function pack, main;
    int (*cpu_supported)(void);
    const char *version;
} convgen_kernel;

/* The first bytes of a packed buffer; the tensors follow, each at a multiple of 64. */
typedef struct {
    uint64_t magic;
    uint32_t abi, header_size;
    uint64_t identity[2];
    uint64_t payload_size, checksum;
    uint64_t reserved[2];
} convgen_packed_header;

_Static_assert(sizeof(convgen_packed_header) == CONVGEN_ALIGNMENT, "the tensors after the header must be aligned");

typedef void (*convgen_task)(void *context, int task, int tasks);

/* The public head of a pool. Kernels of other libraries reach a pool only through it, so a change
 * here is a change of CONVGEN_ABI. */
struct convgen_pool {
    uint32_t abi;
    int32_t threads;
    int (*acquire)(convgen_pool *pool); /* 1: the caller has the pool to itself until release */
    void (*release)(convgen_pool *pool);
    void (*launch)(convgen_pool *pool, convgen_task task, void *context); /* returns when all tasks are done */
    void (*destroy)(convgen_pool *pool);
};

/* A pool in the caller's memory, of that many bytes and aligned, whose threads a program lends for a while: each calls
 * work() with a number of its own, 1 … threads - 1, and returns from it after stop(). Threads may come late or not at all:
 * their tasks are the launching thread's. After the last one has returned, end(). */
size_t convgen_lent_size(int threads);
convgen_pool *convgen_lend(void *memory, int threads);
void convgen_lent_work(convgen_pool *pool, int number);
void convgen_lent_stop(convgen_pool *pool);
void convgen_lent_end(convgen_pool *pool);

/* One call of generated code. Its workspace is [main][task 0][task 1]...; code that packs has none and
 * allocates from the heap, because packing is rare and its needs are not worth a buffer. */
typedef struct {
    convgen_pool *pool; /* acquired for this call, or NULL */
    char *shares;       /* of the tasks; NULL: heap */
    size_t share;
} convgen_call;

static inline size_t convgen_round_up(size_t size)
{
    return (size + CONVGEN_ALIGNMENT - 1) & ~(size_t)(CONVGEN_ALIGNMENT - 1);
}

/* Whether denormals are flushed and how results are rounded is a property of a thread. Those that take part in a call
 * take the caller's, so that results do not depend on them, and get theirs back: they may be a program's. */
static inline unsigned convgen_float_mode(void)
{
#ifdef __x86_64__
    return __builtin_ia32_stmxcsr();
#else
    return 0;
#endif
}

static inline void convgen_set_float_mode(unsigned mode)
{
#ifdef __x86_64__
    const unsigned flags = 0x3f; /* what has happened so far: no part of the mode */
    if ((__builtin_ia32_stmxcsr() ^ mode) & ~flags)
        __builtin_ia32_ldmxcsr(mode & ~flags);
#else
    (void)mode;
#endif
}

/* Run generated code. */
int convgen_enter(const convgen_call *call, char *main_workspace, convgen_function function, const convgen_any *args,
                  int count);
/* A status: whether a buffer is what it must be. */
int convgen_check_buffer(const void *data, size_t size, size_t expected, size_t alignment);
int convgen_overlap(const void *a, size_t a_size, const void *b, size_t b_size);
uint64_t convgen_checksum(const void *payload, size_t size); /* size is a multiple of 64 */

int convgen_kernel_sizes(const convgen_kernel *kernel, int threads, convgen_sizes *sizes);
int convgen_kernel_pack(const convgen_kernel *kernel, const convgen_pack_args *args);
/* The same without the checksum: a run takes it, verify refuses it. */
int convgen_kernel_repack(const convgen_kernel *kernel, const convgen_pack_args *args);
int convgen_kernel_run(const convgen_kernel *kernel, const convgen_run_args *args);
int convgen_kernel_verify(const convgen_kernel *kernel, const void *packed, size_t size);
int convgen_create_pool(int threads, convgen_pool **pool);
int convgen_borrow_pool(int threads, convgen_parallel_for loop, void *context, convgen_pool **pool);
void convgen_destroy_pool(convgen_pool *pool);
const char *convgen_status_text(int status);

#define CONVGEN_EXPORT __attribute__((visibility("default")))

/* The exported functions of one kernel. */
#define CONVGEN_ENTRY_POINTS(name, kernel)                                                                  \
    CONVGEN_EXPORT int name##_sizes(int threads, convgen_sizes *sizes)                                      \
    {                                                                                                       \
        return convgen_kernel_sizes(&kernel, threads, sizes);                                               \
    }                                                                                                       \
    CONVGEN_EXPORT int name##_pack(const convgen_pack_args *args) { return convgen_kernel_pack(&kernel, args); } \
    CONVGEN_EXPORT int name##_repack(const convgen_pack_args *args)                                         \
    {                                                                                                       \
        return convgen_kernel_repack(&kernel, args);                                                        \
    }                                                                                                       \
    CONVGEN_EXPORT int name##_run(const convgen_run_args *args) { return convgen_kernel_run(&kernel, args); } \
    CONVGEN_EXPORT int name##_verify_packed(const void *packed, size_t size)                                \
    {                                                                                                       \
        return convgen_kernel_verify(&kernel, packed, size);                                                \
    }                                                                                                       \
    CONVGEN_COMMON_ENTRY_POINTS(name, kernel, convgen_status_text)

/* What a kernel's library and a network's both export; text: of a status. */
#define CONVGEN_COMMON_ENTRY_POINTS(name, code, text)                                                       \
    CONVGEN_EXPORT int name##_check_cpu(void)                                                               \
    {                                                                                                       \
        return code.cpu_supported() ? CONVGEN_OK : CONVGEN_UNSUPPORTED_CPU;                                 \
    }                                                                                                       \
    CONVGEN_EXPORT const char *name##_version(void) { return code.version; }                                \
    CONVGEN_EXPORT const char *name##_error(int status) { return text(status); }                            \
    CONVGEN_EXPORT int name##_pool_create(int threads, convgen_pool **pool)                                 \
    {                                                                                                       \
        return convgen_create_pool(threads, pool);                                                          \
    }                                                                                                       \
    CONVGEN_EXPORT int name##_pool_borrow(int threads, convgen_parallel_for loop, void *context,            \
                                          convgen_pool **pool)                                              \
    {                                                                                                       \
        return convgen_borrow_pool(threads, loop, context, pool);                                           \
    }                                                                                                       \
    CONVGEN_EXPORT void name##_pool_destroy(convgen_pool *pool) { convgen_destroy_pool(pool); }

#endif
