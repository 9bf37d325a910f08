"""The emulator and device.h against layouts that others published: swizzled rows, and who holds which sums.

Sources, quoted as data: PTX ISA 8.8, "Swizzling Modes" (the tables of 16-byte chunks) and "Multiply-and-Accumulate
Operation using wgmma"; CUTLASS 3, ``include/cute/atom/mma_traits_sm90_gmma.hpp`` (BSD-3): ``Layout_K_SW128_Atom_Bits``
and ``CLayout_64xN``, as shapes and strides.
"""

from __future__ import annotations

import shutil
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from convgen.check.emulation.emulate import run
from convgen.cuda.code import DeviceSource
from convgen.lowering.interface import Launch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to emulate")

#: PTX ISA, "Swizzling Modes": chunks of 16 bytes in rows of 128 bytes, until the pattern repeats.
TABLES = {
    32: ["01234567", "10325476"],
    64: ["01234567", "10325476", "23016745", "32107654"],
    128: ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"],
}
#: cute::Swizzle<bits, base, shift> of each mode.
SWIZZLES = {32: (1, 4, 3), 64: (2, 4, 3), 128: (3, 4, 3)}


@pytest.mark.parametrize("mode", TABLES)
def test_chunks_trade_places_as_the_tables_say(mode: int) -> None:
    table = TABLES[mode]
    text = f"""#include "device.h"
extern "C" __global__ void __launch_bounds__(32)
chunks(const float* __restrict__ src, float* __restrict__ dst) {{
  extern __shared__ __align__(1024) uchar rows[];
  for (int i = threadIdx.x; i < 64; i += 32) dst[i] = (i * 16 + cg_swizzle(rows + i * 16, {mode})) / 16;
}}
"""
    source = DeviceSource(text, (Launch("chunks", (1, 1, 1), (32, 1, 1), 1024, ("src", "dst")),))
    found = run(source, {"src": np.zeros(1, np.float32), "dst": np.zeros(64, np.float32)})
    expected = [row * 8 + int(chunk) for row in range(8) for chunk in table[row % len(table)]]
    np.testing.assert_array_equal(found, expected)
    bits, base, shift = SWIZZLES[mode]
    for chunk in range(64):  # cute: these bits of the address are changed by those `shift` further up
        address = chunk << base
        assert address ^ (address >> shift & ((1 << bits) - 1) << base) == expected[chunk] << base


@pytest.mark.parametrize(("kind", "stored"), [("f16", np.float16), ("i8", np.int8)])
def test_a_warpgroup_reads_and_keeps_what_cute_says(kind: str, stored: type) -> None:
    """Operands placed by cute's layout of K-major tiles; sums read by its layout of accumulators."""
    columns, depth = 24, 128 // np.dtype(stored).itemsize
    rng = np.random.default_rng(0)
    both: npt.NDArray[Any] = rng.integers(-4, 5, (64 + columns, depth)).astype(stored)
    a, b = both[:64], both[64:]
    tiles = both.reshape(-1).view(np.uint8)
    at = np.arange(tiles.size)
    placed = np.empty_like(tiles)
    placed[at ^ (at >> 3 & 7 << 4)] = tiles  # Swizzle<3, 4, 3> of rows of 128 bytes, 8 at a time
    sums = "int" if kind == "i8" else "float"
    text = f"""#include "device.h"
extern "C" __global__ void __launch_bounds__(128)
sums(const float* __restrict__ src, float* __restrict__ dst) {{
  extern __shared__ __align__(1024) uchar tiles[];
  const int t = threadIdx.y * 32 + threadIdx.x;
  for (int i = t; i < {tiles.size // 4}; i += 128) ((float*)tiles)[i] = src[i];
  __syncthreads();
  {sums} acc[{columns // 2}];
  cg_clear_tile<16, {columns}>(acc);
  cg_wgmma_tile<cg_{kind}, {columns}>(acc, tiles + threadIdx.y * (16 * 128), 128, tiles + 64 * 128, 128);
  for (int i = 0; i < {columns // 2}; ++i) dst[t * {columns // 2} + i] = acc[i];
}}
"""
    source = DeviceSource(text, (Launch("sums", (1, 1, 1), (32, 4, 1), tiles.size, ("src", "dst")),))
    found = run(source, {"src": placed.view(np.float32), "dst": np.zeros(64 * columns, np.float32)}, order=3)
    expected, exact = np.zeros_like(found), a.astype(np.int64) @ b.astype(np.int64).T
    # CLayout_64xN: thread (4, 8, 4) : (128, 1, 16), value (2, 2, N / 8) : (64, 8, 512), of a matrix by columns.
    for t0, t1, t2, v0, v1, v2 in product(range(4), range(8), range(4), range(2), range(2), range(columns // 8)):
        thread, value = t0 + 4 * t1 + 32 * t2, v0 + 2 * v1 + 4 * v2
        column, row = divmod(t0 * 128 + t1 + t2 * 16 + v0 * 64 + v1 * 8 + v2 * 512, 64)
        expected[thread * (columns // 2) + value] = exact[row, column]
    np.testing.assert_array_equal(found, expected)
