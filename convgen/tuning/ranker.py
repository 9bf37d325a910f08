"""Which candidates to measure first: a cost model taught by records.

A Gaussian process over log-seconds (Rasmussen and Williams, 2006, chapter 2). Its mean is what the
schedules' own analytic ``cost`` says of their defaults, a little slower with every pick that differs; its
kernel says which measurements tell something about each other:

- of one schedule, the more alike the layers are, and the more alike the picks' *differences from the
  default*, each by itself and all together: defaults fit themselves to the layer, so that what was
  gained by moving off them carries over;
- of one layer, all of them a little, those of one schedule more.

Times count as multiples of the layer's operations at the nominal peak, so that layers of all sizes teach
each other. How much picks matter in a layer and how much its measurements scatter, the measurements tell.

Every prediction is computed from the records nearest to the layer, which are all that is read of a store: nothing
is trained ahead, a new record counts at once, the same records always give the same answer, and the uncertainty
that comes with it tells a :class:`~convgen.tuning.race.Race` what is worth trying. It takes NumPy only.
Gradient-boosted trees (XGBoost, the model of MetaSchedule and AutoTVM) were tried on 404 trials of 24 layers, each
layer left out in turn: they put the first candidate within 5 % of the best later (place 3.1 to 4.4 in the mean,
this 2.9), say nothing of their uncertainty, and bring SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from ..deferred import np
from ..errors import SpecError
from ..hardware.target import Target
from ..lowering.discover import schedules
from ..lowering.schedule import Candidate, Picks, Schedule
from ..problem.dtypes import BYTES
from ..problem.layout import BLOCKS
from ..problem.spec import ConvSpec
from ..records.record import TuningRecord
from ..records.store import RecordStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.float64]

#: Records a prediction is computed from: all of the layer's own, then those of the nearest layers.
NEAREST = 500
#: Layers of a store that are considered at all, those measured last; and how many of the nearest may hand on winners.
FAMILIAR, NEIGHBOURS = 10_000, 32
#: Records of other layers that are read for the predictions of one: more than are needed, as some may mean nothing.
READ = 2000
#: The mean: the weight of log-cost, what one changed pick costs, and what each doubling of one costs.
COST, CHANGED, DOUBLED = 0.8, 0.05, 0.03
#: The kernel, in units of log-seconds: a schedule's level in layers like this, the effect of its picks
#: there, the layer, a schedule's level and the effect of its picks in this layer alone.
LEVEL, EFFECT, LAYER, OWN_LEVEL, OWN_EFFECT = 0.15, 0.03, 0.4, 0.12, 0.06
#: What measurements scatter by, in log-seconds: on a quiet machine; and how much it may be on a busy one, which
#: the measurements themselves tell.
NOISE, NOISES = 0.05, (0.05, 0.1, 0.2, 0.35)
#: What picks do together beside what each does by itself (variances).
JOINT = 4.0
#: How much more picks may matter in a layer than they usually do.
SCALES = (1.0, 2.0, 4.0)
#: Distances, in doublings, over which layers and picks stop resembling each other.
ALIKE, NEAR = 2.0, 1.2
#: How much slower than a layer's best still matters, in log-seconds; a failure is that much slower than expected.
SLOW, FAILED = math.log(3), 1.0
#: Verbs whose picks multiply: tiles to registers, parts to tasks, blocks to what a task does.
_TOGETHER = ("tile", "parallel", "block")
#: Layers at least so much alike (their kernel) hand on their winners.
SIMILAR, WINNERS = 0.7, 3


@dataclass
class _Algorithm:
    """A schedule in one layer: what does not depend on the picks."""

    schedule: Schedule
    default: Picks
    domains: dict[str, tuple[Any, ...]]
    level: float  # the mean of its default, in log-seconds over the bound

    def __contains__(self, picks: Picks) -> bool:
        return picks.keys() == self.domains.keys() and all(picks[k] in values for k, values in self.domains.items())


class _Row(NamedTuple):
    schedule: str
    moves: tuple[float, ...]  # by how much each pick differs from the default
    mean: float


@dataclass
class _Layer:
    """A layer on a machine with a number of threads, and what was measured there."""

    spec: ConvSpec
    threads: int
    hardware: str
    bound: float  # seconds at the nominal peak
    place: tuple[float, ...]  # among the layers, in doublings
    algorithms: dict[str, _Algorithm] = field(default_factory=dict)
    seconds: dict[Candidate, float | None] = field(default_factory=dict)
    rows: dict[Candidate, _Row] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)  # descriptors of specs whose records are still to be read
    read: int = 0  # records of other layers that were read for this one

    @property
    def best(self) -> float:
        return min((s for s in self.seconds.values() if s is not None), default=math.inf)


class Ranker:
    """Predicts how fast candidates are, from what was measured of any layer.

    Args:
        target, threads: what is tuned for.
    """

    def __init__(self, target: Target, threads: int) -> None:
        self.target, self.threads = target, threads
        self._layers: dict[tuple[str, int, str], _Layer] = {}
        self._specs: dict[str, ConvSpec | None] = {}
        self._store: RecordStore | None = None
        self._order: dict[int, list[tuple[float, _Layer]]] = {}  # by layer: the others, the most alike first

    @classmethod
    def from_store(cls, store: RecordStore | None, target: Target, threads: int) -> Ranker:
        """A ranker taught by a store's records for the target, whatever the thread count or machine.

        It reads those of a layer when they are first needed: the store stays open as long as the ranker is used.
        Without records it knows what the schedules say of themselves.

        Raises:
            RecordError: the store cannot be read.
        """
        ranker = cls(target, threads)
        ranker._store = store
        for descriptor, _, hardware, count in store.problems(last=FAMILIAR, target=target.spelling) if store else ():
            if spec := ranker._spec(descriptor):
                ranker._layer(spec, count, hardware).unread.append(descriptor)
        return ranker

    def learn(self, record: TuningRecord) -> None:
        """Take a trial into account; one that another version of its schedule made says nothing and is left out.

        The last record of a candidate counts, so that hearing of a trial twice changes nothing.
        """
        spec = self._spec(record.spec)
        if spec is None or record.target != self.target.spelling:
            return
        layer = self._layer(spec, record.threads, record.hardware)
        algorithm = self._algorithm(layer, record.schedule)
        picks = Picks(**record.picks)
        if algorithm and algorithm.schedule.version == record.schedule_version and picks in algorithm:
            self._observe(layer, Candidate(algorithm.schedule, picks), record.seconds)

    def observe(self, spec: ConvSpec, candidate: Candidate, seconds: float | None) -> None:
        """What :meth:`learn` does, for a trial just made here; None: it failed."""
        layer = self._layer(spec.core, self.threads, self.target.hardware)
        if candidate.picks in self._known(layer, candidate.schedule):
            self._observe(layer, candidate, seconds)

    def predict(self, spec: ConvSpec, candidates: Sequence[Candidate]) -> list[float]:
        """Expected log-seconds of candidates for this ranker's target and threads; lower is better."""
        layer = self._layer(spec.core, self.threads, self.target.hardware)
        mean, _ = self.posterior(spec, candidates)
        return [float(value) for value in mean + math.log(layer.bound)]

    def posterior(self, spec: ConvSpec, candidates: Sequence[Candidate]) -> tuple[Array, Array]:
        """Mean [candidates] and covariance [candidates, candidates] of log-seconds over the layer's bound."""
        if not candidates:
            return np.zeros(0), np.zeros((0, 0))
        own = self._layer(spec.core, self.threads, self.target.hardware)
        asked = [(own, self._row(own, candidate)) for candidate in candidates]
        given, values = self._given(own)
        mean = np.array([row.mean for _, row in asked])
        levels, moved = _kernel(asked, asked)
        if not given:
            return mean, levels + moved
        surprise = np.array(values) - np.array([row.mean for _, row in given])
        scale, inverse = _likeliest(*_kernel(given, given), surprise)
        across, moves = _kernel(asked, given)
        cross = across + scale**2 * moves
        return mean + cross @ (inverse @ surprise), levels + scale**2 * moved - cross @ inverse @ cross.T

    def similar(self, spec: ConvSpec) -> list[Candidate]:
        """What won on layers like this one and on this layer with other thread counts, the most alike first.

        A pick that was its layer's default becomes this layer's default, others are taken over, or the nearest
        that this layer's space has; those that are not valid then are left out.
        """
        own = self._layer(spec.core, self.threads, self.target.hardware)
        found: list[Candidate] = []
        for likeness, other in self._neighbours(own)[:NEIGHBOURS]:
            if likeness < SIMILAR or len(found) == WINNERS:
                break
            self._read(other, own)
            if other.best < math.inf:
                winner = min((s, str(c), c) for c, s in other.seconds.items() if s is not None)[2]
                adapted = self._adapted(winner, other, own)
                if adapted is not None and adapted not in found:
                    found.append(adapted)
        return found

    # ---- layers and rows --------------------------------------------------------------------------

    def _spec(self, descriptor: str) -> ConvSpec | None:
        """The core of a record's spec; None where this version cannot read it."""
        if descriptor not in self._specs:
            try:
                self._specs[descriptor] = ConvSpec.parse(descriptor).core
            except SpecError:
                self._specs[descriptor] = None
        return self._specs[descriptor]

    def _layer(self, spec: ConvSpec, threads: int, hardware: str) -> _Layer:
        key = (spec.descriptor, threads, hardware)
        if key not in self._layers:
            bound = max(spec.flops, 1) / self.target.peak_flops
            self._layers[key] = _Layer(spec, threads, hardware, bound, _place(spec, threads))
        return self._layers[key]

    def _algorithm(self, layer: _Layer, schedule_id: str) -> _Algorithm | None:
        """A schedule in a layer; None where there is none of that id or it does not apply."""
        schedule = schedules().get(schedule_id)
        if schedule_id not in layer.algorithms:
            if schedule is None or schedule.reason_against(layer.spec, self.target) is not None:
                return None
            self._known(layer, schedule)
        return layer.algorithms[schedule_id]

    def _known(self, layer: _Layer, schedule: Schedule) -> _Algorithm:
        """A schedule that applies to a layer."""
        if schedule.id not in layer.algorithms:
            cost = schedule.cost(layer.spec, self.target)
            level = COST * math.log(cost / layer.bound) if 0 < cost < math.inf else SLOW
            layer.algorithms[schedule.id] = _Algorithm(
                schedule,
                schedule.default(layer.spec, self.target),
                schedule.space(layer.spec, self.target).domains,
                level,
            )
        return layer.algorithms[schedule.id]

    def _row(self, layer: _Layer, candidate: Candidate) -> _Row:
        if candidate in layer.rows:
            return layer.rows[candidate]
        algorithm, extents = self._known(layer, candidate.schedule), _extents(layer.spec)
        steps, waste = [], []
        products = dict.fromkeys(_TOGETHER, 0.0)
        for name, default in cast(Any, algorithm.default.items()):
            value: Any = candidate.picks[name]
            if isinstance(value, str):
                values = sorted(algorithm.domains[name])
                steps.append(float(values.index(value) - values.index(default)))
            else:
                steps.append(_doublings(value) - _doublings(default))
                verb = name.partition("_")[0]
                if verb in products:
                    products[verb] += steps[-1]
                extent = extents.get(name.rpartition("_")[2], 1)
                waste.append(_waste(extent, value) - _waste(extent, default))
        changed = sum(step != 0 for step in steps)
        doubled = sum(min(abs(step), 3.0) for step in steps)
        mean = algorithm.level + CHANGED * changed + DOUBLED * doubled
        return _Row(
            candidate.schedule.id, tuple(max(-3.0, min(3.0, m)) for m in (*steps, *waste, *products.values())), mean
        )

    def _observe(self, layer: _Layer, candidate: Candidate, seconds: float | None) -> None:
        if not layer.seconds:
            self._order.clear()  # one more that may be near
        layer.seconds[candidate] = seconds
        layer.rows[candidate] = self._row(layer, candidate)

    def _adapted(self, winner: Candidate, there: _Layer, here: _Layer) -> Candidate | None:
        schedule = winner.schedule
        algorithm = self._algorithm(here, schedule.id)
        if algorithm is None:
            return None
        base = there.algorithms[schedule.id].default
        picks = {}
        for name, values in algorithm.domains.items():
            default, value = algorithm.default[name], winner.picks[name]
            if value == base[name]:
                picks[name] = default
            elif value in values or isinstance(value, str):
                picks[name] = value
            else:
                distances = [(abs(_doublings(v) - _doublings(value)), v) for v in values]
                picks[name] = min(distances)[1]
        adapted = Candidate(schedule, Picks(**picks))
        return None if schedule.reason_against(here.spec, self.target, adapted.picks) else adapted

    # ---- the process --------------------------------------------------------------------------

    def _read(self, layer: _Layer, own: _Layer) -> None:
        """Learn what the store has of a layer near one's own: of much the newest.

        What was measured here meanwhile is the same, or newer.
        """
        while layer.unread and self._store is not None and (layer is own or own.read < READ):
            found = self._store.trials(
                spec=layer.unread.pop(),
                target=self.target.spelling,
                hardware=layer.hardware,
                threads=layer.threads,
                limit=NEAREST,
            )
            own.read += 0 if layer is own else 1 + len(found)
            for record in found:
                self.learn(record)

    def _neighbours(self, own: _Layer) -> list[tuple[float, _Layer]]:
        """The nearest other layers of which there are records, the most alike first."""
        found = self._order.get(id(own))
        if found is None:
            others = [layer for layer in self._layers.values() if layer is not own and (layer.seconds or layer.unread)]
            if not others:
                return []
            likeness = _alike(np.array([own.place]), np.array([layer.place for layer in others]))[0]
            order = np.argsort(-likeness, kind="stable")[:NEAREST]
            found = self._order[id(own)] = [(float(likeness[i]), others[i]) for i in order]
        return found

    def _given(self, own: _Layer) -> tuple[list[tuple[_Layer, _Row]], list[float]]:
        """What a prediction for a layer is computed from, and the measured values."""
        given: list[tuple[_Layer, _Row]] = []
        values: list[float] = []
        for layer in (own, *(layer for _, layer in self._neighbours(own))):
            self._read(layer, own)
            limit = math.log(layer.best / layer.bound) + SLOW if layer.best < math.inf else math.inf
            for candidate, seconds in layer.seconds.items():
                row = layer.rows[candidate]
                if row.schedule in own.algorithms:
                    given.append((layer, row))
                    worse = row.mean + FAILED
                    values.append(worse if seconds is None else min(math.log(seconds / layer.bound), limit))
            if len(given) >= NEAREST:
                break
        # The layer's own come first; of so many the newest.
        owned = len(own.seconds)
        start = max(0, owned - NEAREST)
        return given[start : start + NEAREST], values[start : start + NEAREST]


def _kernel(a: Sequence[tuple[_Layer, _Row]], b: Sequence[tuple[_Layer, _Row]]) -> tuple[Array, Array]:
    """Covariances [a, b] of log-seconds: of layers and schedules, and of the effect of picks, which scales."""
    layers = [np.array([id(layer) for layer, _ in rows]) for rows in (a, b)]
    names = [np.array([row.schedule for _, row in rows]) for rows in (a, b)]
    alike = _alike(*(np.array([layer.place for layer, _ in rows]) for rows in (a, b)))
    same_layer, same_schedule = layers[0][:, None] == layers[1], names[0][:, None] == names[1]
    near = np.zeros(same_layer.shape)
    for name in np.intersect1d(names[0], names[1]):
        at = [np.flatnonzero(found == name) for found in names]
        moves = [np.array([rows[int(i)][1].moves for i in there]) for rows, there in zip((a, b), at, strict=True)]
        block = JOINT * np.exp(-np.sqrt(_squares(*moves)) / NEAR)
        for x, y in zip(moves[0].T, moves[1].T, strict=True):
            block += np.exp(-np.abs(x[:, None] - y) / NEAR)
        near[np.ix_(*at)] = block
    levels = same_layer * LAYER**2 + same_schedule * (LEVEL**2 * alike + OWN_LEVEL**2 * same_layer)
    return levels, near * (EFFECT**2 * alike + OWN_EFFECT**2 * same_layer)


def _likeliest(levels: Array, moved: Array, surprise: Array) -> tuple[float, Array]:
    """The scale of the picks' effects and the noise that make what was measured likeliest (their section 5.4.1):
    the scale, and the inverse of the covariance. A few measurements do not tell: without evidence it is the least.
    """
    best: tuple[float, float, Array] = (-math.inf, 1.0, levels)
    for scale in SCALES:
        values, vectors = np.linalg.eigh(levels + scale**2 * moved)
        white = (vectors.T @ surprise) ** 2
        for noise in NOISES:
            spread = np.maximum(values, 0.0) + noise**2
            evidence = -0.5 * float((white / spread + np.log(spread)).sum()) - math.log(scale * noise / NOISE)
            if evidence > best[0]:
                best = evidence, scale, (vectors / spread) @ vectors.T
    return best[1:]


def _doublings(value: int | bool) -> float:
    """Numbers by their size; flags, and 0, by themselves."""
    return float(value) if isinstance(value, bool) or value <= 0 else math.log2(value)


def _waste(extent: int, tile: int) -> float:
    """By how many doublings whole tiles exceed what they cover."""
    return math.log2(math.ceil(extent / tile) * tile / extent) if tile > 1 else 0.0


def _extents(spec: ConvSpec) -> dict[str, int]:
    """What a pick called ``verb_axis`` divides."""
    out = spec.out_spatial
    return {
        "oc": max(1, spec.oc // spec.groups),
        "c": spec.oc,
        "ow": max(1, out[-1]),
        "oh": max(1, math.prod(out[:-1])),
        "px": max(1, spec.out_pixels),
    }


def _place(spec: ConvSpec, threads: int) -> tuple[float, ...]:
    """Where a layer lies among layers: its sizes as logarithms to base 2."""
    out, size = spec.out_spatial, spec.bytes
    sizes = [
        spec.n,
        spec.ic / spec.groups,
        spec.oc / spec.groups,
        spec.groups,
        spec.out_pixels,
        out[-1],
        math.prod(spec.kernel),
        spec.kernel[-1],
        math.prod(spec.stride),
        spec.stride[-1],
        math.prod(spec.dilation),
        spec.flops,
        spec.flops / max(1, sum(size.values())),
        size.get("weights", size["dst"]),
        threads,
    ]
    # What makes another layer of it counts as some doublings.
    kinds = [2 * spec.transposed, 2 * _layouts(spec), 2 * BYTES[spec.dtype], spec.residual, spec.rank]
    return (*(math.log2(max(s, 1e-9)) for s in sizes), *map(float, kinds))


def _layouts(spec: ConvSpec) -> int:
    """A number of the layouts of src and dst: 0 of NCHW, 1 of NHWC, others of other pairs."""
    known = list(BLOCKS)
    src, dst = known.index(spec.layout), known.index(spec.dst_layout)
    return src if src == dst else src + len(known) * (1 + dst)


def _squares(a: Array, b: Array) -> Array:
    """Squared distances of rows."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.asarray(np.maximum(squares, 0.0))


def _alike(a: Array, b: Array) -> Array:
    return np.asarray(np.exp(-_squares(a, b) / (2 * ALIKE**2 * a.shape[1])))
