"""How many trials and seconds a search takes to come near the best known kernel; stops and resumes anywhere.

    python bench/efficiency.py --records efficiency.sqlite              # the 24 layers of the sample
    python bench/efficiency.py --records e.sqlite --layers 1,12,17 --trials 12 --longest 3   # a look

Four searches go over the same spaces, layer by layer: the race as users get it, `cold` (an empty store) and
`warm` (a store with all records of the *other* layers of the sample, none of its own); `random`, uniform over
a schedule and then over its valid points; and, where that has not tried everything there is, `longest`: the
race told all of these trials, for as long as there is time.

Every trial is committed to the store given by --records the moment it ends, and no candidate is measured
twice: a search that comes to a known candidate takes its recorded time, and the seconds that its trial took. A
tuning ends with a comparison; whatever would be in that comparison if one of the searches ended at any of its
trials is measured side by side in the end, and those figures count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from convgen.errors import BuildError, Inapplicable
from convgen.folders import TemporaryFolder
from convgen.formats.entries import SpecEntry
from convgen.formats.sources import read_specs, write_text
from convgen.hardware.machine import machine
from convgen.hardware.target import Target, resolve
from convgen.interrupts import interrupts_held
from convgen.lowering.candidates import default_candidate
from convgen.lowering.schedule import Candidate
from convgen.lowering.versions import versions
from convgen.measure.standalone.command import finite
from convgen.measure.standalone.timing import HOPELESS, TRIAL_SECONDS
from convgen.measure.trial import CandidateModule, Expected, candidate_module
from convgen.measure.workers import LocalBuilder, LocalRunner, Pools
from convgen.problem.spec import ConvSpec
from convgen.records.answer import candidate_record, record_candidate, record_result
from convgen.records.outcome import INTERRUPTED, Result
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
from convgen.tuning.race import ROUND, Race
from convgen.tuning.ranker import Ranker
from convgen.tuning.search import FINALISTS

HERE = Path(__file__).parent
SAMPLE = HERE / "sample.json"

#: The searches that teach the warm one about other layers.
TEACHERS = ("cold", "random", "longest")
#: The shares of the best known speed whose trials and seconds are reported.
SHARES = (0.95, 0.99)
#: The goal: the first share within so many trials or seconds, on 2 cores.
GOAL_TRIALS, GOAL_SECONDS = 16, 20.0
#: A space of at most so many candidates is searched exhaustively.
SMALL = 70
#: Candidates more than this many times slower than the fastest are not measured again.
CLOSE = 1.25
#: Turns of the last comparison, orders of the random search, and draws in a row without a new candidate that end it.
TURNS, ORDERS, MISSES = 15, 200, 200


@dataclass
class Trial:
    """One step of a search: what was tried, its time (None: it failed), and what trying it cost."""

    candidate: Candidate
    seconds: float | None
    cost: float


@dataclass
class Search:
    """The trials of one search of one layer, in their order."""

    trials: list[Trial] = field(default_factory=list)

    def finalists(self, default: Candidate) -> Iterator[tuple[int, float, list[Candidate]]]:
        """After each trial: its number, the seconds spent so far, and what the final comparison would hold if the
        search ended there: as in a tuning the fastest few, and the default where it was tried.
        """
        spent, measured = 0.0, list[tuple[float, int, Candidate]]()
        for number, trial in enumerate(self.trials, 1):
            spent += trial.cost
            if trial.seconds is not None:
                measured = sorted([*measured, (trial.seconds, number, trial.candidate)])
            candidates = [candidate for _, _, candidate in measured]
            yield number, spent, [c for rank, c in enumerate(candidates) if rank < FINALISTS or c == default]

    def reached(self, goal: Iterable[Candidate], default: Candidate) -> tuple[int, float] | None:
        """Trials and seconds after which the final comparison would hold a candidate of ``goal``; None: never."""
        wanted = set(goal)
        for number, spent, finalists in self.finalists(default):
            if not wanted.isdisjoint(finalists):
                return number, spent
        return None

    def shuffled(self, seed: int) -> Search:
        trials = list(self.trials)
        random.Random(seed).shuffle(trials)
        return Search(trials)


class Bench:
    """Measures candidates of one layer, each once.

    Args:
        store: where trials are kept.
        pools: compile and time what the store does not have.
    """

    def __init__(self, spec: ConvSpec, target: Target, threads: int, store: RecordStore, pools: Pools, folder: Path):
        self.spec, self.target, self.threads, self.store, self.pools = spec, target, threads, store, pools
        self._folder = folder
        self._expected: Expected | None = None
        self.known: dict[Candidate, TuningRecord] = {}
        self.finals: list[TuningRecord] = []
        for record in store.trials(
            spec=spec.descriptor, target=target.spelling, hardware=target.hardware, threads=threads
        ):
            candidate = record_candidate(record, spec, target) if record.versions == versions() else None
            if candidate is not None and (record.note or {}).get("final"):
                self.finals.append(record)
            elif candidate is not None:
                self.known.setdefault(candidate, record)

    @property
    def expected(self) -> Expected:
        if self._expected is None:
            self._folder.mkdir()
            self._expected = Expected(self.spec, self._folder, self.threads)
        return self._expected

    def spent(self, search: str) -> float:
        """Seconds of the trials that were made for a search."""
        return sum(_cost(record) for record in self.known.values() if (record.note or {}).get("search") == search)

    def measure(self, candidates: Sequence[Candidate], search: str) -> list[Trial]:
        """Trials of candidates, in their order; candidates that cannot be built from their picks are left out."""
        missing = [candidate for candidate in candidates if candidate not in self.known]
        if missing:
            _ = self.expected  # made before the clock starts, so that no trial pays for it
            start = time.perf_counter()
            modules, failed = self._lowered(missing)
            built = dict(zip(modules, self.pools.build(list(modules.values())), strict=True)) | failed
            share = (time.perf_counter() - start) / len(missing)
            best = min((record.seconds for record in self.known.values() if record.seconds), default=0.0)
            for candidate, answer in built.items():
                start = time.perf_counter()
                result = answer if isinstance(answer, Result) else self._run(answer, HOPELESS * best)
                if result.outcome == INTERRUPTED.outcome:
                    raise KeyboardInterrupt
                cost = share + time.perf_counter() - start
                self._keep(candidate, result, {"search": search, "cost": round(cost, 4)})
        records = [(candidate, self.known[candidate]) for candidate in candidates if candidate in self.known]
        return [Trial(candidate, record.seconds, _cost(record)) for candidate, record in records]

    def compare(self, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
        """Seconds of candidates measured side by side, in turn."""
        label = hashlib.sha256("\n".join(sorted(map(str, candidates))).encode()).hexdigest()[:16]
        done = [record for record in self.finals if (record.note or {}).get("set") == label]
        if len(done) < len(candidates):
            modules, _ = self._lowered(candidates)
            paths = dict(zip(modules, self.pools.build(list(modules.values())), strict=True))
            built = {candidate: path for candidate, path in paths.items() if isinstance(path, str)}
            samples = self.pools.duel(list(built.values()), self.expected, self.threads, TURNS)
            for path in built.values():
                self.pools.discard(path)
            note = {"final": True, "set": label}
            done = [
                self._record(candidate, Result("ok", tuple(taken)), note)
                for candidate, taken in zip(built, samples, strict=True)
            ]
            for record in done:
                self.store.add(record)
        times = ((record_candidate(record, self.spec, self.target), record.seconds) for record in done)
        return {candidate: seconds for candidate, seconds in times if candidate and seconds}

    def _run(self, path: str, hopeless: float) -> Result:
        result = self.pools.run(path, self.expected, self.threads, seconds=TRIAL_SECONDS, hopeless=hopeless)
        self.pools.discard(path)
        return result

    def _lowered(
        self, candidates: Iterable[Candidate]
    ) -> tuple[dict[Candidate, CandidateModule], dict[Candidate, Result]]:
        """The candidates' serialised modules, and how the others failed; those that do not apply are in neither."""
        modules, failed = {}, {}
        for candidate in candidates:
            try:
                modules[candidate] = candidate_module(self.spec, self.target, candidate)
            except Inapplicable:
                continue
            except BuildError as error:
                failed[candidate] = Result("build_error", error=str(error)[-2000:])
        return modules, failed

    def _keep(self, candidate: Candidate, result: Result, note: dict[str, Any]) -> None:
        self.known[candidate] = self._record(candidate, result, note)
        self.store.add(self.known[candidate])

    def _record(self, candidate: Candidate, result: Result, note: dict[str, Any]) -> TuningRecord:
        return candidate_record(self.spec, self.target, self.threads, candidate, result, note)


def _cost(record: TuningRecord) -> float:
    return float((record.note or {}).get("cost", 0.0))


# ---- the searches -------------------------------------------------------------------------------


def race(bench: Bench, search: str, ranker: Ranker, trials: int, seed: int) -> Search:
    """The search as users get it; the time it takes to decide what to try counts as part of a trial's cost."""
    run, done = Race(bench.spec, bench.target, bench.threads, seed, ranker=ranker), Search()
    while len(done.trials) < trials:
        start = time.perf_counter()
        batch = run.ask(min(ROUND, trials - len(done.trials)))
        if not batch:
            break
        asking = (time.perf_counter() - start) / len(batch)
        for trial in bench.measure(batch, search):
            run.tell(trial.candidate, record_result(bench.known[trial.candidate]))
            done.trials.append(Trial(trial.candidate, trial.seconds, trial.cost + asking))
    return done


def longest(bench: Bench, seconds: float, seed: int) -> None:
    """Race for so many seconds of trials, beginning with everything that is known of the layer."""
    run = Race(bench.spec, bench.target, bench.threads, seed, ranker=Ranker(bench.target, bench.threads))
    for candidate, record in bench.known.items():
        run.tell(candidate, record_result(record))
    while bench.spent("longest") < seconds and (batch := run.ask(ROUND)):
        for trial in bench.measure(batch, "longest"):
            run.tell(trial.candidate, record_result(bench.known[trial.candidate]))


def randomly(bench: Bench, trials: int, seed: int) -> tuple[Search, bool]:
    """Draws candidates uniformly; returns the search, and whether it tried every candidate there is."""
    core, rng = bench.spec.core, random.Random(seed)
    schedules = Race(bench.spec, bench.target, bench.threads).schedules
    spaces = {schedule: schedule.space(core, bench.target) for schedule in schedules}

    def valid(candidate: Candidate) -> bool:
        return candidate.schedule.reason_against(core, bench.target, candidate.picks) is None

    def drawn() -> Iterator[Candidate]:
        seen, misses = set[Candidate](), 0
        while misses < MISSES:
            schedule = rng.choice(schedules)
            candidate = Candidate(schedule, spaces[schedule].sample(rng))
            misses += 1
            if candidate not in seen and valid(candidate):
                seen.add(candidate)
                misses = 0
                yield candidate

    everything: list[Candidate] = []
    if sum(space.size for space in spaces.values()) <= 20 * SMALL:
        everything = [c for c in (Candidate(s, p) for s, space in spaces.items() for p in space) if valid(c)]
    done, exhaustive = Search(), 0 < len(everything) <= SMALL
    if exhaustive:
        rng.shuffle(everything)
    source = iter(everything) if exhaustive else drawn()
    while exhaustive or len(done.trials) < trials:
        batch = [candidate for _, candidate in zip(range(ROUND), source, strict=False)]
        if not batch:
            break
        done.trials += bench.measure(batch, "random")
    return done, exhaustive


# ---- one layer ------------------------------------------------------------------------------------


def teach(entries: Sequence[SpecEntry], left_out: ConvSpec, bench: Bench) -> Ranker:
    """A ranker that knows what the searches of the other layers measured, and nothing about ``left_out``."""
    ranker = Ranker(bench.target, bench.threads)
    for entry in entries:
        if entry.spec.core != left_out.core:
            for record in bench.store.trials(
                spec=entry.spec.descriptor,
                target=bench.target.spelling,
                hardware=bench.target.hardware,
                threads=bench.threads,
            ):
                if (record.note or {}).get("search") in TEACHERS and record.versions == versions():
                    ranker.learn(record)
    return ranker


def conclude(entry: SpecEntry, bench: Bench, searches: dict[str, Search], exhaustive: bool) -> dict[str, Any]:
    """The row of a layer: measures the leading candidates side by side, and says what each search needed to come near
    the fastest.
    """
    known = {candidate: record.seconds for candidate, record in bench.known.items() if record.seconds is not None}
    default = default_candidate(bench.spec, bench.target)
    limit = CLOSE * min(known.values())
    fastest = sorted(known, key=lambda candidate: (known[candidate], str(candidate)))[:4]
    led = [
        candidate
        for name in ("warm", "cold", "random")
        for _, _, finalists in searches[name].finalists(default)
        for candidate in finalists
        if known[candidate] <= limit
    ]
    again = bench.compare(list(dict.fromkeys([*fastest, *([default] if default in known else []), *led])))
    best = min(again, key=lambda candidate: again[candidate])

    def needed(search: Search, share: float) -> dict[str, float] | None:
        goal = [candidate for candidate, seconds in again.items() if seconds * share <= again[best]]
        reached = search.reached(goal, default)
        return None if reached is None else {"trials": reached[0], "seconds": round(reached[1], 2)}

    def usual(share: float) -> dict[str, float] | None:
        """What random search needs: the median over orders of its trials. Only the finalists of the first order were
        measured again; for the finalists of other orders the times of their trials count.
        """
        goal = {c for c, s in again.items() if s * share <= again[best]}
        scale = again[best] / known[best]
        goal |= {c for c, s in known.items() if c not in again and s * scale * share <= again[best]}
        needs = sorted(
            searches["random"].shuffled(i).reached(goal, default) or (math.inf, math.inf) for i in range(ORDERS)
        )
        trials, seconds = (statistics.median(values) for values in zip(*needs, strict=True))
        return None if math.isinf(trials) else {"trials": trials, "seconds": round(seconds, 2)}

    def leading(search: Search, trials: int) -> float:
        """The share of the best known speed after so many trials."""
        count = min(trials, len(search.trials))
        times = [
            again[candidate]
            for number, _, finalists in search.finalists(default)
            if number == count
            for candidate in finalists
            if candidate in again
        ]
        return round(again[best] / min(times), 4) if times else 0.0

    methods = {}
    for name, search in searches.items():
        reached = {f"{share:.0%}": usual(share) if name == "random" else needed(search, share) for share in SHARES}
        methods[name] = {
            "trials": len(search.trials),
            "seconds": round(sum(trial.cost for trial in search.trials), 2),
            "reached": reached,
            f"share_after_{GOAL_TRIALS}": leading(search, GOAL_TRIALS),
            "curve": [[str(trial.candidate), trial.seconds, round(trial.cost, 4)] for trial in search.trials],
        }
    return {
        "spec": entry.spec.descriptor,
        "name": next(iter(entry.names), ""),
        "threads": bench.threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": machine().cpu,
        "versions": versions(),
        "tried": len(bench.known),
        "exhaustive": exhaustive,
        "best": {"candidate": str(best), "seconds": again[best]},
        "default_share": round(again[best] / again[default], 4) if default in again else None,
        "compared": {str(candidate): seconds for candidate, seconds in again.items()},
        "searches": methods,
    }


# ---- all of them ----------------------------------------------------------------------------------


def run(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """The rows of all layers: first the searches that teach, then the warm ones that learn from them."""
    sample = read_specs(SAMPLE)
    entries = [sample[number - 1] for number in options.layers] if options.layers else sample
    target, began, rows = resolve("cpu"), time.monotonic(), []
    with (
        interrupts_held() as interrupts,
        RecordStore(options.records) as store,
        TemporaryFolder() as root,
    ):
        pools = Pools(LocalBuilder(target.cores), LocalRunner())
        pools.interrupts = interrupts
        try:
            _warm_up(pools, target, options.threads, root / "0")
            benches, first = [], []
            for number, entry in enumerate(entries, 1):
                bench = Bench(entry.spec, target, options.threads, store, pools, root / str(number))
                cold = race(bench, "cold", Ranker(target, options.threads), options.trials, options.seed)
                drawn, exhaustive = randomly(bench, options.random_trials, options.seed)
                if not exhaustive:
                    longest(bench, options.longest, options.seed)
                benches.append(bench)
                first.append((cold, drawn, exhaustive))
                console.print(_progress(number, len(entries), began, entry, f"{len(bench.known)} candidates"))
            for number, (entry, bench, (cold, drawn, exhaustive)) in enumerate(
                zip(entries, benches, first, strict=True), 1
            ):
                ranker = teach(entries, entry.spec, bench)
                warm = race(bench, "warm", ranker, options.trials, options.seed)
                rows.append(conclude(entry, bench, {"warm": warm, "cold": cold, "random": drawn}, exhaustive))
                said = "  ".join(f"{name} {_cell(rows[-1], name, SHARES[0])}" for name in ("warm", "cold", "random"))
                console.print(_progress(number, len(entries), began, entry, said))
        finally:
            pools.close()
    return rows


def _warm_up(pools: Pools, target: Target, threads: int, folder: Path) -> None:
    """Start the workers: a tuning job does so once, so the first layer should not pay for it."""
    spec = ConvSpec.parse("conv1d n1 ic1 oc1 i9 k3")
    folder.mkdir()
    expected = Expected(spec, folder, threads)
    module = candidate_module(spec, target, default_candidate(spec, target))
    for path in pools.build([module] * target.cores):
        if isinstance(path, str):
            pools.run(path, expected, threads, seconds=0.0)
            pools.discard(path)


def _progress(number: int, count: int, began: float, entry: SpecEntry, said: str) -> str:
    return f"{time.monotonic() - began:5.0f} s  {number}/{count} {entry.spec}: {said}"


def _cell(row: dict[str, Any], search: str, share: float) -> str:
    needed = row["searches"][search]["reached"][f"{share:.0%}"]
    if needed is None:
        return f"> {row['searches'][search]['trials']}"
    return f"{needed['trials']:.0f} / {needed['seconds']:.1f} s"


def within(rows: Sequence[dict[str, Any]], search: str, share: float) -> int:
    """How many layers reached a share of the best known speed within the goal's trials or seconds."""
    needs = [row["searches"][search]["reached"][f"{share:.0%}"] for row in rows]
    return sum(
        need is not None and (need["trials"] <= GOAL_TRIALS or need["seconds"] <= GOAL_SECONDS) for need in needs
    )


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Layers within the goal, and medians over layers, per search."""

    def median(search: str, share: float, unit: str) -> float | None:
        needs = [row["searches"][search]["reached"][f"{share:.0%}"] for row in rows]
        value = statistics.median(math.inf if need is None else need[unit] for need in needs)
        return None if math.isinf(value) else round(value, 2)

    return {
        "layers": len(rows),
        "default_at_95%": sum((row["default_share"] or 0.0) >= 0.95 for row in rows),
        "searches": {
            search: {
                f"{share:.0%}": {
                    "within_goal": within(rows, search, share),
                    "median_trials": median(search, share, "trials"),
                    "median_seconds": median(search, share, "seconds"),
                }
                for share in SHARES
            }
            for search in ("warm", "cold", "random")
        },
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of all layers, and their summary."""
    searches, total, count = ("warm", "cold", "random"), summary(rows), len(rows)
    of = rows[0]
    made = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    text = [
        "# Trials and seconds to come near the best known kernel",
        "",
        f"{of['cpu']}, {of['threads']} threads, {of['date'][:10]}; {made}.",
        "[bench/README.md](../../README.md) says how.",
        "",
        f"Of {count} layers, those within {GOAL_TRIALS} trials or {GOAL_SECONDS:.0f} s, and medians over all:",
        "",
        "| | " + " | ".join(f"{share:.0%} | trials | seconds" for share in SHARES) + " |",
        "|---|" + "--:|" * (3 * len(SHARES)),
    ]

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:g}"

    for search in searches:
        cells = []
        for share in SHARES:
            part = total["searches"][search][f"{share:.0%}"]
            cells += [f"{part['within_goal']}/{count}", shown(part["median_trials"]), shown(part["median_seconds"])]
        text.append(f"| {search} | " + " | ".join(cells) + " |")
    text += [
        "",
        f"The zero-trial default alone has 95 % in {total['default_at_95%']} of them.",
        "",
        "Trials / seconds; “> n”: n trials were not enough. *Tried*: candidates the best known one was found among.",
        "",
        "| layer | tried | default | " + " | ".join(f"{s} {share:.0%}" for share in SHARES for s in searches) + " |",
        "|---|--:|--:|" + "--:|" * (len(SHARES) * len(searches)),
    ]
    for row in rows:
        cells = [_cell(row, search, share) for share in SHARES for search in searches]
        tried = f"{row['tried']}{' (all)' if row['exhaustive'] else ''}"
        default = "–" if row["default_share"] is None else f"{row['default_share']:.0%}"
        text.append(f"| {row['spec']} | {tried} | {default} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--records", type=Path, required=True, help="store of this bench's trials; goes on from there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--layers",
        type=lambda s: [int(n) for n in s.split(",")],
        help="numbers of layers of the sample, from 1; all unless given",
    )
    parser.add_argument("--trials", type=int, default=32, help="of the race, cold and warm")
    parser.add_argument("--random-trials", type=int, default=32, help="of random search")
    parser.add_argument("--longest", type=finite, default=12.0, help="seconds per layer of the longest search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "search", help="where results are kept")
    parser.add_argument("--json", action="store_true", help="print the rows and the summary as one JSON document")
    options = parser.parse_args(arguments)
    if options.layers and not all(1 <= number <= len(read_specs(SAMPLE)) for number in options.layers):
        parser.error(f"--layers: expected numbers from 1 to {len(read_specs(SAMPLE))}, found {options.layers}")
    if min(options.trials, options.random_trials, options.threads) < 1 or not options.longest >= 0:
        parser.error("--trials, --random-trials and --threads: expected at least 1; --longest: at least 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    try:
        rows = run(options, console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from here")
        return 130
    options.results.mkdir(parents=True, exist_ok=True)
    write_text("".join(json.dumps(row) + "\n" for row in rows), options.results / "efficiency.jsonl")
    write_text(markdown(rows), options.results / "efficiency.md")
    console.print(f"wrote {options.results / 'efficiency.md'} and .jsonl")
    if options.json:
        print(json.dumps({"summary": summary(rows), "layers": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
