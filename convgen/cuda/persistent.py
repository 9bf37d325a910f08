"""Kernels whose blocks take one tile after another.

TVM generates what becomes of a piece of a tile, as a kernel whose blocks, of one warpgroup, have a piece each: of its
sums, which it does not know how to compute. Here its body becomes the end of a loop over tiles; ``cg_persistent`` of
hopper.h fetches, multiplies and says which piece is which. What it makes of the sums

- it stores in dst itself, having passed the sums through shared memory, or
- makes of those that a thread has in registers, and would store in order: these go to shared memory then, from where
  the copy engine stores them in dst (``cg_stores``). What is added to the sums comes the same way.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from ..errors import BuildError
from ..lowering.interface import Launch, Persistent, TensorMap
from ..problem.dtypes import BYTES
from .implicit import PIECE_ROWS

#: Threads of a warpgroup.
WARPGROUP = 128
_KERNEL = re.compile(
    r'extern "C" __global__ void __launch_bounds__\([\d, ]*\) (?P<head>\w+\([^)]*\)) \{\n'
    r"(?:  extern __shared__ __align__\(\d+\) (?P<kind>\w+) (?P<memory>\w+)\[\];\n)?"
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
#: A kernel's shared memory is a multiple of this; that of barriers among it, of less.
_ALIGNMENT, _BARRIERS_ALIGNMENT = 1024, 128


def places(adds: bool) -> int:
    """Pieces of a warpgroup that have a place in shared memory on their way to dst, where the copy engine stores them:
    one is read while the next is finished; what is to be added to two more is on its way.
    """
    return 4 if adds else 2


def stores_bytes(size: int, columns: int, warpgroups: int, adds: bool) -> tuple[int, int]:
    """Bytes of shared memory for pieces on their way to dst, and for the barriers of what is added to them.

    Args:
        size: bytes of an element.
        columns: channels of a piece.
    """
    barriers = -(-8 * places(adds) * warpgroups // _BARRIERS_ALIGNMENT) * _BARRIERS_ALIGNMENT
    return warpgroups * places(adds) * PIECE_ROWS * columns * size, barriers if adds else 0


class _Held(NamedTuple):
    """Values that each thread has of a piece: their type, their name, and the tensors that they are made from."""

    type: str
    name: str
    tensors: list[str]


class _Pieces(NamedTuple):
    """What becomes of pieces, as CUDA: what is declared before the loop over tiles, done before a tile is multiplied,
    before and after the body that TVM generated, and in the end; the kernel's head; and the block's bytes of shared
    memory before and after the operands.
    """

    declared: str
    ahead: str
    before: str
    after: str
    end: str
    head: str
    shared: tuple[int, int]


def _held(body: str, function: str) -> tuple[str, _Held | None]:
    """The body without the values that a function says a thread has, and these; None where it is not called."""
    call = re.search(rf"  {function}\(\(&\((\w+)\[0\]\)\), ([\w, ]+)\);\n", body)
    declared = re.search(rf"  (?:alignas\(\d+\) )?(\w+) {call[1]}\[\d+\];\n", body) if call else None
    if call is None or declared is None:
        return body, None
    return body.replace(call[0], "").replace(declared[0], ""), _Held(declared[1], call[1], call[2].split(", "))


def _stored(found: re.Match[str], sums: _Held, made: Persistent, shared: int) -> _Pieces:
    """The body stores them itself, through ``shared`` bytes of each warpgroup."""
    kind = found["kind"]
    declared = f"{kind}* const {found['memory']} = ({kind}*)(tile_memory + tiles.group * {shared});"
    before = f"{sums.type}* const {sums.name} = all_sums + piece * {made.piece_sums};"
    return _Pieces(declared, "", before, "tiles.sync();", "", found["head"], (made.warpgroups * shared, 0))


def _sent(found: re.Match[str], sums: _Held, added: _Held | None, made: Persistent, to: TensorMap) -> _Pieces:
    """The copy engine stores them, by a map of dst, and fetches what is added to them."""
    element, dst = _DST.findall(found["head"])[0]
    count, columns = made.piece_sums, 2 * made.piece_sums
    image, box = (to.dims[0], to.box[0]) if len(to.dims) == 4 else (0, PIECE_ROWS)
    shared = stores_bytes(BYTES[to.dtype], columns, made.warpgroups, added is not None)
    numbers = f"{columns}, {image}, {box}, {places(added is not None)}, {str(added is not None).lower()}"
    barriers = f"tile_memory + {shared[0] + made.operands}"
    maps = f"dst_map, {added.tensors[0] if added else 'dst_map'}"
    held = [(sums.type, sums.name, f"all_sums + piece * {count}"), (element, dst, "finished")]
    before = f"__align__(16) {element} finished[{count}];"
    if added:
        held.append((added.type, added.name, "added"))
        before += f"\n        __align__(16) {added.type} added[{count}];\n        stores.take(piece, added);"
    for kind, name, values in held:
        before += f"\n        const cg_held<{kind}, {columns}> {name} = {{{values}}};"
    return _Pieces(
        declared=f"cg_stores<Tiles, {element}, {numbers}> stores(tiles, tile_memory, {barriers}, {maps});",
        ahead="stores.ahead();" if added else "",
        before=before,
        after="stores.send(piece, finished);",
        end="stores.end();",
        head=_DST.sub("const __grid_constant__ cg_tensor_map dst_map", found["head"]),
        shared=shared,
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
    body, sums = _held(found["body"] + "\n" if found else "", "cg_piece_sums")
    body, added = _held(body, "cg_piece_added")
    if found is None or sums is None or launch.block != (32, 4, 1) or (found["memory"] is None) != bool(made.dst):
        raise BuildError(f"expected {launch.function} to compute pieces of tiles, found {text[start:]!r}")
    for word, here in _WORDS:
        body = body.replace(word, here)
    pieces = _sent(found, sums, added, made, made.dst) if made.dst else _stored(found, sums, made, launch.shared)
    threads, (shared, barriers) = (made.warpgroups + 1) * WARPGROUP, pieces.shared
    clusters = f"__cluster_dims__({made.cluster}, 1, 1) " if made.cluster > 1 else ""
    kernel = f"""\
extern "C" __global__ void {clusters}__launch_bounds__({threads}, {made.resident}) {pieces.head} {{
  extern __shared__ __align__({_ALIGNMENT}) uchar tile_memory[];
  using Tiles = {made.type};
  Tiles tiles(tile_memory + {shared}, {", ".join(sums.tensors)});
  if (tiles.multiplies()) {{
    {pieces.declared}
    __align__(16) {sums.type} all_sums[Tiles::PIECES * {made.piece_sums}];
    while (tiles.take()) {{
      {pieces.ahead}
      tiles.multiply(all_sums);
      tiles.add_up(all_sums);
#pragma unroll
      for (int piece = 0; piece < Tiles::PIECES; ++piece) {{
        if (!tiles.owns(piece))
          continue;
        const int block = tiles.block(piece);
        {pieces.before}
{body.rstrip()}
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
        launch, grid=(grid, 1, 1), block=(32, threads // 32, 1), shared=shared + made.operands + barriers, maps=maps
    )  # fmt: skip
    return text[:start] + kernel + found["after"], changed
