"""Time kernels and other libraries side by side.

All in one process, on the same data and threads, in turns, back and forth. A turn is the median of a
few samples, a time the median of the turns. Only what may still matter takes part in every turn:

- a library far behind the best one, or a way of using it that is behind its other way, stops after
  :data:`TRIAL_ROUNDS`; its time is that of these rounds;
- where the ratio to the best library is not settled after the rounds asked for, the kernels and the
  libraries that may be the best one go on, up to :data:`MORE` times as many rounds.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check.bounds import even_tolerance, reference, worst
from ..check.data import Arrays, float_data
from ..errors import SpecError, UnsupportedError
from ..hardware.machine import Machine, machine, pinned
from ..kernel.library import Library
from ..problem.dtypes import distance, load, numpy_dtype, widen
from ..problem.spec import ConvSpec
from .peers import PEERS, Entrant, OnnxRuntime, find_peer
from .standalone.timing import alternate, repeats, sample
from .trial import artifact_facts, load_artifact, prepare_artifact, run_duel

F32 = npt.NDArray[np.float32]

#: Types of layers that some peer has tensors of.
COMPARED = ("f32", "bf16", "i8")
#: Pause in seconds before another library's turn, on several threads: the last one's idle threads spin
#: for up to 0.2 s. On one thread there are none, and a rest changes no median.
REST = 0.35
#: Samples a turn takes, and their length in seconds.
SAMPLES, SAMPLE_SECONDS = 5, 5e-3
#: Rounds between two rests in the comparison that ends a search.
BLOCK = 3
#: Seconds a turn runs before its first sample, to wake threads and fill caches.
WARM_UP = 0.02
#: Rounds that all take part in, and how many times slower than the best library one may be to go on;
#: of the several ways of using a library, how many times slower than its best one.
TRIAL_ROUNDS, HOPELESS, WORSE_WAY = 2, 3.0, 1.25
#: How many times the rounds asked for there may be, the widest interval of a ratio that needs no more
#: of them, and how many times slower than the best library one may be to take part in these.
MORE, WIDEST, CLOSE = 3, 1.3, 1.15


@dataclass(frozen=True)
class Timing:
    """How a kernel or a peer did: ``seconds`` per call, the median of ``rounds``; or the ``problem``
    why it was not timed. ``way`` is a peer's fastest of several.
    """

    name: str
    version: str | None
    way: str = ""
    seconds: float | None = None
    rounds: tuple[float, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Comparison:
    """A layer's times side by side.

    ``ratio`` is the best peer's time over the kernel's, above 1 where the kernel is faster, and
    ``interval`` its 95 % confidence interval, both over the rounds that the two shared; None where
    no peer was timed. ``mode`` says what a call finds in the caches: ``warm``, what the last one
    left, or ``cold``, nothing.
    """

    spec: str
    threads: int
    mode: str
    flops: int
    kernels: tuple[Timing, ...]
    peers: tuple[Timing, ...]
    ratio: float | None
    interval: tuple[float, float] | None

    @property
    def best_peer(self) -> Timing | None:
        return _fastest(self.peers)

    def to_dict(self) -> dict[str, Any]:
        best = self.best_peer
        return asdict(self) | {"best_peer": best.name if best else None}


@dataclass
class Contestant:
    """An entrant under the name of its library, and its seconds per call, round by round."""

    name: str
    entrant: Entrant
    is_kernel: bool = False
    rounds: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)


def compare(
    kernels: Mapping[str, Library],
    peers: Sequence[str],
    threads: int,
    *,
    rounds: int = 7,
    seed: int = 0,
    rest: float | None = None,
    cold: bool = False,
    vector_bits: int | None = None,
) -> Comparison:
    """Time kernels of one spec and peers, in turn, several times over.

    Args:
        kernels: by the name to report; the first is the one that ratios are about.
        peers: names in :data:`PEERS`.
        rounds: turns each of them gets at least, unless it is far behind.
        seed: of the data.
        rest: pause before another library's turn, in seconds; :data:`REST` on several threads.
        cold: empty the caches before each call, and take one call per sample.
        vector_bits: keep the peers to vectors of so many, for the rest of this process; one that cannot be kept
            to them is not timed.

    Raises:
        SpecError: the spec's batch is empty: there is nothing to time.
        UnsupportedError: no such peer, or a dtype that peers have no tensors of.
    """
    spec = next(iter(kernels.values())).spec
    if spec.n == 0:
        raise SpecError("n", "a batch of at least 1 to time", 0, spec.descriptor)
    if spec.dtype not in COMPARED:
        types = ", ".join(COMPARED)
        raise UnsupportedError(f"{spec.descriptor}: expected a layer of {types} to compare, found {spec.dtype}")
    data = float_data(spec, seed)
    expected = reference(spec, data, threads)
    bound = _allowed(spec, data, expected, threads)

    found: dict[str, Timing] = {}
    ready = [Contestant(name, _kernel_entrant(kernel, data, threads), True) for name, kernel in kernels.items()]
    for name in peers:
        peer = find_peer(name)
        version = peer.version()
        if version is None:
            found[name] = Timing(name, None, problem=f"not installed: pip install {peer.package}")
            continue
        try:
            if vector_bits is not None:
                peer.restrict(vector_bits)
            entrants = _right(peer().entrants(spec, data, threads), expected, bound)
        except Exception as error:  # a peer's failures are of its own kinds, and part of the answer
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            found[name] = Timing(name, version, problem=first[:200])
        else:
            ready += [Contestant(name, entrant) for entrant in entrants]

    if rest is None:
        rest = REST if threads > 1 else 0.0
    take_turns(ready, rounds, rest, Flush(machine(), threads) if cold else None)
    for one in ready:
        version = importlib.metadata.version("convgen") if one.is_kernel else PEERS[one.name].version()
        timing = Timing(one.name, version, one.entrant.way, one.seconds, tuple(one.rounds))
        known = found.get(one.name)  # another way of the same library, perhaps one that stopped early
        if known is None or (-len(timing.rounds), one.seconds) < (-len(known.rounds), known.seconds):
            found[one.name] = timing

    own = tuple(found[name] for name in kernels)
    others = tuple(found[name] for name in dict.fromkeys(peers))
    ratio = interval = None
    if best := _fastest(others):
        shared = own[0].rounds[: len(best.rounds)]
        ratio = statistics.median(best.rounds) / statistics.median(shared)
        interval = ratio_interval(best.rounds, shared)
    mode = "cold" if cold else "warm"
    return Comparison(spec.descriptor, threads, mode, spec.flops, own, others, ratio, interval)


def quick_seconds(kernel: Library, rounds: int = 3) -> float:
    """Seconds of a call of a CPU's kernel with warm caches, taken in a fraction of a second: the median of some rounds.

    Raises:
        SpecError: the spec's batch is empty: there is nothing to time.
    """
    spec = kernel.spec
    if spec.n == 0:
        raise SpecError("n", "a batch of at least 1 to time", 0, spec.descriptor)
    one = Contestant("convgen", _kernel_entrant(kernel, float_data(spec), kernel.threads), True)
    take_turns([one], rounds, all_stay=True)
    return one.seconds


def _fastest(timings: Sequence[Timing]) -> Timing | None:
    return min((t for t in timings if t.seconds), key=lambda timing: timing.seconds or 0.0, default=None)


def _allowed(spec: ConvSpec, data: Arrays, expected: npt.NDArray[Any], threads: int) -> F32:
    """How far a peer's output may be off: another algorithm is no reason not to time it. Of integers, peers round a
    step of dst elsewhere; sums are exact.
    """
    if not spec.is_quantised:
        relaxed = spec if spec.accuracy == "bf16" else spec.with_(accuracy="relaxed")
        return even_tolerance(relaxed, data, threads)
    if spec.dst_dtype == "f32":
        return np.float32(2.0**-20) * np.abs(widen(expected))
    return np.full(spec.dst_shape, spec.dst_dtype != "i32", np.float32)


def _right(entrants: Sequence[Entrant], expected: npt.NDArray[Any], bound: F32) -> list[Entrant]:
    """Those of a library's ways whose output is right; raises what is wrong with the first where none is."""
    right, wrong = list[Entrant](), list[Exception]()
    for entrant in entrants:
        try:
            _check(entrant, expected, bound)
            right.append(entrant)
        except Exception as error:
            wrong.append(error)
    if not right and wrong:
        raise wrong[0]
    return right


def _check(entrant: Entrant, expected: npt.NDArray[Any], bound: F32) -> None:
    """Run once, and raise UnsupportedError unless the output is right."""
    with entrant.context():
        entrant.run()
        error = worst(distance(entrant.output(), expected), bound)
    if not error <= 1:
        raise UnsupportedError(f"wrong output: its error is {error:.3g} of the bound")


def _kernel_entrant(kernel: Library, data: Arrays, threads: int) -> Entrant:
    packed = kernel.pack(**{name: data[name] for name in kernel.spec.parameters})
    dst = np.empty(kernel.spec.dst_shape, numpy_dtype(kernel.spec.dst_dtype))
    call = kernel.prepare(data["src"], packed, dst, data.get("residual"), threads=threads)
    return Entrant("", call, lambda: dst)


# ---- turns ------------------------------------------------------------------------------------


def take_turns(
    contestants: Sequence[Contestant],
    rounds: int,
    rest: float = 0.0,
    flush: Callable[[], None] | None = None,
    *,
    all_stay: bool = False,
) -> None:
    """Fill in the contestants' rounds.

    Args:
        rounds: how many there are at least.
        rest: pause before another library's turn, in seconds.
        flush: called before every timed call, of which a sample then takes one.
        all_stay: whether everyone takes part in exactly ``rounds`` rounds, however far behind.
    """
    if all_stay:
        before: str | None = None
        for number in range(rounds):
            before = _take_round(contestants, number, before, rest, flush)
        return
    active: Sequence[Contestant] = contestants
    last: str | None = None
    for number in range(MORE * rounds):
        if number == TRIAL_ROUNDS:
            active = _hopeful(active)
        if number == rounds:
            active = _close(active)
        if number >= rounds and _is_settled(active):
            return
        last = _take_round(active, number, last, rest, flush)


def _take_round(
    active: Sequence[Contestant], number: int, last: str | None, rest: float, flush: Callable[[], None] | None = None
) -> str | None:
    """A turn for each, back and forth: nobody always follows the same neighbour. The last one's library, before
    which ``last`` was, is returned.
    """
    for one in active if number % 2 == 0 else active[::-1]:
        library = "" if one.is_kernel else one.name
        if library != last:
            time.sleep(rest)
        last = library
        one.rounds.append(_turn(one.entrant, flush))
    return last


def _turn(entrant: Entrant, flush: Callable[[], None] | None) -> float:
    with entrant.context():
        if entrant.turn:
            return entrant.turn()
        if flush:
            entrant.run()
            samples = []
            for _ in range(SAMPLES):
                flush()
                samples.append(sample(entrant.run, 1))
        else:
            end = time.perf_counter() + WARM_UP
            count = repeats(entrant.run, SAMPLE_SECONDS)
            while time.perf_counter() < end:
                entrant.run()
            samples = [sample(entrant.run, count) for _ in range(SAMPLES)]
    return statistics.median(samples)


def _hopeful(active: Sequence[Contestant]) -> list[Contestant]:
    """Without the libraries far behind, and the worse ways of using one."""
    best: dict[str, float] = {}
    for one in active:
        if not one.is_kernel:
            best[one.name] = min(one.seconds, best.get(one.name, one.seconds))
    limit = HOPELESS * min(best.values(), default=0.0)
    return [one for one in active if one.is_kernel or one.seconds <= min(limit, WORSE_WAY * best[one.name])]


def _close(active: Sequence[Contestant]) -> list[Contestant]:
    """The kernels, and those that may be the best library."""
    best = min((one.seconds for one in active if not one.is_kernel), default=0.0)
    return [one for one in active if one.is_kernel or one.seconds <= CLOSE * best]


def _is_settled(active: Sequence[Contestant]) -> bool:
    """Whether the ratio is known well enough: on one side of 1, and not wide."""
    others = [one for one in active if not one.is_kernel]
    if not others or len(others) == len(active):
        return True
    best = min(others, key=lambda one: one.seconds)
    low, high = ratio_interval(best.rounds, active[0].rounds)
    return high <= WIDEST * low and not low < 1 < high


def ratio_interval(above: Sequence[float], below: Sequence[float], *, draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of ``median(above) / median(below)``; the rounds are drawn in pairs."""
    rng = random.Random(0)
    pairs = list(zip(above, below, strict=True))
    ratios = []
    for _ in range(draws):
        drawn = rng.choices(pairs, k=len(pairs))
        ratios.append(statistics.median(a for a, _ in drawn) / statistics.median(b for _, b in drawn))
    ratios.sort()
    return ratios[round(0.025 * (draws - 1))], ratios[round(0.975 * (draws - 1))]


def run_comparison(
    paths: list[str], directory: str, threads: int, rounds: int, limit: float
) -> tuple[list[list[float]], list[float] | None]:
    """In a worker: times of libraries and, for an f32 layer on the CPU, ONNX Runtime, taken in turn on CPUs of
    their own.

    Each is a list of medians, one per turn; of a slow layer, where that would last longer than ``limit``
    seconds, of single calls.

    Args:
        paths, directory: artifacts of one spec, and the folder of its inputs; see :mod:`convgen.measure.trial`.
    """
    if artifact_facts(paths[0])["on_device"]:
        return run_duel(paths, directory, threads, rounds), None
    libraries = [load_artifact(path, threads)[0] for path in paths]
    spec = libraries[0].spec
    with pinned(threads):
        field_ = []
        for library in libraries:
            call, dst = prepare_artifact(library, directory, threads)
            field_.append(Contestant("", Entrant("", call, partial(_same, dst)), is_kernel=True))
        if spec.dtype == "f32":
            data = {n: load(Path(directory) / f"{n}.npy", spec.dtype) for n in spec.shapes if n != "dst"}
            with contextlib.suppress(Exception):  # of its own kinds, for a layer it cannot run
                field_ += [Contestant("onnxruntime", one) for one in OnnxRuntime().entrants(spec, data, threads)]
        peer = field_[len(paths) :]
        rest = REST if threads > 1 and peer else 0.0
        seconds = 0.0
        for one in field_:
            one.entrant.run()
            seconds += sample(one.entrant.run, 1)
        round_seconds = len(field_) * (WARM_UP + SAMPLES * SAMPLE_SECONDS) + (SAMPLES + 3) * seconds + rest
        if rounds * round_seconds > limit:
            samples = alternate([one.entrant.run for one in field_], rounds=rounds)
            return samples[: len(paths)], samples[len(paths)] if peer else None
        # Where a change of libraries takes a rest, each has a few rounds between two of them.
        groups = [field_] if not rest else [field_[: len(paths)], peer]
        several = BLOCK if rest else 1
        last = None
        for begin in range(0, rounds, several):
            for group in groups if begin // several % 2 == 0 else groups[::-1]:
                for number in range(begin, min(begin + several, rounds)):
                    last = _take_round(group, number, last, rest)
    return [one.rounds for one in field_[: len(paths)]], peer[0].rounds if peer else None


def _same(value: Any) -> Any:
    return value


# ---- cold caches ------------------------------------------------------------------------------


class Flush:
    """Empties the caches: reads a buffer of twice the last-level cache on the calling CPU, before that
    one of twice an L2 cache on each other CPU that the layer's threads may have used.

    Only reads: what is written would still be on its way to memory when the next call is timed.
    """

    def __init__(self, here: Machine, threads: int) -> None:
        private = 2 * (here.l2 or 1 << 20)
        self._buffer = np.ones(max(2 * (here.l3 or 32 << 20), private), np.uint8)
        self._part = self._buffer[:private]
        self._cpus = sorted(os.sched_getaffinity(0)) if threads > 1 else []

    def __call__(self) -> None:
        usable = os.sched_getaffinity(0)
        try:
            for cpu in self._cpus:
                os.sched_setaffinity(0, {cpu})
                self._part.max()
        finally:
            os.sched_setaffinity(0, usable)
        self._buffer.max()
