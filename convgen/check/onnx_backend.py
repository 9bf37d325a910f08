"""An ONNX backend, as :mod:`onnx.backend.base` defines one, whose convolutions run on convgen's kernels.

>>> from convgen.check import onnx_backend
>>> y, = onnx_backend.prepare(model).run([x])  # doctest: +SKIP

Conv and ConvTranspose are computed by convgen wherever they stand: in the graph, in subgraphs and
in functions. All other operators run in ONNX Runtime, one by one, or where it has no kernel for
them, in ONNX's reference evaluator, which walks the graph. This is for checking kernels in whole
models; no operator is fused with another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import AttributeProto, ModelProto, NodeProto, ValueInfoProto, helper
from onnx.backend.base import BackendRep
from onnx.checker import check_model
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ..errors import SpecError, UnsupportedError
from ..formats.onnx.node import convolution_fields
from ..hardware.target import resolve
from ..kernel.kernel import Kernel, compile_candidate
from ..lowering.candidates import default_candidate
from ..problem.dtypes import UNIT_ROUNDOFF, numpy_dtype
from ..problem.spec import ConvSpec
from .reference import open_session

Array = npt.NDArray[Any]

_DTYPES = {numpy_dtype(name): name for name in UNIT_ROUNDOFF}


@cache
def default_kernel(spec: ConvSpec) -> Kernel:
    """The default kernel for this machine's CPU, built once per process."""
    target = resolve()
    return compile_candidate(spec, target, default_candidate(spec, target), target.cores)


class Representation(BackendRep):  # type: ignore[misc]
    """A model that is ready to run.

    Attributes:
        ran: how often a convolution of each spec has run on a convgen kernel.
        left: how many convolutions have not, as convgen has no such dtype (float64).
    """

    def __init__(self, model: ModelProto, kernel: Callable[[ConvSpec], Kernel]) -> None:
        self.ran: Counter[ConvSpec] = Counter()
        self.left = 0
        self._kernel = kernel
        # The evaluator makes those of subgraphs and functions from its own class.
        self._evaluator = type("Evaluator", (_Evaluator,), {"representation": self})(model)
        given = {tensor.name for tensor in self._evaluator.inits_}
        self._inputs = [name for name in self._evaluator.input_names if name not in given]

    def run(self, inputs: Any, **_: Any) -> tuple[Any, ...]:
        """The model's outputs.

        Args:
            inputs: the inputs in the order of the graph, initializers left out; or by name, where
                initializers can be given others.

        Raises:
            SpecError: another number of inputs, or a convolution whose operands do not fit it.
            UnsupportedError: a convolution with other than 1 to 3 spatial axes.
        """
        if not isinstance(inputs, Mapping):
            values = inputs if isinstance(inputs, Sequence) else [inputs]
            if len(values) != len(self._inputs):
                raise SpecError("inputs", f"{len(self._inputs)}: {', '.join(self._inputs)}", len(values))
            inputs = dict(zip(self._inputs, values, strict=True))
        return tuple(self._evaluator.run(None, inputs))

    def convolve(self, node: NodeProto, attributes: Mapping[str, Any], x: Array, weights: Array, bias: Any) -> Array:
        """What a node computes of operands that have one dtype of :data:`_DTYPES`."""
        where = f"{node.op_type} {node.name or node.output[0]!r}"
        try:
            fields = convolution_fields(node.op_type, attributes, x.shape, weights.shape, bias is not None, where)
            spec = ConvSpec(**fields, dtype=_DTYPES[x.dtype])
        except SpecError as error:
            raise SpecError(error.field, error.expected, error.found, where) from None
        operands = [value if value is None else np.ascontiguousarray(value) for value in (x, weights, bias)]
        y: Array = self._kernel(spec)(*operands)
        self.ran[spec] += 1
        return y


class _Convolution:
    """Replaces the evaluator's own Conv and ConvTranspose."""

    representation: ClassVar[Representation]
    onnx_node: NodeProto

    def _run(self, x: Array, weights: Array, bias: Array | None = None, **attributes: Any) -> tuple[Array, ...]:
        if x.dtype not in _DTYPES:
            self.representation.left += 1
            y: tuple[Array, ...] = super()._run(x, weights, bias, **attributes)  # type: ignore[misc]
            return y
        given = {name: value for name, value in attributes.items() if value is not None}
        return (self.representation.convolve(self.onnx_node, given, x, weights, bias),)


class _OnnxRuntime:
    """Goes before the evaluator's own operators: these are slow (pooling), and some keep to the
    newest opset whatever the model's is (Softmax).
    """

    onnx_node: NodeProto
    has_linked_attribute: bool
    run_params: Mapping[str, Any]

    def _run(self, *inputs: Any, **attributes: Any) -> Any:
        node = self.onnx_node
        plain = all(x is None or (isinstance(x, np.ndarray) and x.dtype.isbuiltin == 1) for x in inputs)
        if plain and inputs and all(node.output) and not self.has_linked_attribute:
            opset = self.run_params["opsets"][node.domain]
            session = _node_session(_anonymous(node), opset, tuple(x if x is None else x.dtype for x in inputs))
            if session:
                feeds = {f"x{index}": x for index, x in enumerate(inputs) if x is not None}
                return tuple(session.run(None, feeds))
        return super()._run(*inputs, **attributes)  # type: ignore[misc]


def _anonymous(node: NodeProto) -> bytes:
    """The node as bytes without its names: equal for nodes that compute the same."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.ClearField("name")
    copy.ClearField("doc_string")
    copy.input[:] = [name and f"x{index}" for index, name in enumerate(node.input)]
    copy.output[:] = [f"y{index}" for index in range(len(node.output))]
    return bytes(copy.SerializeToString(deterministic=True))


@cache
def _node_session(
    anonymous: bytes, opset: int, dtypes: tuple[np.dtype[Any] | None, ...]
) -> ort.InferenceSession | None:
    """A session that runs one node on operands of any shape; None where ONNX Runtime has no kernel for it."""
    node = NodeProto.FromString(anonymous)
    inputs = [
        helper.make_tensor_value_info(f"x{index}", helper.np_dtype_to_tensor_dtype(dtype), None)
        for index, dtype in enumerate(dtypes)
        if dtype is not None
    ]
    graph = helper.make_graph([node], "node", inputs, [ValueInfoProto(name=name) for name in node.output])
    opsets = [helper.make_opsetid(node.domain, opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)  # the newest may be too new
    try:
        return open_session(model.SerializeToString(), 1, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    except (ort_errors.Fail, ort_errors.InvalidGraph, ort_errors.NotImplemented):
        return None


class _Evaluator(ReferenceEvaluator):  # type: ignore[misc]
    """The reference evaluator with other implementations of single operators.

    Its ``new_ops`` would do the same, but do not reach the functions of a model.
    """

    representation: ClassVar[Representation]

    def _load_impl(self, node: NodeProto, input_types: Any = None) -> Any:
        implementation = super()._load_impl(node, input_types)
        bodies = any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in node.attribute)
        if bodies or not isinstance(implementation, type):  # or a function, whose nodes will be looked up here in turn
            return implementation
        convolution = not node.domain and node.op_type in ("Conv", "ConvTranspose")
        bases = (_Convolution if convolution else _OnnxRuntime, implementation)
        return type(implementation.__name__, bases, {"representation": self.representation})


def prepare(
    model: ModelProto, device: str = "CPU", *, kernel: Callable[[ConvSpec], Kernel] = default_kernel
) -> Representation:
    """A model that is ready to run.

    Args:
        model: symbolic sizes are allowed.
        device: ``CPU``.
        kernel: gives the kernel of a spec; asked every time a convolution runs.

    Raises:
        UnsupportedError: another device.
        onnx.checker.ValidationError: not a valid model.
    """
    if not supports_device(device):
        raise UnsupportedError(f"device: expected CPU, found {device!r}")
    check_model(model)
    return Representation(model, kernel)


def run_model(model: ModelProto, inputs: Any, device: str = "CPU", **options: Any) -> tuple[Any, ...]:
    """The outputs of a model; arguments as of :func:`prepare` and :meth:`Representation.run`."""
    return prepare(model, device, **options).run(inputs)


def supports_device(device: str) -> bool:
    """Whether it is ``CPU``."""
    return device == "CPU"
