"""The runner over files of layers: it resumes, and leaves its results readable whatever happens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_module import load_bench
from bench_rows import row
from paths import ROOT

from convgen.formats.entries import SpecEntry
from convgen.hardware.machine import machine
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.versions import versions
from convgen.problem.spec import ConvSpec
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
from convgen.report.networks import processor_slug
from convgen.report.rows import Row, RowFile
from convgen.tuning.tuner import Tuner

SPECS = [f"conv1d n1 ic4 oc{oc} i20 k3 s1 p1" for oc in (4, 8, 12)]


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return load_bench("run")


def layers_folder(tmp_path: Path) -> Path:
    """Where rows of this processor are kept."""
    return tmp_path / "results" / processor_slug(machine()) / "layers"


class Measurer:
    """Answers at once, and remembers what it was asked; stops like Ctrl-C after so many rows."""

    def __init__(self, stop_after: int = 99, **values: Any) -> None:
        self.asked: list[tuple[str, int]] = []
        self.stop_after, self.values = stop_after, values

    def __call__(self, entry: SpecEntry, tuner: Tuner, options: argparse.Namespace) -> Row:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((entry.spec.descriptor, tuner.threads))
        values = {"mode": "cold" if options.cold else "warm", "tuning_seconds": options.seconds, **self.values}
        return row(entry.spec.descriptor, tuner.threads, count=entry.count, **values)


@pytest.fixture
def bench(runner: ModuleType, tmp_path: Path) -> Callable[..., tuple[int, list[tuple[str, int]]]]:
    """Runs the runner over the three layers: its status, and what it measured."""
    problem = tmp_path / "net.txt"
    problem.write_text("\n".join(SPECS))

    def run(*arguments: str, measurer: Measurer | None = None) -> tuple[int, list[tuple[str, int]]]:
        measurer = measurer or Measurer()
        fixed = ["--records", str(tmp_path / "records.sqlite"), "--results", str(tmp_path / "results")]
        problems = [] if "--quick" in arguments or "--summary" in arguments else [str(problem)]
        return runner.main([*problems, *fixed, *arguments], measurer), measurer.asked

    return run


def keys(threads: int, specs: list[str] = SPECS) -> list[tuple[str, int]]:
    return [(spec, threads) for spec in specs]


def test_what_is_known_is_not_measured_again(bench: Any, tmp_path: Path) -> None:
    assert bench("--threads", "1,2", "--seconds", "0") == (0, keys(1) + keys(2))
    assert bench("--threads", "1,2", "--seconds", "0") == (0, [])
    assert bench("--threads", "2", "--seconds", "9") == (0, keys(2))  # was not tuned
    assert bench("--threads", "1,2", "--seconds", "0") == (0, [])
    assert bench("--threads", "1", "--seconds", "0", "--fresh") == (0, keys(1))
    assert bench("--threads", "1", "--seconds", "0", "--unsteady", "1.1") == (0, keys(1))
    assert len((layers_folder(tmp_path) / "net.jsonl").read_text().splitlines()) == 6
    assert (layers_folder(tmp_path) / "net.md").read_text().count("## ") == 2  # both thread counts, whichever was asked
    assert (layers_folder(tmp_path) / "net.html").exists()


def test_an_interrupt_keeps_what_is_measured(bench: Any, tmp_path: Path) -> None:
    assert bench("--threads", "1", measurer=Measurer(stop_after=2)) == (130, keys(1, SPECS[:2]))
    kept = layers_folder(tmp_path) / "net.jsonl"
    assert list(RowFile(kept).rows) == keys(1, SPECS[:2])
    assert f"`{SPECS[1]}`" in (layers_folder(tmp_path) / "net.md").read_text()
    assert bench("--threads", "1") == (0, keys(1, SPECS[2:]))
    assert list(RowFile(kept).rows) == keys(1)


def test_an_interrupt_before_the_first_row(bench: Any, tmp_path: Path) -> None:
    assert bench("--threads", "1", measurer=Measurer(stop_after=0)) == (130, [])
    assert list(layers_folder(tmp_path).iterdir()) == []


def test_each_row_is_kept_the_moment_it_is_known(bench: Any, tmp_path: Path) -> None:
    kept = layers_folder(tmp_path) / "net.jsonl"
    seen = []

    class Watching(Measurer):
        def __call__(self, *arguments: Any) -> Row:
            seen.append(len(RowFile(kept).rows))
            return super().__call__(*arguments)

    bench("--threads", "1", measurer=Watching())
    assert seen == [0, 1, 2]


def test_strict_rows_stand_beside_the_standard_ones(bench: Any, tmp_path: Path) -> None:
    strict = [f"{spec} strict" for spec in SPECS]
    assert bench("--threads", "1") == (0, keys(1))
    assert bench("--threads", "1", "--accuracy", "strict") == (0, keys(1, strict))
    assert set(RowFile(layers_folder(tmp_path) / "net.jsonl").rows) == set(keys(1) + keys(1, strict))
    text = (layers_folder(tmp_path) / "net.md").read_text()
    assert "## 1 thread, strict" in text
    assert bench("--threads", "1") == (0, [])
    assert "## 1 thread, strict" in (layers_folder(tmp_path) / "net.md").read_text()


def test_cold_rows_have_a_file_of_their_own(bench: Any, tmp_path: Path) -> None:
    assert bench("--threads", "1") == (0, keys(1))
    assert bench("--threads", "1", "--cold") == (0, keys(1))
    for name, mode in (("net", "warm"), ("net.cold", "cold")):
        rows = [json.loads(line) for line in (layers_folder(tmp_path) / f"{name}.jsonl").read_text().splitlines()]
        assert {values["mode"] for values in rows} == {mode}
        assert (layers_folder(tmp_path) / f"{name}.md").exists()


def test_rows_of_another_batch_layout_or_target_have_files_of_their_own(bench: Any, tmp_path: Path) -> None:
    options = ["--batch", "8", "--layout", "nhwc", "--target", "cpu:haswell"]
    asked = [ConvSpec.parse(spec).with_(n=8, layout="nhwc").descriptor for spec in SPECS]
    assert bench("--threads", "1", *options) == (0, keys(1, asked))
    assert set(RowFile(layers_folder(tmp_path) / "net.n8.nhwc.cpu-haswell.jsonl").rows) == set(keys(1, asked))
    assert bench("--threads", "1", *options) == (0, [])
    assert bench("--threads", "1") == (0, keys(1))


@pytest.mark.parametrize(("dtype", "words"), [("u8", "src_u8 dst_u8 i8"), ("i8", "i8"), ("bf16", "bf16")])
def test_rows_of_another_type_have_files_of_their_own(bench: Any, tmp_path: Path, dtype: str, words: str) -> None:
    asked = [ConvSpec.parse(f"{spec} {words}").descriptor for spec in SPECS]
    assert bench("--threads", "1", "--dtype", dtype) == (0, keys(1, asked))
    assert set(RowFile(layers_folder(tmp_path) / f"net.{dtype}.jsonl").rows) == set(keys(1, asked))


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("clip(0,6)", "relu src_u8 dst_u8 i8"),
        ("residual gelu", "src_u8 dst_u8 i8"),
        ("residual relu", "relu src_u8 dst_u8 i8"),
    ],
)
def test_layers_of_integers_have_what_libraries_know_of_them(runner: ModuleType, given: str, stored: str) -> None:
    layer = "conv2d n1 ic4 oc8 i9x9 k3x3 s1x1 p1x1"
    assert runner.stored_as(ConvSpec.parse(f"{layer} {given}"), "u8") == ConvSpec.parse(f"{layer} {stored}")


def test_layers_that_cannot_have_a_layout_are_left_out(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--threads", "1", "--layout", "nchw8c") == (0, [])
    assert f"left out {SPECS[0]}: ic: expected a multiple of 8, the blocks of nchw8c" in capsys.readouterr().err
    assert not (layers_folder(tmp_path) / "net.nchw8c.jsonl").exists()


def test_the_quick_sample_is_measured_anew(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        status, asked = bench("--quick")
        assert (status, len(asked), {threads for _, threads in asked}) == (0, 24, {1})
    assert "| depthwise 1-D | 1 |" in capsys.readouterr().out
    assert (layers_folder(tmp_path) / "sample.html").exists()
    _, asked = bench("--quick", "--threads", "1,2")
    assert {threads for _, threads in asked} == {1, 2}


def test_the_quick_sample_is_all_that_is_measured(runner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--quick", "bench/problems/resnet50.json"])
    assert "--quick: expected no problems beside it" in capsys.readouterr().err


def test_a_summary_of_all_results(bench: Any, tmp_path: Path) -> None:
    bench("--threads", "1,2")
    bench("--quick")
    bench("--threads", "1", "--layout", "nhwc")
    assert bench("--summary") == (0, [])
    text = (layers_folder(tmp_path) / "README.md").read_text()
    assert "[net](net.md)" in text
    assert "Spot checks" not in text.partition("[sample](sample.md)")[2]
    assert (layers_folder(tmp_path) / "summary.svg").read_text().startswith("<svg")


def test_something_must_be_asked_for(runner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main([])
    assert "nothing to do" in capsys.readouterr().err


def test_rows_in_the_repository_are_readable() -> None:
    """Whatever version wrote them."""
    paths = list((ROOT / "bench" / "results").glob("*/layers/*.jsonl"))
    assert paths
    for path in paths:
        rows = RowFile(path).rows.values()
        assert len(rows) == len(path.read_text().splitlines())
        assert all(one.seconds > 0 and one.spec and one.schedule for one in rows)


def test_recorded_rows_are_of_what_a_job_has_found(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The winner of a job beside the default; the seconds are those of its trials."""
    spec, target = ConvSpec.parse(SPECS[0]), resolve()
    candidate = parse_candidate(spec, target, "reference")
    common: dict[str, Any] = {
        "spec": SPECS[0],
        "target": target.spelling,
        "hardware": target.hardware,
        "threads": 1,
        "schedule": "reference",
        "schedule_version": candidate.schedule.version,
        "picks": dict(candidate.picks),
        "outcome": "ok",
        "versions": versions(),
    }
    timed: list[dict[str, Any]] = []

    def measure(entry: SpecEntry, kernels: dict[str, Any], *_: Any, **__: Any) -> Row:
        timed.append({name: kernel.schedule for name, kernel in kernels.items()})
        return row(entry.spec.descriptor, 1)

    monkeypatch.setattr(runner, "measure", measure)
    with RecordStore(tmp_path / "records.sqlite") as store:
        store.add(TuningRecord(**common, seconds=2e-3, samples=(2e-3,), note={"cost": 1.25}))
        final = {"final": True, "winner": True, "cost": 2.5}
        store.add(TuningRecord(**common, seconds=1e-3, samples=(1e-3,), note=final))
    default = default_candidate(spec, target).schedule.id
    problem = tmp_path / "net.txt"
    problem.write_text("\n".join(SPECS))
    kept = ["--records", str(tmp_path / "records.sqlite"), "--results", str(tmp_path / "results")]
    assert runner.main([str(problem), "--threads", "1", "--recorded", *kept]) == 0
    assert timed[0] == {"tuned": "reference", "default": default}
    assert [set(kernels) for kernels in timed[1:]] == [{"default"}] * 2
    rows = RowFile(layers_folder(tmp_path) / "net.jsonl").rows
    assert [row.values["tuning_seconds"] for row in rows.values()] == [3.8, 0.0, 0.0]


def test_a_wrong_option_is_said_in_a_line(
    bench: Any, runner: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--batch", "-1") == (2, [])
    assert "bench: n: expected" in capsys.readouterr().err
    assert bench("--target", "gpu") == (2, [])
    assert "bench: target: expected one of cpu, cuda" in capsys.readouterr().err
    assert runner.main(["/nowhere/net.json", "--results", str(tmp_path)]) == 2
    assert "bench: /nowhere/net.json" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--threads", "two"], ["--peers", "cudnn"]])
def test_a_wrong_list_is_a_usage_error(bench: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench(*arguments)
