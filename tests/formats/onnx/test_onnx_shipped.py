"""The ONNX reader on the models that the onnx package ships."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from paths import ROOT

from convgen.check.reference import run_onnxruntime
from convgen.formats.onnx.reader import specs_from_onnx

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
LIGHT = sorted((DATA / "light").glob("light_*.onnx"))
CONVOLUTIONS = ("Conv", "ConvTranspose")

Case = tuple[onnx.ModelProto, list[np.ndarray], np.ndarray]


def _stored_cases() -> dict[str, Case]:
    cases = {}
    for folder in sorted(DATA.glob("pytorch-*/test_*onv*")):
        if not (folder / "model.onnx").exists() or "onv" not in folder.name:
            continue
        model = onnx.load(folder / "model.onnx")
        if not any(node.op_type in CONVOLUTIONS for node in model.graph.node):
            continue
        sets = folder / "test_data_set_0"
        read = [
            [numpy_helper.to_array(onnx.load_tensor(file)) for file in sorted(sets.glob(f"{kind}_*.pb"))]
            for kind in ("input", "output")
        ]
        cases[folder.name] = (model, read[0], read[1][0])
    return cases


def _node_cases() -> dict[str, Case]:
    from onnx.backend.test.case import node as package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The package's collect_testcases() would build the cases of every operator, which takes seconds.
        for module in ("conv", "convtranspose", "causal_conv_with_state"):
            importlib.import_module(f"{package.__name__}.{module}")
    cases = {}
    for case in package._NodeTestCases:
        if any(node.op_type in CONVOLUTIONS for node in case.model.graph.node):
            inputs, outputs = case.data_sets[0]
            cases[case.name] = (case.model, list(inputs), outputs[0])
    return cases


STORED, NODE = _stored_cases(), _node_cases()
PLAIN = {name: case for name, case in (STORED | NODE).items() if len(case[0].graph.node) == 1}
EXPANDED = sorted(set(NODE) - set(PLAIN))  # another operator spelled out, with a Conv in its middle


def test_the_package_has_the_cases() -> None:
    assert len(STORED) == 30
    assert set(STORED) <= set(PLAIN)
    assert len(PLAIN) >= 47
    assert len(LIGHT) == 9


@pytest.mark.parametrize("name", PLAIN)
def test_shipped_case(name: str) -> None:
    """The spec read from a model computes the outputs that come with the model."""
    model, inputs, expected = PLAIN[name]
    (entry,) = specs_from_onnx(model)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    fed = [value.name for value in model.graph.input if value.name not in values]
    values |= dict(zip(fed, inputs, strict=True))
    got = run_onnxruntime(entry.spec, *(values[name] for name in model.graph.node[0].input))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXPANDED)
def test_shipped_case_within_another_operator(name: str) -> None:
    model, _, expected = NODE[name]
    (entry,) = specs_from_onnx(model)
    assert entry.spec.dtype == {"float32": "f32", "float16": "f16"}[expected.dtype.name]
    assert entry.spec.dst_shape == expected.shape
    gated = expected.dtype == np.float32 and ("silu" in name or "swish" in name)  # f16 is widened in between
    assert entry.spec.activation == ("silu" if gated else "none")


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_light_graph(path: Path) -> None:
    """Every convolution is read, and its output has the shape that shape inference gives."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in [*graph.value_info, *graph.output]
    }
    nodes = {node.name or node.output[0]: node for node in graph.node if node.op_type in CONVOLUTIONS}
    entries = specs_from_onnx(onnx.load(path))
    names = [name for entry in entries for name in entry.names]
    assert sorted(names) == sorted(nodes)
    assert len({entry.spec for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.count == len(entry.names)
        for name in entry.names:
            assert entry.spec.dst_shape == shapes[nodes[name].output[0]], name


def test_light_resnet50_is_resnet50() -> None:
    """The graph's layers are those of the problem file, which another exporter's model gave."""
    entries = specs_from_onnx(DATA / "light" / "light_resnet50.onnx")
    assert sum(entry.count for entry in entries) == 53
    assert sum(entry.count * entry.spec.macs for entry in entries) == 4_087_136_256
    problems = ROOT / "bench" / "problems" / "resnet50.json"
    layers = json.loads(problems.read_text())["layers"]
    assert {e.spec.descriptor: e.count for e in entries} == {layer["spec"]: layer["count"] for layer in layers}
