"""Optimisers' steps, which PyTorch does not count where they are fused: weights are packed anew."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import convgen.torch as ours  # noqa: E402
from convgen.bridges.torch.backend import backend  # noqa: E402
from convgen.bridges.torch.steps import Steps, steps  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"), pytest.mark.timeout(600)]


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_a_compiled_model_after_fused_steps(kind: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    fast, optimizer = torch.compile(model, backend=backend), getattr(torch.optim, kind)(model.parameters(), fused=True)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=2e-5, atol=2e-5)
        before = model.weight._version, model.weight.detach().clone()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert model.weight._version == before[0]  # else this test is of nothing
        assert not torch.equal(model.weight, before[1])
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=2e-5, atol=2e-5)
    torch._dynamo.reset()


def test_a_layer_after_a_fused_step_that_changes_few_elements() -> None:
    torch.manual_seed(0)
    layer, x = ours.Conv2d(64, 64, 3), torch.randn(1, 64, 8, 8)
    mask = torch.zeros_like(layer.weight)
    mask[37, 21] = 1
    layer.weight.register_hook(lambda gradient: gradient * mask)
    optimizer = torch.optim.SGD([layer.weight], lr=5.0, fused=True)
    for _ in range(3):
        with torch.no_grad():
            wanted = nn.functional.conv2d(x, layer.weight, layer.bias)
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-2)
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()


def test_steps_are_counted_of_memory_that_they_may_change() -> None:
    """Of views into it as well; of weights without gradients where the optimiser may change these."""

    class Own(torch.optim.Optimizer):  # type: ignore[name-defined]
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> None:
            pass

    counted, (one, other) = Steps(), (nn.Parameter(torch.ones(4)) for _ in range(2))
    assert counted.of_all([one, other]) == [0, 0]
    one.grad = torch.ones(4)
    counted.count(torch.optim.SGD([one, other], lr=1.0), (), {})
    assert counted.of_all([one, one.detach()[2:], other]) == [1, 1, 0]
    counted.count(Own([other]), (), {})
    assert counted.of_all([one, other]) == [1, 2]


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # PyTorch's compiler imports one
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_compiled_is_counted(fused: bool) -> None:
    torch._dynamo.reset()
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    weight.grad = torch.ones(4, 4)
    before = steps.of(weight), weight._version
    torch.compile(optimizer.step, backend="aot_eager")()
    assert torch.equal(weight.detach(), torch.zeros(4, 4))
    assert (steps.of(weight), weight._version) != before
    torch._dynamo.reset()
