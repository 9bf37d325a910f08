"""How build systems find an exported library: CMake and pkg-config, wherever its folder lies."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from naive import compile_naive
from programs import cmake

from convgen.kernel.export import write_library
from convgen.kernel.packages import Package, glibc_of, package_files
from convgen.lowering.interface import ABI
from convgen.problem.spec import ConvSpec

SPEC = ConvSpec.parse("conv2d n1 ic4 oc6 i20x18 k3x3 p1 relu")
#: Both ways to link a library in one project.
PROJECT = """
cmake_minimum_required(VERSION 3.16)
project(both LANGUAGES C)
find_package(kernel {version} REQUIRED)
find_package(kernel REQUIRED) # once more, as another part of a project may
add_executable(shared ${{kernel_DIR}}/example.c)
target_link_libraries(shared PRIVATE kernel::kernel m)
add_executable(archive ${{kernel_DIR}}/example.c)
target_link_libraries(archive PRIVATE kernel::static)
"""


#: Asks CMake for versions of two packages that have one: of ours, and of what CMake itself writes for it.
REQUESTS = """
include(CMakePackageConfigHelpers)
write_basic_package_version_file(
  ${{CMAKE_CURRENT_LIST_DIR}}/theirs/theirsConfigVersion.cmake VERSION {version} COMPATIBILITY SameMajorVersion)
foreach(request IN ITEMS {requests})
  string(REPLACE " " ";" words "${{request}}")
  foreach(name IN ITEMS ours theirs)
    unset(${{name}}_DIR CACHE)
    find_package(${{name}} ${{words}} QUIET CONFIG NO_DEFAULT_PATH PATHS ${{CMAKE_CURRENT_LIST_DIR}}/${{name}})
    message("${{name}}|${{request}}|${{${{name}}_FOUND}}|${{${{name}}_CONSIDERED_VERSIONS}}")
  endforeach()
endforeach()
"""
ASKED = ["4", "4.0", "4.0.0", "4.1", "4.3", "4.3.0", "4.3.1", "4.4", "4.10", "3", "3.9", "5", "5.0", "0.1", "40", "04"]
ASKED += ["4 EXACT", "4.0 EXACT", "4.3 EXACT", "4.3.0 EXACT", "4.10 EXACT"]
RANGES = ["0...99", "3...4", "3...5", "4...5", "4...<5", "4...<5.0", "4...<5.1", "4...4.3", "4...<4.3", "4...<4.4"]
RANGES += ["4.0...4.9", "4.1...<5", "4.3...4.3", "4.3...<4.3.1", "4.4...<5", "4.10...4.11", "5...6", "3.9...<4.9"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export that was moved, to a folder with a space in its name."""
    interface, path = compile_naive(SPEC, tmp_path, name="kernel")
    write_library(tmp_path / "first", interface, path, {"threads": 1})
    return Path(shutil.move(tmp_path / "first", tmp_path / "moved there"))


@pytest.mark.parametrize("version", ["", f"{ABI}", f"{ABI}.0", f"{ABI}.0 EXACT"])
def test_cmake_finds_it(folder: Path, tmp_path: Path, version: str) -> None:
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(version=version))
    build = tmp_path / "build"
    cmake("-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={folder}")
    if version:
        return
    cmake("--build", build)
    for program in ("shared", "archive"):
        done = subprocess.run([build / program], capture_output=True, text=True)
        assert (done.returncode, done.stdout[-4:]) == (0, " ok\n"), done.stderr


@pytest.mark.parametrize(
    ("version", "changed"), [(f"{ABI + 1}", {}), (f"{ABI}.1", {}), ("", {"CMAKE_SYSTEM_PROCESSOR": "riscv64"})]
)
def test_cmake_refuses_another_version_or_processor(
    folder: Path, tmp_path: Path, version: str, changed: dict[str, str]
) -> None:
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(version=version))
    values = {"CMAKE_PREFIX_PATH": folder, **changed, **({"CMAKE_SYSTEM_NAME": "Linux"} if changed else {})}
    said = cmake("-S", tmp_path, "-B", tmp_path / "build", *(f"-D{k}={v}" for k, v in values.items()), fails=True)
    assert "kernelConfig.cmake, version:" in said
    assert ("x86_64" in said or "aarch64" in said) == bool(changed)


@pytest.mark.parametrize(("libc", "system", "found"), [("musl", "gnu", 0), ("musl", "musl", 1), (None, "gnu", 1)])
def test_cmake_refuses_another_c_library(tmp_path: Path, libc: str | None, system: str, found: int) -> None:
    Package("ours", "4.0", "a library", "x86_64").write(tmp_path, libc)
    config, *_ = package_files("ours")
    (tmp_path / config).write_text("")  # a script has no targets
    asked = f'set(CMAKE_LIBRARY_ARCHITECTURE x86_64-linux-{system})\nfind_package(ours QUIET PATHS "{tmp_path}")\n'
    (tmp_path / "ask.cmake").write_text(asked + 'message("${ours_FOUND}|${ours_CONSIDERED_VERSIONS}")\n')
    said = cmake("-P", tmp_path / "ask.cmake")
    assert f"{found}|" in said
    assert ("4.0 (x86_64, musl)" in said) == (not found)


@pytest.mark.parametrize("version", ["4.0", "4.3", "4.10"])
def test_versions_are_what_cmake_calls_same_major(tmp_path: Path, version: str) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    Package("ours", version, "a library", "x86_64").write(tmp_path / "ours")
    for name in ("ours", "theirs"):
        (tmp_path / name / package_files(name)[0]).write_text("")  # a script has no targets
    requests = " ".join(f'"{request}"' for request in [*ASKED, *RANGES])
    (tmp_path / "ask.cmake").write_text(REQUESTS.format(version=version, requests=requests))
    said = [line.split("|", 1) for line in cmake("-P", tmp_path / "ask.cmake").splitlines() if "|" in line]
    ours, theirs = ([line for name, line in said if name == which] for which in ("ours", "theirs"))
    assert ours == theirs
    found = [line.split("|")[0] for line in ours if line.split("|")[1] == "1"]
    assert len(ours) == len(ASKED) + len(RANGES)
    assert {"4", "4.0", "4...<5", f"{version} EXACT"} <= set(found)
    assert not {"3", "5", "0.1", "3...5", "4...5"} & set(found)


@pytest.mark.parametrize(
    ("linking", "asked", "more"),
    [
        ("shared", ["--cflags", "--libs"], ["-lm"]),
        ("archive", ["--cflags", "--variable=archive"], ["-lm", "-lpthread"]),
        ("static", ["--static", "--cflags", "--libs"], ["-static"]),
    ],
)
def test_pkg_config_finds_it(folder: Path, tmp_path: Path, linking: str, asked: list[str], more: list[str]) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    plain, program = Path(shutil.move(folder, tmp_path / "there")), tmp_path / "example"
    flags = []
    for one in [asked] if "--libs" in asked else [[option] for option in asked]:
        command, environment = ["pkg-config", *one, "kernel"], {"PKG_CONFIG_PATH": str(plain)}
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        flags += told.stdout.split()
    flags += [*more, f"-Wl,-rpath,{plain}"]
    subprocess.run(["cc", "-std=c11", plain / "example.c", *flags, "-o", program], check=True)
    assert "ok" in subprocess.run([program], capture_output=True, text=True, check=True).stdout
    said = subprocess.run(["objdump", "-p", program], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED +(\S+)", said))
    assert ("libkernel.so" in needed) == (linking == "shared")
    assert (not needed) == (linking == "static")


def test_the_manifest_says_what_it_needs(folder: Path) -> None:
    needs = json.loads((folder / "manifest.json").read_text())["needs"]
    library = folder / "libkernel.so"
    said = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    versions = [tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([\d.]+)", said)]
    assert needs["glibc"] == ".".join(map(str, max(versions)))
    assert needs["libraries"] == ["m", "pthread"]
    assert needs["architecture"] in ("x86_64", "aarch64")


def test_versions_are_compared_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0GLIBC_2.9\0GLIBC_2.34\0GLIBC_2.2.5\0GLIBC_PRIVATE\0 GLIBC_9.9 \0")
    (tmp_path / "b").write_bytes(b"nothing")
    assert glibc_of(tmp_path / "a") == "2.34"
    assert glibc_of(tmp_path / "b") is None
