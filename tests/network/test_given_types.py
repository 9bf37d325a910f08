"""Inputs that are no floats: images of bytes, masks of truth values, whole numbers; and integers that a layer reads."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import convgen
from convgen.errors import KernelError, NotTakenError

TYPES = {
    np.float32: TensorProto.FLOAT,
    np.uint8: TensorProto.UINT8,
    np.int8: TensorProto.INT8,
    np.int32: TensorProto.INT32,
    np.bool_: TensorProto.BOOL,
}


def model_of(
    nodes: list[Any], inputs: dict[str, Any], constants: dict[str, Any], outputs: Sequence[str] = ("y",)
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TYPES[array.dtype.type], array.shape) for name, array in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


RNG = np.random.default_rng(0)
GIVEN: dict[str, Any] = {
    "img": RNG.integers(0, 256, (1, 9, 11, 3), np.uint8),
    "mask": RNG.integers(0, 2, (1, 1, 9, 11)).astype(np.bool_),
    "shift": RNG.integers(-9, 9, (1, 8, 1, 1), np.int32),
}
NODES = [
    helper.make_node("Cast", ["img"], ["f"], to=TensorProto.FLOAT),
    helper.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
    helper.make_node("Mul", ["t", "share"], ["x"]),
    helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
    helper.make_node("Cast", ["shift"], ["s"], to=TensorProto.FLOAT),
    helper.make_node("Add", ["c", "s"], ["a"]),
    helper.make_node("Where", ["mask", "a", "zero"], ["y"]),
]
CONSTANTS = {
    "share": np.float32(1 / 255),
    "zero": np.float32(0),
    "w": RNG.standard_normal((8, 3, 3, 3), np.float32),
}


def run(model: onnx.ModelProto, inputs: dict[str, Any]) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def test_an_image_a_mask_and_whole_numbers(tmp_path: Path) -> None:
    """From the model to a library of C: each input keeps its type."""
    path = tmp_path / "picture.onnx"
    model = model_of(NODES, GIVEN, CONSTANTS)
    onnx.save(model, path)
    network = convgen.compile(path, threads=1)
    assert {name: info.dtype for name, info in network.inputs.items()} == {"img": "u8", "mask": "bool", "shift": "i32"}
    wanted = run(model, GIVEN)
    np.testing.assert_allclose(network(**GIVEN), wanted, rtol=1e-5, atol=1e-5)
    report = network.validate(path)
    assert report.passed, report
    manifest = network.export(tmp_path / "out")
    assert [one["dtype"] for one in manifest["sizes"][0]["inputs"]] == ["u8", "bool", "i32"]
    np.testing.assert_array_equal(convgen.load(tmp_path / "out")(**GIVEN), network(**GIVEN))
    header = (tmp_path / "out" / "picture.h").read_text()
    assert "input 0 (img) = [1, 9, 11, 3] of u8, 297 bytes" in header
    assert "#define picture_INPUT0_ELEMENTS 297" in header
    command = ["cc", "-std=c11", "-Wall", "-Werror", "example.c", "libpicture.a", "-lm", "-lpthread", "-o", "example"]
    subprocess.run(command, cwd=tmp_path / "out", check=True)
    ran = subprocess.run(["./example"], cwd=tmp_path / "out", check=True, capture_output=True, text=True)
    assert "ok" in ran.stdout
    with pytest.raises(KernelError, match="img: expected dtype uint8"):
        network(**GIVEN | {"img": GIVEN["img"].astype(np.float32)})


def test_a_layer_reads_bytes_that_are_given() -> None:
    """At any address: bytes need not lie at a multiple of anything."""
    constants = {
        "step": np.float32(0.1),
        "zero": np.uint8(3),
        "w": RNG.integers(-9, 9, (8, 3, 3, 3), np.int8),
        "w_step": np.float32(0.01),
        "w_zero": np.int8(0),
    }
    quantised = ["x", "step", "zero", "w", "w_step", "w_zero", "step", "zero"]
    nodes = [
        helper.make_node("QLinearConv", quantised, ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
    ]
    memory = RNG.integers(0, 256, 3 * 7 * 9 + 1, np.uint8)
    given = {"x": memory[1:].reshape(1, 3, 7, 9)}
    model = model_of(nodes, given, constants)
    np.testing.assert_array_equal(convgen.compile(model, threads=1)(given["x"]), run(model, given))


def resizes(given: Any, *cases: tuple[str, str, tuple[int, ...]]) -> tuple[onnx.ModelProto, list[str]]:
    """A model that resizes its input in some ways: mode, coordinates and sizes of each."""
    nodes, names = [], list[str]()
    constants: dict[str, Any] = {"step": np.float32(1)}
    for number, (mode, way, sizes) in enumerate(cases):
        resized, constants[f"s{number}"] = f"q{number}", np.array(sizes)
        attributes = {"mode": mode, "coordinate_transformation_mode": way}
        nodes.append(helper.make_node("Resize", ["x", "", "", f"s{number}"], [resized], f"r{number}", **attributes))
        nodes.append(helper.make_node("DequantizeLinear", [resized, "step"], [f"y{number}"]))
        names.append(f"y{number}")
    return model_of(nodes, {"x": given}, constants, names), names


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_images_of_integers_are_resized_as_onnx_runtime_does(dtype: Any) -> None:
    """To the bit: nearest pixels, and by factors whose shares no rounding touches; else they are refused."""
    info = np.iinfo(dtype)
    x = RNG.integers(info.min, info.max, (1, 3, 5, 6), dtype, endpoint=True)
    model, names = resizes(
        x,
        ("nearest", "half_pixel", (1, 3, 13, 4)),
        ("linear", "half_pixel", (1, 3, 10, 48)),
        ("linear", "asymmetric", (1, 3, 20, 6)),
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = convgen.compile(model, threads=1)(x)
    for name, wanted in zip(names, session.run(names, {"x": x}), strict=True):
        np.testing.assert_array_equal(found[name], wanted)
    with pytest.raises(NotTakenError) as caught:
        convgen.compile(resizes(x, ("linear", "half_pixel", (1, 3, 15, 18)))[0])
    assert "factors such as 2, 4 and 8" in caught.value.nodes["Resize 'r0'"]


@pytest.mark.parametrize(
    ("kind", "last", "axis"), [("ArgMax", 0, 1), ("ArgMax", 1, 1), ("ArgMin", 0, -1), ("ArgMin", 1, 2)]
)
def test_places_of_the_largest(tmp_path: Path, kind: str, last: int, axis: int) -> None:
    """What a segmenting network ends with, i64; of several that are alike the first or the last, as asked for."""
    x = RNG.standard_normal((2, 7, 30, 40), np.float32)
    x[:, 3] = x[:, 5]  # ties
    x[..., 11] = x[..., 4]
    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["m"]),
        helper.make_node("Add", ["m", "shift"], ["s"]),
        helper.make_node("Sigmoid", ["s"], ["g"]),
        helper.make_node(kind, ["s"], ["a"], axis=axis, select_last_index=last),
        helper.make_node("Squeeze", ["a", "axes"], ["y"]),
        helper.make_node("Cast", ["a"], ["z"], to=TensorProto.FLOAT),
    ]
    shift = RNG.standard_normal((7, 1, 40), np.float32)
    shift[[3, 5]], shift[..., [4, 11]] = 0.3, 0.2
    constants = {"factor": np.float32(1.7), "shift": shift, "axes": np.array([axis])}
    model = model_of(nodes, {"x": x}, constants, ("y", "z", "g"))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    path = tmp_path / "places.onnx"
    onnx.save(model, path)
    network = convgen.compile(path, threads=2)
    found = network(x)
    assert found["y"].dtype == np.int64
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = dict(zip(("y", "z", "g"), session.run(None, {"x": x}), strict=True))
    np.testing.assert_array_equal(found["y"], wanted["y"])
    np.testing.assert_array_equal(found["z"], wanted["z"])
    assert network.validate(path).passed
    manifest = network.export(tmp_path / "out")
    assert manifest["sizes"][0]["outputs"][0]["dtype"] == "i64"
    command = ["cc", "-std=c11", "-Wall", "-Werror", "example.c", "libplaces.a", "-lm", "-lpthread", "-o", "example"]
    subprocess.run(command, cwd=tmp_path / "out", check=True)
    assert subprocess.run(["./example"], cwd=tmp_path / "out", check=True, capture_output=True).returncode == 0


def test_whole_numbers_that_come_out() -> None:
    """Bytes, sums and truth values as they are; constants of 64 bits; not what f32 does not have."""
    x = RNG.integers(0, 9, (3, 4), np.uint8)
    nodes = [
        helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0]),
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Greater", ["f", "four"], ["z"]),
        helper.make_node("Shape", ["x"], ["w"]),
    ]
    model = model_of(nodes, {"x": x}, {"four": np.float32(4)}, ("y", "z", "w"))
    for output, number in zip(
        model.graph.output, (TensorProto.UINT8, TensorProto.BOOL, TensorProto.INT64), strict=True
    ):
        output.type.tensor_type.elem_type = number
    found = convgen.compile(model, threads=1)(x)
    for name, wanted in {"y": x.T, "z": x > 4, "w": np.array([3, 4])}.items():
        np.testing.assert_array_equal(found[name], wanted)
        assert found[name].dtype == wanted.dtype
    model.graph.node.append(helper.make_node("Identity", ["large"], ["v"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**24 + 1]), "large"))
    model.graph.output.append(helper.make_tensor_value_info("v", TensorProto.INT64, (1,)))
    with pytest.raises(NotTakenError, match="whole numbers beyond 16777216, which f32 does not have"):
        convgen.compile(model, threads=1)
