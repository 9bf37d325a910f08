"""Gradients of weights whose pieces are several images, and whose tasks have several blocks of channels."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from convgen.check.data import exact_data, float_data
from convgen.check.reference import run_onnxruntime
from convgen.hardware.target import Target, resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.lower import lower
from convgen.lowering.schedule import Candidate, Picks
from convgen.problem.spec import ConvSpec

Array = np.ndarray[Any, Any]

NATIVE, GRADIENT = resolve("cpu"), find_schedule("cpu_gradient")
#: One whose caches are so small that all is fetched ahead.
FAR = replace(NATIVE, l2=1 << 12)
#: Pixels, channels and images that no tile divides; padded and cropped ones, whose pixels do not all meet one of src.
LAYERS = [
    "conv2d n5 ic37 oc70 i7x9 k1x1 s1 p0 weights",
    "conv2d n5 ic37 oc70 i9x11 k1x1 s2 p0 nobias weights",
    "conv2d n3 ic21 oc40 i9x10 k1x1 s2x3 p0 weights nhwc",
    "conv2d n3 ic50 oc68 g2 i11x41 k1x1 s1x2 p0 weights bf16",
    "conv2d n3 ic19 oc33 i40x30 k1x1 s2x1 p0 weights",
    "conv1d n7 ic19 oc33 i83 k1 s3 p0 weights",
    "conv1d n3 ic30 oc33 i70 k1 s17 p0 weights",
    "conv3d n2 ic18 oc20 i4x5x6 k1x1x1 s2x1x2 p0 nobias weights",
    "conv2d n3 ic35 oc40 i9x10 k1x1 s1 p0 weights nhwc",
    "convtranspose2d n3 ic40 oc18 i5x6 k1x1 s2 p0 op1x1 weights",
    "conv2d n4 ic17 oc40 i6x5 k1x1 s2 p1 weights",
    "conv2d n5 ic19 oc40 i8x7 k3x3 s2 p1 weights",
]


def points(spec: ConvSpec, target: Target, count: int) -> list[Picks]:
    """Some of several images, of several blocks and of several parts."""
    rng, space = random.Random(spec.descriptor), GRADIENT.space(spec.core, target)
    found: list[Picks] = []
    wanted = [("images", 2), ("blocks", 2), ("parts", 2), ("rows", 1)] * count
    for name, least in wanted[:count]:
        drawn = (space.sample(rng) for _ in range(20000))
        good = (p for p in drawn if p[name] >= min(least, max(space.domains[name])) and is_valid(spec, target, p))
        found.append(next(good))
    return found


def is_valid(spec: ConvSpec, target: Target, picks: Picks) -> bool:
    return bool(GRADIENT.is_valid(spec.core, target, picks))  # type: ignore[attr-defined]


def computed(spec: ConvSpec, target: Target, picks: Picks, data: dict[str, Array], threads: int) -> Array:
    return np.asarray(compile_candidate(spec, target, Candidate(GRADIENT, picks), threads)(**data))


@pytest.mark.parametrize("descriptor", LAYERS)
def test_any_piece_gives_what_onnx_runtime_does(descriptor: str) -> None:
    spec = ConvSpec.parse(descriptor)
    data = exact_data(spec)
    expected = run_onnxruntime(spec, data["src"], residual=data["residual"])
    for target, picks in zip((NATIVE, FAR) * 2, points(spec, NATIVE, 4), strict=True):
        np.testing.assert_array_equal(computed(spec, target, picks, data, 2), expected, str(picks))


@pytest.mark.parametrize("descriptor", LAYERS[:3])
def test_threads_change_no_bit(descriptor: str) -> None:
    spec = ConvSpec.parse(descriptor)
    data, picks = float_data(spec), points(spec, NATIVE, 1)[0]
    one, two = (computed(spec, FAR, picks, data, threads) for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("descriptor", [LAYERS[0], LAYERS[1], LAYERS[2], LAYERS[8]])
def test_what_comes_from_afar_is_fetched(descriptor: str) -> None:
    """Of src too, where a pixel meets one of its."""
    spec, buffers = ConvSpec.parse(descriptor), []
    for target in (NATIVE, FAR):
        picks = GRADIENT.default(spec.core, target)
        text = lower(spec, target, Candidate(GRADIENT, picks)).module.script()
        buffers.append({line.split("address_of(")[1].split("[")[0] for line in text.splitlines() if "prefetch" in line})
    assert [len(names) for names in buffers] == [0, 2]


@pytest.mark.parametrize("layer", ["ic576 oc96 i14x14 k1x1", "ic256 oc512 i14x14 k1x1 s2x2"])
def test_src_of_many_images_is_read_once_or_twice(layer: str) -> None:
    """As it does not fit into the caches; and tiles have pixels enough for their sums."""
    spec, target = ConvSpec.parse(f"conv2d n64 {layer} p0 nobias weights"), resolve("cpu:znver4").on(1)
    core = spec.core
    picks = GRADIENT.default(core, target)
    tiles = -(-core.oc // picks.tile_oc)
    assert tiles // picks.blocks <= 2 <= tiles
    assert picks.images * picks.rows * core.out_spatial[-1] >= 98 or picks.images * core.out_pixels >= 98
