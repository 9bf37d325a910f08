"""Graphs of which something is not taken, cut into parts."""

from __future__ import annotations

import graphlib
from itertools import combinations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from network_models import model_of
from onnx import ModelProto, TensorProto, helper

from convgen.formats.onnx.file import ModelFile
from convgen.network.graph import Graph, Operator
from convgen.network.parts import Parts, split
from convgen.network.reading import Outside, read_partly

HALVES = np.full((4, 4), 0.5, np.float32)


def parts_of(model: ModelProto) -> tuple[Parts, dict[str, str]]:
    with ModelFile(model) as file:
        read = read_partly(file, {})
    return split(read.graph, read.outside, "m", read.types), {node.name: node.reason for node in read.outside}


# ---- any graph ---------------------------------------------------------------------------------

#: Of each node: whether it is taken, and how far back the nodes are that it reads.
NODES = st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 5), min_size=1, max_size=3)), min_size=1, max_size=14)


def drawn(nodes: list[tuple[bool, list[int]]]) -> tuple[Graph, list[Outside], dict[str, set[str]]]:
    """A graph of the taken nodes, the others, and what each node reads of others."""
    taken, outside, reads = [], [], dict[str, set[str]]()
    for number, (is_taken, back) in enumerate(nodes):
        inputs = tuple(dict.fromkeys(f"v{number - b}" if b <= number else "x" for b in back))
        reads[f"v{number}"] = set(inputs) - {"x"}
        if is_taken:
            taken.append(Operator(f"n{number}", "product", inputs, f"v{number}"))
        else:
            outside.append(Outside(f"n{number}", "", inputs, (f"v{number}",)))
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(["x", *reads], (1, 1))
    unread = sorted(reads.keys() - set().union(*reads.values()))
    return Graph("g", list(reversed(taken)), shapes, {}, ["x"], unread, unread), outside, reads


def runs(groups: dict[str, str], reads: dict[str, set[str]]) -> bool:
    """Whether groups of nodes can run one after another."""
    needs: dict[str, set[str]] = {group: set() for group in groups.values()}
    for node, others in reads.items():
        needs[groups[node]] |= {groups[other] for other in others} - {groups[node]}
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@example([(True, [1]), (False, [1]), (True, [1, 2])])  # one path round a node that is not taken
@example([(False, [1]), (True, [5]), (True, [1, 2])])  # the second waits for another input, the first does not
@given(NODES)
def test_parts_are_connected_convex_and_as_large_as_can_be(nodes: list[tuple[bool, list[int]]]) -> None:
    graph, outside, reads = drawn(nodes)
    made = split(graph, outside, "g").networks
    groups = {node.output: part.name for part in made for node in part.nodes}
    assert groups.keys() == {node.output for node in graph.nodes}
    groups |= {output: output for node in outside for output in node.outputs}
    assert runs(groups, reads)
    for part in made:
        inside = {node.output for node in part.nodes}
        reached, waiting = set[str](), [next(iter(inside))]
        while waiting:
            node = waiting.pop()
            reached.add(node)
            near = {*reads[node], *(other for other in inside if node in reads[other])}
            waiting += (near & inside) - reached
        assert reached == inside
        read = {name for node in part.nodes for name in node.inputs}
        assert {*part.inputs} == read - inside
        elsewhere = {name for node, names in reads.items() if node not in inside for name in names} | {*graph.outputs}
        assert {*part.outputs} == inside & elsewhere
    for one, other in combinations(made, 2):
        touch = {*one.inputs} & {*other.outputs} or {*other.inputs} & {*one.outputs}
        joined = {node: one.name if group == other.name else group for node, group in groups.items()}
        assert not touch or not runs(joined, reads)


# ---- models ------------------------------------------------------------------------------------


def test_a_node_that_is_not_taken_stands_between_two_parts() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Hardmax", ["a"], ["b"], name="odd"),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w"], ["d"]),
        helper.make_node("Add", ["d", "a"], ["y"]),
    ]
    made, outside = parts_of(model_of(nodes, {"x": (2, 4)}, ["y"], {"w": HALVES[:4, :4]}))
    assert [(part.inputs, part.outputs) for part in made.networks] == [(["x"], ["a"]), (["b", "a"], ["y"])]
    assert outside == {"Hardmax 'odd'": "no such operator is known here"}


def test_what_would_cost_more_as_a_node_stays() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="alone"),
        helper.make_node("Hardmax", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    made, _ = parts_of(model_of(nodes, {"x": (2, 4)}, ["y"], {"w": HALVES[:4, :4]}))
    assert [part.outputs for part in made.networks] == [["y"]]
    assert "no convolution or product" in made.outside["alone"]


def test_what_was_folded_into_a_convolution_that_is_not_taken() -> None:
    """Its weights are an input of the model, so that it stays; what follows it is taken without it."""
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"], name="open"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w"], ["y"]),
    ]
    model = model_of(nodes, {"x": (1, 2, 5, 5), "k": (2, 2, 1, 1)}, ["y"], {"w": HALVES[:2, :2, None, None]})
    made, outside = parts_of(model)
    assert outside == {"Conv 'open'": "its weights are no constants: 'k' is an input"}
    assert [(part.inputs, part.outputs) for part in made.networks] == [(["a"], ["y"])]


def test_truth_values_between_parts_are_truth_values() -> None:
    """Within a part they are 0 and 1 of f32."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Greater", ["a", "x"], ["more"]),
        helper.make_node("Where", ["more", "a", "x"], ["b"]),
        helper.make_node("Less", ["b", "x"], ["less"]),
        helper.make_node("NonZero", ["less"], ["places"], name="outside"),
        helper.make_node("Where", ["given", "b", "x"], ["z"]),
    ]
    model = model_of(nodes, {"x": (2, 4)}, ["z", "places"], {"w": HALVES[:4, :4]})
    model.graph.input.append(helper.make_tensor_value_info("given", TensorProto.BOOL, (2, 4)))
    made, outside = parts_of(model)
    (part,) = made.networks
    assert (part.inputs, set(part.names)) == (["x", "given"], {"less", "z"})
    assert {name: part.dtype(stored) for name, stored in zip(part.names, part.outputs, strict=True)} == {
        "less": "bool",
        "z": "f32",
    }
    assert part.dtype("given") == "bool"
    assert list(outside) == ["NonZero 'outside'"]
