"""Implicit GEMM on tensor cores: pixels × output channels, reduced over taps and input channels.

Applies to  convolutions of any rank, stride and dilation that are not transposed, with groups 1, on GPUs
            with ``mma.sync``, ``ldmatrix`` and ``cp.async``: f16 and bf16; f32 as TF32 where the accuracy
            allows it, else each product as three of TF32.
Strategy    1. Pack weights as [oc][taps × ic], in vectors of 16 bytes along the reduction.
            2. src is read as [pixels][taps × ic] without writing that anywhere: 16 bytes at a time
               straight into shared memory, asynchronously, zeros where the padding is, `stages` steps
               ahead. A first launch lays out NCHW, or channels that are not whole vectors, for it.
            3. Rows in shared memory are 16 bytes longer than their data: `ldmatrix` then meets no bank twice.
            4. A block of `tile_m` pixels × `tile_n` channels is divided among warps; each keeps its
               tile of sums in registers.
            5. The sums pass through shared memory once, for stores of 16 bytes; bias, residual and
               activation on the way.
            6. `split_k` blocks share a long reduction of few pixels; a second launch adds them up.
Why not     im2col in memory: it writes every input k² times; sums straight to dst: 4 bytes at a time.
"""

from __future__ import annotations

import math

from tvm import te, tirx
from tvm.tirx import IndexMap

from convgen.compute import ACCUMULATOR, Operands, ceildiv, copied, epilogue, flat, round_up, unflat
from convgen.cuda import tensorize
from convgen.dtypes import BYTES
from convgen.schedule import Picks, Program, Schedule, Space, require

#: Bytes of a copy, and rows of a step in shared memory are this much longer than their data.
VECTOR = 16
#: A thread's registers beside its sums and fragments: addresses, counters.
OTHER_REGISTERS = 64
#: Seconds that a further launch takes.
LAUNCH = 3e-6


class CudaGemm(Schedule):
    id, version = "cuda_gemm", 1

    def applies(self, spec, target):
        require(target.kind == "cuda", "needs a GPU")
        require({"ldmatrix", "cp_async"} <= set(target.features), "needs ldmatrix and cp.async (sm_80 or later)")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.groups == 1, "needs groups 1")
        need = "tf32" if spec.dtype == "f32" else spec.dtype
        require(need in target.matrix, f"needs matrix units for {need}")
        require(spec.dtype != "f32" or spec.accuracy != "strict", "sums of three TF32 products are not strict")

    def space(self, spec, target):
        step = 2 * _lanes(spec)
        reduction = _reduction(spec)
        return Space(
            tile_m=[32, 64, 128, 256],
            tile_n=[n for n in (16, 32, 64, 128, 256) if n < 2 * max(16, spec.oc)],
            tile_k=[k for k in (step, 2 * step, 4 * step) if k < 2 * reduction or k == step],
            warps_m=[1, 2, 4],
            warps_n=[1, 2, 4],
            stages=[2, 3, 4, 5],
            split_k=[s for s in (1, 2, 4, 8, 16) if s == 1 or reduction >= 8 * s * step],
        )

    def valid(self, spec, target, picks):
        rows, cols = _warp(picks)
        require(picks.tile_m % (16 * picks.warps_m) == 0 and picks.tile_n % (8 * picks.warps_n) == 0, "warps without a tile")
        require(rows * cols <= 64 * 64, f"{rows} × {cols} sums of a warp, registers for {64 * 64}")
        require(2 <= picks.warps_m * picks.warps_n <= 16, "2 to 16 warps in a block")
        need = shared_memory(spec, picks)
        require(need <= target.shared_memory, f"{need} bytes of shared memory, {target.shared_memory} there")
        registers = _registers(spec, picks) * 32 * picks.warps_m * picks.warps_n
        require(registers <= 1 << 16, f"{registers} registers in a block, {1 << 16} there")
        require(picks.tile_m * picks.tile_k * BYTES[spec.dtype] % (VECTOR * 32) == 0, "less than a copy per lane")
        steps = ceildiv(_reduction(spec), picks.tile_k)
        require(picks.split_k <= max(1, steps // 2), "less than two steps for each of split_k")

    def default(self, spec, target):
        return min(self._likely(spec, target), key=lambda picks: _seconds(spec, target, picks))

    def _likely(self, spec, target):
        """Points worth a prediction: a few dozen."""
        space = self.space(spec, target).domains
        step = 2 * _lanes(spec)
        shapes = [(256, 128, 4, 2), (128, 256, 2, 4), (128, 128, 2, 2), (128, 64, 2, 2), (64, 128, 2, 2)]
        shapes += [(64, 64, 2, 2), (128, 32, 4, 1), (64, 32, 2, 1), (32, 64, 1, 2), (32, 32, 2, 1), (64, 16, 4, 1)]
        for tile_m, tile_n, warps_m, warps_n in shapes:
            for tile_k in (2 * step, 4 * step, step):
                for stages in (4, 3, 2):
                    for split_k in space["split_k"]:
                        picks = Picks(
                            tile_m=tile_m, tile_n=tile_n, tile_k=tile_k, warps_m=warps_m, warps_n=warps_n,
                            stages=stages, split_k=split_k,
                        )  # fmt: skip
                        if self.reason_against(spec, target, picks) is None:
                            yield picks

    def cost(self, spec, target):
        return _seconds(spec, target, self.default(spec, target))

    def program(self, spec, target, picks):
        ops, host, lanes = Operands(spec, native=True), Operands(spec), _lanes(spec)
        stored = tensorize.STORED[spec.dtype]
        depth = _vectors(spec)  # vectors of channels
        taps = math.prod(spec.kernel)
        pixels = spec.n * math.prod(spec.out_spatial)
        m, n, k = _rounded(spec, picks)
        vectors = k // lanes
        zero = tirx.const(0, stored)

        def packed_weights(o, vector, v):
            tap, c = tirx.floordiv(vector, depth), tirx.floormod(vector, depth) * lanes + v
            inside = tirx.all(o < spec.oc, tap < taps, c < spec.ic)
            value = host.weights.tensor(o, c, *unflat(tap, spec.kernel))
            return tirx.if_then_else(inside, value, tirx.const(0, value.ty.dtype))

        packed = [te.compute((n, vectors, lanes), packed_weights, name="weights_packed")]
        packed += [copied(p, n) for p in host.parameters[1:]]
        w = te.placeholder((n, vectors, lanes), stored, "weights_in")
        per_channel = [te.placeholder(t.shape, t.dtype, f"{t.op.name}_in") for t in packed[1:]]

        source = _channels_last(spec, ops)

        def gathered(pixel, vector, v):
            image, *out = unflat(pixel, (spec.n, *spec.out_spatial))
            tap, c = tirx.floordiv(vector, depth), tirx.floormod(vector, depth) * lanes + v
            at = [
                o * s + t * d - begin
                for o, t, s, d, (begin, _) in zip(
                    out, unflat(tap, spec.kernel), spec.stride, spec.dilation, spec.padding, strict=True
                )
            ]
            conditions = [x >= 0 for x, (begin, _) in zip(at, spec.padding, strict=True) if begin]
            conditions += [x < size for x, size, (_, end) in zip(at, spec.in_spatial, spec.padding, strict=True) if end]
            if m != pixels:
                conditions.append(pixel < pixels)
            if vectors != taps * depth:
                conditions.append(vector < taps * depth)
            value = source(image, *at, c)
            return tirx.if_then_else(tirx.all(*conditions), value, zero) if conditions else value

        a = te.compute((m, vectors, lanes), gathered, name="gathered")
        split = picks.split_k
        outer = te.reduce_axis((0, vectors // split), "vector")
        inner = te.reduce_axis((0, lanes), "v")

        def product(s, i, j):
            vector = s * (vectors // split) + outer
            return te.sum(
                a[i, vector, inner].astype(ACCUMULATOR) * w[j, vector, inner].astype(ACCUMULATOR), [outer, inner]
            )

        sums = te.compute((split, m, n), product, name="tile_sums")
        tile = te.compute((split, m, n), lambda s, i, j: sums[s, i, j], name="tile")
        if split > 1:
            parts = te.compute((split, m, n), lambda s, i, j: tile[s, i, j], name="parts")

        def value(pixel, o):
            if split > 1:
                total = parts[0, pixel, o]
                for s in range(1, split):
                    total = total + parts[s, pixel, o]
            else:
                total = tile[0, pixel, o]
            image, *out = unflat(pixel, (spec.n, *spec.out_spatial))
            residual = ops.residual[ops.order(image, o, out)] if spec.residual else None
            return epilogue(spec, total, residual=residual, **ops.per_channel(per_channel, o)).astype(stored)

        finished = te.compute((pixels, spec.oc), value, name="finished")

        def stored_at(*index):
            image, o, out = ops.logical(index)
            return finished[flat((image, *out), (spec.n, *spec.out_spatial)), o]

        dst = te.compute(spec.dst_shape, stored_at, name="dst")
        return Program(pack=host.pack(*packed), main=ops.main([w, *per_channel], dst))

    def apply(self, sch, spec, target, picks):
        warps = picks.warps_m * picks.warps_n
        rows, cols = _warp(picks)
        kind = {"f16": "f16", "bf16": "bf16"}.get(spec.dtype) or ("tf32" if _single(spec) else "tf32x3")
        lanes = _lanes(spec)

        # A block's tile, divided among warps.
        tile = sch.get_sblock("tile")
        s, i, j = sch.get_loops(tile)
        block_i, i = sch.split(i, [None, picks.tile_m])
        block_j, j = sch.split(j, [None, picks.tile_n])
        wm, mi = sch.split(i, [picks.warps_m, None])
        wn, nj = sch.split(j, [picks.warps_n, None])
        sch.reorder(s, block_i, block_j, wm, wn, mi, nj)
        block, warp = sch.fuse(s, block_i, block_j), sch.fuse(wm, wn)
        sch.bind(block, "blockIdx.x")
        sch.bind(warp, "threadIdx.y")
        sch.set_scope(tile, 0, "shared.dyn")

        # What becomes of it: dst, its pixels in one row, or the part of a sum that another launch adds up.
        dst = sch.get_sblock("dst")
        axes = len(spec.dst_shape)
        sch.transform_block_layout(dst, IndexMap.from_func(lambda *index: _matrix(spec, index), ndim=axes))
        vector = 1 if spec.layout == "nchw" else math.gcd(VECTOR // BYTES[spec.dtype], spec.oc)
        if picks.split_k > 1:
            parts = sch.get_sblock("parts")
            sch.reverse_compute_at(parts, block, preserve_unit_loops=True)
            _within(sch, sch.get_loops(parts)[1:], warps, 4)
            thread = _spread(sch, sch.get_loops(dst), 256, vector)
        else:
            for follower in (sch.get_sblock("finished"), dst):
                sch.reverse_compute_at(follower, block, preserve_unit_loops=True)
            loops = sch.get_loops(dst)[1:]
            if spec.layout == "nchw":  # its rows are pixels
                sch.reorder(loops[1], loops[0])
                loops.reverse()
            thread = _within(sch, loops, warps, vector)
        finished = sch.get_sblock("finished")
        sch.compute_at(finished, thread, preserve_unit_loops=True)
        sch.set_scope(finished, 0, "local")
        sch.unroll(sch.get_loops(finished)[-1])
        if vector > 1:
            loaded = sch.cache_read(finished, 0, "local")
            sch.compute_at(loaded, thread, preserve_unit_loops=True)
            _, v = sch.split(sch.get_loops(loaded)[-1], [None, min(4, vector)])
            sch.vectorize(v)

        sums = sch.get_sblock("tile_sums")
        sch.compute_at(sums, warp, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        *_, i, j, k, v = sch.get_loops(sums)
        step, within, k = sch.split(k, [None, picks.tile_k // (2 * lanes), 2])
        sch.reorder(step, within, i, j, k, v)

        sch.set_scope(sch.get_sblock("gathered"), 0, "shared.dyn")
        for copied_block in (sch.get_sblock("gathered"), sch.cache_read(sums, 1, "shared.dyn")):
            sch.compute_at(copied_block, step, preserve_unit_loops=True)
            sch.storage_align(copied_block, 0, axis=0, factor=2 * lanes, offset=lanes)
            *_, i2, k2, v2 = sch.get_loops(copied_block)
            _, ty, tx = sch.split(sch.fuse(i2, k2), [None, warps, 32], preserve_unit_iters=True)
            sch.bind(ty, "threadIdx.y")
            sch.bind(tx, "threadIdx.x")
            sch.vectorize(v2)

        init = sch.decompose_reduction(sums, step)
        tensorize.replace(sch, sch.get_loops(init)[-2], init, tensorize.clear(rows, cols))
        sch.unroll(within)
        tensorize.replace(sch, i, sums, tensorize.mma(kind, spec.dtype, rows, cols))
        tile = tensorize.replace(sch, mi, tile, tensorize.store(rows, cols))
        # Rows of two-float stores meet no bank twice where they are 8 banks apart.
        sch.storage_align(tile, 0, axis=1, factor=32, offset=8)
        if picks.stages > 1:
            sch.annotate(step, "software_pipeline_stage", [0, 0, picks.stages - 1])
            sch.annotate(step, "software_pipeline_order", [0, 1, 2])
            sch.annotate(step, "software_pipeline_async_stages", [0])

        if _needs_layout(spec):
            staged = sch.get_sblock("channels_last")
            _spread(sch, sch.get_loops(staged), 256, 1)


def _matrix(spec, index):
    """The index of dst as (pixel, channel)."""
    image, *rest = index
    o, out = (rest[0], rest[1:]) if spec.layout == "nchw" else (rest[-1], rest[:-1])
    return flat((image, *out), (spec.n, *spec.out_spatial)), o


def _within(sch, loops, warps, vector):
    """A tile's elements among the threads of its block, in vectors; returns a thread's loop."""
    *rows, last = loops
    last, v = sch.split(last, [None, vector])
    _, ty, tx = sch.split(sch.fuse(*rows, last), [None, warps, 32])
    sch.bind(ty, "threadIdx.y")
    sch.bind(tx, "threadIdx.x")
    sch.vectorize(v)
    return tx


def _spread(sch, loops, threads, vector):
    """All elements of a block of TE among the threads of a launch of its own, in vectors; returns a thread's loop."""
    *rows, last = loops
    last, v = sch.split(last, [None, vector])
    blocks, tx = sch.split(sch.fuse(*rows, last), [None, threads])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(tx, "threadIdx.x")
    sch.vectorize(v)
    return tx


def _single(spec):
    """Whether one product of TF32 will do."""
    return spec.accuracy == "tf32"


def _lanes(spec):
    return VECTOR // BYTES[spec.dtype]


def _vectors(spec):
    """Vectors of input channels."""
    return ceildiv(spec.ic, _lanes(spec))


def _reduction(spec):
    return math.prod(spec.kernel) * _vectors(spec) * _lanes(spec)


def _rounded(spec, picks):
    """(pixels, channels, reduction) rounded up to whole tiles."""
    pixels = spec.n * math.prod(spec.out_spatial)
    return (
        round_up(pixels, picks.tile_m),
        round_up(spec.oc, picks.tile_n),
        round_up(_reduction(spec), picks.tile_k * picks.split_k),
    )


def _warp(picks):
    """(rows, cols) of a warp's tile."""
    return picks.tile_m // picks.warps_m, picks.tile_n // picks.warps_n


def shared_memory(spec, picks):
    """Bytes of shared memory of a block: the steps under way, and the sums on their way out."""
    row = picks.tile_k * BYTES[spec.dtype] + VECTOR
    return picks.stages * (picks.tile_m + picks.tile_n) * row + picks.tile_m * (picks.tile_n + 24) * 4


def _registers(spec, picks):
    """Of a thread, about."""
    rows, cols = _warp(picks)
    fragments = (rows // 16 * 4 + cols // 8 * 2) * (1 if spec.dtype != "f32" or _single(spec) else 3)
    return rows * cols // 32 + fragments + OTHER_REGISTERS


def _needs_layout(spec):
    return spec.layout == "nchw" or spec.ic % _lanes(spec) != 0


def _channels_last(spec, ops):
    """src as ``f(n, *spatial, channel)``: itself, or laid out with whole vectors of channels by a first launch."""
    if not _needs_layout(spec):
        return lambda *index: ops.src.tensor(*index)
    zero = tirx.const(0, tensorize.STORED[spec.dtype])

    def value(image, *rest):
        *at, c = rest
        read = ops.src.tensor(*ops.order(image, c, at))
        return tirx.if_then_else(c < spec.ic, read, zero) if spec.ic % _lanes(spec) else read

    shape = (spec.n, *spec.in_spatial, _vectors(spec) * _lanes(spec))
    staged = te.compute(shape, value, name="channels_last")
    return lambda *index: staged(*index)


def _seconds(spec, target, picks):
    """Predicted seconds: what limits a core, matrix units or the way to its shared memory, and what waits.

    Rates are of an A100, per core and cycle; waiting is for L2, once per step where few steps are under way.
    """
    m, n, k = _rounded(spec, picks)
    rows, cols = _warp(picks)
    warps = picks.warps_m * picks.warps_n
    size = BYTES[spec.dtype]
    blocks = m // picks.tile_m * (n // picks.tile_n) * picks.split_k
    resident = min(
        target.shared_per_core // (shared_memory(spec, picks) + 1024),
        (1 << 16) // (_registers(spec, picks) * 32 * warps),
        target.threads_per_core // (32 * warps),
    )
    if not resident:
        return math.inf
    per_core = ceildiv(blocks, target.cores)
    waves = ceildiv(per_core, resident)
    steps = k // picks.split_k // picks.tile_k
    products = {2: 1024, 4: 512 if _single(spec) else 170}[size]
    row = picks.tile_k * size
    through = row * (warps * (rows + cols) + picks.tile_m + picks.tile_n)
    step = max(
        picks.tile_m * picks.tile_n * picks.tile_k / products,
        through / 128,
        row * (picks.tile_m + picks.tile_n) / 40,
    )
    alone = max(800 / (picks.stages - 1), 4 * (picks.tile_k * size / 32) * (rows // 16 * (cols // 8)) * 2)
    finish = picks.tile_m * picks.tile_n * (8 / 128 + size / 40)
    cycles = max(per_core * (steps * step + finish), waves * (steps * alone + finish)) + 2000
    seconds = cycles / 1.4e9
    if picks.split_k > 1:  # another launch, which reads what this one wrote
        seconds += LAUNCH + picks.split_k * m * n * 8 / 2e12
    if _needs_layout(spec):
        seconds += LAUNCH + 3 * math.prod(spec.src_shape) * size / 1e12
    return seconds
