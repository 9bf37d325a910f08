"""Kernels whose blocks take one tile after another.

TVM generates what becomes of a piece of a tile, as a kernel whose blocks, of one warpgroup, have a piece each: of its
sums, which it does not know how to compute. Here its body becomes the end of a loop over tiles; ``cg_persistent`` of
hopper.h fetches, multiplies and says which piece is which. What it makes of the sums

- it stores in dst itself, having passed the sums through shared memory, or
- makes of those that a thread has in registers, and would store in order: it goes to shared memory then, from where
  the copy engine stores it in dst (``cg_stores``).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from ..errors import BuildError
from ..lowering.interface import Launch, Persistent, TensorMap
from .implicit import PIECE_ROWS

#: Threads of a warpgroup.
WARPGROUP = 128
#: Pieces of a warpgroup that have a place in shared memory on their way to dst: cg_stores'.
PLACES = 2
_KERNEL = re.compile(
    r'(?P<before>.*)extern "C" __global__ void __launch_bounds__\([\d, ]*\) (?P<head>\w+\([^)]*\)) \{\n'
    r"(?:  extern __shared__ __align__\(\d+\) (?P<kind>\w+) (?P<memory>\w+)\[\];\n)?"
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
_DST = re.compile(r"((?:signed )?\w+)\* __restrict__ (dst\w*)")
#: A kernel's shared memory is a multiple of this.
_ALIGNMENT = 1024


class _Pieces(NamedTuple):
    """What becomes of a warpgroup's pieces, as CUDA: what is declared before the loop over tiles, done before and after
    the body that TVM generated, and in the end; the kernel's head; and a warpgroup's bytes of shared memory.
    """

    declared: str
    before: str
    after: str
    end: str
    head: str
    shared: int


def _stored(found: re.Match[str], made: Persistent, shared: int) -> _Pieces:
    """The body stores them itself, through ``shared`` bytes."""
    kind, sums = found["kind"], found["sums"]
    declared = f"{kind}* const {found['memory']} = ({kind}*)(tile_memory + tiles.group * {shared});"
    before = f"{found['sum']}* const {sums} = all_sums + piece * {made.piece_sums};"
    return _Pieces(declared, before, "tiles.sync();", "", found["head"], shared)


def _sent(found: re.Match[str], made: Persistent, to: TensorMap) -> _Pieces:
    """The copy engine stores them, by a map of dst."""
    element, dst = _DST.findall(found["head"])[0]
    of = f"{2 * made.piece_sums}>"
    before = f"const cg_held<{found['sum']}, {of} {found['sums']} = {{all_sums + piece * {made.piece_sums}}};\n"
    return _Pieces(
        declared=f"cg_stores<{element}, {of} stores(tile_memory, dst_map);",
        before=f"{before}        const cg_staged<{element}, {of} {dst} = stores.begin();",
        after="stores.send(tiles.channel(piece), tiles.rest, tiles.pixel(piece));",
        end="stores.end();",
        head=_DST.sub("const __grid_constant__ cg_tensor_map dst_map", found["head"]),
        shared=PLACES * PIECE_ROWS * to.swizzle,
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
    if found is None or launch.block != (32, 4, 1) or (found["memory"] is None) != bool(made.dst):
        raise BuildError(f"expected {launch.function} to compute pieces of tiles, found {text[start:]!r}")
    body = found["body"]
    for word, here in _WORDS:
        body = body.replace(word, here)
    pieces = _sent(found, made, made.dst) if made.dst else _stored(found, made, launch.shared)
    threads, shared = (made.warpgroups + 1) * WARPGROUP, made.warpgroups * pieces.shared
    clusters = f"__cluster_dims__({made.cluster}, 1, 1) " if made.cluster > 1 else ""
    kernel = f"""\
extern "C" __global__ void {clusters}__launch_bounds__({threads}, {made.resident}) {pieces.head} {{
  extern __shared__ __align__({_ALIGNMENT}) uchar tile_memory[];
  using Tiles = {made.type};
  Tiles tiles(tile_memory + {shared}, {found["src"]}, {found["weights"]});
  if (tiles.multiplies()) {{
    {pieces.declared}
    __align__(16) {found["sum"]} all_sums[Tiles::PIECES * {made.piece_sums}];
    while (tiles.take()) {{
      tiles.multiply(all_sums);
      tiles.add_up(all_sums);
#pragma unroll
      for (int piece = 0; piece < Tiles::PIECES; ++piece) {{
        if (!tiles.owns(piece))
          continue;
        const int block = tiles.block(piece);
        {pieces.before}
{body}
        {pieces.after}
      }}
    }}
    {pieces.end}
  }}
  tiles.end();
}}
"""
    grid = min(made.blocks, cores * made.resident // made.cluster * made.cluster)
    maps = {**launch.maps, "dst": made.dst} if made.dst else launch.maps
    changed = replace(
        launch, grid=(grid, 1, 1), block=(32, threads // 32, 1), shared=shared + made.operands, maps=maps
    )  # fmt: skip
    return text[:start] + found["before"] + kernel + found["after"], changed
