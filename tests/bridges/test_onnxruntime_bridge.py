"""Models whose parts are custom operators of ONNX Runtime: what they compute, and what is refused."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from network_models import arrays_for, expected, furthest, model_of
from onnx import ModelProto, TensorProto, helper, numpy_helper

import convgen
from convgen.bridges.onnxruntime import OnnxRuntimeModel
from convgen.cli import cli
from convgen.errors import ExportError, UnsupportedError

pytestmark = pytest.mark.timeout(600)

#: What outputs may differ by, relative to the largest element: some dozens of roundings, Winograd's included.
ERROR = 2e-5
#: Folders of other releases of ONNX Runtime, each such that it can be imported from there; see CONTRIBUTING.md.
RELEASES = [Path(folder) for folder in os.environ.get("CONVGEN_ONNXRUNTIMES", "").split(os.pathsep) if folder]


def weights(*shape: int) -> Any:
    """Random numbers, the same every time."""
    rng = np.random.default_rng(shape)
    return (rng.standard_normal(shape) * np.prod(shape[1:]) ** -0.5).astype(np.float32)


def whole_model() -> ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("MaxPool", ["r0"], ["p0"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p0", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "p0"], ["y"]),
    ]
    return model_of(nodes, {"x": (1, 3, 16, 12)}, ["y"], {"w0": weights(16, 3, 3, 3), "w1": weights(16, 16, 3, 3)})


def partly_model() -> ModelProto:
    """Two convolutions with what is not taken between and behind them.

    The CumSum wants the shape of a value that the first convolution keeps for itself, the If reads what is computed
    inside of a part, and the Einsum has many weights.
    """
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["r0"], ["out"])],
            kind,
            [],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        )
        for kind in ("Sin", "Cos")
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Shape", ["c0"], ["s0"]),
        helper.make_node("Slice", ["s0", "zero", "one", "zero"], ["batch"]),
        helper.make_node("Hardmax", ["r0"], ["h0"], name="odd", axis=1),
        helper.make_node("CumSum", ["h0", "batch"], ["t0"], name="sums"),
        helper.make_node("Conv", ["t0", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "r0"], ["a1"]),
        helper.make_node("Relu", ["a1"], ["y"]),
        helper.make_node("Einsum", ["y", "table"], ["z"], equation="nchw,cd->nd", name="einsum"),
        helper.make_node("If", ["condition"], ["v"], name="choice", then_branch=branches[0], else_branch=branches[1]),
    ]
    constants = {
        "w0": weights(16, 3, 3, 3),
        "w1": weights(16, 16, 3, 3),
        "zero": np.array([0]),
        "one": np.array([1]),
        "table": weights(16, 40),
    }
    model = model_of(nodes, {"x": (1, 3, 10, 9)}, ["y", "z", "v"], constants)
    model.graph.input.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))
    helper.set_model_props(model, {"author": "somebody", "names": "a long list, " * 200})
    model.producer_name, model.model_version = "producer", 3
    return model


def partly_inputs(seed: int = 0) -> dict[str, Any]:
    x = np.random.default_rng(seed).standard_normal((1, 3, 10, 9), np.float32)
    return {"x": x, "condition": np.array(seed % 2 == 0)}


def session_of(made: OnnxRuntimeModel, threads: int = 1, **settings: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    for name, value in settings.items():
        setattr(options, name, value)
    options.register_custom_ops_library(str(made.library))
    return onnxruntime.InferenceSession(str(made.model), options, providers=["CPUExecutionProvider"])


def outputs_of(session: onnxruntime.InferenceSession, inputs: dict[str, Any]) -> dict[str, Any]:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bridge")


@pytest.fixture(scope="module")
def whole(folder: Path) -> OnnxRuntimeModel:
    return convgen.for_onnxruntime(whole_model(), folder / "new" / "whole.onnx", threads=2, records=False)


@pytest.fixture(scope="module")
def partly(folder: Path) -> OnnxRuntimeModel:
    onnx.save(partly_model(), folder / "given.onnx", save_as_external_data=True, size_threshold=100)
    return convgen.for_onnxruntime(folder / "given.onnx", folder / "partly.onnx", threads=2, records=False)


# ---- what is computed --------------------------------------------------------------------------


def test_a_model_that_is_taken_whole_is_one_node(whole: OnnxRuntimeModel) -> None:
    model = onnx.load(whole.model)
    onnx.checker.check_model(model, full_check=True)
    assert [(node.domain, node.op_type) for node in model.graph.node] == [("convgen", whole.parts[0].operator)]
    assert not model.graph.initializer
    assert whole.outside == {}
    inputs = arrays_for(whole_model())
    assert furthest(outputs_of(session_of(whole), inputs), expected(whole_model(), inputs)) < ERROR


def test_results_are_the_library_s_own_on_any_number_of_threads(whole: OnnxRuntimeModel) -> None:
    x = arrays_for(whole_model())["x"]
    wanted = convgen.compile(whole_model(), threads=2, records=False)(x)
    for threads in (1, 2, 3):
        assert outputs_of(session_of(whole, threads), {"x": x})["y"].tobytes() == wanted.tobytes()


def test_what_is_not_taken_stays(partly: OnnxRuntimeModel) -> None:
    model = onnx.load(partly.model)
    onnx.checker.check_model(model, full_check=True)
    assert sorted(partly.outside) == ["CumSum 'sums'", "Einsum 'einsum'", "Hardmax 'odd'", "If 'choice'"]
    kinds = [node.op_type if node.domain == "" else node.domain for node in model.graph.node]
    assert sorted(kinds) == ["CumSum", "Einsum", "Hardmax", "If", "convgen", "convgen"]
    assert [(part.inputs, part.outputs) for part in partly.parts] == [(("x",), ("r0",)), (("t0", "r0"), ("y",))]
    for seed in (0, 1):
        inputs = partly_inputs(seed)
        assert furthest(outputs_of(session_of(partly, 2), inputs), expected(partly_model(), inputs)) < ERROR


def test_names_versions_and_metadata_are_kept(partly: OnnxRuntimeModel) -> None:
    before, after = partly_model(), onnx.load(partly.model)
    assert [value.name for value in after.graph.input] == [value.name for value in before.graph.input]
    assert [value.name for value in after.graph.output] == [value.name for value in before.graph.output]
    assert (after.ir_version, after.producer_name, after.model_version) == (8, "producer", 3)
    assert {(opset.domain, opset.version) for opset in after.opset_import} == {("", 17), ("convgen", 1)}
    found = {entry.key: entry.value for entry in after.metadata_props}
    assert found.items() >= {entry.key: entry.value for entry in before.metadata_props}.items()
    assert found["convgen.library"] == "libpartly.so"
    given = next(tensor for tensor in before.graph.initializer if tensor.name == "table")
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    assert (kept.pop("table") == numpy_helper.to_array(given)).all()
    (axis,) = kept.values()
    assert axis.tolist() == [1]


def test_several_runs_at_once(partly: OnnxRuntimeModel) -> None:
    session = session_of(partly, 2)
    cases = [partly_inputs(seed) for seed in range(8)]
    wanted = [outputs_of(session, inputs) for inputs in cases]
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(lambda number: outputs_of(session, cases[number % 8]), range(64)))
    for number, outputs in enumerate(found):
        for name, array in outputs.items():
            assert array.tobytes() == wanted[number % 8][name].tobytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_cpu_mem_arena": False},
        {"execution_mode": onnxruntime.ExecutionMode.ORT_PARALLEL, "inter_op_num_threads": 2},
        {"graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_sessions(partly: OnnxRuntimeModel, settings: dict[str, Any]) -> None:
    inputs = partly_inputs()
    found = outputs_of(session_of(partly, 2, **settings), inputs)
    assert furthest(found, expected(partly_model(), inputs)) < ERROR


def test_constants_that_are_inputs_as_in_old_models(folder: Path) -> None:
    nodes = [
        helper.make_node("Hardmax", ["x"], ["a"]),
        helper.make_node("Einsum", ["a", "t"], ["b"], equation="ij,jk->ik"),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    model = model_of(nodes, {"x": (3, 4), "t": (4, 4), "w": (4, 5)}, ["y"], {"t": weights(4, 4), "w": weights(4, 5)})
    model.ir_version = 3
    made = convgen.for_onnxruntime(model, folder / "old.onnx", threads=1, records=False)
    after = onnx.load(made.model)
    onnx.checker.check_model(after)
    assert [value.name for value in after.graph.input] == ["x", "t"]
    inputs = {"x": arrays_for(model)["x"]}
    assert furthest(outputs_of(session_of(made), inputs), expected(model, inputs)) < ERROR


def test_several_sizes(folder: Path) -> None:
    """Of which the model keeps the dimension open, and what is computed from it."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], end=1),
        helper.make_node("Concat", ["shape", "rest"], ["flat"], axis=0),
        helper.make_node("Conv", ["x", "w0"], ["c0"]),
        helper.make_node("Reshape", ["c0", "flat"], ["f0"]),
        helper.make_node("Hardmax", ["f0"], ["h0"]),
        helper.make_node("Expand", ["one", "shape"], ["ones"], name="ones"),
        helper.make_node("CumSum", ["ones", "zero"], ["z"], name="sum"),
        helper.make_node("MatMul", ["h0", "w1"], ["y"]),
    ]
    constants = {"w0": weights(4, 3, 1, 1), "w1": weights(24, 5), "rest": np.array([24])}
    constants |= {"one": np.ones(1, np.float32), "zero": np.array(0)}
    model = model_of(nodes, {"x": (1, 3, 2, 3)}, ["y", "z"], constants)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    made = convgen.for_onnxruntime(model, folder / "sizes.onnx", threads=1, records=False, dims={"N": (1, 3)})
    onnx.checker.check_model(onnx.load(made.model), full_check=True)
    session = session_of(made)
    assert session.get_inputs()[0].shape == ["N", 3, 2, 3]
    for n in (3, 1):
        inputs = {"x": np.random.default_rng(n).standard_normal((n, 3, 2, 3), np.float32)}
        found = outputs_of(session, inputs)
        assert [array.shape for array in found.values()] == [(n, 5), (n,)]
        assert furthest(found, expected(model, inputs)) < ERROR
    with pytest.raises(Exception, match=r"expected shape \[1, 3, 2, 3\] or that of one of 1 other sizes, found \[2, 3"):
        session.run(None, {"x": np.zeros((2, 3, 2, 3), np.float32)})


@pytest.mark.skipif(not RELEASES, reason="CONVGEN_ONNXRUNTIMES names no other releases")
@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_other_releases(partly: OnnxRuntimeModel, release: Path, tmp_path: Path) -> None:
    inputs = partly_inputs()
    np.savez(tmp_path / "inputs.npz", **inputs)
    program = f"""
import sys
sys.path[:0], sys.path[len(sys.path):] = [{str(release)!r}], {sys.path!r}
import numpy as np, onnxruntime as ort
assert ort.__file__.startswith({str(release)!r}), ort.__file__
options = ort.SessionOptions()
options.intra_op_num_threads = 2
options.register_custom_ops_library({str(partly.library)!r})
session = ort.InferenceSession({str(partly.model)!r}, options, providers=["CPUExecutionProvider"])
names = [value.name for value in session.get_outputs()]
inputs = dict(np.load({str(tmp_path / "inputs.npz")!r}))
np.savez({str(tmp_path / "outputs.npz")!r}, **dict(zip(names, session.run(names, inputs))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert furthest(dict(np.load(tmp_path / "outputs.npz")), expected(partly_model(), inputs)) < ERROR


# ---- what is refused ---------------------------------------------------------------------------


class FakeOnnxRuntime:
    """An ONNX Runtime of some version, as far as a library sees it that registers its operators."""

    def __init__(self, api_version: int, text: str) -> None:
        status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
        self.said: list[tuple[int, str]] = []
        self._create = status(self._created)
        self._api = (ctypes.c_void_p * 400)(ctypes.cast(self._create, ctypes.c_void_p).value)
        get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
        named = ctypes.CFUNCTYPE(ctypes.c_void_p)
        self._text = ctypes.create_string_buffer(text.encode())
        address = ctypes.addressof(self._api)
        self._get = get(lambda version: address if version <= api_version else None)
        self._named = named(lambda: ctypes.addressof(self._text))
        functions = (self._get, self._named)
        self.base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p).value for f in functions))

    def _created(self, code: int, message: bytes) -> int:
        self.said.append((code, message.decode()))
        return 1

    def register(self, library: Path) -> list[tuple[int, str]]:
        """What the library answers, as error code and message."""
        function = ctypes.CDLL(str(library)).RegisterCustomOps
        function.restype, function.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_void_p)
        function(None, ctypes.addressof(self.base))
        return self.said


def test_an_older_onnx_runtime_is_refused(whole: OnnxRuntimeModel) -> None:
    said = FakeOnnxRuntime(16, "1.16.3").register(whole.library)
    assert said == [(9, "convgen: expected ONNX Runtime 1.17 or newer, found 1.16.3")]


def test_a_machine_without_the_instructions_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convgen.network.source.cpu_condition", lambda isa, arch: "0")
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (2, 4)}, ["y"], {"w": weights(4, 5)})
    made = convgen.for_onnxruntime(model, folder / "foreign.onnx", threads=1, records=False)
    with pytest.raises(Exception, match="this CPU lacks instructions"):
        session_of(made)


def test_another_library_is_refused(whole: OnnxRuntimeModel, partly: OnnxRuntimeModel) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(partly.library))
    with pytest.raises(Exception, match=rf"{whole.parts[0].operator}.* is not a registered"):
        onnxruntime.InferenceSession(str(whole.model), options)


def test_another_shape_is_refused(whole: OnnxRuntimeModel, tmp_path: Path) -> None:
    """Where ONNX Runtime does not see it, since the model was changed."""
    model = onnx.load(whole.model)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    onnx.save(model, tmp_path / "open.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(whole.library))
    session = onnxruntime.InferenceSession(str(tmp_path / "open.onnx"), options)
    with pytest.raises(Exception, match=r"input x: expected shape \[1, 3, 16, 12\], found \[1, 3, 17, 12\]"):
        session.run(None, {"x": np.zeros((1, 3, 17, 12), np.float32)})


def test_a_model_of_which_nothing_is_taken(tmp_path: Path) -> None:
    nodes = [helper.make_node("Hardmax", ["x"], ["a"], name="odd"), helper.make_node("Relu", ["a"], ["y"], name="one")]
    with pytest.raises(UnsupportedError, match=r"Hardmax 'odd': no such operator.*one: no convolution or product"):
        convgen.for_onnxruntime(model_of(nodes, {"x": (2, 3)}, ["y"]), tmp_path / "new.onnx", threads=1)
    assert not [*tmp_path.iterdir()]


def test_a_reason_is_said_once(tmp_path: Path) -> None:
    names = ["x", *(f"h{number}" for number in range(6)), "y"]
    nodes = [helper.make_node("Hardmax", [a], [b], name=f"odd {b}") for a, b in itertools.pairwise(names)]
    with pytest.raises(UnsupportedError) as caught:
        convgen.for_onnxruntime(model_of(nodes, {"x": (2, 3)}, ["y"]), tmp_path / "new.onnx", threads=1)
    assert str(caught.value).count("no such operator") == 1
    assert "and 6 more: no such operator" in str(caught.value)


def test_parts_hand_on_bytes_and_compare(tmp_path: Path) -> None:
    """A quantised model with an operator on bytes that is not taken, and truth values within a part."""
    quantised = ["step", "zero", "w", "step", "w_zero", "step", "zero"]
    nodes = [
        helper.make_node("QLinearConv", ["x", *quantised], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("BitShift", ["a", "one"], ["b"], name="odd", direction="RIGHT"),
        helper.make_node("QLinearConv", ["b", *quantised], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("DequantizeLinear", ["c", "step", "zero"], ["d"]),
        helper.make_node("Greater", ["d", "limit"], ["more"]),
        helper.make_node("Where", ["more", "d", "limit"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {
        "step": np.float32(0.05),
        "zero": np.uint8(20),
        "w": rng.integers(-20, 20, (4, 4, 3, 3), np.int8),
        "w_zero": np.int8(0),
        "one": np.uint8(1),
        "limit": np.float32(0.3),
    }
    model = model_of(nodes, {"x": (1, 4, 6, 5)}, ["y"], constants)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    given = {"x": rng.integers(0, 256, (1, 4, 6, 5), np.uint8)}
    made = convgen.for_onnxruntime(model, tmp_path / "new.onnx", threads=1, records=False)
    assert made.outside == {"BitShift 'odd'": "no such operator is known here"}
    assert [(part.inputs, part.outputs) for part in made.parts] == [(("x",), ("a",)), (("b",), ("y",))]
    wanted = expected(model, given)
    assert furthest(outputs_of(session_of(made), given), wanted) == 0
    assert (wanted["y"] > 0.3).any()


def test_places_that_cannot_be_written(folder: Path, partly: OnnxRuntimeModel, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"ends in \.onnx"):
        convgen.for_onnxruntime(whole_model(), tmp_path / "model.ort")
    with pytest.raises(ExportError, match="another file than the model itself"):
        convgen.for_onnxruntime(folder / "given.onnx", folder / "new" / ".." / "given.onnx")
    (tmp_path / "libtaken.so").mkdir()
    with pytest.raises(ExportError, match="found a directory"):
        convgen.for_onnxruntime(whole_model(), tmp_path / "taken.onnx")
    with pytest.raises(UnsupportedError, match="CPU"):
        convgen.for_onnxruntime(whole_model(), tmp_path / "gpu.onnx", target="cuda:sm_80")


def test_files_of_others_are_not_overwritten(partly: OnnxRuntimeModel, tmp_path: Path) -> None:
    """Another model, what is no model, a model that belongs to a library of another name, and a library alone."""
    onnx.save(whole_model(), tmp_path / "other.onnx")
    (tmp_path / "notes.onnx").write_text("no model")
    shutil.copy(partly.model, tmp_path / "renamed.onnx")
    (tmp_path / "libalone.so").write_bytes(b"a library")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("other", "notes", "renamed", "alone"):
        with pytest.raises(ExportError, match=rf"{name}.*: expected .* or nothing, found"):
            convgen.for_onnxruntime(whole_model(), tmp_path / f"{name}.onnx", threads=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_earlier_model_is_written_again(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    for columns in (5, 6):
        model = model_of(nodes, {"x": (2, 4)}, ["y"], {"w": weights(4, columns)})
        made = convgen.for_onnxruntime(model, tmp_path / "again.onnx", threads=1)
        inputs = arrays_for(model)
        assert furthest(outputs_of(session_of(made), inputs), expected(model, inputs)) < ERROR


# ---- the command line --------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path) -> None:
    nodes = [helper.make_node("Hardmax", ["x"], ["a"], name="odd"), helper.make_node("MatMul", ["a", "w"], ["y"])]
    model = model_of(nodes, {"x": (2, 4)}, ["y"], {"w": weights(4, 5)})
    onnx.save(model, tmp_path / "small.onnx")
    words = ["compile", str(tmp_path / "small.onnx"), "--for", "onnxruntime", "--threads", "1", "--no-records"]
    done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["outside"] == {"Hardmax 'odd'": "no such operator is known here"}
    assert [Path(answer[key]).name for key in ("model", "library")] == ["small.onnx", "libsmall.so"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["libsmall.so", "small.onnx"]
    inputs = arrays_for(model)
    made = OnnxRuntimeModel(Path(answer["model"]), Path(answer["library"]), (), {})
    assert furthest(outputs_of(session_of(made), inputs), expected(model, inputs)) < ERROR
