"""How much of this process's CPUs other programs use while something is timed.

A time that was taken beside another program's work is no time of a kernel. The system counts what each CPU does and
what each process uses; the difference is others' work, a virtual machine's neighbours (``steal``) included.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")

#: Above this share figures are not reliable: medians no longer hide it.
RELIABLE = 0.05
#: Seconds below which the system's ticks, of 10 ms, say nothing.
SHORTEST = 0.2

#: Places in a line of ``/proc/stat``, behind the CPU's name: what a CPU does when it is not idle. The times of guests
#: (8 and 9) are in the user's already.
_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ, _STEAL = 0, 1, 2, 5, 6, 7
_BUSY = (_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ, _STEAL)
#: Places in ``/proc/<pid>/stat``, behind the program's name: the parent, and the process's own time and that of its
#: children which have ended.
_PARENT, _TIMES = 1, slice(11, 15)


class BusyWatch:
    """Watches the CPUs that this process may use, from now on.

    What the process and those it has started use is its own: a tuner's workers among them.
    """

    def __init__(self) -> None:
        self._cpus = frozenset(os.sched_getaffinity(0))
        self._start = self._read()

    def share(self) -> float | None:
        """The share of the CPUs' time since the beginning that others have used, from 0 to 1; None where that was too
        short to tell, or the system does not.
        """
        now = self._read()
        if self._start is None or now is None or now[0] - self._start[0] < SHORTEST:
            return None
        seconds, used, own = (after - before for before, after in zip(self._start, now, strict=True))
        ticks = seconds * os.sysconf("SC_CLK_TCK") * len(self._cpus)
        return min(1.0, max(0.0, (used - own) / ticks))

    def _read(self) -> tuple[float, int, int] | None:
        """The time in seconds; and in ticks, how long the CPUs were busy so far, and what of it was our own work."""
        try:
            used = busy_ticks((_PROC / "stat").read_text(), self._cpus)
            return time.monotonic(), used, family_ticks(os.getpid(), _processes())
        except (OSError, ValueError, IndexError):
            return None


def busy_ticks(text: str, cpus: Iterable[int]) -> int:
    """How long some CPUs have been busy, from the text of ``/proc/stat``."""
    wanted = {f"cpu{cpu}" for cpu in cpus}
    ticks = 0
    for line in text.splitlines():
        name, *counts = line.split()
        if name in wanted:
            ticks += sum(int(counts[place]) for place in _BUSY if place < len(counts))
    return ticks


def family_ticks(process: int, stats: Iterable[str]) -> int:
    """What a process, those that it has started, and theirs, have used: of the texts of ``/proc/<pid>/stat``."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for text in stats:
        number, _, rest = text.partition(" (")
        fields = rest.rpartition(")")[2].split()  # a program's name may have anything in it
        children.setdefault(int(fields[_PARENT]), []).append(int(number))
        ticks[int(number)] = sum(map(int, fields[_TIMES]))
    total, waiting = 0, [process]
    while waiting:
        one = waiting.pop()
        total += ticks.get(one, 0)
        waiting += children.get(one, [])
    return total


def _processes() -> list[str]:
    texts = []
    for name in os.listdir(_PROC):
        if name.isdigit():
            try:
                texts.append((_PROC / name / "stat").read_text(errors="replace"))
            except OSError:  # it has ended meanwhile
                continue
    return texts


def crowd_warning(threads: Iterable[int]) -> str:
    """What to say of figures of so many threads; empty where this process may use a CPU for each."""
    usable, most = len(os.sched_getaffinity(0)), max(threads, default=1)
    if most <= usable:
        return ""
    cpus = "one CPU" if usable == 1 else f"{usable} CPUs"
    return f"{most} threads shared {cpus}, as this process may use no more: the figures are not those of a CPU for each"


def busy_warning(shares: Iterable[float | None]) -> str:
    """What to say of figures during which others had these shares of the CPUs; empty where they are reliable."""
    most = max((share for share in shares if share is not None), default=0.0)
    if most <= RELIABLE:
        return ""
    return (
        f"other programs used up to {most:.0%} of the CPUs meanwhile: above {RELIABLE:.0%} the figures are not reliable"
    )
