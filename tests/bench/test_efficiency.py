"""The bench of searches: what counts as reached, that nothing is measured twice, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_module import load_bench
from race_fakes import Fake

from convgen.formats.entries import SpecEntry
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate
from convgen.lowering.schedule import Candidate, Picks
from convgen.problem.spec import ConvSpec
from convgen.records.outcome import Result
from convgen.records.store import RecordStore
from convgen.tuning.ranker import Ranker

SPEC = ConvSpec.parse("conv2d n1 ic3 oc17 i6x7 k3x3 p1 relu")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_bench("efficiency")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecordStore]:
    with RecordStore(tmp_path / "records.sqlite") as store:
        yield store


class Instant:
    """Pools that compile and time nothing: a candidate is the slower the later it was built first."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.duels = 0

    def build(self, modules: Sequence[str]) -> list[str | Result]:
        self.built += modules
        order = list(dict.fromkeys(self.built))
        return [f"/nowhere/{order.index(module)}" for module in modules]

    def run(self, path: str, expected: Any, threads: int, *, seconds: float, hopeless: float = 0.0) -> Result:
        return Result("ok", ((1 + int(path.rpartition("/")[2])) * 1e-5,))

    def duel(self, paths: Sequence[str], expected: Any, threads: int, rounds: int) -> list[list[float]]:
        self.duels += 1
        return [[(1 + int(path.rpartition("/")[2])) * 1e-5] * rounds for path in paths]

    def discard(self, path: str) -> None:
        pass


def at(x: int) -> Candidate:
    return Candidate(FAKE, Picks(x=x))


FAKE = Fake("fake", x=list(range(20)))


def test_a_search_has_reached_what_its_comparison_would_have(bench: ModuleType) -> None:
    """The three fastest by its own times, and the default."""
    times = [(1, 5.0), (2, None), (3, 6.0), (4, 3.0), (5, 2.0), (6, 9.0), (7, 2.5)]
    search = bench.Search([bench.Trial(at(x), seconds, 0.5) for x, seconds in times])
    found = {number: candidates for number, _, candidates in search.finalists(at(3))}
    assert found[2] == [at(1)]
    assert found[4] == [at(4), at(1), at(3)]
    assert found[7] == [at(5), at(7), at(4), at(3)]  # the default stays
    assert search.reached([at(5), at(7)], at(3)) == (5, 2.5)
    assert search.reached([at(3)], at(1)) == (3, 1.5)
    assert search.reached([at(6)], at(1)) is None  # tried, but never among the fastest
    assert search.reached([at(2)], at(1)) is None  # failed
    assert sorted(str(t.candidate) for t in search.shuffled(1).trials) == sorted(str(at(x)) for x, _ in times)


def test_no_candidate_is_measured_twice(bench: ModuleType, store: RecordStore, tmp_path: Path) -> None:
    pools, target = Instant(), resolve()

    def searched(folder: str) -> tuple[Any, dict[str, Any]]:
        layer = bench.Bench(SPEC, target, 2, store, pools, tmp_path / folder)
        cold = bench.race(layer, "cold", Ranker(target, 2), 10, 0)
        drawn, exhaustive = bench.randomly(layer, 6, 0)
        before = len(layer.known)
        bench.longest(layer, 1e-9, 0)
        assert exhaustive or len(layer.known) > before or layer.spent("longest") >= 1e-9
        warm = bench.race(layer, "warm", bench.teach([SpecEntry(SPEC)], SPEC, layer), 10, 0)
        found = {"warm": warm, "cold": cold, "random": drawn}
        return layer, bench.conclude(SpecEntry(SPEC, 1, ("small",)), layer, found, exhaustive)

    layer, row = searched("first")
    assert len(pools.built) == len(set(pools.built)) + pools.duels * len(row["compared"])  # built again to compare
    assert len(store) == len(layer.known) + len(row["compared"])
    curve = row["searches"]["cold"]["curve"]
    assert curve[0][0] == str(default_candidate(SPEC, target))
    assert row["searches"]["warm"]["curve"][0][1] == curve[0][1]  # replayed
    assert row["best"]["seconds"] == min(row["compared"].values())
    assert row["searches"]["cold"]["reached"]["95%"] is not None

    # Nothing is built or run when it is all there; and what comes out is the same.
    built, count = len(pools.built), len(store)
    _, again = searched("second")
    assert (len(pools.built), len(store), pools.duels) == (built, count, 1)
    assert {k: again[k] for k in ("best", "tried", "compared")} == {k: row[k] for k in ("best", "tried", "compared")}
    for name, search in row["searches"].items():
        assert [step[:2] for step in again["searches"][name]["curve"]] == [step[:2] for step in search["curve"]]


def test_other_layers_teach_and_its_own_records_do_not(bench: ModuleType, store: RecordStore, tmp_path: Path) -> None:
    target, other = resolve(), SPEC.with_(ic=4)
    for spec, folder in ((SPEC, "a"), (other, "b")):
        layer = bench.Bench(spec, target, 2, store, Instant(), tmp_path / folder)
        bench.race(layer, "cold", Ranker(target, 2), 4, 0)
        bench.race(layer, "warm", Ranker(target, 2), 6, 0)
    learned = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranker, "learn", lambda self, record: learned.append(record))
        bench.teach([SpecEntry(SPEC), SpecEntry(other)], SPEC, layer)
    assert {record.spec for record in learned} == {other.descriptor}
    assert {record.note["search"] for record in learned} == {"cold"}


def test_the_summary_counts_layers_within_the_goal(bench: ModuleType) -> None:
    def row(trials: float | None, seconds: float, share: float) -> dict[str, Any]:
        found = None if trials is None else {"trials": trials, "seconds": seconds}
        search = {"trials": 32, "seconds": 9.0, "reached": {"95%": found, "99%": None}}
        return {
            "spec": SPEC.descriptor,
            "threads": 2,
            "date": "2026-01-31T12:00:00+00:00",
            "cpu": "a processor",
            "versions": {"convgen": "1"},
            "tried": 40,
            "exhaustive": False,
            "default_share": share,
            "searches": dict.fromkeys(("warm", "cold", "random"), search),
        }

    limit = bench.GOAL_TRIALS
    rows = [
        row(3, 2.0, 0.96),
        row(limit + 9, 19.0, 0.9),
        row(limit, 50.0, 0.9),
        row(limit + 1, 21.0, 0.5),
        row(None, 0, 0),
    ]
    total = bench.summary(rows)
    assert total["default_at_95%"] == 1
    assert total["searches"]["warm"]["95%"] == {
        "within_goal": 3,
        "median_trials": limit + 1,
        "median_seconds": 21.0,
    }
    assert total["searches"]["cold"]["99%"] == {"within_goal": 0, "median_trials": None, "median_seconds": None}
    text = bench.markdown(rows)
    assert "| warm | 3/5 | 17 | 21 | 0/5 | – | – |" in text
    assert f"| {SPEC.descriptor} | 40 | 96% | 3 / 2.0 s | 3 / 2.0 s | 3 / 2.0 s | > 32 | > 32 | > 32 |" in text


@pytest.mark.parametrize("arguments", [[], ["--records", "x", "--layers", "0"], ["--records", "x", "--trials", "0"]])
def test_impossible_arguments_are_refused(
    arguments: list[str], bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err
