$driver

/* ---- the library's calls ---------------------------------------------------------------------- */

static void compute(const convgen_sizes *sizes, dst_element *dst)
{
    /* Once, on any machine: pack the weights. */
    void *packed = buffer(sizes->packed);
    const convgen_pack_args pack = {
$pack        .packed = packed,
        .packed_size = sizes->packed,
    };
    must("pack", ${name}_pack(&pack));

    /* Once per device: load the code, upload what was packed. */
    open_device();
    must_on_device("load", ${name}_load());
    struct CUstream_st *stream;
    driver_must("cuStreamCreate", cuStreamCreate(&stream, 0));
    memset(dst, 0xff, sizes->dst); /* NaN: what is not written shows */
    const convgen_cuda_run_args run = {
        .src = upload(src, sizes->src),
        .src_size = sizes->src,
        .packed = upload(packed, sizes->packed),
        .packed_size = sizes->packed,
$run        .dst = upload(dst, sizes->dst),
        .dst_size = sizes->dst,
        .workspace = upload(NULL, sizes->workspace),
        .workspace_size = sizes->workspace,
        .stream = stream,
    };

    /* As often as there is input: run. The call returns when the work is on the stream. */
    must_on_device("run", ${name}_run(&run));
    driver_must("cuStreamSynchronize", cuStreamSynchronize(stream));
    driver_must("cuMemcpyDtoH", cuMemcpyDtoH(dst, address(run.dst), sizes->dst));

    must_on_device("unload", ${name}_unload());
    release(run.src);
    release(run.packed);
    release(run.residual);
    release(run.dst);
    release(run.workspace);
    free(packed);
}
