"""Tuning jobs as they are written down: the layers of models, for targets and thread counts, within a budget.

A :class:`Job` says what is tuned and how; it is a TOML file or a command line::

    models = ["resnet50.onnx", "layers.toml", "conv2d n1 ic64 oc64 i56x56 k3x3 p1 relu"]
    threads = [1, 2]
    seconds = 1800

:mod:`convgen.tuning.job_run` works on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import SpecError, meant, meant_by
from ..formats.entries import AccuracyRule, SpecEntry, apart_with_accuracy, merge
from ..formats.onnx.reader import instances_from_onnx
from ..formats.sources import is_model, is_path, read_bytes, read_specs, sizes_for
from ..hardware.discover import target_families
from ..hardware.target import Target, check_threads
from ..hardware.target import resolve as resolve_here
from ..lowering.discover import schedule_ids
from ..problem.spec import ConvSpec


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
        trials_per_layer: trials of a layer in all, whoever made them; None: no limit.
        patience: trials of a layer without a gain after which it is done; None: the usual number.
        exclude: ids of schedules that do not take part.
        seed: of the search.
        dims: sizes of symbolic dimensions of ONNX models.
        planned: layers of models that are known already, in the order in which they run, by what ``models`` has.
        accuracy: of all layers or of some, by name; the last rule that names a layer counts.
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
    trials_per_layer: int | None = None
    patience: int | None = None
    exclude: tuple[str, ...] = ()
    seed: int = 0
    dims: Mapping[str, int] = field(default_factory=dict)
    planned: Mapping[str, tuple[SpecEntry, ...]] = field(default_factory=dict)
    accuracy: tuple[AccuracyRule, ...] = ()
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
        """Each model's layers, in the order in which they run where it has one; and why some are left out."""
        layers: list[list[SpecEntry]] = []
        skipped: list[str] = []
        unplanned = [model for model in self.models if model not in self.planned]
        sizes = dict(zip(unplanned, sizes_for(unplanned, self.dims, self.folder), strict=True)) if unplanned else {}
        for model in self.models:
            path = self.folder / model
            if model in self.planned:
                layers.append(list(self.planned[model]))
            elif not is_path(model, self.folder):
                layers.append(read_specs(model))
            else:
                read = instances_from_onnx if is_model(model, self.folder) else read_specs
                # Where nothing could be read the second one raises: it says what is wrong.
                layers.append(read(path, sizes[model], skipped) or read(path, sizes[model]))
        chosen = apart_with_accuracy(layers, self.accuracy)
        return tuple(zip(self.models, map(tuple, chosen), strict=True)), tuple(skipped)

    @property
    def layers(self) -> tuple[tuple[str, tuple[SpecEntry, ...]], ...]:
        """Each model and its layers, identical ones merged.

        Raises:
            SpecError, UnsupportedError: a model cannot be read.
        """
        return tuple((model, tuple(merge(entries))) for model, entries in self._read[0])

    @property
    def networks(self) -> dict[str, tuple[ConvSpec, ...]]:
        """The models of which it is known in what order their layers run: their instances in that order.

        Raises:
            SpecError, UnsupportedError: a model cannot be read.
        """
        ordered = [(model, entries) for model, entries in self._read[0] if self._has_order(model)]
        return {model: tuple(entry.spec for entry in entries) for model, entries in ordered}

    def _has_order(self, model: str) -> bool:
        """Whether a source says in what order its layers run: others are lists of layers."""
        return model in self.planned or is_model(model, self.folder)

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
            Problem(spec, target, check_threads(threads, target), tuple(spec_uses))
            for target in targets
            for threads in self.threads or (None,)
            for spec, spec_uses in uses.items()
        ]

    def to_toml(self) -> str:
        """The job as a file's text; relative paths stay relative to :attr:`folder`."""
        values: dict[str, Any] = {"models": list(self.models)}
        values |= {"target": self.targets[0]} if len(self.targets) == 1 else {"targets": list(self.targets)}
        values["threads"] = list(self.threads) if len(self.threads) != 1 else self.threads[0]
        for name in ("seconds", "trials", "trials_per_layer", "patience", "seed", "tracker", "device_key", "cluster"):
            values[name] = getattr(self, name)
        values["exclude"] = list(self.exclude)
        values["accuracy"] = [str(rule) for rule in self.accuracy]
        values["records"] = None if self.records is None else str(self.records)
        lines = [f"{key} = {json.dumps(v, ensure_ascii=False)}" for key, v in values.items() if v not in (None, [])]
        if self.dims:
            sizes = ", ".join(f"{json.dumps(name)} = {size}" for name, size in self.dims.items())
            lines.append(f"dims = {{ {sizes} }}")
        return "\n".join(lines) + "\n"


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
    "accuracy": (lambda v: _is_text(v) or v == [] or _texts(v), "CLASS or NAME=CLASS, or a list of such rules"),
    "records": (_is_text, "the path of a record store"),
    "tracker": (lambda v: _is_text(v) and ":" in v, "host:port"),
    "device_key": (_is_text, "the key of devices"),
    "cluster": (_is_text, "the address of a scheduler"),
}


#: What a file of layers has, and people call models.
_OTHERS = ("layers", "layer", "specs", "spec")


def _checked(values: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """A job file's values as a job's arguments."""
    for key, value in values.items():
        if key not in _KEYS:
            hint = meant_by(["models"]) if key in _OTHERS else meant(key, _KEYS)
            raise SpecError(key, f"one of {', '.join(_KEYS)}", f"an unknown key{hint}", where)
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
        if is_path(model, folder) and not (folder / model).is_file():
            raise SpecError(f"models[{number}]", "an existing file or a descriptor", repr(model), where)
    targets = given.pop("targets", None) or [given.pop("target", "cpu")]
    for number, target in enumerate(targets):
        if target.partition(":")[0] not in target_families():
            known = ", ".join(target_families())
            raise SpecError(f"targets[{number}]", f"one of {known}, or with a processor", repr(target), where)
    threads = given.pop("threads", [])
    rules = given.pop("accuracy", [])
    try:
        rules = tuple(AccuracyRule.parse(text) for text in ([rules] if isinstance(rules, str) else rules))
    except SpecError as error:
        raise SpecError("accuracy", error.expected, error.found, where) from None
    for name in given.get("exclude", []):
        if name not in schedule_ids():
            raise SpecError(
                "exclude", f"some of {', '.join(schedule_ids())}", f"{name!r}{meant(str(name), schedule_ids())}", where
            )
    if "records" in given:
        given["records"] = folder / os.path.expanduser(given["records"])
    return given | {
        "models": tuple(given["models"]),
        "targets": tuple(dict.fromkeys(targets)),
        "threads": tuple(dict.fromkeys([threads] if isinstance(threads, int) else threads)),
        "exclude": tuple(dict.fromkeys(given.get("exclude", []))),
        "accuracy": rules,
    }
