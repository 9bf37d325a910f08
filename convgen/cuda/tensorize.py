"""A warp's tile of a matrix product, as tensor intrinsics: what they compute, and the functions of device.h that do.

The sums of a tile are one buffer ``[rows][cols]`` here; on the device every thread holds a 32nd part of it
(:mod:`convgen.cuda.code` declares it so), in an order that only these intrinsics know.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..compute import ACCUMULATOR

#: How vectors are stored in shared memory, by dtype.
STORED = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
#: Bytes of a step of the reduction.
STEP = 32
#: Bytes of a row in shared memory as wgmma takes them.
ROW = 128

_described: ContextVar[bool] = ContextVar("described", default=False)


@contextmanager
def described() -> Iterator[None]:
    """Programs that are scheduled meanwhile keep what the intrinsics compute: loops that any compiler takes."""
    token = _described.set(True)
    try:
        yield
    finally:
        _described.reset(token)


def replace(sch: Any, loop: Any, block: Any, intrinsic: str) -> Any:
    """Put an intrinsic in place of the block under ``loop`` that it describes; returns the block there then."""
    if _described.get():
        return block
    name = sch.get(block).name_hint
    sch.tensorize(loop, intrinsic)
    return sch.get_sblock(f"{name}_o")


@functools.cache
def mma(kind: str, dtype: str, rows: int, cols: int) -> str:
    """``sums[i, j] += a[i, k, v] * b[j, k, v]`` over one step: two vectors of 16 bytes; returns the intrinsic's name.

    Args:
        kind: the type of device.h that multiplies: ``f16``, ``bf16``, ``tf32`` or ``tf32x3``.
        dtype: how a and b are stored.
    """
    from tvm.script import tirx as T  # noqa: N812

    size = 4 if dtype == "f32" else 2
    lanes, stored = 16 // size, STORED[dtype]
    function = f"cg_mma_tile<cg_{kind}, {rows}, {cols}>"

    def wide(value: Any) -> Any:
        return value.astype(ACCUMULATOR)

    @T.prim_func(s_tir=True, private=True)
    def description(c: T.handle, a: T.handle, b: T.handle) -> None:
        C = T.match_buffer(c, (rows, cols), "float32", offset_factor=1, scope="local")
        A = T.match_buffer(a, (rows, 2, lanes), stored, offset_factor=1, scope="shared.dyn")
        B = T.match_buffer(b, (cols, 2, lanes), stored, offset_factor=1, scope="shared.dyn")
        with T.sblock("root"):
            T.reads(C[0:rows, 0:cols], A[0:rows, 0:2, 0:lanes], B[0:cols, 0:2, 0:lanes])
            T.writes(C[0:rows, 0:cols])
            for i, j, k, v in T.grid(rows, cols, 2, lanes):
                with T.sblock("product"):
                    vi, vj, vk, vv = T.axis.remap("SSRR", [i, j, k, v])
                    C[vi, vj] = C[vi, vj] + wide(A[vi, vk, vv]) * wide(B[vj, vk, vv])

    @T.prim_func(s_tir=True, private=True)
    def implementation(c: T.handle, a: T.handle, b: T.handle) -> None:
        a0, a1, b0, b1 = T.int32(), T.int32(), T.int32(), T.int32()
        C = T.match_buffer(c, (rows, cols), "float32", offset_factor=1, scope="local")
        A = T.match_buffer(a, (rows, 2, lanes), stored, offset_factor=1, scope="shared.dyn", strides=[a0, a1, 1])
        B = T.match_buffer(b, (cols, 2, lanes), stored, offset_factor=1, scope="shared.dyn", strides=[b0, b1, 1])
        with T.sblock("root"):
            T.reads(C[0:rows, 0:cols], A[0:rows, 0:2, 0:lanes], B[0:cols, 0:2, 0:lanes])
            T.writes(C[0:rows, 0:cols])
            T.evaluate(
                T.call_extern(
                    "void",
                    function,
                    C.access_ptr("rw"),
                    A.access_ptr("r"),
                    a0 * size,
                    B.access_ptr("r"),
                    b0 * size,
                )
            )

    return _registered(f"convgen_mma_{kind}_{dtype}_{rows}x{cols}", description, implementation)


@functools.cache
def wgmma(kind: str, dtype: str, cols: int) -> str:
    """What :func:`mma` computes, over rows of 128 bytes, with 16 rows to each of the four warps of a warpgroup."""
    from tvm.script import tirx as T  # noqa: N812

    size = 4 if dtype == "f32" else 2
    lanes, stored, rows, vectors = 16 // size, STORED[dtype], 16, ROW // 16
    function = f"cg_wgmma_tile<cg_{kind}, {cols}>"

    def wide(value: Any) -> Any:
        return value.astype(ACCUMULATOR)

    @T.prim_func(s_tir=True, private=True)
    def description(c: T.handle, a: T.handle, b: T.handle) -> None:
        C = T.match_buffer(c, (rows, cols), "float32", offset_factor=1, scope="local")
        A = T.match_buffer(a, (rows, vectors, lanes), stored, offset_factor=1, scope="shared.dyn")
        B = T.match_buffer(b, (cols, vectors, lanes), stored, offset_factor=1, scope="shared.dyn")
        with T.sblock("root"):
            T.reads(C[0:rows, 0:cols], A[0:rows, 0:vectors, 0:lanes], B[0:cols, 0:vectors, 0:lanes])
            T.writes(C[0:rows, 0:cols])
            for i, j, k, v in T.grid(rows, cols, vectors, lanes):
                with T.sblock("product"):
                    vi, vj, vk, vv = T.axis.remap("SSRR", [i, j, k, v])
                    C[vi, vj] = C[vi, vj] + wide(A[vi, vk, vv]) * wide(B[vj, vk, vv])

    @T.prim_func(s_tir=True, private=True)
    def implementation(c: T.handle, a: T.handle, b: T.handle) -> None:
        C = T.match_buffer(c, (rows, cols), "float32", offset_factor=1, scope="local")
        A = T.match_buffer(a, (rows, vectors, lanes), stored, offset_factor=1, scope="shared.dyn")
        B = T.match_buffer(b, (cols, vectors, lanes), stored, offset_factor=1, scope="shared.dyn")
        with T.sblock("root"):
            T.reads(C[0:rows, 0:cols], A[0:rows, 0:vectors, 0:lanes], B[0:cols, 0:vectors, 0:lanes])
            T.writes(C[0:rows, 0:cols])
            T.evaluate(T.call_extern("void", function, C.access_ptr("rw"), A.access_ptr("r"), B.access_ptr("r")))

    return _registered(f"convgen_wgmma_{kind}_{dtype}_{cols}", description, implementation)


def wgmma_definition(kind: str, cols: int) -> str:
    """The instruction for tiles 64 × ``cols``, in CUDA: ``cg_wgmma`` of device.h.

    Source: PTX ISA, "Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async".
    """
    count = cols // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(acc[{i}])' for i in range(count))
    return f"""\
template <> struct cg_wgmma<cg_{kind}, {cols}> {{
    static CG_DEVICE void mma(float *acc, uint64_t a, uint64_t b)
    {{
        asm volatile("wgmma.mma_async.sync.aligned.m64n{cols}k16.f32.{kind}.{kind} {{{sums}}}, %{count}, %{count + 1}, "
                     "1, 1, 1, 0, 0;" : {outputs} : "l"(a), "l"(b));
    }}
}};
"""


@functools.cache
def clear(rows: int, cols: int) -> str:
    """``sums[i, j] = 0``."""
    from tvm.script import tirx as T  # noqa: N812

    function = f"cg_clear_tile<{rows}, {cols}>"

    @T.prim_func(s_tir=True, private=True)
    def description(c: T.handle) -> None:
        C = T.match_buffer(c, (rows, cols), "float32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:rows, 0:cols])
            for i, j in T.grid(rows, cols):
                with T.sblock("zero"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    C[vi, vj] = T.float32(0)

    @T.prim_func(s_tir=True, private=True)
    def implementation(c: T.handle) -> None:
        C = T.match_buffer(c, (rows, cols), "float32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:rows, 0:cols])
            T.evaluate(T.call_extern("void", function, C.access_ptr("w")))

    return _registered(f"convgen_clear_{rows}x{cols}", description, implementation)


@functools.cache
def store(rows: int, cols: int) -> str:
    """``tile[i, j] = sums[i, j]``, to shared memory."""
    from tvm.script import tirx as T  # noqa: N812

    function = f"cg_store_tile<{rows}, {cols}>"

    @T.prim_func(s_tir=True, private=True)
    def description(d: T.handle, c: T.handle) -> None:
        D = T.match_buffer(d, (rows, cols), "float32", offset_factor=1, scope="shared.dyn")
        C = T.match_buffer(c, (rows, cols), "float32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:rows, 0:cols])
            T.writes(D[0:rows, 0:cols])
            for i, j in T.grid(rows, cols):
                with T.sblock("copy"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    D[vi, vj] = C[vi, vj]

    @T.prim_func(s_tir=True, private=True)
    def implementation(d: T.handle, c: T.handle) -> None:
        d0 = T.int32()
        D = T.match_buffer(d, (rows, cols), "float32", offset_factor=1, scope="shared.dyn", strides=[d0, 1])
        C = T.match_buffer(c, (rows, cols), "float32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:rows, 0:cols])
            T.writes(D[0:rows, 0:cols])
            T.evaluate(T.call_extern("void", function, D.access_ptr("w"), d0, C.access_ptr("r")))

    return _registered(f"convgen_store_{rows}x{cols}", description, implementation)


def _registered(name: str, description: Any, implementation: Any) -> str:
    from tvm.s_tir import TensorIntrin

    TensorIntrin.register(name, description, implementation, override=True)
    return name
