"""Gradient of weights with few channels per group: pixels in the vector lanes of NCHW, channels in those of NHWC.

Applies to  the gradient of weights of layers of any rank, transposed ones too, NCHW and NHWC, on CPUs. Meant for
            depthwise and grouped layers: a tile has all that a group of few channels has.
Strategy    1. A task has the sums of `block` × `tile_o` channels of the gradient of dst (NCHW), or of vectors of these
               (NHWC: neighbours, that lines in memory are read as they lie), with all channels of src of their groups
               and all taps: threads and their number change no bit.
            2. It goes over all images, `rows` output rows at a time, and over its tiles for these: of `tile_c` channels
               of src × `tile_r` rows of the kernel × the taps of a row. Of a depthwise layer there is one tile, so that
               both tensors are read once.
            3. A step loads a vector of the gradient for each of `tile_o`, and of src for each channel and tap, where it
               lies: nothing is copied or transposed. All their products are added to sums in registers.
            4. Rows of the kernel outside the image are left out. Columns: of NCHW, lanes are masked; of NHWC, pixels
               with the same taps inside are a loop each.
            5. The lanes of NCHW's sums are added up at the end, halves to halves.
            6. Of a transposed layer src and the gradient of dst change places. Its bias is a sum of its own.
Why not     for many channels: each tile would read src again; cpu_gradient puts them in order once instead.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

from convgen.cpu.correlation import Correlation, gradient_program
from convgen.cpu.counted import Counted, at_most
from convgen.cpu.gradient_tiles import ChannelTiles, PixelTiles, TileSizes
from convgen.cpu.model import Counts, Stream, Work
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE
from convgen.hardware.target import Target
from convgen.lowering.compute import ceildiv
from convgen.lowering.schedule import Picks, Program, Space, require
from convgen.problem.layout import PLAIN
from convgen.problem.spec import ConvSpec

#: Taps of a row in one tile, and the longest stride along a row whose pixels are shuffled from whole vectors.
MOST_TAPS, MOST_STRIDE = 9, 4
#: Sums of all tiles of a task, in vectors: its scratch memory.
MOST_SUMS = 1 << 14
#: Vectors at the ends of a line that are code of their own.
MOST_EDGES = 8
#: Cycles of a mask, and of a lane's sum that is stored.
MASKED, REDUCED = 1, 12


class CpuGradientGrouped(Counted):
    id, version, directions = "cpu_gradient_grouped", 1, ("weights",)

    def takes_layouts(self, src: str, dst: str) -> bool:
        return src == dst and src in PLAIN

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        sizes = _sizes(spec, target)
        sums = sizes.relation.own * sizes.relation.taps
        require(sums <= MOST_SUMS, f"{sums} sums of a channel, at most {MOST_SUMS}")
        if sizes.is_last:
            return
        stride, edges = sizes.relation.stride[2], max(map(sizes.edges, sizes.runs))
        require(stride <= MOST_STRIDE, f"a stride of {stride} along a row, at most {MOST_STRIDE}")
        require(edges <= MOST_EDGES, f"{edges} vectors at the ends of a row, at most {MOST_EDGES}")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        sizes = _sizes(spec, target)
        lines, own = sizes.relation.lines, sizes.relation.own
        return Space(
            block=[b for b in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if b <= sizes.tiles(1)],
            tile_o=[o for o in (1, 2, 3, 4, 5, 6, 8) if o <= sizes.outputs],
            tile_c=[c for c in (1, 2, 3, 4, 5, 6, 8) if c <= own],
            tile_r=[r for r in (1, 2, 3, 4, 5, 7, 9) if r <= sizes.kernel_rows],
            rows=sorted({min(lines, 1 << i) for i in range(11)} | {lines}),
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        sizes, o = _sizes(spec, target), picks.tile_o
        used, kept = sizes.sums(picks) + o + 1, picks.block * sizes.kept(picks)
        small = o == picks.tile_c == picks.tile_r == 1
        require(small or used <= target.vector_registers, f"{used} vectors, {target.vector_registers} registers")
        few = o == picks.block == 1
        require(few or kept <= MOST_SUMS, f"{kept} vectors of sums, at most {MOST_SUMS} in scratch memory")
        require(picks.block <= sizes.tiles(o), "block exceeds the tiles")

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        domains, sizes = self.space(spec, target).domains, _sizes(spec, target)
        points = []
        for o, c, r in itertools.product(*(domains[name] for name in ("tile_o", "tile_c", "tile_r"))):
            tile = Picks(block=1, tile_o=o, tile_c=c, tile_r=r, rows=1)
            tile = tile.replace(block=at_most(_most_tiles(sizes, target, tile), domains["block"]))
            points.append(tile.replace(rows=at_most(_most_lines(sizes, target, tile), domains["rows"])))
        return self.fastest(spec, target, points)

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        sizes, o = _sizes(spec, target), picks.tile_o
        relation, all_tiles, tiles = sizes.relation, sizes.tiles(o), sizes.of_channels(picks)
        tasks = min(all_tiles, picks.block * ceildiv(ceildiv(all_tiles, picks.block), target.cores))
        passes, lines, rows = tasks * spec.n * tiles, relation.lines, picks.tile_c * picks.tile_r
        # What several tiles read comes from the L2 cache each time.
        is_again = tiles * sizes.shared(picks.block, o) > 1
        near = 1.5 * 4 * target.lanes * (o + rows * (o if sizes.is_last else 1)) * is_again
        work = [Work(tasks, cycles=BEGIN_TASK)]
        for run in sizes.runs:
            sums, (steps, loads, shuffles, masked) = o * rows * run[1], sizes.line(picks, run)
            work.append(Work(passes * lines * steps, fmas=sums, loads=loads, shuffles=shuffles, near=near, chain=1))
            work.append(Work(passes * lines, cycles=BEGIN_RUN + MASKED * masked * loads))
            work.append(Work(passes * ceildiv(lines, picks.rows), loads=2 * sums, stores=sums, cycles=BEGIN_TILE))
        work.append(Work(tasks * sizes.kept(picks), cycles=2 * target.lanes if sizes.is_last else REDUCED))
        of_group = sizes.vectors.parts if sizes.is_last else relation.group
        share, again = tasks / all_tiles, ceildiv(of_group, o * picks.block)
        moved = [
            Stream(relation.outer_bytes * share, ahead=1),
            Stream(relation.inner_bytes * share * again, ahead=1),
            Stream(spec.bytes["dst"] * share),
        ]
        return Counts(work, moved)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        relation, tiles = Correlation(spec), ChannelTiles if spec.layout == "nhwc" else PixelTiles
        return gradient_program(
            spec,
            target.lanes,
            lambda *tensors: tiles(relation, picks, target.lanes, MOST_TAPS, *tensors).statement(),
            with_bias=spec.bias and relation.is_swapped,
        )


@lru_cache(maxsize=1024)
def _sizes(spec: ConvSpec, target: Target) -> TileSizes:
    return TileSizes(Correlation(spec), target.lanes, MOST_TAPS)


def _most_tiles(sizes: TileSizes, target: Target, tile: Picks) -> int:
    """Of a task: all that leaves each core a task and its sums a quarter of the L2 cache; of NCHW, what reads a group
    again. Where images are small that is more, as long as tasks are many: planes of channels that follow each other are
    fetched ahead, single ones of image after image are not.
    """
    relation, tiles = sizes.relation, sizes.tiles(tile.tile_o)
    most, of_group = tiles // target.cores, tiles // relation.spec.groups
    if not sizes.is_last:
        read = 4 * relation.own * math.prod(relation.inner.size)
        most = max(min(most, of_group), min(most // 8, of_group * ceildiv(8 * target.l1, read)))
    return min(most, target.l2 // (16 * target.lanes * sizes.kept(tile)))


def _most_lines(sizes: TileSizes, target: Target, tile: Picks) -> int:
    """At a time: all where nothing is read again, else as many as half of the L2 cache has room for."""
    if sizes.of_channels(tile) == len(sizes.runs) == sizes.shared(tile.block, tile.tile_o) == 1:
        return sizes.relation.lines
    return target.l2 // 2 // sizes.line_bytes(tile)
