"""What a network's C functions refuse to run on: the same on a CPU and on a GPU, before anything is touched."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from network_models import model_of
from onnx import helper

import convgen

#: One argument is wrong in each line of ``check``.
PROGRAM = r"""
static _Alignas(64) char x[net_INPUT0_BYTES + 64], weights[net_WEIGHTS_BYTES + 64], work[1 << 16];
static _Alignas(64) char y[net_OUTPUT0_BYTES + 64], z[net_OUTPUT1_BYTES + 64];

#define EXPECT(status, change)                                                                     \
    {                                                                                              \
        const void *inputs[] = {x};                                                                \
        void *outputs[] = {y, z};                                                                  \
        size_t input_sizes[] = {net_INPUT0_BYTES};                                                 \
        size_t output_sizes[] = {net_OUTPUT0_BYTES, net_OUTPUT1_BYTES};                            \
        ARGUMENTS a = {.inputs = inputs, .input_sizes = input_sizes, .outputs = outputs,           \
                       .output_sizes = output_sizes, .workspace = work, .workspace_size = sizeof work}; \
        SET_WEIGHTS                                                                                \
        change;                                                                                    \
        const int found = RUN(&a);                                                                 \
        if (found != (status)) {                                                                   \
            fprintf(stderr, "line %d: expected %d, found %d\n", __LINE__, (int)(status), found);   \
            return 1;                                                                              \
        }                                                                                          \
    }

static int check(void)
{
    EXPECT(CONVGEN_NULL_POINTER, a.inputs = NULL)
    EXPECT(CONVGEN_NULL_POINTER, a.output_sizes = NULL)
    EXPECT(CONVGEN_NULL_POINTER, inputs[0] = NULL)
    EXPECT(CONVGEN_NULL_POINTER, outputs[1] = NULL)
    EXPECT(CONVGEN_WRONG_SIZE, --input_sizes[0])
    EXPECT(CONVGEN_WRONG_SIZE, ++output_sizes[1])
    EXPECT(CONVGEN_MISALIGNED, inputs[0] = x + ALIGNMENT / 2)
    EXPECT(CONVGEN_MISALIGNED, outputs[0] = y + ALIGNMENT / 2)
    EXPECT(CONVGEN_NULL_POINTER, (a.workspace = NULL, a.workspace_size = 0))
    EXPECT(CONVGEN_WRONG_SIZE, a.workspace_size = 8)
    EXPECT(CONVGEN_MISALIGNED, a.workspace = work + 32)
    EXPECT(CONVGEN_OVERLAP, outputs[0] = x)
    EXPECT(CONVGEN_OVERLAP, outputs[1] = y)
    EXPECT(CONVGEN_OVERLAP, outputs[1] = work)
    EXPECT(CONVGEN_OVERLAP, outputs[0] = weights + 16)
    EXPECT(CONVGEN_OVERLAP, a.workspace = weights)
    EXPECT(NO_SUCH_SIZE, a.size = 1)
    EXPECT(NO_SUCH_SIZE, a.size = -1)
    return 0;
}
"""

ON_CPU = r"""
#include <stdio.h>

#include "net.h"

static convgen_network *network;
#define ARGUMENTS convgen_network_args
#define SET_WEIGHTS
#define RUN(a) net_run(network, a)
#define ALIGNMENT 4
#define NO_SUCH_SIZE CONVGEN_NO_SUCH_SIZE
"""

MAIN_ON_CPU = r"""
int main(void)
{
    FILE *file = fopen("net.weights", "rb");
    if (file == NULL || fread(weights, 1, net_WEIGHTS_BYTES, file) != net_WEIGHTS_BYTES)
        return 2;
    fclose(file);
    if (net_open_memory(weights, net_WEIGHTS_BYTES, &network) != CONVGEN_OK)
        return 3;
    if (check())
        return 1;
    EXPECT(CONVGEN_OK, inputs[0] = x + 4)
    return 0;
}
"""

ON_DEVICE = r"""
#include <stdio.h>

#include "net.h"

#define ARGUMENTS convgen_network_cuda_args
#define SET_WEIGHTS a.weights = weights, a.weights_size = net_WEIGHTS_BYTES;
#define RUN(a) net_run(a)
#define ALIGNMENT 16
#define NO_SUCH_SIZE CONVGEN_DEVICE_NO_SUCH_SIZE
"""

MAIN_ON_DEVICE = r"""
int main(void)
{
    EXPECT(CONVGEN_NULL_POINTER, a.weights = NULL)
    EXPECT(CONVGEN_WRONG_SIZE, --a.weights_size)
    EXPECT(CONVGEN_MISALIGNED, a.weights = weights + 16)
    if (check())
        return 1;
    EXPECT(CONVGEN_NO_DRIVER, a.size = 0)
    return 0;
}
"""


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_80"])
def test_wrong_arguments_are_refused_with_the_same_status(target: str, tmp_path: Path) -> None:
    if target != "cpu":
        pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'convgen[cuda]'")
    weights = np.ones((8, 8, 3, 3), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4),
        helper.make_node("Conv", ["y", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Softmax", ["c"], ["z"], axis=1),
    ]
    model = model_of(nodes, {"x": (1, 8, 6, 6)}, ["y", "z"], {"w": weights})
    network = convgen.compile(model, target, 1, records=False, name="net")
    network.export(tmp_path, example=False)
    on_cpu = target == "cpu"
    parts = (ON_CPU, PROGRAM, MAIN_ON_CPU) if on_cpu else (ON_DEVICE, PROGRAM, MAIN_ON_DEVICE)
    (tmp_path / "use.c").write_text("".join(parts))
    libraries = ["-lm", "-lpthread", *([] if on_cpu else ["-ldl"])]
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "use.c", "libnet.a", *libraries, "-o", "use"]
    subprocess.run(command, cwd=tmp_path, check=True)
    environment = {"CONVGEN_CUDA_DRIVER": "/no/driver"}
    done = subprocess.run(["./use"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
