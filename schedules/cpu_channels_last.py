"""Direct convolution of channels-last rows: output channels in the vector lanes, runs of input in memory.

Applies to  convolutions of any rank, stride and dilation that are not transposed, dense or with groups of whole
            vectors of output channels: NHWC; and NCHW with more than a 1×1 kernel.
Strategy    1. The taps of a kernel's row and their channels lie side by side: one run of `kw × ic` numbers per row of
               the kernel (dilated or grouped: a run of channels per tap). Pack weights as [oc/t][rows of the
               kernel][run][t].
            2. A task copies its rows with their padding, NCHW transposed in registers; a 1×1 kernel reads src where it
               lies.
            3. Keep a tile of `tile_px` pixels × `tile_oc` channels in registers: vector loads of weights, broadcast
               src. The last pixels of a row and the last vectors of channels are smaller tiles, with code of their own.
            4. Bias, residual and activation on the tile; vectors of channels are stored, the last one masked. NCHW:
               of pixels, transposed in registers.
            5. One parallel loop over parts of the channels × batch × blocks of rows (in 1-D of tiles). `order` says
               whether a task's weights or its pixels are gone through again.
Why not     pixels in the lanes: channels-last data would have to be transposed in and out. Of NCHW, rows that make
            good vectors need no transposition (cpu_masked, cpu_im2col).
"""

from __future__ import annotations

import math

from tvm import te, tirx

from convgen.cpu.vector import (
    Block,
    finish,
    interleave,
    load,
    load_parameters,
    load_within,
    outer_products,
    spread_parameters,
    store,
    written,
    zeros,
)
from convgen.lowering.compute import Operands, ceildiv, copied, round_up, unflat, widen
from convgen.lowering.schedule import Picks, Space, Written, busiest, require

#: Rows of a task, in 1-D tiles; parts of the channels.
BLOCKS, PARTS = (1, 2, 4, 7, 8, 14, 16, 28, 56), (1, 2, 3, 4, 6, 8, 12, 16)


class CpuChannelsLast(Written):
    id, version = "cpu_channels_last", 1

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        gemm = spec.layout == "nchw" and spec.has_unit_kernel
        require(not gemm, "needs NHWC, or more than a 1×1 kernel: cpu_gemm_channels is for these")
        whole = spec.oc // spec.groups % target.lanes == 0
        require(spec.groups == 1 or whole, f"needs groups 1, or multiples of {target.lanes} output channels per group")

    def space(self, spec, target):
        lanes, channels = target.lanes, spec.oc // spec.groups
        g = _Geometry(spec)
        tiles = [lanes * v for v in (1, 2, 3, 4) if lanes * (v - 1) < channels]
        return Space(
            tile_oc=[t for t in tiles if spec.groups == 1 or channels % t == 0],
            tile_px=[p for p in range(1, 29) if p <= g.out[2]],
            block=[b for b in BLOCKS if b == 1 or b < 2 * g.blockable(1)],
            order=["oc", "pixels"],
            parallel_oc=list(PARTS),
        )

    def valid(self, spec, target, picks):
        most = _most_pixels(target, picks)
        require(picks.tile_px <= most, f"{picks.tile_px} pixels in a tile, registers for {most}")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")
        require(picks.block < 2 * _Geometry(spec).blockable(picks.tile_px), "block exceeds what there is")

    def default(self, spec, target):
        lanes, space, g = target.lanes, self.space(spec, target).domains, _Geometry(spec)
        base = Picks(tile_oc=lanes, tile_px=1, block=1, order="oc", parallel_oc=1)
        tiles = [base.replace(tile_oc=o, tile_px=p) for o in space["tile_oc"] for p in space["tile_px"]]
        tiles = [picks for picks in tiles if picks.tile_px <= _most_pixels(target, picks)]
        base = min(tiles, key=lambda p: (_row_cycles(spec, target, p), p.tile_oc // lanes + p.tile_px))
        weights = 4 * math.prod(spec.weights_shape)
        base = base.replace(order="pixels" if weights <= target.l2 // 2 else "oc")
        points = [base.replace(block=b, parallel_oc=p) for b in space["block"] for p in space["parallel_oc"]]
        points = [picks for picks in points if self.reason_against(spec, target, picks) is None]
        room = target.l2 // 2

        def penalty(picks):
            """Time; what a task reads again and again should stay in its core's cache."""
            most = 4 * spec.ic * math.prod(g.extent(picks))
            return _cycles(spec, target, picks) * (1 + 0.05 * (most > room)), picks.parallel_oc, -picks.block

        return min(points, key=penalty)

    def cost(self, spec, target):
        cycles = _cycles(spec, target, self.default(spec, target))
        return cycles * 2 * target.lanes * target.cores / (0.95 * target.peak_flops)

    def program(self, spec, target, picks):
        ops, g, tile = Operands(spec), _Geometry(spec), picks.tile_oc

        def packed_weights(b, tap, k, t):
            taps = unflat(tap, g.taps)
            within, c = (k // g.channels,), k % g.channels
            value = ops.weights[(b * tile + t, c, *(taps if g.apart else [*taps[:-1], *within])[3 - spec.rank :])]
            return tirx.if_then_else(b * tile + t < spec.oc, value, tirx.const(0, "float32"))

        shape = (ceildiv(spec.oc, tile), math.prod(g.taps), g.run, tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed"), *map(copied, ops.parameters[1:])]
        return written(ops, packed, lambda *buffers: _kernel(spec, g, picks, target.lanes, *buffers))


def _most_pixels(target, picks):
    """Pixels of a tile: its sums share the registers with a vector of weights for each of its vectors of channels and
    a scalar, which these share.
    """
    return (target.vector_registers - 1) // (picks.tile_oc // target.lanes) - 1


class _Geometry:
    """The spec with three spatial axes, those it lacks of size 1."""

    def __init__(self, spec):
        more = 3 - spec.rank
        self.rank = spec.rank
        self.out, self.size, self.kernel, self.stride, self.dilation, self.window = (
            (1,) * more + tuple(values)
            for values in (spec.out_spatial, spec.in_spatial, spec.kernel, spec.stride, spec.dilation, spec.window)
        )
        self.begin = (0,) * more + tuple(begin for begin, _ in spec.padding)
        self.channels = spec.ic // spec.groups
        #: Whether the taps of a row are apart from each other.
        self.apart = spec.groups > 1 or self.dilation[2] > 1
        self.taps = self.kernel if self.apart else (*self.kernel[:2], 1)
        self.run = self.channels * (1 if self.apart else self.kernel[2])
        #: Whether rows are copied: for their padding, or to convert numbers once.
        self.copies = not spec.has_unit_kernel or (spec.dtype != "f32" and spec.oc > 64)

    def blockable(self, tile_px):
        """What a task takes a block of: rows; in 1-D, tiles."""
        return self.out[1] if self.rank > 1 else ceildiv(self.out[2], tile_px)

    def blocks(self, picks):
        """Rows of a task, and tiles of each."""
        tiles = ceildiv(self.out[2], picks.tile_px)
        return (picks.block, tiles) if self.rank > 1 else (1, min(picks.block, tiles))

    def extent(self, picks):
        """Planes, rows and columns that a task reads."""
        rows, tiles = self.blocks(picks)
        pixels = min(tiles * picks.tile_px, self.out[2])
        return [(o - 1) * s + w for o, s, w in zip((1, rows, pixels), self.stride, self.window, strict=True)]


def _chunks(pixels, lanes):
    """Pixels of each vector that a row of so many is stored as."""
    return [min(lanes, pixels - t) for t in range(0, pixels, lanes)]


def _tile_cycles(spec, target, g, vectors, pixels):
    """Of a tile, in FMAs: its products, or what takes longer: loads, a sum's latency; and the store."""
    lanes = target.lanes
    fmas = target.fmas  # beside two loads
    step = max(vectors * pixels, fmas / 2 * (vectors + pixels), 5.5 * fmas)
    if 4 * spec.reduction_length * vectors * lanes > target.l1 // 2:
        step = max(step, 3 * vectors)  # weights on their way from the L2 cache
    # Pixels so far apart that their cache lines, eight of which have a place, displace each other.
    apart = 4 * spec.ic * g.stride[2]
    if pixels > 8 * (target.l1 // 8) // math.gcd(target.l1 // 8, apart) - vectors:
        step *= 2
    store = vectors * pixels * (3 + 2 * spec.residual)
    if spec.layout == "nchw":  # whole vectors; or with masks, which are slow before AVX-512
        store += vectors * lanes * sum(4 if c == lanes else 6 if lanes == 16 else 30 for c in _chunks(pixels, lanes))
    return math.prod(g.taps) * (g.run * step + 6 * fmas) + store + 10 * fmas


def _row_cycles(spec, target, picks):
    """Of a row of pixels with all channels of a group."""
    g, lanes = _Geometry(spec), target.lanes
    many, left = divmod(ceildiv(spec.oc // spec.groups, lanes), picks.tile_oc // lanes)
    tiles, rest = divmod(g.out[2], picks.tile_px)
    total = 0.0
    for vectors, channel_blocks in ((picks.tile_oc // lanes, many), (left, int(left > 0))):
        for pixels, times in ((picks.tile_px, tiles), (rest, int(rest > 0))):
            if channel_blocks and times:
                total += channel_blocks * times * _tile_cycles(spec, target, g, vectors, pixels)
    return total


def _cycles(spec, target, picks):
    """Of the busiest core, in FMAs."""
    g, lanes = _Geometry(spec), target.lanes
    rows, tiles = g.blocks(picks)
    row = spec.groups * _row_cycles(spec, target, picks) / ceildiv(g.out[2], picks.tile_px)  # of a tile
    copy = (4 if spec.layout == "nhwc" else 8) * math.prod(g.extent(picks)) * spec.ic / lanes if g.copies else 0
    whole = spec.n * g.out[0]
    across = ceildiv(g.out[1], rows) if g.rank > 1 else ceildiv(ceildiv(g.out[2], picks.tile_px), tiles)
    blocks = ceildiv(spec.oc, picks.tile_oc)
    parts = [blocks * (p + 1) // picks.parallel_oc - blocks * p // picks.parallel_oc for p in range(picks.parallel_oc)]
    last = (g.out[1] % rows or rows) / rows if g.rank > 1 else 1

    def task(part, share):
        return share * (rows * tiles * row * part / blocks + copy) + 200

    if whole * across * len(parts) > 64 * target.cores:
        return whole * sum(across * task(part, 1) for part in parts) / target.cores
    shares = [1] * (across - 1) + [last]
    return busiest([task(part, s) for part in parts for _ in range(whole) for s in shares], target.cores)


def _kernel(spec, g, picks, lanes, src, residual, parameters, dst):
    """All of the layer: a loop over parts of the channels and blocks of rows."""
    weights = parameters.pop("weights")
    more = 3 - spec.rank
    rows, tiles = g.blocks(picks)
    blocks_y, blocks_x = ceildiv(g.out[1], rows), ceildiv(ceildiv(g.out[2], picks.tile_px), tiles)
    blocks, most, parts = ceildiv(spec.oc, picks.tile_oc), picks.tile_oc // lanes, picks.parallel_oc
    last = ceildiv(spec.oc - (blocks - 1) * picks.tile_oc, lanes)  # vectors of the last block
    planes, lines, columns = g.extent(picks)
    channels_last = spec.layout == "nhwc"
    # NCHW: whole vectors of pixels, and of the last one's channels.
    width = round_up(columns * spec.ic if channels_last else round_up(columns, lanes) * spec.ic + lanes, lanes)
    whole = Block()

    def place(n, pixel, channel):
        return [n, *pixel[more:], channel] if channels_last else [n, channel, *pixel[more:]]

    def copied_rows(block, n, corner):
        """The rows that the task reads from ``corner`` on, zeros outside the image."""
        panel = block.buffer((planes, lines, width))
        with block.loop(planes) as (plane, z), plane.loop(lines) as (line, y):
            at = [line.let(c + i) for c, i in zip(corner[:2], (z, y), strict=True)]
            inside = tirx.all(*(c for i, size in zip(at, g.size, strict=False) for c in (i >= 0, i < size)))
            for condition, there in ((inside, True), (tirx.Not(inside), False)):
                with line.when(condition) as branch:
                    if there and not channels_last:
                        transposed_row(branch, panel, n, z, y, at, corner[2])
                        continue
                    with branch.loop(width // lanes) as (one, i):
                        value = zeros(lanes)
                        if there:
                            first = one.let(corner[2] * spec.ic + i * lanes)
                            row = place(n, (*at, 0), first)
                            value = load_within(src, spec.dtype, row, lanes, lanes, size=g.size[2] * spec.ic)
                        one.add(store(panel, "f32", [z, y, i * lanes], value, lanes, lanes))
        return panel

    def transposed_row(block, panel, n, z, y, at, x0):
        """A row of each channel's plane as one row of pixels, squares of vectors at a time."""
        full, rest = divmod(spec.ic, lanes)
        with block.loop(ceildiv(columns, lanes)) as (some, i), some.loop(full + (rest > 0)) as (square, j):
            x = square.let(x0 + i * lanes)
            for these, channels in square.cases(j, full, lanes, rest):
                c = these.let(j * lanes)
                rows = [load_within(src, spec.dtype, place(n, (*at, x), c + k), lanes, lanes) for k in range(channels)]
                rows = [these.let(row) for row in rows] + [zeros(lanes)] * (lanes - channels)
                # Fewer channels than a vector has: the next pixel overwrites what follows.
                count = channels if full else lanes
                for k, pixel in enumerate(interleave(these, rows, lanes)):
                    where = [z, y, (i * lanes + k) * spec.ic + c]
                    these.add(store(panel, "f32", where, pixel, lanes, count))

    with whole.loop(parts * spec.n * g.out[0] * blocks_y * blocks_x, parallel=True) as (task, index):
        part, n, z, block_y, block_x = map(task.let, unflat(index, (parts, spec.n, g.out[0], blocks_y, blocks_x)))
        y0, tile0 = task.let(block_y * rows), task.let(block_x * tiles)
        corner = [(z, y0, tile0 * picks.tile_px)[a] * g.stride[a] - g.begin[a] for a in range(3)]
        corner = [task.let(c) for c in corner]
        panel = copied_rows(task, n, corner) if g.copies else None
        first, end = (task.let(p * blocks // parts) for p in (part, part + 1))

        def rows_of(block):
            count = rows if g.out[1] % rows == 0 else tirx.min(rows, g.out[1] - y0)
            with block.loop(count) as (one, r):
                yield one, r

        def tiles_of(block):
            """Code for each tile of a row: ``(block, its first pixel in the task, pixels)``."""
            all_tiles = ceildiv(g.out[2], picks.tile_px)
            count = tiles if all_tiles % tiles == 0 else tirx.min(tiles, all_tiles - tile0)
            with block.loop(count) as (one, i):
                full, rest = divmod(g.out[2], picks.tile_px)
                for these, pixels in one.cases(tile0 + i, full, picks.tile_px, rest):
                    yield these, these.let(i * picks.tile_px), pixels

        def channels_of(block):
            """Code for each block of channels: ``(block, its number, vectors)``."""
            with block.loop(blocks // parts if blocks % parts == 0 else end - first) as (one, j):
                b = one.let(first + j)
                for these, vectors in one.cases(b, blocks - (last < most), most, last if last < most else None):
                    yield these, b, vectors

        def product(block, b, vectors, r, x, pixels):
            """Channels of block ``b`` times ``pixels`` of row ``r`` of the task from ``x`` on, and what follows."""
            sums = block.registers([(t, v) for t in range(pixels) for v in range(vectors)], lanes)
            group = 0 if spec.groups == 1 else block.let(b * picks.tile_oc // (spec.oc // spec.groups) * g.channels)
            with block.loop(math.prod(g.taps)) as (turn, tap):
                kz, ky, kx = unflat(tap, g.taps)

                def scalar(t, k):
                    if panel is None:
                        pixel = (z, y0 + r, tile0 * picks.tile_px + x + t)
                        at = [p * s for p, s in zip(pixel, g.stride, strict=True)]
                        return widen(src[tuple(place(n, at, group + k))], spec.dtype)
                    column = (x + t) * g.stride[2] + kx * g.dilation[2]
                    line = r * g.stride[1] + ky * g.dilation[1]
                    return panel[kz * g.dilation[0], line, column * spec.ic + group + k]

                outer_products(
                    turn, sums, g.run, scalar, lambda v, k: load(weights, "f32", [b, tap, k, v * lanes], lanes, lanes)
                )
            for v in range(vectors):
                o = block.let(b * picks.tile_oc + v * lanes)
                if not channels_last:
                    stored_planes(block, sums, v, o, r, x, pixels)
                    continue
                for these, count in block.cases(o, spec.oc - spec.oc % lanes, lanes, spec.oc % lanes):
                    given = load_parameters(these, parameters, o, lanes, count)
                    for t in range(pixels):
                        at = place(n, (z, y0 + r, tile0 * picks.tile_px + x + t), o)
                        finish(these, spec, dst, residual, at, sums[t, v], lanes, count, **given)

        def stored_planes(block, sums, v, o, r, x, pixels):
            """A vector of channels as rows of pixels."""
            for t, count in enumerate(_chunks(pixels, lanes)):
                columns = [sums[t * lanes + i, v] if i < count else zeros(lanes) for i in range(lanes)]
                for k, row in enumerate(interleave(block, columns, lanes)):
                    with block.when(True if spec.oc % lanes == 0 else o + k < spec.oc) as there:
                        given = spread_parameters(there, parameters, o + k, lanes)
                        at = place(n, (z, y0 + r, tile0 * picks.tile_px + x + t * lanes), o + k)
                        finish(there, spec, dst, residual, at, row, lanes, count, **given)

        if picks.order == "oc":
            for a, b, vectors in channels_of(task):
                for these, r in rows_of(a):
                    for one, x, pixels in tiles_of(these):
                        product(one, b, vectors, r, x, pixels)
        else:
            for these, r in rows_of(task):
                for one, x, pixels in tiles_of(these):
                    for a, b, vectors in channels_of(one):
                        product(a, b, vectors, r, x, pixels)
    return whole.statement()
