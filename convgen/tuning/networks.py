"""The final comparison of a network: its layers one after another, with what tuning found and with the defaults.

A layer that is compared alone has a warm input and the caches for itself; in its network others use them in between.
So where the order of a model's layers is known, the winners of their comparisons must win there as well: all of them
run in their network's chain (:class:`~convgen.measure.chain.Chain`), in turn with the defaults, and each is kept where
it is certainly faster there. What is kept must not make the whole slower, either. What times a network is a
:class:`Timing`: its chain of convolutions, or the whole that was compiled (:mod:`convgen.network.tuning`).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..errors import BuildError, Inapplicable, MeasureError
from ..lowering.schedule import Candidate
from ..measure.workers import ChainSamples
from ..problem.spec import ConvSpec
from ..records.answer import record_candidate
from ..records.record import TuningRecord, now
from .context import SearchContext
from .final import built, judge
from .search import GAIN, Search

#: How often each chain runs.
ROUNDS = 15

#: How often a network's rounds are drawn for an interval.
DRAWS = 200

#: Of each round the seconds of each instance.
Rounds = Sequence[Sequence[float]]
#: Which kernel each layer has in a network.
Choice = dict[ConvSpec, Candidate]


class Timing(Protocol):
    """What times a network's layers where they are used.

    Attributes:
        whole: whether it times what stands between the layers as well.
    """

    whole: bool

    def usable(self, search: Search, candidates: list[Candidate]) -> list[Candidate]:
        """Those of a layer's candidates that can be timed."""

    def times(self, model: str, order: Sequence[ConvSpec], choices: Sequence[Choice]) -> ChainSamples:
        """Seconds with each choice, taken in turn, round by round: of each instance, and where it times the whole, last
        of everything else.

        Args:
            order: the instances that take part.

        Raises:
            MeasureError: they cannot be timed.
        """


class ChainTiming:
    """Convolutions one after another, in a worker."""

    whole = False

    def __init__(self, context: SearchContext) -> None:
        self._context = context
        self._libraries: dict[ConvSpec, dict[Candidate, str]] = {}

    def usable(self, search: Search, candidates: list[Candidate]) -> list[Candidate]:
        try:
            found = self._libraries[search.spec] = dict(built(search, candidates))
        except (BuildError, Inapplicable):
            return []
        return list(found)

    def times(self, model: str, order: Sequence[ConvSpec], choices: Sequence[Choice]) -> ChainSamples:
        paths = [{spec: self._libraries[spec][choice[spec]] for spec in dict.fromkeys(order)} for choice in choices]
        return self._context.pools.chains(order, paths, self._context.threads, ROUNDS)


@dataclass(frozen=True)
class NetworkTimes:
    """What a model's layers take one after another.

    Attributes:
        layers: how many instances took part: those of the layers that were reached.
        default_seconds: of all of them, with the defaults (:func:`whole_seconds`); None where nothing was timed.
        seconds: with what is kept.
        ratio_default: the first over the second, [median, low, high].
        won, lost: how many layers keep a tuned kernel, and how many had one that does not pay here.
        reason: why nothing was timed, or why nothing is kept.
        whole: whether the seconds are of the whole model, what stands between its layers included.
    """

    model: str
    target: str
    threads: int
    layers: int = 0
    default_seconds: float | None = None
    seconds: float | None = None
    ratio_default: list[float] | None = None
    won: int = 0
    lost: int = 0
    reason: str = ""
    whole: bool = False


def judge_networks(
    context: SearchContext,
    networks: Mapping[str, Sequence[ConvSpec]],
    searches: Mapping[ConvSpec, Search],
    timing: Timing | None = None,
) -> list[NetworkTimes]:
    """Time the networks of which a layer has contenders (:class:`~convgen.tuning.search.Search`), and keep what pays.

    A winner that does not becomes a record that says so, and the default's record answers.

    Args:
        networks: each model's instances, in the order in which they run.
        searches: of the layers that were reached, each after its final comparison.
        timing: what times the networks; their chains of convolutions where None.
    """
    open_layers = {spec: found for spec, search in searches.items() if (found := search.contenders)}
    judged = {model: order for model, order in networks.items() if not open_layers.keys().isdisjoint(order)}
    if not judged:
        return []
    if timing is None and (context.target.on_device or context.pools.runner.isolated):
        where = "a GPU" if context.target.on_device else "other machines"
        reason = f"layers were compared alone, as on {where}"
        return [NetworkTimes(model, context.target.spelling, context.threads, reason=reason) for model in judged]
    return _Judge(context, judged, searches, open_layers, timing or ChainTiming(context)).judge()


def whole_seconds(rounds: Rounds) -> float:
    """What a network takes: the sum of its instances' medians, as what disturbs a round disturbs few of them."""
    return math.fsum(map(statistics.median, zip(*rounds, strict=True)))


def whole_ratio(above: Rounds, below: Rounds) -> list[float]:
    """The ratio of what a network takes in two ways, and its 95 % bootstrap interval: the rounds are drawn in pairs."""
    rng = random.Random(0)
    ratios = []
    for _ in range(DRAWS):
        drawn = rng.choices(range(len(above)), k=len(above))
        ratios.append(whole_seconds([above[i] for i in drawn]) / whole_seconds([below[i] for i in drawn]))
    ratios.sort()
    ends = ratios[round(0.025 * (DRAWS - 1))], ratios[round(0.975 * (DRAWS - 1))]
    return [whole_seconds(above) / whole_seconds(below), *ends]


class _Judge:
    """The networks of one target and number of threads, which are timed with several choices of kernels.

    Attributes:
        entrants: of every layer that takes part the default, and then what is to be judged (``open``); of another
            layer its winner.
        networks: each model's instances that take part.
        refused: why a model was not timed.
        notes: what is said of a layer's entrants.
    """

    def __init__(
        self,
        context: SearchContext,
        networks: Mapping[str, Sequence[ConvSpec]],
        searches: Mapping[ConvSpec, Search],
        open_layers: Mapping[ConvSpec, list[Candidate]],
        timing: Timing,
    ) -> None:
        self.context, self.searches, self.timing = context, searches, timing
        self.entrants: dict[ConvSpec, list[Candidate]] = {}
        self.refused: dict[str, str] = {}
        self.notes: dict[ConvSpec, list[dict[str, Any]]] = {}
        for spec in dict.fromkeys(spec for order in networks.values() for spec in order if spec in searches):
            default = searches[spec].race.default
            wanted = dict.fromkeys([default, *open_layers.get(spec, self._settled(spec))])
            found = timing.usable(searches[spec], list(wanted))
            if default in found:  # a layer without one has nothing to be compared with
                self.entrants[spec] = found
        self.open = [spec for spec in open_layers if len(self.entrants.get(spec, ())) > 1]
        self.networks = {model: [spec for spec in order if spec in self.entrants] for model, order in networks.items()}

    def _settled(self, spec: ConvSpec) -> list[Candidate]:
        """The winner of a layer of which there is nothing to judge."""
        winner = self.searches[spec].winner
        candidate = record_candidate(winner, spec, self.context.target) if winner else None
        return [] if candidate is None else [candidate]

    def judge(self) -> list[NetworkTimes]:
        """Judge each layer in all networks that it occurs in, then what is kept in each network as a whole."""
        if not self.open:
            self.refused = dict.fromkeys(self.networks, "what won cannot be built again")
            return [self._times(model, self._choice(0), None) for model in self.networks]
        choices = [self._choice(place) for place in range(max(len(self.entrants[spec]) for spec in self.open))]
        samples = {model: taken for model in self.networks if (taken := self._time(model, choices))}
        kept = dict(choices[1])
        for spec in self.open:
            if times := self._layer_times(samples, spec):
                winner, self.notes[spec] = judge(times, 0)
                kept[spec] = self.entrants[spec][winner or 0]
        whole = self._whole(kept, choices, samples)
        if self.context.pools.interrupts.came:
            return []
        self._keep(kept)
        return [self._times(model, kept, whole.get(model)) for model in self.networks]

    def _choice(self, place: int) -> Choice:
        """The entrants of a place; the last one of a layer that has fewer."""
        return {spec: entrants[min(place, len(entrants) - 1)] for spec, entrants in self.entrants.items()}

    def _time(self, model: str, choices: Sequence[Choice]) -> ChainSamples | None:
        """Time a network with several choices; None where that is refused."""
        try:
            return self.timing.times(model, self.networks[model], choices)
        except MeasureError as error:
            self.refused[model] = str(error)
            return None

    def _layer_times(self, samples: Mapping[str, ChainSamples], spec: ConvSpec) -> list[list[float]]:
        """Seconds of all of a layer's instances with each of its entrants, round by round; empty where it was not
        timed.
        """
        of_networks = [
            [
                [sum(seconds[i] for i, other in enumerate(self.networks[model]) if other == spec) for seconds in rounds]
                for rounds in taken[: len(self.entrants[spec])]
            ]
            for model, taken in samples.items()
            if spec in self.networks[model]
        ]
        # Of a slow network there are fewer rounds.
        return [[sum(parts) for parts in zip(*several, strict=False)] for several in zip(*of_networks, strict=True)]

    def _whole(
        self, kept: Choice, choices: Sequence[Choice], samples: Mapping[str, ChainSamples]
    ) -> dict[str, tuple[float, float, list[float]]]:
        """Each network's seconds with the defaults and with what is ``kept``, and their ratio. Where a network is
        slower with it, its layers' defaults are kept.
        """
        found: dict[str, tuple[float, float, list[float]]] = {}
        waiting = list(samples)
        while waiting and not self.context.pools.interrupts.came:
            model = waiting.pop(0)
            own = self.networks[model]
            taken: ChainSamples | None = samples[model]
            if all(kept[spec] == choices[0][spec] for spec in own):
                taken = [samples[model][0]] * 2
            elif any(kept[spec] != choices[1][spec] for spec in own):
                taken = self._time(model, [choices[0], kept])
            if not taken:
                continue
            against = whole_ratio(taken[0], taken[1])
            mine = [spec for spec in self.open if spec in own and kept[spec] != choices[0][spec]]
            # Chains are timed without what stands between: what seems a little slower there need not be.
            if mine and (against[0] < (1.0 if self.timing.whole else GAIN) or against[2] < 1):
                kept |= {spec: choices[0][spec] for spec in mine}
                self.refused[model] = f"all together they were slower than the defaults: {against[0]:.3f}×"
                waiting += [other for other in samples if not set(mine).isdisjoint(self.networks[other])]
            else:
                found[model] = whole_seconds(taken[0]), whole_seconds(taken[1]), against
        return found

    def _keep(self, kept: Choice) -> None:
        """Records of what was judged: the comparison's, with what the network said."""
        cost = self.context.journal.charge() / max(len(self.notes), 1)
        for spec, notes in self.notes.items():
            search, models = self.searches[spec], [model for model, order in self.networks.items() if spec in order]
            records: dict[Candidate, TuningRecord] = {}
            for candidate, note in zip(self.entrants[spec], notes, strict=True):
                record = search.finals[candidate]
                network = {name: note[name] for name in ("default_seconds", "ratio_default")} | {"models": models}
                said = {**(record.note or {}), "winner": candidate == kept[spec], "network": network}
                said |= {"cost": cost / len(notes)} | ({"job": search.journal.job} if search.journal.job else {})
                records[candidate] = replace(record, when=now(), note=said)
            search.conclude(dict(sorted(records.items(), key=lambda item: item[0] == kept[spec])))

    def _times(self, model: str, kept: Choice, whole: tuple[float, float, list[float]] | None) -> NetworkTimes:
        order = self.networks[model]
        default_seconds, seconds, against = whole or (None, None, None)
        tuned = [spec for spec in dict.fromkeys(order) if kept[spec] != self.entrants[spec][0]]
        lost = [spec for spec in dict.fromkeys(order) if spec in self.notes and spec not in tuned]
        return NetworkTimes(
            model,
            self.context.target.spelling,
            self.context.threads,
            len(order),
            default_seconds,
            seconds,
            against,
            len(tuned),
            len(lost),
            self.refused.get(model, ""),
            self.timing.whole,
        )
