"""Instructions that add several products at once: which of them is used where, and that they are exact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from convgen.check.bounds import reference, tolerance, worst
from convgen.check.data import exact_data, float_data
from convgen.check.validate import validate
from convgen.cpu.operation import operation_of
from convgen.hardware.machine import machine
from convgen.hardware.target import Target, resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.lower import lower, source
from convgen.problem.dtypes import distance
from convgen.problem.spec import ConvSpec

BYTES = "conv2d ic36 oc24 i6x5 k3x3 p1 i8"
PAIRS = "conv2d ic34 oc24 i6x5 k3x3 p1 bf16"


def with_pairs() -> Target:
    """Zen 4's target, whose pairs of bf16 are faster than f32, without what Intel's processors lack."""
    target = resolve("cpu:znver4")
    config = json.loads(target.tvm_config)
    config["mattr"] = [*config["mattr"], "-sse4a"]
    isa = tuple(name for name in target.isa if name != "sse4a")
    if not set(isa) <= machine().features:
        pytest.skip("this machine has no instruction for pairs of bf16")
    return replace(target, tvm_config=json.dumps(config, sort_keys=True), isa=isa, native=True)


def native(name: str) -> Target:
    """A target whose code this machine runs; else the test is left out."""
    target = resolve(name)
    if not target.native:
        pytest.skip(f"this machine does not run code for {target}")
    return target


@pytest.mark.parametrize(
    ("model", "words", "instruction"),
    [
        ("znver4", BYTES, "vpdpbusd"),
        ("alderlake", BYTES, "vpdpbusd"),
        ("skylake-avx512", BYTES, "vpmaddwd"),
        ("haswell", BYTES, "vpmaddwd"),
        ("x86-64-v2", BYTES, "pmaddwd"),
        ("aarch64-neoverse-n1", BYTES, "sdot"),
        ("aarch64-cortex-a76", f"{BYTES} src_zero", "sdot"),
        ("aarch64-cortex-a76", f"{BYTES} src_u8 src_zero dst_u8 dst_zero", "sdot"),
        ("aarch64-cortex-a76", f"{BYTES} weights_u8", "mla"),
        ("aarch64-cortex-a76", f"{BYTES} src_u8 weights_zero", "mla"),
        ("aarch64-cortex-a72", BYTES, "mla"),
        ("znver4", PAIRS, "vdpbf16ps"),
        ("znver4", "conv2d ic34 oc24 i6x5 k3x3 p1 bf16 nhwc", "vdpbf16ps"),
    ],
)
def test_the_instruction_is_in_the_code(model: str, words: str, instruction: str) -> None:
    spec, target = ConvSpec.parse(words), resolve(f"cpu:{model}")
    text = source(lower(spec, target, parse_candidate(spec, target, "cpu_direct", None)), "asm")
    assert f"\t{instruction}\t" in text
    assert "pmaddubsw" not in text  # it saturates


def test_a_product_of_pairs_loads_its_pixel_into_all_lanes_itself() -> None:
    """Of a tile with one vector of channels, where a load more for each product would take a third longer; and sums are
    rounded by one instruction.
    """
    spec, target = ConvSpec.parse("conv2d ic32 oc32 g2 i14x14 k3x3 p1 relu bf16 nhwc"), resolve("cpu:znver4")
    text = source(lower(spec, target, parse_candidate(spec, target, "cpu_direct", None)), "asm")
    products = [line for line in text.splitlines() if "\tvdpbf16ps\t" in line]
    assert products
    assert all("{1to16}" in line for line in products)
    assert "\tvcvtneps2bf16\t" in text
    assert "\tvpmovdw\t" not in text


@pytest.mark.parametrize("model", ["znver4", "sapphirerapids"])
def test_vectors_of_whole_groups_become_bf16_by_an_instruction(model: str) -> None:
    spec, target = ConvSpec.parse("conv2d ic32 oc32 g32 i14x14 k3x3 p1 relu bf16 nhwc"), resolve(f"cpu:{model}")
    text = source(lower(spec, target, parse_candidate(spec, target, "cpu_grouped", None)), "asm")
    assert "\tvcvtneps2bf16\t" in text
    assert "\tvpmovdw\t" not in text


@pytest.mark.parametrize(
    ("words", "depth"),
    [
        ("conv2d ic34 oc24 i6x5 k3x3 nhwc bf16", 2),
        ("conv2d ic33 oc24 i6x5 k3x3 nhwc bf16", 1),  # a pair would have a channel of two pixels
        ("conv2d ic33 oc24 i6x5 k3x3 bf16", 2),
        ("conv2d ic34 oc24 i6x5 k3x3 f16", 1),
        ("conv2d ic34 oc24 i6x5 k3x3", 1),
    ],
)
def test_what_is_not_pairs_is_multiplied_in_f32(words: str, depth: int) -> None:
    assert operation_of(ConvSpec.parse(words), resolve("cpu:znver4")).depth == depth


@pytest.mark.parametrize("model", ["cpu", "cpu:alderlake", "cpu:skylake-avx512", "cpu:haswell", "cpu:x86-64-v2"])
@pytest.mark.parametrize(
    "words",
    [
        "conv2d n2 ic21 oc24 g3 i9x7 k3x3 s2x1 p1_0x1 relu i8",
        "conv1d ic70 oc20 i41 k3 d2 p2 i8 nwc",
        "conv2d ic2048 oc8 i2x3 k1 i8 nhwc",
    ],
)
def test_bytes_are_exact_with_all_vectors(model: str, words: str) -> None:
    spec, target = ConvSpec.parse(words), native(model)
    validate(compile_candidate(spec, target, parse_candidate(spec, target, "cpu_direct", None), 1)).raise_if_failed()


@pytest.mark.parametrize(
    "words", ["conv2d ic5 oc20 i9x9 k3x3 p1 i8", "conv3d ic48 oc16 i3x4x5 k2x3x3 p0x1x1 i8 nchw16c"]
)
def test_bytes_are_what_a_sum_of_integers_is(words: str) -> None:
    """By NumPy, in 64 bits: an independent reference."""
    spec = ConvSpec.parse(words).with_(bias=False)
    data = exact_data(spec)
    src = spec.src_blocks.channels_first(data["src"]).astype(np.int64)
    padded = np.pad(src, ((0, 0), (0, 0), *spec.padding))
    windows = np.lib.stride_tricks.sliding_window_view(padded, spec.kernel, tuple(range(2, padded.ndim)))
    axes: tuple[Sequence[int], Sequence[int]] = (
        (1, *range(2 + spec.rank, 2 + 2 * spec.rank)),
        tuple(range(1, 2 + spec.rank)),
    )
    sums = np.moveaxis(np.tensordot(windows, data["weights"].astype(np.int64), axes), -1, 1)
    scaled = sums * data["scale"].reshape(1, -1, *(1,) * spec.rank).astype(np.float64)
    by_hand = spec.dst_blocks.stored(np.clip(np.rint(scaled), -128, 127).astype(np.int8))
    target = resolve("cpu")
    kernel = compile_candidate(spec, target, parse_candidate(spec, target, "cpu_direct", None), 1)
    np.testing.assert_array_equal(kernel(data["src"], data["weights"], scale=data["scale"]), by_hand)


@pytest.mark.parametrize(
    "words",
    [
        "conv2d ic32 oc40 i9x9 k3x3 p1 relu residual bf16 nhwc",
        "conv2d ic31 oc24 g1 i9x7 k3x3 s2 bf16",
        "conv2d ic32 oc40 i9x9 k3x3 p1 f16 nhwc accuracy_bf16",
        "conv2d ic3 oc20 i9x7 k3x3 s2 f16 accuracy_bf16",
        "convtranspose1d ic1 oc1 i1 k1 nobias f16 accuracy_bf16",
        "convtranspose2d ic20 oc24 i5x7 k3x3 s2 f16 accuracy_bf16",
        "conv2d ic42 oc48 g3 i9x7 k3x3 p1 d2 silu bf16",
        "conv1d ic48 oc20 i33 k3 p1 bf16 nhwc",
        "conv2d ic32 oc32 i9x9 k3x3 p1 bf16 nchw16c",
        "convtranspose2d ic32 oc32 i5x6 k3x3 s2 p1 bf16",
    ],
)
def test_pairs_are_within_the_bound_of_sums_in_any_order(words: str) -> None:
    spec, target = ConvSpec.parse(words), with_pairs()
    schedule = "cpu_transposed" if spec.transposed else "cpu_direct"
    validate(compile_candidate(spec, target, parse_candidate(spec, target, schedule, None), 1)).raise_if_failed()


@pytest.mark.parametrize("words", ["conv2d ic32 oc40 i9x9 k3x3 p1 bf16 nhwc", "conv2d ic31 oc20 i9x9 k3x3 relu bf16"])
def test_accuracy_bf16_rounds_operands_alone(words: str) -> None:
    """src and dst stay f32; results are as far from f32 as rounded operands are, and no further."""
    spec = ConvSpec.parse(words).with_(dtype="f32", accuracy="bf16")
    target = with_pairs()
    kernel = compile_candidate(spec, target, parse_candidate(spec, target, "cpu_direct", None), 1)
    validate(kernel).raise_if_failed()
    data = float_data(spec)
    found, exact = kernel(**data), reference(spec, data)
    bound = tolerance(spec, data)
    assert 1e-3 < worst(distance(found, exact), bound) <= 1
    assert worst(distance(found, exact), tolerance(spec.with_(accuracy="standard"), data)) > 1
    assert not kernel.lowered.candidate.schedule.transforms


def test_bytes_have_fast_defaults_in_every_layout() -> None:
    for words in ("nchw", "nhwc", "nchw16c", "nchw8c"):
        spec = ConvSpec.parse(f"conv2d ic256 oc256 i14x14 k3x3 p1 i8 {words}")
        for model in ("znver4", "haswell", "x86-64-v2", "aarch64-cortex-a72"):
            transformed = model == "znver4" and words in ("nhwc", "nchw16c")
            expected = "cpu_winograd_integers" if transformed else "cpu_direct"
            assert default_candidate(spec, resolve(f"cpu:{model}")).schedule.id == expected


@pytest.mark.parametrize("model", ["cpu", "cpu:haswell"])
@pytest.mark.parametrize(
    "words",
    [
        "conv2d ic21 oc24 i9x7 k3x3 p1 relu i8 src_u8 src_zero dst_u8 dst_zero",
        "conv2d ic24 oc20 i9x7 k3x3 p1_0 i8 src_zero weights_zero nhwc",
        "conv2d ic64 oc40 i5x6 k1x1 i8 src_u8 src_zero dst_i32 nhwc",
        "conv2d ic32 oc32 g2 i6x7 k3x3 p1 i8 weights_u8 weights_zero dst_f32 nchw16c",
        "convtranspose2d ic24 oc20 i5x6 k3x3 s2 p1 i8 src_u8 src_zero dst_zero",
    ],
)
def test_zero_points_and_types_of_single_tensors_are_exact(model: str, words: str) -> None:
    spec, target = ConvSpec.parse(words), native(model)
    schedule = "cpu_transposed" if spec.transposed else "cpu_direct"
    validate(compile_candidate(spec, target, parse_candidate(spec, target, schedule, None), 1)).raise_if_failed()
