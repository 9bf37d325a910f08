/* Runs a network between guard pages: run SIZE THREADS end|start …. Reads SIZE.input0 …, writes out.0.0 …: of each run
 * every output. */
$guarded

enum { INPUTS = $inputs, OUTPUTS = $outputs };

static void run(int size, int threads, int at_end, int number)
{
    char path[64];
    convgen_network_sizes sizes;
    must("sizes", ${name}_sizes(size, threads, &sizes));
    const buffer weights = filled("$name.weights", sizes.weights, at_end);
    convgen_network *network;
    must("open", ${name}_open_memory(weights.data, weights.size, &network));
    buffer given[INPUTS + 1], made[OUTPUTS];
    const void *inputs[INPUTS + 1];
    void *outputs[OUTPUTS];
    size_t input_sizes[INPUTS + 1], output_sizes[OUTPUTS];
    for (int i = 0; i < INPUTS; ++i) {
        snprintf(path, sizeof path, "%d.input%d", size, i);
        input_sizes[i] = ${name}_inputs(size)[i].bytes;
        given[i] = filled(path, input_sizes[i], at_end);
        inputs[i] = given[i].data;
    }
    for (int i = 0; i < OUTPUTS; ++i) {
        output_sizes[i] = ${name}_outputs(size)[i].bytes;
        made[i] = guarded(output_sizes[i], at_end, 0xff); /* NaN */
        outputs[i] = made[i].data;
    }
    const buffer workspace = guarded(sizes.workspace, at_end, 0xff);
    convgen_pool *pool = NULL;
    if (threads > 1)
        must("pool_create", ${name}_pool_create(threads, &pool));
    const convgen_network_args args = {
        .inputs = inputs,
        .input_sizes = input_sizes,
        .outputs = outputs,
        .output_sizes = output_sizes,
        .workspace = workspace.data,
        .workspace_size = workspace.size,
        .pool = pool,
        .size = size,
    };
    must("run", ${name}_run(network, &args));
    if (threads > 1)
        ${name}_pool_destroy(pool);
    for (int i = 0; i < OUTPUTS; ++i) {
        snprintf(path, sizeof path, "out.%d.%d", number, i);
        keep(path, made[i]);
        release(made[i]);
    }
    for (int i = 0; i < INPUTS; ++i)
        release(given[i]);
    release(workspace);
    ${name}_close(network);
    release(weights);
}

int main(int argc, char **argv)
{
    must("check_cpu", ${name}_check_cpu());
    for (int i = 0; 3 * i + 3 < argc; ++i) {
        run(atoi(argv[3 * i + 1]), atoi(argv[3 * i + 2]), strcmp(argv[3 * i + 3], "end") == 0, i);
        puts("done");
        fflush(stdout);
    }
    return 0;
}
