"""Layers of PyTorch: convolution modules, alone or in a ``Sequential`` with what stands before and after them.

PyTorch is not imported here: whoever has a module has it. A module is known by the class that
defines its ``forward``, so that a subclass with another one is refused instead of misread; so is one
with hooks, which may change what it computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SpecError, UnsupportedError
from ..problem.activation import Activation
from ..problem.dtypes import narrow
from ..problem.spec import ConvSpec
from .torch_quantised import CONVOLUTIONS as QUANTISED
from .torch_quantised import DEQUANTIZE, QUANTIZE, QuantisedConvolution, Steps, stored_by

F64 = npt.NDArray[np.float64]

#: Class in torch.nn.modules -> (rank, transposed).
_CONVOLUTIONS = {
    f"conv.{operator}{rank}d": (rank, operator == "ConvTranspose")
    for operator in ("Conv", "ConvTranspose")
    for rank in (1, 2, 3)
}
#: Where convgen's own layers are, which compute what those of torch.nn do that they derive from.
_OURS = "convgen.bridges.torch.modules"
#: Where PyTorch's classes are that are known.
_PREFIXES = ("torch.nn.modules.", "torch.ao.nn.")
_PAD = "padding._ConstantPadNd"  # ZeroPad*d and ConstantPad*d
_NORMS = ("batchnorm._BatchNorm", "batchnorm.SyncBatchNorm")
_ACTIVATIONS: dict[str, Callable[[Any], Activation]] = {
    "activation.ReLU": lambda m: Activation("relu"),
    "activation.LeakyReLU": lambda m: Activation("leaky_relu", (m.negative_slope,)),
    "activation.PReLU": lambda m: Activation("prelu"),
    "activation.Hardtanh": lambda m: Activation("clip", (m.min_val, m.max_val)),  # ReLU6 too
    "activation.Sigmoid": lambda m: Activation("sigmoid"),
    "activation.Tanh": lambda m: Activation("tanh"),
    "activation.SiLU": lambda m: Activation("silu"),
    "activation.Hardswish": lambda m: Activation("hardswish"),
    "activation.Hardsigmoid": lambda m: Activation("hardsigmoid", (1 / 6, 0.5)),
    "activation.ELU": lambda m: Activation("elu", (m.alpha,)),
    "activation.GELU": lambda m: Activation("gelu_tanh" if m.approximate == "tanh" else "gelu"),
    "activation.Mish": lambda m: Activation("mish"),
}
_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def spec_from_torch(
    module: Any, input_shape: Sequence[int], *, accuracy: str = "standard", layout: str = "nchw"
) -> ConvSpec:
    """The layer that a module of ``torch.nn`` computes in eval mode.

    Args:
        module: ``Conv1d…3d`` or ``ConvTranspose1d…3d``, lazy ones included, or a ``Sequential``,
            nested at will, of padding with zeros (``ZeroPad1d…3d``, ``ConstantPad1d…3d``), one of
            these, then BatchNorm, then an activation. BatchNorm becomes part of weights and bias,
            as :func:`arrays_from_torch` gives them; Identity and Dropout count for nothing. Of hooks
            only those of ``torch.nn.utils`` are known. Several convolutions:
            :func:`layers_from_torch`. Or a quantised convolution of ``torch.ao``, which is a layer of integers, with
            the ``Quantize`` before it, a ReLU and the ``DeQuantize`` behind it.
        input_shape: ``(n, channels, *sizes)`` whatever the memory format, or without ``n``: one image.
        accuracy: as in :class:`ConvSpec`.
        layout: the memory format of input and output: ``"nhwc"`` is torch's channels_last.

    Raises:
        SpecError: the input's shape is not the module's; names the field.
        UnsupportedError: a module, padding mode or dtype that a spec cannot say; names its place.
    """
    return _spec(_chain(module), input_shape, accuracy, layout)


@dataclass(frozen=True)
class TorchLayer:
    """One convolution of a ``Sequential``: its place, such as ``features.0``, and what ``bind`` takes."""

    name: str
    spec: ConvSpec
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


def layers_from_torch(
    module: Any,
    input_shape: Sequence[int],
    *,
    accuracy: str = "standard",
    layout: str = "nchw",
    arrays: bool = False,
) -> list[TorchLayer]:
    """The layers that a module computes one after another in eval mode.

    Args:
        module: as in :func:`spec_from_torch`, or a ``Sequential`` of several such.
        input_shape: that of the first layer's input; each further one takes the output of the one before.
        accuracy, layout: as in :func:`spec_from_torch`.
        arrays: whether layers have what ``bind`` takes, as :func:`arrays_from_torch` gives it.

    Raises:
        SpecError, UnsupportedError: as in both.
    """
    layers = []
    for chain in _chains(module):
        spec = _spec(chain, input_shape, accuracy, layout)
        layers.append(TorchLayer(chain.place, spec, _arrays(chain) if arrays else {}))
        input_shape = (spec.n, spec.oc, *spec.out_spatial)
    return layers


def _spec(chain: _Chain | QuantisedConvolution, input_shape: Sequence[int], accuracy: str, layout: str) -> ConvSpec:
    conv, where = chain.conv, chain.where
    kind = _kind(conv)
    rank, transposed = _CONVOLUTIONS[kind] if kind in _CONVOLUTIONS else QUANTISED[kind][:2]
    if not isinstance(input_shape, Sequence) or len(input_shape) not in (rank + 1, rank + 2):
        found = (
            f"a {type(input_shape).__name__}; use its .shape" if hasattr(input_shape, "shape") else repr(input_shape)
        )
        raise SpecError("input_shape", f"(n, channels, {rank} sizes), or without n", found, where)
    n, channels, *in_spatial = input_shape if len(input_shape) == rank + 2 else (1, *input_shape)
    if isinstance(chain, QuantisedConvolution):
        return chain.spec((n, channels, *in_spatial), accuracy, layout)
    if channels != conv.in_channels and not _is_lazy(conv.weight):
        raise SpecError("input_shape", f"in_channels = {conv.in_channels}", f"{channels} channels", where)
    return ConvSpec(
        n=n,
        ic=channels,
        oc=conv.out_channels,
        in_spatial=tuple(in_spatial),
        kernel=conv.kernel_size,
        stride=conv.stride,
        padding=_padding(chain),
        dilation=conv.dilation,
        groups=conv.groups,
        transposed=transposed,
        output_padding=conv.output_padding,  # zeros unless transposed
        bias=conv.bias is not None or bool(chain.norms),
        activation=chain.activation,
        accuracy=accuracy,
        dtype=_dtype(chain),
        layout=layout,
    )


def arrays_from_torch(module: Any) -> dict[str, npt.NDArray[Any]]:
    """What ``kernel.bind`` takes, by name: ``weights``, ``bias`` and ``slope`` where the layer has them; of a layer of
    integers ``scale`` and zero points, too.

    BatchNorm is folded in float64; the arrays have the dtype of the convolution's weights. The bias of a quantised
    convolution is rounded to steps of its sums.

    Args:
        module: as in :func:`spec_from_torch`.

    Raises:
        SpecError: a parameter has no values yet (lazy modules, the meta device), or nothing says how the input of a
            quantised convolution is stored.
        UnsupportedError: as in :func:`spec_from_torch`.
    """
    return _arrays(_chain(module))


def _arrays(chain: _Chain | QuantisedConvolution) -> dict[str, npt.NDArray[Any]]:
    if isinstance(chain, QuantisedConvolution):
        return chain.arrays()
    conv, where = chain.conv, chain.where
    for hook in getattr(conv, "_forward_pre_hooks", {}).values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(conv, ())  # weight_norm and the like: makes the weight of its parts, as a call would

    weights = _values("weight", conv.weight, where)
    arrays = {"weights": weights}
    if conv.bias is not None or chain.norms:
        arrays["bias"] = np.zeros(conv.out_channels) if conv.bias is None else _values("bias", conv.bias, where)
    for norm in chain.norms:
        mean, variance = (_values(name, getattr(norm, name), where) for name in ("running_mean", "running_var"))
        scale = 1 / np.sqrt(variance + norm.eps)
        if norm.weight is not None:
            scale *= _values("weight", norm.weight, where)
        arrays["weights"] = _scaled(conv, arrays["weights"], scale)
        arrays["bias"] = (arrays["bias"] - mean) * scale
        if norm.bias is not None:
            arrays["bias"] += _values("bias", norm.bias, where)
    if chain.slope is not None:
        arrays["slope"] = np.resize(_values("weight", chain.slope, where), conv.out_channels)
    return {name: narrow(array, _dtype(chain)) for name, array in arrays.items()}


@dataclass
class _Chain:
    """A convolution and what follows it, in this order; ``pads`` are the zeros before, ``(begin, end)`` per axis."""

    conv: Any
    place: str
    where: str
    pads: list[tuple[int, int]]
    norms: list[Any] = field(default_factory=list)
    activation: str = "none"
    slope: Any = None


def _chain(module: Any) -> _Chain | QuantisedConvolution:
    """The one convolution of a module, and what belongs to it."""
    chains = _chains(module)
    if len(chains) > 1:
        where = f"{chains[1].where}: expected one convolution (layers_from_torch reads several), found another"
        raise UnsupportedError(where)
    return chains[0]


def _chains(module: Any) -> list[_Chain | QuantisedConvolution]:
    """The convolutions of a module in order, each with what belongs to it."""
    chains: list[_Chain | QuantisedConvolution] = []
    pads: list[Any] = []
    steps: Steps | None = None  # how what comes next is stored, where that is known
    for place, part in _flat(module):
        kind, where = _kind(part), f"{place} ({type(part).__name__})" if place else type(part).__name__
        _check_hooks(part, where)
        if kind.startswith("dropout.") and part.training and part.p:
            raise UnsupportedError(f"{where}: expected eval mode, found training mode")
        if kind.startswith("dropout.") or kind == "linear.Identity":
            continue
        if kind == _PAD:
            pads.append((part, where))
        elif kind in _CONVOLUTIONS:
            if part.padding_mode != "zeros":
                raise UnsupportedError(f"{where}: padding_mode: expected 'zeros', found {part.padding_mode!r}")
            chains.append(_Chain(part, place, where, _zeros(pads, kind)))
            pads = []
        elif kind in QUANTISED and not pads:
            chains.append(made := QuantisedConvolution(part, kind, place, where, steps))
            steps = made.stored
        elif kind in (QUANTIZE, DEQUANTIZE) and not pads:
            steps = stored_by(part, where) if kind == QUANTIZE else None
        elif not chains or pads:
            expected = "a convolution of torch.nn with its own forward, or zeros as padding before one"
            raise UnsupportedError(f"{where}: expected {expected}{_way(part)}")
        else:
            _follow(chains[-1], part, kind, where)
    if pads:
        raise UnsupportedError(f"{pads[0][1]}: expected a convolution after it, found none")
    if not chains:
        raise SpecError("module", "a convolution of torch.nn", "none in it", type(module).__name__)
    return chains


def _way(part: Any) -> str:
    """What to do with a module that is no layer."""
    if _is_quantised(part):
        return "; of torch.ao it takes quantised convolutions, alone or with ReLU, as convert makes them"
    if getattr(part, "_modules", None):
        return "; convgen.compile(torch.export.export(module, (x,))) takes whole modules"
    return ""


def _is_quantised(part: Any) -> bool:
    """Whether a class of PyTorch's is of quantised layers, those for training included."""
    parts = [cls.__module__.split(".") for cls in type(part).__mro__]
    return any(names[:2] == ["torch", "ao"] and {"quantized", "qat"} & {*names} for names in parts)


def _follow(chain: _Chain | QuantisedConvolution, part: Any, kind: str, where: str) -> None:
    """Add what follows a convolution to it."""
    if chain.activation != "none":
        raise UnsupportedError(f"{where}: expected nothing after the activation {chain.activation}")
    if isinstance(chain, QuantisedConvolution):
        if kind != "activation.ReLU":
            raise UnsupportedError(f"{where}: expected ReLU or nothing after a quantised convolution{_way(part)}")
        chain.activation = "relu"
        return
    if kind in _NORMS:
        if part.training or part.running_mean is None:
            raise UnsupportedError(f"{where}: expected statistics kept by eval mode, found those of each batch")
        _check_channels("num_features", part.num_features, part.running_mean, chain, where)
        chain.norms.append(part)
    elif kind in _ACTIVATIONS:
        chain.activation = str(_ACTIVATIONS[kind](part))
        if chain.activation == "prelu":
            if part.num_parameters != 1:
                _check_channels("num_parameters", part.num_parameters, part.weight, chain, where)
            chain.slope = part.weight
    else:
        known = ", ".join(name.rpartition(".")[2] for name in _ACTIVATIONS)
        raise UnsupportedError(f"{where}: expected BatchNorm or one of {known}")


def _zeros(pads: list[Any], kind: str) -> list[tuple[int, int]]:
    """What padding modules add before a convolution of a kind, ``(begin, end)`` per axis."""
    rank, transposed = _CONVOLUTIONS[kind]
    total = [(0, 0)] * rank
    for pad, where in pads:
        value = getattr(pad, "value", 0)
        if value != 0:
            raise UnsupportedError(f"{where}: value: expected 0, found {value}")
        if transposed or len(pad.padding) != 2 * rank:
            expected = f"Conv{len(pad.padding) // 2}d"
            raise UnsupportedError(f"{where}: expected {expected} after it, found {kind.partition('.')[2]}")
        if min(pad.padding) < 0:
            raise UnsupportedError(f"{where}: padding: expected no negative one, found {tuple(pad.padding)}")
        pairs = list(zip(pad.padding[::2], pad.padding[1::2], strict=True))[::-1]  # the last axis comes first there
        total = [(begin + b, end + e) for (begin, end), (b, e) in zip(total, pairs, strict=True)]
    return total


def _padding(chain: _Chain) -> Any:
    """A spec's padding: the convolution's own and that before it."""
    conv = chain.conv
    if not any(map(any, chain.pads)):
        return conv.padding  # "same" at stride 1, where it is ONNX's SAME_UPPER
    if conv.padding == "valid":
        return chain.pads
    if conv.padding == "same":
        totals = [(kernel - 1) * dilation for kernel, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
        own = [(total // 2, total - total // 2) for total in totals]
    else:
        own = [(size, size) for size in conv.padding]
    return [(begin + b, end + e) for (begin, end), (b, e) in zip(chain.pads, own, strict=True)]


def _check_hooks(module: Any, where: str) -> None:
    """Refuse hooks that may change what a module takes or gives, those of all modules (torch.nn.modules.module) too."""
    every = sys.modules.get("torch.nn.modules.module")
    for hook in _hooks(module, "_forward_hooks", every, "_global_forward_hooks"):
        raise UnsupportedError(f"{where}: expected no forward hook, found {_hook_name(hook)}")
    for hook in _hooks(module, "_forward_pre_hooks", every, "_global_forward_pre_hooks"):
        origin = getattr(hook, "__func__", type(hook)).__module__  # a lazy module's own is a method
        if not str(origin).startswith(("torch.nn.utils.", "torch.nn.modules.")):
            raise UnsupportedError(f"{where}: expected no forward pre-hook, found {_hook_name(hook)}")


def _hooks(module: Any, name: str, every: Any, global_name: str) -> list[Any]:
    return [*getattr(module, name, {}).values(), *getattr(every, global_name, {}).values()]


def _hook_name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _dtype(chain: _Chain) -> str:
    name = str(chain.conv.weight.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise UnsupportedError(f"{chain.where}: dtype: expected one of {', '.join(_DTYPES)}, found {name}")
    return _DTYPES[name]


def _flat(module: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The modules of nested Sequentials in order, with their places such as ``0.1``."""
    if _kind(module) != "container.Sequential":
        yield place, module
        return
    _check_hooks(module, f"{place} (Sequential)" if place else "Sequential")
    for name, child in module._modules.items():
        yield from _flat(child, f"{place}.{name}" if place else name)


def _kind(module: Any) -> str:
    """The class in torch.nn.modules, or torch.ao.nn, whose ``forward`` the module runs, such as ``conv.Conv2d``; else
    ``""``.
    """
    if {"forward", "_conv_forward"} & set(getattr(module, "__dict__", {})):  # replaced on the instance
        return ""
    classes = type(module).__mro__
    caller = next((cls for cls in classes if {"__call__", "_call_impl"} & set(vars(cls))), None)
    if caller is not None and not caller.__module__.startswith("torch."):
        return ""
    owners = [cls for cls in classes if {"forward", "_conv_forward"} & set(vars(cls)) and cls.__module__ != _OURS]
    if not owners or "forward" not in vars(owners[0]):  # Conv*d.forward is little but its _conv_forward
        return ""
    name = f"{owners[0].__module__}.{owners[0].__qualname__}"
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), "")


def _check_channels(field: str, found: int, parameter: Any, chain: _Chain, where: str) -> None:
    if found != chain.conv.out_channels and not _is_lazy(parameter):
        raise SpecError(field, f"out_channels = {chain.conv.out_channels}", found, where)


def _is_lazy(parameter: Any) -> bool:
    """Whether a parameter has no shape yet."""
    return hasattr(parameter, "materialize")


def _values(name: str, parameter: Any, where: str) -> F64:
    if _is_lazy(parameter) or parameter.is_meta:
        first = "; call the module once, which makes it" if _is_lazy(parameter) else ""
        raise SpecError(name, "a parameter with values", f"one without{first}", where)
    return np.asarray(parameter.detach().cpu().double().resolve_neg())


def _scaled(conv: Any, weights: F64, scale: F64) -> F64:
    """Weights whose output channels are multiplied by ``scale`` ``[oc]``."""
    shape = weights.shape
    if not _CONVOLUTIONS[_kind(conv)][1]:
        return weights * scale.reshape(-1, *(1,) * (len(shape) - 1))
    groups = conv.groups  # [ic, oc/groups, *kernel]
    split = weights.reshape(groups, shape[0] // groups, *shape[1:])
    by_group = scale.reshape(groups, 1, shape[1], *(1,) * (len(shape) - 2))
    return (split * by_group).reshape(shape)
