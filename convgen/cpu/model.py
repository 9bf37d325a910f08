"""What one core of a CPU does per cycle, and how long counted work takes on it.

Schedules count (:class:`Counts`): FMAs, loads, stores, bytes of each stream. :meth:`Core.seconds` is the only place
where counts become seconds. A default is chosen by them, so the facts are those of a known processor, rounded:
they must be the same on every machine with that processor, busy or not.

Sources: AMD, "Software Optimization Guide for the AMD Zen4 / Zen5 Microarchitecture" (publications 57647, 58455);
Intel, "Optimization Reference Manual" (248966); Arm, "Cortex-A72 Software Optimization Guide". Of Zen 5 and Sapphire
Rapids, bandwidths, FMAs and clocks as they are sustained, and what a region takes were measured and rounded; those of
the others are estimates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from ..hardware.machine import measured
from ..hardware.processor import system_processor
from ..hardware.target import Target

#: FLOP per second of a loop of scalars, each sum waiting for the one before: roughly, on any processor.
SCALAR_FLOPS = 1e9


@dataclass(frozen=True)
class Waits:
    """What a core loses where its units and bandwidths have time left. By default nothing: of one never measured.

    Attributes:
        origin: where the facts are from.
        crowded: how much longer steps take whose lines displace each other from the L1 cache.
        paged: how much longer lines take of rows in a page each.
        strips: cycles that a step waits for such a row where it comes from beyond the L2 cache, in strips too short for
            the processor to fetch ahead.
        sums: cycles for each vector that a transform reads of sums that were stored just before.
        scattered: cycles to write a line beyond the L2 cache, in turn with ``places`` others; of more, as much more.
        places: see there.
        phased: how much longer a strided gradient of weights takes than is counted of its phases.
    """

    origin: str = "none known"
    crowded: float = 1
    paged: float = 1
    strips: float = 0
    sums: float = 0
    scattered: float = 0
    places: int = 64
    phased: float = 1


@dataclass(frozen=True)
class Core:
    """One core.

    Attributes:
        origin: where the facts are from.
        hertz: cycles per second.
        fmas: FMAs of the target's vectors that begin per cycle, as long loops sustain them.
        quads, pairs: the same of sums of four products of bytes per lane, and of two products of bf16.
        latency: cycles from one FMA to the next on the same sum.
        loads, stores: vectors per cycle.
        shuffles: of two vectors, per cycle.
        masked_store: cycles of a store of a part of a vector: with a mask, or of short ones in pieces.
        l2, l3, memory: bytes per cycle from there, one core alone.
        together: bytes per cycle from memory to all cores: what two of them read at once comes once.
        region: cycles to start a parallel region and to wait for its end.
        fetches: lines per cycle that come from memory, fetched ahead, and slow down nothing else.
        beside: cycles that a load takes from FMAs.
        spills: bytes per cycle that are written to the L2 cache.
        exposed: of what is fetched ahead, the part that products do not hide.
        l2_size, l3_size: bytes that the caches hold.
        kept: the part of the L2 cache that stays what it is while other data pass.
        tile_product, tile_load, tile_store: cycles of a matrix tile each; without such, infinite.
        waits: what it loses besides.
    """

    origin: str
    hertz: float
    fmas: float
    latency: float
    loads: float
    stores: float
    shuffles: float
    masked_store: float
    l2: float
    l3: float
    memory: float
    region: float
    together: float = math.inf
    fetches: float = math.inf
    beside: float = 0
    spills: float = math.inf
    exposed: float = 0.15
    quads: float = 1
    pairs: float = 1
    l2_size: float = 0
    l3_size: float = 0
    kept: float = 0.75
    tile_product: float = math.inf
    tile_load: float = math.inf
    tile_store: float = math.inf
    waits: Waits = Waits()

    def cycles(self, counts: Counts, *, cold: bool = True) -> float:
        """Cycles of the busiest core.

        Args:
            cold: weights come from memory, as in a network; else from where the last call left them.
        """
        own = self.cycles_with(self.cycles_of(counts.work), counts.streams, counts.regions, cold=cold)
        return own + self.cycles(counts.then, cold=cold) if counts.then else own

    def seconds(self, counts: Counts, *, cold: bool = True) -> float:
        """Seconds of the busiest core; see :meth:`cycles`."""
        return self.cycles(counts, cold=cold) / self.hertz

    def cycles_of(self, work: Iterable[Work], most: float = math.inf) -> float:
        """Cycles of work alone; infinite where they are more than ``most``, of which the rest is not looked at."""
        total = 0.0  # added one by one: sum() rounds otherwise from Python 3.12 on
        for part in work:
            total += part.times * self.once(part)
            if total > most:
                return math.inf
        return total

    def cycles_with(self, work: float, streams: Iterable[Stream], regions: int = 1, *, cold: bool = True) -> float:
        """Cycles of work that takes so many, and of streams beside it, which are never fewer."""
        visible = 0.0
        for stream in streams:
            if cold and stream.weights:
                cycles = max(stream.bytes / self.memory, stream.weights / self.together)
            else:
                cycles = stream.bytes / self._rate(stream.footprint)
            visible += max(self.exposed * cycles, cycles - stream.ahead * work)
        return work + visible + regions * self.region

    def once(self, part: Work) -> float:
        """Cycles of a piece of code, once: what its busiest unit needs, or its longest chain of sums."""
        _, fmas, loads, stores, masked, shuffles, near, spilled, lines, chain, cycles, quads, pairs, *tiles = part
        busiest = max(
            fmas / self.fmas + quads / self.quads + pairs / self.pairs + loads * self.beside,
            loads / self.loads + lines,
            stores / self.stores + masked * max(self.masked_store, 1 / self.stores),
            shuffles / self.shuffles,
            near / self.l2,
            spilled / self.spills,
            chain * self.latency,
        )
        if any(tiles):
            each = (self.tile_product, self.tile_load, self.tile_store)
            busiest = max(busiest, *map(_cycles, tiles, each))
        return busiest + cycles

    def _rate(self, footprint: float) -> float:
        """Bytes per cycle of a stream that comes round again after so many bytes."""
        return self.l2 if footprint <= self.l2_size else self.l3 if footprint <= self.l3_size else self.memory


def _cycles(count: float, each: float) -> float:
    """Of something that a core may not have."""
    return count * each if count else 0


class Work(NamedTuple):
    """A piece of code that the busiest core runs ``times`` over.

    Attributes:
        fmas, loads, stores, masked_stores, shuffles: vector instructions; scalars that are broadcast are loads.
        quads, pairs: vector instructions that add four products of bytes to a lane, or two of bf16.
        near: bytes that come from the L2 cache.
        spilled: bytes that are written there.
        lines: of those that come from there, which the L1 cache takes in for a cycle each, and loads nothing else.
        chain: FMAs that wait for each other.
        cycles: of what overlaps with nothing: a loop that begins, a branch that is guessed wrongly.
        tile_products, tile_loads, tile_stores: of matrix tiles.
    """

    times: float
    fmas: float = 0
    loads: float = 0
    stores: float = 0
    masked_stores: float = 0
    shuffles: float = 0
    near: float = 0
    spilled: float = 0
    lines: float = 0
    chain: float = 0
    cycles: float = 0
    quads: float = 0
    pairs: float = 0
    tile_products: float = 0
    tile_loads: float = 0
    tile_stores: float = 0

    def with_times(self, times: float) -> Work:
        """The same code so many times."""
        return Work(times, *self[1:])


class Stream(NamedTuple):
    """Bytes that one core reads or writes beyond its L2 cache.

    Attributes:
        weights: of weights, which in a network are cold, what all cores together read; of others 0.
        ahead: the share of the work during which they are fetched ahead, so that it hides them.
        footprint: bytes after which it comes round again: what a cache must hold to serve it.
    """

    bytes: float
    weights: float = 0
    ahead: float = 0
    footprint: float = 0


@dataclass(frozen=True)
class Counts:
    """What the busiest core has to do for a layer, or for a part of it, and ``then`` for what follows."""

    work: Sequence[Work]
    streams: Sequence[Stream] = ()
    regions: int = 1
    then: Counts | None = None


#: What processors have whatever vectors are used, by LLVM's name.
_CHIPS: dict[str, dict[str, float]] = {
    "znver5": {"hertz": 4.5e9, "latency": 4, "l2": 26, "l3": 20, "memory": 9, "region": 1000},
    "znver4": {
        "hertz": 3.7e9,
        "latency": 4,
        "l2": 28,
        "l3": 14,
        "memory": 8,
        "region": 2000,
        "together": 11,
        "kept": 0.725,
    },
    "znver3": {"hertz": 3.5e9, "latency": 4, "l2": 28, "l3": 14, "memory": 7, "region": 2000},
    "haswell": {"hertz": 3.2e9, "latency": 5, "l2": 24, "l3": 10, "memory": 5, "region": 2000},
    "skylake-avx512": {"hertz": 2.8e9, "latency": 4, "l2": 40, "l3": 8, "memory": 5, "region": 2000},
    "sapphirerapids": {
        "hertz": 3.1e9,
        "latency": 4,
        "l2": 64,
        "l3": 8,
        "memory": 4.5,
        "region": 2000,
        "fetches": 0.04,
        "beside": 0.1,
        "spills": 16,
        "exposed": 0.6,
    },
    "cortex-a72": {"hertz": 2.0e9, "latency": 7, "l2": 12, "l3": 6, "memory": 4, "region": 4000},
}
#: Processors that are taken for one of those.
_LIKE = {
    "skylake": "haswell",
    "broadwell": "haswell",
    "x86-64": "haswell",
    "x86-64-v2": "haswell",
    "x86-64-v3": "haswell",
    "x86-64-v4": "skylake-avx512",
    "icelake-server": "skylake-avx512",
    "cascadelake": "skylake-avx512",
    "graniterapids": "sapphirerapids",
    "emeraldrapids": "sapphirerapids",
    "znver2": "znver3",
}
#: What they do with vectors of so many bits: FMAs, loads, stores and shuffles per cycle, cycles of a masked store.
_VECTORS: dict[tuple[str, int], tuple[float, float, float, float, float]] = {
    ("znver5", 512): (1.9, 2, 1, 1, 6),
    ("znver5", 256): (1.8, 2, 1, 1, 3),
    ("znver4", 512): (1, 1, 0.5, 1, 3),
    ("znver4", 256): (2, 2, 1, 2, 3),
    ("znver3", 256): (2, 2, 1, 2, 3),
    ("haswell", 256): (2, 2, 1, 1, 3),
    ("haswell", 128): (1, 2, 1, 1, 2),
    ("skylake-avx512", 512): (2, 2, 1, 1, 1.5),
    ("skylake-avx512", 256): (2, 2, 1, 1, 1.5),
    ("sapphirerapids", 512): (2, 2, 1, 1, 1.5),
    ("sapphirerapids", 256): (2, 3, 2, 2, 1.5),
    ("cortex-a72", 128): (1, 1, 1, 1, 8),
}
#: The same of sums of four products of bytes, and of two products of bf16; others do as many as FMAs.
_PRODUCTS: dict[tuple[str, int], tuple[float, float]] = {
    ("skylake-avx512", 512): (2, 0.5),
    ("sapphirerapids", 512): (2, 0.5),
}
#: Cycles of a product, a load and a store of a matrix tile, of processors that have them (Intel, 248966, chapter 20).
_TILES: dict[str, tuple[float, float, float]] = {"sapphirerapids": (16, 8, 16)}
#: What cores wait for. Those of Zen 4 and Zen 5 were measured on layers that differ in it, and rounded.
_ZEN = Waits("measured", crowded=1.04, paged=1.5, strips=16, sums=1.3, scattered=18, phased=1.4)
_WAITS = {
    "znver4": _ZEN,
    "znver5": _ZEN,
    **dict.fromkeys(("znver3", "haswell", "skylake-avx512", "sapphirerapids"), replace(_ZEN, origin="taken for Zen's")),
}
#: What stands for a processor that is not known, by bits of a vector.
_ASSUMED = {512: "skylake-avx512", 256: "haswell", 128: "cortex-a72"}


@lru_cache(maxsize=64)
def core_of(target: Target, lanes: int = 0) -> Core:
    """The core that a CPU target's kernels run on: a known one, this machine's as measured once, or for another
    processor a known one with the same vectors.

    Args:
        lanes: of the vectors that are worked on, which may be fewer than the target's: units that do one vector of 512
            bits per cycle, or half a one, may do twice as many of 256.

    Raises:
        BuildError, MeasureError: this machine's processor is not known, and cannot be measured.
    """
    model = str(json.loads(target.tvm_config).get("mcpu", ""))
    known = (_LIKE.get(model, model), target.vector_bits) in _VECTORS
    is_here = not known and target.native and model == system_processor()
    core = _measured(model, target.vector_bits, target.lanes) if is_here else _known(model, target.vector_bits)
    if 0 < lanes < target.lanes and target.vector_bits == 512:
        core = replace(core, **_vectors(_LIKE.get(model, model), 256))
    product, load, store = _TILES.get(model, (math.inf,) * 3)
    return replace(core, l2_size=target.l2, l3_size=target.l3, tile_product=product, tile_load=load, tile_store=store)


@lru_cache(maxsize=64)
def _known(model: str, bits: int) -> Core:
    name = _LIKE.get(model, model)
    origin = "known" if name == model else f"taken for {name}"
    if (name, bits) not in _VECTORS:
        name = _ASSUMED[bits]
        origin = f"not known: taken for {name}"
    return Core(origin=origin, **_CHIPS[name], **_vectors(name, bits), waits=_WAITS.get(name, Waits()))


def _vectors(name: str, bits: int) -> dict[str, Any]:
    """What a processor does with vectors of so many bits; an assumed one's where it is not known."""
    names = ("fmas", "loads", "stores", "shuffles", "masked_store", "quads", "pairs")
    vectors = _VECTORS.get((name, bits)) or _VECTORS.get((_ASSUMED[bits], bits), (1, 1, 1, 1, 8))
    products = _PRODUCTS.get((name, bits), (vectors[0], vectors[0]))
    return dict(zip(names, (*vectors, *products), strict=True))


@lru_cache(maxsize=4)
def _measured(model: str, bits: int, lanes: int) -> Core:
    """A core with the same vectors, at the clock that gives the measured peak, with the measured bandwidths: rounded to
    a fifth, so that two runs choose the same kernels.
    """
    alike, found = _known(model, bits), measured(1)

    def rounded(value: float) -> float:
        return float(1.2 ** round(math.log(value, 1.2)))

    hertz = rounded(found.peak / (2 * lanes * alike.fmas))
    rates: dict[str, Any] = {
        field: rounded(rate / hertz)
        for field, rate in (("l2", found.l2), ("l3", found.l3), ("memory", found.dram))
        if rate
    }
    return replace(alike, origin=f"measured; else {alike.origin.removeprefix('not known: ')}", hertz=hertz, **rates)
