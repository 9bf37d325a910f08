"""Modules of PyTorch: against PyTorch where it is installed, and through stand-ins where it is not."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convgen
from convgen.check.reference import run_onnxruntime
from convgen.errors import SpecError, UnsupportedError
from convgen.formats.pytorch import arrays_from_torch, spec_from_torch
from convgen.problem.dtypes import numpy_dtype
from convgen.problem.spec import ConvSpec

# PyTorch's, about its speed
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# ---- stand-ins: classes of the names, with the attributes, of PyTorch's ------------------------


class Parameter(np.ndarray):
    """As much of a tensor as a reader needs."""

    is_meta = False

    def detach(self) -> Parameter:
        return self

    cpu = resolve_neg = detach

    def double(self) -> Parameter:
        return self.astype(np.float64).view(Parameter)


def parameter(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).view(Parameter)


def module(path: str, **attributes: Any) -> Any:
    """An instance of a class ``conv.Conv2d`` of torch.nn.modules."""
    folder, _, name = path.rpartition(".")
    methods = {"forward": None, "_conv_forward": None} if folder == "conv" else {"forward": None}
    made = type(name, (), {"__module__": f"torch.nn.modules.{folder}", **methods})()
    vars(made).update({"training": False} | attributes)
    return made


def conv(rank: int, ic: int, oc: int, kernel: int, *, transposed: bool = False, **options: Any) -> Any:
    groups = options.get("groups", 1)
    shape = (ic, oc // groups) if transposed else (oc, ic // groups)
    attributes = {
        "in_channels": ic,
        "out_channels": oc,
        "kernel_size": (kernel,) * rank,
        "stride": (1,) * rank,
        "padding": (0,) * rank,
        "dilation": (1,) * rank,
        "output_padding": (0,) * rank,
        "groups": groups,
        "padding_mode": "zeros",
        "weight": parameter(*shape, *(kernel,) * rank),
        "bias": parameter(oc, seed=1),
    }
    return module(f"conv.Conv{'Transpose' if transposed else ''}{rank}d", **attributes | options)


def norm(channels: int, **options: Any) -> Any:
    attributes = {
        name: parameter(channels, seed=seed) for seed, name in enumerate(("weight", "bias", "running_mean"), 2)
    }
    attributes["running_var"] = np.abs(parameter(channels, seed=9)) + np.float32(0.5)
    return module("batchnorm._BatchNorm", num_features=channels, eps=1e-3, **attributes | options)


def sequential(*parts: Any) -> Any:
    return module("container.Sequential", _modules={str(place): part for place, part in enumerate(parts)})


def act(name: str, **attributes: Any) -> Any:
    return module(f"activation.{name}", **attributes)


def test_a_module_becomes_its_spec() -> None:
    made = conv(2, 6, 4, 3, groups=2, stride=(2, 1), padding=(1, 2), dilation=(1, 3), bias=None)
    expected = ConvSpec.parse("conv2d n5 ic6 oc4 i9x9 k3 s2x1 p1x2 d1x3 g2 nobias")
    assert spec_from_torch(made, (5, 6, 9, 9)) == expected
    assert spec_from_torch(made, [6, 9, 9]) == expected.with_(n=1)
    nhwc = spec_from_torch(made, (5, 6, 9, 9), layout="nhwc", accuracy="relaxed")
    assert nhwc == expected.with_(layout="nhwc", accuracy="relaxed")
    transposed = conv(1, 4, 2, 4, transposed=True, stride=(3,), output_padding=(1,))
    assert spec_from_torch(transposed, (1, 4, 7)) == ConvSpec.parse("convtranspose1d ic4 oc2 i7 k4 s3 op1")
    same = conv(3, 2, 2, 2, padding="same")
    assert spec_from_torch(same, (1, 2, 5, 5, 5)).padding == ((0, 1),) * 3
    assert convgen.spec_from_torch is spec_from_torch


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_batch_norm_is_folded(transposed: bool, has_bias: bool) -> None:
    core = conv(1, 4, 6, 3, groups=2, transposed=transposed, **({} if has_bias else {"bias": None}))
    first, second = norm(6), norm(6, weight=None, bias=None)
    folded = sequential(core, sequential(first, module("linear.Identity")), second)
    spec, arrays = spec_from_torch(folded, (2, 4, 9)), arrays_from_torch(folded)
    assert spec.bias
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        "weights": (np.float32, spec.weights_shape),
        "bias": (np.float32, (6,)),
    }
    x = parameter(*spec.src_shape, seed=7)
    plain = spec_from_torch(core, (2, 4, 9))
    assert plain.bias == has_bias
    y = run_onnxruntime(plain, x, **arrays_from_torch(core), threads=1)
    for part in (first, second):
        mean, var = part.running_mean.reshape(6, 1), part.running_var.reshape(6, 1)
        y = (y - mean) / np.sqrt(var + part.eps)
        if part.weight is not None:
            y = y * part.weight.reshape(6, 1) + part.bias.reshape(6, 1)
    np.testing.assert_allclose(run_onnxruntime(spec, x, **arrays, threads=1), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (act("ReLU"), "relu"),
        (act("Hardtanh", min_val=0.0, max_val=6.0), "clip(0,6)"),
        (act("LeakyReLU", negative_slope=0.2), "leaky_relu(0.2)"),
        (act("ELU", alpha=0.5), "elu(0.5)"),
        (act("GELU", approximate="none"), "gelu"),
        (act("GELU", approximate="tanh"), "gelu_tanh"),
        (act("Mish"), "mish"),
    ],
)
def test_activations(activation: Any, expected: str) -> None:
    assert spec_from_torch(sequential(conv(2, 3, 4, 1), activation), (3, 5, 5)).activation == expected


@pytest.mark.parametrize("count", [1, 4])
def test_slopes_are_one_per_channel(count: int) -> None:
    made = sequential(conv(2, 3, 4, 1), act("PReLU", num_parameters=count, weight=parameter(count, seed=3)))
    assert spec_from_torch(made, (3, 5, 5)).activation == "prelu"
    np.testing.assert_array_equal(arrays_from_torch(made)["slope"], np.broadcast_to(parameter(count, seed=3), 4))


LAZY = SimpleNamespace(materialize=None, dtype="torch.float32")
DROPOUT = {"training": True, "p": 0.5}


def test_what_counts_for_nothing() -> None:
    identity, dropout = module("linear.Identity"), module("dropout.Dropout2d", p=0.5)
    never = module("dropout.Dropout", training=True, p=0.0)
    core = conv(2, 3, 4, 1)
    assert spec_from_torch(sequential(identity, core, dropout, never), (3, 5, 5)) == spec_from_torch(core, (3, 5, 5))


def test_a_lazy_module_takes_its_channels_from_the_input() -> None:
    lazy = conv(2, 0, 4, 3, weight=LAZY, bias=LAZY)
    lazy = sequential(lazy, norm(0, running_mean=LAZY))
    assert spec_from_torch(lazy, (5, 9, 9)) == ConvSpec.parse("conv2d ic5 oc4 i9x9 k3")
    with pytest.raises(SpecError, match=r"0 \(Conv2d\): weight: .* values, found one without; call the module once"):
        arrays_from_torch(lazy)


class Conv2d:
    """A class of the user's with the name of PyTorch's."""

    def forward(self) -> None: ...


def derived(method: str) -> Any:
    base = conv(2, 3, 4, 1)
    made = type("Mine", (type(base),), {method: None})()
    vars(made).update(vars(base))
    return made


def test_a_subclass_with_the_same_forward_is_its_base() -> None:
    assert spec_from_torch(derived("extra_repr"), (3, 5, 5)) == spec_from_torch(conv(2, 3, 4, 1), (3, 5, 5))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (conv(2, 3, 4, 1, padding_mode="circular"), "Conv2d: padding_mode: expected 'zeros', found 'circular'"),
        (conv(2, 3, 4, 1, weight=parameter(4, 3, 1, 1).double()), "Conv2d: dtype: expected one of .*, found float64"),
        (module("linear.Linear"), "Linear: expected a convolution of torch.nn"),
        ("Conv2d", "str: expected a convolution of torch.nn"),
        (Conv2d(), "Conv2d: expected a convolution of torch.nn"),
        (derived("forward"), "Mine: expected a convolution of torch.nn with its own forward"),
        (derived("_conv_forward"), "Mine: expected a convolution of torch.nn with its own forward"),
        (conv(2, 3, 4, 1, forward=print), "Conv2d: expected a convolution of torch.nn with its own forward"),
        (sequential(act("ReLU"), conv(2, 3, 4, 1)), r"0 \(ReLU\): expected a convolution"),
        (sequential(conv(2, 3, 4, 1), conv(2, 4, 4, 1)), r"1 \(Conv2d\): expected one convolution"),
        (sequential(conv(2, 3, 4, 1), sequential(act("Softplus"))), r"1.0 \(Softplus\): expected BatchNorm or one of"),
        (sequential(conv(2, 3, 4, 1), act("ReLU"), norm(4)), r"2 \(_BatchNorm\): expected nothing after .* relu"),
        (sequential(conv(2, 3, 4, 1), norm(4, training=True)), r"1 \(_BatchNorm\): .* found those of each batch"),
        (sequential(conv(2, 3, 4, 1), norm(4, running_mean=None)), r"1 \(_BatchNorm\): .* found those of each batch"),
        (sequential(conv(2, 3, 4, 1), module("dropout.Dropout", **DROPOUT)), r"1 \(Dropout\): expected eval mode"),
    ],
)
def test_what_a_spec_cannot_say(made: Any, message: str) -> None:
    for read in (lambda: spec_from_torch(made, (3, 5, 5)), lambda: arrays_from_torch(made)):
        with pytest.raises(UnsupportedError, match=message):
            read()


PRELU = act("PReLU", num_parameters=3, weight=parameter(3))


@pytest.mark.parametrize(
    ("made", "shape", "message"),
    [
        (conv(2, 3, 4, 1), (1, 5, 5, 5), "Conv2d: input_shape: expected in_channels = 3, found 5 channels"),
        (conv(2, 3, 4, 1), (3, 5), "Conv2d: input_shape: expected .n, channels, 2 sizes., or without n, found"),
        (conv(2, 3, 4, 1), 5, "Conv2d: input_shape"),
        (conv(2, 3, 4, 1), np.zeros((3, 5, 5)), r"Conv2d: input_shape: .*, found a ndarray; use its \.shape"),
        (conv(2, 3, 4, 9), (3, 5, 5), r"kernel\[0\]: expected a dilated kernel within the padded input"),
        (
            sequential(conv(2, 3, 4, 1), norm(5)),
            (3, 5, 5),
            r"1 \(_BatchNorm\): num_features: expected out_channels = 4",
        ),
        (sequential(conv(2, 3, 4, 1), PRELU), (3, 5, 5), r"1 \(PReLU\): num_parameters: expected out_channels = 4"),
        (sequential(module("linear.Identity")), (3, 5, 5), "Sequential: module: expected a convolution"),
    ],
)
def test_wrong_modules_and_shapes(made: Any, shape: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_from_torch(made, shape)


# ---- PyTorch itself ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def compare(torch: Any, made: Any, shape: tuple[int, ...], rtol: float = 1e-4, atol: float = 1e-5) -> ConvSpec:
    """A module's output is the spec's."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = made(x).numpy()
    spec, arrays = spec_from_torch(made, shape), arrays_from_torch(made)
    assert spec.dst_shape[-expected.ndim :] == expected.shape
    got = run_onnxruntime(spec, x.numpy().reshape(spec.src_shape), **arrays, threads=1)
    np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=rtol, atol=atol)
    return spec


def test_layers_of_convgen_s_own_are_those_that_they_stand_for(torch: Any) -> None:
    ours, nn = importlib.import_module("convgen.torch"), torch.nn
    for name, options in (("Conv2d", {"stride": 2}), ("Conv1d", {"padding": 1}), ("ConvTranspose2d", {"groups": 2})):
        shape = (2, 4, 9, 8)[: 3 + name.endswith("2d")]
        layer = getattr(ours, name)(4, 6, 3, **options)
        assert compare(torch, layer, shape) == spec_from_torch(getattr(nn, name)(4, 6, 3, **options), shape)

    class Own(ours.Conv2d):  # type: ignore[name-defined]
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    with pytest.raises(UnsupportedError, match=r"Own: expected a convolution of torch\.nn with its own forward"):
        spec_from_torch(Own(3, 4, 3), (3, 9, 9))


def test_hooks_of_all_modules_are_hooks(torch: Any) -> None:
    layer = torch.nn.Conv2d(3, 4, 3)
    every = torch.nn.modules.module
    for register in (every.register_module_forward_hook, every.register_module_forward_pre_hook):
        handle = register(lambda *given: None)
        try:
            with pytest.raises(UnsupportedError, match=r"Conv2d: expected no forward (pre-)?hook, found .*lambda"):
                spec_from_torch(layer, (3, 9, 9))
        finally:
            handle.remove()
    assert spec_from_torch(layer, (3, 9, 9)).oc == 4


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # PyTorch's, about its own class
def test_what_is_no_layer_is_told_a_way_on(torch: Any) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 4, 3)

    with pytest.raises(UnsupportedError, match=r"Net: expected a convolution .*; convgen\.compile\(torch\.export"):
        convgen.layers_from_torch(Net(), (3, 9, 9))
    linear = importlib.import_module("torch.ao.nn.quantized").Linear
    with pytest.raises(
        UnsupportedError, match=r"Linear: expected a convolution .*; of torch.ao it takes quantised conv"
    ):
        spec_from_torch(linear(3, 4), (3, 9, 9))


def _activations(nn: Any, oc: int) -> list[Any]:
    return [
        nn.ReLU(),
        nn.ReLU6(inplace=True),
        nn.LeakyReLU(),
        nn.LeakyReLU(-0.5),
        nn.PReLU(init=0.3),
        nn.PReLU(oc),
        nn.Hardtanh(-0.25, 1.5),
        nn.Sigmoid(),
        nn.SiLU(),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.Tanh(),
        nn.ELU(0.7),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.Mish(),
    ]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_random_modules(torch: Any, data: st.DataObject) -> None:
    """Every rank, both directions, every option, with and without BatchNorm and activation."""
    nn, draw = torch.nn, data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    rank, transposed, lazy = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.booleans())

    def axes(low: int, high: int) -> Any:
        """One number, or one per axis, as PyTorch takes both."""
        one = st.integers(low, high)
        return draw(one | st.tuples(*[one] * rank))

    def ends(value: Any) -> tuple[int, int]:
        values = value if isinstance(value, tuple) else (value,)
        return min(values), max(values)

    groups = draw(st.sampled_from((1, 1, 2, 3)))
    ic, oc = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    options = {"kernel_size": axes(1, 4), "stride": axes(1, 3), "dilation": axes(1, 3)}
    options |= {"groups": groups, "bias": draw(st.booleans())}
    smallest, largest = zip(*(ends(options[name]) for name in ("kernel_size", "stride", "dilation")), strict=True)
    reach = (largest[0] - 1) * largest[2] + 1
    if transposed:
        options["padding"] = draw(st.integers(0, (smallest[0] - 1) // 2))
        options["output_padding"] = draw(st.integers(0, max(smallest[1:]) - 1))
    else:
        options["padding"] = draw(st.sampled_from(("same", "valid"))) if draw(st.booleans()) else axes(0, 3)
        if options["padding"] == "same":
            options["stride"] = 1
    name = f"{'Lazy' if lazy else ''}Conv{'Transpose' if transposed else ''}{rank}d"
    made = getattr(nn, name)(*([oc] if lazy else [ic, oc]), **options)
    batch: tuple[int, ...] = draw(st.sampled_from(((), (1,), (2,))))
    sizes = tuple(draw(st.integers(2 if transposed else max(reach, 2), reach + 4)) for _ in range(rank))
    parts = [made]
    if batch != () and draw(st.booleans()):
        parts.append(getattr(nn, f"BatchNorm{rank}d")(oc, eps=1e-2, affine=draw(st.booleans())))
        parts[-1].running_mean.normal_()
        parts[-1].running_var.uniform_(0.5, 2)
    activation = draw(st.sampled_from([None, *range(len(_activations(nn, oc)))]))
    if activation is not None and (batch or activation != 5):  # PReLU per channel wants a batch
        parts += [nn.Dropout(), nn.Sequential(_activations(nn, oc)[activation])]
    whole = nn.Sequential(*parts).eval() if len(parts) > 1 else made
    shape = (*batch, ic, *sizes)
    before = spec_from_torch(whole, shape)
    assert compare(torch, whole, shape) == before  # a lazy one has become another class


@pytest.mark.parametrize("size", [5, 6])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_puts_the_odd_one_at_the_end(torch: Any, size: int, kernel: int, dilation: int) -> None:
    compare(torch, torch.nn.Conv1d(2, 3, kernel, padding="same", dilation=dilation), (1, 2, size))


def test_every_activation(torch: Any) -> None:
    for activation in _activations(torch.nn, 4):
        compare(torch, torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), activation), (2, 3, 6, 6))


def test_sync_batch_norm_and_fused_modules(torch: Any) -> None:
    nn = torch.nn
    fused = importlib.import_module("torch.ao.nn.intrinsic").ConvReLU2d(nn.Conv2d(3, 4, 2), nn.ReLU())
    assert compare(torch, fused, (1, 3, 6, 6)).activation == "relu"
    norms = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), nn.Tanh()).eval()
    expected = arrays_from_torch(norms)
    found = arrays_from_torch(nn.SyncBatchNorm.convert_sync_batchnorm(norms))
    np.testing.assert_equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_reparametrised_weights(torch: Any) -> None:
    """Also where a hook would only make them at the next call."""
    utils, parts = torch.nn.utils, torch.nn.utils.parametrizations
    for wrap in (parts.weight_norm, parts.spectral_norm, utils.weight_norm, utils.spectral_norm):
        compare(torch, wrap(torch.nn.Conv2d(3, 4, 2)).eval(), (1, 3, 6, 6))
    old = utils.weight_norm(torch.nn.Conv2d(3, 4, 2))
    with torch.no_grad():
        old.weight_g.mul_(3)
    weights = arrays_from_torch(old)["weights"]
    compare(torch, old, (1, 3, 6, 6))
    np.testing.assert_array_equal(weights, arrays_from_torch(old)["weights"])
    pruned = importlib.import_module("torch.nn.utils.prune").l1_unstructured(torch.nn.Conv2d(3, 4, 2), "weight", 5)
    assert np.count_nonzero(arrays_from_torch(pruned)["weights"] == 0) == 5


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_narrow_dtypes(torch: Any, name: str) -> None:
    made = torch.nn.Conv2d(3, 4, 2).to(getattr(torch, name))
    spec, arrays = spec_from_torch(made, (1, 3, 6, 6)), arrays_from_torch(made)
    assert arrays["weights"].dtype == numpy_dtype(spec.dtype) == name
    np.testing.assert_array_equal(arrays["weights"].astype(np.float32), made.weight.detach().float().numpy())


def test_values_that_are_not_there(torch: Any) -> None:
    with torch.device("meta"):
        made = torch.nn.Conv2d(3, 4, 2)
    assert spec_from_torch(made, (3, 6, 6)) == ConvSpec.parse("conv2d ic3 oc4 i6x6 k2")
    with pytest.raises(SpecError, match="Conv2d: weight: expected a parameter with values"):
        arrays_from_torch(made)


def test_refused_modules(torch: Any) -> None:
    nn = torch.nn
    training = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))
    with pytest.raises(UnsupportedError, match=r"1 \(BatchNorm2d\)"):
        spec_from_torch(training, (3, 6, 6))
    with pytest.raises(UnsupportedError, match="padding_mode"):
        spec_from_torch(nn.Conv2d(3, 4, 2, padding=1, padding_mode="reflect"), (3, 6, 6))
    with pytest.raises(UnsupportedError, match="float64"):
        spec_from_torch(nn.Conv2d(3, 4, 2, dtype=torch.float64), (3, 6, 6))
    for other in (nn.Linear(3, 4), nn.Conv2d, nn.MaxPool2d(2)):
        with pytest.raises(UnsupportedError, match="expected a convolution"):
            spec_from_torch(other, (3, 6, 6))


def test_a_kernel_is_bound_with_its_arrays(torch: Any) -> None:
    nn = torch.nn
    made = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.PReLU(4)).eval()
    kernel = convgen.build(spec_from_torch(made, (1, 3, 6, 6)), threads=1, records=False)
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        expected = made(x).numpy()
    np.testing.assert_allclose(kernel.bind(**arrays_from_torch(made))(x), expected, rtol=1e-4, atol=1e-5)
