"""The command line where it measures: what it prints, what it returns, what it keeps."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, TINY, Run

from convgen.cli.generate import Work
from convgen.formats.entries import SpecEntry
from convgen.kernel.kernel import compile_candidate
from convgen.measure.peers import PEERS
from convgen.problem.spec import ConvSpec
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
from convgen.tuning.search import Progress

# ---- tune, records ----------------------------------------------------------------------------


def test_tune_fills_the_store_and_build_uses_it(tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    store = ["--records", tmp_path / "records.sqlite"]
    found = run_json("tune", SMALL, "--threads", 1, "--trials", 3, *store)
    (layer,) = found["layers"]
    assert (layer["trials"], layer["known_trials"], layer["spec"]) == (3, 0, SMALL)
    assert layer["best"]["outcome"] == "ok"
    assert layer["default_seconds"] >= layer["best"]["seconds"]

    listed = run_json("records", "list", *store)
    wanted = {"id", "trial_key", "spec", "target", "threads", "schedule", "picks", "outcome", "seconds"}
    assert all(wanted <= record.keys() for record in listed)
    assert {record["spec"] for record in listed} == {SMALL}
    assert run_json("records", "list", "--spec", TINY, *store) == []

    # What was measured is not measured again, and decides what is built.
    again = run_json("tune", SMALL, "--threads", 1, "--trials", 3, *store)
    assert (again["layers"][0]["trials"], again["layers"][0]["known_trials"]) == (0, 3)
    (best,) = run_json("records", "best", SMALL, *store)
    built = run_json("build", SMALL, "--threads", 1, "--out", tmp_path / "out", *store)["layers"][0]
    assert built["record"] == best["id"] == again["layers"][0]["best"]["id"]
    assert built["seconds"] == best["seconds"]
    status, out, err = run("validate", SMALL, "--threads", 1, *store)
    assert (status, err) == (0, "")
    assert f"{best['schedule']}(" in out


def test_the_command_that_tune_names_uses_what_was_found(
    tmp_path: Path, run: Run, run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convgen.tuning.final.ROUNDS", 3)
    layers = tmp_path / "two.txt"
    layers.write_text(f"{TINY}\n")
    options = ["--accuracy", "strict", "--threads", "1,2", "--trials", 1, "--records", tmp_path / "records.sqlite"]
    status, _, err = run("tune", layers, *options)
    assert status == 0, err
    said = re.search(r"next: `convgen (build .*)` uses what was found; so it does with --threads 2$", err, re.MULTILINE)
    assert said is not None, err
    assert "up to 1 trial a layer" in err
    (built,) = run_json(*shlex.split(said[1]), "--out", tmp_path / "out", "--no-validate")["layers"]
    assert built["record"] is not None


def record(seconds: float) -> TuningRecord:
    """A trial on a machine that is not this one."""
    candidate: dict[str, Any] = {"schedule": "reference", "schedule_version": 1, "picks": {}}
    where: dict[str, Any] = {"target": "cpu:elsewhere", "hardware": "elsewhere", "threads": 1}
    return TuningRecord(spec=TINY, outcome="ok", seconds=seconds, versions={"convgen": "0"}, **candidate, **where)


def test_records_travel(tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    first, second, file = tmp_path / "a.sqlite", tmp_path / "b.sqlite", tmp_path / "records.jsonl"
    count = 3
    with RecordStore(first) as store:
        for number in range(count):
            store.add(record(seconds=1e-6 * (number + 1)))
    assert len(run_json("records", "list", "--records", first)) == count
    assert run_json("records", "best", "--records", first) == []  # of another machine
    assert run_json("records", "export", "-o", file, "--records", first)["exported"] == count
    assert run_json("records", "import", file, "--records", second) == {"added": count, "records": count}
    assert run_json("records", "import", file, "--records", second) == {"added": 0, "records": count}
    merged = run_json("records", "merge", first, second, "--records", tmp_path / "c.sqlite")
    assert merged["records"] == count
    assert run_json("records", "check", "--records", second)["ok"]
    assert run_json("records", "recover", first, tmp_path / "d.sqlite")["saved"] == count
    assert "records in" in run("records", "list", "--records", second)[2]


def test_damaged_and_missing_stores_are_trouble(tmp_path: Path, run: Run) -> None:
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"not a database at all" * 100)
    for arguments in (["list", "--records", broken], ["check", "--records", tmp_path / "none.sqlite"]):
        status, out, err = run("records", *arguments)
        assert (status, out) == (3, "")
        assert re.fullmatch(r"convgen: [^\n]+\n", err)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert (
        "`convgen records recover DAMAGED INTO` saves what is readable"
        in run("records", "list", "--records", broken)[2]
    )
    assert run("records", "import", tmp_path / "bad.jsonl", "--records", tmp_path / "x.sqlite")[0] == 3
    assert not (tmp_path / "x.sqlite").exists()


class FakeTuner:
    """Spends a part of what it is given, by a clock of its own."""

    def __init__(self, part: float) -> None:
        self.part, self.now, self.given = part, 100.0, list[float | None]()

    def tune(self, spec: ConvSpec, *, trials: int, seconds: float | None, progress: Callable[[Progress], None]) -> None:
        self.given.append(seconds)
        self.now += (seconds or 0.0) * self.part
        progress(Progress(spec, trials, seconds, done=5, known=2))


class FakeView:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@pytest.mark.parametrize(("part", "expected"), [(1.0, [10, 10, 10]), (0.0, [10, 15, 30]), (2.0, [10, 5, 0])])
def test_layers_share_the_time(part: float, expected: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, entry = FakeTuner(part), SpecEntry(ConvSpec.parse(TINY))
    monkeypatch.setattr("convgen.cli.generate.time.monotonic", lambda: tuner.now)
    work = Work([entry] * 3, None, 1, None, tuner, FakeView(), seconds=30.0)  # type: ignore[arg-type]
    for layer in work.layers():
        work.tune(layer)
    assert tuner.given == pytest.approx(expected)
    assert work.measured == 9


def test_tuning_survives_ctrl_c(tmp_path: Path) -> None:
    """On a terminal: every finished trial is kept, one line says so, and no worker says anything."""
    store = tmp_path / "records.sqlite"
    command = [sys.executable, "-m", "convgen", "tune", SMALL, "--threads", "1", "--records", str(store)]
    process, terminal = pty.fork()
    if process == 0:
        os.execv(command[0], command)
    shown, pressed, deadline = b"", 0.0, time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            try:
                text = os.read(terminal, 1 << 16)
            except OSError:  # the program has closed it
                break
            if not text:
                break
            shown += text
        if not pressed and _count(store) >= 3:
            os.write(terminal, b"\x03")
            pressed = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.close(terminal)
    last = shown.decode().replace("\r", "").strip().splitlines()[-1]
    assert pressed, shown
    assert status == 130
    assert b"Traceback" not in shown
    assert b"best " in shown  # the live view
    said = re.search(r"convgen: interrupted: (\d+) trials measured, kept in .*; the same command goes on", last)
    assert said, last
    assert int(said[1]) == _count(store) >= 3


def _count(path: Path) -> int:
    if not path.exists() or not path.stat().st_size:
        return 0
    with RecordStore(path) as store:
        return len(store)


def test_interrupt_while_building_keeps_what_is_done(
    tmp_path: Path, run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_is_interrupted(spec: ConvSpec, *arguments: Any, **options: Any) -> Any:
        if spec.rank == 1:
            raise KeyboardInterrupt
        return compile_candidate(spec, *arguments, **options)

    monkeypatch.setattr(sys.modules["convgen.kernel.kernel"], "compile_candidate", second_is_interrupted)
    file = tmp_path / "net.txt"
    file.write_text(f"{SMALL}\n{TINY}\n")
    found = run_json("build", file, "--no-records", "--threads", 1, "--out", tmp_path / "out", status=130)
    assert (found["interrupted"], found["complete"], len(found["layers"])) == (True, False, 1)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["complete"], len(index["layers"])) == (False, 1)


def test_a_tuner_refuses_a_target_that_does_not_run_here(run: Run) -> None:
    status, _, err = run("tune", TINY, "--target", "cpu:aarch64-cortex-a72", "--no-records")
    assert status == 2
    assert "runs on this machine" in err
    assert run("build", TINY, "--target", "cpu:nonsense", "--no-records")[0] == 2


def test_empty_batch_is_built_not_tuned(tmp_path: Path, run_json: Callable[..., Any]) -> None:
    empty = "conv1d n0 ic4 oc4 i20 k3"
    assert run_json("tune", empty, "--no-records", "--threads", 1)["layers"][0]["trials"] == 0
    built = run_json("build", empty, "--no-records", "--threads", 1, "--trials", 4, "--out", tmp_path / "out")
    assert built["layers"][0]["validation"]["passed"]


# ---- bench ------------------------------------------------------------------------------------


def test_bench_compares_with_what_is_installed(
    run: Run, run_json: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convgen.measure.compare.REST", 0.0)
    monkeypatch.setattr(PEERS["torch"], "version", classmethod(lambda cls: None))
    options = ["--peers", "onnxruntime,torch", "--repeats", 2, "--no-records"]
    found = run_json("bench", TINY, "--threads", "1,2", *options)
    assert [layer["threads"] for layer in found["layers"]] == [1, 2]
    for layer in found["layers"]:
        peer, missing = layer["peers"]
        low, high = layer["interval"]
        assert low <= layer["ratio"] <= high
        assert layer["ratio"] == pytest.approx(peer["seconds"] / layer["seconds"])
        assert "pip install" in missing["problem"]
        assert layer["percent_of_limit"] == pytest.approx(100 * layer["roofline"]["seconds"] / layer["seconds"])
    assert found["totals"][0]["peers"].keys() == {"onnxruntime"}
    (tmp_path / "twice.txt").write_text(f"{TINY}\n{TINY}\n")
    status, out, _ = run("bench", tmp_path / "twice.txt", "--threads", "1", *options)
    assert status == 0
    assert f"{ConvSpec.parse(TINY)} ×2 " in out
    assert "torch: not installed: pip install torch" in out


def test_bench_reports_cold_figures(run: Run, tmp_path: Path) -> None:
    options = ["--peers", "onnxruntime", "--repeats", 1, "--threads", 1, "--no-records", "--cold"]
    for name, mark in {"net.md": "## 1 thread", "net.html": "<!doctype html>"}.items():
        status, out, err = run("bench", TINY, *options, "--report", tmp_path / name)
        assert status == 0
        assert " dram " in out  # where every call's tensors come from
        assert name in err
        assert mark in (tmp_path / name).read_text()
