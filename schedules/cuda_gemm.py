"""Implicit GEMM on tensor cores: pixels × output channels, reduced over taps and input channels.

Applies to  convolutions of any rank, stride and dilation, dense or with groups; transposed ones whose
            output is whole strides and whose dilation shares no divisor with them; on GPUs with
            ``mma.sync``, ``ldmatrix`` and ``cp.async``: f16, bf16 and i8; f32 as TF32 where the accuracy is
            `tf32` or `bf16`.
Strategy    1. Pack weights as [oc][taps × ic], in vectors of 16 bytes along the reduction.
            2. src is read as [pixels][taps × ic] without writing that anywhere: 16 bytes at a time
               straight into shared memory, asynchronously, zeros where the padding is, `stages` steps
               ahead. Where src is NCHW, or its channels are not whole vectors, a first launch lays it out.
            3. Rows in shared memory are swizzled: chunks of 16 bytes change places, as their address says, so
               that neither `ldmatrix` nor the copies meet a bank twice, and no byte is padding.
            4. A block of `tile_m` pixels × `tile_n` channels is divided among warps; each keeps its
               tile of sums in registers.
            5. The sums pass through shared memory once, for stores of 16 bytes; bias, residual and
               activation on the way.
            6. Transposed: outputs that are a stride apart meet the same taps. Each such phase is a
               product of its own; no zeros between inputs are multiplied.
            7. `split_k` blocks share a long reduction of few pixels; a second launch adds them up.
Why not     im2col in memory: it writes every input k² times; sums straight to dst: 4 bytes at a time.

What is computed, as tensor expressions, is in convgen.cuda.implicit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from convgen.cuda import implicit, model, tensorize
from convgen.cuda.blocks import among_threads, copy_together, divide_among_warps, spread, warp_tile
from convgen.cuda.implicit import lanes_of, needs_layout
from convgen.cuda.operands import channels_last
from convgen.deferred import te, tirx
from convgen.lowering.compute import Expr, Operand, Operands, ceildiv, copied, round_up
from convgen.lowering.schedule import Picks, Program, Scheduled, Space, require
from convgen.problem.dtypes import BYTES

if TYPE_CHECKING:
    from tvm.s_tir import Schedule as TirSchedule

    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec

#: Bytes of a copy.
VECTOR = tensorize.VECTOR
#: A thread's registers besides its sums and fragments: addresses, counters.
OTHER_REGISTERS = 64


class CudaGemm(Scheduled):
    id, version, sums_integers = "cuda_gemm", 3, True
    #: Bytes that the channels of a tap are rounded up to in the reduction.
    whole: ClassVar[int] = VECTOR
    #: In how many parts a reduction may be split.
    splits: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 16)

    def applies(self, spec: ConvSpec, target: Target) -> None:
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

    def admits(self, spec: ConvSpec) -> None:
        """Raise Inapplicable where another schedule of this family is the one for it."""
        rounds = spec.dtype != "f32" or spec.accuracy in ("tf32", "bf16")  # bf16 admits larger errors than TF32's
        require(rounds, "needs accuracy tf32 or bf16 for products of TF32")

    def merges(self, spec: ConvSpec) -> list[int]:
        """How many groups of the layer may be one group of the products."""
        return [1]

    def kind(self, spec: ConvSpec) -> str:
        """The type of device.h that multiplies, without ``cg_``."""
        return "tf32" if spec.dtype == "f32" else spec.dtype

    def reduction(self, spec: ConvSpec, merge_g: int = 1) -> int:
        """Length of the reduction, where ``merge_g`` groups are one."""
        lanes = self.whole // BYTES[spec.dtype]
        return math.prod(implicit.taps(spec)) * round_up(spec.ic // spec.groups * merge_g, lanes)

    def rounded(self, spec: ConvSpec, picks: Picks) -> tuple[int, int, int]:
        """(pixels, channels of a group, reduction) rounded up to whole tiles."""
        return (
            round_up(implicit.pixels(spec), picks.tile_m),
            round_up(spec.oc // spec.groups * picks.merge_g, picks.tile_n),
            round_up(self.reduction(spec, picks.merge_g), picks.tile_k * picks.split_k),
        )

    def count(self, spec: ConvSpec, picks: Picks) -> int:
        """How many products there are."""
        count: int = implicit.phases(spec) * (spec.groups // picks.merge_g)
        return count

    def laid_out(self, spec: ConvSpec, picks: Picks) -> int:
        """Bytes of what is laid out before it is multiplied."""
        return spec.bytes["src"] if needs_layout(spec, picks) else 0

    def depth(self, spec: ConvSpec) -> int:
        """Vectors of the reduction that the intrinsic takes at once."""
        return tensorize.STEP // VECTOR

    def intrinsic(self, spec: ConvSpec, picks: Picks) -> str:
        """The name of the intrinsic that multiplies a warp's tile."""
        return tensorize.mma(self.kind(spec), spec.dtype, *warp_tile(picks))

    def space(self, spec: ConvSpec, target: Target) -> Space:
        step = 2 * lanes_of(spec)
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
            split_k=[s for s in self.splits if s == 1 or reduction >= 8 * s * step],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        rows, cols = warp_tile(picks)
        require(
            picks.tile_m % (16 * picks.warps_m) == 0 and picks.tile_n % (8 * picks.warps_n) == 0,
            "a warp's tile is not whole tiles of 16 × 8",
        )
        require(rows * cols <= 64 * 64, f"{rows} × {cols} sums of a warp, at most {64 * 64}")
        require(2 <= picks.warps_m * picks.warps_n <= 16, "needs 2 to 16 warps in a block")
        need = self.shared_memory(spec, picks)
        require(need <= target.shared_memory, f"{need} bytes of shared memory, at most {target.shared_memory}")
        registers = self.registers(spec, picks) * 32 * picks.warps_m * picks.warps_n
        require(registers <= model.REGISTERS, f"{registers} registers in a block, at most {model.REGISTERS}")
        require(
            picks.tile_m * picks.tile_k * BYTES[spec.dtype] % (VECTOR * 32) == 0,
            "a step has less than one copy for each thread of a warp",
        )
        steps = ceildiv(self.reduction(spec, picks.merge_g), picks.tile_k)
        require(picks.split_k <= max(1, steps // 2), "less than two steps for each part of split_k")
        steps = ceildiv(steps, picks.split_k)
        require(picks.stages <= max(2, steps), f"{picks.stages} stages, there are {steps} steps")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        points = [p for p in self.likely(spec, target) if self.reason_against(spec, target, p) is None]
        return min(points, key=lambda picks: self.seconds(spec, target, picks))

    def likely(self, spec: ConvSpec, target: Target) -> Iterator[Picks]:
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

    def rate(self, spec: ConvSpec, target: Target) -> float:
        """Multiply-adds of a core's matrix units in a cycle."""
        kind = self.kind(spec)
        return dict(target.rates.mma)["tf32"] / 3 if kind == "tf32x3" else dict(target.rates.mma)[kind]

    def rows_read(self, picks: Picks) -> int:
        """Rows of a step that are read from shared memory, by all warps together."""
        rows: int = picks.warps_m * picks.warps_n * sum(warp_tile(picks))
        return rows

    def step_cycles(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Cycles of a warp's own products in a step, with the quarter of a core's units that it has."""
        rows, cols = warp_tile(picks)
        macs: int = rows * cols * picks.tile_k
        return macs / (self.rate(spec, target) / 4)

    def registers(self, spec: ConvSpec, picks: Picks) -> int:
        """Registers of a thread, estimated: its sums, the fragments of both operands, and others."""
        rows, cols = warp_tile(picks)
        fragments = (rows // 16 * 4 + cols // 8 * 2) * (3 if spec.dtype == "f32" else 1)
        return rows * cols // 32 + fragments + OTHER_REGISTERS

    def shared_memory(self, spec: ConvSpec, picks: Picks) -> int:
        """Bytes of a block: for the steps under way, and later for the sums on their way to dst."""
        row = picks.tile_k * BYTES[spec.dtype]
        # Threads past the end of a small tile read on as if it were larger; they store nothing.
        oc = spec.oc // spec.groups * picks.merge_g
        vectors = ceildiv(min(picks.tile_n, oc), _store_lanes(spec, oc))
        rows = ceildiv(round_up(picks.tile_m * vectors, 32 * picks.warps_m * picks.warps_n), vectors)
        sums = rows * (round_up(picks.tile_n - 8, 32) + 8) * 4
        return round_up(max(picks.stages * (picks.tile_m + picks.tile_n) * row, sums), 8 * row)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return self.seconds(spec, target, self.default(spec, target))

    def seconds(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Predicted seconds: the larger of what a core can do at best, and of what its blocks wait for.

        At best a step takes what the slowest of matrix units, shared memory and L2 takes. A block that is alone on
        its core waits for L2 in every step, the less, the more steps are under way.
        """
        m, n, k = self.rounded(spec, picks)
        warps = picks.warps_m * picks.warps_n
        size = BYTES[spec.dtype]
        products = self.count(spec, picks)
        blocks = products * (m // picks.tile_m) * (n // picks.tile_n) * picks.split_k
        resident = min(  # blocks on a core
            target.shared_per_core // (self.shared_memory(spec, picks) + model.RESERVED),
            model.REGISTERS // (self.registers(spec, picks) * 32 * warps),
            target.threads_per_core // (32 * warps),
        )
        if not resident:
            return math.inf
        per_core = ceildiv(blocks, target.cores)
        waves = ceildiv(per_core, resident)
        steps = k // picks.split_k // picks.tile_k
        row = picks.tile_k * size
        through = row * (self.rows_read(picks) + picks.tile_m + picks.tile_n)
        rates, l2 = target.rates, target.rates.l2 * model.L2_SHARE
        step = max(
            picks.tile_m * picks.tile_n * picks.tile_k / self.rate(spec, target),
            through / rates.shared,
            row * (picks.tile_m + picks.tile_n) / l2,
        )
        alone = max(model.L2_CYCLES / (picks.stages - 1), self.step_cycles(spec, target, picks)) + model.STEP_CYCLES
        finish = picks.tile_m * picks.tile_n * (8 / rates.shared + size / l2)
        wave = model.L2_CYCLES + steps * alone + finish  # nothing is multiplied before the first step is there
        cycles: float = max(per_core * (steps * step + finish), waves * wave) + model.LAUNCH_CYCLES
        seconds = cycles / rates.clock
        if picks.split_k > 1:  # another launch, which reads what this one wrote
            seconds += model.LAUNCH + picks.split_k * products * m * n * 8 / (rates.memory * model.PARTS_SHARE)
        if laid_out := self.laid_out(spec, picks):
            seconds += model.LAUNCH + 3 * laid_out / (rates.memory * model.LAYOUT_SHARE)
        return seconds

    def products(self, spec: ConvSpec, picks: Picks) -> implicit.Products:
        """The sizes of the products of a candidate."""
        groups, lanes, taps = spec.groups // picks.merge_g, lanes_of(spec), implicit.taps(spec)
        rows, columns, length = self.rounded(spec, picks)
        depth = self.reduction(spec, picks.merge_g) // math.prod(taps) // lanes
        return implicit.Products(
            batch=self.count(spec, picks), groups=groups, ic=spec.ic // groups, oc=spec.oc // groups, taps=taps,
            lanes=lanes, depth=depth, pixels=implicit.pixels(spec), rows=rows, columns=columns, vectors=length // lanes,
        )  # fmt: skip

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, host = Operands(spec, native=True), Operands(spec)
        products = self.products(spec, picks)
        packed = [implicit.packed_weights(spec, products, host, picks.merge_g)]
        packed += [self.packed_parameter(parameter, products, picks) for parameter in host.parameters[1:]]
        weights = te.placeholder(packed[0].shape, tensorize.STORED[spec.dtype], "weights_in")
        per_channel = [te.placeholder(t.shape, t.dtype, f"{t.op.name}_in") for t in packed[1:]]

        dst = self.outputs(spec, picks, ops, weights, per_channel)
        return Program(pack=host.pack(*packed), main=ops.main([weights, *per_channel], dst))

    def source(self, spec: ConvSpec, picks: Picks, ops: Operands) -> Callable[..., Expr]:
        """src as a function of ``(n, *spatial, channel)``, every group whole vectors of channels."""
        return channels_last(ops.src.tensor, spec.src_blocks, spec.groups // picks.merge_g, lanes_of(spec))

    def packed_parameter(self, parameter: Operand, products: implicit.Products, picks: Picks) -> te.Tensor:
        """A vector of the parameters as it is packed."""
        return copied(parameter)

    def outputs(
        self, spec: ConvSpec, picks: Picks, ops: Operands, weights: te.Tensor, per_channel: Sequence[te.Tensor]
    ) -> te.Tensor:
        """dst.

        Args:
            weights, per_channel: what is packed.
        """
        products, source = self.products(spec, picks), self.source(spec, picks, ops)
        patches = implicit.gathered(spec, products, source)
        sums = self.sums(spec, source, weights, implicit.sums(spec, products, patches, weights, picks.split_k))
        tile = te.compute(sums.shape, lambda *index: sums[index], name="tile")
        parts = te.compute(sums.shape, lambda *index: tile[index], name="parts") if picks.split_k > 1 else tile
        finished = implicit.finished(spec, products, ops, parts, per_channel)
        return te.compute(finished.shape, lambda *index: finished(*index), name="dst")

    def sums(self, spec: ConvSpec, source: Callable[..., Expr], weights: te.Tensor, products: te.Tensor) -> te.Tensor:
        """The sums that are stored: those of the products, unless a subclass has others in their place.

        Args:
            source: src as a function of its index, channels last.
            weights: the packed weights.
            products: the sums of products as tensor expressions.
        """
        return products

    def apply(self, sch: TirSchedule, spec: ConvSpec, target: Target, picks: Picks) -> None:
        block, warp, rows = divide_among_warps(sch, picks)
        _schedule_stores(sch, spec, picks, block)
        self.reduce(sch, spec, picks, warp)
        store = tensorize.store(*warp_tile(picks), tensorize.sums_of(spec.dtype))
        tile = tensorize.replace(sch, rows, sch.get_sblock("tile"), store)
        # A row of stores of two floats meets no bank twice where the next row begins 8 banks on.
        sch.storage_align(tile, 0, axis=2, factor=32, offset=8)
        self.lay_out(sch, spec, picks)

    def lay_out(self, sch: TirSchedule, spec: ConvSpec, picks: Picks) -> None:
        """Schedule the launch that lays out src, where there is one."""
        if needs_layout(spec, picks):
            spread(sch, sch.get_loops(sch.get_sblock("channels_last")), 1)

    def reduce(self, sch: TirSchedule, spec: ConvSpec, picks: Picks, warp: Any) -> None:
        """Schedule the sums of each warp's tile, under the loop over warps: copies, pipelined, and products."""
        rows, cols = warp_tile(picks)
        sums = sch.get_sblock("tile_sums")
        sch.compute_at(sums, warp, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        step, within, row = self.steps(sch, spec, picks, sums)
        self.copies(sch, spec, picks, sums, step)
        init = sch.decompose_reduction(sums, step)
        clear = tensorize.clear(rows, cols, tensorize.sums_of(spec.dtype))
        tensorize.replace(sch, sch.get_loops(init)[-2], init, clear)
        sch.unroll(within)
        tensorize.replace(sch, row, sums, self.intrinsic(spec, picks))
        if picks.stages > 1:
            sch.annotate(step, "software_pipeline_stage", [0, 0, picks.stages - 1])
            sch.annotate(step, "software_pipeline_order", [0, 1, 2])
            sch.annotate(step, "software_pipeline_async_stages", [0])

    def steps(self, sch: TirSchedule, spec: ConvSpec, picks: Picks, sums: Any) -> tuple[Any, Any, Any]:
        """Divide the reduction; returns the loops over steps, over the products of a step, and over a tile's rows."""
        lanes, depth = lanes_of(spec), self.depth(spec)
        *_, row, column, vector, lane = sch.get_loops(sums)
        step, within, vector = sch.split(vector, [None, picks.tile_k // (depth * lanes), depth])
        sch.reorder(step, within, row, column, vector, lane)
        return step, within, row

    def copies(self, sch: TirSchedule, spec: ConvSpec, picks: Picks, sums: Any, step: Any) -> None:
        """Schedule the copies of both operands to shared memory, under the loop over steps."""
        sch.set_scope(sch.get_sblock("gathered"), 0, "shared.dyn")
        for operand in (sch.get_sblock("gathered"), sch.cache_read(sums, 1, "shared.dyn")):
            sch.compute_at(operand, step, preserve_unit_loops=True)
            copy_together(sch, sch.get_loops(operand)[-3:], picks.warps_m * picks.warps_n)


# ---- the schedule ------------------------------------------------------------------------------


def _schedule_stores(sch: TirSchedule, spec: ConvSpec, picks: Picks, block: Any) -> None:
    """What becomes of a block's tile: it is dst, or the part of a sum that another launch adds up to dst."""
    warps, oc = picks.warps_m * picks.warps_n, spec.oc // spec.groups * picks.merge_g
    dst, finished = sch.get_sblock("dst"), sch.get_sblock("finished")
    _give_own_axes(sch, spec, dst, oc)
    single = implicit.pixels(spec) == 1
    lanes = 1 if single else _store_lanes(spec, oc)
    if picks.split_k > 1:
        parts = sch.get_sblock("parts")
        sch.reverse_compute_at(parts, block, preserve_unit_loops=True)
        among_threads(sch, sch.get_loops(parts)[1:], warps, 4)
        thread = spread(sch, sch.get_loops(dst), lanes)
    else:
        for follower in (finished, dst):
            sch.reverse_compute_at(follower, block, preserve_unit_loops=True)
        *outer, row, column = sch.get_loops(dst)[1:]
        if spec.layout == "nchw":  # its rows are pixels
            sch.reorder(column, row)
            row, column = column, row
        thread = among_threads(sch, [*outer, row, column], warps, lanes)
    if single:  # TVM takes what threads read for as much as there are threads, not channels of one pixel
        sch.compute_inline(finished)
        return
    sch.compute_at(finished, thread, preserve_unit_loops=True)
    sch.set_scope(finished, 0, "local")
    sch.unroll(sch.get_loops(finished)[-1])
    if lanes > 1:
        names = [str(read.source.name) for read in sch.get(finished).reads]
        for number in [0, *(i for i, name in enumerate(names) if name.endswith("_packed_in"))]:  # sums, parameters
            loaded = sch.cache_read(finished, number, "local")
            sch.compute_at(loaded, thread, preserve_unit_loops=True)
            _, lane = sch.split(sch.get_loops(loaded)[-1], [None, min(4, lanes)])
            sch.vectorize(lane)


def _give_own_axes(sch: TirSchedule, spec: ConvSpec, dst: Any, oc: int) -> None:
    """Until here dst has the axes of the products; from here on those of its layout."""

    def own_axes(*index: Expr) -> list[Expr]:
        image, channel, out = implicit.output(spec, index, oc)
        return [image, channel, *out] if spec.layout == "nchw" else [image, *out, channel]

    axes = 3 + (spec.rank if spec.transposed else 0)
    sch.transform_layout(dst, ("write", 0), tirx.IndexMap.from_func(own_axes, ndim=axes, index_dtype="int32"))


# ---- sizes -------------------------------------------------------------------------------------


def _store_lanes(spec: ConvSpec, oc: int) -> int:
    """Elements that are stored together, where a group has ``oc`` channels."""
    return 1 if spec.layout == "nchw" else math.gcd(lanes_of(spec), oc)
