"""What a library may be called, as compilers see it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from fake_cuda import PLAIN, SIMPLE, STRICT, compile_cuda
from naive import compile_naive

from convgen.errors import BuildError, ExportError
from convgen.kernel.export import example_text, header_text, write_library
from convgen.kernel.names import check_export_name, free_name
from convgen.lowering.entry import entry_source
from convgen.network.reading import identifier
from convgen.problem.spec import ConvSpec

SPEC = ConvSpec.parse("conv1d n1 ic4 oc6 i20 k3 p1 relu")
FACTS = {"threads": 1}
#: Keywords of C and C++ up to C23 and C++20, words of a linker script, and macros: what a name can be well.
_WORDS = """
alignas alignof and and_eq asm auto bitand bool break case catch char char8_t class co_await compl concept const
consteval constexpr constinit const_cast continue decltype default delete do double dynamic_cast else enum explicit
export extern false final for friend goto if import inline int long module mutable namespace new noexcept not
not_eq nullptr operator or or_eq override private protected public register reinterpret_cast requires restrict return
short signed sizeof static static_assert static_cast struct switch template this thread_local throw true try typedef
typeid typename typeof typeof_unqual union unsigned using virtual void volatile wchar_t while xor
global hidden local VERSION
linux unix i386 NULL EOF INFINITY I main defined min max stdout
A a kernel packed src must must_run entry runtime symbols launches example manifest CONVGEN exit x1 conv_2
"""
HARMLESS = _WORDS.split()
TAKEN = {
    "convgen": "identifier",
    "convgen_kernel": "share",  # convgen_kernel_run() is the runtime's
    "convgen_create": "share",  # and convgen_create_pool()
    "a__b": "reserved",
    "a_": "reserved",
    "conv_driver": "a library called conv",
    "argp": "argp_error",
    "gnu_get_libc": "gnu_get_libc_version",
    "math": "<math.h>",
    "stdio": "<stdio.h>",
    "float": "<float.h>",
    "m": "libm",
    "c": "libc",
    "pthread": "pthread",
}


def export(folder: Path, name: str) -> Path:
    interface, path = compile_naive(SPEC, folder, name=name)
    write_library(folder / name, interface, path, FACTS)
    return folder / name


def succeed(*command: str | Path, cwd: Path, text: str = "") -> None:
    done = subprocess.run([*map(str, command)], cwd=cwd, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_is_refused(name: str) -> None:
    with pytest.raises((BuildError, ExportError), match="name: expected") as caught:
        check_export_name(name)
    assert TAKEN[name] in str(caught.value)


def test_what_is_taken_is_not_written(tmp_path: Path) -> None:
    interface, path = compile_naive(SPEC, tmp_path, name="math")
    with pytest.raises(ExportError, match="name: expected one that nothing else has, found 'math'"):
        write_library(tmp_path / "out", interface, path, FACTS)
    assert not (tmp_path / "out").exists()


def test_an_export_that_was_installed_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(tmp_path, "conv_3x3")
    monkeypatch.setenv("CPATH", str(folder))
    monkeypatch.setenv("LIBRARY_PATH", str(folder))
    assert check_export_name("conv_3x3") == "conv_3x3"
    (folder / "conv_3x3.h").write_text("int conv_3x3;\n")
    with pytest.raises(ExportError, match=r"<conv_3x3\.h> is a header"):
        check_export_name("conv_3x3")
    (folder / "conv_3x3.h").unlink()
    with pytest.raises(ExportError, match=r"libconv_3x3\.so is a library"):
        check_export_name("conv_3x3")


@pytest.mark.parametrize("text", [*TAKEN, "g", "main_graph", "torch-jit-export", "1x1", "", "Größe", "x" * 300])
def test_a_model_of_any_name_has_a_library_that_may_be_called_so(text: str) -> None:
    name = free_name(identifier(text))
    assert check_export_name(name) == name
    assert identifier(text) in name


def test_what_is_harmless_is_accepted() -> None:
    assert [check_export_name(name) for name in HARMLESS] == HARMLESS


@pytest.mark.parametrize("language", ["c11", "gnu2x", "c++11", "c++20"])
def test_headers_of_any_accepted_name_compile_together(tmp_path: Path, language: str) -> None:
    interface, _ = compile_naive(SPEC, tmp_path)
    header = header_text(interface)
    for name in HARMLESS:
        (tmp_path / f"{name}.h").write_text(re.sub(rf"{interface.name}(?=_|\.|:)", name, header))
    lines = [f'#include "{name}.h"\nint (*const of_{name})(void) = {name}_check_cpu;' for name in HARMLESS]
    command = ["c++" if "+" in language else "cc", f"-std={language}", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    kind = "c++" if "+" in language else "c"
    succeed(*command, "-I.", "-fsyntax-only", "-x", kind, "-", cwd=tmp_path, text="\n".join(lines))


@pytest.mark.parametrize("name", ["runtime", "int", "linux", "main", "local", "x" * 200])
def test_libraries_of_odd_names_run(tmp_path: Path, name: str) -> None:
    folder = export(tmp_path, name)
    for library in ([f"-l{name}", "-Wl,-rpath,."], [f"lib{name}.a"]):
        succeed("cc", *STRICT, "-I.", "example.c", "-L.", *library, "-lm", "-lpthread", "-o", "example", cwd=folder)
        succeed("./example", cwd=folder)


def test_names_that_differ_in_case_are_two(tmp_path: Path) -> None:
    for name in ("conv", "CONV"):
        (tmp_path / f"{name}.h").write_text(header_text(compile_naive(SPEC, tmp_path, name=name)[0]))
    calls = '#include "conv.h"\n#include "CONV.h"\nint f(void) { return conv_check_cpu() + CONV_check_cpu(); }'
    succeed("cc", *STRICT, "-I.", "-fsyntax-only", "-x", "c", "-", cwd=tmp_path, text=calls)


@pytest.mark.parametrize("device", [False, True])
def test_no_function_of_ours_ends_as_a_librarys(tmp_path: Path, device: bool) -> None:
    """The example's and the entry points' own identifiers: a name may be anything that stands before such an end."""
    interface, _ = (
        compile_cuda(PLAIN, tmp_path, SIMPLE, "NAME") if device else compile_naive(SPEC, tmp_path, name="NAME")
    )
    functions = set(re.findall(r"\bNAME_([a-z_]+)\(", header_text(interface)))
    assert {"run", "pack", "version", "error"} <= functions
    for text in (example_text(interface), entry_source(interface, "0" * 64)):
        words = {word for word in re.findall(r"\w+", text) if not word.startswith(("NAME", "convgen_", "__"))}
        assert [word for word in words if word.endswith(tuple(f"_{function}" for function in functions))] == []


def test_the_longest_layer_has_a_name_for_files() -> None:
    big, most = 10**9, 2**31 - 1
    sizes = f"k1x1x1 s{most}x{most}x{most} d{most}x{most}x{most} p0_{big}x0_{big}x0_{big} op{big}x{big}x{big}"
    rest = "residual nobias nhwc bf16 strict clip(-1.234567890123456e-05,2.2345678901234567e+05)"
    names = {ConvSpec.parse(f"convtranspose3d n{n} ic1 oc1 i1x1x1 {sizes} {rest}").name for n in (1, 2)}
    assert len(names) == 2
    assert all(len(name) <= 200 and check_export_name(name) for name in names)
