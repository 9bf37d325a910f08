"""The gradient of weights of few channels per group: register tiles whose lanes are pixels of a line of NCHW, or
channels of groups of NHWC, which share what is around them.

A tile has sums of channels of outer × channels of inner × rows of the kernel × taps of a row
(:class:`~convgen.cpu.correlation.Correlation`), a vector each. Tiles overlap where sizes do not divide: sums that two
of them have are the same to the last bit.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..deferred import tirx
from ..lowering.compute import Expr, ceildiv, narrow, unflat
from ..lowering.schedule import Picks
from .correlation import Correlation, total
from .groups import GroupVectors
from .product import LINE, pieces
from .vector import Block, Registers, gathered, load, load_within, zeros

#: A sum of a tile: channel of outer (or vector of channels), channel of inner, row of the kernel, tap.
Key = tuple[int, int, int, int]
#: A row of the kernel in a tile, and the plane and line of inner that it reads.
Row = tuple[int, Sequence[Expr]]


class Tiling:
    """How many tiles there are of ``size`` sums, and where each begins: the last ones overlap."""

    def __init__(self, size: int, tile: int) -> None:
        self.size, self.tile, self.count = size, tile, ceildiv(size, tile)

    def start(self, index: Expr) -> Expr:
        if self.size % self.tile == 0:
            return index * self.tile
        return tirx.min(index * self.tile, self.size - self.tile)


def runs_of_taps(relation: Correlation, most: int) -> list[tuple[int, int]]:
    """The taps of a row as runs of so many at most: the first of each, and how many."""
    sizes = [size for size, times in pieces(relation.kernel[2], most) for _ in range(times)]
    return list(zip(itertools.accumulate([0, *sizes[:-1]]), sizes, strict=True))


class Line(NamedTuple):
    """What a tile does along a line: how many steps of how many loads and shuffles each, and with masks how many."""

    steps: int
    loads: float
    shuffles: float
    masked: int


class TileSizes:
    """How many tiles a layer has, and what each holds: what picks are judged by.

    Attributes:
        is_last: whether channels lie innermost, in the lanes.
        vectors: which channels these are.
        groups: of outer's channels, whose tiles have no channel in common.
        outputs: channels of outer in such a group; of NHWC, vectors of all channels.
        runs: of the taps of a row.
        kernel_rows: rows of the kernel, of all its planes.
    """

    def __init__(self, relation: Correlation, lanes: int, most_taps: int) -> None:
        self.relation, self.lanes, self.is_last = relation, lanes, relation.spec.layout == "nhwc"
        self.vectors = GroupVectors(relation.channels, lanes)
        self.groups = 1 if self.is_last else relation.spec.groups
        self.outputs = self.vectors.number if self.is_last else relation.group
        self.runs = runs_of_taps(relation, most_taps)
        self.kernel_rows = math.prod(relation.kernel[:2])

    def edges(self, run: tuple[int, int]) -> int:
        """Vectors at the ends of a line, of NCHW, that are code of their own."""
        start, end = inside(self.relation, self.lanes, run)
        return start + max(0, ceildiv(self.relation.width, self.lanes) - end)

    def sums(self, picks: Picks) -> int:
        """Vectors of sums that are in registers at a time."""
        return int(picks.tile_o * picks.tile_c * picks.tile_r * max(taps for _, taps in self.runs))

    def of_channels(self, picks: Picks) -> int:
        """Tiles that have the same channels of outer."""
        return Tiling(self.relation.own, picks.tile_c).count * Tiling(self.kernel_rows, picks.tile_r).count

    def kept(self, picks: Picks) -> int:
        """Vectors of sums of all of these."""
        sums = picks.tile_o * picks.tile_c * picks.tile_r * self.relation.kernel[2]
        return int(self.of_channels(picks) * sums)

    def tiles(self, o: int) -> int:
        """Tiles of ``o`` of outer's channels each."""
        return self.groups * Tiling(self.outputs, o).count

    def shared(self, block: int, o: int) -> int:
        """Tiles of a block that read the same of inner: of NCHW those of a group."""
        return min(block, self.tiles(o) // self.groups)

    def line(self, picks: Picks, run: tuple[int, int]) -> Line:
        """What a tile does along a line of outer, for a run of taps."""
        relation, lanes, stride, taps = self.relation, self.lanes, self.relation.stride[2], run[1]
        o, rows = picks.tile_o, picks.tile_c * picks.tile_r
        if self.is_last:
            read = o * rows * taps
            return Line(relation.width, o + read * self.vectors.loaded, read * self.vectors.permuted, 0)
        offsets = {k * relation.dilation[2] // stride for k in range(taps)} if stride > 1 else set(range(taps))
        apart = 2 if lanes == LINE else 1.5  # most vectors lie in two lines of the cache
        loads = o + rows * len(offsets) * stride * apart
        return Line(ceildiv(relation.width, lanes), loads, rows * taps * (stride - 1), self.edges(run))

    def line_bytes(self, picks: Picks) -> int:
        """What a task reads for a line of outer."""
        relation, outputs = self.relation, picks.block * picks.tile_o
        inputs = relation.own * relation.stride[1] * relation.stride[2]
        if self.is_last:
            inputs *= ceildiv(outputs, self.vectors.parts) * self.vectors.groups
            outputs *= self.vectors.count
        return int(4 * relation.width * (outputs + inputs))


class GradientTiles(ABC):
    """The statements of ``main``, but for the gradient of bias of a transposed layer.

    A task has the sums of ``block`` tiles of outer's channels: all channels of inner of their groups, and all taps. It
    goes over all images, ``rows`` lines of outer at a time, and for these over its tiles.

    Args:
        picks: ``block tile_o tile_c tile_r rows``: tiles of outer's channels in a task; of a tile, channels or vectors
            of outer, channels of inner and rows of the kernel; lines that are read again and again from the cache.
        most_taps: of a row of the kernel in one tile.
        src, gradient, dst: buffers.
    """

    def __init__(
        self, relation: Correlation, picks: Picks, lanes: int, most_taps: int, src: Any, gradient: Any, dst: Any
    ) -> None:
        self.relation, self.picks, self.lanes, self.dst = relation, picks, lanes, dst
        self.inner, self.outer = relation.ordered(src, gradient)
        self.dtype = relation.spec.dtype
        self.channels = Tiling(relation.own, picks.tile_c)
        self.kernel_rows = Tiling(math.prod(relation.kernel[:2]), picks.tile_r)
        self.runs = runs_of_taps(relation, most_taps)
        self.with_bias = relation.spec.bias and not relation.is_swapped

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Tiles of outer's channels."""

    @abstractmethod
    def place(self, block: Block, index: Expr) -> Any:
        """Where a tile of outer's channels is."""

    @abstractmethod
    def line(
        self,
        block: Block,
        made: Registers,
        at: Any,
        image: Expr,
        line: Sequence[Expr],
        c: Expr,
        rows: Sequence[Row],
        run: tuple[int, int],
    ) -> None:
        """Adds the products of a line of outer with lines of inner, for a run of taps."""

    @abstractmethod
    def line_of_bias(self, block: Block, made: Registers, at: Any, image: Expr, line: Sequence[Expr]) -> None:
        """Adds the numbers of a line of outer to the sums of ``tile_o`` biases."""

    @abstractmethod
    def store(self, block: Block, at: Any, o: int, value: Expr, index: Expr | None) -> None:
        """Stores the sums that a vector has of the o-th channel or vector: for number ``index`` of a channel's weights,
        or where that is None for the bias.
        """

    def statement(self) -> Any:
        block, each = Block(), self.picks.block
        with block.loop(ceildiv(self.outputs, each), parallel=True) as (task, index):
            first = task.let(index * each)
            self._task(
                task, first, each if self.outputs % each == 0 else task.let(tirx.min(each, self.outputs - first))
            )
        return block.statement()

    def _task(self, task: Block, first: Expr, blocks: Expr) -> None:
        """``blocks`` tiles of outer's channels, from the ``first`` on."""
        picks, relation = self.picks, self.relation
        tiles = self.channels.count * self.kernel_rows.count
        sums = picks.tile_o * picks.tile_c * picks.tile_r * relation.kernel[2]
        kept = task.buffer((picks.block, tiles, sums, self.lanes))
        of_bias = task.buffer((picks.block, picks.tile_o, self.lanes))
        with task.loop(blocks) as (block, b):
            with block.loop(tiles) as (tile, t), tile.loop(sums) as (one, i):
                self._keep(one, kept, zeros(self.lanes), b, t, i)
            for i in range(picks.tile_o if self.with_bias else 0):
                self._keep(block, of_bias, zeros(self.lanes), b, i)
        with task.loop(relation.spec.n) as (image, n), image.loop(ceildiv(relation.lines, picks.rows)) as (body, part):
            line = body.let(part * picks.rows)
            count = (
                picks.rows
                if relation.lines % picks.rows == 0
                else body.let(tirx.min(picks.rows, relation.lines - line))
            )
            with body.loop(blocks) as (block, b):
                at = self.place(block, first + b)
                self._lines(block, kept, of_bias, at, b, (n, line, count))
        with task.loop(blocks) as (block, b):
            self._store(block, self.place(block, first + b), kept, of_bias, b)

    def _lines(self, block: Block, kept: Any, of_bias: Any, at: Any, b: Expr, lines: tuple[Expr, Expr, Expr]) -> None:
        """Some lines' products with a tile of outer's channels, tile after tile."""
        n, line, count = lines
        with block.loop(self.channels.count) as (outer, i), outer.loop(self.kernel_rows.count) as (tile, j):
            for run in self.runs:
                self._tile(tile, kept, at, b, lines, (i, j), run)
        if not self.with_bias:
            return
        made = block.registers(range(self.picks.tile_o), self.lanes)
        with block.loop(count) as (one, y):
            self.line_of_bias(one, made, at, n, self._line(one, line + y))
        for i in range(self.picks.tile_o):
            self._keep(block, of_bias, self._kept(of_bias, b, i) + made[i], b, i)

    def _line(self, block: Block, number: Expr) -> Sequence[Expr]:
        return [block.let(x) for x in unflat(number, self.relation.outer.size[:2])]

    def _tile(
        self,
        tile: Block,
        kept: Any,
        at: Any,
        b: Expr,
        lines: tuple[Expr, Expr, Expr],
        index: tuple[Expr, Expr],
        run: tuple[int, int],
    ) -> None:
        picks, relation, (n, first, count), (i, j) = self.picks, self.relation, lines, index
        begin, taps = run
        keys = [
            (o, c, r, begin + k)
            for o in range(picks.tile_o)
            for c in range(picks.tile_c)
            for r in range(picks.tile_r)
            for k in range(taps)
        ]
        c, row = tile.let(self.channels.start(i)), tile.let(self.kernel_rows.start(j))
        made = tile.registers(keys, self.lanes)
        with tile.loop(count) as (one, y):
            pixel = self._line(one, first + y)
            rows: list[tuple[int, list[Expr]]] = []
            for r in range(picks.tile_r):
                tap = unflat(row + r, relation.kernel[:2])
                rows.append((r, [one.let(x) for x in relation.line(pixel, tap)]))
            inside = [relation.is_inside(where) for _, where in rows]
            all_inside = one.let(tirx.all(*inside))
            with one.when(all_inside) as case:
                self.line(case, made, at, n, pixel, c, rows, run)
            for known, condition in zip(rows if len(rows) > 1 else [], inside, strict=False):
                with one.when(tirx.all(tirx.Not(all_inside), condition)) as case:
                    self.line(case, made, at, n, pixel, c, [known], run)
        number = tile.let(i * self.kernel_rows.count + j)
        for key in keys:
            k = self._number(key)
            self._keep(tile, kept, self._kept(kept, b, number, k) + made[key], b, number, k)

    def _number(self, key: Key) -> int:
        """Where a sum lies among a tile's."""
        (o, c, r, k), picks = key, self.picks
        return int(((o * picks.tile_c + c) * picks.tile_r + r) * self.relation.kernel[2] + k)

    def _kept(self, buffer: Any, *index: Expr) -> Expr:
        return load(buffer, "f32", [*index, 0], self.lanes, self.lanes)

    def _keep(self, block: Block, buffer: Any, value: Expr, *index: Expr) -> None:
        place = [tirx.const(i, "int32") if isinstance(i, int) else i for i in index]
        row = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), self.lanes)
        block.add(tirx.BufferStore(buffer, value, [*place, row]))

    def _store(self, task: Block, at: Any, kept: Any, of_bias: Any, b: Expr) -> None:
        picks, relation, taps = self.picks, self.relation, self.relation.kernel[2]
        with task.loop(self.channels.count) as (outer, i), outer.loop(self.kernel_rows.count) as (tile, j):
            number = tile.let(i * self.kernel_rows.count + j)
            first, row = tile.let(self.channels.start(i)), tile.let(self.kernel_rows.start(j))
            for o in range(picks.tile_o):
                with tile.loop(picks.tile_c) as (channel, c), channel.loop(picks.tile_r * taps) as (one, k):
                    place = one.let((o * picks.tile_c + c) * (picks.tile_r * taps) + k)
                    weight = one.let((first + c) * relation.taps + row * taps + k)
                    self.store(one, at, o, one.let(self._kept(kept, b, number, place)), weight)
        for o in range(picks.tile_o if self.with_bias else 0):
            self.store(task, at, o, task.let(self._kept(of_bias, b, o)), None)

    def put(self, block: Block, channel: Expr, index: Expr | None, value: Expr) -> None:
        """Stores a number: of the weights of a channel of outer, or where the index is None its bias."""
        relation = self.relation
        if index is None:
            place = math.prod(relation.spec.weights_shape) + channel
        else:
            place = channel * (relation.own * relation.taps) + index
        zero = [tirx.const(0, "int32")] * (len(self.dst.shape) - 1)
        block.add(tirx.BufferStore(self.dst, narrow(value, self.dtype), [*zero, place]))


class PixelTiles(GradientTiles):
    """Of NCHW: lanes are neighbouring pixels of a line of outer. Of inner, a tap's are a stride apart: vectors that lie
    there are loaded, and shuffled; where lanes lie outside the image, with masks that are constant.
    """

    @property
    def outputs(self) -> int:
        return self.relation.spec.groups * self._of_group.count

    @property
    def _of_group(self) -> Tiling:
        return Tiling(self.relation.group, self.picks.tile_o)

    def place(self, block: Block, index: Expr) -> tuple[Expr, Expr]:
        """The first channels of outer and inner."""
        tiles = self._of_group
        group = block.let(tirx.floordiv(index, tiles.count))
        first = block.let(tiles.start(tirx.floormod(index, tiles.count)))
        return block.let(group * self.relation.group + first), block.let(group * self.relation.own)

    def line(
        self,
        block: Block,
        made: Registers,
        at: Any,
        image: Expr,
        line: Sequence[Expr],
        c: Expr,
        rows: Sequence[Row],
        run: tuple[int, int],
    ) -> None:
        for step, x, masked in self._steps(block, run):
            count = min(self.lanes, self.relation.width - x) if masked else self.lanes
            factors = [
                step.let(self._load(self.relation.outer, self.outer, image, at[0] + o, [*line, x], count, masked))
                for o in range(self.picks.tile_o)
            ]
            for i in range(self.picks.tile_c):
                for r, where in rows:
                    for k, value in self._taps(step, (image, at[1] + c + i, where), x, run, count, masked):
                        for o, factor in enumerate(factors):
                            made.add(step, (o, i, r, k), factor * value)

    def _steps(self, block: Block, run: tuple[int, int]) -> Iterator[tuple[Block, Expr, bool]]:
        """The vectors of a line: those with lanes outside it, or whose taps have, are code of their own."""
        start, end = inside(self.relation, self.lanes, run)
        for v in range(start):
            yield block, v * self.lanes, True
        if end > start:
            with block.loop(end - start) as (step, i):
                yield step, step.let((start + i) * self.lanes), False
        for v in range(end, ceildiv(self.relation.width, self.lanes)):
            yield block, v * self.lanes, True

    def _load(
        self, images: Any, buffer: Any, image: Expr, channel: Expr, pixel: Sequence[Expr], count: int, masked: bool
    ) -> Expr:
        place = self.relation.element(images, image, channel, pixel)
        if masked:
            return load_within(buffer, self.dtype, place, self.lanes, count)
        return load(buffer, self.dtype, place, self.lanes, count)

    def _taps(
        self,
        step: Block,
        source: tuple[Expr, Expr, Sequence[Expr]],
        x: Expr,
        run: tuple[int, int],
        count: int,
        masked: bool,
    ) -> Iterator[tuple[int, Expr]]:
        """What each tap of a run reads for the pixels from ``x`` on."""
        image, channel, where = source
        stride, dilation, begin = (
            sizes[2] for sizes in (self.relation.stride, self.relation.dilation, self.relation.begin)
        )
        loaded: dict[int, Expr] = {}
        for k in range(run[0], sum(run)):
            rest = (k - run[0]) * dilation % stride
            base = k * dilation - begin - rest
            vectors = []
            for j in range(stride):
                offset, most = base + j * self.lanes, min(self.lanes, count * stride - j * self.lanes)
                if most <= 0:
                    vectors.append(zeros(self.lanes))
                    continue
                if offset not in loaded:
                    pixel = [*where, x * stride + offset]
                    loaded[offset] = step.let(
                        self._load(self.relation.inner, self.inner, image, channel, pixel, most, masked)
                    )
                vectors.append(loaded[offset])
            if stride == 1:
                yield k, vectors[0]
                continue
            yield k, step.let(gathered(vectors, [rest + i * stride for i in range(self.lanes)], self.lanes))

    def line_of_bias(self, block: Block, made: Registers, at: Any, image: Expr, line: Sequence[Expr]) -> None:
        whole, rest = divmod(self.relation.width, self.lanes)
        for o in range(self.picks.tile_o):
            with block.loop(whole) as (step, i):
                value = self._load(
                    self.relation.outer, self.outer, image, at[0] + o, [*line, i * self.lanes], self.lanes, False
                )
                made.add(step, o, value)
            if rest:
                pixel = [*line, whole * self.lanes]
                made.add(block, o, self._load(self.relation.outer, self.outer, image, at[0] + o, pixel, rest, True))

    def store(self, block: Block, at: Any, o: int, value: Expr, index: Expr | None) -> None:
        self.put(block, at[0] + o, index, total(block, value, self.lanes))


def inside(relation: Correlation, lanes: int, run: tuple[int, int]) -> tuple[int, int]:
    """The vectors of a line whose pixels all lie in it, and all that is loaded for a run of taps in inner's."""
    stride, dilation, begin = relation.stride[2], relation.dilation[2], relation.begin[2]
    bases = [k * dilation - begin - (k - run[0]) * dilation % stride for k in range(run[0], sum(run))]
    start = max(0, ceildiv(-min(bases), lanes * stride))
    reached = (relation.inner.size[2] - max(bases) - lanes * stride) // (lanes * stride) + 1
    return start, max(start, min(relation.width // lanes, reached))


class ChannelTiles(GradientTiles):
    """Of NHWC: lanes are channels of outer, of whole groups where there is room (:class:`GroupVectors`). Of inner each
    has the c-th channel of its group. Pixels whose taps lie outside the image are loops of their own, with the taps
    that do not.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.vectors = GroupVectors(self.relation.channels, self.lanes)
        self._tiles = Tiling(self.vectors.number, self.picks.tile_o)

    @property
    def outputs(self) -> int:
        return self._tiles.count

    def place(self, block: Block, index: Expr) -> list[tuple[Expr, Expr]]:
        """For each vector its first channel of outer, and its group's first of inner."""
        first = block.let(self._tiles.start(index))
        vectors = [first + o for o in range(self.picks.tile_o)]
        return [(block.let(self.vectors.first(v)), block.let(self.vectors.source(v))) for v in vectors]

    def line(
        self,
        block: Block,
        made: Registers,
        at: Any,
        image: Expr,
        line: Sequence[Expr],
        c: Expr,
        rows: Sequence[Row],
        run: tuple[int, int],
    ) -> None:
        relation = self.relation
        reached = {k: relation.valid(k) for k in range(run[0], sum(run))}
        ends = sorted({end for pair in reached.values() for end in pair})
        for start, end in itertools.pairwise(ends):
            taps = [k for k, (first, last) in reached.items() if first <= start and end <= last]
            if not taps:
                continue
            with block.loop(end - start) as (step, i):
                x = step.let(start + i)
                for o, (channel, source) in enumerate(at):
                    place = relation.element(relation.outer, image, channel, [*line, x])
                    factor = step.let(load(self.outer, self.dtype, place, self.lanes, self.vectors.count))
                    for j in range(self.picks.tile_c):
                        for r, where in rows:
                            for k in taps:
                                value = self._read(image, where, x, k, source, c + j)
                                made.add(step, (o, j, r, k), factor * value)

    def _read(self, image: Expr, where: Sequence[Expr], x: Expr, k: int, source: Expr, c: Expr) -> Expr:
        relation = self.relation
        at = x * relation.stride[2] + (k * relation.dilation[2] - relation.begin[2])

        def place(channel: Expr) -> list[Expr]:
            return relation.element(relation.inner, image, channel, [*where, at])

        return self.vectors.read(self.inner, self.dtype, place, source, c)

    def line_of_bias(self, block: Block, made: Registers, at: Any, image: Expr, line: Sequence[Expr]) -> None:
        with block.loop(self.relation.width) as (step, x):
            for o, (channel, _) in enumerate(at):
                place = self.relation.element(self.relation.outer, image, channel, [*line, x])
                made.add(step, o, load(self.outer, self.dtype, place, self.lanes, self.vectors.count))

    def store(self, block: Block, at: Any, o: int, value: Expr, index: Expr | None) -> None:
        for lane in range(self.vectors.count):
            self.put(block, at[o][0] + lane, index, tirx.Shuffle([value], [lane]))
