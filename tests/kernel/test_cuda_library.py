"""The C runtime of GPU kernels, and calling them from C and Python, on a driver that writes down what it is told."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from fake_cuda import (
    DEVICE,
    DRIVER_ERROR,
    MISALIGNED,
    NO_CONTEXT,
    NO_DRIVER,
    NO_IMAGE,
    NULL_POINTER,
    OK,
    OVERLAP,
    PLAIN,
    SIMPLE,
    SPEC,
    STRICT,
    WRONG_SIZE,
    Buffers,
    Fake,
    compile_cuda,
    packed_offsets,
    run,
)
from naive import compile_naive, operands

import convgen
from convgen.cuda.driver import device
from convgen.errors import BuildError, ExportError, KernelError
from convgen.kernel.cuda_library import CudaLibrary, _RunArgs
from convgen.kernel.export import write_library
from convgen.kernel.library import Library, Sizes
from convgen.lowering.entry import entry_source, workspace_layout
from convgen.lowering.link import link
from convgen.problem.spec import ConvSpec

# ---- the library -------------------------------------------------------------------------------


def test_the_library_needs_libc_only_and_shows_its_functions_only(path: Path, tmp_path: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    allowed = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"}
    assert all(name in allowed or name.startswith("ld-linux") for name in needed), needed
    names = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    found = {line.split()[-1] for line in names.splitlines()}
    suffixes = ("sizes", "pack", "repack", "verify_packed", "load", "unload", "run", "version", "error", "driver_error")
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
        sum=0,
        src_zero=0,
        weights_zero=0,
        dst_zero=0,
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
