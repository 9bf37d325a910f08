"""Convolution with pixels in the vector lanes: NCHW rows in registers, masks instead of padding.

Applies to  NCHW convolutions of any rank that are not transposed: 1×1 products with at least a vector of pixels, and
            those with few channels per group: depthwise with any multiplier, grouped, and dense layers with few
            products per output (stems).
Strategy    1. Pack weights as [group][oc/t][rows of the kernel][ic][k][t]: in the order they are used.
            2. A vector is `lanes` neighbouring output pixels of a row. Keep a tile of `tile_oc` channels × `tile_oh`
               rows × `tile_ow` vectors in registers. Nothing is copied: input rows are loaded where they lie, those
               above and below the image are left out, and edges are masked (code of their own).
            3. Loop over the input rows, then over the group's input channels. What a row's taps read is loaded once
               and used by all rows and channels of the tile; weights are broadcast.
            4. Where there is a stride, as many vectors are loaded and shuffled apart by phase.
            5. One parallel loop over batch × groups × `parallel_oc` parts of the channels × `parallel_oh` parts of the
               rows of tiles (in 1-D of the tiles). A task's outer loop is that over tiles of channels, so that a
               channel's stores follow each other: planes of dst lie far apart.
            6. A 1×1 product is over flat pixels; of a strided one, over a copy of those it reads. `copy_src`: a task's
               pixels are first copied to [tile][ic][pixel], where many tiles of channels read them again: rows lie far
               apart, each in a page of its own.
Why not     a padded copy: for small planes the copying costs more than the arithmetic. Channels in the lanes
            (cpu_direct): better with many channels, or few pixels.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from convgen.cpu.lanes import MOST_TAPS, Pixels, RowProduct, columns_of, pack_rows, subsampled
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, FAR_ROW, finishing, most_pixels, pieces, steps
from convgen.cpu.vector import Block, written
from convgen.cpu.window import copies, is_short, output_rows, readers
from convgen.deferred import tirx
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, unflat
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.dtypes import RANGES
from convgen.problem.spec import ConvSpec

#: Multiply-adds written out in all tiles together, in any and in the default; more take long to compile.
MOST_UNROLLED, MOST_DEFAULT = 2048, 1024
#: Vectors of pixels in a tile of the default: more leave no registers for what they read.
ROW_SUMS = 16
#: Taps from which products, and not memory, take a 1-D depthwise layer's time. With fewer, half as wide vectors are
#: faster: half as many lie in two lines of the cache.
LONG = 8
#: Cycles of an input row of a tile: each lies at another place in memory.
ROW = 2
#: How much longer weights take that nothing but the processor fetches ahead, which stops at each page.
LATE = 3
#: Parts of the channels of a product.
PARTS = (1, 2, 3, 4, 8)


class CpuRows(Written):
    id, version = "cpu_rows", 5
    merged = ("cpu_masked", "cpu_gemm")

    def takes_integers(self, spec: ConvSpec) -> bool:
        """Sums are of numbers as they are stored; stored in 8 bits, as they become i32 on the way to these alone."""
        return not spec.src_zero and not spec.weights_zero and spec.dst_dtype in RANGES

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        if _is_product(spec, target):
            return
        few = spec.oc // spec.groups <= 32 or spec.reduction_length <= 160
        why = f"needs a 1×1 kernel and {target.lanes} pixels, 32 output channels per group, or 160 products per output"
        require(few, why)
        most = 8 if spec.oc // spec.groups <= 4 else 4  # more shuffles than cpu_direct has broadcasts
        require(spec.stride[-1] <= most, f"needs a stride along the row of at most {most}")
        long = spec.kernel[-1] > MOST_TAPS
        require(not long or spec.stride[-1] == 1, f"needs at most {MOST_TAPS} taps along the row, or stride 1")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        inner, per_group = _flat(spec, target), spec.oc // spec.groups
        rows, width = math.prod(inner.out_spatial[:-1]), inner.out_spatial[-1]
        lanes = [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * width)]
        tall = inner.rank > 1 and inner.dilation[-2] == 1
        tile_oc = [c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 14, 16) if c <= per_group]
        tile_ow = [v for v in (1, 2, 3, 4, 6) if v == 1 or lanes[0] * (v - 1) < width]
        parts = {1 << i for i in range(10) if 1 << i <= (rows if inner.rank > 1 else ceildiv(width, lanes[0]))}
        if inner.rank == 1:  # each tile a task, too
            parts |= {ceildiv(width, n * v) for n in lanes for v in tile_ow}
        return Space(
            lanes=lanes,
            tile_oc=tile_oc,
            tile_oh=[h for h in (1, 2, 3, 4, 5, 6, 7, 8) if h == 1 or (tall and h <= inner.out_spatial[-2])],
            tile_ow=tile_ow,
            parallel_oc=sorted({*(p for p in PARTS if p <= per_group), *(ceildiv(per_group, c) for c in tile_oc)}),
            parallel_oh=sorted(parts),
            copy_src=[False, True] if _is_product(spec, target) else [False],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        inner, sums = _flat(spec, target), picks.tile_oc * picks.tile_oh * picks.tile_ow
        # Beside the sums: what they read, and a weight, or two where products follow each other less closely.
        used = sums + picks.tile_ow * inner.stride[-1] + (1 if _is_product(spec, target) else 2)
        require(sums == 1 or used <= target.vector_registers, f"{used} vectors, {target.vector_registers} registers")
        require(picks.lanes * (picks.tile_ow - 1) < inner.out_spatial[-1], "tile_ow exceeds the row")
        require(picks.parallel_oc <= ceildiv(spec.oc // spec.groups, picks.tile_oc), "fewer tiles than parallel_oc")
        require(picks.parallel_oh <= _tiles(inner, picks), "fewer tiles of pixels than parallel_oh")
        unrolled = _unrolled(inner, picks)
        require(unrolled <= MOST_UNROLLED or sums == 1, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default_product(self, spec, target) if _is_product(spec, target) else _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        counts = _counts_product if _is_product(spec, target) else _counts
        return core_of(target).seconds(counts(spec, target, self.default(spec, target)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        def statement(
            src: tirx.Buffer, residual: tirx.Buffer, parameters: dict[str, tirx.Buffer], dst: tirx.Buffer
        ) -> tirx.Stmt:
            inner = _flat(spec, target)
            columns = columns_of(inner, picks.lanes, picks.tile_ow)
            product = RowProduct(inner, columns, picks.tile_oc, src, residual, parameters, dst, spec.dtypes["src"])
            return _statement(spec, picks, product)

        ops = Operands(spec)
        return written(ops, pack_rows(ops, picks.tile_oc), statement)


def _is_product(spec: ConvSpec, target: Target) -> bool:
    """Whether it is a matrix product of flat pixels, which fill a vector."""
    return spec.has_unit_kernel and spec.groups == 1 and spec.out_pixels >= target.lanes and spec.stride[-1] <= 8


@lru_cache(maxsize=256)
def _flat(spec: ConvSpec, target: Target) -> ConvSpec:
    """What is computed: of a strided product, that over the pixels it reads."""
    if spec.is_pointwise or not _is_product(spec, target):
        return spec
    one = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    return spec.with_(in_spatial=(spec.out_pixels,), kernel=(1,), **one)


def _tiles(spec: ConvSpec, picks: Picks) -> int:
    """Rows of tiles of an image; in 1-D, tiles."""
    if spec.rank == 1:
        return columns_of(spec, picks.lanes, picks.tile_ow).count
    *front, lines = spec.out_spatial[:-1]
    return math.prod(front) * ceildiv(lines, picks.tile_oh)


# ---- the default --------------------------------------------------------------------------------


def _unrolled(spec: ConvSpec, picks: Picks) -> int:
    """Multiply-adds that are written out."""
    taps = spec.kernel[-1] if spec.kernel[-1] <= MOST_TAPS else 1
    tiles = len(columns_of(spec, picks.lanes, picks.tile_ow).runs) if taps > 1 or any(spec.padding[-1]) else 2
    sizes = pieces((1, *spec.out_spatial)[-2], picks.tile_oh)
    down = sum(rows for height, _ in sizes for _, rows in readers(spec, spec.rank - 1, height))
    channels = picks.tile_oc + spec.oc // spec.groups % picks.tile_oc
    return int(channels * down * picks.tile_ow * tiles * taps) * copies(spec, spec.rank - 1)


@lru_cache(maxsize=1024)
def _default(schedule: CpuRows, spec: ConvSpec, target: Target) -> Picks:
    space, core = schedule.space(spec, target).domains, core_of(target)
    small = Picks(**{name: min(values) for name, values in space.items()})
    most, widths, per_group = target.vector_registers - 2, space["lanes"][-2:], spec.oc // spec.groups
    apart, row_sums = (2 * spec.stride[-1], 8) if spec.stride[-1] > 1 else (1, ROW_SUMS)
    if spec.rank == 1 and spec.ic == spec.groups == spec.oc and spec.kernel[-1] < LONG:
        widths, row_sums = widths[:1], 4
    points = [
        small.replace(lanes=n, tile_oc=c, tile_oh=h, tile_ow=v, parallel_oc=ceildiv(per_group, c))
        for n in widths
        for c in space["tile_oc"]
        for h in space["tile_oh"]
        for v in space["tile_ow"]
        if c * h * v + v * apart <= most and h * v <= row_sums
    ]
    points.sort(key=lambda p: core.cycles(Counts(_counts(spec, target, p).work)))
    good = (p for p in points if _unrolled(spec, p) <= MOST_DEFAULT and not schedule.reason_against(spec, target, p))
    picks = next(good, small.replace(parallel_oc=per_group))
    tasks = spec.n * spec.groups * picks.parallel_oc
    splits = [p for p in space["parallel_oh"] if p <= _tiles(spec, picks)]
    return picks.replace(parallel_oh=next((p for p in splits if tasks * p >= 4 * target.cores), splits[-1]))


@lru_cache(maxsize=1024)
def _default_product(schedule: CpuRows, spec: ConvSpec, target: Target) -> Picks:
    lanes, core, space = target.lanes, core_of(target), schedule.space(spec, target).domains
    vectors = 2 if spec.out_pixels > lanes else 1
    channels = [c for c in space["tile_oc"] if c <= min(8, most_pixels(target, vectors))]
    tiles = ceildiv(spec.out_pixels, lanes * vectors)
    base = Picks(lanes=lanes, tile_oc=1, tile_oh=1, tile_ow=vectors, parallel_oc=1, parallel_oh=tiles, copy_src=False)

    def cycles(picks: Picks) -> float:
        return core.cycles(_counts_product(spec, target, picks))

    base = min((base.replace(tile_oc=c, copy_src=copy) for c in channels for copy in (False, True)), key=cycles)
    # What a task copies has to stay in its core's cache.
    most = max(1, target.l2 // 2 // (4 * spec.ic * vectors * lanes))
    parts = [p for p in space["parallel_oh"] if ceildiv(tiles, p) <= most]
    points = [base.replace(parallel_oh=p, parallel_oc=c) for p in parts for c in PARTS]
    return min((p for p in points if schedule.reason_against(spec, target, p) is None), key=cycles)


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    per_group, taps, stride, lanes = spec.oc // spec.groups, spec.kernel[-1], spec.stride[-1], picks.lanes
    channels, groups = ceildiv(per_group, picks.tile_oc), ceildiv(spec.window[-1], stride)
    tasks = spec.n * spec.groups * picks.parallel_oc * picks.parallel_oh
    share = ceildiv(tasks, target.cores) / tasks
    planes, depth = math.prod(spec.kernel[:-2]), spec.ic // spec.groups
    passes = planes * depth
    vectors = ceildiv(spec.out_spatial[-1], lanes)
    columns = ceildiv(vectors, picks.tile_ow)
    wide = vectors / columns
    # Most vectors of neighbouring pixels lie in two lines of the cache.
    read, shuffled = taps * (1 + lanes / target.lanes), 0.0
    if stride > 1:
        shuffled = taps * max(1.0, math.log2(stride))
        # Indices of more than a few shuffles are read, too.
        read = groups * stride * (1 + lanes / target.lanes) + (shuffled if stride > 2 else 0)
    work = []
    for height, lines in pieces((1, *spec.out_spatial)[-2], picks.tile_oh):
        rows = readers(spec, spec.rank - 1, height)
        times = spec.n * spec.groups * channels * math.prod(spec.out_spatial[:-2]) * lines * columns * share
        uses, inputs = sum(count * served for count, served in rows), sum(count for count, _ in rows)
        oc = per_group / channels
        sums = oc * height * wide
        # Runs of a loop: over rows with the same readers, or over channels, each of which lies in another page.
        loops = passes * len(rows) if depth > 1 else planes * sum(count > 1 for count, _ in rows)
        # Where all rows of a single channel are written out, they share the weights that they read.
        short = spec.ic == spec.groups and spec.rank > 1 and is_short(spec, spec.rank - 2)
        weights = spec.kernel[-2] if short else uses
        alone = bool(loops) and not short  # else tiles overlap
        work.append(
            Work(
                times,
                fmas=passes * oc * uses * wide * taps,
                loads=passes * (inputs * read * wide + weights * taps * oc),
                shuffles=passes * inputs * shuffled * wide,
                stores=sums,
                chain=passes * taps * uses / height if alone else 0,
                cycles=BEGIN_TILE * alone + BEGIN_RUN * loops + ROW * passes * inputs * (spec.rank > 1),
            )
        )
    # Beside products there are units for half of it.
    work.append(finishing(spec, picks.lanes, share if alone else share / 2))
    images, own_src = sum(spec.bytes[name] for name in ("src", "dst")), spec.bytes["src"] / (spec.n * spec.groups)
    again = (channels - 1) * spec.bytes["src"] if own_src > target.l1 else 0  # by every tile of channels
    streams = [
        Stream(spec.bytes["weights"] * share, weights=True),
        Stream(images * share, ahead=True, footprint=images),
        Stream(again * share, ahead=True, footprint=own_src),
    ]
    return Counts(work, streams)


def _counts_product(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does of a product."""
    lanes, vectors, parts, tile_px = picks.lanes, picks.tile_ow, picks.parallel_oc, picks.lanes * picks.tile_ow
    tiles, (full, rest) = ceildiv(spec.out_pixels, tile_px), divmod(spec.oc, picks.tile_oc)
    block, channel_blocks = ceildiv(tiles, picks.parallel_oh), full + (rest > 0)
    tasks = spec.n * parts * picks.parallel_oh
    own = ceildiv(tasks, target.cores)
    part = ceildiv(channel_blocks, parts) / channel_blocks
    # Tiles, and blocks of channels, of the busiest core: its blocks of tiles may be shorter.
    passes = min(own * block, spec.n * parts * tiles) * part
    work = [Work(own, cycles=BEGIN_TASK)]
    for channels, blocks in ((picks.tile_oc, full), (rest, 1)):
        if not (channels and blocks):
            continue
        times = passes * blocks
        near = 4 * tile_px if picks.copy_src and 4 * spec.ic * tile_px * block > target.l1 // 2 else 0
        # Stores begin beside the next tile's products.
        step = steps(times * spec.ic, channels, vectors, near=near)
        work += [replace(step, stores=channels * vectors / spec.ic), Work(times, cycles=BEGIN_TILE)]
        # Rows of dst lie in a page each: short ones of stores begin a line, and a page, anew.
        work.append(Work(times * channels / block, cycles=FAR_ROW))
    rows = spec.ic * vectors * passes / part
    if picks.copy_src:
        work.append(Work(rows, loads=1, stores=1, cycles=FAR_ROW / 4))
    else:  # rows of src, far apart, for every block of channels
        again = 2 if _is_read_again(spec, target, channel_blocks * part) else 16
        work.append(Work(rows * channel_blocks * part, cycles=FAR_ROW / again))
    if not spec.is_pointwise:
        work.append(
            Work(spec.n * spec.ic * ceildiv(spec.out_pixels, lanes) / target.cores, loads=2, shuffles=2, stores=1)
        )
    share = passes / (spec.n * parts * tiles * part)
    work.append(finishing(spec, lanes, share / 2))  # likewise: other units do half of it
    images = spec.bytes["src"] + (2 + spec.residual) * spec.bytes["dst"]
    streams = [
        Stream(LATE * 4 * spec.ic * spec.oc / parts, weights=True),
        Stream(images * share, ahead=True, footprint=images),
    ]
    return Counts(work, streams, 1 + (not spec.is_pointwise))


def _is_read_again(spec: ConvSpec, target: Target, blocks: float) -> bool:
    """Whether several blocks of channels read images that follow each other, each a large part of the L2 cache: rows
    then come from beyond it each time, a few lines of each.
    """
    return blocks > 1 and spec.n > 1 and spec.bytes["src"] // spec.n > target.l2 // 4


# ---- the kernel -----------------------------------------------------------------------------------


def _statement(spec: ConvSpec, picks: Picks, product: RowProduct) -> tirx.Stmt:
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
    tiles, blocks = _tiles(spec, picks), ceildiv(spec.oc // spec.groups, picks.tile_oc)
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
