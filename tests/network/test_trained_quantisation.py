"""Models that were trained with ``torch.ao``'s fake quantisation, as PyTorch exports them: networks of integers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import quantised_models

import convgen

torch = pytest.importorskip("torch")
# PyTorch's, about its own classes and its exporter: they are going to be removed, and are what people have
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SHAPE = (8, 3, 16, 16)


def trained(engine: str) -> Any:
    """A small residual network after a few steps of training with fake quantisation, batch normalisation included."""
    nn, ao = torch.nn, torch.ao.quantization

    class Net(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
            self.first = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
            )
            self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
            self.pointwise, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 3)
            self.sum = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x: Any) -> Any:
            x = self.first(self.quant(x))
            x = self.sum.add(x, self.pointwise(self.depthwise(x)))
            return self.dequant(self.head(x))

    torch.manual_seed(0)
    model = Net().train()
    for part in (model.first, model.depthwise):
        ao.fuse_modules_qat(part, [["0", "1", "2"]], inplace=True)
    # Of modules of the first version alone the exporter knows what they compute.
    model.qconfig = ao.get_default_qat_qconfig(engine, version=0)
    model = ao.prepare_qat(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(10):
        x = torch.randn(SHAPE)
        loss = ((model(x) - x.mean((1, 2, 3), keepdim=True)[:, None, :, :, 0]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().apply(ao.disable_observer)


def exported(model: Any, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tests of its modules' state, which stays as it is
        torch.onnx.export(model, (torch.randn(SHAPE),), str(path), dynamo=False, opset_version=17, input_names=["x"])
    return path


@pytest.mark.parametrize("engine", ["onednn", "x86"])
def test_a_trained_model_is_one_of_integers(tmp_path: Path, engine: str) -> None:
    """Numbers of 8 bits, and of 7, to which PyTorch has them clipped. Biases are rounded to steps of the sums: few
    outputs are a step off.
    """
    model = trained(engine)
    path = exported(model, tmp_path / "trained.onnx")
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert (operators.count("BatchNormalization"), operators.count("Clip") > 0) == (2, engine == "x86")
    network = convgen.compile(path, threads=1)
    specs = [convgen.ConvSpec.parse(layer["spec"]) for layer in network.layers() if "spec" in layer]
    assert [(spec.src_dtype, spec.weights_dtype) for spec in specs] == [("u8", "i8")] * 4
    step = float(model.head.activation_post_process.scale)
    for x in (np.random.default_rng(seed).standard_normal(SHAPE, np.float32) for seed in range(3)):
        found = np.asarray(network(x))
        assert len(np.unique(found)) > 30
        with torch.no_grad():
            modules = model(torch.from_numpy(x)).numpy()
        for wanted in (quantised_models.run(path, x), modules):
            steps = np.rint((found - wanted) / step)
            assert np.abs(steps).max() <= 1
            assert (steps == 0).mean() > 0.96
