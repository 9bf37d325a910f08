"""ConvSpec to ONNX and back.

:func:`onnx_model` states what a spec means in ONNX's own operators. It is the definition kernels
are validated against, so it shares nothing with the TE definition of :mod:`convgen.compute`.
:func:`specs_from_onnx` reads the convolutions of a model, with what can be fused into them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .activation import DEFAULTS
from .errors import SpecError, UnsupportedError
from .sources import SpecEntry, merge, read_bytes
from .spec import ConvSpec

F32 = npt.NDArray[np.float32]
_Emit = Callable[..., str]  # (operator, *inputs, output=name, **attributes) -> name
_Constant = Callable[[str, npt.ArrayLike], str]  # (name, value) -> name

#: Written models: the first opset with Gelu, and the IR version that came with it.
OPSET, IR_VERSION = 20, 9

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


# ---- ConvSpec -> ONNX -------------------------------------------------------------------------


def onnx_model(
    spec: ConvSpec,
    weights: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    slope: npt.ArrayLike | None = None,
) -> onnx.ModelProto:
    """The spec as an ONNX graph ``src, [weights], [bias], [slope], [residual] -> dst``.

    Args:
        weights, bias, slope: f32 constants of shape ``spec.weights_shape``, ``[oc]`` and ``[oc]``
            (or one element). What is not given is a graph input of that name.

    ``src``, ``residual`` and ``dst`` have the spec's layout; ONNX convolutions are channels-first,
    so NHWC is transposed on the way in and out.

    Raises:
        SpecError: an array has the wrong shape or dtype, or the spec has no such argument.
    """
    nodes: list[onnx.NodeProto] = []
    inputs = [helper.make_tensor_value_info("src", TensorProto.FLOAT, spec.src_shape)]
    constants: list[onnx.TensorProto] = []

    def emit(op: str, *operands: str, output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, operands, [output], name=output, **attributes))
        return output

    def constant(name: str, value: npt.ArrayLike) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def parameter(name: str, present: bool, shape: tuple[int, ...], array: npt.ArrayLike | None) -> str:
        if not present and array is not None:
            raise SpecError(name, "none, as the spec has no such argument", "an array", str(spec))
        if not present:
            return ""
        if array is None:
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
            return name
        return constant(name, as_f32(spec, name, array, shape))

    order = (0, spec.rank + 1, *range(1, spec.rank + 1))  # channels-last -> channels-first
    back = (0, *range(2, spec.rank + 2), 1)
    channels_last = spec.layout == "nhwc"

    x = emit("Transpose", "src", output="src_nchw", perm=order) if channels_last else "src"
    w = parameter("weights", True, spec.weights_shape, weights)
    b = parameter("bias", spec.bias, (spec.oc,), bias)
    s = parameter("slope", spec.has_slope, (spec.oc,), slope)
    x = _convolution(spec, [x, w, b], emit, constant)
    if spec.residual:
        inputs.append(helper.make_tensor_value_info("residual", TensorProto.FLOAT, spec.dst_shape))
        r = emit("Transpose", "residual", output="residual_nchw", perm=order) if channels_last else "residual"
        x = emit("Add", x, r, output="sum")
    x = _activation(spec, x, s, emit, constant)
    if channels_last:
        emit("Transpose", x, output="dst", perm=back)
    else:
        nodes[-1].output[0] = "dst"

    outputs = [helper.make_tensor_value_info("dst", TensorProto.FLOAT, spec.dst_shape)]
    graph = helper.make_graph(nodes, spec.name, inputs, outputs, constants)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="convgen"
    )


def as_f32(spec: ConvSpec, name: str, array: npt.ArrayLike, shape: tuple[int, ...]) -> F32:
    """The array as f32 of ``shape``; a slope of one element is broadcast.

    Raises:
        SpecError: the shape or dtype is another.
    """
    a = np.asarray(array)
    if a.dtype != np.float32:
        raise SpecError(name, "dtype float32", a.dtype, str(spec))
    if name == "slope" and a.size == 1:
        a = np.broadcast_to(a.reshape(1), shape)
    if a.shape != shape:
        raise SpecError(name, f"shape {shape}", a.shape, str(spec))
    return np.ascontiguousarray(a)


def _convolution(spec: ConvSpec, operands: list[str], emit: _Emit, constant: _Constant) -> str:
    x, weights, bias = operands
    begins, ends = (list(side) for side in zip(*spec.padding, strict=True))
    attributes: dict[str, Any] = {
        "kernel_shape": spec.kernel,
        "strides": spec.stride,
        "dilations": spec.dilation,
        "pads": begins + ends,
        "group": spec.groups,
    }
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
    first = np.array(begins, np.int64)
    bounds = {"starts": first, "stops": first + spec.out_spatial, "axes": np.arange(2, spec.rank + 2)}
    y = emit("Slice", y, *(constant(name, value) for name, value in bounds.items()), output="cropped")
    if bias:
        shape = constant("bias_shape", np.array([spec.oc] + [1] * spec.rank, np.int64))
        y = emit("Add", y, emit("Reshape", bias, shape, output="bias_nchw"), output="biased")
    return y


def _activation(spec: ConvSpec, x: str, slope: str, emit: _Emit, constant: _Constant) -> str:
    name, params = spec.activation_op.name, spec.activation_op.params
    if name == "none":
        return x
    if name == "prelu":
        shape = constant("slope_shape", np.array([spec.oc] + [1] * spec.rank, np.int64))
        return emit("PRelu", x, emit("Reshape", slope, shape, output="slope_nchw"), output="act")
    if name == "clip":
        # Both bounds are always written: ONNX Runtime's default is the largest finite number,
        # which would turn an infinity into a finite value.
        bounds = [constant(f"clip_{word}", np.float32(p)) for word, p in zip(("min", "max"), params, strict=True)]
        return emit("Clip", x, *bounds, output="act")
    if name == "silu":
        return emit("Mul", x, emit("Sigmoid", x, output="gate"), output="act")
    if name == "gelu_tanh":
        return emit("Gelu", x, output="act", approximate="tanh")
    op, attributes = _OPERATORS[name]
    return emit(op, x, output="act", **dict(zip(attributes, params, strict=True)))


# ---- ONNX -> ConvSpec -------------------------------------------------------------------------

#: A dimension: a size, a symbol, or None where nothing is known.
_Dim = int | str | None
_Shape = tuple[_Dim, ...]

#: Operators that only move or repeat values: a parameter passed through them is still one.
_SHAPING = {"Cast", "Concat", "ConstantOfShape", "Expand", "Flatten", "Identity"}
_SHAPING |= {"Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze"}
_ROOTS = frozenset({"", "ai.onnx"})  # the two spellings of ONNX's own operator domain


def specs_from_onnx(source: str | Path | ModelProto, dims: Mapping[str, int] | None = None) -> list[SpecEntry]:
    """The Conv and ConvTranspose nodes of a model as specs, identical ones merged.

    What follows a node is fused into its spec when nothing else uses the value between: scaling by
    BatchNormalization or a constant per channel (it folds into weights and bias), a constant per
    channel added (bias), one tensor added (residual), then one activation. Where two convolutions
    meet in one addition, the one with more convolutions before it takes it: the other's output is
    there by then (of a ResNet block: the main path, not the shortcut).

    Args:
        source: a path or a model. Only shapes are read: weights may be inputs or external data.
        dims: sizes of symbolic dimensions, ``{"N": 1}``; a dimension without a symbol is called
            ``"input[axis]"``.

    Returns:
        Entries in the order of the graph; ``names`` are those of the nodes (or their outputs).

    Raises:
        SpecError: not an ONNX model, no convolution in it, a shape that is not known, or a wrong
            attribute; names the node.
        UnsupportedError: a convolution of another dtype than float32 or with more than 3 spatial axes.
    """
    where = "model" if isinstance(source, ModelProto) else str(source)
    model = _load(source, where)
    unknown = _set_dims(model.graph, dict(dims or {}), where)
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise SpecError("model", "a graph whose shapes can be inferred", _first_line(error), where) from error
    entries = [entry for graph in _graphs(model.graph) for entry in _Reader(graph, unknown, where).entries()]
    if not entries:
        nodes = [node for graph in _graphs(model.graph) for node in graph.graph.node]
        found = sorted({node.op_type for node in nodes if "Conv" in node.op_type})
        raise SpecError("model", "a Conv or ConvTranspose node", ", ".join(found) or "none", where)
    return merge(entries)


def _load(source: str | Path | ModelProto, where: str) -> ModelProto:
    """A copy of the model that may be changed, local functions inlined."""
    model = ModelProto()
    try:
        if isinstance(source, ModelProto):
            model.CopyFrom(source)
        else:
            model.ParseFromString(read_bytes(Path(source)))
        # A damaged or other protobuf file can parse into next to nothing.
        if not model.graph.node or not model.opset_import:
            raise SpecError("file", "an ONNX model", "no graph in it", where)
        if not all(node.output for node in model.graph.node):
            raise SpecError("file", "an ONNX model", "a node without outputs", where)
        names = [name for node in model.graph.node for name in (node.op_type, node.name, *node.input, *node.output)]
        if not all(isinstance(name, str) for name in names):  # protobuf returns bytes where UTF-8 is broken
            raise SpecError("file", "an ONNX model", "a name that is not UTF-8", where)
        return onnx.inliner.inline_local_functions(model) if model.functions else model
    except (DecodeError, RuntimeError) as error:
        raise SpecError("file", "an ONNX model", _first_line(error) or "something else", where) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _set_dims(graph: GraphProto, dims: dict[str, int], where: str) -> list[str]:
    """Write the given sizes into the graph; returns the input dimensions left without one."""
    for name, size in dims.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise SpecError(f"dims[{name}]", "an integer >= 0", repr(size), where)
    initialized = {tensor.name for tensor in graph.initializer}
    known: set[str] = set()
    left: list[str] = []
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if value.name in initialized or dim.HasField("dim_value"):
                continue
            symbol = str(dim.dim_param) or f"{value.name}[{axis}]"
            known.add(symbol)
            if symbol in dims:
                dim.dim_value = dims[symbol]
            elif symbol not in left:
                left.append(symbol)
    for name in dims:
        if name not in known:
            raise SpecError("dims", f"names among {', '.join(sorted(known)) or 'none'}", repr(name), where)
    for value in [*graph.value_info, *graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in dims:
                dim.dim_value = dims[dim.dim_param]
    return left


class _Graph:
    """What the reader asks about one graph; a subgraph also knows what surrounds it."""

    def __init__(self, graph: GraphProto, outer: _Graph | None = None) -> None:
        self.graph = graph
        self.shapes: dict[str, _Shape] = dict(outer.shapes) if outer else {}
        self.dtypes: dict[str, int] = dict(outer.dtypes) if outer else {}
        self.tensors: dict[str, TensorProto] = dict(outer.tensors) if outer else {}
        for value in [*graph.input, *graph.value_info, *graph.output]:
            tensor = value.type.tensor_type
            self.dtypes[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.shapes[value.name] = tuple(
                    d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim
                )
        for constant in graph.initializer:
            self.shapes[constant.name], self.dtypes[constant.name] = tuple(constant.dims), constant.data_type
            self.tensors[constant.name] = constant
        self.users: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in _names_used(node):
                self.users[name].append(node)
            if node.op_type == "Constant" and (tensor := _constant_value(node)) is not None:
                self.tensors.update(dict.fromkeys(node.output, tensor))
        self.outputs = {value.name for value in graph.output}
        inputs = {value.name for value in graph.input}
        self.constants: set[str] = self._closure(outer.constants if outer else set())
        self.parameters: set[str] = self._closure(self.constants | inputs | (outer.parameters if outer else set()))

    def _closure(self, start: set[str]) -> set[str]:
        """Values made from ``start``, constants and shapes alone."""
        values = start | set(self.tensors) | {sparse.values.name for sparse in self.graph.sparse_initializer}
        for node in self.graph.node:
            if node.op_type in _SHAPING and all(name in values for name in node.input if name):
                values.update(node.output)
        return values

    def scalar(self, name: str) -> float | None:
        """The value of a constant of one element; None where it is not known here."""
        tensor = self.tensors.get(name)
        if tensor is None or math.prod(tensor.dims) != 1 or tensor.data_location == TensorProto.EXTERNAL:
            return None
        try:
            return _shortest(numpy_helper.to_array(tensor).reshape(()))
        except (ValueError, TypeError):  # damaged, or not a number
            return None


def _graphs(graph: GraphProto, outer: _Graph | None = None) -> Iterator[_Graph]:
    """A graph and, recursively, the bodies of its If, Loop and Scan nodes."""
    this = _Graph(graph, outer)
    yield this
    for node in graph.node:
        for body in _bodies(node):
            yield from _graphs(body, this)


def _bodies(node: NodeProto) -> list[GraphProto]:
    return [
        body
        for attribute in node.attribute
        for body in ([attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs)
    ]


def _names_used(node: NodeProto) -> list[str]:
    """The values a node reads, its bodies included; not those of which it asks only shape or type."""
    if node.op_type in ("Shape", "Size", "CastLike"):
        return list(node.input[:1]) if node.op_type == "CastLike" else []
    inner = [name for body in _bodies(node) for inside in body.node for name in _names_used(inside)]
    returned = [value.name for body in _bodies(node) for value in body.output]
    return [*node.input, *inner, *returned]


def _constant_value(node: NodeProto) -> TensorProto | None:
    for attribute in node.attribute:
        if attribute.name == "value":
            return attribute.t
        if attribute.name == "value_float":
            return numpy_helper.from_array(np.asarray(attribute.f, np.float32))
        if attribute.name == "value_floats":
            return numpy_helper.from_array(np.asarray(attribute.floats, np.float32))
    return None


def _shortest(value: Any) -> float:
    """The double that is written like the f32 value: 0.1 instead of 0.10000000149011612."""
    return float(str(np.float32(value)))


class _Reader:
    """Reads the convolutions of one graph."""

    def __init__(self, graph: _Graph, unknown: list[str], where: str) -> None:
        self.graph, self.unknown, self.where = graph, unknown, where
        self.taken: set[str] = set()  # outputs of additions that are some convolution's residual

    def entries(self) -> list[SpecEntry]:
        nodes = [n for n in self.graph.graph.node if n.op_type in ("Conv", "ConvTranspose") and n.domain in _ROOTS]
        depth: dict[str, int] = defaultdict(int)  # value -> convolutions on the longest way to it
        for node in self.graph.graph.node:
            before = max((depth[name] for name in node.input), default=0)
            depth.update(dict.fromkeys(node.output, before + (node.op_type in ("Conv", "ConvTranspose"))))
        # The deepest first: of the convolutions that meet in an addition it takes it.
        order = sorted(range(len(nodes)), key=lambda index: (depth[nodes[index].output[0]], index), reverse=True)
        entries = {index: self._entry(nodes[index]) for index in order}
        return [entries[index] for index in range(len(nodes))]

    def _entry(self, node: NodeProto) -> SpecEntry:
        name = node.name or node.output[0]
        where = f"{self.where}: {node.op_type} {name!r}"
        try:
            spec = ConvSpec(**self._convolution(node, where))
            return SpecEntry(self._fuse(node, spec), 1, (name,))
        except SpecError as error:
            raise SpecError(error.field, error.expected, error.found, where) from None

    # ---- the node itself ----

    def _convolution(self, node: NodeProto, where: str) -> dict[str, Any]:
        attributes = _attributes(node)
        if len(node.input) < 2:
            raise SpecError("inputs", "src and weights", f"{len(node.input)}")
        weights = self._shape("weights", node.input[1], where)
        rank = len(weights) - 2
        if not 1 <= rank <= 3:
            raise UnsupportedError(f"{where}: weights {list(weights)} have {rank} spatial axes; 1 to 3 are supported")
        src = self._shape("src", node.input[0], where)
        transposed = node.op_type == "ConvTranspose"
        groups = attributes.get("group", 1)
        if len(src) != rank + 2:
            raise SpecError("src", f"{rank + 2} axes as the weights have", list(src))
        channels = (weights[0], weights[1] * groups) if transposed else (weights[1] * groups, weights[0])
        if channels[0] != src[1]:
            raise SpecError("weights", f"{src[1]} input channels as src has (group={groups})", list(weights))
        kernel = tuple(attributes.get("kernel_shape", weights[2:]))
        if kernel != weights[2:]:
            raise SpecError("kernel_shape", f"the weights' {list(weights[2:])}", list(kernel))
        for name in ("strides", "dilations", "output_padding"):
            if len(attributes.get(name, kernel)) != rank:
                raise SpecError(name, f"{rank} values", attributes[name])
        fields: dict[str, Any] = {
            "n": src[0],
            "ic": channels[0],
            "oc": channels[1],
            "in_spatial": src[2:],
            "kernel": kernel,
            "stride": tuple(attributes.get("strides", [1] * rank)),
            "dilation": tuple(attributes.get("dilations", [1] * rank)),
            "groups": groups,
            "transposed": transposed,
            "bias": len(node.input) > 2 and bool(node.input[2]),
            "padding": _padding(attributes, rank),
        }
        if transposed:
            fields["output_padding"] = tuple(attributes.get("output_padding", [0] * rank))
            if wanted := attributes.get("output_shape"):
                if len(wanted) not in (rank, rank + 2):  # ONNX Runtime takes batch and channels in front, too
                    raise SpecError("output_shape", f"{rank} values", wanted)
                fields["output_spatial"] = tuple(wanted[-rank:])
            elif str(fields["padding"]).startswith("same"):
                window = [(k - 1) * d + 1 for k, d in zip(kernel, fields["dilation"], strict=True)]
                if any(s > w for s, w in zip(fields["stride"], window, strict=True)):
                    # The text says input * stride; shape inference and ONNX Runtime take less.
                    raise UnsupportedError(f"{where}: auto_pad=SAME_* with strides above the window; give pads")
        return fields

    def _shape(self, what: str, name: str, where: str) -> tuple[int, ...]:
        """The shape of an operand, which must be f32.

        Raises:
            SpecError: it is not known; names the dimensions of the inputs that are missing.
            UnsupportedError: another dtype.
        """
        dtype = self.graph.dtypes.get(name, TensorProto.UNDEFINED)
        if dtype not in (TensorProto.FLOAT, TensorProto.UNDEFINED):
            found = _enum_name(TensorProto.DataType, dtype)
            raise UnsupportedError(f"{where}: {what} {name!r} has dtype {found}; float32 is supported")
        shape = self.graph.shapes.get(name)
        sizes = tuple(d for d in shape if isinstance(d, int)) if shape is not None else ()
        if shape is not None and len(sizes) == len(shape) and dtype == TensorProto.FLOAT:
            return sizes
        if self.unknown:
            missing = ", ".join(map(repr, self.unknown))
            raise SpecError("dims", f"a size for {missing}", f"none ({what} is {_text(shape)})")
        raise SpecError(what, "a shape that shape inference finds", _text(shape) + self._lost(name))

    def _lost(self, name: str) -> str:
        """Where a shape got lost: the first node on the way back whose inputs all have one."""
        producers = {output: node for node in self.graph.graph.node for output in node.output if output}
        culprit = None
        while node := producers.pop(name, None):
            culprit = node
            name = next((i for i in node.input if i and _text(self.graph.shapes.get(i)).count("?")), "")
        return f" after {culprit.op_type} {culprit.name or culprit.output[0]!r}" if culprit else ""

    # ---- what follows it ----

    def _fuse(self, node: NodeProto, spec: ConvSpec) -> ConvSpec:
        graph, x = self.graph, node.output[0]
        while x not in graph.outputs:
            users = graph.users[x]
            if len(users) == 2 and (gated := self._gated(x, users)):
                return spec.with_(activation=gated)
            if len(users) != 1 or users[0].domain not in _ROOTS:
                break
            user = users[0]
            if (activation := self._activation(user, x, spec)) is not None:
                return spec.with_(activation=activation)
            others = [name for name in user.input if name != x]
            if user.op_type in ("Identity", "Cast") and graph.dtypes.get(user.output[0]) == TensorProto.FLOAT:
                pass
            elif user.op_type == "BatchNormalization" and not spec.residual and self._folds(user):
                spec = spec.with_(bias=True)
            elif user.op_type == "Mul" and not spec.residual and self._per_channel(others, spec):
                pass
            elif user.op_type in ("Add", "Sum") and self._per_channel(others, spec):
                spec = spec.with_(bias=True)
            elif user.op_type in ("Add", "Sum") and not spec.residual and self._residual(user, others, spec):
                self.taken.add(user.output[0])
                spec = spec.with_(residual=True)
            else:
                break
            x = user.output[0]
        return spec

    def _folds(self, node: NodeProto) -> bool:
        """Whether a BatchNormalization is a scale and a shift per channel, known beforehand."""
        attributes = {a.name: a.i for a in node.attribute}
        inference = not attributes.get("training_mode", 0) and attributes.get("spatial", 1) == 1
        alone = not any(node.output[1:])
        return inference and alone and all(name in self.graph.parameters for name in node.input[1:])

    def _per_channel(self, others: list[str], spec: ConvSpec) -> bool:
        """Whether the one other operand is a parameter with one value, or one per channel."""
        if len(others) != 1 or others[0] not in self.graph.parameters:
            return False
        shape = self.graph.shapes.get(others[0])
        if shape is None or len(shape) > spec.rank + 2:
            return False
        if shape == spec.dst_shape and others[0] not in self.graph.constants:
            return False  # an input of the whole output's shape, which has one pixel: a residual
        full = (1,) * (spec.rank + 2 - len(shape)) + shape
        return full[1] in (1, spec.oc) and all(d == 1 for axis, d in enumerate(full) if axis != 1)

    def _residual(self, node: NodeProto, others: list[str], spec: ConvSpec) -> bool:
        free = node.output[0] not in self.taken
        return len(others) == 1 and free and self.graph.shapes.get(others[0]) == spec.dst_shape

    def _gated(self, x: str, users: list[NodeProto]) -> str | None:
        """silu as x * Sigmoid(x), and hardswish as x * HardSigmoid(x)."""
        gates = [node for node in users if node.op_type in ("Sigmoid", "HardSigmoid")]
        products = [node for node in users if node.op_type == "Mul"]
        if len(gates) != 1 or len(products) != 1:
            return None
        gate = gates[0].output[0]
        if gate in self.graph.outputs or len(self.graph.users[gate]) != 1 or set(products[0].input) != {x, gate}:
            return None
        if gates[0].op_type == "Sigmoid":
            return "silu"
        numbers = {a.name: a.f for a in gates[0].attribute}
        slope, shift = numbers.get("alpha", 0.2), numbers.get("beta", 0.5)
        # Exporters write 1/6 with as few as four digits.
        return "hardswish" if abs(slope - 1 / 6) < 1e-4 and shift == 0.5 else None

    def _activation(self, node: NodeProto, x: str, spec: ConvSpec) -> str | None:
        """The activation a node is, in the spec's spelling; None where it is none."""
        op = node.op_type
        numbers = {a.name: _shortest(a.f) for a in node.attribute if a.type == AttributeProto.FLOAT}
        if op == "PRelu":
            return "prelu" if node.input[0] == x and self._per_channel(list(node.input[1:]), spec) else None
        if op == "Clip":
            if node.input[0] != x:
                return None
            bounds = [self._bound(node, numbers, index) for index in (1, 2)]
            return None if None in bounds else f"clip({bounds[0]!r},{bounds[1]!r})"
        if op == "Gelu":
            words = {a.name: a.s for a in node.attribute}
            return "gelu_tanh" if words.get("approximate") == b"tanh" else "gelu"
        if op == "Swish":
            return "silu" if numbers.get("alpha", 1.0) == 1.0 else None
        for name, (operator, attributes) in _OPERATORS.items():
            if op == operator:
                params = zip(attributes, DEFAULTS[name], strict=True)
                given = [repr(numbers.get(attribute, default)) for attribute, default in params]
                return f"{name}({','.join(given)})" if given else name
        return None

    def _bound(self, node: NodeProto, attributes: Mapping[str, float], index: int) -> float | None:
        """Clip's lower (1) or upper (2) bound; None where its value is not known."""
        limit = math.inf if index == 2 else -math.inf
        value: float | None = attributes.get("max" if index == 2 else "min", limit)
        if len(node.input) > index and node.input[index]:
            value = self.graph.scalar(node.input[index])
        # "No bound" is often spelled as the largest finite number.
        return limit if value is not None and abs(value) >= _F32_MAX else value


_F32_MAX = _shortest(np.finfo(np.float32).max)

#: Attributes of Conv and ConvTranspose and their types.
_ATTRIBUTES = dict.fromkeys(
    ("kernel_shape", "strides", "dilations", "pads", "output_padding", "output_shape"), AttributeProto.INTS
) | {"group": AttributeProto.INT, "auto_pad": AttributeProto.STRING}


def _attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a convolution; integers as int and list."""
    for attribute in node.attribute:
        wanted = _ATTRIBUTES.get(attribute.name)
        if wanted is None:
            raise SpecError(repr(attribute.name), f"one of {', '.join(_ATTRIBUTES)}", "an unknown attribute")
        if attribute.type != wanted:
            kinds = [_enum_name(AttributeProto.AttributeType, number) for number in (wanted, attribute.type)]
            raise SpecError(attribute.name, *kinds)
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _enum_name(enum: Any, number: int) -> str:
    """A protobuf enum's name; the number where a damaged or newer file has one without."""
    names: dict[int, str] = {value: name.lower() for name, value in enum.items()}
    return names.get(number, str(number))


def _padding(attributes: Mapping[str, Any], rank: int) -> Any:
    """``auto_pad`` and ``pads`` as ConvSpec's padding."""
    word = attributes.get("auto_pad", b"NOTSET").decode(errors="replace")
    words = {"SAME_UPPER": "same", "SAME_LOWER": "same_lower", "VALID": "valid"}
    if word in words:
        return words[word]
    if word not in ("NOTSET", ""):
        raise SpecError("auto_pad", f"NOTSET or one of {', '.join(words)}", repr(word))
    pads = attributes.get("pads", [0] * (2 * rank))
    if len(pads) != 2 * rank:
        raise SpecError("pads", f"{2 * rank} values, begins and ends", list(pads))
    return tuple(zip(pads[:rank], pads[rank:], strict=True))


def _text(shape: _Shape | None) -> str:
    return "?" if shape is None else f"[{', '.join('?' if d is None else str(d) for d in shape)}]"
