"""The C runtime: its memory layouts, and its threads and workspace under sanitizers."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
from paths import SUPPORT

from convgen.errors import BuildError
from convgen.kernel import library
from convgen.lowering import interface
from convgen.lowering.interface import Interface, TensorInfo
from convgen.lowering.runtime import source
from convgen.measure.standalone import interface as standalone
from convgen.problem.spec import ConvSpec

RUNTIME = Path(interface.__file__).parents[1] / "runtime"
PROGRAM = SUPPORT / "runtime_check.c"
WARNINGS = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread")


def cc(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["cc", *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("sanitizer", ["", "thread", "address,undefined"])
def test_runtime_program(tmp_path: Path, sanitizer: str) -> None:
    """Pools made, used by many callers and destroyed; failures of every kind; fork."""
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g"] if sanitizer else []
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    if flags and cc(tmp_path, *flags, "empty.c").returncode:
        pytest.skip(f"the C compiler has no -fsanitize={sanitizer}")
    sources = (PROGRAM, RUNTIME / "pool.c", RUNTIME / "kernel.c")
    built = cc(tmp_path, *WARNINGS, *flags, f"-I{RUNTIME}", *sources, "-o", "program")
    assert built.returncode == 0, built.stderr
    # A forked child that makes threads is outside what the thread sanitizer follows, and sanitizers need
    # more address space than the limit leaves.
    arguments = {"": ["fork", "limits"], "thread": []}.get(sanitizer, ["fork"])
    ran = subprocess.run([tmp_path / "program", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    assert "0 failures" in ran.stdout


def test_layouts_are_those_of_tvm_ffi(tmp_path: Path) -> None:
    """The runtime's own declarations against the headers of the tvm-ffi in use."""
    tvm_ffi = pytest.importorskip("tvm_ffi")
    include = Path(tvm_ffi.__file__).parent / "include"
    pairs = {
        "DLTensor": ("convgen_dltensor", ["data", "device", "ndim", "dtype", "shape", "strides", "byte_offset"]),
        "DLDevice": ("convgen_device", ["device_type", "device_id"]),
        "DLDataType": ("convgen_dtype", ["code", "bits", "lanes"]),
        "TVMFFIAny": ("convgen_any", ["type_index", "zero_padding"]),
    }
    lines = ["#include <tvm/ffi/c_api.h>", '#include "runtime.h"']
    for theirs, (ours, fields) in pairs.items():
        lines.append(f'_Static_assert(sizeof({theirs}) == sizeof({ours}), "{theirs}");')
        for field in fields:
            equal = f"offsetof({theirs}, {field}) == offsetof({ours}, {field})"
            sizes = f"sizeof((({theirs} *)0)->{field}) == sizeof((({ours} *)0)->{field})"
            lines.append(f'_Static_assert({equal} && {sizes}, "{theirs}.{field}");')
    lines += [
        '_Static_assert(offsetof(TVMFFIAny, v_ptr) == offsetof(convgen_any, value.v_ptr), "TVMFFIAny.v_ptr");',
        '_Static_assert(kTVMFFIDLTensorPtr == 7 && kDLCPU == 1 && kDLFloat == 2, "constants");',
        "TVMFFISafeCallType safe_call = 0;",
        "int call(convgen_function f) { return sizeof(f) == sizeof(safe_call); }",
        "void TVMFFIErrorSetRaisedFromCStr(const char *, const char *);",
        "void TVMFFIErrorSetRaisedFromCStrParts(const char *, const char **, int32_t);",
    ]
    (tmp_path / "layouts.c").write_text("\n".join(lines) + "\n")
    done = cc(tmp_path, "-std=c11", "-fsyntax-only", f"-I{include}", f"-I{RUNTIME}", "layouts.c")
    assert done.returncode == 0, done.stderr


def test_constants_agree_between_c_and_python() -> None:
    types, runtime = source("types.h"), source("runtime.h")

    def constant(text: str, name: str) -> int:
        found = re.search(rf"{name}(?: =)? (\d+)", text)
        assert found, name
        return int(found[1])

    assert constant(types, "#define CONVGEN_ABI") == interface.ABI
    assert types.count(str(interface.ABI)) >= 2  # the check of a second header, too
    assert constant(types, "CONVGEN_ALIGNMENT") == interface.ALIGNMENT == interface.HEADER_BYTES
    assert constant(types, "CONVGEN_MAX_THREADS") == interface.MAX_THREADS
    assert constant(runtime, "CONVGEN_MAX_PACKED") == interface.MAX_PACKED


def test_python_structs_have_the_layout_of_c(tmp_path: Path) -> None:
    structs = [
        ("convgen_sizes", library.SizesStruct),
        ("convgen_pack_args", library._PackArgs),
        ("convgen_run_args", library._RunArgs),
        # What measures bundles has its own, as it is the standard library alone.
        ("convgen_sizes", standalone.Sizes),
        ("convgen_pack_args", standalone.PackArgs),
        ("convgen_run_args", standalone.RunArgs),
        ("convgen_cuda_run_args", standalone.GpuRunArgs),
    ]
    lines = ['#include "types.h"', '#include "cuda_types.h"']
    for name, struct in structs:
        lines.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "{name}");')
        for field, *_ in struct._fields_:
            offset = getattr(struct, field).offset
            lines.append(f'_Static_assert(offsetof({name}, {field}) == {offset}, "{name}.{field}");')
    (tmp_path / "layouts.c").write_text("\n".join(lines) + "\n")
    done = cc(tmp_path, "-std=c11", "-fsyntax-only", f"-I{RUNTIME}", "layouts.c")
    assert done.returncode == 0, done.stderr


SPEC = ConvSpec.parse("conv2d n1 ic3 oc5 i7x7 k3x3 residual prelu")


def make(**changes: object) -> Interface:
    fields = {"name": "k", "packed": (TensorInfo("w", (5, 3, 3, 3)), TensorInfo("b", (5,))), "isa": ("avx2",)}
    sizes = {"workspace_main": 65, "workspace_task": 1}
    return Interface(**{"spec": SPEC, **fields, **sizes, **changes})  # type: ignore[arg-type]


def test_interface_sizes() -> None:
    made = make()
    assert list(made.arguments) == ["src", "weights", "bias", "slope", "residual", "dst"]
    assert made.arguments["residual"].shape == made.arguments["dst"].shape == (1, 5, 5, 5)
    assert made.arguments["dst"].bytes == 500
    assert made.packed_offsets == (64, 64 + 576)  # 540 bytes rounded up
    assert made.packed_size == 64 + 576 + 64
    assert [made.workspace_size(threads) for threads in (1, 2, 8)] == [192, 256, 640]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "a b"),
        ("name", "1a"),
        ("name", "convgen"),
        ("name", "x" * 201),
        ("name", 'k"; int x'),
        ("packed", ()),
        ("packed", (TensorInfo("w", ()),)),
        ("packed", (TensorInfo("w", (0, 3)),)),
        ("packed", (TensorInfo("w", (3,)),) * 17),
        ("workspace_main", -1),
        ("workspace_task", -1),
        ("isa", ('avx2") || (1',)),
    ],
)
def test_interface_refuses(field: str, value: object) -> None:
    with pytest.raises(BuildError, match=rf"{field}: expected .*, found"):
        make(**{field: value})
