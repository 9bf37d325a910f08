"""The layers that a bundle's runner gives cuDNN are convgen's: on the CPU, where PyTorch computes the same calls."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convgen.check.reference import run_onnxruntime
from convgen.measure.standalone import cudnn
from convgen.measure.standalone.summary import summary
from convgen.problem.spec import ConvSpec
from convgen.tuning.bundle.packing import by_cudnn

LAYERS = [
    "conv2d n2 ic6 oc9 g3 i9x8 k3x3 s2x1 p1x0 d2x1 relu residual",
    "conv1d n2 ic4 oc5 i17 k5 s2 p2",
    "conv3d n1 ic3 oc4 i4x5x6 k3x2x3 s1 p1x0x1 nobias nhwc",
    "convtranspose2d n1 ic4 oc6 g2 i5x4 k3x3 s2 p1 op1",
    "conv2d n2 ic4 oc6 i8x8 k3x3 s2 p1 data",
    "conv2d n2 ic4 oc6 i8x8 k3x3 s2 p1 nobias weights",
    "convtranspose2d n2 ic4 oc6 i5x4 k3x3 s2 p1 nobias weights",
]


@pytest.mark.parametrize("way", ["contiguous", "channels last"])
@pytest.mark.parametrize("text", LAYERS)
def test_layers_are_what_onnx_runtime_computes(text: str, way: str) -> None:
    torch = pytest.importorskip("torch")
    spec = ConvSpec.parse(text)
    layer = json.loads(json.dumps(by_cudnn(spec)))
    call = cudnn.make_call(torch, layer, way, "cpu")
    found, plain = call(), spec.with_(layout="nchw", dst_layout="nchw")
    arrays = [tensor.contiguous().numpy() for tensor in call.tensors]
    if spec.direction == "forward":
        names = ["src", "weights", *(name for name in ("bias", "residual") if layer[name])]
        given = dict(zip(names, arrays, strict=True))
    else:
        src, weights, of_dst = arrays
        given = {"src": of_dst, "weights": weights} if spec.direction == "data" else {"src": src, "residual": of_dst}
        found = found[0 if spec.direction == "data" else 1]
    expected = run_onnxruntime(plain, **given)
    np.testing.assert_allclose(found.contiguous().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_layers_that_pytorch_does_not_have_are_left_out() -> None:
    for text in (
        "conv2d n1 ic4 oc4 i8x8 k3x3 p1_0x1",
        "conv2d n1 ic4 oc4 i8x8 k3x3 gelu",
        "conv2d n1 ic4 oc4 i8x8 k1x1 i8",
    ):
        assert by_cudnn(ConvSpec.parse(text)) is None


def test_without_a_gpu_it_says_why() -> None:
    layer = by_cudnn(ConvSpec.parse(LAYERS[1]))
    assert layer is not None
    assert set(cudnn.timed(layer, 120)) == {"missing"}


def test_without_pytorch_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
    assert cudnn.main() == 0
    assert "PyTorch is not installed" in json.loads(capsys.readouterr().out)["missing"]


def test_the_summary_has_the_faster_of_cudnn_s_ways() -> None:
    trial = {"key": "k", "spec": LAYERS[0], "target": "cuda:sm_90a", "threads": 1, "schedule": "cuda_gemm", "picks": {}}
    trial |= {"group": 3, "layer": 0}
    bundle: Any = SimpleNamespace(manifest={"trials": [trial]}, feature=lambda trial: "")
    lines = [
        {"kind": "run", "facts": {"gpu": {"name": "A GPU"}}},
        {"kind": "trial", "key": "k", "outcome": "ok", "samples": [2e-3, 1e-3, 3e-3]},
        {"kind": "peer", "group": 3, "samples": {"contiguous": [5e-3, 9e-3, 1e-3], "channels last": [4e-3] * 3}},
    ]
    results: Any = SimpleNamespace(lines=lines)
    assert "cuDNN 4000.0 µs, 2.00x" in summary(bundle, results)
