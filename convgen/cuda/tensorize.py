"""A warp's tile of a matrix product, as tensor intrinsics.

Each intrinsic has a description, which says in TIR what is computed, and an implementation, which calls the function
of device.h that computes it. The sums of a tile are one buffer ``[rows][cols]`` in TIR; on the device every thread
holds a 32nd part of it (:mod:`convgen.cuda.code` declares it so), in an order that only the functions of device.h
know.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..lowering.compute import ACCUMULATOR, INTEGER
from ..problem.dtypes import BYTES

#: TVM's name of the type that operands are stored as, by dtype.
STORED = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8"}
#: TVM's name of the type of sums, where it is not f32.
_SUMS = {"i8": INTEGER}
#: Bytes of a copy to shared memory, and of a load from there.
VECTOR = 16
#: Bytes of a row that ``mma`` multiplies in one step of the reduction.
STEP = 32
#: Bytes of a row that ``wgmma`` multiplies in one step, and of a row in shared memory as it is swizzled for it.
ROW = 128

Shape = tuple[int, int, int]

_described: ContextVar[bool] = ContextVar("described", default=False)


@contextmanager
def described() -> Iterator[None]:
    """Programs that are scheduled meanwhile keep the descriptions of the intrinsics: loops that any compiler takes."""
    token = _described.set(True)
    try:
        yield
    finally:
        _described.reset(token)


def is_described() -> bool:
    """Whether programs keep the descriptions of the intrinsics: see :func:`described`."""
    return _described.get()


def replace(sch: Any, loop: Any, block: Any, intrinsic: str) -> Any:
    """Put an intrinsic in the place of the block under ``loop``, which it describes; returns the new block."""
    if _described.get():
        return block
    name = sch.get(block).name_hint
    sch.tensorize(loop, intrinsic)
    return sch.get_sblock(f"{name}_o")


def sums_of(dtype: str) -> str:
    """TVM's name of the type of sums of products."""
    return _SUMS.get(dtype, ACCUMULATOR)


def mma(kind: str, dtype: str, rows: int, cols: int) -> str:
    """The name of the intrinsic ``sums[i, j] += a[i, k, v] * b[j, k, v]`` over a step, which is two vectors ``k``.

    Args:
        kind: the type of device.h that multiplies: ``f16``, ``bf16``, ``i8``, ``tf32`` or ``tf32x3``.
        dtype: how a and b are stored.
    """
    return _product(f"cg_mma_tile<cg_{kind}, {rows}, {cols}>", dtype, rows, cols, STEP // VECTOR)


def mma_across(kind: str, dtype: str, rows: int, cols: int) -> str:
    """As :func:`mma`, of operands whose reduction goes down: ``sums[i, j] += a[k, i] * b[k, j]`` over a step, which is
    as many ``k`` as 32 bytes have elements; ``i`` and ``j`` are vectors of 16 bytes, and lanes of these.
    """
    return _product_across(f"cg_mma_across<cg_{kind}, {rows}, {cols}>", dtype, rows, cols)


def wgmma(kind: str, dtype: str, cols: int) -> str:
    """As :func:`mma`, over a step of 128 bytes; each of the four warps of a warpgroup has 16 rows."""
    return _product(f"cg_wgmma_tile<cg_{kind}, {cols}>", dtype, 16, cols, ROW // VECTOR)


@functools.cache
def _product(function: str, dtype: str, rows: int, cols: int, vectors: int) -> str:
    """The intrinsic of a function of device.h, which takes sums, a, bytes per row of a, b and bytes per row of b."""
    from tvm.script import tirx as T  # noqa: N812

    lanes, stored, summed = VECTOR // BYTES[dtype], STORED[dtype], sums_of(dtype)

    def wide(value: Any) -> Any:
        return value.astype(summed)

    @T.prim_func(s_tir=True, private=True)
    def description(c: T.handle, a: T.handle, b: T.handle) -> None:
        sums = T.match_buffer(c, (rows, cols), summed, offset_factor=1, scope="local")
        left = T.match_buffer(a, (rows, vectors, lanes), stored, offset_factor=1, scope="shared.dyn")
        right = T.match_buffer(b, (cols, vectors, lanes), stored, offset_factor=1, scope="shared.dyn")
        with T.sblock("root"):
            T.reads(sums[0:rows, 0:cols], left[0:rows, 0:vectors, 0:lanes], right[0:cols, 0:vectors, 0:lanes])
            T.writes(sums[0:rows, 0:cols])
            for i, j, k, v in T.grid(rows, cols, vectors, lanes):
                with T.sblock("product"):
                    vi, vj, vk, vv = T.axis.remap("SSRR", [i, j, k, v])
                    sums[vi, vj] = sums[vi, vj] + wide(left[vi, vk, vv]) * wide(right[vj, vk, vv])

    implementation = _called(function, dtype, (rows, cols), (rows, vectors, lanes), (cols, vectors, lanes))
    return _registered(f"convgen {function} {dtype}", description, implementation)


@functools.cache
def _product_across(function: str, dtype: str, rows: int, cols: int) -> str:
    """The intrinsic of :func:`mma_across`; the function takes what :func:`_product` says."""
    from tvm.script import tirx as T  # noqa: N812

    stored, summed = STORED[dtype], sums_of(dtype)
    depth, lanes = STEP // BYTES[dtype], VECTOR // BYTES[dtype]

    def wide(value: Any) -> Any:
        return value.astype(summed)

    @T.prim_func(s_tir=True, private=True)
    def description(c: T.handle, a: T.handle, b: T.handle) -> None:
        sums = T.match_buffer(c, (rows, cols), summed, offset_factor=1, scope="local")
        left = T.match_buffer(a, (depth, rows // lanes, lanes), stored, offset_factor=1, scope="shared.dyn")
        right = T.match_buffer(b, (depth, cols // lanes, lanes), stored, offset_factor=1, scope="shared.dyn")
        with T.sblock("root"):
            T.reads(
                sums[0:rows, 0:cols],
                left[0:depth, 0 : rows // lanes, 0:lanes],
                right[0:depth, 0 : cols // lanes, 0:lanes],
            )
            T.writes(sums[0:rows, 0:cols])
            for i, j, k in T.grid(rows, cols, depth):
                with T.sblock("product"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    sums[vi, vj] = sums[vi, vj] + wide(left[vk, vi // lanes, vi % lanes]) * wide(
                        right[vk, vj // lanes, vj % lanes]
                    )

    shapes = ((depth, size // lanes, lanes) for size in (rows, cols))
    implementation = _called(function, dtype, (rows, cols), *shapes)
    return _registered(f"convgen {function} {dtype}", description, implementation)


def _called(function: str, dtype: str, shape: tuple[int, int], left_shape: Shape, right_shape: Shape) -> Any:
    """The implementation of a product: the call of what :func:`_product` says. ``shape`` is that of the sums, the
    others those of a and b, ``[rows][vectors][elements of a vector]``.
    """
    from tvm.script import tirx as T  # noqa: N812

    size, stored, summed = BYTES[dtype], STORED[dtype], sums_of(dtype)
    (rows, cols), (a_rows, a_vectors, lanes), (b_rows, b_vectors, _) = shape, left_shape, right_shape

    @T.prim_func(s_tir=True, private=True)
    def implementation(c: T.handle, a: T.handle, b: T.handle) -> None:
        a0, a1, b0, b1 = T.int32(), T.int32(), T.int32(), T.int32()
        sums = T.match_buffer(c, (rows, cols), summed, offset_factor=1, scope="local")
        left = T.match_buffer(a, left_shape, stored, offset_factor=1, scope="shared.dyn", strides=[a0, a1, 1])
        right = T.match_buffer(b, right_shape, stored, offset_factor=1, scope="shared.dyn", strides=[b0, b1, 1])
        with T.sblock("root"):
            T.reads(sums[0:rows, 0:cols], left[0:a_rows, 0:a_vectors, 0:lanes], right[0:b_rows, 0:b_vectors, 0:lanes])
            T.writes(sums[0:rows, 0:cols])
            T.evaluate(
                T.call_extern(
                    "void",
                    function,
                    sums.access_ptr("rw"),
                    left.access_ptr("r"),
                    a0 * size,
                    right.access_ptr("r"),
                    b0 * size,
                )
            )

    return implementation


def wgmma_definition(kind: str, cols: int) -> str:
    """The definition of ``cg_wgmma`` of device.h for tiles of 64 × ``cols``, in CUDA.

    Source: PTX ISA, "Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async".
    """
    count = cols // 2
    if kind == "i8":
        operation, letter, summed, rest = "k32.s32.s8.s8", "r", "int", "1"
    else:
        operation, letter, summed, rest = f"k16.f32.{kind}.{kind}", "f", "float", "1, 1, 1, 0, 0"
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+{letter}"(acc[{i}])' for i in range(count))
    return f"""\
template <> struct cg_wgmma<cg_{kind}, {cols}> {{
    static CG_DEVICE void mma({summed} *acc, uint64_t a, uint64_t b)
    {{
        asm volatile("wgmma.mma_async.sync.aligned.m64n{cols}{operation} {{{sums}}}, %{count}, %{count + 1}, "
                     "{rest};" : {outputs} : "l"(a), "l"(b));
    }}
}};
"""


def opaque(summed: str, source: Any, weights: Any) -> Any:
    """A sum of type ``summed`` that depends on src and packed weights; how, TIR is not told.

    The intrinsic of :func:`tma` takes its place.
    """
    from tvm import tirx

    return tirx.call_extern(summed, "cg_sum", source, weights)


def axes_text(axes: Sequence[Sequence[int]]) -> str:
    """``cg_axes`` of hopper.h, one for each: per spatial axis, outputs, taps, strides, dilations, padding in front."""
    missing = 3 - len(axes[0])
    absent = [(1,) * missing] * 4 + [(0,) * missing]  # axes that a layer of lower rank lacks: as if of size 1
    all_axes = [(*first, *axis) for first, axis in zip(absent, axes, strict=True)]
    return ", ".join(f"cg_axes<{', '.join(map(str, axis))}>" for axis in all_axes)


def tma(
    kind: str, dtype: str, cols: int, warpgroups: int, stages: int, rank: int, axes: str, sizes: Sequence[int]
) -> str:
    """The name of the intrinsic that computes 16 rows × ``cols`` of :func:`opaque` sums: ``cg_tma_tile`` of hopper.h.

    Args:
        axes: what :func:`axes_text` makes.
        sizes: the other arguments of ``cg_tma_tile``, in its order.
    """
    function = f"cg_tma_tile<cg_{kind}, {cols}, {warpgroups}, {stages}, {rank}, {axes}>"
    memory = stages * ((64 * warpgroups + cols) * ROW + 8)
    return _tma(function, dtype, cols, (1,) * (rank + 2), memory, *sizes)


@functools.cache
def _tma(function: str, dtype: str, cols: int, ones: tuple[int, ...], size: int, *sizes: int) -> str:
    """The intrinsic of a ``cg_tma_tile``.

    Args:
        ones: the shape of the one element of src that TIR sees accessed.
        size: bytes of shared memory.
        sizes: its last arguments.
    """
    from tvm.script import tirx as T  # noqa: N812

    first, rows = (0,) * len(ones), 16
    stored, summed, align = STORED[dtype], sums_of(dtype), BYTES[dtype]

    @T.prim_func(s_tir=True, private=True)
    def implementation(c: T.handle, a: T.handle, b: T.handle) -> None:
        sums = T.match_buffer(c, (rows, cols), summed, offset_factor=1, scope="local")
        source = T.match_buffer(a, ones, stored, offset_factor=1, align=align)
        weights = T.match_buffer(b, (1, 1, 1, 1), stored, offset_factor=1, align=align)
        with T.sblock("root"):
            T.reads(source[first], weights[0, 0, 0, 0])
            T.writes(sums[0:rows, 0:cols])
            stages = T.alloc_buffer((size,), "uint8", scope="shared.dyn")
            T.evaluate(
                T.call_extern(
                    "void",
                    function,
                    sums.access_ptr("w"),
                    stages.access_ptr("w"),
                    source.access_ptr("r"),
                    weights.access_ptr("r"),
                    *sizes,
                )
            )

    return _registered(f"convgen {function} {stored} {sizes}", _opaque_sums(dtype, rows, cols, ones), implementation)


def _opaque_sums(dtype: str, rows: int, cols: int, ones: tuple[int, ...]) -> Any:
    """The description of ``rows`` × ``cols`` of :func:`opaque` sums; ``ones`` as :func:`_tma` takes them."""
    from tvm.script import tirx as T  # noqa: N812

    first = (0,) * len(ones)
    stored, summed, align = STORED[dtype], sums_of(dtype), BYTES[dtype]

    @T.prim_func(s_tir=True, private=True)
    def description(c: T.handle, a: T.handle, b: T.handle) -> None:
        sums = T.match_buffer(c, (rows, cols), summed, offset_factor=1, scope="local")
        source = T.match_buffer(a, ones, stored, offset_factor=1, align=align)
        weights = T.match_buffer(b, (1, 1, 1, 1), stored, offset_factor=1, align=align)
        with T.sblock("root"):
            T.reads(source[first], weights[0, 0, 0, 0])
            T.writes(sums[0:rows, 0:cols])
            for i, j in T.grid(rows, cols):
                with T.sblock("sum"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    sums[vi, vj] = T.call_extern(summed, "cg_sum", source[first], weights[0, 0, 0, 0])

    return description


@functools.cache
def piece(dtype: str, rows: int, cols: int, rank: int) -> str:
    """The name of the intrinsic that has ``rows`` × ``cols`` of :func:`opaque` sums, a warp's: ``cg_piece_sums``.

    No function has that name: :mod:`convgen.cuda.persistent` puts the sums of a persistent kernel in its place.
    """
    from tvm.script import tirx as T  # noqa: N812

    ones = (1,) * (rank + 2)
    first, stored, summed, align = (0,) * len(ones), STORED[dtype], sums_of(dtype), BYTES[dtype]

    @T.prim_func(s_tir=True, private=True)
    def implementation(c: T.handle, a: T.handle, b: T.handle) -> None:
        sums = T.match_buffer(c, (rows, cols), summed, offset_factor=1, scope="local")
        source = T.match_buffer(a, ones, stored, offset_factor=1, align=align)
        weights = T.match_buffer(b, (1, 1, 1, 1), stored, offset_factor=1, align=align)
        with T.sblock("root"):
            T.reads(source[first], weights[0, 0, 0, 0])
            T.writes(sums[0:rows, 0:cols])
            T.evaluate(
                T.call_extern(
                    "void", "cg_piece_sums", sums.access_ptr("w"), source.access_ptr("r"), weights.access_ptr("r")
                )
            )

    description = _opaque_sums(dtype, rows, cols, ones)
    return _registered(f"convgen piece {rows} {cols} {stored} {rank}", description, implementation)


def opaque_added(dtype: str, residual: Any) -> Any:
    """An element of the residual; which, TIR is not told: the intrinsic of :func:`added_piece` takes its place."""
    from tvm import tirx

    return tirx.call_extern(STORED[dtype], "cg_added", residual)


@functools.cache
def added_piece(dtype: str, rows: int, cols: int, rank: int) -> str:
    """The name of the intrinsic that has ``rows`` × ``cols`` of :func:`opaque_added` elements: ``cg_piece_added``, in
    whose place :mod:`convgen.cuda.persistent` puts those that belong to the sums of a piece.
    """
    from tvm.script import tirx as T  # noqa: N812

    ones = (1,) * (rank + 2)
    first, stored, align = (0,) * len(ones), STORED[dtype], BYTES[dtype]

    @T.prim_func(s_tir=True, private=True)
    def description(c: T.handle, a: T.handle) -> None:
        held = T.match_buffer(c, (rows, cols), stored, offset_factor=1, scope="local")
        source = T.match_buffer(a, ones, stored, offset_factor=1, align=align)
        with T.sblock("root"):
            T.reads(source[first])
            T.writes(held[0:rows, 0:cols])
            for i, j in T.grid(rows, cols):
                with T.sblock("element"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    held[vi, vj] = T.call_extern(stored, "cg_added", source[first])

    @T.prim_func(s_tir=True, private=True)
    def implementation(c: T.handle, a: T.handle) -> None:
        held = T.match_buffer(c, (rows, cols), stored, offset_factor=1, scope="local")
        source = T.match_buffer(a, ones, stored, offset_factor=1, align=align)
        with T.sblock("root"):
            T.reads(source[first])
            T.writes(held[0:rows, 0:cols])
            T.evaluate(T.call_extern("void", "cg_piece_added", held.access_ptr("w"), source.access_ptr("r")))

    return _registered(f"convgen added {rows} {cols} {stored} {rank}", description, implementation)


@functools.cache
def clear(rows: int, cols: int, summed: str) -> str:
    """The name of the intrinsic ``sums[i, j] = 0``; ``summed`` is the type of sums."""
    from tvm import tirx
    from tvm.script import tirx as T  # noqa: N812

    zero = tirx.const(0, summed)

    function = f"cg_clear_tile<{rows}, {cols}>"

    @T.prim_func(s_tir=True, private=True)
    def description(c: T.handle) -> None:
        sums = T.match_buffer(c, (rows, cols), summed, offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads()
            T.writes(sums[0:rows, 0:cols])
            for i, j in T.grid(rows, cols):
                with T.sblock("zero"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    sums[vi, vj] = zero

    @T.prim_func(s_tir=True, private=True)
    def implementation(c: T.handle) -> None:
        sums = T.match_buffer(c, (rows, cols), summed, offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads()
            T.writes(sums[0:rows, 0:cols])
            T.evaluate(T.call_extern("void", function, sums.access_ptr("w")))

    return _registered(f"convgen_clear_{rows}x{cols}_{summed}", description, implementation)


@functools.cache
def store(rows: int, cols: int, summed: str) -> str:
    """The name of the intrinsic ``tile[i, j] = sums[i, j]``, to shared memory; ``summed`` is the type of sums."""
    from tvm.script import tirx as T  # noqa: N812

    function = f"cg_store_tile<{rows}, {cols}>"

    @T.prim_func(s_tir=True, private=True)
    def description(d: T.handle, c: T.handle) -> None:
        tile = T.match_buffer(d, (rows, cols), summed, offset_factor=1, scope="shared.dyn")
        sums = T.match_buffer(c, (rows, cols), summed, offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(sums[0:rows, 0:cols])
            T.writes(tile[0:rows, 0:cols])
            for i, j in T.grid(rows, cols):
                with T.sblock("copy"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    tile[vi, vj] = sums[vi, vj]

    @T.prim_func(s_tir=True, private=True)
    def implementation(d: T.handle, c: T.handle) -> None:
        row = T.int32()
        tile = T.match_buffer(d, (rows, cols), summed, offset_factor=1, scope="shared.dyn", strides=[row, 1])
        sums = T.match_buffer(c, (rows, cols), summed, offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(sums[0:rows, 0:cols])
            T.writes(tile[0:rows, 0:cols])
            T.evaluate(T.call_extern("void", function, tile.access_ptr("w"), row, sums.access_ptr("r")))

    return _registered(f"convgen_store_{rows}x{cols}_{summed}", description, implementation)


def _registered(name: str, description: Any, implementation: Any) -> str:
    from tvm.s_tir import TensorIntrin

    TensorIntrin.register(name, description, implementation, override=True)
    return name
