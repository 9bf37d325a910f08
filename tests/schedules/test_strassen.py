"""Strassen's products: the identity itself, and channels of very different size beside each other."""

from __future__ import annotations

import numpy as np
import pytest

import convgen
from convgen.check.bounds import reference, tolerance
from convgen.check.data import float_data
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.discover import schedules
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import ConvSpec
from convgen.schedules.cpu_strassen import PIXELS, WEIGHTS

#: Which of the seven products each block of the result is the sum of.
RESULT = {(0, 0): (0, 1), (0, 1): (0, 2, 5, 6), (1, 0): (0, 2, 3, 4), (1, 1): (0, 2, 3, 5)}


def test_seven_products_make_the_product_of_blocks() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 10, (2, 2, 2, 3, 3))
    products = [
        np.einsum("i,ijk->jk", factors, a.reshape(4, 3, 3)) @ np.einsum("i,ijk->jk", others, b.reshape(4, 3, 3))
        for factors, others in zip(np.array(WEIGHTS), np.array(PIXELS), strict=True)
    ]
    for (row, column), parts in RESULT.items():
        expected = a[row, 0] @ b[0, column] + a[row, 1] @ b[1, column]
        assert np.array_equal(sum(products[p] for p in parts), expected)


@pytest.mark.parametrize("lanes", ["pixels", "channels"])
def test_small_channels_do_not_drown(lanes: str) -> None:
    spec = ConvSpec.parse("conv2d n1 ic64 oc64 i9x9 k1x1 relaxed")
    target = resolve("cpu")
    schedule = schedules()["cpu_strassen"]
    space = [
        picks
        for picks in schedule.space(spec, target)
        if picks.lanes == lanes and schedule.reason_against(spec, target, picks) is None
    ]
    kernel = compile_candidate(spec, target, Candidate(schedule, space[0]), threads=1)
    data = float_data(spec)
    data["weights"][:32] *= np.logspace(-30, 0, 32, dtype=np.float32)[:, None, None, None]
    data["bias"][:] = 0
    data["weights"][40] = data["weights"][5] = 0
    y = kernel.bind(data["weights"], data["bias"])(data["src"])
    assert (y[:, [5, 40]] == 0).all()
    error = np.abs(y - reference(spec, data))
    assert (error <= tolerance(spec, data)).all()


@pytest.mark.parametrize("accuracy", ["strict", "standard"])
def test_only_relaxed_admits_it(accuracy: str) -> None:
    spec = ConvSpec.parse(f"conv2d n1 ic64 oc64 i28x28 k1x1 {accuracy}")
    reason = schedules()["cpu_strassen"].reason_against(spec, resolve("cpu"))
    assert reason is not None
    assert "accuracy" in reason
    assert convgen.build(spec).schedule != "cpu_strassen"


def test_same_weights_give_the_same_bits_in_every_channel() -> None:
    """A softmax of large equal logits depends on it: what else is the default's accuracy worth."""
    spec = ConvSpec.parse("conv2d n1 ic512 oc1000 i13x13 k1x1 relu")
    data = float_data(spec)
    data["weights"][:] = data["weights"][0]
    data["bias"][:] = 0
    y = convgen.build(spec).bind(data["weights"], data["bias"])(data["src"])
    assert (y == y[:, :1]).all()
