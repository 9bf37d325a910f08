"""What schedules of Winograd's convolution share whose products are of pairs of numbers, in blocks of rows of tiles.

Statements are :mod:`convgen.cpu.winograd_integers` and what is derived from it. A default is the point that takes the
fewest cycles.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod

from ..hardware.target import Target
from ..lowering.compute import ceildiv
from ..lowering.schedule import Picks, Space, busiest, require
from ..problem.spec import ConvSpec
from .counted import Counted
from .images import src_images
from .model import Counts, Stream, Work
from .operation import Operation
from .product import BEGIN_RUN, BEGIN_TASK, Even, finishing, most_pixels, pieces, steps
from .traffic import image_bytes, of_images
from .winograd_integers import TAPS, Grid

#: Rows of tiles of a block; parts of the channels; tiles in registers at most.
ROWS, PARTS, MOST_TILES = (1, 2, 3, 4, 7, 8, 14), (1, 2, 4, 8), 14


class WinogradBlocks(Counted):
    """A schedule of this kind. What each says itself is its numbers, and how its tiles are transformed."""

    @abstractmethod
    def grid(self, spec: ConvSpec, block_rows: int) -> Grid:
        """The layer's tiles in blocks of so many rows."""

    @abstractmethod
    def operation(self, spec: ConvSpec) -> Operation:
        """What adds its products."""

    @abstractmethod
    def inputs(self, g: Grid) -> Work:
        """Of a tile and a vector of its channels, transformed."""

    @abstractmethod
    def outputs(self, spec: ConvSpec, g: Grid) -> Work:
        """Of a tile and a vector of its sums, transformed back and stored."""

    def takes_layouts(self, src: str, dst: str) -> bool:
        return {src, dst} <= {"nhwc", "nchw16c"}

    def require_tiles(self, spec: ConvSpec, lanes: int) -> None:
        """Raises Inapplicable: the layer's shape or its layouts do not fit."""
        plain = not spec.transposed and spec.groups == 1 and spec.rank == 2
        require(plain, "needs a dense 2-D convolution that is not transposed")
        require(set(spec.kernel) == {TAPS}, "needs a 3x3 kernel")
        require(set(spec.stride) == set(spec.dilation) == {1}, "needs stride and dilation 1")
        require(spec.ic % lanes == spec.oc % lanes == 0, f"needs multiples of {lanes} channels")
        require(src_images(spec).block % lanes == 0, f"needs src with {lanes} channels innermost")
        require(spec.dst_blocks.size % lanes == 0, f"needs dst with {lanes} channels innermost")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes, rows = target.lanes, self.grid(spec, 1).tile_rows
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if lanes * v <= spec.oc],
            tile_px=list(range(1, MOST_TILES + 1)),
            block_rows=sorted({b for b in (*ROWS, rows) if b <= rows and b <= max(ROWS)}),
            parallel_oc=[p for p in PARTS if p * lanes <= spec.oc],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most, g = most_pixels(target, picks.tile_oc // target.lanes), self.grid(spec, picks.block_rows)
        require(picks.tile_px <= most, f"{picks.tile_px} tiles in a register tile, registers for {most}")
        require(picks.tile_px <= g.most_tiles, "fewer tiles in a block than tile_px")
        blocks = ceildiv(spec.oc, picks.tile_oc)
        require(picks.parallel_oc <= blocks, f"{picks.parallel_oc} parts of {blocks} blocks of channels")

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        domains, lanes = self.space(spec, target).domains, target.lanes
        names = ("tile_oc", "block_rows", "parallel_oc")
        points = [
            Picks(tile_oc=oc, tile_px=min(most, MOST_TILES, tiles), block_rows=rows, parallel_oc=parts)
            for oc, rows, parts in itertools.product(*(domains[name] for name in names))
            for most, tiles in [(most_pixels(target, oc // lanes), self.grid(spec, rows).most_tiles)]
            if parts <= ceildiv(spec.oc, oc)
        ]
        return self.fastest(spec, target, points)

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        g, lanes, operation = self.grid(spec, picks.block_rows), target.lanes, self.operation(spec)
        tasks = spec.n * g.rows.count * picks.parallel_oc
        loads = [rows for rows, times in g.rows.sizes for _ in range(times * picks.parallel_oc)] * spec.n
        share, products = busiest(loads, target.cores) / sum(loads), list[Work]()
        for vectors, blocks in pieces(spec.oc // lanes, picks.tile_oc // lanes):
            for rows, times in g.rows.sizes:
                for pixels, tiles in Even(rows * g.tile_columns, picks.tile_px).sizes:
                    runs = spec.n * times * share * blocks * tiles * g.parts * g.positions
                    near = 4 * vectors * lanes
                    products.append(steps(runs * g.words, pixels, vectors, near=near, fetched=0.5, operation=operation))
                    products.append(Work(runs, cycles=BEGIN_RUN, stores=pixels * vectors))
        own_tiles = spec.n * share * g.tile_rows * g.tile_columns
        own, core = ceildiv(tasks, target.cores), self.core(spec, target)
        work = [
            *products,
            self.inputs(g).with_times(own_tiles * picks.parallel_oc * spec.ic / g.lanes),
            self.outputs(spec, g).with_times(own_tiles * spec.oc / lanes),
            finishing(spec, lanes, share),
            Work(own, cycles=BEGIN_TASK),
        ]
        weights = 2 * g.positions * spec.ic * spec.oc
        read = own * weights / picks.parallel_oc
        # Weights are fetched while there are products, not while there are transforms.
        ahead = core.cycles_of(products) / core.cycles_of(work)
        streams = [
            Stream(min(weights, read), weights, ahead),
            Stream(max(0.0, read - weights), ahead=ahead, footprint=weights),
            of_images(image_bytes(spec), share),
        ]
        # What passes hand to each other.
        between = g.positions * g.most_tiles * (2 * g.pitch + 4 * g.parts * picks.tile_oc)
        if between > target.l2 // 2:
            streams.append(Stream(2 * own * between, footprint=max(between, target.l2 + 1)))
        return Counts(work, streams)
