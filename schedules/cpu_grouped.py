"""Grouped and depthwise convolution with output channels of whole groups in the vector lanes.

Applies to  convolutions with groups that are not transposed, of any rank, kernel, stride, dilation and number of
            channels per group, whose channels lie in blocks innermost: NHWC (NWC, NDHWC: all of them), nchw16c, nchw8c.
Strategy    1. A vector is the output channels of as many whole groups as there is room for, or a part of one
               group's. Where they do not divide, the last one overlaps its neighbour, so that all share their code.
            2. Pack weights as [vector][rows of the kernel][ic][k][lanes]: in the order they are used.
            3. Keep a tile of `tile_oh` × `tile_ow` pixels × `tile_c` vectors in registers. Nothing is copied: src is
               loaded where it lies, rows outside it are left out, and columns at the edge are code of their own.
            4. Loop over the input rows, then over the group's input channels. A pixel's vector has in each lane the
               c-th channel of the lane's group: loaded as it is (depthwise), broadcast (one group) or permuted. All
               rows and taps that read the pixel use it.
            5. Compute `block_c` tiles of vectors for one tile of pixels before the next pixels, so that src is read
               in the order it lies. Several rows share what they read: it comes from the L2 cache.
            6. One parallel loop over batch × blocks of vectors × parts of the rows (in 1-D of the tiles).
Why not     pixels in the lanes (cpu_rows): channels that lie innermost would have to be transposed.
"""

from __future__ import annotations

import math

from convgen.cpu.bf16 import is_stored
from convgen.cpu.counted import Counted
from convgen.cpu.grouped import Kernel, geometry_of, lanes_of, packed, work_of_tile
from convgen.cpu.groups import GroupVectors
from convgen.cpu.model import Counts, Stream, Work
from convgen.cpu.product import Even, finishing, pieces
from convgen.cpu.tasks import Buffers
from convgen.cpu.traffic import busiest_share, enough_parts, of_images
from convgen.cpu.vector import written
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv
from convgen.lowering.schedule import Picks, Program, Space, require
from convgen.problem.spec import ConvSpec

#: Multiply-adds written out in all tiles together; more take long to compile.
MOST_UNROLLED = 2048
#: Those of the default, and its sums in registers.
MOST_DEFAULT, MOST_SUMS = 900, 16
#: Bytes after which addresses meet in the same set of the L1 cache, and how many pixels of a tile may.
L1_WAY, PLACES = 4096, 9
#: What narrower vectors cost, which work hardly counts: twice as many tiles begin.
NARROW = 1.15


class CpuGrouped(Counted):
    id, version = "cpu_grouped", 4
    merged = ("cpu_depthwise", "cpu_grouped_last")

    def takes_layouts(self, src: str, dst: str) -> bool:
        return "nchw" not in (src, dst)

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.groups > 1, "needs groups")
        require(bool(lanes_of(spec, target)), "needs vectors of whole groups within blocks of channels")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        g, lanes = geometry_of(spec), lanes_of(spec, target)
        return Space(
            lanes=lanes,
            tile_oh=[h for h in (1, 2, 3, 4, 5, 6, 7, 8) if h == 1 or (h <= g.lines and g.line_dilation == 1)],
            tile_ow=[w for w in (*range(1, 11), 12, 14, 16, 20, 24, 28) if w <= g.width],
            tile_c=[t for t in (1, 2, 3, 4) if t == 1 or (t - 1) * lanes[0] < spec.oc // spec.groups],
            block_c=[b for b in (1, 2, 4, 8, 16, 32, 64) if b == 1 or b * lanes[0] < 2 * spec.oc],
            parallel_oh=[p for p in (1, 2, 4, 8, 16, 32) if p <= (g.rows(1) if g.outer else g.width)],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        vectors, g = GroupVectors(spec, picks.lanes), geometry_of(spec)
        pixels = picks.tile_oh * picks.tile_ow
        # Beside the sums: the weights of the taps that a pixel meets, and the pixel.
        used = picks.tile_c * (pixels + min(pixels, g.taps)) + 1
        small = pixels == picks.tile_c == 1
        require(small or used <= target.vector_registers, f"{used} vectors, {target.vector_registers} registers")
        require(vectors.parts % picks.tile_c == 0, "tile_c does not divide the vectors of a group")
        require(picks.block_c < 2 * vectors.number // picks.tile_c, "block_c exceeds the vectors")
        tiles = g.rows(picks.tile_oh) if g.outer else ceildiv(g.width, picks.tile_ow)
        require(picks.parallel_oh <= tiles, "fewer tiles than parallel_oh")
        unrolled = g.unrolled(picks)
        require(small or unrolled <= MOST_UNROLLED, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        """The fastest tile; then all of its vectors where their weights, which the next tile reads again, leave room in
        the L1 cache: src is then read as it lies; then tasks enough.
        """
        space, g = self.space(spec, target).domains, geometry_of(spec)
        picks = self._tile(spec, target)
        vectors = GroupVectors(spec, picks.lanes)
        tiles = vectors.number // picks.tile_c
        fitting = target.l1 // (4 * picks.lanes * picks.tile_c * vectors.depth * math.prod(spec.kernel))
        most = tiles if tiles <= fitting // 2 else max(1, fitting // 4)
        if g.src_block < spec.ic:
            most = 1
        picks = picks.replace(block_c=min((b for b in space["block_c"] if b >= most), default=space["block_c"][-1]))
        splits = [picks.replace(parallel_oh=p) for p in space["parallel_oh"]]
        parts = [p.parallel_oh for p in splits if self.reason_against(spec, target, p) is None]
        tasks = spec.n * ceildiv(tiles, picks.block_c)
        return picks.replace(parallel_oh=enough_parts(parts, tasks, target.cores))

    def _tile(self, spec: ConvSpec, target: Target) -> Picks:
        """The tile that takes the fewest cycles, in a task of its own."""
        space, g = self.space(spec, target).domains, geometry_of(spec)
        small = Picks(lanes=space["lanes"][0], tile_oh=1, tile_ow=1, tile_c=1, block_c=1, parallel_oh=1)
        crowd = math.gcd(4 * g.src_block, L1_WAY) / L1_WAY
        points = [
            small.replace(lanes=n, tile_oh=h, tile_ow=w, tile_c=c)
            for n in space["lanes"][-2:]
            for h in space["tile_oh"]
            for w in sorted({Even(g.width, w).full for w in space["tile_ow"]})
            for c in space["tile_c"]
            if h * w * c <= MOST_SUMS
            and GroupVectors(spec, n).parts % c == 0
            and max(h * w, len(g.offsets(w))) * crowd <= PLACES
            and (w <= 8 or crowd <= 1 / 4)
        ]

        def cycles(p: Picks) -> float:
            return self.cycles_alone(spec, target, p) * (1 if p.lanes == space["lanes"][-1] else NARROW)

        def is_short(p: Picks) -> bool:
            return g.unrolled(p) <= MOST_DEFAULT

        return self.fastest(spec, target, points, cycles, admits=is_short, otherwise=small)

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        g, vectors = geometry_of(spec), GroupVectors(spec, picks.lanes)
        number = vectors.number // picks.tile_c
        tasks = spec.n * ceildiv(number, picks.block_c) * picks.parallel_oh
        share = busiest_share(tasks, target.cores)
        times, work = spec.n * number * math.prod(g.outer[:-1]) * share, list[Work]()
        for height, lines in pieces(g.lines, picks.tile_oh):
            for width, tiles in Even(g.width, picks.tile_ow).sizes:
                tile = work_of_tile(g, vectors, target, picks, height, width)
                work.append(tile.with_times(times * lines * tiles))
        work.append(finishing(spec, picks.lanes, share))
        weights = Stream(spec.bytes["weights"] * share, weights=spec.bytes["weights"])
        return Counts(work, [weights, of_images(spec.bytes["src"] + spec.bytes["dst"], share)])

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g, vectors = Operands(spec), geometry_of(spec), GroupVectors(spec, picks.lanes)
        rounds = is_stored(spec, target)
        return written(
            ops,
            packed(ops, g, vectors, picks),
            lambda *buffers: Kernel(Buffers(*buffers), spec, picks, g, vectors, rounds).statement(),
        )
