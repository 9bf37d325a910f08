"""A network, or its convolutions, here beside other libraries on the whole model, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError, meant
from .busy import BusyWatch
from .chain import Chain
from .compare import REST, Contestant, ratio_interval, take_turns
from .network_model import CONVOLUTIONS, MODEL, NetworkModel, Part, Running, ready
from .network_peers import NETWORK_PEERS
from .peers import Entrant


@dataclass(frozen=True)
class NetworkComparison:
    """A model's convolutions here, beside what other libraries take.

    Attributes:
        rounds: seconds of the chain, by turn.
        parts: what else was timed, or why not.
        best: whose convolutions are the fastest of those in f32; None where none were timed.
        ratio: their time over the chain's, and ``interval`` its 95 % confidence interval.
        busy: the share of the CPUs that other programs used while all took turns (:mod:`convgen.measure.busy`).
    """

    rounds: tuple[float, ...]
    parts: tuple[Part, ...]
    best: str | None
    ratio: float | None
    interval: tuple[float, float] | None
    busy: float | None

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can say it."""
        return {
            "seconds": self.seconds,
            "rounds": list(self.rounds),
            "parts": [part.to_dict() for part in self.parts],
            "best": self.best,
            "ratio": self.ratio,
            "interval": self.interval,
        }


@dataclass(frozen=True)
class ModelComparison:
    """A whole model here, beside what other libraries take.

    Attributes:
        parts: ours first, then the others, each timed or with the reason why not.
        best: the fastest other library, of those in f32 where ours is; None where none was timed.
        ratio: its time over ours, and ``interval`` its 95 % confidence interval.
        busy: the share of the CPUs that other programs used while all took turns (:mod:`convgen.measure.busy`).
    """

    parts: tuple[Part, ...]
    best: str | None
    ratio: float | None
    interval: tuple[float, float] | None
    busy: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can say it."""
        return {
            "parts": [part.to_dict() for part in self.parts],
            "best": self.best,
            "ratio": self.ratio,
            "interval": self.interval,
            "busy": self.busy,
        }


def compare_model(
    model: NetworkModel,
    own: Callable[[], Running],
    version: str,
    peers: Sequence[str],
    threads: int,
    rounds: int = 7,
    precision: str = "f32",
) -> ModelComparison:
    """Time a whole model here and in other libraries, in turn, several times over.

    Args:
        own: makes our way of running it, whose outputs are checked as the others' are.
        precision: what ours multiplies in; what is less than f32 is compared with the others' in any precision.

    Raises:
        UnsupportedError: no such peer, or inputs that cannot be made.
        MeasureError: the model's outputs are not finite.
    """
    check_peers(peers)
    ours = ready(model, Part("convgen", version, precision=precision), own)
    others = [part for name in peers for part in NETWORK_PEERS[name](model, threads, convolutions=False)]
    return compare_parts(ours, others, threads, rounds, precision)


def compare_parts(
    ours: Part, others: Sequence[Part], threads: int, rounds: int = 7, precision: str = "f32"
) -> ModelComparison:
    """Time ways of running a whole model in turn, several times over: those that are ready
    (:func:`~convgen.measure.network_model.ready`). The arguments are those of :func:`compare_model`.
    """
    busy = time_in_turns([part.contestant for part in (ours, *others) if part.contestant], threads, rounds)
    best = _fastest(others, MODEL, precision) if ours.seconds else None
    ratio, interval = quotient(best, ours)
    return ModelComparison((ours, *others), best.library if best else None, ratio, interval, busy)


def time_in_turns(contestants: Sequence[Contestant], threads: int, rounds: int) -> float | None:
    """Fill in the rounds; returns the share of the CPUs that other programs used meanwhile."""
    watch = BusyWatch()
    take_turns(contestants, rounds, REST if threads > 1 else 0.0, all_stay=True)
    return watch.share()


def quotient(above: Part | None, below: Part) -> tuple[float | None, tuple[float, float] | None]:
    """How many times as long one takes as the other, with the 95 % interval; None where one of them was not timed."""
    if above is None or not above.seconds or not below.seconds:
        return None, None
    return above.seconds / below.seconds, ratio_interval(above.rounds, below.rounds)


def check_peers(names: Sequence[str]) -> None:
    """Raise UnsupportedError unless all are libraries that run whole models."""
    for name in names:
        if name not in NETWORK_PEERS:
            raise UnsupportedError(
                f"peers: expected some of {', '.join(NETWORK_PEERS)}, found {name!r}{meant(name, NETWORK_PEERS)}"
            )


def _fastest(parts: Sequence[Part], what: str, precision: str = "f32") -> Part | None:
    """Of those that were timed: in f32, or where ours multiplies in less, in any precision."""
    timed = [p for p in parts if p.seconds and p.what == what and (precision != "f32" or p.precision == "f32")]
    return min(timed, key=lambda part: part.seconds or 0.0, default=None)


def compare_network(
    model: NetworkModel, chain: Chain, peers: Sequence[str], threads: int, *, rounds: int = 7
) -> NetworkComparison:
    """Time a model's convolutions and other libraries on the whole model, in turn, several times over.

    Raises:
        UnsupportedError: no such peer, or inputs that cannot be made.
        MeasureError: the model's outputs are not finite.
    """
    check_peers(peers)
    _ = model.expected
    own = Contestant("convgen", Entrant("chain", chain, chain.output), is_kernel=True)
    parts = [part for name in peers for part in NETWORK_PEERS[name](model, threads)]
    contestants = [part.contestant for part in parts if part.contestant]
    busy = time_in_turns([own, *contestants], threads, rounds)
    best = _fastest(parts, CONVOLUTIONS)
    return NetworkComparison(
        tuple(own.rounds),
        tuple(parts),
        best.library if best else None,
        (best.seconds or 0.0) / own.seconds if best else None,
        ratio_interval(best.rounds, own.rounds) if best else None,
        busy,
    )
