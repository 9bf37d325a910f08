"""Several convolutions of PyTorch in a row, padding before them, and hooks: as PyTorch itself computes them."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import convgen
from convgen.check.reference import run_onnxruntime
from convgen.errors import UnsupportedError
from convgen.formats.pytorch import arrays_from_torch, layers_from_torch, spec_from_torch

torch: Any = pytest.importorskip("torch")
nn = torch.nn

# PyTorch's, about its speed
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def computed(module: Any, x: Any) -> Any:
    """What the layers of a module compute one after another, by ONNX Runtime."""
    found = x.numpy()
    for layer in layers_from_torch(module, x.shape, arrays=True):
        found = run_onnxruntime(layer.spec, found, **layer.arrays, threads=1)
    return found


def check(module: Any, *shape: int) -> None:
    module.eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(x).numpy()
    found = computed(module, x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1, (2, 0), "same", "valid"])
@pytest.mark.parametrize(
    "pads",
    [
        [nn.ZeroPad2d(1)],
        [nn.ZeroPad2d((0, 1, 2, 3))],
        [nn.ConstantPad2d((3, 0, 1, 0), 0.0)],
        [nn.ZeroPad2d(1), nn.Identity(), nn.ConstantPad2d((0, 2, 1, 0), -0.0)],
    ],
)
def test_zeros_before_a_convolution(pads: list[Any], padding: Any) -> None:
    check(nn.Sequential(*pads, nn.Conv2d(3, 4, (3, 2), padding=padding, dilation=(1, 2))), 2, 3, 7, 8)


def test_zeros_of_other_ranks() -> None:
    check(nn.Sequential(nn.ConstantPad1d((1, 2), 0), nn.Conv1d(3, 4, 3)), 2, 3, 9)
    check(nn.Sequential(nn.ConstantPad3d((1, 2, 3, 0, 0, 1), 0), nn.Conv3d(3, 4, 3)), 1, 3, 4, 5, 6)


def test_several_convolutions() -> None:
    block = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    module = nn.Sequential(
        nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3, stride=2), nn.PReLU(4), block, nn.Dropout(), nn.ConvTranspose2d(6, 5, 2, 2)
    )
    check(module, 2, 3, 11, 13)
    layers = layers_from_torch(module, (2, 3, 11, 13), layout="nhwc")
    assert [layer.name for layer in layers] == ["1", "3.0", "5"]
    assert [layer.arrays for layer in layers] == [{}, {}, {}]
    assert all(layer.spec.layout == "nhwc" for layer in layers)
    with pytest.raises(UnsupportedError, match=r"3\.0 \(Conv2d\): expected one convolution \(layers_from_torch reads"):
        spec_from_torch(module, (2, 3, 11, 13))


def test_the_layers_compute_the_module() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(1, 3, 8, 8)
    found = x
    for layer in layers_from_torch(module, x.shape, arrays=True):
        found = convgen.build(layer.spec, threads=1, records=False).bind(**layer.arrays)(found)
    assert torch.allclose(found, module(x), atol=1e-5)


def double(module: Any, given: Any, *rest: Any) -> Any:
    return rest[0] * 2 if rest else None


def hooked(module: Any, how: str) -> Any:
    getattr(module, f"register_forward_{how}")(double)
    return module


class Doubled(nn.Conv2d):  # type: ignore[name-defined]
    def __call__(self, x: Any) -> Any:
        return super().__call__(x) * 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.Sequential(nn.ConstantPad2d(1, 1.0), nn.Conv2d(3, 4, 3)),
            r"0 \(ConstantPad2d\): value: expected 0, found 1",
        ),
        (nn.Sequential(nn.ConstantPad2d(1, float("nan")), nn.Conv2d(3, 4, 3)), "value: expected 0, found nan"),
        (nn.Sequential(nn.ZeroPad2d((-1, 0, 0, 0)), nn.Conv2d(3, 4, 3)), "padding: expected no negative one"),
        (
            nn.Sequential(nn.ZeroPad2d(1), nn.ConvTranspose2d(3, 4, 3)),
            "expected Conv2d after it, found ConvTranspose2d",
        ),
        (nn.Sequential(nn.ConstantPad1d(1, 0), nn.Conv2d(3, 4, 3)), "expected Conv1d after it, found Conv2d"),
        (
            nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3)),
            r"0 \(ReflectionPad2d\): expected a convolution .*, or zeros as padding",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ZeroPad2d(1)), "expected a convolution after it, found none"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ZeroPad2d(1), nn.ReLU()), r"2 \(ReLU\): expected a convolution"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)),
            r"1 \(MaxPool2d\): expected BatchNorm",
        ),
        (hooked(nn.Conv2d(3, 4, 3), "hook"), "Conv2d: expected no forward hook, found double"),
        (hooked(nn.Conv2d(3, 4, 3), "pre_hook"), "Conv2d: expected no forward pre-hook, found double"),
        (hooked(nn.Sequential(nn.Conv2d(3, 4, 3)), "hook"), "Sequential: expected no forward hook, found double"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), hooked(nn.ReLU(), "hook")), r"1 \(ReLU\): expected no forward hook"),
        (Doubled(3, 4, 3), "Doubled: expected a convolution of torch.nn with its own forward"),
        (
            nn.Conv2d(3, 4, 3, dtype=torch.complex64),
            "dtype: expected one of float32, float16, bfloat16, found complex64",
        ),
    ],
)
def test_what_changes_the_result_is_read_or_refused(module: Any, message: str) -> None:
    for read in (lambda: spec_from_torch(module, (1, 3, 8, 8)), lambda: layers_from_torch(module, (1, 3, 8, 8))):
        with pytest.raises(UnsupportedError, match=message):
            read()


def test_hooks_of_pytorch_s_own_are_known() -> None:
    lazy = nn.LazyConv2d(4, 3)
    assert spec_from_torch(lazy, (1, 3, 8, 8)).ic == 3
    prune = importlib.import_module("torch.nn.utils.prune")
    pruned = prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5)
    weights = arrays_from_torch(pruned)["weights"]
    assert (weights == 0).mean() == 0.5
    np.testing.assert_array_equal(weights, pruned.weight.detach().numpy())
