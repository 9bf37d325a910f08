"""Direct convolution with output channels in the vector lanes, in any layout.

Applies to  convolutions of any rank, stride and dilation that are not transposed, dense or with groups of more than
            half a vector of output channels, of i8 with any groups.
Strategy    1. A layout is a block of channels that lie innermost: 1 in NCHW, 16 in nchw16c, all in NHWC. What a row of
               the kernel reads of a block lies side by side: one run of numbers (NCHW, or dilated: of channels, per
               tap). Pack weights as [oc/t][rows of the kernel and blocks][run][t], in the order of their use.
            2. A task copies its rows with their padding, in src's layout; without padding src is read where it lies.
               Where an instruction adds several products (convgen.cpu.operation) runs are of words of several
               channels, and the copy has channels innermost: of NCHW it is transposed, of i8 made unsigned.
            3. Keep a tile of `tile_oh` × `tile_ow` pixels × `tile_oc` channels in registers: vector loads of weights,
               broadcast src. Rows are cut into tiles whose sizes differ by one at most.
            4. Bias, residual and activation on the tile; vectors of channels are stored. NCHW: vectors of pixels,
               transposed in registers. Of integers, rows and planes of the kernel that lie outside of src for all of
               a tile are left out.
            5. One parallel loop over parts of the channels × batch × blocks of rows (in 1-D of tiles). `order` names a
               task's outer loop: `oc`, and every block of channels reads the pixels again, while the next one's
               weights are fetched ahead (a task of one tile: those that follow soon); `pixels`, and every tile reads
               the weights again. 1×1 layers of many NCHW images fetch the next image instead, and what they write.
Why not     pixels in the lanes (cpu_rows): NCHW then needs no transposition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from convgen.cpu.channels import ChannelsInLanes, tiles_of
from convgen.cpu.geometry import Geometry, geometry_of
from convgen.cpu.model import Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TILE, Even, most_pixels, steps
from convgen.cpu.traffic import image_bytes, is_read_again
from convgen.hardware.target import Target
from convgen.lowering.compute import ceildiv, round_up
from convgen.lowering.schedule import Picks, Space, require
from convgen.problem.spec import ConvSpec

#: Pixels of a tile at most: code is written out for each.
MOST_PIXELS = 16
#: Rows of tiles of a task, in 1-D tiles; parts of the channels.
BLOCKS, PARTS = (1, 2, 4, 7, 8, 14, 16, 28, 56, 112), (1, 2, 3, 4, 6, 8, 12, 16)


class CpuDirect(ChannelsInLanes):
    id, version = "cpu_direct", 7
    # Beside it Strassen's products for 1x1 layers won hardly anything.
    merged = ("cpu_channels_last", "cpu_dense", "cpu_gemm_channels", "cpu_im2col", "cpu_strassen")

    def applies(self, spec: ConvSpec, target: Target) -> None:
        lanes, own = target.lanes, spec.ic // spec.groups
        channels = spec.oc // spec.groups
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        many = spec.groups == 1 or channels > lanes // 2 or spec.dtype == "i8"  # whose sums may be too long for f32
        require(many, f"needs groups of more than {lanes // 2} output channels")
        require(spec.src_blocks.is_plain or own % spec.src_blocks.size == 0, "needs groups of whole blocks of channels")
        whole = spec.groups == 1 or channels % lanes == 0 or spec.dst_blocks.is_plain
        require(whole, "needs groups of whole vectors of channels, as dst is in blocks")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes, g = target.lanes, geometry_of(spec, target)
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if lanes * (v - 1) < g.channels],
            tile_oh=[h for h in (1, 2, 3, 4) if h <= g.y.pixels],
            tile_ow=[w for w in range(1, 17) if w <= g.width],
            block=[b for b in BLOCKS if b == 1 or b < 2 * g.blockable(1, 1)],
            order=["oc", "pixels"],
            parallel_oc=list(PARTS),
            copy_src=[True] if g.copied else [False, True],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        pixels = picks.tile_oh * picks.tile_ow
        require(pixels <= MOST_PIXELS, f"{pixels} pixels in a tile, code for {MOST_PIXELS} at most")
        super().valid(spec, target, picks)

    def tiles(self, spec: ConvSpec, target: Target) -> list[Picks]:
        lanes, space, g = target.lanes, self.space(spec, target).domains, geometry_of(spec, target)
        copy_src = g.copied or (spec.dtype != "f32" and not g.operation.converts and spec.oc > 64)
        base = Picks(tile_oc=lanes, tile_oh=1, tile_ow=1, block=1, order="oc", parallel_oc=1, copy_src=copy_src)
        return [
            base.replace(tile_oc=o, tile_oh=h, tile_ow=w)
            for o in space["tile_oc"]
            for h in space["tile_oh"]
            for w in sorted({Even(g.width, w).full for w in space["tile_ow"]})
            if h * w <= min(MOST_PIXELS, most_pixels(target, o // lanes)) and (h == 1 or w < 14)
        ]

    def variants(self, spec: ConvSpec, picks: Picks) -> list[Picks]:
        """Of NCHW a copy may pay without padding, too: rows of channels lie side by side there."""
        return [picks, picks.replace(copy_src=True)] if spec.layout == "nchw" and not picks.copy_src else [picks]

    def work(self, spec: ConvSpec, target: Target, picks: Picks) -> Iterator[Work]:
        lanes, g, waits = target.lanes, geometry_of(spec, target), core_of(target).waits
        inside, slowed = g.share_inside(picks.tile_oh), 1 if picks.copy_src else waits.paged
        again = not picks.copy_src and is_read_again(spec, target, g.blocks(picks))
        for times, height, width, vectors in tiles_of(g, picks, lanes):
            weights = 4 * g.products * vectors * lanes
            near = 4 * vectors * lanes if weights > target.l1 // 2 else 0
            slower = waits.crowded if g.crowds(target, height * width) else 1
            far = g.far_bytes(target, picks, height, width) * slowed
            products = times * g.products * inside * slower
            if far and again:
                yield Work(products, cycles=waits.strips * height)
            yield steps(products, height * width, vectors, near=near, far=far, fetched=0.5, operation=g.operation)
            yield Work(times * g.loops, cycles=BEGIN_RUN)
            yield _finish(g, times, height, width, vectors, lanes)

    def streams(self, spec: ConvSpec, target: Target, picks: Picks, share: float, tasks: float) -> list[Stream]:
        g = geometry_of(spec, target)
        rows, tiles = g.task(picks)
        panel = g.operation.bytes * g.read.channels * math.prod(g.extent(picks))
        weights = 4 * g.products * spec.groups * round_up(g.channels, target.lanes)
        per_task, ahead = weights / picks.parallel_oc, picks.order == "oc"
        images = image_bytes(spec)
        # Parts of rows are written in one pass, others in the next, when the cache has lost them.
        blocks_of_rows = ceildiv(g.blockable(picks.tile_oh, picks.tile_ow), rows if spec.rank > 1 else tiles)
        written_bytes = (1 + spec.residual) * spec.bytes["dst"] / (spec.n * g.z.pixels * blocks_of_rows)
        revisited = ahead and g.dst.block > picks.tile_oc and written_bytes > target.l2 // 4
        again = max(0, tasks - picks.parallel_oc) * per_task if per_task > target.l2 // 4 else 0
        streams = [
            # Weights: once from memory, then from where they stay between tasks, or between tiles.
            Stream(min(weights, tasks * per_task), weights, ahead and min(1, picks.parallel_oc / tasks)),
            Stream(again, ahead=ahead, footprint=weights),
            Stream(images * share, ahead=not revisited, footprint=images),
        ]
        if picks.copy_src and panel > target.l2 // 2:  # the copy leaves the core's cache, and comes back
            streams.append(Stream(2 * tasks * panel, footprint=max(panel, target.l2 + 1)))
        if ahead and panel > target.l2 // 2:
            passes = tasks * ceildiv(g.blocks(picks), picks.parallel_oc)
            streams.append(Stream(passes * panel, ahead=True, footprint=max(panel, target.l2 + 1)))
        if not ahead and per_task > target.l2 // 2:
            streams.append(Stream(tasks * rows * tiles * per_task, footprint=max(per_task, target.l2 + 1)))
        return streams


def _finish(g: Geometry, times: float, height: int, width: int, vectors: int, lanes: int) -> Work:
    """Storing a tile."""
    stored, shuffles, masked = height * width * vectors, 0.0, 0
    if g.dst.layout == "nchw":
        squares = height * ceildiv(width, lanes) * vectors
        stored, shuffles = squares * lanes, squares * lanes * math.log2(lanes)
        masked = stored if width % lanes else 0
    return Work(times, stores=stored - masked, masked_stores=masked, shuffles=shuffles, cycles=BEGIN_TILE)
