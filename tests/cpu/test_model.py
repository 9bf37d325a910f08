"""What a core does per cycle, and the register tile's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convgen.cpu import model
from convgen.cpu.model import Counts, Stream, Waits, Work, core_of
from convgen.cpu.product import FETCHED_AFTER, LINE, Ahead, Even, blocks_ahead, most_pixels, steps_apart
from convgen.hardware.machine import measured
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.schedule import Picks, Schedule
from convgen.problem.spec import ConvSpec

ZEN5 = core_of(resolve("cpu:znver5"))


def test_the_busiest_unit_decides() -> None:
    core = replace(ZEN5, fmas=2, loads=2, stores=1, latency=4, l2=32)
    assert core.cycles(Counts([Work(10, fmas=28, loads=16)], regions=0)) == 140
    assert core.cycles(Counts([Work(10, fmas=28, loads=40)], regions=0)) == 200
    assert core.cycles(Counts([Work(10, fmas=4, chain=1)], regions=0)) == 40  # four sums hide no latency of four
    assert core.cycles(Counts([Work(10, fmas=28, near=512)], regions=0)) == 160
    assert core.cycles(Counts([Work(10, fmas=28, loads=28, lines=3)], regions=0)) == 170  # taken in between loads


def test_weights_are_cold_in_a_network_and_warm_alone() -> None:
    core, counts = replace(ZEN5, l2_size=1 << 21), Counts([Work(1, fmas=1)], [Stream(1 << 20, weights=1 << 20)])
    assert core.cycles(counts) - core.cycles(counts, cold=False) == pytest.approx(
        (1 << 20) * (1 / core.memory - 1 / core.l2)
    )


def test_a_stream_comes_from_the_nearest_cache_that_holds_it() -> None:
    core = replace(ZEN5, l2_size=1 << 20, l3_size=1 << 24)
    nothing = core.cycles(Counts([]))
    rates = [core.cycles(Counts([], [Stream(1 << 30, footprint=1 << n)])) - nothing for n in (20, 24, 25)]
    assert rates == pytest.approx([(1 << 30) / rate for rate in (core.l2, core.l3, core.memory)])
    target = replace(resolve("cpu:znver5"), l2=1 << 19, l3=1 << 23)
    assert (core_of(target).l2_size, core_of(target).l3_size) == (1 << 19, 1 << 23)


def test_what_all_cores_read_at_once_comes_once_and_memory_is_shared() -> None:
    core, nothing = replace(ZEN5, memory=8, together=12), ZEN5.cycles(Counts([]))
    for own, whole, cycles in ((96, 96, 12), (48, 96, 8), (24, 96, 8), (96, 24, 12)):
        assert core.cycles(Counts([], [Stream(own, weights=whole)])) - nothing == pytest.approx(cycles)


def test_what_is_fetched_ahead_hides_behind_products() -> None:
    work = Work(1e6, fmas=2)
    late = Counts([work], [Stream(1 << 20, weights=1 << 20)])
    ahead = Counts([work], [Stream(1 << 20, weights=1 << 20, ahead=True)])
    alone = Counts([work])
    assert ZEN5.cycles(alone) < ZEN5.cycles(ahead) < ZEN5.cycles(late)
    assert ZEN5.cycles(ahead) >= max(ZEN5.cycles(alone), (1 << 20) / ZEN5.memory)


def test_every_target_has_a_core_that_says_where_its_facts_are_from() -> None:
    assert core_of(resolve("cpu:znver4")).origin == "known"
    assert core_of(resolve("cpu:x86-64-v3")).origin == "taken for haswell"
    assert core_of(resolve("cpu:aarch64-neoverse-v1")).origin == "not known: taken for cortex-a72"


def test_a_core_of_which_waits_were_never_measured_has_none() -> None:
    """Of the others no wait is left to what a core loses by default."""
    assert core_of(resolve("cpu:aarch64-neoverse-v1")).waits == Waits()
    none = asdict(Waits())
    for name in ("znver4", "znver5", "haswell", "sapphirerapids"):
        waits = asdict(core_of(resolve(f"cpu:{name}")).waits)
        assert all(waits[wait] > none[wait] for wait in none if wait not in ("origin", "places"))


def test_predictions_wait_as_their_core_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait that a schedule counts with is the core's: without it, the same picks are predicted to take less."""
    target, direct = resolve("cpu:haswell"), find_schedule("cpu_direct")
    squares, strided = (ConvSpec.parse(f"conv2d n1 ic256 oc256 i14x14 k3x3 s{s}x{s} p1x1") for s in (1, 2))
    points = ConvSpec.parse("conv2d n8 ic1024 oc128 i28x28 k1x1")
    tile = Picks(tile_oc=8, tile_oh=1, tile_ow=14, block=1, order="oc", parallel_oc=1, copy_src=False)

    def of_schedule(name: str, spec: ConvSpec) -> tuple[Schedule, Callable[[], float]]:
        chosen = find_schedule(name)
        return chosen, lambda: chosen.cost(spec, target)

    def of_tile(spec: ConvSpec) -> tuple[Schedule, Callable[[], float]]:
        return direct, lambda: core_of(target).cycles_of(direct.work(spec, target, tile))  # type: ignore[attr-defined]

    cases = {
        "sums": of_schedule("cpu_winograd", squares),
        "scattered": of_schedule("cpu_gradient_winograd", squares.with_(n=8, direction="weights")),
        "phased": of_schedule("cpu_gradient_winograd", strided.with_(direction="weights")),
        "paged": of_tile(points),
        "strips": of_tile(points),
        "crowded": of_tile(points.with_(layout="nhwc")),
    }
    assert set(cases) == {field.name for field in fields(Waits)} - {"origin", "places"}
    for name, (chosen, predicted) in cases.items():
        whole, core = predicted(), core_of(target)
        less = replace(core, waits=replace(core.waits, **{name: getattr(Waits(), name)}))
        with monkeypatch.context() as patched:
            patched.setitem(type(chosen).applies.__globals__, "core_of", lambda *_, less=less: less)
            assert predicted() < whole, name


def test_what_intels_cores_do_besides() -> None:
    """A load takes from the FMAs beside it; what is written to the L2 cache takes longer than what comes from there."""
    core = core_of(resolve("cpu:sapphirerapids"))
    assert core.origin == "known"
    assert core_of(resolve("cpu:graniterapids")).origin == "taken for sapphirerapids"
    few, many = (Counts([Work(100, fmas=24, loads=loads)], regions=0) for loads in (10, 16))
    assert core.cycles(few) < core.cycles(many) == 100 * (24 / core.fmas + 16 * core.beside)
    assert ZEN5.cycles(few) == ZEN5.cycles(many)
    near, spilled = (Counts([Work(1, **{what: 6400.0})]) for what in ("near", "spilled"))
    assert core.cycles(near) < core.cycles(spilled)


def test_shorter_vectors_than_the_targets_have_facts_of_their_own() -> None:
    """Of 512 bits, Zen 4 does half a vector of loads or FMAs per cycle and unit."""
    target = resolve("cpu:znver4")
    core, half = core_of(target), core_of(target, 8)
    assert (half.fmas, half.loads, half.stores) == (2 * core.fmas, 2 * core.loads, 2 * core.stores)
    assert (half.hertz, half.l3, half.l2_size) == (core.hertz, core.l3, core.l2_size)
    assert core_of(target, 16) == core
    haswell = resolve("cpu:haswell")
    assert core_of(haswell, 4) == core_of(haswell)
    # So groups of 8 channels are worth a transform of half vectors.
    layer = ConvSpec.parse("conv2d n1 ic256 oc256 g32 i28x28 k3x3 p1x1 relu nhwc")
    assert default_candidate(layer, target.on(1)).schedule.id == "cpu_winograd"


def test_rows_of_many_channels_are_copied_side_by_side_where_the_l1_cache_is_busy() -> None:
    """With AVX2 a step has 12 products: lines that it takes in from the L2 cache show; with AVX-512 it has 28."""
    layer = ConvSpec.parse("conv2d n1 ic512 oc2048 i7x7 k1x1 residual relu")
    copied = {}
    for name in ("haswell", "znver4"):
        target = resolve(f"cpu:{name}").on(1)
        copied[name] = find_schedule("cpu_direct").default(layer.core, target).copy_src
    assert copied == {"haswell": True, "znver4": False}


def test_an_unknown_processor_of_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two measurements that differ by a few percent give the same facts, and so the same defaults."""
    native = resolve()
    found = measured(1)
    monkeypatch.setattr(model, "_VECTORS", {k: v for k, v in model._VECTORS.items() if k[0] in model._ASSUMED.values()})
    monkeypatch.setattr(model, "_LIKE", {})
    cores = []
    for factor in (1.0, 1.01):
        model._known.cache_clear()
        model._measured.cache_clear()
        core_of.cache_clear()
        scaled = replace(found, peak=300e9 * factor, dram=40e9 * factor)
        monkeypatch.setattr(model, "measured", lambda threads, scaled=scaled: scaled)
        cores.append(core_of(native))
    model._known.cache_clear()
    model._measured.cache_clear()
    core_of.cache_clear()
    assert cores[0] == cores[1]
    assert cores[0].origin.startswith("measured")
    peak = cores[0].hertz * cores[0].fmas * 2 * native.lanes
    assert 300e9 / 1.1 < peak < 300e9 * 1.1


@given(st.integers(1, 500), st.integers(1, 40))
def test_tiles_cover_a_row_once_and_differ_by_one(size: int, most: int) -> None:
    even = Even(size, most)
    sizes = [s for s, times in even.sizes for _ in range(times)]
    assert sum(sizes) == size
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == even.count == -(-size // most)
    assert [int(even.start(i)) for i in range(even.count)] == [sum(sizes[:i]) for i in range(even.count)]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 40), st.booleans())
def test_the_tiles_of_a_block_fetch_every_line_of_the_next(steps: int, vectors: int, tiles: int, is_slow: bool) -> None:
    core = replace(ZEN5, fetches=0.001) if is_slow else ZEN5
    apart, lines = steps_apart(core, 28, vectors, tiles), set()
    assert apart == 1 if not is_slow else apart * vectors <= max(tiles, vectors) < 2 * apart * vectors
    for tile in range(tiles):
        ahead = Ahead(None, 0, steps, vectors, tile, tiles, apart)
        origin, fetched = int(ahead.origin), range(0, steps, apart)
        lines |= {
            origin // LINE + step // apart * ahead.lines + line for step in fetched for line in range(ahead.lines)
        }
    assert lines >= set(range(steps * vectors))
    assert max(lines) < steps * vectors + apart * vectors * ahead.share  # little past the end


def test_weights_have_come_when_small_blocks_need_them() -> None:
    assert blocks_ahead(16 * 4) * 16 * 4 >= FETCHED_AFTER
    assert blocks_ahead(2 * FETCHED_AFTER) == 1


def test_registers_hold_the_tile() -> None:
    avx512, avx2 = resolve("cpu:znver5"), resolve("cpu:haswell")
    assert [most_pixels(avx512, v) for v in (1, 2, 3, 4)] == [30, 14, 9, 6]
    assert [most_pixels(avx2, v) for v in (1, 2, 3)] == [14, 6, 4]


def test_a_target_as_threads_see_it() -> None:
    target = resolve("cpu:znver5")
    assert target.on(3).cores == 3
    assert target.on(target.cores) is target
    assert target.on(3).key == target.key
    gpu = resolve("cuda:sm_90a")
    assert gpu.on(1) is gpu
