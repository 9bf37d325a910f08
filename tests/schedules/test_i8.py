"""Layers of 8-bit integers: what is a spec, and that every schedule is exact."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from convgen.check import reference
from convgen.check.validate import validate
from convgen.errors import Inapplicable, KernelError, SpecError
from convgen.hardware.target import resolve
from convgen.kernel.kernel import Kernel, compile_candidate
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.discover import schedules
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import ConvSpec

NATIVE = resolve("cpu")
SPECS = [
    ConvSpec.parse(text)
    for text in (
        "conv2d ic5 oc6 i9x9 k3 p1 i8 relu",
        "conv2d n2 ic16 oc24 i7x9 k3 s2 p1 d2 i8 nobias",
        "conv2d ic32 oc40 i7x7 k1 i8",
        "conv2d n2 ic32 oc40 i5x7 k1 i8 nhwc",
        "conv2d ic16 oc16 g16 i17x19 k3 s2 p1 i8",
        "conv2d ic32 oc32 g4 i9x11 k3 p1 i8",
        "conv1d ic16 oc16 g16 i40 k5 p2 i8 nhwc",
        "conv2d n0 ic3 oc4 i5x6 k3 i8",
    )
]


def compiled(spec: ConvSpec, schedule: str = "reference") -> Kernel:
    return compile_candidate(spec, NATIVE, parse_candidate(spec, NATIVE, schedule, None), 1)


def expected(spec: ConvSpec, data: dict[str, Any]) -> Any:
    return reference.run_onnxruntime(spec, **data)


# ---- what is a spec ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"residual": True, "dst_dtype": "f32"}, "residual"),
        ({"residual_dtype": "u8"}, "residual_dtype"),
        ({"residual": True, "residual_dtype": "f32"}, "residual_dtype"),
        ({"activation": "leaky_relu"}, "activation"),
        ({"activation": "prelu"}, "activation"),
        ({"accuracy": "strict"}, "accuracy"),
        ({"accuracy": "tf32"}, "accuracy"),
        ({"dst_dtype": "i32", "activation": "relu"}, "activation"),
        ({"src_dtype": "f32"}, "src_dtype"),
        ({"weights_dtype": "i32"}, "weights_dtype"),
        ({"dst_dtype": "f16"}, "dst_dtype"),
        ({"dst_dtype": "f32", "dst_zero": True}, "dst_zero"),
    ],
)
def test_what_integers_do_not_mean_is_refused(change: dict[str, Any], field: str) -> None:
    fields: dict[str, Any] = {"n": 1, "ic": 4, "oc": 2, "in_spatial": (5, 5), "kernel": 3, "dtype": "i8"}
    with pytest.raises(SpecError) as error:
        ConvSpec(**fields | change)
    assert error.value.field == field
    if not any(name.endswith(("dtype", "zero")) for name in change):
        ConvSpec(**fields | change | {"dtype": "f32"})


def test_tensors_have_their_own_types() -> None:
    spec = ConvSpec.parse("conv2d ic4 oc2 i5x5 k3 i8")
    assert spec.dtypes == {"src": "i8", "weights": "i8", "bias": "i32", "scale": "f32", "dst": "i8"}
    assert spec.bytes == {"src": 100, "weights": 72, "bias": 8, "scale": 8, "dst": 18}
    assert spec.shapes["scale"] == (2,)
    assert spec.parameters == ["weights", "bias", "scale"]
    assert "scale" not in spec.with_(dtype="f16").shapes


@pytest.mark.parametrize("text", ["conv1d ic4 oc2 i8 i8 k3", "conv1d i8 ic4 oc2 k3 i16", "conv2d ic4 oc2 k3 i8x8 i8"])
def test_the_dtype_is_the_token_that_is_no_size(text: str) -> None:
    spec = ConvSpec.parse(text)
    assert spec.dtype == "i8"
    assert set(spec.in_spatial) <= {8, 16}
    assert ConvSpec.parse(spec.descriptor) == spec


def test_a_lone_i8_is_a_size_in_1d() -> None:
    spec = ConvSpec.parse("conv1d ic4 oc2 i8 k3")
    assert (spec.dtype, spec.in_spatial) == ("f32", (8,))


@pytest.mark.parametrize("rest", ["conv1d i8 i8 i8", "conv2d i8", "conv2d i8x8 i8 f16", "conv2d i8x8 i8 i8"])
def test_a_token_too_many_or_too_few_is_refused(rest: str) -> None:
    with pytest.raises(SpecError):
        ConvSpec.parse(f"{rest} ic4 oc2 k3")


# ---- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_schedule_is_exact(spec: ConvSpec) -> None:
    """Its default for every other problem, else a point drawn from its space."""
    rng = random.Random(spec.descriptor)
    applicable = [s for s in schedules().values() if s.reason_against(spec.core, NATIVE) is None]
    assert len(applicable) > 1
    for schedule in applicable:
        space = schedule.space(spec.core, NATIVE)
        drawn = (space.sample(rng) for _ in range(200 * (SPECS.index(spec) % 2)))
        default = schedule.default(spec.core, NATIVE)
        picks = next((p for p in drawn if not schedule.reason_against(spec.core, NATIVE, p)), default)
        report = validate(compile_candidate(spec, NATIVE, Candidate(schedule, picks), 2))
        report.raise_if_failed()
        assert {"integers", "exact", "memory", "threads"} <= {check.name for check in report.checks}
        assert report.error_factor == report.worst_error == 0


@pytest.mark.parametrize("schedule", ["reference", "cpu_direct"])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_ties_go_to_even_and_what_is_too_large_saturates(schedule: str, activation: str) -> None:
    spec = ConvSpec(1, 1, 3, (1, 513), (1, 1), activation=activation, dtype="i8", bias=True)
    scale = np.array([0.5, -0.5, 0.75], np.float32)
    data: dict[str, np.ndarray] = {
        "src": (np.arange(513) % 256 - 128).astype(np.int8).reshape(spec.src_shape),
        "weights": np.array([1, 3, -2], np.int8).reshape(spec.weights_shape),
        "bias": np.array([1, 0, -1], np.int32),
        "scale": scale,
    }
    sums = data["src"].astype(np.int64) * data["weights"].reshape(1, 3, 1, 1) + data["bias"].reshape(1, 3, 1, 1)
    scaled = sums * scale.reshape(1, 3, 1, 1).astype(np.float64)
    rounded = np.rint(np.maximum(scaled, 0) if activation == "relu" else scaled)
    by_hand = np.clip(rounded, -128, 127).astype(np.int8)
    assert (abs(scaled % 1) == 0.5).any()
    assert (rounded > 127).any()
    assert (rounded < -128).any() == (activation == "none")
    kernel = compiled(spec, schedule)
    found = kernel.bind(data["weights"], data["bias"], scale=scale)(data["src"])
    np.testing.assert_array_equal(found, by_hand)
    np.testing.assert_array_equal(expected(spec, data), by_hand)


@pytest.mark.parametrize(("ic", "schedule"), [(1024, "cpu_direct"), (131_000, "cpu_direct"), (131_000, "reference")])
def test_the_longest_sums_are_exact(ic: int, schedule: str) -> None:
    spec = ConvSpec(1, ic, 4, (2, 2), (1, 1), dtype="i8")
    src = np.full(spec.src_shape, -128, np.int8)
    src[0, 0, 0, 0] = 127
    weights = np.full(spec.weights_shape, -128, np.int8)
    weights[1] = 127
    largest = 2**31 - 1 - ic * 2**14
    bias = np.array([largest, -largest, 0, -ic * 2**14 + 3], np.int32)
    data = {"src": src, "weights": weights, "bias": bias, "scale": np.array([2**-25, 2**-25, 2**-24, 1], np.float32)}
    found = compiled(spec, schedule)(src, weights, bias, scale=data["scale"])
    np.testing.assert_array_equal(found, expected(spec, data))
    assert found[0, 3, 1, 1] == 3


def test_longer_sums_are_left_to_schedules_that_add_integers() -> None:
    spec = ConvSpec(1, 1025, 16, (4, 4), (1, 1), dtype="i8")
    with pytest.raises(Inapplicable, match="exact for 1024 products of i8; there are 1025"):
        parse_candidate(spec, NATIVE, "cpu_rows", None)
    assert default_candidate(spec, NATIVE).schedule.sums_integers
    small = ConvSpec(1, 32, 32, (14, 14), (3, 3), padding=((1, 1), (1, 1)), dtype="i8")
    with pytest.raises(Inapplicable, match="transform is not exact for i8"):
        parse_candidate(small, NATIVE, "cpu_winograd", None)
    assert default_candidate(small, NATIVE).schedule.id != "reference"


# ---- calling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": None}, r"scale: expected shape \(4,\)"),
        ({"scale": np.ones(4)}, "scale: expected dtype float32"),
        ({"scale": np.ones(3, np.float32)}, r"scale: expected shape \(4,\)"),
        ({"bias": np.zeros(4, np.float32)}, "bias: expected dtype int32"),
        ({"weights": np.zeros((4, 2, 1, 1), np.uint8)}, "weights: expected dtype int8"),
        ({"slope": np.ones(4, np.float32)}, "slope: expected none"),
    ],
)
def test_each_tensor_is_checked_by_name(change: dict[str, Any], message: str) -> None:
    spec = ConvSpec(1, 2, 4, (3, 3), (1, 1), dtype="i8")
    good = {
        "weights": np.zeros((4, 2, 1, 1), np.int8),
        "bias": np.zeros(4, np.int32),
        "scale": np.ones(4, np.float32),
    }
    kernel = compiled(spec)
    with pytest.raises(KernelError, match=message):
        kernel.bind(**good | change)
    layer = kernel.bind(**good)
    with pytest.raises(KernelError, match="x: expected dtype int8"):
        layer(np.zeros(spec.src_shape, np.float32))


def test_a_scale_where_there_is_none_is_refused() -> None:
    spec = ConvSpec(1, 2, 4, (3, 3), (1, 1), bias=False)
    with pytest.raises(KernelError, match="scale: expected none"):
        compiled(spec).bind(np.zeros((4, 2, 1, 1), np.float32), scale=np.ones(4, np.float32))
