"""Grouped and depthwise convolution of 8-bit integers, several rows of the kernel per instruction.

Applies to  layers of integers with groups of few channels that are not transposed, of any rank, stride and dilation;
            in any layout.
Strategy    1. A vector is the output channels of as many whole groups as there is room for, as in cpu_grouped.
            2. An instruction adds to each lane the products of a word: four bytes or two 16-bit numbers
               (convgen.cpu.operation). A word has one column of neighbouring rows, where kernels have several taps and
               a group few channels. Pack weights as [vector][plane][word][row of the tile][ic][k][lanes] of words, with
               zeros for the rows of a word that an output row does not read.
            3. A task copies its rows with their padding, as operands: zero points are padding as other numbers are.
            4. Keep a tile of `tile_oh` × `tile_ow` pixels of a vector in registers. Of each column the rows are loaded
               once, and shuffled to words, which all rows and taps use that read them. In 1-D rows are pixels.
            5. Requantise the sums in registers; they start at the bias, less what zero points add. NCHW: vectors of
               pixels, transposed in registers before.
            6. One parallel loop over batch × planes × blocks of rows of tiles.
Why not     words of channels (cpu_direct): a group has one, or few, and the rest of a word would be zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from convgen.cpu.counted import Counted
from convgen.cpu.images import src_images
from convgen.cpu.model import Counts, Stream, Work
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, Even, pieces
from convgen.cpu.row_words import Geometry, Kernel, geometry_of, packed
from convgen.cpu.tasks import Buffers
from convgen.cpu.traffic import busiest_share, of_images
from convgen.cpu.vector import written
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv
from convgen.lowering.schedule import Picks, Program, Space, require
from convgen.problem.spec import ConvSpec

#: Instructions of products that are written out in a tile, at most; those of the default.
MOST_UNROLLED, MOST_DEFAULT = 2048, 512
#: Instructions that requantise a vector.
REQUANTISED = 5


class CpuGroupedIntegers(Counted):
    id, version = "cpu_grouped_integers", 1
    sums_integers = only_integers = True

    def takes_integers(self, spec: ConvSpec) -> bool:
        return True

    def takes_layouts(self, src: str, dst: str) -> bool:
        return True

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed and spec.groups > 1, "needs groups, and no transposed convolution")
        g = geometry_of(spec, target)
        vectors, depth = g.vectors, g.operation.depth
        require(vectors.parts == 1 and g.loaded <= g.slack, "needs groups of few channels")
        require(vectors.within(g.read.block, g.read.channels, True), "needs vectors of whole groups in blocks of src")
        whole = spec.dst_layout == "nchw" or vectors.within(spec.dst_blocks.size, spec.oc, False)
        require(whole, "needs vectors of whole groups in blocks of dst")
        require(g.read == src_images(spec) or spec.ic % depth == 0, f"needs NCHW of a multiple of {depth} channels")
        require(g.unrolled(1, 1) <= MOST_UNROLLED, "needs a smaller kernel")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        g = geometry_of(spec, target)
        return Space(
            tile_oh=[h for h in range(1, 9) if h == 1 or (h <= g.rows and g.dilation[g.axis] == 1)],
            tile_ow=[w for w in (*range(1, 11), 12, 14, 16) if w <= g.width],
            block=[b for b in (1, 2, 4, 8, 16, 32, 64) if b == 1 or b < 2 * g.rows],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        g, pixels = geometry_of(spec, target), picks.tile_oh * picks.tile_ow
        most = target.vector_registers * 3 // 4
        require(pixels <= most, f"{pixels} pixels in a tile, registers for {most}")
        require(picks.block < 2 * ceildiv(g.rows, picks.tile_oh), "block exceeds the rows of tiles")
        unrolled = g.unrolled(picks.tile_oh, picks.tile_ow)
        require(unrolled <= MOST_UNROLLED, f"{unrolled} products written out, at most {MOST_UNROLLED}")

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        g = geometry_of(spec, target)
        points = [
            picks
            for picks in self.space(spec, target)
            if g.unrolled(picks.tile_oh, picks.tile_ow) <= MOST_DEFAULT
            and Even(g.width, picks.tile_ow).full == picks.tile_ow
        ]

        def rank(picks: Picks) -> tuple[float, int]:
            return self.cycles(spec, target, picks), picks.tile_oh * picks.tile_ow

        return self.fastest(spec, target, points, rank, otherwise=Picks(tile_oh=1, tile_ow=1, block=1))

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        g = geometry_of(spec, target)
        tasks = spec.n * g.out[0] * ceildiv(ceildiv(g.rows, picks.tile_oh), picks.block)
        share, own = busiest_share(tasks, target.cores), ceildiv(tasks, target.cores)
        work = [tile.with_times(tile.times * spec.n * g.out[0] * share) for tile in _tiles(g, picks)]
        weights = Stream(spec.bytes["weights"] * share, weights=spec.bytes["weights"])
        images = of_images(spec.bytes["src"] + spec.bytes["dst"], share)
        return Counts([*work, *_copying(g, target, picks, own), Work(own, cycles=BEGIN_TASK)], [weights, images])

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g = Operands(spec, integers=True), geometry_of(spec, target)
        return written(
            ops, packed(ops, g, picks.tile_oh), lambda *buffers: Kernel(Buffers(*buffers), spec, picks, g).statement()
        )


def _tiles(g: Geometry, picks: Picks) -> Iterator[Work]:
    """The tiles of a plane."""
    vectors, operation, planes, turns = g.vectors, g.operation, g.kernel[0], g.spec.dst_layout == "nchw"
    for height, rows in pieces(g.rows, picks.tile_oh):
        for width, tiles in Even(g.width, picks.tile_ow).sizes:
            pixels, words = height * width, planes * len(g.columns(width)) * g.words(height)
            weights = planes * vectors.depth * g.taps * len(g.uses(height))
            shuffled = operation.depth + vectors.depth - 1 if operation.depth > 1 or vectors.permuted else 0
            counts = {"fmas": float(REQUANTISED * pixels)}
            counts[operation.unit] = counts.get(operation.unit, 0) + weights * width * operation.instructions
            length = width if g.axis == 1 else height  # of the rows that squares are of
            squares = ceildiv(length, vectors.lanes) * pixels / length if turns else 0
            stored = squares * vectors.count
            yield Work(
                vectors.number * rows * tiles,
                **counts,
                loads=words * operation.depth + weights + 3 * stored,
                shuffles=words * shuffled + squares * vectors.lanes * math.log2(vectors.lanes),
                stores=0 if turns else 2 * pixels,
                masked_stores=stored,
                chain=weights / height,
                cycles=BEGIN_TILE,
            )


def _copying(g: Geometry, target: Target, picks: Picks, tasks: float) -> list[Work]:
    """The copies of so many tasks."""
    extent, operation, lanes = g.extent(picks), g.operation, target.lanes
    size = g.spec.ic * math.prod(extent) * operation.bytes
    turned = math.log2(lanes) + 3 * operation.depth if g.spec.layout == "nchw" else 0
    near = 8 * lanes if size > target.l1 // 2 else 0
    vectors = Work(tasks * size / (4 * lanes), loads=1, stores=1, shuffles=turned, near=near)
    return [vectors, Work(tasks * math.prod(extent[:2]), cycles=BEGIN_RUN)]
