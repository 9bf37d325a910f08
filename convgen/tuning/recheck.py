"""Measuring records of other versions again, in turn with the default, before one of them answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..check.validate import validate
from ..errors import BuildError, Inapplicable, MeasureError, RecordError, ValidationError
from ..folders import TemporaryFolder
from ..hardware.target import Target
from ..interrupts import interrupts_held
from ..kernel.kernel import compile_candidate
from ..lowering.candidates import default_candidate
from ..lowering.schedule import Candidate
from ..measure.compare import ratio_interval
from ..measure.trial import CandidateModule, Expected, candidate_module
from ..measure.workers import LocalBuilder, LocalRunner, Pools
from ..problem.spec import ConvSpec
from ..records.answer import Answer, candidate_record, record_candidate
from ..records.outcome import Result
from ..records.record import TuningRecord
from ..records.store import RecordStore

#: Samples of each kernel in a re-check, and seconds of samples that precede them.
ROUNDS, VERIFY_SECONDS = 25, 0.02


@contextmanager
def _some_pools(target: Target, pools: Callable[[], Pools] | None) -> Iterator[Pools]:
    """The given pools, left open, or own ones."""
    if pools is not None:
        yield pools()
        return
    made = Pools(LocalBuilder(max(1, min(2, target.cores))), LocalRunner())
    try:
        yield made
    finally:
        made.close()


def measure_in_turn(
    spec: ConvSpec, target: Target, threads: int, candidates: Iterable[Candidate], pools: Pools
) -> dict[Candidate, Result]:
    """Verify candidates in worker processes, and time those that are right in turn; how each ended.

    Raises:
        KeyboardInterrupt: at the end of the running measurement.
    """
    results: dict[Candidate, Result] = {}
    with interrupts_held() as interrupts, TemporaryFolder() as folder:
        pools.interrupts = interrupts
        modules: dict[Candidate, CandidateModule] = {}
        for candidate in dict.fromkeys(candidates):
            try:
                modules[candidate] = candidate_module(spec, target, candidate)
            except (BuildError, Inapplicable) as error:
                results[candidate] = Result("build_error", error=str(error)[-2000:])
        expected = Expected(spec, folder, threads)
        paths: dict[Candidate, str] = {}
        for candidate, built in zip(modules, pools.build(list(modules.values())), strict=True):
            if isinstance(built, Result):
                results[candidate] = built
            else:
                paths[candidate] = built
                results[candidate] = pools.run(built, expected, threads, seconds=VERIFY_SECONDS)
        right = [candidate for candidate in paths if results[candidate].outcome == "ok"]
        try:
            if right and not interrupts.came:
                samples = pools.duel([paths[candidate] for candidate in right], expected, threads, ROUNDS)
                results |= {c: Result("ok", tuple(taken)) for c, taken in zip(right, samples, strict=True)}
        except MeasureError as error:  # one of them fails now and then, and nobody knows which
            results |= {candidate: Result("crash", error=str(error)) for candidate in right}
        finally:
            for path in paths.values():
                pools.discard(path)
    return results


def ratio_over(default: Result, result: Result) -> list[float] | None:
    """[median, low, high] of the default's time over another's, timed in turn; None where one failed."""
    if default.seconds is None or result.seconds is None:
        return None
    if default is result:
        return [1.0, 1.0, 1.0]
    return [default.seconds / result.seconds, *ratio_interval(default.samples, result.samples)]


def recheck(
    store: RecordStore,
    spec: ConvSpec,
    target: Target,
    threads: int,
    answer: Answer,
    pools: Callable[[], Pools] | None = None,
) -> Answer:
    """Measure the records of an answer again, in turn with the default: in worker processes, in one or two seconds.

    The fastest that is right answers; the default, unless another is faster for certain. Each becomes a
    record of today, of a final comparison where it was right; where the store cannot be written, the
    answer's note says so.

    Args:
        answer: says which records, and why the first of them.
    """
    records, target = answer.to_measure, target.on(threads)
    default = default_candidate(spec, target)
    old = {candidate: record for record in records if (candidate := record_candidate(record, spec, target))}
    with _some_pools(target, pools) as workers:
        results = measure_in_turn(spec, target, threads, [default, *old], workers)
    right = [candidate for candidate in results if results[candidate].outcome == "ok"]
    ratios = {candidate: ratio_over(results[default], results[candidate]) for candidate in right}
    # Where the default is right, another must be faster for certain.
    faster = [candidate for candidate in right if (ratio := ratios[candidate]) is None or ratio[1] > 1]
    winner = min(faster, key=lambda c: results[c].seconds or 0.0, default=default if default in right else None)
    made: dict[Candidate, TuningRecord] = {}
    for candidate, result in results.items():
        note = {
            "final": True,
            "winner": candidate == winner,
            "default_seconds": results[default].seconds,
            "ratio_default": ratios.get(candidate),
            "recheck": records[0].id,
        }
        kept_note = note if result.outcome == "ok" else None
        made[candidate] = candidate_record(spec, target, threads, candidate, result, kept_note)
    kept = "; not kept: the store is read-only" if store.readonly else ""
    if not store.readonly:
        try:
            store.add_all(made.values())
        except RecordError as error:  # of a full disk: the build goes on
            kept = f"; not kept: {error}"
    was = record_candidate(records[0], spec, target)
    if was is not None and was == winner:
        verdict = "still wins"
    elif was is not None and results[was].outcome != "ok":
        verdict = f"has expired: {results[was].outcome}"
    else:
        verdict = f"has expired: {'not faster than the default' if winner == default else 'another is faster'} now"
    said = f"{spec.descriptor}: record {records[0].id[:12]} {answer.reason} was measured again and {verdict}{kept}"
    rejected = frozenset(candidate for candidate in results if candidate not in right)
    return Answer(made[winner] if winner else None, "measured again", said, rejected)


@dataclass(frozen=True)
class Checked:
    """What measuring a record again found.

    Attributes:
        record: the one that was checked.
        outcome: ``ok``; ``slower``, where the default certainly is faster; or how it failed, as in a record.
        ratio_default: the default's time over its own [median, low, high]; None where one failed.
        error: what a failure said.
    """

    record: TuningRecord
    outcome: str
    ratio_default: list[float] | None = None
    error: str = ""


def check_records(
    records: Iterable[TuningRecord], target: Target, pools: Callable[[], Pools] | None = None
) -> Iterator[Checked]:
    """Build what records describe, validate it in full, and time it in turn with the default, one by one."""
    with _some_pools(target, pools) as workers:
        for record in records:
            spec = ConvSpec.parse(record.spec)
            candidate = record_candidate(record, spec, target)
            default = default_candidate(spec, target.on(record.threads))
            if candidate is None:
                yield Checked(record, "inapplicable", error=f"{record.schedule} has changed since, or does not apply")
                continue
            results = measure_in_turn(spec, target, record.threads, [candidate, default], workers)
            if results[candidate].outcome != "ok":
                yield Checked(record, results[candidate].outcome, error=results[candidate].error)
                continue
            ratio = ratio_over(results[default], results[candidate])
            try:
                validate(compile_candidate(spec, target, candidate, record.threads)).raise_if_failed()
            except ValidationError as error:
                yield Checked(record, "wrong", ratio, str(error))
                continue
            yield Checked(record, "slower" if ratio and ratio[2] < 1 else "ok", ratio)
