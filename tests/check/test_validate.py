"""The validator itself: it passes what is right, and every planted bug fails the check that is for it."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import SPEC, Planted, c_kernel
from tvm import tirx

from convgen.check.bounds import even_tolerance, reference, tolerance, worst
from convgen.check.data import exact_data, float_data, odd_data, special_data
from convgen.check.validate import Report, validate
from convgen.errors import ValidationError
from convgen.hardware.target import resolve
from convgen.kernel.kernel import Kernel, compile_candidate
from convgen.lowering.candidates import parse_candidate
from convgen.lowering.compute import convolution
from convgen.lowering.schedule import Candidate, Picks
from convgen.problem.accuracy import UNIT_ROUNDOFF, error_factor
from convgen.problem.spec import ConvSpec

CHECKS = ["memory", "threads", "float", "exact", "odd", "special", "refusal"]


def failures(report: Report) -> dict[str, str]:
    return {check.name: check.found for check in report.checks if not check.passed}


def planted(descriptor: str, schedule: Planted | None = None, threads: int = 2) -> Kernel:
    return compile_candidate(ConvSpec.parse(descriptor), resolve(), Candidate(schedule or Planted(), Picks()), threads)


# ---- what is right passes ---------------------------------------------------------------------


def test_a_right_kernel_passes_every_check(tmp_path: Path) -> None:
    report = validate(c_kernel(tmp_path))
    assert failures(report) == {}
    assert [check.name for check in report.checks] == CHECKS
    assert report.passed
    report.raise_if_failed()
    assert 0 < report.worst_error < 1
    assert report.error_factor == error_factor(SPEC)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_right_schedule_passes_every_check(threads: int) -> None:
    report = validate(planted("conv1d n1 ic3 oc4 i9 k3 p1 prelu nhwc", threads=threads))
    assert failures(report) == {}
    assert [check.name for check in report.checks] == CHECKS


def test_a_transform_is_held_to_its_bound_on_integers_too() -> None:
    """And is let off NaN and infinities, which spread over its tiles."""

    def nearly(value: Any, acc: Any, where: Any, spec: ConvSpec) -> Any:
        return value * tirx.const(1 + 2.0**-20, "float32")

    descriptor = "conv2d n1 ic8 oc2 i4x4 k3x3 nobias"
    assert set(failures(validate(planted(descriptor, Planted(finish=nearly))))) == {"exact"}
    report = validate(planted(descriptor, Planted(finish=nearly, transforms=True)))
    assert failures(report) == {}
    assert [check.name for check in report.checks] == [name for name in CHECKS if name != "special"]


def test_an_empty_batch_passes() -> None:
    assert failures(validate(planted("conv2d n0 ic3 oc4 i5x5 k3x3 residual"))) == {}


def test_a_kernel_of_one_element_has_nothing_to_refuse() -> None:
    report = validate(planted("conv1d n1 ic1 oc1 i1 k1"))
    assert failures(report) == {}
    assert "nothing to refuse" in report.checks[-1].found


# ---- bugs in C --------------------------------------------------------------------------------

#: Statements instead of the right ones -> the checks that fail (at least), and what the first says.
BUGS_IN_C: dict[str, tuple[dict[str, str], set[str], str]] = {
    "an unwritten element": ({"store": "if (at != DST - 1) t.dst[at] = v"}, {"float", "exact"}, "largest error inf"),
    "sums onto what was in dst": ({"store": "t.dst[at] += v"}, {"float", "exact"}, "largest error inf"),
    "a read past the end of src": (
        {"store": "t.dst[at] = v + (t.src[N * IC * H * W] == 1e30f)"},
        {"memory"},
        r"signal 11 \(float data, 1 thread, guard page at the end\)",
    ),
    "a read before src": (
        {"store": "t.dst[at] = v + (t.src[-1] == 1e30f)"},
        {"memory"},
        r"signal 11 \(float data, 3 threads, guard page at the start\)",
    ),
    "a read past the end of residual": ({"store": "t.dst[at] = v + (t.residual[at + 1] == 1e30f)"}, {"memory"}, "11"),
    "a read past the packed bias": (
        {"store": "t.dst[at] = v + (t.bias[16] == 1e30f)"},
        {"memory"},
        r"signal 11 \(float data, 1 thread, guard page at the end\)",
    ),
    "a write past the end of dst": ({"store": "t.dst[at] = v; if (at == DST - 1) t.dst[DST] = 0"}, {"memory"}, "11"),
    "a write before dst": ({"store": "t.dst[at] = v; t.dst[-1] = 0"}, {"memory"}, "11"),
    "a write to src": ({"store": "t.dst[at] = v; t.src[0] = 1"}, {"memory"}, "signal 11"),
    "a write to the packed weights": ({"before": "t.weights[0] = 1"}, {"memory"}, "signal 11"),
    "a write to residual": ({"before": "t.residual[3] = 0"}, {"memory"}, "signal 11"),
    "more workspace than was said": ({"store": "t.dst[at] = v; sums[3 * 16] = 0"}, {"memory"}, "signal 11"),
    "src taken as aligned": ({"before": "if ((uintptr_t)t.src % 64) abort()"}, {"memory"}, "signal 6"),
    "dst taken as aligned": ({"before": "if ((uintptr_t)t.dst % 64) abort()"}, {"memory"}, "signal 6"),
    "an error code": ({"before": "return -1"}, {"memory"}, "KernelError"),
    "a division by zero": ({"before": "t.dst[0] = 1 / (int)(t.bias != t.bias)"}, {"memory"}, "signal"),
    "rounding that depends on the threads": (
        {"store": "t.dst[at] = group->num_task == 1 ? v : v * 3.0f / 3.0f * 1.0000001f"},
        {"threads"},
        "expected the bits of the first run, found others: .*, 3 threads",
    ),
    "a race between threads": (
        {"store": "static volatile float shared; shared = v; usleep(20); t.dst[at] = shared"},
        {"threads"},
        "expected the bits of the first run, found others: .*, 3 threads",
    ),
    "another result every time": (
        {"store": "static int count; t.dst[at] = v * (1 + 1e-7f * (count++ % 11))"},
        {"threads", "exact"},
        "expected the bits of the first run",
    ),
    "wrong where the threads do not divide the work": (
        {"store": "t.dst[at] = group->num_task == 4 && o == 4 ? 0 : v"},
        {"threads"},
        "expected the bits of the first run, found others: .*, 4 threads",
    ),
    "off by one in a tail": ({"store": "t.dst[at] = x < OW - 1 ? v : t.dst[at - 1]"}, {"float", "exact"}, "bound"),
    "a task that only the first thread finds": (
        {"store": "if (index == 0 || o < OC - 1) t.dst[at] = v"},
        {"threads"},
        "expected the bits of the first run",
    ),
    "workspace read before it is written": ({"store": "t.dst[at] = v + sums[OW]"}, {"float", "exact"}, "inf"),
    "a residual forgotten": ({"store": "t.dst[at] = v - t.residual[at]"}, {"float", "exact"}, "of the bound"),
    "one channel's bias twice": ({"store": "t.dst[at] = o == 3 ? v + t.bias[3] : v"}, {"float", "exact"}, "bound"),
    "NaN swallowed": ({"store": "t.dst[at] = v > 0 ? v : 0"}, {"special"}, "NaN: at .* expected nan, found 0"),
    "infinity made finite": ({"store": "t.dst[at] = v > 3e38f ? 3e38f : v"}, {"special"}, "infinity: at .*found 3"),
    "minus infinity not clipped": (
        {"store": "t.dst[at] = sums[x] == -INFINITY ? 7 : v"},
        {"special"},
        "beside NaN and infinities: at .* expected 0.*, found 7",
    ),
}


@pytest.mark.parametrize("name", BUGS_IN_C)
def test_a_bug_in_c_fails_its_check(name: str, tmp_path: Path) -> None:
    statements, expected, message = BUGS_IN_C[name]
    report = validate(c_kernel(tmp_path, **statements, threads=3))
    found = failures(report)
    assert expected <= found.keys(), found
    assert not report.passed
    first = next(iter(found))
    with pytest.raises(ValidationError, match=rf"(?s)conv2d .*: {first}: .*{message}.*; repeat with: convgen validate"):
        report.raise_if_failed()


def test_a_kernel_of_one_thread_is_run_on_two(tmp_path: Path) -> None:
    """Whoever loads its library may do that, too."""
    report = validate(c_kernel(tmp_path, store="t.dst[at] = v + index", threads=1))
    assert "2 threads" in failures(report)["threads"]


def test_a_kernel_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["convgen.check.validate"], "SECONDS_AT_LEAST", 2.0)
    report = validate(c_kernel(tmp_path, before="for (volatile int i = 0;;) i = 0"))
    assert "expected an answer within 2 s, found none" in failures(report)["memory"]
    assert report.worst_error == math.inf


def test_an_access_out_of_bounds_does_not_end_the_caller_nor_hide_other_checks(tmp_path: Path) -> None:
    report = validate(c_kernel(tmp_path, store="t.dst[at] = t.src[N * IC * H * W + 99]"))
    assert [check.name for check in report.checks] == ["memory", "refusal"]
    assert report.checks[1].passed


# ---- bugs in tensor expressions ---------------------------------------------------------------

SWAPPED = "conv2d n1 ic2 oc3 i5x6 k3x3 p0_2x1_0"


def swapped_pads(spec: ConvSpec, ops: Any, weights: Any) -> Any:
    return convolution(spec.with_(padding=tuple((e, b) for b, e in spec.padding)), ops, weights)


def tail(value: Any, acc: Any, where: tuple[Any, ...], spec: ConvSpec) -> Any:
    """The last column is the one before it."""
    *front, x = where
    return tirx.Select(x == spec.out_spatial[-1] - 1, acc[(*front, x - 1)], value)


def read_past_the_end(value: Any, acc: Any, where: tuple[Any, ...], spec: ConvSpec) -> Any:
    src = acc.op.input_tensors[0]
    last = [int(size) - 1 for size in src.shape]
    beyond = src[(*last[:-1], last[-1] + 1)]
    return value + tirx.if_then_else(beyond > 1e30, tirx.const(1, "float32"), tirx.const(0, "float32"))


def bias_of_the_first_channel(found: dict[str, Any], channel: Any) -> dict[str, Any]:
    return {"bias": tirx.Select(channel == 2, found["bias"] + 1, found["bias"])}


def relu_the_other_way_round(x: Any) -> Any:
    """``max(x, 0)`` takes the 0 where x is NaN."""
    return tirx.max(x, tirx.const(0, "float32"))


BUGS_IN_TE: dict[str, tuple[str, Planted, set[str]]] = {
    "off by one in a tail": ("conv1d n2 ic3 oc4 i9 k3", Planted(finish=tail), {"float", "exact"}),
    "swapped pads": (SWAPPED, Planted(sums=swapped_pads), {"float", "exact"}),
    "a read past the end of src": ("conv1d n2 ic3 oc4 i9 k3", Planted(finish=read_past_the_end), {"memory"}),
    "wrong bias for one channel": (
        "conv1d n1 ic3 oc4 i9 k3 p1 nhwc",
        Planted(parameters=bias_of_the_first_channel),
        {"float", "exact"},
    ),
    "NaN swallowed": ("conv1d n1 ic3 oc4 i9 k3 relu", Planted(activation=relu_the_other_way_round), {"special"}),
}


@pytest.mark.parametrize("name", BUGS_IN_TE)
def test_a_bug_in_tensor_expressions_fails_its_check(name: str) -> None:
    descriptor, schedule, expected = BUGS_IN_TE[name]
    assert expected <= failures(validate(planted(descriptor, schedule))).keys()


@pytest.mark.parametrize(
    ("times", "transforms", "fails"),
    [
        (0.05, True, set()),
        (0.5, True, {"odd"}),
        (4.0, True, {"exact", "float", "odd"}),
        (0.25, False, {"exact"}),
        (4.0, False, {"exact", "float", "odd", "special"}),
    ],
)
def test_an_error_past_the_bound_fails_and_one_within_it_does_not(
    times: float, transforms: bool, fails: set[str]
) -> None:
    """One product per element: the bound is relative to the element itself.

    What the accuracy class lets a transform lose on data of one scale must come from what it adds, as it says.
    """
    spec = ConvSpec.parse("conv1d n1 ic1 oc1 i64 k1 nobias")
    factor = 1 + times * error_factor(spec, transforms=transforms) * UNIT_ROUNDOFF

    def off(value: Any, acc: Any, where: Any, spec: ConvSpec) -> Any:
        return value * tirx.const(factor, "float32")

    report = validate(planted(spec.descriptor, Planted(finish=off, transforms=transforms)))
    assert failures(report).keys() == fails
    assert report.passed == (not fails)
    assert report.worst_error == pytest.approx(times, rel=0.05, abs=0.01)


# ---- the report -------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "picks"), [("reference", None), ("cpu_direct", None), ("cpu_direct", "another")])
def test_the_reproducing_command_names_the_kernel(schedule: str, picks: str | None) -> None:
    spec, target = ConvSpec.parse("conv2d n1 ic3 oc17 i5x6 k3x3 p1 clip(-1,2.5)"), resolve()
    candidate = parse_candidate(spec, target, schedule)
    if picks:
        near = candidate.schedule.space(spec.core, target).neighbours(candidate.picks)
        good = next(p for p in near if candidate.schedule.reason_against(spec.core, target, p) is None)
        candidate = Candidate(candidate.schedule, good)
    report = validate(compile_candidate(spec, target, candidate, 2), seed=7)
    program, command, descriptor, *rest = shlex.split(report.repro)
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    assert (program, command) == ("convgen", "validate")
    assert options.keys() == {"--target", "--threads", "--schedule", "--picks", "--seed"}
    again = ConvSpec.parse(descriptor)
    where = resolve(options["--target"])
    found = parse_candidate(again, where, options["--schedule"], options["--picks"])
    assert (again, where, found) == (spec, target, candidate)
    assert (options["--threads"], options["--seed"]) == ("2", "7")
    assert validate(compile_candidate(again, where, found, 2), seed=7) == report


def test_a_failure_is_reproduced_by_its_seed(tmp_path: Path) -> None:
    kernel = c_kernel(tmp_path, store="t.dst[at] = at == 11 ? v + 1 : v")
    first, again, other = validate(kernel, seed=3), validate(kernel, seed=3), validate(kernel, seed=4)
    assert first == again
    assert "--seed 3" in first.repro
    assert failures(first)["exact"] != failures(other)["exact"]  # another value at the same element
    assert "at (0, 0, 1, 4) expected" in failures(first)["exact"]


def test_a_report_is_json(tmp_path: Path) -> None:
    folders: dict[str, str] = {"right": "t.dst[at] = v", "unwritten": "if (at) t.dst[at] = v", "crash": "abort()"}
    for name, store in folders.items():
        (tmp_path / name).mkdir()
        report = validate(c_kernel(tmp_path / name, store=store))
        values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert values["passed"] is (name == "right")
        assert values["spec"] == SPEC.descriptor
        assert [check["name"] for check in values["checks"]] == [check.name for check in report.checks]
        assert (values["worst_error"] is None) == (name != "right")


# ---- data, reference and bound ----------------------------------------------------------------

DATA: list[Callable[..., dict[str, Any]]] = [float_data, exact_data, special_data, odd_data]


@pytest.mark.parametrize("make", DATA)
def test_data_have_the_specs_shapes_and_follow_the_seed(make: Callable[..., dict[str, Any]]) -> None:
    spec = ConvSpec.parse("convtranspose2d n2 ic3 oc4 i5x6 k3x2 residual prelu nhwc")
    data = make(spec, 5)
    shapes = {"src": (2, 5, 6, 3), "weights": (3, 4, 3, 2), "bias": (4,), "slope": (4,), "residual": (2, 7, 7, 4)}
    assert {name: array.shape for name, array in data.items()} == shapes
    assert all(array.dtype == np.float32 for array in data.values())
    for name, array in make(spec, 5).items():
        np.testing.assert_array_equal(array, data[name])
    assert (make(spec, 6)["src"] != data["src"]).any()
    assert make(ConvSpec(1, 1, 1, (1,), (1,), bias=False)).keys() == {"src", "weights"}


@pytest.mark.parametrize("k", [1, 17, 512 * 9, 2**20])
def test_sums_of_exact_data_are_exact_whatever_their_order(k: int) -> None:
    spec = ConvSpec(1, k, 1, (1,), (1,))
    data = exact_data(spec)
    most = sum(float(np.abs(array).max()) for array in (data["bias"],))
    most += k * float(np.abs(data["src"]).max() * np.abs(data["weights"]).max())
    assert most < 2**24
    assert np.abs(data["src"]).max() >= 1
    for array in data.values():
        np.testing.assert_array_equal(array, np.rint(array))


def test_special_data_have_nan_and_both_infinities_and_no_zero_weight() -> None:
    data = special_data(SPEC)
    src = data["src"]
    assert np.isnan(src).sum() == 1
    assert (src == np.inf).sum() == 1
    assert (src == -np.inf).sum() == 1
    assert (data["weights"] != 0).all()


def test_the_bound_admits_the_rounding_of_any_order_and_little_more() -> None:
    """Against sums in float64: those in float32, forwards and backwards, keep to the strict bound."""
    spec = ConvSpec(1, 4096, 1, (64,), (1,), accuracy="strict")
    data = float_data(spec)
    products = data["src"][0] * data["weights"][0]  # (ic, 1) broadcast over the pixels
    exact = data["src"][0].astype(np.float64) * data["weights"][0]
    expected = exact.sum(0) + data["bias"]
    bound = tolerance(spec, data)[0, 0]
    for order in (products, products[::-1]):
        found = np.add.accumulate(order, 0, dtype=np.float32)[-1] + data["bias"]
        assert (np.abs(found - expected) <= bound).all()
    assert (bound < 0.01 * np.abs(exact).sum(0)).all()
    assert np.abs(reference(spec, data)[0, 0] - expected).max() <= bound.max()


def test_the_bound_grows_with_the_accuracy_class_and_the_activations_slope() -> None:
    spec = ConvSpec.parse("conv1d n1 ic8 oc2 i9 k3 strict")
    data = float_data(spec)
    strict = tolerance(spec, data)
    standard = even_tolerance(spec.with_(accuracy="standard"), data)
    np.testing.assert_array_equal(tolerance(spec.with_(accuracy="standard"), data), strict)
    assert (standard >= np.float32(7.99) * strict).all()
    np.testing.assert_allclose(even_tolerance(spec.with_(accuracy="relaxed"), data), 8 * standard, rtol=1e-6)
    assert (tolerance(spec.with_(activation="leaky_relu(-3)"), data) >= 3 * strict).all()
    steep = spec.with_(activation="prelu")
    assert (tolerance(steep, data | {"slope": np.array([5, -1], np.float32)}) >= 5 * strict).all()


def test_worst_is_the_largest_error_in_units_of_its_bound() -> None:
    bound = np.array([1, 2, 0], np.float32)
    assert worst(np.array([0.5, 1.5, 0], np.float32), bound) == 0.75
    assert worst(np.array([0, 0, 1e-9], np.float32), bound) == math.inf
    assert worst(np.array([0, np.nan, 0], np.float32), bound) == math.inf
    assert worst(np.empty(0, np.float32), np.empty(0, np.float32)) == 0
