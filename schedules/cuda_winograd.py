"""Winograd convolution on a GPU's ordinary units: fewer multiplications than taps.

Applies to  2-D dense convolutions at stride 1, not dilated, of kernels from 2×2 to 5×5, with many channels.
Strategy    F(m, r) along both axes (Lavin & Gray, CVPR 2016), y = Aᵀ[(G g) · (Bᵀ d)], in three launches:
            1. Pack weights transformed, as f32 [position][ic][oc].
            2. Transform the input: a thread has one tile of one channel in registers.
            3. One matrix product per position, [tiles, ic] x [ic, oc], as in cuda_direct.
            4. Transform back: a thread has one tile of one channel; bias, residual, activation, store.
            Neighbouring threads have neighbouring tiles (NCHW) or channels (NHWC), and so has what lies between
            the launches.
Accuracy    falls with m, as cpu_winograd's does; `tile` holds those that the spec's class admits.
Why not     all in one launch: shared memory has room for few positions of many channels.
"""

from __future__ import annotations

import itertools
import math
from contextlib import contextmanager

from tvm import te

from convgen.cpu.vector import Block, weighted_sum, written
from convgen.cuda import model, tiles
from convgen.cuda.simt import (
    LANES,
    Product,
    all_of,
    bound,
    finish,
    load,
    memory,
    multiply,
    packed,
    put,
    read,
    unrolled,
    where,
)
from convgen.cuda.tiles import Size
from convgen.lowering.compute import Operands, ceildiv, copied, round_up, row_times, unflat
from convgen.lowering.schedule import Picks, Space, Written, require
from convgen.lowering.winograd import admitted, toom_cook

#: Products of a tile and axis: all inputs of a tile are in registers.
MOST_POSITIONS = 6
#: Threads of a block that transforms.
THREADS = 128


class CudaWinograd(Written):
    id, version = "cuda_winograd", 1
    transforms = True

    def applies(self, spec, target):
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
        require(max(map(math.prod, _between(spec, 256, _tiles(spec)[0]))) < 1 << 31, "needs fewer elements")

    def space(self, spec, target):
        found = _tiles(spec)
        return Space(tile=found, **tiles.space(_size(spec, found[0])).domains)

    def valid(self, spec, target, picks):
        tiles.check(target, tiles.of(picks))

    def default(self, spec, target):
        points = [Picks(tile=m, **tiles.default(target, _size(spec, m), _gather(spec))) for m in _tiles(spec)]
        return min(points, key=lambda picks: _seconds(spec, target, picks))

    def cost(self, spec, target):
        return _seconds(spec, target, self.default(spec, target))

    def program(self, spec, target, picks):
        ops, m, tile = Operands(spec), picks.tile, tiles.of(picks)
        size, positions = _size(spec, m), _positions(spec, m)
        (_, g_rows, _), (_, g_cols, _) = (toom_cook(m, k) for k in spec.kernel)

        def along_rows(o, c, a, k):
            return row_times(g_rows, a, lambda t: ops.weights[(o, c, t, k)])

        halfway = te.compute((spec.oc, spec.ic, positions[0], spec.kernel[1]), along_rows, name="halfway")

        def along_both(o, c, a, b):
            return row_times(g_cols, b, lambda t: halfway[o, c, a, t])

        transformed = te.compute((spec.oc, spec.ic, *positions), along_both, name="transformed")
        weights = packed(size, tile, lambda b, k, o: transformed[(o, k, *unflat(b, positions))])

        def kernel(src, residual, parameters, dst):
            whole = Block()
            shapes = _between(spec, tile.tile_m, m)
            inputs = memory(whole, shapes[0], "global", "inputs")
            sums = memory(whole, shapes[1], "global", "products")
            whole.add(_transform(ops, m, src, inputs))
            whole.add(multiply(_product(spec, m, tile, inputs, sums), tile, parameters["weights"]))
            whole.add(_transform_back(ops, m, sums, (dst, residual, parameters)))
            return whole.statement()

        return written(ops, [weights, *map(copied, ops.parameters[1:])], kernel, offsets=False)


def _transform(ops, m, src, inputs):
    """The launch that makes every tile of every input channel Bᵀ d B."""
    spec = ops.spec
    positions, (_, _, b_rows), (_, _, b_cols) = _positions(spec, m), *(toom_cook(m, k) for k in spec.kernel)
    whole = Block()
    with _each(whole, spec, m, spec.ic) as (body, c, t):
        n, *at = unflat(t, (spec.n, *_grid(spec, m)))
        first = [body.let(q * m - begin) for q, (begin, _) in zip(at, spec.padding, strict=True)]
        tile = memory(body, (math.prod(positions),), "local", "tile")
        with unrolled(body, positions[0]) as (column, i), unrolled(column, positions[1]) as (one, j):
            pixel = [one.let(first[0] + i), one.let(first[1] + j)]
            # Past the end lie padding and what the last tile has too many of.
            inside = [y < extent for y, extent in zip(pixel, spec.in_spatial, strict=True)]
            inside += [y >= 0 for y, (begin, _) in zip(pixel, spec.padding, strict=True) if begin]
            value = read(src, spec.dtype, ops.order(n, c, pixel))
            put(one, tile, [i * positions[1] + j], where(inside, value))
        result = _both(body, tile, positions, b_rows, b_cols)
        with unrolled(body, math.prod(positions)) as (one, p):
            put(one, inputs, _place(spec, p, t, c), load(result, [p]))
    return whole.statement()


def _product(spec, m, tile, inputs, sums):
    """The products of all positions, from one intermediate to the other."""
    size, nchw = _size(spec, m), spec.layout == "nchw"

    def fetch(block, b, row, start, offset, lanes):
        # Rows are in whole tiles; what lies past the last one is never stored.
        inside = [start + offset < size.depth] * (size.depth % tile.tile_k != 0)
        return where(inside, load(inputs, _place(spec, b, row, start + offset), lanes), lanes)

    def store(block, b, row, column, taken, count):
        put(block, sums, _place(spec, b, row, column), load(taken, [0], count), count)

    vectors = "row" if nchw else "depth" if spec.ic % LANES == 0 else ""
    return Product(size, fetch, vectors, store, not nchw, LANES if nchw else math.gcd(spec.oc, LANES))


def _transform_back(ops, m, sums, buffers):
    """The launch that makes every tile of every output channel Aᵀ y A, and finishes it."""
    spec = ops.spec
    positions, (a_rows, _, _), (a_cols, _, _) = _positions(spec, m), *(toom_cook(m, k) for k in spec.kernel)
    whole = Block()
    with _each(whole, spec, m, spec.oc) as (body, o, t):
        n, *at = unflat(t, (spec.n, *_grid(spec, m)))
        tile = memory(body, (math.prod(positions),), "local", "tile")
        with unrolled(body, math.prod(positions)) as (one, p):
            put(one, tile, [p], load(sums, _place(spec, p, t, o)))
        result = _both(body, tile, positions, a_rows, a_cols)
        with unrolled(body, m) as (column, i), unrolled(column, m) as (one, j):
            pixel = [one.let(q * m + d) for q, d in zip(at, (i, j), strict=True)]
            inside = [y < extent for y, extent in zip(pixel, spec.out_spatial, strict=True) if extent % m]
            with one.when(all_of(inside)) as within:
                taken = memory(within, (1,), "local", "taken")
                put(within, taken, [0], load(result, [i * m + j]))
                finish(within, spec, buffers, ops.order(n, o, pixel), lambda e: o, taken, 1)
    return whole.statement()


@contextmanager
def _each(whole, spec, m, channels):
    """The body of a launch: its channel, and its tile."""
    count = _size(spec, m).rows
    with (
        bound(whole, ceildiv(count * channels, THREADS), "blockIdx.x") as (grid, block),
        bound(grid, THREADS, "threadIdx.x") as (every, thread),
        every.when(block * THREADS + thread < count * channels if count * channels % THREADS else True) as body,
    ):
        number = body.let(block * THREADS + thread)
        if spec.layout == "nchw":
            yield body, body.let(number // count), body.let(number % count)
        else:
            yield body, body.let(number % channels), body.let(number // channels)


def _both(block, tile, positions, rows, cols):
    """``rows x tile x cols^T``, in registers; the first two are constant."""
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


def _tiles(spec):
    """Outputs of a tile along each axis."""
    admits = [set(admitted(spec.accuracy, k)) for k in spec.kernel]
    return sorted(m for m in set.intersection(*admits) if m + max(spec.kernel) - 1 <= MOST_POSITIONS)


def _positions(spec, m):
    return [m + k - 1 for k in spec.kernel]


def _grid(spec, m):
    """Tiles per axis."""
    return [ceildiv(y, m) for y in spec.out_spatial]


def _size(spec, m):
    return Size(math.prod(_positions(spec, m)), spec.n * math.prod(_grid(spec, m)), spec.oc, spec.ic)


def _between(spec, tile_m, m):
    """Shapes of the transformed input and of the products: rows, which are tiles, in whole ones of a thread block."""
    size = _size(spec, m)
    rows = round_up(size.rows, tile_m)
    return [
        (size.batch, count, rows) if spec.layout == "nchw" else (size.batch, rows, count)
        for count in (spec.ic, spec.oc)
    ]


def _place(spec, position, tile, channel):
    """The index of an element of either."""
    return (position, channel, tile) if spec.layout == "nchw" else (position, tile, channel)


def _gather(spec):
    """Instructions that fetch an element of the transformed input."""
    return 2 if spec.layout == "nchw" or spec.ic % LANES == 0 else 4


def _seconds(spec, target, picks):
    """Predicted: the products, and the launches around them that move data."""
    size, tile = _size(spec, picks.tile), tiles.of(picks)
    between = [4 * math.prod(shape) for shape in _between(spec, tile.tile_m, picks.tile)]
    products = tiles.compute_seconds(target, size, tile, _gather(spec), sum(between))
    moved = sum(between) + 2 * spec.bytes["src"] + spec.bytes["dst"]
    return products + moved / (target.cores * model.BANDWIDTH) + 2 * model.LAUNCH
