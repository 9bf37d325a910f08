"""The sizes of a convolution whose output channels lie in the vector lanes: phases, runs of products, tasks, tiles.

What walks them is :mod:`convgen.cpu.walk`; what a choice of tiles costs is in :mod:`convgen.cpu.channels`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property, lru_cache

from ..deferred import tirx
from ..hardware.target import Target
from ..lowering.compute import INTEGER, Expr, ceildiv, round_up
from ..lowering.schedule import Picks
from ..problem.spec import ConvSpec
from .images import dst_images, src_images, three
from .operation import Operation, operation_of
from .phases import Axis
from .product import LINE, Even

#: Taps of a row, or products of a run, that are too few for a loop of their own: LLVM would unroll it, and keep what
#: neighbouring taps share in registers.
SHORT_ROW = 7


class Geometry:
    """The phases of a spec along its three spatial axes (those it lacks are of size 1), and what a run of numbers is.

    Attributes:
        merge: whether the phases of a row lie in the lanes, beside the channels.
        moves: pixels of src from a pixel of a phase to the next, along each axis.
        channels: output channels of a group.
        apart: whether taps of a row are runs of their own: what they read lies apart, or channels make longer runs.
        read: src as it is read: where its numbers are converted, channels lie innermost.
        inner: channels of a run, or of a tap of one.
        numbers, run: products of the longest run, and words of them.
        runs: along the axes of the kernel and over blocks of channels.
        crop: what a row of outputs lacks at its beginning, where phases are merged.
        width: pixels of a row of a phase.
        reads: the first and the last pixel of src, along each axis, that pixel 0 of any phase meets.
        padded: whether some of what is read lies outside src.
    """

    def __init__(self, spec: ConvSpec, operation: Operation, merge: bool = False) -> None:
        self.spec, self.operation, self.merge = spec, operation, merge
        self.z, self.y, self.x = (_axis(spec, axis) for axis in range(spec.rank - 3, spec.rank))
        self.moves = three((1,) * spec.rank if spec.transposed else spec.stride)
        self.src, self.dst = src_images(spec), dst_images(spec)
        self.channels = spec.oc // spec.groups
        own, self.read = spec.ic // spec.groups, self.src
        if operation.converts and self.src.layout == "nchw":
            own = round_up(own, operation.depth)
            self.read = replace(self.src, layout="nhwc", channels=own * spec.groups)
        layout = self.read.layout
        self.apart = self.x.gap > 1 or (layout == "nhwc" and spec.groups > 1)
        self.apart |= layout == "nchw" and (spec.transposed or self.x.taps < max(own, SHORT_ROW))
        self.apart |= spec.transposed and not merge and own % operation.depth > 0
        self.inner = own if layout in ("nchw", "nhwc") else self.src.block
        if layout == "nchw" and not self.apart:
            self.inner = 1
        columns = self.x.taps if merge else self.x.kernel
        self.numbers = self.inner * (1 if self.apart else columns)
        self.run = ceildiv(self.numbers, operation.depth)
        self.runs = (self.z.kernel, self.y.kernel, columns if self.apart else 1, own // self.inner)
        self.crop = self.x.begin % self.x.stride if merge else 0
        self.width = ceildiv(self.x.out + self.crop, self.x.stride)
        last = self.x.begin // self.x.stride
        columns_read = (last - self.x.taps + 1, last) if merge else self.x.reads
        self.reads = (self.z.reads, self.y.reads, columns_read)
        ends = ((n - 1) * m + last for n, m, (_, last) in zip(self.phase_pixels, self.moves, self.reads, strict=True))
        ends_outside = any(end >= size for end, size in zip(ends, self.src.size, strict=True))
        self._rows: dict[int, Even] = {}
        self.padded = any(first < 0 for first, _ in self.reads) or ends_outside

    @cached_property
    def skips(self) -> bool:
        """Whether taps that all of a tile's rows, or its plane, meet outside of src are left out: there are such, and
        what stands for them is 0 times a whole number (of floats 0 times infinity is NaN).
        """
        biased = self.operation.biased and (self.operation.offset or self.spec.src_zero)
        if self.spec.transposed or self.operation.sums != INTEGER or biased:
            return False
        return any(_share_inside(axis, move, 1) < 1 for axis, move in self._outer)

    @property
    def _outer(self) -> tuple[tuple[Axis, int], tuple[Axis, int]]:
        """Planes and rows, and from a pixel of dst to the next."""
        return (self.z, self.moves[0]), (self.y, self.moves[1])

    def share_inside(self, tile_oh: int) -> float:
        """The share of the products that are computed where tiles have so many rows."""
        if not self.skips:
            return 1.0
        return math.prod(
            _share_inside(axis, move, size) for (axis, move), size in zip(self._outer, (1, tile_oh), strict=True)
        )

    @property
    def copied(self) -> bool:
        """Whether src must be copied: it is padded, or not read as it is stored, or past its end."""
        past = self.numbers % self.operation.depth > 0
        as_stored = self.operation.reads(self.spec) and self.read == self.src
        return self.padded or not as_stored or past

    def words(self, taps: Expr) -> Expr:
        """Of so many taps of a run."""
        depth = self.operation.depth
        return ceildiv(taps * self.inner, depth) if isinstance(taps, int) else taps * (self.inner // depth)

    @property
    def phase_pixels(self) -> tuple[int, int, int]:
        """Planes, rows and columns of a phase."""
        return self.z.pixels, self.y.pixels, self.width

    @property
    def mergeable(self) -> bool:
        """Where all phases have as many taps: no tap is a zero, which infinite pixels would make NaN."""
        return self.x.stride > 1 and self.x.dilation == 1 and self.x.kernel % self.x.stride == 0

    @property
    def buffered(self) -> bool:
        """Whether sums wait in a buffer of output rows until all phases of a row are there."""
        return self.merge or (self.spec.transposed and self.dst.layout == "nchw")

    @property
    def products(self) -> int:
        """Words of a block of weights: of an output, where there is one phase."""
        return math.prod(self.runs) * self.run

    @property
    def loops(self) -> int:
        """Loops of a tile's products: one for each run, or where runs are short one for all."""
        return math.prod(self.runs) if self.run >= SHORT_ROW else 1

    def fetches_images(self, picks: Picks, l2: float) -> bool:
        """Whether the next image is fetched into the L2 cache while one is worked on: of many images that come from
        beyond it two fit in, beside the weights of a part, and each step reads from another row of NCHW, of which the
        processor fetches little ahead. Where several blocks of channels read an image, more of the cache is left: what
        is fetched must not displace it.
        """
        src, weights = self.spec.bytes["src"], self.spec.bytes["weights"] // picks.parallel_oc
        image, once = src // self.spec.n, self.blocks(picks) <= picks.parallel_oc
        fits = weights + 2 * image <= l2 and (once or image <= l2 // 4)
        return self._is_product_of_rows and not picks.copy_src and self.read.layout == "nchw" and fits and src > l2

    def fetches_rows(self, l2: float) -> bool:
        """Whether what a tile writes is fetched while its products are summed: rows of NCHW beyond the L2 cache."""
        return self._is_product_of_rows and self.dst.layout == "nchw" and self.spec.bytes["dst"] > l2

    @property
    def _is_product_of_rows(self) -> bool:
        """Whether it is a product of matrices for each of several images, of numbers read as they are stored."""
        spec = self.spec
        return spec.n > 1 and spec.has_unit_kernel and not (spec.transposed or self.padded or self.operation.converts)

    def blocks(self, picks: Picks) -> int:
        """Blocks of channels of all groups, none of which shares one with another; merged phases: the groups."""
        return self.spec.groups * (1 if self.merge else ceildiv(self.channels, picks.tile_oc))

    def parts(self, picks: Picks) -> int:
        """Blocks of lanes of a block of channels: more than one only where phases are merged."""
        return ceildiv(self.channels * self.x.stride, picks.tile_oc) if self.merge else 1

    def row(self, tile_ow: int) -> Even:
        """A row of a phase in tiles. (A default compares hundreds of cuts of one row.)"""
        found = self._rows.get(tile_ow)
        if found is None:
            found = self._rows[tile_ow] = Even(self.width, tile_ow)
        return found

    def blockable(self, tile_oh: int, tile_ow: int) -> int:
        """What a task takes a block of: rows of tiles; in 1-D, tiles."""
        return ceildiv(self.y.pixels, tile_oh) if self.spec.rank > 1 else self.row(tile_ow).count

    def task(self, picks: Picks) -> tuple[int, int]:
        """Rows of tiles of a task, and tiles of each."""
        tiles = self.row(picks.tile_ow).count
        return (picks.block, tiles) if self.spec.rank > 1 else (1, min(picks.block, tiles))

    def pixels(self, picks: Picks) -> int:
        """Pixels of a row of a task, in each phase."""
        return min(self.task(picks)[1] * self.row(picks.tile_ow).full, self.width)

    def extent(self, picks: Picks) -> list[int]:
        """Planes, rows and columns that a task reads."""
        lines = min(self.task(picks)[0] * picks.tile_oh, self.y.pixels)
        pixels = (1, lines, self.pixels(picks))
        return [(n - 1) * m + b - a + 1 for n, m, (a, b) in zip(pixels, self.moves, self.reads, strict=True)]

    def crowds(self, target: Target, pixels: int) -> bool:
        """Whether so many pixels of a tile are more, in src or in dst, than there is room for in the sets of the L1
        cache that they lie in, as they are a power of two apart.
        """
        src, dst = self.operation.bytes * self.read.block * self.moves[2], 4 * self.dst.block
        return any(pixels > target.places(apart) for apart in (src, dst))

    def far_bytes(self, target: Target, picks: Picks, height: int, width: int) -> int:
        """Of the cache lines that a step of a tile reads, if all of these come from the L2 cache: those of NCHW where
        each step reads another channel, and all channels' do not fit into the L1 cache.
        """
        row = 4 * ((width - 1) * self.moves[2] + LINE)
        if self.read.layout != "nchw" or not self.apart or self.inner * height * row <= target.l1 // 2:
            return 0
        if picks.copy_src:  # rows of all channels side by side
            row = min(row, 4 * round_up(self.extent(picks)[2], target.lanes))
        return height * row


def taps_inside(axis: Axis, move: int, first: Expr, last: Expr) -> tuple[Expr, Expr]:
    """The first tap that some pixel of dst from ``first`` to ``last`` meets inside of src, and the one after the last.

    Args:
        axis: forward: its first tap meets ``axis.reads[0]`` for pixel 0.
        move: pixels of src from a pixel of dst to the next.
    """
    begin, gap = axis.reads[0], axis.gap

    def taps(pixels: Expr) -> Expr:
        """Taps that lie within so many pixels of src, none where it is less than 0."""
        if isinstance(pixels, int):
            return min(axis.taps, ceildiv(max(0, pixels), gap))
        return tirx.min(axis.taps, (tirx.max(0, pixels) + (gap - 1)) // gap)

    return taps(-begin - last * move), taps(axis.size - begin - first * move)


@lru_cache(maxsize=1024)
def _share_inside(axis: Axis, move: int, pixels: int) -> float:
    """The share of taps that remains where so many pixels are computed together."""
    starts = range(0, axis.pixels, pixels)
    found = [taps_inside(axis, move, first, min(first + pixels, axis.pixels) - 1) for first in starts]
    computed = sum(max(0, int(end) - int(first)) for first, end in found)
    return computed / (axis.taps * len(starts))


@lru_cache(maxsize=1024)
def geometry_of(spec: ConvSpec, target: Target, merge: bool = False) -> Geometry:
    return Geometry(spec, operation_of(spec, target), merge)


def _axis(spec: ConvSpec, axis: int) -> Axis:
    """An axis of a spec, a negative one an axis that it lacks. A forward one reads what a transposed one at stride 1
    does, with its taps the other way round.
    """
    if axis < 0 or spec.transposed:
        return Axis.of(spec, axis)
    kernel, dilation = spec.kernel[axis], spec.dilation[axis]
    begin = (kernel - 1) * dilation - spec.padding[axis][0]
    return Axis(spec.in_spatial[axis], spec.out_spatial[axis], kernel, 1, dilation, begin)
