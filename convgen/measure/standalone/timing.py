"""Timing calls: samples that other programs did not disturb, of one call or of several in turn.

Every time that convgen measures on a CPU is taken here, live or by a bundle.
"""

from __future__ import annotations

import resource
import time
from typing import Any, Callable, Sequence

Call = Callable[[], Any]

#: A sample repeats the call until it lasts about this long (seconds): long against the clock's tick
#: and the cost of a call, short against what disturbs a shared machine.
SAMPLE_SECONDS = 1e-3
#: Seconds of samples taken of one candidate.
TRIAL_SECONDS = 0.1
#: A sample's length where several calls are compared.
DUEL_SECONDS = 5e-3
#: A candidate this many times slower than the best is timed only once.
HOPELESS = 2.0


def repeats(call: Call, seconds: float = SAMPLE_SECONDS) -> int:
    """How often to repeat a call in one sample of ``seconds``; warms it up."""
    call()
    start = time.perf_counter()
    call()
    return max(1, min(10_000, int(seconds / max(time.perf_counter() - start, 1e-9))))


def sample(call: Call, count: int) -> float:
    """Seconds per call over ``count`` calls."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def preemptions() -> int:
    """How often the system has taken a CPU away from this process: its involuntary context switches."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def time_calls(
    call: Call,
    *,
    seconds: float = TRIAL_SECONDS,
    sample_seconds: float = SAMPLE_SECONDS,
    hopeless: float = 0.0,
    at_least: int = 5,
) -> list[float]:
    """Samples of seconds per call, for about ``seconds`` in all.

    A sample during which another program got one of the CPUs says little about the call: such samples are left
    out where at least ``at_least`` others remain. Where the first sample exceeds ``hopeless`` (0: no limit), it is
    the only one.
    """
    count = repeats(call, sample_seconds)
    samples: list[float] = []
    quiet: list[float] = []

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
    calls: Sequence[Call], *, rounds: int, seconds: float = DUEL_SECONDS, rest: float = 0.0
) -> list[list[float]]:
    """Samples of several calls taken in turn, so that a drifting machine hits all of them alike.

    A round in which another program got one of the CPUs is taken again, at most ``rounds`` times in all.

    Args:
        rounds: samples per call.
        seconds: length of a sample.
        rest: pause before each sample, for another library's spinning threads to go to sleep.
    """
    counts = [repeats(call, seconds) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    kept, again = 0, rounds if calls else 0
    while kept < rounds:
        is_disturbed, one_round = False, []
        for call, count in zip(calls, counts):
            if rest:
                time.sleep(rest)
                call()
            before = preemptions()
            one_round.append(sample(call, count))
            is_disturbed |= preemptions() != before
        if is_disturbed and again:
            again -= 1
            continue
        kept += 1
        for taken, seconds_per_call in zip(samples, one_round):
            taken.append(seconds_per_call)
    return samples
