"""What a launch on a GPU is taken to cost where CUDA schedules predict times: rates are the target's, the rest is here.

What is here is nominal, of no particular device; it only serves to rank candidates.
"""

from __future__ import annotations

from ..hardware.target import Target
from ..lowering.compute import ceildiv

#: Seconds a launch takes.
LAUNCH = 3e-6
#: FLOP per second of an SM whose threads add up one product after another, and the least that such a launch takes.
SCALAR_FLOPS, SCALAR_LAUNCH = 5e9, 1e-5
#: What is reached of the bytes a cycle that L2 has on paper.
L2_SHARE = 0.85
#: Cycles that a step of a matrix product waits for L2, shared by the steps under way; that any step costs besides;
#: of a launch.
L2_CYCLES, STEP_CYCLES, LAUNCH_CYCLES = 800, 40, 2000
#: Bytes that a launch moves while memory moves one: one that adds up parts of sums, which L2 still has in part; one
#: that lays out src, by single elements.
PARTS_SHARE, LAYOUT_SHARE = 1.3, 0.65
#: 32-bit registers of an SM, and the most a thread may have.
REGISTERS, MOST_REGISTERS = 1 << 16, 255
#: Cycles until a block knows what another block of its cluster has told it. Source: Luo et al., "Benchmarking and
#: Dissecting the Nvidia Hopper GPU Architecture", IPDPS workshops 2024.
CLUSTER_CYCLES = 180
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
    lanes = target.rates.fma
    busy = min(1.0, side_by_side * threads / (2 * lanes))
    compute = turns * macs / (lanes * target.rates.clock * busy)
    memory = moved / (target.rates.memory * min(1.0, blocks / target.cores))
    return max(compute, memory) + min(compute, memory) / 4 + LAUNCH
