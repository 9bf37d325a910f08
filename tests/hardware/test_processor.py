"""LLVM's name of this machine's processor."""

from __future__ import annotations

import pytest
from processors import features

from convgen.hardware.isa import CHECKED
from convgen.hardware.machine import machine
from convgen.hardware.processor import recognised, system_processor
from convgen.hardware.target import resolve


def has(processor: str) -> frozenset[str]:
    on = features("x86_64", processor)
    return frozenset(f.name for f in CHECKED["x86_64"] if f.llvm in on)


@pytest.mark.parametrize("processor", ["haswell", "icelake-server", "sapphirerapids", "znver4", "znver5"])
def test_one_that_has_what_its_number_says_is_what_it_says(processor: str) -> None:
    assert recognised(processor, "x86_64", has(processor) | {"hypervisor"}) == processor


def test_one_with_more_than_its_number_says_is_known_by_what_it_has() -> None:
    """Sapphire Rapids with the number of Rocket Lake, as seen in a virtual machine."""
    assert recognised("rocketlake", "x86_64", has("sapphirerapids")) == "sapphirerapids"
    assert recognised("znver3", "x86_64", has("znver5")) == "znver5"
    assert recognised("haswell", "x86_64", has("haswell") | has("skylake-avx512")) == "skylake-avx512"


def test_one_with_less_than_its_number_says_keeps_it() -> None:
    """What is hidden is turned off one by one; units and caches are those of its number."""
    assert recognised("sapphirerapids", "x86_64", has("haswell")) == "sapphirerapids"
    assert recognised("znver4", "x86_64", has("znver4") - {"avx512bf16"}) == "znver4"


def test_what_no_processor_explains_keeps_its_number() -> None:
    assert recognised("haswell", "x86_64", has("haswell") | {"avx512fp16"}) == "haswell"


def test_kernels_for_this_machine_may_use_all_it_has() -> None:
    if machine().arch != "x86_64":
        pytest.skip("a processor that is no x86-64 is what its number says")
    checked = {f.name for f in CHECKED["x86_64"]}
    assert set(resolve("cpu").isa) <= machine().features & checked
    assert resolve("cpu").spelling == f"cpu:{system_processor()}"
