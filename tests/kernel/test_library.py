"""Linked kernels called from Python: results, refusals, threads, fork."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_script
from naive import compile_naive, convolve, link_naive, operands

from convgen.errors import BuildError, KernelError
from convgen.hardware.isa import CHECKED
from convgen.hardware.machine import machine
from convgen.kernel import library as library_module
from convgen.kernel.library import Layer, Library, aligned
from convgen.lowering import link as link_module
from convgen.lowering.link import link
from convgen.problem.spec import ConvSpec

#: Planes that are too large for the stack: `staged` and `shared` take them from the workspace.
SPEC = ConvSpec.parse("conv2d n2 ic3 oc5 i20x20 k3x3 p1 relu")
PRELU = ConvSpec.parse("conv2d n1 ic4 oc6 g2 i9x8 k3x2 s2x1 p1_0x0_1 d1x2 prelu residual nhwc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    """A library whose tasks need workspace."""
    interface, path = link_naive(SPEC, folder, "shared")
    assert interface.workspace_task > 0
    return Library(path, SPEC, SPEC.name, 2)


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    return operands(SPEC)


@pytest.fixture(scope="module")
def layer(library: Library, inputs: dict[str, np.ndarray]) -> Layer:
    return library.bind(inputs["weights"], inputs["bias"])


# ---- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reference", "staged", "shared"])
@pytest.mark.parametrize(
    "text",
    [
        "conv2d n2 ic3 oc5 i20x20 k3x3 p1 relu",
        "conv2d n1 ic4 oc6 g2 i9x8 k3x2 s2x1 p1_0x0_1 d1x2 prelu residual nhwc",
        "conv3d n1 ic2 oc3 i4x10x12 k2x3x2 p1 s1x2x1 nobias",
        "convtranspose2d n1 ic6 oc4 g2 i9x8 k3x4 s2x3 p1_0x1 op1x2 residual",
        "conv2d n2 ic5 oc7 i9x9 k1x1 nhwc",
    ],
)
def test_layer_computes_the_convolution(folder: Path, text: str, how: str) -> None:
    spec = ConvSpec.parse(text)
    interface, path = link_naive(spec, folder, how)
    given = operands(spec)
    expected = convolve(spec, given)
    for threads in (1, 2, 3):
        layer = Library(path, spec, interface.name, threads).bind(*(given.get(k) for k in ("weights", "bias", "slope")))
        np.testing.assert_array_equal(layer(given["src"], residual=given.get("residual")), expected)


def test_workspace_is_used_where_it_is_needed(folder: Path) -> None:
    staged, path = link_naive(SPEC, folder, "staged")
    assert staged.workspace_main >= 4 * np.prod(SPEC.dst_shape)
    sizes = Library(path, SPEC, SPEC.name, 2).sizes(3)
    assert sizes.workspace == staged.workspace_size(3)
    assert (sizes.src, sizes.weights, sizes.bias, sizes.slope, sizes.residual) == (4 * 2400, 4 * 135, 20, 0, 0)
    assert (sizes.dst, sizes.packed) == (4 * 4000, staged.packed_size)


def test_empty_batch(folder: Path) -> None:
    spec = ConvSpec.parse("conv2d n0 ic3 oc5 i7x7 k3x3")
    _, path = link_naive(spec, folder)
    given = operands(spec)
    out = Library(path, spec, spec.name, 2).bind(given["weights"], given["bias"])(given["src"])
    assert out.shape == (0, 5, 5, 5)


def test_out_and_any_element_alignment(layer: Layer, inputs: dict[str, np.ndarray]) -> None:
    expected = layer(inputs["src"])
    for shift in range(1, 16, 2):
        raw = np.empty(SPEC.n * 3 * 400 + 16, np.float32)
        src = raw[shift : shift + SPEC.n * 3 * 400].reshape(SPEC.src_shape)
        src[:] = inputs["src"]
        guard = np.full(expected.size + 32, np.nan, np.float32)
        out = guard[shift : shift + expected.size].reshape(SPEC.dst_shape)
        assert layer(src, out=out) is out
        np.testing.assert_array_equal(out, expected)
        assert np.isnan(guard[:shift]).all()
        assert np.isnan(guard[shift + expected.size :]).all()


def test_read_only_input_is_read(layer: Layer, inputs: dict[str, np.ndarray]) -> None:
    src = inputs["src"].copy()
    src.flags.writeable = False
    np.testing.assert_array_equal(layer(src), layer(inputs["src"]))


class Exchanged:
    """Anything with DLPack, over an array."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def test_dlpack_is_read_and_written_in_place(layer: Layer, inputs: dict[str, np.ndarray]) -> None:
    expected = layer(inputs["src"])
    out = np.empty_like(expected)
    given = Exchanged(out)
    assert layer(Exchanged(inputs["src"]), out=given) is given
    np.testing.assert_array_equal(out, expected)


def test_slope_may_be_one_number(folder: Path) -> None:
    _, path = link_naive(PRELU, folder)
    library, given = Library(path, PRELU, PRELU.name, 1), operands(PRELU)
    one = convolve(PRELU, {**given, "slope": np.full(PRELU.oc, 0.5, np.float32)})
    for slope in (0.5, np.float32(0.5), np.full(1, 0.5), np.full((1, 1), 0.5, np.float32)):
        layer = library.bind(given["weights"], given["bias"], slope)
        np.testing.assert_array_equal(layer(given["src"], residual=given["residual"]), one)
    with pytest.raises(KernelError, match=r"slope: expected shape \(6,\), found \(5,\)"):
        library.bind(given["weights"], given["bias"], np.zeros(5, np.float32))


# ---- refusals ----------------------------------------------------------------------------------


def refused(match: str, call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(KernelError, match=match):
        call(*args, **kwargs)


def test_layer_refuses_wrong_arrays(layer: Layer, inputs: dict[str, np.ndarray]) -> None:
    x = inputs["src"]
    refused(r"x: expected shape \(2, 3, 20, 20\), found \(3, 20, 20\)", layer, x[0])
    refused(r"x: expected dtype float32 .*, found float64", layer, x.astype(np.float64))
    refused(r"x: expected dtype float32 .*, found >f4", layer, x.astype(">f4"))
    refused(r"x: expected a NumPy array or one with __dlpack__, found list", layer, x.tolist())
    refused(r"x: expected an array in CPU memory, found DLPack device type 2", layer, Exchanged(x, (2, 0)))
    refused(r"residual: expected none .*, found ndarray", layer, x, residual=np.zeros(SPEC.dst_shape, np.float32))
    refused(r"x: .*found NoneType", layer, None)


def test_layer_refuses_wrong_out(layer: Layer, inputs: dict[str, np.ndarray]) -> None:
    x, out = inputs["src"], np.empty(SPEC.dst_shape, np.float32)
    refused(r"out: expected shape .*, found \(4000,\)", layer, x, out=out.reshape(-1))
    refused(r"out: expected dtype float32 .*, found float64", layer, x, out=out.astype(np.float64))
    refused(r"out: expected a C-contiguous array, found strides", layer, x, out=np.asfortranarray(out))
    odd = np.empty(out.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(out.shape)
    refused(r"out: expected an address that is a multiple of 4", layer, x, out=odd)
    out.flags.writeable = False
    refused(r"out: expected writable memory", layer, x, out=out)
    shared = np.empty(4000 + 2400, np.float32)
    src, over = shared[3999:6399].reshape(x.shape), shared[:4000].reshape(SPEC.dst_shape)
    refused(r"out.*found an overlap", layer, src, out=over)
    src[:] = x
    layer(src, out=np.empty(SPEC.dst_shape, np.float32))  # the layer still works


def test_bind_refuses(library: Library, inputs: dict[str, np.ndarray]) -> None:
    weights, bias = inputs["weights"], inputs["bias"]
    refused(r"bias: expected shape \(5,\) .*, found none", library.bind, weights)
    refused(r"weights: expected shape \(5, 3, 3, 3\), found \(135,\)", library.bind, weights.reshape(-1), bias)
    refused(r"weights: expected shape .*, found none", library.bind, None, bias)
    refused(r"slope: expected none .*, found float", library.bind, weights, bias, 0.1)
    refused(r"packed: expected an array of .* bytes", library.pack, weights, bias, packed=np.empty(3, np.float32))
    refused(r"packed: expected \d+ contiguous bytes", library.pack, weights, bias, packed=np.empty(3, np.uint8))
    misplaced = aligned(library.sizes().packed + 1)[1:]
    refused(r"packed: expected an address that is a multiple of 64", library.pack, weights, bias, packed=misplaced)


def test_run_refuses(library: Library, layer: Layer, inputs: dict[str, np.ndarray]) -> None:
    x, out = inputs["src"], np.empty(SPEC.dst_shape, np.float32)
    small = aligned(library.sizes(2).workspace - 64)
    refused(r"workspace: expected at least \d+ contiguous bytes", library.run, x, layer.packed, out, workspace=small)
    refused(r"threads: expected 1 to 1024, found 0", library.run, x, layer.packed, out, threads=0)
    refused(r"threads: expected 1 to 1024, found 1025", library.sizes, 1025)
    other = layer.packed.copy()
    packed = aligned(other.size)
    packed[:] = other
    packed[20] ^= 1  # its identity
    refused(r"packed was not written by this library's pack", library.run, x, packed, out)


def test_verify_packed(library: Library, layer: Layer) -> None:
    packed = aligned(layer.packed.size)
    packed[:] = layer.packed
    assert library.verify_packed(packed)
    for position in (0, 70, packed.size - 1):
        packed[position] ^= 4
        assert not library.verify_packed(packed)
        packed[position] ^= 4
    assert library.verify_packed(packed)


def test_weights_packed_without_a_checksum_run_and_are_not_verified(
    library: Library, layer: Layer, inputs: dict[str, np.ndarray]
) -> None:
    """All but the checksum is the same; what is damaged in the header is refused as ever."""
    packed = library.pack(inputs["weights"], inputs["bias"], checksum=False)
    np.testing.assert_array_equal(np.delete(packed, range(40, 48)), np.delete(layer.packed, range(40, 48)))
    assert not packed[40:48].any()
    assert layer.packed[40:48].any()
    assert not library.verify_packed(packed)
    np.testing.assert_array_equal(Layer(library, packed)(inputs["src"]), layer(inputs["src"]))
    packed[20] ^= 1
    with pytest.raises(KernelError, match="packed was not written by this library's pack"):
        Layer(library, packed)(inputs["src"])


def test_a_library_that_cannot_pack_without_a_checksum_is_said(
    library: Library, inputs: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KernelError, match=r"^checksum: expected True or False, found int"):
        library.pack(inputs["weights"], inputs["bias"], checksum=1)
    monkeypatch.setattr(library, "name", f"{library.name}_of_old")
    with pytest.raises(KernelError, match=r"^checksum: expected a library with the function \w+_of_old_repack"):
        library.pack(inputs["weights"], inputs["bias"], checksum=False)


def test_equal_weights_pack_to_equal_bytes(library: Library, inputs: dict[str, np.ndarray]) -> None:
    first, second = aligned(library.sizes().packed), aligned(library.sizes().packed)
    first[:], second[:] = 0xAA, 0x55
    library.pack(inputs["weights"], inputs["bias"], packed=first)
    library.pack(inputs["weights"], inputs["bias"], packed=second)
    np.testing.assert_array_equal(first, second)


def test_low_level_run_and_prepared_calls(library: Library, layer: Layer, inputs: dict[str, np.ndarray]) -> None:
    expected = layer(inputs["src"])
    for threads in (None, 1, 2, 3):
        for workspace in (None, aligned(library.sizes(threads).workspace + 100)):
            out = np.full(SPEC.dst_shape, np.nan, np.float32)
            library.run(inputs["src"], layer.packed, out, workspace=workspace, threads=threads)
            np.testing.assert_array_equal(out, expected)
            call = library.prepare(inputs["src"], layer.packed, out, workspace=workspace, threads=threads)
            for _ in range(3):
                out[:] = np.nan
                call()
                np.testing.assert_array_equal(out, expected)


# ---- the C functions themselves ----------------------------------------------------------------

OK, NULL_POINTER, WRONG_SIZE, MISALIGNED, WRONG_PACKED, UNSUPPORTED_CPU, OVERLAP = range(7)
BAD_ARGUMENT = 8


@pytest.fixture
def call(library: Library, layer: Layer, inputs: dict[str, np.ndarray]) -> Callable[..., int]:
    """run() with one field changed; returns its status."""
    dst = np.empty(SPEC.dst_shape, np.float32)
    workspace = aligned(library.sizes(2).workspace)

    def run(**changes: Any) -> int:
        args = library_module._RunArgs()
        arrays = {"src": inputs["src"], "packed": layer.packed, "dst": dst, "workspace": workspace}
        for name, array in arrays.items():
            setattr(args, name, array.ctypes.data)
            setattr(args, f"{name}_size", array.nbytes)
        args.pool = library._pool(2)
        for name, change in changes.items():
            setattr(args, name, change(getattr(args, name)) if callable(change) else change)
        return int(library._run(ctypes.byref(args)))

    run.inputs, run.dst, run.packed = inputs, dst, layer.packed  # type: ignore[attr-defined]
    return run


def test_status_of_wrong_arguments(call: Any, library: Library) -> None:
    assert call() == OK
    for name in ("src", "packed", "dst"):
        assert call(**{name: None}) == NULL_POINTER
        assert call(**{f"{name}_size": lambda size: size - 4}) == WRONG_SIZE
        assert call(**{f"{name}_size": lambda size: size + 4}) == WRONG_SIZE
        assert call(**{name: lambda address: address + 2}) == MISALIGNED
    assert call(packed=lambda address: address + 4) == MISALIGNED
    assert call(workspace=lambda address: address + 4) == MISALIGNED
    assert call(workspace=None, workspace_size=0) == NULL_POINTER
    assert call(workspace_size=lambda size: size - 1) == WRONG_SIZE
    assert call(workspace_size=lambda size: size + 1) == OK
    assert call(pool=None) == OK
    assert call(residual=call.dst.ctypes.data, residual_size=call.dst.nbytes) == WRONG_SIZE
    assert call(residual=call.dst.ctypes.data) == WRONG_SIZE
    assert library._run(None) == NULL_POINTER
    assert library._pack(None) == NULL_POINTER
    assert library._sizes(1, None) == NULL_POINTER
    for threads in (0, -1, 1025):
        assert library._sizes(threads, ctypes.byref(library_module.SizesStruct())) == BAD_ARGUMENT
    assert library._verify(None, 100) == NULL_POINTER


def test_status_of_overlaps(call: Any) -> None:
    shared = aligned(1 << 16).view(np.float32)
    start = shared.ctypes.data
    assert call(src=start + 4 * 3999, dst=start) == OVERLAP
    assert call(src=start, dst=start + 4 * 2399) == OVERLAP
    assert call(src=start, dst=start) == OVERLAP
    assert call(src=start + 4 * 4000, dst=start) == OK
    assert call(workspace=call.packed.ctypes.data) in (OVERLAP, MISALIGNED)
    assert call(workspace=start, dst=start) == OVERLAP
    assert call(workspace=start, src=start + 4) == OVERLAP


def test_packed_of_another_layer_is_refused(call: Any, folder: Path) -> None:
    """The same shapes, another activation: nothing but the identity tells them apart."""
    spec = SPEC.with_(activation="none")
    _, path = link_naive(spec, folder, "shared")
    other = Library(path, spec, spec.name, 1).bind(call.inputs["weights"], call.inputs["bias"])
    assert other.packed.size == call.packed.size
    assert call(packed=other.packed.ctypes.data) == WRONG_PACKED
    other.packed[:] = 0
    assert call(packed=other.packed.ctypes.data) == WRONG_PACKED


def test_a_cpu_without_the_isa_is_refused(folder: Path, inputs: dict[str, np.ndarray]) -> None:
    names = [feature.name for feature in CHECKED[machine().arch]]
    present, absent = ([name for name in names if (name in machine().features) is has] for has in (True, False))
    assert absent, "no CPU has FP16 for AVX-512 and SSE4A"
    interface, path = compile_naive(SPEC, folder, name="foreign", isa=(*present, absent[0]))
    library = Library(link(interface, path, folder / "libforeign.so"), SPEC, "foreign", 1)
    refused("this CPU lacks instructions", library.check_cpu)
    refused("this CPU lacks instructions", library.bind, inputs["weights"], inputs["bias"])
    interface, path = compile_naive(SPEC, folder, name="own", isa=tuple(present))
    Library(link(interface, path, folder / "libown.so"), SPEC, "own", 1).check_cpu()


def test_a_feature_that_no_cpu_can_be_asked_for_is_refused(folder: Path) -> None:
    interface, path = compile_naive(SPEC, folder, name="odd", isa=("avx11.3",))
    with pytest.raises(BuildError, match=r"isa: expected features that a CPU of \w+ can be asked for, found avx11.3"):
        link(interface, path, folder / "libodd.so")


def test_every_status_has_a_text(library: Library) -> None:
    texts = [library._error(status) for status in range(-1, 12)]
    assert len(set(texts[1:11])) == 10
    assert texts[0] == texts[-1] == b"not a status of this library"


# ---- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_many_callers_at_once(folder: Path, inputs: dict[str, np.ndarray], threads: int) -> None:
    """Eight threads on one layer, with one shared pool or with none; every result is right."""
    _, path = link_naive(SPEC, folder, "staged")
    layer = Library(path, SPEC, SPEC.name, threads).bind(inputs["weights"], inputs["bias"])
    sources = [operands(SPEC, seed)["src"] for seed in range(8)]
    expected = [convolve(SPEC, {**inputs, "src": src}) for src in sources]
    wrong: list[int] = []

    def caller(index: int) -> None:
        out = np.empty(SPEC.dst_shape, np.float32)
        for repeat in range(40):
            found = layer(sources[index], out=out) if repeat % 2 else layer(sources[index])
            if not np.array_equal(found, expected[index]):
                wrong.append(index)

    callers = [threading.Thread(target=caller, args=(index,)) for index in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == []


def test_pools_are_shared_by_all_libraries(folder: Path, inputs: dict[str, np.ndarray]) -> None:
    """Another library's kernel runs on a pool this one made: threads of the process, not of a library."""
    _, path = link_naive(SPEC, folder, "shared")
    first = Library(path, SPEC, SPEC.name, 3)
    first.bind(inputs["weights"], inputs["bias"])(inputs["src"])
    _, path = link_naive(PRELU, folder, "reference")
    second, given = Library(path, PRELU, PRELU.name, 3), operands(PRELU)
    assert first._pool(3) == second._pool(3)
    before = len(os.listdir("/proc/self/task"))
    layer = second.bind(given["weights"], given["bias"], given["slope"])
    found = layer(given["src"], residual=given["residual"])
    np.testing.assert_array_equal(found, convolve(PRELU, given))
    assert len(os.listdir("/proc/self/task")) == before


def test_workspaces_are_reused(layer: Layer, inputs: dict[str, np.ndarray]) -> None:
    layer(inputs["src"])
    before = list(library_module._workspaces)
    for _ in range(5):
        layer(inputs["src"])
    assert list(library_module._workspaces) == before


def test_fork_after_use(folder: Path) -> None:
    """A child has the layer but not its threads: it computes on its own, and makes pools of its own."""
    _, path = link_naive(SPEC, folder, "shared")
    done = run_script(
        """
        import os, sys
        from naive import convolve, operands
        from convgen.kernel.library import Library
        from convgen.problem.spec import ConvSpec
        spec = ConvSpec.parse(sys.argv[2])
        inputs = operands(spec)
        library = Library(sys.argv[1], spec, spec.name, 2)
        layer = library.bind(inputs["weights"], inputs["bias"])
        expected = convolve(spec, inputs)
        assert (layer(inputs["src"]) == expected).all()
        child = os.fork()
        ok = all((layer(inputs["src"]) == expected).all() for _ in range(3))
        if child == 0:
            assert len(os.listdir("/proc/self/task")) == 1
            other = Library(sys.argv[1], spec, spec.name, 3).bind(inputs["weights"], inputs["bias"])
            ok = ok and (other(inputs["src"]) == expected).all() and len(os.listdir("/proc/self/task")) == 3
            os._exit(0 if ok else 1)
        assert ok and os.waitpid(child, 0)[1] == 0
        print("fine")
        """,
        path,
        SPEC,
    )
    assert done.stdout == "fine\n", done.stderr


# ---- linking -----------------------------------------------------------------------------------


def test_a_missing_or_failing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    interface, path = compile_naive(SPEC, folder)
    out = tmp_path / "libx.so"
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no-such-compiler: No such file .*install a C compiler"):
        link(interface, path, out)
    monkeypatch.delenv("CC")
    (tmp_path / "broken.o").write_text("no object file")
    with pytest.raises(BuildError, match=r"exit status 1 of cc .*\n.*broken.o"):
        link(interface, tmp_path / "broken.o", out)
    with pytest.raises(BuildError, match=r"absent\.o"):
        link(interface, tmp_path / "absent.o", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.o"]


def test_compiled_runtimes_are_kept_and_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    interface, path = compile_naive(SPEC, folder)

    def runtime() -> bytes:
        link_module._runtime_object.cache_clear()
        return link_module._runtime_object(("cc",))

    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    first = runtime()
    (kept,) = (cache / "convgen" / "runtime").iterdir()
    assert kept.read_bytes() == hashlib.sha256(first).digest() + first
    other = b"from the cache"
    kept.write_bytes(hashlib.sha256(other).digest() + other)
    assert runtime() == other
    for damaged in (b"", first, kept.read_bytes()[:-1]):
        kept.write_bytes(damaged)
        assert runtime() == first
        assert kept.read_bytes()[32:] == first

    shutil.rmtree(cache)
    cache.write_text("a file where the directory should be")
    assert runtime() == first
    assert link(interface, path, tmp_path / "lib.so").stat().st_size > 0
    link_module._runtime_object.cache_clear()
