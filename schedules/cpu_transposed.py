"""Transposed convolution by stride phases, in any layout: no zero is multiplied, and no product stored.

Applies to  all transposed convolutions, best with groups of whole vectors of output channels.
Strategy    1. Outputs that are equal modulo the stride form a phase (convgen.cpu.phases): a convolution at stride 1
               of src with every stride-th tap. A single input pixel has as many phases as outputs.
            2. Pack weights as [oc/t][rows of the kernel and blocks of channels][run][t], the taps of a phase together.
            3. A task copies its rows with their padding, in src's layout; else src is read where it lies.
            4. For one phase keep a tile of `tile_oh` × `tile_ow` pixels × `tile_oc` channels in registers: vector loads
               of weights, broadcast src. The next block's weights are fetched ahead.
            5. NHWC and blocks of channels: a pixel's vectors are stored where they belong. NCHW: they go to a buffer
               of output rows, of which vectors of pixels are transposed in registers when all phases of a row are
               there.
            6. `merge`: the phases of a row and the channels together are in the lanes, for few channels. All read the
               same pixels then, so rows begin where the first phase does, padding or not.
            7. One parallel loop over parts of the channels × batch × blocks of rows (in 1-D of tiles).
Why not     GEMM and col2im: it writes each product, and adds them up again in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from convgen.cpu.channels import ChannelsInLanes, tiles_of
from convgen.cpu.geometry import Geometry, geometry_of
from convgen.cpu.model import Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TILE, FAR_ROW, Even, most_pixels, steps
from convgen.cpu.traffic import image_bytes, of_images
from convgen.hardware.target import Target
from convgen.lowering.compute import ceildiv
from convgen.lowering.schedule import Picks, Space, require
from convgen.problem.spec import ConvSpec

#: Rows of tiles of a task, in 1-D tiles; parts of the channels.
BLOCKS, PARTS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 3, 4, 6, 8, 12, 16)


class CpuTransposed(ChannelsInLanes):
    id, version = "cpu_transposed", 7
    merged = ("cpu_transposed_pixel",)

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        whole = spec.groups == 1 or spec.oc // spec.groups % target.lanes == 0 or spec.dst_blocks.is_plain
        require(whole, f"needs groups of multiples of {target.lanes} output channels in blocks of channels")
        own = spec.ic // spec.groups
        require(spec.src_blocks.is_plain or own % spec.src_blocks.size == 0, "needs groups of whole blocks of channels")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes, g = target.lanes, geometry_of(spec, target)
        channels = g.channels * (g.x.stride if g.mergeable else 1)
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4, 6) if lanes * (v - 1) < channels],
            tile_oh=[h for h in (1, 2, 3, 4, 6, 8) if h <= g.y.pixels],
            tile_ow=[w for w in range(1, 29) if w <= g.x.pixels + 1],
            merge=[False, True] if g.mergeable else [False],
            block=[b for b in BLOCKS if b == 1 or b < 2 * g.blockable(1, 1)],
            parallel_oc=list(PARTS),
            copy_src=[True] if g.copied else [False, True],
        )

    def tiles(self, spec: ConvSpec, target: Target) -> list[Picks]:
        space, lanes, g = self.space(spec, target).domains, target.lanes, geometry_of(spec, target)
        # Rows of NCHW, copied, are aligned, and lie side by side.
        widened = spec.dtype != "f32" and not g.operation.converts and spec.oc > 64
        copy_src = g.copied or g.src.layout == "nchw" or widened
        # Merged phases fill the lanes that a group's last vector of channels leaves empty.
        merges = space["merge"] if g.channels % lanes else (False,)
        return [
            Picks(tile_oc=c, tile_oh=h, tile_ow=w, merge=m, block=1, parallel_oc=1, copy_src=copy_src)
            for m in merges
            for c in space["tile_oc"]
            for h in space["tile_oh"]
            for w in _widths(geometry_of(spec, target, m).width, most_pixels(target, c // lanes) // h)
            if h == 1 or w < 14
        ]

    def work(self, spec: ConvSpec, target: Target, picks: Picks) -> Iterator[Work]:
        g, lanes, core = geometry_of(spec, target, picks.merge), target.lanes, core_of(target)
        phases, along = g.z.stride * g.y.stride, 1 if g.merge else g.x.stride
        for times, height, width, vectors in tiles_of(g, picks, lanes):
            resident, passes = 4 * g.products * vectors * lanes, g.blockable(height, width)
            passes *= Even(g.width, picks.tile_ow).count if spec.rank > 1 else 1
            near: float = 4 * vectors * lanes if resident // phases > target.l1 // 2 and passes > 1 else 0
            if resident > target.l2 // 2:  # what is fetched ahead is gone when it is used
                near *= (core.l2 / core.memory + (passes - 1) * core.l2 / core.l3) / passes
            pixels, operation = height * width, g.operation
            yield steps(times * g.products, pixels, vectors, near=near, fetched=0.5, operation=operation)
            yield Work(times * math.prod(g.runs) * (1 if g.apart else along), cycles=BEGIN_RUN)
            stored = height * width * vectors
            loads = 0 if g.buffered else stored * spec.residual
            yield Work(times * phases * along, loads=loads, stores=stored, cycles=BEGIN_TILE)
        yield from _of_buffer(g, lanes)

    def streams(self, spec: ConvSpec, target: Target, picks: Picks, share: float, tasks: float) -> list[Stream]:
        g = geometry_of(spec, target, picks.merge)
        blocks, panel = g.blocks(picks), g.operation.bytes * g.read.channels * math.prod(g.extent(picks))
        weights = 4 * g.products * picks.tile_oc * blocks * g.parts(picks)
        per_task = weights / picks.parallel_oc
        again = max(0, tasks - picks.parallel_oc) * per_task if per_task > target.l2 // 2 else 0
        streams = [
            # Weights: once from memory, then from where they stay between tasks.
            Stream(min(weights, tasks * per_task), weights=weights, ahead=True),
            Stream(again, ahead=True, footprint=weights),
            of_images(image_bytes(spec), share),
        ]
        own_blocks, phases = ceildiv(blocks, picks.parallel_oc), g.z.stride * g.y.stride
        if panel + per_task / own_blocks / phases > target.l2 // 2:
            streams.append(Stream(tasks * own_blocks * phases * panel, footprint=max(panel, target.l2 + 1)))
        return streams


def _widths(width: int, most: int) -> list[int]:
    """Pixels of a tile's rows to choose from: a few of the widest that divide a row evenly."""
    return sorted({Even(width, w).full for w in range(1, min(most, width, 28) + 1)})[-4:]


def _of_buffer(g: Geometry, lanes: int) -> list[Work]:
    """Of an image's rows on their way through the buffer, if there is one."""
    spec, found = g.spec, list[Work]()
    rows = g.z.out * g.y.out * spec.groups
    if g.buffered and g.dst.layout == "nchw":
        whole, rest = divmod(g.x.out, lanes)
        found.append(Work(rows * g.channels, cycles=FAR_ROW))
        for channels, blocks in ((lanes, g.channels // lanes), (g.channels % lanes, 1)):
            if channels and blocks:
                shuffles = 0 if g.merge and g.channels == 1 else lanes * math.log2(lanes)
                turned = channels if shuffles else 0  # wait in a buffer until their row is whole
                ends = ((whole, turned + channels, 0), (bool(rest), turned, channels))
                for count, stores, masked in ends:
                    times, loads = rows * blocks * count, lanes + turned + channels * spec.residual
                    found.append(Work(times, 0, loads, stores, masked, shuffles, cycles=4))
    elif g.buffered:
        found.append(Work(rows * g.x.out * ceildiv(g.channels, lanes), loads=1, masked_stores=1, cycles=2))
    return found
