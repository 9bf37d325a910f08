"""How high strips should be: a network is compiled with several heights, and these run in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..hardware.machine import pinned
from ..hardware.target import Target, check_native
from ..lowering.versions import versions
from ..measure.standalone.timing import repeats, sample
from ..problem.separable import SeparableSpec
from ..records.record import TuningRecord
from ..records.strips import SCHEDULE, VERSION
from ..tuning.networks import ROUNDS, whole_ratio, whole_seconds
from .choice import Choose
from .network import Network, compile_planned, plan_model
from .reading import read_graph
from .rewriting import rewrite
from .strips import height_of, pairs

if TYPE_CHECKING:
    from onnx import ModelProto

#: Heights that are tried beside that which suits the caches, and none.
HEIGHTS = (2, 4, 8, 16, 32)
#: Seconds of a sample.
_SAMPLE_SECONDS = 2e-3


@dataclass(frozen=True)
class StripTime:
    """What a network takes with strips of a height.

    Attributes:
        height: rows; 0 without strips.
        is_default: whether it is what suits the caches.
        seconds: the median.
        ratio: what the default takes over these, median, low and high.
    """

    height: int
    is_default: bool
    seconds: float
    ratio: tuple[float, float, float]


def strip_times(
    source: str | Path | ModelProto, target: Target, threads: int, *, accuracy: str, choose: Choose | None = None
) -> list[StripTime]:
    """Seconds with each height, the default's first: that of the first pair of the model.

    Raises:
        UnsupportedError: it does not run here; and what :func:`plan_model` raises.
        BuildError: TVM, LLVM or the C compiler failed.
    """
    check_native(target)
    graph = read_graph(source)
    rewrite(graph)
    found = list(pairs(graph))
    own = height_of(found[0], target) if found else 0
    known = [height for height in HEIGHTS if found and height < found[0].rows]
    heights = list(dict.fromkeys([own, 0, *known]))
    networks = []
    for height in heights:
        plans = plan_model(source, target, accuracy=accuracy, choose=choose, strips=height)
        networks.append(compile_planned(plans, target, threads, accuracy))
    rounds = _rounds(networks, threads)
    ratios = [whole_ratio(rounds[0], taken) for taken in rounds]
    return [
        StripTime(height, number == 0, whole_seconds(taken), (ratio[0], ratio[1], ratio[2]))
        for number, (height, taken, ratio) in enumerate(zip(heights, rounds, ratios, strict=True))
    ]


def fastest(times: Sequence[StripTime]) -> StripTime:
    """The fastest of those that are certainly faster than the default; the default where none is."""
    faster = [time for time in times if time.ratio[1] > 1]
    return min(faster or times[:1], key=lambda time: time.seconds)


def height_records(spec: SeparableSpec, target: Target, threads: int, times: Sequence[StripTime]) -> list[TuningRecord]:
    """What was timed of a problem, as a store keeps it (:mod:`convgen.records.strips`)."""
    won = fastest(times)
    return [
        TuningRecord(
            spec=spec.descriptor,
            target=target.spelling,
            hardware=target.hardware,
            threads=threads,
            schedule=SCHEDULE,
            schedule_version=VERSION,
            picks={"rows": time.height},
            outcome="ok",
            seconds=time.seconds,
            versions=versions(),
            note={
                "final": True,
                "winner": time is won,
                "default_seconds": times[0].seconds,
                "ratio_default": list(time.ratio),
            },
        )
        for time in times
    ]


def _rounds(networks: Sequence[Network], threads: int) -> list[list[list[float]]]:
    """Seconds of a call of each network, taken in turn, round by round."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(info.shape, np.float32) for info in networks[0].inputs.values()]
    out = {name: np.empty(info.shape, np.float32) for name, info in networks[0].outputs.items()}
    calls = [lambda network=network: network(*inputs, out=out) for network in networks]
    taken: list[list[list[float]]] = [[] for _ in networks]
    with pinned(threads):
        counts = [repeats(call, _SAMPLE_SECONDS) for call in calls]
        for turn in range(ROUNDS):
            for which in range(len(calls))[:: 1 if turn % 2 == 0 else -1]:  # nobody always follows the same one
                calls[which]()  # caches are its own
                taken[which].append([sample(calls[which], counts[which])])
    return taken
