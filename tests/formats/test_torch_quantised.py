"""Quantised convolutions of ``torch.ao`` as layers of integers: against PyTorch's own results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import convgen
from convgen.check.reference import run_onnxruntime
from convgen.errors import SpecError, UnsupportedError
from convgen.formats.pytorch import arrays_from_torch, layers_from_torch, spec_from_torch

torch = pytest.importorskip("torch")
# PyTorch's, about its own classes: they are going to be removed, and are what people have
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def quantised(*modules: Any, shape: tuple[int, ...], training: bool = False, engine: str = "onednn") -> Any:
    """A model between quantisation and dequantisation, calibrated with random data and converted. Weights have a scale
    for each channel; with FBGEMM one.
    """
    ao = torch.ao.quantization
    torch.manual_seed(0)
    torch.backends.quantized.engine = engine
    model = torch.nn.Sequential(ao.QuantStub(), *modules, ao.DeQuantStub())
    model.qconfig = ao.get_default_qat_qconfig("onednn") if training else ao.get_default_qconfig("onednn")
    if engine == "fbgemm":
        model.qconfig = ao.QConfig(activation=model.qconfig.activation, weight=ao.default_weight_observer)
    prepared = ao.prepare_qat(model.train()) if training else ao.prepare(model.eval())
    for _ in range(3):
        prepared(torch.randn(shape))
    return ao.convert(prepared.eval())


def stored(model: Any, x: Any, count: int) -> list[Any]:
    """What the model's first ``count`` modules store, as integers."""
    found = []
    for part in list(model)[:count]:
        x = part(x)
        found.append(x.int_repr().numpy() if x.is_quantized else x.numpy())
    return found


CONVOLUTIONS: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "plain": (lambda nn: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 12, 10)),
    "strided, without a bias": (lambda nn: nn.Conv2d(8, 16, 3, stride=2, bias=False), (1, 8, 13, 11)),
    "grouped": (lambda nn: nn.Conv2d(8, 16, 3, groups=4, dilation=2), (1, 8, 12, 12)),
    "1-D": (lambda nn: nn.Conv1d(8, 16, 5, padding=2), (2, 8, 30)),
    "3-D": (lambda nn: nn.Conv3d(4, 8, 3), (1, 4, 6, 6, 6)),
}


def assert_computes(layer: Any, model: Any, shape: tuple[int, ...]) -> None:
    """What a layer of u8 by i8 gives is what its module does, to a step."""
    assert (layer.spec.src_dtype, layer.spec.weights_dtype, layer.spec.dst_dtype) == ("u8", "i8", "u8")
    src, expected = stored(model, torch.randn(shape), 2)
    found = run_onnxruntime(layer.spec, src, threads=1, **layer.arrays)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert (found == expected).mean() > 0.98
    assert found.std() > 5


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("training", [False, True], ids=["calibrated", "trained"])
def test_a_converted_convolution_computes_what_pytorch_does(name: str, training: bool) -> None:
    """But for roundings: PyTorch adds a bias of f32."""
    make, shape = CONVOLUTIONS[name]
    if training and len(shape) != 4:
        pytest.skip("torch.ao trains 2-D convolutions by itself")
    model = quantised(make(torch.nn), shape=shape, training=training)
    (layer,) = layers_from_torch(model, shape, arrays=True)
    assert_computes(layer, model, shape)


TRANSPOSED: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "1-D": (lambda nn: nn.ConvTranspose1d(8, 12, 4, stride=2, padding=1), (2, 8, 15)),
    "2-D, grouped": (
        lambda nn: nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1, groups=2),
        (1, 8, 9, 7),
    ),
    "2-D, dilated, without a bias": (lambda nn: nn.ConvTranspose2d(6, 10, 3, dilation=2, bias=False), (1, 6, 8, 8)),
    "3-D": (lambda nn: nn.ConvTranspose3d(4, 6, 3, stride=2), (1, 4, 4, 5, 5)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_convolution_computes_what_pytorch_does(name: str) -> None:
    """By FBGEMM: what PyTorch 2.13 computes by oneDNN is not what its own weights, dequantised, give."""
    make, shape = TRANSPOSED[name]
    model = quantised(make(torch.nn), shape=shape, engine="fbgemm")
    (layer,) = layers_from_torch(model, shape, arrays=True)
    assert layer.spec.transposed
    assert_computes(layer, model, shape)


def test_layers_follow_each_other() -> None:
    nn, shape = torch.nn, (1, 4, 9, 9)
    ao = torch.ao.quantization
    fused = ao.fuse_modules(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()).eval(), [["0", "1"]])
    model = quantised(fused, nn.Conv2d(8, 8, 1), nn.ReLU(), shape=shape)
    first, second = layers_from_torch(model, shape, arrays=True)
    assert [layer.spec.activation for layer in (first, second)] == ["relu", "relu"]
    assert second.spec.ic == first.spec.oc
    assert second.arrays.get("src_zero") == first.arrays.get("dst_zero")
    src, _, _, expected = stored(model, torch.randn(shape), 4)
    middle = convgen.build(first.spec, records=False)(src, **first.arrays)
    found = convgen.build(second.spec, records=False)(middle, **second.arrays)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2
    assert (found == expected).mean() > 0.95


def test_a_convolution_alone_has_no_known_input() -> None:
    conv = quantised(torch.nn.Conv2d(4, 8, 3), shape=(1, 4, 9, 9))[1]
    assert spec_from_torch(conv, (1, 4, 9, 9)).src_zero
    with pytest.raises(SpecError, match=r"Conv2d: module: expected a Quantize before it, .*, found none"):
        arrays_from_torch(conv)
    with pytest.raises(SpecError, match="input_shape: expected in_channels = 4, found 5 channels"):
        spec_from_torch(conv, (1, 5, 9, 9))
    with pytest.raises(SpecError, match="accuracy: expected standard for i8"):
        spec_from_torch(conv, (1, 4, 9, 9), accuracy="strict")


def test_what_is_not_taken_is_named() -> None:
    nn, shape = torch.nn, (1, 4, 9, 9)
    model = quantised(nn.Conv2d(4, 8, 3), shape=shape)
    with pytest.raises(UnsupportedError, match=r"Hardswish\): expected ReLU or nothing after a quantised convolution"):
        layers_from_torch(nn.Sequential(*list(model)[:2], nn.Hardswish()).eval(), shape)
    with pytest.raises(UnsupportedError, match=r"Conv2d\): padding_mode: expected 'zeros', found 'reflect'"):
        layers_from_torch(quantised(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), shape=shape), shape)
    wide = copy.deepcopy(model)
    wide[0].dtype = torch.qint32
    with pytest.raises(UnsupportedError, match=r"Quantize\): dtype: expected one of torch.quint8, torch.qint8"):
        layers_from_torch(wide, shape)
    with pytest.raises(UnsupportedError, match=r"ZeroPad2d|Conv2d"):
        layers_from_torch(nn.Sequential(model[0], nn.ZeroPad2d(1), model[1]), shape)
