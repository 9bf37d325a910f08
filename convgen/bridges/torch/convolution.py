"""Convolutions and their gradients as operators of PyTorch, with autograd, and with fake kernels for ``torch.compile``:
``convgen::convolution``, ``convgen::gradient_of_input`` and ``convgen::gradient_of_weight``.

A kernel is built at the first call with a layer's sizes, and kept. Tensors of f32, f16 and bf16 on the CPU are computed
by convgen, contiguous or channels last, as they come; those of f64 by the definition
(:mod:`convgen.bridges.torch.doubles`); all others by PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.onnx import symbolic_helper

from ...hardware.target import Target, resolve
from ...kernel.kernel import Kernel, compile_candidate
from ...lowering.schedule import Candidate
from ...problem.spec import ConvSpec
from ...records.answer import choose, find_record
from ...records.opening import open_store
from ...records.record import TuningRecord
from . import doubles
from .packed import layer_of

_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@cache
def kernel_of(spec: ConvSpec, threads: int, repacked: bool = False) -> Kernel:
    """The kernel of a layer: by its record, where there is one for it as it is, else the default.

    Args:
        repacked: its weights change from call to call, so that the default is that with the time of packing them.
    """
    target = resolve("cpu").on(threads)
    with open_store(None, write=False) as store:
        answer = find_record(store, spec, target, threads) if store is not None else None
    record = None if answer is None or answer.to_measure else answer.record
    candidate, record = choose(spec, target, record, frozenset(), repacked=repacked)
    return _compiled(spec, target, candidate, threads, record)


@cache
def _compiled(
    spec: ConvSpec, target: Target, candidate: Candidate, threads: int, record: TuningRecord | None
) -> Kernel:
    """One kernel, whether weights change or not, where the candidate is one."""
    return compile_candidate(spec, target, candidate, threads, record=record)


def is_last(*tensors: Tensor) -> bool:
    """Whether PyTorch computes channels last: where the channels of one of the images or weights lie innermost.

    Where axes of one element leave open how a tensor lies, its strides still say which format it was given.
    """
    return any(_lies_last(tensor) for tensor in tensors)


def _lies_last(x: Tensor) -> bool:
    form = _LAST.get(x.dim() - 2)
    if form is None or not x.is_contiguous(memory_format=form):
        return False
    return not x.is_contiguous() or x.stride() == _strides(x.shape, True) != _strides(x.shape, False)


def _strides(sizes: Sequence[int], last: bool) -> tuple[int, ...]:
    """Those of a tensor in a memory format, axes of one element too."""
    axes = tuple(range(len(sizes)))
    order = (0, *axes[2:], 1) if last else axes
    inside = {axis: order[place + 1 :] for place, axis in enumerate(order)}
    return tuple(math.prod(sizes[inner] for inner in inside[axis]) for axis in axes)


def spec_of(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    **more: Any,
) -> ConvSpec:
    """The layer of a call; ``padding`` is begin and end of each axis, one after another."""
    outer, inner, *kernel = weight_shape
    ic, oc = (outer, inner * groups) if transposed else (inner * groups, outer)
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return ConvSpec(
        x_shape[0],
        ic,
        oc,
        tuple(x_shape[2:]),
        tuple(kernel),
        tuple(stride),
        pairs,
        tuple(dilation),
        groups,
        transposed,
        tuple(output_padding),
        dtype=_DTYPES[dtype],
        **more,
    )


def _kernel(x: Tensor, weight: Tensor, options: Sequence[Any], repacked: bool = False, **more: Any) -> Kernel:
    """The kernel of a call, of images as PyTorch lays them out."""
    layout = "nhwc" if is_last(x, weight) else "nchw"
    spec = spec_of(x.shape, weight.shape, x.dtype, *options, layout=layout, **more)
    return kernel_of(spec, torch.get_num_threads(), repacked)


def _is_ours(*tensors: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    return all(t.device.type == "cpu" and t.dtype in _DTYPES and t.dtype == given[0].dtype for t in given)


def _are_doubles(*tensors: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    return all(t.device.type == "cpu" and t.dtype == torch.float64 for t in given)


def _numbers(x: Tensor) -> Any:
    """A tensor's numbers, in NumPy."""
    return x.detach().numpy()


def _tensor(made: Any, last: bool) -> Tensor:
    """A tensor of f64, in PyTorch's format."""
    return _formed(torch.from_numpy(made), last)


def _formed(x: Tensor, last: bool) -> Tensor:
    """An image or weights in a memory format."""
    if not last:
        return x.contiguous()
    dense = x.contiguous(memory_format=_LAST[x.dim() - 2])
    return dense.as_strided(dense.shape, _strides(dense.shape, last))


def _stored(x: Tensor, last: bool) -> Tensor:
    """An image as a kernel reads it: channels last as an array with channels last."""
    x = x.detach()
    if not last:
        return x.contiguous()
    return x.permute(0, *range(2, x.dim()), 1).contiguous()


def _image(x: Tensor, last: bool) -> Tensor:
    return x.permute(0, x.dim() - 1, *range(1, x.dim() - 1)) if last else x


def _empty(x: Tensor, shape: Sequence[int], last: bool) -> Tensor:
    form = _LAST[x.dim() - 2] if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


def _even(x: Tensor, padding: Sequence[int], transposed: bool) -> tuple[Tensor, list[int]]:
    """An input padded where its two ends differ, and the padding that is left: PyTorch takes one number of both."""
    begins, ends = list(padding[::2]), list(padding[1::2])
    if begins == ends or transposed:
        return x, begins
    pads = [amount for pair in reversed(list(zip(begins, ends, strict=True))) for amount in pair]
    return torch.nn.functional.pad(x, pads), [0] * len(begins)


@torch.library.custom_op("convgen::convolution", mutates_args=())  # type: ignore[untyped-decorator]
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    trains: bool = False,
) -> Tensor:
    """A convolution of images ``[n, ic, *spatial]``; ``padding`` is begin and end of each axis. ``trains``: the weight
    changes from call to call; a kernel is chosen by the time of packing it, too.
    """
    options = (stride, padding, dilation, transposed, output_padding, groups)
    last = is_last(x, weight)
    if _are_doubles(x, weight, bias):
        shape, given = _shape(x, weight, options), None if bias is None else _numbers(bias)
        return _tensor(doubles.convolution(_numbers(x), _numbers(weight), given, shape, options), last)
    if not _is_ours(x, weight, bias) or x.shape[0] == 0:
        even, pads = _even(x, padding, transposed)
        made = torch.ops.aten.convolution(
            even, weight, bias, stride, pads, dilation, transposed, output_padding, groups
        )
        return _formed(made, last)
    kernel = _kernel(x, weight, options, trains, bias=bias is not None)
    with layer_of(kernel, weight, bias) as layer:
        return _image(layer(_stored(x, last)), last)


def _shape(x: Tensor, weight: Tensor, options: Sequence[Any]) -> tuple[Any, ...]:
    """The shape of a convolution's output, whose sizes may be symbols."""
    stride, padding, dilation, transposed, output_padding, groups = options
    sizes = []
    for axis, (size, kernel) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True)):
        window, pads = dilation[axis] * (kernel - 1) + 1, padding[2 * axis] + padding[2 * axis + 1]
        if transposed:
            sizes.append((size - 1) * stride[axis] + output_padding[axis] + window - pads)
        else:
            sizes.append((size + pads - window) // stride[axis] + 1)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return (x.shape[0], channels, *sizes)


@convolution.register_fake  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return _empty(x, _shape(x, weight, options[:6]), is_last(x, weight))


#: The arguments of both gradients, for PyTorch.
_OF_GRADIENTS = (
    "(Tensor gradient, Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "bool transposed, SymInt[] output_padding, SymInt groups) -> Tensor"
)


@torch.library.custom_op("convgen::gradient_of_input", mutates_args=(), schema=_OF_GRADIENTS)  # type: ignore[untyped-decorator]
def gradient_of_input(gradient: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    """The gradient of a convolution's input, of its shape, from that of its output; ``options`` as of
    :func:`convolution` from ``stride`` on.
    """
    if _are_doubles(gradient, x, weight):
        made = doubles.gradient_of_input(_numbers(gradient), x.shape, _numbers(weight), options)
        return _tensor(made, is_last(x, weight))
    if not _is_ours(gradient, x, weight) or x.shape[0] == 0:
        return _by_pytorch(gradient, x, weight, options, 0)
    last = is_last(x, weight)
    with layer_of(_kernel(x, weight, options, True, direction="data"), weight) as layer:
        return _image(layer(_stored(gradient, last)), last)


@gradient_of_input.register_fake  # type: ignore[untyped-decorator]
def _(gradient: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    return _empty(x, x.shape, is_last(x, weight))


@torch.library.custom_op("convgen::gradient_of_weight", mutates_args=(), schema=_OF_GRADIENTS)  # type: ignore[untyped-decorator]
def gradient_of_weight(gradient: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    """The gradient of a convolution's weight, of its shape, from that of its output; ``options`` as of
    :func:`convolution` from ``stride`` on.
    """
    if _are_doubles(gradient, x, weight):
        made = doubles.gradient_of_weight(_numbers(gradient), _numbers(x), weight.shape, options)
        return _tensor(made, is_last(x, weight))
    if not _is_ours(gradient, x, weight) or x.shape[0] == 0:
        return _by_pytorch(gradient, x, weight, options, 1)
    last = is_last(x, weight)
    layer = _kernel(x, weight, options, direction="weights", bias=False).bind()
    return _formed(layer(_stored(x, last), residual=_stored(gradient, last)), last)


@gradient_of_weight.register_fake  # type: ignore[untyped-decorator]
def _(gradient: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    return _empty(x, weight.shape, is_last(x, weight))


def _by_pytorch(gradient: Tensor, x: Tensor, weight: Tensor, options: Sequence[Any], which: int) -> Tensor:
    """The gradient of the input (0) or of the weight (1) as PyTorch computes it."""
    stride, padding, dilation, transposed, output_padding, groups = options
    (even, pads), last = _even(x, padding, transposed), is_last(x, weight)
    if x.shape[0] == 0:
        return _formed(torch.zeros_like(weight if which else x), last)
    wanted = [index == which for index in range(3)]
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    made: Tensor = torch.ops.aten.convolution_backward(
        gradient, even, weight, [channels], stride, pads, dilation, transposed, output_padding, groups, wanted
    )[which]
    if which == 1:
        return _formed(made, last)
    begins = [0] * len(pads) if pads == list(padding[::2]) else list(padding[::2])
    inside = made[(..., *(slice(b, b + size) for b, size in zip(begins, x.shape[2:], strict=True)))]
    return _formed(inside, last)


def _no_second(ctx: Any, gradient: Tensor) -> Any:
    """What PyTorch calls for a derivative of a gradient."""
    way = "convgen.torch.restore(model) makes them torch.nn's, which have one"
    raise NotImplementedError(f"convgen's convolutions have no second derivative; {way}")


for _gradient in (gradient_of_input, gradient_of_weight):
    _gradient.register_autograd(_no_second)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *options = inputs
    ctx.options = options[:6]
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
    return (
        gradient_of_input(gradient, x, weight, *ctx.options) if of_x else None,
        gradient_of_weight(gradient, x, weight, *ctx.options) if of_weight else None,
        gradient.sum((0, *range(2, gradient.dim()))) if of_bias else None,
        *[None] * 7,
    )


convolution.register_autograd(_backward, setup_context=_keep)


def _as_onnx(
    graph: Any,
    x: Any,
    weight: Any,
    bias: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    trains: bool,
) -> Any:
    """ONNX's node of a convolution, for ``torch.onnx.export(…, dynamo=False)``."""
    operands = [x, weight] if bias.node().mustBeNone() else [x, weight, bias]
    sizes = {"strides_i": stride, "pads_i": padding[::2] + padding[1::2], "dilations_i": dilation, "group_i": groups}
    if transposed:
        return graph.op("ConvTranspose", *operands, **sizes, output_padding_i=output_padding)
    return graph.op("Conv", *operands, **sizes)


_ARGUMENTS = ("v", "v", "v", "is", "is", "is", "b", "is", "i", "b")
torch.onnx.register_custom_op_symbolic(
    "convgen::convolution", symbolic_helper.parse_args(*_ARGUMENTS)(_as_onnx), opset_version=9
)
