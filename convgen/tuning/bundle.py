"""Measuring where there is no compiler and no network: candidates go there as a bundle, results come back as a file.

:func:`pack` compiles candidates and writes them with their inputs, the expected outputs and a runner that
needs Python's standard library only (``runtime/measure_bundle.py``). :func:`read_results` makes of what
the runner wrote the records that measuring live would have made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BuildError, ExportError, Inapplicable, MeasureError, RecordError, SpecError, UnsupportedError
from ..hardware.machine import ISA, MODEL_FIELDS, Device, Machine, parse_cpuinfo
from ..hardware.target import resolve
from ..lowering.link import NATIVE, link_shared
from ..lowering.versions import versions
from ..measure.timing import DUEL_SECONDS, HOPELESS, SAMPLE_SECONDS, TRIAL_SECONDS
from ..measure.trial import LAYER_FACTOR, WORKER_BYTES, Expected, candidate_module
from ..measure.workers import LocalBuilder
from ..problem.spec import ConvSpec
from ..records.answer import record_candidate
from ..records.outcome import Result
from ..records.store import OUTCOMES, RecordStore, TuningRecord, load_json
from ..runtime.measure_bundle import FORMAT, IDENTITY, digest
from .final import ROUNDS, judge
from .race import Race
from .ranker import Ranker
from .search import FINALISTS

if TYPE_CHECKING:
    from ..hardware.target import Target
    from ..lowering.schedule import Candidate
    from .ranker import Ranker

RUNNER, MANIFEST, CHECK = "run.py", "manifest.json", "check.c"
#: Endings of a bundle's file name.
ENDINGS = (".tar.gz", ".tgz", ".zip")
#: Candidates per layer, target and thread count, the default among them.
CANDIDATES = 16
_MANIFEST_BYTES, _LINE_BYTES = 1 << 28, 1 << 24


# ---- the machine that measures -------------------------------------------------------------------


def machine_from_facts(facts: object, where: str = "facts") -> Machine:
    """The machine that a bundle's runner describes (``python3 run.py --facts``).

    Raises:
        MeasureError: a fact is missing or mistyped; ``where`` leads its message.
    """
    if not isinstance(facts, dict):
        raise MeasureError(f"{where}: expected a JSON object, found {type(facts).__name__}")

    def fact(name: str, kind: type) -> Any:
        value = facts.get(name)
        if type(value) is not kind or (isinstance(value, int) and value < 1):
            expected = "text" if kind is str else "an object" if kind is dict else "an integer >= 1"
            raise MeasureError(f"{where}: {name}: expected {expected}, found {value!r:.80}")
        return value

    gpu = facts.get("gpu")  # None, or not there: of a runner that did not ask
    cpuinfo, cpus = fact("cpuinfo", str), fact("cpus", int)
    caches = fact("caches", dict)
    for level, size in caches.items():
        if type(size) is not int or size < 1:
            raise MeasureError(f"{where}: caches.{level}: expected bytes, found {size!r:.80}")
    # As Machine.detect() does it.
    name, model, features = parse_cpuinfo(cpuinfo)
    if not any(names[0] in cpuinfo for names in MODEL_FIELDS):
        model = fact("architecture", str)
    isa = hashlib.sha256(" ".join(sorted(f for f in features if ISA.match(f))).encode()).hexdigest()[:12]
    return Machine(
        cpu=name,
        fingerprint=f"{model}-{isa}-{cpus}",
        features=features,
        cores=fact("cores", int),
        logical=fact("logical", int),
        l1=caches.get("1"),
        l2=caches.get("2"),
        l3=caches.get("3"),
        memory=fact("memory", int),
        arch=fact("architecture", str),
        gpu=Device.from_dict(gpu, f"{where}: gpu") if gpu is not None else None,
    )


def read_facts(path: Path) -> Machine:
    """The machine that a file describes: the output of ``run.py --facts``, results, or
    :meth:`convgen.hardware.machine.Machine.to_dict` as JSON.

    Raises:
        MeasureError: it is neither.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        values = load_json(data)
    except (ValueError, RecursionError):
        try:
            values = load_json(data.partition(b"\n")[0])["facts"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise MeasureError(f"{path}: expected what run.py --facts prints, found {error}") from None
    if isinstance(values, dict) and "fingerprint" in values:
        return Machine.from_dict(values, str(path))
    if isinstance(values, dict) and "facts" in values:  # results that have their first line only
        values = values["facts"]
    return machine_from_facts(values, str(path))


def target_on(target: Target, machine: Machine) -> Target:
    """A target with the facts of the machine that it is for.

    Raises:
        UnsupportedError: that machine cannot run its code.
    """
    there = resolve(target.spelling, machine)
    if not there.native:
        missing = ", ".join(sorted(set(there.isa) - machine.features)) or "another architecture"
        found = machine.cpu if target.kind == "cpu" else machine.gpu.name if machine.gpu else "none with a GPU"
        raise UnsupportedError(f"{target}: expected a machine that has {missing}, found {found}")
    return there


# ---- packing -------------------------------------------------------------------------------------


@dataclass
class Packed:
    """What a bundle holds: layers, trials, those that are there already, and candidates that failed to compile."""

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
    progress: Callable[[str], None] | None = None,
) -> Packed:
    """Compile candidates and write a bundle of them, whole or not at all.

    Args:
        specs: layers; those with an empty batch are left out.
        targets, threads: each layer is measured for every pair; for CPUs or for GPUs, where threads mean nothing.
        out: a file that ends in ``.tar.gz`` or ``.zip``.
        candidates: of each layer, target and thread count: the default and the most promising.
        machine: the one that will measure. Its caches and cores are what candidates are chosen for, and what
            the store has of it is not measured again.
        store: teaches what is promising; None: nothing is known.
        exclude: ids of schedules that do not take part.
        seed: of the choice.
        progress: called with a line per layer.

    Raises:
        BuildError: there is no C compiler for a target.
        ExportError: the bundle cannot be written, or there is nothing to write.
        UnsupportedError: targets are both CPUs' and GPUs', the machine lacks instructions of one, or no schedule
            is left.
    """
    if not out.name.endswith(ENDINGS):
        raise ExportError(f"{out}: expected a name that ends in {' or '.join(ENDINGS)}")
    kinds = {target.kind for target in targets}
    if len(kinds) > 1:
        found = ", ".join(map(str, targets))
        raise UnsupportedError(f"targets: expected CPUs or GPUs in a bundle, not both, found {found}")
    if kinds == {"cuda"}:
        threads = [1]
    if machine is not None:
        targets = [target_on(target, machine) for target in targets]
    specs = [spec for spec in specs if spec.n]
    if not specs:
        raise ExportError(f"{out}: expected a layer to measure, found none")
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix=".bundle-", dir=out.absolute().parent))
        except OSError as error:
            raise ExportError(f"{out}: {error.strerror}") from error
        builder = LocalBuilder(os.cpu_count() or 1)
        stack.callback(builder.close)
        packer = _Packer(
            Path(temporary) / bundle_name(out), builder, store, candidates, exclude, seed, machine is not None
        )
        try:
            packer.begin(targets)
            for number, spec in enumerate(specs, 1):
                count = packer.add(spec, targets, threads)
                if progress:
                    progress(f"[{number}/{len(specs)}] {spec.descriptor}: {count} trials")
            packed = packer.finish()
            part = Path(temporary) / out.name
            _write_archive(packer.folder, part)
            packed.bytes = part.stat().st_size
            os.replace(part, out)
        except OSError as error:
            raise ExportError(f"{out}: {error.strerror or error}") from error
    return packed


class _Packer:
    """Fills a bundle's folder."""

    def __init__(
        self,
        folder: Path,
        builder: Any,
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
        self.groups = 0
        self.device = "cpu"
        self.packed = Packed()
        for name in ("lib", "data"):
            (folder / name).mkdir(parents=True)

    def begin(self, targets: Sequence[Target]) -> None:
        """The library that compares outputs, for each target: also shows that there is a compiler."""
        for target in targets:
            self.device = target.kind
            triple = json.loads(target.tvm_config).get("mtriple", NATIVE)
            arch = triple.partition("-")[0]
            check = f"lib/check-{arch}.so"
            if not (self.folder / check).exists():
                link_shared([CHECK], self.folder / check, arch, headers=["types.h"])
            self.targets.append({"spelling": target.spelling, "architecture": arch, "check": check})

    def add(self, spec: ConvSpec, targets: Sequence[Target], threads: Sequence[int]) -> int:
        """A layer and its candidates; returns how many trials it takes."""
        index, first = len(self.layers), len(self.trials)
        built: dict[tuple[str, Candidate], dict[str, Any]] = {}
        futures: dict[tuple[str, Candidate], Future[Any] | Exception] = {}
        groups = []
        for target in targets:
            for count in threads:
                chosen, default, known = self._choose(spec, target, count)
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
            self.layers.append(self._data(spec, index, needs_bound))
        return sum(not trial["known"] for trial in self.trials[first:])

    def _choose(
        self, spec: ConvSpec, target: Target, threads: int
    ) -> tuple[list[Candidate], Candidate, dict[Candidate, float]]:
        """Candidates to compile, the default among them, and the seconds of those that were measured there."""
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
                    race.tell(candidate, Result(record.outcome, record.samples, record.error))
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
        """What a trial says of its library: the file, or how it failed to be made."""
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
            trial = {
                "key": trial_id(identity),
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
        """Write a layer's inputs and expected output as their bytes."""
        import numpy as np

        names = [*(name for name in spec.shapes if name != "dst"), "expected", *(["bound"] if needs_bound else [])]
        files = {name: f"data/{index}/{name}.bin" for name in names}
        (self.folder / "data" / str(index)).mkdir()
        with tempfile.TemporaryDirectory(prefix="convgen-") as temporary:
            memory = WORKER_BYTES + LAYER_FACTOR * Expected(spec, Path(temporary), os.cpu_count() or 1).bytes
            for name, file in files.items():
                array = np.load(Path(temporary) / f"{name}.npy")
                little = array.astype(array.dtype.newbyteorder("<"), copy=False)
                (self.folder / file).write_bytes(np.broadcast_to(little, array.shape).tobytes())
        facts = {"spec": spec.descriptor, "dtype": spec.dtype, "shape": list(spec.dst_shape)}
        return {**facts, "data": files, "memory": memory}

    def finish(self) -> Packed:
        """The runner and the manifest.

        Raises:
            ExportError: there is no trial.
        """
        to_measure = [trial for trial in self.trials if not trial["known"]]
        if not to_measure:
            raise ExportError("expected trials to measure, found none: the store has them all")
        runner = resources.files("convgen").joinpath("runtime", "measure_bundle.py").read_text(encoding="utf-8")
        (self.folder / RUNNER).write_text(runner, encoding="utf-8")
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


def trial_id(identity: Mapping[str, Any]) -> str:
    """SHA-256 of what makes two trials the same, but for the machine."""
    values = {name: identity[name] for name in IDENTITY}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- archives ------------------------------------------------------------------------------------


def bundle_name(path: Path) -> str:
    """A bundle's file name without its ending."""
    name = path.name
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return name or "bundle"


def _write_archive(folder: Path, out: Path) -> None:
    """All files of a folder below its name; equal files give equal archives."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if out.name.endswith(".zip"):
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                archive.writestr(zipfile.ZipInfo(path.relative_to(folder.parent).as_posix()), path.read_bytes(), 8)
        return

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.name.endswith(RUNNER) else 0o644
        return member

    with tarfile.open(out, "w:gz", compresslevel=6) as tar:
        for path in paths:
            tar.add(path, path.relative_to(folder.parent).as_posix(), filter=plain)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The folder of a bundle: itself, or one that its archive is unpacked into for the while.

    Raises:
        ExportError: there is no bundle.
    """
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="convgen-") as temporary:
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(temporary)
            else:
                with tarfile.open(path) as tar:
                    tar.extractall(temporary, filter="data")
        except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, ValueError) as error:
            raise ExportError(f"{path}: expected a bundle, found {error}") from error
        folders = [entry for entry in Path(temporary).iterdir() if (entry / MANIFEST).is_file()]
        if len(folders) != 1:
            raise ExportError(f"{path}: expected a bundle with one {MANIFEST}, found {len(folders)}")
        yield folders[0]


def _read_manifest(path: Path) -> tuple[str, dict[str, Any]]:
    """SHA-256 and contents of a bundle's manifest."""
    with unpacked(path) as folder:
        manifest = folder / MANIFEST
        try:
            with manifest.open("rb") as file:
                data = file.read(_MANIFEST_BYTES + 1)
        except OSError as error:
            raise ExportError(f"{manifest}: {error.strerror}") from error
    if len(data) > _MANIFEST_BYTES:
        raise ExportError(f"{path}: expected a manifest of at most {_MANIFEST_BYTES} bytes, found more")
    try:
        values = load_json(data)
        if values["format"] != FORMAT:
            raise ExportError(f"{path}: format: expected {FORMAT}, found {values['format']!r:.80}")
        values["by_key"] = {trial["key"]: trial for trial in values["trials"]}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: expected the manifest of a bundle, found {error}") from None
    return hashlib.sha256(data).hexdigest(), values


# ---- results -------------------------------------------------------------------------------------

_COMMON = {"kind", "when", "digest"}
_HEADER = _COMMON | {"format", "manifest", "facts", "python"}
_TRIAL = _COMMON | {"run", "key", "library_sha256", "outcome", "samples", "error", "cost", "reference", *IDENTITY}
_FINAL = _COMMON | {"run", "group", "trials", "samples"}
_FINALIST = {"key", "default", *IDENTITY}


def import_results(path: Path, store: RecordStore, bundle: Path | None = None) -> tuple[int, int]:
    """Add the records of a runner's results to a store, all or none; returns how many there are, and are new.

    Raises:
        RecordError: see :func:`read_results`; or the store cannot be written.
    """
    records = read_results(path, bundle)
    return len(records), store.add_all(records)


def read_results(path: Path, bundle: Path | None = None) -> list[TuningRecord]:
    """The records that measuring live would have made.

    Args:
        path: what the runner wrote.
        bundle: what it ran; then results must be of its trials and libraries.

    Raises:
        RecordError: a line is not what a runner writes, or was changed since; names the file, line and field.
        ExportError: the bundle cannot be read.
    """
    manifest = _read_manifest(bundle) if bundle is not None else None
    reader = _Reader(manifest)
    try:
        with path.open("rb") as file:
            for number, data in enumerate(iter(lambda: file.readline(_LINE_BYTES + 1), b""), 1):
                try:
                    reader.line(_parsed(data))
                except (RecordError, MeasureError) as error:
                    raise RecordError(f"{path}: line {number}: {error}") from None
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error
    if not reader.run:
        raise RecordError(f"{path}: expected results, found an empty file")
    return reader.records


def _parsed(data: bytes) -> dict[str, Any]:
    """A line as an object whose digest is right."""
    if len(data) > _LINE_BYTES:
        raise RecordError(f"expected at most {_LINE_BYTES} bytes, found more")
    if not data.endswith(b"\n"):
        raise RecordError("expected a whole line, found one cut short: run the bundle again, it goes on from there")
    try:
        values = load_json(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RecordError(f"expected a JSON object, found {type(values).__name__}")
    _expect(values.get("kind") in ("run", "trial", "final"), "kind", "run, trial or final", values.get("kind"))
    _names("", values, {"run": _HEADER, "trial": _TRIAL, "final": _FINAL}[values["kind"]])
    try:
        found = digest(values)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"digest: {error}") from None
    _expect(values["digest"] == found, "digest", f"that of the line, {found}", values["digest"])
    return values


def _names(prefix: str, values: dict[str, Any], expected: Collection[str]) -> None:
    for name in sorted(values.keys() ^ set(expected)):
        if name in values:
            raise RecordError(f"{prefix}{name}: expected one of {', '.join(sorted(expected))}, found an unknown field")
        raise RecordError(f"{prefix}{name}: expected a value, found none")


def _expect(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise RecordError(f"{name}: expected {expected}, found {found!r:.120}")


def _samples(name: str, values: object) -> tuple[float, ...]:
    _expect(isinstance(values, list), name, "a list of seconds", values)
    for value in values:  # type: ignore[attr-defined]
        good = type(value) in (int, float) and math.isfinite(value) and value > 0
        _expect(good, name, "positive numbers of seconds", value)
    return tuple(values)  # type: ignore[arg-type]


class _Reader:
    """Results line by line -> records."""

    def __init__(self, manifest: tuple[str, dict[str, Any]] | None) -> None:
        self.manifest = manifest
        self.run = ""
        self.hardware: dict[str, str] = {}  # by kind of target
        self.reference: float | None = None
        self.keys: set[str] = set()
        self.groups: set[int] = set()
        self.records: list[TuningRecord] = []

    def line(self, values: dict[str, Any]) -> None:
        """Take the next line.

        Raises:
            RecordError: a field is not what it must be.
            MeasureError: a fact of the machine is not.
        """
        if values["kind"] == "run":
            self._header(values)
            return
        _expect(bool(self.run), "kind", "the run's own line first", values["kind"])
        _expect(values["run"] == self.run, "run", f"the digest of the first line, {self.run}", values["run"])
        if values["kind"] == "trial":
            self._trial(values)
        else:
            self._final(values)

    def _header(self, values: dict[str, Any]) -> None:
        _expect(not self.run, "kind", "one run in a file", "another one")
        _expect(values["format"] == FORMAT, "format", str(FORMAT), values["format"])
        if self.manifest is not None:
            expected = self.manifest[0]
            _expect(values["manifest"] == expected, "manifest", f"the bundle's, {expected}", values["manifest"])
        machine = machine_from_facts(values["facts"])
        self.hardware = {"cpu": machine.fingerprint} | ({"cuda": machine.gpu.fingerprint} if machine.gpu else {})
        self.run = values["digest"]

    def _identity(self, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """Of a trial, checked as far as it can be without the schedules."""
        identity = {name: values[name] for name in IDENTITY}
        text = identity["spec"]
        try:
            descriptor = ConvSpec.parse(text).descriptor if isinstance(text, str) else None
        except SpecError as error:
            raise RecordError(f"{prefix}spec: {error}") from None
        _expect(descriptor == text, f"{prefix}spec", "a descriptor in its one spelling", text)
        key = trial_id(identity)
        _expect(values["key"] == key, f"{prefix}key", f"the trial's own, {key}", values["key"])
        if self.manifest is not None:
            _expect(key in self.manifest[1]["by_key"], f"{prefix}key", "a trial of the bundle", key)
        return identity

    def _trial(self, values: dict[str, Any]) -> None:
        identity = self._identity(values)
        key, outcome, reference, cost = (values[name] for name in ("key", "outcome", "reference", "cost"))
        _expect(key not in self.keys, "key", "each trial once", key)
        self.keys.add(key)
        if self.manifest is not None:
            library = self.manifest[1]["by_key"][key]["library_sha256"]
            _expect(values["library_sha256"] == library, "library_sha256", str(library), values["library_sha256"])
        _expect(outcome in OUTCOMES, "outcome", f"one of {OUTCOMES}", outcome)
        samples = _samples("samples", values["samples"])
        _expect(bool(samples) == (outcome == "ok"), "samples", "times where, and only where, it is ok", samples)
        good = type(cost) in (int, float) and math.isfinite(cost) and cost >= 0
        _expect(good, "cost", "seconds", cost)
        note = {"cost": float(cost)}
        if reference is not None:
            _samples("reference", [reference])
            self.reference = self.reference or reference
            note["drift"] = reference / self.reference
        self._add(identity, values["when"], outcome, samples, values["error"], note)

    def _final(self, values: dict[str, Any]) -> None:
        """The comparison of the leaders; see :func:`convgen.tuning.final.final_comparison`."""
        group, trials, samples = values["group"], values["trials"], values["samples"]
        _expect(type(group) is int and group not in self.groups, "group", "each group once", group)
        self.groups.add(group)
        _expect(isinstance(trials, list), "trials", "a list", trials)
        _expect(isinstance(samples, list) and len(samples) == len(trials), "samples", "a list per trial", samples)
        identities, times, defaults = [], [], []
        for i, trial in enumerate(trials):
            _expect(isinstance(trial, dict), f"trials[{i}]", "an object", trial)
            _names(f"trials[{i}].", trial, _FINALIST)
            identities.append(self._identity(trial, f"trials[{i}]."))
            times.append(_samples(f"samples[{i}]", samples[i]))
            _expect(bool(times[i]), f"samples[{i}]", "times", samples[i])
            defaults.append(trial["default"] is True)
        same = {(trial["spec"], trial["target"], trial["threads"]) for trial in identities}
        _expect(len(same) <= 1, "trials", "one layer, target and thread count", sorted(map(str, same)))
        _, notes = judge(times, defaults.index(True) if True in defaults else None)
        for identity, taken, note in zip(identities, times, notes, strict=True):
            self._add(identity, values["when"], "ok", taken, "", note)

    def _add(
        self,
        identity: dict[str, Any],
        when: Any,
        outcome: str,
        samples: tuple[float, ...],
        error: Any,
        note: dict[str, Any],
    ) -> None:
        seconds = Result(outcome, samples).seconds
        kind = str(identity["target"]).partition(":")[0]
        _expect(kind in self.hardware, "target", f"one of {', '.join(self.hardware)}, which is there", kind)
        self.records.append(
            TuningRecord(
                **identity,
                hardware=self.hardware[kind],
                outcome=outcome,
                seconds=seconds,
                samples=samples,
                error=error,
                when=when,
                note=note,
            )
        )
