"""ONNX's own cases of every operator that networks take: compiled, run by the C library, and compared."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from convgen.hardware.target import resolve
from convgen.network.network import compile_network
from convgen.network.nodes import READERS

pytestmark = pytest.mark.timeout(600)

#: Operators whose operands but the first are constants here.
PARAMETERS = {"BatchNormalization", "InstanceNormalization", "Clip", "Resize", "Upsample", "Pad", "Dropout"}
#: What is refused of them, and says why: what is not f32, other modes, and outputs that only training wants.
REFUSED = {
    "training_mode", "CAST", "cast", "cubic", "antialias", "keep_aspect", "crop", "with_mask", "dropout_default_mask",
}  # fmt: skip


@cache
def cases() -> dict[tuple[str, int], list[Any]]:
    """The cases of one node each and of f32, by its operator and the version of ONNX's."""
    found = defaultdict(list)
    for case in collect_testcases(None):
        nodes = [node for node in case.model.graph.node if node.op_type != "Constant"] if case.model else []
        if len(nodes) != 1 or nodes[0].op_type not in READERS or "expanded" in case.name:
            continue
        kinds = {case.model.graph.input[0].type.tensor_type.elem_type} if case.model.graph.input else set()
        kinds.add(case.model.graph.output[0].type.tensor_type.elem_type)
        if kinds == {TensorProto.FLOAT} and not any(word in case.name for word in REFUSED):
            found[nodes[0].op_type, case.model.opset_import[0].version].append(case)
    return found


def merged(op: str, group: list[Any]) -> tuple[ModelProto, dict[str, Any], dict[str, Any]]:
    """All cases of an operator as one model, its inputs and the outputs that are expected."""
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
            array = np.asarray(array)
            if array.dtype != np.float32 or (position and op in PARAMETERS):
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
            if value.type.tensor_type.elem_type != TensorProto.FLOAT or value.name not in first_outputs(case.model):
                continue
            graph.output.add().CopyFrom(value)
            graph.output[-1].name = name(value.name)
            outputs[name(value.name)] = np.asarray(array)
    return model, inputs, outputs


def first_outputs(model: ModelProto) -> list[str]:
    """The outputs that inference wants: all of a Split, the first of others."""
    nodes: list[NodeProto] = list(model.graph.node)
    return [name for node in nodes for name in (node.output if node.op_type == "Split" else node.output[:1])]


@pytest.mark.parametrize("key", sorted(cases()), ids=lambda key: f"{key[0]}-{key[1]}")
def test_onnx_cases(key: tuple[str, int]) -> None:
    op, _ = key
    group = cases()[key]
    model, inputs, outputs = merged(op, group)
    network = compile_network(model, resolve("cpu").on(1), 1)
    found = network(*(np.asarray(inputs[name], order="C") for name in network.inputs))
    found = found if isinstance(found, dict) else {next(iter(network.outputs)): found}
    assert list(found) == list(outputs)
    for name, array in outputs.items():
        case = group[int(name.rpartition("_")[2])]
        assert found[name].shape == array.shape, case.name
        np.testing.assert_allclose(found[name], array, rtol=case.rtol, atol=max(case.atol, 1e-6), err_msg=case.name)


def test_every_operator_has_a_case() -> None:
    without = {"Upsample", "Dropout", "Cast"}  # gone, without an f32 case, and one that only f32 to f32 is taken of
    assert set(READERS) - {op for op, _ in cases()} <= without
