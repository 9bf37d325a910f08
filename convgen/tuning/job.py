"""Tuning jobs: the layers of models, for targets and thread counts, within a budget.

A :class:`Job` says what is tuned and how; it is a TOML file or a command line::

    models = ["resnet50.onnx", "layers.toml", "conv2d n1 ic64 oc64 i56x56 k3x3 p1 relu"]
    threads = [1, 2]
    seconds = 1800

A :class:`JobRun` works on it. The records are its only state: it goes on from whatever is in the store,
whoever measured it. Time goes where it pays: each round of candidates to the layer that is expected to
save most of its models' time per second spent on it (the idea of a gradient-based task scheduler:
Zheng et al., *Ansor*, OSDI 2020, section 6).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BuildError, ConvgenError, MeasureError, SpecError
from ..formats.entries import SpecEntry
from ..formats.sources import LINES, SUFFIXES, read_bytes, read_specs
from ..hardware.discover import target_families
from ..hardware.machine import check_memory
from ..hardware.target import resolve as resolve_here
from ..interrupts import interrupts_held
from ..kernel.kernel import check_threads  # after the layers: what is wrong with one is said at once
from ..lowering.discover import schedule_ids
from ..problem.spec import ConvSpec
from .journal import Journal
from .search import round_size, take_rounds
from .tuner import Tuner

if TYPE_CHECKING:
    from ..hardware.target import Target
    from ..measure.workers import Pools
    from ..records.record import TuningRecord
    from ..records.store import RecordStore
    from .journal import Journal
    from .search import Progress, Search
    from .tuner import Tuner

#: Seconds that a final comparison takes, before one was made: on one thread, and on several.
FINAL_GUESS = (2.5, 5.0)
#: Share of the budget that is kept for final comparisons at most, and that first trials take at most.
RESERVE, FIRST = 1 / 3, 1 / 2
#: Trials that the job's mean cost of one counts as, when a layer's own is estimated.
TRUST = 4


@dataclass(frozen=True)
class Use:
    """Where a layer occurs: in a model, so many times, under these names."""

    model: str
    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """A layer for a target and a number of threads, and where it occurs."""

    spec: ConvSpec
    target: Target
    threads: int
    uses: tuple[Use, ...]

    @property
    def count(self) -> int:
        """How often the layer occurs in all models."""
        return sum(use.count for use in self.uses)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for use in self.uses for name in use.names)

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(use.model for use in self.uses))


# ---- what is tuned, and how -----------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is tuned, and within what budget.

    Args:
        models: what :func:`convgen.formats.sources.read_specs` takes: ONNX models, files of layers, descriptors.
        targets: as :func:`convgen.hardware.target.resolve` takes them.
        threads: of the kernels; none: all cores of the target.
        seconds, trials: budget in all, over all runs of the job; None: no limit.
        trials_per_layer: trials of a layer in all, whoever made them; 0: no limit.
        patience: trials of a layer without a gain after which it is done; None: the usual number.
        exclude: ids of schedules that do not take part.
        seed: of the search.
        dims: sizes of symbolic dimensions of ONNX models.
        records: the store; None: the default one.
        tracker, device_key: measure on the devices of this key that this RPC tracker (``host:port``) has.
        cluster: compile on this Dask cluster (its scheduler's address).
        folder: what relative paths are relative to.
        where: the file it was read from; empty otherwise.
    """

    models: tuple[str, ...]
    targets: tuple[str, ...] = ("cpu",)
    threads: tuple[int, ...] = ()
    seconds: float | None = None
    trials: int | None = None
    trials_per_layer: int = 0
    patience: int | None = None
    exclude: tuple[str, ...] = ()
    seed: int = 0
    dims: Mapping[str, int] = field(default_factory=dict)
    records: Path | None = None
    tracker: str | None = None
    device_key: str | None = None
    cluster: str | None = None
    folder: Path = Path()
    where: str = ""

    @classmethod
    def from_file(cls, path: str | Path) -> Job:
        """The job that a TOML file describes; relative paths in it are relative to the file.

        Raises:
            SpecError: the file cannot be read, or a key is missing, unknown or wrong; names the file,
                the key, what was expected and what was found.
        """
        path = Path(path)
        try:
            values = tomllib.loads(read_bytes(path).decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise SpecError("file", "UTF-8 text", "other bytes", str(path)) from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise SpecError("file", "TOML", error, str(path)) from None
        return cls(**_checked(values, path.parent, str(path)), folder=path.parent, where=str(path))

    @property
    def id(self) -> str:
        """A hash of what is tuned and how, but not of the budget: who raises it goes on with the job."""
        layers = sorted({entry.spec.descriptor for _, entries in self.layers for entry in entries})
        said = [layers, sorted(self.targets), sorted(self.threads), sorted(self.exclude), self.seed]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    @cached_property
    def _read(self) -> tuple[tuple[tuple[str, tuple[SpecEntry, ...]], ...], tuple[str, ...]]:
        found: list[tuple[str, tuple[SpecEntry, ...]]] = []
        skipped: list[str] = []
        for model in self.models:
            path = self.folder / model
            dims = self.dims if path.suffix.lower() == ".onnx" else None
            if _is_file(model, self.folder):
                entries = read_specs(str(path), dims or None, skipped)
            else:
                entries = read_specs(model)
            found.append((model, tuple(entries)))
        return tuple(found), tuple(skipped)

    @property
    def layers(self) -> tuple[tuple[str, tuple[SpecEntry, ...]], ...]:
        """Each model and its layers.

        Raises:
            SpecError, UnsupportedError: a model cannot be read.
        """
        return self._read[0]

    @property
    def skipped(self) -> tuple[str, ...]:
        """Why layers of the models are left out."""
        return self._read[1]

    def problems(self, resolve: Callable[[str], Target] | None = None) -> list[Problem]:
        """The distinct layers, each for every target and number of threads.

        Args:
            resolve: gives a target's facts; :func:`convgen.hardware.target.resolve` by default.

        Raises:
            SpecError, UnsupportedError: a model cannot be read, or there is no such target.
        """
        uses: dict[ConvSpec, list[Use]] = {}
        for model, entries in self.layers:
            for entry in entries:
                uses.setdefault(entry.spec, []).append(Use(model, entry.count, entry.names))
        targets = [(resolve or resolve_here)(spelling) for spelling in self.targets]
        return [
            Problem(spec, target, check_threads(threads, target), tuple(found))
            for target in targets
            for threads in self.threads or (None,)
            for spec, found in uses.items()
        ]

    def to_toml(self) -> str:
        """The job as a file's text; relative paths stay relative to :attr:`folder`."""
        values: dict[str, Any] = {"models": list(self.models)}
        values |= {"target": self.targets[0]} if len(self.targets) == 1 else {"targets": list(self.targets)}
        values["threads"] = list(self.threads) if len(self.threads) != 1 else self.threads[0]
        for name in ("seconds", "trials", "trials_per_layer", "patience", "seed", "tracker", "device_key", "cluster"):
            values[name] = getattr(self, name)
        values["exclude"] = list(self.exclude)
        values["records"] = None if self.records is None else str(self.records)
        lines = [f"{key} = {json.dumps(v, ensure_ascii=False)}" for key, v in values.items() if v not in (None, [])]
        if self.dims:
            sizes = ", ".join(f"{json.dumps(name)} = {size}" for name, size in self.dims.items())
            lines.append(f"dims = {{ {sizes} }}")
        return "\n".join(lines) + "\n"


def _is_file(model: str, folder: Path) -> bool:
    """Whether a source is a file's name, not a layer in words."""
    if (folder / model).exists():
        return True
    return not (model.strip() and any(form.recognise(model) for form in LINES.values()))


def _is_integer(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(_is_text(item) for item in value) and bool(value)


#: Keys of a job file: whether a value is right, and what was expected otherwise.
_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "models": (_texts, "a list of files or descriptors"),
    "target": (_is_text, "a target, such as cpu"),
    "targets": (_texts, "a list of targets"),
    "threads": (
        lambda v: (isinstance(v, list) and all(_is_integer(n, 1) for n in v)) or _is_integer(v, 1),
        "a number of threads, or a list of them",
    ),
    "seconds": (
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < math.inf,
        "a number >= 0",
    ),
    "trials": (lambda v: _is_integer(v, 0), "an integer >= 0"),
    "trials_per_layer": (lambda v: _is_integer(v, 0), "an integer >= 0"),
    "patience": (lambda v: _is_integer(v, 1), "an integer >= 1"),
    "exclude": (lambda v: v == [] or _texts(v), "a list of schedule ids"),
    "seed": (lambda v: _is_integer(v, 0), "an integer >= 0"),
    "dims": (
        lambda v: isinstance(v, dict) and all(_is_integer(n, 1) for n in v.values()),
        "a table of sizes, such as { N = 1 }",
    ),
    "records": (_is_text, "the path of a record store"),
    "tracker": (lambda v: _is_text(v) and ":" in v, "host:port"),
    "device_key": (_is_text, "the key of devices"),
    "cluster": (_is_text, "the address of a scheduler"),
}


def _checked(values: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """A job file's values as a job's arguments."""
    for key, value in values.items():
        if key not in _KEYS:
            raise SpecError(key, f"one of {', '.join(_KEYS)}", "an unknown key", where)
        is_right, expected = _KEYS[key]
        if not is_right(value):
            raise SpecError(key, expected, json.dumps(value, default=str), where)
    if "models" not in values:
        raise SpecError("models", _KEYS["models"][1], "no such key", where)
    if "target" in values and "targets" in values:
        raise SpecError("targets", "one of target and targets", "both", where)
    if ("tracker" in values) != ("device_key" in values):
        key = "device_key" if "tracker" in values else "tracker"
        raise SpecError(key, f"{_KEYS[key][1]}, beside its companion", "no such key", where)
    given = dict(values)
    for number, model in enumerate(given["models"]):
        if _is_file(model, folder) and not (folder / model).is_file():
            raise SpecError(f"models[{number}]", "an existing file or a descriptor", repr(model), where)
    targets = given.pop("targets", None) or [given.pop("target", "cpu")]
    for number, target in enumerate(targets):
        if target.partition(":")[0] not in target_families():
            known = ", ".join(target_families())
            raise SpecError(f"targets[{number}]", f"one of {known}, or with a processor", repr(target), where)
    threads = given.pop("threads", [])
    for name in given.get("exclude", []):
        if name not in schedule_ids():
            raise SpecError("exclude", f"some of {', '.join(schedule_ids())}", repr(name), where)
    if "records" in given:
        given["records"] = folder / os.path.expanduser(given["records"])
    return given | {
        "models": tuple(given["models"]),
        "targets": tuple(dict.fromkeys(targets)),
        "threads": tuple(dict.fromkeys([threads] if isinstance(threads, int) else threads)),
        "exclude": tuple(dict.fromkeys(given.get("exclude", []))),
    }


def split_sources(words: Sequence[str]) -> tuple[str, ...]:
    """A command line's words as sources: a descriptor may come in several words.

    >>> split_sources(["a.onnx", "conv1d", "n1", "ic4", "oc4", "i20", "k3", "b.toml"])
    ('a.onnx', 'conv1d n1 ic4 oc4 i20 k3', 'b.toml')
    """
    groups: list[list[str]] = []
    for word in words:
        alone = len(word.split()) != 1 or Path(word).suffix.lower() in (*SUFFIXES, ".onnx", ".log")
        alone = alone or os.path.exists(word)
        begins = not groups or alone or LINES["descriptors"].recognise(word) or _is_whole(groups[-1])
        if begins:
            groups.append([word])
        else:
            groups[-1].append(word)
    return tuple(" ".join(group) for group in groups)


def _is_whole(group: Sequence[str]) -> bool:
    """Whether a source takes no more words: a file, or a line in one word."""
    (first, *rest) = group
    if rest:
        return False
    return len(first.split()) != 1 or not any(form.recognise(f"{first} ") for form in LINES.values())


# ---- the work -------------------------------------------------------------------------------------


@dataclass
class Layer:
    """A problem of a running job.

    Attributes:
        state: ``waiting``, ``searching``, ``comparing``, ``done``, ``skipped`` (nothing to do) or ``failed``.
        reason: why it was skipped, or failed.
        predicted: seconds of its default, before anything was measured.
    """

    problem: Problem
    search: Search | None = None
    state: str = "waiting"
    reason: str = ""
    predicted: float = 0.0

    @property
    def progress(self) -> Progress | None:
        return self.search.state if self.search else None

    @property
    def best(self) -> TuningRecord | None:
        """The winner of the final comparison; before there is one, the fastest trial."""
        return (self.search.winner or self.search.best) if self.search else None

    @property
    def share(self) -> float:
        """Seconds that the layer takes of its models' time."""
        best = self.search.race.best if self.search else math.inf
        return self.problem.count * (best if best < math.inf else self.predicted)

    @property
    def is_open(self) -> bool:
        """Whether there may be something to search."""
        return self.search is not None and self.state in ("waiting", "searching") and not self.search.over

    @property
    def is_improved(self) -> bool:
        """Whether a tuned candidate seems to beat the default."""
        state = self.progress
        return bool(state and state.best and (state.default is None or state.best < 0.99 * state.default))


class JobRun:
    """A job at work; between two runs of it only the records remain.

    Args:
        job: what to do.
        store: where records go; None: they are kept for this run only.
        pools: who compiles and measures; None: nothing can be measured, only asked how the job stands.
        report: called after every trial and whenever a layer's state changes.
        resolve: gives a target's facts.
        now: the clock, in seconds.

    Attributes:
        layers: every problem of the job.

    Raises:
        SpecError, UnsupportedError: a model cannot be read, or a target is unknown or does not run here.
        RecordError: the store cannot be read.
    """

    def __init__(
        self,
        job: Job,
        store: RecordStore | None,
        pools: Pools | None = None,
        *,
        report: Callable[[JobRun, Layer], None] | None = None,
        resolve: Callable[[str], Target] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job, self.store, self.pools = job, store, pools
        self.journal: Journal = Journal(store, job.id, now=now)
        self._report, self._now = report or (lambda run, layer: None), now
        self.layers = [Layer(problem) for problem in job.problems(resolve)]
        self._tuners: dict[tuple[str, int], Tuner] = {}
        self._finals: list[float] = []  # what final comparisons took
        self._running = False
        for layer in self.layers:
            target, threads = layer.problem.target, layer.problem.threads
            key = (target.spelling, threads)
            if key not in self._tuners:
                self._tuners[key] = Tuner(target, threads, self.journal, pools=pools)
            self._open(layer, self._tuners[key])

    def _open(self, layer: Layer, tuner: Tuner) -> None:
        """Find out where a layer stands."""
        spec = layer.problem.spec
        if not spec.n:
            layer.state, layer.reason = "skipped", "an empty batch: nothing to tune"
            return
        try:
            check_memory(spec)
            layer.search = search = tuner.search(
                spec,
                trials=self.job.trials_per_layer,
                patience=self.job.patience,
                seed=self.job.seed,
                exclude=self.job.exclude,
                progress=lambda _: self._report(self, layer),
            )
        except ConvgenError as error:
            layer.state, layer.reason = "failed", str(error)
            return
        default = search.race.default
        predicted = default.schedule.cost(spec.core, tuner.target)
        layer.predicted = predicted if predicted < math.inf else 10 * spec.flops / tuner.target.peak_flops
        if self._is_answered(search):
            layer.state, layer.reason = "skipped", "the store has the answer"
        elif search.over and search.answered:
            layer.state = "done"
        elif search.started:
            layer.state = "searching"

    def _is_answered(self, search: Search) -> bool:
        """Whether the store has what this job would find out: another job's answer, or an imported one."""
        if search.winner is None:
            return False
        asked = self.job.trials_per_layer
        if asked:
            return search.state.done >= asked
        note = search.winner.note or {}
        if "recheck" in note:  # it beat the default, and nothing else was tried
            return False
        by = note.get("job")
        return by != self.journal.job if by else search.state.done <= len(search.compared)

    # ---- where it stands ----------------------------------------------------------------------

    @property
    def _searches(self) -> list[Search]:
        return [layer.search for layer in self.layers if layer.search]

    @property
    def spent(self) -> float:
        """Seconds spent on the job, in all its runs."""
        kept = sum(search.job_cost for search in self._searches)
        return kept + (self.journal.uncharged if self._running else 0.0)

    @property
    def trials(self) -> int:
        """Trials made for the job, in all its runs."""
        return sum(search.job_trials for search in self._searches)

    @property
    def measured(self) -> int:
        """Trials made in this run."""
        return sum(search.made for search in self._searches)

    @property
    def left(self) -> float | None:
        """Seconds left of the budget; None: there is no limit."""
        return None if self.job.seconds is None else max(0.0, self.job.seconds - self.spent)

    # ---- running ------------------------------------------------------------------------------

    def run(self) -> None:
        """Spend the budget, and compare what was found.

        Raises:
            KeyboardInterrupt: what was measured until then is in the store.
            MeasureError: nothing can be measured any more.
            RecordError: the store cannot be read or written.
        """
        if self.pools is None:
            raise MeasureError("job: expected workers to run it with, found none")
        with interrupts_held() as interrupts:
            self.pools.interrupts = interrupts
            self.journal.charge()
            self._running = True

            def stop() -> bool:
                return interrupts.came or self._is_spent()

            while not interrupts.came:
                take_rounds(self.pools, self._choose, stop)
                if interrupts.came:
                    break
                finished = [layer for layer in self.layers if self._is_finished(layer)]
                for layer in finished:
                    self._compare(layer)
                    if interrupts.came:
                        break
                if not finished:  # the time is over, or nothing is left to try
                    break
            self._last_comparisons(lambda: interrupts.came)
            self._running = False

    def close(self) -> None:
        """Give claims and files back; the workers are the caller's."""
        for search in self._searches:
            search.close()
        for tuner in self._tuners.values():
            tuner.close()
        self.journal.close()

    def _is_spent(self) -> bool:
        """Whether it is time to compare: the budget is spent, but for what that takes."""
        job = self.job
        if job.trials is not None and self.trials >= job.trials:
            return True
        return job.seconds is not None and self.spent >= job.seconds - self._reserve()

    def _reserve(self) -> float:
        """Seconds to keep for the final comparisons."""
        reserve = sum(self._final_seconds(layer) for layer in self.layers if self._awaits_comparison(layer))
        return min(reserve, RESERVE * (self.job.seconds or 0.0))

    def _final_seconds(self, layer: Layer) -> float:
        if self._finals:
            return sum(self._finals) / len(self._finals)
        return FINAL_GUESS[layer.problem.threads > 1]

    def _awaits_comparison(self, layer: Layer) -> bool:
        search = layer.search
        return search is not None and layer.state == "searching" and search.best is not None and not search.answered

    def _is_finished(self, layer: Layer) -> bool:
        """Whether the search of a layer is over, and the comparison is due."""
        return layer.search is not None and layer.state == "searching" and bool(layer.search.over)

    def _choose(self) -> tuple[Search, int] | None:
        """The search that a round is to be spent on; None where comparisons are due, or there is none."""
        pools, job = self.pools, self.job
        if pools is None or any(self._is_finished(layer) for layer in self.layers):
            return None
        claimed = sum(search.in_flight for search in self._searches)
        left = math.inf if job.trials is None else job.trials - self.trials - claimed
        candidates = [layer for layer in self.layers if layer.is_open]
        candidates = [layer for layer in candidates if layer.search and not layer.search.blocked] or candidates
        if left <= 0 or not candidates:
            return None
        fresh = [layer for layer in candidates if layer.search and not layer.search.started]
        if fresh and (job.seconds is None or self.spent < FIRST * job.seconds or len(fresh) == len(candidates)):
            layer, count = max(fresh, key=lambda layer: layer.share), max(pools.builder.workers, 1)
        else:
            mean = sum(s.job_cost for s in self._searches) / self.trials if self.trials else 1.0
            layer, count = max(candidates, key=lambda layer: _value(layer, mean)), round_size(pools)
        if layer.state != "searching":
            layer.state = "searching"
            self._report(self, layer)
        return _search(layer), int(min(count, left))

    def _last_comparisons(self, came: Callable[[], bool]) -> None:
        """Compare what was searched: first what has most to gain; what seems no better while there is time."""
        seconds = self.job.seconds
        waiting = [layer for layer in self.layers if layer.state == "searching"]
        for layer in sorted(waiting, key=lambda layer: (layer.is_improved, layer.share), reverse=True):
            if came():
                return
            if (
                layer.is_improved
                or seconds is None
                or self.spent <= seconds
                or not any(s.winner for s in self._searches)
            ):
                self._compare(layer)

    def _compare(self, layer: Layer) -> None:
        """The final comparison of a layer."""
        search = _search(layer)
        layer.state = "comparing"
        start = self._now()
        try:
            answered = search.answered
            winner = search.final()
            if not answered and winner is not None:
                self._finals.append(self._now() - start)
        except BuildError as error:
            winner, layer.reason = None, str(error)
        if self.pools and self.pools.interrupts.came:
            layer.state = "searching"
            return
        layer.state = "done" if winner else "failed"
        if winner is None:
            layer.reason = layer.reason or "no candidate finished within the budget with the right result"
        search.close()
        self._report(self, layer)


def _value(layer: Layer, mean: float) -> float:
    """Seconds of the models' time that a second spent on a layer is expected to save.

    ``mean``: seconds that a trial of the job takes.
    """
    search = _search(layer)
    cost = (search.job_cost + TRUST * mean) / (search.job_trials + TRUST)
    return search.gain * layer.share / max(cost, 1e-9)


def _search(layer: Layer) -> Search:
    """The search of a layer that has one."""
    if layer.search is None:
        raise MeasureError(f"{layer.problem.spec.descriptor}: {layer.reason}")
    return layer.search
