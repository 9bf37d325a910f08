"""Gradients of a layer as PyTorch's autograd has them: a second reference, which shares nothing with the first."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from ..problem.dtypes import widen
from ..problem.spec import ConvSpec
from .data import Arrays

if TYPE_CHECKING:
    import numpy.typing as npt


def is_installed() -> bool:
    """Whether PyTorch is, and can be imported."""
    try:
        import_module("torch")
    except ImportError:
        return False
    return True


def gradients(spec: ConvSpec, data: Arrays) -> npt.NDArray[np.float64]:
    """Of a spec of direction ``data`` or ``weights``, in f64, of the shape and layout of its dst.

    Args:
        data: src, and the weights or the residual, of shapes that the spec says, of any type of floats.
    """
    import torch

    layer = spec.with_(direction="forward")

    def image(name: str, blocks: Any) -> Any:
        return torch.tensor(np.ascontiguousarray(blocks.channels_first(widen(data[name]))), dtype=torch.float64)

    x = torch.zeros((spec.n, spec.ic, *spec.in_spatial), dtype=torch.float64)
    weights, bias = (torch.zeros(shape, dtype=torch.float64) for shape in (spec.weights_shape, (spec.oc,)))
    if spec.direction == "data":
        gradient, weights = image("src", spec.src_blocks), torch.tensor(widen(data["weights"]), dtype=torch.float64)
    else:
        x, gradient = image("src", spec.src_blocks), image("residual", spec.dst_blocks)
    for tensor in (x, weights, bias):
        tensor.requires_grad_()
    functional = torch.nn.functional
    convolve = getattr(functional, f"conv{'_transpose' * spec.transposed}{spec.rank}d")
    options = {"stride": spec.stride, "dilation": spec.dilation, "groups": spec.groups}
    pads = [amount for pair in reversed(layer.padding) for amount in pair]
    if spec.transposed:
        ends = reversed(list(zip(spec.padding, spec.output_padding, strict=True)))
        crop = [amount for (begin, end), extra in ends for amount in (-begin, extra - end)]
        y = functional.pad(convolve(x, weights, None, **options), crop) + bias.reshape(-1, *(1,) * spec.rank)
    else:
        y = convolve(functional.pad(x, pads), weights, bias, **options)
    of_src, of_weights, of_bias = (t.numpy() for t in torch.autograd.grad(y, (x, weights, bias), gradient))
    if spec.direction == "data":
        return np.asarray(spec.dst_blocks.stored(of_src))
    return np.concatenate([of_weights.reshape(-1), of_bias]) if spec.bias else np.asarray(of_weights)
