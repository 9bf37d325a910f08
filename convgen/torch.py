"""Convolutions for PyTorch that train: modules and functions in place of ``torch.nn``'s, computed by convgen's kernels.

And :func:`wait`, for what ``torch.compile(…, backend="convgen", options={"background": True})`` compiles.

>>> import convgen.torch
>>> layer = convgen.torch.Conv2d(64, 128, 3, padding=1)  # doctest: +SKIP
>>> convgen.torch.replace(model)  # doctest: +SKIP

Their state dicts are ``torch.nn``'s, and so are their arguments and results, the layout of tensors included. A kernel
is built when a layer first meets sizes: seconds, once. Numbers of 64 bits on the CPU are computed by the definition,
for ``torch.autograd.gradcheck``; tensors that are neither these nor f32, f16 or bf16 there, by PyTorch. See
``docs/gradients.md``.
"""

from __future__ import annotations

from .bridges.torch.functional import (
    CallError,
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from .bridges.torch.modules import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    replace,
    restore,
)
from .network.apart import wait

__all__ = [
    "CallError",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "replace",
    "restore",
    "wait",
]
