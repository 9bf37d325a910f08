"""A task's copy of the rows that it reads, as operands of matrix tiles: padded, channels innermost, of the tiles' type.

Rows that are a stride apart follow one another: output rows then read rows that are neighbours, and a tile may go on
from one row to the next. A row of a tile that crosses a line of the cache takes six times as long to load: rows begin
where they do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...deferred import tirx
from ...lowering.compute import STORAGE, Expr, ceildiv, narrow, widen
from .. import bf16
from ..images import Images
from ..vector import Block, interleave, load, load_stored, load_within, store_stored, zeros

#: Lanes of a vector of f32, and bytes of any vector.
LANES, VECTOR = 16, 64


@dataclass(frozen=True)
class Panel:
    """The shape of a copy, and where an image's rows come from.

    Attributes:
        images, dtype: how src lies, and what it is stored as.
        operand, size: what the copy is stored as, and bytes of an element.
        channels: of a pixel, with zeros past those there are.
        planes, plane_step: planes, and how far they are apart in src.
        phases: which rows modulo ``stride`` are read.
        stride, lines: rows of src from one row of a phase to the next; rows of each phase.
        columns: pixels of a row.
        taps: where pixels have few channels, the copy has for each output all that a row of the kernel reads, so many
            pixels. Else one pixel.
        step: pixels from what an output reads to what the next one reads.
        width: columns of the copy: pixels, or outputs.
        pixel: numbers from one of them to the next.
    """

    images: Images
    dtype: str
    operand: str
    size: int
    channels: int
    planes: int
    plane_step: int
    phases: tuple[int, ...]
    stride: int
    lines: int
    columns: int
    taps: int
    step: int
    width: int
    pixel: int

    @property
    def row(self) -> int:
        """Numbers of a row."""
        return self.width * self.pixel

    @property
    def numbers(self) -> int:
        """Of the whole copy; a row's last vectors may reach past it."""
        return self.planes * len(self.phases) * self.lines * self.row + self._beyond

    @property
    def _beyond(self) -> int:
        """What the last pair of tiles reads, whose rows are outputs, or a row's last vectors write, past the end."""
        return 2 * LANES * max(VECTOR // self.size, self.pixel, self.step * self.channels)

    @property
    def vectors(self) -> int:
        """Vectors that are stored."""
        return self.planes * len(self.phases) * self.lines * ceildiv(self.row, self._unit)

    @property
    def pixels(self) -> int:
        """Pixels that are copied."""
        return self.planes * len(self.phases) * self.lines * self.columns

    def start(self, plane: Expr, phase: Expr, line: Expr) -> Expr:
        """Where a row begins."""
        return ((plane * len(self.phases) + phase) * self.lines + line) * self.row

    def copied(self, body: Block, src: Any, image: Expr, corner: tuple[Expr, Expr, Expr], rest: int, fill: Expr) -> Any:
        """The copy, from the pixel ``corner`` on, which may lie outside the image; there it is ``fill``, an operand, as
        are ``rest`` pixels after the last row.
        """
        edge = tirx.Broadcast(fill, VECTOR // self.size)
        panel = body.buffer((self.numbers,), STORAGE[self.operand], addressed=True)
        row = None
        if self.taps > 1:
            row = body.buffer((self.columns * self.channels + self._beyond,), STORAGE[self.operand])
        z0, y0, x0 = corner
        with body.loop(self.planes) as (plane, iz):
            z = plane.let(z0 + iz * self.plane_step)
            for number, phase in enumerate(self.phases):
                with plane.loop(self.lines) as (line, iy):
                    y = line.let(y0 + iy * self.stride + phase)
                    start = line.let(self.start(iz, number, iy))
                    checks = ((z, self.images.size[0]), (y, self.images.size[1]))
                    inside = tirx.all(*(c for i, size in checks for c in (i >= 0, i < size)))
                    with line.when(inside) as some:
                        copy, at = (panel, start) if self.taps == 1 else (row, 0)
                        self._row(some, src, (image, z, y, x0), copy, at, edge)
                        if self.taps > 1:
                            self._spread(some, row, panel, start)
                    with line.when(tirx.Not(inside)) as none:
                        self._clear(none, panel, start, self.row, edge)
        if rest:
            self._clear(body, panel, self.start(self.planes, 0, 0), rest * self.channels, edge)
        return panel

    def _spread(self, body: Block, row: Any, panel: Any, start: Expr) -> None:
        """What each output reads of a row."""
        unit, length = VECTOR // self.size, self.taps * self.channels
        with body.loop(self.width) as (step, i):
            for first in range(0, length, unit):
                at = step.let(i * (self.step * self.channels) + first)
                value = load_stored(row, self.operand, [at], unit, length - first)
                step.add(self._stored(panel, start + i * self.pixel + first, value, unit))

    @property
    def _unit(self) -> int:
        """Numbers that are copied at once."""
        return VECTOR // self.size if self.dtype == self.operand and self.images.layout != "nchw" else LANES

    def _clear(self, body: Block, panel: Any, start: Expr, count: int, edge: Expr) -> None:
        """At least so many numbers of the edge; what they overwrite is written afterwards, or lies past the end."""
        unit = VECTOR // self.size
        with body.loop(ceildiv(count, unit)) as (step, i):
            step.add(store_stored(panel, self.operand, [start + i * unit], edge, unit, unit))

    def _row(
        self, body: Block, src: Any, place: tuple[Expr, Expr, Expr, Expr], panel: Any, start: Expr, edge: Expr
    ) -> None:
        """A row of the image, from a column on."""
        x0 = place[3]
        if self.images.layout == "nchw":
            self._turned(body, src, place, panel, start, edge)
        elif isinstance(x0, int):
            before, after = max(-x0, 0), max(x0 + self.columns - self.images.size[2], 0)
            width = self.columns - before - after
            self._clear(body, panel, start, before * self.channels, edge)
            self._pixels(body, src, (*place[:3], max(x0, 0)), width, panel, start + before * self.channels)
            self._clear(body, panel, start + (before + width) * self.channels, after * self.channels, edge)
        else:
            inside = tirx.all(x0 >= 0, x0 + self.columns <= self.images.size[2])
            with body.when(inside) as some:
                self._pixels(some, src, place, self.columns, panel, start)
            with body.when(tirx.Not(inside)) as partly, partly.loop(self.columns) as (pixel, i):
                x, at = pixel.let(x0 + i), pixel.let(start + i * self.channels)
                exists = tirx.all(x >= 0, x < self.images.size[2])
                with pixel.when(exists) as some:
                    self._pixels(some, src, (*place[:3], x), 1, panel, at)
                with pixel.when(tirx.Not(exists)) as none:
                    self._clear(none, panel, at, self.channels, edge)

    def _pixels(
        self, body: Block, src: Any, place: tuple[Expr, Expr, Expr, Expr], count: int, panel: Any, start: Expr
    ) -> None:
        """So many pixels of a row, from one on, all of which there are; the last vectors go on with zeros."""
        image, z, y, x = place
        own, unit = self.images.channels, self._unit
        apart = own != self.channels
        length, each = (own, self.channels) if apart else (count * own, 0)
        with body.loop(count if apart else 1) as (pixel, i):
            begin, at = pixel.let((x + i) * own), pixel.let(start + i * each)
            with pixel.loop(length // unit) as (step, k):
                where = self.images.place(image, 0, [z, y, 0], begin + k * unit)
                step.add(self._stored(panel, at + k * unit, self._first(src, where, unit), unit))
            for first in range(length // unit * unit, each or length, unit):
                where = self.images.place(image, 0, [z, y, 0], begin + first)
                pixel.add(self._stored(panel, at + first, self._first(src, where, length - first), unit))

    def _turned(
        self, body: Block, src: Any, place: tuple[Expr, Expr, Expr, Expr], panel: Any, start: Expr, edge: Expr
    ) -> None:
        """A row of NCHW: vectors of pixels, transposed in registers."""
        image, z, y, x0 = place
        outside = tirx.Broadcast(widen(edge.value, self.operand), LANES)
        group = min(self.channels, LANES)
        for first in range(0, self.channels, group):
            with body.loop(ceildiv(self.columns, LANES)) as (step, i):
                x, rows = step.let(x0 + i * LANES), list[Expr]()
                ramp = tirx.Ramp(x, tirx.const(1, "int32"), LANES)
                low, high = (tirx.Broadcast(tirx.const(n, "int32"), LANES) for n in (0, self.images.size[2]))
                inside = tirx.And(ramp >= low, ramp < high)
                for c in range(first, first + group):
                    value = zeros(LANES)
                    if c < self.images.channels:
                        where = self.images.place(image, c, [z, y, 0], x)
                        value = load_within(src, self.dtype, where, LANES, LANES, size=self.images.size[2])
                        if not isinstance(edge.value, tirx.IntImm):
                            value = tirx.Select(inside, step.let(value), outside)
                    rows.append(step.let(value))
                for number, value in enumerate(interleave(step, rows, LANES)):
                    numbers = number * LANES if group < LANES or self.channels == LANES else number * self.channels
                    at = start + i * (LANES * self.channels) + (numbers + first)
                    step.add(self._stored(panel, at, self._converted(value), LANES))

    def _first(self, src: Any, where: list[Expr], count: int) -> Expr:
        """The first numbers of a pixel's channels."""
        if count <= 0:
            return tirx.Broadcast(tirx.const(0, STORAGE[self.operand]), self._unit)
        if self.dtype == self.operand:
            return load_stored(src, self.dtype, where, self._unit, count)
        return self._converted(load(src, self.dtype, where, self._unit, count))

    def _converted(self, value: Expr) -> Expr:
        return bf16.rounded(value) if self.operand == "bf16" else narrow(value, self.operand, LANES)

    def _stored(self, panel: Any, at: Expr, value: Expr, lanes: int) -> Any:
        return store_stored(panel, self.operand, [at], value, lanes, lanes)
