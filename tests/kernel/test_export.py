"""Exported libraries, as a C programmer meets them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from naive import compile_naive
from paths import ROOT

from convgen.api import build
from convgen.errors import BuildError, ExportError
from convgen.kernel.export import example_text, write_library
from convgen.lowering.interface import ABI, Interface
from convgen.lowering.link import link as linked
from convgen.network.check.exported import validate_folder
from convgen.problem.activation import DEFAULTS
from convgen.problem.spec import ConvSpec

SPEC = ConvSpec.parse("conv2d n1 ic4 oc6 i20x18 k3x3 p1 relu")
FACTS = {
    "target": "cpu:test",
    "threads": 2,
    "schedule": "naive 1",
    "picks": {"tile": 4},
    "seconds": 1.5e-3,
    "error_factor": 50.0,
    "versions": {"convgen": "0"},
}
STRICT = ("-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror")


def export(spec: ConvSpec, folder: Path, how: str = "reference", name: str = "kernel", **facts: Any) -> Path:
    interface, path = compile_naive(spec, folder, how, name)
    write_library(folder / name, interface, path, {**FACTS, **facts})
    return folder / name


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": ".", "LC_ALL": "C"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def succeed(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One exported kernel with workspace, for tests that only look at it."""
    return export(SPEC, tmp_path_factory.mktemp("export"), "staged")


# ---- the example -------------------------------------------------------------------------------

EXAMPLES = [
    "conv2d n1 ic4 oc6 i20x18 k3x3 p1 relu",
    "conv2d n2 ic4 oc6 g2 i9x8 k3x2 s2x1 p1_0x0_1 d1x2 prelu residual nhwc",
    "conv1d n2 ic4 oc4 i30 k5 d3 nobias leaky_relu(0.25)",
    "conv1d n1 ic8 oc8 g8 i33 k4 s3 p1_2 elu nhwc residual",
    "conv3d n1 ic2 oc3 i4x10x12 k2x3x2 p1 s1x2x1 clip(-10,20)",
    "convtranspose1d n2 ic4 oc6 i9 k4 s3 p1_0 op2 residual silu",
    "convtranspose2d n1 ic6 oc4 g2 i9x8 k3x4 s2x3 p1_0x1 op1x2 hardswish nhwc",
    "convtranspose3d n1 ic2 oc2 i3x4x5 k2 s2 d2 nobias tanh",
    "conv2d n2 ic5 oc7 i9x9 k1x1 gelu",
    "conv2d n0 ic3 oc5 i7x7 k3x3",
]
BLOCKED_EXAMPLES = [
    "conv2d n2 ic16 oc32 g2 i9x8 k3x2 residual nchw8c dst_nchw16c",
    "conv1d n2 ic16 oc8 i9 k3 nchw16c dst_nhwc",
    "convtranspose3d n1 ic8 oc16 i3x4x5 k2 s2 residual nhwc dst_nchw8c",
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_example_passes(tmp_path: Path, text: str) -> None:
    """Compiled as its comments say, without a warning, against both libraries."""
    folder = export(ConvSpec.parse(text), tmp_path, "staged", name="layer")
    succeed("cc", *STRICT, "example.c", "-L.", "-llayer", "-lm", "-lpthread", "-o", "shared", cwd=folder)
    succeed("cc", *STRICT, "example.c", "liblayer.a", "-lm", "-lpthread", "-o", "static", cwd=folder)
    printed = [succeed(folder / program, cwd=folder) for program in ("shared", "static")]
    assert printed[0] == printed[1]
    assert re.search(r": (\d+) of \1 outputs checked, largest error .*; ok\n$", printed[0])


@pytest.mark.parametrize("text", BLOCKED_EXAMPLES)
def test_example_of_layouts_in_blocks_passes(tmp_path: Path, text: str) -> None:
    folder = export(ConvSpec.parse(text), tmp_path, name="layer")
    succeed("cc", *STRICT, "example.c", "liblayer.a", "-lm", "-lpthread", "-o", "example", cwd=folder)
    assert "; ok" in succeed("./example", cwd=folder)


@pytest.mark.parametrize(
    "text",
    [
        "conv2d n2 ic6 oc5 i9x8 k3x2 s2x1 p1x0 data",
        "conv1d n2 ic8 oc8 g8 i30 k5 d3 data nhwc",
        "conv2d n2 ic6 oc5 i9x8 k3x2 s2x1 p1x0 weights",
        "convtranspose2d n2 ic6 oc4 g2 i9x8 k3 s2 p1_0x1 nobias weights nhwc",
    ],
)
def test_a_gradient_is_exported_as_a_layer_is(tmp_path: Path, text: str) -> None:
    """Its example, compiled as its comments say; and the folder is validated as it lies there."""
    build(ConvSpec.parse(text), threads=2, records=False, name="layer").export(tmp_path / "layer")
    succeed("cc", *STRICT, "example.c", "-L.", "-llayer", "-lm", "-lpthread", "-o", "example", cwd=tmp_path / "layer")
    assert re.search(r": (\d+) of \1 outputs checked.*; ok\n$", succeed("./example", cwd=tmp_path / "layer"))
    validate_folder(tmp_path / "layer").raise_if_failed()


def test_every_activation_has_an_example(tmp_path: Path) -> None:
    """Wrong expressions in C would refuse right libraries; each is compiled and run once."""
    for name in DEFAULTS:
        spec = ConvSpec.parse(f"conv1d n1 ic3 oc4 i9 k3 {name}")
        folder = export(spec, tmp_path, name=f"a_{name}")
        succeed("cc", *STRICT, "example.c", f"liba_{name}.a", "-lm", "-lpthread", "-o", "example", cwd=folder)
        assert "; ok" in succeed("./example", cwd=folder)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "i8"])
def test_an_example_stores_what_the_layer_stores(tmp_path: Path, dtype: str) -> None:
    epilogue = "relu" if dtype == "i8" else "residual prelu"
    spec = ConvSpec.parse(f"conv2d n1 ic3 oc4 i9x8 k3 p1 {epilogue} {dtype}")
    folder = export(spec, tmp_path, name="narrow")
    succeed("cc", *STRICT, "example.c", "libnarrow.a", "-lm", "-lpthread", "-o", "example", cwd=folder)
    assert "; ok" in succeed("./example", cwd=folder)
    arguments = json.loads((folder / "manifest.json").read_text())["arguments"]
    own = {("i8", 1), ("i32", 4), ("f32", 4)} if dtype == "i8" else {(dtype, 2)}
    assert {(a["dtype"], a["alignment"]) for a in arguments} == own


@pytest.mark.parametrize(
    ("found", "replaced"),
    [
        ("return fmax(x, 0);", "return x;"),
        ("- padding[axis]", "- 0 * padding[axis]"),
        ("sum += value(bias[oc]);", ""),
        ("sum += product;", "sum += product * (1 + 1e-4);"),
    ],
)
def test_example_detects_wrong_results(out: Path, tmp_path: Path, found: str, replaced: str) -> None:
    """The library beside another layer's loops: the same as a wrong library beside the right ones."""
    text = (out / "example.c").read_text()
    assert found in text
    (tmp_path / "example.c").write_text(text.replace(found, replaced))
    succeed("cc", f"-I{out}", "example.c", out / "libkernel.a", "-lm", "-lpthread", "-o", "example", cwd=tmp_path)
    done = run("./example", cwd=tmp_path)
    assert done.returncode == 1
    assert re.match(r"element \d+ of dst: expected \S+, found \S+\n", done.stderr)


def test_example_samples_large_layers(tmp_path: Path) -> None:
    """A large layer's example is the same program over a part of the outputs, spread over all positions."""
    spec = ConvSpec.parse("conv2d n1 ic256 oc256 i56x56 k3x3 p1")
    interface, _ = compile_naive(SPEC, tmp_path)
    step = re.search(r"STEP = (\d+)", example_text(Interface("x", spec, interface.packed, 0, 0, ())))
    assert step
    assert 256 * 56 * 56 / int(step[1]) * spec.reduction_length < 40e6
    assert int(step[1]) % 2 == 1
    assert int(step[1]) % 7 != 0


# ---- the libraries -----------------------------------------------------------------------------

FUNCTIONS = {
    "sizes",
    "pack",
    "repack",
    "run",
    "verify_packed",
    "check_cpu",
    "version",
    "error",
    "pool_create",
    "pool_borrow",
    "pool_destroy",
}


def test_library_needs_only_the_c_library(out: Path) -> None:
    needed = re.findall(r"^\s*(?:/\S*/)?([\w.+-]+)", succeed("ldd", "libkernel.so", cwd=out), re.MULTILINE)
    allowed = re.compile(r"(linux-vdso|ld-linux[\w-]*|libc|libm|libpthread)\.so\.\d+$")
    assert needed
    assert [name for name in needed if not allowed.match(name)] == []


def test_library_shows_only_its_functions(out: Path) -> None:
    shown = succeed("nm", "-D", "--defined-only", "libkernel.so", cwd=out).split()[2::3]
    assert set(shown) == {f"kernel_{function}" for function in FUNCTIONS}
    archived = re.findall(r" [A-Z] (\w+)$", succeed("nm", "--defined-only", "libkernel.a", cwd=out), re.MULTILINE)
    assert set(archived) == set(shown)


def test_library_has_no_paths_and_no_executable_stack(out: Path) -> None:
    for file in ("libkernel.so", "libkernel.a"):
        data = (out / file).read_bytes()
        for path in (out.parent, Path.cwd(), Path.home(), Path("/tmp/"), ROOT):
            assert f"{path}/".encode() not in data
        assert b".debug_info" not in data
    stack = re.search(r"GNU_STACK.*", succeed("readelf", "-lW", "libkernel.so", cwd=out))
    assert stack
    assert "RWE" not in stack[0]


def test_library_is_reproducible(out: Path, tmp_path: Path) -> None:
    """The same kernel linked elsewhere gives the same bytes."""
    again = export(SPEC, tmp_path, "staged")
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
#include "first.h"
#include "second.h"

int main(void)
{
    convgen_sizes a, b;
    convgen_pool *pool = NULL;
    if (first_sizes(2, &a) || second_sizes(2, &b) || first_pool_create(2, &pool))
        return 1;
    float *src = (float *)calloc(1, a.src), *weights = (float *)calloc(1, a.weights + b.weights);
    float *bias = (float *)calloc(1, a.bias + b.bias), *middle = (float *)malloc(a.dst), *dst = (float *)malloc(b.dst);
    void *packed = aligned_alloc(64, a.packed), *other = aligned_alloc(64, b.packed);
    void *workspace = aligned_alloc(64, a.workspace + b.workspace + 64);
    for (size_t i = 0; i < a.bias / 4; ++i)
        bias[i] = 1;
    for (size_t i = 0; i < b.weights / 4; ++i)
        weights[i] = 2;
    static convgen_pack_args p, q; /* all 0: C++17 has no names in initialisers */
    p.weights = q.weights = weights;
    p.bias = q.bias = bias;
    p.weights_size = a.weights, p.bias_size = a.bias, p.packed = packed, p.packed_size = a.packed;
    q.weights_size = b.weights, q.bias_size = b.bias, q.packed = other, q.packed_size = b.packed;
    convgen_run_args r = {src, a.src, packed, a.packed, NULL, 0, middle, a.dst, workspace, a.workspace, pool};
    convgen_run_args s = {middle, a.dst, other, b.packed, NULL, 0, dst, b.dst, workspace, b.workspace, pool};
    if (first_pack(&p) || second_pack(&q) || first_run(&r) || second_run(&s))
        return 2;
    r.packed = other;
    r.packed_size = b.packed;
    const int status = first_run(&r);
    second_pool_destroy(pool);
    printf("%g %g %d\\n", middle[0], dst[0], status == CONVGEN_WRONG_PACKED);
    return 0;
}
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in a row in one directory: first's output is second's input."""
    folder = tmp_path_factory.mktemp("two")
    export(ConvSpec.parse("conv2d n1 ic3 oc4 i20x20 k1x1 relu"), folder, "staged", "first")
    export(ConvSpec.parse("conv2d n1 ic4 oc2 i20x20 k1x1"), folder, "staged", "second")
    for name in ("first", "second"):
        for path in (folder / name).glob(f"*{name}*"):
            shutil.copy(path, folder)
    (folder / "program.c").write_text(PROGRAM)
    return folder


@pytest.mark.parametrize("libraries", [("libfirst.a", "libsecond.a"), ("-L.", "-lfirst", "-lsecond")])
@pytest.mark.parametrize("compiler", [("cc", "-std=c11"), ("c++", "-x", "c++", "-std=c++17")])
def test_two_libraries_in_one_program(two: Path, compiler: tuple[str, ...], libraries: tuple[str, ...]) -> None:
    """Both headers, one pool, one workspace; from C and from C++."""
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"there is no {compiler[0]}")
    flags = ("-Wall", "-Wextra", "-Werror", "-pedantic")
    succeed(*compiler, *flags, "program.c", "-x", "none", *libraries, "-lm", "-lpthread", "-o", "program", cwd=two)
    # The first layer's src is 0 and its bias 1; the second sums 4 channels of 1 with weight 2, and bias 1.
    assert succeed("./program", cwd=two) == "1 9 1\n"


def test_example_under_valgrind(out: Path, tmp_path: Path) -> None:
    """No access outside a buffer, nothing read before it is written, nothing leaked, pools included."""
    if shutil.which("valgrind") is None:
        pytest.skip("there is no valgrind")
    shutil.copytree(out, tmp_path / "out")
    folder = tmp_path / "out"
    succeed("cc", "-g", "example.c", "libkernel.a", "-lm", "-lpthread", "-o", "example", cwd=folder)
    command = ("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=all")
    assert "; ok" in succeed(*command, "./example", cwd=folder)


# ---- the directory -----------------------------------------------------------------------------


def test_manifest(out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    assert ConvSpec.from_dict(manifest["spec"]["fields"]) == SPEC
    assert manifest["spec"]["descriptor"] == SPEC.descriptor
    arguments = {argument["name"]: argument for argument in manifest["arguments"]}
    assert list(arguments) == ["src", "weights", "bias", "dst"]
    assert arguments["src"]["shape"] == [1, 4, 20, 18]
    assert arguments["src"]["axes"] == ["n", "ic", "ih", "iw"]
    assert arguments["weights"]["axes"] == ["oc", "ic/groups", "kh", "kw"]
    assert arguments["dst"]["bytes"] == 4 * 6 * 20 * 18
    assert {argument["function"] for argument in manifest["arguments"]} == {"pack", "run"}
    workspace = manifest["workspace"]
    assert workspace["bytes"] == workspace["fixed"] + 2 * workspace["per_thread"] >= arguments["dst"]["bytes"]
    assert (manifest["target"], manifest["schedule"], manifest["picks"]) == ("cpu:test", "naive 1", {"tile": 4})
    assert (manifest["seconds"], manifest["error_bound"]["factor"]) == (1.5e-3, 50.0)
    assert (manifest["abi"], manifest["threads"], manifest["versions"]) == (ABI, 2, {"convgen": "0"})
    assert set(manifest["files"]) == {path.name for path in out.iterdir()} - {"manifest.json"}
    for name, facts in manifest["files"].items():
        data = (out / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (facts["sha256"], facts["bytes"])


def test_manifest_layouts_of_a_transposed_nhwc_layer(tmp_path: Path) -> None:
    out = export(ConvSpec.parse("convtranspose1d n1 ic4 oc6 g2 i5 k2 s2 prelu residual nhwc"), tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    axes = {argument["name"]: argument["axes"] for argument in manifest["arguments"]}
    assert axes == {
        "src": ["n", "iw", "ic"],
        "weights": ["ic", "oc/groups", "kw"],
        "bias": ["oc"],
        "slope": ["oc"],
        "residual": ["n", "ow", "oc"],
        "dst": ["n", "ow", "oc"],
    }


@pytest.mark.parametrize(
    ("bias", "axes"), [("nobias", ["oc", "ic/groups", "kh", "kw"]), ("", ["oc * ic/groups * kh * kw + oc"])]
)
def test_a_gradient_of_weights_has_the_axes_of_weights(tmp_path: Path, bias: str, axes: list[str]) -> None:
    spec = ConvSpec.parse(f"conv2d n1 ic3 oc4 i5x5 k3x3 {bias} weights")
    manifest = build(spec, threads=1, records=False, name="gradient").export(tmp_path / "out")
    found = {argument["name"]: (argument["axes"], argument["shape"]) for argument in manifest["arguments"]}
    assert found["dst"] == (axes, list(spec.dst_shape))
    assert found["residual"][0] == ["n", "oc", "oh", "ow"]


def test_manifest_and_header_of_layouts_in_blocks(tmp_path: Path) -> None:
    out = export(ConvSpec.parse("conv2d n2 ic32 oc16 i5x6 k1 residual nchw16c dst_nchw8c"), tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    found = {argument["name"]: (argument["axes"], argument["shape"]) for argument in manifest["arguments"]}
    assert found["src"] == (["n", "ic/16", "ih", "iw", "ic%16"], [2, 2, 5, 6, 16])
    assert found["dst"] == found["residual"] == (["n", "oc/8", "oh", "ow", "oc%8"], [2, 2, 5, 6, 8])
    assert manifest["spec"]["fields"]["dst_layout"] == "nchw8c"
    assert "[n, ic/16, ih, iw, ic%16] = [2, 2, 5, 6, 16], f32, 7680 bytes" in (out / "kernel.h").read_text()


def test_a_header_sets_every_tensor_apart_from_its_axes(tmp_path: Path) -> None:
    folder = export(ConvSpec.parse("conv2d n1 ic3 oc4 i9x8 k3 i8 weights_zero"), tmp_path, name="narrow")
    assert re.search(r"^ \*   weights_zero \[oc\] = \[4\], ", (folder / "narrow.h").read_text(), re.MULTILINE)


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    out = export(SPEC, tmp_path)
    (out / "notes.txt").write_text("the user's own")
    before = (out / "libkernel.so").read_bytes()
    assert export(SPEC.with_(activation="none"), tmp_path) == out
    assert (out / "libkernel.so").read_bytes() != before
    assert (out / "notes.txt").read_text() == "the user's own"
    assert len(list(out.iterdir())) == 9


def test_another_library_is_not_mixed_in(tmp_path: Path) -> None:
    out = export(SPEC, tmp_path)
    before = {path: path.read_bytes() for path in out.iterdir()}
    interface, path = compile_naive(SPEC, tmp_path, name="other")
    with pytest.raises(ExportError, match="expected an earlier export of other or none, found kernel"):
        write_library(out, interface, path, FACTS)
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "folder that is there"])
@pytest.mark.parametrize("other", ["other", "kernel"])
def test_of_two_exports_at_once_the_later_finds_the_earlier(
    other: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is made and put into place while the other is linked."""
    out = tmp_path / "out"
    if there:
        out.mkdir()
    made = {
        name: compile_naive(spec, tmp_path, "reference", name)
        for name, spec in {"kernel": SPEC, "other": SPEC.with_(activation="none")}.items()
    }
    earlier = made[other]

    def link(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr("convgen.kernel.export.link", linked)
        if not (out / "manifest.json").exists():
            write_library(out, *earlier, FACTS)
        linked(*arguments, **options)

    monkeypatch.setattr("convgen.kernel.export.link", link)
    if other == "kernel":
        write_library(out, *made["kernel"], FACTS)
    else:
        with pytest.raises(ExportError, match="expected an earlier export of kernel or none, found other"):
            write_library(out, *made["kernel"], FACTS)
    assert json.loads((out / "manifest.json").read_text())["name"] == other
    assert (out / f"lib{other}.so").exists()
    assert len(list(out.iterdir())) == 8
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("file", ["example.c", "kernel.h", "kernelConfig.cmake"])
def test_what_is_no_export_is_not_overwritten(file: str, tmp_path: Path) -> None:
    out = tmp_path / "kernel"
    out.mkdir()
    (out / file).write_text("the user's own")
    (out / "notes.txt").write_text("beside it")
    with pytest.raises(ExportError, match=f"an earlier export of kernel or none, found {file} without manifest"):
        export(SPEC, tmp_path)
    assert {path.name for path in out.iterdir()} == {file, "notes.txt"}
    assert (out / file).read_text() == "the user's own"


def test_nothing_is_left_of_an_export_that_failed(tmp_path: Path) -> None:
    interface, path = compile_naive(SPEC, tmp_path, name="kernel")
    broken = tmp_path / "broken.o"
    broken.write_bytes(path.read_bytes()[:100])
    present = sorted(tmp_path.iterdir())
    with pytest.raises(BuildError, match=r"broken\.o"):
        write_library(tmp_path / "a" / "b", interface, broken, FACTS)
    with pytest.raises(ExportError, match="facts: expected JSON values"):
        write_library(tmp_path / "a" / "b", interface, path, {**FACTS, "picks": {"x": object()}})
    with pytest.raises(ExportError, match="facts: expected threads among them, found target"):
        write_library(tmp_path / "a" / "b", interface, path, {"target": "cpu"})
    with pytest.raises(ExportError, match="facts: expected none that the manifest has of its own, found files, isa"):
        write_library(tmp_path / "a" / "b", interface, path, {**FACTS, "isa": [], "files": {}})
    with pytest.raises(ExportError, match="expected a directory, found a file"):
        write_library(broken, interface, path, FACTS)
    assert sorted(tmp_path.iterdir()) == present
    write_library(tmp_path / "a" / "b", interface, path, FACTS)
    assert len(list((tmp_path / "a" / "b").iterdir())) == 8


def test_what_an_earlier_export_has_left_goes(tmp_path: Path) -> None:
    """Its own files, as its manifest lists them; those of the user stay."""
    folder = export(SPEC, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("example.input0.N1", "mine.txt"):
        (folder / name).write_text("")
    manifest["files"] |= {"example.input0.N1": {}, "example.output0.N1": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    export(SPEC, tmp_path)
    assert not (folder / "example.input0.N1").exists()
    assert (folder / "mine.txt").exists()
    manifest["files"] |= {"../mine.txt": {}}  # what is no file beside it: nothing is believed
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "example.input0.N1").write_text("")
    (tmp_path / "mine.txt").write_text("")
    export(SPEC, tmp_path)
    assert (folder / "example.input0.N1").exists()
    assert (tmp_path / "mine.txt").exists()
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == set(manifest["files"]) - {
        *("example.input0.N1", "example.output0.N1", "../mine.txt")
    }
