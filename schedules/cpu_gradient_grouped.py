"""Gradient of weights with few channels per group: pixels in the vector lanes of NCHW, channels in those of NHWC.

Applies to  the gradient of weights of layers of any rank, transposed ones too, NCHW and NHWC, on CPUs. Meant for
            depthwise and grouped layers: a tile has all that a group of few channels has.
Strategy    1. A task has the sums of `block` × `tile_o` channels of the gradient of dst (NCHW), or of vectors of these
               (NHWC: neighbours, that lines in memory are read as they lie), with all channels of src of their groups
               and all taps: threads and their number change no bit.
            2. It goes over all images, `rows` output rows at a time, and over its tiles for these: of `tile_c` channels
               of src × `tile_r` rows of the kernel × the taps of a row. Of a depthwise layer there is one tile, so that
               both tensors are read once.
            3. A step loads a vector of the gradient for each of `tile_o`, and of src for each channel and tap, where it
               lies: nothing is copied or transposed. All their products are added to sums in registers.
            4. Rows of the kernel outside the image are left out. Columns: of NCHW, lanes are masked; of NHWC, pixels
               with the same taps inside are a loop each.
            5. The lanes of NCHW's sums are added up at the end, halves to halves.
            6. Of a transposed layer src and the gradient of dst change places. Its bias is a sum of its own.
Why not     for many channels: each tile would read src again; cpu_gradient puts them in order once instead.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

from convgen.cpu.correlation import Correlation, add_sums_of_channels
from convgen.cpu.gradient_tiles import ChannelTiles, GradientTiles, PixelTiles, Tiling, inside
from convgen.cpu.groups import GroupVectors
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, LINE, pieces
from convgen.cpu.vector import Block, written
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv, nothing_packed
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.layout import PLAIN
from convgen.problem.spec import ConvSpec

#: Taps of a row in one tile, and the longest stride along a row whose pixels are shuffled from whole vectors.
MOST_TAPS, MOST_STRIDE = 9, 4
#: Sums of all tiles of a task, in vectors: its scratch memory.
MOST_SUMS = 1 << 14
#: Vectors at the ends of a line that are code of their own.
MOST_EDGES = 8
#: Cycles of a mask, and of a lane's sum that is stored.
MASKED, REDUCED = 1, 12


class CpuGradientGrouped(Written):
    id, version, directions = "cpu_gradient_grouped", 1, ("weights",)

    def takes_layouts(self, src: str, dst: str) -> bool:
        return src == dst and src in PLAIN

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        relation = Correlation(spec)
        sums = relation.own * relation.taps
        require(sums <= MOST_SUMS, f"{sums} sums of a channel, at most {MOST_SUMS}")
        if spec.layout == "nhwc":
            return
        stride = relation.stride[2]
        require(stride <= MOST_STRIDE, f"a stride of {stride} along a row, at most {MOST_STRIDE}")
        edges = max(_edges(relation, target.lanes, run) for run in _runs(relation))
        require(edges <= MOST_EDGES, f"{edges} vectors at the ends of a row, at most {MOST_EDGES}")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        relation = Correlation(spec)
        outputs, tiles = _outputs(relation, target.lanes), _tiles(relation, target.lanes, 1)
        return Space(
            block=[b for b in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if b <= tiles],
            tile_o=[o for o in (1, 2, 3, 4, 5, 6, 8) if o <= outputs],
            tile_c=[c for c in (1, 2, 3, 4, 5, 6, 8) if c <= relation.own],
            tile_r=[r for r in (1, 2, 3, 4, 5, 7, 9) if r <= math.prod(relation.kernel[:2])],
            rows=sorted({min(relation.lines, 1 << i) for i in range(11)} | {relation.lines}),
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        relation, o = Correlation(spec), picks.tile_o
        used, kept = _sums(relation, picks) + o + 1, picks.block * _kept(relation, picks)
        small = o == picks.tile_c == picks.tile_r == 1
        require(small or used <= target.vector_registers, f"{used} vectors, {target.vector_registers} registers")
        few = o == picks.block == 1
        require(few or kept <= MOST_SUMS, f"{kept} vectors of sums, at most {MOST_SUMS} in scratch memory")
        require(picks.block <= _tiles(relation, target.lanes, o), "block exceeds the tiles")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        relation, tiles = Correlation(spec), ChannelTiles if spec.layout == "nhwc" else PixelTiles

        def statement(src: Any, gradient: Any, parameters: dict[str, Any], dst: Any) -> Any:
            kernel: GradientTiles = tiles(relation, picks, target.lanes, MOST_TAPS, src, gradient, dst)
            block = Block()
            block.add(kernel.statement())
            if spec.bias and relation.is_swapped:
                add_sums_of_channels(block, spec, target.lanes, gradient, dst)
            return block.statement()

        return written(Operands(spec), [nothing_packed()], statement)


def _runs(relation: Correlation) -> list[tuple[int, int]]:
    """The runs of taps of a row: the first, and how many."""
    sizes = [size for size, times in pieces(relation.kernel[2], MOST_TAPS) for _ in range(times)]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _edges(relation: Correlation, lanes: int, run: tuple[int, int]) -> int:
    start, end = inside(relation, lanes, run)
    return start + max(0, ceildiv(relation.width, lanes) - end)


def _sums(relation: Correlation, picks: Picks) -> int:
    return int(picks.tile_o * picks.tile_c * picks.tile_r * min(relation.kernel[2], MOST_TAPS))


def _kept(relation: Correlation, picks: Picks) -> int:
    """Vectors of sums of a tile of outer's channels."""
    tiles = Tiling(relation.own, picks.tile_c).count * Tiling(math.prod(relation.kernel[:2]), picks.tile_r).count
    return int(tiles * picks.tile_o * picks.tile_c * picks.tile_r * relation.kernel[2])


def _outputs(relation: Correlation, lanes: int) -> int:
    """Channels of outer in a group; of NHWC, vectors of all."""
    is_last = relation.spec.layout == "nhwc"
    return GroupVectors(relation.channels, lanes).number if is_last else relation.group


def _tiles(relation: Correlation, lanes: int, o: int) -> int:
    """Tiles of outer's channels."""
    groups = 1 if relation.spec.layout == "nhwc" else relation.spec.groups
    return groups * Tiling(_outputs(relation, lanes), o).count


def _shared(relation: Correlation, target: Target, block: int, o: int) -> int:
    """Tiles of a block that read the same of inner: of NCHW those of a group."""
    groups = 1 if relation.spec.layout == "nhwc" else relation.spec.groups
    return min(block, _tiles(relation, target.lanes, o) // groups)


@lru_cache(maxsize=1024)
def _default(schedule: CpuGradientGrouped, spec: ConvSpec, target: Target) -> Picks:
    domains, core, relation = schedule.space(spec, target).domains, core_of(target), Correlation(spec)
    is_last = spec.layout == "nhwc"

    def block(o: int, c: int, r: int) -> int:
        """All that leaves each core a task and its sums a quarter of the L2 cache; of NCHW, what reads a group again.
        Where images are small that is more, as long as tasks are many: planes of channels that follow each other are
        fetched ahead, single ones of image after image are not.
        """
        tiles = _tiles(relation, target.lanes, o)
        most, of_group = tiles // target.cores, tiles // spec.groups
        if not is_last:
            read = 4 * relation.own * math.prod(relation.inner.size)
            most = max(min(most, of_group), min(most // 8, of_group * ceildiv(8 * target.l1, read)))
        kept = 4 * target.lanes * _kept(relation, Picks(tile_o=o, tile_c=c, tile_r=r))
        return max(int(b) for b in domains["block"] if b == 1 or (b <= most and 4 * b * kept <= target.l2))

    def rows(each: int, o: int, c: int, r: int) -> int:
        """All where nothing is read again, else as many as half of the L2 cache has room for."""
        alone = c == relation.own and r == math.prod(relation.kernel[:2]) and len(_runs(relation)) == 1
        if alone and _shared(relation, target, each, o) == 1:
            return relation.lines
        read = relation.own * relation.stride[1] * relation.stride[2]
        if is_last:
            vectors = GroupVectors(relation.channels, target.lanes)
            numbers = each * o * vectors.count + ceildiv(each * o, vectors.parts) * vectors.groups * read
        else:
            numbers = each * o + read
        return max(int(n) for n in domains["rows"] if n == 1 or 4 * n * relation.width * numbers <= target.l2 // 2)

    points = []
    for o, c, r in itertools.product(*(domains[name] for name in ("tile_o", "tile_c", "tile_r"))):
        each = block(o, c, r)
        points.append(Picks(block=each, tile_o=o, tile_c=c, tile_r=r, rows=rows(each, o, c, r)))
    good = [picks for picks in points if schedule.reason_against(spec, target, picks) is None]
    return min(good, key=lambda picks: core.cycles(_counts(spec, target, picks)))


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """Of the busiest core."""
    relation, lanes, is_last = Correlation(spec), target.lanes, spec.layout == "nhwc"
    o, c, r = picks.tile_o, picks.tile_c, picks.tile_r
    vectors = GroupVectors(relation.channels, lanes)
    number = ceildiv(_tiles(relation, lanes, o), picks.block)
    tasks = min(_tiles(relation, lanes, o), picks.block * ceildiv(number, target.cores))
    tiles = Tiling(relation.own, c).count * Tiling(math.prod(relation.kernel[:2]), r).count
    passes, lines = tasks * spec.n * tiles, relation.lines
    work = [Work(tasks, cycles=BEGIN_TASK)]
    for run in _runs(relation):
        sums, stride, taps = o * c * r * run[1], relation.stride[2], run[1]
        if is_last:
            steps, edges = relation.width, 0
            loads, shuffles = o + o * c * r * taps * vectors.loaded, o * c * r * taps * vectors.permuted
        else:
            steps, edges = ceildiv(relation.width, lanes), _edges(relation, lanes, run)
            offsets = {k * relation.dilation[2] // stride for k in range(taps)} if stride > 1 else set(range(taps))
            apart = 2 if lanes == LINE else 1.5  # most vectors lie in two lines
            loads = o + c * r * len(offsets) * stride * apart
            shuffles = c * r * taps * (stride - 1)
        # What several tiles read comes from the L2 cache each time.
        is_again = tiles * _shared(relation, target, picks.block, o) > 1
        near = 1.5 * 4 * lanes * (o + c * r * (o if is_last else 1)) * is_again
        work.append(Work(passes * lines * steps, fmas=sums, loads=loads, shuffles=shuffles, near=near, chain=1))
        work.append(Work(passes * lines, cycles=BEGIN_RUN + MASKED * edges * loads))
        work.append(Work(passes * ceildiv(lines, picks.rows), loads=2 * sums, stores=sums, cycles=BEGIN_TILE))
    stored = tasks * _kept(relation, picks)
    work.append(Work(stored, cycles=REDUCED if not is_last else 2 * lanes))
    share = tasks / _tiles(relation, lanes, o)
    again = ceildiv(vectors.parts if is_last else relation.group, o * picks.block)
    inner, outer = ("residual", "src") if relation.is_swapped else ("src", "residual")
    moved = [
        Stream(spec.bytes[outer] * share, ahead=1),
        Stream(spec.bytes[inner] * share * again, ahead=1),
        Stream(spec.bytes["dst"] * share),
    ]
    return Counts(work, moved)
