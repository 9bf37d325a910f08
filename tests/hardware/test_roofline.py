"""The limits of a layer, on a machine with given figures."""

from __future__ import annotations

import dataclasses

import pytest

from convgen.hardware.machine import Machine, Measured
from convgen.hardware.roofline import roofline
from convgen.problem.spec import ConvSpec

HERE = Machine("cpu", "cpu-0-2", frozenset(), cores=2, logical=4, l1=32 << 10, l2=1 << 20, l3=32 << 20, memory=1 << 34)
FOUND = Measured(peak=100e9, l2=100e9, l3=50e9, dram=10e9, date="2026-01-01")


@pytest.mark.parametrize(
    ("descriptor", "threads", "limited_by", "seconds"),
    [
        # 2·64·64·9·56² operations at the peak; 1.7 MiB of tensors do not matter.
        ("conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1", 1, "compute", 2 * 64 * 64 * 9 * 56 * 56 / 100e9),
        # 1 MiB of weights, src and dst in L3; on two threads, which have 2 MiB of L2, there.
        ("conv1d n1 ic512 oc512 i1 k1 nobias", 1, "l3", 4 * (512 * 512 + 2 * 512) / 50e9),
        ("conv1d n1 ic512 oc512 i1 k1 nobias", 2, "l2", 4 * (512 * 512 + 2 * 512) / 100e9),
        # 4 MiB of weights and a residual, far beyond L2; 64 MiB of weights, beyond L3.
        ("conv1d n1 ic1024 oc1024 i1 k1 nobias residual", 2, "l3", 4 * (1024 * 1024 + 3 * 1024) / 50e9),
        ("conv1d n1 ic4096 oc4096 i1 k1 nobias", 2, "dram", 4 * (4096 * 4096 + 2 * 4096) / 10e9),
    ],
)
def test_the_side_that_bounds(descriptor: str, threads: int, limited_by: str, seconds: float) -> None:
    found = roofline(ConvSpec.parse(descriptor), threads, here=HERE, found=FOUND)
    assert (found.limited_by, found.seconds) == (limited_by, pytest.approx(seconds))
    assert found.to_dict()["seconds"] == found.seconds


@pytest.mark.parametrize(
    ("words", "of"),
    [("i8", "i8"), ("bf16", "bf16"), ("accuracy_bf16", "bf16"), ("", "f32"), ("f16", "f32"), ("relaxed", "f32")],
)
def test_the_peak_is_that_of_what_is_multiplied(words: str, of: str) -> None:
    spec = ConvSpec.parse(f"conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1 {words}")
    peaks = {"f32": 100e9, "i8": 400e9, "bf16": 200e9}
    found = dataclasses.replace(FOUND, peak_i8=peaks["i8"], peak_bf16=peaks["bf16"])
    limit = roofline(spec, 1, here=HERE, found=found)
    assert (limit.peak_of, limit.peak_flops) == (of, peaks[of])
    assert limit.compute_seconds == pytest.approx(spec.flops / peaks[of])
    # Where the machine has no such instruction, or one that is slower, f32 is what there is.
    for slower in (None, 50e9):
        found = dataclasses.replace(FOUND, peak_i8=slower, peak_bf16=slower)
        assert roofline(spec, 1, here=HERE, found=found).peak_of == "f32"


def test_more_threads_than_cores_have_no_more_caches() -> None:
    spec = ConvSpec.parse("conv1d n1 ic1024 oc1024 i1 k1")
    assert roofline(spec, 4, here=HERE, found=FOUND).level == "l3"


def test_cold_tensors_come_from_memory() -> None:
    spec = ConvSpec.parse("conv1d n1 ic64 oc64 i1 k1")
    assert roofline(spec, 1, here=HERE, found=FOUND).level == "l2"
    assert roofline(spec, 1, here=HERE, found=FOUND, cold=True).level == "dram"


def test_unknown_caches_count_as_none() -> None:
    spec = ConvSpec.parse("conv1d n1 ic64 oc64 i1 k1")
    here = dataclasses.replace(HERE, l2=None)
    found = dataclasses.replace(FOUND, l2=None)
    assert roofline(spec, 1, here=here, found=found).level == "l3"
    here, found = dataclasses.replace(here, l3=None), dataclasses.replace(found, l3=None)
    assert roofline(spec, 1, here=here, found=found).level == "dram"
