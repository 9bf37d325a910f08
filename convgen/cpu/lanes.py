"""The register tile with pixels in the vector lanes: rows of NCHW planes as vectors of neighbouring pixels.

A tile has sums of ``channels × lines × vectors`` of pixels in registers. A line is a row of the output; of a transposed
convolution, a phase of a row: the pixels that are a stride apart. An input row is loaded where it lies, once for all
taps, lines and channels that read it; padding is masked, in code of its own for tiles at the edge. Weights are
broadcast.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from ..deferred import te, tirx
from ..hardware.target import Target
from ..lowering.compute import ACCUMULATOR, Expr, Operands, ceildiv, copied, row_times, unflat
from ..problem.dtypes import BYTES
from ..problem.spec import ConvSpec
from .vector import (
    PIECE,
    Block,
    Registers,
    finish,
    interleave,
    load,
    load_within,
    prefetch,
    spread_parameters,
    store,
    stretches,
    zeros,
)
from .window import Lines, Met, kernel_rows

#: Taps of a row that are written out; more are passes of a loop.
MOST_TAPS = 64
#: Bytes of a cache line: what a prefetch fetches.
CACHE_LINE = 64


def vector_lengths(target: Target, pixels: int) -> list[int]:
    """Lanes that vectors of a row of so many pixels can have: fewer than the target's where it is short."""
    return [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * pixels)]


def pack_rows(ops: Operands, tile: int, matrix: Sequence[Sequence[Any]] | None = None) -> list[te.Tensor]:
    """Weights as ``[group and oc/tile][rows of the kernel][ic][taps of a row][tile]``, in the order they are used, and
    the other parameters as they are. ``matrix``: its rows times the taps of a row, instead of these.
    """
    spec, rows = ops.spec, ops.spec.kernel[:-1]
    per_group, depth = spec.oc // spec.groups, spec.ic // spec.groups
    tiles = ceildiv(per_group, tile)

    def packed_weights(block: Expr, row: Expr, c: Expr, k: Expr, t: Expr) -> Expr:
        group, channel = block // tiles, block % tiles * tile + t
        pair = (group * depth + c, channel) if spec.transposed else (group * per_group + channel, c)

        def weight(tap: Expr) -> Expr:
            return ops.weights[(*pair, *unflat(row, rows), tap)]

        value = row_times(matrix, k, weight) if matrix else weight(k)
        if per_group % tile == 0:
            return value
        return tirx.if_then_else(channel < per_group, value, tirx.const(0, ACCUMULATOR))

    shape = (spec.groups * tiles, math.prod(rows), depth, len(matrix) if matrix else spec.kernel[-1], tile)
    return [te.compute(shape, packed_weights, name="weights_packed"), *map(copied, ops.parameters[1:])]


class Tap(NamedTuple):
    """The k-th tap of a row: its phase, and what it reads: the ``offset``-th of every stride of pixels, from the
    ``group``-th on.
    """

    k: int
    phase: int
    group: int
    offset: int


@lru_cache(maxsize=256)
def row_taps(spec: ConvSpec) -> list[Tap]:
    """The taps of a row, phase by phase."""
    stride, dilation, begin = spec.stride[-1], spec.dilation[-1], spec.padding[-1][0]
    if not spec.transposed:
        return [Tap(k, 0, *divmod(k * dilation, stride)) for k in range(spec.kernel[-1])]
    reads = [(k, *divmod(begin - k * dilation, stride)) for k in range(spec.kernel[-1])]
    taps = [Tap(k, -least % stride, group + (least > 0), 0) for k, group, least in reads]
    return sorted(taps, key=lambda tap: tap.phase)


class Columns:
    """A row of output pixels as tiles of ``vectors`` vectors of each phase, and what of the input row each tile meets.

    ``runs`` lists runs of equal tiles. A tile maps ``("stored", v, j)`` to the pixels that there are of the j-th vector
    that the v-th ones of all phases become, and ``(v, group, j)`` to what :func:`~convgen.cpu.vector.load` needs to
    know of the load ``offset(v, group, j)`` elements past the tile's first: how many lanes lie left of the image, and
    how many elements follow.

    Attributes:
        step: pixels of a phase in a tile.
        phases: of the output; more than one only where the convolution is transposed.
        stride: of the input.
        taps: of a row, phase by phase; ``looped``: they are too many to be written out.
    """

    def __init__(self, spec: ConvSpec, lanes: int, vectors: int) -> None:
        self.lanes, self.vectors, self.step = lanes, vectors, lanes * vectors
        self._size, self._out = spec.in_spatial[-1], spec.out_spatial[-1]
        stride, begin = spec.stride[-1], spec.padding[-1][0]
        self.phases, self.stride, self._begin = (stride, 1, 0) if spec.transposed else (1, stride, begin)
        self.taps = row_taps(spec)
        self.groups = sorted({tap.group for tap in self.taps})
        self.looped = not spec.transposed and len(self.taps) > MOST_TAPS
        advance, first = self.step * self.stride, self.groups[0] * self.stride - self._begin
        self.count = ceildiv(self._out, self.step * self.phases)
        start = min(self.count, ceildiv(max(0, -first), advance))
        reach = self.offset(vectors - 1, self.groups[-1], self.stride - 1) + lanes
        end = max(start, min(self._out // (self.step * self.phases), (self._size - reach) // advance + 1))
        self.runs = stretches(self.count, start, end, self._tile)

    def offset(self, v: int, group: int, j: int) -> int:
        return (v * self.stride + j) * self.lanes + group * self.stride - self._begin

    def tiles(
        self, body: Block, start: Expr = 0, end: Expr = None
    ) -> Iterator[tuple[Block, Expr, Expr, dict[Any, Any]]]:
        """Code for the tiles of a row, or those from ``start`` to ``end``: ``(its body, its index, its first pixel, the
        tile)``.
        """
        for first, count, tile in self.runs:
            if end is not None:
                low = body.let(tirx.max(start, first))
                first, count = low, body.let(tirx.max(tirx.min(end, first + count) - low, 0))
            with body.loop(count) as (inner, i):
                yield inner, i + first, inner.let((i + first) * self.step), tile

    @property
    def crossed(self) -> bool:
        """Whether each piece of a vector has pixels of both vectors that were loaded for it: that takes one of AVX2's
        instructions, and two where pixels follow each other.
        """
        return self.lanes == 2 * PIECE and self.stride == 2

    def in_order(self, value: Expr) -> Expr:
        """A vector of the same pixels, one after another, from sums of what :class:`Taps` reads."""
        return tirx.Shuffle([value], [0, 1, 4, 5, 2, 3, 6, 7]) if self.crossed else value

    def _tile(self, index: int) -> dict[Any, Any]:
        lanes, x0, tile = self.lanes, index * self.step, dict[Any, Any]()
        for v in range(self.vectors):
            for j in range(self.phases):
                tile["stored", v, j] = min(lanes, self._out - (x0 + v * lanes) * self.phases - j * lanes)
            for group, j in itertools.product(self.groups, range(self.stride)):
                x = x0 * self.stride + self.offset(v, group, j)
                shift = min(lanes, max(0, -x))
                tile[v, group, j] = (shift, max(0, min(lanes - shift, self._size - x - shift)))
        return tile


@lru_cache(maxsize=256)
def columns_of(spec: ConvSpec, lanes: int, vectors: int) -> Columns:
    return Columns(spec, lanes, vectors)


class Taps:
    """What the taps of a row read, as vectors: loaded, and where there is a stride shuffled apart, once each.

    ``read(offset, count, shift)`` is the :func:`~convgen.cpu.vector.load` of a vector that lies ``offset`` past the
    tile's first element. Sums of them are :meth:`Columns.in_order`.
    """

    def __init__(self, block: Block, columns: Columns, tile: dict[Any, Any], read: Callable[[int, int, int], Expr]):
        self._block, self._columns, self._tile, self._read = block, columns, tile, read
        self._found: dict[Any, Expr | None] = {}

    def __getitem__(self, key: tuple[int, Tap]) -> Expr | None:
        """What a tap reads for the v-th vector; None where all of it is padding."""
        v, tap = key
        return self._every(self._columns.stride, tap.offset, 0, v, tap.group)

    def _every(self, step: int, phase: int, j: int, v: int, group: int) -> Expr | None:
        """The j-th vector of every step-th element, by halves where that goes: they are shared by phases."""
        key = (step, phase, j, v, group)
        if key not in self._found:
            value = self._load(v, group, j) if step == 1 else self._shuffled(step, phase, j, v, group)
            self._found[key] = None if value is None else self._block.let(value)
        return self._found[key]

    def _load(self, v: int, group: int, j: int) -> Expr | None:
        shift, count = self._tile[v, group, j]
        return self._read(self._columns.offset(v, group, j) + shift, count, shift) if count > 0 else None

    def _shuffled(self, step: int, phase: int, j: int, v: int, group: int) -> Expr | None:
        lanes, ways = self._columns.lanes, 2 if step % 2 == 0 else step
        outer, inner = divmod(phase, step // ways)
        parts = [self._every(step // ways, inner, j * ways + i, v, group) for i in range(ways)]
        if all(part is None for part in parts):
            return None
        parts = [zeros(lanes) if part is None else part for part in parts]
        if self._columns.crossed:
            order = [v * lanes + start + outer + i for start in (0, PIECE) for v in range(2) for i in (0, 2)]
            return tirx.Shuffle(parts, order)
        return tirx.Shuffle(parts, [outer + i * ways for i in range(lanes)])


def add_products(
    body: Block, sums: Registers, values: dict[int, Expr], lines: Iterable[Any], weight: Callable[[Any, Any], Expr]
) -> None:
    """Add ``values[v] * weight(line, t)`` to the sums of these lines, whose keys are ``(t, line, v)``."""
    for t, line in itertools.product(dict.fromkeys(t for t, *_ in sums.keys) if values else (), lines):
        spread = body.let(tirx.Broadcast(weight(line, t), sums.lanes))
        for v, value in values.items():
            sums.add(body, (t, line, v), value * spread)


class Channels(NamedTuple):
    """A tile of output channels: its group, its index there, and how many channels it has."""

    group: Expr
    tile: Expr
    size: int


class Pixels(NamedTuple):
    """A tile of pixels: the image's index in src and in dst, its rows, its first pixel there (of each phase), and what
    of the image its vectors meet (:class:`Columns`). ``panel``: a copy of what it reads, ``[tile, ic, pixel]``, and its
    index there; or None.
    """

    source: Expr
    image: Expr
    lines: Lines
    x: Expr
    pattern: dict[Any, Any]
    panel: tuple[tirx.Buffer, Expr] | None = None


@dataclass(frozen=True)
class RowProduct:
    """The sums of tiles, their epilogue and store.

    Attributes:
        spec: the layer; where src is a copy of its pixels, flat, the 1-D layer that is left.
        tile_oc: channels of a tile, as the weights are packed.
        dtype: of src.
        together: phases whose sums are in registers at a time.
        fetches: whether what the next tile of a row reads is fetched ahead: channels lie far apart.
    """

    spec: ConvSpec
    columns: Columns
    tile_oc: int
    dtype: str
    src: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer
    together: int = 1
    fetches: bool = False

    def channels(self, body: Block, group: Expr, tile: Expr) -> Iterator[tuple[Block, Channels]]:
        """Code for a tile of channels: a full one, and a group's last one, which may have fewer."""
        full, rest = divmod(self.spec.oc // self.spec.groups, self.tile_oc)
        for case, size in body.cases(tile, full, self.tile_oc, rest):
            yield case, Channels(group, tile, size)

    def copy(
        self, body: Block, place: tuple[Expr, Expr, Expr], pattern: dict[Any, Any], panel: tuple[tirx.Buffer, Expr]
    ) -> None:
        """Copy what a tile of a 1×1 kernel reads of an image's channel, from a pixel on."""
        lanes, (image, c, x), (buffer, index) = self.columns.lanes, place, panel
        for v in range(self.columns.vectors):
            count = pattern["stored", v, 0]
            value = load(self.src, self.dtype, [image, c, x + v * lanes], lanes, count)
            body.add(store(buffer, "f32", [index, c, v * lanes], value, lanes, lanes))

    def tile(self, body: Block, channels: Channels, pixels: Pixels) -> None:
        """The sums of a tile of channels for a tile of pixels, their epilogue and store."""
        spec, columns, lanes, phases = self.spec, self.columns, self.columns.lanes, self.columns.phases
        heights, sums = range(pixels.lines.height), dict[Any, Registers]()
        vectors = [v for v in range(columns.vectors) if pixels.pattern["stored", v, 0] > 0]
        for first in range(0, phases, self.together):
            lines = list(itertools.product(heights, range(first, min(first + self.together, phases))))
            keys = list(itertools.product(range(channels.size), lines, vectors))
            registers = body.registers(keys, lanes)
            sums.update(dict.fromkeys(keys, registers))
            for inner, met in kernel_rows(body, spec, pixels.lines):
                with inner.loop(spec.ic // spec.groups) as (step, c):
                    self.add_row(step, channels, pixels, registers, c, met)
        for t in range(channels.size):
            channel = body.let(channels.group * (spec.oc // spec.groups) + channels.tile * self.tile_oc + t)
            given = spread_parameters(body, self.parameters, channel, lanes)
            for r, v in itertools.product(heights, vectors):
                row = pixels.lines.row(r) if pixels.lines.first else [0] * (len(self.dst.shape) - 3)
                keys = [(t, (r, phase), v) for phase in range(phases)]
                apart = [body.let(columns.in_order(sums[key][key])) for key in keys]
                for j, value in enumerate(interleave(body, apart, lanes)):
                    place = [pixels.image, channel, *row, pixels.x * phases + (v * phases + j) * lanes]
                    count = pixels.pattern["stored", v, j]
                    if count > 0:
                        finish(body, spec, self.dst, self.residual, place, value, lanes, count, **given)

    def add_row(self, body: Block, channels: Channels, pixels: Pixels, sums: Registers, c: Expr, met: Met) -> None:
        """The products of an input row of a channel."""
        spec, columns, lanes = self.spec, self.columns, self.columns.lanes
        row = [pixels.source, body.let(channels.group * (spec.ic // spec.groups) + c), *met.where]
        block = channels.group * ceildiv(spec.oc // spec.groups, self.tile_oc) + channels.tile
        present = {phase for _, (_, phase), _ in sums.keys}

        def add(inner: Block, k: Expr, phase: int, values: dict[int, Expr]) -> None:
            rows = {(r, phase): kernel_row for r, kernel_row in met.uses}
            weights = self.parameters["weights"]
            add_products(inner, sums, values, rows, lambda line, t: weights[block, rows[line], c, k, t])

        def read(offset: int, count: int, shift: int) -> Expr:
            if pixels.panel:
                panel, index = pixels.panel
                return load(panel, "f32", [index, c, offset], lanes, lanes)
            return load(self.src, self.dtype, [*row, pixels.x * columns.stride + offset], lanes, count, shift)

        if self.fetches and 0 in present:
            for at in range(columns.step, 2 * columns.step, CACHE_LINE // BYTES[self.dtype]):
                body.add(prefetch(self.src, [*row, pixels.x + at]))
        vectors = dict.fromkeys(v for *_, v in sums.keys)
        if columns.looped:
            with body.loop(spec.kernel[-1]) as (inner, k):
                x = inner.let(pixels.x + k * spec.dilation[-1] - spec.padding[-1][0])
                places = {v: [*row, x + v * lanes] for v in vectors}
                loaded = {v: load_within(self.src, self.dtype, place, lanes, lanes) for v, place in places.items()}
                add(inner, k, 0, {v: inner.let(value) for v, value in loaded.items()})
            return
        inputs = Taps(body, columns, pixels.pattern, read)
        for tap in columns.taps:
            if tap.phase in present:
                add(body, tap.k, tap.phase, {v: x for v in vectors if (x := inputs[v, tap]) is not None})


def subsampled(block: Block, spec: ConvSpec, src: tirx.Buffer, image: Expr, lanes: int) -> tirx.Buffer:
    """The pixels of an image that a strided 1×1 kernel reads, ``[1, ic, pixels]`` in f32: a copy, made in parallel over
    the channels. Most of what is read with a stride is skipped, and every block of output channels would skip it again.
    """
    *rows, width = spec.out_spatial
    columns, dtype = columns_of(spec, lanes, 1), spec.dtypes["src"]
    # Whole vectors, overwritten by the next row: TVM shrinks a buffer to what it sees accessed, and of a masked
    # store it sees the first element.
    copy = block.buffer((1, spec.ic, math.prod(rows) * width + lanes))
    with block.loop(spec.ic, parallel=True) as (plane, c), plane.loop(math.prod(rows)) as (row, y):
        where = [row.let(p * s) for p, s in zip(unflat(y, rows), spec.stride, strict=False)]
        for inner, _, x0, tile in columns.tiles(row):

            def read(offset: int, count: int, shift: int, x0: Expr = x0) -> Expr:
                return load(src, dtype, [image, c, *where, x0 * spec.stride[-1] + offset], lanes, count, shift)

            value = Taps(inner, columns, tile, read)[0, columns.taps[0]]
            inner.add(store(copy, "f32", [0, c, y * width + x0], columns.in_order(value), lanes, lanes))
    return copy
