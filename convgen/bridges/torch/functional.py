"""``torch.nn.functional``'s convolutions, by convgen's operators: the same arguments and results, gradients too."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...errors import SpecError
from .convolution import convolution

Sizes = int | Sequence[int]


class CallError(SpecError, RuntimeError):
    """A call whose tensors do not fit, which PyTorch's own functions refuse with a ``RuntimeError``."""


def _each(name: str, value: Sizes, rank: int) -> list[int]:
    """A number for each axis."""
    values = [value] * rank if isinstance(value, int) else list(value)
    values = values * rank if len(values) == 1 else values
    if len(values) != rank:
        raise SpecError(name, f"a number, or {rank} of them", repr(value))
    return values


def _pads(padding: Sizes | str, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Begin and end of each axis."""
    rank = weight.dim() - 2
    if not isinstance(padding, str):
        return [p for p in _each("padding", padding, rank) for _ in range(2)]
    if padding == "valid":
        return [0] * (2 * rank)
    if padding != "same" or set(stride) != {1}:
        raise SpecError("padding", "numbers, valid, or same where the stride is 1", repr(padding))
    totals = [d * (k - 1) for d, k in zip(dilation, _taps(weight), strict=True)]
    return [part for total in totals for part in (total // 2, total - total // 2)]


def _taps(weight: Tensor) -> list[int]:
    """The sizes of a kernel; while PyTorch traces for ONNX they are tensors, which it warns to make numbers of."""
    if not torch.jit.is_tracing():
        return list(weight.shape[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return [int(size) for size in weight.shape[2:]]


def _batched(x: Tensor, rank: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Of a single image, or of a batch."""
    if x.dim() not in (rank + 1, rank + 2):
        raise CallError("input", f"{rank + 1} or {rank + 2} axes", x.dim())
    return compute(x) if x.dim() == rank + 2 else compute(x.unsqueeze(0)).squeeze(0)


def convolve(
    rank: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    groups: int,
    output_padding: Sizes | None = None,
) -> Tensor:
    """A convolution of any rank; a transposed one where ``output_padding`` is given.

    Under ``torch.autocast`` it is of the type that PyTorch's own is. One of complex numbers is PyTorch's own.

    Raises:
        SpecError: an argument is wrong.
        NotImplementedError: derivatives in forward mode are asked for.
    """
    tensors = {"input": x, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (name != "bias" or tensor is not None):
            raise SpecError(name, "a tensor", type(tensor).__name__)
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name}: expected no tangent: convgen's convolutions have no forward mode")
    if x.is_complex():  # which PyTorch's functions take apart, and its operators do not know
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        if output_padding is not None:
            options |= {"output_padding": output_padding}
        theirs = getattr(torch.nn.functional, f"conv{'' if output_padding is None else '_transpose'}{rank}d")
        made: Tensor = theirs(x, weight, bias, **options)
        return made
    strides, steps = _each("stride", stride, rank), _each("dilation", dilation, rank)
    pads = _pads(padding, weight, strides, steps)
    transposed = output_padding is not None
    extra = _each("output_padding", 0 if output_padding is None else output_padding, rank)
    _check_channels(rank, x, weight, groups, transposed)
    x, weight = _autocast(x, x), _autocast(weight, x)
    bias = None if bias is None else _autocast(bias, x)
    trains = torch.is_grad_enabled() and weight.requires_grad
    rest = (strides, pads, steps, transposed, extra, groups, trains)
    return _batched(x, rank, lambda images: convolution(images, weight, bias, *rest))


def _check_channels(rank: int, x: Tensor, weight: Tensor, groups: int, transposed: bool) -> None:
    if weight.dim() != rank + 2:
        raise CallError("weight", f"{rank + 2} axes", weight.dim())
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    if torch.jit.is_tracing():  # sizes are tensors then; the operator itself checks them
        return
    if x.dim() > rank and x.shape[-rank - 1] != channels:
        raise CallError("input", f"{channels} channels, as the weight has", f"{x.shape[-rank - 1]}")


def _autocast(tensor: Tensor, x: Tensor) -> Tensor:
    """A tensor as ``torch.autocast`` has it where x lies: it casts what convolutions read, but never f64."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _conv(rank: int) -> Callable[..., Tensor]:
    def conv(
        input: Tensor,  # noqa: A002  (as PyTorch has it)
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Tensor:
        return convolve(rank, input, weight, bias, stride, padding, dilation, groups)

    return _named(conv, f"conv{rank}d", rank)


def _conv_transpose(rank: int) -> Callable[..., Tensor]:
    def conv(
        input: Tensor,  # noqa: A002  (as PyTorch has it)
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        dilation: Sizes = 1,
    ) -> Tensor:
        return convolve(rank, input, weight, bias, stride, padding, dilation, groups, output_padding)

    return _named(conv, f"conv_transpose{rank}d", rank)


def _named(function: Any, name: str, rank: int) -> Callable[..., Tensor]:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"``torch.nn.functional.{name}``, of images with {rank} axes or of one."
    return function  # type: ignore[no-any-return]


conv1d, conv2d, conv3d = (_conv(rank) for rank in (1, 2, 3))
conv_transpose1d, conv_transpose2d, conv_transpose3d = (_conv_transpose(rank) for rank in (1, 2, 3))
