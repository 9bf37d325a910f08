"""``convgen.torch``: modules and functions against PyTorch's own, forward and backward."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import convgen.torch as ours  # noqa: E402
from convgen.bridges.torch.convolution import (  # noqa: E402
    convolution,
    gradient_of_input,
    gradient_of_weight,
    kernel_of,
)
from convgen.bridges.torch.packed import layer_of  # noqa: E402
from convgen.errors import SpecError  # noqa: E402
from convgen.kernel.library import BaseLibrary  # noqa: E402
from convgen.problem.spec import ConvSpec  # noqa: E402

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
    "transposed, one axis": ("ConvTranspose1d", (6, 4, 4), {"stride": 3, "output_padding": 2}, (2, 6, 7)),
    "transposed, three axes": (
        "ConvTranspose3d",
        (4, 2, 3),
        {"stride": (1, 2, 1), "padding": 1, "dilation": (1, 1, 2), "bias": False},
        (1, 4, 3, 4, 5),
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


#: Modules whose sizes leave open, or not, how their tensors lie in memory.
FORMATS: dict[str, tuple[str, tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "square": ("Conv2d", (6, 8, 3), {"padding": 1}, (2, 6, 9, 8)),
    "pointwise": ("Conv2d", (6, 8, 1), {"bias": False}, (2, 6, 4, 5)),
    "depthwise": ("Conv2d", (8, 8, 3), {"padding": 1, "groups": 8}, (2, 8, 7, 6)),
    "one channel": ("Conv2d", (1, 4, 3), {}, (2, 1, 6, 5)),
    "one pixel": ("Conv2d", (6, 4, 1), {}, (2, 6, 1, 1)),
    "transposed": ("ConvTranspose2d", (6, 4, 3), {"stride": 2}, (2, 6, 5, 4)),
    "three axes": ("Conv3d", (2, 4, 3), {"padding": 1}, (2, 2, 4, 5, 6)),
}


@pytest.mark.parametrize("of_weights", ["contiguous", "channels last"])
@pytest.mark.parametrize("of_images", ["contiguous", "channels last"])
@pytest.mark.parametrize("case", FORMATS)
def test_results_and_gradients_lie_in_memory_as_pytorch_s(case: str, of_images: str, of_weights: str) -> None:
    """Channels last where the images are, or the weights; the gradients that a step leaves, as their weights.

    Of one small image of three axes PyTorch itself computes otherwise.
    """
    name, arguments, options, shape = FORMATS[case]
    last = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*arguments, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(integers(*parameter.shape))
    made = copy.deepcopy(theirs)
    ours.replace(torch.nn.ModuleList([made]))
    x, gradient = integers(*shape), None
    if of_images == "channels last":
        x = x.to(memory_format=last)
    found = []
    for module in (theirs, made):
        if of_weights == "channels last":
            module.to(memory_format=last)
        given = x.detach().requires_grad_()
        y = module(given)
        gradient = integers(*y.shape) if gradient is None else gradient
        of_x, of_weight = torch.autograd.grad(y, (given, module.weight), gradient, retain_graph=True)
        y.backward(gradient)
        found.append((y, of_x, of_weight, given.grad, module.weight.grad))
    assert type(made).__module__.startswith("convgen.")
    for of_theirs, of_made in zip(*found, strict=True):
        assert torch.equal(of_theirs, of_made)
        # How far apart an axis of one element is, PyTorch decides by the processor.
        axes = [axis for axis, size in enumerate(of_made.shape) if size > 1]
        assert [of_theirs.stride(axis) for axis in axes] == [of_made.stride(axis) for axis in axes]


@pytest.mark.parametrize("sizes", [(2, 6, 9, 9, 3), (2, 6, 5, 4, 1)])
@pytest.mark.parametrize("form", ["contiguous", "channels last"])
def test_the_operators_are_such_as_pytorch_can_compile(form: str, sizes: tuple[int, ...]) -> None:
    n, channels, height, width, kernel = sizes
    weight = torch.randn(8, channels // 2, kernel, kernel)
    if form == "channels last":
        weight = weight.to(memory_format=torch.channels_last)
    tensors = (torch.randn(n, channels, height, width), weight, torch.randn(8))
    given = tuple(t.requires_grad_() for t in tensors)
    options = ([2, 2], [1, 1, 1, 1], [1, 1], False, [0, 0], 2)
    torch.library.opcheck(convolution, (*given, *options))
    x, weight = (tensor.detach() for tensor in tensors[:2])  # there is no derivative of these operators
    for operator in (gradient_of_input, gradient_of_weight):
        torch.library.opcheck(operator, (torch.randn_like(convolution(x, weight, None, *options)), x, weight, *options))


class Called(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


#: Of numbers of 64 bits: shape of the input and of the weight, and options.
DOUBLES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "conv1d": ((2, 4, 9), (6, 2, 3), {"stride": 2, "padding": 1, "groups": 2}),
    "conv2d": ((2, 4, 6, 5), (6, 2, 3, 2), {"stride": (2, 1), "padding": (1, 2), "groups": 2}),
    "conv2d depthwise, dilated": ((1, 3, 7, 6), (6, 1, 3, 3), {"padding": 2, "dilation": 2, "groups": 3}),
    "conv2d same": ((1, 2, 5, 4), (3, 2, 1, 3), {"padding": "same"}),
    "conv2d past its window": ((1, 2, 3, 3), (2, 2, 2, 2), {"stride": 3, "padding": 3}),
    "conv3d": ((1, 2, 3, 4, 3), (4, 2, 2, 3, 1), {"stride": (1, 2, 1), "padding": (1, 0, 0)}),
    "conv_transpose1d": ((2, 4, 5), (4, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}),
    "conv_transpose2d": ((1, 4, 3, 4), (4, 1, 3, 2), {"stride": (2, 3), "padding": (1, 0), "groups": 4}),
    "conv_transpose2d dilated": ((2, 2, 3, 3), (2, 3, 2, 2), {"dilation": 3, "output_padding": 2, "padding": 1}),
    "conv_transpose3d": ((1, 2, 2, 3, 2), (2, 2, 2, 2, 3), {"stride": (2, 1, 1)}),
}


@pytest.mark.parametrize("form", ["contiguous", "channels last"])
@pytest.mark.parametrize("case", DOUBLES)
def test_numbers_of_64_bits_are_computed_by_the_definition(case: str, form: str) -> None:
    shape, weight_shape, options = DOUBLES[case]
    name = case.split()[0]
    if form == "channels last" and len(shape) != 4:
        pytest.skip("images of two axes have such a format")
    torch.manual_seed(0)
    channels = weight_shape[1] * options.get("groups", 1) if "transpose" in name else weight_shape[0]
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in (shape, weight_shape, (channels,)))
    if form == "channels last":
        x = x.to(memory_format=torch.channels_last)
    given = tuple(t.requires_grad_() for t in (x, weight, bias))
    made, expected = (getattr(module, name)(*given, **options) for module in (ours, torch.nn.functional))
    assert torch.allclose(made, expected, rtol=1e-12, atol=1e-12)
    with Called() as called:
        assert torch.autograd.gradcheck(lambda *t: getattr(ours, name)(*t, **options), given)
    assert "convgen::convolution" in called.names
    assert not {called_name for called_name in called.names if called_name.startswith("aten::convolution")}


def model_of_every_kind() -> Any:
    """A small model whose convolutions are dense, depthwise, strided and transposed."""
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 12, 1),
        nn.SiLU(),
        nn.ConvTranspose2d(12, 4, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


@pytest.mark.parametrize("form", ["contiguous", "channels last", "weights channels last"])
def test_a_model_trains_as_one_graph(form: str) -> None:
    """Compiled through aot_autograd, forward and backward, against PyTorch's own layers, over three steps."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    theirs = model_of_every_kind()
    made = model_of_every_kind()
    made.load_state_dict(theirs.state_dict())
    assert ours.replace(made) == ["0", "3", "4", "6"]
    x = torch.randn(2, 3, 10, 12)
    if form == "channels last":
        x = x.to(memory_format=torch.channels_last)
    if form == "weights channels last":
        theirs.to(memory_format=torch.channels_last)
        made.to(memory_format=torch.channels_last)
    target = torch.tensor([1, 3])
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    losses: dict[int, list[float]] = {0: [], 1: []}
    for which, (model, call) in enumerate(((theirs, theirs), (made, compiled))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(call(x), target)
            loss.backward()
            optimizer.step()
            losses[which].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] < losses[0][0]
    for a, b in zip(theirs.parameters(), made.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gaining", [["0", "3", "4", "6"], [], ["3", "6"]])
def test_layers_that_gain_are_replaced_and_no_others(gaining: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a clock says of them here: of each it is asked once, as the layer that it would become."""
    model = model_of_every_kind()
    names, asked = {module: name for name, module in model.named_modules()}, list[str]()

    def gains(module: Any, theirs: type, given: tuple[Any, ...]) -> bool:
        assert type(module).__module__.startswith("convgen.")
        assert issubclass(type(module), theirs)
        assert given[0].shape[:2] == (2, module.in_channels)
        asked.append(names[module])
        return names[module] in gaining

    monkeypatch.setattr("convgen.bridges.torch.modules._gains", gains)
    assert ours.replace(model, torch.randn(2, 3, 10, 12)) == gaining
    assert asked == ["0", "3", "4", "6"]
    kinds = {name for name, module in model.named_modules() if type(module).__module__.startswith("convgen.")}
    assert kinds == set(gaining)


def test_only_layers_that_gain_are_replaced() -> None:
    """Those whose step is slower than PyTorch's stay, and nothing of the model is changed by finding out."""
    model = model_of_every_kind().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps: list[tuple[int, int]] = []
    replaced = ours.replace(model, torch.randn(2, 3, 10, 12), progress=lambda *step: steps.append(step))
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)]
    assert len(steps) >= 4
    kinds = {name for name, module in model.named_modules() if type(module).__module__.startswith("convgen.")}
    assert kinds == set(replaced)
    assert set(replaced) <= {"0", "3", "4", "6"}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


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


def test_kernels_of_weights_that_train_are_chosen_with_the_time_of_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def counted(spec: Any, threads: int, repacked: bool = False) -> Any:
        asked.append((spec.direction, repacked))
        return kernel_of(spec, threads, repacked)

    monkeypatch.setattr("convgen.bridges.torch.convolution.kernel_of", counted)
    layer, x = ours.Conv2d(6, 8, 3, bias=False), integers(1, 6, 7, 7).requires_grad_()
    layer(x).sum().backward()
    assert asked == [("forward", True), ("data", True), ("weights", False)]
    asked.clear()
    with torch.no_grad():
        layer(x)
    layer.weight.requires_grad_(False)
    layer(x)
    assert asked == [("forward", False)] * 2


def test_weights_that_change_are_packed_into_the_memory_of_before() -> None:
    """But for what a call reads at the moment."""
    spec = ConvSpec.parse("conv2d n1 ic6 oc8 i7x7 k3x3 s1x1 p1x1 nobias")
    kernels = [kernel_of(spec.with_(direction=direction), 1, True) for direction in ("forward", "data")]
    weight, x = integers(8, 6, 3, 3), np.ones(spec.src_shape, np.float32)
    memory = []
    for _ in range(3):
        for kernel in kernels:
            with layer_of(kernel, weight) as layer, layer_of(kernel, weight) as same:
                assert same is layer
                memory.append(layer.packed)
        weight.add_(1)
    assert all(later is first for later, first in zip(memory, memory[:2] * 3, strict=True))
    assert memory[0] is not memory[1]
    with layer_of(kernels[0], weight) as layer:
        before = layer(x)
        weight.mul_(2)
        with layer_of(kernels[0], weight) as other:
            assert other.packed is not layer.packed
            np.testing.assert_array_equal(other(x), 2 * before)
        np.testing.assert_array_equal(layer(x), before)


def test_what_is_no_convolution_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^input: expected 3 or 4 axes, found 2"):
        ours.conv2d(torch.randn(2, 3), torch.randn(2, 3, 1, 1))
    with pytest.raises(SpecError, match=r"^padding: expected numbers, valid, or same where the stride is 1"):
        ours.conv2d(torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3), stride=2, padding="same")
    with pytest.raises(RuntimeError, match=r"^input: expected 5 channels, as the weight has, found 3"):  # as PyTorch's
        ours.Conv2d(5, 3, 1)(torch.randn(1, 3, 5, 5))
    with pytest.raises(SpecError, match=r"^input: expected a tensor, found ndarray"):
        ours.conv2d(torch.randn(1, 3, 5, 5).numpy(), torch.randn(2, 3, 3, 3))
    for change in (ours.replace, ours.restore):
        with pytest.raises(SpecError, match=r"^model: expected a torch\.nn\.Module, found int"):
            change(3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("whole", [True, False])
def test_under_autocast_types_are_pytorch_s(dtype: str, whole: bool) -> None:
    """Between layers that autocast changes itself, and where some of a model's convolutions stay PyTorch's."""
    nn = torch.nn
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(9, 9), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Linear(8, 5))
    made = copy.deepcopy(theirs)
    ours.replace(made if whole else made[:2])
    assert type(made[1]) is ours.Conv2d
    found = []
    for model in (theirs, made):
        x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", dtype=getattr(torch, dtype)):
            y = model(x)
        y.float().square().mean().backward()
        assert y.dtype == getattr(torch, dtype)
        found.append([y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())])
    for of_theirs, of_made in zip(*found, strict=True):
        torch.testing.assert_close(of_made, of_theirs, rtol=0.05, atol=0.01)
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):  # which leaves f64 alone
        assert ours.conv1d(*(torch.ones(1, 1, 3, dtype=torch.float64),) * 2).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's, about its forward mode
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
def test_derivatives_in_forward_mode_are_refused(which: str) -> None:
    """They would be zeros: the operators have none."""
    given = {"input": torch.randn(1, 2, 5, 5), "weight": torch.randn(3, 2, 3, 3), "bias": torch.randn(3)}

    def function(tensor: Any) -> Any:
        return ours.conv2d(**given | {which: tensor})

    tensor = given[which]
    with pytest.raises(NotImplementedError, match=f"^{which}: expected no tangent"):
        torch.func.jvp(function, (tensor,), (tensor,))
    with pytest.raises(NotImplementedError, match=f"^{which}: expected no tangent"):
        torch.func.jacfwd(function)(tensor)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="expected no tangent"):
        function(torch.autograd.forward_ad.make_dual(tensor, tensor))


@pytest.mark.parametrize(("kind", "options"), [("Conv2d", {}), ("ConvTranspose2d", {"stride": 2, "output_padding": 1})])
def test_complex_numbers_are_pytorch_s(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs, mine = (
        getattr(library, kind)(4, 6, 3, padding=1, dtype=torch.complex64, **options) for library in (torch.nn, ours)
    )
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 7, 6, dtype=torch.complex64)
    torch.testing.assert_close(mine(x), theirs(x))


def test_tensors_without_memory_have_shapes() -> None:
    """On the meta device, which autocast does not know."""
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            found, expected = (
                m.conv2d(torch.empty(2, 4, 9, 8, device="meta"), torch.empty(6, 4, 3, 3, device="meta"))
                for m in (ours, torch.nn.functional)
            )
        assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)


def test_what_was_replaced_is_restored() -> None:
    model = model_of_every_kind()
    kinds = [type(module) for module in model]
    names = ours.replace(model)
    assert [type(module) for module in model] != kinds
    assert ours.restore(model) == names
    assert [type(module) for module in model] == kinds
    assert ours.restore(model) == []


def test_a_layer_says_whose_it_is() -> None:
    assert repr(ours.Conv2d(3, 4, 3)).startswith("convgen.torch.Conv2d(3, 4, kernel_size=(3, 3)")
    assert repr(ours.ConvTranspose1d(3, 4, 3)).startswith("convgen.torch.ConvTranspose1d(")


def test_there_is_no_second_derivative() -> None:
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    (first,) = torch.autograd.grad(ours.Conv2d(3, 4, 3)(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative; convgen.torch.restore"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_are_written_as_onnx_s() -> None:
    """By the exporter that knows of other operators than PyTorch's."""
    layers = (
        ours.Conv2d(4, 8, (3, 2), 2, (1, 0), groups=2),
        ours.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, dilation=2, bias=False),
        ours.Conv2d(6, 2, 4, padding="same", dilation=(1, 2)),
    )
    model, x, file = torch.nn.Sequential(*layers).eval(), torch.randn(2, 4, 9, 8), io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = model(x).numpy()
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
