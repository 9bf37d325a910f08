"""Whole networks: what they compute, on how many threads, from which weights, and what is refused."""

from __future__ import annotations

import ctypes
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from network_models import arrays_for, expected, furthest, model_of
from onnx import ModelProto, TensorProto, helper

import convgen
from convgen.cli import cli, main
from convgen.errors import ExportError, KernelError, NotTakenError, UnsupportedError
from convgen.hardware.target import resolve
from convgen.network.compile import RecentCode, compile_plans
from convgen.network.graph import Operator
from convgen.network.helpers import Helpers
from convgen.network.layouts import Costs, lay
from convgen.network.library import NetworkLibrary
from convgen.network.network import Network, compile_network
from convgen.network.reading import read_graph
from convgen.network.rewriting import rewrite
from convgen.network.views import Views, fuse
from convgen.problem.layout import PLAIN

pytestmark = pytest.mark.timeout(600)

#: What outputs may differ by, relative to the largest element: some dozens of roundings, Winograd's included.
ERROR = 2e-5


def block_model() -> ModelProto:
    """A residual block, two branches that are concatenated, pooling and a classifier."""
    rng = np.random.default_rng(3)

    def weights(*shape: int) -> Any:
        return (rng.standard_normal(shape) * np.prod(shape[1:]) ** -0.5).astype(np.float32)

    constants = {
        "w0": weights(32, 3, 3, 3),
        "w1": weights(32, 32, 3, 3),
        "b1": weights(32),
        "w2": weights(16, 32, 1, 1),
    }
    constants |= {"w3": weights(16, 32, 3, 3), "w4": weights(10, 32), "b4": weights(10)}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "r0"], ["a1"]),
        helper.make_node("Relu", ["a1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["left"]),
        helper.make_node("Conv", ["r1", "w3"], ["right"], pads=[1, 1, 1, 1]),
        helper.make_node("Concat", ["left", "right"], ["both"], axis=1),
        helper.make_node("MaxPool", ["both"], ["pooled"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["pooled"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w4", "b4"], ["scores"], transB=1),
        helper.make_node("Softmax", ["scores"], ["chances"]),
    ]
    return model_of(nodes, {"x": (1, 3, 24, 20)}, ["chances", "pooled"], constants)


@pytest.fixture(scope="module")
def block() -> Network:
    return compile_network(block_model(), resolve("cpu").on(2), 2)


@pytest.fixture(scope="module")
def exported(block: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    block.export(folder)
    return folder


# ---- what is computed --------------------------------------------------------------------------


def test_a_block_computes_what_onnxruntime_does(block: Network) -> None:
    inputs = arrays_for(block_model())
    assert furthest(block(inputs["x"]), expected(block_model(), inputs)) < ERROR
    assert furthest(block(x=inputs["x"]), expected(block_model(), inputs)) < ERROR


def test_one_two_and_three_threads_agree(block: Network, exported: Path) -> None:
    x = arrays_for(block_model())["x"]
    found = [convgen.load(exported, threads)(x) for threads in (1, 2, 3)]
    for other in found[1:]:
        for name, array in found[0].items():
            assert array.tobytes() == other[name].tobytes()


def test_an_output_that_is_an_input_or_another_output() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Identity", ["y"], ["z"])]
    model = model_of(nodes, {"x": (2, 3)}, ["y", "z", "x"])
    x = arrays_for(model)["x"]
    found = compile_network(model, resolve("cpu").on(1), 1)(x)
    assert [*found] == ["y", "z", "x"]
    for name, array in (("y", np.maximum(x, 0)), ("z", np.maximum(x, 0)), ("x", x)):
        assert (found[name] == array).all()


def test_several_processes_compile_the_same(block: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr("convgen.network.compile.recent_code", RecentCode(0))  # as a process that has compiled nothing
    with Helpers(2) as helpers:
        helpers.begin(12)
        assert len(helpers.ready) == 1
        built = compile_plans(block.plans, block.target, tmp_path, lambda *numbers: told.append(numbers), helpers)
    assert helpers.ready[0].result().status is not None  # it has ended
    assert told == [(number, len(built.objects)) for number in range(len(built.objects) + 1)]
    assert built.entry == block.built.entry
    assert built.weights.read_bytes() == block.built.weights.read_bytes()


def test_what_packs_weights_is_no_part_of_a_library(block: Network) -> None:
    assert all(b"__tvm_ffi_main" in code and b"__tvm_ffi_pack" not in code for code in block.built.objects)


# ---- how it is laid out ------------------------------------------------------------------------


def planned(model: ModelProto) -> tuple[Any, Views, list[Any]]:
    graph = read_graph(model)
    rewrite(graph)
    laid = lay(graph, Costs(resolve("cpu").on(1)))
    views = Views(laid)
    return laid, views, fuse(graph, views)


def test_a_concatenation_is_written_in_place() -> None:
    laid, views, steps = planned(block_model())
    assert laid.layouts["both"] not in PLAIN
    assert {views.root("left").of, views.root("right").of} == {"both"}
    assert views.root("right").offset == 4 * 16 * 12 * 10
    assert not [step for step in steps if isinstance(step, Operator) and step.kind == "concat"]


def test_dense_blocks_share_one_tensor() -> None:
    rng, channels, constants, nodes, features = np.random.default_rng(0), 16, {}, [], ["x0"]
    nodes.append(helper.make_node("Relu", ["x"], ["x0"]))
    for number in range(3):
        source = "x0" if number == 0 else f"all{number - 1}"
        ic = channels * (number + 1)
        constants[f"w{number}"] = (rng.standard_normal((channels, ic, 1, 1)) * ic**-0.5).astype(np.float32)
        nodes.append(helper.make_node("Conv", [source, f"w{number}"], [f"y{number}"]))
        features.append(f"y{number}")
        nodes.append(helper.make_node("Concat", list(features), [f"all{number}"], axis=1))
    nodes.append(helper.make_node("Sigmoid", ["all2"], ["out"]))
    model = model_of(nodes, {"x": (1, channels, 8, 8)}, ["out"], constants)
    _, views, steps = planned(model)
    assert {views.root(name).of for name in ("x0", "y0", "y1", "y2", "all0", "all1")} == {"all2"}
    assert len(steps) == 5
    inputs = arrays_for(model)
    network = compile_network(model, resolve("cpu").on(1), 1)
    assert furthest(network(inputs["x"]), expected(model, inputs)) < ERROR


def test_chains_are_one_pass() -> None:
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Mul", ["x", "s"], ["m"]),
        helper.make_node("Add", ["m", "x"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    _, _, steps = planned(model_of(nodes, {"x": (1, 8, 6, 6)}, ["y"]))
    assert len(steps) == 1
    assert [operator.kind for operator in steps[0].operators] == ["activate", "mul", "add", "activate"]


def test_products_take_in_what_follows() -> None:
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((12, 7)).astype(np.float32), "b": rng.standard_normal(7).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["b", "p"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    model = model_of(nodes, {"x": (2, 5, 12)}, ["y"], constants)
    _, _, steps = planned(model)
    assert [step.spec.descriptor for step in steps] == ["conv1d n1 ic12 oc7 i10 k1 s1 p0 relu nhwc"]
    inputs = arrays_for(model)
    assert furthest(compile_network(model, resolve("cpu").on(1), 1)(inputs["x"]), expected(model, inputs)) < ERROR


def test_transpositions_are_other_names() -> None:
    rng = np.random.default_rng(0)
    shapes = {"w0": (16, 3, 3, 3), "w1": (16, 1, 3, 3), "m0": (16, 32), "m1": (32, 16), "w2": (8, 16, 1, 1)}
    constants = {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["first"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["first", "w1"], ["deep"], pads=[1, 1, 1, 1], group=16),
        helper.make_node("Transpose", ["deep"], ["rows"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["rows", "m0"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["active"]),
        helper.make_node("MatMul", ["active", "m1"], ["narrow"]),
        helper.make_node("Transpose", ["narrow"], ["image"], perm=[0, 3, 1, 2]),
        helper.make_node("Add", ["first", "image"], ["sum"]),
        helper.make_node("Conv", ["sum", "w2"], ["y"]),
    ]
    model = model_of(nodes, {"x": (1, 3, 9, 7)}, ["y"], constants)
    _, _, steps = planned(model)
    assert [step.spec.residual for step in steps] == [False, False, False, True, False]
    inputs = arrays_for(model)
    assert furthest(compile_network(model, resolve("cpu").on(1), 1)(inputs["x"]), expected(model, inputs)) < ERROR


# ---- what is refused ---------------------------------------------------------------------------


def test_every_node_that_is_not_taken_is_named() -> None:
    nodes = [
        helper.make_node("Det", ["x"], ["d"], name="first"),
        helper.make_node("Relu", ["d"], ["r"]),
        helper.make_node("Hardmax", ["r"], ["y"], name="second"),
    ]
    with pytest.raises(UnsupportedError, match="2 nodes") as caught:
        compile_network(model_of(nodes, {"x": (2, 3, 3)}, ["y"]), resolve("cpu").on(1), 1)
    assert "Det 'first'" in str(caught.value)
    assert "Hardmax 'second'" in str(caught.value)


def test_inputs_may_lie_in_any_way_and_tensors_give_tensors(block: Network) -> None:
    torch = pytest.importorskip("torch")
    (info,) = block.inputs.values()
    x = np.random.default_rng(3).standard_normal(info.shape, np.float32)
    expected = block(x)
    for lain in (np.asfortranarray(x), np.repeat(x, 2, axis=3)[..., ::2], x[:, ::-1].copy()[:, ::-1]):
        np.testing.assert_equal(block(lain), expected)
    for tensor in (torch.from_numpy(x), torch.from_numpy(x).to(memory_format=torch.channels_last)):
        found = block(tensor)
        assert all(isinstance(output, torch.Tensor) for output in found.values())
        np.testing.assert_equal({name: output.numpy() for name, output in found.items()}, expected)


def test_wrong_arguments_are_refused(block: Network) -> None:
    x = arrays_for(block_model())["x"]
    with pytest.raises(KernelError, match="expected shape"):
        block(x[:, :2])
    with pytest.raises(KernelError, match="none"):
        block()
    with pytest.raises(KernelError, match="expected 1"):
        block(x, x)
    with pytest.raises(KernelError, match="each once"):
        block(x, x=x)
    with pytest.raises(KernelError, match="x: expected inputs each once, found it twice"):
        block({"x": x}, x=x)
    with pytest.raises(KernelError, match="other: expected inputs x, each once, found 'other'"):
        block({"other": x})
    with pytest.raises(KernelError, match="names among"):
        block(x, out={"other": x})
    with pytest.raises(KernelError, match="dtype"):
        block(x.astype(np.float64))


# ---- weights -----------------------------------------------------------------------------------


def test_damaged_and_foreign_weights_are_refused(exported: Path, tmp_path: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("manifest.json", *manifest["files"]):
        (folder / name).write_bytes((exported / name).read_bytes())
    weights = folder / f"{manifest['name']}.weights"
    data = bytearray(weights.read_bytes())
    assert convgen.load(folder).name == manifest["name"]
    for position in (0, 20, 64, len(data) - 1):
        damaged = bytearray(data)
        damaged[position] ^= 1
        weights.write_bytes(damaged)
        with pytest.raises(ExportError, match="another library's, or damaged"):
            convgen.load(folder)
    weights.write_bytes(data[:-64])
    with pytest.raises(ExportError, match="damaged"):
        convgen.load(folder)
    weights.unlink()
    with pytest.raises(ExportError, match="cannot be read"):
        convgen.load(folder)
    needs = dict(manifest["needs"])
    manifest["needs"] |= {"libc": "musl", "triple": needs["triple"].replace("gnu", "musl")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"needs: expected a library for glibc, .*, found one for .*-linux-musl"):
        convgen.load(folder)
    manifest["needs"] = needs
    manifest["needs"] |= {"architecture": "riscv64", "triple": "riscv64-linux-musl"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"needs: expected a library for .*, found one for riscv64-linux-musl"):
        convgen.load(folder)


@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_is_touched_outside(exported: Path, at_end: bool) -> None:
    """Inputs, outputs, weights and workspace each lie between pages that cannot be touched, at one end or the other."""
    name = json.loads((exported / "manifest.json").read_text())["name"]
    data = np.fromfile(exported / f"{name}.weights", np.uint8)
    weights = Guarded(data.size, at_end)
    weights.bytes()[...] = data
    weights.protect()  # they are read, nothing else
    network = NetworkLibrary(exported / f"lib{name}.so", name, weights.bytes(), 1)
    x = arrays_for(block_model())["x"]
    wanted = convgen.load(exported, 1)(x)
    guarded = {name: Guarded(array.nbytes, at_end) for name, array in (("x", x), *wanted.items())}
    guarded["x"].array(x.shape)[...] = x
    guarded["x"].protect()
    out = {name: guarded[name].array(array.shape) for name, array in wanted.items()}
    workspace = Guarded(network.sizes().workspace, at_end)
    network.workspaces.append(workspace.bytes())
    network(guarded["x"].array(x.shape), out=out)
    for name, array in wanted.items():
        assert array.tobytes() == out[name].tobytes()
    network.workspaces.clear()


class Guarded:
    """Memory between pages that must not be touched: it begins where the first ends, or ends where the last begins."""

    def __init__(self, size: int, at_end: bool) -> None:
        self._libc, page = ctypes.CDLL(None), 4096
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 4)
        self._libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._bytes = -(-size // page) * page
        self._begin = self._libc.mmap(None, self._bytes + 2 * page, 3, 0x22, -1, 0) + page
        for guard in (self._begin - page, self._begin + self._bytes):
            assert self._libc.mprotect(guard, page, 0) == 0
        begin = self._begin + (self._bytes - size if at_end else 0)
        self._memory: Any = (ctypes.c_uint8 * size).from_address(begin)

    def protect(self) -> None:
        """Against being written."""
        assert self._libc.mprotect(self._begin, self._bytes, 1) == 0

    def bytes(self) -> Any:
        return np.frombuffer(self._memory, np.uint8)

    def array(self, shape: tuple[int, ...]) -> Any:
        return self.bytes().view(np.float32).reshape(shape)


# ---- what is exported --------------------------------------------------------------------------


def test_the_example_runs(exported: Path, tmp_path: Path) -> None:
    name = json.loads((exported / "manifest.json").read_text())["name"]
    flags = ["-std=c11", "-O1", "-Wall", "-Werror", "-I", str(exported), str(exported / "example.c")]
    linked = {
        "shared": [f"-L{exported}", f"-l{name}", f"-Wl,-rpath,{exported}"],
        "static": [str(exported / f"lib{name}.a")],
    }
    for kind, libraries in linked.items():
        program = tmp_path / kind
        subprocess.run(["cc", *flags, *libraries, "-lm", "-lpthread", "-o", str(program)], check=True)
        for given in ([], [str(exported / f"{name}.weights")]):
            done = subprocess.run([str(program), *given], cwd=exported, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "2 outputs as expected; ok" in done.stdout
        done = subprocess.run([str(program), "nowhere.weights"], cwd=exported, capture_output=True, text=True)
        assert done.returncode == 1
        assert "nowhere.weights: open: " in done.stderr


def test_loading_takes_numpy_alone(exported: Path) -> None:
    code = (
        "import sys, convgen, numpy as np\n"
        f"net = convgen.load({str(exported)!r}, 1)\n"
        "net(np.zeros((1, 3, 24, 20), np.float32))\n"
        "assert not {'tvm', 'onnx', 'onnxruntime'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line(tmp_path: Path) -> None:
    path, out = tmp_path / "small.onnx", tmp_path / "out"
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    model = model_of(nodes, {"x": (2, 3)}, ["y"])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    path.write_bytes(model.SerializeToString())
    done = CliRunner().invoke(cli, ["compile", str(path), "--dim", "N=4", "--threads", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    x = np.random.default_rng(0).standard_normal((4, 3), np.float32)
    assert (convgen.load(out)(x) == np.maximum(x, 0)).all()
    manifest = json.loads((out / "manifest.json").read_text())
    (size,) = manifest["sizes"]
    assert size["inputs"] == [{"name": "x", "shape": [4, 3], "dtype": "f32", "bytes": 48}]
    assert manifest["model"] == "small.onnx"


def test_inputs_may_be_a_mapping_by_their_names() -> None:
    """Whatever these are: no keywords of Python's, or the argument's own."""
    model = model_of(
        [helper.make_node("Sub", ["in put/0:0", "out"], ["y"])], {"in put/0:0": (2, 3), "out": (2, 3)}, ["y"]
    )
    torch = pytest.importorskip("torch")
    network = convgen.compile(model, threads=1, records=False)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2, 3), np.float32) for _ in range(2))
    given = {"out": b, "in put/0:0": a}
    np.testing.assert_array_equal(network(given), a - b)
    assert isinstance(network({name: torch.from_numpy(array) for name, array in given.items()}), torch.Tensor)
    assert len(network.step_seconds(given)) == network.sizes().steps


def test_several_sizes_are_validated_and_exported_without_an_example(tmp_path: Path) -> None:
    path, out = tmp_path / "small.onnx", tmp_path / "out"
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (2, 3)}, ["y"])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    path.write_bytes(model.SerializeToString())
    sized = [str(path), "--dim", "N=1,3", "--threads", "1", "--no-records"]
    done = CliRunner().invoke(cli, ["validate", *sized, "--whole"])
    assert done.exit_code == 0, done.output
    assert [line.split()[2] for line in done.output.splitlines() if "ok    float" in line] == ["N1:", "N3:"]
    done = CliRunner().invoke(cli, ["validate", *sized])
    assert (done.exit_code, "N=SIZE, or several with --whole, found N=1,3" in done.output) == (2, True)
    done = CliRunner().invoke(cli, ["compile", *sized, "--no-example", "--out", str(out)])
    assert done.exit_code == 0, done.output
    manifest = json.loads((out / "manifest.json").read_text())
    assert {file.name for file in out.iterdir()} == {"manifest.json", *manifest["files"]}
    assert not [file for file in out.iterdir() if file.name.startswith("example")]
    assert "example" not in (out / f"{manifest['name']}.h").read_text()
    x = np.full((3, 3), -1, np.float32)
    assert (convgen.load(out)(x) == 0).all()


def outside_model() -> ModelProto:
    """Of four nodes two are not taken, one has a graph inside, and one is."""
    inner = helper.make_graph(
        [helper.make_node("Relu", ["s"], ["i"])], "inner", [], [helper.make_tensor_value_info("i", 1, None)]
    )
    nodes = [
        helper.make_node("Det", ["x"], ["d"], name="first"),
        helper.make_node("Sigmoid", ["d"], ["s"]),
        helper.make_node("Hardmax", ["s"], ["h"], name="second"),
        helper.make_node("If", ["c"], ["y"], name="third", then_branch=inner, else_branch=inner),
    ]
    model = model_of(nodes, {"x": (2, 3, 3), "c": (1,)}, ["y", "h"])
    model.graph.input[1].type.tensor_type.elem_type = 9  # bool
    return model


def test_what_is_not_taken_is_listed_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(outside_model().SerializeToString())
    command = ["compile", str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    told = capsys.readouterr()
    for node in ("Det 'first'", "Hardmax 'second'", "If 'third'"):
        assert node in told.out
    assert "3 nodes not taken, 1 other node would be" in told.err
    assert main([*command, "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["taken"], document["manifest"]) == (False, None)
    reasons = {entry["node"]: entry["reason"] for entry in document["outside"]}
    assert reasons["If 'third'"] == "graphs inside of nodes are not taken"
    assert not (tmp_path / "out").exists()
    with pytest.raises(NotTakenError) as caught:
        convgen.compile(outside_model())
    assert (caught.value.nodes, caught.value.taken) == (reasons, 1)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), NotTakenError)


def test_a_cause_of_many_refusals_is_listed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what are no nodes are not counted as such."""
    names = [f"d{number}" for number in range(5)]
    nodes = [helper.make_node("Det", [f"x{name}"], [name], name=name) for name in names]
    model = model_of([*nodes, helper.make_node("Hardmax", ["x"], ["y"], name="h")], {"x": (2, 3)}, [*names, "y"])
    text = helper.make_tensor_value_info("s", TensorProto.STRING, [2])
    model.graph.input.extend([text, *(helper.make_tensor_value_info(f"x{name}", 1, [2, 2]) for name in names)])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert main(["compile", str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.out.count("no such operator is known here") == 2
    assert "and 4 more" in told.out
    assert "1 input and 6 nodes not taken; --json lists each" in told.err
    with pytest.raises(NotTakenError, match=r"1 input and 6 nodes are not taken: input 's': expected .*string"):
        convgen.compile(model)


def test_inputs_without_a_shape_are_all_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = model_of([helper.make_node("Add", ["x", "z"], ["y"])], {"x": (2, 3), "z": (2, 3)}, ["y"])
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert main(["compile", str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().out
    assert told.count("expected a known shape (--dim), found [N, 3]; such as --dim N=1") == 2
    model.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    model.graph.input[1].type.tensor_type.ClearField("shape")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NotTakenError) as caught:
        convgen.compile(tmp_path / "model.onnx")
    assert caught.value.nodes["input 'x'"].endswith("found [x[0], 3]; such as --dim 'x[0]=1'")
    assert caught.value.nodes["input 'z'"].startswith("expected a shape in the model, found none")


def test_a_reason_names_its_model_and_node_once(tmp_path: Path) -> None:
    weights = {"w": np.zeros((4, 3, 3, 3, 1), np.float32)}
    model = model_of([helper.make_node("Conv", ["x", "w"], ["y"], name="a")], {"x": (1, 3, 8, 8)}, ["y"], weights)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NotTakenError) as caught:
        convgen.compile(tmp_path / "model.onnx")
    assert caught.value.nodes == {"Conv 'a'": "src: expected 5 axes as the weights have, found [1, 3, 8, 8]"}


@pytest.mark.parametrize("name", ["pthread", "not a name", "two__underscores"])
def test_a_name_that_is_taken_is_wrong_usage(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(block_model().SerializeToString())
    given = ["--name", name, "--out", str(tmp_path / "out")]
    assert main(["compile", str(tmp_path / "model.onnx"), *given]) == 2
    assert "--name: expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
