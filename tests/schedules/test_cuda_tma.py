"""Tiles that Hopper's copy engine fetches: by the specification, on the CPU. No device has run them.

The emulator lets every copy arrive, and every product read, as late as it may.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import ORDERS, packed

import convgen.check.emulation.emulate as emulate
from convgen.check.bounds import reference
from convgen.check.data import exact_data
from convgen.check.emulation.emulate import compile_emulated, emulated_driver, run
from convgen.check.emulation.standin import emulated_code
from convgen.cuda import code
from convgen.cuda.code import DeviceSource, generate
from convgen.errors import BuildError, KernelError
from convgen.hardware.target import resolve
from convgen.kernel.export import write_library
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import parse_candidate
from convgen.lowering.discover import schedules_of
from convgen.lowering.interface import Launch, TensorMap
from convgen.lowering.link import link
from convgen.lowering.lower import lower
from convgen.lowering.runtime import source as runtime_source
from convgen.lowering.schedule import Candidate, Picks
from convgen.problem.spec import ConvSpec

pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install '.[cuda]'")
emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to emulate")

SCHEDULE, TARGET = schedules_of("cuda")["cuda_wgmma_tma"], resolve("cuda:sm_90a")
#: Ranks; strides, dilation and padding of all kinds; several images; tails of pixels and channels; groups; layouts.
LAYERS = [
    "conv1d n3 ic64 oc17 i33 k3 s1 p2_0 d2 nhwc gelu f16",
    "conv1d n1 ic8 oc8 i40 k9 s8 p4 nhwc bf16",
    "conv2d n2 ic72 oc40 i9x8 k3x2 s2x3 p1x0_2 d2x1 residual relu nhwc bf16",
    "conv2d n2 ic19 oc33 i7x6 k3x3 s2 p1x0_2 f16",
    "conv2d n2 ic128 oc40 g2 i9x9 k3x3 s2 p1x0_1 relu f16",
    "conv2d n1 ic64 oc96 i5x5 k1x1 s1 p0 nhwc bf16",
    "conv3d n2 ic24 oc16 i3x4x5 k3x3x2 s1x2x1 p1 d1x1x2 nhwc f16",
]
#: Several tiles along every axis, and more steps than stages.
TILES = "conv2d n2 ic128 oc72 i9x8 k5x1 s1 p2x0 nhwc f16"


def picks(**others: int) -> Picks:
    """Two warpgroups."""
    plain = {"merge_g": 1, "tile_m": 128, "tile_n": 32, "tile_k": 64, "warps_n": 1, "stages": 3, "split_k": 1}
    plain |= others
    return Picks(**plain, warps_m=plain["tile_m"] // 16)


def made(text: str, chosen: Picks | None = None) -> tuple[ConvSpec, DeviceSource, dict[str, Any], Any]:
    """A candidate's source, what it is called with, and what it should compute."""
    spec = ConvSpec.parse(text)
    lowered = lower(spec, TARGET, Candidate(SCHEDULE, chosen or SCHEDULE.default(spec.core, TARGET)))
    data = exact_data(spec)
    buffers = {"src": data["src"]} | {f"packed{i}": array for i, array in enumerate(packed(lowered, data))}
    if spec.residual:
        buffers["residual"] = data["residual"]
    return spec, generate(lowered), buffers | {"dst": np.zeros(spec.dst_shape, data["src"].dtype)}, data


@emulated
@pytest.mark.parametrize("text", LAYERS)
def test_patches_are_the_convolutions(text: str) -> None:
    """Whole numbers, bit for bit."""
    spec, source, buffers, data = made(text)
    assert any("cg_tma_tile" in source.text and launch.maps for launch in source.launches)
    out, expected = run(source, buffers, order=LAYERS.index(text)), reference(spec, data)
    if spec.activation_op.exact:
        np.testing.assert_array_equal(out, expected)
    else:
        np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=2e-3, atol=2e-3)


@emulated
@pytest.mark.parametrize(
    "chosen",
    [picks(), picks(stages=2, split_k=4), picks(tile_m=64, tile_n=96, stages=5)],
    ids=["two warpgroups", "split", "wide"],
)
def test_tiles_are_right_in_every_order(chosen: Picks, tmp_path: Path) -> None:
    spec, source, buffers, data = made(TILES, chosen)
    library = compile_emulated(source.text, tmp_path)
    for order, guard in zip(ORDERS, ("end", "start", "end"), strict=True):
        buffers["dst"] = np.zeros_like(buffers["dst"])
        out = run(source, buffers, order=order, library=library, guard=guard)
        np.testing.assert_array_equal(out, reference(spec, data))


@emulated
def test_a_groups_nan_reaches_no_other() -> None:
    spec, source, buffers, data = made("conv2d n1 ic128 oc16 g2 i5x4 k3x3 p1 nhwc f16", picks(tile_m=64))
    buffers["src"] = data["src"] = data["src"].copy()
    data["src"][..., 64:] = np.nan
    out = run(source, buffers)
    assert np.isnan(out[..., 8:]).all()
    data["src"][..., 64:] = 0
    np.testing.assert_array_equal(out[..., :8], reference(spec, data)[..., :8])


CLEAR = r"(cg_clear_tile<16, COLS>\(acc\);\n    )"
#: What is changed in cg_tma_tile, and what the emulator says then.
WRONG = {
    "no wait for the copies": (r"cg_barrier_wait\(full \+ .*?\);", "", "under way"),
    "the other parity": (r"(k / STAGES) % 2", r"(\1 + 1) % 2", "under way|does not end"),
    "no wait for the products": (r"cg_wgmma_wait<1>\(\);", "", "which products under way read"),
    "no wait for the last": (r"cg_wgmma_wait<0>\(\);\n    __sync", "__sync", "products .*under way"),
    "a wait that is too early": (r"cg_wgmma_wait<1>", "cg_wgmma_wait<2>", "which products under way read"),
    "no barrier before a stage is filled": (r"__syncthreads\(\);    /\*", "/*", "no barrier|under way|others wait for"),
    "a stage filled a step too early": (r"k - 1 \+ STAGES", "k + STAGES", "no barrier between|under way"),
    "no barrier after barriers are made": (CLEAR + r"__syncthreads\(\);", r"\1", "mbarrier"),
    "fewer bytes expected": (r"expect\(barrier, BYTES", "expect(barrier, BYTES - 16", "does not end"),
    "barriers left where sums go": (r"cg_barrier_end\(full \+ k\)", "", "which is an mbarrier"),
}


def changed(monkeypatch: pytest.MonkeyPatch, file: str, text: str) -> None:
    """Emulate with another text of a file."""
    monkeypatch.setattr(emulate, "runtime_source", lambda name: text if name == file else runtime_source(name))


@emulated
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pipeline_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, wrong, message = WRONG[name]
    text = runtime_source("hopper.h")
    tile = text.index("CG_DEVICE void cg_tma_tile")
    edited, count = re.subn(pattern, wrong, text[tile:])
    assert count
    changed(monkeypatch, "hopper.h", text[:tile] + edited)
    # Sums of 128 pixels x 192 channels take more room than the stages: the barriers' too.
    large = name == "barriers left where sums go"
    _, source, buffers, _ = made(TILES, picks(tile_n=192, stages=2) if large else picks())
    with pytest.raises(KernelError, match=message):
        run(source, buffers, order=1)


# ---- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("conv2d n1 ic64 oc64 i32x32 k3x3 s9 nhwc f16", "strides up to 8"),
        ("conv2d n1 ic64 oc64 i32x32 k3x3 p1 g4 nhwc f16", "groups of whole 64 channels"),
        ("conv2d n1 ic64 oc64 i300x32 k130x1 nhwc f16", r"corners of the padding within \[-128, 127\]"),
        ("conv3d n1 ic64 oc64 i40x4x4 k3x1x1 d9x1x1 nhwc f16", r"corners of the padding within \[-16, 15\]"),
        ("conv3d n1 ic64 oc64 i40x4x4 k3x1x1 d16x1x1 p16x0x0 nhwc f16", "taps less than 32 apart"),
        ("convtranspose2d n1 ic64 oc64 i8x8 k2x2 s2 nhwc f16", "not transposed"),
        ("conv2d n1 ic256 oc64 i8x8 k3x3 g4 nhwc i8", "groups of whole 128 channels"),
        ("conv2d n1 ic64 oc64 i8x8 k3x3 nhwc tf32", "f16, bf16 or i8"),
    ],
)
def test_what_im2col_mode_cannot_do_is_refused(text: str, why: str) -> None:
    assert re.search(why, SCHEDULE.reason_against(ConvSpec.parse(text).core, TARGET) or "")


def test_at_the_limits_it_applies() -> None:
    for text in (
        "conv2d n1 ic64 oc64 i300x32 k129x1 s8 nhwc f16",
        "conv3d n1 ic64 oc64 i40x4x4 k2x1x1 d31x1x1 p15x0x0 nhwc f16",
        "conv1d n1 ic8 oc64 i40000 k2 d32767 nhwc bf16",
    ):
        assert SCHEDULE.reason_against(ConvSpec.parse(text).core, TARGET) is None


def encoder(driver: ctypes.CDLL, **usual: Any) -> Callable[..., int]:
    """``cuTensorMapEncode…`` of a tensor, with some arguments changed."""
    storage = np.zeros(256, np.uint8)

    def call(**changed: Any) -> int:
        given = usual | changed
        place = storage.ctypes.data + -storage.ctypes.data % 64 + given["shift"]
        im2col = "lower" in usual
        array = {"dims": ctypes.c_uint64, "strides": ctypes.c_uint64, "lower": ctypes.c_int, "upper": ctypes.c_int}
        names = ["dims", "strides", *(["lower", "upper", "channels", "pixels"] if im2col else ["box"]), "steps"]
        values = [
            (array.get(name, ctypes.c_uint32) * len(given[name]))(*given[name])
            if isinstance(given[name], tuple)
            else given[name]
            for name in names
        ]
        function = driver.cuTensorMapEncodeIm2col if im2col else driver.cuTensorMapEncodeTiled
        values += [given[name] for name in ("interleave", "swizzle", "promotion", "fill")]
        tensor = given["type"], given["rank"], ctypes.c_void_p(given["address"])
        return int(function(ctypes.c_void_p(place), *tensor, *values))

    return call


@emulated
def test_the_emulated_driver_has_the_real_ones_limits(tmp_path: Path) -> None:
    driver = ctypes.CDLL(str(emulated_driver(tmp_path, (9, 0))))
    plain = {"shift": 0, "type": 6, "rank": 4, "address": 4096, "dims": (64, 9, 9, 2), "strides": (128, 1152, 10368)}
    plain |= {"steps": (1, 8, 8, 1), "interleave": 0, "swizzle": 3, "promotion": 2, "fill": 0}
    tiled = encoder(driver, **plain, box=(64, 256, 1, 1))
    corners = {"lower": (-128, 127), "upper": (127, 127), "channels": 64, "pixels": 1024}
    im2col = encoder(driver, **plain, **corners)
    refused: list[dict[str, Any]] = [
        {"shift": 16},
        {"type": 13},
        {"rank": 6},
        {"address": 8},
        {"dims": (64, 0, 9, 2)},
        {"dims": (64, 2**32 + 1, 9, 2)},
        {"strides": (120, 1152, 10368)},
        {"strides": (128, 1152, 2**40)},
        {"steps": (1, 9, 1, 1)},
        {"steps": (1, 1, 0, 1)},
        {"swizzle": 2},
        {"type": 1, "fill": 1},
    ]
    for call in (tiled, im2col):
        assert call() == 0
        assert call(dims=(64, 2**32, 9, 2)) == 0
        assert [call(**change) for change in refused] == [1] * len(refused)
    assert tiled(box=(64, 257, 1, 1)) == tiled(box=(64, 0, 1, 1)) == tiled(box=(60, 8, 1, 1)) == 1
    assert tiled(rank=1, swizzle=0) == 0
    for change in (
        {"rank": 2},
        {"lower": (-129, 0)},
        {"upper": (0, 128)},
        {"lower": (9, 0), "upper": (0, 0)},  # nothing between them
        {"channels": 257, "swizzle": 0},
        {"channels": 0},
        {"pixels": 1025},
    ):
        assert im2col(**change) == 1
    assert im2col(rank=3, lower=(-32768,), upper=(32767,)) == 0


BAD = {
    "a tiled map for patches": ("cg_copy_patches<1>(x, map, bar, 0, 0, 0, 0, 0, 0, 0, 0);", "in this mode"),
    "another rank": ("cg_copy_patches<2>(x, map, bar, 0, 0, 0, 0, 0, 0, 0, 0);", "no map of 4 axes"),
    "no barrier": ("cg_copy_rows(x, map, bar + 1, 0, 0);", "expected one that was initialised"),
    "misaligned": ("cg_copy_rows(x + 128, map, bar, 0, 0);", "multiple of 1024"),
    "outside of shared memory": ("cg_copy_rows(x + 2048, map, bar, 0, 0);", "expected shared memory"),
    "never waited for": ("cg_copy_rows(x, map, bar, 0, 0);", "ends while a copy"),
    "read at once": ("cg_copy_rows(x, map, bar, 0, 0); dst[0] = x[0];", "under way"),
}


@emulated
@pytest.mark.parametrize("name", BAD)
def test_what_the_instruction_rejects_is_a_fault(name: str) -> None:
    statement, message = BAD[name]
    text = f"""#include "device.h"
extern "C" __global__ void __launch_bounds__(32)
copy(const __grid_constant__ cg_tensor_map map, float* __restrict__ dst) {{
  extern __shared__ __align__(1024) uchar x[];
  uint64_t* bar = (uint64_t*)(x + 2048);
  if (threadIdx.x == 0) {{ cg_barrier_init(bar, 1); cg_barrier_expect(bar, 1024); {statement} }}
}}
"""
    rows = TensorMap("f16", (64, 8), (128,), (64, 8), 128)
    launch = Launch("copy", (1, 1, 1), (32, 1, 1), 2048 + 16, ("src", "dst"), {"src": rows})
    src = np.zeros((8, 64), np.float16)
    with pytest.raises(KernelError, match=message):
        run(DeviceSource(text, (launch,)), {"src": src, "dst": np.zeros(4, np.float32)})


# ---- the code, and the library -------------------------------------------------------------------


@pytest.mark.parametrize("tile", [(128, 256), (256, 128), (64, 32)])
def test_the_instructions_are_there_and_nothing_spills(tile: tuple[int, int]) -> None:
    spec = ConvSpec.parse("conv2d n16 ic256 oc256 i28x28 k3x3 s1 p1 relu nhwc f16")
    chosen = picks(tile_m=tile[0], tile_n=tile[1])
    source = generate(lower(spec, TARGET, Candidate(SCHEDULE, chosen)))
    images, (used,) = code.compile_images(source, TARGET)
    assert [what for what, _ in images] == ["sm_90a"]
    assert not used.spilled
    assert used.shared <= SCHEDULE.shared_memory(spec.core, chosen)  # type: ignore[attr-defined]
    assert "serialized" not in code.compiled(source.text, "sm_90a")[2]
    sass = code.disassembled(images[0][1])
    for instruction in ("UTMALDG.4D.IM2COL", "UTMALDG.2D", f"HGMMA.64x{tile[1]}x16.F32"):
        assert instruction in sass
    assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in sass  # the next products begin before these end
    assert "LDGSTS" not in sass


@pytest.mark.parametrize("tile", [(128, 256), (256, 128)])
def test_large_tiles_are_weighed_by_the_registers_they_take(tile: tuple[int, int]) -> None:
    """Operands of warpgroups stay in shared memory: only sums and addresses are in registers, and blocks fit."""
    spec, chosen = ConvSpec.parse("conv2d n64 ic256 oc512 i56x56 k1x1 nhwc f16"), picks(tile_m=tile[0], tile_n=tile[1])
    lowered = lower(spec, TARGET, Candidate(SCHEDULE, chosen))
    (used,) = code.compile_images(generate(lowered), TARGET)[1]
    estimated = SCHEDULE.registers(spec.core, chosen)  # type: ignore[attr-defined]
    assert used.registers <= estimated <= used.registers + 40
    assert SCHEDULE.seconds(spec.core, TARGET, chosen) < SCHEDULE.seconds(  # type: ignore[attr-defined]
        spec.core, TARGET, picks(tile_m=64, tile_n=64)
    )


@emulated
def test_the_exported_example_gives_maps_to_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C alone: its comparison with a plain convolution passes; a driver without maps is refused."""
    spec = ConvSpec.parse("conv2d n2 ic16 oc24 i6x5 k3x3 s2 p1 relu f16")
    kernel = compile_candidate(spec, TARGET, parse_candidate(spec, TARGET, "cuda_wgmma_tma"), 1, name="layer")
    interface = dataclasses.replace(kernel.interface, device=emulated_code(kernel.lowered, tmp_path))
    write_library(tmp_path / "out", interface, kernel.object_file, {"threads": 1})
    assert '"lower": [' in (tmp_path / "out" / "manifest.json").read_text()
    command = ["cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "example.c", "liblayer.a"]
    subprocess.run([*command, "-lm", "-lpthread", "-ldl", "-o", "example"], cwd=tmp_path / "out", check=True)

    def example(driver: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "CONVGEN_CUDA_DRIVER": str(driver)}
        return subprocess.run(["./example"], cwd=tmp_path / "out", env=environment, capture_output=True, text=True)

    done = example(emulated_driver(tmp_path, (9, 0)))
    assert done.returncode == 0, done.stderr
    old = runtime_source("emulated_map.h").replace("cuTensorMapEncode", "cuOtherMapEncode")
    changed(monkeypatch, "emulated_map.h", old)
    (tmp_path / "old").mkdir()
    done = example(emulated_driver(tmp_path / "old", (9, 0)))
    assert done.returncode == 1
    assert "or an old one" in done.stderr


def test_more_maps_than_a_launch_takes_are_refused(tmp_path: Path) -> None:
    spec = ConvSpec.parse("conv2d n1 ic16 oc24 i6x5 k3x3 f16")
    kernel = compile_candidate(spec, TARGET, parse_candidate(spec, TARGET, "cuda_wgmma_tma"), 1)
    device = kernel.interface.device
    assert device is not None
    last = device.launches[-1]
    (made_map, *_) = last.maps.values()
    names = ("src", "dst", "packed0", "packed1", "workspace0")
    crowded = dataclasses.replace(last, maps=dict.fromkeys(names, made_map))
    interface = dataclasses.replace(kernel.interface, device=dataclasses.replace(device, launches=(crowded,)))
    with pytest.raises(BuildError, match="expected at most 4 maps, found 5"):
        link(interface, kernel.object_file, tmp_path / "lib.so")
