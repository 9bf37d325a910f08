"""Timing a call: samples that the rest of the machine did not disturb, of one call or of several in turn."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

#: A sample repeats the call until it lasts about this long (seconds): long against the clock's tick
#: and the cost of a call, short against what disturbs a shared machine.
SAMPLE_SECONDS = 1e-3
#: Seconds of samples taken of one candidate.
TRIAL_SECONDS = 0.1
#: A sample's length where several are compared.
DUEL_SECONDS = 5e-3
#: A candidate this many times slower than the best is timed only once.
HOPELESS = 2.0


# ---- timing -----------------------------------------------------------------------------------


def repeats(call: Callable[[], Any], seconds: float = SAMPLE_SECONDS) -> int:
    """How often to repeat a call in one sample; warms it up."""
    call()
    start = time.perf_counter()
    call()
    return max(1, min(10_000, int(seconds / max(time.perf_counter() - start, 1e-9))))


def sample(call: Callable[[], Any], count: int) -> float:
    """Seconds per call over ``count`` calls."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def preemptions() -> int:
    """How often the system has taken a CPU away from this process: its involuntary context switches."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def time_calls(
    call: Callable[[], Any], *, seconds: float = 0.1, at_least: int = 5, hopeless: float = 0.0
) -> list[float]:
    """Samples of seconds per call, for about ``seconds`` in all.

    Samples during which something else got one of the CPUs say little of the call: they are left
    out where at least ``at_least`` others remain. Only the first is taken where it exceeds
    ``hopeless`` (0: no limit).
    """
    count = repeats(call)
    samples, quiet = [], []

    def take() -> float:
        before = preemptions()
        samples.append(sample(call, count))
        if preemptions() == before:
            quiet.append(samples[-1])
        return samples[-1]

    first = take()
    if hopeless and first > hopeless:
        return samples
    for _ in range(max(at_least, min(200, int(seconds / max(first * count, 1e-9)))) - 1):
        take()
    return quiet if len(quiet) >= at_least else samples


def alternate(
    calls: Sequence[Callable[[], Any]], *, rounds: int, seconds: float = DUEL_SECONDS, rest: float = 0.0
) -> list[list[float]]:
    """Samples of several calls taken in turn, so that a drifting machine hits all of them alike.

    A round in which something else got one of the CPUs is taken again, at most ``rounds`` times in all.

    Args:
        rounds: samples per call.
        seconds: length of a sample.
        rest: pause before each sample, for another library's spinning threads to go to sleep.
    """
    counts = [repeats(call, seconds) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    kept, again = 0, rounds if calls else 0
    while kept < rounds:
        disturbed, one_round = False, []
        for call, count in zip(calls, counts, strict=True):
            if rest:
                time.sleep(rest)
                call()
            before = preemptions()
            one_round.append(sample(call, count))
            disturbed |= preemptions() != before
        if disturbed and again:
            again -= 1
            continue
        kept += 1
        for taken, seconds_per_call in zip(samples, one_round, strict=True):
            taken.append(seconds_per_call)
    return samples


def reference_kernel(repeats: int = 5) -> float:
    """Seconds of a small fixed computation on one thread: what the machine gives at the moment.

    Multiplications and additions on 32 KiB, about 0.4 ms of them, the median of ``repeats``. It
    takes a busy core, a lower clock or another machine's share of the core as long as anything else.
    """
    values = np.ones(8192, np.float32)

    def compute() -> None:
        for _ in range(200):
            np.multiply(values, np.float32(0.5), out=values)
            np.add(values, np.float32(1.0), out=values)

    compute()
    return statistics.median(sample(compute, 1) for _ in range(repeats))
