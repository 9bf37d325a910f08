"""Winograd convolution on a GPU's ordinary units: fewer multiplications than taps.

Applies to  2-D dense convolutions at stride 1, not dilated, of kernels from 2×2 to 5×5, with many channels.
Strategy    F(m, r) along both axes (Lavin & Gray, CVPR 2016), y = Aᵀ[(G g) · (Bᵀ d)], in three launches:
            1. Pack weights transformed, as f32 [position][ic][oc].
            2. Transform the input: a thread has one tile of one channel in registers.
            3. One matrix product per position, [tiles, ic] x [ic, oc], as in cuda_direct.
            4. Transform back: a thread has one tile of one channel; bias, residual, activation, store.
            Neighbouring threads have neighbouring tiles (NCHW) or channels (NHWC); the tensors that one launch
            hands to the next are laid out in the same order.
Accuracy    falls as m grows, as cpu_winograd's does; `tile` has the m that the spec's accuracy admits.
Why not     all in one launch: shared memory has room for few positions of many channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from convgen.cpu.vector import Block, weighted_sum, written
from convgen.cuda import model, tiles
from convgen.cuda.simt import (
    LANES,
    Buffers,
    Product,
    all_of,
    finish,
    load,
    memory,
    multiply,
    one_each,
    packed,
    put,
    read,
    unrolled,
    where,
)
from convgen.cuda.tiles import Size, Tile
from convgen.deferred import te
from convgen.lowering.compute import Expr, Operands, ceildiv, copied, round_up, row_times, unflat
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, Space, Written, require
from convgen.lowering.winograd import Matrix, admitted, magnitudes, toom_cook

if TYPE_CHECKING:
    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec

#: Products per tile and axis, at most: a thread has all inputs of a tile in registers.
MOST_POSITIONS = 6
#: Threads of a block in the launches that transform.
THREADS = 128


class CudaWinograd(Written):
    id, version = "cuda_winograd", 1
    transforms = True

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cuda", "needs a GPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.rank == 2 and spec.groups == 1, "needs a 2-D convolution of one group")
        require(set(spec.stride) == {1} == set(spec.dilation), "needs stride and dilation 1")
        require(min(spec.kernel) >= 2, "needs a kernel of at least 2×2")
        require(bool(_tiles(spec)), f"no transform of at most {MOST_POSITIONS} products at accuracy {spec.accuracy}")
        # Where a window lies in nothing but padding the exact result admits no error; a transform has one.
        covered = all(2 * max(pads) <= k + 1 for pads, k in zip(spec.padding, spec.kernel, strict=True))
        require(covered, "needs windows with half of their taps inside the input")
        require(min(spec.ic, spec.oc) >= 16, "needs at least 16 input and output channels")
        require(max(map(math.prod, _shapes(spec, 256, _tiles(spec)[0]))) < 1 << 31, "needs fewer elements")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        outputs = _tiles(spec)
        return Space(tile=outputs, **tiles.space(_size(spec, outputs[0])).domains)

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        tiles.check(target, tiles.of(picks))

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        points = [Picks(tile=m, **tiles.default(target, _size(spec, m), _gather(spec))) for m in _tiles(spec)]
        return min(points, key=lambda picks: _seconds(spec, target, picks))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return _seconds(spec, target, self.default(spec, target))

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        return magnitudes(spec, src, weights, dict.fromkeys(range(spec.rank), picks.tile))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, m, tile = Operands(spec), picks.tile, tiles.of(picks)
        weights = packed(_size(spec, m), tile, _transformed_weights(ops, m))

        def kernel(*given: Any) -> Any:
            buffers, launches = Buffers(*given), Block()
            shapes = _shapes(spec, tile.tile_m, m)
            inputs = memory(launches, shapes[0], "global", "inputs")
            sums = memory(launches, shapes[1], "global", "products")
            launches.add(_transform(ops, m, buffers.src, inputs))
            launches.add(multiply(_product(spec, m, tile, inputs, sums), tile, buffers.parameters["weights"]))
            launches.add(_transform_back(ops, m, sums, buffers))
            return launches.statement()

        return written(ops, [weights, *map(copied, ops.parameters[1:])], kernel, offsets=False)


def _transformed_weights(ops: Operands, m: int) -> Callable[[Expr, Expr, Expr], Expr]:
    """The weights ``G g Gᵀ`` as a function of position, input channel and output channel.

    Output channel ``o`` and input channel ``c`` have positions ``(a, b)``, and before the second half columns ``k``.
    """
    spec, positions = ops.spec, _positions(ops.spec, m)
    (_, g_rows, _), (_, g_cols, _) = (toom_cook(m, k) for k in spec.kernel)

    def along_rows(o: Expr, c: Expr, a: Expr, k: Expr) -> Expr:
        return row_times(g_rows, a, lambda tap: ops.weights[(o, c, tap, k)])

    halfway = te.compute((spec.oc, spec.ic, positions[0], spec.kernel[1]), along_rows, name="halfway")

    def along_both(o: Expr, c: Expr, a: Expr, b: Expr) -> Expr:
        return row_times(g_cols, b, lambda tap: halfway[o, c, a, tap])

    transformed = te.compute((spec.oc, spec.ic, *positions), along_both, name="transformed")
    return lambda position, c, o: transformed[(o, c, *unflat(position, positions))]


def _transform(ops: Operands, m: int, src: Any, inputs: Any) -> Any:
    """The launch that makes every tile of every input channel Bᵀ d B."""
    spec, launch = ops.spec, Block()
    positions, (_, _, b_rows), (_, _, b_cols) = _positions(spec, m), *(toom_cook(m, k) for k in spec.kernel)
    with _each_tile(launch, spec, m, spec.ic) as (body, channel, number):
        image, *place = unflat(number, (spec.n, *_grid(spec, m)))
        first = [body.let(t * m - begin) for t, (begin, _) in zip(place, spec.padding, strict=True)]
        tile = memory(body, (math.prod(positions),), "local", "tile")
        with unrolled(body, positions[0]) as (each_row, i), unrolled(each_row, positions[1]) as (each_input, j):
            pixel = [each_input.let(first[0] + i), each_input.let(first[1] + j)]
            # Past the end lie the padding, and the part of the last tile that is beyond the output.
            inside = [y < extent for y, extent in zip(pixel, spec.in_spatial, strict=True)]
            inside += [y >= 0 for y, (begin, _) in zip(pixel, spec.padding, strict=True) if begin]
            value = read(src, spec.dtype, ops.order(image, channel, pixel))
            put(each_input, tile, [i * positions[1] + j], where(inside, value))
        result = _both(body, tile, positions, b_rows, b_cols)
        with unrolled(body, math.prod(positions)) as (each_position, position):
            put(each_position, inputs, _place(spec, position, number, channel), load(result, [position]))
    return launch.statement()


def _product(spec: ConvSpec, m: int, tile: Tile, inputs: Any, sums: Any) -> Product:
    """The products, one for each position: of the transformed inputs and the transformed weights."""
    size, nchw = _size(spec, m), spec.layout == "nchw"

    def fetch(block: Block, position: Expr, row: Expr, start: Expr, offset: Expr, lanes: int) -> Expr:
        # The rows of the inputs are whole tiles of the product; what lies past the last one is never stored.
        inside = [start + offset < size.depth] * (size.depth % tile.tile_k != 0)
        return where(inside, load(inputs, _place(spec, position, row, start + offset), lanes), lanes)

    def store(block: Block, position: Expr, row: Expr, column: Expr, piece: Any, count: int) -> None:
        put(block, sums, _place(spec, position, row, column), load(piece, [0], count), count)

    vectors = "row" if nchw else "depth" if spec.ic % LANES == 0 else ""
    return Product(size, fetch, vectors, store, not nchw, LANES if nchw else math.gcd(spec.oc, LANES))


def _transform_back(ops: Operands, m: int, sums: Any, buffers: Buffers) -> Any:
    """The launch that makes every tile of every output channel Aᵀ y A, and finishes it."""
    spec, launch = ops.spec, Block()
    positions, (a_rows, _, _), (a_cols, _, _) = _positions(spec, m), *(toom_cook(m, k) for k in spec.kernel)
    with _each_tile(launch, spec, m, spec.oc) as (body, channel, number):
        image, *place = unflat(number, (spec.n, *_grid(spec, m)))
        tile = memory(body, (math.prod(positions),), "local", "tile")
        with unrolled(body, math.prod(positions)) as (each_position, position):
            put(each_position, tile, [position], load(sums, _place(spec, position, number, channel)))
        result = _both(body, tile, positions, a_rows, a_cols)
        with unrolled(body, m) as (each_row, i), unrolled(each_row, m) as (each_output, j):
            pixel = [each_output.let(t * m + offset) for t, offset in zip(place, (i, j), strict=True)]
            inside = [y < extent for y, extent in zip(pixel, spec.out_spatial, strict=True) if extent % m]
            with each_output.when(all_of(inside)) as within:
                stored_sums = memory(within, (1,), "local", "stored_sums")
                put(within, stored_sums, [0], load(result, [i * m + j]))
                finish(within, spec, buffers, ops.order(image, channel, pixel), lambda e: channel, stored_sums, 1)
    return launch.statement()


@contextmanager
def _each_tile(launch: Block, spec: ConvSpec, m: int, channels: int) -> Iterator[tuple[Block, Expr, Expr]]:
    """A launch with a thread for each tile of each channel: what the thread does, its channel, its tile."""
    count = _size(spec, m).rows
    with one_each(launch, count * channels, THREADS) as (body, thread):
        number = body.let(thread)
        if spec.layout == "nchw":
            yield body, body.let(number // count), body.let(number % count)
        else:
            yield body, body.let(number % channels), body.let(number // channels)


def _both(block: Block, tile: Any, positions: Sequence[int], rows: Matrix, cols: Matrix) -> Any:
    """``rows · tile · colsᵀ``, in registers; ``rows`` and ``cols`` are constant."""
    height, width = positions
    halfway = memory(block, (len(rows) * width,), "local", "halfway")
    result = memory(block, (len(rows) * len(cols),), "local", "result")
    for i, j in itertools.product(range(len(rows)), range(width)):
        value = weighted_sum((rows[i][k], load(tile, [k * width + j])) for k in range(height))
        put(block, halfway, [i * width + j], value)
    for i, j in itertools.product(range(len(rows)), range(len(cols))):
        value = weighted_sum((cols[j][k], load(halfway, [i * width + k])) for k in range(width))
        put(block, result, [i * len(cols) + j], value)
    return result


# ---- sizes -------------------------------------------------------------------------------------


def _tiles(spec: ConvSpec) -> list[int]:
    """Every m: how many outputs a tile may have along each axis."""
    admits = [set(admitted(spec.accuracy, k)) for k in spec.kernel]
    return sorted(m for m in set.intersection(*admits) if m + max(spec.kernel) - 1 <= MOST_POSITIONS)


def _positions(spec: ConvSpec, m: int) -> list[int]:
    """Products of a tile, per axis."""
    return [m + k - 1 for k in spec.kernel]


def _grid(spec: ConvSpec, m: int) -> list[int]:
    """Tiles per axis."""
    return [ceildiv(y, m) for y in spec.out_spatial]


def _size(spec: ConvSpec, m: int) -> Size:
    """Of the products: one for each position; rows are tiles, columns output channels."""
    return Size(math.prod(_positions(spec, m)), spec.n * math.prod(_grid(spec, m)), spec.oc, spec.ic)


def _shapes(spec: ConvSpec, tile_m: int, m: int) -> list[tuple[int, int, int]]:
    """Shapes of the transformed inputs and of the transformed sums.

    Their rows, which are tiles, are rounded up to the ``tile_m`` of a thread block.
    """
    size = _size(spec, m)
    rows = round_up(size.rows, tile_m)
    return [_place(spec, size.batch, rows, channels) for channels in (spec.ic, spec.oc)]


def _place(spec: ConvSpec, position: Expr, tile: Expr, channel: Expr) -> tuple[Expr, Expr, Expr]:
    """The index of an element of the transformed inputs or of the transformed sums."""
    return (position, channel, tile) if spec.layout == "nchw" else (position, tile, channel)


def _gather(spec: ConvSpec) -> int:
    """Instructions that fetch an element of the transformed input, counted about."""
    return 2 if spec.layout == "nchw" or spec.ic % LANES == 0 else 4


def _seconds(spec: ConvSpec, target: Target, picks: Picks) -> float:
    """Predicted seconds: of the products, and of the two launches around them, which move data."""
    size, tile = _size(spec, picks.tile), tiles.of(picks)
    between = sum(4 * math.prod(shape) for shape in _shapes(spec, tile.tile_m, picks.tile))
    products = tiles.compute_seconds(target, size, tile, _gather(spec), between)
    moved = between + 2 * spec.bytes["src"] + spec.bytes["dst"]
    return products + moved / target.rates.memory + 2 * model.LAUNCH
