"""The C runtime of GPU kernels, and calling them from C and Python, on a driver that writes down what it is told."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from naive import compile_naive, operands
from paths import SUPPORT

import convgen
from convgen.cuda import driver as driver_module
from convgen.cuda.driver import Event, Memory, Stream, context, device, synchronize
from convgen.errors import BuildError, ExportError, KernelError
from convgen.kernel.cuda_library import CudaLayer, CudaLibrary, _RunArgs, current_stream
from convgen.kernel.dlpack import _read, _Tensor
from convgen.kernel.export import write_library
from convgen.kernel.library import Library, Sizes
from convgen.lowering.interface import DeviceCode, Interface, Launch
from convgen.lowering.link import entry_source, link, workspace_layout
from convgen.problem.spec import ConvSpec

SPEC = ConvSpec.parse("conv2d n2 ic3 oc5 i20x20 k3x3 p1 relu residual")
PLAIN = ConvSpec.parse("conv2d n1 ic3 oc5 i9x9 k3x3")
#: Two launches that hand two buffers to each other.
DEVICE = DeviceCode(
    images=(("sm_90a", b"CUBIN90a"), ("sm_80", b"CUBIN80"), ("sm_86", b"CUBIN86".ljust(64)), ("compute_80", b"PTX80")),
    launches=(
        Launch("first", (3, 2, 1), (128, 1, 1), 70000, ("src", "packed0", "workspace0", "workspace1")),
        Launch("second", (4, 1, 5), (64, 2, 3), 0, ("workspace1", "residual", "packed1", "dst")),
    ),
    workspace=(100, 300),
)
SIMPLE = DeviceCode(
    images=(("sm_90", b"CUBIN90"),), launches=(Launch("only", (2, 1, 1), (32, 1, 1), 512, ("src", "packed0", "dst")),)
)
STRICT = ("-std=c11", "-Wall", "-Wextra", "-Werror")

(OK, NULL_POINTER, WRONG_SIZE, MISALIGNED, WRONG_PACKED, _, OVERLAP) = range(7)
NO_DRIVER, NO_CONTEXT, NO_IMAGE, DRIVER_ERROR = range(32, 36)


def compile_cuda(spec: ConvSpec, folder: Path, device_code: DeviceCode, name: str = "kernel") -> tuple[Interface, Path]:
    """A kernel whose pack is real and whose device code is not."""
    interface, path = compile_naive(spec, folder, name=name)
    return dataclasses.replace(interface, workspace_main=0, workspace_task=0, device=device_code), path


class Fake:
    """The driver of ``fake_cuda_driver.c``."""

    def __init__(self, path: Path) -> None:
        self.path, self._dll = path, ctypes.CDLL(str(path))
        self._dll.fake_log.restype = ctypes.c_char_p

    @property
    def log(self) -> list[str]:
        log: bytes = self._dll.fake_log()
        return log.decode().splitlines()

    def reset(self) -> None:
        self._dll.fake_reset()
        for function, count in (("first", 4), ("second", 4), ("only", 3)):
            self._dll.fake_parameters(function.encode(), count)

    def capability(self, major: int, minor: int, number: int = 0) -> None:
        self._dll.fake_capability(number, major, minor)

    def fail(self, function: str, error: int) -> None:
        self._dll.fake_fail(function.encode(), error)

    def context(self, number: int = 0) -> int:
        """A new context of a device, made current."""
        made = self._dll.fake_context(number)
        self.current(made)
        return int(made)

    def current(self, number: int) -> None:
        """-1: none."""
        self._dll.fake_current(number)

    def destroy(self, number: int) -> None:
        self._dll.fake_destroy(number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Iterator[Fake]:
    """The driver that all libraries of this module find."""
    path = folder / "libcuda.so.1"
    source = SUPPORT / "fake_cuda_driver.c"
    command = ["cc", *STRICT, "-O1", "-fPIC", "-shared", "-pthread", "-o", str(path), str(source)]
    subprocess.run(command, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVGEN_CUDA_DRIVER", str(path))
        yield Fake(path)


@pytest.fixture
def fake(loaded: Fake) -> Iterator[Fake]:
    loaded.reset()
    yield loaded
    loaded.reset()


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    interface, object_file = compile_cuda(SPEC, folder, DEVICE)
    return link(interface, object_file, folder / "libkernel.so")


@pytest.fixture
def library(fake: Fake, path: Path) -> Iterator[CudaLibrary]:
    made = CudaLibrary(path, SPEC, "kernel")
    yield made
    fake.reset()
    for number in (0, 1):
        made.unload(number)


class Buffers:
    """The buffers of a call, in memory the fake driver takes for a device's, and their struct."""

    def __init__(self, library: CudaLibrary) -> None:
        self.sizes = library.sizes()
        self.args = _RunArgs()
        self.memory = {}
        for name in ("src", "packed", "residual", "dst", "workspace"):
            size = getattr(self.sizes, name)
            raw = np.zeros(size + 512, np.uint8)
            self.memory[name] = raw[-raw.ctypes.data % 256 :]
            if size:
                setattr(self.args, name, self.memory[name].ctypes.data)
                setattr(self.args, f"{name}_size", size)

    def address(self, name: str, offset: int = 0) -> str:
        return f"{self.memory[name].ctypes.data + offset:#x}"


def packed_offsets(library: CudaLibrary) -> tuple[int, ...]:
    """Where the packed tensors of SPEC's naive kernel lie: the weights, then the bias."""
    weights = -(-library.sizes().weights // 64) * 64
    return 64, 64 + weights


def run(library: CudaLibrary, args: Any) -> int:
    return int(library._run(ctypes.byref(args)))


# ---- the library -------------------------------------------------------------------------------


def test_the_library_needs_libc_only_and_shows_its_functions_only(path: Path, tmp_path: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    allowed = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"}
    assert all(name in allowed or name.startswith("ld-linux") for name in needed), needed
    names = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    found = {line.split()[-1] for line in names.splitlines()}
    suffixes = ("sizes", "pack", "verify_packed", "load", "unload", "run", "version", "error", "driver_error")
    assert found == {f"kernel_{suffix}" for suffix in suffixes}


def test_the_images_are_in_the_library_and_end_with_a_zero(path: Path) -> None:
    data = path.read_bytes()
    for _, image in DEVICE.images:
        assert image + b"\0" in data


def test_sizes_count_each_part_of_the_workspace_from_a_multiple_of_256(library: CudaLibrary) -> None:
    assert workspace_layout(DEVICE) == ((0, 256), 768)
    sizes = library.sizes()
    assert sizes == Sizes(
        src=2 * 3 * 400 * 4,
        weights=5 * 3 * 9 * 4,
        bias=20,
        slope=0,
        scale=0,
        residual=2 * 5 * 400 * 4,
        dst=2 * 5 * 400 * 4,
        packed=sizes.packed,
        workspace=768,
    )
    assert sizes.packed > 64


def test_packing_and_verifying_need_no_driver(folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", str(folder / "none.so"))
    made = CudaLibrary(shutil.copy(path, folder / "libpacks.so"), SPEC, "kernel")
    given = operands(SPEC)
    packed = made.pack(given["weights"], given["bias"])
    assert made.verify_packed(packed)
    packed[-65] ^= 1
    assert not made.verify_packed(packed)
    assert made._load() == made._unload() == NO_DRIVER
    assert run(made, Buffers(made).args) == NO_DRIVER
    assert "no CUDA driver" in made._error(NO_DRIVER).decode()
    with pytest.raises(KernelError, match=r"expected a CUDA driver, found none: .*none\.so"):
        made.bind(given["weights"], given["bias"])


def test_a_driver_without_the_functions_is_none(folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", str(path))  # a library, but no driver
    made = CudaLibrary(shutil.copy(path, folder / "libother.so"), SPEC, "kernel")
    assert made._load() == NO_DRIVER
    assert device() is None


def test_a_packed_buffer_is_tied_to_the_device_code(folder: Path, library: CudaLibrary) -> None:
    given = operands(SPEC)
    changed = dataclasses.replace(DEVICE, images=(("sm_90a", b"CUBIN90b"), *DEVICE.images[1:]))
    interface, object_file = compile_cuda(SPEC, folder, changed)
    other = CudaLibrary(link(interface, object_file, folder / "libchanged.so"), SPEC, "kernel")
    packed = library.pack(given["weights"], given["bias"])
    assert library.verify_packed(packed)
    assert not other.verify_packed(packed)


def test_kinds_of_libraries_are_not_taken_for_each_other(folder: Path, path: Path) -> None:
    with pytest.raises(ExportError, match="expected a library with the kernel kernel"):
        Library(path, SPEC, "kernel", 1)
    interface, object_file = compile_naive(SPEC, folder, name="host")
    with pytest.raises(ExportError, match="expected a library with the kernel host"):
        CudaLibrary(link(interface, object_file, folder / "libhost.so"), SPEC, "host")


# ---- launches ----------------------------------------------------------------------------------


def test_a_run_launches_everything_in_order_with_its_arguments(fake: Fake, library: CudaLibrary) -> None:
    fake.context()
    buffers = Buffers(library)
    buffers.args.stream = 0x1230
    assert library._load() == OK
    before = len(fake.log)
    assert run(library, buffers.args) == OK
    at, (weights, bias) = buffers.address, packed_offsets(library)
    first = [at("src"), at("packed", weights), at("workspace"), at("workspace", 256)]
    second = [at("workspace", 256), at("residual"), at("packed", bias), at("dst")]
    assert fake.log[before:] == [
        f"launch first grid 3 2 1 block 128 1 1 shared 70000 stream 0x1230: {' '.join(first)}",
        f"launch second grid 4 1 5 block 64 2 3 shared 0 stream 0x1230: {' '.join(second)}",
    ]


def test_dynamic_shared_memory_is_asked_for(fake: Fake, library: CudaLibrary) -> None:
    fake.context()
    assert library._load() == OK
    assert [line for line in fake.log if "attribute" in line] == ["attribute 8 of first = 70000"]


@pytest.mark.parametrize(
    ("capability", "image"),
    [
        ((9, 0), "CUBIN90a"),
        ((8, 0), "CUBIN80"),
        ((8, 6), "CUBIN80"),  # the first that runs
        ((8, 9), "CUBIN80"),
        ((9, 1), "PTX80"),
        ((10, 0), "PTX80"),
        ((12, 1), "PTX80"),
    ],
)
def test_the_first_image_that_runs_on_the_device_is_loaded(
    fake: Fake, library: CudaLibrary, capability: tuple[int, int], image: str
) -> None:
    fake.capability(*capability, 1)
    number = fake.context(1)
    assert library._load() == OK
    assert fake.log[0] == f"load {image} into {number}"


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (5, 2)])
def test_an_older_device_has_no_image(fake: Fake, library: CudaLibrary, capability: tuple[int, int]) -> None:
    fake.capability(*capability)
    fake.context()
    assert library._load() == NO_IMAGE
    assert run(library, Buffers(library).args) == NO_IMAGE
    assert fake.log == []


def test_machine_code_runs_on_later_minor_capabilities_of_its_major_one_only(folder: Path, fake: Fake) -> None:
    interface, object_file = compile_cuda(PLAIN, folder, SIMPLE, "cubin")
    code = dataclasses.replace(SIMPLE, images=(("sm_86", b"CUBIN86"), ("compute_120a", b"PTX120a")))
    interface = dataclasses.replace(interface, device=code)
    made = CudaLibrary(link(interface, object_file, folder / "libcubin.so"), PLAIN, "cubin")
    expected = {(8, 0): NO_IMAGE, (8, 6): OK, (8, 9): OK, (9, 0): NO_IMAGE, (12, 0): OK, (12, 1): NO_IMAGE}
    for capability, status in expected.items():
        fake.capability(*capability)
        fake.context()
        assert made._load() == status, capability


def test_each_context_is_loaded_once_and_unloaded(fake: Fake, library: CudaLibrary) -> None:
    one, two = fake.context(0), fake.context(1)
    buffers = Buffers(library)
    for number in (one, two, one):
        fake.current(number)
        assert run(library, buffers.args) == OK
        assert library._load() == OK
    assert [line for line in fake.log if line.startswith("load")] == [f"load CUBIN90a into {n}" for n in (one, two)]
    fake.current(one)
    assert library._unload() == OK
    assert library._unload() == OK  # nothing to do
    assert [line for line in fake.log if line.startswith("unload")] == [f"unload from {one}"]
    fake.current(two)
    before = len(fake.log)
    assert run(library, buffers.args) == OK
    assert not any("load" in line for line in fake.log[before:])


def test_a_context_in_the_place_of_another_is_loaded_anew(fake: Fake, library: CudaLibrary) -> None:
    number = fake.context()
    assert library._load() == OK
    fake.destroy(number)
    assert fake.context() == number
    assert library._load() == OK
    assert [line for line in fake.log if line.startswith("load")] == [f"load CUBIN90a into {number}"] * 2


def test_threads_that_load_at_once_load_once(fake: Fake, library: CudaLibrary) -> None:
    number, barrier, statuses = fake.context(), threading.Barrier(8), []

    def load() -> None:
        fake.current(number)  # of this thread
        barrier.wait()
        statuses.append(library._load())

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [OK] * 8
    assert sum(line.startswith("load") for line in fake.log) == 1


# ---- misuse ------------------------------------------------------------------------------------


def test_without_a_context_nothing_runs(fake: Fake, library: CudaLibrary) -> None:
    fake.current(-1)
    assert library._load() == library._unload() == NO_CONTEXT
    assert run(library, Buffers(library).args) == NO_CONTEXT
    assert fake.log == []


@pytest.mark.parametrize(
    ("field", "change", "status"),
    [
        ("src", None, NULL_POINTER),
        ("packed", None, NULL_POINTER),
        ("residual", None, NULL_POINTER),
        ("dst", None, NULL_POINTER),
        ("src", 8, MISALIGNED),
        ("dst", 4, MISALIGNED),
        ("residual", 12, MISALIGNED),
        ("packed", 32, MISALIGNED),
        ("workspace", 16, MISALIGNED),
        ("src_size", -4, WRONG_SIZE),
        ("packed_size", 64, WRONG_SIZE),
        ("residual_size", 4, WRONG_SIZE),
        ("dst_size", -1, WRONG_SIZE),
        ("workspace_size", -1, WRONG_SIZE),
    ],
)
def test_a_wrong_buffer_is_refused(
    fake: Fake, library: CudaLibrary, field: str, change: int | None, status: int
) -> None:
    fake.context()
    args = Buffers(library).args
    setattr(args, field, None if change is None else getattr(args, field) + change)
    assert run(library, args) == status
    assert fake.log == []


def test_addresses_at_multiples_of_16_and_64_and_a_larger_workspace_are_taken(fake: Fake, library: CudaLibrary) -> None:
    fake.context()
    args = Buffers(library).args
    for name, offset in (("src", 16), ("residual", 48), ("dst", 80), ("packed", 64), ("workspace", 64)):
        setattr(args, name, getattr(args, name) + offset)
    args.workspace_size += 1000
    assert run(library, args) == OK


def test_no_workspace_is_refused_where_one_is_needed(fake: Fake, library: CudaLibrary) -> None:
    fake.context()
    args = Buffers(library).args
    args.workspace, args.workspace_size = None, 0
    assert run(library, args) == NULL_POINTER


def test_a_null_struct_is_refused(fake: Fake, library: CudaLibrary) -> None:
    fake.context()
    assert library._run(None) == library._sizes(None) == NULL_POINTER


@pytest.mark.parametrize(
    ("written", "other"),
    [
        ("dst", "src"),
        ("dst", "packed"),
        ("dst", "residual"),
        ("dst", "workspace"),
        ("workspace", "src"),
        ("workspace", "packed"),
        ("workspace", "residual"),
    ],
)
def test_overlaps_are_refused(fake: Fake, library: CudaLibrary, written: str, other: str) -> None:
    fake.context()
    buffers = Buffers(library)
    for moved in (written, other):
        args = Buffers(library).args
        fixed = written if moved == other else other
        setattr(args, moved, getattr(args, fixed) + getattr(buffers.sizes, fixed) // 64 * 64)
        if getattr(buffers.sizes, fixed) % 64 == 0:
            setattr(args, moved, getattr(args, moved) - 64)
        assert run(library, args) == OVERLAP, moved
    assert fake.log == []


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"])
def test_what_cannot_be_loaded_is_tried_again(fake: Fake, library: CudaLibrary, function: str) -> None:
    fake.context()
    fake.fail(function, 200)
    assert run(library, Buffers(library).args) == DRIVER_ERROR
    assert library._driver_error() == b"CUDA_ERROR_INVALID_IMAGE"
    loads, unloads = (sum(line.startswith(word) for line in fake.log) for word in ("load", "unload"))
    assert loads == unloads == (function != "cuModuleLoadData")
    fake.fail("nothing", 0)
    assert run(library, Buffers(library).args) == OK


def test_a_refused_launch_is_told(fake: Fake, library: CudaLibrary) -> None:
    fake.context()
    fake.fail("cuLaunchKernel", 701)
    assert run(library, Buffers(library).args) == DRIVER_ERROR
    assert library._driver_error() == b"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"
    fake.fail("cuLaunchKernel", 12345)
    assert run(library, Buffers(library).args) == DRIVER_ERROR
    assert b"no name" in library._driver_error()
    with pytest.raises(KernelError, match=r"kernel: the CUDA driver reported an error: .*no name"):
        library._require(DRIVER_ERROR)


def test_every_status_has_words(library: CudaLibrary) -> None:
    texts = [library._error(status) for status in (*range(10), *range(32, 36))]
    assert len(set(texts)) == len(texts)
    assert not any(b"not a status" in text for text in texts)
    assert b"not a status" in library._error(36)
    assert b"16" in library._error(MISALIGNED)


def test_an_empty_batch_needs_no_device(folder: Path, fake: Fake) -> None:
    spec = ConvSpec.parse("conv2d n0 ic3 oc5 i9x9 k3x3")
    interface, object_file = compile_cuda(spec, folder, SIMPLE, "empty")
    made = CudaLibrary(link(interface, object_file, folder / "libempty.so"), spec, "empty")
    fake.current(-1)
    assert run(made, _RunArgs()) == OK
    assert fake.log == []


# ---- what is linked ----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["sm_9", "gfx90a", "sm_90x", "", 'sm_90"'])
def test_an_image_for_something_unknown_is_refused(folder: Path, what: str) -> None:
    interface, _ = compile_cuda(PLAIN, folder, dataclasses.replace(SIMPLE, images=((what, b""),)))
    with pytest.raises(BuildError, match="images: expected one for sm_90a, compute_80 or the like"):
        entry_source(interface, "digest")


@pytest.mark.parametrize("argument", ["packed", "packed9", "workspace0", "src0", "weights", "dst1"])
def test_an_argument_that_does_not_exist_is_refused(folder: Path, argument: str) -> None:
    launch = dataclasses.replace(SIMPLE.launches[0], arguments=("src", argument))
    interface, _ = compile_cuda(PLAIN, folder, dataclasses.replace(SIMPLE, launches=(launch,)))
    with pytest.raises(BuildError, match=f"launch: expected the argument .*found '{argument}'"):
        entry_source(interface, "digest")


# ---- export ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    interface, object_file = compile_cuda(SPEC, folder, DEVICE, "layer")
    write_library(folder / "layer", interface, object_file, {"threads": 1, "error_factor": 50.0})
    return folder / "layer"


def succeed(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_manifest_describes_the_launches(exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["threads"] == 1
    assert manifest["workspace"] == {"bytes": 768, "alignment": 64}
    assert manifest["device"]["architectures"] == ["sm_90a", "sm_80", "sm_86", "compute_80"]
    assert manifest["device"]["launches"][1] == {
        "function": "second",
        "grid": [4, 1, 5],
        "block": [64, 2, 3],
        "dynamic_shared_memory": 0,
        "arguments": ["workspace1", "residual", "packed1", "dst"],
        "tensor_maps": {},
    }
    assert [part["offset"] for part in manifest["device"]["workspace"]["parts"]] == [0, 256]
    alignments = {argument["name"]: argument["alignment"] for argument in manifest["arguments"]}
    assert alignments == {"src": 16, "weights": 4, "bias": 4, "residual": 16, "dst": 16}


def test_the_header_is_c_and_cpp_alone_and_beside_one_of_the_cpu(folder: Path, exported: Path, tmp_path: Path) -> None:
    interface, object_file = compile_naive(PLAIN, folder, name="host")
    write_library(tmp_path / "host", interface, object_file, {"threads": 1})
    use = (
        '#include "layer.h"\n#include "host.h"\n#include "layer.h"\n'
        "int use(const convgen_cuda_run_args *a, const convgen_run_args *b) { return layer_run(a) + host_run(b); }\n"
    )
    (tmp_path / "use.c").write_text(use)
    (tmp_path / "use.cpp").write_text(use)
    include = (f"-I{exported}", f"-I{tmp_path / 'host'}")
    succeed("cc", *STRICT, "-Wpedantic", *include, "-c", "use.c", cwd=tmp_path)
    succeed("c++", "-std=c++11", "-Wall", "-Wextra", "-Werror", *include, "-c", "use.cpp", cwd=tmp_path)
    text = (exported / "layer.h").read_text()
    for words in ("compute capability 9.0 exactly; 8.0 to 8.9", "8.0 and later", "768 bytes", "CONVGEN_CUDA_DRIVER"):
        assert words in text


@pytest.mark.parametrize("how", ["shared", "static"])
def test_the_example_calls_the_library_through_the_driver(fake: Fake, exported: Path, how: str) -> None:
    inputs = ("-L.", "-llayer") if how == "shared" else ("liblayer.a",)
    succeed("cc", *STRICT, "example.c", *inputs, "-lm", "-lpthread", "-ldl", "-o", how, cwd=exported)
    environment = {**os.environ, "LD_LIBRARY_PATH": "."}
    done = subprocess.run([f"./{how}"], cwd=exported, env=environment, capture_output=True, text=True, check=False)
    # The fake computes nothing: dst is still what was uploaded, NaN, and the comparison must find that.
    assert done.returncode == 1
    assert re.search(r"expected \S+, found -?nan", done.stderr), done.stderr
    environment["CONVGEN_CUDA_DRIVER"] = "/none"
    done = subprocess.run([f"./{how}"], cwd=exported, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no CUDA driver: /none" in done.stderr


def test_an_exported_library_is_loaded_for_what_it_is(fake: Fake, exported: Path) -> None:
    made = convgen.load(exported, threads=7)
    assert isinstance(made, CudaLibrary)
    assert made.threads == 1
    given = operands(SPEC)
    assert made.verify_packed(made.pack(given["weights"], given["bias"]))


# ---- the driver from Python ----------------------------------------------------------------------


def test_the_device_is_what_the_driver_says(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    found = device()
    assert found is not None
    assert (found.name, found.sms, found.l2, found.memory) == ("Fake 0", 132, 50 << 20, 1 << 30)
    assert found.driver == 12090
    other = dataclasses.replace(found, driver=12080)
    assert re.fullmatch(r"Fake 0-[0-9a-f]{8}-132", found.fingerprint)
    assert other.fingerprint != found.fingerprint
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", "/none")
    assert device() is None


def test_a_machine_without_a_device_has_none(folder: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copy(fake.path, folder / "libempty-cuda.so"))
    other = Fake(copy)
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", str(copy))
    other.fail("cuInit", 100)
    assert device() is None
    with pytest.raises(KernelError, match="cuInit: the CUDA driver reported CUDA_ERROR_NO_DEVICE"):
        synchronize()


def test_memory_takes_and_gives_bytes(fake: Fake) -> None:
    memory = Memory(64)
    memory.upload(np.arange(16, dtype=np.float32))
    np.testing.assert_array_equal(memory.download().view(np.float32), np.arange(16))
    memory.upload(np.array([-1, -2], np.float32), 8)
    np.testing.assert_array_equal(memory.download(4, 12).view(np.float32), [1, -1, -2])
    memory.fill(0xFF)
    assert (memory.download() == 0xFF).all()
    for offset, size in ((60, 8), (-4, 4), (0, 65)):
        with pytest.raises(KernelError, match="expected a part of 64 bytes"):
            memory.download(offset, size)
    with pytest.raises(KernelError, match="expected a part of 64 bytes"):
        memory.upload(np.zeros(17, np.float32))
    assert "free" not in fake.log
    del memory
    assert fake.log[-1] == "free"


def test_no_memory_is_an_error(fake: Fake) -> None:
    fake.fail("cuMemAlloc_v2", 2)
    with pytest.raises(KernelError, match="cuMemAlloc_v2: the CUDA driver reported CUDA_ERROR_OUT_OF_MEMORY"):
        Memory(1)


def test_contexts_are_current_for_a_while(fake: Fake) -> None:
    loaded = driver_module.driver()
    current = fake.context(1)
    outer = loaded.get("cuCtxGetCurrent", ctypes.c_void_p)
    with context(0):
        inner = loaded.get("cuCtxGetCurrent", ctypes.c_void_p)
        with context(0):
            assert loaded.get("cuCtxGetCurrent", ctypes.c_void_p) == inner
        assert loaded.get("cuCtxGetCurrent", ctypes.c_void_p) == inner
    assert inner != outer
    assert loaded.get("cuCtxGetCurrent", ctypes.c_void_p) == outer
    fake.current(-1)
    fake.destroy(current)
    with pytest.raises(KernelError, match="device: expected one of 2, counted from 0, found 2"), context(2):
        pass


def test_events_tell_seconds(fake: Fake) -> None:
    start, end, stream = Event(), Event(), Stream()
    start.record(stream.handle)
    end.record(stream.handle)
    end.synchronize()
    stream.synchronize()
    assert end.seconds_since(start) == pytest.approx(2.5e-3)
    assert fake.log == ["stream 1", "synchronize stream"]


# ---- layers ------------------------------------------------------------------------------------


class Array:
    """An array of a framework with arrays on a GPU, as DLPack shows it; its memory is the CPU's."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (2, 0), version: int | None = 1) -> None:
        self.array, self._device, self._version = array, device, version
        self.dtype, self.device = array.dtype, "fake"
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, stream: int, **options: Any) -> Any:
        if self._version is None and options:
            raise TypeError("max_version")
        self.streams.append(stream)
        array = self.array.view("i2") if self.array.dtype.name == "bfloat16" else self.array
        return array.__dlpack__(**options)

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(empty=lambda shape, dtype, device: Array(aligned_empty(shape, dtype)))

    @property
    def address(self) -> str:
        return f"{self.array.ctypes.data:#x}"


def aligned_empty(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    array: np.ndarray = raw[-raw.ctypes.data % 64 :][:size].view(dtype).reshape(shape)
    return array


@pytest.fixture
def layer(library: CudaLibrary) -> CudaLayer:
    given = operands(SPEC)
    return library.bind(given["weights"], given["bias"])


@pytest.fixture
def x() -> Array:
    return Array(aligned_empty(SPEC.src_shape))


@pytest.fixture
def z() -> Array:
    return Array(aligned_empty(SPEC.dst_shape))


def launches(fake: Fake) -> list[list[str]]:
    return [line.split(": ")[1].split() for line in fake.log if line.startswith("launch")]


def test_binding_loads_and_uploads_what_was_packed(fake: Fake, library: CudaLibrary, layer: CudaLayer) -> None:
    given = operands(SPEC)
    packed = library.pack(given["weights"], given["bias"])
    np.testing.assert_array_equal(layer.packed.download(), packed)
    size = packed.size
    assert fake.log[:5] == [
        "load CUBIN90a into 0",
        "attribute 8 of first = 70000",
        f"allocate {size}",
        f"upload {size}",
        "synchronize default",
    ]


@pytest.mark.parametrize("version", [1, None])
def test_a_call_launches_on_the_arrays_memory(
    fake: Fake, library: CudaLibrary, layer: CudaLayer, z: Array, version: int | None
) -> None:
    x = Array(aligned_empty(SPEC.src_shape), version=version)
    y = layer(x, residual=z)
    assert isinstance(y, Array)
    assert y.array.shape == SPEC.dst_shape
    packed, (workspace,) = layer.packed.address, layer._workspaces.values()
    weights, bias = packed_offsets(library)
    assert launches(fake) == [
        [x.address, f"{packed + weights:#x}", f"{workspace.address:#x}", f"{workspace.address + 256:#x}"],
        [f"{workspace.address + 256:#x}", z.address, f"{packed + bias:#x}", y.address],
    ]
    assert not any(line.startswith("synchronize") for line in fake.log[5:])


def test_out_is_written_and_returned(fake: Fake, layer: CudaLayer, x: Array, z: Array) -> None:
    out = Array(aligned_empty(SPEC.dst_shape))
    assert layer(x, residual=z, out=out) is out
    assert launches(fake)[1][3] == out.address


class Owner:
    """A stream of CUDA's Python protocol."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 0x770


def test_streams_are_the_callers_and_have_a_workspace_each(fake: Fake, layer: CudaLayer, x: Array, z: Array) -> None:
    for stream in (None, 0x550, Owner(), SimpleNamespace(cuda_stream=0x990), 0x550, 0):
        layer(x, residual=z, stream=stream)
    used = re.findall(r"^launch first.*?stream (\S+):", "\n".join(fake.log), re.MULTILINE)
    assert used == ["0", "0x550", "0x770", "0x990", "0x550", "0"]
    assert x.streams == [1, 0x550, 0x770, 0x990, 0x550, 1]  # DLPack's word for the default stream is 1
    workspaces = [arguments[2] for arguments in launches(fake)[::2]]
    assert workspaces[0] == workspaces[5]
    assert workspaces[1] == workspaces[4]
    assert len(set(workspaces)) == 4
    with pytest.raises(KernelError, match=r"stream: expected a handle or an object with __cuda_stream__, found str"):
        layer(x, residual=z, stream="main")


def test_each_threads_default_stream_has_a_workspace(fake: Fake, layer: CudaLayer, x: Array, z: Array) -> None:
    threads = [threading.Thread(target=layer, args=(x,), kwargs={"residual": z, "stream": 2}) for _ in range(2)]
    layer(x, residual=z, stream=2)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({arguments[2] for arguments in launches(fake)[::2]}) == len(layer._workspaces) >= 2


def test_the_launches_of_calls_from_several_threads_do_not_mix(
    fake: Fake, layer: CudaLayer, x: Array, z: Array
) -> None:
    outs = [Array(aligned_empty(SPEC.dst_shape)) for _ in range(4)]

    def work(out: Array) -> None:
        for _ in range(20):
            layer(x, residual=z, out=out)

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [line.split()[1] for line in fake.log if line.startswith("launch")]
    assert names == ["first", "second"] * 80


def test_a_device_other_than_the_first(fake: Fake, library: CudaLibrary) -> None:
    given = operands(SPEC)
    layer = library.bind(given["weights"], given["bias"], device=1)
    assert fake.log[0] == "load CUBIN90a into 1"
    x, z, y = (Array(aligned_empty(s), (2, 1)) for s in (SPEC.src_shape, SPEC.dst_shape, SPEC.dst_shape))
    layer(x, residual=z, out=y)
    with pytest.raises(KernelError, match="x: expected an array on CUDA device 1, found one on CUDA device 0"):
        layer(Array(x.array), residual=z, out=y)
    with pytest.raises(KernelError, match="device: expected one of 2"):
        library.bind(given["weights"], given["bias"], device=2)


def refused(layer: CudaLayer, message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(KernelError, match=message):
        layer(*arguments, **options)


def test_arrays_the_layer_cannot_take_are_refused(fake: Fake, layer: CudaLayer, x: Array, z: Array) -> None:
    before = len(fake.log)
    shape = SPEC.src_shape
    refused(layer, r"x: expected an array on CUDA device 0, found ndarray of the CPU", x.array, residual=z)
    refused(layer, r"x: expected an array on a CUDA device with __dlpack__, found list", [1.0], residual=z)
    refused(layer, r"x: expected .* found Array of DLPack device type 10", Array(x.array, (10, 0)), residual=z)
    wide = Array(aligned_empty((*shape[:-1], 2 * shape[-1]))[..., ::2])
    refused(layer, r"x: expected a C-contiguous array, found strides \(2400, 800, 40, 2\)", wide, residual=z)
    refused(layer, r"x: expected shape .*, found \(2, 3, 20\)", Array(aligned_empty(shape[:-1])), residual=z)
    refused(layer, "x: expected dtype float32, found float64", Array(aligned_empty(shape, np.float64)), residual=z)
    refused(layer, "x: expected dtype float32, found int32", Array(aligned_empty(shape, np.int32)), residual=z)
    moved = Array(aligned_empty((x.array.size + 1,))[1:].reshape(shape))
    refused(layer, "x: expected an address that is a multiple of 16, found 0x", moved, residual=z)
    refused(layer, "residual: expected shape .* found none", x)
    refused(layer, "residual: expected .* of the CPU", x, residual=z.array)
    refused(layer, "out: expected .* of the CPU", x, residual=z, out=z.array)
    frozen = aligned_empty(SPEC.dst_shape)
    frozen.flags.writeable = False
    refused(layer, "out: expected writable memory, found a read-only array", x, residual=z, out=Array(frozen))
    refused(layer, r"out \(dst\): expected memory apart from all other arguments", x, residual=z, out=z)
    assert not launches(fake), fake.log[before:]


def test_an_axis_of_one_has_any_stride_and_managed_memory_is_taken(fake: Fake, folder: Path) -> None:
    interface, object_file = compile_cuda(PLAIN, folder, SIMPLE, "plain")
    made = CudaLibrary(link(interface, object_file, folder / "libplain.so"), PLAIN, "plain")
    given = operands(PLAIN)
    layer = made.bind(given["weights"], given["bias"])
    x = np.lib.stride_tricks.as_strided(aligned_empty(PLAIN.src_shape), PLAIN.src_shape, (4, 324, 36, 4))
    y = layer(Array(x, (13, 0)))
    assert launches(fake) == [[f"{x.ctypes.data:#x}", f"{layer.packed.address + 64:#x}", y.address]]
    assert not layer._workspaces
    refused(layer, "residual: expected none", Array(x), residual=y)


def test_an_array_that_cannot_make_others_needs_out(fake: Fake, layer: CudaLayer, z: Array) -> None:
    class Bare:
        def __init__(self) -> None:
            self._of = Array(aligned_empty(SPEC.src_shape))
            self.__dlpack__, self.__dlpack_device__ = self._of.__dlpack__, self._of.__dlpack_device__

    refused(layer, "out: expected an array to write to, as Bare cannot make one", Bare(), residual=z)
    assert layer(Bare(), residual=z, out=Array(aligned_empty(SPEC.dst_shape)))


def test_an_array_that_refuses_to_be_shared_is_named(fake: Fake, layer: CudaLayer, x: Array, z: Array) -> None:
    def refuse(**options: Any) -> None:
        raise BufferError("requires grad")

    x.__dlpack__ = refuse  # type: ignore[method-assign]
    refused(layer, "x: expected an array that can be shared, found Array: requires grad", x, residual=z)
    x.__dlpack__ = lambda **options: object()  # type: ignore[method-assign]
    refused(layer, "x: expected a DLPack capsule, found object", x, residual=z)


def test_a_view_begins_at_its_offset_and_may_lack_strides() -> None:
    shape = (ctypes.c_int64 * 2)(3, 4)
    tensor = _Tensor(data=0x1000, ndim=2, shape=shape, byte_offset=0x40)
    tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes = 2, 32, 1
    new = ctypes.pythonapi.PyCapsule_New
    new.argtypes, new.restype = (ctypes.c_void_p,) * 3, ctypes.py_object
    name = ctypes.create_string_buffer(b"dltensor")
    found = _read("x", new(ctypes.addressof(tensor), ctypes.addressof(name), None))
    assert (found.address, found.shape, found.strides) == (0x1040, (3, 4), (4, 1))
    assert (found.dtype, found.writable) == ("float32", True)


@pytest.mark.parametrize("version", [None, (1, 0)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_pytorch_says_of_its_tensors_is_read(dtype: str, version: tuple[int, int] | None) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(2, 6, 5, dtype=getattr(torch, dtype))[:, 1::2]
    found = _read("x", tensor.__dlpack__(max_version=version) if version else tensor.__dlpack__())
    assert found.address == tensor.data_ptr()
    assert (found.shape, found.strides) == ((2, 3, 5), (30, 10, 1))
    assert (found.dtype, found.writable) == (dtype, True)


def test_the_stream_is_the_frameworks_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensor:
        is_cuda, device = True, "cuda:1"

    streams = {"cuda:1": SimpleNamespace(cuda_stream=0xA0)}
    torch = SimpleNamespace(Tensor=Tensor, cuda=SimpleNamespace(current_stream=streams.__getitem__))
    cupy = SimpleNamespace(ndarray=list, cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0xB0)))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert current_stream(Tensor()) == 0xA0
    assert current_stream([]) == 0xB0
    assert current_stream("another") == 0


def test_a_layer_is_freed_with_its_memory(fake: Fake, library: CudaLibrary, x: Array, z: Array) -> None:
    given = operands(SPEC)
    layer = library.bind(given["weights"], given["bias"])
    layer(x, residual=z)
    del layer
    assert sum(line == "free" for line in fake.log) == 2  # packed and workspace
