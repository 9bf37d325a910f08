"""Kernels with a warp that fetches, whose blocks take one tile after another: by the specification, on the CPU.

No device has run them.

In the emulator's random orders copies arrive late, and threads stop before they arrive at a barrier; the seeds are
the tests' names.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import packed

import convgen.check.emulation.emulate as emulate
from convgen.check.bounds import reference
from convgen.check.data import exact_data
from convgen.check.emulation.emulate import compile_emulated, run
from convgen.cuda import code
from convgen.cuda.code import DeviceSource, generate
from convgen.errors import KernelError
from convgen.hardware.target import resolve
from convgen.lowering.discover import schedules_of
from convgen.lowering.interface import Launch
from convgen.lowering.lower import lower
from convgen.lowering.runtime import source as runtime_source
from convgen.lowering.schedule import Candidate, Picks
from convgen.problem.dtypes import BYTES
from convgen.problem.spec import ConvSpec

pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install '.[cuda]'")
emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to emulate")

SCHEDULE, TARGET = schedules_of("cuda")["cuda_wgmma_persistent"], resolve("cuda:sm_90a")
#: Several tiles along pixels and channels, and more steps than stages.
TILES = "conv2d n2 ic64 oc72 i9x8 k5x1 s1 p2x0 nhwc f16"


def picks(**others: int) -> Picks:
    """A warpgroup that multiplies tiles of 64 × 64."""
    plain = {"merge_g": 1, "tile_m": 64, "tile_n": 64, "tile_k": 64, "warps_m": 4, "warps_n": 1, "stages": 2}
    return Picks(**(plain | {"split_k": 1, "resident": 1, "cluster": 1, "cluster_k": 1, "bulk_store": 0} | others))


def made(text: str, chosen: Picks, blocks: int = 2) -> tuple[ConvSpec, DeviceSource, dict[str, Any], Any]:
    """A candidate's source, with so few blocks that each takes several tiles; what it is called with; its data."""
    spec = ConvSpec.parse(text)
    lowered = lower(spec, TARGET, Candidate(SCHEDULE, chosen))
    data = exact_data(spec)
    buffers = {"src": data["src"]} | {f"packed{i}": array for i, array in enumerate(packed(lowered, data))}
    if spec.residual:
        buffers["residual"] = data["residual"]
    source = generate(lowered)
    launches = [
        dataclasses.replace(launch, grid=(blocks, 1, 1)) if launch.maps else launch for launch in source.launches
    ]
    source = dataclasses.replace(source, launches=tuple(launches))
    return spec, source, buffers | {"dst": np.zeros(spec.dst_shape, data["src"].dtype)}, data


@emulated
@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (TILES, picks(stages=3)),
        (TILES, picks(tile_m=128, warps_m=8, stages=3)),
        (TILES, picks(tile_m=128, tile_n=32, resident=2)),
        (TILES, picks(split_k=2)),
        ("conv2d n2 ic19 oc33 i7x6 k3x3 s2 p1x0_2 f16", picks(tile_n=32)),
        ("conv2d n2 ic128 oc40 g2 i9x9 k3x3 s2 p1x0_1 residual relu nhwc bf16", picks()),
        ("conv1d n3 ic64 oc17 i33 k3 s1 p2_0 d2 nhwc f16", picks(tile_n=32)),
        ("conv3d n2 ic24 oc16 i3x4x5 k3x3x2 s1x2x1 p1 d1x1x2 nhwc f16", picks(tile_n=32)),
        ("conv2d n1 ic128 oc40 i9x9 k3x3 p1 relu nhwc i8", picks(tile_k=128, tile_n=32)),
    ],
    ids=["plain", "two warpgroups", "tall", "split", "nchw", "groups", "1-D", "3-D", "i8"],
)
@pytest.mark.parametrize("cluster", [1, 2])
def test_tiles_are_the_convolutions(text: str, chosen: Picks, cluster: int) -> None:
    """Whole numbers, bit for bit."""
    spec, source, buffers, data = made(text, Picks(**{**chosen, "cluster": cluster}))
    np.testing.assert_array_equal(run(source, buffers, order=len(text)), reference(spec, data))


@emulated
@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (TILES, picks(tile_n=32)),
        (TILES, picks(tile_m=128, warps_m=8, cluster=2)),
        (TILES, picks(tile_m=128, resident=2)),
        ("conv2d n2 ic128 oc80 g2 i9x9 k3x3 s2 p1x0_1 residual relu nhwc bf16", picks()),
        ("conv1d n3 ic64 oc24 i33 k3 s1 p2_0 d2 prelu nhwc f16", picks(tile_n=32)),
        ("conv3d n2 ic24 oc16 i3x4x5 k3x3x2 s1x2x1 p1 d1x1x2 nhwc f16", picks(tile_n=32, cluster=2)),
        ("conv2d n1 ic128 oc48 i9x9 k3x3 p1 relu nhwc i8", picks(tile_k=128)),
        ("conv2d n1 ic64 oc72 i8x8 k1x1 residual nhwc f16", picks()),
        ("conv2d n2 ic64 oc72 i9x8 k3x3 p1 residual relu nhwc f16", picks(tile_m=128, tile_n=96)),
        ("conv2d n2 ic64 oc40 i8x8 k3x3 p1 residual bf16", picks(tile_m=128, warps_m=8)),
        ("conv2d n5 ic64 oc33 i6x4 k1x1 relu f16", picks(tile_n=32, cluster=2)),
        ("conv2d n3 ic64 oc72 i6x8 k3x3 p1 residual relu f16", picks(tile_m=128, tile_n=96)),
        ("conv2d n3 ic128 oc80 g2 i12x8 k3x3 p1 residual f16", picks()),
        ("conv2d n1 ic64 oc33 i9x8 k1x1 residual f16", picks(tile_n=32)),
        ("conv1d n3 ic64 oc24 i32 k3 p1 relu i8", picks(tile_k=128, tile_n=32)),
        ("conv2d n3 ic64 oc40 i6x8 k1x1 i8", picks(tile_k=128)),
        ("conv3d n2 ic24 oc16 i2x4x8 k3x1x1 p1x0x0 i8", picks(tile_k=128, tile_n=32)),
    ],
    ids=[
        "plain",
        "clusters",
        "tall",
        "groups",
        "1-D, prelu",
        "3-D",
        "i8",
        "residual",
        "residual of six pieces",
        "nchw, boxes of 64, residual",
        "nchw, boxes of 8",
        "nchw, boxes of 16, residual of six pieces",
        "nchw, boxes of 32, groups, residual",
        "nchw, one image, residual",
        "nchw, i8, boxes of 32",
        "nchw, i8, boxes of 16",
        "nchw, i8, boxes of 64",
    ],
)
def test_the_copy_engine_stores_the_convolutions(text: str, chosen: Picks) -> None:
    """Tails of pixels and of channels among them."""
    spec, source, buffers, data = made(text, Picks(**{**chosen, "bulk_store": 1}))
    assert {"dst", *(["residual"] if spec.residual else [])} <= source.launches[-1].maps.keys()
    np.testing.assert_array_equal(run(source, buffers, order=len(text)), reference(spec, data))


#: Something is added, in boxes of 16 pixels.
ADDED = "conv2d n3 ic64 oc72 i6x8 k3x3 p1 residual relu f16"
#: Eighteen steps.
LONG = "conv2d n1 ic128 oc72 i9x8 k3x3 s1 p1 relu nhwc f16"


@emulated
@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (LONG, picks(cluster_k=2)),
        (LONG, picks(cluster_k=4, tile_m=128, warps_m=8)),
        (LONG, picks(cluster_k=4, tile_n=96, bulk_store=1)),
        (LONG, picks(cluster_k=4, tile_m=128, tile_n=32, bulk_store=1)),
        (LONG.replace("relu", "residual relu"), picks(cluster_k=4, tile_m=128, tile_n=96, bulk_store=1)),
        ("conv2d n1 ic128 oc40 i9x9 k3x3 p1 relu nhwc i8", picks(tile_k=128, cluster_k=4)),
        ("conv2d n2 ic64 oc33 i7x6 k3x3 s2 p1x0_2 f16", picks(tile_n=32, cluster_k=2)),
    ],
    ids=["two", "two warpgroups", "pieces that some lack", "tall", "residual", "i8", "nchw"],
)
def test_a_cluster_adds_up_a_tile(text: str, chosen: Picks) -> None:
    spec, source, buffers, data = made(text, chosen, blocks=chosen.cluster_k)
    assert len(source.launches) == 1 + (spec.layout == "nchw")
    np.testing.assert_array_equal(run(source, buffers, order=len(text)), reference(spec, data))


@emulated
def test_parts_that_have_no_step_are_zeros() -> None:
    """Seventeen steps in eight parts of three."""
    spec, source, buffers, data = made("conv2d n1 ic1088 oc32 i3x3 k1 nhwc f16", picks(tile_n=32, split_k=8))
    np.testing.assert_array_equal(run(source, buffers, order=1, timeout=100), reference(spec, data))


@emulated
@pytest.mark.parametrize(
    ("text", "others"),
    [
        (TILES, {}),
        (TILES, {"cluster": 2}),
        (TILES, {"cluster_k": 2}),
        (TILES, {"bulk_store": 1}),
        (TILES, {"cluster": 2, "bulk_store": 1}),
        (f"{ADDED} nhwc", {"tile_m": 128, "tile_n": 96, "bulk_store": 1}),
        (ADDED, {"tile_m": 128, "warps_m": 8, "cluster": 2, "bulk_store": 1}),
        (ADDED, {"tile_n": 96, "cluster_k": 2, "bulk_store": 1}),
    ],
)
def test_timing_changes_nothing(text: str, others: dict[str, int], tmp_path: Path) -> None:
    """Whatever is late: copies, arrivals, warps, stores."""
    spec, source, buffers, data = made(text, picks(stages=3, **others))
    library = compile_emulated(source.text, tmp_path)
    for order in ("ascending", "descending", 11, 12, 13):
        buffers["dst"] = np.zeros_like(buffers["dst"])
        out = run(source, buffers, order=order, library=library)
        np.testing.assert_array_equal(out, reference(spec, data), err_msg=f"seed {order}")


def in_orders(source: DeviceSource, buffers: dict[str, Any], expected: Any = None) -> None:
    """Run in several random orders: a fault may take one that is unlucky. Where it is said what to expect, compare."""
    for order in (1, 2, 3, 4):
        out = run(source, buffers, order=order)
        if expected is not None:
            np.testing.assert_array_equal(out, expected, err_msg="outputs differ")


#: What is changed in cg_persistent, and what the emulator says then.
WRONG = {
    "no wait for an empty stage": (
        r"cg_barrier_wait<SHARES>\(empty \+ stage, phase \^ 1\);",
        "",
        "under way|which others read|arrivals to come",
    ),
    "the other parity of empty": (r"phase \^ 1\)", "phase)", "does not end"),
    "no wait for the copies": (r"cg_barrier_wait<SHARES>\(full \+ stage, phase\);", "", "under way|which others read"),
    "the other parity of full": (r"full \+ stage, phase\)", "full + stage, phase ^ 1)", "under way|does not end"),
    "released before products end": (
        r"cg_wgmma_wait<1>\(\);\n(\s+release\(before\);)",
        r"\1\ncg_wgmma_wait<1>();",
        "read",
    ),
    "a wait that is too early": (r"cg_wgmma_wait<1>", "cg_wgmma_wait<2>", "read"),
    "released by one lane, others not asked": (r"__syncwarp\(\);", "", "read"),
    "too few arrivals expected": (
        r"empty \+ k, SHARES \* WARPS",
        "empty + k, WARPS - 1",
        "read|no more are to|does not end|under way",
    ),
    "the last stage kept": (r"(cg_settled\(acc\[i\]\);\n)\s+release\(before\);", r"\1", "does not end"),
    "no wait for the last": (r"cg_wgmma_wait<0>\(\);", "", "products .*under way|read"),
    "fewer bytes expected": (r"full \+ stage, BYTES", "full + stage, BYTES - 16", "does not end"),
    "a barrier of fewer threads": (r"cg_sync<128>", "cg_sync<96>", "expected|wait"),
    "no barrier of the warpgroup": (r"cg_sync<128>\(1 \+ group\);", ";", "no barrier between"),
}
#: The same of clusters,
WRONG_CLUSTER = {
    "no arrival at the other block": (r"cg_lane\(\) < SHARES", "cg_lane() == rank", "does not end"),
    "the own block told twice": (r"arrive_at\(barrier, cg_lane\(\)\)", "arrive_at(barrier, rank)", "under way|read"),
    "only one block waited for": (r"SHARES \* WARPS", "WARPS", "no more are to|under way|read|does not end"),
    "weights not shared": (r"\(1 << SHARES\) - 1", "1 << rank", "does not end"),
    "both fetch the same half": (r"rank \* \(SHARE \* 128\)", "0", "under way|read"),
    "no barrier of the cluster at the beginning": (
        r"if constexpr \(CLUSTER > 1\)\s+cg_cluster_sync\(\);\s+else\s+__syncthreads",
        "__syncthreads",
        "initialised|no barrier between",
    ),
    "no barrier of the cluster at the end": (
        r"(void end\(\) const\s+\{\s+)if constexpr \(CLUSTER > 1\)\s+cg_cluster_sync\(\);",
        r"\1",
        "has ended",
    ),
}
#: of those that add up a tile,
WRONG_SPLIT = {
    "no wait for others' sums": (r"cg_barrier_wait<SPLITS>\(sent, turn\);", "", "no barrier between"),
    "no wait for the place": (r"cg_barrier_wait<SPLITS>\(taken, turn \^ 1\);", "", "which others read|no more are to"),
    "sums not told of": (r"tell_others\(sent\);", "", "does not end"),
    "never told that they were added up": (r"tell_others\(taken\);", "", "does not end"),
    "told by one lane, others not asked": (
        r"__syncwarp\(\);\s+(if \(cg_lane\(\) < SPLITS)",
        r"\1",
        "no barrier between",
    ),
}
#: and of stores.
WRONG_STORE = {
    "no fence": (r"cg_fence_async\(\);", "", "no fence for the copy engine"),
    "no barrier before it is sent": (
        r"(cg_fence_async\(\);\s+)cg_sync<128>\(1 \+ group\);",
        r"\1",
        "no barrier between",
    ),
    "no wait for the place": (r"cg_store_wait<PLACES - 1>\(\);", ";", "or stores"),
    "a wait that is too early": (r"cg_store_wait<PLACES - 1>", "cg_store_wait<PLACES>", "or stores"),
    "only one thread waits": (
        r"(cg_store_wait<PLACES - 1>\(\);\s+)cg_sync<128>\(1 \+ group\);",
        r"\1",
        "or stores|no barrier between",
    ),
    "no wait at the end": (r"cg_store_wait<0>\(\);", ";", "ends while its stores"),
    "never committed": (r"cg_store_commit\(\);", "", "or stores|ends while its stores"),
}
#: What is added to sums comes the same way.
WRONG_ADDED = {
    "no wait for it": (r"cg_barrier_wait\(here \+ place, phase\);", "", "under way"),
    "the other parity": (r"here \+ place, phase\)", "here + place, phase ^ 1)", "under way|does not end"),
    "fewer bytes expected": (r"expect\(barrier, BYTES\)", "expect(barrier, BYTES - 16)", "does not end"),
    "more bytes expected": (r"expect\(barrier, BYTES\)", "expect(barrier, BYTES + 16)", "does not end"),
    "the place not waited for, ahead": (
        r"(void ahead\(\)\s+\{\s+if \(leads\) \{\s+)cg_store_wait<1>\(\);",
        r"\1",
        "or stores",
    ),
    "the place not waited for": (r"cg_store_wait<1>\(\);(\s+fetch\(piece)", r"\1", "or stores"),
    "a piece too early": (r"AHEAD = PLACES - 2", "AHEAD = PLACES - 1", "or stores|under way"),
    "to the place after": (
        r"= places \+ coming \* BYTES",
        "= places + (coming + 1) % PLACES * BYTES",
        "under way|stores",
    ),
    "barriers that others do not see": (r"if constexpr \(ADDS\)\s+cg_sync<128>\(1 \+ group\);", "", "barrier"),
    "no fence": (r"cg_fence_async\(\);", "", "no fence for the copy engine"),
    "one box of pixels for all": (r"(cg_copy_rows\(to \+ i.*?)\(pixel \+ i\) % IMAGE", r"\1pixel % IMAGE", "differ"),
}


def edit(monkeypatch: pytest.MonkeyPatch, pattern: str, wrong: str) -> None:
    """Emulate with something changed in cg_persistent or what follows it."""
    text = runtime_source("hopper.h")
    start = text.index("struct cg_persistent")
    edited, count = re.subn(pattern, wrong, text[start:])
    assert count
    monkeypatch.setattr(
        emulate, "runtime_source", lambda file: text[:start] + edited if file == "hopper.h" else runtime_source(file)
    )


@emulated
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pipeline_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, wrong, message = WRONG[name]
    edit(monkeypatch, pattern, wrong)
    _, source, buffers, _ = made(TILES, picks())
    with pytest.raises(KernelError, match=message):
        in_orders(source, buffers)


@emulated
@pytest.mark.parametrize("name", WRONG_CLUSTER)
def test_a_wrong_cluster_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, wrong, message = WRONG_CLUSTER[name]
    edit(monkeypatch, pattern, wrong)
    _, source, buffers, _ = made(TILES, picks(cluster=2))
    with pytest.raises(KernelError, match=message):
        in_orders(source, buffers)


@emulated
@pytest.mark.parametrize("name", WRONG_SPLIT)
def test_a_wrong_sum_of_a_cluster_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, wrong, message = WRONG_SPLIT[name]
    edit(monkeypatch, pattern, wrong)
    _, source, buffers, _ = made(TILES, picks(cluster_k=2))
    with pytest.raises(KernelError, match=message):
        in_orders(source, buffers)


@emulated
@pytest.mark.parametrize("name", WRONG_STORE)
def test_a_wrong_store_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, wrong, message = WRONG_STORE[name]
    edit(monkeypatch, pattern, wrong)
    _, source, buffers, _ = made(TILES, picks(tile_m=128, bulk_store=1))
    with pytest.raises(KernelError, match=message):
        in_orders(source, buffers)


@emulated
@pytest.mark.parametrize("name", WRONG_ADDED)
def test_a_wrong_fetch_of_what_is_added_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, wrong, message = WRONG_ADDED[name]
    edit(monkeypatch, pattern, wrong)
    one_step = ADDED.replace("k3x3 p1", "k1x1")  # so that stages in use again order nothing
    spec, source, buffers, data = made(one_step, picks(tile_m=128, tile_n=96, bulk_store=1), blocks=1)
    expected = reference(spec, data)
    with pytest.raises((KernelError, AssertionError), match=message):
        in_orders(source, buffers, expected)


@emulated
@pytest.mark.parametrize(
    ("kind", "image", "box"),
    [
        *[("half", 0, 64), ("half", 64, 64), ("half", 96, 32), ("half", 48, 16), ("half", 24, 8)],
        *[("signed char", 0, 64), ("signed char", 64, 64), ("signed char", 96, 32), ("signed char", 48, 16)],
    ],
)
def test_no_two_threads_meet_at_a_bank_on_the_way_to_dst(kind: str, image: int, box: int) -> None:
    """Of a matrix, whose eight rows of 16 bytes are moved at once; of a warp's bytes, or pairs where they are two
    channels'.
    """
    function, count, step = ("matrix", 2, 1) if kind == "half" else ("value", 16, 1) if image else ("value", 8, 2)
    text = f"""#include "device.h"
extern "C" __global__ void __launch_bounds__(128)
places(const float* __restrict__ src, float* __restrict__ dst) {{
  for (int i = 0; i < {count}; ++i)
    dst[(threadIdx.y * 32 + threadIdx.x) * {count} + i] = cg_staged<{kind}, 32, {image}, {box}>::{function}(i * {step});
}}
"""
    source = DeviceSource(text, (Launch("places", (1, 1, 1), (32, 4, 1), 1024, ("src", "dst")),))
    found = run(source, {"src": np.zeros(1, np.float32), "dst": np.zeros((4, 32, count), np.float32)}).astype(int)
    assert len(np.unique(found)) == found.size
    for moved in found.transpose(0, 2, 1).reshape(-1, 8 if kind == "half" else 32):
        words = {place // 4 + i for place in moved for i in range(4 if kind == "half" else 1)}
        assert len({word % 32 for word in words}) == len(words)


#: A block of two warps each: what they do, and what the emulator says.
PARTIAL = {
    "a barrier of one warp orders no other": (
        "if (w) cg_sync<32>(1); if (w == 0) x[0] = 1; else dst[t] = x[0];",
        "no barrier",
    ),
    "warps at barriers of different numbers": ("cg_sync<64>(w ? 2 : 3);", "do not all come"),
    "a barrier that some leave out": ("if (w == 0) cg_sync<64>(1);", "do not all come"),
    "one arrival too many": (
        "if (!w && !t) { cg_barrier_expect(bar, 8); cg_barrier_expect(bar, 8); cg_barrier_arrive(bar); }",
        "no more are to arrive",
    ),
}


def two_warps(body: str) -> DeviceSource:
    text = f"""#include "device.h"
extern "C" __global__ void __launch_bounds__(64)
both(const float* __restrict__ src, float* __restrict__ dst) {{
  extern __shared__ __align__(1024) uchar memory[];
  float* x = (float*)memory;
  uint64_t* bar = (uint64_t*)(memory + 512);
  const int t = threadIdx.x, w = threadIdx.y;
  if (t == 0 && w == 0) cg_barrier_init(bar, 2), cg_barrier_init(bar + 1, 2);
  __syncthreads();
  {body}
}}
"""
    return DeviceSource(text, (Launch("both", (1, 1, 1), (32, 2, 1), 1024, ("src", "dst")),))


@emulated
@pytest.mark.parametrize("name", PARTIAL)
def test_what_only_some_threads_wait_for_orders_no_others(name: str) -> None:
    body, message = PARTIAL[name]
    with pytest.raises(KernelError, match=message):
        in_orders(two_warps(body), {"src": np.zeros(64, np.float32), "dst": np.zeros(64, np.float32)})


#: A cluster of two blocks of a warp each: what they do, and what the emulator says.
TOGETHER = {
    "another block's memory": ("x[r ? -256 : 256] = 1;", "shared memory of another block"),
    "a barrier that the other has not made": ("if (!t) cg_barrier_arrive_at(bar + 1, !r);", "was initialised"),
    "no such block": ("cg_barrier_arrive_at(bar, 2);", "block 2 of a cluster of 2"),
    "a barrier of the cluster that a block leaves out": ("if (r) cg_cluster_sync();", "ends without"),
    "what the other sent, too early": (
        "cg_put_at(x + 4 * t, !r, w); dst[t] = x[0]; cg_cluster_sync();",
        "no barrier between",
    ),
    "__syncthreads for the cluster's barrier": (
        "cg_put_at(x + 4 * t, !r, w); __syncthreads(); dst[t] = x[0]; cg_cluster_sync();",
        "no barrier between",
    ),
}


def two_blocks(body: str) -> DeviceSource:
    text = f"""#include "device.h"
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(32)
both(const float* __restrict__ src, float* __restrict__ dst) {{
  extern __shared__ __align__(1024) uchar memory[];
  float* x = (float*)memory;
  uint64_t* bar = (uint64_t*)(memory + 768);
  const int t = threadIdx.x, r = blockIdx.x;
  __align__(16) float w[4] = {{1.0f * t, 2, 3, 4}};
  if (t == 0) cg_barrier_init(bar, 2);
  cg_cluster_sync();
  {body}
}}
"""
    return DeviceSource(text, (Launch("both", (2, 1, 1), (32, 1, 1), 1024, ("src", "dst")),))


@emulated
@pytest.mark.parametrize("name", TOGETHER)
def test_what_blocks_of_a_cluster_may_not(name: str) -> None:
    body, message = TOGETHER[name]
    with pytest.raises(KernelError, match=message):
        in_orders(two_blocks(body), {"src": np.zeros(64, np.float32), "dst": np.zeros(64, np.float32)})


@emulated
def test_blocks_of_a_cluster_send_and_wait() -> None:
    body = "cg_put_at(x + 4 * t, !r, w); cg_cluster_sync(); dst[32 * r + t] = x[4 * t] + 100 * r;"
    out = run(two_blocks(body), {"src": np.zeros(64, np.float32), "dst": np.zeros(64, np.float32)}, order=1)
    np.testing.assert_array_equal(out, np.concatenate([np.arange(32), np.arange(32) + 100]))


@emulated
@pytest.mark.parametrize("order", [1, 2, 3])
def test_arrivals_order_what_came_before_them(order: int) -> None:
    """A warp writes and arrives, the other waits and reads; and back again."""
    body = """
  if (w == 0) {
    x[t] = t;
    __syncwarp();
    if (t < 2) cg_barrier_arrive(bar);
    cg_barrier_wait(bar + 1, 0);
    dst[t] = x[t];
  } else {
    cg_barrier_wait(bar, 0);
    x[t] = x[t] + 1;
    __syncwarp();
    if (t < 2) cg_barrier_arrive(bar + 1);
    dst[32 + t] = 0;
  }"""
    out = run(two_warps(body), {"src": np.zeros(64, np.float32), "dst": np.zeros(64, np.float32)}, order=order)
    np.testing.assert_array_equal(out, np.concatenate([np.arange(32) + 1, np.zeros(32)]))


#: The shapes that a block's tile may have with all registers.
LARGE = [picks(tile_m=128, tile_n=256, warps_m=8, stages=4), picks(tile_m=256, tile_n=128, warps_m=8, stages=4)]
LARGE += [picks(tile_m=128, tile_n=96, warps_m=8, stages=3, resident=2)]
LARGE += [picks(tile_m=128, tile_n=256, warps_m=8, stages=4, cluster=2, bulk_store=1)]
LARGE += [picks(tile_m=128, tile_n=128, warps_m=8, stages=4, cluster_k=4, bulk_store=1)]
LARGE += [picks(tile_m=128, tile_n=96, warps_m=8, stages=2, resident=2, bulk_store=1)]
NAMES = ["128 x 256", "256 x 128", "two blocks of 128 x 96", "128 x 256 in clusters", "128 x 128 of four blocks"]
NAMES += ["two blocks of 128 x 96 that send"]


@pytest.mark.parametrize("chosen", LARGE, ids=NAMES)
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_the_instructions_are_there_and_nothing_spills(chosen: Picks, layout: str) -> None:
    spec = ConvSpec.parse(f"conv2d n16 ic256 oc256 i28x28 k3x3 s1 p1 relu residual {layout} f16")
    assert SCHEDULE.reason_against(spec.core, TARGET, chosen) is None
    source = generate(lower(spec, TARGET, Candidate(SCHEDULE, chosen)))
    images, (*_, used) = code.compile_images(source, TARGET)
    assert not used.spilled
    assert used.shared <= SCHEDULE.shared_memory(spec.core, chosen)  # type: ignore[attr-defined]
    assert used.threads == 384
    log = code.compiled(source.text, "sm_90a")[2]
    assert "serialized" not in log
    assert "setmaxnreg ignored" not in log
    sass = code.disassembled(images[0][1])
    columns = min(256, chosen.tile_n)
    for instruction in ("UTMALDG.4D.IM2COL", "UTMALDG.2D", f"HGMMA.64x{columns}x16.F32", "USETMAXREG"):
        assert instruction in sass
    assert ("UTMALDG.2D.MULTICAST" in sass) == (chosen.cluster > 1)
    axes, transposed = ("4D", "T") if layout == "nchw" else ("3D", "")
    for instruction in (
        f"UTMASTG.{axes}",
        f"UTMALDG.{axes} ",
        f"STSM.16.M{transposed}88.4",
        f"LDSM.16.M{transposed}88.4",
    ):
        assert (instruction in sass) == bool(chosen.bulk_store), instruction
    assert not re.search(r"\bLDL\b|\bSTL\b", sass)


def test_picks_are_refused_that_do_not_fit() -> None:
    spec = ConvSpec.parse("conv2d n16 ic256 oc256 i28x28 k3x3 s1 p1 nhwc f16").core
    reasons = {
        "sums of a thread": picks(tile_m=256, tile_n=256, warps_m=8),
        "whole times 64 pixels": picks(tile_m=64, warps_m=8),
        "bytes of shared memory": picks(tile_m=128, tile_n=256, warps_m=8, stages=6),
        "registers of a thread": picks(tile_m=128, tile_n=192, warps_m=8, stages=2, resident=2),
        "shares weights or a reduction": picks(cluster=2, cluster_k=2),
        "threads store the parts": picks(split_k=2, bulk_store=1),
    }
    for why, chosen in reasons.items():
        assert re.search(why, SCHEDULE.reason_against(spec, TARGET, chosen) or ""), why
    few = SCHEDULE.reason_against(ConvSpec.parse(TILES).core, TARGET, picks(stages=6))
    assert "no more than 5 steps" in (few or "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("conv2d n16 ic256 oc256 i28x28 k3x3 s1 p1 f16", None),
        ("conv2d n16 ic256 oc33 i28x28 k3x3 s1 p1 residual f16", None),
        ("conv2d n16 ic256 oc256 i14x14 k3x3 s1 p1 f16", "whole 16 bytes of an image's pixels, there are 392"),
        ("conv2d n16 ic256 oc256 i14x14 k3x3 s1 p1 i8", "whole 16 bytes of an image's pixels, there are 196"),
        ("conv2d n16 ic256 oc260 i28x28 k3x3 s1 p1 nhwc f16", "whole 16 bytes of a group's channels, there are 520"),
        ("conv2d n16 ic256 oc72 g2 i28x28 k3x3 s1 p1 nhwc f16", "whole 16 bytes of a group's channels, there are 72"),
        ("conv2d n16 ic256 oc48 g3 i28x28 k3x3 s1 p1 nhwc f16", None),
    ],
)
def test_the_copy_engine_stores_whole_vectors(text: str, why: str | None) -> None:
    spec = ConvSpec.parse(text.replace("ic256", "ic192") if "g3" in text else text).core
    chosen = picks(tile_n=32, tile_k=128 // BYTES[spec.dtype], bulk_store=1)
    found = SCHEDULE.reason_against(spec, TARGET, chosen)
    assert (why in (found or "")) if why else found is None


@pytest.mark.parametrize(
    "text",
    [
        "conv2d n1 ic512 oc512 i7x7 k3x3 s1 p1 relu nhwc f16",
        "conv2d n64 ic64 oc256 i56x56 k1x1 s1 residual relu nhwc f16",
    ],
)
def test_no_plain_point_is_predicted_to_be_faster(text: str) -> None:
    spec = ConvSpec.parse(text).core
    seconds: Any = SCHEDULE.seconds  # type: ignore[attr-defined]
    default, plain = SCHEDULE.default(spec, TARGET), list(SCHEDULE.plain_points(spec, TARGET))
    assert len(plain) >= 3
    assert seconds(spec, TARGET, default) <= min(seconds(spec, TARGET, point) for point in plain)
