/* Runs a kernel between guard pages: run CASE THREADS end|start …. Reads CASE.src …, writes out.0 …, one for each run. */
$guarded

static buffer operand(const char *name, const char *tensor, size_t size, int at_end)
{
    char path[300];
    snprintf(path, sizeof path, "%s.%s", name, tensor);
    return size == 0 ? (buffer){NULL, 0, NULL, 0} : filled(path, size, at_end);
}

#define OPERAND(tensor) const buffer tensor = operand(name, #tensor, sizes.tensor, at_end)
#define GIVEN(tensor) .tensor = tensor.data, .tensor##_size = tensor.size

static void run(const char *name, int threads, int at_end, const char *out)
{
    convgen_sizes sizes;
    must("sizes", ${name}_sizes(threads, &sizes));
    OPERAND(src);
    OPERAND(weights);
    OPERAND(bias);
    OPERAND(slope);
    OPERAND(scale);
    OPERAND(src_zero);
    OPERAND(weights_zero);
    OPERAND(dst_zero);
    OPERAND(sum);
    OPERAND(residual);
    const buffer packed = guarded(sizes.packed, at_end, 0);
    const convgen_pack_args pack = {GIVEN(weights),  GIVEN(bias),         GIVEN(slope),    GIVEN(scale),
                                    GIVEN(src_zero), GIVEN(weights_zero), GIVEN(dst_zero), GIVEN(sum),
                                    GIVEN(packed)};
    must("pack", ${name}_pack(&pack));
    seal(packed);

    const buffer dst = guarded(sizes.dst, at_end, at_end ? 0xff : $other_fill);
    const buffer workspace = guarded(sizes.workspace, at_end, 0xff); /* NaN */
    convgen_pool *pool = NULL;
    if (threads > 1)
        must("pool_create", ${name}_pool_create(threads, &pool));
    const convgen_run_args args = {GIVEN(src), GIVEN(packed),    GIVEN(residual),
                                   GIVEN(dst), GIVEN(workspace), .pool = pool};
    must("run", ${name}_run(&args));
    if (threads > 1)
        ${name}_pool_destroy(pool);
    keep(out, dst);
    const buffer all[] = {src,      weights, bias,     slope,  scale, src_zero, weights_zero,
                          dst_zero, sum,     residual, packed, dst,   workspace};
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i)
        if (all[i].pages != NULL)
            release(all[i]);
}

int main(int argc, char **argv)
{
    must("check_cpu", ${name}_check_cpu());
    for (int i = 0; 3 * i + 3 < argc; ++i) {
        char out[32];
        snprintf(out, sizeof out, "out.%d", i);
        run(argv[3 * i + 1], atoi(argv[3 * i + 2]), strcmp(argv[3 * i + 3], "end") == 0, out);
        puts("done");
        fflush(stdout);
    }
    return 0;
}
