"""Winograd's algorithms on a CPU: what they make of a layer's axes, its tiles, and constant matrices times vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from ..hardware.target import Target
from ..lowering.compute import Expr, ceildiv, round_up
from ..lowering.schedule import Picks
from ..lowering.winograd import admitted, phases, strided, transposed
from ..problem.spec import ConvSpec
from .images import Images, dst_images, src_images
from .product import Even
from .vector import Block, weighted_sum, zeros

#: Products per output, against the taps, that a transform must save to be worth its passes.
MOST_PRODUCTS = 0.85
#: Products per tile and axis: code is written out for all of them.
MOST_POSITIONS = 16
#: Rows of tiles of a block, in 1-D its tiles.
ROWS, TILES = (1, 2, 4, 7, 8, 14), (1, 2, 4, 7, 14, 28, 56, 112, 224)

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Axis:
    """A transformed axis: its bilinear algorithm, and where the tiles lie.

    A tile has ``outputs`` pixels, of ``extent`` inputs with ``positions`` products. Under a dilation d
    its pixels are d apart, and d tiles interleave: the ``period``.

    Attributes:
        back, weights, inputs: the matrices Aᵀ, G and Bᵀ.
        outputs: pixels of a tile.
        size: pixels of all tiles together: dst's.
        first: the first input of the first tile.
        step: inputs from a tile to the next.
        period: tiles that interleave.
    """

    back: Matrix
    weights: Matrix
    inputs: Matrix
    outputs: int
    size: int
    first: int
    step: int
    period: int

    @property
    def positions(self) -> int:
        return len(self.inputs)

    @property
    def extent(self) -> int:
        return len(self.inputs[0])

    @property
    def groups(self) -> int:
        """How many times ``period`` tiles cover dst."""
        return ceildiv(self.size, self.outputs * self.period)

    @property
    def tiles(self) -> int:
        return self.groups * self.period

    @property
    def ragged(self) -> bool:
        """Whether the last tiles have pixels that dst has not."""
        return self.tiles * self.outputs != self.size

    def input(self, tile: Expr, k: int) -> Expr:
        """Where the k-th input of a tile is, counted from the first tile's first."""
        if self.period == 1:
            return tile * self.step + k
        return tile // self.period * (self.step * self.period) + tile % self.period + k * self.period

    def output(self, tile: Expr, p: int) -> Expr:
        """Where a tile's p-th pixel is."""
        if self.period == 1:
            return tile * self.outputs + p
        return tile // self.period * (self.outputs * self.period) + tile % self.period + p * self.period

    def reach(self, groups: int) -> int:
        """Inputs of so many groups of tiles."""
        return ((groups - 1) * self.step + self.extent) * self.period


#: The rows of a 1-D layer.
NO_AXIS = Axis(back=((1,),), weights=((1,),), inputs=((1,),), outputs=1, size=1, first=0, step=1, period=1)


def transformed_axes(spec: ConvSpec) -> tuple[int, ...]:
    """The axes that are transformed: the last two, in 1-D the only one."""
    return tuple(range(spec.rank))[-2:]


@lru_cache(maxsize=1024)
def transformed_axis(spec: ConvSpec, axis: int, m: int) -> Axis:
    """An axis of a layer in tiles of ``m`` outputs of a phase."""
    kernel, stride, begin = spec.kernel[axis], spec.stride[axis], spec.padding[axis][0]
    m = outputs_of(spec, axis, m)
    if spec.transposed:
        *matrices, first = transposed(m, kernel, stride, begin)
        step = m
    else:
        matrices, first, step = [*strided(m, kernel, stride)], -begin, m * stride
    back, weights, inputs = map(rounded, matrices)
    period = spec.dilation[axis] if kernel > 1 else 1
    return Axis(back, weights, inputs, len(back), spec.out_spatial[axis], first, step, period)


def rounded(matrix: Sequence[Sequence[Fraction]]) -> Matrix:
    """A matrix as its coefficients are used."""
    return tuple(tuple(map(float, row)) for row in matrix)


def outputs_of(spec: ConvSpec, axis: int, m: int) -> int:
    """Output pixels of a phase per tile: 1 along an axis where no transform saves products."""
    return m if spec.kernel[axis] > spec.stride[axis] else 1


def lanes_of(spec: ConvSpec, target: Target) -> int:
    """Lanes of the vectors of channels: the most that fill a group's inputs and outputs, at least half of what there
    are; 0 where none do.
    """
    sizes = [n for n in (target.lanes, max(4, target.lanes // 2)) if not (spec.ic // spec.groups) % n]
    sizes = [n for n in sizes if not (spec.oc // spec.groups) % n]
    return target.lanes if spec.groups == 1 else max(sizes, default=0)


def tile_sizes(spec: ConvSpec, admits: Callable[[str, int], Sequence[int]] = admitted) -> list[int]:
    """The tile sizes that the accuracy class admits and that save enough products."""
    axes = transformed_axes(spec)
    of_axis = {a: phases(spec.kernel[a], spec.stride[a]) for a in axes}
    sizes = []
    for m in admits(spec.accuracy, max(max(taps) for taps in of_axis.values())):
        per_axis = {a: [outputs_of(spec, a, m) + taps - 1 for taps in of_axis[a]] for a in axes}
        share = math.prod(sum(per_axis[a]) / (outputs_of(spec, a, m) * spec.kernel[a]) for a in axes)
        if share <= MOST_PRODUCTS and all(sum(points) <= MOST_POSITIONS for points in per_axis.values()):
            sizes.append(m)
    return sizes


def covered(spec: ConvSpec, axis: int) -> bool:
    """Whether the windows at the edges have half of their taps, or one less, inside the input."""
    kernel, stride = spec.kernel[axis], spec.stride[axis]
    begin, end = spec.padding[axis]
    if not spec.transposed:
        return 2 * max(begin, end) <= (kernel + 1) * spec.dilation[axis]
    taps = ceildiv(kernel, stride)
    inside = 1 + min(begin, end - spec.output_padding[axis]) // stride
    return 2 * (taps - inside) <= taps + 1


def taps_covered(spec: ConvSpec, axis: int) -> bool:
    """Whether every tap of a convolution that is not transposed lies inside the input for some output: the first and
    the last, and none steps over the input.
    """
    size, stride, begin = spec.in_spatial[axis], spec.stride[axis], spec.padding[axis][0]
    first = (spec.out_spatial[axis] - 1) * stride - begin  # of the first tap, where it lies last
    last = (spec.kernel[axis] - 1) * spec.dilation[axis] - begin  # of the last tap, where it lies first
    return first >= 0 and last < size and stride <= size


def block_choices(spec: ConvSpec, m: int) -> list[int]:
    """Choices for the rows of tiles of a block; in 1-D, its tiles. Those that interleave count as one."""
    groups = transformed_axis(spec, transformed_axes(spec)[0], m).groups
    return sorted(
        {b for b in (ROWS if spec.rank > 1 else TILES) if b <= groups} | ({groups} if groups <= 14 else set())
    )


class Tiles:
    """Tiles of images along one or two transformed axes, cut into blocks: what the way in reads and makes.

    Args:
        depth: tiles after which the next vector of channels follows; 0 where all channels of a tile lie together.

    Attributes:
        rows, columns: the transformed axes.
        blocked: that of them which is cut into blocks of so many ``groups``.
        positions: products of a tile.
        most_tiles: of a plane of a block.
        lines, length: of the input of a plane of a block.
        src: how the images lie.
        lanes: of its vectors of channels.
        own: channels of a group of channels.
        channels: numbers from a tile's transformed input to the next one's.
        apart: numbers from a vector of channels to the next.
        direct: whether images are transformed where they lie; else they are copied first.
    """

    def __init__(
        self, axes: Sequence[Axis], block_rows: int, src: Images, groups: int, lanes: int, depth: int = 0
    ) -> None:
        self.lanes, self.src, self.own = lanes, src, src.channels // groups
        self.rows, self.columns = axes if len(axes) == 2 else (NO_AXIS, axes[0])
        self.blocked = axes[0]
        self.groups = Even(self.blocked.groups, block_rows)
        self.positions = self.rows.positions * self.columns.positions
        of_rows, of_columns = (
            self.groups.full if axis is self.blocked else axis.groups for axis in (self.rows, self.columns)
        )
        self.lines, self.length = self.rows.reach(of_rows), self.columns.reach(of_columns)
        self.tile_columns = of_columns * self.columns.period
        self.most_tiles = self.tiles(self.groups.full)
        # A power of two would put tiles in few sets of the cache.
        self.channels, self.apart = (lanes, depth * lanes) if depth else (round_up(self.own, lanes) + lanes, lanes)
        self.direct = src.layout != "nchw" and src.rank > 1

    @property
    def stored(self) -> tuple[int, int]:
        """Of a line of the input: padding on its left, vectors of pixels after it. In 1-D a block may lie anywhere."""
        left = max(0, -self.columns.first) if self.blocked is self.rows else 0
        pixels = min(self.length - left, self.src.size[-1]) if self.blocked is self.rows else self.length
        return left, max(0, ceildiv(pixels, self.lanes))

    def tiles(self, groups: int) -> int:
        """Of a plane of a block of so many groups."""
        return groups * self.blocked.period * (self.tile_columns if self.blocked is self.rows else 1)


class Grid(Tiles):
    """A layer's tiles: the sizes of a candidate.

    The depth of 3-D stays direct; layers without one have a single plane.

    Attributes:
        planes, planes_in: of dst and src. window: planes of src that a block reads.
        dst: how it lies.
        outputs: output channels of a group of channels.
    """

    def __init__(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        axes = [transformed_axis(spec, axis, picks.tile) for axis in transformed_axes(spec)]
        super().__init__(axes, picks.block_rows, src_images(spec), spec.groups, lanes_of(spec, target))
        self.outputs, deep = spec.oc // spec.groups, spec.rank > 2
        self.planes, self.planes_in = (spec.out_spatial[0], spec.in_spatial[0]) if deep else (1, 1)
        self.depth = (spec.stride[0], spec.dilation[0], spec.padding[0][0], spec.kernel[0]) if deep else (1, 1, 0, 1)
        self.plane_blocks = Even(self.planes, picks.block_planes)
        stride, dilation, _, taps = self.depth
        self.window = (self.plane_blocks.full - 1) * stride + (taps - 1) * dilation + 1
        self.dst = dst_images(spec)

    @property
    def met(self) -> int:
        """Taps of the depth that lie in src, of all planes of dst together."""
        stride, dilation, begin, taps = self.depth
        places = (z * stride - begin + k * dilation for z in range(self.planes) for k in range(taps))
        return sum(0 <= place < self.planes_in for place in places)

    def pixels(self, groups: int) -> int:
        """Pixels of dst at most."""
        return (
            groups
            * self.blocked.period
            * self.blocked.outputs
            * (self.columns.size if self.blocked is self.rows else 1)
        )


# ---- constant matrices times vectors ------------------------------------------------------------


def transformed(block: Block, matrix: Matrix, values: Sequence[Expr]) -> list[Expr]:
    """The products of a constant matrix with values; what rows or columns of opposite points share is made once."""
    matrix, values = _paired_columns(block, matrix, values)
    found: dict[int, Expr] = {}
    for i, row in enumerate(matrix):
        if i in found:
            continue
        other = next((j for j in range(i + 1, len(matrix)) if j not in found and _opposite(row, matrix[j])), None)
        if other is None:
            found[i] = _sum(block, row, values)
            continue
        even, odd = ([a if a == sign * b else 0 for a, b in zip(row, matrix[other], strict=True)] for sign in (1, -1))
        factor = next((abs(c) for c in odd if c), 1)
        factor = factor if all(abs(c) in (0, factor) for c in odd) else 1
        shared, difference = _sum(block, even, values), _sum(block, [c / factor for c in odd], values)
        found[i], found[other] = (
            block.let(weighted_sum([(1, shared), (sign * factor, difference)])) for sign in (1, -1)
        )
    return [found[i] for i in range(len(matrix))]


@lru_cache(maxsize=1024)
def operations(matrix: Matrix) -> int:
    """About how many operations :func:`transformed` takes."""
    terms = sum(max(0, sum(c != 0 for c in row) - 1) for row in matrix)
    return ceildiv(3 * terms, 4) if len(matrix) > 2 else terms


def _opposite(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two rows are ``e + o`` and ``e - o`` with something to share."""
    same, differ = (sum(x == sign * y != 0 for x, y in zip(a, b, strict=True)) for sign in (1, -1))
    return all(abs(x) == abs(y) for x, y in zip(a, b, strict=True)) and min(same, differ) > 0 and same + differ > 2


def _paired_columns(block: Block, matrix: Matrix, values: Sequence[Expr]) -> tuple[Matrix, list[Expr]]:
    """The same product with sums and differences in place of values that all rows take with coefficients ``±c``."""
    columns, made, values = [list(c) for c in zip(*matrix, strict=True)], set[int](), list(values)
    for i, a in enumerate(columns):
        for j in range(i + 1, len(columns)):
            b = columns[j]
            if i in made or j in made or not _opposite(a, b):
                continue
            made |= {i, j}
            values[i], values[j] = block.let(values[i] + values[j]), block.let(values[i] - values[j])
            columns[i], columns[j] = (
                [x if x == sign * y else 0 for x, y in zip(a, b, strict=True)] for sign in (1, -1)
            )
            break
    return tuple(zip(*columns, strict=True)), values


def _sum(block: Block, row: Sequence[float], values: Sequence[Expr]) -> Expr:
    """A row times values: first what is added as it is, so that no operation only negates."""
    terms = sorted(
        ((c, v) for c, v in zip(row, values, strict=True) if c), key=lambda term: (term[0] != 1, term[0] < 0)
    )
    total = weighted_sum(terms)
    return zeros(values[0].ty.dtype.lanes) if total is None else block.let(total)
