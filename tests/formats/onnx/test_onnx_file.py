"""ONNX files: large ones, external data, and hostile ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, external_data_helper, helper, numpy_helper, parser

from convgen.errors import ConvgenError, SpecError
from convgen.formats.onnx import file as onnx_file
from convgen.formats.onnx import functions as onnx_functions
from convgen.formats.onnx import reader as onnx_reader
from convgen.formats.onnx.file import ModelFile
from convgen.formats.onnx.layers import read_layers
from convgen.formats.onnx.reader import layers_from_onnx, specs_from_onnx
from convgen.problem.spec import ConvSpec

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
SPEC = ConvSpec.parse("conv2d ic4 oc4 i9x9 k3x3 relu")


def refusal(source: Path | ModelProto, **options: Any) -> str:
    """Why a model, or its only convolution, is refused; it is read in this process."""
    try:
        (layer,) = read_layers(source, options.get("dims", {}), options.get("arrays", False))
    except ConvgenError as error:
        return str(error)
    return str(layer.refusal)


def conv(src: str = "x", weights: str = "w", dst: str = "y") -> NodeProto:
    return helper.make_node("Conv", [src, weights], [dst], name="layer")


def made(nodes: list[NodeProto], src: tuple[int, ...] = (1, 4, 9, 9), **options: Any) -> ModelProto:
    """A model of input x, weights w and these nodes."""
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", src), ("w", (4, 4, 3, 3)))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    arrays = options.get("arrays", {})
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=options.get("functions", []))


# ---- large models and external data -----------------------------------------------------------


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model whose tensors all lie in ``data/weights.bin``, the size of a Reshape included."""
    rng = np.random.default_rng(0)
    source = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[1,324] flat) => (float y) {
        x = Reshape(flat, shape) c = Conv(x, w, b) y = Relu(c) }"""
    )
    arrays = {"w": rng.standard_normal((4, 4, 3, 3), np.float32), "b": rng.standard_normal(4, np.float32)}
    for name, array in (arrays | {"shape": np.array([1, 4, 9, 9])}).items():
        source.graph.initializer.append(numpy_helper.from_array(array, name))
    (tmp_path / "data").mkdir()
    path = tmp_path / "m.onnx"
    onnx.save(source, path, save_as_external_data=True, size_threshold=0, location="data/weights.bin")
    return path


def moved(path: Path, name: str = "w", **entries: str | None) -> Path:
    """The model with the reference of one tensor changed."""
    source = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in source.graph.initializer if t.name == name)
    found = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in found.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(source.SerializeToString())
    return path


def test_external_data(external: Path) -> None:
    (layer,) = layers_from_onnx(external, arrays=True)
    assert layer.spec == SPEC
    whole = onnx.load(external)
    for tensor in whole.graph.initializer:
        if tensor.name in "wb":
            key = {"w": "weights", "b": "bias"}[tensor.name]
            np.testing.assert_array_equal(layer.arrays[key], numpy_helper.to_array(tensor))
    (inline,) = layers_from_onnx(whole, arrays=True)
    np.testing.assert_array_equal(inline.arrays["weights"], layer.arrays["weights"])


def test_external_weights_are_not_needed(external: Path) -> None:
    """Of large tensors the shape is enough, and the file may be missing."""
    source = onnx.load(external)
    source.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 4, 9, 9), np.float32), "w"))
    sizes = external.parent / "sizes.onnx"
    onnx.save(source, sizes, save_as_external_data=True, size_threshold=2000, location="gone.bin")
    (external.parent / "gone.bin").unlink()
    assert read_layers(sizes, {}, arrays=False)[0].spec == ConvSpec.parse("conv2d ic4 oc4 i9x9 k9x9 relu")
    assert "'layer'" not in (found := refusal(sizes, arrays=True))
    assert "location: expected a file inside the model's folder, found 'gone.bin': No such file" in found


def test_a_missing_file_of_small_tensors(external: Path) -> None:
    (external.parent / "data" / "weights.bin").unlink()
    found = refusal(external)
    assert "src: expected a shape that shape inference finds, found [?, ?, ?, ?] after Reshape 'x': " in found
    assert "tensor 'shape': location: expected a file inside the model's folder" in found


def _link(folder: Path, data: Path) -> str:
    (folder / "link").symlink_to(data)
    return "link"


def _link_to_folder(folder: Path, data: Path) -> str:
    (folder / "folder").symlink_to(data.parent)
    return f"folder/{data.name}"


def _pipe(folder: Path, data: Path) -> str:
    os.mkfifo(folder / "pipe")
    return "pipe"


HOSTILE_LOCATIONS: dict[str, Callable[[Path, Path], str]] = {
    "absolute": lambda folder, data: str(data),
    "up": lambda folder, data: "../" + data.name,
    "up and back": lambda folder, data: "data/../data/weights.bin",
    "nothing in it": lambda folder, data: "/",
    "dots": lambda folder, data: ".",
    "zero byte": lambda folder, data: "data\0/weights.bin",
    "too long": lambda folder, data: "a" * 5000,
    "link": _link,
    "link to a folder": _link_to_folder,
    "link to a device": lambda folder, data: _link(folder, Path("/dev/zero")),
    "folder": lambda folder, data: "data",
    "pipe": _pipe,
    "file as a folder": lambda folder, data: "m.onnx/weights.bin",
}


@pytest.mark.parametrize("how", HOSTILE_LOCATIONS)
@pytest.mark.parametrize("tensor", ["w", "shape"])
def test_locations_outside_the_folder(external: Path, tmp_path: Path, how: str, tensor: str) -> None:
    """Whenever data would be read; the values of small tensors are, for their shapes."""
    outside = tmp_path.parent / f"{tmp_path.name}.bin"
    outside.write_bytes((tmp_path / "data" / "weights.bin").read_bytes())
    path = moved(external, tensor, location=HOSTILE_LOCATIONS[how](tmp_path, outside))
    found = refusal(path, arrays=True)
    assert f"tensor {tensor!r}: location: expected " in found
    assert "\n" not in found
    if tensor == "w":
        assert read_layers(path, {}, arrays=False)[0].spec == SPEC


def cached(tmp_path: Path, data: str = "blobs", linked: bool = True) -> Path:
    """A model as Hugging Face caches it: links in ``snapshots/…`` to its files, whose names are hashes."""
    for folder in ("blobs", "elsewhere", "snapshots/main/onnx", "made"):
        (tmp_path / folder).mkdir(parents=True)
    source = made([conv()], arrays={"w": np.arange(4 * 4 * 3 * 3, dtype=np.float32).reshape(4, 4, 3, 3)})
    onnx.save(source, tmp_path / "made/m.onnx", save_as_external_data=True, size_threshold=0, location="m.onnx_data")
    (tmp_path / "made/m.onnx").rename(tmp_path / "blobs/aaaa")
    (tmp_path / "made/m.onnx_data").rename(tmp_path / data / "bbbb")
    path = tmp_path / "snapshots/main/onnx/m.onnx"
    if linked:
        path.symlink_to("../../../blobs/aaaa")
    else:
        (tmp_path / "blobs/aaaa").rename(path)
    (path.parent / "m.onnx_data").symlink_to(f"../../../{data}/bbbb")
    return path


@pytest.mark.parametrize("linked", [True, False])
def test_a_cache_of_links(tmp_path: Path, linked: bool) -> None:
    """Data is read where the real model's folder, or the cache's, has it; from the working directory too."""
    path = cached(tmp_path, linked=linked)
    (layer,) = layers_from_onnx(path, arrays=True)
    np.testing.assert_array_equal(layer.arrays["weights"].ravel(), np.arange(144, dtype=np.float32))
    code = (
        "import convgen.onnx_reader as r; print(r.layers_from_onnx('m.onnx', arrays=True)[0].arrays['weights'].sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=path.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(np.arange(144, dtype=np.float32).sum())), done.stderr


def test_a_link_within_the_folder(external: Path) -> None:
    (external.parent / "link").symlink_to("data/weights.bin")
    (layer,) = layers_from_onnx(moved(external, location="link"), arrays=True)
    assert layer.arrays["weights"].shape == (4, 4, 3, 3)


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("data", ["elsewhere", "snapshots"])
def test_a_link_out_of_a_cache(tmp_path: Path, data: str, linked: bool) -> None:
    found = refusal(cached(tmp_path, data, linked), arrays=True)
    assert "location: expected a file inside the model's folder, found 'm.onnx_data': one through a link" in found


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": "100000"}, "length: expected at most the 6"),
        ({"offset": "-4"}, "offset: expected a number of bytes, found '-4'"),
        ({"offset": "1e3"}, "offset: expected a number of bytes, found '1e3'"),
        ({"offset": "9" * 30}, "offset: expected a number of bytes, found '999"),
        ({"length": "580"}, "length: expected 576 bytes as its shape and dtype have, found 580"),
        ({"length": str(2**59)}, "length: expected 576 bytes"),
    ],
)
def test_offsets_outside_the_file(external: Path, entries: dict[str, str], message: str) -> None:
    assert message in refusal(moved(external, "w", **entries), arrays=True)


def test_a_missing_length_is_that_of_the_shape(external: Path) -> None:
    (layer,) = read_layers(moved(external, "w", length=None), {}, arrays=True)
    assert layer.arrays["weights"].shape == (4, 4, 3, 3)


def test_a_model_in_memory_has_no_folder(external: Path) -> None:
    source = onnx.load(external, load_external_data=False)
    assert "expected a shape that shape inference finds" in refusal(source)


def sparse(path: Path, model: ModelProto, name: str, dims: tuple[int, ...]) -> None:
    """Append an f32 initializer of zeros to a saved model, as a hole in the file."""

    def head(field: int, size: int) -> bytes:
        return onnx_file._varint(field << 3 | 2) + onnx_file._varint(size)

    size = 4 * int(np.prod(dims, dtype=np.int64))
    tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT).SerializeToString() + head(9, size)
    initializer = head(5, len(tensor) + size) + tensor
    graph = head(7, len(initializer) + size) + initializer  # protobuf merges it with the one before
    content = model.SerializeToString() + graph
    path.write_bytes(content)
    os.truncate(path, len(content) + size)


def test_a_model_above_2_gib(tmp_path: Path) -> None:
    """Beyond what protobuf can read, and above the memory that its reader has."""
    path = tmp_path / "big.onnx"
    sparse(path, made([conv(weights="big")], (1, 24576, 4, 4)), "big", (24576, 24576, 1, 1))
    assert path.stat().st_size > onnx_reader.MEMORY > 2**31 - 1
    (entry,) = specs_from_onnx(path)
    assert entry.spec == ConvSpec.parse("conv2d ic24576 oc24576 i4x4 k1x1 nobias")


def test_external_data_above_2_gib(external: Path) -> None:
    """Only the wanted part is read."""
    data = external.parent / "data" / "weights.bin"
    content = data.read_bytes()
    os.truncate(data, 5 << 30)
    with data.open("r+b") as file:
        file.seek((5 << 30) - 576)
        file.write(content[:576])
    (before,) = read_layers(external, {}, arrays=True)
    (layer,) = read_layers(moved(external, "w", offset=str((5 << 30) - 576), length="576"), {}, arrays=True)
    np.testing.assert_array_equal(layer.arrays["weights"], before.arrays["weights"])


def test_the_lean_copy_of_a_model_is_the_model() -> None:
    """Large data is referred to and documentation dropped; all else stays, and data reads as it was."""
    big, small = np.arange(2000, dtype=np.float32), np.arange(3.0)
    source = made([conv()], arrays={"big": big, "small": small})
    source.graph.initializer.append(helper.make_tensor("floats", TensorProto.FLOAT, [40, 50], big))
    source.graph.initializer.append(helper.make_tensor("doubles", TensorProto.DOUBLE, [2000], big))
    source.graph.initializer.append(helper.make_tensor("integers", TensorProto.INT32, [2000], big.astype(int)))
    source.graph.initializer.append(helper.make_tensor("halves", TensorProto.FLOAT16, [2000], big))
    source.graph.node[0].doc_string = "stack trace\n" * 1000
    constant = source.graph.node.add(op_type="Constant", output=["c"])
    constant.attribute.append(helper.make_attribute("value", numpy_helper.from_array(big)))
    with ModelFile(source) as file:
        assert len(file.proto.SerializeToString()) < 12_000
        for tensor, original in zip(file.proto.graph.initializer, source.graph.initializer, strict=True):
            np.testing.assert_array_equal(file.array(tensor), numpy_helper.to_array(original))
        np.testing.assert_array_equal(file.array(file.proto.graph.node[1].attribute[0].t), big)
    assert external_data_helper.uses_external_data(file.proto.graph.initializer[0])
    assert not external_data_helper.uses_external_data(file.proto.graph.initializer[1])


# ---- hostile models ---------------------------------------------------------------------------


def test_other_kinds_of_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "empty.onnx").touch()
    assert "file: expected a file, found a pipe or device" in refusal(tmp_path / "pipe.onnx")
    assert "file: expected a file, found a pipe or device" in refusal(Path("/dev/zero"))
    assert "file: expected some content, found an empty file" in refusal(tmp_path / "empty.onnx")
    assert "file: expected an existing file, found no such file" in refusal(tmp_path / "none.onnx")
    assert "file: expected a file, found a directory" in refusal(tmp_path)


def nested(levels: int, padding: int = 0) -> bytes:
    """A model with Ifs inside each other."""

    def field(number: int, content: bytes) -> bytes:
        return onnx_file._field(number, content)

    graph = field(1, field(4, b"Identity") + field(1, b"x") + field(2, b"z"))
    for level in range(levels):
        branch = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"  # the attribute's type is GRAPH
        name = b"z%d" % level
        node = field(4, b"If") + field(1, b"x") + field(2, name) + field(5, branch) + field(6, b" " * padding)
        graph = field(1, node)
    return bytes(made([conv()]).SerializeToString()) + field(7, graph)


def test_nesting(tmp_path: Path) -> None:
    path = tmp_path / "nested.onnx"
    path.write_bytes(nested(20))
    assert refusal(path) == "None"
    for padding in (0, 2000):  # protobuf refuses it, or the walk before
        path.write_bytes(nested(300, padding))
        assert "file: expected a" in refusal(path)


def function(name: str, *called: str) -> onnx.FunctionProto:
    """A function that calls others one after the other."""
    values = ["a", *(f"v{i}" for i in range(len(called) - 1)), "b"]
    nodes = [helper.make_node(f, [values[i]], [values[i + 1]], domain="local") for i, f in enumerate(called)]
    nodes = nodes or [helper.make_node("Relu", ["a"], ["b"])]
    return helper.make_function("local", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])


FUNCTIONS = {
    "that calls itself": [function("f0", "f0")],
    "that call each other": [function("f0", "f1"), function("f1", "f0")],
    "too many deep": [*(function(f"f{i}", f"f{i + 1}") for i in range(2000)), function("f2000")],
    "exponentially many": [*(function(f"f{i}", *[f"f{i + 1}"] * 2) for i in range(40)), function("f40")],
}


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_functions(functions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_functions, "MAX_NODES", 2000)
    call = helper.make_node("f0", ["x"], ["h"], domain="local")
    found = refusal(made([call, conv("h")], functions=FUNCTIONS[functions]))
    assert "functions: expected " in found


def test_limits_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    source = made([conv()], arrays={f"k{i}": np.ones(300, np.float32) for i in range(200)})
    monkeypatch.setattr(onnx_file, "MAX_FIELDS", 100)
    assert "a graph of at most 100 nodes, tensors and so on" in refusal(source)
    monkeypatch.setattr(onnx_file, "MAX_FIELDS", 10_000)
    monkeypatch.setattr(onnx_file, "MAX_GRAPH", 500)
    assert "beside the data of its tensors, found more" in refusal(source)


def referring(node: NodeProto) -> NodeProto:
    """A node with an attribute that refers to one of a function."""
    node.attribute.add(name="group", ref_attr_name="g", type=onnx.AttributeProto.INT)
    return node


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [helper.make_node("Add", ["x", "h"], ["g"]), helper.make_node("Relu", ["g"], ["h"]), conv("h")],
            "value 'g': expected one that does not depend on itself",
        ),
        (
            [helper.make_node("Add", ["x", "h"], ["h"]), conv("h")],
            "value 'h': expected one that does not depend on itself",
        ),
        (
            [conv("h")],
            "value 'h': expected an input, a constant or a node that computes it, found none for Conv 'layer'",
        ),
        ([helper.make_node("Relu", ["x"], ["h"])] * 2 + [conv("h")], "value 'h': expected one node that computes it"),
        ([helper.make_node("Relu", ["x"], ["x"]), conv()], "value 'x': expected one node that computes it"),
        ([helper.make_node("Relu\nx", ["x"], ["h"]), conv()], r"a node 'Relu\nx' with 1 outputs"),
        ([helper.make_node("Relu", ["x"], []), conv()], "a node 'Relu' with 0 outputs"),
        ([conv(dst="c"), helper.make_node("PRelu", ["c"], ["y"])], "inputs of PRelu: expected at least 2, found 1"),
        ([conv(dst="c"), helper.make_node("Clip", [], ["y"])], "inputs of Clip: expected at least 1, found 0 of 'y'"),
        ([referring(conv())], "attribute: expected a value outside of functions, found a reference"),
    ],
)
def test_what_is_no_graph(nodes: list[NodeProto], message: str) -> None:
    assert message in refusal(made(nodes))


SHAPES = {
    "a size of 2^60": (made([conv()], (1, 4, 2**60, 9)), "in_spatial[0]: expected at most 2147483647"),
    "an overflowing product": (
        made([helper.make_node("Flatten", ["x"], ["h"]), conv("h")], (2**40, 4, 2**40, 9)),
        "src: expected 4 axes as the weights have",
    ),
    "a negative size": (made([conv()], (-1, 4, 9, 9)), "dims: expected a size for 'x[0]' (as in --dim 'x[0]=1')"),
    "a size of 0": (made([conv()], (1, 0, 9, 9)), "weights: expected 0 input channels"),
    "a tile of 2^62": (
        made([helper.make_node("Tile", ["x", "r"], ["h"]), conv("h")], arrays={"r": np.array([2**62, 1, 1, 1])}),
        "n: expected at most 2147483647",
    ),
    "weights of 2^62": (
        made(
            [helper.make_node("ConstantOfShape", ["s"], ["h"]), conv(weights="h")],
            arrays={"s": np.array([2**20, 4, 2**20, 2**20])},
        ),
        "kernel[0]: expected a dilated kernel within the padded input",
    ),
    "weights of 2^29": (
        made(
            [helper.make_node("ConstantOfShape", ["s"], ["h"]), conv(weights="h")],
            (1, 4, 2**13, 2**13),
            arrays={"s": np.array([2, 4, 2**13, 2**13])},
        ),
        "value 'h': expected a constant of at most 268435456 elements, from 256 nodes and 7e+10 products, found more",
    ),
}


@pytest.mark.parametrize("what", SHAPES)
def test_shapes_out_of_range(what: str) -> None:
    source, message = SHAPES[what]
    assert message in refusal(source, arrays=True)


def test_many_nodes() -> None:
    """Long chains, wide fans and many bodies take time in proportion."""
    count = 1500
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["o"])], "b", [], [onnx.ValueInfoProto(name="o")])
    nodes = [conv(dst="v0"), *(helper.make_node("Identity", [f"v{i}"], [f"v{i + 1}"]) for i in range(count))]
    nodes += [helper.make_node("Conv", ["x", "w"], [f"f{i}"]) for i in range(count)]
    nodes += [helper.make_node("Sum", [f"f{i}" for i in range(count)], ["sum"])]
    nodes += [helper.make_node("If", ["t"], [f"i{i}"], then_branch=branch, else_branch=branch) for i in range(count)]
    nodes += [helper.make_node("Custom", ["x"], ["c0"], domain="local")]
    nodes += [helper.make_node("Conv", [f"c{i}", "w"], [f"c{i + 1}"]) for i in range(count)]
    layers = read_layers(made(nodes, arrays={"t": np.array(True)}), {}, arrays=False)
    assert len(layers) == 2 * count + 1
    assert layers[0].dst == f"v{count}"
    assert all("found ? after Custom 'c0'" in str(layer.refusal) for layer in layers[-count:])


def test_truncated_anywhere(tmp_path: Path) -> None:
    content = made([conv()], arrays={"big": np.ones(1000)}).SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(1, len(content), 7):
        path.write_bytes(content[:length])
        found = refusal(path)
        assert found == "None" or found.startswith(f"{path}: ")


# ---- damaged bytes ----------------------------------------------------------------------------


def _seeds() -> list[bytes]:
    models = [(LIGHT / f"light_{name}.onnx").read_bytes() for name in ("bvlc_alexnet", "squeezenet")]
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[N,4,8,8] x, bool t, int64 n, float[4,4,3,3] w) => (float y, float z) {
          b = local.block<slope=0.5>(x, w)
          y = If (t) <then_branch = t1 () => (a) { d = Conv<pads=[1,1,1,1]>(b, w) a = Relu(d) },
                      else_branch = t2 () => (e) { e = Identity(b) }>
          z = Loop(n, t, x) <body = b (int64 i, bool c, v) => (c2, u)
              { c2 = Identity(c) f = Conv<pads=[1,1,1,1]>(v, w) s = Sigmoid(f) u = Mul(f, s) }> }
        <domain: "local", opset_import: ["" : 17]>
        block <slope: float = 0.25> (v, u) => (o) {
          p = Conv<pads=[1,1,1,1]>(v, u) o = LeakyRelu<alpha: float = @slope>(p) }"""
    nodes = [helper.make_node("Pad", ["x", "pads"], ["h"]), helper.make_node("Expand", ["k", "size"], ["u"])]
    nodes += [conv("h", "u", "c"), helper.make_node("BatchNormalization", ["c", "k4", "k4", "k4", "k4"], ["n"])]
    nodes += [helper.make_node("Clip", ["n", "zero"], ["y"])]
    arrays = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "size": np.array([4, 4, 3, 3]), "zero": np.float32(0)}
    arrays |= {"k": np.ones((4, 1, 1), np.float32), "k4": np.ones(4, np.float32)}
    return [*models, parser.parse_model(text).SerializeToString(), made(nodes, arrays=arrays).SerializeToString()]


SEEDS = _seeds()
NUMBERS = [0, 1, 0x7F, 0xFF, 2**31 - 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**64 - 1]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid model with a few bytes changed, cut out, doubled, replaced by numbers or by parts of another."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["flip", "cut", "double", "number", "splice", "end"])):
            case "flip":
                content[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del content[at : at + draw(st.integers(1, 40))]
            case "double":
                start = draw(st.integers(0, max(0, len(content) - 1)))
                content[at:at] = content[start : start + draw(st.integers(1, 200))]
            case "number":
                content[at : at + 1] = onnx_file._varint(draw(st.sampled_from(NUMBERS)))
            case "splice":
                other = draw(st.sampled_from(SEEDS))
                start = draw(st.integers(0, len(other) - 1))
                content[at:at] = other[start : start + draw(st.integers(1, 200))]
            case "end":
                del content[at:]
    return bytes(content)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged(), arrays=st.booleans())
def test_damaged_files(tmp_path: Path, content: bytes, arrays: bool) -> None:
    """They are read or refused in one line that names the file."""
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content)
    try:
        layers = read_layers(path, {}, arrays)
    except ConvgenError as error:
        messages = [str(error)]
    else:
        messages = [str(layer.refusal) for layer in layers if layer.refusal]
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)


# ---- the process that reads a file ------------------------------------------------------------


def test_it_reads_what_this_process_does(external: Path) -> None:
    for path, arrays in ((LIGHT / "light_squeezenet.onnx", True), (external, True), (external, False)):
        inside, outside = read_layers(path, {}, arrays), layers_from_onnx(path, arrays=arrays)
        assert inside == outside
        for one, other in zip(inside, outside, strict=True):
            assert one.arrays.keys() == other.arrays.keys()
            assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def test_its_errors_are_those_of_this_process(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(made([conv()], (-1, 4, 9, 9)).SerializeToString())
    with pytest.raises(SpecError) as caught:
        specs_from_onnx(path)
    assert (caught.value.field, str(caught.value)) == ("dims", refusal(path))
    path.write_bytes(b"nonsense")
    with pytest.raises(SpecError) as caught:
        specs_from_onnx(path)
    assert (caught.value.field, str(caught.value)) == ("file", refusal(path))


def test_sizes_that_explode(tmp_path: Path) -> None:
    """A shape whose length doubles 40 times: nothing asks for its elements."""
    nodes = [helper.make_node("Shape", ["x"], ["s0"])]
    nodes += [helper.make_node("Concat", [f"s{i}"] * 2, [f"s{i + 1}"], axis=0) for i in range(40)]
    nodes += [helper.make_node("Reshape", ["x", "s40"], ["r"]), conv("r")]
    path = tmp_path / "bomb.onnx"
    path.write_bytes(made(nodes).SerializeToString())
    assert "src: expected a shape that shape inference finds, found ? after Reshape 'r'" in refusal(path)


def test_a_bomb_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers whose zero points are taken off; the process ends at its limit of memory, and this one does not."""
    arrays = {"s": np.array([2**9, 4, 2**8, 2**9]), "one": np.array(1, np.float32), "zero": np.array(1, np.int8)}
    value = numpy_helper.from_array(np.array([3], np.int8))
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["v"], value=value)]
    nodes += [helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"])]
    operands = ["q", "one", "zero", "v", "one", "zero", "one", "zero"]
    nodes += [helper.make_node("QLinearConv", operands, ["y"], name="layer")]
    path = tmp_path / "bomb.onnx"
    path.write_bytes(made(nodes, (1, 4, 2**10, 2**10), arrays=arrays).SerializeToString())
    monkeypatch.setattr(onnx_reader, "MEMORY", 768 << 20)
    with pytest.raises(SpecError, match="file: expected a model that can be read in 768 MiB of memory"):
        specs_from_onnx(path)


def test_it_is_stopped_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_reader, "TIMEOUT", 0.01)
    with pytest.raises(SpecError, match=r"can be read in 0.01 s, found another one"):
        specs_from_onnx(LIGHT / "light_squeezenet.onnx")


def test_it_imports_nothing_from_the_working_directory(tmp_path: Path) -> None:
    for name in ("onnx", "numpy", "convgen"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    path = LIGHT / "light_squeezenet.onnx"
    code = f"import sys; sys.path.pop(0); import convgen; print(len(convgen.specs_from_onnx({str(path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{len(specs_from_onnx(path))}\n"), done.stderr
