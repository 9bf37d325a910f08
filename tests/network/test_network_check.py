"""How networks are checked: what is drawn, bounds of errors, where tensors lie; and that what is wrong is found."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import Interpreted
from onnx import TensorProto, helper, numpy_helper

from convgen.check.fuzz.run import Fuzzer
from convgen.check.fuzz.shrinking import shrink
from convgen.cli import main
from convgen.errors import ValidationError
from convgen.hardware.target import resolve
from convgen.lowering.interface import ALIGNMENT
from convgen.lowering.link import link_network
from convgen.network.check.bounds import RULES, measure
from convgen.network.check.drawing import draw_network
from convgen.network.check.drawn import Drawn, model_of, run_model
from convgen.network.check.fuzz import NetworkCase, Networks, check
from convgen.network.check.places import check_places
from convgen.network.check.validate import compare_network, validate_network
from convgen.network.kinds import KINDS
from convgen.network.memory import ARENA, WEIGHTS, Lifetime, Place, arrange
from convgen.network.network import Network, compile_network
from convgen.network.nodes import READERS
from convgen.network.plan import Plan, plan
from convgen.network.reading import read_graph
from convgen.network.rewriting import rewrite
from convgen.network.source import Call, entry_source

pytestmark = pytest.mark.timeout(600)

SEED, COUNT = 11, 120


@cache
def networks() -> list[Drawn]:
    drawn = (draw_network(SEED, index) for index in range(COUNT))
    return [one for one in drawn if one.nodes]


# ---- what is drawn -----------------------------------------------------------------------------


def test_a_network_depends_on_seed_and_index_alone() -> None:
    first, again = (draw_network(SEED, 7).model().SerializeToString(deterministic=True) for _ in range(2))
    assert first == again
    assert first != draw_network(SEED + 1, 7).model().SerializeToString(deterministic=True)


def test_nearly_every_operator_is_drawn() -> None:
    counts = Counter(node.op_type for one in networks() for node in one.nodes)
    assert counts["Conv"] > COUNT / 5
    assert len(counts.keys() & READERS.keys()) > 50


def test_any_of_its_nodes_are_a_network_with_the_same_values() -> None:
    one = max(networks(), key=lambda drawn: len(drawn.nodes))
    for kept in ([0], [len(one.nodes) - 1], range(0, len(one.nodes), 2)):
        model = one.model(kept)
        found = run_model(model, {value.name: one.values[value.name] for value in model.graph.input})
        for name, array in found.items():
            np.testing.assert_array_equal(array, one.values[name])


# ---- what is read, and its bounds --------------------------------------------------------------


def test_every_operator_has_a_rule() -> None:
    assert RULES.keys() == KINDS.keys()


def test_drawn_networks_are_read_as_onnxruntime_computes_them() -> None:
    """Every tensor, computed here in f64, is within its bound of ONNX Runtime's; and bounds are no more than that."""
    shares: list[float] = []
    for index, one in enumerate(networks()):
        graph = read_graph(one.model())
        for name, found in measure(graph, {name: one.values[name] for name in graph.inputs}).items():
            if name not in one.values or name in one.inputs:
                continue
            wanted = one.values[name].astype(np.float64)
            assert found.value.shape == wanted.shape, (index, name)
            judged = np.isfinite(found.error)
            difference = np.abs(found.value - wanted)
            assert (difference <= found.error)[judged].all(), (index, name)
            shares.append(float((found.error / (np.abs(wanted).max() + 1)).max()))
    assert np.median(shares) < 1e-5


def test_rewritten_networks_compute_the_same() -> None:
    """Products that are convolutions, what they take in, and concatenations of concatenations."""
    convolutions = 0
    for index, one in enumerate(networks()):
        graph = read_graph(one.model())
        before = len(graph.convolutions)
        rewrite(graph)
        convolutions += len(graph.convolutions) - before
        found = measure(graph, {name: one.values[name] for name in graph.inputs})
        for name, output in zip(graph.names, graph.outputs, strict=True):
            difference = np.abs(found[output].value - one.values[name])
            judged = np.isfinite(found[output].error)
            assert (difference <= found[output].error)[judged].all(), (index, name)
    assert convolutions > COUNT / 10


def test_errors_of_a_chain_grow_as_those_of_independent_roundings() -> None:
    """Not with the product of the layers' gains: after 30 layers of random weights a bound still says something."""
    rng = np.random.default_rng(0)
    names = [f"t{number}" for number in range(31)]
    constants = {f"w{n}": (rng.standard_normal((16, 16, 1, 1)) / 4).astype(np.float32) for n in range(30)}
    nodes = [helper.make_node("Conv", [names[n], f"w{n}"], [names[n + 1]]) for n in range(30)]
    x = rng.standard_normal((1, 16, 4, 4), np.float32)
    model = model_of(nodes, {"t0": x}, ["t30"], constants, 17)
    found = measure(read_graph(model), {"t0": x})["t30"]
    difference = np.abs(found.value - run_model(model, {"t0": x})["t30"])
    assert (difference <= found.error).all()
    assert found.error.max() < 1e-3 * np.abs(found.value).max()


# ---- where tensors lie -------------------------------------------------------------------------


def planned(one: Drawn) -> Plan:
    graph = read_graph(one.model())
    rewrite(graph)
    return plan(graph, resolve("cpu").on(1))


def test_no_two_tensors_of_drawn_networks_share_memory() -> None:
    assert sum(check_places(planned(one)) for one in networks()[:40]) > 100


def test_plans_of_drawn_networks_compute_what_onnxruntime_does() -> None:
    """Layouts, parts of tensors, chains in one pass and places, without the code that is generated for them."""
    for index, one in enumerate(networks()):
        graph = read_graph(one.model())
        bounds = measure(graph, {name: one.values[name] for name in graph.inputs})
        found = Interpreted(planned(one), one.values).run()
        for name, output in zip(graph.names, graph.outputs, strict=True):
            bound = bounds[output].error
            judged = np.isfinite(bound)
            assert (np.abs(found[name] - one.values[name]) <= bound)[judged].all(), (index, name)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 6)), max_size=30))
def test_buffers_that_live_at_once_lie_apart(drawn: list[tuple[int, int, int]]) -> None:
    buffers = [Lifetime(f"b{n}", size, first, first + more) for n, (size, first, more) in enumerate(drawn)]
    offsets, arena = arrange(buffers)
    for step in range(30):
        alive = sorted((offsets[b.name], b.size) for b in buffers if b.first <= step <= b.last)
        assert all(at + size <= after for (at, size), (after, _) in pairwise(alive))
        assert sum(size for _, size in alive) <= arena
        assert all(at % ALIGNMENT == 0 and at + size <= arena for at, size in alive)


def test_what_lies_wrong_is_found() -> None:
    """Every tensor of the arena moved to another's place, one at a time: some plan must be wrong each time."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((16, 16, 3, 3)).astype(np.float32) for name in ("w0", "w1", "w2")}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w1"], ["b"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["b", "w2"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["a", "c"], ["y"]),
    ]
    model = model_of(nodes, {"x": rng.standard_normal((1, 16, 8, 8), np.float32)}, ["y"], weights, 17)
    graph = read_graph(model)
    rewrite(graph)
    made = plan(graph, resolve("cpu").on(1))
    assert check_places(made) > 4
    places = {name: place for name, place in made.places.items() if place.space == ARENA}
    name, other = sorted(places, key=lambda one: places[one].offset)[:2]
    for wrong, reason in (
        (places[other], "found byte"),
        (Place(ARENA, 0, made.arena), "expected a place within"),
        (replace(places[name], offset=places[name].offset + 2), "expected a multiple of 4 bytes"),
        (Place("input", 0, 0), "expected an output in the arena"),
    ):
        with pytest.raises(ValidationError, match=reason):
            check_places(replace(made, places={**made.places, name: wrong}))
    with pytest.raises(ValidationError, match="nothing"):
        check_places(replace(made, steps=made.steps[:-1]))


# ---- what comes out ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[Network, Any]:
    rng = np.random.default_rng(1)
    constants = {"w": rng.standard_normal((8, 4, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["y"]),
    ]
    model = model_of(nodes, {"x": rng.standard_normal((1, 4, 9, 9), np.float32)}, ["y"], constants, 17)
    return compile_network(model, resolve("cpu").on(2), 2), model


def test_a_right_network_passes(small: tuple[Network, Any]) -> None:
    network, model = small
    report = network.validate(model)
    assert [check.name for check in report.checks] == ["places", "memory", "threads", "float"]
    report.raise_if_failed()
    assert 0 < report.worst_error < 1
    assert report.to_dict()["passed"]


def test_outputs_that_show_little_are_named(small: tuple[Network, Any]) -> None:
    network, model = small
    assert "the same" not in network.validate(model).checks[-1].found
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Sigmoid", ["c"], ["y"])]
    values, nothing = {"x": np.ones((1, 2, 5, 5), np.float32)}, {"w": np.zeros((3, 2, 3, 3), np.float32)}
    model = model_of(nodes, values, ["y"], nothing, 17)
    report = compile_network(model, resolve("cpu").on(1), 1).validate(model)
    assert report.passed
    assert report.checks[-1].found.endswith("; all elements of y are the same, which shows little")


def test_another_model_fails(small: tuple[Network, Any]) -> None:
    network, model = small
    other = type(model)()
    other.CopyFrom(model)
    other.graph.node[1].op_type = "Tanh"
    report = network.validate(other)
    assert not report.passed
    with pytest.raises(ValidationError, match=r"float: largest error \S+ of the bound"):
        report.raise_if_failed()


def test_what_cannot_run_is_a_failed_check(small: tuple[Network, Any], tmp_path: Path) -> None:
    network, model = small
    weights = tmp_path / "weights"
    weights.write_bytes(network.built.weights.read_bytes()[:-64])
    built = replace(network.built, weights=weights)
    report = validate_network(network.plans, built, model, threads=1, accuracy="standard")
    failed = next(check for check in report.checks if not check.passed)
    assert failed.name == "memory"
    assert "damaged" in failed.found
    assert report.to_dict()["worst_error"] is None


@pytest.mark.parametrize("begin", [64, -64], ids=["at the end", "at the start"])
def test_weights_lie_between_guard_pages(small: tuple[Network, Any], tmp_path: Path, begin: int) -> None:
    """A convolution that reads weights one line of the cache past them, or from before them: other numbers, where the
    file is mapped, and nothing else.
    """
    network, model = small
    code = network.built.code
    (size,) = code.sizes
    places = [place for call in size.calls for _, place in call.arguments if place.space == WEIGHTS]
    first = min(place.offset for place in places)
    moved = begin if begin > 0 else begin - first

    def displaced(call: Call) -> Call:
        arguments = [
            (info, replace(place, offset=place.offset + moved) if place.space == WEIGHTS else place)
            for info, place in call.arguments
        ]
        return replace(call, arguments=tuple(arguments))

    wrong = replace(code, sizes=(replace(size, calls=tuple(map(displaced, size.calls))),))
    library, weights = tmp_path / "wrong.so", tmp_path / "wrong.weights"
    link_network(code.name, entry_source(wrong), network.built.objects, library)
    weights.write_bytes(network.built.weights.read_bytes())
    built = replace(network.built, library=library, weights=weights)
    report = validate_network(network.plans, built, model, threads=1, accuracy="standard")
    failed = next(check for check in report.checks if not check.passed)
    assert failed.name == "memory"
    assert failed.found.endswith("expected a clean run between guard pages, found signal 11")


def test_the_command(small: tuple[Network, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(small[1].SerializeToString())
    assert main(["validate", str(path), "--whole", "--threads", "1", "--no-records"]) == 0
    assert "of the bound accumulated through the graph" in capsys.readouterr().out
    assert main(["validate", str(path), "--whole", "--schedule", "reference"]) == 2


# ---- the fuzzer --------------------------------------------------------------------------------


def test_a_sample_of_drawn_networks_passes() -> None:
    summary = Fuzzer(SEED, Networks(threads=2)).run(specs=8)
    assert [finding.message for finding in summary.findings] == []
    assert summary.checks["float"] == summary.candidates > 4
    assert 0 < summary.errors["network"] < 1


def test_a_layer_of_a_few_rows_is_the_same_on_any_threads() -> None:
    """LLVM made vectors of its rows, by two threads of fewer of them, and rounded one element otherwise."""
    case = NetworkCase(1801, 516, resolve("cpu").spelling, 2, (9,))
    outcome = check(case)
    assert outcome.kind in ("ok", "refused"), outcome.message


def test_a_failing_network_shrinks_to_the_nodes_that_fail() -> None:
    index = next(i for i in range(COUNT) if len(draw_network(SEED, i).nodes) > 8)
    subject = Networks(threads=2)
    (case,) = subject.draw(SEED, index).cases

    def fails(tried: NetworkCase) -> bool:
        return tried.nodes is None or {2, 5} <= set(tried.nodes)

    least = shrink(case, subject.steps(), fails)
    assert (least.nodes, least.threads) == ((2, 5), 1)
    words = shlex.split(least.command)
    assert words[:3] == ["convgen", "fuzz", "--networks"]
    assert words[-2:] == ["--nodes", "2,5"]


def test_the_fuzz_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "--networks", "--seed", str(SEED), "--start", "1", "--specs", "1", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "operators: " in out
    assert ", 0 findings in " in out
    assert main(["fuzz", "--networks", "--schedule", "reference"]) == 2
    assert main(["fuzz", "--nodes", "1"]) == 2


def test_a_network_is_compared_before_it_is_written(tmp_path: Path) -> None:
    """What comes out must be near ONNX Runtime's, of whole numbers the same but for a few, and finite where it is."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"]),
        helper.make_node("ArgMax", ["y"], ["z"], axis=1),
        helper.make_node("Greater", ["y", "zero"], ["t"]),
    ]
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((9, 3, 1, 1), np.float32), "zero": np.zeros((), np.float32)}
    graph = helper.make_graph(
        nodes,
        "three",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))],
        [
            helper.make_tensor_value_info(name, kind, None)
            for name, kind in (("y", TensorProto.FLOAT), ("z", TensorProto.INT64), ("t", TensorProto.BOOL))
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    network = compile_network(model, resolve("cpu").on(1), 1)
    report = network.compare(model)
    assert report.passed, report
    assert [check.name for check in report.checks] == ["onnxruntime"]

    def compared(change: Callable[[dict[str, Any]], None]) -> bool:
        def call(*arrays: Any, **options: Any) -> dict[str, Any]:
            found: dict[str, Any] = network(*arrays, **options)
            change(found)
            return found

        given = (network.plans, network.built, call, model)
        return compare_network(*given, threads=1, accuracy="standard").passed

    def scaled(found: dict[str, Any]) -> None:
        found["y"] *= 1.01

    def not_finite(found: dict[str, Any]) -> None:
        found["y"][0, 0, 0, 0] = np.nan

    def moved(found: dict[str, Any]) -> None:
        found["z"][:, :, :4] += 2

    def negated(found: dict[str, Any]) -> None:
        found["t"][..., 0] ^= True

    assert compared(lambda found: None)
    assert not any(map(compared, (scaled, not_finite, moved, negated)))
    path = tmp_path / "three.onnx"
    onnx.save(model, path)
    assert main(["compile", str(path), "--out", str(tmp_path / "out"), "--no-records"]) == 0
    validation = json.loads((tmp_path / "out" / "manifest.json").read_text())["validation"]
    assert validation["passed"]
    assert "of the largest element" in validation["checks"][0]["found"]


def test_a_bound_beyond_the_outputs_promises_no_more_than_compare_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of deep networks are larger than what these compute; those of drawn graphs are all there is."""
    made, other = (
        helper.make_model(
            helper.make_graph(
                [helper.make_node("Mul", ["x", "factor"], ["y"])],
                "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64])],
                [numpy_helper.from_array(np.float32(factor), "factor")],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=9,
        )
        for factor in (2, 2.01)
    )
    network = compile_network(made, resolve("cpu").on(1), 1)

    def passed(**how: Any) -> bool:
        args: dict[str, Any] = {"threads": 1, "accuracy": "standard", **how}
        return validate_network(network.plans, network.built, other, **args).passed

    assert not passed()
    monkeypatch.setattr(
        "convgen.network.check.validate.measure",
        lambda *args: {name: replace(found, error=found.error + 1e6) for name, found in measure(*args).items()},
    )
    assert not passed()
    assert passed(is_drawn=True)
    assert passed(accuracy="bf16")  # 0.5 % are allowed there
