/* ---- the library's calls ---------------------------------------------------------------------- */

static void compute(const convgen_sizes *sizes, dst_element *dst)
{
    must("check_cpu", ${name}_check_cpu());
    void *packed = buffer(sizes->packed), *workspace = buffer(sizes->workspace);

    /* Once: pack the weights. */
    const convgen_pack_args pack = {
$pack        .packed = packed,
        .packed_size = sizes->packed,
    };
    must("pack", ${name}_pack(&pack));

    /* As often as there is input: run, here on the calling thread ... */
    convgen_run_args run = {
        .src = src,
        .src_size = sizes->src,
        .packed = packed,
        .packed_size = sizes->packed,
$run        .dst = dst,
        .dst_size = sizes->dst,
        .workspace = workspace,
        .workspace_size = sizes->workspace,
        .pool = NULL,
    };
    memset(dst, 0xff, sizes->dst); /* NaN: what is not written shows */
    must("run", ${name}_run(&run));

    /* ... and here on two. One pool serves all layers of a program. */
    must("pool_create", ${name}_pool_create(2, &run.pool));
    dst_element *again = buffer(sizes->dst);
    memset(again, 0xff, sizes->dst);
    run.dst = again;
    must("run with a pool", ${name}_run(&run));
    ${name}_pool_destroy(run.pool);
    if (memcmp(dst, again, sizes->dst) != 0) {
        fprintf(stderr, "one thread and two threads disagree\n");
        exit(1);
    }
    free(again);
    free(workspace);
    free(packed);
}
