/* Packs the weights of a network's convolutions, for whoever compiles it: one function for all of them. */
#include "runtime.h"

enum { MOST = CONVGEN_MAX_PACKED + 8 }; /* parameters, then what is packed */

/* data: of each tensor, in the order in which the compiled code takes them. threads: at most so many. */
int convgen_pack(convgen_function pack, const convgen_tensor *tensors, void *const *data, int count, int threads)
{
    if (pack == NULL || count < 0 || count > MOST)
        return CONVGEN_BAD_ARGUMENT;
    convgen_dltensor list[MOST];
    convgen_any args[MOST];
    for (int i = 0; i < count; ++i) {
        list[i] = (convgen_dltensor){.data = data[i],
                                     .device = {1, 0},
                                     .ndim = tensors[i].ndim,
                                     .dtype = tensors[i].dtype,
                                     .shape = tensors[i].shape};
        args[i] = (convgen_any){.type_index = 7, .value.v_ptr = &list[i]};
    }
    convgen_pool *pool = NULL;
    if (threads > 1)
        (void)convgen_create_pool(threads, &pool); /* without one, the thread that calls packs alone */
    const convgen_call call = {.pool = pool != NULL && pool->acquire(pool) ? pool : NULL};
    const int status = convgen_enter(&call, NULL, pack, args, count);
    if (call.pool != NULL)
        pool->release(pool);
    if (pool != NULL)
        convgen_destroy_pool(pool);
    /* all that can fail there is the heap */
    return status == CONVGEN_OK ? CONVGEN_OK : CONVGEN_NO_MEMORY;
}
