"""Gradients of a layer in ONNX's own operators: that of src as the transposed layer, that of weights as a convolution
whose weights are the gradient of dst.

Like all of :mod:`convgen.check.onnx_model` it shares nothing with :mod:`convgen.lowering.compute`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..problem.spec import ConvSpec
from .onnx_integers import Constant, Emit, conv_attributes


def gradient_of_src(spec: ConvSpec, src: str, emit: Emit, constant: Constant) -> str:
    """Of the gradient of dst and the weights, channels first."""
    attributes = conv_attributes(spec)
    if not spec.transposed:
        reached = [
            (o - 1) * s + w - b - e
            for o, s, w, (b, e) in zip(spec.out_spatial, spec.stride, spec.window, spec.padding, strict=True)
        ]  # rows past the last window's end get nothing
        extra = [size - end for size, end in zip(spec.in_spatial, reached, strict=True)]
        return emit("ConvTranspose", src, "weights", output="conv", output_padding=extra, **attributes)
    x = emit("Conv", src, "weights", output="conv", **attributes)
    return _first(x, spec.in_spatial, "rows", emit, constant)


def gradient_of_weights(spec: ConvSpec, src: str, gradient: str, emit: Emit, constant: Constant) -> str:
    """Of src and the gradient of dst, channels first; flat with that of bias after it, where there is one.

    A tap's gradient is a sum over images and pixels: a convolution whose channels are the images, whose images are the
    channels, and whose steps between taps and pixels have changed places.
    """
    image, kernel, own = src, gradient, spec.ic // spec.groups
    sizes, taps = spec.in_spatial, spec.out_spatial
    if spec.transposed:  # each pixel of src is multiplied with those of dst that it reaches
        image, kernel, own = gradient, src, spec.oc // spec.groups
        sizes, taps = taps, sizes
    parted = _reshaped(image, [spec.n, spec.groups, own, *sizes], "parted", emit, constant)
    axes = range(3, spec.rank + 3)
    turned = emit("Transpose", parted, output="turned", perm=(2, 1, 0, *axes))
    images = _reshaped(turned, [own, spec.groups * spec.n, *sizes], "images", emit, constant)
    kernels = emit("Transpose", kernel, output="kernels", perm=(1, 0, *range(2, spec.rank + 2)))
    attributes = conv_attributes(spec) | {"strides": spec.dilation, "dilations": spec.stride, "kernel_shape": taps}
    x = emit("Conv", images, kernels, output="conv", **attributes)
    x = _first(x, spec.kernel, "taps", emit, constant)
    x = emit("Transpose", x, output="gradient", perm=(1, 0, *range(2, spec.rank + 2)))
    if not spec.bias:
        return x
    summed = constant("summed", np.array([0, *range(2, spec.rank + 2)], np.int64))
    of_bias = emit("ReduceSum", gradient, summed, output="bias_gradient", keepdims=0)
    return emit("Concat", _reshaped(x, [-1], "flat", emit, constant), of_bias, output="gradients", axis=0)


def mirrored_weights(spec: ConvSpec, emit: Emit, constant: Constant) -> str:
    """``[ic, oc/groups, *kernel]`` as a convolution has weights, taps in the opposite order."""
    own, group = spec.ic // spec.groups, spec.oc // spec.groups
    parted = _reshaped("weights", [spec.groups, own, group, *spec.kernel], "weights_parted", emit, constant)
    turned = emit("Transpose", parted, output="weights_turned", perm=(0, 2, 1, *range(3, spec.rank + 3)))
    x = _reshaped(turned, [spec.oc, own, *spec.kernel], "weights_joined", emit, constant)
    backwards = {
        "last": np.full(spec.rank, -1, np.int64),
        "before": np.full(spec.rank, np.iinfo(np.int64).min, np.int64),
        "spatial": np.arange(2, spec.rank + 2),
        "back": np.full(spec.rank, -1, np.int64),
    }
    return emit("Slice", x, *(constant(name, value) for name, value in backwards.items()), output="weights_mirrored")


def _reshaped(tensor: str, shape: Sequence[int], output: str, emit: Emit, constant: Constant) -> str:
    return emit("Reshape", tensor, constant(f"{output}_shape", np.array(shape, np.int64)), output=output)


def _first(tensor: str, sizes: Sequence[int], name: str, emit: Emit, constant: Constant) -> str:
    """The first of all rows and columns."""
    rank = len(sizes)
    bounds = [np.zeros(rank, np.int64), np.array(sizes, np.int64), np.arange(2, rank + 2)]
    words = [f"{name}_{word}" for word in ("start", "end", "axes")]
    named = (constant(word, value) for word, value in zip(words, bounds, strict=True))
    return emit("Slice", tensor, *named, output=f"{name}_cropped")
