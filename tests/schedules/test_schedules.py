"""Every discovered schedule for CPUs on a set of small problems, and what any schedule must keep to.

A new file in ``schedules/`` is tested here without a line added, but for a problem in :data:`SMOKE`
where none applies to it.
"""

from __future__ import annotations

import inspect
import json
import math
import pickle
import random
import re
from itertools import islice
from typing import Any

import pytest
from drawn_points import random_picks
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from strategies import ACTIVATIONS, specs
from usable import usable

from convgen import build
from convgen.check.data import float_data
from convgen.check.validate import Report, validate
from convgen.errors import Inapplicable, SpecError, UnsupportedError
from convgen.formats.sources import read_specs
from convgen.hardware.target import Target, resolve
from convgen.kernel.kernel import Kernel, compile_candidate
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.discover import schedules
from convgen.lowering.lower import lower
from convgen.lowering.schedule import Candidate, Picks, Schedule, Space, require
from convgen.problem.spec import ConvSpec

THREADS = 3
#: Between them: every rank, layout, feature, activation and dtype; channels one off the tiles.
SMOKE = [
    "conv2d n1 ic3 oc17 i9x10 k3x3 s2 p0_1x1_0 relu",
    "conv2d n2 ic16 oc31 i7x6 k3x3 s1 p1 residual silu",
    "conv2d n1 ic17 oc33 i6x6 k3x3 s1 p1x0_2 nhwc prelu",
    "conv2d n1 ic31 oc15 i5x7 k1x1 s1 p0 residual gelu",
    "conv2d n1 ic33 oc16 i4x4 k1x1 s1 p0 nhwc nobias relu6",
    "conv1d n1 ic16 oc17 i33 k3 s1 p2_0 elu(0.5) strict",
    "conv1d n2 ic6 oc12 g3 i20 k5 s2 p2 d2 hardswish",
    "conv2d n1 ic15 oc15 g15 i9x9 k3x3 s1 p1 relu6",
    "conv2d n1 ic4 oc8 g4 i8x8 k5x5 s2x1 p2 residual leaky_relu(0.25)",
    "conv2d n1 ic16 oc16 g16 i6x5 k3x3 s1 p1 d1x2 nhwc leaky_relu",
    "conv3d n1 ic16 oc16 i3x4x5 k3x3x3 s1 p1 sigmoid",
    "conv3d n1 ic2 oc3 i4x5x4 k2x3x1 s1x2x1 p0_1x1x0 nhwc hardsigmoid",
    "convtranspose2d n1 ic5 oc6 i4x5 k3x3 s2 p1x0_1 op1x0 tanh",
    "convtranspose1d n2 ic4 oc6 g2 i6 k4 s3 p1 d2 op2 nhwc gelu_tanh residual",
    "convtranspose2d n1 ic17 oc16 i5x5 k4x4 s2 p1 relaxed relu",
    "convtranspose3d n1 ic3 oc2 i2x3x2 k2x2x3 s2x1x2 p0 nobias",
    "conv2d n1 ic16 oc16 i1x1 k1x1 s1 p0 clip(0,inf)",  # one pixel
    "conv2d n2 ic17 oc33 i9x8 k3x3 s2x1 p1x0_2 weights",
    "conv3d n1 ic5 oc18 i3x4x9 k2x3x3 s1 p0x1x1 d1x1x2 nobias weights nhwc f16",
    "convtranspose2d n2 ic6 oc10 g2 i5x9 k3x4 s2x2 p1x0_1 op1x0 weights",
    "conv2d n1 ic8 oc34 g2 i5x6 k3x3 s1 p1 weights bf16",  # one channel past a vector, stored narrow
    "conv2d n2 ic20 oc40 g20 i9x35 k3x3 s2 p1 weights nhwc bf16",
    "conv2d n3 ic18 oc17 i9x10 k3x3 s1 p1 weights nhwc bf16",  # tiles past the image, channels past a vector
    "conv2d n1 ic16 oc17 i9x8 k3x3 s1 p1 data",
    "conv2d n2 ic7 oc7 g7 i9x37 k3x3 s2 p1 data f16",
    "convtranspose2d n2 ic6 oc9 g3 i5x9 k3x4 s2x3 p1x0_1 op1x0 prelu residual",
    "conv2d n1 ic8 oc17 i5x4 k5x4 s1 p0",  # the kernel covers the input
    "conv2d n1 ic5 oc9 i11x11 k2x2 s3x4 p0 clip(-1,2.5)",  # strides past the kernel
    "conv2d n1 ic17 oc18 i7x9 k3x3 s1 p1 residual mish bf16",
    "conv2d n1 ic16 oc34 i6x6 k1x1 s1 p0 residual prelu f16 relaxed",
    "conv2d n1 ic9 oc9 g9 i9x8 k3x3 s2 p1 relu f16",
    "conv2d n1 ic17 oc17 g17 i6x5 k3x3 s1 p1 nhwc residual bf16",
    "convtranspose2d n1 ic5 oc18 i4x5 k4x4 s2 p1 relu f16",
    "convtranspose1d n1 ic6 oc10 g2 i150 k7 s3 p2 prelu",  # edges and a middle
    "convtranspose2d n4 ic9 oc5 i1x1 k4x3 s1 p0x1_0 residual relu bf16",  # one input pixel
    "convtranspose2d n1 ic6 oc34 i5x7 k5x4 s3x2 p1 op1x0 d1x3 prelu",  # phases with more taps, with fewer and with none
    "convtranspose1d n1 ic9 oc3 i45 k8 s4 p2 tanh nhwc f16",  # phases and channels in the lanes
    "convtranspose3d n1 ic6 oc4 g2 i2x3x9 k1x3x4 s1x2x2 p0x1x1 residual",
    "conv2d n1 ic32 oc64 g2 i9x18 k3x3 s1 p1 residual relu",
    "conv2d n2 ic32 oc48 i9x8 k3x3 s1 p1x0_1 residual relu nhwc accuracy_bf16",  # products of pairs
    "conv2d n1 ic16 oc16 i7x6 k3x3 s1 p1 silu nhwc bf16 accuracy_bf16",
    "conv2d n2 ic48 oc48 g3 i5x11 k5x4 s1 p2_3x1 prelu f16",
    "conv2d n1 ic32 oc32 g2 i12x19 k3x3 s2 p1x0_1 gelu nobias",
    "conv2d n1 ic6 oc18 i5x9 k1x1 s1x2 p0 residual relu relaxed",
    "conv3d n2 ic9 oc70 i3x5x7 k1x1x1 s2x1x3 p0 residual hardswish bf16",  # a matrix product with all its tails
    "conv1d n1 ic5 oc7 i131 k3 s1 p16_4 d8 prelu",
    "conv1d n2 ic3 oc6 i70 k2 s1 p19_0 d19 tanh bf16",
    "conv2d n1 ic28 oc56 g7 i6x11 k3x3 s1 p1 nhwc relu",  # several groups in a vector, the last ones twice
    "conv1d n2 ic18 oc15 g3 i40 k3 s2 p2 d2 nhwc residual f16",  # a vector of groups that do not fill it
    "conv1d n1 ic5 oc10 g5 i80 k66 s1 p33 nhwc prelu",  # more taps than are written out
]
#: More padding than input: whole blocks of rows, tiles and strides that lie in nothing but padding.
PADDED = [
    "conv2d n1 ic2 oc30 g2 i4x1 k1x1 s1 p0_3x0 residual relu",
    "conv3d n1 ic2 oc2 g2 i1x5x1 k1x1x1 s1 p1x1_2x2_1 nobias",
    "conv2d n1 ic17 oc18 i2x3 k2x2 s1x2 p5_4x4_6",
    "conv2d n1 ic16 oc16 g16 i3x1 k2x1 s1x100 p3_4x99_3 nhwc",
    "conv1d n2 ic16 oc5 i3 k2 s3 p9_8",
    "conv2d n1 ic16 oc16 i5x5 k3x3 s1 p4",
    "conv2d n1 ic32 oc32 g2 i1x2 k3x3 s1 p2",
]
#: What ``convgen fuzz`` found, as it shrunk it.
FOUND = [
    "conv1d n1 ic1 oc17 i1 k1 s1 p0 nobias bf16",  # masked 16-bit stores went past the end of dst
    "conv1d n1 ic16 oc17 i4 k3 s1 p0_1 nobias bf16 nhwc",
    "conv1d n1 ic16 oc16 i3 k3 s1 p0 nobias",  # a single Winograd tile: its default was not valid
    "conv1d n1 ic1 oc1 i1 k4 s1 p0_9 nobias",  # 1-D blocks whose padding moves with the block
    "conv2d n1 ic1 oc48 i3x4 k4x1 s1x3 p1_0x0 nhwc relaxed",  # Winograd read NHWC of one channel as NCHW
]
NATIVE = resolve()
HASWELL = resolve("cpu:haswell")
#: Targets whose facts differ; no code is run for these.
TARGETS = [NATIVE, *map(resolve, ("cpu:x86-64-v2", "cpu:haswell", "cpu:znver4", "cpu:aarch64-cortex-a72"))]


def applicable(spec: ConvSpec, target: Target = NATIVE) -> list[Schedule]:
    return [s for s in schedules().values() if s.reason_against(spec.core, target) is None]


def compiled(spec: ConvSpec, schedule: Schedule, picks: Picks, target: Target = NATIVE) -> Kernel:
    return compile_candidate(spec, target, Candidate(schedule, picks), THREADS)


def checked(kernel: Kernel, seed: int = 0) -> Report:
    """The report of a kernel that passes."""
    report = validate(kernel, seed=seed)
    report.raise_if_failed()
    return report


def pairs(descriptors: list[str]) -> list[Any]:
    """Every descriptor with every schedule that applies to it, as parameters."""
    found = [(s, f) for s in descriptors for f in applicable(ConvSpec.parse(s))]
    return [pytest.param(s, f, id=f"{f.id}-{s.replace(' ', '-')}") for s, f in found]


PAIRS = pairs(SMOKE)


# ---- what comes out ---------------------------------------------------------------------------


def check_points(descriptor: str, schedule: Schedule, drawn: int) -> None:
    """The kernels of the default and of points drawn from the space pass validation."""
    spec = ConvSpec.parse(descriptor)
    rng = random.Random(f"{schedule.id} {descriptor}")
    for picks in [schedule.default(spec.core, NATIVE), *random_picks(schedule, spec, NATIVE, drawn, rng)]:
        report = checked(compiled(spec, schedule, picks))
        assert {c.name for c in report.checks} >= {"memory", "threads", "float", "exact", "refusal"}


@pytest.mark.parametrize(("descriptor", "schedule"), PAIRS)
def test_kernels_of_the_default_and_of_a_random_point_pass_validation(descriptor: str, schedule: Schedule) -> None:
    """The point for every other problem; the exhaustive run draws four for each."""
    check_points(descriptor, schedule, SMOKE.index(descriptor) % 2)


@pytest.mark.parametrize(("descriptor", "schedule"), pairs(PADDED))
def test_padding_larger_than_the_input_passes_validation(descriptor: str, schedule: Schedule) -> None:
    check_points(descriptor, schedule, 2)


@pytest.mark.parametrize(("descriptor", "schedule"), pairs(FOUND))
def test_what_was_found_passes_validation(descriptor: str, schedule: Schedule) -> None:
    check_points(descriptor, schedule, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("descriptor", "schedule"), pairs([*SMOKE, *PADDED, *FOUND]))
def test_more_random_points_pass_validation(descriptor: str, schedule: Schedule) -> None:
    check_points(descriptor, schedule, 4)


@pytest.mark.parametrize("schedule_id", usable(NATIVE))
def test_equal_specs_generate_the_same(schedule_id: str) -> None:
    """Whatever is remembered of the first one: another process, or another line of a model, has one of its own."""
    schedule = find_schedule(schedule_id)
    descriptor = next(s for s in SMOKE if schedule in applicable(ConvSpec.parse(s)))

    def generated() -> str:
        spec = ConvSpec.parse(descriptor)
        candidate = Candidate(schedule, schedule.default(spec.core, NATIVE))
        return str(lower(spec, NATIVE, candidate).module.script())

    assert generated() == generated()


@pytest.mark.parametrize("schedule_id", usable(NATIVE))
def test_a_smoke_problem_exercises_every_schedule(schedule_id: str) -> None:
    assert any(find_schedule(schedule_id) in applicable(ConvSpec.parse(s)) for s in SMOKE)


@pytest.mark.parametrize("schedule_id", usable(NATIVE))
def test_a_smoke_problem_exercises_every_schedule_with_a_narrow_dtype(schedule_id: str) -> None:
    narrow = [spec for spec in map(ConvSpec.parse, SMOKE) if spec.dtype != "f32"]
    assert any(find_schedule(schedule_id) in applicable(spec) for spec in narrow)


def test_the_smoke_problems_exercise_every_activation() -> None:
    present = {ConvSpec.parse(s).activation_op.name for s in SMOKE}
    assert present == {ConvSpec(1, 1, 1, (1,), (1,), activation=a).activation_op.name for a in ACTIVATIONS}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=150, deadline=None, print_blob=True)
@given(specs(), st.sampled_from((1, 15, 16, 17, 33)), st.integers(0, 2**32))
def test_every_kernel_of_any_spec_passes_validation(spec: ConvSpec, channels: int, seed: int) -> None:
    plain = spec.src_blocks.is_plain and spec.dst_blocks.is_plain
    if spec.groups == 1 and plain:  # the strategy's channels are few; tiles are wide
        spec = spec.with_(ic=channels, oc=channels + seed % 3)
    for schedule in applicable(spec):
        for picks in [
            schedule.default(spec.core, NATIVE),
            *random_picks(schedule, spec, NATIVE, 3, random.Random(seed)),
        ]:
            checked(compiled(spec, schedule, picks), seed % 1000)


def for_avx2(schedule: Schedule, dtype: str) -> ConvSpec:
    """The first problem which the schedule takes on AVX2, in that dtype."""
    problems = [spec.with_(dtype=dtype) for spec in map(ConvSpec.parse, SMOKE)]
    return next(spec for spec in problems if schedule.reason_against(spec.core, HASWELL) is None)


@pytest.mark.skipif(not HASWELL.native, reason="needs a CPU with AVX2")
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("schedule_id", usable(HASWELL))
def test_code_for_avx2_passes_validation(schedule_id: str, dtype: str) -> None:
    """One layer per schedule and dtype; all of them in the exhaustive run."""
    schedule = find_schedule(schedule_id)
    spec = for_avx2(schedule, dtype)
    kernel = compiled(spec, schedule, schedule.default(spec.core, HASWELL), HASWELL)
    assert "zmm" not in kernel.source("asm")
    checked(kernel)


@pytest.mark.slow
@pytest.mark.parametrize(("descriptor", "schedule"), PAIRS)
@pytest.mark.parametrize("target", [t for t in TARGETS[1:] if t.native], ids=str)
def test_narrower_targets_pass_validation(target: Target, descriptor: str, schedule: Schedule) -> None:
    spec = ConvSpec.parse(descriptor)
    if schedule in applicable(spec, target):
        checked(compiled(spec, schedule, schedule.default(spec.core, target), target))


def test_what_a_single_tile_uses_once_is_not_fetched_ahead() -> None:
    """Weights of one pixel stream by: the processor does that, and an instruction for it only costs."""
    schedule = find_schedule("cpu_direct")
    for pixels, fetches in (("1x1", False), ("6x6", True)):
        spec = ConvSpec.parse(f"conv2d n1 ic64 oc64 i{pixels} k1x1")
        picks = schedule.default(spec.core, NATIVE).replace(order="oc")
        assert ("prefetch" in compiled(spec, schedule, picks).source("asm")) == fetches


# ---- what a schedule must keep to -------------------------------------------------------------


def large(draw: st.DrawFn) -> ConvSpec:
    """Specs of the sizes of real layers."""
    rank, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    depthwise = draw(st.booleans())
    channels = draw(st.integers(1, 2048))
    size, kernel, stride = draw(st.integers(1, 300)), draw(st.integers(1, 11)), draw(st.integers(1, 8))
    padding, dilation = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    size += (kernel - 1) * dilation + padding * 2
    return ConvSpec(
        n=draw(st.integers(1, 4)),
        ic=channels,
        oc=channels * draw(st.integers(1, 3)) if depthwise else draw(st.integers(1, 2048)),
        in_spatial=(size,) * rank if rank < 3 else (min(size, 40 + (kernel - 1) * dilation),) * 3,
        kernel=(kernel,) * rank,
        stride=(stride,) * rank,
        padding=((padding, padding),) * rank,
        dilation=(dilation,) * rank,
        groups=channels if depthwise else 1,
        transposed=transposed,
        layout=draw(st.sampled_from(("nchw", "nhwc"))),
        accuracy=draw(st.sampled_from(("strict", "standard", "relaxed"))),
    )


@st.composite
def any_specs(draw: st.DrawFn) -> ConvSpec:
    """Small and odd, or as large as real layers."""
    while draw(st.booleans()):
        try:
            return large(draw)
        except SpecError:  # past 2**31 elements
            continue
    return draw(specs())


@settings(max_examples=150, deadline=None, print_blob=True)
@given(any_specs(), st.sampled_from(TARGETS), st.integers(0, 2**32))
def test_a_schedule_says_why_it_does_not_apply_or_has_a_valid_default(
    spec: ConvSpec, target: Target, seed: int
) -> None:
    core, rng = spec.core, random.Random(seed)
    reasons = {}
    for schedule in schedules().values():
        why = schedule.reason_against(core, target)  # lets all but Inapplicable through
        if why is not None:
            reasons[schedule.id] = why
            assert re.search(r"[a-z]{3}", why), f"{schedule.id} gives no reason"
            continue
        space, default = schedule.space(core, target), schedule.default(core, target)
        assert default in space, f"{schedule.id}: {default}"
        schedule.valid(core, target, default)
        assert schedule.default(core, target) == default
        assert schedule.cost(core, target) > 0
        for picks in (space.sample(rng) for _ in range(20)):
            why = schedule.reason_against(core, target, picks)
            assert why is None or re.search(r"[a-z]{3}", why)
    assert len(reasons) < len(schedules()), "no schedule applies"


@pytest.mark.parametrize(("target", "layout"), [(NATIVE, "nchw"), (HASWELL, "nhwc")], ids=["native", "haswell nhwc"])
def test_every_real_layer_gets_a_default_that_is_not_the_reference(target: Target, layout: str) -> None:
    """The reference is for what no fast schedule takes; none of these are."""
    files = sorted((ROOT / "bench" / "problems").glob("*.json"))
    assert files
    for spec in {entry.spec.with_(layout=layout) for file in files for entry in read_specs(file)}:
        candidate = default_candidate(spec, target)
        assert candidate.schedule.reason_against(spec.core, target, candidate.picks) is None
        assert candidate.schedule.id != "reference", spec.descriptor


@pytest.mark.parametrize(("descriptor", "schedule"), pairs(SMOKE[::2]))
def test_an_equal_layer_is_lowered_alike(descriptor: str, schedule: Schedule) -> None:
    """What schedules keep of a layer is found again for an equal one, which is another object."""
    first, second = (
        lower(spec, NATIVE, Candidate(schedule, schedule.default(spec.core, NATIVE))).module
        for spec in (ConvSpec.parse(descriptor), ConvSpec.parse(descriptor))
    )
    assert first.script() == second.script()


@pytest.mark.parametrize(("descriptor", "schedule"), PAIRS)
def test_picks_survive_being_written_down(descriptor: str, schedule: Schedule) -> None:
    """Records keep picks as JSON, the command line and reports as text, worker processes as pickles."""
    spec = ConvSpec.parse(descriptor)
    for picks in [
        schedule.default(spec.core, NATIVE),
        *random_picks(schedule, spec, NATIVE, 5, random.Random(0)),
    ]:
        assert all(type(value) in (int, str, bool) for value in picks.values())
        read = Picks(**json.loads(json.dumps(dict(picks))))
        assert read == picks
        assert hash(read) == hash(picks)
        assert [type(v) for v in read.values()] == [type(v) for v in picks.values()]
        assert pickle.loads(pickle.dumps(picks)) == picks
        assert parse_candidate(spec, NATIVE, schedule.id, str(picks)) == Candidate(schedule, picks)


def test_ids_are_unique_and_versions_begin_at_one() -> None:
    found = schedules()
    assert {"reference", "cpu_direct"} <= found.keys()
    for schedule_id, schedule in found.items():
        assert schedule.id == schedule_id
        assert re.fullmatch(r"[a-z][a-z0-9_]*", schedule_id)
        assert type(schedule.version) is int
        assert schedule.version >= 1
        assert type(schedule.transforms) is bool
        assert not vars(schedule), "a schedule has no state"


@pytest.mark.parametrize("schedule_id", schedules())
def test_the_docstring_tells_where_it_applies_and_how_it_works(schedule_id: str) -> None:
    module = inspect.getmodule(type(find_schedule(schedule_id)))
    assert module is not None
    text = module.__doc__ or ""
    assert re.search(r"^Applies to  \S", text, re.M), f"{module.__name__}: no section 'Applies to'"
    strategy = re.search(r"^Strategy    (.*?)(?=^\S|\Z)", text, re.M | re.S)
    assert strategy, f"{module.__name__}: no section 'Strategy'"
    assert re.findall(r"^ +(?:Strategy +)?(\d)\. \S", " " + strategy[0], re.M)[:2] == ["1", "2"], "no numbered steps"


def test_the_reference_applies_to_whatever_there_is() -> None:
    spec = ConvSpec.parse("convtranspose3d n2 ic4 oc6 g2 i3x2x2 k2x1x3 s2 p0 op1 d1x2x1 nhwc residual prelu")
    for target in TARGETS:
        assert find_schedule("reference").reason_against(spec.core, target) is None


def test_an_unknown_schedule_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"schedule: expected one of .*reference.*, found 'cpu_magic'"):
        find_schedule("cpu_magic")


# ---- spaces and picks -------------------------------------------------------------------------

SPACE = Space(tile=[1, 2, 4], order=["oc", "pixels"], copy=[False, True])


def test_a_space_is_the_product_of_its_domains() -> None:
    points = list(SPACE)
    assert len(points) == len(set(points)) == SPACE.size == math.prod((3, 2, 2))
    assert all(p in SPACE for p in points)
    assert list(Space()) == [Picks()]  # nothing to choose: one point
    assert Space().size == 1


def test_only_a_spaces_own_points_are_in_it() -> None:
    inside = Picks(tile=2, order="oc", copy=True)
    assert inside in SPACE
    assert inside.replace(tile=3) not in SPACE
    assert Picks(tile=2, order="oc") not in SPACE
    assert Picks(**inside, more=1) not in SPACE
    assert dict(inside) not in SPACE


def test_repeated_values_of_a_domain_count_once() -> None:
    assert Space(tile=[2, 1, 2]).domains == {"tile": (2, 1)}


def test_samples_are_points_and_reach_all_of_them() -> None:
    rng = random.Random(0)
    assert {SPACE.sample(rng) for _ in range(400)} == set(SPACE)


def test_neighbours_differ_in_one_value_and_there_are_no_others() -> None:
    picks = Picks(tile=2, order="oc", copy=True)
    near = list(SPACE.neighbours(picks))
    expected = [p for p in SPACE if sum(p[name] != picks[name] for name in picks) == 1]
    assert sorted(near, key=str) == sorted(expected, key=str)


def test_picks_are_immutable_mappings_with_attributes() -> None:
    picks = Picks(tile=2, order="oc")
    assert (picks.tile, picks["order"], dict(picks)) == (2, "oc", {"tile": 2, "order": "oc"})
    assert str(picks) == "order=oc tile=2"
    assert picks == Picks(order="oc", tile=2)
    assert hash(picks) == hash(Picks(order="oc", tile=2))
    changed = picks.replace(tile=4)
    assert (picks.tile, changed.tile) == (2, 4)
    with pytest.raises(AttributeError, match="cannot set tile"):
        picks.tile = 3
    with pytest.raises(AttributeError, match="width"):
        _ = picks.width


def test_require_raises_the_reason() -> None:
    require(True, "never said")
    with pytest.raises(Inapplicable, match=r"^needs more$"):
        require(False, "needs more")


@pytest.mark.parametrize(
    ("picks", "message"),
    [
        ("tile=3", r"found 'tile=3'"),
        ("tile", r"found 'tile'"),
        ("width=3", r"found 'width=3'"),
        ("tile_ow=3 tile_ow=3", r"found 'tile_ow=3'"),
        ("order=oc", r"expected a value for tile_oc, tile_oh, tile_ow, block, parallel_oc, copy_src, found none"),
        ("", r"expected a value for tile_oc, tile_oh, tile_ow, block, order, parallel_oc, copy_src, found none"),
    ],
)
def test_malformed_picks_are_refused(picks: str, message: str) -> None:
    spec = ConvSpec.parse("conv2d n1 ic4 oc4 i8x8 k3x3")
    with pytest.raises(Inapplicable, match=message):
        parse_candidate(spec, NATIVE, "cpu_direct", picks)


def test_picks_that_are_in_the_space_but_not_valid_are_refused_with_the_reason() -> None:
    spec = ConvSpec.parse("conv2d n1 ic4 oc64 i32x32 k3x3")
    schedule = find_schedule("cpu_direct")
    space = schedule.space(spec.core, NATIVE)
    bad = next(p for p in islice(space, 100_000) if schedule.reason_against(spec.core, NATIVE, p))
    why = schedule.reason_against(spec.core, NATIVE, bad)
    assert why
    with pytest.raises(Inapplicable) as error:
        parse_candidate(spec, NATIVE, schedule.id, str(bad))
    assert str(error.value) == why


def test_without_picks_a_candidate_is_the_default() -> None:
    spec = ConvSpec.parse("conv2d n1 ic4 oc4 i8x8 k3x3")
    schedule = find_schedule("cpu_direct")
    candidate = parse_candidate(spec, NATIVE, "cpu_direct")
    assert candidate == Candidate(schedule, schedule.default(spec.core, NATIVE))
    assert str(candidate) == f"cpu_direct({candidate.picks})"


def test_a_schedule_that_does_not_apply_is_refused_with_the_reason() -> None:
    with pytest.raises(Inapplicable, match="needs a convolution that is not transposed"):
        parse_candidate(ConvSpec.parse("convtranspose1d n1 ic4 oc4 i8 k3"), NATIVE, "cpu_direct")


def test_same_weights_give_the_same_bits_in_every_channel() -> None:
    """A softmax of large equal logits depends on it: what else is the default's accuracy worth."""
    spec = ConvSpec.parse("conv2d n1 ic512 oc1000 i13x13 k1x1 relu")
    data = float_data(spec)
    data["weights"][:] = data["weights"][0]
    data["bias"][:] = 0
    y = build(spec).bind(data["weights"], data["bias"])(data["src"])
    assert (y == y[:, :1]).all()
