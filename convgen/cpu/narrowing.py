"""Four vectors of integers stored as bytes together: instructions that pack two vectors, saturating, take the place of
bounds and of a narrowing store of each.

A pair of vectors of 32 bits becomes one of 16, two of these one of bytes. Instructions pack pieces of 128 bits each by
itself: words of four bytes come out as ``[piece][vector]``, and one permutation puts them in order. What is added to
them comes the other way: one permutation puts bytes of it below those of an f32 of which they then are the lowest bits.
Source: Intel, "64 and IA-32 Architectures Software Developer's Manual" (PACKSSDW, PACKUSWB, VPERMD, VPERMI2B).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..deferred import tirx
from ..lowering.compute import ACCUMULATOR, INTEGER, STORAGE, Expr, of_lanes
from ..lowering.requantise import CLAMPS, steps_of
from ..problem.spec import ConvSpec
from .vector import Block, load, load_stored, store_stored

#: Lanes of a vector, and vectors that are packed together.
LANES, TOGETHER = 16, 4
#: More than any number of 8 bits, and its sum with any zero point, but an integer of 32.
_LARGE = 2.0**30
#: From words ``[piece][vector]`` to ``[vector][piece]``.
_ORDER = [piece * TOGETHER + vector for vector in range(TOGETHER) for piece in range(LANES // 4)]
#: Bytes of four vectors; what numbers of them are added to, and the two upper bytes of that f32, of 0x4B000000.
_BYTES, _BASE, _UPPER = LANES * TOGETHER, 2.0**23, 0x4B00
#: Bytes of a word, the lowest first: one of the vectors', which lanes number, and of the upper bytes the lower one
#: twice, then the other.
_SPREAD = _BYTES << 8 | _BYTES << 16 | (_BYTES + 1) << 24


class Stored(NamedTuple):
    """A vector of sums: where it is stored in dst, its parameters, and whether the one before lies just before it."""

    place: Sequence[Expr]
    sums: Expr
    given: dict[str, Expr]
    follows: bool


def store_bytes(
    block: Block,
    spec: ConvSpec,
    tensors: tuple[Any, Any],
    vectors: Sequence[Stored],
    zero: Expr | None,
    *,
    permutes: bool = False,
) -> None:
    """The epilogues of up to four vectors of 16 sums, and their stores.

    Args:
        tensors: dst, of 8-bit integers, and the residual, or None.
        zero: dst's zero point, a scalar i32, or None.
        permutes: whether there are permutations of bytes (AVX512-VBMI).
    """
    dst, residual = tensors
    runs = list(_runs(vectors))
    values = []
    spread = _spread(block, spec, residual, vectors, runs) if residual is not None and permutes else []
    for number, vector in enumerate(vectors):
        given = {name: value for name, value in vector.given.items() if name != "dst_zero"}
        if spread:
            more = _BASE + (128 if spec.residual_dtype == "i8" else 0)
            given["residual"] = spread[number]
            given["residual_zero"] = block.let(given["residual_zero"] + tirx.const(more, ACCUMULATOR))
        elif residual is not None:
            given["residual"] = load(residual, spec.residual_dtype, vector.place, LANES, LANES)
        values.append(block.let(steps_of(spec, vector.sums, lanes=LANES, whole=_whole, **given)))
    packed = _packed(block, spec, values, zero)
    for first, count in runs:
        lanes = list(range(first * LANES, (first + count) * LANES))
        part = packed if count == TOGETHER else block.let(tirx.Shuffle([packed], lanes))
        block.add(store_stored(dst, spec.dst_dtype, vectors[first].place, part, len(lanes), len(lanes)))


def _runs(vectors: Sequence[Stored]) -> Iterator[tuple[int, int]]:
    """The vectors that one store writes each: the first, and how many."""
    first = 0
    while first < len(vectors):
        count = _together(vectors[first + 1 :])
        yield first, count
        first += count


def _spread(
    block: Block, spec: ConvSpec, residual: Any, vectors: Sequence[Stored], runs: Sequence[tuple[int, int]]
) -> list[Expr]:
    """The residual of vectors as f32, :data:`_BASE` more than it is, and of i8 another 128; nothing where few of its
    bytes lie side by side.
    """
    count = min(count for _, count in runs)
    if count == 1:
        return []
    size, dtype = count * LANES, spec.residual_dtype
    places = [vectors[first + i].place for first, together in runs for i in range(0, together, count)]
    pieces = [block.let(load_stored(residual, dtype, place, size, size)) for place in places]
    pieces += pieces[-1:] * (_BYTES // size - len(pieces))
    numbers = pieces[0] if len(pieces) == 1 else block.let(tirx.Shuffle(pieces, list(range(_BYTES))))
    numbers = tirx.reinterpret(f"int8x{_BYTES}", numbers)
    if dtype == "i8":
        numbers = numbers ^ tirx.Broadcast(tirx.const(-128, "int8"), _BYTES)
    numbers = block.let(numbers)
    upper = tirx.reinterpret(f"int8x{_BYTES}", tirx.Broadcast(tirx.const(_UPPER, INTEGER), LANES))
    spread = []
    for vector in range(len(vectors)):
        words = tirx.Ramp(tirx.const(_SPREAD + vector * LANES, INTEGER), tirx.const(1, INTEGER), LANES)
        index, name = tirx.reinterpret(f"int8x{_BYTES}", words), "llvm.x86.avx512.vpermi2var.qi.512"
        found = tirx.call_llvm_pure_intrin(f"int8x{_BYTES}", name, numbers, index, upper)
        spread.append(block.let(tirx.reinterpret(of_lanes(ACCUMULATOR, LANES), found)))
    return spread


def _together(following: Sequence[Stored]) -> int:
    """How many vectors one store writes: 4, 2 or 1, the first and those that follow it."""
    most = next((i for i, vector in enumerate(following) if not vector.follows), len(following)) + 1
    return next(count for count in (TOGETHER, 2, 1) if count <= most)


def _packed(block: Block, spec: ConvSpec, values: Sequence[Expr], zero: Expr | None) -> Expr:
    """Steps of dst as its bytes, one vector after another."""
    whole = [block.let(_nearest(value, spec.residual)) for value in values]
    whole += whole[-1:] * (TOGETHER - len(whole))
    pairs = [block.let(_pack("packssdw", "int16x32", *whole[i : i + 2])) for i in (0, 2)]
    pairs = [block.let(_bounded(spec, pair, zero)) for pair in pairs]
    narrow = _pack("packuswb" if spec.dst_dtype == "u8" else "packsswb", "int8x64", *pairs)
    words = block.let(tirx.reinterpret(f"{INTEGER}x{LANES}", narrow))
    ordered = block.let(tirx.Shuffle([words], _ORDER))
    return block.let(tirx.reinterpret(f"{STORAGE[spec.dst_dtype]}x{TOGETHER * LANES}", ordered))


def _whole(value: Expr) -> Expr:
    """Rounded to nearest, ties to even, as f32: in one instruction."""
    return tirx.call_llvm_pure_intrin(of_lanes(ACCUMULATOR, LANES), "llvm.nearbyint", value)


def _nearest(value: Expr, is_bounded: bool) -> Expr:
    """Rounded to nearest, ties to even; of NaN, and of what is less than any integer, the least one.

    ``is_bounded``: none is larger than any integer.
    """
    # In this order a single instruction, whose answer to NaN is its second operand.
    bounded = value if is_bounded else tirx.min(tirx.Broadcast(tirx.const(_LARGE, ACCUMULATOR), LANES), value)
    every, current = tirx.const(-1, "int16"), tirx.const(4, INTEGER)  # all lanes, and the rounding that is set
    nothing = tirx.Broadcast(tirx.const(0, INTEGER), LANES)
    name = "llvm.x86.avx512.mask.cvtps2dq.512"
    return tirx.call_llvm_pure_intrin(f"{INTEGER}x{LANES}", name, bounded, nothing, every, current)


def _bounded(spec: ConvSpec, pair: Expr, zero: Expr | None) -> Expr:
    """With dst's zero point, and within the activation's bounds, which are rounded as what they bound is."""

    def spread(value: Expr) -> Expr:
        return tirx.Broadcast(value.astype("int16"), 2 * LANES)

    op = spec.activation_op
    centre = tirx.const(0, INTEGER) if zero is None else zero
    if zero is not None:
        pair = tirx.call_llvm_pure_intrin("int16x32", "llvm.sadd.sat", pair, spread(centre))
    for bound, nearer in zip(CLAMPS[op.name] or op.params, (tirx.max, tirx.min), strict=True):
        if math.isfinite(bound):
            whole = max(-512, min(511, round(bound)))  # ties to even, as everywhere
            pair = nearer(pair, spread(centre + whole))
    return pair


def _pack(instruction: str, dtype: str, a: Expr, b: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(dtype, f"llvm.x86.avx512.{instruction}.512", a, b)
