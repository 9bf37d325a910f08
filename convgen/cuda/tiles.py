"""How a product without matrix units is divided among thread blocks and threads: the picks, and the predicted time."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from ..cuda import model
from ..hardware.target import Target
from ..lowering.compute import ceildiv, round_up
from ..lowering.schedule import Picks, Space, require
from ..problem.spec import ConvSpec


class Tile(NamedTuple):
    """What a thread block computes: ``tile_m`` × ``tile_n`` sums, and of each sum ``tile_k`` products at a time.

    A thread has ``thread_m`` × ``thread_n`` of the sums.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    thread_m: int
    thread_n: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.tile_m // self.thread_m * (self.tile_n // self.thread_n)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: slices of both operands, as f32."""
        return 4 * self.tile_k * (self.tile_m + self.tile_n)

    @property
    def registers(self) -> int:
        """Registers of a thread, estimated: the sums, a column and a row of operands, and 48 for addresses."""
        return self.thread_m * self.thread_n + self.thread_m + self.thread_n + 48


class Size(NamedTuple):
    """How large a batch of products ``[rows, depth] × [depth, columns]`` is."""

    batch: int
    rows: int
    columns: int
    depth: int

    def blocks(self, tile: Tile) -> int:
        """Thread blocks, with a tile each."""
        return self.batch * ceildiv(self.rows, tile.tile_m) * ceildiv(self.columns, tile.tile_n)


def space(size: Size) -> Space:
    """Tiles not much larger than the product."""
    return Space(
        tile_m=[m for m in (16, 32, 64, 128, 256) if m == 16 or m < 2 * size.rows],
        tile_n=[n for n in (4, 8, 16, 32, 64, 128) if n == 4 or n < 2 * size.columns],
        tile_k=[k for k in (4, 8, 16, 32) if k == 4 or k < 2 * size.depth],
        thread_m=[1, 2, 4, 8],
        thread_n=[1, 2, 4, 8],
    )


def check(target: Target, tile: Tile) -> None:
    """Raise :class:`~convgen.errors.Inapplicable` where a tile does not fit into a thread block."""
    threads, shared = tile.threads, tile.shared
    require(tile.thread_n <= tile.tile_n, "a thread has more channels than its block")
    require(threads % 32 == 0, f"{threads} threads are not whole warps")
    require(threads <= 1024, f"{threads} threads, at most 1024 in a block")
    require(shared <= target.shared_memory, f"{shared} bytes of shared memory, at most {target.shared_memory}")
    fits = threads * tile.registers <= model.REGISTERS
    require(fits, f"{threads} threads of about {tile.registers} registers, {model.REGISTERS} in all")


def default(target: Target, size: Size, gather: float) -> Picks:
    """The tile whose predicted time is least; ``gather`` as :func:`compute_seconds` takes it."""
    tile_k = 16 if size.depth > 8 else 8 if size.depth > 4 else 4
    domains = space(size).domains | {"tile_k": (tile_k,)}
    tiles = [Tile(*values) for values in itertools.product(*domains.values())]
    fitting = [t for t in tiles if t.thread_n <= t.tile_n and t.threads in (32, 64, 128, 256)]
    best = min(fitting, key=lambda tile: (compute_seconds(target, size, tile, gather), tile))
    return Picks(**best._asdict())


def of(picks: Picks) -> Tile:
    """The tile that picks name, which may have other names too."""
    return Tile(*(picks[name] for name in Tile._fields))


def compute_seconds(target: Target, size: Size, tile: Tile, gather: float, moved: float = 0, share: float = 1) -> float:
    """Predicted seconds of a launch.

    Args:
        gather: instructions that fetch an element of the first operand.
        moved: bytes from and to memory.
        share: the share of the depth that is computed, on average; the rest is skipped.
    """
    m, n = tile.thread_m, tile.thread_n
    # Per product of a thread: its FMA, its share of vector loads from shared memory, and of copying a slice there.
    instructions = 1 + (1 / m + 1 / n) / 2 + gather / tile.tile_n + 1 / tile.tile_m
    from_shared, from_l2 = 1.5 * (1 / m + 1 / n), 8 * (1 / tile.tile_m + 1 / tile.tile_n)
    slowdown = max(instructions, from_shared) + from_l2
    macs = tile.tile_m * tile.tile_n * round_up(size.depth, tile.tile_k) * slowdown * share
    resident = model.blocks_per_core(target, tile.threads, tile.shared, tile.registers)
    return model.seconds(target, size.blocks(tile), macs, moved, tile.threads, resident)


def cost(spec: ConvSpec, target: Target, size: Size, gather: float, share: float = 1) -> float:
    """Predicted seconds of the default; ``gather`` and ``share`` as :func:`compute_seconds` takes them."""
    tile = of(default(target, size, gather))
    return compute_seconds(target, size, tile, gather, sum(spec.bytes.values()), share)
