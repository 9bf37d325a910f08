"""Implicit GEMM on tensor cores: pixels × output channels, reduced over taps and input channels.

Applies to  convolutions of any rank, stride and dilation, dense or with groups; transposed ones whose
            output is whole strides and whose dilation shares no divisor with them; on GPUs with
            ``mma.sync``, ``ldmatrix`` and ``cp.async``: f16, bf16 and i8; f32 as TF32 where the accuracy is
            `tf32`.
Strategy    1. Pack weights as [oc][taps × ic], in vectors of 16 bytes along the reduction.
            2. src is read as [pixels][taps × ic] without writing that anywhere: 16 bytes at a time
               straight into shared memory, asynchronously, zeros where the padding is, `stages` steps
               ahead. A first launch lays out NCHW, or channels that are not whole vectors, for it.
            3. Rows in shared memory are swizzled: 16-byte chunks trade places, told by their address, so that
               neither `ldmatrix` nor the copies meet a bank twice, and no byte is padding.
            4. A block of `tile_m` pixels × `tile_n` channels is divided among warps; each keeps its
               tile of sums in registers.
            5. The sums pass through shared memory once, for stores of 16 bytes; bias, residual and
               activation on the way.
            6. Transposed: outputs that are a stride apart meet the same taps. Each such phase is a
               product of its own; no zeros between inputs are multiplied.
            7. `split_k` blocks share a long reduction of few pixels; a second launch adds them up.
Why not     im2col in memory: it writes every input k² times; sums straight to dst: 4 bytes at a time.
"""

from __future__ import annotations

import itertools
import math

from tvm import te, tirx
from tvm.tirx import IndexMap

from convgen.cuda import model, tensorize
from convgen.lowering.compute import Operands, ceildiv, copied, epilogue, flat, narrow, round_up, unflat
from convgen.lowering.schedule import Picks, Program, Scheduled, Space, require
from convgen.problem.dtypes import BYTES

#: Bytes of a copy.
VECTOR = tensorize.VECTOR
#: A thread's registers beside its sums and fragments: addresses, counters.
OTHER_REGISTERS = 64


class CudaGemm(Scheduled):
    id, version, sums_integers = "cuda_gemm", 2, True

    def applies(self, spec, target):
        require(target.kind == "cuda", "needs a GPU")
        require({"ldmatrix", "cp_async"} <= set(target.features), "needs ldmatrix and cp.async (sm_80 or later)")
        if spec.transposed:
            whole = all(o % s == 0 for o, s in zip(spec.out_spatial, spec.stride, strict=True))
            require(whole, "needs whole strides of output where it is transposed")
            coprime = all(math.gcd(d, s) == 1 for d, s in zip(spec.dilation, spec.stride, strict=True))
            require(coprime, "needs a dilation that shares no divisor with the stride where it is transposed")
        require(spec.groups < spec.ic or spec.groups == 1, "needs more than one channel in a group")
        need = "tf32" if spec.dtype == "f32" else spec.dtype
        require(need in target.matrix, f"needs matrix units for {need}")
        self.admits(spec)

    def admits(self, spec):
        """Raise Inapplicable where another schedule of this family is the one for it."""
        require(spec.dtype != "f32" or spec.accuracy == "tf32", "needs accuracy tf32 for products of TF32")

    def merges(self, spec):
        """How many groups may be one."""
        return [1]

    def kind(self, spec):
        """The type of device.h that multiplies."""
        return "tf32" if spec.dtype == "f32" else spec.dtype

    #: Bytes of channels that a tap's are rounded up to in the reduction.
    whole = VECTOR

    def reduction(self, spec, merge_g=1):
        """Length of the reduction."""
        lanes = self.whole // BYTES[spec.dtype]
        return math.prod(_taps(spec)) * round_up(spec.ic // spec.groups * merge_g, lanes)

    def rounded(self, spec, picks):
        """(pixels, channels of a group, reduction) rounded up to whole tiles."""
        return (
            round_up(_pixels(spec), picks.tile_m),
            round_up(spec.oc // spec.groups * picks.merge_g, picks.tile_n),
            round_up(self.reduction(spec, picks.merge_g), picks.tile_k * picks.split_k),
        )

    def depth(self, spec):
        """Vectors of the reduction that the intrinsic takes."""
        return tensorize.STEP // VECTOR

    def intrinsic(self, spec, picks):
        return tensorize.mma(self.kind(spec), spec.dtype, *_warp(picks))

    def space(self, spec, target):
        step = 2 * _lanes(spec)
        merges = self.merges(spec)
        oc, reduction = spec.oc // spec.groups * merges[-1], self.reduction(spec, merges[-1])
        return Space(
            merge_g=merges,
            tile_m=[32, 64, 128, 256],
            tile_n=[n for n in (16, 32, 64, 128, 256) if n < 2 * max(16, oc)],
            tile_k=[k for k in (step, 2 * step, 4 * step) if k < 2 * reduction or k == step],
            warps_m=[1, 2, 4],
            warps_n=[1, 2, 4],
            stages=[2, 3, 4, 5],
            split_k=[s for s in (1, 2, 4, 8, 16) if s == 1 or reduction >= 8 * s * step],
        )

    def valid(self, spec, target, picks):
        rows, cols = _warp(picks)
        require(
            picks.tile_m % (16 * picks.warps_m) == 0 and picks.tile_n % (8 * picks.warps_n) == 0, "warps without a tile"
        )
        require(rows * cols <= 64 * 64, f"{rows} × {cols} sums of a warp, registers for {64 * 64}")
        require(2 <= picks.warps_m * picks.warps_n <= 16, "2 to 16 warps in a block")
        need = self.shared_memory(spec, picks)
        require(need <= target.shared_memory, f"{need} bytes of shared memory, {target.shared_memory} there")
        registers = _registers(spec, picks) * 32 * picks.warps_m * picks.warps_n
        require(registers <= model.REGISTERS, f"{registers} registers in a block, {model.REGISTERS} there")
        require(picks.tile_m * picks.tile_k * BYTES[spec.dtype] % (VECTOR * 32) == 0, "less than a copy per lane")
        steps = ceildiv(self.reduction(spec, picks.merge_g), picks.tile_k)
        require(picks.split_k <= max(1, steps // 2), "less than two steps for each of split_k")

    def default(self, spec, target):
        points = [p for p in self.likely(spec, target) if self.reason_against(spec, target, p) is None]
        return min(points, key=lambda picks: self.seconds(spec, target, picks))

    def likely(self, spec, target):
        """Points worth a prediction: a few hundred; at least one is valid."""
        domains = self.space(spec, target).domains
        shapes = [(256, 128, 4, 2), (128, 256, 2, 4), (128, 128, 2, 2), (128, 64, 2, 2), (64, 128, 2, 2)]
        shapes += [(64, 64, 2, 2), (128, 32, 4, 1), (64, 32, 2, 1), (32, 64, 1, 2), (32, 32, 2, 1), (64, 16, 4, 1)]
        others = [domains[name] for name in ("tile_k", "stages", "split_k", "merge_g")]
        for (tile_m, tile_n, warps_m, warps_n), (tile_k, stages, split_k, merge_g) in itertools.product(
            shapes, itertools.product(*others)
        ):
            yield Picks(
                merge_g=merge_g, tile_m=tile_m, tile_n=tile_n, tile_k=tile_k,
                warps_m=warps_m, warps_n=warps_n, stages=stages, split_k=split_k,
            )  # fmt: skip

    def rate(self, spec):
        """Products per core and cycle."""
        return {1: 2048, 2: 1024, 4: 512 if spec.accuracy == "tf32" else 170}[BYTES[spec.dtype]]

    def rows_read(self, picks):
        """Rows of a step that are read from shared memory."""
        return picks.warps_m * picks.warps_n * sum(_warp(picks))

    def step_cycles(self, spec, picks):
        """Cycles of a warp's own products in a step: it has a quarter of a core's units."""
        rows, cols = _warp(picks)
        return rows * cols * picks.tile_k / (self.rate(spec) / 4)

    def shared_memory(self, spec, picks):
        """Bytes of a block: the steps under way, and the sums on their way out."""
        row = picks.tile_k * BYTES[spec.dtype]
        # Threads past a small tile's end read as far as if it were larger; they store nothing.
        oc = spec.oc // spec.groups * picks.merge_g
        vectors = ceildiv(min(picks.tile_n, oc), _store(spec, oc))
        rows = ceildiv(round_up(picks.tile_m * vectors, 32 * picks.warps_m * picks.warps_n), vectors)
        sums = rows * (round_up(picks.tile_n - 8, 32) + 8) * 4
        return round_up(max(picks.stages * (picks.tile_m + picks.tile_n) * row, sums), 8 * row)

    def cost(self, spec, target):
        return self.seconds(spec, target, self.default(spec, target))

    def seconds(self, spec, target, picks):
        """Predicted seconds: what limits a core, matrix units or the way to its shared memory, and what waits.

        Rates are of an A100, per core and cycle; waiting is for L2, once per step where few steps are under way.
        """
        m, n, k = self.rounded(spec, picks)
        warps = picks.warps_m * picks.warps_n
        size = BYTES[spec.dtype]
        groups = _phases(spec) * spec.groups // picks.merge_g
        blocks = groups * (m // picks.tile_m) * (n // picks.tile_n) * picks.split_k
        resident = min(
            target.shared_per_core // (self.shared_memory(spec, picks) + model.RESERVED),
            model.REGISTERS // (_registers(spec, picks) * 32 * warps),
            target.threads_per_core // (32 * warps),
        )
        if not resident:
            return math.inf
        per_core = ceildiv(blocks, target.cores)
        waves = ceildiv(per_core, resident)
        steps = k // picks.split_k // picks.tile_k
        row = picks.tile_k * size
        through = row * (self.rows_read(picks) + picks.tile_m + picks.tile_n)
        step = max(
            picks.tile_m * picks.tile_n * picks.tile_k / self.rate(spec),
            through / 128,
            row * (picks.tile_m + picks.tile_n) / 40,
        )
        alone = max(800 / (picks.stages - 1), self.step_cycles(spec, picks)) + 40
        finish = picks.tile_m * picks.tile_n * (8 / 128 + size / 40)
        cycles = max(per_core * (steps * step + finish), waves * (steps * alone + finish)) + 2000
        seconds = cycles / 1.4e9
        if picks.split_k > 1:  # another launch, which reads what this one wrote
            seconds += model.LAUNCH + picks.split_k * groups * m * n * 8 / 2e12
        if _needs_layout(spec, picks):
            seconds += model.LAUNCH + 3 * math.prod(spec.src_shape) * size / 1e12
        return seconds

    def program(self, spec, target, picks):
        ops, host, lanes = Operands(spec, native=True), Operands(spec), _lanes(spec)
        stored, summed = tensorize.STORED[spec.dtype], tensorize.sums_of(spec.dtype)
        groups, merge = spec.groups // picks.merge_g, picks.merge_g
        ic_group, oc_group = spec.ic // spec.groups, spec.oc // spec.groups
        ic, oc = ic_group * merge, oc_group * merge  # of a group from here on
        taps = _taps(spec)
        depth = self.reduction(spec, merge) // math.prod(taps) // lanes  # vectors of channels
        pixels = _pixels(spec)
        m, n, k = self.rounded(spec, picks)
        vectors = k // lanes
        products = _phases(spec) * groups

        def where(b, vector, v):
            """Of an element of the reduction: phase, group, tap of that phase per axis, channel of the group."""
            phase, g = (tirx.floordiv(b, groups), tirx.floormod(b, groups)) if _phases(spec) > 1 else (0, b)
            tap, c = tirx.floordiv(vector, depth), tirx.floormod(vector, depth) * lanes + v
            return _phase(spec, phase), g, unflat(tap, taps), c

        def packed_weights(b, j, vector, v):
            phase, g, tap, c = where(b, vector, v)
            at = [_kernel_tap(spec, axis, phase, t) for axis, t in enumerate(tap)]
            inside = [j < oc, vector < math.prod(taps) * depth, c < ic]
            inside += [t < size for t, size in zip(at, spec.kernel, strict=True)]
            if merge > 1:
                inside.append(tirx.floordiv(j, oc_group) == tirx.floordiv(c, ic_group))
            o, c = g * oc + j, g * ic + c
            own = (c, tirx.floormod(o, oc_group)) if spec.transposed else (o, tirx.floormod(c, ic_group))
            value = host.weights.tensor(*own, *at)
            return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, value.ty.dtype))

        packed = [te.compute((products, n, vectors, lanes), packed_weights, name="weights_packed")]
        packed += [copied(p) for p in host.parameters[1:]]
        w = te.placeholder(packed[0].shape, stored, "weights_in")
        per_channel = [te.placeholder(t.shape, t.dtype, f"{t.op.name}_in") for t in packed[1:]]

        source = _channels_last(spec, ops, picks)

        def gathered(b, pixel, vector, v):
            phase, g, tap, c = where(b, vector, v)
            image, *out = unflat(pixel, (spec.n, *_grid(spec)))
            at, conditions = [], []
            for axis, (o, tap_) in enumerate(zip(out, tap, strict=True)):
                position, inside = _read(spec, axis, phase, o, tap_)
                at.append(position)
                conditions += inside
            if m != pixels:
                conditions.append(pixel < pixels)
            if vectors != math.prod(taps) * depth:
                conditions.append(vector < math.prod(taps) * depth)
            if depth > ceildiv(ic, lanes):
                conditions.append(c < round_up(ic, lanes))
            value = source(image, *at, g * round_up(ic, lanes) + c)
            return tirx.if_then_else(tirx.all(*conditions), value, tirx.const(0, stored)) if conditions else value

        a = te.compute((products, m, vectors, lanes), gathered, name="gathered")
        split = picks.split_k
        outer = te.reduce_axis((0, vectors // split), "vector")
        inner = te.reduce_axis((0, lanes), "v")

        def product(s, g, i, j):
            vector = s * (vectors // split) + outer
            left, right = a[g, i, vector, inner], w[g, j, vector, inner]
            return te.sum(left.astype(summed) * right.astype(summed), [outer, inner])

        sums = self.sums(spec, source, w, te.compute((split, products, m, n), product, name="tile_sums"))
        tile = te.compute(sums.shape, lambda *index: sums[index], name="tile")
        total = te.compute(sums.shape, lambda *index: tile[index], name="parts") if split > 1 else tile

        strides = spec.stride if spec.transposed else ()

        def value(*index):
            *phase, g, pixel, j = index
            b = flat((*phase, g), (*strides, groups))
            whole = total[0, b, pixel, j]
            for s in range(1, split):
                whole = whole + total[s, b, pixel, j]
            o = g * oc + j
            image, *out = unflat(pixel, (spec.n, *_grid(spec)))
            if spec.transposed:
                out = [q * s + f for q, s, f in zip(out, strides, phase, strict=True)]
            residual = ops.residual[ops.order(image, o, out)] if spec.residual else None
            result = epilogue(spec, whole, residual=residual, **ops.per_channel(per_channel, o))
            return narrow(result, spec.dtype) if spec.dtype == "i8" else result.astype(stored)

        finished = te.compute((*strides, groups, pixels, oc), value, name="finished")
        dst = te.compute(finished.shape, lambda *index: finished(*index), name="dst")
        return Program(pack=host.pack(*packed), main=ops.main([w, *per_channel], dst))

    def sums(self, spec, source, weights, products):
        """What is stored, of the products of src, as a function of its index, and packed weights."""
        return products

    def apply(self, sch, spec, target, picks):
        warps = picks.warps_m * picks.warps_n
        rows, cols = _warp(picks)
        summed = tensorize.sums_of(spec.dtype)

        # A block's tile, divided among warps.
        tile = sch.get_sblock("tile")
        s, g, i, j = sch.get_loops(tile)
        block_i, i = sch.split(i, [None, picks.tile_m])
        block_j, j = sch.split(j, [None, picks.tile_n])
        wm, mi = sch.split(i, [picks.warps_m, None])
        wn, nj = sch.split(j, [picks.warps_n, None])
        sch.reorder(s, g, block_i, block_j, wm, wn, mi, nj)
        block, warp = sch.fuse(s, g, block_i, block_j), sch.fuse(wm, wn)
        sch.bind(block, "blockIdx.x")
        sch.bind(warp, "threadIdx.y")
        sch.set_scope(tile, 0, "shared.dyn")

        # What becomes of it: dst, or the part of a sum that another launch adds up. Up to here dst has the axes of
        # the products; now it gets its own.
        dst = sch.get_sblock("dst")
        oc = spec.oc // spec.groups * picks.merge_g
        own = IndexMap.from_func(
            lambda *index: _own_axes(spec, index, oc),
            ndim=3 + (spec.rank if spec.transposed else 0),
            index_dtype="int32",
        )
        sch.transform_layout(dst, ("write", 0), own)
        single = _pixels(spec) == 1
        vector = 1 if single else _store(spec, oc)
        if picks.split_k > 1:
            parts = sch.get_sblock("parts")
            sch.reverse_compute_at(parts, block, preserve_unit_loops=True)
            _within(sch, sch.get_loops(parts)[1:], warps, 4)
            thread = _spread(sch, sch.get_loops(dst), 256, vector)
        else:
            for follower in (sch.get_sblock("finished"), dst):
                sch.reverse_compute_at(follower, block, preserve_unit_loops=True)
            *ones, i, j = sch.get_loops(dst)[1:]
            if spec.layout == "nchw":  # its rows are pixels
                sch.reorder(j, i)
                i, j = j, i
            thread = _within(sch, [*ones, i, j], warps, vector)
        finished = sch.get_sblock("finished")
        if single:  # TVM takes what threads read for as much as there are threads, not channels of one pixel
            sch.compute_inline(finished)
        else:
            sch.compute_at(finished, thread, preserve_unit_loops=True)
            sch.set_scope(finished, 0, "local")
            sch.unroll(sch.get_loops(finished)[-1])
            if vector > 1:
                loaded = sch.cache_read(finished, 0, "local")
                sch.compute_at(loaded, thread, preserve_unit_loops=True)
                _, v = sch.split(sch.get_loops(loaded)[-1], [None, min(4, vector)])
                sch.vectorize(v)

        self.reduce(sch, spec, picks, warp)
        tile = tensorize.replace(sch, mi, tile, tensorize.store(rows, cols, summed))
        # Rows of two-float stores meet no bank twice where they are 8 banks apart.
        sch.storage_align(tile, 0, axis=2, factor=32, offset=8)
        if _needs_layout(spec, picks):
            staged = sch.get_sblock("channels_last")
            _spread(sch, sch.get_loops(staged), 256, 1)

    def reduce(self, sch, spec, picks, warp):
        """Schedule the sums of each warp's tile."""
        warps, lanes, summed = picks.warps_m * picks.warps_n, _lanes(spec), tensorize.sums_of(spec.dtype)
        rows, cols = _warp(picks)
        sums = sch.get_sblock("tile_sums")
        sch.compute_at(sums, warp, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        *_, i, j, k, v = sch.get_loops(sums)
        depth = self.depth(spec)
        step, within, k = sch.split(k, [None, picks.tile_k // (depth * lanes), depth])
        sch.reorder(step, within, i, j, k, v)

        sch.set_scope(sch.get_sblock("gathered"), 0, "shared.dyn")
        for copied_block in (sch.get_sblock("gathered"), sch.cache_read(sums, 1, "shared.dyn")):
            sch.compute_at(copied_block, step, preserve_unit_loops=True)
            *_, i2, k2, v2 = sch.get_loops(copied_block)
            _, ty, tx = sch.split(sch.fuse(i2, k2), [None, warps, 32], preserve_unit_iters=True)
            sch.bind(ty, "threadIdx.y")
            sch.bind(tx, "threadIdx.x")
            sch.vectorize(v2)

        init = sch.decompose_reduction(sums, step)
        tensorize.replace(sch, sch.get_loops(init)[-2], init, tensorize.clear(rows, cols, summed))
        sch.unroll(within)
        tensorize.replace(sch, i, sums, self.intrinsic(spec, picks))
        if picks.stages > 1:
            sch.annotate(step, "software_pipeline_stage", [0, 0, picks.stages - 1])
            sch.annotate(step, "software_pipeline_order", [0, 1, 2])
            sch.annotate(step, "software_pipeline_async_stages", [0])


def _own_axes(spec, index, oc):
    """dst's own index of (phases, group of ``oc`` channels, pixel of the phase, channel of the group)."""
    *phases, g, pixel, j = index
    image, *out = unflat(pixel, (spec.n, *_grid(spec)))
    if spec.transposed:
        out = [q * s + f for q, s, f in zip(out, spec.stride, phases, strict=True)]
    o = g * oc + j
    return [image, o, *out] if spec.layout == "nchw" else [image, *out, o]


# ---- taps and pixels of a product --------------------------------------------------------------


def _phases(spec):
    return math.prod(spec.stride) if spec.transposed else 1


def _phase(spec, phase):
    """Per axis."""
    return unflat(phase, spec.stride) if spec.transposed else [0] * spec.rank


def _grid(spec):
    """Outputs of a phase per axis."""
    if not spec.transposed:
        return spec.out_spatial
    return tuple(o // s for o, s in zip(spec.out_spatial, spec.stride, strict=True))


def _pixels(spec):
    return spec.n * math.prod(_grid(spec))


def _taps(spec):
    """Most taps of a phase per axis."""
    if not spec.transposed:
        return spec.kernel
    return tuple(ceildiv(k, s) for k, s in zip(spec.kernel, spec.stride, strict=True))


def _by_phase(spec, axis, phase, value):
    """``value(phase)`` of an axis as a choice among constants: TVM's simplifier has wrong rules for the arithmetic."""
    last = spec.stride[axis] - 1
    chosen = tirx.const(value(last), "int32")
    for i in reversed(range(last)):
        chosen = tirx.Select(phase[axis] == i, tirx.const(value(i), "int32"), chosen)
    return chosen


def _first(spec, axis, phase):
    """The first tap that an output of a phase meets: ``phase + padding - tap * dilation`` is whole strides."""
    stride = spec.stride[axis]
    return (phase + spec.padding[axis][0]) * pow(spec.dilation[axis], -1, stride) % stride if stride > 1 else 0


def _first_tap(spec, axis, phase):
    return _by_phase(spec, axis, phase, lambda f: _first(spec, axis, f))


def _kernel_tap(spec, axis, phase, tap):
    """The tap of the kernel that one of a phase is."""
    return _first_tap(spec, axis, phase) + spec.stride[axis] * tap if spec.transposed else tap


def _read(spec, axis, phase, o, tap):
    """Where output ``o`` reads src for a tap, and when that is inside."""
    (begin, end), size = spec.padding[axis], spec.in_spatial[axis]
    stride, dilation = spec.stride[axis], spec.dilation[axis]
    if not spec.transposed:
        at = o * stride + tap * dilation - begin
        return at, [at >= 0] * bool(begin) + [at < size] * bool(end)
    start = _by_phase(spec, axis, phase, lambda f: (f + begin - _first(spec, axis, f) * dilation) // stride)
    at = o + start - tap * dilation
    inside = [at >= 0, at < size]
    if spec.kernel[axis] % stride:
        inside.append(_kernel_tap(spec, axis, phase, tap) < spec.kernel[axis])
    return at, inside


# ---- threads -----------------------------------------------------------------------------------


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


# ---- sizes -------------------------------------------------------------------------------------


def _store(spec, oc):
    """Elements that are stored together."""
    return 1 if spec.layout == "nchw" else math.gcd(_lanes(spec), oc)


def _lanes(spec):
    return VECTOR // BYTES[spec.dtype]


def _warp(picks):
    """(rows, cols) of a warp's tile."""
    return picks.tile_m // picks.warps_m, picks.tile_n // picks.warps_n


def _registers(spec, picks):
    """Of a thread, about."""
    rows, cols = _warp(picks)
    fragments = (rows // 16 * 4 + cols // 8 * 2) * (3 if spec.dtype == "f32" else 1)
    return rows * cols // 32 + fragments + OTHER_REGISTERS


def _needs_layout(spec, picks):
    return spec.layout == "nchw" or spec.ic // spec.groups * picks.merge_g % _lanes(spec) != 0


def _channels_last(spec, ops, picks):
    """src as ``f(n, *spatial, channel)``, every group whole vectors of channels: itself, or laid out so by a first
    launch.
    """
    if not _needs_layout(spec, picks):
        return lambda *index: ops.src.tensor(*index)
    ic = spec.ic // spec.groups * picks.merge_g
    whole = round_up(ic, _lanes(spec))

    def value(image, *rest):
        *at, c = rest
        if whole == ic:
            return ops.src.tensor(*ops.order(image, c, at))
        g, c = tirx.floordiv(c, whole), tirx.floormod(c, whole)
        read = ops.src.tensor(*ops.order(image, g * ic + c, at))
        return tirx.if_then_else(c < ic, read, tirx.const(0, tensorize.STORED[spec.dtype]))

    shape = (spec.n, *spec.in_spatial, spec.groups // picks.merge_g * whole)
    staged = te.compute(shape, value, name="channels_last")
    return lambda *index: staged(*index)
