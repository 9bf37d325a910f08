/* Packs the weights of a network's convolutions, for whoever compiles it: one function for all of them. */
#include "runtime.h"

enum { MOST = CONVGEN_MAX_PACKED + 8 }; /* parameters, then what is packed */

/* data: of each tensor, in the order in which the compiled code takes them. */
int convgen_pack(convgen_function pack, const convgen_tensor *tensors, void *const *data, int count)
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
    const convgen_call call = {.pool = NULL};
    /* all that can fail there is the heap */
    return convgen_enter(&call, NULL, pack, args, count) == CONVGEN_OK ? CONVGEN_OK : CONVGEN_NO_MEMORY;
}
