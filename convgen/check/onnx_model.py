"""ConvSpec to ONNX: what a spec means, in ONNX's own operators.

It is the definition kernels are validated against, so it shares nothing with the TE definition of
:mod:`convgen.lowering.compute`. The way back is :mod:`convgen.formats.onnx.reader`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ..errors import SpecError
from ..problem.dtypes import numpy_dtype
from ..problem.layout import Blocks
from ..problem.spec import ConvSpec
from .onnx_gradients import gradient_of_src, gradient_of_weights, mirrored_weights
from .onnx_integers import ELEMENTS, conv_attributes, quantised, sum_quantised
from .onnx_integers import Constant as _Constant
from .onnx_integers import Emit as _Emit

#: Written models, (opset, IR version): the first with Gelu; for bf16, the first whose Conv takes it.
VERSIONS = {"f32": (20, 9), "f16": (20, 9), "bf16": (22, 10), "i8": (20, 9)}

#: Activation -> ONNX operator, where parameters are attributes in this order.
_OPERATORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "relu": ("Relu", ()),
    "leaky_relu": ("LeakyRelu", ("alpha",)),
    "sigmoid": ("Sigmoid", ()),
    "tanh": ("Tanh", ()),
    "hardswish": ("HardSwish", ()),
    "hardsigmoid": ("HardSigmoid", ("alpha", "beta")),
    "elu": ("Elu", ("alpha",)),
    "gelu": ("Gelu", ()),
}


def onnx_model(
    spec: ConvSpec,
    weights: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    slope: npt.ArrayLike | None = None,
    **others: npt.ArrayLike,
) -> onnx.ModelProto:
    """The spec as an ONNX graph ``src, [parameters], [residual] -> dst``.

    Args:
        weights, bias, slope, others: parameters of the spec as constants, of its shapes and dtypes (a slope may have
            one element). What is not given is a graph input of that name.

    ``src``, ``residual`` and ``dst`` have the spec's layouts; ONNX convolutions are channels-first,
    so others are transposed on the way in and out, and blocks joined and parted.

    Raises:
        SpecError: an array has the wrong shape or dtype, or the spec has no such argument.
    """
    nodes: list[onnx.NodeProto] = []
    dtype = numpy_dtype(spec.dtype)
    inputs = [helper.make_tensor_value_info("src", ELEMENTS[spec.src_dtype], spec.src_shape)]
    constants: list[onnx.TensorProto] = []

    def emit(op: str, *operands: str, output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, operands, [output], name=output, **attributes))
        return output

    def constant(name: str, value: npt.ArrayLike) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype if isinstance(value, float) else None), name))
        return name

    given = {"weights": weights, "bias": bias, "slope": slope, **others}
    for name, array in given.items():
        if array is not None and name not in spec.parameters:
            raise SpecError(name, "none, as the spec has no such argument", "an array", str(spec))
    for name in spec.parameters:
        if (array := given.get(name)) is None:
            inputs.append(helper.make_tensor_value_info(name, ELEMENTS[spec.dtypes[name]], spec.shapes[name]))
        else:
            constant(name, checked(spec, name, array, spec.shapes[name]))

    x = _channels_first("src", spec.src_blocks, spec.src_spatial, emit, constant)
    if spec.direction == "weights":
        gradient = _channels_first("residual", spec.dst_blocks, spec.dst_spatial, emit, constant)
        x = gradient_of_weights(spec, x, gradient, emit, constant)
    elif spec.direction == "data":
        x = gradient_of_src(spec, x, emit, constant)
    elif spec.is_quantised:
        x = quantised(spec, x, emit, constant)
    else:
        weights_name = mirrored_weights(spec, emit, constant) if spec.mirrored else "weights"
        x = _convolution(spec, [x, weights_name, "bias" if spec.bias else ""], emit, constant)
    if "residual" in spec.shapes:
        inputs.append(helper.make_tensor_value_info("residual", ELEMENTS[spec.residual_dtype], spec.shapes["residual"]))
    if spec.residual:
        r = _channels_first("residual", spec.dst_blocks, spec.dst_spatial, emit, constant)
        x = sum_quantised(spec, x, r, emit, constant) if spec.is_quantised else emit("Add", x, r, output="added")
    if not spec.is_quantised:
        x = _activation(spec, x, emit, constant)
    if spec.direction != "weights":  # whose dst is no image
        _stored(x, spec.dst_blocks, spec.dst_spatial, emit, constant)
    nodes[-1].output[0] = "dst"

    outputs = [helper.make_tensor_value_info("dst", ELEMENTS[spec.dst_dtype], spec.dst_shape)]
    graph = helper.make_graph(nodes, spec.name, inputs, outputs, constants)
    opset, ir_version = VERSIONS[spec.dtype]
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version, producer_name="convgen"
    )


def _channels_first(tensor: str, blocks: Blocks, spatial: tuple[int, ...], emit: _Emit, constant: _Constant) -> str:
    """A tensor of any layout as ONNX has it."""
    rank, output = len(spatial), f"{tensor}_nchw"
    if blocks.layout == "nchw":
        return tensor
    if blocks.is_plain:
        return emit("Transpose", tensor, output=output, perm=(0, rank + 1, *range(1, rank + 1)))
    beside = emit("Transpose", tensor, output=f"{tensor}_parts", perm=(0, 1, rank + 2, *range(2, rank + 2)))
    shape = constant(f"{output}_shape", np.array([0, blocks.channels, *spatial], np.int64))  # 0: as it is
    return emit("Reshape", beside, shape, output=output)


def _stored(tensor: str, blocks: Blocks, spatial: tuple[int, ...], emit: _Emit, constant: _Constant) -> str:
    """The inverse of :func:`_channels_first`: the result in dst's layout."""
    rank = len(spatial)
    if blocks.layout == "nchw":
        return tensor
    if blocks.is_plain:
        return emit("Transpose", tensor, output="dst", perm=(0, *range(2, rank + 2), 1))
    parts = np.array([0, blocks.channels // blocks.size, blocks.size, *spatial], np.int64)
    tensor = emit("Reshape", tensor, constant("dst_parts_shape", parts), output="dst_parts")
    return emit("Transpose", tensor, output="dst", perm=(0, 1, *range(3, rank + 3), 2))


def checked(spec: ConvSpec, name: str, array: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The array, which must be stored as the spec says and have ``shape``; a slope of one element is broadcast.

    Raises:
        SpecError: the shape or dtype is another.
    """
    a = np.asarray(array)
    if a.dtype != (dtype := numpy_dtype(spec.dtypes[name])):
        raise SpecError(name, f"dtype {dtype.name}", a.dtype, str(spec))
    if name == "slope" and a.size == 1:
        a = np.broadcast_to(a.reshape(1), shape)
    if a.shape != shape:
        raise SpecError(name, f"shape {shape}", a.shape, str(spec))
    return np.ascontiguousarray(a)


def _convolution(spec: ConvSpec, operands: list[str], emit: _Emit, constant: _Constant) -> str:
    x, weights, bias = operands
    attributes = conv_attributes(spec)
    with_bias = [x, weights, bias] if bias else [x, weights]
    if not spec.transposed:
        return emit("Conv", *with_bias, output="conv", **attributes)
    if all(extra < s for extra, s in zip(spec.output_padding, spec.stride, strict=True)):
        return emit("ConvTranspose", *with_bias, output="conv", output_padding=spec.output_padding, **attributes)
    # ONNX allows output padding below the dilation; ONNX Runtime refuses it from the stride on
    # ("computed output shape is inconsistent"). What it adds lies beyond every window: zeros, put
    # there before the crop and the bias.
    y = emit("ConvTranspose", x, weights, output="conv", **attributes | {"pads": [0] * (2 * spec.rank)})
    amounts = constant("amounts", np.array([0] * (spec.rank + 4) + list(spec.output_padding), np.int64))
    y = emit("Pad", y, amounts, output="padded")
    first = np.array([begin for begin, _ in spec.padding], np.int64)
    bounds = {"starts": first, "stops": first + spec.out_spatial, "axes": np.arange(2, spec.rank + 2)}
    y = emit("Slice", y, *(constant(name, value) for name, value in bounds.items()), output="cropped")
    if bias:
        shape = constant("bias_shape", np.array([spec.oc] + [1] * spec.rank, np.int64))
        y = emit("Add", y, emit("Reshape", bias, shape, output="bias_nchw"), output="biased")
    return y


def _activation(spec: ConvSpec, x: str, emit: _Emit, constant: _Constant) -> str:
    name, params = spec.activation_op.name, spec.activation_op.params
    if name == "none":
        return x
    if name == "prelu":
        shape = constant("slope_shape", np.array([spec.oc] + [1] * spec.rank, np.int64))
        return emit("PRelu", x, emit("Reshape", "slope", shape, output="slope_nchw"), output="act")
    if name == "clip":
        # Both bounds are always written: ONNX Runtime's default is the largest finite number,
        # which would turn an infinity into a finite value.
        bounds = [constant(f"clip_{word}", p) for word, p in zip(("min", "max"), params, strict=True)]
        return emit("Clip", x, *bounds, output="act")
    if name == "silu":
        return emit("Mul", x, emit("Sigmoid", x, output="gate"), output="act")
    if name == "mish":  # ONNX has Mish from opset 18 on only, and ONNX Runtime decomposes it anyway
        gate = emit("Tanh", emit("Softplus", x, output="softplus"), output="gate")
        return emit("Mul", x, gate, output="act")
    if name == "gelu_tanh":
        return emit("Gelu", x, output="act", approximate="tanh")
    op, attributes = _OPERATORS[name]
    return emit(op, x, output="act", **dict(zip(attributes, params, strict=True)))
