"""From a spec to a kernel: which candidate is taken, what is refused, and how a kernel is called."""

from __future__ import annotations

import gc
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_records import SPEC, TEXT, record

import convgen
from convgen import ConvSpec, Kernel
from convgen.check.bounds import reference
from convgen.check.data import exact_data
from convgen.check.validate import validate
from convgen.errors import BuildError, Inapplicable, KernelError, RecordError, SpecError, UnsupportedError
from convgen.hardware.machine import Machine, machine
from convgen.hardware.target import check_threads, resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering import candidates
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.discover import schedules
from convgen.lowering.schedule import Candidate, Picks
from convgen.lowering.versions import versions
from convgen.records.answer import best_record, choose, record_candidate
from convgen.records.opening import open_store
from convgen.records.store import RecordStore, default_path


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return convgen.build(TEXT, threads=2, records=False)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return exact_data(SPEC)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with RecordStore(tmp_path / "records.sqlite") as store:
        yield store


# ---- which candidate --------------------------------------------------------------------------


def test_without_records_a_kernel_is_the_default_at_once(kernel: Kernel) -> None:
    assert kernel.spec == SPEC
    assert kernel.threads == 2
    assert kernel.target == resolve().on(2)
    assert kernel.record is None
    assert Candidate(kernel.lowered.candidate.schedule, kernel.picks) == default_candidate(SPEC, resolve().on(2))
    assert kernel.schedule == kernel.lowered.candidate.schedule.id
    assert kernel.note == ""
    assert validate(kernel).passed


def test_a_spec_and_its_descriptor_build_the_same(kernel: Kernel) -> None:
    again = convgen.build(SPEC, resolve(), threads=2, records=False)
    assert (again.schedule, again.picks, again.name) == (kernel.schedule, kernel.picks, kernel.name)
    assert again.version == kernel.version


def test_the_fastest_record_is_used(store: RecordStore) -> None:
    picks = next(
        p
        for p in default_candidate(SPEC, resolve()).schedule.space(SPEC, resolve())
        if default_candidate(SPEC, resolve()).schedule.reason_against(SPEC, resolve(), p) is None
    )
    other = Candidate(default_candidate(SPEC, resolve()).schedule, picks)
    for found in (record(seconds=2e-4), record(other, seconds=1e-4), record(seconds=3e-4)):
        store.add(found)
    kernel = convgen.build(SPEC, threads=2, records=store)
    assert (kernel.schedule, kernel.picks) == (other.schedule.id, other.picks)
    assert list(kernel.picks) == list(other.picks)  # in the schedule's order, whatever the record's
    assert kernel.record is not None
    assert kernel.record.seconds == 1e-4
    assert convgen.build(SPEC, threads=2, records=store.path).record == kernel.record
    assert convgen.build(SPEC, threads=2, records=str(store.path)).record == kernel.record
    assert len(store) == 3


def test_what_was_compared_side_by_side_comes_before_what_was_not(store: RecordStore) -> None:
    for found in (record(seconds=1e-6), record(seconds=3e-3, note={"final": True}), record(seconds=4e-3)):
        store.add(found)
    assert best_record(store, SPEC, resolve(), 2) == record(seconds=3e-3, note={"final": True}, when=_when(store, 3e-3))


def _when(store: RecordStore, seconds: float) -> str:
    (found,) = [r for r in store.trials() if r.seconds == seconds]
    return found.when


@pytest.mark.parametrize(
    "changes",
    [
        {"hardware": "another machine"},
        {"threads": 3},
        {"target": "cpu:haswell"},
        {"spec": SPEC.with_(oc=18).descriptor},
        {"schedule_version": 1000},
        {"schedule": "cpu_gone"},
        {"picks": {"tile": 3}},
        {"outcome": "wrong", "seconds": None, "error": "at 3"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_record_that_does_not_match_is_not_used(changes: dict[str, Any], store: RecordStore) -> None:
    store.add(record(**changes))
    assert best_record(store, SPEC, resolve(), 2) is None
    candidate = default_candidate(SPEC, resolve())
    kernel = convgen.build(SPEC, threads=2, records=store)
    assert kernel.record is None
    assert (kernel.schedule, kernel.picks) == (candidate.schedule.id, candidate.picks)


def test_a_matching_record_is_used_where_others_do_not_match(store: RecordStore) -> None:
    store.add(record(seconds=1e-6, hardware="another machine"))
    store.add(record(seconds=1e-4))
    kernel = convgen.build(SPEC, threads=2, records=store)
    assert kernel.schedule == "reference"
    assert kernel.record is not None
    assert kernel.record.seconds == 1e-4
    assert "this is the slow reference" in kernel.note
    assert SPEC.descriptor in kernel.note


def test_a_record_is_its_candidate_again() -> None:
    candidate = default_candidate(SPEC, resolve())
    assert record_candidate(record(candidate), SPEC, resolve()) == candidate
    assert record_candidate(record(candidate, schedule_version=99), SPEC, resolve()) is None


def test_the_default_store_is_used_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVGEN_RECORDS", str(tmp_path / "default.sqlite"))
    with RecordStore() as store:
        assert store.path == default_path() == tmp_path / "default.sqlite"
        store.add(record(seconds=1e-4))
    assert convgen.build(SPEC, threads=2).schedule == "reference"
    assert convgen.build(SPEC, threads=2, records=True).schedule == "reference"
    assert convgen.build(SPEC, threads=2, records=False).record is None


def test_without_records_no_file_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVGEN_RECORDS", str(tmp_path / "records.sqlite"))
    convgen.build("conv1d n1 ic1 oc1 i9 k3", records=False)
    assert list(tmp_path.iterdir()) == []


def test_stores_are_closed_but_for_the_callers_own(store: RecordStore) -> None:
    with open_store(store) as same:
        assert same is store
    assert len(store) == 0  # still open
    with open_store(store.path) as other:
        assert other is not None
    with pytest.raises(RecordError):
        len(other)
    with open_store(False) as none:
        assert none is None


def test_a_store_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no store")
    with pytest.raises(RecordError, match="file"):
        convgen.build(TEXT, records=tmp_path / "file")


def test_every_applicable_schedule_is_considered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is that of the shortest predicted time; where none applies, the reasons are told."""
    found = schedules()
    costs = {s: f.cost(SPEC, resolve()) for s, f in found.items() if f.reason_against(SPEC, resolve()) is None}
    assert default_candidate(SPEC, resolve()).schedule.id == min(costs, key=lambda s: (costs[s], s))
    monkeypatch.setattr(candidates, "schedules", lambda: {"cpu_transposed": found["cpu_transposed"]})
    with pytest.raises(
        UnsupportedError, match=r"conv2d .* on cpu:.*: no schedule applies \(cpu_transposed: needs a transposed"
    ):
        default_candidate(SPEC, resolve())


# ---- tuning -----------------------------------------------------------------------------------


def test_a_budget_tunes_and_the_winner_is_built(store: RecordStore) -> None:
    done: list[int] = []
    kernel = convgen.build(
        SPEC, threads=1, trials=2, records=store, progress=lambda state: done.append(state.done), name="tuned"
    )
    assert done[-1] == 2
    assert kernel.record is not None
    assert kernel.record == best_record(store, SPEC, resolve(), 1)
    assert (kernel.schedule, dict(kernel.picks)) == (kernel.record.schedule, dict(kernel.record.picks))
    assert kernel.name == "tuned"
    assert convgen.build(SPEC, threads=1, records=store).record == kernel.record


def test_an_empty_batch_is_not_tuned(store: RecordStore) -> None:
    kernel = convgen.build("conv2d n0 ic3 oc17 i6x7 k3x3", trials=5, records=store)
    assert kernel.record is None
    assert len(store) == 0
    layer = kernel.bind(np.ones(kernel.spec.weights_shape, np.float32), np.ones(17, np.float32))
    assert layer(np.empty((0, 3, 6, 7), np.float32)).shape == (0, 17, 4, 5)


@pytest.mark.parametrize(
    "budget",
    [{"trials": -1}, {"seconds": -1.0}, {"trials": 1.5}, {"seconds": math.inf}, {"seconds": math.nan}],
    ids=str,
)
def test_an_impossible_budget_is_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"trials|seconds"):
        convgen.build(TEXT, records=False, **budget)


def test_where_tuning_finds_nothing_the_default_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = importlib.import_module("convgen.api").Tuner
    stale = record(schedule_version=1000)
    for answer in (None, stale):
        monkeypatch.setattr(tuner, "tune", lambda self, *_, answer=answer, **__: answer)
        kernel = convgen.build(SPEC, threads=2, trials=3, records=False)
        assert kernel.record is None
        assert kernel.schedule == default_candidate(SPEC, resolve()).schedule.id


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, -1, 1025, True, 2.0, "2"])
def test_wrong_thread_counts_are_refused(threads: Any) -> None:
    with pytest.raises(SpecError, match=r"^threads: expected an integer between 1 and 1024, found") as error:
        convgen.build(TEXT, threads=threads, records=False)
    assert error.value.field == "threads"


def test_threads_default_to_all_cores() -> None:
    assert check_threads(None, resolve()) == machine().cores
    assert check_threads(1024, resolve()) == 1024


def test_a_layer_larger_than_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine()
    small = Machine(**{**vars(here), "memory": 5000})
    monkeypatch.setattr(importlib.import_module("convgen.hardware.machine"), "machine", lambda: small)
    needed = sum(SPEC.bytes.values())
    assert needed > 5000
    with pytest.raises(SpecError, match=rf"memory: expected tensors of at most 5,000 bytes, found {needed:,}"):
        convgen.build(TEXT, records=False)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tpu", "target: expected one of .*found 'tpu'"),
        ("cpu:pdp11", "expected a 64-bit processor LLVM knows, found 'pdp11'"),
    ],
)
def test_targets_that_do_not_exist_are_refused(target: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        convgen.build(TEXT, target=target, records=False)


@pytest.mark.parametrize("text", ["", "conv4d n1", "conv2d n1 ic3 oc4 i2x2 k3x3", "conv2d ic3 oc4 i8x8 k3x3 huh"])
def test_a_wrong_descriptor_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        convgen.build(text, records=False)


@pytest.mark.parametrize("name", ["9lives", "a b", "convgen", "x" * 300, "naïve", "a;b"])
def test_a_name_that_is_no_c_identifier_is_refused(name: str) -> None:
    with pytest.raises(BuildError, match="name: expected a C identifier"):
        convgen.build(TEXT, records=False, name=name)


def test_picks_that_are_not_valid_are_refused() -> None:
    schedule = parse_candidate(SPEC, resolve(), "cpu_direct").schedule
    space = schedule.space(SPEC, resolve())
    bad = next(p for p in space if schedule.reason_against(SPEC, resolve(), p) is not None)
    with pytest.raises(Inapplicable):
        compile_candidate(SPEC, resolve(), Candidate(schedule, bad), 1)


def test_a_schedule_with_other_arguments_is_an_error_that_names_them() -> None:
    from convgen.lowering.schedule import Program
    from convgen.schedules.reference import Reference

    class Forgetful(Reference):
        def program(self, *arguments: Any) -> Program:
            made = super().program(*arguments)
            return Program(pack=made.pack, main=made.main[1:])

    class Failing(Reference):
        def apply(self, sch: Any, *_: Any) -> None:
            sch.get_sblock("missing")

    for schedule, message in ((Forgetful(), "expected"), (Failing(), "cannot be scheduled")):
        with pytest.raises(BuildError, match=message):
            compile_candidate(SPEC, resolve(), Candidate(schedule, Picks()), 1)


# ---- the kernel -------------------------------------------------------------------------------


def test_a_narrower_target_builds_and_runs() -> None:
    target = resolve("cpu:haswell")
    if not target.native:
        pytest.skip("this CPU has no AVX2")
    for text in (TEXT, "conv2d n1 ic16 oc24 i9x9 k1x1 residual", "conv2d n1 ic8 oc8 g8 i9x9 k3x3 p1"):
        kernel = convgen.build(text, target="cpu:haswell", threads=2, records=False)
        assert kernel.target.vector_bits == 256
        assert "avx2" in kernel.interface.isa
        assert "zmm" not in kernel.source("asm")
        validate(kernel).raise_if_failed()


@pytest.mark.parametrize(
    ("kind", "shows"), [("tir", "T.prim_func"), ("ll", "define"), ("asm", "__tvm_ffi_main")], ids=["tir", "ll", "asm"]
)
def test_the_source_is_text(kernel: Kernel, kind: str, shows: str) -> None:
    assert shows in kernel.source(kind)


def test_another_kind_of_source_is_refused(kernel: Kernel) -> None:
    with pytest.raises(UnsupportedError, match="source: expected one of tir, ll, asm, found 'c'"):
        kernel.source("c")


def test_the_name_is_the_prefix_of_the_functions() -> None:
    kernel = convgen.build("conv1d n1 ic1 oc1 i9 k3", records=False, name="my_layer")
    assert kernel.name == kernel.interface.name == "my_layer"
    assert kernel.path.name == "libmy_layer.so"
    assert b"my_layer_run" in kernel.path.read_bytes()


def test_versions_are_written_down() -> None:
    found = versions()
    assert found.keys() == {"convgen", "tvm", "llvm"}
    assert found["convgen"] == convgen.__version__
    assert all(text and isinstance(text, str) for text in found.values())


def test_the_files_of_a_kernel_go_with_it() -> None:
    kernel = convgen.build("conv1d n1 ic1 oc1 i9 k3", records=False)
    folder = kernel.path.parent
    assert folder.is_dir()
    layer = kernel.bind(np.ones((1, 1, 3), np.float32), np.zeros(1, np.float32))
    del kernel
    gc.collect()
    assert layer(np.ones((1, 1, 9), np.float32)).tolist() == [[[3.0] * 7]]  # a layer keeps its kernel
    del layer
    gc.collect()
    assert not folder.exists()


def test_a_kernel_is_exported_and_loaded(kernel: Kernel, data: dict[str, Any], tmp_path: Path) -> None:
    manifest = kernel.export(tmp_path / "out", facts={"validated": True})
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    assert manifest["schedule"] == kernel.schedule
    assert manifest["picks"] == dict(kernel.picks)
    assert manifest["validated"] is True
    loaded = convgen.load(tmp_path / "out")
    assert (loaded.spec, loaded.threads) == (SPEC, 2)
    found = loaded.bind(data["weights"], data["bias"])(data["src"])
    np.testing.assert_array_equal(found, reference(SPEC, data))


# ---- calls ------------------------------------------------------------------------------------


def test_a_layer_is_bound_once_and_called_often(kernel: Kernel, data: dict[str, Any]) -> None:
    layer = kernel.bind(data["weights"], data["bias"])
    expected = reference(SPEC, data)
    out = np.empty(SPEC.dst_shape, np.float32)
    assert layer(data["src"], out=out) is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(layer(data["src"]), expected)
    np.testing.assert_array_equal(kernel(data["src"], data["weights"], data["bias"]), expected)
    np.testing.assert_array_equal(kernel(data["src"], data["weights"], data["bias"], out=out), expected)


def test_residual_and_slope_are_given_where_the_spec_has_them() -> None:
    spec = ConvSpec.parse("conv1d n1 ic2 oc3 i9 k3 residual prelu nobias")
    kernel = convgen.build(spec, threads=1, records=False)
    data = exact_data(spec)
    expected = reference(spec, data)
    found = kernel(data["src"], data["weights"], slope=data["slope"], residual=data["residual"])
    np.testing.assert_array_equal(found, expected)
    layer = kernel.bind(data["weights"], slope=data["slope"])
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: layer(data["src"]), "residual: expected"),
        (lambda: kernel.bind(data["weights"]), "slope: expected"),
        (lambda: kernel.bind(data["weights"], np.ones(3, np.float32), data["slope"]), "bias: expected none"),
        (lambda: layer(data["src"], residual=data["residual"][:, :1]), "residual: expected shape"),
    ]
    for call, message in refused:
        with pytest.raises(KernelError, match=message):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[..., :-1], r"x: expected shape \(1, 3, 6, 7\), found \(1, 3, 6, 6\)"),
        (lambda x: x.astype(np.float64), "x: expected dtype float32 in native byte order, found float64"),
        (lambda x: x.astype(">f4"), "x: expected dtype float32 in native byte order, found >f4"),
        (lambda x: x.tolist(), "x: expected a NumPy array or one with __dlpack__, found list"),
        (lambda x: None, "x: expected a NumPy array or one with __dlpack__, found NoneType"),
    ],
)
def test_a_wrong_array_is_refused(
    kernel: Kernel, data: dict[str, Any], change: Callable[[Any], Any], message: str
) -> None:
    layer = kernel.bind(data["weights"], data["bias"])
    with pytest.raises(KernelError, match=message):
        layer(change(data["src"]))


def test_tensors_of_another_library_are_read_and_written_in_place(kernel: Kernel, data: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    layer = kernel.bind(torch.from_numpy(data["weights"]), torch.from_numpy(data["bias"]))
    out = torch.zeros(SPEC.dst_shape)
    src = torch.from_numpy(data["src"].copy())
    assert layer(src, out=out) is out
    np.testing.assert_array_equal(out.numpy(), reference(SPEC, data))
    made = layer(src)
    assert isinstance(made, torch.Tensor)
    assert torch.equal(made, out)


def test_a_default_that_a_search_rejected_is_not_built() -> None:
    target = resolve()
    default = default_candidate(SPEC, target)
    assert choose(SPEC, target, None) == (default, None)
    candidate, found = choose(SPEC, target, None, {default})
    assert (candidate.schedule.id, found) == ("reference", None)
    known = record(default)
    assert choose(SPEC, target, known, {default}) == (default, known)


# ---- when the reference is said to be slow -----------------------------------------------------


def test_the_reference_is_slow_where_nothing_else_applies_or_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    target = resolve().on(1)
    spec = ConvSpec.parse("conv2d n1 ic1 oc1 i2x2 k1x1")
    kernel = compile_candidate(spec, target, candidates.reference_candidate(spec, target), 1)
    chosen = default_candidate(spec, target).schedule.is_reference
    monkeypatch.setattr(
        "convgen.kernel.kernel.default_candidate", lambda spec, target: Candidate(schedules()["reference"], Picks())
    )
    assert kernel.note == ""  # predicted to be as fast as any
    monkeypatch.undo()
    assert ("it was asked for" in kernel.note) != chosen
    monkeypatch.setattr("convgen.kernel.kernel.is_last_resort", lambda spec, target: True)
    assert f"no fast schedule applies on {target}; this is the slow reference" in kernel.note


def test_what_has_no_fast_schedule_is_told_from_what_has_one() -> None:
    target = resolve().on(1)
    blocked = ConvSpec.parse("conv2d n1 ic16 oc16 i8x8 k3x3 p1 nobias nchw8c").with_(direction="weights")
    assert candidates.is_last_resort(blocked, target)
    assert not candidates.is_last_resort(SPEC, target)
