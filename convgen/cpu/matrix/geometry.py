"""A convolution as products of matrix tiles: which pixels are rows of tiles, and which channels of taps are columns.

A group of output rows is one sequence of pixels: from one row to the next some lie between that no output needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from ...deferred import tirx
from ...lowering.compute import ACCUMULATOR, INTEGER, Expr, ceildiv, round_up, unflat
from ...problem.dtypes import BYTES
from ...problem.spec import ConvSpec
from .. import bf16
from ..images import dst_images, src_images, three
from .panel import LANES, Panel
from .tiles import ROW_BYTES, ROWS

#: Pixels and channels of four tiles of sums, which are kept at once.
PIXELS, CHANNELS = 2 * ROWS, 2 * LANES


def operands_of(spec: ConvSpec) -> tuple[str, str]:
    """The types of pixels and weights that tiles of a layer have."""
    return (spec.src_dtype, spec.weights_dtype) if spec.is_quantised else ("bf16", "bf16")


class Geometry:
    """The sizes of a layer; spatial axes are three, those it lacks are of size 1.

    Attributes:
        copies: whether tasks copy what they read.
        operands: the types of what is multiplied: of pixels and of weights.
        operand, size, depth: the first of them, its bytes, and numbers of it in four bytes.
        channels: of a pixel that is read, with padding where it is copied.
        run: columns of a tile, as many for all steps.
        merged: whether the taps of a row are one run of channels.
        taps: steps: planes, rows and columns of the kernel, and runs of channels; one column where taps are merged.
        units: what is cut into groups: output rows, in 1-D output pixels.
        is_possible: whether src can be read where it lies, if it is not copied, by groups of pixels that fill a tile.
    """

    def __init__(self, spec: ConvSpec, copies: bool) -> None:
        self.spec, self.copies = spec, copies
        self.operands = operands_of(spec)
        self.operand = self.operands[0]
        self.size, self.depth = BYTES[self.operand], 4 // BYTES[self.operand]
        self.kernel, self.stride, self.dilation = map(three, (spec.kernel, spec.stride, spec.dilation))
        self.begin = three([begin for begin, _ in spec.padding], 0)
        self.src, self.dst, self.out = src_images(spec), dst_images(spec), three(spec.out_spatial)
        self.units = self.out[1] if spec.rank > 1 else self.out[2]
        self.channels, self.run, runs, self.merged = self._reduction()
        self.taps = (*self.kernel[:2], 1 if self.merged else self.kernel[2], runs)
        ends = [
            (n - 1) * s + (k - 1) * d - b < size
            for n, s, k, d, b, size in zip(
                self.out, self.stride, self.kernel, self.dilation, self.begin, self.src.size, strict=True
            )
        ]
        is_padded = any(self.begin) or not all(ends)
        is_ready = spec.layout == "nhwc" and spec.src_dtype == self.operand and self.run % self.depth == 0
        self.is_possible = copies or (is_ready and not is_padded)

    def _reduction(self) -> tuple[int, int, int, bool]:
        """Channels of a pixel, columns of a tile, runs of them, and whether taps are merged.

        Rows of tiles begin at multiples of their length, so that they cross no line of the cache.
        """
        most, ic, kx = ROW_BYTES // self.size, self.spec.ic, self.kernel[2]
        if not self.copies:
            run = math.gcd(ic, most)
            return ic, run, ic // run, False
        channels = max(self.depth, 1 << (ic - 1).bit_length()) if ic < most else round_up(ic, most)
        merged = kx > 1 and self.dilation[2] == 1 and ceildiv(kx * channels, most) < kx
        if merged:
            return channels, most, ceildiv(kx * channels, most), True
        return channels, min(channels, most), ceildiv(channels, most), False

    @property
    def steps(self) -> int:
        """Products of a tile of sums."""
        return math.prod(self.taps)

    @property
    def pixel(self) -> int:
        """Numbers from what an output pixel reads to what the next one reads."""
        return self.taps[3] * self.run if self.merged else self.stride[2] * self.channels

    @property
    def needed(self) -> int:
        """Pixels that a row of outputs reads."""
        return self._reach(self.out[2])

    def _reach(self, outputs: int) -> int:
        """Pixels of a row that so many outputs read."""
        return (outputs - 1) * self.stride[2] + (self.kernel[2] - 1) * self.dilation[2] + 1

    @property
    def shared(self) -> int:
        """Pixels of a row's right padding that are the next one's left padding."""
        if self.spec.rank == 1 or self.merged:
            return 0
        return min(self.begin[2], max(0, self.needed - self.begin[2] - self.src.size[2]))

    @property
    def columns(self) -> int:
        """Pixels from a row that is read to the next."""
        if not self.copies:
            return self.src.size[2]
        if self.merged:
            return self.needed
        return round_up(max(self.needed - self.shared, self.stride[2] * self.out[2]), self.stride[2])

    @property
    def pitch(self) -> int:
        """Pixels of a group's sequence from one output row to the next."""
        return self.out[2] if self.merged else ceildiv(self.columns, self.stride[2])

    @property
    def continues(self) -> bool:
        """Whether a group may have several units."""
        return self.copies or self.spec.rank == 1 or (self.stride[1] == 1 and self.columns % self.stride[2] == 0)

    def pixels(self, units: int) -> int:
        """Of a group's sequence."""
        return units if self.spec.rank == 1 else (units - 1) * self.pitch + self.out[2]

    def tiles(self, units: int) -> tuple[int, tuple[int, ...]]:
        """A group's pixels as pairs of tiles, and where the tiles of the last pair begin that is not whole, if there
        is such: where src is not copied, none goes past the group's end.
        """
        pixels = self.pixels(units)
        pairs, rest = divmod(pixels, 2 * ROWS)
        starts = tuple(range(pixels - rest, pixels, ROWS))
        return pairs, starts if self.copies else (*starts[:-1], *(pixels - ROWS for _ in starts[-1:]))

    def extent(self, units: int) -> tuple[int, int]:
        """Output rows of a group, and pixels of each."""
        return (1, units) if self.spec.rank == 1 else (units, self.out[2])

    def axes(self, unit: Expr) -> tuple[Expr, Expr]:
        """The output row and pixel where a unit begins."""
        return (0, unit) if self.spec.rank == 1 else (unit, 0)

    def corner(self, plane: Expr, unit: Expr) -> tuple[Expr, Expr, Expr]:
        """The first pixel of src that a task reads from an output plane and unit on."""
        at = (plane, *self.axes(unit))
        z, y, x = (
            0 - b if isinstance(i, int) else i * s - b for i, s, b in zip(at, self.stride, self.begin, strict=True)
        )
        return z, y, x

    def panel(self, units: int) -> Panel:
        """The copy of what so many units read."""
        rows, outputs = self.extent(units)
        columns = self._reach(units) if self.spec.rank == 1 else self.columns
        shift = (self.kernel[1] - 1) * self.dilation[1] // self.stride[1]
        return Panel(
            images=self.src,
            dtype=self.spec.src_dtype,
            operand=self.operand,
            size=self.size,
            channels=self.channels,
            planes=self.kernel[0],
            plane_step=self.dilation[0],
            phases=self.phases,
            stride=self.stride[1],
            lines=rows + shift,
            columns=columns,
            taps=self.kernel[2] if self.merged else 1,
            step=self.stride[2],
            width=outputs if self.merged else columns,
            pixel=self.pixel if self.merged else self.channels,
        )

    @property
    def phases(self) -> tuple[int, ...]:
        """Rows modulo the stride that are read, in the order of the taps that first read them."""
        return tuple(dict.fromkeys(tap * self.dilation[1] % self.stride[1] for tap in range(self.kernel[1])))

    def line(self, tap: Expr) -> tuple[Expr, Expr]:
        """The phase of the rows that a tap reads, and the row that it reads for the first output row."""
        if self.stride[1] == 1:
            return 0, tap * self.dilation[1]
        return tap % len(self.phases), tap * self.dilation[1] // self.stride[1]

    def element(self, step: Expr, k: Expr) -> tuple[Sequence[Expr], Expr]:
        """The tap and the channel of column ``k`` of a step; where there are no such, one of them is too large."""
        *taps, block = unflat(step, self.taps)
        number = block * self.run + k
        if not self.merged:
            return taps, number
        return [*taps[:2], tirx.floordiv(number, self.channels)], tirx.floormod(number, self.channels)

    def group_bytes(self, units: int) -> int:
        """What a group of pixels reads."""
        panel = self.panel(units)
        return panel.planes * len(panel.phases) * panel.lines * panel.row * self.size

    @property
    def sums(self) -> str:
        """TVM's type of sums."""
        return INTEGER if self.spec.is_quantised else ACCUMULATOR

    @property
    def transposes(self) -> bool:
        """Whether vectors of channels become vectors of pixels."""
        return self.dst.layout == "nchw"

    def narrowed(self, value: Expr, dtype: str, lanes: int) -> Expr:
        """f32 as dst is stored."""
        return bf16.narrowed(value, dtype, lanes)


@lru_cache(maxsize=1024)
def geometry_of(spec: ConvSpec, copies: bool) -> Geometry:
    return Geometry(spec, copies)
