"""The bench on GPUs: it says where there is no device, resumes, and compiles without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from bench_module import load_bench
from bench_rows import row
from paths import ROOT

from convgen.check.emulation.emulate import emulated_driver
from convgen.errors import UnsupportedError, ValidationError
from convgen.formats.entries import SpecEntry
from convgen.hardware.target import resolve
from convgen.lowering.discover import schedules_of
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import ConvSpec
from convgen.report.rows import Row

pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install '.[cuda]'")

LAYERS = ["conv2d n1 ic8 oc8 i6x6 k1x1 relu", "conv2d n1 ic16 oc16 i6x6 k3x3 p1"]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_bench("cuda")


@pytest.fixture(scope="module")
def compiler() -> ModuleType:
    return load_bench("cuda_compile")


@pytest.fixture
def problem(tmp_path: Path) -> Path:
    (tmp_path / "net.txt").write_text("\n".join(LAYERS))
    return tmp_path / "net.txt"


class Measurer:
    """Answers at once; fails for some layers."""

    def __init__(self, wrong: tuple[str, ...] = ()) -> None:
        self.asked: list[str] = []
        self.wrong = wrong

    def __call__(self, bench: Any, entry: SpecEntry) -> Row:
        self.asked.append(entry.spec.descriptor)
        if any(text in entry.spec.descriptor for text in self.wrong):
            raise ValidationError(f"{entry.spec.descriptor}: float: wrong")
        tuned = bench.options.seconds
        return row(entry.spec.descriptor, 1, count=entry.count, mode="cold", device="cuda", tuning_seconds=tuned)


@pytest.fixture
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to emulate")
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", str(emulated_driver(tmp_path)))


def test_without_a_device_it_says_so(
    bench: ModuleType, problem: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", "/none")
    assert bench.main([str(problem), "--results", str(problem.parent)]) == 2
    assert "expected a CUDA device, found none" in capsys.readouterr().err


@pytest.mark.usefixtures("emulated")
def test_what_is_known_is_not_measured_again(bench: ModuleType, problem: Path) -> None:
    arguments = [str(problem), "--modes", "f32,f16", "--batches", "1,16", "--results", str(problem.parent)]
    measurer = Measurer(wrong=("n16 ic8",))
    assert bench.main([*arguments, "--records", str(problem.parent / "r")], measurer) == bench.FAILED
    assert len(measurer.asked) == 8
    again = Measurer()
    assert bench.main([*arguments, "--records", str(problem.parent / "r")], again) == bench.OK
    assert again.asked == [text for text in measurer.asked if "n16 ic8" in text]
    assert len(again.asked) == 2
    assert "## GPU" in (problem.parent / "net.f16.n16.md").read_text()
    assert "net.f16.n16.md" in (problem.parent / "README.md").read_text()


def test_modes_and_batches_change_the_layers(bench: ModuleType) -> None:
    entry = SpecEntry(ConvSpec.parse(LAYERS[0]), 3)
    made = {mode: bench.in_mode(entry, mode, 16) for mode in bench.MODES}
    assert {mode: str(one.spec.descriptor).partition(" relu")[2].strip() for mode, one in made.items()} == {
        "f16": "f16 nhwc",
        "bf16": "bf16 nhwc",
        "tf32": "nhwc tf32",
        "f32": "",
    }
    assert {one.spec.n for one in made.values()} == {16}
    assert {one.count for one in made.values()} == {3}


@pytest.mark.parametrize(
    "text",
    [
        "conv2d n64 ic8 oc8 i224x100 k7x7 s2x2 p3 relu",
        "conv1d n2 ic4 oc4 i4 k3 p1",
        "conv2d n2 ic8 oc4 i90x90 k4x4 s2 d2",
    ],
)
def test_what_the_sanitizer_sees_is_small_and_of_the_same_kind(bench: ModuleType, text: str) -> None:
    spec = ConvSpec.parse(text)
    small = bench.small(spec)
    assert small.n == 1
    assert max(small.out_spatial) <= 12
    assert (small.kernel, small.stride, small.ic) == (spec.kernel, spec.stride, spec.ic)


@pytest.mark.usefixtures("emulated")
def test_no_layer_is_begun_after_the_minutes(
    bench: ModuleType, problem: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(problem), "--modes", "f32", "--batches", "1", "--results", str(problem.parent), "--minutes", "2"]
    measurer = Measurer()
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: 130.0 * len(measurer.asked)))
    assert bench.main([*arguments, "--records", str(problem.parent / "r")], measurer) == bench.OK
    assert len(measurer.asked) == 1
    assert "layers left for the next run: 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main([str(problem), "--minutes", "0"])


#: What stands for compute-sanitizer: it notes its arguments and ends as told.
CHECKER = """#!/bin/sh
echo "$@" >> "{notes}"
{ends}
"""


@pytest.mark.parametrize(
    ("ends", "error", "says"),
    [
        ("""echo '"passed": true'""", None, ""),
        ("echo 'ERROR SUMMARY: 3 errors'; exit 86", ValidationError, "compute-sanitizer memcheck: ERROR SUMMARY: 3"),
        ("""echo '"passed": false'; exit 1""", ValidationError, "passed"),
        (
            "echo 'Error: no permission for counters'; exit 1",
            UnsupportedError,
            "refused, exit status 1: Error: no perm",
        ),
        ("echo '========= Internal error'; exit 255", UnsupportedError, "refused, exit status 255"),
        ("echo nothing", UnsupportedError, "refused, exit status 0"),
    ],
)
def test_a_checker_that_does_not_run_is_told_from_a_wrong_kernel(
    bench: ModuleType, tmp_path: Path, ends: str, error: type[Exception] | None, says: str
) -> None:
    target = resolve("cuda:sm_80")
    layer = ConvSpec.parse("conv2d n64 ic64 oc64 i56x56 k3x3 s1 p1 relu f16 nhwc")
    schedule = schedules_of("cuda")["cuda_gemm"]
    candidate = bench.fitted(Candidate(schedule, schedule.default(layer.core, target)), bench.small(layer), target)
    assert schedule.reason_against(bench.small(layer).core, target, candidate.picks) is None
    program = tmp_path / "compute-sanitizer"
    program.write_text(CHECKER.format(notes=tmp_path / "notes", ends=ends))
    program.chmod(0o755)
    if error is None:
        bench.sanitize(str(program), bench.small(layer), candidate, target)
        first, second = (tmp_path / "notes").read_text().splitlines()
        assert first.startswith("--tool memcheck")
        assert second.startswith("--tool racecheck")
        assert f"--schedule cuda_gemm --picks {candidate.picks}" in first  # what is marked, not what is fastest there
        return
    with pytest.raises(error, match=says):
        bench.sanitize(str(program), bench.small(layer), candidate, target)


def test_every_default_is_compiled_without_a_device_and_resumes(problem: Path) -> None:
    results = problem.parent / "results"
    script = ROOT / "bench" / "cuda.py"
    command = [
        sys.executable,
        str(script),
        str(problem),
        "--compile",
        "--modes",
        "f16",
        "--archs",
        "sm_80",
        "--jobs",
        "1",
    ]
    command += ["--results", str(results)]
    environment = {**os.environ, "CONVGEN_CUDA_DRIVER": "/none"}
    subprocess.run(command, env=environment, check=True, timeout=200)
    rows = [json.loads(line) for line in (results / "compile.jsonl").read_text().splitlines()]
    assert {values["target"] for values in rows} == {"cuda:sm_80"}
    assert len(rows) == 2
    assert all(values["instructions"]["HMMA"] for values in rows)
    assert "| cuda_gemm |" in (results / "compile.md").read_text()
    first = rows[0] | {"schedule": "kept"}
    again = rows[1] | {"error": "another"}
    (results / "compile.jsonl").write_text("".join(json.dumps(values) + "\n" for values in (first, again)))
    subprocess.run(command, env=environment, check=True, timeout=200)
    assert [json.loads(line) for line in (results / "compile.jsonl").read_text().splitlines()] == [first, rows[1]]


def test_a_layer_as_i8_lacks_what_i8_does_not_take(bench: ModuleType, compiler: ModuleType) -> None:
    for text, expected in (("residual clip(0,6) strict", "i8 nhwc"), ("relu", "relu i8 nhwc")):
        entry = SpecEntry(ConvSpec.parse(f"conv2d n1 ic8 oc8 i6x6 k3x3 {text}"))
        spec = bench.in_mode(entry, "i8").spec
        assert spec == ConvSpec.parse(f"conv2d n1 ic8 oc8 i6x6 k3x3 {expected}")
        refused = {"spec": spec.descriptor, "target": "cuda:sm_80", "versions": {}, "error": "none"}
        assert "## cuda:sm_80, i8" in compiler.compile_report([refused])
    with pytest.raises(SystemExit):
        bench.parse(["--modes", "i8"])


def test_what_failed_or_spilled_is_compiled_again(compiler: ModuleType) -> None:
    row = {"error": "", "predicted_cycles": None, "functions": [{"spilled": 0}, {"spilled": 0}]}
    assert compiler.is_whole(row)
    for wrong in ({"error": "none"}, {"functions": [{"spilled": 0}, {"spilled": 8}]}):
        assert not compiler.is_whole(row | wrong)
    assert not compiler.is_whole({"error": "", "functions": []})


def test_what_does_not_compile_is_in_the_table(compiler: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", "/none")
    failed = compiler.compiled("conv2d n1 ic8 oc8 i6x6 k1x1", "cuda:sm_1")
    assert failed["error"].startswith("UnsupportedError: target: expected one of cuda:sm_70")
    assert "- `conv2d n1 ic8 oc8 i6x6 k1x1` cuda:sm_1: UnsupportedError" in compiler.compile_report([failed])
