"""The libraries kernels are compared with: same layer, same output, and honest figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import convgen
from convgen.errors import SpecError, UnsupportedError
from convgen.peers import PEERS, Entrant, OnnxRuntime, Peer, compare, find_peer, ratio_interval
from convgen.spec import ConvSpec
from convgen.validate import float_data, reference, tolerance, worst

SPECS = [
    "conv2d n1 ic8 oc12 i9x11 k3x3 p1x1 relu",
    "conv2d n2 ic8 oc12 g4 i9x11 k3x2 s2x1 p1_2x0_1 residual silu",
    "conv2d n1 ic8 oc8 g8 i9x9 k3x3 p1x1 nobias clip(0,6) nhwc",
    "conv1d n1 ic6 oc4 i40 k5 d2 p0_2 leaky_relu(0.1)",
    "conv3d n1 ic4 oc8 i5x6x7 k2x3x3 hardsigmoid",
    "conv2d n1 ic8 oc8 i9x9 k1x1 residual gelu nhwc",
    "convtranspose1d n1 ic8 oc12 i30 k5 s3 p0_2 elu(0.5)",
    "convtranspose2d n1 ic8 oc12 g2 i9x11 k3x4 s2x3 p1_0x0_2 op1x1 prelu",
    "convtranspose3d n1 ic4 oc4 i4x5x6 k3x3x3 s2x2x2 gelu_tanh",
]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("descriptor", SPECS)
def test_every_way_computes_the_layer(name: str, descriptor: str) -> None:
    if PEERS[name].version() is None:
        pytest.skip(f"{name} is not installed")
    spec = ConvSpec.parse(descriptor)
    data = float_data(spec)
    expected, bound = reference(spec, data), tolerance(spec.with_(accuracy="relaxed"), data)
    entrants = PEERS[name]().entrants(spec, data, threads=1)
    assert entrants
    for entrant in entrants:
        with entrant.context():
            entrant.run()
            output = entrant.output()
        assert output.shape == spec.dst_shape
        assert worst(np.abs(output - expected), bound) <= 1, entrant.way


class Fake(Peer):
    name, package = "fake", "fake"

    @classmethod
    def version(cls) -> str | None:
        return "1.0"

    def entrants(self, spec: ConvSpec, data: Any, threads: int) -> list[Entrant]:
        (right,) = OnnxRuntime().entrants(spec, data, threads)
        return [right, Entrant("wrong", lambda: None, lambda: np.zeros(spec.dst_shape, np.float32))]


class Broken(Fake):
    def entrants(self, spec: ConvSpec, data: Any, threads: int) -> list[Entrant]:
        raise RuntimeError("no such\noperator")


class Missing(Fake):
    @classmethod
    def version(cls) -> str | None:
        return None


def test_compare_times_only_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peer in {"fake": Fake, "broken": Broken, "missing": Missing}.items():
        monkeypatch.setitem(PEERS, name, peer)
    kernel = convgen.build("conv1d n1 ic4 oc4 i20 k3 p1", threads=1, records=False)
    names = ["missing", "onnxruntime", "fake", "broken"]
    found = compare({"convgen": kernel}, names, 1, rounds=3, rest=0.0)
    assert [timing.name for timing in found.peers] == names
    problems = {timing.name: timing.problem for timing in found.peers}
    assert "pip install" in problems["missing"]
    assert "wrong output" in problems["fake"]
    assert problems["broken"] == "no such"
    (timed,) = [timing for timing in found.peers if timing.seconds]
    assert (timed.name, len(timed.rounds)) == ("onnxruntime", 3)
    assert found.best_peer is timed
    assert found.ratio == pytest.approx(timed.seconds / found.kernels[0].seconds)  # type: ignore[operator]
    assert compare({"convgen": kernel}, [], 1, rounds=1, rest=0.0).ratio is None


def test_compare_refuses_what_it_cannot_time() -> None:
    kernel = convgen.build("conv1d n0 ic4 oc4 i20 k3", threads=1, records=False)
    with pytest.raises(SpecError, match="at least 1"):
        compare({"convgen": kernel}, [], 1)
    with pytest.raises(UnsupportedError, match="nobody"):
        find_peer("nobody")


def test_ratio_interval() -> None:
    assert ratio_interval([2.0] * 5, [1.0] * 5) == (2.0, 2.0)
    low, high = ratio_interval([2.0, 2.1, 1.9, 2.2, 6.0, 2.0, 2.05], [1.0, 1.1, 0.9, 1.0, 1.0, 1.05, 0.95])
    assert 1.7 < low < 2.05 < high < 2.6
