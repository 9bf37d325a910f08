"""The bounds that README publishes, on data they were not made for, against PyTorch's sums in double precision."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from convgen.check.bounds import reference, tolerance, worst
from convgen.check.data import Arrays, odd_data
from convgen.check.reference import run_onnxruntime
from convgen.hardware.target import resolve
from convgen.kernel.kernel import Kernel, compile_candidate
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedule, schedules
from convgen.lowering.schedule import Candidate
from convgen.lowering.winograd import magnitudes, toom_cook
from convgen.problem.accuracy import UNIT_ROUNDOFF
from convgen.problem.spec import ConvSpec

torch = pytest.importorskip("torch", reason="PyTorch is the reference in double precision")

TARGET = resolve()

#: A layer that each transform has a form of its own for.
TRANSFORMED = [
    ("cpu_winograd", "conv2d n1 ic32 oc32 i28x28 k3x3 p1 nobias"),
    ("cpu_winograd", "conv2d n1 ic32 oc32 i29x28 k2x2 nobias nhwc"),
    ("cpu_winograd", "conv2d n1 ic16 oc32 i29x30 k5x5 s2 p2 nobias relaxed"),
    ("cpu_winograd", "conv1d n1 ic16 oc32 i131 k3 d3 p3 nobias"),
    ("cpu_winograd", "conv3d n1 ic16 oc16 i4x12x13 k3x3x3 p1 nobias relaxed"),
    ("cpu_winograd", "convtranspose2d n1 ic32 oc32 i14x15 k4x4 s2 p1 op0x1 nobias"),
    ("cpu_winograd", "convtranspose1d n1 ic16 oc16 i40 k7 s3 p2 op1 nobias relaxed"),
    ("cpu_winograd_rows", "conv1d n1 ic64 oc64 i1000 k2 nobias"),
    ("cpu_winograd_rows", "conv2d n1 ic3 oc8 i28x40 k3x5 d1x2 p1x4 nobias relaxed"),
    ("cpu_winograd", "conv2d n1 ic64 oc64 g2 i28x28 k3x3 p1 nobias"),
    ("cpu_winograd", "conv2d n1 ic64 oc32 g2 i27x28 k5x5 s2 p2 nobias relaxed"),
]


def exact(spec: ConvSpec, data: Arrays) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The layer without bias or activation, in double precision."""
    src, weights = (torch.from_numpy(data[name].astype(np.float64)) for name in ("src", "weights"))
    if spec.layout == "nhwc":
        src = src.movedim(-1, 1)
    begins, ends = ([pads[end] for pads in spec.padding] for end in (0, 1))
    if spec.transposed:
        call = getattr(torch.nn.functional, f"conv_transpose{spec.rank}d")
        whole = call(src, weights, stride=spec.stride, output_padding=spec.output_padding, groups=spec.groups)
        for axis, (begin, size) in enumerate(zip(begins, spec.out_spatial, strict=True)):
            whole = whole.narrow(2 + axis, begin, size)
        out = whole
    else:
        pads = [pad for pair in zip(begins[::-1], ends[::-1], strict=True) for pad in pair]
        call = getattr(torch.nn.functional, f"conv{spec.rank}d")
        out = call(
            torch.nn.functional.pad(src, pads), weights, stride=spec.stride, dilation=spec.dilation, groups=spec.groups
        )
    return np.asarray((out.movedim(1, -1) if spec.layout == "nhwc" else out).numpy())


def built(spec: ConvSpec, name: str) -> Kernel:
    chosen = schedule(name)
    return compile_candidate(spec, TARGET, Candidate(chosen, chosen.default(spec.core, TARGET)), 2)


def of_bound(spec: ConvSpec, data: Arrays, output: np.ndarray[Any, Any], bound: np.ndarray[Any, Any]) -> float:
    """The largest error as a fraction of its bound, where something is promised."""
    judged = np.isfinite(bound)
    with np.errstate(invalid="ignore"):
        error = np.abs(output.astype(np.float64) - exact(spec, data))
    return worst(error[judged].astype(np.float32), bound[judged])


def he(spec: ConvSpec, seed: int) -> Arrays:
    """Ordinary layers' data: normal pixels, and weights as He's initialisation makes them."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(spec.weights_shape) * np.sqrt(2 / spec.reduction_length)
    return {
        "src": rng.standard_normal(spec.src_shape).astype(np.float32),
        "weights": weights.astype(np.float32),
    }


def bright(spec: ConvSpec, data: Arrays, times: float) -> Arrays:
    """The data with twelve pixels so many times brighter."""
    rng = np.random.default_rng(1)
    src = data["src"].copy()
    pixels = np.moveaxis(src, -1, 1) if spec.layout == "nhwc" else src
    for _ in range(12):
        at: tuple[Any, ...] = tuple(int(rng.integers(size)) for size in pixels.shape[2:])
        pixels[(slice(None), slice(None), *at)] *= times
    return data | {"src": src}


def kinds(spec: ConvSpec) -> dict[str, Arrays]:
    even = he(spec, 0)
    rng = np.random.default_rng(2)
    pruned = np.where(rng.random(spec.weights_shape) < 0.9, 0, even["weights"]).astype(np.float32)
    first = even["weights"].copy()
    first[(..., 0)] = 0
    blank = even["src"].copy()
    blank[(..., slice(None, blank.shape[-1] // 2))] = 0
    found = {
        "bright": bright(spec, even, 1e4),
        "brighter": bright(spec, even, 1e6),
        "pruned": bright(spec, even | {"weights": pruned}, 1e4),
        "a tap of zeros": bright(spec, even | {"weights": first}, 1e5),
        "half blank": even | {"src": blank},
        "subnormal": even | {"src": even["src"] * np.float32(1e-39)},
        "subnormal weights": even | {"weights": even["weights"] * np.float32(1e-38)},
    }
    return found | {f"odd {seed}": odd_data(spec, seed) for seed in range(6)}


@pytest.mark.parametrize(("name", "descriptor"), TRANSFORMED)
def test_a_transform_keeps_its_bound_on_any_data(name: str, descriptor: str) -> None:
    spec = ConvSpec.parse(descriptor)
    kernel = built(spec, name)
    for kind, data in kinds(spec).items():
        bound = tolerance(spec, data, kernel.lowered)
        output = kernel.bind(data["weights"])(data["src"])
        assert of_bound(spec, data, output, bound) <= 1, kind


@pytest.mark.parametrize(("name", "descriptor"), [TRANSFORMED[0], TRANSFORMED[7], TRANSFORMED[9]], ids=str)
def test_but_not_the_bound_of_plain_sums(name: str, descriptor: str) -> None:
    """So the one that is published for it has to be another."""
    spec = ConvSpec.parse(descriptor)
    kernel = built(spec, name)
    data = kinds(spec)["a tap of zeros" if spec.kernel[-1] > 1 else "brighter"]
    output = kernel.bind(data["weights"])(data["src"])
    assert of_bound(spec, data, output, tolerance(spec, data)) > 20


@pytest.mark.parametrize(
    "descriptor",
    [
        "conv2d n1 ic64 oc64 i28x28 k3x3 p1 nobias strict nhwc",
        "conv1d n1 ic64 oc64 i256 k3 p1 nobias strict",
        "conv2d n1 ic64 oc64 g64 i28x28 k3x3 p1 nobias strict",
        "conv2d n1 ic64 oc64 g4 i28x28 k3x3 p1 nobias strict",
        "convtranspose2d n1 ic32 oc32 i14x14 k4x4 s2 p1 nobias strict",
        "conv2d n1 ic32 oc32 i28x28 k2x2 nobias strict nhwc",
        "conv2d n1 ic64 oc64 i55x55 k2x2 nobias strict",
        "conv1d n1 ic64 oc64 i1000 k2 nobias strict",
        "conv2d n1 ic64 oc64 i14x14 k1x1 nobias strict",
    ],
)
def test_strict_has_the_error_of_plain_sums_on_any_data(descriptor: str) -> None:
    spec = ConvSpec.parse(descriptor)
    kernel = compile_candidate(spec, TARGET, default_candidate(spec, TARGET), 2)
    for kind, data in kinds(spec).items():
        bound = tolerance(spec, data)
        output = kernel.bind(data["weights"])(data["src"])
        assert of_bound(spec, data, output, bound) <= 1, kind
        assert of_bound(spec, data, run_onnxruntime(spec, data["src"], data["weights"]), bound) <= 1, kind


@pytest.mark.parametrize(
    "descriptor", ["conv2d n1 ic1024 oc16 i4x4 k1x1 nobias", "conv2d n1 ic256 oc16 i7x7 k3x3 p1 nobias strict"]
)
def test_rounding_errors_that_are_all_alike_have_a_larger_bound(descriptor: str) -> None:
    """Of equal products every sum is rounded as the one before: a bound with the square root of K does not hold."""
    spec = ConvSpec.parse(descriptor)
    kernel = compile_candidate(spec, TARGET, default_candidate(spec, TARGET), 1)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(12):
        pixel, weight = rng.uniform(0.5, 2, 2).astype(np.float32)
        data = {"src": np.full(spec.src_shape, pixel), "weights": np.full(spec.weights_shape, weight)}
        found.append(of_bound(spec, data, kernel.bind(data["weights"])(data["src"]), tolerance(spec, data)))
    most = (8 + spec.reduction_length) / (8 + 2 * spec.reduction_length**0.5)
    assert 1 < max(found) <= most


@pytest.mark.parametrize(
    ("descriptor", "tile"),
    [
        ("conv1d n1 ic1 oc32 i400 k2 p1 nobias relaxed", 7),
        ("conv1d n1 ic1 oc16 i400 k3 p1 nobias relaxed", 5),
    ],
)
def test_weights_that_become_subnormal_count_as_normal(descriptor: str, tile: int) -> None:
    spec, chosen = ConvSpec.parse(descriptor), schedule("cpu_winograd_rows")
    points = (picks for picks in chosen.space(spec.core, TARGET) if picks.tile == tile)
    picks = next(picks for picks in points if chosen.reason_against(spec.core, TARGET, picks) is None)
    kernel = compile_candidate(spec, TARGET, Candidate(chosen, picks), 1)
    rng = np.random.default_rng(7)
    for i in range(40):
        src = np.zeros(spec.src_shape, np.float32)
        src[..., int(rng.integers(8)) :: 8] = 10 ** rng.uniform(5, 25)
        weights = (rng.standard_normal(spec.weights_shape) * 2.0 ** -rng.uniform(116, 149)).astype(np.float32)
        data = {"src": src, "weights": weights}
        assert of_bound(spec, data, kernel.bind(weights)(src), tolerance(spec, data, kernel.lowered)) <= 1, i


def test_strict_admits_no_transform() -> None:
    for each, where in itertools.product(schedules().values(), (TARGET, resolve("cuda:sm_80"))):
        for _, descriptor in TRANSFORMED:
            spec = ConvSpec.parse(descriptor).with_(accuracy="strict").core
            assert not each.transforms or each.reason_against(spec, where), (each.id, descriptor)


@pytest.mark.parametrize("ic", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["k2", "k3", "k4"])
def test_integers_of_few_channels_pass_their_own_check(ic: int, kernel: str) -> None:
    """Where all of a window is zero, a transform's error is not."""
    from convgen.check.validate import validate

    spec = ConvSpec.parse(f"conv1d n1 ic{ic} oc32 i200 {kernel} nobias")
    report = validate(built(spec, "cpu_winograd_rows"), seed=ic)
    report.raise_if_failed()


def test_an_empty_batch_has_an_empty_bound() -> None:
    spec = ConvSpec.parse("conv1d n0 ic16 oc16 i20 k3 silu")
    kernel = built(spec, "cpu_winograd_rows")
    assert tolerance(spec, odd_data(spec), kernel.lowered).shape == spec.dst_shape


# ---- what the bound of a transform is ------------------------------------------------------------


@pytest.mark.parametrize(("m", "taps"), [(2, 3), (4, 3), (3, 2), (6, 3), (2, 5)])
def test_magnitudes_are_those_of_the_worst_place_in_a_tile(m: int, taps: int) -> None:
    """One channel: what the algorithm adds up, from its matrices, for every place that an output can have."""
    rng = np.random.default_rng(0)
    spec = ConvSpec(1, 1, 1, (40,), (taps,), bias=False)
    src, weights = np.abs(rng.standard_normal(40)), np.abs(rng.standard_normal(taps))
    back, g, b = (np.abs(np.array(matrix, np.float64)) for matrix in toom_cook(m, taps))
    larger = magnitudes(spec, src[None, None], weights[None, None], {0: m})
    found = run_onnxruntime(larger.spec, larger.src.astype(np.float32), larger.weights.astype(np.float32))[0, 0]
    for at in range(len(found)):
        places = []
        for i in range(m):
            inputs = [src[k] if 0 <= k < 40 else 0 for k in range(at - i, at - i + m + taps - 1)]
            places.append(float(back[i] @ ((g @ weights) * (b @ inputs))))
        # Of several places' sums each element's largest is added: no less than the largest sum, and not much more.
        assert max(places) <= found[at] * (1 + 1e-5)
        assert found[at] <= m * max(places) * (1 + 1e-5)


def test_plain_sums_of_any_data_have_a_bound_in_units_of_their_products() -> None:
    spec = ConvSpec.parse("conv1d n1 ic4 oc1 i3 k1 nobias")
    data = {
        "src": np.array([[[1, 0, 1e30]] * 4], np.float32),
        "weights": np.full((1, 4, 1), 0.5, np.float32),
    }
    bound = tolerance(spec, data)[0, 0]
    np.testing.assert_allclose(bound[[0, 2]], 12 * UNIT_ROUNDOFF * np.array([2.0, 2e30]), rtol=1e-6)
    assert 0 < bound[1] < 1e-37
    huge = tolerance(spec, data | {"src": np.full(spec.src_shape, 3e38, np.float32)})
    assert np.isinf(huge).all()  # the sum of the products is no number of f32


def test_nothing_is_promised_of_sums_that_may_be_too_large_with_their_errors() -> None:
    """A product of 3.4e38 is one of 3.41e38, which is none, where a factor is rounded to bf16."""
    spec = ConvSpec.parse("conv2d n1 ic1 oc2 i1x1 k1x1 nobias accuracy_bf16")
    data = {
        "src": np.full(spec.src_shape, 3e38, np.float32),
        "weights": np.array([1.132, 0.5], np.float32).reshape(spec.weights_shape),
    }
    assert np.isfinite(reference(spec, data)).all()
    assert np.isinf(tolerance(spec, data).ravel()).tolist() == [True, False]
    assert np.isfinite(tolerance(spec.with_(accuracy="standard"), data)).all()
