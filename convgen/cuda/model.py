"""What a GPU is taken to reach where CUDA schedules predict times.

The figures are nominal, of no particular device; they only serve to rank candidates.
"""

from __future__ import annotations

from ..hardware.target import Target
from ..lowering.compute import ceildiv

#: f32 multiply-adds that an SM begins in a cycle, and its cycles in a second.
LANES, CLOCK = 128, 1.7e9
#: Bytes a second between memory and an SM.
BANDWIDTH = 15e9
#: Seconds a launch takes.
LAUNCH = 3e-6
#: FLOP per second of an SM whose threads add up one product after another, and the least that such a launch takes.
SCALAR_FLOPS, SCALAR_LAUNCH = 5e9, 1e-5
#: What an SM of an A100 does in a cycle: bytes through shared memory, bytes from L2; and its cycles in a second.
SHARED_BYTES, L2_BYTES, MATRIX_CLOCK = 128, 40, 1.4e9
#: Cycles that a step of a matrix product waits for L2, shared by the steps under way; that any step costs besides;
#: of a launch.
L2_CYCLES, STEP_CYCLES, LAUNCH_CYCLES = 800, 40, 2000
#: Bytes a second that a launch moves: one that adds up parts of sums, one that lays out src.
PARTS_BANDWIDTH, LAYOUT_BANDWIDTH = 2e12, 1e12
#: 32-bit registers of an SM, and the most a thread may have.
REGISTERS, MOST_REGISTERS = 1 << 16, 255
#: Bytes of shared memory that the system takes for every block, besides what the block asks for.
RESERVED = 1024


def blocks_per_core(target: Target, threads: int, shared: int, registers: int) -> int:
    """Thread blocks an SM holds at once, at most."""
    limits = [target.threads_per_core // threads, REGISTERS // (threads * min(registers, MOST_REGISTERS))]
    if shared:
        limits.append(target.shared_per_core // (shared + RESERVED))
    return max(1, min(limits))


def scalar_seconds(target: Target, flops: float) -> float:
    """Predicted seconds of a launch without any reuse."""
    return flops / (target.cores * SCALAR_FLOPS) + SCALAR_LAUNCH


def seconds(target: Target, blocks: int, macs: float, moved: float, threads: int, resident: int) -> float:
    """Predicted seconds of a launch.

    Blocks on one SM share its lanes; too few threads do not fill them. Arithmetic and memory overlap: the longer of
    the two counts, and a quarter of the other.

    Args:
        blocks, threads: blocks of the launch, and threads of a block.
        macs: multiply-adds of a block.
        moved: bytes from and to memory, of the launch.
        resident: blocks that an SM holds at once.
    """
    turns = ceildiv(blocks, target.cores)  # blocks of one SM, one after the other or side by side
    side_by_side = min(resident, turns)
    busy = min(1.0, side_by_side * threads / (2 * LANES))
    compute = turns * macs / (LANES * CLOCK * busy)
    memory = moved / (BANDWIDTH * min(blocks, target.cores))
    return max(compute, memory) + min(compute, memory) / 4 + LAUNCH
