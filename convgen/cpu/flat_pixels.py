"""1×1 convolutions of NCHW as products of matrices over flat pixels: which are, what they count, and the tiles worth
comparing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..hardware.target import Target
from ..lowering.compute import ceildiv
from ..lowering.schedule import Picks
from ..problem.spec import ConvSpec
from .model import Counts, Stream, Work, core_of
from .product import BEGIN_TASK, BEGIN_TILE, FAR_ROW, finishing, most_pixels, pieces, steps
from .traffic import image_bytes, is_read_again, of_images

#: How much longer weights take that nothing but the processor fetches ahead, which stops at each page.
LATE = 3
#: Parts of the channels.
PARTS = (1, 2, 3, 4, 8)


def is_product(spec: ConvSpec, target: Target) -> bool:
    """Whether it is a matrix product of flat pixels, which fill a vector."""
    return spec.has_unit_kernel and spec.groups == 1 and spec.out_pixels >= target.lanes and spec.stride[-1] <= 8


@lru_cache(maxsize=256)
def flattened(spec: ConvSpec, target: Target) -> ConvSpec:
    """What is computed: of a strided product, that over the pixels it reads."""
    if spec.is_pointwise or not is_product(spec, target):
        return spec
    one = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    return spec.with_(in_spatial=(spec.out_pixels,), kernel=(1,), **one)


def product_counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does of a product."""
    lanes, vectors, parts, tile_px = picks.lanes, picks.tile_ow, picks.parallel_oc, picks.lanes * picks.tile_ow
    tiles, channel_blocks = ceildiv(spec.out_pixels, tile_px), ceildiv(spec.oc, picks.tile_oc)
    block = ceildiv(tiles, picks.parallel_oh)
    tasks = spec.n * parts * picks.parallel_oh
    own = ceildiv(tasks, target.cores)
    part = ceildiv(channel_blocks, parts) / channel_blocks
    # Tiles, and blocks of channels, of the busiest core: its blocks of tiles may be shorter.
    passes = min(own * block, spec.n * parts * tiles) * part
    work = [Work(own, cycles=BEGIN_TASK)]
    for channels, blocks in pieces(spec.oc, picks.tile_oc):
        times = passes * blocks
        near = 4 * tile_px if picks.copy_src and 4 * spec.ic * tile_px * block > target.l1 // 2 else 0
        # Stores begin beside the next tile's products.
        step = steps(times * spec.ic, channels, vectors, near=near)
        work += [step._replace(stores=channels * vectors / spec.ic), Work(times, cycles=BEGIN_TILE)]
        # Rows of dst lie in a page each: short ones of stores begin a line, and a page, anew.
        work.append(Work(times * channels / block, cycles=FAR_ROW))
    rows = spec.ic * vectors * passes / part
    if picks.copy_src:
        work.append(Work(rows, loads=1, stores=1, cycles=FAR_ROW / 4))
    else:  # rows of src, far apart, for every block of channels
        again = 2 if is_read_again(spec, target, channel_blocks * part) else 16
        work.append(Work(rows * channel_blocks * part, cycles=FAR_ROW / again))
    if not spec.is_pointwise:
        work.append(
            Work(spec.n * spec.ic * ceildiv(spec.out_pixels, lanes) / target.cores, loads=2, shuffles=2, stores=1)
        )
    share = passes / (spec.n * parts * tiles * part)
    work.append(finishing(spec, lanes, share / 2))  # other units do half of it
    weights = LATE * 4 * spec.ic * spec.oc
    return Counts(
        work, [Stream(weights / parts, weights), of_images(image_bytes(spec), share)], 1 + (not spec.is_pointwise)
    )


def product_points(spec: ConvSpec, target: Target, domains: Mapping[str, Sequence[Any]]) -> list[Picks]:
    """Points worth comparing: the tile that is fastest in as many tasks as tiles, in all tasks whose copy of src stays
    in their core's cache.
    """
    lanes, vectors, core = target.lanes, 2 if spec.out_pixels > target.lanes else 1, core_of(target)
    tiles = ceildiv(spec.out_pixels, lanes * vectors)
    base = Picks(lanes=lanes, tile_oc=1, tile_oh=1, tile_ow=vectors, parallel_oc=1, parallel_oh=tiles, copy_src=False)
    channels = [c for c in domains["tile_oc"] if c <= min(8, most_pixels(target, vectors))]
    points = [base.replace(tile_oc=c, copy_src=copies) for c in channels for copies in (False, True)]
    base = min(points, key=lambda picks: core.cycles(product_counts(spec, target, picks)))
    most = max(1, target.l2 // 2 // (4 * spec.ic * vectors * lanes))
    parts = [p for p in domains["parallel_oh"] if ceildiv(tiles, p) <= most]
    return [base.replace(parallel_oh=p, parallel_oc=c) for p in parts for c in PARTS]
