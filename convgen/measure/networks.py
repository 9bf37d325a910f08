"""A network's convolutions here beside other libraries on the whole model, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from .busy import BusyWatch
from .chain import Chain
from .compare import REST, Contestant, ratio_interval, take_turns
from .network_model import CONVOLUTIONS, NetworkModel, Part
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


def compare_network(
    model: NetworkModel, chain: Chain, peers: Sequence[str], threads: int, *, rounds: int = 7
) -> NetworkComparison:
    """Time a model's convolutions and other libraries on the whole model, in turn, several times over.

    Raises:
        UnsupportedError: no such peer, or inputs that cannot be made.
        MeasureError: the model's outputs are not finite.
    """
    for name in peers:
        if name not in NETWORK_PEERS:
            raise UnsupportedError(f"peers: expected some of {', '.join(NETWORK_PEERS)}, found {name!r}")
    _ = model.expected
    own = Contestant("convgen", Entrant("chain", chain, chain.output), is_kernel=True)
    parts = [part for name in peers for part in NETWORK_PEERS[name](model, threads)]
    ready = [part.contestant for part in parts if part.contestant]
    watch = BusyWatch()
    take_turns([own, *ready], rounds, REST if threads > 1 else 0.0, all_stay=True)
    busy = watch.share()
    comparable = [part for part in parts if part.seconds and part.what == CONVOLUTIONS and part.precision == "f32"]
    best = min(comparable, key=lambda part: part.seconds or 0.0, default=None)
    return NetworkComparison(
        tuple(own.rounds),
        tuple(parts),
        best.library if best else None,
        (best.seconds or 0.0) / own.seconds if best else None,
        ratio_interval(best.rounds, own.rounds) if best else None,
        busy,
    )
