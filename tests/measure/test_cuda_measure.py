"""Tuning kernels for GPUs, on a device that is emulated: live, and by bundles."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from archives import untar
from fleets import KEY, LONG, Fleet
from worker_jobs import build_spilling, in_worker

from convgen.check.emulation.emulate import emulated_driver
from convgen.cli import main
from convgen.cuda.code import Resources
from convgen.cuda.driver import device
from convgen.errors import MeasureError, ResourceError, UnsupportedError
from convgen.hardware.machine import Machine, machine
from convgen.hardware.target import Target, resolve
from convgen.lowering.candidates import default_candidate
from convgen.measure import gpu as gpu_measure
from convgen.measure.standalone.devices import Cuda
from convgen.measure.standalone.errors import TROUBLE, Trouble
from convgen.measure.standalone.facts import facts as machine_facts
from convgen.measure.standalone.results import Results
from convgen.measure.standalone.sanitizer import sanitized
from convgen.measure.trial import Expected, build_artifact, candidate_module, run_artifact, run_duel
from convgen.measure.workers import LocalBuilder, LocalRunner, Pools
from convgen.problem.spec import ConvSpec
from convgen.records.store import RecordStore
from convgen.tuning import bundle as bundles
from convgen.tuning.bundle import self_check
from convgen.tuning.job import Job
from convgen.tuning.job_run import JobRun
from convgen.tuning.tuner import Tuner

pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install '.[cuda]'")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to emulate")

SPEC = ConvSpec.parse("conv2d n1 ic8 oc8 i5x4 k3x3 p1 relu residual")
OTHER = ConvSpec.parse("conv2d n1 ic4 oc8 i4x4 k1x1")
BARE = (sys.executable, "-I", "-S")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(autouse=True, scope="module")
def _emulated(driver: Path) -> Iterator[None]:
    """This process and all it starts have an emulated device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVGEN_CUDA_DRIVER", str(driver))
        yield


@pytest.fixture(scope="module")
def target(_emulated: None) -> Target:
    return resolve("cuda")


@pytest.fixture(scope="module")
def artifact(target: Target, tmp_path_factory: pytest.TempPathFactory) -> str:
    module = candidate_module(SPEC, target, default_candidate(SPEC, target))
    return build_artifact(module, str(tmp_path_factory.mktemp("artifact")))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return Expected(SPEC, tmp_path_factory.mktemp("expected"), 1)


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    pools = Pools(LocalBuilder(2), LocalRunner())
    yield pools
    pools.close()


def run(path: str, expected: Expected, seconds: float = 0.01, hopeless: float = 0.0) -> dict[str, Any]:
    return run_artifact(path, str(expected.directory), 1, seconds, hopeless)


# ---- one candidate -----------------------------------------------------------------------------


def test_the_target_is_the_device(target: Target) -> None:
    found = device()
    assert found is not None
    assert found.emulated
    assert (target.spelling, target.native, target.hardware) == ("cuda:sm_80", True, found.fingerprint)


def test_a_candidate_is_verified_and_timed(artifact: str, expected: Expected) -> None:
    answer = run(artifact, expected)
    assert answer["outcome"] == "ok"
    assert len(answer["samples"]) >= 5
    assert all(seconds > 0 for seconds in answer["samples"])


def test_one_far_behind_is_timed_once(artifact: str, expected: Expected) -> None:
    assert len(run(artifact, expected, hopeless=1e-12)["samples"]) == 1


def test_a_duel_samples_each_as_often(artifact: str, expected: Expected) -> None:
    samples = run_duel([artifact, artifact], str(expected.directory), 1, rounds=3)
    assert [len(taken) for taken in samples] == [3, 3]


def test_calls_take_turns_on_more_than_the_cache_holds(
    artifact: str, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the copies, as many as are needed, are few."""
    import ctypes

    import numpy as np

    from convgen.measure.trial import artifact_facts, load_inputs

    monkeypatch.setattr(gpu_measure.gpu(), "facts", {**gpu_measure.gpu().facts, "l2": 20_000})
    data = load_inputs(SPEC, str(expected.directory))
    call = gpu_measure.prepare(artifact, artifact_facts(artifact)["name"], data)
    size = sum(array.nbytes for array in data.values())
    assert len(call.copies) * (2 * size) >= 40_000 > 2 * size
    assert len({args.src for args in call.copies}) == len(call.copies)
    for _ in call.copies:
        call()
    gpu_measure.gpu().wait()
    want = np.load(expected.directory / "expected.npy").tobytes()
    for args in call.copies:
        memory = (ctypes.c_char * args.dst_size)()
        gpu_measure.gpu()("cuMemcpyDtoH_v2", memory, args.dst, args.dst_size)
        assert bytes(memory) == want
    call.close()


# ---- what cannot be measured ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"spilled": 8}, "kernel: expected all values in registers, found 8 bytes spilled"),
        ({"registers": 129, "threads": 512}, "kernel: expected at most 65536 registers of a block, found 69632"),
        ({"shared": (163 << 10) + 1}, "kernel: expected at most 166912 bytes of shared memory, found 166913"),
    ],
)
def test_what_takes_too_much_is_refused(changed: dict[str, Any], text: str) -> None:
    fits = Resources("kernel", registers=128, spilled=0, shared=163 << 10, threads=512)
    gpu_measure.check_resources([fits], resolve("cuda:sm_80"))
    with pytest.raises(ResourceError, match=text):
        gpu_measure.check_resources([fits, replace(fits, **changed)], resolve("cuda:sm_80"))


def test_a_spilling_candidate_is_an_outcome_and_is_not_measured(
    pools: Pools, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    monkeypatch.setattr("convgen.measure.workers.build_artifact", in_worker(build_spilling))
    monkeypatch.setattr(pools.runner, "submit", lambda path, *_, **__: measured.append(path))
    with RecordStore(tmp_path / "r.sqlite") as store, Tuner(target, 1, store, pools=pools) as tuner:
        assert tuner.tune(OTHER, trials=1) is None
        (record,) = store.trials(spec=OTHER.descriptor)
    assert not measured
    assert (record.outcome, record.seconds) == ("build_error", None)
    assert record.error.startswith("ResourceError")
    assert record.error.strip().endswith("expected all values in registers, found 16 bytes spilled")


def test_a_wrong_candidate_is_rejected(target: Target, expected: Expected, tmp_path: Path, pools: Pools) -> None:
    """One that adds where it must take the larger: its CUDA source is altered."""
    path = build_altered(target, tmp_path, lambda text: text.replace("residual_ptr[", "0.5f + residual_ptr["))
    result = pools.run(path, expected, 1, seconds=0.01)
    assert result.outcome == "wrong"
    assert "elements; at (0, 0, " in result.error


def test_one_that_needs_more_memory_than_there_is_ends_as_such(
    artifact: str, expected: Expected, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it had is given back: nothing is left after it, nor after others."""
    wrong = build_altered(target, tmp_path, lambda text: text.replace("residual_ptr[", "0.5f + residual_ptr["))
    gpu = gpu_measure.gpu()
    taken: list[int] = []
    allocate, free = gpu.allocate, gpu.free

    def noted(size: int) -> int:
        if len(taken) == limit:
            allocate(1 << 50)
        taken.append(allocate(size))
        return taken[-1]

    monkeypatch.setattr(gpu, "allocate", noted)

    def released(address: int) -> None:
        taken.remove(address)
        free(address)

    monkeypatch.setattr(gpu, "free", released)
    limit = 99
    assert [run(path, expected)["outcome"] for path in (artifact, wrong)] == ["ok", "wrong"]
    assert not taken
    limit = 1  # the tensors are there, the workspace has no room
    answer = run(artifact, expected)
    assert answer["outcome"] == "memory"
    assert "CUDA_ERROR_OUT_OF_MEMORY" in answer["error"]
    assert not taken


def test_a_candidate_that_ends_the_context_costs_its_trial(
    target: Target, artifact: str, expected: Expected, tmp_path: Path, pools: Pools
) -> None:
    """The worker is replaced: a context refuses everything after a fault."""
    path = build_altered(target, tmp_path, lambda text: re.sub(r"(__global__[^{]*{)", r"\1 __builtin_trap();", text))
    for _ in range(2):
        result = pools.run(path, expected, 1, seconds=0.01)
        assert result.outcome in ("run_error", "crash")
        assert pools.run(artifact, expected, 1, seconds=0.01).outcome == "ok"
        with pytest.raises(MeasureError):
            pools.duel([artifact, path], expected, 1, rounds=2)
        assert len(pools.duel([artifact, artifact], expected, 1, rounds=2)) == 2


def build_altered(target: Target, root: Path, change: Callable[[str], str]) -> str:
    """The artifact of a candidate whose CUDA source is changed."""
    standin: Any = importlib.import_module("convgen.check.emulation.standin")
    generate, changed = standin.generate, []

    def altered(lowered: Any) -> Any:
        source = generate(lowered)
        changed.append(change(source.text))
        assert changed[-1] != source.text
        return replace(source, text=changed[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standin, "generate", altered)
        path = build_artifact(candidate_module(SPEC, target, default_candidate(SPEC, target)), str(root))
    assert changed
    return path


def test_without_a_device_live_tuning_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", "/none")
    with pytest.raises(UnsupportedError, match="expected a target that runs on this machine, found no GPU that runs"):
        Tuner(resolve("cuda:sm_80"), 1, None)
    assert main(["tune", OTHER.descriptor, "--target", "cuda", "--trials", "1"]) != 0
    assert "expected a CUDA device for 'cuda', found none" in capsys.readouterr().err


# ---- a job -----------------------------------------------------------------------------------------


def test_a_job_finishes_with_records_of_the_device(pools: Pools, target: Target, tmp_path: Path) -> None:
    job = Job((SPEC.descriptor, OTHER.descriptor), targets=("cuda",), threads=(2,), trials_per_layer=2)
    with RecordStore(tmp_path / "r.sqlite") as store:
        jobrun = JobRun(job, store, pools)
        jobrun.run()
        jobrun.close()
        for layer in jobrun.layers:
            assert (layer.state, layer.problem.threads) == ("done", 1), layer.reason
            records = list(store.trials(spec=layer.problem.spec.descriptor))
            assert {record.hardware for record in records} == {target.hardware}
            assert {record.target for record in records} == {"cuda:sm_80"}
            assert {record.threads for record in records} == {1}
            assert layer.best is not None
            assert (layer.best.note or {})["winner"]
            assert (layer.best.note or {})["ratio_onnxruntime"] is None


def test_a_device_of_a_fleet_has_a_gpu(artifact: str, expected: Expected, target: Target, tmp_path: Path) -> None:
    from convgen.measure.fleet import RemoteRunner

    fleet = Fleet(tmp_path)
    try:
        fleet.serve("a")
        fleet.wait_for(1)
        runner = RemoteRunner(fleet.tracker, KEY, timeout=20.0, patience=LONG)
        try:
            assert resolve("cuda", machine=runner.machine()) == target
            result = runner.submit(artifact, expected, 1, seconds=0.01).result(LONG)
            assert (result.outcome, result.device) == ("ok", "a"), result.error
            samples = runner.duel([artifact, artifact], expected, 1, 2).result(LONG)
            assert [len(taken) for taken in samples] == [2, 2]  # type: ignore[union-attr]
        finally:
            runner.close()
    finally:
        fleet.close()


# ---- bundles ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "layer.tar.gz"
    packed = bundles.pack([OTHER], [target], [4], out, candidates=2)
    assert (packed.layers, packed.trials, packed.failed) == (1, 2, 0), packed.errors
    return out


def measure(archive: Path, folder: Path, driver: str, *, status: int = 0) -> str:
    untar(archive, folder)
    command = [*BARE, str(folder / "layer" / "run.py"), "-o", str(folder / "results.jsonl")]
    environment = {"CONVGEN_CUDA_DRIVER": driver}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == status, done.stderr
    return done.stderr


def test_a_bundle_goes_there_and_its_results_come_back(
    archive: Path, driver: Path, target: Target, tmp_path: Path
) -> None:
    measure(archive, tmp_path, str(driver))
    records = bundles.read_results(tmp_path / "results.jsonl", archive)
    assert [record.outcome for record in records[:2]] == ["ok", "ok"], records
    assert {record.hardware for record in records} == {target.hardware}
    assert {(record.target, record.threads) for record in records} == {("cuda:sm_80", 1)}
    assert sum(bool((record.note or {}).get("winner")) for record in records) == 1
    facts = bundles.read_facts(tmp_path / "results.jsonl")
    assert facts.gpu == device()
    assert resolve("cuda", facts) == target


def test_a_bundle_refuses_a_machine_without_a_device(archive: Path, tmp_path: Path) -> None:
    said = measure(archive, tmp_path, "/none", status=TROUBLE)
    assert "cuda:sm_80: left out: expected a CUDA driver, found none" in said


def test_a_bundle_is_packed_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", "/none")
    packed = bundles.pack([OTHER], [resolve("cuda:sm_90a")], [1], tmp_path / "b.zip", candidates=1)
    assert (packed.trials, packed.failed) == (1, 0), packed.errors


def test_a_wrong_candidate_of_a_bundle_is_rejected(archive: Path, driver: Path, tmp_path: Path) -> None:
    """What is expected is changed, and the digest with it."""
    import hashlib

    untar(archive, tmp_path)
    manifest = tmp_path / "layer" / "manifest.json"
    values = json.loads(manifest.read_text())
    name = values["layers"][0]["data"]["expected"]
    file = tmp_path / "layer" / name
    data = bytearray(file.read_bytes())
    data[3] ^= 0x40  # of an exponent
    file.write_bytes(data)
    values["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(values))
    command = [*BARE, str(tmp_path / "layer" / "run.py"), "-o", str(tmp_path / "r.jsonl")]
    subprocess.run(command, env={"CONVGEN_CUDA_DRIVER": str(driver)}, check=True, capture_output=True, timeout=200)
    records = bundles.read_results(tmp_path / "r.jsonl")
    assert [record.outcome for record in records] == ["wrong", "wrong"]


def test_results_of_another_device_are_not_gone_on_with(tmp_path: Path) -> None:
    facts = machine_facts()
    Results(str(tmp_path / "here"), "0", facts, Cuda.machine_facts)
    for name in ("same", "other"):
        shutil.copy(tmp_path / "here", tmp_path / name)
    Results(str(tmp_path / "same"), "0", facts, Cuda.machine_facts)
    other = {**facts, "gpu": {**facts["gpu"], "name": "Another"}}
    with pytest.raises(Trouble, match="another one"):
        Results(str(tmp_path / "other"), "0", other, Cuda.machine_facts)


# ---- machines ----------------------------------------------------------------------------------------


def test_a_machine_with_a_gpu_travels_as_json() -> None:
    here = replace(machine(), gpu=device())
    assert Machine.from_dict(json.loads(json.dumps(here.to_dict())), "there") == here
    broken = here.to_dict()
    broken["gpu"]["sms"] = "many"
    with pytest.raises(MeasureError, match="there: expected the facts of a GPU"):
        Machine.from_dict(broken, "there")


#: What stands for compute-sanitizer: it runs the rest of its command line, and finds what it is told to.
CHECKER = """#!/bin/sh
[ "$1 $3" = "--tool --log-file" ] || exit 9
log=$4
shift 4
"$@"
echo '========= {says}' > "$log"
"""


def test_a_device_is_checked_one_feature_at_a_time(
    driver: Path, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every schedule's default, alone and under a checker; the summary says what is right."""
    monkeypatch.setattr(self_check, "FEATURES", {"padding": self_check.FEATURES["padding"]})
    monkeypatch.setattr(self_check, "MODES", ("nhwc f16",))
    out = tmp_path / "layer.tar.gz"
    packed = bundles.pack([OTHER], [target], [1], out, self_check=True, candidates=1)
    assert (packed.layers, packed.failed) == (2, 0), packed.errors
    untar(out, tmp_path)
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    environment = {"CONVGEN_CUDA_DRIVER": str(driver), "PATH": f"{program.parent}:{os.environ['PATH']}"}

    def measured(says: str, *options: str) -> str:
        program.write_text(CHECKER.format(says=says))
        program.chmod(0o755)
        command = [*BARE, str(tmp_path / "layer" / "run.py"), "-o", str(tmp_path / "r.jsonl"), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "summary.txt").read_text()

    summary = measured("ERROR SUMMARY: 0 errors", "--minutes", "1e-9")
    assert f"0 of {packed.trials} candidates were tried" in summary
    summary = measured("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "--sanitizer")
    assert f"{packed.trials} of {packed.trials} candidates were tried" in summary
    assert re.search(r"cuda_gemm +1 of 1", summary)
    assert "not right" not in summary
    checked = packed.trials - 1  # without the layer that is no feature
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert f"compute-sanitizer {tool}: nothing found in {checked} of {checked}" in summary
    assert re.search(rf"fastest:\n.*{OTHER.descriptor}", summary)
    assert len(bundles.read_results(tmp_path / "r.jsonl", out)) >= packed.trials


def test_what_a_checker_says_is_told_from_its_own_failure(tmp_path: Path) -> None:
    program, job = tmp_path / "checker", {"kind": "check", "root": str(tmp_path)}
    for says, found in (("ERROR SUMMARY: 3 errors", 3), ("Error: no device", None)):
        program.write_text(CHECKER.format(says=says).replace('"$@"', "true"))
        program.chmod(0o755)
        answer = sanitized(str(program), "memcheck", job, 20)
        assert answer["found"] == found
        assert says in answer["said"]
