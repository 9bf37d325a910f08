$driver

/* ---- the library's calls ---------------------------------------------------------------------- */

enum { RUNS = 1 };

static void *weights; /* on the device */
static size_t weights_size;
static struct CUstream_st *stream;

/* Once per device: load the code, upload the weights. */
static void open_network(const char *path)
{
    convgen_network_sizes sizes;
    must("sizes", ${name}_sizes(0, &sizes));
    weights_size = sizes.weights;
    void *file = contents(path, weights_size);
    must("verify_weights", ${name}_verify_weights(file, weights_size));
    open_device();
    must_on_device("load", ${name}_load());
    weights = upload(file, weights_size);
    free(file);
    driver_must("cuStreamCreate", cuStreamCreate(&stream, 0));
}

static void compute(int run, int size, const void *const *inputs, const size_t *input_sizes, void *const *outputs,
                    const size_t *output_sizes)
{
    convgen_network_sizes sizes;
    must("sizes", ${name}_sizes(size, &sizes));
    const void *device_inputs[INPUTS + 1];
    void *device_outputs[OUTPUTS], *workspace = upload(NULL, sizes.workspace);
    for (int i = 0; i < INPUTS; ++i)
        device_inputs[i] = upload(inputs[i], input_sizes[i]);
    for (int i = 0; i < OUTPUTS; ++i)
        device_outputs[i] = upload(outputs[i], output_sizes[i]);
    const convgen_network_cuda_args args = {
        .inputs = device_inputs,
        .input_sizes = input_sizes,
        .outputs = device_outputs,
        .output_sizes = output_sizes,
        .weights = weights,
        .weights_size = weights_size,
        .workspace = workspace,
        .workspace_size = sizes.workspace,
        .stream = stream,
        .size = size,
    };

    /* As often as there is input. The call returns when the work is on the stream. */
    must_on_device("run", ${name}_run(&args));
    driver_must("cuStreamSynchronize", cuStreamSynchronize(stream));

    for (int i = 0; i < OUTPUTS; ++i) {
        if (output_sizes[i] > 0)
            driver_must("cuMemcpyDtoH", cuMemcpyDtoH(outputs[i], address(device_outputs[i]), output_sizes[i]));
        release(device_outputs[i]);
    }
    for (int i = 0; i < INPUTS; ++i)
        release(device_inputs[i]);
    release(workspace);
    (void)run;
}

static void close_network(void)
{
    must_on_device("unload", ${name}_unload());
    release(weights);
}
