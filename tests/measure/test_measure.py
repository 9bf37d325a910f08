"""Timing, and how a trial ends in a worker process: no figure of time is asserted but those of a false clock."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import planted
import psutil
import pytest
import worker_jobs
from hostile import HIDING, MARKUP, TERMINAL, lines
from worker_jobs import in_worker

from convgen.check.bounds import reference
from convgen.check.data import exact_data
from convgen.errors import MeasureError
from convgen.hardware.target import resolve
from convgen.lowering.candidates import parse_candidate
from convgen.lowering.link import link
from convgen.lowering.lower import lower
from convgen.lowering.schedule import Candidate, Picks
from convgen.measure.drift import reference_kernel
from convgen.measure.standalone.timing import SAMPLE_SECONDS, alternate, repeats, sample, time_calls
from convgen.measure.standalone.words import tell
from convgen.measure.trial import (
    CandidateModule,
    Expected,
    build_artifact,
    candidate_module,
    memory_limit,
    run_artifact,
    run_duel,
    serialised,
)
from convgen.measure.workers import LocalBuilder, LocalRunner, Pools, as_result
from convgen.problem.dtypes import load, save
from convgen.problem.spec import ConvSpec
from convgen.records.outcome import INTERRUPTED, Result

SPEC = ConvSpec.parse("conv2d n1 ic3 oc5 i6x7 k3x3 p1 residual prelu")


# ---- timing -----------------------------------------------------------------------------------


class Clock:
    """Time that passes only in calls and in sleep."""

    def __init__(self) -> None:
        self.now = 100.0
        self.preempted = 0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.calls.append("rest")
        self.now += seconds

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        """A function that takes so long, each time the next of ``seconds``, in the end the last."""
        left = list(seconds)

        def called() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return called


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sys.modules["convgen.measure.standalone.timing"], "time", clock)
    monkeypatch.setattr(sys.modules["convgen.measure.standalone.timing"], "preemptions", lambda: clock.preempted)
    return clock


@pytest.mark.parametrize(("duration", "count"), [(1e-5, 100), (1e-3, 1), (2.0, 1), (1e-12, 10_000), (0.0, 10_000)])
def test_a_sample_repeats_a_call_until_it_is_long_enough(clock: Clock, duration: float, count: int) -> None:
    found = repeats(clock.call("f", 5.0, duration))  # the first call warms up
    assert found == pytest.approx(count, abs=1)
    assert clock.calls == ["f", "f"]


def test_a_sample_is_seconds_per_call(clock: Clock) -> None:
    assert sample(clock.call("f", 1.0, 2.0, 3.0), 3) == pytest.approx(2.0)


def test_samples_fill_the_time_there_is(clock: Clock) -> None:
    samples = time_calls(clock.call("f", 1e-4), seconds=0.1)
    assert len(samples) == pytest.approx(0.1 / SAMPLE_SECONDS, rel=0.15)
    assert samples == pytest.approx([1e-4] * len(samples))


def test_slow_calls_are_sampled_a_few_times_and_quick_ones_not_forever(clock: Clock) -> None:
    assert len(time_calls(clock.call("f", 7.0), seconds=0.1, at_least=5)) == 5
    assert len(time_calls(clock.call("f", 1e-4), seconds=1000)) == 200


def test_a_hopeless_call_is_sampled_once(clock: Clock) -> None:
    call = clock.call("f", 1e-2)
    assert len(time_calls(call, hopeless=9e-3)) == 1
    assert len(time_calls(call, hopeless=11e-3)) > 1
    assert len(time_calls(call, hopeless=0.0)) > 1


def preempted(clock: Clock, *lengths: float) -> Callable[[], None]:
    """A call that is preempted whenever it takes more than a second."""
    call, usual = clock.call("p", *lengths), 1.0

    def called() -> None:
        before = clock.now
        call()
        clock.preempted += clock.now - before > usual

    return called


def test_samples_with_a_preemption_are_left_out(clock: Clock) -> None:
    call = preempted(clock, 1.0, 1.0, 1.0, 9.0, 1.0, 9.0, 1.0)  # two of them warm up
    assert time_calls(call, seconds=7.0) == pytest.approx([1.0] * 5)


def test_samples_with_a_preemption_are_better_than_none(clock: Clock) -> None:
    call = preempted(clock, 1.0, 1.0, 9.0)
    assert time_calls(call, seconds=0.0, at_least=4) == pytest.approx([9.0] * 4)


def test_a_round_with_a_preemption_is_taken_again(clock: Clock) -> None:
    calls = [clock.call("a", 1.0), preempted(clock, 1.0, 1.0, 9.0, 1.0)]
    assert alternate(calls, rounds=2) == [pytest.approx([1.0] * 2)] * 2
    assert clock.calls.count("a") == 2 + 3


def test_a_machine_that_is_never_quiet_is_measured_all_the_same(clock: Clock) -> None:
    assert alternate([preempted(clock, 9.0)], rounds=3) == [pytest.approx([9.0] * 3)]
    assert len(clock.calls) == 2 + 2 * 3


def test_the_reference_kernel_is_the_median_of_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2.0, 9.0, 1.0])
    monkeypatch.setattr(sys.modules["convgen.measure.drift"], "sample", lambda call, count: next(times))
    assert reference_kernel(repeats=3) == 2.0


def test_alternating_calls_take_turns(clock: Clock) -> None:
    calls = [clock.call("a", 1.0), clock.call("b", 3.0)]
    assert alternate(calls, rounds=3) == [pytest.approx([1.0] * 3), pytest.approx([3.0] * 3)]
    assert clock.calls == ["a", "a", "b", "b", *["a", "b"] * 3]


def test_a_rest_comes_before_each_sample_and_then_a_warm_call(clock: Clock) -> None:
    alternate([clock.call("a", 1.0), clock.call("b", 1.0)], rounds=2, rest=0.1)
    assert clock.calls[4:] == ["rest", "a", "a", "rest", "b", "b"] * 2


def test_nothing_to_alternate() -> None:
    assert alternate([], rounds=3) == []


# ---- results ----------------------------------------------------------------------------------


def test_the_time_of_a_result_is_its_median() -> None:
    assert Result("ok", (3.0, 1.0, 2.0)).seconds == 2.0
    assert Result("wrong", (), "at 3").seconds is None


def test_the_drift_is_relative_to_the_first_trial_and_unknown_where_nothing_was_timed() -> None:
    answer = {"outcome": "ok", "samples": [1.0], "reference": 3.0}
    assert as_result(answer, 2.0, "d") == Result("ok", (1.0,), drift=1.5, device="d")
    assert as_result(answer).drift is None
    assert as_result({"outcome": "wrong", "error": "at 3"}, 2.0) == Result("wrong", error="at 3")


# ---- a trial, in this process -----------------------------------------------------------------


def candidate(schedule: str = "cpu_direct", spec: ConvSpec = SPEC) -> Candidate:
    return parse_candidate(spec, resolve(), schedule)


def module(spec: ConvSpec = SPEC, schedule: str = "cpu_direct") -> CandidateModule:
    return candidate_module(spec, resolve(), candidate(schedule, spec))


#: What no builder can read.
BROKEN = CandidateModule("{}", SPEC.descriptor, resolve(), "cpu_direct", Picks(), 0, ())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return Expected(SPEC, tmp_path_factory.mktemp("expected"), 2)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_artifact(module(), str(tmp_path_factory.mktemp("root")))


def test_what_all_candidates_share_is_written_once(expected: Expected) -> None:
    data = {path.stem: np.load(path) for path in expected.directory.iterdir()}
    assert data.keys() == {"src", "weights", "bias", "slope", "residual", "expected", "bound"}
    written = load(expected.directory / "expected.npy", SPEC.dtype)
    np.testing.assert_array_equal(written, reference(SPEC, exact_data(SPEC)))
    assert data["bound"].shape == SPEC.dst_shape
    assert (data["bound"] > 0).all()


def test_the_digest_is_of_the_data(expected: Expected, tmp_path: Path) -> None:
    assert Expected(SPEC, tmp_path, 1).digest == expected.digest
    (tmp_path / "other").mkdir()
    assert Expected(SPEC.with_(padding=2), tmp_path / "other", 1).digest != expected.digest


def test_a_candidate_may_use_more_memory_than_its_layer_but_not_all() -> None:
    physical = psutil.virtual_memory().total
    assert 1 << 30 <= memory_limit(0) < memory_limit(1 << 20) < physical
    assert memory_limit(1 << 50) < physical


@pytest.mark.parametrize("schedule", ["reference", "cpu_direct", "cpu_rows"])
def test_a_lowered_candidate_travels_as_plain_data(schedule: str) -> None:
    """True stays True and 1 stays 1, and the module is the same."""
    spec = ConvSpec.parse("conv1d n1 ic16 oc15 i20 k1")
    lowered = lower(spec, resolve(), candidate(schedule, spec))
    sent = pickle.loads(pickle.dumps(serialised(lowered)))
    arrived = sent.lowered()
    assert (arrived.spec, arrived.target, arrived.candidate, arrived.packed) == (
        lowered.spec,
        lowered.target,
        lowered.candidate,
        lowered.packed,
    )
    kinds = [[type(value) for value in found.candidate.picks.values()] for found in (arrived, lowered)]
    assert kinds[0] == kinds[1]
    assert serialised(arrived) == sent


def test_an_artifact_is_a_private_folder(artifact: str) -> None:
    files = {path.name for path in Path(artifact).parent.iterdir()}
    assert files >= {"candidate.json", Path(artifact).name}
    root = Path(artifact).parents[1]
    assert build_artifact(module(), str(root)) != artifact


def test_a_right_candidate_is_timed(artifact: str, expected: Expected) -> None:
    for threads in (1, 3):
        found = run_artifact(artifact, str(expected.directory), threads, seconds=0.01, hopeless=0.0)
        assert found["outcome"] == "ok"
        assert all(seconds > 0 for seconds in [*found["samples"], found["reference"]])
        json.dumps(found)


def altered(expected: Expected, folder: Path, change: Callable[[np.ndarray[Any, Any]], None]) -> str:
    for path in expected.directory.iterdir():
        shutil.copy(path, folder)
        if path.stem == "expected":
            array = load(path, SPEC.dtype)
            change(array)
            save(folder / path.name, array)
    return str(folder)


def test_a_wrong_candidate_is_not_timed(artifact: str, expected: Expected, tmp_path: Path) -> None:
    def change(array: np.ndarray[Any, Any]) -> None:
        array[0, 2, 3, 4] += 1

    found = run_artifact(artifact, altered(expected, tmp_path, change), 2, seconds=0.01, hopeless=0.0)
    assert found["outcome"] == "wrong"
    assert "samples" not in found
    assert found["error"].startswith("1 of 210 elements; at (0, 2, 3, 4) expected ")


def test_a_transform_may_round_and_others_may_not(artifact: str, expected: Expected, tmp_path: Path) -> None:
    """By less than the bound, which is written beside the expected output."""

    def change(array: np.ndarray[Any, Any]) -> None:
        array[0, 0, 0, 0] = np.nextafter(array[0, 0, 0, 0], np.inf)

    folder = altered(expected, tmp_path, change)
    assert run_artifact(artifact, folder, 2, seconds=0.01, hopeless=0.0)["outcome"] == "wrong"
    facts = Path(artifact).parent / "candidate.json"
    before = facts.read_text()
    facts.write_text(json.dumps(json.loads(before) | {"exact": False}))
    try:
        assert run_artifact(artifact, folder, 2, seconds=0.01, hopeless=0.0)["outcome"] == "ok"
    finally:
        facts.write_text(before)


@pytest.mark.parametrize(
    ("descriptor", "schedule", "exact"),
    [
        ("conv2d n1 ic3 oc5 i6x6 k3x3 relu", "cpu_direct", True),
        ("conv2d n1 ic3 oc5 i6x6 k3x3 tanh", "cpu_direct", False),
        ("conv2d n1 ic16 oc16 i6x6 k3x3 relu", "cpu_winograd", False),
    ],
)
def test_integers_must_match_bit_for_bit_unless_something_rounds(
    descriptor: str, schedule: str, exact: bool, tmp_path: Path
) -> None:
    spec = ConvSpec.parse(descriptor)
    path = build_artifact(module(spec, schedule), str(tmp_path))
    assert json.loads((Path(path).parent / "candidate.json").read_text())["exact"] is exact
    (tmp_path / "expected").mkdir()
    shared = Expected(spec, tmp_path / "expected", 2)
    assert run_artifact(path, str(shared.directory), 2, seconds=0.001, hopeless=0.0)["outcome"] == "ok"


def test_a_duel_samples_each_as_often(artifact: str, expected: Expected) -> None:
    samples = run_duel([artifact, artifact], str(expected.directory), 2, rounds=4)
    assert [len(taken) for taken in samples] == [4, 4]


# ---- kernels with bugs in them ----------------------------------------------------------------


def planted_artifact(root: Path, before: str = "", store: str = "t.dst[at] = v") -> str:
    """The artifact of a kernel in C that does this before it computes, and stores its results so."""
    folder = Path(tempfile.mkdtemp(dir=root))
    source = planted.SOURCE.replace("#include <math.h>", "#include <math.h>\n#include <signal.h>\n#include <unistd.h>")
    object_file = planted.compile_c(source.format(store=store, before=before), folder / "kernel.o")
    library = link(planted.interface(), object_file, folder / "libplanted.so")
    facts = {"spec": planted.SPEC.descriptor, "name": "planted", "exact": True}
    (folder / "candidate.json").write_text(json.dumps(facts))
    return str(library)


def expected_of(root: Path) -> Expected:
    """What the planted kernel should compute."""
    folder = root / "expected"
    folder.mkdir(exist_ok=True)
    return Expected(planted.SPEC, folder, 1)


# ---- worker processes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    pools = Pools(LocalBuilder(1), LocalRunner())
    yield pools
    pools.close()


@pytest.fixture(scope="module")
def hasty() -> Iterator[Pools]:
    """For what never ends: all else, taking fresh memory above all, may take long on a busy machine."""
    pools = Pools(LocalBuilder(1), LocalRunner(timeout=2))
    yield pools
    pools.close()


def in_workers(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    """Let workers run these functions of ``worker_jobs`` instead of the module's."""
    for name, function in functions.items():
        monkeypatch.setattr(sys.modules["convgen.measure.workers"], name, in_worker(function))


def test_workers_build_and_run(pools: Pools, expected: Expected) -> None:
    (path,) = pools.build([module()])
    assert isinstance(path, str)
    assert Path(path).is_relative_to(pools.builder.root)
    result = pools.run(path, expected, 2, seconds=0.001)
    assert (result.outcome, result.error) == ("ok", "")
    assert result.seconds is not None
    assert [len(taken) for taken in pools.duel([path, path], expected, 2, 3)] == [3, 3]
    pools.discard(path)
    assert not Path(path).parent.exists()


def test_a_module_that_does_not_build_is_an_outcome(pools: Pools) -> None:
    broken, good = pools.build([BROKEN, module()])
    assert isinstance(broken, Result)
    assert broken.outcome == "build_error"
    assert broken.error
    assert isinstance(good, str)


def test_a_call_that_fails_is_an_outcome(pools: Pools, expected: Expected) -> None:
    result = pools.run("/nowhere/lib.so", expected, 1, seconds=0.001)
    assert result.outcome == "run_error"
    assert "FileNotFoundError" in result.error
    with pytest.raises(MeasureError, match=r"(?s)re-measuring: run_error: .*No such file"):
        pools.duel(["/nowhere/lib.so"], expected, 1, 3)


def test_a_worker_that_dies_is_a_crash_and_replaced(
    pools: Pools, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        in_workers(patch, run_artifact=worker_jobs.crash, build_artifact=worker_jobs.leave)
        assert pools.run("any", expected, 1, seconds=0.001).outcome == "crash"
        (built,) = pools.build([BROKEN])
        assert isinstance(built, Result)
        assert built.outcome == "crash"
    (path,) = pools.build([module()])
    assert isinstance(path, str)
    assert pools.run(path, expected, 2, seconds=0.001).outcome == "ok"


def test_a_worker_that_eats_memory_is_killed(pools: Pools, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it asks for more than there is, or takes it page by page in code that is not Python's."""
    with monkeypatch.context() as patch:
        patch.setattr(Expected, "memory", 600 << 20)
        in_workers(patch, run_artifact=worker_jobs.eat_memory)
        result = pools.run("any", expected, 1, seconds=0.001)
        assert result.outcome == "memory"
        assert "may use 600 MiB" in result.error
        in_workers(patch, run_artifact=worker_jobs.ask_for_all_memory)
        assert pools.run("any", expected, 1, seconds=0.001).outcome == "memory"


def test_a_workspace_that_cannot_be_had_is_an_outcome(
    artifact: str, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*_: Any) -> None:
        np.empty(1 << 60, np.uint8)

    monkeypatch.setattr(sys.modules["convgen.measure.trial"], "prepare_artifact", prepare)
    found = run_artifact(artifact, str(expected.directory), 1, seconds=0.001, hopeless=0.0)
    assert found["outcome"] == "memory"
    assert "1.00 EiB" in found["error"]


@pytest.mark.parametrize(("signal", "name"), [(4, "SIGILL"), (11, "SIGSEGV")])
def test_a_kernel_that_crashes_is_an_outcome(
    pools: Pools, expected: Expected, tmp_path: Path, signal: int, name: str
) -> None:
    """In compiled code, as a candidate would."""
    assert (
        pools.run(planted_artifact(tmp_path, f"raise({signal})"), expected_of(tmp_path), 2, seconds=0.001).outcome
        == "crash"
    )


def test_a_kernel_that_hangs_or_is_wrong_is_an_outcome(pools: Pools, hasty: Pools, tmp_path: Path) -> None:
    hangs = planted_artifact(tmp_path, "for (volatile int x = 1; x;) pause()")
    assert hasty.run(hangs, expected_of(tmp_path), 2, seconds=0.001).outcome == "timeout"
    wrong = planted_artifact(tmp_path, store="t.dst[at] = v + (at == 7)")
    result = pools.run(wrong, expected_of(tmp_path), 2, seconds=0.001)
    assert result.outcome == "wrong"
    assert result.error.startswith("1 of 350 elements; at (0, 0, 1, 0) ")
    right = pools.run(planted_artifact(tmp_path), expected_of(tmp_path), 2, seconds=0.001)
    assert (right.outcome, right.device) == ("ok", "")
    assert right.drift is not None


def test_a_kernel_that_eats_memory_is_an_outcome(pools: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Expected, "memory", 600 << 20)
    eats = planted_artifact(tmp_path, "for (;;) memset(malloc(1 << 24), 1, 1 << 24)")
    result = pools.run(eats, expected_of(tmp_path), 2, seconds=0.001)
    assert result.outcome == "memory"


def test_a_worker_that_hangs_is_killed_and_replaced(
    hasty: Pools, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        in_workers(patch, run_artifact=worker_jobs.sleep)
        result = hasty.run("any", expected, 1, seconds=0.001)
    assert result == Result("timeout", error="killed after 2 s")
    assert hasty.run("/nowhere/lib.so", expected, 1, seconds=0.001).outcome == "run_error"


def test_an_interrupt_ends_the_wait(expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """And closing ends workers that are busy, removes the artifacts and leaves no process."""
    pools = Pools(LocalBuilder(1, timeout=100), LocalRunner(timeout=100))
    children = set(psutil.Process().children(recursive=True))
    in_workers(monkeypatch, run_artifact=worker_jobs.sleep, build_artifact=worker_jobs.sleep)
    pools.interrupts.came = True
    assert pools.run("any", expected, 1, seconds=0.001) == INTERRUPTED
    assert pools.build([BROKEN] * 3) == [INTERRUPTED] * 3
    assert pools.builder.root.is_dir()
    pools.close()
    assert not pools.builder.root.exists()
    started = set(psutil.Process().children(recursive=True)) - children
    psutil.wait_procs(list(started), timeout=10)
    assert not any(process.is_running() for process in started)


def test_what_measures_a_bundle_tells_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (TERMINAL, MARKUP, HIDING):
        tell(f"left out: {name}")
        assert len(lines(capsys.readouterr().err)) == 1
