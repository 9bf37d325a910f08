"""cuda_wgmma_tma with warps of two kinds: one fetches, others multiply; blocks take one tile after another.

Applies to  what cuda_wgmma_tma does.
Strategy    1. As many blocks as the GPU holds at once share the tiles, in an order that keeps operands in L2: tiles
               that are under way at a time are next to each other along pixels and channels.
            2. A warpgroup of a block only fetches, with one thread and few registers; it gives the others to one or two
               warpgroups that multiply, each `tile_m` / 64 / warpgroups times 64 pixels × `tile_n` channels.
            3. A stage has two mbarriers: `full` counts the bytes that arrive, `empty` the warps that have multiplied.
               No barrier of the block is in the loop. Fetching goes on over the end of a tile: the next one's
               operands arrive while sums are stored.
            4. A warpgroup stores its sums 64 pixels × 32 channels at a time, through 10 KiB of shared memory of its
               own, so that what is left is for stages. How they are stored is cuda_gemm's.
Why not     clusters that share operands by multicast, stores by TMA, and warpgroups that take turns at tiles, so that
            one multiplies while the other stores: not written yet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from convgen.cuda import model, tensorize
from convgen.lowering.compute import ceildiv, round_up
from convgen.lowering.interface import Persistent
from convgen.lowering.schedule import Picks, Space, require
from convgen.problem.dtypes import BYTES

from .cuda_gemm import CudaGemm, needs_layout
from .cuda_wgmma import WARPGROUP_ROWS
from .cuda_wgmma_tma import ALIGNMENT, SHARE, CudaWgmmaTma

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
    id, version = "cuda_wgmma_persistent", 1

    def space(self, spec: ConvSpec, target: Target) -> Space:
        domains = super().space(spec, target).domains
        return Space(**{**domains, "warps_m": [4, 8], "resident": [1, 2]})

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
        steps = ceildiv(self.reduction(spec), picks.tile_k)
        require(picks.split_k <= max(1, steps // 2), "less than two steps for each part of split_k")

    def likely(self, spec: ConvSpec, target: Target) -> Iterator[Picks]:
        domains = self.space(spec, target).domains
        names = ("tile_m", "tile_n", "warps_m", "split_k", "resident", "stages")
        for values in itertools.product(*(domains[name] for name in names[:-1]), (3, 4, 6)):
            yield Picks(merge_g=1, tile_k=domains["tile_k"][0], warps_n=1, **dict(zip(names, values, strict=True)))

    def registers(self, spec: ConvSpec, picks: Picks) -> int:
        """Registers of a thread that multiplies, estimated: its sums, and some to store them."""
        return _sums(picks) + 40

    def shared_memory(self, spec: ConvSpec, picks: Picks) -> int:
        piece = CudaGemm.shared_memory(self, spec, Picks(**{**_piece(picks), "stages": 0}))
        if spec.dst_layout == "nchw" and 1 < spec.out_pixels < WARPGROUP // PIECE:
            # A thread for each pixel of a channel: past the last channel of the piece they read on as well.
            columns = WARPGROUP // spec.out_pixels
            piece = max(piece, WARPGROUP_ROWS * (round_up(columns - 8, 32) + 8) * 4)
        warpgroups: int = picks.warps_m // 4
        return warpgroups * round_up(piece, ALIGNMENT) + _operands(picks)

    def seconds(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Predicted seconds, times :data:`SHARE` as cuda_wgmma_tma's: of the tiles of a core one after the other, at
        what the slowest of matrix units, shared memory and L2 allows.

        Only the first step of a block waits. While a block stores its sums it multiplies nothing, but as many steps
        arrive as there are stages; and another block of the core multiplies.
        """
        m, n, k = self.rounded(spec, picks)
        size, rates, l2 = BYTES[spec.dtype], target.rates, target.rates.l2 * model.L2_SHARE
        turns = ceildiv(self.tiles(spec, picks), target.cores * picks.resident)
        steps, rows = k // picks.split_k // picks.tile_k, picks.tile_m + picks.tile_n
        read = picks.tile_m + picks.tile_m // WARPGROUP_ROWS * picks.tile_n
        products = picks.tile_m * picks.tile_n * picks.tile_k / self.rate(spec, target)
        products = max(products, tensorize.ROW * (read + rows) / rates.shared)
        copies = tensorize.ROW * rows / l2
        step = picks.resident * max(products, copies)
        finish = picks.tile_m * picks.tile_n * (8 / rates.shared + size / l2)
        turn = max(
            picks.resident * steps * products + finish,
            steps * max(step, model.L2_CYCLES / picks.stages) + max(0, finish - picks.stages * copies),
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

    def apply(self, sch: TirSchedule, spec: ConvSpec, target: Target, picks: Picks) -> None:
        super().apply(sch, spec, target, _piece(picks))

    def whole_reduction(self, spec: ConvSpec, picks: Picks) -> str:
        return tensorize.piece(spec.dtype, picks.tile_n, spec.rank)

    def persistent(self, spec: ConvSpec, picks: Picks) -> Persistent:
        warpgroups = picks.warps_m // 4
        tall = picks.tile_m // WARPGROUP_ROWS // warpgroups
        axes, sizes = self.reduction_text(spec, picks)
        numbers = [picks.tile_n, PIECE, warpgroups, tall, picks.stages, picks.resident, spec.rank]
        return Persistent(
            type=f"cg_persistent<cg_{self.kind(spec)}, {', '.join(map(str, numbers))}, {axes}, "
            f"cg_sizes<{', '.join(map(str, [*sizes, picks.split_k]))}>>",
            tiles=self.tiles(spec, picks),
            warpgroups=warpgroups,
            piece_sums=PIECE // 2,
            operands=_operands(picks),
            resident=picks.resident,
        )


def _piece(picks: Picks) -> Picks:
    """Of a piece of a tile, as if a block of one warpgroup had no more."""
    return Picks(**{**picks, "tile_m": WARPGROUP_ROWS, "tile_n": PIECE, "warps_m": 4})


def _sums(picks: Picks) -> int:
    """Sums of a thread."""
    sums: int = picks.tile_m * picks.tile_n // (32 * picks.warps_m)
    return sums


def _operands(picks: Picks) -> int:
    """Bytes of shared memory for the steps under way and their barriers."""
    size: int = picks.stages * ((picks.tile_m + picks.tile_n) * tensorize.ROW + 16)
    return round_up(size, ALIGNMENT)


def _registers(picks: Picks) -> int:
    """Registers of a thread that multiplies: cg_persistent's ``MULTIPLY``."""
    warpgroups: int = picks.warps_m // 4 + 1
    first: int = model.REGISTERS // (picks.resident * WARPGROUP * warpgroups) // 8 * 8
    fetches = 24 if picks.resident > 1 else 40
    return min(240, (first * warpgroups - fetches) // (warpgroups - 1) // 8 * 8)
