"""The layouts of a convolution: the best of all that are tried, whether or not they are predicted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from convgen.hardware.target import resolve
from convgen.lowering.schedule import Candidate
from convgen.network.layouts import Choice, Costs, LayoutSearch
from convgen.network.reading import read_graph
from convgen.network.rewriting import rewrite
from convgen.problem.layout import PLAIN
from convgen.problem.spec import ConvSpec


def search() -> LayoutSearch:
    """Of three convolutions in a row: pointwise, depthwise and strided, and pointwise again."""
    kernels = {"a": (64, 32, 1, 1), "b": (64, 1, 3, 3), "c": (32, 64, 1, 1)}
    weights = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in kernels.items()]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["t"]),
        helper.make_node("Conv", ["t", "b"], ["u"], group=64, strides=[2, 2], pads=[1] * 4),
        helper.make_node("Conv", ["u", "c"], ["v"]),
        helper.make_node("Relu", ["v"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 32, 56, 56))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 32, 28, 28))
    graph = helper.make_graph(nodes, "row", [x], [y], weights)
    read = read_graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    rewrite(read)
    return LayoutSearch(read, Costs(resolve("cpu:znver5").on(2)))


def test_the_choice_is_the_best_of_all_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked, every = search(), set[ConvSpec](), set[ConvSpec]()
    known = made.costs.convolution

    def noted(spec: ConvSpec) -> tuple[float, Candidate]:
        asked.add(spec)
        return known(spec)

    monkeypatch.setattr(made.costs, "convolution", noted)
    for node in made.graph.convolutions:
        src, dst = node.inputs[0], node.output
        for pair in itertools.product(PLAIN, PLAIN):
            layouts = {**{name: options[0] for name, options in made.options.items()}, src: pair[0], dst: pair[1]}
            chosen = made.choose(node, layouts)
            options = []
            for one, other in made._pairs(node, layouts):
                every.add(laid := made.laid(node.spec, one, other))
                seconds, candidate = known(laid)
                seconds += made._converted(src, layouts, one)
                seconds += sum(made._converted(name, layouts, other) for name in (*node.inputs[1:], dst))
                options.append((Choice(one, other, candidate), seconds))
            assert chosen == min(options, key=lambda option: option[1])
    assert asked < every
