"""Matrix tiles of x86 (AMX): eight registers of up to 16 rows of 64 bytes; the product of two is added to a third.

``sums[m, n] += sum over k of a[m, k] * b[k, n]``: a row of ``a`` is a pixel's channels, one of ``b`` has as many
numbers of each of 16 outputs as an element of ``sums`` is wide: two of bf16, four of i8. Registers are named by number,
as the instructions name them: LLVM then neither moves nor saves them, and they live within one task.

Source: Intel, "Architecture Instruction Set Extensions Programming Reference" (319433), chapter 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...deferred import tirx
from ...lowering.compute import Expr
from ...lowering.schedule import require
from ..vector import Block

#: Rows of a tile, bytes of a row, and bytes of an element of sums.
ROWS, ROW_BYTES, SUM_BYTES = 16, 64, 4
#: How elements of these two types are multiplied, and what a CPU must have for it.
_PRODUCTS = {
    ("bf16", "bf16"): ("tdpbf16ps", "amx-bf16"),
    ("i8", "i8"): ("tdpbssd", "amx-int8"),
    ("i8", "u8"): ("tdpbsud", "amx-int8"),
    ("u8", "i8"): ("tdpbusd", "amx-int8"),
    ("u8", "u8"): ("tdpbuud", "amx-int8"),
}
#: What every kernel with tiles needs.
_TILES = "amx-tile"
#: Bytes of a configuration, and where in it the numbers of bytes and of rows of each tile begin.
_CONFIGURATION, _WIDTHS, _HEIGHTS = 64, 16, 48


def require_tiles(isa: Sequence[str], operands: tuple[str, str]) -> None:
    """Raise :class:`~convgen.errors.Inapplicable` unless instructions multiply tiles of two types."""
    require({_TILES, _PRODUCTS[operands][1]} <= set(isa), "needs a CPU with matrix tiles")


def instructions(operands: tuple[str, str]) -> tuple[str, ...]:
    """The features that a kernel asks for which multiplies tiles of two types."""
    return _TILES, _PRODUCTS[operands][1]


def configure(block: Block, shapes: Sequence[tuple[int, int]]) -> None:
    """Say of each tile how many rows it has, and of how many bytes. It takes as long as ten products."""
    values = [0] * _CONFIGURATION
    values[0] = 1  # the palette: the only one there is
    for tile, (rows, size) in enumerate(shapes):
        values[_WIDTHS + 2 * tile], values[_HEIGHTS + tile] = size, rows
    buffer = block.buffer((_CONFIGURATION,), "uint8")
    for at, value in enumerate(values):
        block.add(tirx.BufferStore(buffer, tirx.const(value, "uint8"), [tirx.const(at, "int32")]))
    block.add(_call("ldtilecfg", _address(buffer, [0])))


def release(block: Block) -> None:
    """Give the tiles back: a task that ends with tiles in use would have them saved when threads change."""
    block.add(_call("tilerelease"))


def zero(block: Block, tile: int) -> None:
    block.add(_call("tilezero", _number(tile)))


def read(block: Block, tile: int, buffer: Any, index: Sequence[Expr], stride: int) -> None:
    """Read a tile whose rows begin ``stride`` bytes from each other, the first at ``index``."""
    block.add(_call("tileloadd64", _number(tile), _address(buffer, index), tirx.const(stride, "int64")))


def write(block: Block, tile: int, buffer: Any, index: Sequence[Expr], stride: int) -> None:
    """The inverse of :func:`read`."""
    block.add(_call("tilestored64", _number(tile), _address(buffer, index), tirx.const(stride, "int64")))


def multiply(block: Block, operands: tuple[str, str], sums: int, a: int, b: int) -> None:
    """Add the products of two tiles of these types to a third."""
    block.add(_call(_PRODUCTS[operands][0], _number(sums), _number(a), _number(b)))


def _call(name: str, *arguments: Expr) -> Any:
    return tirx.Evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments))


def _number(tile: int) -> Expr:
    return tirx.const(tile, "int8")


def _address(buffer: Any, index: Sequence[Expr]) -> Expr:
    place = [tirx.const(i, "int32") if isinstance(i, int) else i for i in index]
    return tirx.address_of(tirx.BufferLoad(buffer, place))
