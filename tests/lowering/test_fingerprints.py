"""What schedules generate for a few layers of all kinds is what was committed; what counts as a difference."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from convgen.hardware.target import resolve
from convgen.problem.spec import ConvSpec

fingerprints: Any = importlib.import_module("fingerprints")  # a program beside this file

#: Of ``bench/problems``: pointwise and depthwise 1-D, strided and plain 2-D, grouped, depthwise, 3-D, transposed.
LAYERS = [
    "conv1d n1 ic32 oc32 i16000 k1 s1 p0 residual",
    "conv1d n1 ic512 oc512 g512 i4001 k3 s1 p1 prelu",
    "conv2d n1 ic256 oc512 i56x56 k1x1 s2x2 p0x0",
    "conv2d n1 ic48 oc192 i13x13 k3x3 s1x1 p1x1 relu",
    "conv2d n1 ic256 oc256 g32 i56x56 k3x3 s2x2 p1x1 relu",
    "conv2d n1 ic960 oc960 g960 i7x7 k3x3 s1x1 p1x1 clip(0,6)",
    "conv3d n1 ic512 oc512 i2x7x7 k3x3x3 s1x1x1 p1x1x1 relu",
    "convtranspose2d n1 ic21 oc21 i16x16 k4x4 s2x2 p0x0",
]


@pytest.mark.parametrize("mode", fingerprints.MODES)
@pytest.mark.parametrize("target", fingerprints.TARGETS)
def test_schedules_generate_what_they_did(target: str, mode: str) -> None:
    """Where a change is meant: ``python tests/lowering/fingerprints.py --write``, and raise schedules' versions."""
    committed = dict(line.split("\t") for line in fingerprints.path_of(target, mode).read_text().splitlines())
    specs = [ConvSpec.parse(descriptor) for descriptor in LAYERS]
    generated = dict(
        line.split("\t") for line in fingerprints.lines(resolve(target, fingerprints.MACHINE), mode, specs)
    )
    assert len(generated) >= len(LAYERS) - 1  # there are no transposed layers of i8
    assert generated == {layer: committed[layer] for layer in generated}


TIR = """
@T.prim_func
def main(src: T.Buffer((4, 8), "float32"), dst: T.Buffer((4, 8), "float32")):
    acc = T.sblock_alloc_buffer((8,))
    for row in T.parallel(4):
        for column in T.vectorized(8):
            with T.sblock("sums"):
                v_row, v_column = T.axis.remap("SS", [row, column])
                acc[v_column] = T.exp(src[v_row, v_column]) + T.float32(0.5)
                dst[v_row, v_column] = acc[v_column] * src[v_row, v_column]
"""
CUDA = """
extern "C" __global__ void __launch_bounds__(128) main_kernel(float* __restrict__ dst, const float* src) {
  __shared__ float tile[64];
  for (int row = 0; row < 4; ++row) {
    cg_copy<16>(&tile[threadIdx.x], &src[row * 128]);
    __syncthreads();
    dst[row * 128 + threadIdx.x] = fmaxf(tile[threadIdx.x], 0.5f) + expf(src[row]);
  }
}
"""


@pytest.mark.parametrize(
    ("canonical", "text", "names"),
    [
        (fingerprints.canonical_tir, TIR, {"row": "task", "v_column": "lane", "acc": "sums", '"sums"': '"dst"'}),
        (fingerprints.canonical_cuda, CUDA, {"row": "task", "tile": "staged", "dst": "out"}),
    ],
    ids=["TIR", "CUDA"],
)
def test_names_do_not_count(canonical: Callable[[str], str], text: str, names: dict[str, str]) -> None:
    renamed = text
    for name, other in names.items():
        renamed = renamed.replace(name, other)
    assert renamed != text
    assert canonical(renamed) == canonical(text)


CHANGES = [
    (fingerprints.canonical_tir, TIR, "T.float32(0.5)", "T.float32(0.25)"),
    (fingerprints.canonical_tir, TIR, "T.parallel(4)", "T.parallel(2)"),
    (fingerprints.canonical_tir, TIR, "(8,)", "(16,)"),
    (fingerprints.canonical_tir, TIR, "T.exp(", "T.sqrt("),
    (fingerprints.canonical_tir, TIR, '"float32"', '"float16"'),
    (fingerprints.canonical_tir, TIR, '"SS"', '"SR"'),
    (fingerprints.canonical_tir, TIR, "T.vectorized", "T.unroll"),
    (fingerprints.canonical_tir, TIR, "src[v_row, v_column])", "src[v_column, v_row])"),
    (fingerprints.canonical_tir, TIR, "acc[v_column] * src", "src[v_row, v_column] * acc"),
    (fingerprints.canonical_cuda, CUDA, "0.5f", "0.25f"),
    (fingerprints.canonical_cuda, CUDA, "__launch_bounds__(128)", "__launch_bounds__(256)"),
    (fingerprints.canonical_cuda, CUDA, "fmaxf", "fminf"),
    (fingerprints.canonical_cuda, CUDA, "cg_copy<16>", "cg_copy<8>"),
    (fingerprints.canonical_cuda, CUDA, "cg_copy<16>", "cg_load<16>"),
    (fingerprints.canonical_cuda, CUDA, "    __syncthreads();\n", ""),
    (fingerprints.canonical_cuda, CUDA, "const float*", "const int8_t*"),
    (fingerprints.canonical_cuda, CUDA, "threadIdx.x], &src", "threadIdx.y], &src"),
    (fingerprints.canonical_cuda, CUDA, "&src[row * 128]", "&dst[row * 128]"),
]


@pytest.mark.parametrize(("canonical", "text", "before", "after"), CHANGES)
def test_what_is_computed_counts(canonical: Callable[[str], str], text: str, before: str, after: str) -> None:
    """Constants, extents, functions, types, kinds of loops, barriers, and which value goes where."""
    changed = text.replace(before, after, 1)
    assert changed != text
    assert canonical(changed) != canonical(text)


def test_the_order_of_loops_and_statements_counts() -> None:
    outer, inner = "for row in T.parallel(4):", "for column in T.vectorized(8):"
    swapped = TIR.replace(outer, "OUTER").replace(inner, outer).replace("OUTER", inner)
    assert fingerprints.canonical_tir(swapped) != fingerprints.canonical_tir(TIR)
    lines = CUDA.splitlines()
    lines[4], lines[5] = lines[5], lines[4]
    assert fingerprints.canonical_cuda("\n".join(lines)) != fingerprints.canonical_cuda(CUDA)
