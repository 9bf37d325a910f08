"""Layers of integers of every type, with zero points: what they mean, by hand and by ONNX Runtime."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from convgen.check import data, reference
from convgen.check.validate import validate
from convgen.errors import KernelError, SpecError
from convgen.hardware.target import resolve
from convgen.kernel.kernel import Kernel, compile_candidate
from convgen.lowering.candidates import parse_candidate
from convgen.problem.dtypes import RANGES, numpy_dtype
from convgen.problem.spec import ConvSpec

NATIVE = resolve("cpu")
SPECS = [
    ConvSpec.parse(text)
    for text in (
        "conv2d ic5 oc6 i9x9 k3 p1 i8 src_u8 dst_u8 src_zero dst_zero",
        "conv2d n2 ic6 oc6 g2 i9x8 k3 p1 s2 i8 src_u8 weights_u8 src_zero weights_zero dst_u8 dst_zero relu nhwc",
        "conv2d ic5 oc6 i9x9 k3 p1 i8 src_u8 src_zero dst_zero clip(-3,40) nobias",
        "conv2d ic4 oc4 g4 i9x9 k3 p1 i8 src_u8 src_zero dst_i32",
        "conv2d ic16 oc16 i9x9 k1 i8 src_zero dst_f32 relu nchw16c",
        "convtranspose2d ic6 oc4 g2 i5x6 k3 p1_0x1 s2 d1x2 op1x0 i8 src_u8 src_zero weights_zero dst_u8 dst_zero",
        "convtranspose1d ic3 oc2 i9 k4 s3 i8",
        "conv3d ic4 oc4 i5x4x6 k3x1x2 p1 i8 src_u8 dst_zero dst_u8",
        "conv1d ic3 oc3 g3 i4 k3 s2 p3_2 src_zero weights_u8 i8",  # which no QLinearConv takes
        "conv2d ic5 oc6 i9x9 k3 p1 i8 src_u8 dst_u8 dst_zero residual residual_u8 relu",
        "conv2d n2 ic8 oc16 i4x5 k1 i8 src_u8 residual clip(-30,50) nhwc dst_nchw16c",
    )
]


def compiled(spec: ConvSpec) -> Kernel:
    return compile_candidate(spec, NATIVE, parse_candidate(spec, NATIVE, "reference", None), 1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_reference_is_exact(spec: ConvSpec) -> None:
    assert ConvSpec.parse(spec.descriptor) == spec == ConvSpec.from_dict(spec.to_dict())
    report = validate(compiled(spec))
    report.raise_if_failed()
    assert report.error_factor == report.worst_error == 0


@pytest.mark.parametrize(("src", "dst", "zero"), list(itertools.product(("i8", "u8"), ("i8", "u8"), (False, True))))
def test_by_hand(src: str, dst: str, zero: bool) -> None:
    """Ties, both ends of every type, and zero points at them, in whole numbers."""
    spec = ConvSpec(
        1, 1, 4, (1, 256), (1, 3), padding=((0, 0), (1, 1)), activation="none", dtype="i8", src_dtype=src,
        dst_dtype=dst, src_zero=zero, dst_zero=zero,
    )  # fmt: skip
    ends = {"src_zero": RANGES[src][0], "dst_zero": RANGES[dst][1]} if zero else {}
    stored = np.arange(256) + RANGES[src][0]
    weights = np.array([[1, 2, -1], [-2, 0, 1], [127, 127, 127], [-127, -127, -127]])
    bias, scale = np.array([1, 0, -1, 2], np.int32), np.array([0.5, -0.5, 0.75, 0.5], np.float32)
    whole = np.pad(stored - ends.get("src_zero", 0), 1)
    sums = np.stack([np.convolve(whole, row[::-1], "valid") for row in weights]) + bias[:, None]
    rounded = np.rint(sums * scale[:, None].astype(np.float64)) + ends.get("dst_zero", 0)
    by_hand = np.clip(rounded, *RANGES[dst]).astype(numpy_dtype(dst)).reshape(spec.dst_shape)
    assert (abs(sums * scale[:, None] % 1) == 0.5).any()
    assert {*RANGES[dst]} <= set(by_hand.reshape(-1).tolist())
    given: dict[str, Any] = {
        "weights": weights.astype(np.int8).reshape(spec.weights_shape),
        "bias": bias,
        "scale": scale,
        **{name: np.array([value], numpy_dtype(spec.dtypes[name])) for name, value in ends.items()},
    }
    image = stored.astype(numpy_dtype(src)).reshape(spec.src_shape)
    np.testing.assert_array_equal(compiled(spec)(image, **given), by_hand)
    np.testing.assert_array_equal(reference.run_onnxruntime(spec, image, **given), by_hand)


def test_large_weights_are_packed_beside_their_sums() -> None:
    """Two functions of weights: those that are multiplied, and what zero points add to sums."""
    spec = ConvSpec.parse("conv2d n1 ic96 oc576 i2x2 k1x1 src_zero src_u8 dst_u8 i8 nchw16c")
    validate(compile_candidate(spec, NATIVE, parse_candidate(spec, NATIVE, "cpu_direct", None), 1)).raise_if_failed()


@pytest.mark.parametrize(
    ("schedule", "channels", "more", "scales"),
    [
        ("reference", 2, "residual_u8", (0.71, 0.5)),
        ("reference", 2, "residual_u8", (2.0**30, -(2.0**21))),
        ("cpu_direct", 2, "residual_u8", (0.71, 0.5)),
        ("cpu_direct", 32, "residual_u8 nhwc", (0.71, 0.5)),
        ("cpu_direct", 32, "residual_u8 nhwc", (2.0**30, -(2.0**21))),
        ("cpu_direct", 48, "nhwc", (0.5, 0.71)),
        ("cpu_direct", 16, "nhwc", (0.5, 0.71)),
        ("cpu_direct", 32, "residual_u8 nhwc dst_nchw16c", (0.71, 0.5)),
        ("cpu_direct", 32, "nhwc dst_nchw16c", (0.5, 0.71)),
    ],
)
def test_sums_with_a_residual_by_hand(schedule: str, channels: int, more: str, scales: tuple[float, float]) -> None:
    """Every number of src beside every number of the residual, of few channels and of whole vectors."""
    spec = ConvSpec.parse(
        f"conv2d ic1 oc{channels} i256x256 k1 i8 src_u8 dst_u8 residual dst_zero clip(-90,100) nobias {more}"
    )
    low, high = RANGES[spec.residual_dtype]
    given: dict[str, Any] = {
        "weights": np.array([1, -2] * (channels // 2), np.int8).reshape(spec.weights_shape),
        "scale": np.array([1, 0.37] * (channels // 2), np.float32),
        "sum": np.array([scales[0], 40, scales[1], high - 125], np.float32),
        "dst_zero": np.array([100], np.uint8),
    }
    image = np.repeat(np.arange(256, dtype=np.uint8), 256).reshape(1, 1, 256, 256)
    residual = np.broadcast_to(np.arange(low, high + 1), (1, channels, 256, 256))
    sums = image * given["weights"].reshape(1, -1, 1, 1).astype(np.float32)
    product = np.clip(np.rint(sums * given["scale"].reshape(1, -1, 1, 1)) + 40, 0, 255).astype(np.float32)
    first, second = np.clip(given["sum"][::2], -(2.0**20), 2.0**20)
    total = (product - np.float32(40)) * first + (residual - np.float32(high - 125)).astype(np.float32) * second
    by_hand = np.rint(np.clip(total, -90, 100)) + 100
    kernel = compile_candidate(spec, NATIVE, parse_candidate(spec, NATIVE, schedule, None), 1)
    stored = spec.dst_blocks.stored(residual.astype(numpy_dtype(spec.residual_dtype)))
    found = kernel(spec.src_blocks.stored(image), residual=np.ascontiguousarray(stored), **given)
    np.testing.assert_array_equal(spec.dst_blocks.channels_first(found), by_hand)


def test_long_sums_wrap_as_those_of_onnx_runtime() -> None:
    spec = ConvSpec.parse("conv1d n1 ic100000 oc2 i2 k1 i8 src_u8 dst_i32 nobias")
    src = np.full(spec.src_shape, 255, np.uint8)
    weights = np.stack([np.full((100_000, 1), 127, np.int8), np.full((100_000, 1), -1, np.int8)])
    found = compiled(spec)(src, weights)
    np.testing.assert_array_equal(found[0, :, 0], [100_000 * 255 * 127 - 2**32, -255 * 100_000])
    np.testing.assert_array_equal(found, reference.run_onnxruntime(spec, src, weights))


def test_one_kernel_serves_every_scale_and_zero_point() -> None:
    spec = ConvSpec.parse("conv2d ic3 oc4 i5x5 k3 p1 i8 src_u8 dst_u8 src_zero dst_zero")
    kernel = compiled(spec)
    for seed in range(5):
        given: dict[str, Any] = data.float_data(spec, seed)
        np.testing.assert_array_equal(kernel(**given), reference.run_onnxruntime(spec, **given))


def test_types_and_zero_points_go_with_the_dtype() -> None:
    spec = SPECS[0]
    assert spec.with_(dtype="f32") == ConvSpec.parse("conv2d ic5 oc6 i9x9 k3 p1")
    assert spec.with_(activation="relu").src_dtype == "u8"
    plain = ConvSpec.parse("conv2d ic5 oc6 i9x9 k3 p1 i8")
    assert {"src_dtype", "weights_dtype", "dst_dtype", "src_zero"}.isdisjoint(plain.canonical)
    assert spec.key != plain.key
    assert spec.dtypes["src_zero"] == "u8" == spec.dtypes["dst_zero"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src_zero": None}, r"src_zero: expected shape \(1,\)"),
        ({"src_zero": 256}, "src_zero: expected a number of u8, found 256"),
        ({"src_zero": 0.5}, "src_zero: expected a number of u8"),
        ({"src_zero": np.zeros(1, np.int8)}, "src_zero: expected dtype uint8"),
        ({"dst_zero": np.zeros(2, np.uint8)}, r"dst_zero: expected shape \(1,\)"),
        ({"weights_zero": 0}, "weights_zero: expected none"),
        ({"zero": 0}, "zero: expected parameters among"),
    ],
)
def test_zero_points_are_checked_by_name(change: dict[str, Any], message: str) -> None:
    spec = SPECS[0]
    good = data.float_data(spec)
    del good["src"]
    kernel = compiled(spec)
    kernel.bind(**good)
    with pytest.raises(KernelError, match=message):
        kernel.bind(**good | change)


@pytest.mark.parametrize("rest", ["src_u8", "i8 dst_f32 dst_zero", "src_zero", "f16 dst_f32", "i8 weights_i32"])
def test_types_and_zero_points_are_of_integers(rest: str) -> None:
    with pytest.raises(SpecError):
        ConvSpec.parse(f"conv2d ic4 oc2 i5x5 k3 {rest}")
