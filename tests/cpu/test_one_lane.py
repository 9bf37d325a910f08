"""A single element of a narrow type is stored alone: not with bytes of its neighbours, nor beyond the end."""

from __future__ import annotations

import pytest

import convgen
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import parse_candidate
from convgen.problem.spec import ConvSpec

#: Where LLVM knows at compile time that a mask has one lane.
CASES = [
    ("cpu_direct", "conv1d ic512 oc40 i1 k1 i8 src_u8 dst_u8 dst_zero"),
    ("cpu_direct", "conv1d ic512 oc40 i1 k1 i8 dst_zero"),
    ("cpu_winograd_rows", "conv1d ic8 oc16 i1 k5 p2 bf16"),
    ("cpu_rows", "conv2d ic8 oc16 i3x17 k3x3 p1x1 bf16"),
]


@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3", "cpu:x86-64-v2"])
@pytest.mark.parametrize(("schedule", "descriptor"), CASES)
def test_one_element_is_stored_alone(schedule: str, descriptor: str, target: str) -> None:
    spec, resolved = ConvSpec.parse(descriptor), resolve(target).on(1)
    if not resolved.native:
        pytest.skip(f"{target} does not run here")
    kernel = compile_candidate(spec, resolved, parse_candidate(spec, resolved, schedule), 1)
    convgen.validate(kernel).raise_if_failed()
