"""The register tile: sums of products of pixels and vectors of output channels.

A tile has ``pixels × vectors`` sums in registers. A step of its reduction loads its vectors of weights once, and
multiplies them by one number of each pixel. Every dense CPU schedule is an index map around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..deferred import tirx
from ..hardware.target import Target
from ..lowering.compute import Expr, ceildiv
from ..problem.spec import ConvSpec
from .model import Core, Work
from .operation import MULTIPLY, Operation
from .vector import Block, Registers, prefetch

#: Cycles to begin a run of products, a tile (its addresses, and loops that end), and a task.
BEGIN_RUN, BEGIN_TILE, BEGIN_TASK = 5, 12, 100
#: FMAs that begin while a line comes from memory, at least.
FETCHED_AFTER = 1024
#: Cycles to begin a row that lies in a page of its own.
FAR_ROW = 12
#: Numbers of f32 in a cache line.
LINE = 16


def most_pixels(target: Target, vectors: int) -> int:
    """Pixels of a tile for which there are registers; where pixels are in the lanes, channels.

    Beside its sums, a tile holds a vector of weights for each of its vectors of channels, and one broadcast pixel.
    """
    return (target.vector_registers - 1) // vectors - 1


def pieces(size: int, most: int) -> list[tuple[int, int]]:
    """``size`` as pieces of ``most`` and what is left: the sizes there are, and how many pieces have each."""
    return [(piece, times) for piece, times in ((most, size // most), (size % most, 1)) if piece and times]


@dataclass(frozen=True)
class Even:
    """``size`` as the fewest tiles of at most ``most``: the first are of ``full``, the others one smaller.

    Attributes:
        count: how many tiles there are.
        many: how many of them are of ``full``.
    """

    size: int
    most: int
    count: int = field(init=False)
    full: int = field(init=False)
    many: int = field(init=False)

    def __post_init__(self) -> None:
        count = ceildiv(self.size, self.most)
        full = ceildiv(self.size, count) if count else 0
        self.__dict__.update(count=count, full=full, many=self.size - count * (full - 1))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Sizes, and how many tiles have each."""
        return [
            (size, times) for size, times in ((self.full, self.many), (self.full - 1, self.count - self.many)) if times
        ]

    def start(self, index: Expr) -> Expr:
        """Where a tile begins."""
        if self.many == self.count:
            return index * self.full
        return index * (self.full - 1) + tirx.min(index, self.many)

    def size_of(self, index: Expr) -> Expr:
        """How large a tile is."""
        if self.many == self.count:
            return self.full
        return tirx.Select(index < self.many, self.full, self.full - 1)

    def cases(self, block: Block, index: Expr) -> Iterator[tuple[Block, int]]:
        """Code for each size that the tile of an ``index`` may have: ``(its body, size)``."""
        if self.many == self.count:
            yield block, self.full
            return
        for condition, size in ((index < self.many, self.full), (index >= self.many, self.full - 1)):
            with block.when(condition) as case:
                yield case, size


def register_tiles(
    block: Block, cut: Even, size: Expr, pixels_of: Callable[[int], int], most: int
) -> Iterator[tuple[Block, Expr, int, Expr, int]]:
    """Code for the register tiles, of ``most`` pixels, of a piece of a cut whose ``size`` is known when it runs.

    Yields:
        its body, its first pixel, how many it has; the number of the tile, and how many there are.
    """
    for known, _ in cut.sizes:
        with block.when(True if len(cut.sizes) == 1 else size == known) as case:
            tiles = Even(pixels_of(known), most)
            with case.loop(tiles.count) as (one, i):
                for inner, pixels in tiles.cases(one, i):
                    yield inner, inner.let(tiles.start(i)), pixels, i, tiles.count


def blocks_ahead(fmas: int) -> int:
    """How many blocks ahead of its use a line of weights is fetched, so that it has come: a block lasts ``fmas``."""
    return ceildiv(FETCHED_AFTER, fmas)


def steps_apart(core: Core, fmas: int, vectors: int, tiles: int) -> int:
    """Steps of so many FMAs, each with so many lines of weights, from a fetch ahead to the next: more than one where
    memory does not keep up with a line per step, as many as let the ``tiles`` of a block fetch all of the next one's.
    A power of two.
    """
    if core.fetches * fmas / core.fmas >= 1:
        return 1
    return 1 << max(1, tiles // vectors).bit_length() - 1


@dataclass(frozen=True)
class Ahead:
    """Weights of the next block of channels, fetched into the L2 cache a line or more per step, or one in some steps.

    They come from memory once, while the products of the block before hide it. ``tile`` of ``tiles`` fetches its
    share; those that have none left fetch the last one's again, which costs less than a branch.

    Attributes:
        weights: packed, flat from any index on.
        start: index of the next block's first number.
        steps: of a tile; each has so many ``vectors`` of weights, of a line.
        apart: steps from a fetch to the next (:func:`steps_apart`).
    """

    weights: Any
    start: Expr
    steps: Expr
    vectors: int
    tile: Expr
    tiles: int
    apart: int = 1

    @property
    def lines(self) -> int:
        """Lines that a step fetches."""
        return ceildiv(self.vectors, self.tiles)

    @property
    def share(self) -> int:
        """Lines that a tile fetches."""
        return (self.steps if self.apart == 1 else ceildiv(self.steps, self.apart)) * self.lines

    @property
    def origin(self) -> Expr:
        """Where this tile's share begins."""
        shares = ceildiv(self.vectors * self.apart, self.lines)
        tile = self.tile if self.tiles <= shares else tirx.min(self.tile, shares - 1)
        return self.start + tile * (self.share * LINE)

    def fetch(self, block: Block, origin: Expr, step: Expr) -> None:
        zeros = [0] * (len(self.weights.shape) - 1)
        with block.when(True if self.apart == 1 else step % self.apart == 0) as due:
            for line in range(self.lines):
                at = origin + (step // self.apart * self.lines + line) * LINE
                due.add(prefetch(self.weights, [*zeros, at], level=2))


def fetching(
    block: Block, core: Core, weights: Any, start: Expr, steps: Expr, fmas: int, share: tuple[Expr, int]
) -> Callable[[Block, Expr], None]:
    """What fetches in a tile's step, by its number, some of the next block's weights (:class:`Ahead`), packed
    ``[…][oc]``.

    Args:
        start: index of that block's first number.
        steps, fmas: of the tile, and of a step.
        share: which of how many tiles it is.
    """
    lines = ceildiv(int(weights.shape[-1]), LINE)
    apart = steps_apart(core, fmas, lines, share[1])
    ahead = Ahead(weights, block.let(start), steps, lines, *share, apart)
    origin = block.let(ahead.origin)
    return lambda step, k: ahead.fetch(step, origin, k)


def multiply(
    block: Block,
    sums: Registers,
    length: Expr,
    scalar: Callable[[Any, Expr], Expr],
    vector: Callable[[Any, Expr], Expr],
    fetch: Callable[[Block, Expr], None] | None = None,
    operation: Operation = MULTIPLY,
) -> None:
    """Add ``scalar(t, k) * vector(v, k)`` to every sum, whose keys are all pairs ``(t, v)``, for each k of a length.

    ``fetch`` adds what a step fetches ahead. Where an ``operation`` adds several products, k counts its words.
    """
    scalars, vectors = (dict.fromkeys(part) for part in zip(*sums.keys, strict=True))
    with block.loop(length) as (step, k):
        row = {v: step.let(vector(v, k)) for v in vectors}
        if fetch:
            fetch(step, k)
        for t in scalars:
            factor = step.let(tirx.Broadcast(scalar(t, k), sums.lanes))
            for v, value in row.items():
                sums.put(step, (t, v), operation.add(sums[t, v], factor, value, sums.lanes))


def finishing(spec: ConvSpec, lanes: int, share: float) -> Work:
    """The epilogue of a core's ``share`` of all outputs, but for their stores: bias, residual, activation."""
    operations = spec.activation_op.operations + spec.bias + spec.residual
    return Work(math.prod(spec.dst_shape) / lanes * share, fmas=operations, loads=spec.residual)


def steps(
    times: float,
    pixels: int,
    vectors: int,
    *,
    near: float = 0,
    far: float = 0,
    fetched: float = 0,
    operation: Operation = MULTIPLY,
) -> Work:
    """What steps of a tile count.

    Args:
        near: bytes of weights that come from the L2 cache. Pixels come from there too, now and then, which slows them.
        far: bytes of the lines that a step's pixels lie in, where all of these come from there.
        fetched: lines that are fetched ahead.
    """
    lines, loads = (near + far) / (4 * LINE), pixels + vectors + fetched
    products = {operation.unit: pixels * vectors * operation.instructions}
    return Work(times, **products, loads=loads, lines=lines, near=1.5 * near, chain=1)
