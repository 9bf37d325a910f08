"""Convolutions of NCHW with pixels in the lanes: the sizes and work of their tiles, and the statements of ``main``, as
``schedules/cpu_rows.py`` says what they do.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ..deferred import tirx
from ..hardware.target import Target
from ..lowering.compute import Expr, ceildiv, unflat
from ..lowering.schedule import Picks
from ..problem.spec import ConvSpec
from .lanes import MOST_TAPS, Pixels, RowProduct, columns_of, subsampled
from .model import Counts, Stream, Work
from .product import BEGIN_RUN, BEGIN_TILE, finishing, pieces
from .traffic import busiest_share, of_images
from .vector import Block
from .window import copies, is_short, output_rows, readers

#: Cycles of an input row of a tile: each lies at another place in memory.
ROW = 2


def tiles_of_pixels(spec: ConvSpec, picks: Picks) -> int:
    """Rows of tiles of an image; in 1-D, tiles."""
    if spec.rank == 1:
        return columns_of(spec, picks.lanes, picks.tile_ow).count
    *front, lines = spec.out_spatial[:-1]
    return math.prod(front) * ceildiv(lines, picks.tile_oh)


def unrolled(spec: ConvSpec, picks: Picks) -> int:
    """Multiply-adds that are written out."""
    taps = spec.kernel[-1] if spec.kernel[-1] <= MOST_TAPS else 1
    tiles = len(columns_of(spec, picks.lanes, picks.tile_ow).runs) if taps > 1 or any(spec.padding[-1]) else 2
    sizes = pieces((1, *spec.out_spatial)[-2], picks.tile_oh)
    down = sum(rows for height, _ in sizes for _, rows in readers(spec, spec.rank - 1, height))
    channels = picks.tile_oc + spec.oc // spec.groups % picks.tile_oc
    return int(channels * down * picks.tile_ow * tiles * taps) * copies(spec, spec.rank - 1)


def row_counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    tasks = spec.n * spec.groups * picks.parallel_oc * picks.parallel_oh
    share, channels = busiest_share(tasks, target.cores), ceildiv(spec.oc // spec.groups, picks.tile_oc)
    columns = ceildiv(ceildiv(spec.out_spatial[-1], picks.lanes), picks.tile_ow)
    work, alone = list[Work](), False
    for height, lines in pieces((1, *spec.out_spatial)[-2], picks.tile_oh):
        times = spec.n * spec.groups * channels * math.prod(spec.out_spatial[:-2]) * lines * columns * share
        work.append(_work_of_tile(spec, target, picks, height).with_times(times))
        alone = _is_alone(spec, height)
    # Beside products there are units for half of it.
    work.append(finishing(spec, picks.lanes, share if alone else share / 2))
    own_src = spec.bytes["src"] / (spec.n * spec.groups)
    again = (channels - 1) * spec.bytes["src"] if own_src > target.l1 else 0  # by every tile of channels
    streams = [
        Stream(spec.bytes["weights"] * share, weights=spec.bytes["weights"]),
        of_images(spec.bytes["src"] + spec.bytes["dst"], share),
        Stream(again * share, ahead=True, footprint=own_src),
    ]
    return Counts(work, streams)


def _loops_of_tile(spec: ConvSpec, height: int) -> int:
    """Runs of a loop: over rows with the same readers, or over channels, each of which lies in another page."""
    rows, planes, depth = readers(spec, spec.rank - 1, height), math.prod(spec.kernel[:-2]), spec.ic // spec.groups
    return planes * depth * len(rows) if depth > 1 else planes * sum(count > 1 for count, _ in rows)


def _is_written_out(spec: ConvSpec) -> bool:
    """Whether all rows of a single channel are, which then share the weights that they read."""
    return spec.ic == spec.groups and spec.rank > 1 and is_short(spec, spec.rank - 2)


def _is_alone(spec: ConvSpec, height: int) -> bool:
    """Whether nothing of a tile so high overlaps with the next one."""
    return _loops_of_tile(spec, height) > 0 and not _is_written_out(spec)


def _work_of_tile(spec: ConvSpec, target: Target, picks: Picks, height: int) -> Work:
    """A tile of so many rows, once: as wide, and of as many channels, as tiles are on average."""
    per_group, taps, stride, lanes = spec.oc // spec.groups, spec.kernel[-1], spec.stride[-1], picks.lanes
    vectors = ceildiv(spec.out_spatial[-1], lanes)
    wide, oc = vectors / ceildiv(vectors, picks.tile_ow), per_group / ceildiv(per_group, picks.tile_oc)
    # Most vectors of neighbouring pixels lie in two lines of the cache.
    lines, shuffled = 1 + lanes / target.lanes, 0.0
    read = taps * lines
    if stride > 1:
        shuffled = taps * max(1.0, math.log2(stride))
        # Indices of more than a few shuffles are read, too.
        read = ceildiv(spec.window[-1], stride) * stride * lines + (shuffled if stride > 2 else 0)
    rows, passes = readers(spec, spec.rank - 1, height), math.prod(spec.kernel[:-2]) * (spec.ic // spec.groups)
    uses, inputs = sum(count * served for count, served in rows), sum(count for count, _ in rows)
    weights, alone = spec.kernel[-2] if _is_written_out(spec) else uses, _is_alone(spec, height)
    begin = BEGIN_TILE * alone + BEGIN_RUN * _loops_of_tile(spec, height)
    return Work(
        1,
        fmas=passes * oc * uses * wide * taps,
        loads=passes * (inputs * read * wide + weights * taps * oc),
        shuffles=passes * inputs * shuffled * wide,
        stores=oc * height * wide,
        chain=passes * taps * uses / height if alone else 0,
        cycles=begin + ROW * passes * inputs * (spec.rank > 1),
    )


# ---- the kernel -----------------------------------------------------------------------------------


def statement(spec: ConvSpec, picks: Picks, product: RowProduct) -> tirx.Stmt:
    """All images at once; or one after the other, each copied without what its strides skip."""
    whole = Block()
    if product.spec == spec:  # not "is": what is cached may come from an equal one
        _add_images(whole, picks, product, spec.n, 0)
    else:
        with whole.loop(spec.n) as (body, image):
            copy = subsampled(body, spec, product.src, image, picks.lanes)
            _add_images(body, picks, replace(product, src=copy, dtype="f32"), 1, image)
    return whole.statement()


def _add_images(whole: Block, picks: Picks, product: RowProduct, images: int, first: Expr) -> None:
    """The parallel loop over images from ``first`` on, groups, parts of the channels and of the pixels."""
    spec, columns, parts = product.spec, product.columns, picks.parallel_oh
    tiles, blocks = tiles_of_pixels(spec, picks), ceildiv(spec.oc // spec.groups, picks.tile_oc)
    tasks = (images, spec.groups, picks.parallel_oc, parts)
    each = ceildiv(blocks, picks.parallel_oc)
    with whole.loop(math.prod(tasks), parallel=True) as (body, index):
        source, group, block, part = map(body.let, unflat(index, tasks))
        start, end = (body.let(p * tiles // parts) for p in (part, part + 1))
        split = (start, end) if spec.rank == 1 and parts > 1 else ()
        image, panel = body.let(first + source), None
        if picks.copy_src:
            panel = body.buffer((ceildiv(tiles, parts), spec.ic, columns.step))
            with body.loop(spec.ic) as (step, c):  # a channel's tiles together: its rows lie in pages of their own
                for tile_body, tile, x, pattern in columns.tiles(step, *split):
                    product.copy(tile_body, (source, c, x), pattern, (panel, tile - start))
        with body.loop(each) as (outer, i):
            for case, channels in product.channels(outer, group, outer.let(block * each + i)):
                for lines_body, lines in output_rows(case, spec, spec.rank - 1, picks.tile_oh, start, end):
                    for tile_body, tile, x, pattern in columns.tiles(lines_body, *split):
                        held = None if panel is None else (panel, tile - start)
                        product.tile(tile_body, channels, Pixels(source, image, lines, x, pattern, held))
