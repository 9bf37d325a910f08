"""Matrix tiles: on processors that have them, against ONNX Runtime; what they ask for, and where they are chosen."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest
from drawn_points import random_picks

from convgen.check.validate import validate
from convgen.cpu.matrix.geometry import geometry_of
from convgen.cpu.matrix.tiles import ROW_BYTES
from convgen.hardware.isa import WRITTEN
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.entry import cpu_condition
from convgen.lowering.lower import lower, source
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import ConvSpec

NATIVE, TILES = resolve(), resolve("cpu:sapphirerapids")
SCHEDULE = find_schedule("cpu_matrix")
needs_tiles = pytest.mark.skipif(not set(WRITTEN) <= set(NATIVE.isa), reason="needs a CPU with matrix tiles")

#: Between them: ranks, layouts, dtypes; strides, dilations and padding; tails of pixels, of channels and of runs; taps
#: that are merged; src that is read where it lies; activations that are written out and those that are loops.
LAYERS = [
    "conv2d n1 ic64 oc48 i9x9 k3x3 nhwc residual relu bf16",
    "conv2d n2 ic3 oc17 i19x10 k7x7 s2 p0_1x1_0 relu bf16",
    "conv2d n1 ic3 oc64 i20x37 k7x7 s2 p3 nhwc relu bf16",
    "conv2d n2 ic16 oc31 i7x6 k3x3 s1 p1 residual silu bf16",
    "conv2d n1 ic17 oc33 i6x6 k3x3 s1 p1x0_2 nhwc prelu bf16",
    "conv2d n1 ic40 oc15 i5x7 k1x1 residual gelu bf16",
    "conv2d n1 ic33 oc1 i4x4 k1x1 nhwc nobias relu6 bf16",
    "conv1d n1 ic16 oc17 i33 k3 p2_0 elu(0.5) bf16",
    "conv1d n1 ic5 oc7 i131 k3 p16_4 d8 prelu bf16 nhwc",
    "conv1d n1 ic33 oc3 i33 k7 s8 p6_5 d3 nobias nhwc i8",
    "conv3d n1 ic16 oc16 i3x4x5 k3x3x3 p1 sigmoid bf16",
    "conv3d n1 ic2 oc3 i4x5x4 k2x3x1 s1x2x1 p0_1x1x0 nhwc bf16",
    "conv2d n1 ic5 oc9 i11x11 k2x2 s3x4 clip(-1,2.5) bf16",
    "conv2d n2 ic32 oc40 i20x20 k3x3 s2 p1 nhwc dst_nchw bf16",
    "conv2d n1 ic24 oc32 i12x12 k1x1 s2 nchw dst_nchw16c bf16",
    "conv2d n1 ic17 oc18 i2x3 k2x2 s1x2 p5_4x4_6 bf16",
    "conv2d n1 ic64 oc33 i9x9 k3x3 p1 nhwc relu accuracy_bf16",
    "conv2d n1 ic20 oc33 i9x19 k3x3 s2 p1 residual accuracy_bf16",
    "conv2d n1 ic64 oc33 i9x9 k3x3 p1 nhwc relu i8",
    "conv2d n1 ic6 oc34 i9x9 k3x3 p1 s2 i8",
    "conv2d n1 ic200 oc34 i9x9 k3x3 p2 d2 nhwc i8",
    "conv1d n1 ic128 oc64 i50 k1 nhwc i8",
    "conv2d n1 ic64 oc48 i9x9 k3x3 p1 nhwc i8 src_u8 dst_u8 src_zero dst_zero",
    "conv2d n1 ic6 oc34 i9x9 k3x3 p1 s2 relu i8 src_u8 src_zero dst_zero",
    "conv2d n1 ic3 oc20 i15x15 k7x7 p3 s2 nhwc i8 src_zero nobias",
    "conv1d n1 ic24 oc17 i50 k3 p1 nhwc i8 src_u8 weights_u8 src_zero dst_i32",
    "conv1d n1 ic128 oc64 i50 k1 nhwc i8 weights_u8 dst_f32",
]


@needs_tiles
@pytest.mark.parametrize("layer", LAYERS)
def test_kernels_pass_validation(layer: str) -> None:
    """The default's, and of every fourth layer a random point's."""
    spec = ConvSpec.parse(layer)
    core, rng, drawn = spec.core, random.Random(layer), int(LAYERS.index(layer) % 4 == 1)
    for picks in [SCHEDULE.default(core, NATIVE), *random_picks(SCHEDULE, spec, NATIVE, drawn, rng)]:
        validate(compile_candidate(spec, NATIVE, Candidate(SCHEDULE, picks), 3)).raise_if_failed()


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_of_tiles_cross_no_line_of_a_copy(layer: str) -> None:
    g = geometry_of(ConvSpec.parse(layer).core, True)
    assert ROW_BYTES % (g.run * g.size) == 0
    assert g.pixel % g.run == 0
    assert g.merged or g.channels * g.dilation[2] % g.run == 0
    assert g.taps[3] * g.run >= g.channels * (g.kernel[2] if g.merged else 1)


def test_tiles_are_shaped_once_and_given_back_in_every_task() -> None:
    """Shaping takes as long as ten products; tiles in use are saved when threads change."""
    spec = ConvSpec.parse(LAYERS[0])
    code = source(lower(spec, TILES, Candidate(SCHEDULE, SCHEDULE.default(spec.core, TILES))), "asm")
    assert [len(re.findall(rf"\b{name}\b", code)) for name in ("ldtilecfg", "tilerelease")] == [1, 1]
    assert "tdpbf16ps" in code
    assert "vcvtneps2bf16" in code


@pytest.mark.parametrize(("dtype", "feature"), [("bf16", "amx-bf16"), ("i8", "amx-int8")])
def test_only_what_multiplies_tiles_asks_for_them(dtype: str, feature: str) -> None:
    spec = ConvSpec.parse(f"conv2d n1 ic64 oc64 i8x8 k3x3 p1 nhwc {dtype}")
    for name, asked in (("cpu_matrix", {"amx-tile", feature}), ("cpu_direct", set[str]())):
        schedule = find_schedule(name)
        lowered = lower(spec, TILES, Candidate(schedule, schedule.default(spec.core, TILES)))
        assert set(WRITTEN) & set(lowered.isa) == asked
        assert set(TILES.isa) - set(WRITTEN) <= set(lowered.isa)


def test_a_library_asks_whether_the_system_saves_tiles() -> None:
    condition = cpu_condition(("amx-tile", "amx-bf16"), "x86_64")
    assert condition == "convgen_cpu_tells(0x7, 0, CONVGEN_EDX, 0x1400000) && convgen_system_saves(0x60000)"


#: A signal stack that has no room for tiles: Linux then refuses the process to use them.
REFUSED = """
import ctypes, sys
class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
stack = Stack(ctypes.addressof(memory), 0, 8192)
assert ctypes.CDLL(None, use_errno=True).sigaltstack(ctypes.byref(stack), None) == 0
import numpy as np
from convgen.kernel.load import load
load(sys.argv[1]).bind(np.zeros((16, 64, 3, 3), "int8"), scale=np.ones(16, "float32"))
"""


@needs_tiles
def test_a_process_that_may_not_use_tiles_is_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("export") / "out"
    spec = ConvSpec.parse("conv2d n1 ic64 oc16 i8x8 k3x3 nhwc nobias i8")
    compile_candidate(spec, NATIVE, Candidate(SCHEDULE, SCHEDULE.default(spec.core, NATIVE)), 1).export(folder)
    done = subprocess.run([sys.executable, "-c", REFUSED, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lacks instructions" in done.stderr


@pytest.mark.parametrize(
    "layer", ["ic64 oc64 i56x56 k3x3 p1 nhwc", "ic256 oc64 i56x56 k1x1 nhwc", "ic64 oc64 i56x56 k3x3"]
)
@pytest.mark.parametrize("dtype", ["bf16", "i8"])
def test_is_the_default_where_there_are_tiles(layer: str, dtype: str) -> None:
    spec = ConvSpec.parse(f"conv2d n1 {layer} {dtype}")
    assert default_candidate(spec, TILES).schedule.id == "cpu_matrix"
    assert SCHEDULE.reason_against(spec.core, resolve("cpu:znver4")) == "needs a CPU with matrix tiles"
