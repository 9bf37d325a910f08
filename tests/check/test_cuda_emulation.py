"""CUDA kernels run on the CPU: what warps compute, faults that must be found, generated kernels."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulated import ORDERS, packed

from convgen.check.bounds import reference
from convgen.check.data import exact_data
from convgen.check.emulation.emulate import compile_emulated, emulated_driver, run
from convgen.cuda.code import HEADERS, DeviceSource, generate
from convgen.errors import BuildError, KernelError
from convgen.hardware.target import resolve
from convgen.lowering.discover import schedules_of
from convgen.lowering.interface import Launch
from convgen.lowering.lower import lower
from convgen.lowering.runtime import source as runtime_source
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import ConvSpec

COMPILER = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]
pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")


def kernel(body: str, shared: int = 0, threads: int = 64, grid: int = 1) -> DeviceSource:
    """A kernel of ``src`` and ``dst``, both f32."""
    text = f"""#include "device.h"
extern "C" __global__ void __launch_bounds__({threads})
main_kernel(const float* __restrict__ src, float* __restrict__ dst) {{
  int t = threadIdx.x;
  {body}
}}
"""
    return DeviceSource(text, (Launch("main_kernel", (grid, 1, 1), (threads, 1, 1), shared, ("src", "dst")),))


def result(
    source: DeviceSource, src: Any, shape: tuple[int, ...], order: str | int = "ascending", **options: Any
) -> Any:
    return run(source, {"src": src, "dst": np.empty(shape, np.float32)}, order=order, **options)


def whole_numbers(*shape: int) -> Any:
    return np.random.default_rng(0).integers(-8, 9, shape).astype(np.float32)


# ---- what warps compute ------------------------------------------------------------------------

STORED = {
    "cg_f16": np.float16,
    "cg_bf16": ml_dtypes.bfloat16,
    "cg_tf32": np.float32,
    "cg_tf32x3": np.float32,
    "cg_i8": np.int8,
}


def product(kind: str, a: Any, b: Any, order: str | int = "ascending") -> Any:
    """``a b^T`` by one warp through ``cg_mma_tile``; rows in shared memory are swizzled."""
    (rows, depth), cols = a.shape, len(b)
    stored = np.dtype(STORED[kind])
    pitch, sums = depth * stored.itemsize, "int" if kind == "cg_i8" else "float"
    plain = np.concatenate([a, b]).astype(stored).view(np.uint8)
    at = np.arange(plain.size)
    placed = plain.reshape(-1)[at ^ (at >> 3 & (pitch - 16))].reshape(plain.shape)
    body = f"""
  extern __shared__ __align__(64) uchar tile[];
  for (int i = t; i < {placed.size // 4}; i += 32) ((float*)tile)[i] = src[i];
  __syncwarp();
  {sums} acc[{rows * cols // 32}];
  cg_clear_tile<{rows}, {cols}>(acc);
  for (int k = 0; k < {depth * stored.itemsize}; k += 32)
    cg_mma_tile<{kind}, {rows}, {cols}>(acc, tile + k, {pitch}, tile + {rows * pitch} + k, {pitch});
  cg_store_tile<{rows}, {cols}>(dst, {cols}, acc);"""
    source = kernel(body, shared=placed.size, threads=32)
    found = result(source, placed.reshape(-1).view(np.float32), (rows, cols), order)
    return found.view(np.int32) if kind == "cg_i8" else found


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize(("rows", "cols"), [(16, 8), (16, 16), (32, 24), (64, 40)])
@pytest.mark.parametrize("row", [32, 64, 128])
def test_products_of_whole_numbers_are_exact(kind: str, rows: int, cols: int, row: int) -> None:
    both = whole_numbers(rows + cols, row // np.dtype(STORED[kind]).itemsize)
    a, b = both[:rows], both[rows:]
    np.testing.assert_array_equal(product(kind, a, b, order=1), a @ b.T)


@pytest.mark.parametrize("row", [32, 64, 128])
def test_swizzled_rows_meet_no_bank_twice(row: int) -> None:
    """What is copied or read of shared memory at once, 8 chunks of 16 bytes, takes each of the 32 banks once."""
    body = f"""
  extern __shared__ __align__(1024) uchar rows[];
  for (int i = t; i < {4 * row}; i += 64) {{
    const uchar* chunk = rows + i * 16;
    dst[i] = cg_shared_address(chunk + cg_swizzle(chunk, {row}));
  }}"""  # 64 rows
    size = 64 * row
    at = result(kernel(body, shared=size), whole_numbers(1), (64, row // 16)).astype(int)
    assert sorted(at.reshape(-1)) == list(range(0, size, 16))
    assert (at // 128 == np.arange(0, size, 16).reshape(at.shape) // 128).all()
    copies = at.reshape(-1, 8)  # of 8 threads that follow one another
    matrices = at.reshape(8, 8, -1).transpose(0, 2, 1).reshape(-1, 8)  # a chunk of each of 8 rows
    for chunks in (copies, matrices):
        assert (np.sort(chunks % 128) == np.arange(0, 128, 16)).all()


def test_three_products_of_tf32_are_nearly_f32() -> None:
    rng = np.random.default_rng(0)
    a, b = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
    a[:, 3], b[:, 3] = rng.uniform(1, 2, 16), rng.uniform(1, 2, 8)  # of one term each: no sum is rounded
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    once, thrice = (np.max(np.abs(product(kind, a, b) / exact - 1)) for kind in ("cg_tf32", "cg_tf32x3"))
    assert once > 2.0**-13
    assert thrice < 2.0**-21


#: Lane, register, half -> row and column, of A and of B: read off the figures in PTX ISA 8.8.
FRAGMENTS = {
    "f16": {
        "a": {(0, 0, 0): (0, 0), (0, 1, 1): (8, 1), (0, 2, 0): (0, 8), (5, 3, 1): (9, 11), (31, 0, 0): (7, 6)},
        "b": {(0, 0, 1): (1, 0), (0, 1, 0): (8, 0), (5, 0, 0): (2, 1), (31, 1, 1): (15, 7)},
    },
    "tf32": {
        "a": {(0, 0, 0): (0, 0), (0, 1, 0): (8, 0), (0, 2, 0): (0, 4), (5, 3, 0): (9, 5), (31, 3, 0): (15, 7)},
        "b": {(0, 0, 0): (0, 0), (0, 1, 0): (4, 0), (5, 0, 0): (1, 1), (31, 1, 0): (7, 7)},
    },
}


@pytest.mark.parametrize("kind", FRAGMENTS)
def test_fragments_are_where_the_isa_says(kind: str, tmp_path: Path) -> None:
    """Products of one element of A and one of B: where the sum appears, and which pairs meet."""
    stored, halves = (np.float16, 2) if kind == "f16" else (np.float32, 1)
    body = f"""
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(src[t * 6 + i]);
  for (int i = 0; i < 2; ++i) b[i] = __float_as_uint(src[t * 6 + 4 + i]);
  float d[4] = {{0, 0, 0, 0}};
  cg_mma_{kind}(d, a, b);
  cg_store_tile<16, 8>(dst, 8, d);"""
    source, found = kernel(body, threads=32), 0
    library = compile_emulated(source.text, tmp_path)
    for (lane, register, half), (row, k) in FRAGMENTS[kind]["a"].items():
        for (lane_b, register_b, half_b), (k_b, column) in FRAGMENTS[kind]["b"].items():
            registers = np.zeros((32, 6, halves), stored)
            registers[lane, register, half] = 3
            registers[lane_b, 4 + register_b, half_b] = 5
            expected = np.zeros((16, 8), np.float32)
            expected[row, column] = 15 * (k == k_b)
            found += k == k_b
            out = result(source, registers.reshape(-1).view(np.float32), (16, 8), library=library)
            np.testing.assert_array_equal(out, expected)
    assert found


def test_rows_of_matrices_go_to_lanes() -> None:
    body = """
  __shared__ ushort rows[32][8];
  for (int i = 0; i < 8; ++i) rows[t][i] = t * 8 + i;
  __syncwarp();
  uint32_t four[4], two[2];
  cg_ldmatrix(four, rows[t]);
  cg_ldmatrix(two, rows[t % 16]);
  for (int i = 0; i < 4; ++i) dst[t * 6 + i] = (four[i] & 0xffff) * 1000.0f + (four[i] >> 16);
  for (int i = 0; i < 2; ++i) dst[t * 6 + 4 + i] = (two[i] & 0xffff) * 1000.0f + (two[i] >> 16);"""
    lanes, matrix = np.arange(32)[:, None], np.array([0, 1, 2, 3, 0, 1])
    low = matrix * 64 + lanes // 4 * 8 + lanes % 4 * 2
    np.testing.assert_array_equal(result(kernel(body, threads=32), whole_numbers(1), (32, 6), 1), low * 1000 + low + 1)


def test_rows_of_transposed_matrices_go_to_lanes() -> None:
    """PTX ISA, "ldmatrix", ``.trans``: a lane has elements of one column, of two rows."""
    body = """
  __shared__ ushort rows[32][8];
  for (int i = 0; i < 8; ++i) rows[t][i] = t * 8 + i;
  __syncwarp();
  uint32_t four[4], two[2];
  cg_ldmatrix_trans(four, rows[t]);
  cg_ldmatrix_trans(two, rows[t % 16]);
  for (int i = 0; i < 4; ++i) dst[t * 6 + i] = (four[i] & 0xffff) * 1000.0f + (four[i] >> 16);
  for (int i = 0; i < 2; ++i) dst[t * 6 + 4 + i] = (two[i] & 0xffff) * 1000.0f + (two[i] >> 16);"""
    lanes, matrix = np.arange(32)[:, None], np.array([0, 1, 2, 3, 0, 1])
    low = matrix * 64 + lanes % 4 * 2 * 8 + lanes // 4
    np.testing.assert_array_equal(result(kernel(body, threads=32), whole_numbers(1), (32, 6), 1), low * 1000 + low + 8)


def test_shuffles() -> None:
    body = """
  float x = t, sum = x;
  for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(~0u, sum, i);
  dst[t] = sum;
  dst[32 + t] = __shfl_down_sync(~0u, x, 3);
  dst[64 + t] = __shfl_down_sync(~0u, x, 3, 8);
  dst[96 + t] = __shfl_up_sync(~0u, x, 1, 16);
  dst[128 + t] = __shfl_sync(~0u, x, 5, 8);
  dst[160 + t] = t < 4 ? __shfl_xor_sync(0xf, x, 1) : 0;"""
    t = np.arange(32)
    expected = np.array(
        [
            np.full(32, t.sum()),
            np.where(t + 3 < 32, t + 3, t),
            np.where(t % 8 + 3 < 8, t + 3, t),
            np.where(t % 16, t - 1, t),
            t // 8 * 8 + 5,
            np.where(t < 4, t ^ 1, 0),
        ]
    )
    np.testing.assert_array_equal(result(kernel(body, threads=32), whole_numbers(1), (6, 32), 1), expected)


def test_conversions_round_as_the_isa_says() -> None:
    src = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    src[:8] = 1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 65520, 2.0**-25, -np.inf
    body = """
  dst[t] = half(src[t]);
  dst[64 + t] = nv_bfloat16(src[t]);
  dst[128 + t] = __uint_as_float(cg_to_tf32(__float_as_uint(src[t])));"""
    f16, bf16, tf32 = result(kernel(body), src, (3, 64))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(f16, src.astype(np.float16))
    np.testing.assert_array_equal(bf16, src.astype(ml_dtypes.bfloat16))
    fraction, exponent = np.frexp(src.astype(np.float64))
    away = np.sign(fraction) * np.floor(np.abs(fraction) * 2**11 + 0.5)
    np.testing.assert_array_equal(tf32[:-1], np.ldexp(away, exponent - 11)[:-1])
    assert tf32[7] == -np.inf


def test_extrema_ignore_nan() -> None:
    src = np.array([np.nan, 1, -1, 0] * 16, np.float32)
    out = result(kernel("dst[t] = max(src[t], 0.0f); dst[64 + t] = min(src[t], 0.0f);"), src, (2, 64))
    np.testing.assert_array_equal(out[:, :4], [[0, 1, 0, 0], [0, 0, -1, 0]])


def test_asynchronous_copies() -> None:
    """Two groups, one of them zeros."""
    body = """
  extern __shared__ __align__(64) uchar memory[];
  float* x = (float*)memory;
  cg_copy_async<4>(x + t, src + t); cg_commit();
  cg_copy_async<4>(x + 64 + t, src + t, t % 2 == 0); cg_commit();
  cg_wait<1>(); __syncthreads();
  dst[t] = x[63 - t];
  cg_wait<0>(); __syncthreads();
  dst[64 + t] = x[64 + 63 - t];"""
    src = whole_numbers(64) + 20
    for order in ORDERS:
        out = result(kernel(body, shared=512), src, (2, 64), order)
        np.testing.assert_array_equal(out, [src[::-1], np.where(np.arange(64) % 2, 0, src)[::-1]])


def test_shared_and_private_memory_begin_as_no_sensible_number() -> None:
    out = result(kernel("__shared__ float x[64]; float y[64]; dst[t] = x[t]; dst[64 + t] = y[int(src[t])];"),
                 np.arange(64, dtype=np.float32), (2, 64))  # fmt: skip
    assert np.isnan(out[0]).all()
    assert (np.abs(out[1]) > 1e30).all()


# ---- faults ------------------------------------------------------------------------------------

REVERSE = "__shared__ float x[64]; x[t] = src[t]; %s dst[t] = x[63 - t];"
REVERSE_WARP = "__shared__ float x[32]; x[t] = src[t]; %s dst[t] = x[31 - t];"
COPY = """
  extern __shared__ __align__(64) uchar memory[];
  float* x = (float*)memory;
  cg_copy_async<16>(x + t * 4, src + t * 4); cg_commit();
  %s
  dst[t] = x[255 - t * 4];"""
RING = """
  __shared__ float x[64];
  for (int i = 0; i < 3; ++i) { x[t] = src[t] + i; __syncthreads(); dst[t] = x[63 - t]; %s }"""

RIGHT = {
    "barrier": kernel(REVERSE % "__syncthreads();"),
    "barrier of a warp": kernel(REVERSE_WARP % "__syncwarp();", threads=32),
    "copy": kernel(COPY % "cg_wait<0>(); __syncthreads();", shared=1024),
    "ring": kernel(RING % "__syncthreads();"),
    "two store the same": kernel("__shared__ float x[2]; x[t % 2] = src[t % 2]; __syncthreads(); dst[t] = x[t % 2];"),
}
WRONG = {
    "no barrier": (kernel(REVERSE % ""), "with no barrier between"),
    "no barrier of a warp": (kernel(REVERSE_WARP % "", threads=32), "no barrier"),
    "a shuffle is no barrier": (
        kernel(REVERSE_WARP % "__shfl_sync(~0u, t, 0);", threads=32),
        "no barrier",
    ),
    "stored again while others read": (kernel(RING % ""), "with no barrier between"),
    "two store what differs": (
        kernel("__shared__ float x[2]; x[t % 2] = src[t]; __syncthreads(); dst[t] = x[t % 2];"),
        "other than thread",
    ),
    "no wait": (kernel(COPY % "__syncthreads();", shared=1024), "a copy from .* is under way"),
    "a group too few waited for": (kernel(COPY % "cg_wait<1>(); __syncthreads();", shared=1024), "is under way"),
    "no commit": (
        kernel((COPY % "cg_wait<0>(); __syncthreads();").replace("cg_commit();", ""), shared=1024),
        "under way",
    ),
    "no barrier after the wait": (kernel(COPY % "cg_wait<0>();", shared=1024), "no barrier between|under way"),
    "two copies to one place": (
        kernel(COPY % "cg_copy_async<16>(x + t * 4, src); cg_commit(); cg_wait<0>(); __syncthreads();", shared=1024),
        "under way",
    ),
    "copy misaligned": (
        kernel((COPY % "cg_wait<0>(); __syncthreads();").replace("src + t * 4", "src + t * 4 + 1"), shared=1024),
        "expected multiples of 16",
    ),
    "vector misaligned": (kernel("*(float4*)(dst + t) = make_float4(0, 0, 0, 0);"), "expected a multiple of 16"),
    "ldmatrix misaligned": (
        kernel("__shared__ ushort x[300]; uint32_t r[2]; cg_ldmatrix(r, x + t % 16 * 8 + 1);", threads=32),
        "multiple of 16",
    ),
    "past dynamic shared memory": (
        kernel("extern __shared__ uchar x[]; ((float*)x)[t + (t > 62)] = src[t];", shared=256),
        "touches byte 256 of 256",
    ),
    "past a shared array": (
        kernel("__shared__ float x[64]; float* y = x; y[t + int(src[0]) - 99] = 1;"),
        "touches byte 256 of 256",
    ),
    "past an array by its index": (
        kernel("float x[4]; for (int i = 0; i < 4; ++i) x[i] = src[i]; dst[t] = x[t];"),
        "outside its array|outside its object",
    ),
    "past src": (kernel("dst[t] = src[t + 200];"), "which it may not"),
    "src stored to": (kernel("((float*)src)[t] = 1;"), "which it may not"),
    "lanes part": (kernel("if (t != 7) __syncwarp(); dst[t] = t;"), r"takes thread \(7, 0, 0\), which has ended"),
    "lanes part at a barrier": (
        kernel("if (t % 2) __syncthreads(); else dst[t] = __shfl_xor_sync(~0u, src[t], 2);"),
        "__shfl_xor_sync.*takes",
    ),
    "barrier not for all": (kernel("if (t < 32) __syncthreads(); dst[t] = t;"), r"barrier .* thread .* ends without"),
    "two barriers": (kernel("if (t < 32) __syncthreads();\n else __syncthreads();"), "does not wait at"),
    "warp too small": (
        kernel("uint32_t a[4] = {}; float d[4] = {}; cg_mma_f16(d, a, a);", threads=40),
        "takes 32 lanes",
    ),
    "tf32 not rounded": (
        kernel("uint32_t a[4] = {1, 1, 1, 1}; float d[4] = {}; cg_mma_tf32(d, a, a);", threads=32),
        "rounded to tf32",
    ),
    "a division by zero": (kernel("dst[t] = 100 / (int(src[t]) - 100);"), "divides by zero"),
    "the stack": (kernel("volatile float x[100000]; x[t] = 1; dst[t] = x[t];"), "which it may not"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_run_in_every_order(name: str, tmp_path: Path) -> None:
    source = RIGHT[name]
    threads = source.launches[0].block[0]
    library, src = compile_emulated(source.text, tmp_path), np.arange(256, dtype=np.float32)
    outs = [result(source, src, (threads,), order, library=library) for order in ORDERS]
    assert np.isfinite(outs).all()
    assert (outs == outs[0]).all()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_found_in_every_order(name: str, tmp_path: Path) -> None:
    source, message = WRONG[name]
    library, src = compile_emulated(source.text, tmp_path), np.arange(256, dtype=np.float32) + 100
    for order in ORDERS:
        with pytest.raises(KernelError, match=message) as error:
            result(source, src, (256,), order, library=library)
        assert re.match(r"main_kernel: block \(0, 0, 0\), thread \(\d+, 0, 0\): ", str(error.value))


def test_blocks_run_in_the_order_asked_for() -> None:
    source = kernel("if (t == 0) { float before = dst[0]; dst[0] = blockIdx.x; dst[1 + blockIdx.x] = before; }", grid=4)
    first = {order: result(source, whole_numbers(1), (5,), order)[0] for order in ORDERS}
    assert (first["ascending"], first["descending"]) == (3, 0)


def test_stores_past_the_end_are_found() -> None:
    with pytest.raises(KernelError, match="writes past the end of dst"):
        result(kernel("dst[t] = 1;"), whole_numbers(1), (63,))
    with pytest.raises(KernelError, match="touches address"):
        result(kernel("dst[t - 1] = 1;"), whole_numbers(1), (64,), guard="start")


def test_no_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="install g"):
        result(RIGHT["barrier"], whole_numbers(64), (64,))
    monkeypatch.undo()
    with pytest.raises(BuildError, match="nonsense"):
        result(kernel("nonsense"), whole_numbers(64), (64,))


# ---- generated kernels -------------------------------------------------------------------------

TARGET = resolve("cuda:sm_80")
LAYERS = {
    "cuda_gemm": [
        "conv2d n2 ic16 oc32 i7x6 k3x3 s1 p1 residual relu nhwc f16",
        "conv2d n1 ic64 oc64 i14x13 k3x3 s1 p1 nhwc relu f16",  # a reduction of several steps
        "conv2d n1 ic32 oc24 i8x8 k1x1 s1 p0 residual relu6 bf16",
        "convtranspose2d n1 ic16 oc16 i5x5 k4x4 s2 p1 relu nhwc f16",
    ],
    "cuda_gemm_tf32x3": ["conv2d n1 ic16 oc40 i9x7 k3x3 s2 p1 nhwc relu"],
    "cuda_gemm_merged": ["conv2d n1 ic32 oc32 g8 i9x7 k3x3 s1 p1 nhwc relu f16"],
    "cuda_direct": ["conv2d n1 ic3 oc17 i9x10 k3x3 s2 p0_1x1_0 relu", "conv2d n2 ic16 oc31 i7x6 k3x3 s1 p1 residual"],
    "cuda_depthwise": ["conv2d n1 ic16 oc16 g16 i6x5 k3x3 s1 p1 d1x2 nhwc residual relu bf16"],
    "cuda_grouped": ["conv2d n1 ic16 oc24 g2 i6x5 k3x3 s1 p1 d1x2 nhwc residual relu f16"],
    "cuda_transposed": ["convtranspose2d n1 ic5 oc6 i4x5 k3x3 s2 p1x0_1 op1x0"],
}


def generated(schedule: str, descriptor: str) -> tuple[ConvSpec, DeviceSource, dict[str, Any], Any]:
    """The default candidate's source, what it is called with but ``dst``, and what it should compute."""
    spec, found = ConvSpec.parse(descriptor), schedules_of("cuda")
    if schedule not in found:
        pytest.skip(f"no schedule {schedule}")
    lowered = lower(spec, TARGET, Candidate(found[schedule], found[schedule].default(spec.core, TARGET)))
    data = exact_data(spec)
    buffers = {"src": data["src"]} | {f"packed{i}": array for i, array in enumerate(packed(lowered, data))}
    if spec.residual:
        buffers["residual"] = data["residual"]
    return spec, generate(lowered), buffers, data


@pytest.mark.parametrize(("schedule", "descriptor"), [(s, d) for s, layers in LAYERS.items() for d in layers])
def test_generated_kernels_are_right_in_every_order(schedule: str, descriptor: str, tmp_path: Path) -> None:
    spec, source, buffers, data = generated(schedule, descriptor)
    library = compile_emulated(source.text, tmp_path)
    for order, guard in zip(ORDERS, ("end", "start", "end"), strict=True):
        dst = np.zeros(spec.dst_shape, data["src"].dtype)
        out = run(source, buffers | {"dst": dst}, order=order, library=library, guard=guard)
        np.testing.assert_array_equal(out, reference(spec, data))


#: 4 GiB of src, of which few pixels meet the one tap.
LARGE = "conv2d n1 ic8 oc16 i16384x8192 k1x1 s4096x4096 p0 nobias nhwc tf32"


def test_sources_may_have_more_bytes_than_32_bits_count(tmp_path: Path) -> None:
    """Elements are counted in 32 bits, and their bytes in 64."""
    spec = ConvSpec.parse(LARGE)
    schedule = schedules_of("cuda")["cuda_gemm"]
    lowered = lower(spec, TARGET, Candidate(schedule, schedule.default(spec.core, TARGET)))
    rng = np.random.default_rng(0)
    weights = rng.integers(-8, 9, spec.weights_shape).astype(np.float32)
    few = rng.integers(-8, 9, (4, 2, 8)).astype(np.float32)
    shape = tuple(spec.src_shape)
    src = np.memmap(tmp_path / "src", np.float32, "w+", shape=shape)
    src[0, ::4096, ::4096] = few
    src.flush()
    dst = np.zeros(spec.dst_shape, np.float32)
    source = generate(lowered)
    run(source, {"src": src, "packed0": packed(lowered, {"weights": weights})[0], "dst": dst})
    np.testing.assert_array_equal(dst[0], few @ weights[:, :, 0, 0].T)


@pytest.mark.parametrize(("pattern", "wrong"), [(r"__syncthreads\(\);", ""), (r"cg_wait<\d+>", "cg_wait<9>")])
def test_what_generated_kernels_wait_for_they_need(pattern: str, wrong: str) -> None:
    """Without one of their barriers or waits a fault is found.

    One barrier may be idle: TVM sets it before the sums are stored over a stage of the pipeline, which need not be
    the one that was read last.
    """
    spec, source, buffers, data = generated("cuda_gemm", LAYERS["cuda_gemm"][1])
    places, faults, idle = list(re.finditer(pattern, source.text)), [], []
    for place in places:
        text = source.text[: place.start()] + wrong + source.text[place.end() :]
        dst = np.zeros(spec.dst_shape, data["src"].dtype)
        try:
            run(DeviceSource(text, source.launches, source.workspace), buffers | {"dst": dst})
        except KernelError as error:
            faults.append(str(error))
        else:
            idle.append(place)
            np.testing.assert_array_equal(dst, reference(spec, data))
    assert len(places) >= 3
    assert len(idle) <= (wrong == "")
    assert all(re.search("no barrier between|under way", fault) for fault in faults)


# ---- the driver --------------------------------------------------------------------------------

CALLS = """
import sys
import numpy as np
import convgen.cuda.driver as cuda
from ctypes import byref, c_void_p, c_uint64

device = cuda.device()
print(device.name, device.capability)
call, src = cuda.driver(), np.arange(64, dtype=np.float32)
cu = __import__("ctypes").CDLL(sys.argv[1])
with cuda.context():
    a, b = cuda.Memory(src.nbytes), cuda.Memory(src.nbytes)
    a.upload(src)
    for library in sys.argv[2:]:
        module, function = c_void_p(), c_void_p()
        assert cu.cuModuleLoadData(byref(module), open(library, "rb").read()) == 0
        assert cu.cuModuleGetFunction(byref(function), module, b"other") == 500
        assert cu.cuModuleGetFunction(byref(function), module, b"main_kernel") == 0
        values = c_uint64(a.address), c_uint64(b.address)
        arguments = (c_void_p * 2)(*(__import__("ctypes").addressof(v) for v in values))
        assert cu.cuLaunchKernel(function, 1, 1, 1, 64, 1, 1, 49153, None, arguments, None) == 1
        assert cu.cuLaunchKernel(function, 1, 1, 1, 64, 1, 1, 0, None, arguments, None) == 0
        print(b.download().view(np.float32)[:3])
"""


def test_the_driver_launches_and_reports_faults(tmp_path: Path) -> None:
    driver = emulated_driver(tmp_path, capability=(9, 0))
    right = compile_emulated(RIGHT["barrier"].text, tmp_path)
    wrong = compile_emulated(WRONG["no barrier"][0].text, tmp_path)
    command = [sys.executable, "-c", CALLS, str(driver), str(right), str(wrong)]
    environment = os.environ | {"CONVGEN_CUDA_DRIVER": str(driver)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["Emulated sm_90 (9, 0)", "[63. 62. 61.]"]
    assert "with no barrier between" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("cuMemcpyDtoH_v2: the CUDA driver reported CUDA_ERROR_LAUNCH_FAILED")


BINDINGS = """
from cuda.bindings import driver
assert driver.cuInit(0)[0] == 0
(_, device), = [driver.cuDeviceGet(0)]
print(driver.cuDeviceGetName(16, device)[1].decode().rstrip("\\0 "))
error, context = driver.cuDevicePrimaryCtxRetain(device)
assert (error, *driver.cuCtxSetCurrent(context)) == (0, 0)
error, memory = driver.cuMemAlloc(64)
assert (error, *driver.cuMemFree(memory)) == (0, 0)
assert driver.cuMemFree(memory)[0] == 1
"""


def test_cuda_bindings_take_the_driver(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    emulated_driver(tmp_path)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BINDINGS], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("Emulated sm_80", 0), done.stderr


# ---- the device's compiler ---------------------------------------------------------------------

TILES = {
    "sm_70": (),
    "sm_75": ("cg_f16",),
    "sm_80": ("cg_f16", "cg_bf16", "cg_tf32", "cg_tf32x3", "cg_i8"),
    "sm_90a": ("cg_f16", "cg_bf16", "cg_tf32", "cg_tf32x3", "cg_i8"),
}


@pytest.mark.parametrize("arch", TILES)
def test_the_devices_compiler_takes_the_prelude(arch: str) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
    body = "extern __shared__ __align__(64) uchar x[]; float acc[12]; int sums[12]; dst[t] = half(src[t]);"
    for kind in TILES[arch]:
        acc = "sums" if kind == "cg_i8" else "acc"
        body += f"""
  cg_clear_tile<16, 24>({acc});
  cg_mma_tile<{kind}, 16, 24>({acc}, x, 64, x + 1024, 64);
  cg_store_tile<16, 24>(dst, 24, {acc});"""
    if "cg_bf16" in TILES[arch]:
        body += "cg_copy_async<16>(x, src); cg_copy_async<4>(x + 16, src, t < 3); cg_commit(); cg_wait<0>();"
    try:
        _, program = nvrtc.nvrtcCreateProgram(
            kernel(body).text.encode(),
            b"kernel.cu",
            len(HEADERS),
            [runtime_source(name).encode() for name in HEADERS],
            [name.encode() for name in HEADERS],
        )
    except RuntimeError as error:
        pytest.skip(f"needs NVRTC: {error}")
    options = [f"--gpu-architecture={arch}".encode(), b"-std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
