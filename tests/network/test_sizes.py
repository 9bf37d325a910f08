"""Networks that are made for several sizes: one library, one set of weights."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from network_models import expected, furthest, model_of
from onnx import ModelProto, helper

import convgen
from convgen.cli import cli, main
from convgen.errors import ExportError, KernelError, SpecError
from convgen.network.export import header_text
from convgen.network.library import NetworkLibrary
from convgen.network.sizes import every_size, labels_of

pytestmark = pytest.mark.timeout(600)


def open_model(batch: str = "N", height: str = "H") -> ModelProto:
    """Convolutions, pooling and a classifier, of any batch and height."""
    rng = np.random.default_rng(5)
    shapes = {"w0": (16, 3, 3, 3), "w1": (32, 16, 3, 3), "w2": (10, 32), "slope": (32, 1, 1)}
    constants = {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["c0"], ["p0"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p0", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c1"], ["m"]),
        helper.make_node("Mul", ["m", "slope"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w2"], ["y"], transB=1),
    ]
    model = model_of(nodes, {"x": (1, 3, 12, 10)}, ["y"], constants)
    for axis, name in ((0, batch), (2, height)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    return model


@pytest.fixture(scope="module")
def network() -> Any:
    return convgen.compile(open_model(), threads=2, dims={"N": (1, 3), "H": (12, 8)}, records=False)


@pytest.fixture(scope="module")
def exported(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes") / "out"
    network.export(folder)
    return folder


def given(n: int, h: int) -> dict[str, Any]:
    return {"x": np.random.default_rng(n + h).standard_normal((n, 3, h, 10), np.float32)}


def test_every_size_computes_what_onnxruntime_does(network: Any, exported: Path) -> None:
    loaded = convgen.load(exported)
    for n, h in ((3, 8), (1, 12), (3, 12), (1, 8)):
        inputs = given(n, h)
        wanted = expected(open_model(), inputs)
        assert furthest(network(inputs["x"]), wanted) < 2e-5
        assert (loaded(x=inputs["x"]) == network(inputs["x"])).all()


def test_other_sizes_are_refused_with_those_there_are(network: Any) -> None:
    with pytest.raises(KernelError) as caught:
        network(given(2, 8)["x"])
    for shape in ("(1, 3, 12, 10)", "(1, 3, 8, 10)", "(3, 3, 12, 10)", "(3, 3, 8, 10)", "found x (2, 3, 8, 10)"):
        assert shape in str(caught.value)


def test_weights_lie_there_once(network: Any, exported: Path) -> None:
    """What two sizes pack alike is shared: the file is smaller than those of both by themselves."""
    single = [convgen.compile(open_model(), dims={"N": n, "H": 12}, threads=1, records=False) for n in (1, 3)]
    sizes = [one.sizes().weights for one in single]
    both = convgen.compile(open_model(), dims={"N": (1, 3), "H": 12}, threads=1, records=False).sizes().weights
    assert max(sizes) <= both < sum(sizes)
    first, other = single
    with pytest.raises(ExportError, match="another library's"):
        NetworkLibrary(first.built.library, first.name, other.built.weights, 1)
    status = other._run(first._network, ctypes.create_string_buffer(256))
    assert other._error(status) == b"the network was opened by another library"


def test_weights_are_in_memory_once(network: Any) -> None:
    arrays = [
        {id(array) for step in plan.steps if step.name == "c1" for array in step.parameters.values()}
        for plan in network.plans
    ]
    assert arrays[0]
    assert all(found == arrays[0] for found in arrays)


def test_threads_call_at_once_at_different_sizes(network: Any) -> None:
    inputs = [given(n, h)["x"] for n, h in ((3, 8), (1, 12), (3, 12), (1, 8))] * 4
    wanted = [network(x).tobytes() for x in inputs]
    with ThreadPoolExecutor(4) as executor:
        for _ in range(5):
            assert [found.tobytes() for found in executor.map(network, inputs)] == wanted


def test_the_manifest_and_the_header_know_each_size(exported: Path, network: Any) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert [size["label"] for size in manifest["sizes"]] == ["N1_H12", "N1_H8", "N3_H12", "N3_H8"]
    assert [size["dims"] for size in manifest["sizes"]] == every_size({"N": (1, 3), "H": (12, 8)})
    assert manifest["sizes"][2]["inputs"][0]["shape"] == [3, 3, 12, 10]
    assert max(size["memory_bytes"] for size in manifest["sizes"]) == network.memory
    assert f"{network.memory / (1 << 20):.1f} MiB" in repr(network)


def test_the_example_runs_every_size(exported: Path, tmp_path: Path) -> None:
    command = ["cc", "-std=c11", "-O1", "-Wall", "-Werror", "-I", str(exported), str(exported / "example.c")]
    command += [str(exported / "libsmall.a"), "-lm", "-lpthread", "-o", str(tmp_path / "example")]
    subprocess.run(command, check=True)
    done = subprocess.run([str(tmp_path / "example")], cwd=exported, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 outputs as expected; ok" in done.stdout


#: Finds sizes by shapes, runs in static buffers, and opens twice on one set of weights in memory.
PROGRAM = r"""
#include <stdio.h>
#include "small.h"
static _Alignas(64) unsigned char weights[small_WEIGHTS_BYTES];
static _Alignas(64) unsigned char workspace[small_WORKSPACE_BYTES(1)];
static float x[small_INPUT0_BYTES / sizeof(float)], y[2][small_OUTPUT0_BYTES / sizeof(float)];
_Static_assert(small_N3_H8_INPUT0_BYTES == 3 * 3 * 8 * 10 * 4, "");
_Static_assert(small_INPUT0_BYTES == small_N3_H12_INPUT0_BYTES, "");
_Static_assert(small_N3_H8_INPUT0_ELEMENTS == 3 * 3 * 8 * 10, "");
_Static_assert(small_N3_H8_OUTPUT0_ELEMENTS * sizeof(float) == small_N3_H8_OUTPUT0_BYTES, "");
_Static_assert(_Generic(small_N1_H8_WORKSPACE_BYTES(1), size_t: 1, default: 0), "");
_Static_assert(small_WORKSPACE_BYTES(2) >= small_N1_H8_WORKSPACE_BYTES(2), "");
int main(void)
{
    int64_t shape[4] = {3, 3, 8, 10};
    const int64_t *shapes[1] = {shape};
    int size = -1;
    if (small_find_size(shapes, &size) != CONVGEN_OK || size != small_N3_H8) return 1;
    shape[0] = 2;
    if (small_find_size(shapes, &size) != CONVGEN_NO_SUCH_SIZE || small_find_size(NULL, &size) != CONVGEN_NULL_POINTER)
        return 2;
    convgen_network_sizes sizes;
    if (small_sizes(4, 1, &sizes) != CONVGEN_NO_SUCH_SIZE) return 3;
    if (small_sizes(-1, 1, &sizes) != CONVGEN_NO_SUCH_SIZE) return 3;
    if (small_inputs(4) != NULL || small_outputs(-1) != NULL || small_inputs(1)[0].shape[2] != 8) return 4;
    FILE *file = fopen("small.weights", "rb");
    if (file == NULL || fread(weights, 1, sizeof weights, file) != sizeof weights) return 5;
    convgen_network *networks[2];
    for (int i = 0; i < 2; ++i) {
        if (small_open_memory(weights, sizeof weights, &networks[i]) != CONVGEN_OK) return 6;
        const void *inputs[] = {x};
        void *outputs[] = {y[i]};
        const size_t in[] = {small_N3_H8_INPUT0_BYTES}, out[] = {small_N3_H8_OUTPUT0_BYTES};
        convgen_network_args args = {.inputs = inputs, .input_sizes = in, .outputs = outputs, .output_sizes = out,
                                     .workspace = workspace, .workspace_size = sizeof workspace, .size = small_N3_H8};
        if (small_run(networks[i], &args) != CONVGEN_OK) return 7;
        args.size = small_N1_H8; /* other bytes */
        if (small_run(networks[i], &args) != CONVGEN_WRONG_SIZE) return 8;
        args.size = 4;
        if (small_run(networks[i], &args) != CONVGEN_NO_SUCH_SIZE) return 9;
    }
    small_close(networks[0]);
    weights[sizeof weights - 1] ^= 1;
    convgen_network *damaged;
    if (small_open_memory(weights, sizeof weights, &damaged) != CONVGEN_WRONG_WEIGHTS || damaged != NULL) return 10;
    if (small_open_memory(weights, sizeof weights - 64, &damaged) != CONVGEN_WRONG_WEIGHTS) return 11;
    if (small_open_memory(weights + 1, sizeof weights, &damaged) != CONVGEN_MISALIGNED) return 12;
    small_close(networks[1]);
    for (int i = 0; i < 3; ++i) /* x is 0, and so are the sums */
        if (y[0][i] != 0 || y[1][i] != 0) return 13;
    printf("%s\n", small_error(CONVGEN_NO_SUCH_SIZE));
    return 0;
}
"""


def test_from_c_in_static_buffers(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "program.c").write_text(PROGRAM)
    command = ["cc", "-std=c11", "-Wall", "-Werror", "-I", str(exported), str(tmp_path / "program.c")]
    command += [str(exported / "libsmall.a"), "-lm", "-lpthread", "-o", str(tmp_path / "program")]
    subprocess.run(command, check=True)
    done = subprocess.run([str(tmp_path / "program")], cwd=exported, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "the network was not made for tensors of such sizes\n")


def test_the_header_is_cpp_as_well(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "program.cpp").write_text('#include "small.h"\nstatic_assert(small_N3_H8 == 3);\n')
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", "-I", str(exported)]
    subprocess.run([*command, str(tmp_path / "program.cpp")], check=True)


def test_the_header_names_tensors_as_the_model_does(network: Any, tmp_path: Path) -> None:
    """Whatever they are called: nothing ends its comments, seems to begin one, or is not seen."""
    code = network.built.code
    names = ["2nd-входы", "out-put", "/block/*/Relu*/*/", "a\nb\u202ec\\"]
    inputs = tuple(replace(code.inputs[0], name=name) for name in names)
    text = header_text(replace(code, sizes=(replace(code.sizes[0], inputs=inputs),)))
    assert all(f"({name}) = " in text for name in names[:2])
    assert "a\\nb\\u202ec" in text
    (tmp_path / "odd.h").write_text(text, encoding="utf-8")
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", "-x", "c"]
    subprocess.run([*command, str(tmp_path / "odd.h")], check=True)


def test_statuses_are_told_of_the_network(network: Any) -> None:
    returned = [*range(1, 4), *range(5, 10), *range(32, 36)]  # all but CONVGEN_WRONG_PACKED
    texts = [network._error(status).decode() for status in returned]
    assert len(set(texts)) == len(returned)
    assert not [text for text in texts if "layer" in text or "packed" in text or "not a status" in text]
    assert all("network needs" in text for text in texts[:2])


def test_what_is_no_file_cannot_be_read(exported: Path, tmp_path: Path) -> None:
    """At once: nobody writes to the pipe."""
    library = ctypes.CDLL(str(exported / "libsmall.so"))
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null"), tmp_path / "none"):
        status = library.small_open(os.fsencode(path), ctypes.byref(ctypes.c_void_p()))
        library.small_error.restype = ctypes.c_char_p
        assert library.small_error(status) == b"the file of weights cannot be read"


def test_steps_are_timed(network: Any) -> None:
    for size, (n, h) in enumerate(((1, 12), (1, 8), (3, 12), (3, 8))):
        seconds = network.step_seconds(given(n, h)["x"])
        assert len(seconds) == len(network.layers(size)) == network.sizes(1, size).steps
        assert all(0 <= second < 10 for second in seconds)
        assert sum(seconds) > 0


def test_the_command_line_takes_sizes(tmp_path: Path) -> None:
    path, out = tmp_path / "small.onnx", tmp_path / "out"
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (2, 3)}, ["y"])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch size"
    path.write_bytes(model.SerializeToString())
    command = ["compile", str(path), "--threads", "1", "--out", str(out)]
    done = CliRunner().invoke(cli, [*command, "--dim", "batch size=2,5"])
    assert done.exit_code == 0, done.output
    assert "small_batch_size5 = 1" in (out / "small.h").read_text()
    loaded = convgen.load(out)
    for n in (2, 5):
        assert loaded(np.full((n, 3), -1, np.float32)).shape == (n, 3)
    for wrong in ("batch size=2,2", "batch size=0", "batch size=", "=3", "batch size=1,x"):
        assert main([*command, "--dim", wrong]) == 2, wrong


def test_sizes_and_their_labels() -> None:
    assert every_size({}) == [{}]
    assert every_size({"N": 4}) == [{"N": 4}]
    assert every_size({"N": (1, 2), "H": 8}) == [{"N": 1, "H": 8}, {"N": 2, "H": 8}]
    assert labels_of(every_size({"N": (1, 2), "H": 8})) == ["N1", "N2"]
    assert labels_of(every_size({"N": 4})) == [""]
    assert labels_of(every_size({"a.b": (1, 2), "__": (3, 4)})) == ["a_b1_dim3", "a_b1_dim4", "a_b2_dim3", "a_b2_dim4"]
    assert labels_of([{"a.": 1, "a!": 2}, {"a.": 2, "a!": 1}, {"a.": 1, "a!": 1}])[0] == "a1_a2"
    for wrong in ({"N": ()}, {"N": (1, 1)}, {"N": (0,)}, {"N": range(1, 66)}):
        with pytest.raises(SpecError, match="expected"):
            every_size(wrong)
