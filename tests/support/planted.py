"""Kernels with bugs in them, for tests of what must notice: written in C, or planted into a schedule."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from convgen.folders import TemporaryFolder
from convgen.hardware.target import resolve
from convgen.kernel.kernel import CpuKernel, kernel_type
from convgen.lowering.compute import Operands, convolution, copied, epilogue
from convgen.lowering.interface import Interface, TensorInfo
from convgen.lowering.link import link
from convgen.lowering.lower import Lowered
from convgen.lowering.schedule import Candidate, Picks, Program
from convgen.problem.activation import Activation
from convgen.problem.spec import ConvSpec
from convgen.schedules.reference import Reference

#: What the kernel in C computes; its padding differs at every side.
SPEC = ConvSpec.parse("conv2d n2 ic3 oc5 i6x7 k3x3 s1 p1_0x0_2 residual relu")

SOURCE = r"""
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "runtime.h"

enum {{ N = 2, IC = 3, OC = 5, H = 6, W = 7, K = 3, TOP = 1, LEFT = 0, OH = 5, OW = 7, WORKSPACE = 4 * OW }};
enum {{ DST = N * OC * OH * OW }};

extern int (*__TVMBackendParallelLaunch)(convgen_lambda, void *, int);
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void *);

typedef struct {{
    float *src, *residual, *weights, *bias, *dst;
}} tensors;

static float *data(const convgen_any *args, int i)
{{
    return ((convgen_dltensor *)args[i].value.v_ptr)->data;
}}

int __tvm_ffi_pack(void *self, const convgen_any *args, int32_t count, convgen_any *result)
{{
    memcpy(data(args, 2), data(args, 0), sizeof(float) * OC * IC * K * K);
    memcpy(data(args, 3), data(args, 1), sizeof(float) * OC);
    return 0;
}}

static int task(int index, convgen_group *group, void *closure)
{{
    const tensors t = *(tensors *)closure;
    for (int row = index; row < N * OC * OH; row += group->num_task) {{
        float *sums = __TVMBackendAllocWorkspace(1, 0, WORKSPACE, 2, 32);
        const int n = row / (OC * OH), o = row / OH % OC, y = row % OH;
        for (int x = 0; x < OW; x++) {{
            sums[x] = 0;
            for (int c = 0; c < IC; c++)
                for (int i = 0; i < K; i++)
                    for (int j = 0; j < K; j++) {{
                        const int h = y + i - TOP, w = x + j - LEFT;
                        const int from = ((n * IC + c) * H + h) * W + w, tap = ((o * IC + c) * K + i) * K + j;
                        if (h >= 0 && h < H && w >= 0 && w < W)
                            sums[x] += t.src[from] * t.weights[tap];
                    }}
        }}
        for (int x = 0; x < OW; x++) {{
            const int at = row * OW + x;
            float v = sums[x] + t.bias[o] + t.residual[at];
            if (v < 0)
                v = 0;
            {store};
        }}
        __TVMBackendFreeWorkspace(1, 0, sums);
    }}
    return 0;
}}

int __tvm_ffi_main(void *self, const convgen_any *args, int32_t count, convgen_any *result)
{{
    tensors t = {{data(args, 0), data(args, 1), data(args, 2), data(args, 3), data(args, 4)}};
    {before};
    return __TVMBackendParallelLaunch(task, &t, 0);
}}
"""


def compile_c(text: str, path: Path, compiler: str = "cc") -> Path:
    """An object file from C that includes the runtime's header."""
    source = path.with_suffix(".c")
    source.write_text(text)
    with resources.as_file(resources.files("convgen").joinpath("runtime")) as headers:
        command = [compiler, "-std=c11", "-O1", "-fPIC", "-w", f"-I{headers}", "-c", str(source), "-o", str(path)]
        subprocess.run(command, check=True)
    return path


def interface() -> Interface:
    """That of the kernel in C."""
    packed = (TensorInfo("packed0", SPEC.weights_shape), TensorInfo("packed1", (SPEC.oc,)))
    return Interface("planted", SPEC, packed, workspace_main=0, workspace_task=64, isa=())


def c_kernel(
    folder: Path,
    *,
    store: str = "t.dst[at] = v",
    before: str = "",
    threads: int = 3,
    target: str = "cpu",
    compiler: str = "cc",
) -> CpuKernel:
    """The kernel of :data:`SPEC` with other statements in two places: right, as it stands."""
    resolved = resolve(target)
    lowered = Lowered(SPEC, resolved, Candidate(Reference(), Picks()), None, 0, interface().packed)
    object_file = compile_c(SOURCE.format(store=store, before=before), folder / "kernel.o", compiler)
    library = link(interface(), object_file, folder / "libplanted.so")
    made: type[CpuKernel] = kernel_type(resolved)  # type: ignore[assignment]
    return made(lowered, interface(), object_file, library, threads, None, TemporaryFolder(folder))


class Planted(Reference):
    """The reference with a bug.

    ``sums`` and ``parameters`` replace the convolution's sums and a channel's bias and slope,
    ``finish`` what is done to a finished sum; ``activation`` is the spec's, computed wrong.
    """

    id = "planted"

    def __init__(
        self,
        sums: Callable[..., Any] | None = None,
        parameters: Callable[[dict[str, Any], Any], dict[str, Any]] = lambda found, channel: found,
        finish: Callable[..., Any] = lambda value, read, where, spec: value,
        activation: Callable[[Any], Any] | None = None,
        transforms: bool = False,
    ) -> None:
        self.sums, self.parameters, self.finish, self.activation = sums or convolution, parameters, finish, activation
        self.transforms = transforms

    def program(self, spec: ConvSpec, target: Any, picks: Picks) -> Program:
        from tvm import te

        ops = Operands(spec)
        packed = [copied(t) for t in ops.parameters]
        weights, *vectors = [te.placeholder(t.shape, t.dtype, f"{t.op.name}_in") for t in packed]
        acc = self.sums(spec, ops, weights)

        def value(n: Any, o: Any, pixel: tuple[Any, ...]) -> Any:
            total = self.finish(acc[(n, o, *pixel)], acc, (n, o, *pixel), spec)
            residual = ops.residual[ops.order(n, o, pixel)] if ops.residual is not None else None
            given = self.parameters(ops.per_channel(vectors, o), o)
            if self.activation is None:
                return epilogue(spec, total, residual=residual, **given)
            assert Activation.parse(spec.activation).name != "none"
            return self.activation(epilogue(spec.with_(activation="none"), total, residual=residual, **given))

        return Program(pack=ops.pack(*packed), main=ops.main([weights, *vectors], ops.store(value)))
