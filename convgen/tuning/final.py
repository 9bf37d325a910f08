"""The final comparison of a layer: its leaders, the default and ONNX Runtime timed in turn decide."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from ..errors import MeasureError
from ..lowering.schedule import Candidate
from ..measure.busy import BusyWatch
from ..measure.compare import ratio_interval
from ..measure.standalone.timing import TRIAL_SECONDS
from ..measure.trial import candidate_module
from ..records.outcome import Result
from ..records.record import TuningRecord
from .rounds import LOOK_SECONDS, Round
from .search import Search

#: How many turns each kernel gets.
ROUNDS = 9


def final_comparison(search: Search) -> TuningRecord | None:
    """Time the leaders, the default and ONNX Runtime in turn, and keep the figures.

    A tuned candidate wins where the interval of its ratio to the default lies above 1, else the
    default does. Nothing is measured where an earlier comparison had the same candidates.

    Returns:
        The winner's record; None where no candidate is right, or Ctrl-C came.

    Raises:
        BuildError: a leader cannot be lowered any more.
    """
    search.refresh()
    if search.answered:
        return search.winner
    if all(seconds is None for seconds in search.tried.values()):
        return None
    search.state.phase = "final"
    search.report(search.state)
    _try_default(search)
    interrupts = search.context.pools.interrupts
    libraries = built(search, search.leaders())
    if not libraries or interrupts.came:
        return None
    results, peer = _compare(search, libraries)
    if interrupts.came:
        return None
    records = _records(search, results, peer)
    search.conclude(records)
    search.state.phase = "done"
    search.report(search.state)
    return search.winner


def _try_default(search: Search) -> None:
    """Measure the default if that was not yet done: here, or elsewhere meanwhile."""
    interrupts, default = search.context.pools.interrupts, search.race.default
    while default not in search.tried and not interrupts.came:
        attempt = Round(search, search.draw_default())
        if attempt.building:
            attempt.measure(lambda: interrupts.came)
        elif default not in search.tried:
            time.sleep(LOOK_SECONDS)


def built(search: Search, candidates: Sequence[Candidate]) -> list[tuple[Candidate, str]]:
    """Candidates and their libraries, those that were kept or built again; without those that cannot be built.

    Raises:
        BuildError, Inapplicable: one cannot be lowered any more.
    """
    libraries = search.libraries
    missing = [candidate for candidate in candidates if candidate not in libraries]
    if missing:
        modules = [candidate_module(search.spec, search.context.target, candidate) for candidate in missing]
        for candidate, path in zip(missing, search.context.pools.build(modules), strict=True):
            if isinstance(path, str):
                libraries[candidate] = path
    return [(candidate, libraries[candidate]) for candidate in candidates if candidate in libraries]


def _compare(
    search: Search, leaders: list[tuple[Candidate, str]]
) -> tuple[list[tuple[Candidate, Result]], list[float] | None]:
    """Time libraries in turn; ONNX Runtime's samples as well where it can take part."""
    context = search.context
    pools, threads, expected = context.pools, context.threads, context.expected(search.spec)
    watch = None if pools.runner.isolated else BusyWatch()  # a device's CPUs are not watched
    try:
        samples, peer = pools.compare([path for _, path in leaders], expected, threads, ROUNDS)
    except MeasureError:  # one of them fails now and then: it shows when each runs by itself
        return [(c, pools.run(path, expected, threads, seconds=TRIAL_SECONDS)) for c, path in leaders], None
    busy = None if watch is None else watch.share()
    return [(c, Result("ok", tuple(taken), busy=busy)) for (c, _), taken in zip(leaders, samples, strict=True)], peer


def _records(
    search: Search, results: list[tuple[Candidate, Result]], peer: list[float] | None
) -> dict[Candidate, TuningRecord]:
    """The records of a comparison, the winner's last."""
    times = [result.samples if result.outcome == "ok" else None for _, result in results]
    default = next((i for i, (c, _) in enumerate(results) if c == search.race.default and times[i]), None)
    winner, notes = judge(times, default, peer)
    cost = search.charge() / max(len(results), 1)
    order = sorted(range(len(results)), key=lambda i: i == winner)
    return {results[i][0]: search.record(*results[i], {**notes[i], "cost": cost}) for i in order}


def judge(
    times: Sequence[Sequence[float] | None], default: int | None, peer: Sequence[float] | None = None
) -> tuple[int | None, list[dict[str, Any]]]:
    """Which of several kernels wins: the fastest that is certainly faster than the default, else the default.

    Args:
        times: samples of each in seconds, taken in turn; None where it failed.
        default: which is the default; None: it is not among them, or failed. The fastest wins then.
        peer: samples of ONNX Runtime, taken in turn with them.

    Returns:
        The winner's index, None where all failed; and what the record of each says (see
        :attr:`~convgen.records.record.TuningRecord.note`). Ratios are the other's time over the kernel's.
    """
    base = times[default] if default is not None else None
    against = [ratio(base, taken) if base and taken else None for taken in times]
    ranked = sorted((statistics.median(taken), i) for i, taken in enumerate(times) if taken)
    winner = next((i for _, i in ranked if i == default or (r := against[i]) is None or r[1] > 1.0), None)
    notes = [
        {
            "final": True,
            "default_seconds": statistics.median(base) if base else None,
            "onnxruntime_seconds": statistics.median(peer) if peer else None,
            "ratio_default": against[i],
            "ratio_onnxruntime": ratio(peer, taken) if peer and taken else None,
            "winner": i == winner,
        }
        for i, taken in enumerate(times)
    ]
    return winner, notes


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratio of two medians and its 95 % bootstrap interval: ``[median, low, high]``."""
    count = min(len(above), len(below))
    above, below = above[:count], below[:count]
    return [statistics.median(above) / statistics.median(below), *ratio_interval(above, below)]
