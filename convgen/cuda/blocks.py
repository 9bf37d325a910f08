"""How matrix products are divided among a GPU's blocks, warps and threads, by TIR's primitives: what schedules on
matrix units share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..lowering.schedule import Picks

if TYPE_CHECKING:
    from tvm.s_tir import Schedule as TirSchedule

#: Threads of a block of the launches beside that of the products: they lay out a tensor, or add up parts.
OTHER_THREADS = 256


def divide_among_warps(sch: TirSchedule, picks: Picks) -> tuple[Any, Any, Any]:
    """A block's tile, divided among warps; returns the loops over blocks, over warps, and over a warp's rows."""
    tile = sch.get_sblock("tile")
    part, product, row, column = sch.get_loops(tile)
    block_row, row = sch.split(row, [None, picks.tile_m])
    block_column, column = sch.split(column, [None, picks.tile_n])
    warp_row, row = sch.split(row, [picks.warps_m, None])
    warp_column, column = sch.split(column, [picks.warps_n, None])
    sch.reorder(part, product, block_row, block_column, warp_row, warp_column, row, column)
    block, warp = sch.fuse(part, product, block_row, block_column), sch.fuse(warp_row, warp_column)
    sch.bind(block, "blockIdx.x")
    sch.bind(warp, "threadIdx.y")
    sch.set_scope(tile, 0, "shared.dyn")
    return block, warp, row


def copy_together(sch: TirSchedule, loops: Sequence[Any], warps: int) -> None:
    """An operand's step, copied by all threads of a block: ``loops`` are over rows, vectors and lanes."""
    row, vector, lane = loops
    _, warp, thread = sch.split(sch.fuse(row, vector), [None, warps, 32], preserve_unit_iters=True)
    sch.bind(warp, "threadIdx.y")
    sch.bind(thread, "threadIdx.x")
    sch.vectorize(lane)


def among_threads(sch: TirSchedule, loops: Sequence[Any], warps: int, lanes: int) -> Any:
    """A tile's elements among the threads of its block, in vectors; returns a thread's loop."""
    *rows, last = loops
    last, lane = sch.split(last, [None, lanes])
    _, warp, thread = sch.split(sch.fuse(*rows, last), [None, warps, 32])
    sch.bind(warp, "threadIdx.y")
    sch.bind(thread, "threadIdx.x")
    sch.vectorize(lane)
    return thread


def spread(sch: TirSchedule, loops: Sequence[Any], lanes: int) -> Any:
    """All elements of a stage among the threads of a launch of its own, in vectors; returns a thread's loop."""
    *rows, last = loops
    last, lane = sch.split(last, [None, lanes])
    blocks, thread = sch.split(sch.fuse(*rows, last), [None, OTHER_THREADS])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    sch.vectorize(lane)
    return thread


def warp_tile(picks: Picks) -> tuple[int, int]:
    """Rows and columns of a warp's tile."""
    return picks.tile_m // picks.warps_m, picks.tile_n // picks.warps_n
