"""Transposed convolution of NCHW planes: neighbouring pixels of a stride phase in the lanes.

Applies to  transposed convolutions of any rank and groups, NCHW, dilated only where the stride is 1.
Strategy    1. Along the last axis, output pixels whose distance to the first one is the same modulo
               the stride form a phase: pixel s·q + r takes every s-th tap, of input pixels q + offset.
            2. A vector is `lanes` neighbouring q of one phase; a tile is all phases × `tile_ow` vectors ×
               `tile_oc` channels. A src vector is loaded where it lies, masked at the edges, and used by
               all phases, taps and channels; weights are broadcast, packed [oc/t][taps][ic][taps of a row][t].
            3. Sums of `tile_phase` phases at once stay in registers over all rows of taps and input channels.
            4. Rows of taps that lie in padding are left out: their loop runs over those inside.
            5. Phases are shuffled together, so that epilogue and store work on whole vectors.
            6. `prefetch_src`: each channel's src of the next tile is fetched ahead; channels lie far apart.
            7. One parallel loop over batch × rows (× parts of a row) × channel blocks.
Why not     channels in the lanes (cpu_transposed): better with many channels, and rows shorter than a vector.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from convgen.cpu.counted import Counted
from convgen.cpu.lanes import Pixels, RowProduct, columns_of, pack_rows, row_taps, vector_lengths
from convgen.cpu.model import Counts, Stream, Work
from convgen.cpu.product import BEGIN_RUN, BEGIN_TILE, finishing
from convgen.cpu.traffic import busiest_share, enough_parts, image_bytes, of_images
from convgen.cpu.vector import Block, written
from convgen.cpu.window import Lines
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv, unflat
from convgen.lowering.schedule import Picks, Program, Space, require
from convgen.problem.spec import ConvSpec

#: Multiply-adds written out, in all tiles together; more take long to compile.
MOST_UNROLLED = 4096
#: Cycles of a step: each input channel lies in another page.
FAR = 2


class CpuTransposedRows(Counted):
    id, version = "cpu_transposed_rows", 2

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.stride[-1] <= 64, "needs a stride of at most 64 along a row")
        require(spec.kernel[-1] <= 256, "needs at most 256 taps along a row")
        require(all(s == 1 or d == 1 for s, d in zip(spec.stride, spec.dilation, strict=True)), "dilated and strided")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        width, phases = ceildiv(spec.out_spatial[-1], spec.stride[-1]), spec.stride[-1]
        lanes = vector_lengths(target, width)
        return Space(
            lanes=lanes,
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16) if c <= spec.oc // spec.groups],
            tile_ow=[v for v in (1, 2, 3, 4) if v == 1 or lanes[0] * (v - 1) < width],
            tile_phase=sorted({ceildiv(phases, parts) for parts in (1, 2, 3, 4, 6, 8)}),
            parallel_ow=[1, 2, 4, 8, 16],
            prefetch_src=[False, True],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        width, phases = ceildiv(spec.out_spatial[-1], spec.stride[-1]), spec.stride[-1]
        sums = picks.tile_phase * picks.tile_oc * picks.tile_ow
        most = _most_sums(target)
        require(sums <= most or sums == picks.tile_phase, f"{sums} sums, registers for {most}")
        require(picks.lanes * (picks.tile_ow - 1) < width, "tile_ow exceeds the row")
        require(picks.parallel_ow <= ceildiv(width, picks.lanes * picks.tile_ow), "fewer tiles than parallel_ow")
        per_phase = picks.tile_oc * picks.tile_ow
        unrolled = len(columns_of(spec, picks.lanes, picks.tile_ow).runs) * per_phase * max(phases, spec.kernel[-1])
        require(
            unrolled <= MOST_UNROLLED or per_phase == 1, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}"
        )

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        """The fastest tile; then tasks enough."""
        space, names = self.space(spec, target).domains, ("lanes", "tile_oc", "tile_ow", "tile_phase")
        least = {name: min(space[name]) for name in names} | {"parallel_ow": 1, "prefetch_src": False}
        small = Picks(**least | {"tile_phase": min(space["tile_phase"], key=lambda p: (abs(p - 8), p))})
        points = [
            small.replace(**dict(zip(names, values, strict=True)))
            for values in itertools.product(*(space[name] for name in names))
            if math.prod(values[1:]) <= _most_sums(target)
        ]
        tile = self.fastest(spec, target, points, otherwise=small)
        tasks = spec.n * math.prod(spec.out_spatial[:-1]) * _blocks(spec, tile)
        tiles = ceildiv(ceildiv(spec.out_spatial[-1], spec.stride[-1]), tile.lanes * tile.tile_ow)
        parts = enough_parts([p for p in space["parallel_ow"] if p <= tiles], tasks, target.cores)
        return tile.replace(parallel_ow=parts, prefetch_src=tiles > 1 and spec.bytes["src"] > target.l2)

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        taps, phases, depth = spec.kernel[-1], spec.stride[-1], spec.ic // spec.groups
        vectors = ceildiv(ceildiv(spec.out_spatial[-1], phases), picks.lanes)
        tiles, groups = ceildiv(vectors, picks.tile_ow), ceildiv(phases, picks.tile_phase)
        # Taps of the other axes that meet the input, on average over the output.
        sizes = zip(spec.kernel[:-1], spec.in_spatial[:-1], spec.out_spatial[:-1], strict=True)
        met = math.prod(min(k, k * i / o) for k, i, o in sizes)
        tasks = spec.n * math.prod(spec.out_spatial[:-1]) * _blocks(spec, picks) * picks.parallel_ow
        share = busiest_share(tasks, target.cores)
        rows, wide = tasks / picks.parallel_ow * share, vectors / tiles
        steps, stored = rows * tiles * groups * met, rows * vectors * picks.tile_oc * phases
        met_pixels = len({tap.group for tap in row_taps(spec)})  # by the phases of one pixel
        read = min(met_pixels, ceildiv(taps, groups)) * (1 + picks.lanes / target.lanes)
        fmas, loads = taps / groups * picks.tile_oc * wide, read * wide + taps / groups * picks.tile_oc
        work = [
            Work(steps * depth, fmas, loads, chain=ceildiv(taps, phases), cycles=FAR),
            Work(steps, cycles=BEGIN_RUN),
            Work(rows * tiles, cycles=BEGIN_TILE),
            Work(stored, stores=1, shuffles=math.log2(phases)),
            finishing(spec, picks.lanes, share),
        ]
        return Counts(
            work, [Stream(spec.bytes["weights"], weights=spec.bytes["weights"]), of_images(image_bytes(spec), share)]
        )

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        columns = columns_of(spec, picks.lanes, picks.tile_ow)
        how = {"together": picks.tile_phase, "fetches": picks.prefetch_src}

        def statement(*tensors: Any) -> Any:
            return _statement(RowProduct(spec, columns, picks.tile_oc, spec.dtype, *tensors, **how), picks.parallel_ow)

        ops = Operands(spec)
        return written(ops, pack_rows(ops, picks.tile_oc), statement)


def _statement(product: RowProduct, parts: int) -> Any:
    """The parallel loop over images, rows, parts of them, groups and tiles of channels, around what a task does."""
    spec, count, whole = product.spec, product.columns.count, Block()
    tasks = (spec.n, *spec.out_spatial[:-1], parts, spec.groups, ceildiv(spec.oc // spec.groups, product.tile_oc))
    with whole.loop(math.prod(tasks), parallel=True) as (body, index):
        image, *row, part, group, channel_tile = map(body.let, unflat(index, tasks))
        split = () if parts == 1 else (body.let(p * count // parts) for p in (part, part + 1))
        for case, channels in product.channels(body, group, channel_tile):
            for tile_body, _, x, pattern in product.columns.tiles(case, *split):
                product.tile(tile_body, channels, Pixels(image, image, Lines(row, 1, False), x, pattern))
    return whole.statement()


def _most_sums(target: Target) -> int:
    """Sums in registers beside a vector of src or two, and a weight."""
    return 28 if target.vector_registers > 16 else 12


def _blocks(spec: ConvSpec, picks: Picks) -> int:
    """Blocks of output channels, of all groups."""
    return spec.groups * ceildiv(spec.oc // spec.groups, int(picks.tile_oc))
