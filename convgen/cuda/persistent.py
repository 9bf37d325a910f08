"""Kernels whose blocks take one tile after another.

TVM generates what becomes of a piece of a tile, as a kernel whose blocks, of one warpgroup, have a piece each: the
sums, which it does not know how to compute, pass through shared memory to dst. Here its body becomes the end of a
loop over tiles; ``cg_persistent`` of hopper.h fetches, multiplies and says which piece is which.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ..errors import BuildError
from ..lowering.interface import Launch, Persistent

#: Threads of a warpgroup.
WARPGROUP = 128
_KERNEL = re.compile(
    r'(?P<before>.*)extern "C" __global__ void __launch_bounds__\([\d, ]*\) (?P<head>\w+\([^)]*\)) \{\n'
    r"  extern __shared__ (?P<align>__align__\(\d+\)) (?P<kind>\w+) (?P<memory>\w+)\[\];\n"
    r"  (?P<sum>float|int) (?P<sums>\w+)\[\d+\];\n"
    r"  cg_piece_sums\(\(&\((?P=sums)\[0\]\)\), (?P<src>\w+), (?P<weights>\w+)\);\n"
    r"(?P<body>.*?)\n\}\n(?P<after>.*)",
    re.DOTALL,
)
#: What a thread of a piece's block is there, and what it is here.
_WORDS = (
    ("((int)blockIdx.x)", "block"),
    ("((int)threadIdx.y)", "(((int)threadIdx.y) & 3)"),
    ("__syncthreads()", "tiles.sync()"),
)


def persistent(text: str, launch: Launch, made: Persistent, cores: int) -> tuple[str, Launch]:
    """The text and the launch, whose blocks have a piece each, as those of a persistent kernel.

    Args:
        text: CUDA source, with ``cg_piece_sums`` in the launch's kernel.
        cores: of the device; so many blocks, times those that a core holds, take all tiles. On a device with others
            the kernel is as right.

    Raises:
        BuildError: the kernel is not as TVM is expected to generate it.
    """
    start = text.rindex('extern "C" __global__', 0, text.index(f" {launch.function}("))
    found = _KERNEL.fullmatch(text[start:])
    if found is None or launch.block != (32, 4, 1):
        raise BuildError(f"expected {launch.function} to compute pieces of tiles, found {text[start:]!r}")
    body = found["body"]
    for word, here in _WORDS:
        body = body.replace(word, here)
    memory, sums, piece = found["memory"], found["sums"], launch.shared
    threads = (made.warpgroups + 1) * WARPGROUP
    kernel = f"""\
extern "C" __global__ void __launch_bounds__({threads}, {made.resident}) {found["head"]} {{
  extern __shared__ {found["align"]} uchar tile_memory[];
  using Tiles = {made.type};
  Tiles tiles(tile_memory + {made.warpgroups * piece}, {found["src"]}, {found["weights"]});
  if (tiles.fetches())
    return;
  {found["kind"]}* const {memory} = ({found["kind"]}*)(tile_memory + tiles.group * {piece});
  {found["sum"]} all_sums[Tiles::PIECES * {made.piece_sums}];
  while (tiles.take()) {{
    tiles.multiply(all_sums);
#pragma unroll
    for (int piece = 0; piece < Tiles::PIECES; ++piece) {{
      const int block = tiles.block(piece);
      {found["sum"]}* const {sums} = all_sums + piece * {made.piece_sums};
{body}
      tiles.sync();
    }}
  }}
}}
"""
    shared = made.warpgroups * piece + made.operands
    grid = min(made.tiles, cores * made.resident)
    changed = replace(launch, grid=(grid, 1, 1), block=(32, threads // 32, 1), shared=shared)
    return text[:start] + found["before"] + kernel + found["after"], changed
