/* Calls generated code and gives it what TVM's runtime would: parallel launches and workspace.
 *
 * Generated code reaches the runtime through a few data symbols that it defines weakly as NULL; the
 * definitions at the end of this file take their place at link time, so there is nothing to set up.
 */
#include "runtime.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static const uint64_t MAGIC = 0x6b636170766e6f63; /* "convpack" */

/* ---- workspace ------------------------------------------------------------------------------- */

typedef struct heap_block {
    _Alignas(CONVGEN_ALIGNMENT) struct heap_block *next;
} heap_block;

/* What the running thread allocates from. Generated code frees in reverse order. */
typedef struct {
    const convgen_call *call;
    char *top, *end;
    heap_block *blocks;
    int in_task;
} frame;

static _Thread_local frame *current;

static void *allocate(int device_type, int device_id, uint64_t size, int dtype_code, int dtype_bits)
{
    (void)device_type, (void)device_id, (void)dtype_code, (void)dtype_bits;
    frame *f = current;
    if (size > SIZE_MAX - 2 * CONVGEN_ALIGNMENT)
        return NULL;
    size = convgen_round_up(size);
    if (f->call->shares == NULL) {
        heap_block *block = aligned_alloc(CONVGEN_ALIGNMENT, sizeof(heap_block) + size);
        if (block == NULL)
            return NULL;
        block->next = f->blocks;
        f->blocks = block;
        return block + 1;
    }
    if (size > (size_t)(f->end - f->top))
        return NULL;
    char *start = f->top;
    f->top += size;
    return start;
}

static void pop_block(frame *f)
{
    heap_block *block = f->blocks;
    f->blocks = block->next;
    free(block);
}

static int deallocate(int device_type, int device_id, void *start)
{
    (void)device_type, (void)device_id;
    frame *f = current;
    if (f->call->shares != NULL)
        f->top = start;
    else if (f->blocks != NULL && f->blocks + 1 == (heap_block *)start)
        pop_block(f);
    else
        return -1;
    return 0;
}

/* ---- parallel regions ------------------------------------------------------------------------ */

typedef struct {
    const convgen_call *call;
    convgen_lambda lambda;
    void *closure;
    unsigned mode;
    atomic_int failed;
} region;

static void run_task(void *context, int task, int tasks)
{
    region *r = context;
    char *share = r->call->shares ? r->call->shares + (size_t)task * r->call->share : NULL;
    frame f = {.call = r->call, .top = share, .end = share + r->call->share, .in_task = 1};
    frame *outer = current;
    convgen_group group = {NULL, tasks};
    const unsigned own_mode = convgen_float_mode();
    current = &f;
    convgen_set_float_mode(r->mode);
    if (r->lambda(task, &group, r->closure) != 0)
        atomic_store(&r->failed, 1);
    while (f.blocks != NULL)
        pop_block(&f);
    convgen_set_float_mode(own_mode);
    current = outer;
}

static int parallel_launch(convgen_lambda lambda, void *closure, int tasks)
{
    (void)tasks; /* generated code passes 0, "as many as there are threads", and divides by num_task */
    frame *f = current;
    if (f->in_task) { /* a nested region runs inline, on the workspace of its task */
        convgen_group group = {NULL, 1};
        return lambda(0, &group, closure);
    }
    region r = {.call = f->call, .lambda = lambda, .closure = closure, .mode = convgen_float_mode()};
    if (f->call->pool != NULL)
        f->call->pool->launch(f->call->pool, run_task, &r);
    else
        run_task(&r, 0, 1);
    return atomic_load(&r.failed) ? -1 : 0;
}

/* With a thread-local frame around it. */
int convgen_enter(const convgen_call *c, char *main_workspace, convgen_function function, const convgen_any *args, int count)
{
    frame f = {.call = c, .top = main_workspace, .end = c->shares};
    frame *outer = current;
    convgen_any result = {0};
    current = &f;
    const int failed = function(NULL, args, count, &result);
    while (f.blocks != NULL)
        pop_block(&f);
    current = outer;
    return failed ? CONVGEN_INTERNAL : CONVGEN_OK;
}

/* ---- arguments ------------------------------------------------------------------------------- */

/* Tensors that are bound once: weights, bias and so on. */
enum { PARAMETERS = 8 };

typedef struct {
    convgen_dltensor tensors[CONVGEN_MAX_PACKED + PARAMETERS];
    convgen_any args[CONVGEN_MAX_PACKED + PARAMETERS];
    int count;
} arguments;

static void push(arguments *a, const convgen_tensor *tensor, const void *data)
{
    if (tensor->ndim == 0)
        return;
    convgen_dltensor *t = &a->tensors[a->count];
    *t = (convgen_dltensor){
        .data = (void *)data, .device = {1, 0}, .ndim = tensor->ndim, .dtype = tensor->dtype, .shape = tensor->shape};
    a->args[a->count++] = (convgen_any){.type_index = 7, .value.v_ptr = t};
}

static void push_packed(arguments *a, const convgen_kernel *kernel, const void *packed)
{
    for (int i = 0; i < kernel->packed_count; ++i)
        push(a, &kernel->packed[i], (const char *)packed + kernel->packed[i].offset);
}

int convgen_check_buffer(const void *data, size_t size, size_t expected, size_t alignment)
{
    if (expected == 0)
        return data == NULL && size == 0 ? CONVGEN_OK : CONVGEN_WRONG_SIZE;
    if (data == NULL)
        return CONVGEN_NULL_POINTER;
    if (size != expected)
        return CONVGEN_WRONG_SIZE;
    return (uintptr_t)data % alignment ? CONVGEN_MISALIGNED : CONVGEN_OK;
}

static int check_tensor(const void *data, size_t size, const convgen_tensor *tensor)
{
    return convgen_check_buffer(data, size, tensor->bytes, tensor->dtype.bits / 8);
}

int convgen_overlap(const void *a, size_t a_size, const void *b, size_t b_size)
{
    const uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
    return x < y ? y - x < a_size && b_size > 0 : x - y < b_size && a_size > 0;
}

/* ---- the packed buffer ----------------------------------------------------------------------- */

/* Words of a block of it, each of which any thread may take, and sums that run side by side, since each waits for the
 * product before. */
enum { CHECKSUM_BLOCK = 8192, CHECKSUM_LANES = 8 };

static uint64_t mixed(uint64_t hash, uint64_t word)
{
    hash = (hash ^ word) * 0x9e3779b97f4a7c15;
    return hash ^ hash >> 29;
}

static uint64_t block_checksum(const uint64_t *words, size_t count, uint64_t block) /* count is a multiple of 8 */
{
    uint64_t a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
    for (size_t i = 0; i < count; i += CHECKSUM_LANES) { /* written out: an array of them would not stay in registers */
        a = mixed(a, words[i]);
        b = mixed(b, words[i + 1]);
        c = mixed(c, words[i + 2]);
        d = mixed(d, words[i + 3]);
        e = mixed(e, words[i + 4]);
        f = mixed(f, words[i + 5]);
        g = mixed(g, words[i + 6]);
        h = mixed(h, words[i + 7]);
    }
    const uint64_t hashes[CHECKSUM_LANES] = {a, b, c, d, e, f, g, h};
    uint64_t total = block;
    for (int lane = 0; lane < CHECKSUM_LANES; ++lane)
        total = mixed(total, hashes[lane]);
    return total;
}

typedef struct {
    const uint64_t *payload;
    size_t words;
    atomic_uint_least64_t sum;
} checksum;

static void add_blocks(void *context, int task, int tasks)
{
    checksum *c = context;
    const size_t blocks = (c->words + CHECKSUM_BLOCK - 1) / CHECKSUM_BLOCK;
    uint64_t sum = 0;
    for (size_t b = blocks * task / tasks; b < blocks * (task + 1) / tasks; ++b) {
        const size_t left = c->words - b * CHECKSUM_BLOCK;
        sum += block_checksum(c->payload + b * CHECKSUM_BLOCK, left < CHECKSUM_BLOCK ? left : CHECKSUM_BLOCK, b);
    }
    atomic_fetch_add(&c->sum, sum); /* in any order */
}

/* What a header has where nothing was summed up: no checksum is that. */
enum { NO_CHECKSUM = 0 };

static uint64_t checksum_by(convgen_pool *pool, const void *payload, size_t size)
{
    checksum c = {.payload = payload, .words = size / sizeof(uint64_t), .sum = size};
    if (pool != NULL)
        pool->launch(pool, add_blocks, &c);
    else
        add_blocks(&c, 0, 1);
    const uint64_t sum = atomic_load(&c.sum);
    return sum == NO_CHECKSUM ? 1 : sum;
}

uint64_t convgen_checksum(const void *payload, size_t size) { return checksum_by(NULL, payload, size); }

static int check_packed(const convgen_kernel *kernel, const void *packed, size_t size)
{
    const int status = convgen_check_buffer(packed, size, kernel->packed_size, CONVGEN_ALIGNMENT);
    if (status != CONVGEN_OK)
        return status;
    const convgen_packed_header *header = packed;
    const int ours = header->magic == MAGIC && header->abi == CONVGEN_ABI && header->header_size == sizeof *header &&
                     memcmp(header->identity, kernel->identity, sizeof kernel->identity) == 0 &&
                     header->payload_size == kernel->packed_size - sizeof *header && header->reserved[0] == 0 &&
                     header->reserved[1] == 0;
    return ours ? CONVGEN_OK : CONVGEN_WRONG_PACKED;
}

/* ---- what the entry points call -------------------------------------------------------------- */

#define RETURN_UNLESS_OK(expression)                                                                                   \
    do {                                                                                                               \
        const int status_ = (expression);                                                                              \
        if (status_ != CONVGEN_OK)                                                                                     \
            return status_;                                                                                            \
    } while (0)

static size_t workspace_size(const convgen_kernel *kernel, int threads)
{
    return convgen_round_up(kernel->workspace_main) + (size_t)threads * convgen_round_up(kernel->workspace_task);
}

int convgen_kernel_sizes(const convgen_kernel *kernel, int threads, convgen_sizes *sizes)
{
    if (sizes == NULL)
        return CONVGEN_NULL_POINTER;
    if (threads < 1 || threads > CONVGEN_MAX_THREADS)
        return CONVGEN_BAD_ARGUMENT;
    const size_t images = kernel->empty ? 0 : 1; /* an empty batch is compiled as a batch of one */
    *sizes = (convgen_sizes){
        .src = images * kernel->src.bytes,
        .weights = kernel->weights.bytes,
        .bias = kernel->bias.bytes,
        .slope = kernel->slope.bytes,
        .scale = kernel->scale.bytes,
        .src_zero = kernel->src_zero.bytes,
        .weights_zero = kernel->weights_zero.bytes,
        .dst_zero = kernel->dst_zero.bytes,
        .sum = kernel->sum.bytes,
        .residual = images * kernel->residual.bytes,
        .dst = images * kernel->dst.bytes,
        .packed = kernel->packed_size,
        .workspace = workspace_size(kernel, threads),
    };
    return CONVGEN_OK;
}

static int pack(const convgen_kernel *kernel, const convgen_pack_args *args, int is_stored)
{
    if (args == NULL)
        return CONVGEN_NULL_POINTER;
    const convgen_pack_args a = *args;
    const struct {
        const convgen_tensor *tensor;
        const void *data;
        size_t size;
    } parameters[PARAMETERS] = {
        {&kernel->weights, a.weights, a.weights_size},
        {&kernel->bias, a.bias, a.bias_size},
        {&kernel->slope, a.slope, a.slope_size},
        {&kernel->scale, a.scale, a.scale_size},
        {&kernel->src_zero, a.src_zero, a.src_zero_size},
        {&kernel->weights_zero, a.weights_zero, a.weights_zero_size},
        {&kernel->dst_zero, a.dst_zero, a.dst_zero_size},
        {&kernel->sum, a.sum, a.sum_size},
    };
    for (int i = 0; i < PARAMETERS; ++i)
        RETURN_UNLESS_OK(check_tensor(parameters[i].data, parameters[i].size, parameters[i].tensor));
    RETURN_UNLESS_OK(convgen_check_buffer(a.packed, a.packed_size, kernel->packed_size, CONVGEN_ALIGNMENT));
    if (a.pool != NULL && a.pool->abi != CONVGEN_ABI)
        return CONVGEN_BAD_ARGUMENT;
    for (int i = 0; i < PARAMETERS; ++i)
        if (convgen_overlap(a.packed, a.packed_size, parameters[i].data, parameters[i].size))
            return CONVGEN_OVERLAP;
    if (!kernel->cpu_supported())
        return CONVGEN_UNSUPPORTED_CPU;

    /* The header comes last: a buffer whose packing failed is not a packed buffer. Gaps between the
     * tensors are zeroed, so that equal weights give equal bytes. */
    convgen_packed_header *header = a.packed;
    memset(header, 0, sizeof *header);
    for (int i = 0; i < kernel->packed_count; ++i) {
        const convgen_tensor *t = &kernel->packed[i];
        memset((char *)a.packed + t->offset + t->bytes, 0, convgen_round_up(t->bytes) - t->bytes);
    }
    arguments list = {.count = 0};
    for (int i = 0; i < PARAMETERS; ++i)
        push(&list, parameters[i].tensor, parameters[i].data);
    push_packed(&list, kernel, a.packed);
    convgen_pool *pool = a.pool != NULL && a.pool->acquire(a.pool) ? a.pool : NULL;
    const convgen_call c = {.pool = pool};
    const int status = convgen_enter(&c, NULL, kernel->pack, list.args, list.count);
    const size_t payload = kernel->packed_size - sizeof *header;
    const uint64_t sum = status == CONVGEN_OK && is_stored ? checksum_by(pool, header + 1, payload) : NO_CHECKSUM;
    if (pool != NULL)
        pool->release(pool);
    if (status != CONVGEN_OK)
        return CONVGEN_NO_MEMORY; /* all that can fail there is the heap */

    *header = (convgen_packed_header){
        .magic = MAGIC,
        .abi = CONVGEN_ABI,
        .header_size = sizeof *header,
        .identity = {kernel->identity[0], kernel->identity[1]},
        .payload_size = payload,
        .checksum = sum,
    };
    return CONVGEN_OK;
}

int convgen_kernel_pack(const convgen_kernel *kernel, const convgen_pack_args *args) { return pack(kernel, args, 1); }

int convgen_kernel_repack(const convgen_kernel *kernel, const convgen_pack_args *args) { return pack(kernel, args, 0); }

int convgen_kernel_verify(const convgen_kernel *kernel, const void *packed, size_t size)
{
    RETURN_UNLESS_OK(check_packed(kernel, packed, size));
    const convgen_packed_header *header = packed;
    return header->checksum == convgen_checksum(header + 1, header->payload_size) ? CONVGEN_OK : CONVGEN_WRONG_PACKED;
}

int convgen_kernel_run(const convgen_kernel *kernel, const convgen_run_args *args)
{
    if (args == NULL)
        return CONVGEN_NULL_POINTER;
    if (kernel->empty)
        return CONVGEN_OK;
    const convgen_run_args a = *args;
    if (a.pool != NULL && a.pool->abi != CONVGEN_ABI)
        return CONVGEN_BAD_ARGUMENT;
    const size_t workspace = workspace_size(kernel, a.pool != NULL ? a.pool->threads : 1);
    RETURN_UNLESS_OK(check_tensor(a.src, a.src_size, &kernel->src));
    RETURN_UNLESS_OK(check_packed(kernel, a.packed, a.packed_size));
    RETURN_UNLESS_OK(check_tensor(a.residual, a.residual_size, &kernel->residual));
    RETURN_UNLESS_OK(check_tensor(a.dst, a.dst_size, &kernel->dst));
    if (workspace > 0) {
        if (a.workspace_size < workspace) /* more is welcome: layers share one */
            return a.workspace == NULL ? CONVGEN_NULL_POINTER : CONVGEN_WRONG_SIZE;
        RETURN_UNLESS_OK(convgen_check_buffer(a.workspace, workspace, workspace, CONVGEN_ALIGNMENT));
    }
    if (convgen_overlap(a.dst, a.dst_size, a.src, a.src_size) || convgen_overlap(a.dst, a.dst_size, a.packed, a.packed_size) ||
        convgen_overlap(a.dst, a.dst_size, a.residual, a.residual_size) ||
        convgen_overlap(a.workspace, workspace, a.src, a.src_size) || convgen_overlap(a.workspace, workspace, a.packed, a.packed_size) ||
        convgen_overlap(a.workspace, workspace, a.residual, a.residual_size) ||
        convgen_overlap(a.workspace, workspace, a.dst, a.dst_size))
        return CONVGEN_OVERLAP;
    if (!kernel->cpu_supported())
        return CONVGEN_UNSUPPORTED_CPU;

    arguments list;
    list.count = 0;
    push(&list, &kernel->src, a.src);
    push(&list, &kernel->residual, a.residual);
    push_packed(&list, kernel, a.packed);
    push(&list, &kernel->dst, a.dst);

    char *main_workspace = workspace > 0 ? a.workspace : (char *)&list; /* not NULL, of size 0 */
    const convgen_call c = {
        .pool = a.pool != NULL && a.pool->acquire(a.pool) ? a.pool : NULL,
        .shares = main_workspace + convgen_round_up(kernel->workspace_main),
        .share = convgen_round_up(kernel->workspace_task),
    };
    const int status = convgen_enter(&c, main_workspace, kernel->main, list.args, list.count);
    if (c.pool != NULL)
        c.pool->release(c.pool);
    return status;
}

const char *convgen_status_text(int status)
{
    switch (status) {
    case CONVGEN_OK: return "no error";
    case CONVGEN_NULL_POINTER: return "a pointer that the layer needs is NULL";
    case CONVGEN_WRONG_SIZE: return "a size is not what the layer needs";
    case CONVGEN_MISALIGNED: return "packed or workspace is not aligned to 64 bytes, or a tensor not to its element";
    case CONVGEN_WRONG_PACKED: return "packed was not written by this library's pack, or was changed since";
    case CONVGEN_UNSUPPORTED_CPU: return "this CPU lacks instructions the library was compiled for";
    case CONVGEN_OVERLAP: return "a buffer that is written overlaps another one";
    case CONVGEN_NO_MEMORY: return "memory or threads ran out";
    case CONVGEN_BAD_ARGUMENT: return "a thread count is out of range, or a pool is of another ABI";
    case CONVGEN_INTERNAL: return "a fault in the library itself";
    default: return "not a status of this library";
    }
}

/* ---- symbols of generated code ---------------------------------------------------------------- */

/* Called before generated code returns an error, with a text meant for Python. The status code has
 * to do: the arguments were checked above. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count)
{
    (void)kind, (void)parts, (void)count;
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) { (void)kind, (void)message; }

/* Services that kernels have no business with. Called all the same they fail, as an error of the call. */
static int unavailable(void) { return -1; }

int (*__TVMBackendParallelLaunch)(convgen_lambda, void *, int) = parallel_launch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = deallocate;
int (*__TVMBackendParallelBarrier)(void) = unavailable;
int (*__TVMFFIEnvModLookupFromImports)(void) = unavailable;
int (*__TVMFFIFunctionCall)(void) = unavailable;
int (*__TVMFFIHandleInitOnce)(void) = unavailable;
