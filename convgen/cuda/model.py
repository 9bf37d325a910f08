"""What the CUDA schedules take a GPU to reach, to predict times: nominal figures, which only rank candidates."""

from __future__ import annotations

from ..hardware.target import Target
from ..lowering.compute import ceildiv

#: f32 multiply-adds an SM does in a cycle, and cycles in a second.
LANES, CLOCK = 128, 1.7e9
#: Bytes a second from memory, of each SM.
BANDWIDTH = 15e9
#: Seconds a launch takes.
LAUNCH = 3e-6
#: 32-bit registers of an SM, and the most a thread may have.
REGISTERS, MOST_REGISTERS = 1 << 16, 255
#: Bytes of shared memory that every block takes besides its own.
RESERVED = 1024


def blocks_per_core(target: Target, threads: int, shared: int, registers: int) -> int:
    """Thread blocks an SM holds at once, at most."""
    limits = [target.threads_per_core // threads, REGISTERS // (threads * min(registers, MOST_REGISTERS))]
    if shared:
        limits.append(target.shared_per_core // (shared + RESERVED))
    return max(1, min(limits))


def seconds(target: Target, blocks: int, macs: float, moved: float, threads: int, resident: int) -> float:
    """Of a launch of ``blocks``, each of ``macs`` multiply-adds and ``threads`` threads, that moves ``moved`` bytes.

    Blocks on one SM share its lanes; too few threads do not fill them. Copies hide most of the arithmetic, or
    it them.
    """
    turns = ceildiv(blocks, target.cores)  # one SM's blocks, one after the other or side by side
    side_by_side = min(resident, turns)
    busy = min(1.0, side_by_side * threads / (2 * LANES))
    compute = turns * macs / (LANES * CLOCK * busy)
    memory = moved / (BANDWIDTH * min(blocks, target.cores))
    return max(compute, memory) + min(compute, memory) / 4 + LAUNCH
