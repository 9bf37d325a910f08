"""The fuzzer: what it draws and what it finds. How small it makes that is in ``test_shrinking.py``."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from paths import SUPPORT
from usable import runnable

import convgen.schedules
from convgen.check.fuzz import kernels
from convgen.check.fuzz.cases import Case, SeededCase, misread
from convgen.check.fuzz.drawing import FEATURES, Draw, draw
from convgen.check.fuzz.kernels import Kernels
from convgen.check.fuzz.outcome import KINDS, Outcome
from convgen.check.fuzz.run import Fuzzer, Summary
from convgen.check.fuzz.shrinking import case_steps, shrink
from convgen.check.fuzz.worker import Worker
from convgen.check.random_specs import SMALL
from convgen.check.validate import validate
from convgen.cli import main
from convgen.errors import Inapplicable
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering import discover
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.discover import schedules
from convgen.lowering.schedule import Candidate, Picks
from convgen.problem.activation import DEFAULTS
from convgen.problem.dtypes import DTYPES
from convgen.problem.layout import PLAIN
from convgen.problem.spec import OPERATORS, ConvSpec
from convgen.problem.tokens import ACCURACIES

NATIVE = resolve()
SEED, COUNT = 3, 300


@cache
def draws() -> list[Draw]:
    return [draw(SEED, index, NATIVE) for index in range(COUNT)]


# ---- what is drawn ----------------------------------------------------------------------------


def test_a_draw_depends_on_the_seed_and_the_index_alone() -> None:
    """Not on what was drawn before, nor on the process: hashes of strings differ from one to another."""
    random.seed(7)
    assert [draw(SEED, index, NATIVE) for index in (9, 4)] == [draws()[9], draws()[4]]
    assert len({d.spec for d in draws()}) > 0.9 * COUNT
    assert draw(SEED + 1, 9, NATIVE) != draws()[9]
    script = f"""
from convgen.check.fuzz.drawing import draw
from convgen.hardware.target import resolve
for index in range(12):
    for case in draw({SEED}, index, resolve()).cases:
        print(case.command)
"""
    child = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "1"},
    )
    assert child.stdout.splitlines() == [case.command for d in draws()[:12] for case in d.cases]


@pytest.mark.parametrize("feature", FEATURES)
def test_the_draw_is_weighted_towards_every_feature(feature: str) -> None:
    assert sum(FEATURES[feature](d.spec) for d in draws()) >= COUNT // 25


@pytest.mark.parametrize(
    ("descriptor", "features"),
    [
        ("conv2d n2 ic3 oc4 i5x5 k5x5 s1 p0", {"batch 2", "groups = 1", "kernel = input", "one pixel"}),
        ("conv1d n0 ic1 oc4 i9 k3 s4 p4_0", {"batch 0", "groups = 1", "one channel", "stride > kernel"}
         | {"padding > kernel", "asymmetric padding"}),
        ("conv1d n1 ic4 oc8 g2 i3 k2 s1 p2_2 d4", {"batch 1", "groups in between", "dilation past the input"}),
        ("conv1d n1 ic4 oc8 g4 i21 k3 s1 p0 d9", {"batch 1", "groups = ic"}),
        ("convtranspose2d n1 ic2 oc2 i1x1 k2 s1 p0", {"batch 1", "groups = 1", "one pixel"}),
    ],
)  # fmt: skip
def test_features_are_what_they_are_called(descriptor: str, features: set[str]) -> None:
    spec = ConvSpec.parse(descriptor)
    assert {name for name, has in FEATURES.items() if has(spec)} == features


def test_every_kind_of_layer_is_drawn() -> None:
    specs = [d.spec for d in draws()]
    wanted: dict[str, tuple[set[Any], Callable[[ConvSpec], Any]]] = {
        "operator": (set(OPERATORS), lambda s: s.operator),
        "dtype": (set(DTYPES), lambda s: s.dtype),
        "layout": (set(PLAIN), lambda s: s.layout if s.layout in PLAIN else PLAIN[0]),
        "accuracy": (set(ACCURACIES), lambda s: s.accuracy),
        "activation": (set(DEFAULTS), lambda s: s.activation_op.name),
        "bias": ({False, True}, lambda s: s.bias),
        "residual": ({False, True}, lambda s: s.residual),
    }
    for name, (values, of) in wanted.items():
        assert set(map(of, specs)) == values, name


def test_sizes_lie_at_and_beside_the_tiles() -> None:
    """Of the dense layers past one vector of channels: more of them than a uniform draw would have."""
    lanes = NATIVE.vector_bits // 32
    rests = Counter(d.spec.oc % lanes for d in draws() if d.spec.groups == 1 and d.spec.oc > lanes)
    assert (rests[1] + rests[0] + rests[lanes - 1]) / rests.total() > 1.5 * 3 / lanes
    assert min(rests[1], rests[0], rests[lanes - 1]) >= 5


def test_every_schedule_is_drawn_alike_often_and_with_picks_of_its_own() -> None:
    counts, other = Counter[str](), Counter[str]()
    for d in draws():
        for name in {case.schedule for case in d.cases}:
            assert name is not None
            counts[name] += 1
        for case in d.cases:
            assert case.schedule is not None
            other[case.schedule] += case.picks != schedules()[case.schedule].default(case.spec.core, NATIVE)
    assert counts.keys() == runnable(NATIVE).keys()
    assert min(counts.values()) >= 0.5 * COUNT / len(counts), counts
    assert min(count for name, count in other.items() if name != "reference") >= 0.3 * COUNT / len(counts), other


def test_cases_are_small_valid_and_begin_with_the_layers_default() -> None:
    for d in draws():
        assert d.spec.macs <= SMALL.macs
        assert all(size <= 4 * SMALL.elements for size in d.spec.bytes.values())
        assert misread(d.spec) is None
        assert len(set(d.cases)) == len(d.cases)
        best = default_candidate(d.spec, NATIVE)
        assert (d.cases[0].schedule, d.cases[0].picks) == (best.schedule.id, best.picks)
        for case in d.cases:
            found = parse_candidate(d.spec, NATIVE, str(case.schedule), str(case.picks))
            assert found == Candidate(schedules()[str(case.schedule)], case.picks or Picks())
            assert (case.spec, case.threads, case.seed) == (d.spec, d.cases[0].threads, d.cases[0].seed)
    assert len({d.cases[0].threads for d in draws()}) > 2


def test_schedule_and_threads_can_be_chosen() -> None:
    for index in range(5):
        cases = draw(SEED, index, NATIVE, threads=4, schedule="cpu_rows").cases
        assert {(case.schedule, case.threads) for case in cases} == {("cpu_rows", 4)}


def test_no_layer_is_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is drawn beforehand to see whether the schedule applies to any."""
    drawn = list[tuple[int, int]]()

    def counted(seed: int, index: int, *arguments: Any, **options: Any) -> Any:
        drawn.append((seed, index))
        return draw(seed, index, *arguments, **options)

    monkeypatch.setattr(kernels, "draw", counted)
    subject = Kernels(NATIVE, threads=1, schedule="cpu_rows")
    found = [subject.draw(0, index) for index in range(2)]
    assert drawn == [(0, 0), (0, 1)]
    assert [one.spec for one in found] == [draw(0, i, NATIVE, threads=1, schedule="cpu_rows").spec for i in range(2)]


def test_what_applies_to_nothing_is_skipped_with_the_reason() -> None:
    """No small spec has the channels that vectors as wide as these ask for."""
    found = draw(SEED, 0, replace(NATIVE, vector_bits=1 << 14), schedule="cpu_winograd")
    assert found.cases == ()
    assert found.skipped[0].startswith("cpu_winograd applies to none of")


def test_the_command_is_that_of_the_report() -> None:
    case = next(case for d in draws() for case in d.cases if case.picks and case.spec.activation.startswith("clip("))
    candidate = parse_candidate(case.spec, NATIVE, str(case.schedule), str(case.picks))
    report = validate(compile_candidate(case.spec, NATIVE, candidate, case.threads), seed=case.seed)
    assert report.repro == case.command


# ---- layers of integers -----------------------------------------------------------------------


def integer_draw(index: int, seeds: int = 3) -> Draw:
    return draw(SEED, index, NATIVE, threads=2, seeds=seeds)


def test_layers_of_integers_alone_can_be_drawn_with_much_data() -> None:
    specs, schedules_drawn = set[ConvSpec](), set[str]()
    for index in range(40):
        found = integer_draw(index)
        assert found.spec.is_quantised
        assert not found.skipped
        best = default_candidate(found.spec, NATIVE)
        first, *others = found.cases
        assert isinstance(first, SeededCase)
        assert (first.schedule, first.picks, first.seeds) == (best.schedule.id, best.picks, 3)
        assert all(case.seed == first.seed + 3 for case in others)
        specs.add(found.spec)
        schedules_drawn |= {str(case.schedule) for case in found.cases}
    assert len(specs) > 36
    assert len(schedules_drawn) > 4


def test_layers_differ_in_spec_zero_points_or_scales() -> None:
    plain = ConvSpec.parse("conv1d n1 ic4 oc8 i9 k3 nobias dst_i32 i8")  # nothing but weights is drawn
    zero = ConvSpec.parse("conv1d n1 ic4 oc8 i9 k3 src_zero dst_i32 i8")
    for spec, counts in ((plain, {1}), (zero, {6, 7, 8, 9})):
        outcome = SeededCase(spec, NATIVE.spelling, 2, 0, seeds=3).job()()
        assert (outcome.kind, len(outcome.checks)) == ("ok", 9)
        assert len(outcome.layers) in counts
    again = SeededCase(zero, NATIVE.spelling, 1, 0, seeds=3).job()()
    assert again.layers == outcome.layers
    assert not SeededCase(zero.with_(n=0), NATIVE.spelling, 1, 0, seeds=3).job()().message


def test_what_fails_is_shrunk_to_the_seed_it_fails_with() -> None:
    case = SeededCase(ConvSpec.parse("conv2d n1 ic4 oc8 i9x9 k3x3 i8"), NATIVE.spelling, 2, 5, "reference", Picks(), 4)

    def fails(simpler: Case) -> bool:
        return isinstance(simpler, SeededCase) and simpler.seed <= 7 < simpler.seed + simpler.seeds

    first: Case = case
    shrunk = shrink(first, case_steps(NATIVE), fails)
    assert isinstance(shrunk, SeededCase)
    assert (shrunk.seed, shrunk.seeds, shrunk.spec.macs) == (7, 1, 1)
    assert shrunk.command.endswith("--seed 7")


def test_the_command_counts_layers_of_integers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "--integers", "2", "--specs", "2", "--seed", str(SEED), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtypes"] == {"i8": 2}
    assert 2 <= found["layers"] <= 6 * found["candidates"]
    assert main(["fuzz", "--integers", "2", "--directions", "data"]) == 2
    assert main(["fuzz", "--integers", "2", "--networks"]) == 2


# ---- planted bugs -----------------------------------------------------------------------------

HEADER = """
import functools, os, sys, time
from planted import Planted
from tvm import tirx
from convgen.errors import Inapplicable
from convgen.lowering.schedule import Picks, Space
"""

#: A tile that does not divide the width makes the last column wrong.
TAIL = """
def last_column(width, value, read, where, spec):
    wrong = tirx.all(where[-1] == spec.out_spatial[-1] - 1, spec.out_spatial[-1] % width != 0)
    return tirx.Select(wrong, value + tirx.const(1, "float32"), value)

class Tail(Planted):
    id = "planted"

    def space(self, spec, target):
        return Space(tile_ow=[1, 2, 3, 5], order=["rows", "columns"])

    def default(self, spec, target):
        return Picks(tile_ow=1, order="rows")

    def program(self, spec, target, picks):
        return Planted(finish=functools.partial(last_column, picks.tile_ow)).program(spec, target, picks)
"""

Plant = Callable[[str], None]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """Puts a schedule ``planted`` beside the others, here and in every process started from here."""

    def put(text: str) -> None:
        (tmp_path / "schedules").mkdir()
        (tmp_path / "schedules" / "planted.py").write_text(HEADER + text)
        (tmp_path / "sitecustomize.py").write_text(
            f"import convgen.schedules\nconvgen.schedules.__path__.append({str(tmp_path / 'schedules')!r})\n"
        )
        path = os.pathsep.join([str(tmp_path), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setattr(convgen.schedules, "__path__", [*convgen.schedules.__path__, str(tmp_path / "schedules")])
        discover.schedules.cache_clear()

    yield put
    monkeypatch.undo()
    sys.modules.pop("convgen.schedules.planted", None)
    vars(convgen.schedules).pop("planted", None)
    discover.schedules.cache_clear()


def fuzz(**options: Any) -> Summary:
    return Fuzzer(1, Kernels("cpu", threads=2, schedule="planted")).run(**options)


def planted_draw(index: int) -> Draw:
    return draw(1, index, NATIVE, threads=2, schedule="planted")


def hits_the_tail(case: Case) -> bool:
    return case.picks is not None and case.spec.n > 0 and case.spec.core.out_spatial[-1] % case.picks.tile_ow > 0


def test_a_planted_bug_is_found_and_shrunk_to_a_command_that_repeats_it(
    plant: Plant, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(TAIL)
    monkeypatch.setattr("convgen.check.fuzz.run.MOST_SHRUNK", 1)
    found_by = (i for i in range(100) if any(map(hits_the_tail, planted_draw(i).cases)))
    summary = fuzz(start=next(found_by), specs=1)
    first = summary.findings[0]
    assert (first.kind, first.schedule, first.repeats) == ("wrong", "planted", True)
    least = Case(
        ConvSpec.parse("conv1d n1 ic1 oc1 i1 k1 nobias"),
        NATIVE.spelling,
        1,
        0,
        "planted",
        Picks(tile_ow=2, order="rows"),
    )
    assert first.command == least.command
    assert isinstance(first.drawn, Case)
    assert hits_the_tail(first.drawn)
    cases = planted_draw(first.index).cases
    assert [f.drawn for f in summary.findings] == [case for case in cases if hits_the_tail(case)]
    assert summary.candidates == len(cases) > len(summary.findings)  # the default is right
    for command in (first.command, first.drawn.command):
        program, *arguments = shlex.split(command)
        assert program == "convgen"
        assert main(arguments) == 1
        assert "FAIL  exact" in capsys.readouterr().out
    right = first.command.replace("tile_ow=2", "tile_ow=1")
    assert main(shlex.split(right)[1:]) == 0
    once = ["--seed", "1", "--start", str(first.index), "--specs", "1", "--threads", "2", "--schedule", "planted"]
    assert main(["fuzz", *once]) == 1
    assert "found: wrong: " in capsys.readouterr().err  # at once: a long run that is killed prints nothing at its end


#: What a planted schedule does when it is scheduled -> the kind, and what the finding says.
ENDS = {
    "a crash": ("os.abort()", "crash", "signal 6"),
    "an exit": ("sys.stderr.write('LLVM ERROR: no'); sys.stderr.flush(); os._exit(3)", "crash", "status 3: LLVM ERROR"),
    "a hang": ("time.sleep(600)", "hang", "no answer within 1 s"),
    "a TVM error": ("sch.get_sblock('nobody')", "build", "cannot be scheduled"),
    "an exception": ("raise LookupError('planted')", "build", "planted"),
    "a refusal": ("raise Inapplicable('not like this')", "refused", "not like this"),
}


def test_how_a_check_can_end(plant: Plant) -> None:
    """In one worker: whatever happens to it, the next check is served."""
    cases = "".join(f"        if spec.oc == {i}: {how}\n" for i, (how, _, _) in enumerate(ENDS.values(), 1))
    plant(f"""
class Ends(Planted):
    id = "planted"

    def apply(self, sch, spec, target, picks):
{cases}
        super().apply(sch, spec, target, picks)
""")

    def check(channels: int, worker: Worker) -> Outcome:
        spec = ConvSpec.parse(f"conv1d n1 ic1 oc{channels} i3 k1")
        return worker.check(Case(spec, NATIVE.spelling, 1, 0, "planted", Picks()))

    with closing(Worker()) as worker, closing(Worker(limit=1.0)) as impatient:
        for i, (_, kind, message) in enumerate(ENDS.values(), 1):
            outcome = check(i, impatient if kind == "hang" else worker)
            assert outcome.kind == kind, outcome
            assert message in outcome.message
        right = check(len(ENDS) + 1, worker)
        assert (right.kind, right.message) == ("ok", "")
        assert {"memory", "threads", "float", "exact", "odd", "special", "refusal"} == set(right.checks)
        assert 0 <= right.error < 1


@pytest.mark.parametrize(
    ("picks", "kind", "message"),
    [
        ("Picks(tile=3)", "refused", "found 'tile=3'"),  # outside the space
        ("Picks(tile=2)", "refused", "two"),  # not valid
        ("Picks(tile=1 // 0)", "error", "ZeroDivisionError"),
    ],
)
def test_a_default_that_is_not_valid_is_found(
    plant: Plant, capsys: pytest.CaptureFixture[str], picks: str, kind: str, message: str
) -> None:
    plant(f"""
class Default(Planted):
    id = "planted"

    def space(self, spec, target):
        return Space(tile=[1, 2])

    def valid(self, spec, target, picks):
        if picks.tile == 2:
            raise Inapplicable("two")

    def default(self, spec, target):
        return {picks}
""")
    summary = fuzz(specs=1 if kind == "refused" else 3)
    found = summary.findings[0]
    assert (found.kind, found.schedule) == (kind, "planted" if kind == "refused" else "default")
    assert message in found.message
    if kind == "refused":
        assert '"conv1d n1 ic1 oc1 i1 k1 s1 p0 nobias"' in found.command
        assert main(shlex.split(found.command)[1:]) == 2
        assert message in capsys.readouterr().err
    else:
        assert (len(summary.findings), summary.skipped) == (1, {found.message: 2})  # said once
        assert found.command.startswith(f"convgen fuzz --seed 1 --start 0 --specs 1 --target {NATIVE}")
        assert main([*shlex.split(found.command)[1:], "--json"]) == 1
        (again,) = json.loads(capsys.readouterr().out)["findings"]
        assert again["message"] == found.message


def test_a_spec_that_is_read_back_as_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = ConvSpec.parse.__func__  # type: ignore[attr-defined] # a classmethod has one

    def without_residual(cls: type[ConvSpec], text: str) -> ConvSpec:
        spec: ConvSpec = parse(cls, text.replace(" residual", ""))
        return spec

    monkeypatch.setattr(ConvSpec, "parse", classmethod(without_residual))
    index = next(i for i in range(100) if draw(SEED, i, NATIVE, schedule="reference").spec.residual)
    found = Fuzzer(SEED, Kernels(schedule="reference")).run(start=index, specs=1).findings[0]
    assert found.kind == "descriptor"
    assert found.message == (
        "descriptor: expected conv1d n1 ic1 oc1 i1 k1 s1 p0 nobias residual, found conv1d n1 ic1 oc1 i1 k1 s1 p0 nobias"
    )
    assert found.command == (
        f"convgen fuzz --seed {SEED} --start {index} --specs 1 --target {NATIVE} --schedule reference"
    )


# ---- the command ------------------------------------------------------------------------------


def test_what_is_right_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """A short run over the real schedules."""
    assert main(["fuzz", "--seed", "20", "--seconds", "10"]) == 0
    out = capsys.readouterr().out
    assert "seed 20 from 0 on cpu:" in out
    assert ", 0 findings in " in out


def test_the_document_counts_what_was_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "--seed", str(SEED), "--start", "5", "--specs", "2", "--workers", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    cases = [case for d in draws()[5:7] for case in d.cases]
    assert (document["seed"], document["start"], document["specs"]) == (SEED, 5, 2)
    assert (document["target"], document["interrupted"], document["findings"]) == (NATIVE.spelling, False, [])
    assert document["candidates"] == len(cases)
    assert document["operators"] == Counter(d.spec.operator for d in draws()[5:7])
    counts = {name: sum(found.values()) for name, found in document["schedules"].items()}
    assert counts == Counter(case.schedule for case in cases)
    assert document["checks"]["memory"] == document["checks"]["refusal"] == len(cases)
    assert document["errors"].keys() == counts.keys()
    assert document["slowest"][1] in {case.command for case in cases}


def test_an_interrupt_ends_a_run_with_what_it_has() -> None:
    fuzzer = Fuzzer(SEED)

    def interrupt(summary: Summary) -> None:
        if summary.candidates:
            signal.raise_signal(signal.SIGINT)

    summary = fuzzer.run(progress=interrupt)
    assert summary.interrupted
    assert summary.candidates >= 1
    assert summary.findings == []


def test_a_wrong_command_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--schedule", "nobody"], "expected one of"),
        (["--target", "cpu:aarch64-cortex-a72"], "expected a target that runs on this machine"),
        (["--specs", "0"], "0 is not in the range"),
    ):
        assert main(["fuzz", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_every_kind_is_explained() -> None:
    assert all(KINDS.values())
    assert {kind for _, kind, _ in ENDS.values()} <= KINDS.keys()


def test_a_schedule_that_applies_to_nothing_is_an_error() -> None:
    with pytest.raises(Inapplicable, match=r"--schedule cuda_gemm on cpu.*: cuda_gemm applies to none of [0-9]+ specs"):
        Kernels("cpu", schedule="cuda_gemm")
