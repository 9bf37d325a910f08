"""What kernels take of a thread's stack is bounded, and what bounds it is right."""

from __future__ import annotations

import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from naive import link_naive
from usable import usable

from convgen.errors import BuildError, Inapplicable
from convgen.hardware.target import Target, resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering import stack
from convgen.lowering.discover import schedules_of
from convgen.lowering.lower import compile_object, lower
from convgen.lowering.schedule import Candidate, Schedule
from convgen.lowering.stack import STACK, check_stack, stack_bytes
from convgen.problem.spec import ConvSpec

#: Between them every schedule for CPUs applies.
LAYERS = [
    "conv2d n1 ic31 oc15 i5x7 k1x1 residual gelu relaxed",
    "conv2d n1 ic16 oc34 i6x6 k3x3 p1 prelu relaxed bf16",
    "conv2d n1 ic16 oc34 i6x6 k1x1 residual prelu f16 relaxed",
    "conv2d n1 ic32 oc64 g2 i9x18 k3x3 p1 residual relu",
    "conv2d n1 ic4 oc8 g4 i8x8 k5x5 s2x1 p2 residual leaky_relu(0.25)",
    "conv2d n1 ic16 oc32 i6x5 k3x3 p1 nhwc accuracy_bf16",
    "conv2d n1 ic16 oc16 g16 i6x5 k3x3 p1 nhwc tanh",
    "convtranspose2d n1 ic5 oc18 i4x5 k4x4 s2 p1 relu",
    "convtranspose2d n1 ic6 oc6 g6 i5x6 k3x3 s2 p1",
    "convtranspose2d n4 ic9 oc5 i1x1 k4x3 s1 residual relu",
    "conv1d n1 ic16 oc17 i33 k3 p2_0 elu(0.5) strict",
    "conv2d n1 ic28 oc56 g7 i6x11 k3x3 p1 nhwc relu",
    "conv2d n1 ic17 oc33 i6x6 k3x3 p1 nhwc prelu",
    "conv2d n2 ic17 oc33 i6x6 k3x3 p1 weights",
]


def candidates(target: Target) -> list[tuple[ConvSpec, Schedule]]:
    """Every schedule with the first of the layers that it applies to."""
    found = []
    for schedule in schedules_of("cpu").values():
        for spec in map(ConvSpec.parse, LAYERS):
            try:
                schedule.check(spec.core, target)
            except Inapplicable:
                continue
            found.append((spec, schedule))
            break
    return found


def test_every_schedule_is_among_them() -> None:
    target = resolve("cpu")
    assert {schedule.id for _, schedule in candidates(target)} == set(usable(target))


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="reads objdump's x86 code")
@pytest.mark.parametrize("spelling", ["cpu", pytest.param("cpu:x86-64", marks=pytest.mark.slow)])
def test_frames_are_those_that_the_disassembler_shows(spelling: str, tmp_path: Path) -> None:
    target, largest = resolve(spelling), 0
    for spec, schedule in candidates(target):
        path = tmp_path / f"{schedule.id}.o"
        compile_object(lower(spec, target, Candidate(schedule, schedule.default(spec.core, target))), path)
        text = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
        shown = [int(size, 16) for size in re.findall(r"\bsub +\$0x([0-9a-f]+),%rsp", text)]
        shown = [size for size in shown if size > 127]  # smaller ones are another instruction
        assert stack_bytes(path.read_bytes(), "x86_64") == sum(shown)
        check_stack(path.read_bytes(), "x86_64")
        largest = max(largest, sum(shown))
    assert largest > 1000


def test_sums_of_short_runs_stay_in_registers(tmp_path: Path) -> None:
    """LLVM unrolls runs of three channels, and kept what their steps load beside each other on the stack."""
    target, spec = resolve("cpu:znver4"), ConvSpec.parse("conv2d n1 ic3 oc64 i224x224 k3x3 s2 dst_nchw16c relu")
    direct = schedules_of("cpu")["cpu_direct"]
    compile_object(lower(spec, target, Candidate(direct, direct.default(spec.core, target))), tmp_path / "kernel.o")
    assert stack_bytes((tmp_path / "kernel.o").read_bytes(), "x86_64") < 1000


CALLER = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include "kernel.h"

static void *call(void *unused)
{
    convgen_sizes s;
    if (kernel_sizes(1, &s))
        exit(1);
    #define NEW(name) .name = s.name ? calloc(1, s.name) : NULL, .name##_size = s.name
    const convgen_pack_args pack = {NEW(weights), NEW(bias), NEW(slope), NEW(scale),
                                    .packed = aligned_alloc(64, (s.packed + 63) / 64 * 64), .packed_size = s.packed};
    const convgen_run_args run = {NEW(src), NEW(residual), NEW(dst), .packed = pack.packed, .packed_size = s.packed,
                                  .workspace = aligned_alloc(64, (s.workspace + 63) / 64 * 64 + 64),
                                  .workspace_size = s.workspace};
    int status = kernel_pack(&pack);
    if (!status)
        status = kernel_run(&run);
    if (status) {
        puts(kernel_error(status));
        exit(1);
    }
    return unused;
}

int main(int argc, char **argv)
{
    pthread_attr_t attributes;
    pthread_t thread;
    (void)argc;
    pthread_attr_init(&attributes);
    if (pthread_attr_setstacksize(&attributes, strtoul(argv[1], NULL, 10)) ||
        pthread_create(&thread, &attributes, call, NULL))
        return 2;
    return pthread_join(thread, NULL);
}
"""


@pytest.mark.parametrize(
    ("text", "schedule"),
    [(LAYERS[0], "reference"), (LAYERS[4], "cpu_rows"), (LAYERS[2], "cpu_rows")],
    ids=lambda value: value if isinstance(value, str) and value.startswith(("cpu", "ref")) else "",
)
def test_kernels_run_on_a_small_stack(text: str, schedule: str, tmp_path: Path) -> None:
    """Of that size, with what the C library itself wants of it, and a guard page below."""
    target, spec = resolve("cpu"), ConvSpec.parse(text)
    found = schedules_of("cpu")[schedule]
    kernel = compile_candidate(spec, target, Candidate(found, found.default(spec.core, target)), 1, name="kernel")
    kernel.export(tmp_path)
    (tmp_path / "caller.c").write_text(CALLER)
    command = ["cc", "-std=gnu11", "-o", "caller", "caller.c", "libkernel.so", "-Wl,-rpath,$ORIGIN", "-pthread"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(["./caller", str(STACK + (16 << 10))], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "at\n * most 64 KiB of a thread's stack" in (tmp_path / "kernel.h").read_text()


def test_what_takes_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (b"\x90\x48\x81\xec" + size.to_bytes(4, "little") for size in (4096, STACK))
    check_stack(small * 3, "x86_64")
    for code in (large, small * 20):
        with pytest.raises(BuildError, match=r"frames of at most 57344 bytes, found \d+"):
            check_stack(code, "x86_64")
    # sub sp, sp, #16, lsl #12 and sub sp, sp, #96
    assert stack_bytes(struct.pack("<3I", 0xD14043FF, 0xD10183FF, 0xD503201F), "aarch64") == (16 << 12) + 96
    monkeypatch.setattr(stack, "STACK", 0)
    with pytest.raises(BuildError, match="found"):
        link_naive(ConvSpec.parse("conv1d n1 ic1 oc1 i9 k3"), tmp_path)
