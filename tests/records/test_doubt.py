"""What cannot be does not answer: records dated in the future, or far too slow."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from answers import another, final, pretend, took
from made_records import SPEC, record

import convgen
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.schedule import Candidate
from convgen.records import shipped
from convgen.records.answer import find_record
from convgen.records.doubt import ABSURD, AHEAD, OVERHEAD, SLOWER, doubt
from convgen.records.record import TuningRecord, write_lines
from convgen.records.store import RecordStore
from convgen.tuning.context import SearchContext
from convgen.tuning.journal import Journal
from convgen.tuning.search import Search

LATER = "2099-01-01T00:00:00Z"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordStore]:
    (tmp_path / "tuned").mkdir()
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "tuned")
    with RecordStore(tmp_path / "records.sqlite") as opened:
        yield opened


def reference() -> Candidate:
    return parse_candidate(SPEC, resolve(), "reference")


def slow_one(**changes: Any) -> TuningRecord:
    """The reference as the winner of a final comparison, a hundred times slower than it could be."""
    values: dict[str, Any] = {"note": {"final": True, "winner": True}, **changes}
    return record(reference(), 1e-3, **values)


def said_of(store: RecordStore, item: TuningRecord) -> str:
    return doubt(item, store, SPEC, resolve().on(2))


def when(ahead: timedelta) -> str:
    return (datetime.now(UTC) + ahead).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- the reasons ------------------------------------------------------------------------------


def test_clocks_may_differ_by_a_day(store: RecordStore) -> None:
    assert said_of(store, final(when=when(AHEAD - timedelta(minutes=1)))) == ""
    assert "after now" in said_of(store, final(when=when(AHEAD + timedelta(minutes=1))))
    assert said_of(store, final(when="9999-12-31T23:59:59.999999Z")) == "dated 9999-12-31, after now"
    assert said_of(store, final(when="1970-01-01T00:00:00Z")) == ""


def test_much_slower_than_another_record(store: RecordStore) -> None:
    winner = final(another(), 1e-3, winner=True)
    store.add(winner)
    for unlike in ({"threads": 1}, {"hardware": "another"}, {"versions": {"convgen": "0"}}, {"outcome": "crash"}):
        store.add(record(seconds=None if "outcome" in unlike else 1e-9, **unlike))
        assert said_of(store, winner) == ""
    store.add(record(seconds=1.01e-3 / SLOWER))
    assert said_of(store, winner) == ""
    faster = record(seconds=1e-3 / 8)
    store.add(faster)
    assert said_of(store, winner) == f"8 times slower than record {faster.id[:12]}"
    store.add(final(reference(), 2e-3, winner=False))  # it was an accident: measured in turn it is slow
    assert said_of(store, winner) == ""


def test_what_cannot_answer_speaks_against_no_record(store: RecordStore) -> None:
    """It is never measured again: the doubt would last for ever."""
    winner = final(another(), 1e-3, winner=True)
    store.add(winner)
    changes: list[dict[str, Any]] = [
        {"schedule": "gone"},
        {"schedule_version": 99},
        {"picks": {"none": 1}},
        {"when": LATER},
    ]
    for impossible in changes:
        store.add(record(seconds=1e-9, **impossible))
    assert said_of(store, winner) == ""
    assert find_record(store, SPEC, resolve(), 2).record == winner


def test_faster_than_any_cpu(store: RecordStore) -> None:
    """A wrong unit, or a clock that stood still: it would win every comparison of records."""
    target, threads = resolve().on(2), 2
    lanes = threads * target.lanes
    least = SPEC.flops / (lanes * 2 * 2 * 6e9)  # two FMAs a cycle at 6 GHz, which no CPU has surpassed much
    assert said_of(store, final(another(), least / 5, winner=True)) == ""
    wrong = final(reference(), least / 100, winner=True)
    assert said_of(store, wrong) == "faster than any such CPU computes"
    good = final(another(), 9e-6, winner=True)
    store.add(good)
    store.add(wrong)
    assert said_of(store, good) == ""
    answer = find_record(store, SPEC, resolve(), 2)
    assert answer.to_measure == (wrong, good)


def test_absurdly_slower_than_predicted(store: RecordStore) -> None:
    default = default_candidate(SPEC, resolve().on(2))
    least = default.schedule.cost(SPEC.core, resolve().on(2)) + OVERHEAD
    assert said_of(store, record(seconds=0.9 * ABSURD * least)) == ""
    assert said_of(store, record(seconds=3 * ABSURD * least)) == "75 times slower than predicted for the default"
    compared = {"final": True, "winner": True, "default_seconds": 4 * ABSURD * least}
    assert said_of(store, record(seconds=3 * ABSURD * least, note=compared)) == ""  # so slow is this machine


def test_what_was_measured_again_is_believed(store: RecordStore) -> None:
    store.add(record(seconds=1e-9))
    again = final(another(), 1e-3, note={"final": True, "winner": True, "recheck": "0" * 64})
    assert said_of(store, again) == ""
    assert "after now" in said_of(store, final(another(), note={"final": True, "recheck": "0" * 64}, when=LATER))


# ---- what answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [{"when": LATER}, {}, {"when": "1970-01-01T00:00:00Z"}], ids=["future", "slow", "the past"]
)
@pytest.mark.parametrize("others", ["none", "before", "after"])
def test_it_is_measured_again_and_said(
    bad: dict[str, Any], others: str, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: what a re-check finds answers from then on, whatever the clocks say."""
    default, wrong = default_candidate(SPEC, resolve().on(2)), slow_one(**bad)
    honest = [record(default, 1e-5), final(another(), 9e-6, winner=True)]
    store.add_all([*(honest if others == "before" else []), wrong, *(honest if others == "after" else [])])
    calls = pretend(monkeypatch, {default: took(1e-5), another(): took(9e-6), reference(): took(1e-3)})
    kernel = convgen.build(SPEC, threads=2, records=store)
    if others == "after":  # the last comparison answers, and the first is forgotten
        assert (kernel.record, kernel.note, calls) == (honest[1], "", [])
        return
    best = default if others == "none" else another()
    assert (kernel.schedule, kernel.picks) == (best.schedule.id, best.picks)
    reason = "dated 2099-01-01, after now" if bad.get("when") == LATER else "times slower than"
    assert f"record {wrong.id[:12]} " in kernel.note
    assert reason in kernel.note
    assert "was measured again and has expired" in kernel.note
    assert {default, reference()} <= set(calls[0])
    again = convgen.build(SPEC, threads=2, records=store)
    assert (again.record, again.note, len(calls)) == (kernel.record, "", 1)


def test_many_that_cannot_be_are_one_measurement(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add_all([slow_one(when=f"{year}-01-01T00:00:00Z") for year in range(2090, 2099)])
    default = default_candidate(SPEC, resolve().on(2))
    calls = pretend(monkeypatch, {default: took(1e-5), reference(): took(1e-3)})
    assert [convgen.build(SPEC, threads=2, records=store).schedule for _ in range(3)] == [default.schedule.id] * 3
    assert len(calls) == 1


def test_it_wins_where_it_is_fast_after_all(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the clock was wrong."""
    default = default_candidate(SPEC, resolve().on(2))
    store.add(final(another(), 1e-5, winner=True, when=LATER))
    pretend(monkeypatch, {default: took(2e-5), another(): took(1e-5)})
    kernel = convgen.build(SPEC, threads=2, records=store)
    assert kernel.picks == another().picks
    assert "after now was measured again and still wins" in kernel.note
    assert convgen.build(SPEC, threads=2, records=store).note == ""


def test_where_nothing_can_be_measured_the_next_answers(store: RecordStore) -> None:
    good, wrong = final(another(), 9e-6, winner=True), slow_one(when=LATER)
    store.add_all([good, wrong])
    answer = find_record(store, SPEC, resolve(), 2, measure=False)
    assert answer.record == good
    assert answer.doubted == ((wrong.id, "dated 2099-01-01, after now"),)
    assert (
        answer.note == f"{SPEC.descriptor}: record {wrong.id[:12]} is not believed: it is dated 2099-01-01, after now"
    )
    with RecordStore(store.path.with_name("other.sqlite")) as other:
        other.add(wrong)
        assert find_record(other, SPEC, resolve(), 2, measure=False).record is None


def test_an_import_does_not_outlive_what_is_measured_later(store: RecordStore, tmp_path: Path) -> None:
    write_lines(tmp_path / "r.jsonl", [final(another(), 1e-5, winner=True, when=when(timedelta(hours=20)))])
    store.import_(tmp_path / "r.jsonl")
    mine = final(default_candidate(SPEC, resolve().on(2)), 1.1e-5, winner=True)
    store.add(mine)
    assert find_record(store, SPEC, resolve(), 2).record == mine


# ---- tuning and commands ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"when": LATER}, {}], ids=["future", "slow"])
def test_a_search_does_not_take_it_for_the_answer(bad: dict[str, Any], store: RecordStore) -> None:
    """So that it ends with a comparison, whose winner is added last."""
    good = final(another(), 9e-6, winner=True)
    store.add(good)

    def searched() -> Search:
        return Search(SearchContext(resolve().on(2), 2, Journal(store)), SPEC)

    assert searched().winner == good
    store.add(slow_one(**bad))
    assert searched().winner is None
    assert not searched().answered
    assert reference() in searched().tried  # it is known, also without samples, and not measured as something new


def test_check_lists_it(store: RecordStore, capsys: pytest.CaptureFixture[str]) -> None:
    cli = importlib.import_module("convgen.cli")
    wrong = slow_one(when=LATER)
    store.add_all([final(another(), 9e-6, winner=True), wrong])
    said = f"record {wrong.id[:12]} is not believed: it is dated 2099-01-01, after now"
    assert cli.main(["records", "check", "--records", str(store.path)]) == 0
    out, err = capsys.readouterr()
    assert said in err
    assert "all whole, 1 not believed" in out
    assert cli.main(["records", "show", wrong.id[:12], "--records", str(store.path)]) == 0
    assert re.search(r"answers here +no: it is not believed: it is dated 2099-01-01", capsys.readouterr().out)
    assert cli.main(["records", "best", "--records", str(store.path)]) == 0
    out, err = capsys.readouterr()
    assert said in err
    assert another().schedule.id in out
