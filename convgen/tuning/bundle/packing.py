"""Compiling candidates into a bundle, with their inputs and expected outputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...check.drawn import PART, Draws, digests, sampled
from ...errors import BuildError, ExportError, Inapplicable, UnsupportedError
from ...folders import TemporaryFolder, replacing
from ...hardware.machine import Machine
from ...hardware.target import Target
from ...lowering.link import link_shared
from ...lowering.schedule import Candidate
from ...lowering.versions import versions
from ...measure.standalone.bundle import IDENTITY
from ...measure.standalone.results import FORMAT
from ...measure.standalone.timing import DUEL_SECONDS, HOPELESS, SAMPLE_SECONDS, TRIAL_SECONDS
from ...measure.trial import LAYER_FACTOR, WORKER_BYTES, Expected, candidate_module, check_compilers, load_inputs
from ...measure.workers import LocalBuilder
from ...problem.dtypes import load
from ...problem.spec import ConvSpec
from ...records.answer import record_candidate, record_result
from ...records.outcome import Result
from ...records.store import RecordStore
from ..final import ROUNDS
from ..race import Race
from ..ranker import Ranker
from ..search import FINALISTS
from .archive import ENDINGS, MANIFEST, RUNNER, bundle_name, write_archive, write_runner
from .machine import target_on
from .self_check import every_default, feature_layers

#: The C file of the library that compares outputs.
CHECK = "check.c"
#: Bytes of a tensor that a bundle has whole, at most: larger ones are drawn where they are measured.
STORED_BYTES = 1 << 16
#: Elements that a candidate which rounds otherwise is judged by, of a larger output.
SAMPLES = 1 << 14
#: Candidates per layer, target and thread count, the default among them.
CANDIDATES = 16


@dataclass
class Packed:
    """What a bundle holds.

    Attributes:
        layers: how many.
        trials: how many are to be measured.
        known: how many more have a result already and take part in the comparisons.
        failed: how many candidates did not compile; ``errors`` says why.
        bytes: the file's size.
    """

    layers: int = 0
    trials: int = 0
    known: int = 0
    failed: int = 0
    bytes: int = 0
    errors: list[str] = field(default_factory=list)


def pack(
    specs: Sequence[ConvSpec],
    targets: Sequence[Target],
    threads: Sequence[int],
    out: Path,
    *,
    candidates: int = CANDIDATES,
    machine: Machine | None = None,
    store: RecordStore | None = None,
    exclude: Collection[str] = (),
    seed: int = 0,
    self_check: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Packed:
    """Compile candidates and write a bundle of them, whole or not at all.

    Args:
        specs: layers; those with an empty batch are left out.
        targets, threads: each layer is measured for every pair; for CPUs or for GPUs, where threads mean nothing.
        out: a file that ends in ``.tar.gz``, ``.tar.xz``, which is smallest, or ``.zip``.
        candidates: of each layer, target and thread count: the default and the most promising.
        machine: the one that will measure. Candidates are chosen for its caches and cores, and what the store
            has of it is not measured again.
        store: what is known; the promising candidates are chosen by it. None: nothing is known.
        exclude: ids of schedules that do not take part.
        seed: of the choice.
        self_check: begin with small layers that have one feature each, and of them the default of every schedule:
            does the device compute what it should? ``specs`` may be empty then.
        progress: called with a line per layer.

    Raises:
        BuildError: there is no C compiler for a target, or it fails.
        ExportError: the bundle cannot be written, or nothing of it is to be measured, or compiled.
        UnsupportedError: targets are both CPUs' and GPUs', the machine lacks instructions of one, NVIDIA's compiler
            is not installed, or no schedule is left.
    """
    if not out.name.endswith(ENDINGS):
        raise ExportError(f"{out}: expected a name that ends in {' or '.join(ENDINGS)}")
    devices = {target.kind for target in targets}
    if len(devices) > 1:
        found = ", ".join(map(str, targets))
        raise UnsupportedError(f"targets: expected CPUs or GPUs in a bundle, not both, found {found}")
    if any(target.on_device for target in targets):
        threads = [1]
    if machine is not None:
        targets = [target_on(target, machine) for target in targets]
    layers = [*(feature_layers() if self_check else ()), *(("", spec) for spec in specs if spec.n)]
    if not layers:
        raise ExportError(f"{out}: expected a layer to measure, found none")
    try:
        with replacing(out) as part, contextlib.closing(LocalBuilder(os.cpu_count() or 1)) as builder:
            folder = part.parent / bundle_name(out)
            packer = _Packer(folder, builder, store, candidates, exclude, seed, machine is not None)
            packer.begin(targets)
            for number, (feature, spec) in enumerate(layers, 1):
                count = packer.add(spec, targets, threads, feature)
                if progress:
                    progress(f"[{number}/{len(layers)}] {spec.descriptor}: {count} trials")
            packed = packer.finish()
            write_archive(packer.folder, part)
            packed.bytes = part.stat().st_size
    except OSError as error:
        raise ExportError(f"{out}: {error.strerror or error}") from error
    return packed


class _Packer:
    """Fills a bundle's folder."""

    def __init__(
        self,
        folder: Path,
        builder: LocalBuilder,
        store: RecordStore | None,
        candidates: int,
        exclude: Collection[str],
        seed: int,
        is_known_machine: bool,
    ) -> None:
        self.folder, self.builder, self.store, self.candidates = folder, builder, store, candidates
        self.exclude, self.seed, self.is_known_machine = exclude, seed, is_known_machine
        self.layers: list[dict[str, Any]] = []
        self.trials: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []
        self.rankers: dict[tuple[str, int], Ranker] = {}
        self.keys: set[str] = set()
        self.groups = 0
        self.device = ""
        self.packed = Packed()
        for name in ("lib", "data"):
            (folder / name).mkdir(parents=True)

    def begin(self, targets: Sequence[Target]) -> None:
        """The library that compares outputs, for each target."""
        for target in targets:
            check_compilers(target)
            self.device, arch = target.kind, target.architecture
            check = f"lib/check-{arch}.so"
            if not (self.folder / check).exists():
                link_shared([CHECK], self.folder / check, arch, headers=["types.h"])
            self.targets.append({"spelling": target.spelling, "architecture": arch, "check": check})

    def add(self, spec: ConvSpec, targets: Sequence[Target], threads: Sequence[int], feature: str = "") -> int:
        """A layer and its candidates; returns how many trials it takes.

        Args:
            feature: what the layer checks, where it is one of a self-check.
        """
        index, first = len(self.layers), len(self.trials)
        built: dict[tuple[str, Candidate], dict[str, Any]] = {}
        futures: dict[tuple[str, Candidate], Future[Any] | Exception] = {}
        groups = []
        for target in targets:
            for count in threads:
                chosen, default, known = self._choose(spec, target, count, feature)
                groups.append((target, count, chosen, default, known))
                for candidate in chosen:
                    key = (target.spelling, candidate)
                    if key not in futures:
                        futures[key] = self._submit(spec, target, candidate)
        for key, future in futures.items():
            built[key] = self._library(future)
        for target, count, chosen, default, known in groups:
            self._group(index, spec, target, count, chosen, default, known, built)
        if len(self.trials) > first:
            needs_bound = any(not trial["exact"] for trial in self.trials[first:])
            made = {**self._data(spec, index, needs_bound), "feature": feature}
            if self.device == "cuda" and not feature:
                made["convolution"] = by_cudnn(spec)
            self.layers.append(made)
        return sum(not trial["known"] for trial in self.trials[first:])

    def _choose(
        self, spec: ConvSpec, target: Target, threads: int, feature: str
    ) -> tuple[list[Candidate], Candidate, dict[Candidate, float]]:
        """Candidates to compile, the default, and the seconds of those that were measured on that machine."""
        if feature:
            candidates, default = every_default(spec, target)
            return list(candidates), default, {}
        key = (target.spelling, threads)
        if key not in self.rankers:
            self.rankers[key] = Ranker.from_store(self.store, target, threads)
        race = Race(spec, target, threads, self.seed, ranker=self.rankers[key], exclude=self.exclude)
        known: dict[Candidate, float] = {}
        if self.store is not None and self.is_known_machine:
            for record in self.store.trials(
                spec=spec.descriptor, target=target.spelling, hardware=target.hardware, threads=threads
            ):
                candidate = record_candidate(record, spec, target) if record.versions == versions() else None
                if candidate is not None and candidate not in race.seen:
                    race.tell(candidate, record_result(record))
                    known[candidate] = record.seconds or 0.0
        chosen = race.ask(self.candidates)
        if chosen and known.get(race.default):
            chosen.insert(0, race.default)  # for the comparison at the end
        return chosen, race.default, known

    def _submit(self, spec: ConvSpec, target: Target, candidate: Candidate) -> Future[Any] | Exception:
        try:
            future: Future[Any] = self.builder.submit(candidate_module(spec, target, candidate))
            return future
        except (BuildError, Inapplicable) as error:
            return error

    def _library(self, future: Future[Any] | Exception) -> dict[str, Any]:
        """What a trial says of its library: the file, or how making it failed; empty where the candidate is none."""
        made: Any = future if isinstance(future, Exception) else future.result()
        nothing = {"library": None, "library_sha256": None, "name": "", "exact": True}
        if isinstance(made, Inapplicable):
            return {}
        if isinstance(made, Exception):
            made = Result("build_error", error=str(made)[-2000:])
        if isinstance(made, Result):
            self.packed.failed += 1
            self.packed.errors.append(made.error)
            return {**nothing, "failed": {"outcome": made.outcome, "error": made.error}}
        source = Path(made)
        meta = json.loads((source.parent / "candidate.json").read_text())
        data = source.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        library = f"lib/{sha256[:32]}.so"
        (self.folder / library).write_bytes(data)
        shutil.rmtree(source.parent)
        return {
            "library": library,
            "library_sha256": sha256,
            "name": meta["name"],
            "exact": meta["exact"],
            "failed": None,
        }

    def _group(
        self,
        layer: int,
        spec: ConvSpec,
        target: Target,
        threads: int,
        chosen: list[Candidate],
        default: Candidate,
        known: dict[Candidate, float],
        built: dict[tuple[str, Candidate], dict[str, Any]],
    ) -> None:
        """The trials that race with each other."""
        for candidate in chosen:
            library = built[(target.spelling, candidate)]
            if not library:
                continue
            identity = {
                "spec": spec.descriptor,
                "target": target.spelling,
                "threads": threads,
                "schedule": candidate.schedule.id,
                "schedule_version": candidate.schedule.version,
                "picks": dict(candidate.picks),
                "versions": versions(),
            }
            key = trial_id(identity)
            if key in self.keys:  # a layer that was given is one of the self-check too
                continue
            self.keys.add(key)
            trial = {
                "key": key,
                **identity,
                **library,
                "layer": layer,
                "group": self.groups,
                "default": candidate == default,
                "known": known.get(candidate),
            }
            self.trials.append(trial)
        self.groups += 1

    def _data(self, spec: ConvSpec, index: int, needs_bound: bool) -> dict[str, Any]:
        """What a layer is given and what it should compute: the bytes of small tensors in files; of a large one how it
        is drawn, and of a large output digests and, for candidates that round otherwise, samples.
        """
        (self.folder / "data" / str(index)).mkdir()
        entry: dict[str, Any] = {"spec": spec.descriptor, "dtype": spec.dtype, "shape": list(spec.dst_shape)}
        data: dict[str, Any] = {}
        with TemporaryFolder(self.folder.parent) as temporary:
            draws = Draws()
            entry["memory"] = WORKER_BYTES + LAYER_FACTOR * Expected(spec, temporary, os.cpu_count() or 1, draws).bytes
            for name, array in load_inputs(spec, str(temporary)).items():
                recipe = draws.recipe(array) if array.nbytes > STORED_BYTES else None
                if recipe is None:
                    data[name] = self._file(index, name, array)
                else:
                    data[name] = {"dtype": spec.dtypes[name], "count": array.size, **recipe}
            expected = load(temporary / "expected.npy", spec.dtype)
            bound = np.broadcast_to(np.load(temporary / "bound.npy"), expected.shape)
        if expected.nbytes > STORED_BYTES:
            entry |= {"part": PART, "digests": [f"{digest:016x}" for digest in digests(expected)]}
            entry |= {"samples": SAMPLES} if needs_bound else {}
            expected, bound = sampled(expected, 0, SAMPLES), sampled(bound, 0, SAMPLES)
        if needs_bound or "digests" not in entry:
            data["expected"] = self._file(index, "expected", expected)
        if needs_bound:
            data["bound"] = self._file(index, "bound", bound)
        return {**entry, "data": data}

    def _file(self, index: int, name: str, array: Any) -> str:
        """Write a tensor's bytes; returns the file's name in the bundle."""
        file = f"data/{index}/{name}.bin"
        bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
        (self.folder / file).write_bytes(bits.astype(bits.dtype.newbyteorder("<"), copy=False).tobytes())
        return file

    def finish(self) -> Packed:
        """The runner and the manifest.

        Raises:
            ExportError: there is no trial, or none of them compiled.
        """
        to_measure = [trial for trial in self.trials if not trial["known"]]
        if not to_measure:
            raise ExportError("expected trials to measure, found none: the store has them all")
        if all(trial["failed"] for trial in to_measure):
            reason = self.packed.errors[0].partition("\n")[0]
            raise ExportError(f"expected trials that compile, found none of {len(to_measure)}: {reason}")
        write_runner(self.folder / RUNNER)
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            "device": self.device,
            "versions": versions(),
            "targets": self.targets,
            "layers": self.layers,
            "trials": self.trials,
            "timing": {
                "trial_seconds": TRIAL_SECONDS,
                "sample_seconds": SAMPLE_SECONDS,
                "hopeless": HOPELESS,
                "finalists": FINALISTS,
                "rounds": ROUNDS,
                "duel_seconds": DUEL_SECONDS,
            },
            "files": {
                path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in files
            },
        }
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        self.packed.layers, self.packed.trials = len(self.layers), len(to_measure)
        self.packed.known = len(self.trials) - len(to_measure)
        return self.packed


def by_cudnn(spec: ConvSpec) -> dict[str, Any] | None:
    """A layer as :mod:`convgen.measure.standalone.cudnn` computes it; None where PyTorch has no such layer."""
    even = all(begin == end for begin, end in spec.padding)
    if spec.is_quantised or not even or spec.activation not in ("none", "relu") or spec.mirrored:
        return None
    layer = spec.with_(direction="forward", layout="nchw", dst_layout="nchw")
    residual = {"residual": layer.shapes["dst"]} if spec.residual else {}
    return {
        "dtype": spec.dtype,
        "tf32": spec.accuracy in ("tf32", "bf16"),
        "direction": spec.direction,
        "kernel": list(spec.kernel),
        "stride": list(spec.stride),
        "padding": [begin for begin, _ in spec.padding],
        "dilation": list(spec.dilation),
        "output_padding": list(spec.output_padding),
        "groups": spec.groups,
        "transposed": spec.transposed,
        "bias": spec.bias,
        "residual": spec.residual,
        "relu": spec.activation == "relu",
        "shapes": {name: list(shape) for name, shape in {**layer.shapes, **residual}.items()},
    }


def trial_id(identity: Mapping[str, Any]) -> str:
    """SHA-256 of the fields that make two trials the same, but for the machine."""
    values = {name: identity[name] for name in IDENTITY}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
