"""cuda_wgmma_tma with warps of two kinds: one fetches, others multiply; blocks take one tile after another.

Applies to  what cuda_wgmma_tma does.
Strategy    1. As many blocks as the GPU holds at once share the tiles, in an order that keeps operands in L2: tiles
               that are under way at a time are next to each other along pixels and channels.
            2. A warpgroup of a block only fetches, with one thread and few registers; it gives the others to one or two
               warpgroups that multiply, each `tile_m` / 64 / warpgroups times 64 pixels × `tile_n` channels.
            3. A stage has two mbarriers: `full` counts the bytes that arrive, `empty` the warps that have multiplied.
               No barrier of the block is in the loop. Fetching goes on over the end of a tile: the next one's
               operands arrive while sums are stored.
            4. A warpgroup stores its sums 64 pixels × 32 channels at a time. With `bulk_store` threads finish the sums
               that they have in registers and write the results to shared memory, from where the copy engine stores
               them, while the next piece is finished, or the next tile multiplied. Of two bytes they are written as
               matrices (`stmatrix`), transposed where dst is NCHW: boxes of pixels of one image there. A residual
               comes by the copy engine too, pieces ahead, to where the results go. What follows one another in dst,
               channels of a group or pixels of an image, must be whole vectors of 16 bytes. Else sums pass through
               10 KiB of shared memory, and are stored as cuda_gemm's.
            5. With `cluster` two blocks take tiles of the same channels. Each fetches half of the weights, for both:
               L2 reads them once. A stage is empty when the warps of both have multiplied.
            6. With `cluster_k` so many blocks take one tile, each a part of its reduction. Each finishes some of its
               pieces: the others write their sums of those into its shared memory, and it adds them up, in one order.
               There is no workspace and no second launch, as with split_k.
Why not     clusters that share patches: where a tile has more pixels than channels, half of its weights are less to
            share, but few layers have channels for two such tiles. Warpgroups that take turns at tiles, so that one
            multiplies while the other stores: not written yet.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from convgen.cuda import implicit, model, tensorize
from convgen.cuda.implicit import PIECE_ROWS, needs_layout
from convgen.cuda.persistent import stores_bytes
from convgen.deferred import te
from convgen.errors import Inapplicable
from convgen.lowering.compute import Expr, Operand, Operands, ceildiv, round_up
from convgen.lowering.interface import Persistent, TensorMap
from convgen.lowering.schedule import Picks, Space, require
from convgen.problem.dtypes import BYTES

from .cuda_gemm import CudaGemm
from .cuda_wgmma import WARPGROUP_ROWS
from .cuda_wgmma_tma import ALIGNMENT, SHARE, CudaWgmmaTma, strides_of

if TYPE_CHECKING:
    from tvm.s_tir import Schedule as TirSchedule

    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec

#: Channels of a piece of a tile, whose sums go to dst together.
PIECE = 32
#: Threads of a warpgroup.
WARPGROUP = 128
#: Sums of a thread, at most.
MOST_SUMS = 128


class CudaWgmmaPersistent(CudaWgmmaTma):
    id, version = "cuda_wgmma_persistent", 3

    def space(self, spec: ConvSpec, target: Target) -> Space:
        domains = super().space(spec, target).domains
        own = {"warps_m": [4, 8], "resident": [1, 2], "cluster": [1, 2], "cluster_k": [1, 2, 4], "bulk_store": [0, 1]}
        return Space(**(domains | own))

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        require(picks.tile_m % (16 * picks.warps_m) == 0, f"a warpgroup has whole times {WARPGROUP_ROWS} pixels")
        sums = _sums(picks)
        require(sums <= MOST_SUMS, f"{sums} sums of a thread, at most {MOST_SUMS}")
        need = picks.resident * (self.shared_memory(spec, picks) + model.RESERVED)
        require(need <= target.shared_per_core, f"{need} bytes of shared memory, at most {target.shared_per_core}")
        need = self.shared_memory(spec, picks)
        require(need <= target.shared_memory, f"{need} bytes of shared memory, at most {target.shared_memory}")
        have, registers = _registers(picks), self.registers(spec, picks)
        require(registers <= have, f"about {registers} registers of a thread, {have} are there")
        require(picks.cluster == 1 or picks.cluster_k == 1, "a cluster shares weights or a reduction")
        steps = ceildiv(self.reduction(spec), picks.tile_k)
        parts = picks.split_k * picks.cluster_k
        require(parts <= max(1, steps // 2), "less than two steps for each part of the reduction")
        if picks.bulk_store:
            require(picks.split_k == 1, "threads store the parts of split_k")
            what, count = _together(spec)
            size = count * BYTES[spec.dtype]
            require(size % tensorize.VECTOR == 0, f"bulk_store needs whole 16 bytes of {what}, there are {size}")
        have = self.turns(spec, target, picks) * ceildiv(steps, parts)
        require(picks.stages <= max(2, have), f"{picks.stages} stages, a block has no more than {have} steps")

    def likely(self, spec: ConvSpec, target: Target) -> Iterator[Picks]:
        """Points worth a prediction, all of them valid."""
        domains = self.space(spec, target).domains
        names = ("tile_m", "tile_n", "warps_m", "split_k", "resident", "cluster", "cluster_k")
        for values in itertools.product(*(domains[name] for name in names)):
            chosen = dict(zip(names, values, strict=True))
            if sum(chosen[name] > 1 for name in ("split_k", "cluster", "cluster_k")) > 1:
                continue
            store = int(_can_send(spec) and chosen["split_k"] == 1)
            most = None  # stages, as there is room for
            with contextlib.suppress(Inapplicable):
                for stages in domains["stages"]:
                    picks = Picks(
                        merge_g=1, tile_k=domains["tile_k"][0], warps_n=1, stages=stages, bulk_store=store, **chosen
                    )  # fmt: skip
                    self.valid(spec, target, picks)
                    most = picks
            if most is not None:
                yield most

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return min(self.likely(spec, target), key=lambda picks: self.seconds(spec, target, picks))

    def plain_points(self, spec: ConvSpec, target: Target) -> Iterator[Picks]:
        plain = {**self.default(spec, target), "stages": 2, "split_k": 1, "cluster": 1, "cluster_k": 1, "bulk_store": 0}
        for part in ({}, {"split_k": 2}, {"cluster": 2}, {"cluster_k": 2}, {"bulk_store": 1}):
            picks = Picks(**(plain | part))
            if self.reason_against(spec, target, picks) is None:
                yield picks

    def registers(self, spec: ConvSpec, picks: Picks) -> int:
        """Registers of a thread that multiplies, estimated: its sums, and some to store them."""
        return _sums(picks) + 40

    def shared_memory(self, spec: ConvSpec, picks: Picks) -> int:
        warpgroups: int = picks.warps_m // 4
        if picks.bulk_store:
            return sum(stores_bytes(BYTES[spec.dtype], PIECE, warpgroups, spec.residual)) + _operands(picks)
        piece = CudaGemm.shared_memory(self, spec, Picks(**{**_piece(picks), "stages": 0}))
        if spec.dst_layout == "nchw" and 1 < spec.out_pixels < WARPGROUP // PIECE:
            # A thread for each pixel of a channel: past the last channel of the piece they read on as well.
            columns = WARPGROUP // spec.out_pixels
            piece = max(piece, WARPGROUP_ROWS * (round_up(columns - 8, 32) + 8) * 4)
        return warpgroups * round_up(piece, ALIGNMENT) + _operands(picks)

    def rounded(self, spec: ConvSpec, picks: Picks) -> tuple[int, int, int]:
        m, n, k = super().rounded(spec, picks)
        return round_up(m, picks.tile_m * picks.cluster), n, k

    def seconds(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Predicted seconds, times :data:`SHARE` as cuda_wgmma_tma's: of the tiles of a core one after the other, at
        what the slowest of matrix units, shared memory and L2 allows.

        Only the first step of a block waits. While a block finishes its sums it multiplies nothing, but as many steps
        arrive as there are stages; and another block of the core multiplies. What the copy engine stores leaves
        meanwhile.
        """
        m, n, _ = self.rounded(spec, picks)
        size, rates, l2 = BYTES[spec.dtype], target.rates, target.rates.l2 * model.L2_SHARE
        turns = self.turns(spec, target, picks)
        steps, rows = self.part(spec, picks), picks.tile_m + picks.tile_n
        read = picks.tile_m + picks.tile_m // WARPGROUP_ROWS * picks.tile_n
        products = picks.tile_m * picks.tile_n * picks.tile_k / self.rate(spec, target)
        products = max(products, tensorize.ROW * (read + rows) / rates.shared)
        copies = tensorize.ROW * (picks.tile_m + picks.tile_n / picks.cluster) / l2
        step = picks.resident * max(products, copies)
        waits = model.L2_CYCLES + model.CLUSTER_CYCLES * (picks.cluster - 1)
        sums = ceildiv(picks.tile_m * picks.tile_n, picks.cluster_k)  # that it finishes
        through = (2 + 2 * spec.residual) * size  # bytes of a sum that shared memory takes and gives
        finish = sums * (through / rates.shared if picks.bulk_store else 8 / rates.shared + size / l2)
        if picks.cluster_k > 1:
            moved = 4 * sums * (picks.cluster_k - 1)
            finish += 2 * model.CLUSTER_CYCLES + moved * (1 / rates.cluster + 1 / rates.shared)
        turn = max(
            picks.resident * steps * products + finish,
            picks.resident * (steps * copies + sums * size / l2),
            steps * max(step, waits / picks.stages) + max(0, finish - picks.stages * copies),
        )
        seconds: float = SHARE * (turns * turn + model.L2_CYCLES + model.LAUNCH_CYCLES) / rates.clock
        if picks.split_k > 1:
            moved = picks.split_k * spec.groups * m * n * 8
            seconds += model.LAUNCH + moved / (rates.memory * model.PARTS_SHARE)
        if needs_layout(spec, picks):
            moved = 3 * math.prod(spec.src_shape) * size
            seconds += model.LAUNCH + moved / (rates.memory * model.LAYOUT_SHARE)
        return seconds

    def tiles(self, spec: ConvSpec, picks: Picks) -> int:
        """How many tiles there are, parts of sums counted each."""
        m, n, _ = self.rounded(spec, picks)
        count: int = m // picks.tile_m * (n // picks.tile_n) * spec.groups * picks.split_k
        return count

    def turns(self, spec: ConvSpec, target: Target, picks: Picks) -> int:
        """How many tiles a block takes, at most."""
        return ceildiv(self.tiles(spec, picks) * picks.cluster_k, target.cores * picks.resident)

    def part(self, spec: ConvSpec, picks: Picks) -> int:
        """The most steps that a block sums of a tile."""
        return ceildiv(self.reduction(spec) // picks.tile_k, picks.split_k * picks.cluster_k)

    def reduction_text(self, spec: ConvSpec, picks: Picks) -> tuple[str, list[int]]:
        axes, sizes = super().reduction_text(spec, picks)
        return axes, [*sizes[:-1], self.part(spec, picks)]

    def packed_parameter(self, parameter: Operand, products: implicit.Products, picks: Picks) -> te.Tensor:
        if not _sends(picks):
            return super().packed_parameter(parameter, products, picks)
        return implicit.padded(parameter, products)

    def outputs(
        self, spec: ConvSpec, picks: Picks, ops: Operands, weights: te.Tensor, per_channel: Sequence[te.Tensor]
    ) -> te.Tensor:
        if not _sends(picks):
            return super().outputs(spec, picks, ops, weights, per_channel)
        products, source = self.products(spec, picks), self.source(spec, picks, ops)
        starts = source(*[0] * (spec.rank + 2)), weights(0, 0, 0, 0)
        summed = tensorize.sums_of(spec.dtype)

        def held(*_: Expr) -> Expr:
            return tensorize.opaque(summed, *starts)

        shape = implicit.held_shape(products, PIECE)
        sums, added = te.compute(shape, held, name="tile_sums"), None
        if ops.residual is not None:
            first = ops.residual.tensor(*[0] * (spec.rank + 2))
            added = te.compute(shape, lambda *_: tensorize.opaque_added(spec.dtype, first), name="tile_added")
        return implicit.finished_pieces(spec, products, ops, sums, added, per_channel)

    def apply(self, sch: TirSchedule, spec: ConvSpec, target: Target, picks: Picks) -> None:
        if not _sends(picks):
            super().apply(sch, spec, target, _piece(picks))
            return
        dst = sch.get_sblock("dst")
        *blocks, warp, row, pair, chunk, lower, one = sch.get_loops(dst)
        sch.bind(sch.fuse(*blocks), "blockIdx.x")
        sch.bind(warp, "threadIdx.y")
        sch.bind(sch.fuse(row, pair), "threadIdx.x")
        sch.unroll(chunk)
        sch.unroll(lower)
        sch.vectorize(one)
        given = {"tile_sums": tensorize.piece}
        if spec.residual:
            given["tile_added"] = tensorize.added_piece
        for name, intrinsic in given.items():
            held = sch.get_sblock(name)
            sch.compute_at(held, warp, preserve_unit_loops=True)
            sch.set_scope(held, 0, "local")
            *_, lane, _ = sch.get_loops(held)
            tensorize.replace(sch, lane, held, intrinsic(spec.dtype, 32, PIECE // 2, spec.rank))
        self.lay_out(sch, spec, picks)

    def whole_reduction(self, spec: ConvSpec, picks: Picks) -> str:
        return tensorize.piece(spec.dtype, 16, picks.tile_n, spec.rank)

    def maps(self, spec: ConvSpec, picks: Picks) -> dict[str, TensorMap]:
        """As cuda_wgmma_tma's, but that a block of a cluster fetches its part of the weights."""
        maps = super().maps(spec, picks)
        rows = picks.tile_n // picks.cluster
        maps["packed0"] = replace(maps["packed0"], box=(picks.tile_k, rows))
        return maps | ({"residual": _stores(spec)} if spec.residual and _sends(picks) else {})

    def persistent(self, spec: ConvSpec, picks: Picks) -> Persistent:
        warpgroups = picks.warps_m // 4
        tall = picks.tile_m // WARPGROUP_ROWS // warpgroups
        axes, sizes = self.reduction_text(spec, picks)
        numbers = [picks.tile_n, PIECE, warpgroups, tall, picks.stages, picks.resident]
        numbers += [picks.cluster, picks.cluster_k, spec.rank]
        return Persistent(
            type=f"cg_persistent<cg_{self.kind(spec)}, {', '.join(map(str, numbers))}, {axes}, "
            f"cg_sizes<{', '.join(map(str, [*sizes, picks.split_k]))}>>",
            blocks=self.tiles(spec, picks) * picks.cluster_k,
            warpgroups=warpgroups,
            piece_sums=PIECE // 2,
            operands=_operands(picks),
            resident=picks.resident,
            cluster=picks.cluster * picks.cluster_k,
            dst=_stores(spec) if _sends(picks) else None,
        )


def _piece(picks: Picks) -> Picks:
    """Of a piece of a tile, as if a block of one warpgroup had no more."""
    return Picks(**{**picks, "tile_m": WARPGROUP_ROWS, "tile_n": PIECE, "warps_m": 4})


def _sends(picks: Picks) -> bool:
    """Whether the copy engine stores what threads make of the sums that they have in registers."""
    return bool(picks.bulk_store) and not tensorize.is_described()


def _together(spec: ConvSpec) -> tuple[str, int]:
    """What follows one another in dst, and how many there are."""
    if spec.dst_layout == "nchw":
        return "an image's pixels", math.prod(spec.out_spatial)
    return "a group's channels", spec.oc // spec.groups


def _can_send(spec: ConvSpec) -> bool:
    """Whether the copy engine can store dst: its maps want whole vectors of what follows one another."""
    return _together(spec)[1] * BYTES[spec.dtype] % tensorize.VECTOR == 0


def _stores(spec: ConvSpec) -> TensorMap:
    """dst, or the residual, of which a piece is moved at a time: what it has besides is left out. It is ``[pixel]
    [group][channel]``, of NCHW ``[image][group][channel][pixel]``, in boxes of pixels that no image ends within.
    """
    size, oc = BYTES[spec.dtype], spec.oc // spec.groups
    dims: tuple[int, ...]
    box: tuple[int, ...]
    if spec.dst_layout == "nhwc":
        dims, box = (oc, spec.groups, implicit.pixels(spec)), (PIECE, 1, PIECE_ROWS)
    else:
        pixels = math.prod(spec.out_spatial)
        dims = (pixels, oc, spec.groups, spec.n)
        box = (PIECE_ROWS if spec.n == 1 else math.gcd(pixels, PIECE_ROWS), PIECE, 1, 1)
    row = box[0] * size
    return TensorMap(spec.dtype, dims, strides_of(dims, size), box, row if row > tensorize.VECTOR else 0)


def _sums(picks: Picks) -> int:
    """Sums of a thread."""
    sums: int = picks.tile_m * picks.tile_n // (32 * picks.warps_m)
    return sums


def _operands(picks: Picks) -> int:
    """Bytes of shared memory for the steps under way, the sums of other blocks of a cluster, and barriers."""
    pieces = picks.tile_m // PIECE_ROWS // (picks.warps_m // 4) * (picks.tile_n // PIECE)
    sums = picks.warps_m // 4 * ceildiv(pieces, picks.cluster_k) * (picks.cluster_k - 1) * PIECE_ROWS * PIECE
    size: int = 4 * sums + picks.stages * ((picks.tile_m + picks.tile_n) * tensorize.ROW + 16) + 16
    return round_up(size, ALIGNMENT)


def _registers(picks: Picks) -> int:
    """Registers of a thread that multiplies: cg_persistent's ``MULTIPLY``."""
    warpgroups: int = picks.warps_m // 4 + 1
    first: int = model.REGISTERS // (picks.resident * WARPGROUP * warpgroups) // 8 * 8
    fetches = 24 if picks.resident > 1 else 40
    return min(240, (first * warpgroups - fetches) // (warpgroups - 1) // 8 * 8)
