/* ---- the library's calls ---------------------------------------------------------------------- */

/* On the thread that calls, then on two. One pool serves all libraries of a program. */
enum { RUNS = 2 };

static convgen_network *network;

static void open_network(const char *weights)
{
    must("check_cpu", ${name}_check_cpu());
    const int status = ${name}_open(weights, &network);
    if (status != CONVGEN_OK)
        fprintf(stderr, "%s: ", weights);
    must("open", status);
}

static void compute(int threads, int size, const void *const *inputs, const size_t *input_sizes, void *const *outputs,
                    const size_t *output_sizes)
{
    convgen_network_sizes sizes;
    must("sizes", ${name}_sizes(size, threads, &sizes));
    convgen_pool *pool = NULL;
    if (threads > 1)
        must("pool_create", ${name}_pool_create(threads, &pool));
    void *workspace = buffer(sizes.workspace);
    const convgen_network_args args = {
        .inputs = inputs,
        .input_sizes = input_sizes,
        .outputs = outputs,
        .output_sizes = output_sizes,
        .workspace = workspace,
        .workspace_size = sizes.workspace,
        .pool = pool,
        .size = size,
    };
    must("run", ${name}_run(network, &args));
    free(workspace);
    if (threads > 1)
        ${name}_pool_destroy(pool);
}

static void close_network(void) { ${name}_close(network); }
