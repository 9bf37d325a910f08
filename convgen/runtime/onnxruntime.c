/* Networks as ONNX Runtime's custom operators: on its threads, in its memory.
 *
 * A kernel holds what does not change, so that any number of runs may use it at once; each takes its workspace from the
 * allocator of its own context.
 */
#include "onnxruntime.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const convgen_ort_op *op;
    const OrtApi *api;
    convgen_network *network;
    OrtMemoryInfo *memory;
    int sizes; /* that the network was made for */
} kernel;

/* ---- what an operator is ----------------------------------------------------------------------- */

static const convgen_ort_op *op_of(const OrtCustomOp *op) { return (const convgen_ort_op *)op; }

const char *convgen_ort_name(const OrtCustomOp *op) { return op_of(op)->name; }

const char *convgen_ort_provider(const OrtCustomOp *op)
{
    (void)op;
    return NULL;
}

static int type_of(const convgen_value *value)
{
    static const struct {
        const char *dtype;
        int type;
    } known[] = {{"u8", ORT_UINT8}, {"i8", ORT_INT8},   {"i32", ORT_INT32},
                 {"i64", ORT_INT64}, {"f16", ORT_HALF}, {"bf16", ORT_BFLOAT16}, {"bool", ORT_BOOL}};
    for (size_t i = 0; i < sizeof known / sizeof *known; ++i)
        if (strcmp(value->dtype, known[i].dtype) == 0)
            return known[i].type;
    return ORT_FLOAT;
}

int convgen_ort_input_type(const OrtCustomOp *op, size_t index) { return type_of(&op_of(op)->inputs(0)[index]); }

int convgen_ort_output_type(const OrtCustomOp *op, size_t index) { return type_of(&op_of(op)->outputs(0)[index]); }

size_t convgen_ort_input_count(const OrtCustomOp *op) { return (size_t)op_of(op)->input_count; }

size_t convgen_ort_output_count(const OrtCustomOp *op) { return (size_t)op_of(op)->output_count; }

int convgen_ort_zero(const OrtCustomOp *op)
{
    (void)op;
    return 0;
}

int convgen_ort_zero_of(const OrtCustomOp *op, size_t index)
{
    (void)op, (void)index;
    return 0;
}

int convgen_ort_one(const OrtCustomOp *op)
{
    (void)op;
    return 1;
}

int convgen_ort_any_version(const OrtCustomOp *op)
{
    (void)op;
    return INT32_MAX;
}

/* ---- kernels ----------------------------------------------------------------------------------- */

static OrtStatus *failed(const OrtApi *api, const convgen_ort_op *op, int code, const char *what)
{
    char text[512];
    snprintf(text, sizeof text, "convgen: %s: %s", op->name, what);
    return api->CreateStatus(code, text);
}

static OrtStatus *failed_with(const kernel *k, int status)
{
    return status == CONVGEN_OK ? NULL : failed(k->api, k->op, ORT_FAIL, k->op->error(status));
}

void convgen_ort_destroy(void *data)
{
    kernel *k = data;
    k->op->close(k->network);
    if (k->memory != NULL)
        k->api->ReleaseMemoryInfo(k->memory);
    free(k);
}

OrtStatus *convgen_ort_create(const OrtCustomOp *base, const OrtApi *api, const OrtKernelInfo *info, void **out)
{
    (void)info;
    const convgen_ort_op *op = op_of(base);
    kernel *k = malloc(sizeof *k);
    if (k == NULL)
        return failed(api, op, ORT_FAIL, op->error(CONVGEN_NO_MEMORY));
    *k = (kernel){.op = op, .api = api};
    convgen_network_sizes sizes;
    OrtStatus *status = failed_with(k, op->sizes(0, op->threads, &sizes));
    if (status == NULL) {
        k->sizes = sizes.sizes;
        const size_t weights = (size_t)(op->weights_end - (const char *)op->weights);
        status = failed_with(k, op->open_memory(op->weights, weights, &k->network));
    }
    if (status == NULL)
        status = api->CreateCpuMemoryInfo(ORT_DEVICE_ALLOCATOR, ORT_MEM_DEFAULT, &k->memory);
    if (status != NULL)
        convgen_ort_destroy(k);
    else
        *out = k;
    return status;
}

/* ---- a run ------------------------------------------------------------------------------------- */

typedef struct {
    char *end, *limit;
} text;

static void write_shape(text *t, const int64_t *shape, int rank)
{
    for (int axis = 0; axis < rank && t->end < t->limit; ++axis) {
        const size_t left = (size_t)(t->limit - t->end);
        const int length = snprintf(t->end, left, axis > 0 ? ", %lld" : "%lld", (long long)shape[axis]);
        t->end = (size_t)length < left ? t->end + length : t->limit;
    }
}

static OrtStatus *wrong_shape(const kernel *k, int number, const int64_t *found, int rank)
{
    const convgen_value *first = &k->op->inputs(0)[number];
    char expected[128] = "", given[128] = "", others[64] = "", what[500];
    write_shape(&(text){expected, expected + sizeof expected}, first->shape, first->rank);
    write_shape(&(text){given, given + sizeof given}, found, rank);
    if (k->sizes > 1)
        snprintf(others, sizeof others, " or that of one of %d other sizes", k->sizes - 1);
    snprintf(what, sizeof what, "input %.100s: expected shape [%s]%s, found [%s]", first->name, expected, others, given);
    return failed(k->api, k->op, ORT_INVALID_ARGUMENT, what);
}

/* Take out of a set of sizes, bit by bit, those for which an input of this shape is wrong. ONNX Runtime checks types and
 * the model's own inputs, not what its operators hand on. */
static OrtStatus *narrow(const kernel *k, int number, const OrtTensorTypeAndShapeInfo *info, uint64_t *sizes)
{
    size_t rank = 0;
    int64_t shape[CONVGEN_ORT_MOST_AXES] = {0};
    OrtStatus *status = k->api->GetDimensionsCount(info, &rank);
    if (status == NULL && rank <= CONVGEN_ORT_MOST_AXES)
        status = k->api->GetDimensions(info, shape, rank);
    if (status != NULL)
        return status;
    for (int size = 0; size < k->sizes; ++size) {
        const convgen_value *input = &k->op->inputs(size)[number];
        if (rank != (size_t)input->rank || memcmp(shape, input->shape, rank * sizeof *shape) != 0)
            *sizes &= ~(UINT64_C(1) << size);
    }
    return *sizes != 0 ? NULL : wrong_shape(k, number, shape, rank <= CONVGEN_ORT_MOST_AXES ? (int)rank : 0);
}

static OrtStatus *get_input(const kernel *k, const OrtKernelContext *context, int number, uint64_t *sizes,
                            const void **data)
{
    const OrtValue *value = NULL;
    OrtTensorTypeAndShapeInfo *info = NULL;
    OrtStatus *status = k->api->KernelContext_GetInput(context, (size_t)number, &value);
    if (status == NULL)
        status = k->api->GetTensorTypeAndShape(value, &info);
    if (status != NULL)
        return status;
    status = narrow(k, number, info, sizes);
    k->api->ReleaseTensorTypeAndShapeInfo(info);
    return status != NULL ? status : k->api->GetTensorMutableData((OrtValue *)value, (void **)data);
}

static OrtStatus *get_output(const kernel *k, OrtKernelContext *context, int size, int number, void **data)
{
    const convgen_value *output = &k->op->outputs(size)[number];
    OrtValue *value = NULL;
    OrtStatus *status =
        k->api->KernelContext_GetOutput(context, (size_t)number, output->shape, (size_t)output->rank, &value);
    return status != NULL ? status : k->api->GetTensorMutableData(value, data);
}

/* What the threads of a session are in a run: the first to come walks through the network's steps, and the others take
 * tasks of these until it is done. The session is asked for threads once and not at every step, which would cost
 * microseconds each time, and give the parts of a tensor to other cores than those that have them in their caches. */
typedef struct {
    const kernel *k;
    const convgen_network_args *args;
    unsigned mode; /* of the thread that calls, which need not be the first */
    atomic_int come;
    int status;
} crew;

static void take_part(void *data, size_t unused)
{
    (void)unused;
    crew *c = data;
    const int number = atomic_fetch_add(&c->come, 1);
    if (number > 0) {
        convgen_lent_work(c->args->pool, number);
        return;
    }
    const unsigned own_mode = convgen_float_mode();
    convgen_set_float_mode(c->mode);
    c->status = c->k->op->run(c->k->network, c->args);
    convgen_set_float_mode(own_mode);
    convgen_lent_stop(c->args->pool);
}

/* Run on the threads of the session, with a pool in some memory. */
static int run_together(const kernel *k, const OrtKernelContext *context, convgen_network_args *args, void *memory)
{
    const size_t threads = (size_t)k->op->threads;
    args->pool = convgen_lend(memory, k->op->threads);
    crew c = {.k = k, .args = args, .mode = convgen_float_mode()};
    OrtStatus *status = k->api->KernelContext_ParallelFor(context, take_part, threads, threads, &c);
    if (status != NULL) {
        k->api->ReleaseStatus(status); /* it refuses before it begins */
        take_part(&c, 0);
    }
    convgen_lent_end(args->pool);
    return c.status;
}

static OrtStatus *run(const kernel *k, const OrtKernelContext *context, convgen_network_args *args)
{
    convgen_network_sizes sizes = {0};
    OrtStatus *status = failed_with(k, k->op->sizes(args->size, k->op->threads, &sizes));
    const size_t pool = k->op->threads > 1 ? convgen_round_up(convgen_lent_size(k->op->threads)) : 0;
    args->workspace_size = sizes.workspace;
    if (status != NULL || pool + sizes.workspace == 0)
        return status != NULL ? status : failed_with(k, k->op->run(k->network, args));

    OrtAllocator *allocator = NULL;
    void *memory = NULL;
    status = k->api->KernelContext_GetAllocator(context, k->memory, &allocator);
    if (status != NULL)
        return status;
    status = k->api->AllocatorAlloc(allocator, pool + sizes.workspace + CONVGEN_ALIGNMENT, &memory);
    if (status == NULL) {
        char *aligned = (char *)convgen_round_up((uintptr_t)memory); /* allocators promise less */
        args->workspace = aligned + pool;
        status = failed_with(k, pool > 0 ? run_together(k, context, args, aligned) : k->op->run(k->network, args));
        OrtStatus *freed = k->api->AllocatorFree(allocator, memory);
        if (freed != NULL)
            k->api->ReleaseStatus(freed);
    }
    k->api->ReleaseAllocator(allocator);
    return status;
}

OrtStatus *convgen_ort_compute(void *data, OrtKernelContext *context)
{
    const kernel *k = data;
    const void *inputs[CONVGEN_ORT_MOST_VALUES];
    void *outputs[CONVGEN_ORT_MOST_VALUES];
    size_t input_sizes[CONVGEN_ORT_MOST_VALUES], output_sizes[CONVGEN_ORT_MOST_VALUES];
    OrtStatus *status = NULL;
    uint64_t fitting = UINT64_MAX >> (64 - k->sizes);
    for (int i = 0; i < k->op->input_count && status == NULL; ++i)
        status = get_input(k, context, i, &fitting, &inputs[i]);
    if (status != NULL)
        return status;
    const int size = __builtin_ctzll(fitting);
    for (int i = 0; i < k->op->input_count; ++i)
        input_sizes[i] = k->op->inputs(size)[i].bytes;
    for (int i = 0; i < k->op->output_count && status == NULL; ++i) {
        status = get_output(k, context, size, i, &outputs[i]);
        output_sizes[i] = k->op->outputs(size)[i].bytes;
    }
    if (status != NULL)
        return status;
    convgen_network_args args = {.inputs = inputs,
                                 .input_sizes = input_sizes,
                                 .outputs = outputs,
                                 .output_sizes = output_sizes,
                                 .size = size};
    return run(k, context, &args);
}

/* ---- registration ------------------------------------------------------------------------------ */

/* The domain of each ONNX Runtime in this process. Session options refer to it for as long as they live, so it stays
 * until the library is unloaded, and then too: ONNX Runtime itself may be gone by that time. */
typedef struct domain {
    const OrtApi *api;
    OrtCustomOpDomain *made;
    struct domain *next;
} domain;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static domain *domains;

static OrtStatus *make_domain(const OrtApi *api, const convgen_ort_op *const *ops, int count, domain **out)
{
    domain *d = malloc(sizeof *d);
    if (d == NULL)
        return api->CreateStatus(ORT_FAIL, "convgen: memory ran out");
    *d = (domain){.api = api, .next = domains};
    OrtStatus *status = api->CreateCustomOpDomain("convgen", &d->made);
    if (status != NULL) {
        free(d);
        return status;
    }
    for (int i = 0; i < count && status == NULL; ++i)
        status = api->CustomOpDomain_Add(d->made, &ops[i]->base);
    if (status != NULL) {
        api->ReleaseCustomOpDomain(d->made);
        free(d);
        return status;
    }
    *out = domains = d;
    return NULL;
}

static OrtStatus *too_old(const OrtApiBase *base)
{
    char text[200];
    const OrtApi *first = base->GetApi(1);
    if (first == NULL)
        abort(); /* there is no way to answer: no version of ONNX Runtime is so */
    snprintf(text, sizeof text, "convgen: expected ONNX Runtime 1.%d or newer, found %.50s", ORT_API_VERSION,
             base->GetVersionString());
    return first->CreateStatus(ORT_NOT_IMPLEMENTED, text);
}

OrtStatus *convgen_ort_register(OrtSessionOptions *options, const OrtApiBase *base, const convgen_ort_op *const *ops,
                                int count)
{
    const OrtApi *api = base->GetApi(ORT_API_VERSION);
    if (api == NULL)
        return too_old(base);
    for (int i = 0; i < count; ++i) {
        const int status = ops[i]->check_cpu();
        if (status != CONVGEN_OK)
            return failed(api, ops[i], ORT_NOT_IMPLEMENTED, ops[i]->error(status));
    }
    pthread_mutex_lock(&mutex);
    domain *d = domains;
    while (d != NULL && d->api != api)
        d = d->next;
    OrtStatus *status = d != NULL ? NULL : make_domain(api, ops, count, &d);
    pthread_mutex_unlock(&mutex);
    return status != NULL ? status : api->AddCustomOpDomain(options, d->made);
}
