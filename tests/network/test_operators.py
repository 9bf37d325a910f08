"""ONNX's own cases of every operator that networks take: compiled, run by the C library, and compared.

Networks compute in f32. Cases of f32, of truth values and of casts to halves and back are taken as they are. Most cases
of what compares or chooses are of whole numbers, and all of ReduceLogSumExp of f64: these are given as the same numbers
of f32. Left out are cases of strings, of f64 and of floats of 8 bits, which networks do not take; of integers, which
have tests of their own (``test_integer_nodes.py``, ``test_whole_numbers.py``); and functions written out as several
nodes, which are cases of the operators that they consist of.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from convgen.errors import UnsupportedError
from convgen.hardware.target import resolve
from convgen.network.network import compile_network
from convgen.network.nodes import READERS
from convgen.network.reading import read_graph
from convgen.network.whole import READ_WHOLE

pytestmark = pytest.mark.timeout(600)

#: Operators that networks take, but for those of quantised models.
KNOWN = {*READERS, *READ_WHOLE}
#: Operators whose operands but the first are constants here.
PARAMETERS = {"BatchNormalization", "InstanceNormalization", "GroupNormalization"}
PARAMETERS |= {"Clip", "Resize", "Upsample", "Pad", "Dropout"}
#: Operators that compare, or choose; and those of truth values alone.
COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "Where")
LOGIC = ("And", "Or", "Xor", "Not")
F32, F64, TRUTH = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.BOOL
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
WHOLE = {getattr(TensorProto, f"{sign}INT{bits}") for sign in ("U", "") for bits in (8, 16, 32, 64)}
#: Types that become f32, of operators whose results do not depend on it.
WIDER = dict.fromkeys(COMPARISONS, WHOLE) | {"ReduceLogSumExp": {F64}}
#: The types of the first input and output in the cases that are run; of other operators both are f32.
TYPES: dict[str, list[set[int]]] = {
    **{op: [{F32, TensorProto.INT64}] for op in ("ArgMax", "ArgMin")},
    **{op: [{F32, TRUTH}] for op in COMPARISONS},
    **{op: [{TRUTH}] for op in LOGIC},
    **{op: [{F32}, {TRUTH}] for op in ("ReduceMax", "ReduceMin")},
    "Cast": [{F32, half} for half in HALVES],
}
#: Operators, and the versions of ONNX that their cases are of. Written down, as collecting the cases takes seconds.
CASES = (
    "Abs-13 Add-14 And-7 ArgMax-13 ArgMin-13 AveragePool-22 BatchNormalization-15 Cast-28 Ceil-13 Celu-28 Clip-13 "
    "Concat-13 Cos-22 DepthToSpace-28 Div-14 Dropout-11 Dropout-22 Elu-22 Equal-19 Erf-13 Exp-13 Expand-13 "
    "Flatten-25 Floor-13 Gather-13 Gelu-20 Gemm-13 GlobalAveragePool-22 GlobalMaxPool-22 Greater-13 "
    "GreaterOrEqual-16 GroupNormalization-21 HardSigmoid-22 HardSwish-22 Identity-25 InstanceNormalization-22 "
    "LRN-13 LayerNormalization-17 LeakyRelu-16 Less-13 LessOrEqual-16 Log-13 LogSoftmax-13 MatMul-13 Max-13 "
    "MaxPool-22 Mean-13 Min-13 Mish-22 Mul-14 Neg-13 Not-1 Or-7 PRelu-16 Pad-25 Pow-15 RMSNormalization-23 "
    "Reciprocal-13 ReduceL1-18 ReduceL2-18 ReduceLogSum-28 ReduceLogSumExp-28 ReduceMax-18 ReduceMax-20 "
    "ReduceMean-18 ReduceMin-18 ReduceMin-20 ReduceProd-18 ReduceSum-13 ReduceSumSquare-18 Relu-14 Reshape-25 "
    "Resize-19 Round-22 Selu-22 Sigmoid-13 Sign-13 Sin-22 Slice-13 Softmax-13 Softplus-22 Softsign-22 "
    "SpaceToDepth-28 Split-13 Split-18 Sqrt-13 Squeeze-25 Sub-14 Sum-13 Swish-24 Tanh-13 ThresholdedRelu-22 Tile-13 "
    "Transpose-25 Unsqueeze-25 Upsample-9 Where-16 Xor-7"
)
#: What is refused of them, by words in the cases' names.
REFUSED = (
    *("training", "default_mask", "cubic", "antialias", "crop", "not_smaller", "not_larger", "min_greater_than_max"),
    *("float32_int", "float32_uint", "empty_set", "zero_size", "allowzero", "start_out_of_bounds"),
)
#: Where ONNX Runtime gives another answer, and so do networks: the last pixel of what is left of 2.4 elements.
OTHERWISE = {"test_resize_downsample_scales_linear_align_corners"}


@cache
def all_cases() -> list[Any]:
    """The cases of one node each, of the types above."""
    return [case for case in single_nodes() if types_of(case) in TYPES.get(operator(case), [{F32}])]


@cache
def single_nodes() -> list[Any]:
    """The cases of one node each that networks take."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the cases of other operators compute
        collected = collect_testcases(None)
    for case in collected:
        nodes = [node for node in case.model.graph.node if node.op_type != "Constant"] if case.model else []
        if len(nodes) == 1 and nodes[0].op_type in KNOWN and "expanded" not in case.name:
            found.append(in_f32(case))
    return found


def operator(case: Any) -> str:
    return next(str(node.op_type) for node in case.model.graph.node if node.op_type != "Constant")


def types_of(case: Any) -> set[int]:
    """Of the first input, where there is one, and of the first output."""
    graph = case.model.graph
    return {value.type.tensor_type.elem_type for value in (*graph.input[:1], *graph.output[:1])}


def in_f32(case: Any) -> Any:
    """A case of an operator of :data:`WIDER`, of the same numbers in f32."""
    wider, model = WIDER.get(operator(case), set()), ModelProto()
    model.CopyFrom(case.model)
    changed = set()
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in wider:
            value.type.tensor_type.elem_type = F32
            changed.add(value.name)

    def numbers(values: Any, arrays: Any) -> list[Any]:
        pairs = zip(values, arrays, strict=True)
        return [np.asarray(array, np.float32) if value.name in changed else array for value, array in pairs]

    if not changed:
        return case
    graph = model.graph
    sets = [(numbers(graph.input, given), numbers(graph.output, wanted)) for given, wanted in case.data_sets]
    return replace(case, model=model, data_sets=sets)


def as_array(value: Any) -> Any:
    """A case's tensor: an array, or as a file has it."""
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def is_refused(case: Any) -> bool:
    return any(word in case.name for word in REFUSED)


@cache
def cases() -> dict[tuple[str, int], list[Any]]:
    """Those that are taken, by their operators and the versions of ONNX's."""
    found = defaultdict(list)
    for case in filter(lambda case: not is_refused(case) and case.name not in OTHERWISE, all_cases()):
        found[operator(case), case.model.opset_import[0].version].append(case)
    return found


def merged(op: str, group: list[Any], everything: bool = False) -> tuple[ModelProto, dict[str, Any], dict[str, Any]]:
    """All cases of an operator as one model, its inputs and the outputs that are expected: those that inference wants,
    or all of them.
    """
    model, inputs, outputs = ModelProto(), dict[str, Any](), dict[str, Any]()
    model.CopyFrom(group[0].model)
    graph = model.graph
    for field in ("node", "input", "output", "initializer", "value_info"):
        graph.ClearField(field)
    for number, case in enumerate(group):
        given, wanted = case.data_sets[0]

        def name(value: str, number: int = number) -> str:
            return f"{value}_{number}" if value else ""

        for position, (value, array) in enumerate(zip(case.model.graph.input, given, strict=True)):
            array = as_array(array)
            if array.dtype.kind in "iu" or (position and op in PARAMETERS):
                graph.initializer.append(numpy_helper.from_array(array, name(value.name)))
            else:
                graph.input.add().CopyFrom(value)
                graph.input[-1].name = name(value.name)
                inputs[name(value.name)] = array
        for node in case.model.graph.node:
            kept = graph.node.add()
            kept.CopyFrom(node)
            kept.input[:] = map(name, node.input)
            kept.output[:] = map(name, node.output)
            kept.name = case.name
        for value, array in zip(case.model.graph.output, wanted, strict=True):
            if not everything and value.name not in first_outputs(case.model):
                continue
            graph.output.add().CopyFrom(value)
            graph.output[-1].name = name(value.name)
            outputs[name(value.name)] = as_array(array)
    return model, inputs, outputs


def first_outputs(model: ModelProto) -> list[str]:
    """The outputs that inference wants: all of a Split, the first of others."""
    nodes: list[NodeProto] = list(model.graph.node)
    return [name for node in nodes for name in (node.output if node.op_type == "Split" else node.output[:1])]


@pytest.mark.parametrize("key", CASES.split())
def test_onnx_cases(key: str) -> None:
    op, _, version = key.rpartition("-")
    group = cases()[op, int(version)]
    model, inputs, outputs = merged(op, group)
    network = compile_network(model, resolve("cpu").on(1), 1)
    found = network(*(np.asarray(inputs[name], order="C") for name in network.inputs))
    found = found if isinstance(found, dict) else {next(iter(network.outputs)): found}
    assert list(found) == list(outputs)
    for name, array in outputs.items():
        case = group[int(name.rpartition("_")[2])]
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), case.name
        if array.dtype != np.float32:  # places, truth values, and what a cast rounds
            np.testing.assert_array_equal(found[name].astype(np.float32), array.astype(np.float32), err_msg=case.name)
            continue
        np.testing.assert_allclose(found[name], array, rtol=case.rtol, atol=max(case.atol, 1e-6), err_msg=case.name)


def test_what_is_refused_says_why() -> None:
    refused = list(filter(is_refused, all_cases()))
    assert len(refused) > 40
    for case in refused:
        with pytest.raises(UnsupportedError, match=r"(nodes?|inputs?) (is|are) not taken: "):
            read_graph(merged(case.model.graph.node[-1].op_type, [case], everything=True)[0])


def test_every_operator_has_a_case() -> None:
    assert sorted(f"{op}-{version}" for op, version in cases()) == sorted(CASES.split())
    assert {op for op, _ in cases()} == KNOWN


def test_what_is_left_out_is_of_other_types() -> None:
    taken = {case.name for case in all_cases()}
    left = [case for case in single_nodes() if case.name not in taken]
    assert not [case.name for case in left if types_of(case) <= {F32, TRUTH}]
    assert not [case.name for case in left if operator(case) in LOGIC]
    named = [case.name for case in left if operator(case) in (*COMPARISONS, "ReduceLogSumExp")]
    assert all("string" in name for name in named), named


def test_sums_over_several_axes_lose_no_digits() -> None:
    """Of thousands of terms that are alike, one after another, all roundings go the same way."""
    shape = (1, 8, 38, 17)
    x = np.full(shape, -1.2, np.float32)
    x[0, 0, 0, 0] = 0
    node = helper.make_node("Softmax", ["x"], ["y"], axis=1)  # before version 13: over all that follow
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph([node], "shares", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    raised = np.exp(x.astype(np.float64))
    found = compile_network(model, resolve("cpu"), threads=1)(x)
    np.testing.assert_allclose(found, raised / raised.sum(), rtol=1e-6)
