"""Layers of 8-bit integers in the libraries that convgen is measured against, in the form that each has fast code for.

Scales are of the layer as it is (:mod:`convgen.check.onnx_model`): src and dst have steps of 1, weights the layer's
scale per channel, so that sums times a channel's scale are steps of dst.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ..check.data import Arrays
from ..check.onnx_integers import conv_attributes
from ..errors import UnsupportedError
from ..problem.dtypes import RANGES
from ..problem.spec import ConvSpec

#: PyTorch's engines of integers on x86. It takes the first for most layers, the second for those of many groups.
ENGINES = ("onednn", "fbgemm")
#: Of the models that are made: ONNX's operators, and the version of the format.
_OPSET, _IR = 17, 9
_ONNX = {"u8": TensorProto.UINT8, "i8": TensorProto.INT8}


def _needs(condition: bool, what: str) -> None:
    if not condition:
        raise UnsupportedError(what)


def qdq_model(spec: ConvSpec, data: Arrays, *, transposed: bool = False) -> ModelProto:
    """The layer as a convolution between DequantizeLinear and QuantizeLinear, which compilers make one operator of.

    Tensors in NHWC, which ONNX does not have, are transposed outside of these, as their bytes: compilers whose code
    computes in NHWC find that nothing moves.

    Args:
        transposed: whether transposed layers are taken too, which no compiler fuses: they are computed in f32 between.

    Raises:
        UnsupportedError: it is transposed, its tensors are in blocks of channels, or its dst is not of 8 bits.
    """
    _needs(transposed or not spec.transposed, "its compiler does not fuse transposed convolutions of integers")
    _needs(not spec.transposed or spec.groups == 1, "has no scales of the channels of groups that are transposed")
    _needs(spec.src_blocks.is_plain and spec.dst_blocks.is_plain, "takes NCHW and NHWC only")
    _needs(not spec.residual, "rounds once where a residual is added, not twice")
    _needs(spec.dst_dtype in RANGES, "gives 8-bit integers only")
    constants, nodes = dict[str, Any](), []

    def add(kind: str, names: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, names, [output], **attributes))
        return output

    def scaled(kind: str, name: str, tensor: str, output: str, scale: Any, **attributes: Any) -> str:
        zero = np.broadcast_to(data.get(f"{name}_zero", np.zeros(1)), np.shape(scale) or (1,)).reshape(np.shape(scale))
        constants[f"{name}_scale"] = np.asarray(scale, np.float32)
        constants[f"{name}_zero"] = zero.astype(np.uint8 if spec.dtypes[name] == "u8" else np.int8)
        return add(kind, [tensor, f"{name}_scale", f"{name}_zero"], output, **attributes)

    constants["weights"] = data["weights"]
    scale, src, stored = data["scale"], "src", "dst"
    if spec.layout == "nhwc":
        src = add("Transpose", ["src"], "channels_first", perm=(0, spec.rank + 1, *range(1, spec.rank + 1)))
    names = [
        scaled("DequantizeLinear", "src", src, "numbers", 1.0),
        scaled("DequantizeLinear", "weights", "weights", "factors", scale, axis=int(spec.transposed)),
    ]
    if spec.bias:
        constants["bias"] = (data["bias"] * scale.astype(np.float64)).astype(np.float32)
        names.append("bias")
    kind, attributes = "Conv", conv_attributes(spec)
    if spec.transposed:
        kind, attributes = "ConvTranspose", attributes | {"output_padding": spec.output_padding}
    blob = add(kind, names, "sums", **attributes)
    name, bounds = spec.activation_op.name, spec.activation_op.params
    if name == "relu":
        blob = add("Relu", [blob], "active")
    elif name == "clip":
        constants |= {f"bound{i}": np.asarray(np.float32(bound)) for i, bound in enumerate(bounds)}
        blob = add("Clip", [blob, "bound0", "bound1"], "active")
    if spec.dst_layout == "nhwc":
        stored = "stored"
    scaled("QuantizeLinear", "dst", blob, stored, 1.0)
    if spec.dst_layout == "nhwc":
        add("Transpose", [stored], "dst", perm=(0, *range(2, spec.rank + 2), 1))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("src", _ONNX[spec.src_dtype], spec.src_shape)],
        [helper.make_tensor_value_info("dst", _ONNX[spec.dst_dtype], spec.dst_shape)],
        [numpy_helper.from_array(np.ascontiguousarray(value), key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)


def torch_layer(spec: ConvSpec, data: Arrays, form: Any, engine: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """PyTorch's quantised operator: ``(run, output)``, src in a memory format.

    An array in NHWC is a tensor with its channels last as it lies in memory: it is given as that, and what comes out,
    of this format whatever went in, is dst as it lies in memory, too.

    Args:
        engine: whose kernel runs, one of :data:`ENGINES`.

    Raises:
        UnsupportedError: it has no such operator.
    """
    import torch

    _needs((spec.src_dtype, spec.weights_dtype, spec.dst_dtype) == ("u8", "i8", "u8"), "multiplies u8 by i8 to u8 only")
    _needs(not spec.weights_zero and not spec.transposed, "has no such operator of integers")
    _needs(all(begin == end for begin, end in spec.padding), "pads evenly only")
    _needs(not spec.residual, "rounds once where a residual is added, not twice")
    _needs(spec.activation_op.name in ("none", "relu"), f"has no {spec.activation_op.name} of integers")
    zeros = {name: int(data[name][0]) if name in data else 0 for name in ("src_zero", "dst_zero")}
    scale = torch.from_numpy(data["scale"].astype(np.float64))
    bias = torch.from_numpy((data["bias"] * data["scale"]).astype(np.float32)) if spec.bias else None
    operators, last = torch.ops.quantized, spec.layout == "nhwc"
    torch.backends.quantized.engine = engine  # whose the packed weights are
    values = torch.from_numpy(data["src"])
    if last:
        values = values.permute(0, spec.rank + 1, *range(1, spec.rank + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # these tensors are going to be removed
        channels = torch.zeros(spec.oc, dtype=torch.long)
        weights = torch._make_per_channel_quantized_tensor(torch.from_numpy(data["weights"]), scale, channels, 0)
        src = torch._make_per_tensor_quantized_tensor(values, 1.0, zeros["src_zero"])
    src = src.contiguous(memory_format=form)
    padding = [begin for begin, _ in spec.padding]
    prepack = getattr(operators, f"conv{spec.rank}d_prepack")
    packed = prepack(weights, bias, spec.stride, padding, spec.dilation, spec.groups)
    convolve = getattr(operators, f"conv{spec.rank}d{'_relu' if spec.activation_op.name == 'relu' else ''}")
    result: list[Any] = [None]

    def run() -> None:
        result[0] = convolve(src, packed, 1.0, zeros["dst_zero"])

    def output() -> Any:
        found = result[0].int_repr()
        return found.permute(0, *range(2, spec.rank + 2), 1) if last else found

    return run, output
