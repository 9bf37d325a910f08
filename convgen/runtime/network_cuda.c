/* Puts the steps of a network on a stream of a GPU. A run allocates nothing and waits for nothing, so that it can be
 * captured into a CUDA graph once the code is loaded. */
#include "network_cuda.h"

enum { MOST_BUFFERS = 257 }; /* of a step, the workspace among them */

/* A status of what networks on CPUs share with these. */
static int own_status(int status)
{
    switch (status) {
    case CONVGEN_WRONG_WEIGHTS: return CONVGEN_DEVICE_WRONG_WEIGHTS;
    case CONVGEN_NO_SUCH_SIZE: return CONVGEN_DEVICE_NO_SUCH_SIZE;
    default: return status;
    }
}

int convgen_device_network_load(const convgen_device_network *network)
{
    for (int i = 0; i < network->function_count; ++i) {
        const int status = convgen_cuda_load_code(network->functions[i]);
        if (status != CONVGEN_OK)
            return status;
    }
    return CONVGEN_OK;
}

int convgen_device_network_unload(const convgen_device_network *network)
{
    int first = CONVGEN_OK; /* what failed first; the rest is unloaded all the same */
    for (int i = 0; i < network->function_count; ++i) {
        const int status = convgen_cuda_unload_code(network->functions[i]);
        if (first == CONVGEN_OK)
            first = status;
    }
    return first;
}

int convgen_device_network_sizes(const convgen_device_network *network, int size, convgen_network_sizes *sizes)
{
    return own_status(convgen_network_sizes_of(&network->host, size, 1, sizes));
}

int convgen_device_network_find_size(const convgen_device_network *network, const int64_t *const *shapes, int *size)
{
    return own_status(convgen_network_find_size(&network->host, shapes, size));
}

int convgen_device_network_verify(const convgen_device_network *network, const void *weights, size_t size)
{
    if (weights == NULL)
        return CONVGEN_NULL_POINTER;
    if ((uintptr_t)weights % CONVGEN_ALIGNMENT)
        return CONVGEN_MISALIGNED;
    return own_status(convgen_network_check_weights(&network->host, weights, size));
}

/* ---- running --------------------------------------------------------------------------------- */

static int check_args(const convgen_network_code *host, const convgen_network_size *size,
                      const convgen_network_cuda_args *a, size_t workspace)
{
    const convgen_network_buffers buffers = {
        .inputs = a->inputs,
        .input_sizes = a->input_sizes,
        .outputs = a->outputs,
        .output_sizes = a->output_sizes,
        .weights = a->weights,
        .weights_size = a->weights_size,
        .workspace = a->workspace,
        .workspace_size = a->workspace_size,
    };
    return convgen_network_check_buffers(host, size, &buffers, workspace, CONVGEN_TENSOR_ALIGNMENT);
}

static int start(const convgen_device_step *step, const convgen_network_size *size, const convgen_network_cuda_args *a)
{
    const void *buffers[MOST_BUFFERS];
    for (int i = 0; i < step->count; ++i) {
        const convgen_device_place *place = &step->places[i];
        const char *base = NULL;
        switch (place->place) {
        case CONVGEN_ARENA: base = a->workspace; break;
        case CONVGEN_WEIGHTS: base = a->weights; break;
        case CONVGEN_INPUT: base = a->inputs[place->number]; break;
        case CONVGEN_OUTPUT: base = a->outputs[place->number]; break;
        }
        buffers[i] = base + place->offset;
    }
    buffers[step->count] = (const char *)a->workspace + size->arena;
    return convgen_cuda_start(step->code, buffers, a->stream);
}

int convgen_device_network_run(const convgen_device_network *network, const convgen_network_cuda_args *args)
{
    if (args == NULL)
        return CONVGEN_NULL_POINTER;
    const convgen_network_cuda_args a = *args;
    convgen_network_sizes sizes;
    int status = convgen_device_network_sizes(network, a.size, &sizes);
    if (status != CONVGEN_OK)
        return status;
    const convgen_network_size *size = &network->host.sizes[a.size];
    status = check_args(&network->host, size, &a, sizes.workspace);
    for (int i = 0; i < size->step_count && status == CONVGEN_OK; ++i)
        status = start(&network->steps[a.size][i], size, &a);
    return status;
}

const char *convgen_device_network_status_text(int status)
{
    const char *shared = convgen_network_shared_text(status);
    if (shared != NULL)
        return shared;
    switch (status) {
    case CONVGEN_DEVICE_WRONG_WEIGHTS: return "the weights are another library's, or damaged";
    case CONVGEN_DEVICE_NO_SUCH_SIZE: return "the network was not made for tensors of such sizes";
    case CONVGEN_MISALIGNED: return "weights or workspace are not aligned to 64 bytes, or a tensor not to 16";
    default: return convgen_cuda_status_text(status);
    }
}
