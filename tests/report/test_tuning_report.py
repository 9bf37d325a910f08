"""What is told of a tuning job afterwards."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import astuple, replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bench_rows import A, B, row
from click.testing import CliRunner

from convgen.cli.report import report
from convgen.errors import MeasureError, RecordError
from convgen.formats.entries import SpecEntry
from convgen.hardware import machine
from convgen.hardware.machine import Measured
from convgen.problem.spec import ConvSpec
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
from convgen.report.gather import Model, gather, read_rows
from convgen.report.rows import Row
from convgen.report.tuning import Drift, Ratio, grouped, wins
from convgen.report.tuning_page import page
from convgen.report.tuning_text import facts, markdown
from convgen.report.words import span

HERE = "AuthenticAMD-1-2-3-0123456789ab-2"
VERSIONS = {"convgen": "1", "tvm": "2"}
DAY = "2026-01-02"


def trial(
    seconds: float | None = 1e-3,
    *,
    spec: str = A,
    schedule: str = "cpu_direct",
    tile: int = 1,
    at: int = 0,
    outcome: str = "",
    error: str = "",
    note: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] = VERSIONS,
    threads: int = 2,
    target: str = "cpu:test",
) -> TuningRecord:
    """A record; ``at`` seconds after midnight."""
    return TuningRecord(
        spec=spec,
        target=target,
        hardware=HERE,
        threads=threads,
        schedule=schedule,
        schedule_version=1,
        picks={"tile": tile},
        outcome=outcome or ("ok" if seconds else "crash"),
        seconds=seconds,
        error=error,
        versions=versions,
        when=f"{DAY}T{at // 3600:02}:{at // 60 % 60:02}:{at % 60:02}.000000Z",
        note=note,
    )


def final(seconds: float, default: float, ort: float | None, *, winner: bool, **more: Any) -> TuningRecord:
    """A record of a final comparison."""

    def ratio(other: float | None) -> list[float] | None:
        return None if other is None else [other / seconds, 0.9 * other / seconds, 1.1 * other / seconds]

    note = {"final": True, "job": "j", "cost": 1.0, "default_seconds": default, "onnxruntime_seconds": ort}
    note |= {"ratio_default": ratio(default), "ratio_onnxruntime": ratio(ort), "winner": winner}
    return trial(seconds, note=note, **more)


def search(at: int, **more: Any) -> dict[str, Any]:
    """Arguments of a trial that a job made."""
    return {"at": at, "note": {"job": "j", "cost": 0.5, "drift": 1.0 + at / 100}, **more}


#: A layer whose default was tried first, and the third trial won; and one that has no comparison yet.
JOB = (
    trial(4e-3, tile=1, **search(1)),
    trial(None, tile=2, error=f"{A}: cpu_direct(tile=2) died: <SIGSEGV> after 3 s", **search(2)),
    trial(2e-3, tile=3, **search(3)),
    trial(2.5e-3, schedule="cpu_winograd", tile=4, **search(4)),
    trial(None, schedule="cpu_winograd", tile=5, error="died: <SIGSEGV> after 71 s", **search(5)),
    final(4.4e-3, 4.4e-3, 3e-3, winner=False, tile=1, at=6),
    final(2.2e-3, 4.4e-3, 3e-3, winner=True, tile=3, at=6),
    trial(1e-3, spec=B, schedule="cpu_rows", **search(7)),
)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return filled(tmp_path / "job.sqlite", *JOB)


def filled(path: Path, *records: TuningRecord) -> RecordStore:
    store = RecordStore(path)
    for record in records:
        store.add(record)
    return store


def model(name: str, **counts: int) -> Model:
    specs = {"a": A, "b": B, "c": "conv1d n1 ic4 oc4 i20 k3 s1 p0"}
    return Model(name, [SpecEntry(ConvSpec.parse(specs[k]), count, (f"{k}1",)) for k, count in counts.items()])


@pytest.fixture
def this_machine(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """This machine is the records', and its peak is known."""
    found = Measured(peak=400e9, l2=None, l3=None, dram=100e9, date=DAY)
    here = machine.Machine("Some CPU", HERE, frozenset(), 2, 2, None, None, None, 1 << 30)
    monkeypatch.setattr("convgen.report.gather.machine", lambda: here)
    monkeypatch.setattr("convgen.hardware.roofline.machine", lambda: here)
    monkeypatch.setattr("convgen.report.gather.measured", lambda threads: found)
    return found


# ---- facts ------------------------------------------------------------------------------------


def test_a_layer_of_a_job(store: RecordStore) -> None:
    (setting,) = gather(store).settings
    layer = setting.layers[0]
    assert (layer.descriptor, layer.kind, layer.trials) == (A, "2-D, large plane", 5)
    assert (layer.seconds, layer.schedule, layer.picks, layer.compared) == (2.2e-3, "cpu_direct", {"tile": 3}, True)
    assert (layer.default_trial, layer.winner_trial, layer.kept_default) == (1, 3, False)
    assert layer.curve == [(1, 4e-3), (3, 2e-3)]
    assert astuple(layer.others["default"].ratio) == (2.0, pytest.approx(1.8), pytest.approx(2.2))
    assert layer.others["onnxruntime"].seconds == 3e-3
    assert layer.others["onnxruntime"].ratio.verdict == "faster"
    assert layer.failures == {"crash": 2}
    assert layer.cost == pytest.approx(5 * 0.5 + 2 * 1.0)
    other = setting.layers[1]
    assert (other.descriptor, other.seconds, other.compared, other.others) == (B, 1e-3, False, {})
    assert (setting.trials, setting.outcomes, setting.jobs) == (6, {"crash": 2}, {"j"})
    assert setting.cost == pytest.approx(5.0)
    assert (setting.first[11:19], setting.last[11:19]) == ("00:00:01", "00:00:07")


def test_models_count_their_layers(store: RecordStore) -> None:
    found = gather(store, [model("net", a=3, b=2, c=1), model("other", a=1)])
    (setting,) = found.settings
    net, other = setting.totals
    assert (net.layers, net.tuned, net.convolutions) == (3, 2, 5)
    assert net.seconds == pytest.approx(3 * 2.2e-3 + 2 * 1e-3)
    assert net.others["default"].seconds == pytest.approx(3 * 4.4e-3)  # of the one layer that has it
    assert net.others["default"].ratio == pytest.approx(2.0)
    assert not net.is_whole("default")
    assert other.is_whole("onnxruntime")
    assert other.others["onnxruntime"].ratio == pytest.approx(3 / 2.2)
    assert [layer.count for layer in setting.layers] == [4, 2]
    assert setting.layers[0].names == [("net", "a1"), ("other", "a1")]
    assert setting.missing == [("net", "conv1d n1 ic4 oc4 i20 k3 s1 p0")]
    assert found.notes == []
    alone = gather(store, [model("other", a=1)])
    assert [layer.descriptor for layer in alone.settings[0].layers] == [A]
    assert len(alone.notes) == 1  # of the problem that is left out


def test_without_models_every_layer_counts_once(store: RecordStore) -> None:
    (total,) = gather(store).settings[0].totals
    assert (total.layers, total.convolutions, total.seconds) == (2, 2, pytest.approx(3.2e-3))


def test_settings_are_told_apart_and_chosen(tmp_path: Path) -> None:
    records = [trial(), trial(threads=1), trial(target="cpu:other")]
    store = filled(tmp_path / "s.sqlite", *records)
    found = [(setting.target, setting.threads) for setting in gather(store).settings]
    assert found == [("cpu:other", 2), ("cpu:test", 1), ("cpu:test", 2)]
    assert [s.target for s in gather(store, targets=["cpu:test"], threads=[1]).settings] == ["cpu:test"]
    with pytest.raises(RecordError, match="net for cpu:none with 3 threads, found none"):
        gather(store, [model("net", a=1)], targets=["cpu:none"], threads=[3])
    other = Model("other", [SpecEntry(ConvSpec.parse("conv1d n1 ic9 oc9 i99 k1"))])
    with pytest.raises(RecordError, match=r"records of other.*, found none; there are others: .* with --whole$"):
        gather(store, [other])


def test_a_default_that_nothing_beats_is_told(tmp_path: Path) -> None:
    store = filled(tmp_path / "s.sqlite", trial(1e-3), final(1e-3, 1e-3, None, winner=True, at=1))
    (layer,) = gather(store).settings[0].layers
    assert layer.kept_default
    assert layer.others.keys() == {"default"}  # ONNX Runtime could not be timed
    assert "the default</small>" in page(gather(store))


def test_records_without_notes_say_not_measured(tmp_path: Path) -> None:
    store = filled(tmp_path / "s.sqlite", trial(2e-3), trial(1e-3, tile=2, at=1))
    found = gather(store)
    (layer,) = found.settings[0].layers
    assert (layer.seconds, layer.cost, layer.limit, layer.default_trial) == (1e-3, None, None, None)
    assert found.settings[0].drift is None
    for text in (page(found), markdown(found)):
        assert text.count("not measured") >= 3
        assert "nan" not in text


@pytest.mark.parametrize(
    "note",
    [
        {"final": True, "default_seconds": "fast", "ratio_default": [1, 2], "cost": -1, "job": 7, "device": []},
        {"final": True, "default_seconds": 2e-3, "ratio_default": [1, None, "x"], "drift": True},
        {"final": 0, "winner": "yes", "drift": "1", "busy": "much"},
        {"busy": 7.0},
        {"busy": [0.5]},
    ],
)
def test_notes_of_elsewhere_may_hold_anything(tmp_path: Path, note: dict[str, Any]) -> None:
    found = gather(filled(tmp_path / "s.sqlite", trial(1e-3, note=note)))
    (layer,) = found.settings[0].layers
    known = {"default": 2.0} if note.get("default_seconds") == 2e-3 else {}
    assert {name: other.ratio.value for name, other in layer.others.items()} == known
    assert all(other.ratio.low is None for other in layer.others.values())
    assert json.loads(json.dumps(found.to_dict()))
    assert page(found)


def test_a_busy_machine_is_mentioned(tmp_path: Path) -> None:
    """In a trial, which its neighbours make up for, and in a comparison, which decides."""
    quiet = [trial(2e-3, tile=number, at=number, note={"busy": 0.01 * number}) for number in range(4)]
    (setting,) = gather(filled(tmp_path / "quiet.sqlite", *quiet)).settings
    assert facts(setting)["other programs"] == "used at most 3% of the CPUs in 4 measurements"

    noisy = trial(1e-3, tile=9, at=8, note={"busy": 0.5})
    decisive = final(9e-4, 2e-3, None, winner=True, tile=9, at=9)
    decisive = replace(decisive, note={**(decisive.note or {}), "busy": 0.25})
    found = gather(filled(tmp_path / "busy.sqlite", *quiet, noisy, decisive))
    said = (
        "used more than 5% of the CPUs in 2 of 6 measurements, up to 50%; the figures of 1 of 1 layer are not reliable"
    )
    assert facts(found.settings[0])["other programs"] == said
    assert said in markdown(found)
    assert said in page(found)
    (plain,) = found.to_dict()["settings"]
    assert plain["busy"] == {"watched": 6, "disturbed": 2, "most": 0.5}
    assert plain["layers"][0]["busy"] == 0.25
    assert "other programs" not in facts(gather(filled(tmp_path / "old.sqlite", *JOB)).settings[0])


def test_of_several_versions_the_newest_count(tmp_path: Path) -> None:
    old = {"convgen": "0"}
    records = [trial(1e-4, versions=old), trial(3e-3, at=1), trial(2e-3, tile=2, at=2)]
    (setting,) = gather(filled(tmp_path / "s.sqlite", *records)).settings
    assert (setting.trials, setting.older, setting.versions) == (2, 1, [VERSIONS])
    assert setting.layers[0].seconds == 2e-3


def test_a_winner_of_other_versions_keeps_its_search(tmp_path: Path) -> None:
    """An old record that was compared again: there is no search of these versions."""
    old = {"convgen": "0"}
    records = [trial(2e-3, versions=old), final(1e-3, 3e-3, None, winner=True, at=5)]
    (setting,) = gather(filled(tmp_path / "s.sqlite", *records)).settings
    assert (setting.trials, setting.layers[0].seconds, setting.older) == (1, 1e-3, 0)


def test_a_descriptor_of_another_version(tmp_path: Path) -> None:
    found = gather(filled(tmp_path / "s.sqlite", trial(spec="conv9d of tomorrow")))
    assert found.settings[0].layers[0].kind == "of another version"
    assert "conv9d of tomorrow" in page(found)


def test_records_are_read_problem_by_problem(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    trials = RecordStore.trials

    def spy(self: RecordStore, **wanted: Any) -> list[TuningRecord]:
        asked.append(wanted)
        return trials(self, **wanted)

    monkeypatch.setattr(RecordStore, "trials", spy)
    gather(store)
    assert [wanted["spec"] for wanted in asked] == sorted([A, B])
    assert all(wanted.keys() == {"spec", "target", "hardware", "threads"} for wanted in asked)


# ---- limits and peers -------------------------------------------------------------------------


def test_the_limit_is_this_machines_where_it_is_the_records(store: RecordStore, this_machine: Measured) -> None:
    (setting,) = gather(store).settings
    assert (setting.cpu, setting.peak, setting.no_limit) == ("Some CPU", 400e9, "")
    layer = setting.layers[0]
    spec = ConvSpec.parse(A)
    assert layer.limit == (pytest.approx(spec.flops / this_machine.peak), "compute")
    assert layer.of_limit == pytest.approx(spec.flops / 400e9 / 2.2e-3)


def test_a_machine_that_cannot_be_measured_has_no_limit(
    store: RecordStore, this_machine: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(threads: int) -> Measured:
        raise MeasureError("no clock\nat all")

    monkeypatch.setattr("convgen.report.gather.measured", fail)
    (setting,) = gather(store).settings
    assert setting.no_limit.endswith("no clock")
    assert "no clock" in page(gather(store))


def test_rows_of_a_bench_add_peers_and_limits(store: RecordStore) -> None:
    limit = {"seconds": 1.1e-3, "limited_by": "compute", "peak_flops": 9e9}
    rows = [
        row(A, 2, ort=9e-3, torch=4.4e-3, fingerprint=HERE, roofline=limit),
        row(A, 1, fingerprint=HERE),
        row(B, 2),  # of another machine
    ]
    found = gather(store, rows=rows)
    layer = found.settings[0].layers[0]
    assert layer.others["torch"].ratio == Ratio(2.0)
    assert layer.others["torch"].apart
    assert layer.others["onnxruntime"].seconds == 3e-3  # timed in turn: better than the row's
    assert layer.of_limit == pytest.approx(0.5)
    assert found.settings[0].cpu == "CPU"
    assert found.settings[0].peers == ["onnxruntime", "torch"]
    assert any(note.startswith("2 rows") for note in found.notes)


def test_rows_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ('{"spec": 1}\n', "[]\n", "no rows\n", '{"a": 2}\n'):
        path.write_text(text)
        with pytest.raises(RecordError, match="rows of a bench"):
            read_rows(path)
    path.write_text("".join(json.dumps(dict(one.values)) + "\n" for one in (row(A), row(B, mode="cold"))))
    assert [one.values["spec"] for one in read_rows(path)] == [A]
    assert isinstance(read_rows(path)[0], Row)


# ---- failures, wins, drift --------------------------------------------------------------------


def test_every_failure_is_listed_with_its_command(store: RecordStore) -> None:
    (setting,) = gather(store).settings
    ((first, second),) = grouped(setting.failures)  # they differ in a number only
    assert first.message == "died: <SIGSEGV> after 3 s"
    words = ["convgen", "validate", A, "--schedule", "cpu_direct", "--picks", "tile=2"]
    assert shlex.split(first.command) == [*words, "--threads", "2", "--target", "cpu:test"]
    text = page(gather(store))
    assert "died: &lt;SIGSEGV&gt;" in text
    for failure in (first, second):
        assert failure.command in unescape(text)
        assert failure.command in markdown(gather(store))
    assert "after 71 s" in text


def test_other_failures_are_other_groups(tmp_path: Path) -> None:
    errors = ["a", "b", "b", ""]
    records = [trial(None, tile=i, at=i, error=error) for i, error in enumerate(errors)]
    records.append(trial(None, tile=9, outcome="wrong", error="b"))
    groups = grouped(gather(filled(tmp_path / "s.sqlite", *records)).settings[0].failures)
    assert [(len(group), group[0].outcome, group[0].message) for group in groups] == [
        (2, "crash", "b"),
        (1, "crash", "a"),
        (1, "crash", "no message"),
        (1, "wrong", "b"),
    ]


def test_wins(store: RecordStore) -> None:
    found = wins(gather(store).settings[0].layers)
    assert list(found) == ["1×1, many pixels", "2-D, large plane"]
    direct, winograd = found["2-D, large plane"].items()
    assert (direct[0], direct[1].wins, direct[1].layers, direct[1].behind) == ("cpu_direct", 1, 1, 1.0)
    assert (winograd[0], winograd[1].wins) == ("cpu_winograd", 0)
    assert winograd[1].behind == pytest.approx(1.25)


def test_drift_has_few_points_however_many_trials() -> None:
    drift = Drift.of([1.0, 1.2, 0.8] * 1000)
    assert drift is not None
    assert (drift.count, len(drift.medians)) == (3000, 240)
    assert (min(drift.lows), max(drift.highs)) == (0.8, 1.2)
    assert Drift.of([]) is None
    short = Drift.of([1.0, 1.1])
    assert short is not None
    assert short.medians == (1.0, 1.1)


def test_spans() -> None:
    assert [span(s) for s in (None, 0.25, 42.4, 61, 7500)] == [
        "not measured",
        "0.2 s",
        "42 s",
        "1 min 1 s",
        "2 h 5 min",
    ]


# ---- the page ---------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Elements left open, attributes that load something, and numbers that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        self._check(tag, attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._check(tag, attributes)

    def _check(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if (
                name.startswith("on")
                or name == "src"
                or (name == "href" and not (value or "").startswith(("#", "data:")))
            ):
                self.problems.append(f"{tag} {name}={value}")
            if re.search(r"\b(nan|inf)\b", value or ""):
                self.problems.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}>")


def check(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert (checker.open, checker.problems) == ([], [])
    assert "script" not in checker.counts
    assert "@import" not in text
    assert "url(" not in text
    return checker


def test_the_page_needs_nothing_else(store: RecordStore, this_machine: Measured) -> None:
    checker = check(page(gather(store, [model("a <net>", a=3, b=2, c=1)], rows=[row(A, 2, fingerprint=HERE)])))
    assert checker.counts["h1"] == 1
    assert checker.counts["details"] == 1
    assert "a &lt;net&gt;" in page(gather(store, [model("a <net>", a=1)]))


def test_the_curve_has_the_default_the_winner_and_each_failure(store: RecordStore) -> None:
    text = page(gather(store, [model("net", a=1)]))
    (best,) = re.findall(r'<path class="best" d="([^"]*)"', text)
    assert best == "M100 50.0H100V50.0H500V0.0H1000"  # half the speed is half of the way to a quarter
    (lost,) = re.findall(r'<path class="lost" d="([^"]*)"', text)
    assert lost.count("M") == 2
    (dots,) = re.findall(r'<path class="dots" d="([^"]*)"', text)
    assert dots.count("M") == 3
    (level,) = re.findall(r'<path class="level" d="([^"]*)"', text)
    assert level == "M0 50.0H1000"
    assert text.count('<circle class="ring" cx="50.00%" cy="0.0%"') == 1
    assert "95 % after 3, best at 3 of 5 trials; 2 crash; 4.5 s" in text


@pytest.mark.parametrize(
    "records",
    [
        [trial(None)],
        [final(1e-3, 2e-3, 3e-3, winner=True)],
        [trial(1e-3), trial(None, spec=B, at=1)],
        [trial(1e-9), trial(1e3, tile=2, at=1), final(1e-9, 1e3, 1e3, winner=True, at=2)],
        [trial(1e-3, threads=1), trial(1e-3, threads=2)],
    ],
    ids=["nothing right", "no search", "one right", "far apart", "two settings"],
)
def test_pages_of_odd_stores(tmp_path: Path, records: list[TuningRecord]) -> None:
    found = gather(filled(tmp_path / "s.sqlite", *records))
    check(page(found))
    assert markdown(found).startswith("# Tuning: s.sqlite\n")
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_markdown_tables(store: RecordStore) -> None:
    text = markdown(gather(store, [model("net", a=3, b=2)]))
    cells = "2200 | 2.00 (1.80–2.20) | 1.36 (1.23–1.50) | not measured | cpu_direct(tile=3) | 5 | 2 crash |"
    assert f"| `{A}` a1 ×3 | 3 | {cells}" in text
    assert "net: 8.600 ms tuned. 1 of these layers: 6.600 ms tuned, 13.2 ms by default (2.00×)." in text


# ---- the command ------------------------------------------------------------------------------


def test_the_command_writes_pages_and_tables(store: RecordStore, tmp_path: Path) -> None:
    path, out, tables = str(store.path), tmp_path / "r.html", tmp_path / "r.md"
    run = CliRunner().invoke
    done = run(report, [path, A, "-o", str(out), "--json"])
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["title"] == A
    (setting,) = document["settings"]
    assert [layer["spec"] for layer in setting["layers"]] == [A]
    assert setting["layers"][0]["others"]["default"]["ratio"]["value"] == 2.0
    assert len(setting["failures"]) == 2
    check(out.read_text())
    assert run(report, [path, "-o", str(tables)]).stdout == ""
    assert run(report, [path]).stdout == tables.read_text()


def test_the_command_takes_a_job(store: RecordStore, tmp_path: Path) -> None:
    layers = tmp_path / "net.json"
    layers.write_text(json.dumps({"layers": [{"name": "x", "count": 7, "spec": A}]}))
    job = tmp_path / "night.toml"
    job.write_text('models = ["net.json"]\nrecords = "job.sqlite"\ntarget = "cpu:test"\nthreads = 2\n')
    done = CliRunner().invoke(report, [str(job), "--json"])
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["title"] == "night"
    (total,) = document["settings"][0]["totals"]
    assert (total["name"], total["convolutions"]) == ("net", 7)
    job.write_text('models = ["net.json"]\nrecords = "job.sqlite"\ntarget = "cpu:test"\nthreads = 5\n')
    failed = CliRunner().invoke(report, [str(job)])
    assert isinstance(failed.exception, RecordError)


def test_the_command_refuses(store: RecordStore, tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(report, [str(store.path), "-o", "r.pdf"]).exit_code == 2
    missing = run(report, [str(tmp_path / "no.sqlite")]).exception
    assert isinstance(missing, RecordError)
    assert not (tmp_path / "no.sqlite").exists()
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(store.path.read_bytes()[:4096])
    assert isinstance(run(report, [str(damaged), "-o", str(tmp_path / "r.html")]).exception, RecordError)
    assert not (tmp_path / "r.html").exists()


# ---- in a browser -----------------------------------------------------------------------------

#: Says how wide the page is, and what it tried to load; nothing at all is allowed.
_PROBE = """
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:;
 script-src 'unsafe-inline'">
<script>
const blocked = [];
addEventListener("securitypolicyviolation", event => blocked.push(event.blockedURI));
addEventListener("load", () => {
  const root = document.documentElement, wide = [];
  for (const element of document.querySelectorAll("main *")) {
    const box = element.getBoundingClientRect();
    if (box.right > innerWidth + 8 && !element.closest(".scroll, svg")) wide.push(element.outerHTML.slice(0, 80));
  }
  parent.document.title = JSON.stringify({
    inner: innerWidth, scroll: root.scrollWidth, wide, blocked,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
    meters: [...document.querySelectorAll(".bar rect")].map(bar => bar.getBoundingClientRect().width),
  });
});
</script>
"""


def _browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(_browser() is None, reason="no Chromium found (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_in_a_browser(store: RecordStore, this_machine: Measured, tmp_path: Path, width: int) -> None:
    text = page(gather(store, [model("net", a=3, b=2, c=1), model("other", a=1)]))
    file = tmp_path / "r.html"
    probed = text.replace('<meta charset="utf-8">', f'<meta charset="utf-8">{_PROBE}', 1)
    frame = f'<iframe style="border: 0" width="{width}" height="900" srcdoc="{escape(probed)}"></iframe>'
    file.write_text(f'<!doctype html><meta charset="utf-8"><title></title>{frame}')  # windows have a least width
    command = [_browser() or "", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    command += ["--window-size=1300,1000", "--enable-logging=stderr", "--dump-dom", file.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}, check=False
    )
    said = re.search(r"<title>(.*?)</title>", done.stdout)
    assert said, done.stderr[-2000:]
    found = json.loads(unescape(said[1]))
    assert found["scroll"] <= found["inner"] == width
    assert found["wide"] == found["blocked"] == found["loaded"] == []
    tuned, default = found["meters"][-3:-1]
    assert math.isclose(default / tuned, 2.0, rel_tol=0.02)
    assert "CONSOLE" not in done.stderr  # such as of a path that is none
