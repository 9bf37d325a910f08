"""On a real GPU: kernels are right, tuning finds one that is no slower, cuDNN agrees and is timed beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from bench_module import load_bench

from convgen.api import build
from convgen.check.validate import validate
from convgen.cuda.driver import device
from convgen.hardware.target import resolve
from convgen.measure.standalone.command import main as measure_here
from convgen.problem.spec import ConvSpec
from convgen.records.store import RecordStore
from convgen.tuning.bundle import import_results, pack
from convgen.tuning.bundle.self_check import every_default, feature_layers
from convgen.tuning.tuner import Tuner

FOUND = device()
WHY = "needs an NVIDIA GPU and its driver (libcuda.so.1), found none"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(FOUND is None or FOUND.emulated, reason=WHY)]

LAYERS = [
    "conv2d n2 ic64 oc64 i14x14 k3x3 p1 relu residual",
    "conv2d n2 ic64 oc64 i14x14 k3x3 p1 relu residual nhwc tf32",
    "conv2d n2 ic64 oc64 i14x14 k3x3 p1 relu residual nhwc f16",
    "conv2d n2 ic64 oc128 i15x13 k3x3 s2 p1 relu nhwc bf16",
    "conv2d n1 ic3 oc32 i40x40 k7x7 s2 p3 relu nhwc f16",
    "conv2d n2 ic256 oc256 i16x16 k1x1 silu nhwc f16",
    "conv2d n2 ic64 oc64 i14x14 k3x3 p1 g8",
    "conv2d n2 ic64 oc64 i14x14 k3x3 p1 g64 relu",
    "conv1d n2 ic32 oc32 i50 k5 p2 d2",
    "conv3d n1 ic16 oc16 i6x6x6 k3x3x3 p1",
    "convtranspose2d n1 ic32 oc16 i8x8 k4x4 s2 p1",
]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_bench("cuda")


@pytest.mark.parametrize("text", LAYERS)
def test_a_default_is_right(text: str) -> None:
    validate(build(text, target="cuda", records=False)).raise_if_failed()


@pytest.mark.parametrize(("feature", "spec"), list(feature_layers()))
def test_every_schedules_default_is_right_one_feature_at_a_time(feature: str, spec: ConvSpec) -> None:
    """Each in a process of its own: what faults or hangs is named, and spoils no other."""
    candidates, _ = every_default(spec, resolve("cuda"))
    wrong = []
    for candidate in candidates:
        command = [sys.executable, "-m", "convgen", "validate", spec.descriptor, "--target", "cuda", "--no-records"]
        command += ["--schedule", candidate.schedule.id, "--picks", str(candidate.picks)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired:
            wrong.append(f"{candidate}: hangs")
            continue
        if done.returncode:
            wrong.append(f"{candidate}: exit status {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
    assert not wrong, f"{feature}: " + "\n".join(wrong)


@pytest.mark.parametrize("text", LAYERS[:3])
def test_tuning_finds_one_that_is_no_slower(text: str, tmp_path: Path) -> None:
    spec, target = ConvSpec.parse(text), resolve("cuda")
    with RecordStore(tmp_path / "r.sqlite") as store, Tuner(target, 1, store) as tuner:
        winner = tuner.tune(spec, trials=8)
        records = list(store.trials(spec=spec.descriptor))
    assert winner is not None
    assert winner.hardware == target.hardware
    assert not [record for record in records if record.outcome in ("wrong", "crash", "run_error", "timeout")]
    assert (winner.note or {})["ratio_default"][0] >= 0.95
    assert all(max(record.samples) < 3 * min(record.samples) for record in records if record.outcome == "ok")


def test_cudnn_agrees_and_is_timed(bench: ModuleType, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch with CUDA, found one without")
    (tmp_path / "net.txt").write_text("\n".join(LAYERS[:1]))
    arguments = [str(tmp_path / "net.txt"), "--modes", "f32,f16", "--batches", "2", "--results", str(tmp_path)]
    assert bench.main(arguments) == 0
    for mode in ("f32", "f16"):
        (line,) = (tmp_path / f"net.{mode}.n2.jsonl").read_text().splitlines()
        values = json.loads(line)
        assert values["ratio"], values["peers"]
        assert 0 < values["roofline"]["seconds"] < values["kernels"][0]["seconds"] * 1.5


def test_a_bundle_is_measured_here(tmp_path: Path) -> None:
    pack([ConvSpec.parse(LAYERS[2])], [resolve("cuda")], [1], tmp_path / "b.zip", candidates=3)
    from convgen.tuning.bundle import unpacked

    with unpacked(tmp_path / "b.zip") as folder:
        assert measure_here([str(folder), "-o", str(tmp_path / "r.jsonl")]) == 0
    with RecordStore(tmp_path / "r.sqlite") as store:
        count, _ = import_results(tmp_path / "r.jsonl", store, tmp_path / "b.zip")
        assert count >= 4
        assert {record.outcome for record in store.trials(spec=ConvSpec.parse(LAYERS[2]).descriptor)} == {"ok"}
