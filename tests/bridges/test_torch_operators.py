"""What operators of PyTorch become: each against PyTorch, where ONNX Runtime computes what networks are read from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from onnx_reference import Reference  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

import convgen  # noqa: E402
import convgen.torch as ours  # noqa: E402
from convgen.bridges.torch.exported import TorchProgram  # noqa: E402
from convgen.errors import SpecError  # noqa: E402

# Of PyTorch, about itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class After(nn.Module):
    """A function of what a convolution gives."""

    def __init__(self, function: Callable[[Tensor], Any], rank: int = 2) -> None:
        super().__init__()
        self.function = function
        self.first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](4, 8, 1)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.first(x))


def program(module: nn.Module, *inputs: Tensor) -> TorchProgram:
    return TorchProgram(torch.export.export(module.eval(), inputs), Reference, "network")  # type: ignore[arg-type]


def check(module: nn.Module, *inputs: Tensor) -> TorchProgram:
    """Nothing of a module stays outside, and its outputs are PyTorch's."""
    made = program(module, *inputs)
    assert made.outside == {}
    with torch.no_grad():
        wanted, found = module(*inputs), made(*inputs)
    wanted, found = ([one] if isinstance(one, Tensor) else list(one) for one in (wanted, found))
    for one, other in zip(wanted, found, strict=True):
        assert other.shape == one.shape
        torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-5)
    return made


def image(rank: int = 2) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal((2, 4, 9, 12, 6)[: rank + 2]).astype(np.float32))


ROW = torch.linspace(-1, 1, 12)
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "activations": lambda x: F.mish(F.elu(F.leaky_relu(F.hardswish(F.silu(x)), 0.1), 0.5)),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "clips": lambda x: F.relu6(x) + F.hardtanh(x, -0.5, 0.7) + x.clamp(min=0.1) + x.clamp(max=0.2) + x.clamp(-1, 1),
    "hardsigmoid": lambda x: F.hardsigmoid(3 * x) * x.sigmoid() + x.tanh(),
    "functions": lambda x: (x.abs() + 1).log().exp().sqrt() + x.square().neg() + (x * x + 1).rsqrt() + x.erf(),
    "rounded": lambda x: x.floor() + x.ceil() + (x.abs() + 1).reciprocal() + x.sin() + x.cos() + F.softplus(x),
    "arithmetic": lambda x: (x * 2 - 1) / (x * x + 3) + torch.add(x, x, alpha=3) - torch.sub(x, ROW, alpha=0.5) + x**2,
    "reversed": lambda x: 2 - x + 1 / (x.abs() + 1),
    "extremes": lambda x: (
        torch.maximum(x, ROW) + torch.minimum(x, -ROW) + x.amax(3, keepdim=True) + x.amin((2, 3), True)
    ),
    "reduced": lambda x: (x.mean((2, 3)), x.sum(1), x.mean(dim=-1, keepdim=True), x.mean() * 2, x.sum()),
    "softmax": lambda x: (x.softmax(1), x.log_softmax(-1)),
    "reshaped": lambda x: (
        x.flatten(2),
        x.view(2, 2, 4, -1).unsqueeze(1),
        (x[:, :1] * 2).squeeze(1),
        x.mean((2, 3), True).squeeze(),
    ),
    "moved": lambda x: (x.permute(0, 2, 3, 1).contiguous(), x.transpose(1, 2) * 2, x.flatten(2).mT * 1),
    "joined": lambda x: (torch.cat([x, x * 2], 1), torch.stack([x, x + 1], 2).flatten(1, 2)),
    "parts": lambda x: [part * 2 for part in (*x.chunk(2, 1), *x.split([1, 3, 5], 2), x[:, 2], x[..., 1:9:3])],
    "padded": lambda x: (F.pad(x, (1, 2, 0, 3), value=0.5), F.pad(x, (-1, 1))),
    "reflected": lambda x: (F.pad(x, (2, 1, 1, 0), mode="reflect"), F.pad(x, (1, 2, 3, 4), mode="replicate")),
    "shuffled": lambda x: (F.pixel_shuffle(x, 2), F.channel_shuffle(x, 4)),
    "larger": lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, size=(18, 24), mode="bilinear"),
    "aligned": lambda x: F.interpolate(x, size=(7, 30), mode="bilinear", align_corners=True),
    "max_pool": lambda x: (F.max_pool2d(x, 3, 2, 1, ceil_mode=True), F.max_pool2d(x, (2, 3), dilation=2)),
    "avg_pool": lambda x: (F.avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)),
    "adaptive": lambda x: (
        F.adaptive_avg_pool2d(x, 1),
        F.adaptive_avg_pool2d(x, (3, 4)),
        F.adaptive_max_pool2d(x, (3, 2)),
    ),
    "expanded": lambda x: x.mean(3, keepdim=True).expand(-1, -1, -1, 5) * 2,
    "products": lambda x: x @ x.transpose(2, 3) + torch.bmm(x.flatten(0, 1), x.flatten(0, 1).mT).view(2, 8, 9, 9),
    "unbound": lambda x: [part * 2 for part in (*x.unbind(1), *x.flatten(2).unbind(-1)[:2])],
    "signs": lambda x: (3 * x).round() + x.sign() + F.selu(x) + F.celu(x, 0.7) + F.softplus(x, beta=2.5),
    "norms": lambda x: (x.norm(dim=1), x.norm(1, (2, 3), True), x.logsumexp(1), x.prod(3), x[:1, :1, :2, :2].prod()),
    "spread": lambda x: (x.var(1), x.std((2, 3), keepdim=True), x.var((0, 1), correction=0), x.std()),
    "turned": lambda x: (x.flip(1, 3), x.roll((2, -1), (1, 2)), x.repeat(1, 2, 1, 3), x[0, 0].repeat(2, 1, 1)),
    "dropped": lambda x: F.dropout(x, 0.5, training=False) + x.float().clone().detach(),
}


@pytest.mark.parametrize("how", ["nearest", "nearest-exact", "bilinear", "aligned"])
@pytest.mark.parametrize("factor", [0.4, 0.5, 1.5, 1.7, 2.0, 2.3, (1.7, 0.6)])
def test_images_resized_by_a_factor(factor: Any, how: str) -> None:
    """The factor that is given says where pixels come from, not the ratio of the whole sizes that come of it."""
    options: dict[str, Any] = {"mode": "bilinear", "align_corners": True} if how == "aligned" else {"mode": how}
    for again in (None, True):
        options["recompute_scale_factor"] = again
        module, x = After(partial(F.interpolate, scale_factor=factor, **options)), image()
        made = program(module, x)
        with torch.no_grad():
            torch.testing.assert_close(made(x), module(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function(name: str) -> None:
    check(After(FUNCTIONS[name]), image())


LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "batch_norm": (lambda: nn.BatchNorm2d(8), 2),
    "plain_batch_norm": (lambda: nn.BatchNorm1d(8, affine=False), 1),
    "group_norm": (lambda: nn.GroupNorm(2, 8), 2),
    "layer_norm": (lambda: nn.LayerNorm([9, 12]), 2),
    "instance_norm": (lambda: nn.InstanceNorm2d(8, affine=True), 2),
    "plain_instance_norm": (lambda: nn.InstanceNorm1d(8), 1),
    "glu": (lambda: nn.GLU(1), 2),
    "last_glu": (lambda: nn.GLU(), 2),
    "pixel_unshuffle": (lambda: nn.PixelUnshuffle(3), 2),
    "plain_layer_norm": (lambda: nn.LayerNorm(12, elementwise_affine=False), 2),
    "prelu": (lambda: nn.PReLU(8), 2),
    "linear": (lambda: nn.Linear(12, 5), 2),
    "linear_without_bias": (lambda: nn.Linear(9, 5, bias=False), 1),
    "conv1d": (lambda: nn.Conv1d(8, 4, 3, 2, 1, groups=2), 1),
    "conv2d": (lambda: nn.Conv2d(8, 16, (3, 2), (2, 1), (1, 0), (1, 2), groups=8, bias=False), 2),
    "conv3d": (lambda: nn.Conv3d(8, 3, 3, padding="same"), 3),
    "circular": (lambda: nn.Conv2d(8, 3, 3, padding=1, padding_mode="reflect"), 2),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, groups=2), 2),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 5, 3)), 2),
    "pool1d": (lambda: nn.Sequential(nn.MaxPool1d(3, 2), nn.AvgPool1d(2)), 1),
    "pool3d": (lambda: nn.Sequential(nn.MaxPool3d(2), nn.AvgPool3d(2)), 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str) -> None:
    make, rank = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        for tensor in (*layer.buffers(), *(layer.parameters() if "norm" in name and name != "weight_norm" else ())):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    check(After(layer, rank), image(rank))


OWN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "conv1d same": (lambda: ours.Conv1d(8, 4, 4, padding="same", dilation=3), 1),
    "conv2d": (lambda: ours.Conv2d(8, 16, (3, 2), (2, 1), (1, 0), (1, 2), groups=8, bias=False), 2),
    "conv3d": (lambda: ours.Conv3d(8, 3, 3, padding=1), 3),
    "transposed": (lambda: ours.ConvTranspose2d(8, 6, 3, 2, (1, 0), output_padding=1, groups=2), 2),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", OWN)
def test_a_layer_of_convgen_s_is_a_convolution(name: str) -> None:
    """Of a model that was trained with them: nothing stays outside, and results are those of PyTorch's own layers."""
    make, rank = OWN[name]
    torch.manual_seed(0)
    module, x = After(make(), rank), image(rank)
    made = check(module, x)
    assert ours.restore(module)
    with torch.no_grad():
        torch.testing.assert_close(made(x), module(x), rtol=2e-5, atol=2e-5)


def test_nothing_is_copied_to_change_the_order_of_axes() -> None:
    """Tensors in channels_last are given as they lie in memory; so are those that PyTorch would make so."""
    module = After(lambda x: x.relu()).to(memory_format=torch.channels_last)
    x = image().to(memory_format=torch.channels_last)
    found = check(module, x)(x)
    assert found.is_contiguous(memory_format=torch.channels_last)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "unknown": (lambda x: x.cumsum(1), "no such operator"),
    "dtype": (lambda x: x.double() * 2, "torch.float64"),
    "indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), "but the first"),
    "sizes": (lambda x: F.adaptive_avg_pool2d(x, 5), "windows of different sizes"),
    "weights": (lambda x: F.conv2d(x, x[:1, :, :3, :3]), "weight is not known beforehand"),
    "statistics": (lambda x: F.batch_norm(x, None, None, training=True), "over several images"),
    "rounding": (lambda x: x.round(decimals=2), "decimals 2"),
    "one row": (lambda x: x.roll(3), ""),
    "pixels": (lambda x: F.interpolate(x, size=(5, 7), mode="bicubic"), ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_outside_is_named_and_computed(name: str) -> None:
    function, reason = REFUSED[name]
    module, x = After(function), image()
    made = program(module, x)
    assert any(reason in text for text in made.outside.values()), made.outside
    assert len(made.networks) == 1
    with torch.no_grad():
        torch.testing.assert_close(made(x), module(x), rtol=2e-5, atol=2e-5)


def test_networks_are_as_few_as_can_be() -> None:
    """What no unknown operator separates is one network, on whichever branch it is."""

    def function(x: Tensor) -> Tensor:
        left, right = x.relu().cumsum(1), (x * 2).cumsum(2)
        late = F.conv2d(left + right, torch.ones(3, 8, 1, 1)) + F.conv2d(x, torch.ones(3, 8, 1, 1))
        return late.cumsum(1) + 1

    module, x = After(function), image()
    made = program(module, x)
    assert len(made.networks) == 2
    with torch.no_grad():
        torch.testing.assert_close(made(x), module(x), rtol=1e-5, atol=1e-4)


def test_a_program_without_a_product_is_left_alone() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() + 1

    x = image()
    made = program(Sum(), x)
    assert made.networks == []
    assert repr(made) == (
        "<TorchProgram: no network; 2 nodes left to PyTorch: relu, add: no convolution or product is beside it>"
    )
    assert all("no convolution" in reason for reason in made.outside.values())
    assert torch.equal(made(x), x.relu() + 1)


def test_an_output_may_have_an_empty_name() -> None:
    module, x = After(lambda y: {"": y, "more": y.relu()}), image()
    made = program(module, x)
    assert not made.outside
    with torch.no_grad():
        torch.testing.assert_close(made(x), module(x), rtol=2e-5, atol=2e-5)


def test_onnx_runtime_takes_no_exported_program() -> None:
    exported = torch.export.export(After(lambda y: y).eval(), (image(),))
    message = "source: expected a path or an ONNX model, found an ExportedProgram; .*torch.onnx.export"
    with pytest.raises(SpecError, match=message):
        convgen.for_onnxruntime(exported, "model.onnx")
