"""Defaults of pointwise layers of a training step, whose images follow each other."""

from __future__ import annotations

import re

import pytest

from convgen.check.validate import validate
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.lower import lower
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import ConvSpec

ZEN4 = resolve("cpu:znver4").on(1)
COPIED = [
    "conv2d n2 ic40 oc24 i9x13 k1x1 s1 p0 relu",
    "conv2d n2 ic17 oc18 i7x21 k1x1 s1 p0 residual",
    "conv2d n2 ic20 oc70 i22x12 k1x1 s2x1 p0 bf16",
]


@pytest.mark.parametrize(
    ("layer", "schedule", "copies"),
    [
        ("ic576 oc96 i14x14", "cpu_direct", True),  # an image is half of the L2 cache, and read three times
        ("ic192 oc64 i14x14", "cpu_direct", False),  # it stays near
        ("ic144 oc24 i56x56", "cpu_rows", True),
    ],
)
def test_images_that_are_read_again_from_afar_are_copied(layer: str, schedule: str, copies: bool) -> None:
    spec = ConvSpec.parse(f"conv2d n16 {layer} k1x1 s1 p0 nobias")
    chosen = default_candidate(spec, ZEN4)
    assert (chosen.schedule.id, chosen.picks.copy_src) == (schedule, copies)


@pytest.mark.parametrize("descriptor", COPIED)
def test_copies_of_several_tiles_are_right(descriptor: str) -> None:
    """Pixels that do not fill the tiles, and tasks of several of these."""
    spec, native, rows = ConvSpec.parse(descriptor), resolve("cpu"), find_schedule("cpu_rows")
    for parts in (1, 2):
        picks = rows.default(spec.core, native).replace(copy_src=True, parallel_oh=parts)
        rows.valid(spec.core, native, picks)
        validate(compile_candidate(spec, native, Candidate(rows, picks), 2)).raise_if_failed()


@pytest.mark.parametrize(
    "layer", ["ic16 oc40 i14x13 k1x1", "ic24 oc20 i21x22 k1x1 s2x3", "ic32 oc48 g2 i9x10 k1x1 relu"]
)
def test_rows_of_the_next_image_are_fetched(layer: str) -> None:
    """And those of dst: where images come from beyond the L2 cache, and are read where they lie. One alone is not."""
    schedule, target = find_schedule("cpu_direct"), resolve("cpu").on(1)
    one = ConvSpec.parse(f"conv2d n1 {layer} p0 nobias")
    size = max(one.bytes["src"], one.bytes["dst"] // 2)
    many = one.with_(n=target.l2 // min(one.bytes["src"], one.bytes["dst"]) + 2)
    assert 3 * size < target.l2
    for spec, fetched in ((many, {"src", "dst"}), (one, set()), (many.with_(layout="nhwc", dst_layout="nhwc"), set())):
        picks = schedule.default(spec.core, target)
        picks = picks.replace(copy_src=False) if spec.layout == "nchw" else picks
        candidate = Candidate(schedule, picks)
        script = str(lower(spec, target, candidate).module["main"].script())
        names = set(re.findall(r"llvm\.prefetch.*?address_of\((?:T\.handle\(\), )?(\w+)\[", script))
        assert names & {"src", "dst"} == fetched
        validate(compile_candidate(spec, target, candidate, 1)).raise_if_failed()
