"""A program that runs a kernel in static buffers, of the sizes that the header has as constants."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import convgen

PROGRAM = """
#include <stdio.h>
#include "conv.h"

static ELEMENT src[conv_SRC_ELEMENTS], weights[conv_WEIGHTS_ELEMENTS], dst[conv_DST_ELEMENTS];
static ELEMENT residual[conv_RESIDUAL_ELEMENTS];
static float bias[conv_BIAS_ELEMENTS];
static _Alignas(CONVGEN_ALIGNMENT) unsigned char packed[conv_PACKED_BYTES];
static _Alignas(CONVGEN_ALIGNMENT) unsigned char workspace[conv_WORKSPACE_BYTES(THREADS) + 1];

_Static_assert(sizeof src == conv_SRC_BYTES && sizeof dst == conv_DST_BYTES, "");
_Static_assert(sizeof weights == conv_WEIGHTS_BYTES && sizeof residual == conv_RESIDUAL_BYTES, "");
_Static_assert(conv_SRC_ELEMENTS == 2 * 3 * 6 * 7 && conv_DST_ELEMENTS == 2 * 8 * 6 * 7, "");
_Static_assert(conv_WORKSPACE_BYTES(4) >= conv_WORKSPACE_BYTES(1), "");
_Static_assert(_Generic(conv_WORKSPACE_BYTES(4), size_t: 1, default: 0), "an int overflows on many threads");
#if conv_WORKSPACE_BYTES(4) < conv_WORKSPACE_BYTES(1) || conv_PACKED_BYTES < 64
#error "no constants of the preprocessor"
#endif

#define GIVEN(buffer) .buffer = buffer, .buffer##_size = sizeof buffer

int main(void)
{
    convgen_sizes sizes;
    if (conv_sizes(THREADS, &sizes) != CONVGEN_OK || sizes.src != sizeof src || sizes.weights != sizeof weights ||
        sizes.dst != sizeof dst || sizes.packed != sizeof packed || sizes.workspace != sizeof workspace - 1)
        return 2;
    for (int i = 0; i < conv_SRC_ELEMENTS; ++i)
        src[i] = (ELEMENT)1;
    for (int i = 0; i < conv_WEIGHTS_ELEMENTS; ++i)
        weights[i] = (ELEMENT)2;
    for (int i = 0; i < conv_RESIDUAL_ELEMENTS; ++i)
        residual[i] = (ELEMENT)5;
    convgen_pack_args pack = {GIVEN(weights), GIVEN(bias), GIVEN(packed)};
    convgen_run_args run = {GIVEN(src), GIVEN(packed), GIVEN(residual), GIVEN(dst), GIVEN(workspace)};
    if (conv_pack(&pack) != CONVGEN_OK || (THREADS > 1 && conv_pool_create(THREADS, &run.pool) != CONVGEN_OK))
        return 3;
    if (conv_run(&run) != CONVGEN_OK)
        return 4;
    if (THREADS > 1)
        conv_pool_destroy(run.pool);
    printf("%g %g\\n", (double)dst[0], (double)dst[8]);
    return 0;
}
"""


@pytest.mark.parametrize(("dtype", "element"), [("f32", "float"), ("f16", "_Float16")])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_program_with_static_buffers_alone(dtype: str, element: str, threads: int, tmp_path: Path) -> None:
    text = f"conv2d n2 ic3 oc8 i6x7 k3x3 p1 residual {dtype}".removesuffix(" f32")
    kernel = convgen.build(text, threads=threads, records=False, name="conv")
    kernel.export(tmp_path)
    bias = element if kernel.spec.dtypes["bias"] == dtype else "float"
    (tmp_path / "program.c").write_text(PROGRAM.replace("static float bias", f"static {bias} bias"))
    defined = [f"-DELEMENT={element}", f"-DTHREADS={threads}"]
    defined += ["-Wpedantic"] * (dtype == "f32")  # C11 has no _Float16
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", *defined, "program.c", "libconv.a", "-lm", "-lpthread"]
    subprocess.run([*command, "-o", "program"], cwd=tmp_path, check=True)
    corner, inside = 3 * 4 * 2 + 5, 3 * 9 * 2 + 5
    assert subprocess.check_output(["./program"], cwd=tmp_path, text=True) == f"{corner} {inside}\n"
