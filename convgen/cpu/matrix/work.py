"""What a convolution by matrix tiles counts: products of tiles, sums on their way out, copies of what is read."""

from __future__ import annotations

import math

from ...hardware.target import Target
from ...lowering.compute import ceildiv, round_up
from ...lowering.schedule import Picks
from ..model import Work
from ..product import BEGIN_RUN, BEGIN_TILE, pieces
from . import tiles
from .geometry import CHANNELS, Geometry
from .panel import LANES

#: Bytes of a tile.
TILE_BYTES = tiles.ROWS * tiles.ROW_BYTES


def weight_bytes(g: Geometry) -> int:
    """Of a block of channels."""
    return g.size * g.steps * g.run * CHANNELS


def work_of_products(g: Geometry, target: Target, picks: Picks, share: float) -> list[Work]:
    """A share of all products."""
    weights, blocks = weight_bytes(g), ceildiv(g.spec.oc, CHANNELS)
    met = weights if picks.order == "oc" else weights * blocks  # before one is met again
    near_weights = weights if met > target.l1 // 2 else 0
    near_pixels = g.group_bytes(picks.tile) + (weights if picks.order == "oc" else 0) > target.l1 * 3 // 4
    work = []
    for size, times in pieces(g.units, picks.tile):
        pairs, starts = g.tiles(size)
        for rows, number in ((2, pairs), (len(starts), 1)):
            count = times * number * g.spec.n * g.out[0] * blocks * share
            near = near_weights / g.steps + (rows * TILE_BYTES if near_pixels else 0)
            step = Work(count * g.steps, tile_products=2 * rows, tile_loads=2 + rows, near=near)
            work += [step, Work(count, tile_stores=2 * rows, cycles=BEGIN_TILE)] if rows and number else []
    return work


def work_of_sums(g: Geometry, target: Target, picks: Picks, share: float) -> Work:
    """A share of all sums, from a group's buffer to dst."""
    spec = g.spec
    kept = tiles.SUM_BYTES * g.pixels(min(picks.tile, g.units)) * min(CHANNELS, round_up(spec.oc, LANES))
    near = 2 * tiles.SUM_BYTES * LANES if kept > target.l1 // 2 else 0  # sums that leave the L1 cache
    shuffles = math.log2(LANES) if g.transposes else 1
    return Work(spec.n * spec.oc * spec.out_pixels / LANES * share, loads=1, stores=1, shuffles=shuffles, near=near)


def work_of_copies(g: Geometry, picks: Picks, tasks: int) -> list[Work]:
    """The copies of so many tasks."""
    panel, turned = g.panel(min(picks.block * picks.tile, g.units)), 2 * math.log2(LANES)
    work = [Work(tasks * panel.vectors, loads=1, stores=1, shuffles=turned * (g.spec.layout == "nchw"), cycles=1)]
    if g.spec.layout == "nhwc" and panel.channels != g.spec.ic:
        work.append(Work(tasks * panel.pixels, cycles=BEGIN_RUN))
    return work
