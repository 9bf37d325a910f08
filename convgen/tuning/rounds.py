"""Rounds of a search: draw candidates, lower them, compile them, measure them, and keep each trial as it ends.

:func:`take_rounds` keeps the workers busy with the rounds of any number of searches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any

from ..errors import BuildError, Inapplicable
from ..lowering.schedule import Candidate
from ..measure.standalone.timing import HOPELESS, TRIAL_SECONDS
from ..measure.trial import CandidateModule, Expected, candidate_module
from ..measure.workers import Pools
from ..records.outcome import INTERRUPTED, Result
from .race import ROUND
from .search import Search

#: Seconds between two looks at what another job is measuring.
LOOK_SECONDS = 0.2


def begin_round(search: Search, count: int) -> Round:
    """Draw up to ``count`` candidates and begin to compile them."""
    return Round(search, search.draw(count))


class Round:
    """Candidates of a search that are being compiled, and then measured.

    Those that are not valid after all are dropped; those that TVM cannot schedule have failed.

    Args:
        search: told how the trials end.
        drawn: candidates that it has claimed.
    """

    def __init__(self, search: Search, drawn: Iterable[Candidate]) -> None:
        self.search = search
        self.building: dict[Candidate, Future[str | Result]] = {}
        self._running: dict[Future[Result], tuple[Candidate, str]] = {}
        modules: dict[Candidate, CandidateModule] = {}
        failed: dict[Candidate, Result] = {}
        for candidate in drawn:
            try:
                modules[candidate] = candidate_module(search.spec, search.context.target, candidate)
            except Inapplicable:
                search.drop(candidate)
            except BuildError as error:
                failed[candidate] = Result("build_error", error=str(error)[-2000:])
        for candidate, result in failed.items():
            search.commit(candidate, result)
        for candidate, module in modules.items():
            self.building[candidate] = search.context.pools.builder.submit(module)

    def measure(self, stop: Callable[[], bool], meanwhile: Callable[[], None] | None = None) -> None:
        """Verify and time what was compiled, and commit each trial as it ends.

        Args:
            stop: whether to end after the trials that are running; where nothing is known of the layer, after the first
                one: a budget too small for it would bring nothing however often it is given.
            meanwhile: called once, when the devices are busy.
        """
        search, pools, running = self.search, self.search.context.pools, self._running
        runner, interrupts = pools.runner, pools.interrupts
        expected = search.context.expected(search.spec)
        # Compiling disturbs what is timed on this machine, and two at a time keep another one busy.
        if not runner.isolated:
            _wait(self.building.values(), lambda: interrupts.came)
        places = runner.devices + (runner.devices if runner.isolated else 0)
        try:
            while (self.building or running) and not interrupts.came:
                stopped = bool(search.tried) and stop()
                if stopped and not running:
                    break
                stopped = self._start(expected, places, stopped, stop)
                if meanwhile and (running or not self.building):
                    meanwhile()
                    meanwhile = None
                waited: list[Future[Any]] = [*running]
                if not stopped and len(running) < places:
                    waited += self.building.values()
                if waited:
                    wait(waited, timeout=0.1, return_when=FIRST_COMPLETED)
                self._finish()
        finally:
            for job, (candidate, path) in running.items():
                search.drop(candidate)
                job.add_done_callback(partial(_discard, pools, path))
            running.clear()
            self.abandon()

    def _start(self, expected: Expected, places: int, stopped: bool, stop: Callable[[], bool]) -> bool:
        """Give the runner what is compiled, as long as it has places; whether it is time to stop."""
        search, runner = self.search, self.search.context.pools.runner
        for candidate in [candidate for candidate, made in self.building.items() if made.done()]:
            if stopped or len(self._running) >= places:
                break
            path = self.building.pop(candidate).result()
            if isinstance(path, str):
                best = search.race.best
                hopeless = HOPELESS * best if best < float("inf") else 0.0
                job = runner.submit(path, expected, search.context.threads, seconds=TRIAL_SECONDS, hopeless=hopeless)
                self._running[job] = candidate, path
            elif path.outcome != INTERRUPTED.outcome:
                search.commit(candidate, path)
                stopped = stop()
        return stopped

    def _finish(self) -> None:
        """Commit the trials that have ended."""
        for job in [job for job in self._running if job.done()]:
            candidate, path = self._running.pop(job)
            result = job.result()
            if result.outcome == INTERRUPTED.outcome:
                self.search.context.pools.discard(path)
                self.search.drop(candidate)
            else:
                self.search.commit(candidate, result)
                self.search.keep_library(candidate, path)

    def abandon(self) -> None:
        """Leave what was not yet measured to others."""
        for candidate, made in self.building.items():
            self.search.drop(candidate)
            made.add_done_callback(partial(_discard_built, self.search.context.pools))
        self.building.clear()


def _discard(pools: Pools, path: str, _: Future[Any]) -> None:
    pools.discard(path)


def _discard_built(pools: Pools, made: Future[str | Result]) -> None:
    if made.exception() is None and isinstance(path := made.result(), str):  # the search has ended by another's error
        pools.discard(path)


def _wait(futures: Collection[Future[Any]], came: Callable[[], bool]) -> None:
    """Until all are done, or Ctrl-C came."""
    while wait(list(futures), timeout=0.1).not_done and not came():
        pass


def round_size(pools: Pools) -> int:
    """Candidates per round: enough for every device."""
    return max(ROUND, 2 * pools.runner.devices)


def take_rounds(pools: Pools, choose: Callable[[], tuple[Search, int] | None], stop: Callable[[], bool]) -> None:
    """Measure round after round until it is time to ``stop``, or there is nothing left to choose.

    Where the devices are other machines, the next round is compiled while one is measured.

    Args:
        choose: the search whose turn it is, and how many candidates at most.
    """

    def begin(wait_for_others: bool) -> Round | None:
        while not stop() and (chosen := choose()):
            search, count = chosen
            next_round = begin_round(search, count)
            if next_round.building:
                return next_round
            if search.in_flight or (search.blocked and not wait_for_others):
                return None
            if search.blocked:
                time.sleep(LOOK_SECONDS)
        return None

    def is_over(current: Round) -> bool:
        return stop() or bool(current.search.over)

    ahead: list[Round] = []

    def meanwhile() -> None:
        ahead.extend(filter(None, [begin(wait_for_others=False)]))

    try:
        while current := ahead.pop() if ahead else begin(wait_for_others=True):
            current.measure(partial(is_over, current), meanwhile if pools.runner.isolated else None)
    finally:
        for left in ahead:
            left.abandon()
