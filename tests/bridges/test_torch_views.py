"""Views that networks and PyTorch read: by exported programs and by ``torch.compile``, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from onnx_reference import Reference  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from convgen.bridges.torch import backend as module  # noqa: E402
from convgen.bridges.torch.exported import TorchProgram  # noqa: E402
from convgen.bridges.torch.program import Program  # noqa: E402

# Of PyTorch, about itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Model(nn.Module):
    """A function of layers and an image [2, 4, 6, 6]."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.first, self.second, self.linear = nn.Conv2d(4, 8, 1), nn.Conv2d(3, 8, 1), nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def check(function: Callable[[Any, Tensor], Any], monkeypatch: pytest.MonkeyPatch, networks: int) -> None:
    """By both ways results and strides are PyTorch's, by as many networks."""
    torch.manual_seed(0)
    model, x = Model(function).eval(), torch.randn(2, 4, 6, 6)
    exported = TorchProgram(torch.export.export(model, (x,)), Reference, "network")  # type: ignore[arg-type]
    found: list[Program[Any]] = []

    def program(*args: Any, **options: Any) -> Program[Any]:
        found.append(Program(*args, **options))
        return found[-1]

    monkeypatch.setattr(module, "Program", program)
    monkeypatch.setattr(module, "compile_model", lambda model, *_, **__: Reference(model))
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(x)
        results = [exported(x), torch.compile(model, backend=module.backend)(x)]
    torch._dynamo.reset()
    for made in results:
        torch.testing.assert_close(made, wanted, rtol=2e-5, atol=2e-5, check_stride=True)
    assert [len(exported.networks), *(len(one.networks) for one in found)] == [networks, networks]


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda y: y[:, 2:6],
    "steps": lambda y: y[:, :, ::2],
    "select": lambda y: y[:, 3],
    "chunk": lambda y: y.chunk(2, 1)[1],
    "split": lambda y: y.split([3, 5], 1)[0],
    "unbind": lambda y: y.unbind(1)[2],
    "narrow": lambda y: y.narrow(3, 1, 4),
    "transpose": lambda y: y.transpose(1, 3),
    "expand": lambda y: y[:, :1].expand(-1, 3, -1, -1),
    "views of views": lambda y: y.reshape(2, 2, 4, 36).permute(1, 0, 3, 2).unbind(0)[1].transpose(1, 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_that_networks_and_pytorch_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = VIEWS[name]

    def function(model: Any, x: Tensor) -> Any:
        made = view(model.first(x))
        return made.cumsum(1), made.argmax(1), made.relu()

    check(function, monkeypatch, 1)


def _later(model: Any, x: Tensor) -> Tensor:
    """Slices that what lies behind an unknown operator reads, with no product beside it."""
    y = model.first(x)
    made: Tensor = (y[:, :4] + y[:, 4:].cumsum(1)).relu()
    return made


def _other_network(model: Any, x: Tensor) -> Any:
    """A slice that another network reads."""
    y = model.first(x)
    return model.second(y[:, :3] + y.cumsum(1)[:, :3])


def _returned(model: Any, x: Tensor) -> Any:
    """A slice that is returned, and read by the same network."""
    part = model.first(x)[:, :3]
    return part, model.second(part)


def _thirds(model: Any, x: Tensor) -> Any:
    """Three of [2, 24, 6]."""
    return model.linear(x.flatten(1, 2)).split(6, 2)


def _masked(model: Any, x: Tensor) -> Any:
    q, k, v = _thirds(model, x)
    future = torch.ones(q.shape[1], q.shape[1]).triu(1).bool()
    return (q @ k.transpose(1, 2)).masked_fill(future, -1e9).softmax(-1) @ v


def _attention(model: Any, x: Tensor) -> Any:
    q, k, v = (one.view(2, 24, 2, 3).transpose(1, 2) for one in _thirds(model, x))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 24, 6)


def _unbound(model: Any, x: Tensor) -> Any:
    q, k, v = model.linear(x.flatten(1, 2)).reshape(2, 24, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 24, 6)


MODELS: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    "read later": (_later, 1),
    "read by another network": (_other_network, 2),
    "returned": (_returned, 1),
    "masked attention": (_masked, 2),
    "attention": (_attention, 1),
    "attention of what is unbound": (_unbound, 1),
    "attention without heads": (lambda model, x: F.scaled_dot_product_attention(*_thirds(model, x)), 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_with_views(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(MODELS[name][0], monkeypatch, MODELS[name][1])
