"""The rates of targets add up to what the devices' data sheets say."""

from __future__ import annotations

import pytest

from convgen.hardware.target import Target, resolve

#: Dense 10¹² operations a second with sums of 32 bits, by operand type: NVIDIA's data sheets and whitepapers of T4,
#: A100, A40, GeForce RTX 4090, H100 SXM5 and GeForce RTX 5090.
SHEETS = {
    "sm_75": {"f16": 65},
    "sm_80": {"f16": 312, "bf16": 312, "tf32": 156, "i8": 624},
    "sm_86": {"f16": 149.7, "bf16": 149.7, "tf32": 74.8, "i8": 299.3},
    "sm_89": {"f16": 165.2, "bf16": 165.2, "tf32": 82.6, "i8": 660.6},
    "sm_90a": {"f16": 989.4, "bf16": 989.4, "tf32": 494.7, "i8": 1978.9},
    "sm_120": {"f16": 209.5, "bf16": 209.5, "tf32": 104.8, "i8": 838},
}
#: Multiprocessors of these devices.
USUAL = {"sm_70": 80, "sm_75": 40, "sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90a": 132, "sm_120": 170}
#: f32 outside of the matrix units.
SCALAR = {"sm_70": 15.7, "sm_75": 8.1, "sm_80": 19.5, "sm_86": 37.4, "sm_89": 82.6, "sm_120": 104.8}


def operations(target: Target, per_cycle: int) -> float:
    """10¹² operations a second of the usual device's cores; a multiply-add is two."""
    return USUAL[target.arch] * per_cycle * 2 * target.rates.clock / 1e12


@pytest.mark.parametrize("arch", SHEETS)
def test_matrix_units_do_what_the_data_sheet_says(arch: str) -> None:
    target = resolve(f"cuda:{arch}")
    found = dict(target.rates.wgmma or target.rates.mma)
    assert {dtype: operations(target, rate) for dtype, rate in found.items()} == pytest.approx(SHEETS[arch], rel=0.02)


@pytest.mark.parametrize("arch", SCALAR)
def test_f32_units_do_what_the_data_sheet_says(arch: str) -> None:
    target = resolve(f"cuda:{arch}")
    assert operations(target, target.rates.fma) == pytest.approx(SCALAR[arch], rel=0.02)


def test_rates_are_there_for_what_targets_say_they_take() -> None:
    for arch in ("sm_70", "sm_80", "sm_87", "sm_90", "sm_90a", "sm_100", "sm_120"):
        target = resolve(f"cuda:{arch}")
        assert tuple(dtype for dtype, _ in target.rates.mma) == target.matrix
        assert bool(target.rates.wgmma) == ("wgmma" in target.features)
