"""The bilinear algorithms of cpu_winograd: exact identities, and what an accuracy class admits."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from tvm import tirx

from convgen.api import build
from convgen.check.bounds import reference
from convgen.check.validate import validate
from convgen.cpu.vector import Block
from convgen.cpu.winograd import Grid, tile_sizes, transformed, transformed_axes, transformed_axis
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.schedule import Candidate
from convgen.lowering.winograd import ADMITTED, POINTS, admitted, strided, toom_cook, transposed
from convgen.problem.spec import ConvSpec

NATIVE = resolve("cpu")
WINOGRAD = find_schedule("cpu_winograd")

Matrix = list[list[Fraction]]


def times(matrix: Matrix, vector: list[Fraction]) -> list[Fraction]:
    return [sum((a * b for a, b in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]


def bilinear(back: Matrix, weights: Matrix, inputs: Matrix, d: list[Fraction], g: list[Fraction]) -> list[Fraction]:
    """Aᵀ[(G g) · (Bᵀ d)], exactly."""
    return times(back, [a * b for a, b in zip(times(weights, g), times(inputs, d), strict=True)])


def integers(rng: random.Random, count: int) -> list[Fraction]:
    return [Fraction(rng.randint(-9, 9)) for _ in range(count)]


def sizes() -> list[tuple[int, int, int]]:
    """Every (m, kernel, stride) that there are points for."""
    found = itertools.product(range(1, 8), range(1, 9), range(1, 5))
    return [(m, k, s) for m, k, s in found if m + -(-k // s) - 2 <= len(POINTS)]


@pytest.mark.parametrize(("m", "r"), [(m, k) for m, k, s in sizes() if s == 1])
def test_toom_cook_is_a_correlation_with_the_fewest_products(m: int, r: int) -> None:
    back, weights, inputs = toom_cook(m, r)
    assert len(weights) == len(inputs) == m + r - 1
    rng = random.Random(m * 10 + r)
    d, g = integers(rng, m + r - 1), integers(rng, r)
    assert bilinear(back, weights, inputs, d, g) == [sum(d[i + t] * g[t] for t in range(r)) for i in range(m)]


def test_strided_is_the_strided_correlation() -> None:
    rng = random.Random(0)
    for m, k, s in sizes():
        matrices = strided(m, k, s)
        d, g = integers(rng, s * (m - 1) + k), integers(rng, k)
        expected = [sum(d[i * s + t] * g[t] for t in range(k)) for i in range(m)]
        assert bilinear(*matrices, d, g) == expected, (m, k, s)


def test_transposed_is_the_transposed_convolution() -> None:
    rng = random.Random(0)
    for (m, k, s), begin in itertools.product(sizes(), range(4)):
        back, weights, inputs, first = transposed(m, k, s, begin)
        values = integers(rng, 40)
        x = dict(zip(range(-20, 20), values, strict=True))  # more than any tile reads
        g = integers(rng, k)
        d = [x[first + i] for i in range(len(inputs[0]))]
        expected = [
            sum((g[t] * x[(o + begin - t) // s] for t in range(k) if (o + begin - t) % s == 0), Fraction(0))
            for o in range(m * s)
        ]
        assert bilinear(back, weights, inputs, d, g) == expected, (m, k, s, begin)


@pytest.mark.parametrize(
    ("kernel", "stride", "m", "products"),
    [(3, 1, 2, 4), (3, 1, 4, 6), (3, 2, 2, 5), (3, 2, 4, 9), (5, 2, 4, 11), (7, 2, 3, 11), (4, 2, 3, 8)],
)
def test_a_stride_costs_the_products_of_its_phases(kernel: int, stride: int, m: int, products: int) -> None:
    assert len(strided(m, kernel, stride)[1]) == products


@pytest.mark.parametrize("accuracy", ADMITTED)
@pytest.mark.parametrize("taps", range(1, 8))
def test_an_accuracy_class_admits_tiles_within_its_points(accuracy: str, taps: int) -> None:
    most, points = ADMITTED[accuracy]
    for m in admitted(accuracy, taps):
        assert m <= most
        assert m + taps - 1 <= points <= len(POINTS) + 1


#: One layer for each kind of transform, its channels and tiles one off.
LAYERS = [
    "conv2d n1 ic17 oc33 i15x18 k3x3 s2 p1 relu",
    "conv2d n2 ic33 oc17 i15x14 k3x3 s2x1 p1x0 nhwc residual",
    "conv2d n1 ic16 oc16 i13x14 k5x5 s2 p2",
    "conv2d n1 ic17 oc18 i13x14 k7x7 s2 p3 relaxed",
    "conv2d n1 ic17 oc16 i11x9 k5x5 s1 p2",
    "conv2d n1 ic16 oc17 i9x9 k7x7 s1 p3",
    "conv2d n1 ic17 oc17 i9x10 k2x2 s1 p0_1",
    "conv2d n1 ic17 oc17 i9x30 k1x7 s1 p0x3",
    "conv2d n1 ic17 oc17 i30x9 k7x1 s1 p3x0 bf16",
    "conv2d n1 ic17 oc17 i17x19 k3x3 s1 p2 d2 gelu",
    "conv1d n1 ic17 oc33 i99 k3 s2 p1 silu",
    "conv1d n2 ic17 oc33 i50 k3 s1 p4 d4 nhwc",
    "conv3d n1 ic17 oc17 i3x7x9 k3x3x3 s2 p1",
    "conv3d n2 ic17 oc18 i2x7x9 k4x3x3 s1 p3_2x1x1",  # the depth is shorter than the kernel
    "conv3d n1 ic16 oc16 i4x8x8 k1x3x3 s2x1x1 p1_0x1x1",  # planes that lie in padding, and meet no tap
    "conv3d n2 ic17 oc48 i4x8x8 k1x3x3 s1 p3_0x1x0_1",
    "convtranspose2d n1 ic17 oc33 i5x7 k4x4 s2 p1 relu",
    "convtranspose2d n2 ic16 oc17 i7x5 k3x3 s2 p1 op1 nhwc residual",
    "convtranspose1d n1 ic17 oc33 i37 k4 s2 p1 gelu relaxed",
    "convtranspose2d n1 ic17 oc17 i6x5 k3x3 s1 p1 f16",
]


def check_tiles(descriptor: str, tiles: int) -> None:
    """The kernels of the default and of a point for each of the largest tiles keep their bounds."""
    spec, rng = ConvSpec.parse(descriptor), random.Random(descriptor)
    space = WINOGRAD.space(spec.core, NATIVE)
    chosen = {WINOGRAD.default(spec.core, NATIVE)}
    for m in sorted(space.domains["tile"])[-tiles:]:
        points = (p for p in iter(lambda: space.sample(rng), None) if p.tile == m)
        chosen.add(next(p for p in points if WINOGRAD.reason_against(spec.core, NATIVE, p) is None))
    for picks in chosen:
        validate(compile_candidate(spec, NATIVE, Candidate(WINOGRAD, picks), 2)).raise_if_failed()


@pytest.mark.parametrize("descriptor", LAYERS)
def test_every_kind_of_transform_keeps_its_bound(descriptor: str) -> None:
    """The largest tile has the largest error."""
    check_tiles(descriptor, 1)


@pytest.mark.slow
@pytest.mark.parametrize("descriptor", LAYERS)
def test_every_tile_keeps_its_bound(descriptor: str) -> None:
    check_tiles(descriptor, 99)


@pytest.mark.parametrize(
    "descriptor",
    [
        "conv2d n2 ic64 oc32 g2 i9x13 k3x3 p1 residual relu",
        "conv2d n1 ic32 oc64 g4 i14x14 k3x3 p1 prelu",  # half as long vectors
        "conv2d n1 ic32 oc64 g2 i15x17 k5x5 s2 p2 nhwc",
        "conv3d n1 ic32 oc32 g2 i3x8x9 k3x3x3 p1",
        "conv1d n1 ic64 oc64 g2 i70 k3 p2 d2 f16",
        "conv2d n1 ic3 oc40 i9x33 k3x3 p1",
        "conv2d n1 ic5 oc16 i12x9 k3x3 p1 nhwc relu",
    ],
)
def test_groups_and_few_channels(descriptor: str) -> None:
    spec = ConvSpec.parse(descriptor)
    candidate = Candidate(WINOGRAD, WINOGRAD.default(spec.core, NATIVE))
    report = validate(compile_candidate(spec, NATIVE, candidate, threads=2))
    assert report.passed, report


@pytest.mark.parametrize(
    ("descriptor", "why"),
    [
        ("conv2d n1 ic16 oc16 i9x9 k2x2 s2", "saves enough products"),
        ("conv2d n1 ic16 oc16 i9x9 k5x5 p2 strict", "accuracy strict does not admit"),
        ("conv2d n1 ic16 oc16 i9x9 k3x3 p3", "half of their taps inside"),
        ("conv2d n1 ic16 oc16 i9x9 k3x3 s2 d2", "dilated and strided"),
        ("convtranspose2d n1 ic16 oc16 i9x9 k4x4 s2 p0 op1", "half of their taps inside"),
        ("convtranspose3d n1 ic16 oc16 i5x5x5 k4x4x4 s2 p1", "two axes where transposed"),
        ("conv2d n1 ic64 oc3 i32x32 k3x3 p1", "output channels"),
        ("conv2d n1 ic24 oc36 g2 i32x32 k3x3 p1", "groups of whole vectors"),
        ("convtranspose2d n1 ic32 oc32 g2 i9x9 k4x4 s2 p1", "groups 1 where transposed"),
    ],
)
def test_it_says_where_it_does_not_apply(descriptor: str, why: str) -> None:
    reason = WINOGRAD.reason_against(ConvSpec.parse(descriptor).core, NATIVE)
    assert reason is not None
    assert why in reason


class Folding(Block):
    """Statements of numbers that are known: no variables."""

    def let(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize(("m", "kernel", "stride"), sizes())
def test_what_rows_and_columns_share_leaves_the_product_as_it_is(m: int, kernel: int, stride: int) -> None:
    rng = random.Random(m * 100 + kernel * 10 + stride)
    back, _, inputs = strided(m, kernel, stride)
    for matrix in (back, inputs):
        values = integers(rng, len(matrix[0]))
        numbers = tuple(tuple(map(float, row)) for row in matrix)
        found = transformed(Folding(), numbers, [tirx.const(float(v), "float32") for v in values])
        assert [float(value) for value in found] == [float(v) for v in times(matrix, values)]


@pytest.mark.parametrize("descriptor", LAYERS)
def test_tiles_cover_every_pixel_once(descriptor: str) -> None:
    spec = ConvSpec.parse(descriptor).core
    for m, axis in itertools.product(tile_sizes(spec), transformed_axes(spec)):
        tiles = transformed_axis(spec, axis, m)
        pixels = [tiles.output(tile, p) for tile in range(tiles.tiles) for p in range(tiles.outputs)]
        assert sorted(pixels) == list(range(len(pixels)))
        assert len(pixels) >= spec.out_spatial[axis]
        assert tiles.ragged == (len(pixels) > spec.out_spatial[axis])
        reached = [tiles.input(tile, k) for tile in range(tiles.tiles) for k in range(tiles.extent)]
        assert max(reached) == tiles.reach(tiles.groups) - 1


def test_the_default_keeps_the_sums_of_a_block_in_the_cache() -> None:
    """Of a stem with many products per tile: at more rows they came from beyond it, a line at a time."""
    spec, target = (
        ConvSpec.parse("conv2d n1 ic3 oc64 i224x224 k7x7 s2 p3 dst_nchw16c relu"),
        resolve("cpu:znver4").on(1),
    )
    picks = WINOGRAD.default(spec.core, target)
    grid = Grid(spec.core, target, picks)
    assert 4 * grid.positions * grid.most_tiles * picks.tile_oc <= target.l2


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_one_odd_pixel_spoils_at_standard(value: float) -> None:
    """All outputs of its tiles, of 4x4 at most, and no others; at ``strict`` its own nine, as ONNX Runtime has it."""
    spec = ConvSpec.parse("conv2d n1 ic16 oc16 i24x24 k3x3 p1 nobias")
    picks = WINOGRAD.default(spec, NATIVE)
    assert max(WINOGRAD.space(spec, NATIVE).domains["tile"]) == 4
    spreading = compile_candidate(spec, NATIVE, Candidate(WINOGRAD, picks), 1)
    strict = build(spec.with_(accuracy="strict"), threads=1, records=False)
    rng = np.random.default_rng(0)
    weights, src = rng.uniform(0.5, 1, spec.weights_shape).astype(np.float32), np.ones(spec.src_shape, np.float32)
    run, exactly = spreading.bind(weights), strict.bind(weights)
    usual, edge = run(src), exactly(src)
    for y, x in itertools.product((8, 9, 11), repeat=2):
        odd = src.copy()
        odd[0, 3, y, x] = value
        changed = np.argwhere(differs(run(odd), usual).any((0, 1)))
        tiles = {(i // picks.tile, j // picks.tile) for i in range(y - 1, y + 2) for j in range(x - 1, x + 2)}
        assert {(int(i) // picks.tile, int(j) // picks.tile) for i, j in changed} == tiles
        own = np.argwhere(differs(exactly(odd), edge).any((0, 1)))
        assert {(int(i), int(j)) for i, j in own} == set(itertools.product(range(y - 1, y + 2), range(x - 1, x + 2)))
        assert len(changed) > len(own)
        with np.errstate(invalid="ignore", over="ignore"):
            expected = reference(strict.spec, {"src": odd, "weights": weights}, 1)
        np.testing.assert_array_equal(np.isfinite(exactly(odd)), np.isfinite(expected))


def differs(found: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Where two results are not the same bits."""
    return np.asarray(found.view(np.uint32) != usual.view(np.uint32))
