"""``convgen.torch``: modules and functions against PyTorch's own, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import convgen.torch as ours  # noqa: E402
from convgen.bridges.torch.convolution import convolution  # noqa: E402
from convgen.errors import SpecError  # noqa: E402
from convgen.kernel.library import BaseLibrary  # noqa: E402

CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "strided": ("Conv2d", (6, 8, 3), {"padding": 1, "stride": 2}, (2, 6, 9, 9)),
    "depthwise": ("Conv2d", (8, 8, 3), {"padding": 1, "groups": 8, "bias": False}, (2, 8, 7, 7)),
    "same": ("Conv1d", (3, 5, 3), {"padding": "same", "dilation": 2}, (2, 3, 11)),
    "circular": ("Conv2d", (4, 5, 3), {"padding": 1, "padding_mode": "circular"}, (1, 4, 6, 5)),
    "one image": ("Conv2d", (4, 5, 3), {}, (4, 6, 5)),
    "three axes": ("Conv3d", (2, 4, 3), {"padding": 1}, (1, 2, 4, 5, 6)),
    "transposed": (
        "ConvTranspose2d",
        (6, 4, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
        (2, 6, 5, 5),
    ),
    "no image": ("Conv2d", (4, 5, 3), {}, (0, 4, 6, 5)),
}


def integers(*shape: int) -> Any:
    return torch.randint(-3, 4, shape).float()


@pytest.mark.parametrize("form", ["contiguous", "channels last"])
@pytest.mark.parametrize("case", CASES)
def test_a_module_is_pytorch_s(case: str, form: str) -> None:
    name, arguments, options, shape = CASES[case]
    if form == "channels last" and len(shape) != 4:
        pytest.skip("images of two axes have such a format")
    torch.manual_seed(0)
    theirs, made = getattr(torch.nn, name)(*arguments, **options), getattr(ours, name)(*arguments, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(integers(*parameter.shape))
    made.load_state_dict(theirs.state_dict())
    x = integers(*shape)
    if form == "channels last":
        x = x.to(memory_format=torch.channels_last)
    x_theirs, x_made = (x.clone().requires_grad_() for _ in range(2))
    y_theirs, y_made = theirs(x_theirs), made(x_made)
    assert y_made.stride() == y_theirs.stride() or not x.numel()
    assert torch.equal(y_theirs, y_made)
    gradient = integers(*y_theirs.shape)
    y_theirs.backward(gradient)
    y_made.backward(gradient)
    assert torch.equal(x_theirs.grad, x_made.grad)
    for a, b in zip(theirs.parameters(), made.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_operator_is_one_that_pytorch_can_compile() -> None:
    tensors = (torch.randn(2, 6, 9, 9), torch.randn(8, 3, 3, 3), torch.randn(8))
    given = tuple(t.requires_grad_() for t in tensors)
    torch.library.opcheck(convolution, (*given, [2, 2], [1, 1, 1, 1], [1, 1], False, [0, 0], 2))


def test_numbers_of_64_bits_pass_gradcheck() -> None:
    def double(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    given = double(2, 4, 6, 5), double(6, 2, 3, 3), double(6)
    assert torch.autograd.gradcheck(lambda x, w, b: ours.conv2d(x, w, b, stride=2, padding=1, groups=2), given)


def test_layers_of_a_model_are_replaced() -> None:
    class Own(torch.nn.Conv2d):  # type: ignore[name-defined]
        pass

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), Own(4, 4, 1), torch.nn.Conv1d(2, 2, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert ours.replace(model) == ["0", "3"]
    assert [type(module) for module in model] == [ours.Conv2d, torch.nn.ReLU, Own, ours.Conv1d]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert ours.replace(model) == []


def test_weights_are_packed_once_for_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again as soon as they change, whether PyTorch counts the change or not."""
    packed = []
    pack = BaseLibrary.pack

    def counted(library: BaseLibrary, *arguments: Any, **options: Any) -> Any:
        if library.spec.direction != "weights":  # which have nothing to pack
            packed.append(library.spec.direction)
        return pack(library, *arguments, **options)

    monkeypatch.setattr(BaseLibrary, "pack", counted)
    layer, x = ours.Conv2d(6, 8, 3, padding=1, bias=False), integers(2, 6, 7, 7).requires_grad_()

    def step() -> list[str]:
        packed.clear()
        y = layer(x)
        expected = torch.nn.functional.conv2d(x, layer.weight, padding=1)
        assert torch.equal(y, expected)
        (of_x,) = torch.autograd.grad(y.sum(), x)
        (of_expected,) = torch.autograd.grad(expected.sum(), x)
        assert torch.equal(of_x, of_expected)
        return list(packed)

    with torch.no_grad():
        layer.weight.copy_(integers(8, 6, 3, 3))
    assert step() == ["forward", "data"]
    assert step() == []
    with torch.no_grad():
        layer.weight.add_(1)
    assert step() == ["forward", "data"]
    layer.weight.data.mul_(2)
    assert step() == ["forward", "data"]
    layer.weight.data = integers(8, 6, 3, 3)
    assert step() == ["forward", "data"]
    with torch.inference_mode():
        weight = integers(8, 6, 3, 3)
        plain = x.detach()
        for _ in range(2):
            made = ours.conv2d(plain, weight, padding=1)
            assert torch.equal(made, torch.nn.functional.conv2d(plain, weight, padding=1))
            weight.mul_(2)


def test_what_is_no_convolution_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^input: expected 3 or 4 axes, found 2"):
        ours.conv2d(torch.randn(2, 3), torch.randn(2, 3, 1, 1))
    with pytest.raises(SpecError, match=r"^padding: expected numbers, valid, or same where the stride is 1"):
        ours.conv2d(torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3), stride=2, padding="same")
