"""Other libraries on whole models: their profiles, and that nobody is timed who computes something else."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_network import chain_model, kernels_for

from convgen.errors import MeasureError, UnsupportedError
from convgen.formats.onnx.reader import instances_from_onnx
from convgen.measure import network_peers, networks
from convgen.measure.chain import Chain
from convgen.measure.network_model import CONVOLUTIONS, MODEL, NetworkModel, Part, Running, profiled, ready
from convgen.measure.network_peers import NETWORK_PEERS, onnxruntime_parts, openvino_parts
from convgen.measure.profiles import Profile, median_profile, onnxruntime_profiles, openvino_profile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NetworkModel:
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    chain_model(path)
    return NetworkModel(path)


def event(name: str, ts: int, dur: int, op: str = "", cat: str = "Node") -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"op_name": op} if op else {}}


def test_a_profile_of_onnxruntime() -> None:
    events = [
        event("session_initialization", 0, 50, cat="Session"),
        event("model_run", 200, 90, cat="Session"),
        event("model_run", 100, 80, cat="Session"),
        event("a_kernel_time", 105, 10, "FusedConv"),
        event("a_fence_before", 104, 7, "FusedConv"),
        event("b_kernel_time", 120, 3, "ReorderOutput"),
        event("c_kernel_time", 130, 20, "ConvTranspose"),
        event("d_kernel_time", 160, 5, "Convert"),
        event("e_bn_nchwc_kernel_time", 170, 2, "Conv"),  # a batch normalisation
        event("a_kernel_time", 205, 40, "FusedConv"),
    ]
    first, second = onnxruntime_profiles(events)
    assert astuple(first) == pytest.approx((30e-6, 3e-6, 7e-6, 2))
    assert astuple(second) == pytest.approx((40e-6, 0, 0, 1))
    with pytest.raises(MeasureError, match="model_run"):
        onnxruntime_profiles(events[:1])


def test_a_profile_of_openvino() -> None:
    kinds = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "Deconvolution", "Reorder", "Convert", "Add")
    found = openvino_profile([(kind, 1e-3) for kind in kinds])
    assert astuple(found) == pytest.approx((4e-3, 1e-3, 2e-3, 4))
    with pytest.raises(MeasureError, match="executed"):
        openvino_profile([])


def test_medians_of_profiles() -> None:
    profiles = [Profile(seconds, 2 * seconds, 0.0, int(seconds)) for seconds in (5.0, 1.0, 3.0)]
    assert median_profile(profiles) == Profile(3.0, 6.0, 0.0, 1)


@pytest.mark.parametrize("parts", [onnxruntime_parts, openvino_parts])
def test_a_library_finds_the_models_convolutions(model: NetworkModel, parts: Any) -> None:
    pytest.importorskip("openvino")
    for part in parts(model, 1):
        assert part.problem == ""
        assert part.contestant is not None
        if part.what == MODEL:
            assert part.error < 0.1
            part.contestant.entrant.run()
        else:
            assert part.contestant.entrant.turn() > 0
            assert part.profiles[0].nodes == 4


def test_a_library_that_crashes_leaves_the_others(model: NetworkModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crashing:
        status = -11

        def call(self, *arguments: Any) -> str:
            raise ChildProcessError

        def stop(self) -> None: ...

    monkeypatch.setattr(network_peers, "Worker", Crashing)
    (part,) = openvino_parts(model, 1)
    assert part.problem == "its compiler crashes: Segmentation fault"
    assert part.contestant is None


def test_a_wrong_library_is_not_timed(model: NetworkModel) -> None:
    (expected,) = model.expected.values()

    def running(outputs: Any) -> Part:
        return ready(model, Part("fake", "1.0"), lambda: Running(lambda: None, lambda: outputs))

    assert "differ by 0.5" in running([1.5 * expected]).problem
    assert "expected 576 elements" in running([expected[:, :1]]).problem
    assert "not finite" not in running([np.full_like(expected, np.nan)]).problem
    assert running([np.full_like(expected, np.nan)]).contestant is None
    assert running([expected]).contestant is not None
    assert "not installed" in ready(model, Part("fake", None), lambda: Running(list, list)).problem
    assert profiled(Part("fake", "1.0", CONVOLUTIONS), lambda: Profile(0, 0, 1, 0)).problem.endswith("no convolution")


def test_a_comparison(model: NetworkModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_model: NetworkModel, _threads: int) -> list[Part]:
        return [Part("broken", "1.0", problem="it broke")]

    monkeypatch.setitem(NETWORK_PEERS, "broken", broken)
    layers = instances_from_onnx(model.path)
    chain = Chain(layers, kernels_for(layers))
    found = networks.compare_network(model, chain, ["onnxruntime", "broken"], 1, rounds=2)
    assert found.best == "onnxruntime"
    assert len(found.rounds) == 2
    whole, inside, failed = found.parts
    assert (whole.what, inside.what, failed.problem) == (MODEL, CONVOLUTIONS, "it broke")
    assert found.ratio == pytest.approx((inside.seconds or 0) / found.seconds)
    assert inside.to_dict()["profile"]["nodes"] == 4
    assert networks.compare_network(model, chain, ["broken"], 1, rounds=1).ratio is None
    with pytest.raises(UnsupportedError, match="peers"):
        networks.compare_network(model, chain, ["none"], 1)


def test_inputs_that_cannot_be_made(tmp_path: Path) -> None:
    path = tmp_path / "strange.onnx"
    chain_model(path, strange=True)
    with pytest.raises(UnsupportedError, match=r"strange.onnx: expected a model that ONNX Runtime can run"):
        _ = NetworkModel(path).inputs
    chain_model(path)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.save(model, path)
    with pytest.raises(
        UnsupportedError, match=r"x: expected a tensor of f32, .* of known shape, found .* \['N', 3, 12, 12\]"
    ):
        _ = NetworkModel(path).inputs
    assert NetworkModel(path, {"N": 1}).inputs["x"].shape == (1, 3, 12, 12)
