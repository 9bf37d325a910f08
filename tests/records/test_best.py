"""Which record answers a build: own ones, those of like machines, shipped ones, and outdated ones measured again."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from answers import OTHER, another, elsewhere, final, pretend, took
from made_records import SPEC, record
from paths import ROOT
from stores import unprivileged

import convgen
from convgen import ConvSpec
from convgen.errors import RecordError, UnsupportedError
from convgen.hardware.machine import machine
from convgen.hardware.target import Target, resolve
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.discover import schedules
from convgen.lowering.schedule import Candidate
from convgen.lowering.versions import versions
from convgen.measure.workers import LocalBuilder, LocalRunner, Pools
from convgen.records import shipped as tuned
from convgen.records.answer import Answer, best_record, find_record, preferred, reason_against, same_kind
from convgen.records.opening import open_store
from convgen.records.outcome import Result
from convgen.records.pruning import outdated, prunable
from convgen.records.record import TuningRecord, write_lines
from convgen.records.store import RecordStore
from convgen.tuning import recheck as recheck_module
from convgen.tuning.recheck import check_records, measure_in_turn


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    """Workers for all tests here: starting them takes longest."""
    made = Pools(LocalBuilder(1), LocalRunner())
    yield made
    made.close()


PROBLEMS = ROOT / "bench" / "problems"
#: Schedules that there were once, by what is in their place.
EARLIER = {
    "cpu_direct": {"cpu_channels_last", "cpu_dense", "cpu_gemm_channels", "cpu_im2col", "cpu_strassen"},
    "cpu_grouped": {"cpu_depthwise", "cpu_grouped_last"},
    "cpu_rows": {"cpu_gemm", "cpu_masked"},
    "cpu_transposed": {"cpu_transposed_pixel"},
    "cpu_winograd": {"cpu_winograd_grouped"},
}
WHEN = "2026-01-{:02}T12:00:00Z"


def found_record(
    store: RecordStore, spec: ConvSpec, target: Target, threads: int, pools: Callable[[], Pools] | None = None
) -> Answer:
    """The answer to a build, after measuring again what must be."""
    answer = find_record(store, spec, target, threads)
    return recheck_module.recheck(store, spec, target, threads, answer, pools) if answer.to_measure else answer


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecordStore]:
    with RecordStore(tmp_path / "records.sqlite") as opened:
        yield opened


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of shipped databases: tests do not depend on what ships."""
    made = tmp_path / "tuned"
    made.mkdir()
    monkeypatch.setattr(tuned, "FOLDER", made)
    return made


def reference() -> Candidate:
    return parse_candidate(SPEC, resolve(), "reference")


def no_measuring(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is to be measured")


# ---- which of several -------------------------------------------------------------------------


def test_the_last_winner_then_finals_then_trials() -> None:
    """The last that was added, whatever clocks say."""
    trial, slow_trial = record(seconds=1e-6), record(seconds=1e-5)
    loser, old_final = final(seconds=2e-6, winner=False), final(seconds=3e-6)
    old, new = (final(seconds=s, winner=True, when=WHEN.format(d)) for s, d in ((4e-6, 2), (9e-6, 1)))
    wrong = record(outcome="wrong", seconds=None, when=WHEN.format(9))
    order = [new, old, loser, old_final, trial, slow_trial]
    for count in range(len(order)):
        left = [*order[count:], wrong]
        random.Random(count).shuffle(left)
        if {old, new} <= {*left}:
            left = [*(item for item in left if item != new), new]
        assert preferred(left) == order[count]
    assert preferred([wrong]) is None
    assert preferred([]) is None


def test_a_new_comparison_replaces_the_one_before(store: RecordStore) -> None:
    """Also where its winner is slower: the machine may have been."""
    store.add(final(another(), 1e-6, winner=True, when=WHEN.format(1)))
    store.add(final(default_candidate(SPEC, resolve().on(2)), 2e-6, winner=True, when=WHEN.format(2)))
    store.add(final(another(), 2.1e-6, winner=False, when=WHEN.format(2)))
    found = best_record(store, SPEC, resolve(), 2)
    assert found is not None
    assert (found.seconds, found.picks) == (2e-6, dict(default_candidate(SPEC, resolve().on(2)).picks))


def test_a_trial_alone_must_be_clearly_faster_than_the_default(store: RecordStore) -> None:
    """Or a lucky measurement would make a layer slower."""
    default = record(default_candidate(SPEC, resolve().on(2)), 1e-3)
    for added, answer in (
        (record(another(), 0.98e-3), 0.98e-3),  # the default was never tried
        (default, 1e-3),
        (record(reference(), 0.96e-3), 0.96e-3),
        (final(another(), 0.99e-3, winner=True), 0.99e-3),
    ):
        store.add(added)
        found = best_record(store, SPEC, resolve(), 2)
        assert found is not None
        assert found.seconds == answer


def test_a_winner_that_means_nothing_any_more_leaves_it_to_the_next(store: RecordStore) -> None:
    store.add(final(winner=True, schedule_version=1000, when=WHEN.format(3)))
    store.add(final(default_candidate(SPEC, resolve().on(2)), winner=True, picks={"tile": 1}, when=WHEN.format(2)))
    store.add(final(another(), 5e-3, winner=True, when=WHEN.format(1)))
    found = best_record(store, SPEC, resolve(), 2)
    assert found is not None
    assert found.seconds == 5e-3


# ---- machines of the same kind ----------------------------------------------------------------


def test_machines_of_the_same_kind() -> None:
    target = resolve()
    assert same_kind(target.hardware, target, 1024)
    assert same_kind(elsewhere(), target, 1)
    assert same_kind(elsewhere(64), target, os.cpu_count() or 1)
    assert not same_kind(elsewhere(64), target, (os.cpu_count() or 1) + 1)  # here threads would share CPUs
    assert not same_kind(elsewhere(1 - (os.cpu_count() or 1)), target, 2) or os.cpu_count() == 1  # there they did
    assert not same_kind("x" + elsewhere(), target, 1)
    assert not same_kind("another machine", target, 1)
    assert not same_kind("AuthenticAMD-25-17-1", target, 1)


def test_a_record_of_a_like_machine_answers_and_the_kernel_says_so(
    store: RecordStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convgen.api.recheck", no_measuring)
    store.add(final(another(), hardware=elsewhere(), winner=True))
    assert best_record(store, SPEC, resolve(), 2) is None
    kernel = convgen.build(SPEC, threads=2, records=store)
    assert (kernel.schedule, kernel.picks) == (another().schedule.id, another().picks)
    assert f"of this kind with {(os.cpu_count() or 1) + 1} CPUs" in kernel.note
    assert SPEC.descriptor in kernel.note
    manifest = kernel.export(tmp_path / "out")
    assert manifest["record_origin"] == kernel.origin
    assert "from another machine" in kernel.origin
    store.add(record(reference(), 1e-4))  # anything of this machine itself is preferred
    kernel = convgen.build(SPEC, threads=2, records=store)
    assert (kernel.schedule, kernel.origin) == ("reference", "")


# ---- what ships -------------------------------------------------------------------------------


def plant(folder: Path, records: list[TuningRecord], name: str = "planted") -> Path:
    path = folder / f"{name}.jsonl"
    here = [TuningRecord(**{**vars_of(r), "hardware": machine().fingerprint}) for r in records]
    origin = tuned.Origin.of(here, ["models/net.onnx"], "a test")
    values = {**origin.__dict__, "hardware": records[0].hardware}
    tuned.write(path, records, tuned.Origin(**values))
    return path


def vars_of(item: TuningRecord) -> dict[str, Any]:
    return {name: value for name, value in item.to_dict().items() if name not in ("schema", "id", "trial_key")}


def test_a_shipped_record_answers_after_the_store(store: RecordStore, folder: Path) -> None:
    shipped = final(another(), winner=True)
    plant(folder, [shipped, final(reference(), threads=1), final(spec="conv2d n1 ic1 oc1 i8x8 k1x1 s1x1 p0x0")])
    kernel = convgen.build(SPEC, threads=2, records=store)
    assert (kernel.record, kernel.picks) == (shipped, another().picks)
    assert kernel.origin.startswith("of those that ship with convgen, measured ")
    assert kernel.note == ""  # as good as an own one
    assert convgen.build(SPEC, threads=2, records=False).record is None
    assert convgen.build(SPEC, threads=3, records=store).record is None
    assert len(store) == 0
    store.add(record(reference(), 1e-4))
    assert convgen.build(SPEC, threads=2, records=store).schedule == "reference"


@pytest.mark.parametrize("hardware", ["like", "other"])
def test_a_shipped_database_is_for_its_kind_of_machine(hardware: str, store: RecordStore, folder: Path) -> None:
    shipped = final(another(), winner=True, hardware=elsewhere() if hardware == "like" else "another-machine-4")
    path = plant(folder, [shipped])
    if hardware == "other":
        path.write_text("not even read")
    answer = found_record(store, SPEC, resolve(), 2)
    assert answer.record == (shipped if hardware == "like" else None)
    assert ("ship with convgen" in answer.note) == (hardware == "like")


def test_a_damaged_database_is_named(store: RecordStore, folder: Path) -> None:
    lines = plant(folder, [final(another()), final(reference())], "cut")
    lines.write_text(lines.read_text().splitlines(keepends=True)[0])
    with pytest.raises(RecordError, match=r"cut\.jsonl: expected 2 records, as the file beside it says, found 1"):
        found_record(store, SPEC, resolve(), 2)
    for number, (text, message) in enumerate(
        (("{", "not JSON"), ("{}", "expected the fields cpu, "), ("[]", "found list"))
    ):
        other = folder.parent / f"{number}"
        other.mkdir()
        (other / "x.json").write_text(text)
        with pytest.raises(RecordError, match=rf"x\.json: .*{message}"):
            tuned.databases(other)


def test_what_is_shipped_says_where_it_is_from(folder: Path) -> None:
    items = [final(another(), threads=n, when=WHEN.format(n)) for n in (1, 2)]
    tuned.write(folder / "a.jsonl", items, tuned.Origin.of(items, ["bench/net.json"], "a note"))
    ((origin, path),) = tuned.databases(folder)
    assert (origin.cpu, origin.hardware, origin.target) == (machine().cpu, machine().fingerprint, resolve().spelling)
    assert (origin.since, origin.until, origin.versions) == (WHEN.format(1), WHEN.format(2), versions())
    assert (origin.threads, origin.layers, origin.records) == ([1, 2], 1, 2)
    assert (origin.sources, origin.note, path.name) == (["net.json"], "a note", "a.jsonl")
    for bad, message in (
        ([], "at least one"),
        ([*items, record(versions=OTHER)], "versions: expected the same in all"),
        ([record(hardware="another")], "hardware: expected this machine"),
    ):
        with pytest.raises(RecordError, match=message):
            tuned.Origin.of(bad)
    with pytest.raises(RecordError, match=r"ends in \.jsonl"):
        tuned.write(folder / "a.txt", items, origin)


def test_what_ships_is_whole() -> None:
    """The package's own databases: each problem has one answer that a build may take, of a comparison,
    with a layer of the bench.
    """
    folder = Path(tuned.__file__).parent
    known = {entry.spec.descriptor for path in PROBLEMS.glob("*.json") for entry in convgen.read_specs(path)}
    shipped = tuned.databases(folder)
    assert shipped
    for origin, path in shipped:
        found = [item for items in tuned.records_of(path, origin.records).values() for item in items]
        assert {item.hardware for item in found} == {origin.hardware}
        assert {item.outcome for item in found} == {"ok"}
        assert all(item.versions == origin.versions for item in found)
        assert len({(item.spec, item.threads) for item in found}) == len(found)
        assert all((item.note or {})["winner"] for item in found)
        assert {item.spec for item in found} <= known
        # `convgen records prune --database` drops what a new version of a schedule has left behind.
        assert {reason for item in found if (reason := outdated(item))} == set()
    assert {path.stem for path in folder.glob("*.jsonl")} == {path.stem for path in folder.glob("*.json")}


# ---- records of other versions ----------------------------------------------------------------


def test_an_old_record_that_still_wins_is_made_new(
    store: RecordStore, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really measured: a direct convolution against the reference, which stands in for the default."""
    direct = parse_candidate(SPEC, resolve(), "cpu_direct")
    monkeypatch.setattr(recheck_module, "default_candidate", lambda *_: reference())
    spec = ConvSpec.parse("conv2d n1 ic32 oc32 i28x28 k3x3 p1")
    old = final(parse_candidate(spec, resolve(), "cpu_direct"), versions=OTHER, spec=spec.descriptor)
    store.add(old)
    answer = found_record(store, spec, resolve(), 2, pools=lambda: pools)
    assert answer.record is not None
    assert (answer.record.schedule, answer.record.versions) == (direct.schedule.id, versions())
    assert "convgen 0.0.1, llvm 19, tvm 0.26.0 was measured again and still wins" in answer.note
    made = [item for item in store.trials() if item != old]
    assert sorted(item.schedule for item in made) == ["cpu_direct", "reference"]
    note = answer.record.note
    assert note is not None
    assert note["final"] is note["winner"] is True
    assert note["recheck"] == old.id
    assert note["ratio_default"][0] > 1
    assert answer.record in made
    monkeypatch.setattr(recheck_module, "measure_in_turn", no_measuring)
    assert found_record(store, spec, resolve(), 2) == Answer(answer.record)  # once is enough


def test_an_old_record_that_no_longer_wins_has_expired(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    default = default_candidate(SPEC, resolve().on(2))
    store.add(final(another(), 1e-9, winner=True, versions=OTHER))
    calls = pretend(monkeypatch, {default: took(1e-3), another(): took(2e-3)})
    kernel = convgen.build(SPEC, threads=2, records=store.path)
    assert kernel.picks == default.picks
    assert "has expired: not faster than the default now" in kernel.note
    assert kernel.record is not None
    assert (kernel.record.note or {})["winner"] is True
    again = convgen.build(SPEC, threads=2, records=store.path)
    assert (again.record, again.note) == (kernel.record, "")
    assert calls == [[default, another()]]
    assert len(store) == 3


@pytest.mark.parametrize("outcome", ["wrong", "crash", "timeout", "build_error", "memory"])
def test_an_old_record_that_fails_has_expired(
    outcome: str, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = default_candidate(SPEC, resolve().on(2))
    store.add(final(another(), winner=True, versions=OTHER))
    calls = pretend(monkeypatch, {default: took(1e-3), another(): Result(outcome, error="planted")})
    answer = found_record(store, SPEC, resolve(), 2)
    assert f"has expired: {outcome}" in answer.note
    assert answer.rejected == {another()}
    assert answer.record is not None
    assert answer.record.picks == dict(default.picks)
    (failed,) = store.trials(outcome=outcome)
    assert (failed.error, failed.note) == ("planted", None)
    assert found_record(store, SPEC, resolve(), 2) == Answer(answer.record)
    assert len(calls) == 1


def test_where_everything_fails_it_is_not_tried_again(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    default = default_candidate(SPEC, resolve().on(2))
    store.add(final(another(), winner=True, versions=OTHER))
    calls = pretend(monkeypatch, {c: Result("crash", error="planted") for c in (default, another())})
    kernel = convgen.build(SPEC, threads=2, records=store)
    assert (kernel.schedule, kernel.record) == ("reference", None)  # the default was rejected
    assert found_record(store, SPEC, resolve(), 2) == Answer(None)
    assert len(calls) == 1


def test_a_store_that_must_not_be_written_is_not(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    default = default_candidate(SPEC, resolve().on(2))
    store.add(final(another(), winner=True, versions=OTHER))
    calls = pretend(monkeypatch, {default: took(2e-3), another(): took(1e-3)})
    with RecordStore(store.path, readonly=True) as readonly:
        for count in (1, 2):
            kernel = convgen.build(SPEC, threads=2, records=readonly)
            assert kernel.picks == another().picks
            assert kernel.note.endswith("still wins; not kept: the store is read-only")
            assert len(calls) == count
    assert len(store) == 1


def test_a_full_disk_costs_the_record_but_not_the_kernel(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    default = default_candidate(SPEC, resolve().on(2))
    store.add(final(another(), winner=True, versions=OTHER))
    pretend(monkeypatch, {default: took(2e-3), another(): took(1e-3)})

    def full(self: RecordStore, records: Any) -> int:
        raise RecordError(f"{self.path}: database or disk is full")

    monkeypatch.setattr(RecordStore, "add_all", full)
    kernel = convgen.build(SPEC, threads=2, records=store)
    assert kernel.picks == another().picks
    assert kernel.note.endswith("records.sqlite: database or disk is full")


def test_a_build_opens_what_it_may_only_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "r.sqlite"
        items = [final(another(), winner=True)]
        with RecordStore(path) as made, open_store(path, write=False) as opened:
            assert opened is not None
            assert not opened.readonly
            made.add_all(items)
        with unprivileged(Path(name)):
            with open_store(path, write=False) as opened:
                assert opened is not None
                assert opened.readonly
                assert found_record(opened, SPEC, resolve(), 2).record == items[0]
            with pytest.raises(RecordError), open_store(path) as opened:
                opened.add(record())  # type: ignore[union-attr]


def test_an_old_default_is_not_measured(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recheck_module, "recheck", no_measuring)
    store.add(final(default_candidate(SPEC, resolve().on(2)), winner=True, versions=OTHER))
    assert found_record(store, SPEC, resolve(), 2) == Answer(None)


@pytest.mark.parametrize(
    "changes", [{"schedule_version": 1000}, {"schedule": "cpu_gone"}, {"hardware": "another"}, {"threads": 1}], ids=str
)
def test_what_means_nothing_here_is_not_measured(
    changes: dict[str, Any], store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recheck_module, "recheck", no_measuring)
    store.add(final(another(), versions=OTHER, **changes))
    assert found_record(store, SPEC, resolve(), 2) == Answer(None)


def test_what_may_be_chance_does_not_win(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    default = default_candidate(SPEC, resolve().on(2))
    store.add(final(another(), winner=True, versions=OTHER))
    noise = Result("ok", (*(1e-3 + 4e-4 * (-1) ** i for i in range(24)), 9.9e-4))
    default_result = Result("ok", (1e-3,) * 25)
    pretend(monkeypatch, {default: default_result, another(): noise})
    assert (noise.seconds or 1.0) < (default_result.seconds or 0.0)
    answer = found_record(store, SPEC, resolve(), 2)
    assert answer.record is not None
    assert answer.record.picks == dict(default.picks)


def test_all_who_may_win_are_measured_together(
    store: RecordStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of an unfinished search, an old winner, and a shipped record."""
    default = default_candidate(SPEC, resolve().on(2))
    space = default.schedule.space(SPEC, resolve())
    valid = (Candidate(default.schedule, p) for p in space if not default.schedule.reason_against(SPEC, resolve(), p))
    old, trial, shipped = itertools.islice((c for c in valid if c != default), 3)
    store.add(final(old, winner=True, versions=OTHER))
    store.add(record(trial))
    plant(folder, [final(shipped, winner=True)])
    times = {default: took(4e-3), old: took(3e-3), trial: took(2e-3), shipped: took(1e-3)}
    calls = pretend(monkeypatch, times)
    answer = found_record(store, SPEC, resolve(), 2)
    assert set(calls[0]) == set(times)
    assert answer.record is not None
    assert answer.record.picks == dict(shipped.picks)
    assert "has expired: another is faster now" in answer.note
    assert best_record(store, SPEC, resolve(), 2) == answer.record


def test_a_shipped_record_of_other_versions_is_measured_and_kept(
    store: RecordStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(folder, [final(another(), winner=True, versions=OTHER)])
    pretend(monkeypatch, {default_candidate(SPEC, resolve().on(2)): took(2e-3), another(): took(1e-3)})
    answer = found_record(store, SPEC, resolve(), 2)
    assert answer.record in store.trials()
    assert found_record(store, SPEC, resolve(), 2) == Answer(answer.record)


def test_an_interrupt_leaves_no_record(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(recheck_module, "measure_in_turn", interrupted)
    store.add(final(another(), winner=True, versions=OTHER))
    with pytest.raises(KeyboardInterrupt):
        found_record(store, SPEC, resolve(), 2)
    assert len(store) == 1


def test_what_is_wrong_is_found_in_a_worker(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that fails does not keep the others from being timed."""
    real, default = Pools.run, default_candidate(SPEC, resolve().on(2))
    ended = iter([Result("wrong", error="planted")])

    def run(self: Pools, *arguments: Any, **options: Any) -> Result:
        return next(ended, None) or real(self, *arguments, **options)

    monkeypatch.setattr(Pools, "run", run)
    results = measure_in_turn(SPEC, resolve(), 2, [another(), default, default], pools)
    assert {candidate: result.outcome for candidate, result in results.items()} == {another(): "wrong", default: "ok"}
    assert len(results[default].samples) == recheck_module.ROUNDS


# ---- checks, and what can go ------------------------------------------------------------------


def test_records_are_measured_again(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    good, gone = record(default_candidate(SPEC, resolve().on(2))), record(schedule_version=1000)
    slow = record(another())
    module = importlib.import_module("convgen.tuning.recheck")
    real = module.validate
    found = check_records([good, gone], resolve(), lambda: pools)
    outcomes = [(one.record, one.outcome, one.ratio_default) for one in found]
    assert outcomes == [(good, "ok", [1.0, 1.0, 1.0]), (gone, "inapplicable", None)]

    pretend(monkeypatch, {default_candidate(SPEC, resolve().on(2)): took(1e-3), another(): took(2e-3)})
    (one,) = check_records([slow], resolve(), lambda: pools)
    assert (one.outcome, one.ratio_default) == ("slower", [0.5, 0.5, 0.5])

    def failing(kernel: Any) -> Any:
        report = real(kernel)
        raise convgen.errors.ValidationError(f"planted; {len(report.checks)} checks")

    monkeypatch.setattr(module, "validate", failing)
    (one,) = check_records([slow], resolve(), lambda: pools)
    assert one.outcome == "wrong"
    assert "planted" in one.error


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"outcome": "crash", "seconds": None}, "its outcome is crash"),
        ({"schedule": "cpu_gone"}, "cpu_gone is gone"),
        ({"schedule": "cpu_im2col"}, "cpu_im2col gave way to cpu_direct, which has to be measured anew"),
        ({"picks": {"tile": 3}}, "no longer admits its picks"),
        ({"hardware": "another"}, "another kind of machine"),
        ({"versions": OTHER}, "convgen 0.0.1, llvm 19, tvm 0.26.0: a build would measure it"),
        ({"spec": "conv9d"}, "conv9d"),
        ({"target": "tpu"}, "tpu"),
    ],
    ids=lambda value: next(iter(value), "none") if isinstance(value, dict) else "",
)
def test_why_a_record_does_not_answer(changes: dict[str, Any], reason: str) -> None:
    found = reason_against(record(default_candidate(SPEC, resolve().on(2)), **changes))
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(("old", "now"), sorted((old, now) for now, names in EARLIER.items() for old in names))
def test_records_of_earlier_schedules_say_what_is_in_their_place(old: str, now: str) -> None:
    assert reason_against(record(schedule=old)) == f"{old} gave way to {now}, which has to be measured anew"
    with pytest.raises(UnsupportedError, match=f"schedule: {old} gave way to {now}: expected {now}, found '{old}'"):
        find_schedule(old)
    assert old not in schedules()


def test_these_are_all_earlier_schedules() -> None:
    assert {name: set(found.merged) for name, found in schedules().items() if found.merged} == EARLIER


def test_what_can_go_and_what_stays() -> None:
    now = WHEN.format(31)
    recent: dict[str, Any] = {"versions": OTHER, "when": WHEN.format(30)}
    trials = [record(another(), 1e-3 * i, when=WHEN.format(i)) for i in range(1, 6)]
    old = [record(another(), 1e-3 * i, **recent) for i in range(1, 6)]
    old_final = final(another(), 1.0, winner=True, **recent)
    ancient = final(winner=True, versions=OTHER, when="2025-01-01T00:00:00Z")
    gone = final(winner=True, schedule_version=1000)
    stays = [
        final(another(), 5.0, winner=True),
        final(another(), 6.0, winner=False),
        record(outcome="crash", seconds=None),
        record(another(), 9.0, threads=1),
    ]
    failed = record(outcome="wrong", seconds=None, **recent)
    items = [*trials, *old, old_final, ancient, gone, *stays, failed]
    random.Random(0).shuffle(items)
    found = prunable(items, keep=2, days=30, now=now)
    assert {reason: set(dropped) for reason, dropped in found.items()} == {
        "of another version of its schedule": {gone},
        "of other versions, more than 30 days old": {ancient},
        "failed with other versions": {failed},
        "slower than the 2 fastest of its problem": set(trials[2:]),
        "slower than the 2 fastest of its problem, of other versions": set(old[1:]),  # the final is the first
    }


# ---- records travel ---------------------------------------------------------------------------


def test_an_imported_record_gives_the_same_kernel(store: RecordStore, tmp_path: Path) -> None:
    """Bit for bit: the same picks, the same TIR, the same record; nothing is measured."""
    target, items = resolve(), []
    specs = [ConvSpec.parse(t) for t in ("conv2d n1 ic16 oc32 i14x14 k3x3 p1 relu", "conv2d n1 ic16 oc32 i14x14 k1x1")]
    for spec in specs:
        default = default_candidate(spec, target)
        for picks in itertools.islice(default.schedule.space(spec, target), 200):
            if picks != default.picks and default.schedule.reason_against(spec, target, picks) is None:
                items.append(final(Candidate(default.schedule, picks), winner=True, spec=spec.descriptor))
                break
    store.add_all([*items, *(record(reference(), 0.9e-3, spec=spec.descriptor) for spec in specs)])
    write_lines(tmp_path / "tuned.jsonl", [best for s in specs if (best := best_record(store, s, target, 2))])
    with RecordStore(tmp_path / "there.sqlite") as there:
        assert there.import_(tmp_path / "tuned.jsonl") == len(items) == 2
        for spec in specs:
            here, other = (convgen.build(spec, threads=2, records=where) for where in (store, there))
            assert here.record == other.record
            assert here.picks == other.picks != default_candidate(spec, target).picks
            assert here.source("tir") == other.source("tir")
            assert here.source("asm") == other.source("asm")
        assert len(there) == 2


def test_a_like_machine_with_more_cpus_reaches_the_same_kernel(store: RecordStore) -> None:
    """Though its own default is another: the record's candidate does not depend on the number of CPUs."""
    here = resolve()
    config = json.dumps({**json.loads(here.tvm_config), "num-cores": 64}, sort_keys=True)
    there = dataclasses.replace(here, cores=64, hardware=elsewhere(62), tvm_config=config)
    store.add(final(another(), winner=True))
    kernels = [convgen.build(SPEC, target, threads=2, records=store) for target in (here, there)]
    assert kernels[0].record == kernels[1].record
    assert kernels[0].picks == kernels[1].picks == another().picks
    assert kernels[0].source("tir") == kernels[1].source("tir")
    assert (kernels[0].note, "of this kind" in kernels[1].note) == ("", True)
