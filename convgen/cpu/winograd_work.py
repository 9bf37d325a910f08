"""What Winograd's algorithms count: their passes and products, and what a convolution's blocks move."""

from __future__ import annotations

import math

from ..hardware.target import Target
from ..lowering.compute import ceildiv, round_up
from ..lowering.schedule import Picks, busiest
from ..problem.spec import ConvSpec
from .model import Core, Counts, Stream, Work
from .product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, LINE, Even, finishing, pieces, steps
from .traffic import PAGE, image_bytes
from .winograd import NO_AXIS, Grid, Tiles, operations, transformed_axes
from .winograd_gradient import GradientGrid


class _Blocks:
    """The blocks of a convolution: how they are shared out, and what they hold.

    Attributes:
        by_channels: whether all input is transformed first, and tasks have a block of channels each.
        oc_blocks: of a group of channels.
        share, own: of the busiest core: the part of all work, and its tasks.
        slab, weights: bytes of weights: of a block of channels at a position, and of a group.
        values, sums: bytes of the transformed input of a block, in lines of the cache, and of a block's sums.
        in_l1: whether a block of channels finds in the L1 cache what it reads, though all of its weights come by.
    """

    def __init__(self, spec: ConvSpec, target: Target, g: Grid, picks: Picks) -> None:
        self.by_channels, self.oc_blocks = picks.parallel == "oc", ceildiv(g.outputs, picks.tile_oc)
        tasks = spec.n * spec.groups * g.plane_blocks.count * g.groups.count
        tasks *= self.oc_blocks if self.by_channels else 1
        sizes = [float(a * b) for a, n in g.plane_blocks.sizes for b, m in g.groups.sizes for _ in range(n * m)]
        # Of many tasks, each core has about its share.
        loads = sizes * (tasks // len(sizes)) if tasks <= 64 * target.cores else [1.0] * target.cores
        self.share, self.own = busiest(loads, target.cores) / sum(loads), ceildiv(tasks, target.cores)
        self.slab = 4 * g.depth[3] * g.own * picks.tile_oc
        self.weights = self.slab * g.positions * self.oc_blocks
        products = 4 * g.positions * g.most_tiles
        self.values = products * round_up(g.own, LINE) * min(g.window, g.planes_in)
        self.sums = products * picks.tile_oc * g.plane_blocks.full
        self.in_l1 = self.values + self.sums + self.slab * g.positions <= target.l1 and not self.by_channels


def winograd_counts(spec: ConvSpec, target: Target, core: Core, picks: Picks) -> Counts:
    """What the busiest core does for a convolution.

    Args:
        core: with vectors as long as the kernel's.
    """
    g = Grid(spec, target, picks)
    blocks = _Blocks(spec, target, g, picks)
    products = _of_layer(spec, blocks, work_of_products(target, g, picks, g.met, blocks.in_l1))
    work, streams = [*products, *_other_work(spec, core, g, blocks)], _streams(spec, target, core, blocks)
    # Weights are fetched while there are products, not while there are transforms, and by these alone where groups are
    # so small that the processor's own fetching begins anew with each position.
    paged = spec.groups > 1 and blocks.slab <= PAGE
    own, weights = blocks.own, blocks.weights * (core.waits.paged if paged else 1)
    ahead = core.cycles_of(products) / core.cycles_of(work)
    if blocks.by_channels:
        once = Stream(min(weights, own * weights / blocks.oc_blocks), weights, ahead)
        return Counts(work, [*streams, once], 2)
    # A group's weights come from memory while its first block is worked on, and then from where they stay.
    new = min(own, ceildiv(spec.groups, target.cores))

    def of_blocks(n: int, of_weights: Stream, regions: int, then: Counts | None = None) -> Counts:
        some = [part.with_times(part.times * n / own) for part in work]
        moved = [stream._replace(bytes=stream.bytes * n / own) for stream in streams]
        return Counts(some, [*moved, of_weights], regions, then)

    warm = Stream((own - new) * weights, ahead=ahead, footprint=weights)
    return of_blocks(new, Stream(new * weights, spec.groups * weights, ahead), 1, of_blocks(own - new, warm, 0))


def _other_work(spec: ConvSpec, core: Core, g: Grid, blocks: _Blocks) -> list[Work]:
    """Transforms and stores of the busiest core."""
    made = g.planes_in if blocks.by_channels else min(g.planes_in, g.window) * g.plane_blocks.count
    return [
        *_of_layer(spec, blocks, work_of_input(g, near=blocks.in_l1), made),
        *_of_layer(spec, blocks, _work_of_output(spec, g, core.waits.sums, blocks.in_l1), g.planes),
        finishing(spec, g.lanes, blocks.share),
        Work(blocks.own, cycles=BEGIN_TASK),
    ]


def _of_layer(spec: ConvSpec, blocks: _Blocks, parts: list[Work], times: float = 1) -> list[Work]:
    """The busiest core's share of what each image and group has so many times."""
    times *= blocks.share * spec.n * spec.groups
    return [part.with_times(part.times * times) for part in parts]


def _streams(spec: ConvSpec, target: Target, core: Core, blocks: _Blocks) -> list[Stream]:
    """What it moves but for weights."""
    values, sums, near = blocks.values, blocks.sums, blocks.values + blocks.sums + 2 * blocks.slab
    passes = blocks.own * (1 if blocks.by_channels else blocks.oc_blocks)
    streams = [Stream(image_bytes(spec) * blocks.share, ahead=True, footprint=target.l3)]
    # Transformed input comes from beyond the L2 cache, for every block.
    if blocks.by_channels or near > core.kept * target.l2:
        streams.append(Stream(passes * values, footprint=max(near, target.l2 + 1)))
    if near > target.l2:  # sums leave the L2 cache, and come back, but for the share of them that it holds
        streams.append(Stream(2 * passes * sums * (1 - target.l2 / near), footprint=near))
    return streams


def work_of_input(g: Tiles, *, near: bool = False) -> list[Work]:
    """Work of copying and transforming a plane of src. ``near``: what is made stays in the L1 cache."""
    rows, columns, vectors = g.rows, g.columns, ceildiv(g.own, g.lanes)
    shuffles = math.log2(g.lanes) if g.src.layout == "nchw" else 0
    copied_pixels = g.groups.count * g.lines * g.length
    found = [] if g.direct else [Work(copied_pixels * vectors, loads=1, stores=1, shuffles=shuffles, cycles=0.5)]
    for axis, times in ((rows, rows.tiles * g.length), (columns, rows.tiles * rows.positions * columns.tiles)):
        if axis is not NO_AXIS:
            # What is written to the L2 cache comes from there first.
            spilled = 4 * g.lanes * axis.positions if axis is columns and not near else 0
            counted = (operations(axis.inputs), axis.extent, axis.positions)
            found.append(Work(times * vectors, *counted, near=2 * spilled, spilled=spilled, cycles=2))
    return found


def work_of_products(target: Target, g: Grid, picks: Picks, met: int, in_l1: bool = False) -> list[Work]:
    """Work of the products of all planes, with ``met`` taps of the depth in all; sums may stay in the L1 cache."""
    lanes, width, found = g.lanes, picks.tile_oc // g.lanes, list[Work]()
    for size, blocks in g.groups.sizes:
        tiles = Even(g.tiles(size), picks.tile_px)
        for vectors, channel_blocks in pieces(ceildiv(g.outputs, lanes), width):
            near = 4 * lanes * vectors if 4 * g.own * vectors * lanes > target.l1 // 2 else 0
            for pixels, count in tiles.sizes:
                times = blocks * channel_blocks * count * g.positions
                fetched = ceildiv(width, tiles.count)
                step = steps(times * met * g.own, pixels, vectors, near=near, fetched=fetched)
                sums = pixels * vectors
                if in_l1:  # they go there beside the next tile's products
                    step = step._replace(stores=sums * g.planes / max(1, met * g.own))
                    tile = Work(times * g.planes, cycles=BEGIN_TILE)
                else:
                    tile = Work(times * g.planes, stores=sums, spilled=4 * lanes * sums, cycles=BEGIN_TILE)
                found += [step, Work(times * met, cycles=BEGIN_RUN), tile]
    return found


def _work_of_output(spec: ConvSpec, g: Grid, wait: float, in_l1: bool) -> list[Work]:
    """Work of transforming a plane of dst back, and of its store.

    Each vector that a tile reads is a ``wait``, and comes from the L2 cache unless ``in_l1``.
    """
    rows, columns, vectors = g.rows, g.columns, ceildiv(g.outputs, g.lanes)
    outputs = rows.outputs * columns.outputs
    sums = operations(rows.back) * columns.positions + operations(columns.back) * rows.outputs
    near, loads = 0 if in_l1 else 4 * g.lanes * g.positions, g.positions + outputs * spec.residual
    times, begin = rows.tiles * columns.tiles * vectors, wait * g.positions
    found = [Work(times, sums + 2 * outputs, loads, outputs, near=near, cycles=begin)]
    if g.dst.layout == "nchw":
        shuffles = math.log2(g.lanes)
        found.append(Work(rows.size * columns.size * vectors, fmas=2, loads=2, stores=1, shuffles=shuffles))
    return found


def work_of_taps(g: GradientGrid, vectors: float) -> Work:
    """Work of transforming so many vectors of sums of a gradient of weights back, and of storing them."""
    *rows, columns = g.back
    sums = operations(columns) * (len(rows[0]) if rows else 1)
    if rows:
        sums += operations(rows[0]) * len(columns[0])
    near = 4 * g.lanes * g.positions
    return Work(vectors, sums, g.positions, g.taps, shuffles=g.taps * g.taps, near=near, cycles=BEGIN_TILE)


def packing_counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What packing takes the busiest core beside a copy of the weights: what is transformed, and what is written more
    than there is, which is as much as it reads first.
    """
    g = Grid(spec, target, picks)
    rows, columns, taps = g.rows, g.columns, math.prod(spec.kernel[-len(transformed_axes(spec)) :])
    times = spec.groups * ceildiv(g.outputs, g.lanes) * g.own * g.depth[3] / target.cores
    sums = operations(rows.weights) * len(columns.weights[0]) + operations(columns.weights) * rows.positions
    more = 4 * g.lanes * (g.positions - taps)
    work = Work(times, sums, taps, g.positions)
    return Counts([work], [Stream(2 * more * times, footprint=4 * g.lanes * g.positions * times * target.cores)], 0)
