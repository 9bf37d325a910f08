/* Runs the steps of a network one after another, and holds its weights. */
#define _POSIX_C_SOURCE 200809L
#include "network.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const uint64_t MAGIC = 0x7774656e766e6f63; /* "convnetw" */

struct convgen_network {
    const convgen_network_code *code;
    const char *weights;
    size_t mapped; /* bytes to unmap; 0: the weights are the caller's */
};

/* ---- weights --------------------------------------------------------------------------------- */

/* The header of packed buffers leads the weights of a network too. */
int convgen_network_check_weights(const convgen_network_code *code, const void *weights, size_t size)
{
    if (size != code->weights)
        return CONVGEN_WRONG_WEIGHTS;
    const convgen_packed_header *header = weights;
    const size_t payload = size - sizeof *header;
    const int ours = header->magic == MAGIC && header->abi == CONVGEN_NETWORK_ABI &&
                     header->header_size == sizeof *header &&
                     memcmp(header->identity, code->identity, sizeof code->identity) == 0 &&
                     header->payload_size == payload && header->reserved[0] == 0 && header->reserved[1] == 0 &&
                     header->checksum == convgen_checksum(header + 1, payload);
    return ours ? CONVGEN_OK : CONVGEN_WRONG_WEIGHTS;
}

int convgen_network_seal(const convgen_network_code *code, void *weights, size_t size)
{
    if (size != code->weights)
        return CONVGEN_WRONG_SIZE;
    convgen_packed_header *header = weights;
    *header = (convgen_packed_header){
        .magic = MAGIC,
        .abi = CONVGEN_NETWORK_ABI,
        .header_size = sizeof *header,
        .identity = {code->identity[0], code->identity[1]},
        .payload_size = size - sizeof *header,
        .checksum = convgen_checksum(header + 1, size - sizeof *header),
    };
    return CONVGEN_OK;
}

static int opened(const convgen_network_code *code, const void *weights, size_t size, size_t mapped,
                  convgen_network **out)
{
    const int status = convgen_network_check_weights(code, weights, size);
    if (status != CONVGEN_OK)
        return status;
    convgen_network *network = malloc(sizeof *network);
    if (network == NULL)
        return CONVGEN_NO_MEMORY;
    *network = (convgen_network){code, weights, mapped};
    *out = network;
    return CONVGEN_OK;
}

int convgen_network_open_memory(const convgen_network_code *code, const void *weights, size_t size,
                                convgen_network **network)
{
    if (network == NULL || weights == NULL)
        return CONVGEN_NULL_POINTER;
    *network = NULL;
    if ((uintptr_t)weights % CONVGEN_ALIGNMENT)
        return CONVGEN_MISALIGNED;
    return opened(code, weights, size, 0, network);
}

int convgen_network_open(const convgen_network_code *code, const char *path, convgen_network **network)
{
    if (network == NULL || path == NULL)
        return CONVGEN_NULL_POINTER;
    *network = NULL;
    const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe would be waited for */
    if (file < 0)
        return CONVGEN_CANNOT_READ;
    struct stat status;
    const int known = fstat(file, &status) == 0;
    if (!known || (size_t)status.st_size != code->weights) {
        close(file);
        return known && S_ISREG(status.st_mode) ? CONVGEN_WRONG_WEIGHTS : CONVGEN_CANNOT_READ;
    }
    void *weights = mmap(NULL, code->weights, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (weights == MAP_FAILED)
        return CONVGEN_CANNOT_READ;
    const int result = opened(code, weights, code->weights, code->weights, network);
    if (result != CONVGEN_OK)
        munmap(weights, code->weights);
    return result;
}

void convgen_network_close(convgen_network *network)
{
    if (network == NULL)
        return;
    if (network->mapped > 0)
        munmap((void *)network->weights, network->mapped);
    free(network);
}

/* ---- running --------------------------------------------------------------------------------- */

static const convgen_network_size *size_of(const convgen_network_code *code, int size)
{
    return size >= 0 && size < code->size_count ? &code->sizes[size] : NULL;
}

static size_t workspace_size(const convgen_network_size *size, int threads)
{
    return size->arena + size->workspace_main + (size_t)threads * size->workspace_task;
}

int convgen_network_sizes_of(const convgen_network_code *code, int size, int threads, convgen_network_sizes *sizes)
{
    if (sizes == NULL)
        return CONVGEN_NULL_POINTER;
    const convgen_network_size *made = size_of(code, size);
    if (made == NULL)
        return CONVGEN_NO_SUCH_SIZE;
    if (threads < 1 || threads > CONVGEN_MAX_THREADS)
        return CONVGEN_BAD_ARGUMENT;
    *sizes = (convgen_network_sizes){
        .inputs = code->input_count,
        .outputs = code->output_count,
        .steps = made->step_count,
        .sizes = code->size_count,
        .weights = code->weights,
        .workspace = workspace_size(made, threads),
    };
    return CONVGEN_OK;
}

const convgen_value *convgen_network_inputs(const convgen_network_code *code, int size)
{
    const convgen_network_size *made = size_of(code, size);
    return made != NULL ? made->inputs : NULL;
}

const convgen_value *convgen_network_outputs(const convgen_network_code *code, int size)
{
    const convgen_network_size *made = size_of(code, size);
    return made != NULL ? made->outputs : NULL;
}

int convgen_network_find_size(const convgen_network_code *code, const int64_t *const *shapes, int *size)
{
    if (size == NULL || (shapes == NULL && code->input_count > 0))
        return CONVGEN_NULL_POINTER;
    for (int number = 0; number < code->size_count; ++number) {
        int equal = 1;
        for (int i = 0; i < code->input_count; ++i) {
            const convgen_value *input = &code->sizes[number].inputs[i];
            if (shapes[i] == NULL && input->rank > 0)
                return CONVGEN_NULL_POINTER;
            for (int axis = 0; axis < input->rank; ++axis)
                equal &= shapes[i][axis] == input->shape[axis];
        }
        if (equal) {
            *size = number;
            return CONVGEN_OK;
        }
    }
    return CONVGEN_NO_SUCH_SIZE;
}

/* Of the types that convgen_value has: u8, i8, i32, i64, f32, f16, bf16, bool. */
static size_t element_bytes(const char *dtype)
{
    if (strcmp(dtype, "bool") == 0 || dtype[1] == '8')
        return 1;
    return strstr(dtype, "16") != NULL ? 2 : strcmp(dtype, "i64") == 0 ? 8 : 4;
}

static int check_values(const convgen_value *values, int count, const void *const *data, const size_t *sizes,
                        size_t alignment)
{
    if (count > 0 && (data == NULL || sizes == NULL))
        return CONVGEN_NULL_POINTER;
    for (int i = 0; i < count; ++i) {
        const size_t least = alignment > 0 ? alignment : element_bytes(values[i].dtype);
        const int status = convgen_check_buffer(data[i], sizes[i], values[i].bytes, least);
        if (status != CONVGEN_OK)
            return status;
    }
    return CONVGEN_OK;
}

/* Whether memory that is written overlaps anything else that the call has, of outputs the first so many. */
static int overlaps(const convgen_network_code *code, const convgen_network_size *size,
                    const convgen_network_buffers *b, const void *data, size_t bytes, int outputs)
{
    int found = convgen_overlap(data, bytes, b->weights, code->weights);
    for (int i = 0; i < code->input_count; ++i)
        found |= convgen_overlap(data, bytes, b->inputs[i], size->inputs[i].bytes);
    for (int i = 0; i < outputs; ++i)
        found |= convgen_overlap(data, bytes, b->outputs[i], size->outputs[i].bytes);
    return found;
}

int convgen_network_check_buffers(const convgen_network_code *code, const convgen_network_size *size,
                                  const convgen_network_buffers *b, size_t workspace, size_t alignment)
{
    int status = check_values(size->inputs, code->input_count, b->inputs, b->input_sizes, alignment);
    if (status == CONVGEN_OK)
        status = check_values(size->outputs, code->output_count, (const void *const *)b->outputs, b->output_sizes,
                              alignment);
    if (status == CONVGEN_OK)
        status = convgen_check_buffer(b->weights, b->weights_size, code->weights, CONVGEN_ALIGNMENT);
    if (status != CONVGEN_OK)
        return status;
    if (workspace > 0) {
        if (b->workspace_size < workspace)
            return b->workspace == NULL ? CONVGEN_NULL_POINTER : CONVGEN_WRONG_SIZE;
        status = convgen_check_buffer(b->workspace, workspace, workspace, CONVGEN_ALIGNMENT);
        if (status != CONVGEN_OK)
            return status;
        if (overlaps(code, size, b, b->workspace, workspace, code->output_count))
            return CONVGEN_OVERLAP;
    }
    for (int i = 0; i < code->output_count; ++i)
        if (overlaps(code, size, b, b->outputs[i], size->outputs[i].bytes, i))
            return CONVGEN_OVERLAP;
    return CONVGEN_OK;
}

static int check_args(const convgen_network *network, const convgen_network_size *size, const convgen_network_args *a,
                      size_t workspace)
{
    if (a->pool != NULL && a->pool->abi != CONVGEN_ABI)
        return CONVGEN_BAD_ARGUMENT;
    const convgen_network_buffers buffers = {
        .inputs = a->inputs,
        .input_sizes = a->input_sizes,
        .outputs = a->outputs,
        .output_sizes = a->output_sizes,
        .weights = network->weights,
        .weights_size = network->code->weights,
        .workspace = a->workspace,
        .workspace_size = a->workspace_size,
    };
    const int status = convgen_network_check_buffers(network->code, size, &buffers, workspace, 0);
    if (status != CONVGEN_OK)
        return status;
    return network->code->cpu_supported() ? CONVGEN_OK : CONVGEN_UNSUPPORTED_CPU;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

enum { MOST_ARGUMENTS = 256 };

static int run_step(const convgen_step *step, const convgen_call *call, char *main_workspace, const char *weights,
                    const convgen_network_args *a)
{
    convgen_dltensor tensors[MOST_ARGUMENTS];
    convgen_any args[MOST_ARGUMENTS];
    for (int i = 0; i < step->count; ++i) {
        const convgen_argument *argument = &step->arguments[i];
        char *base = NULL;
        switch (argument->place) {
        case CONVGEN_ARENA: base = a->workspace; break;
        case CONVGEN_WEIGHTS: base = (char *)weights; break;
        case CONVGEN_INPUT: base = (char *)a->inputs[argument->number]; break;
        case CONVGEN_OUTPUT: base = a->outputs[argument->number]; break;
        }
        tensors[i] = (convgen_dltensor){.data = base + argument->offset,
                                        .device = {1, 0},
                                        .ndim = argument->ndim,
                                        .dtype = argument->dtype,
                                        .shape = argument->shape};
        args[i] = (convgen_any){.type_index = 7, .value.v_ptr = &tensors[i]};
    }
    return convgen_enter(call, main_workspace, step->function, args, step->count);
}

int convgen_network_run(const convgen_network_code *code, const convgen_network *network,
                        const convgen_network_args *args)
{
    if (network == NULL || args == NULL)
        return CONVGEN_NULL_POINTER;
    if (network->code != code)
        return CONVGEN_WRONG_NETWORK;
    const convgen_network_args a = *args;
    const convgen_network_size *size = size_of(code, a.size);
    if (size == NULL)
        return CONVGEN_NO_SUCH_SIZE;
    const size_t workspace = workspace_size(size, a.pool != NULL ? a.pool->threads : 1);
    int status = check_args(network, size, &a, workspace);
    if (status != CONVGEN_OK)
        return status;
    char none[1]; /* where a network needs no workspace: not NULL, of size 0 */
    char *main_workspace = workspace > 0 ? (char *)a.workspace + size->arena : none;
    const convgen_call call = {
        .pool = a.pool != NULL && a.pool->acquire(a.pool) ? a.pool : NULL,
        .shares = main_workspace + size->workspace_main,
        .share = size->workspace_task,
    };
    for (int i = 0; i < size->step_count && status == CONVGEN_OK; ++i) {
        const double begin = a.seconds != NULL ? now() : 0;
        status = run_step(&size->steps[i], &call, main_workspace, network->weights, &a);
        if (a.seconds != NULL)
            a.seconds[i] = now() - begin;
    }
    if (call.pool != NULL)
        call.pool->release(call.pool);
    return status;
}

const char *convgen_network_shared_text(int status)
{
    switch (status) {
    case CONVGEN_NULL_POINTER: return "a pointer that the network needs is NULL";
    case CONVGEN_WRONG_SIZE: return "a size is not what the network needs";
    default: return NULL;
    }
}

const char *convgen_network_status_text(int status)
{
    const char *shared = convgen_network_shared_text(status);
    if (shared != NULL)
        return shared;
    switch (status) {
    case CONVGEN_MISALIGNED: return "weights or workspace are not aligned to 64 bytes, or a tensor not to its element";
    case CONVGEN_CANNOT_READ: return "the file of weights cannot be read";
    case CONVGEN_WRONG_WEIGHTS: return "the weights are another library's, or damaged";
    case CONVGEN_NO_SUCH_SIZE: return "the network was not made for tensors of such sizes";
    case CONVGEN_WRONG_NETWORK: return "the network was opened by another library";
    default: return convgen_status_text(status);
    }
}
