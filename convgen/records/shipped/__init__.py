"""The tuned records that ship with convgen, read where they are asked for.

A database is two files in this folder: ``NAME.jsonl`` with the records, a JSON object per line as
``convgen records export`` writes them, and ``NAME.json`` that says where they are from (:class:`Origin`).
README.md beside them tells how to make one.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...errors import RecordError
from ...hardware.machine import machine
from ..record import TuningRecord, read_lines, write_lines, write_whole

#: Where the databases are.
FOLDER = Path(__file__).parent
_KINDS: dict[str, type] = {"records": int, "layers": int, "threads": list, "sources": list, "versions": dict}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a database's records are from.

    Attributes:
        cpu: the processor's name.
        hardware: fingerprint of the machine (:attr:`convgen.hardware.machine.Machine.fingerprint`).
        target: what the kernels were compiled for.
        versions: of convgen, TVM and LLVM.
        since, until: when the first and the last was measured, ISO 8601 UTC.
        threads: thread counts there are records for.
        layers, records: how many.
        sources: files and models whose layers these are.
        note: what else is to be said.
    """

    cpu: str
    hardware: str
    target: str
    versions: dict[str, str]
    since: str
    until: str
    threads: list[int]
    layers: int
    records: int
    sources: list[str]
    note: str

    @classmethod
    def of(cls, records: Sequence[TuningRecord], sources: Iterable[str] = (), note: str = "") -> Origin:
        """Of records that were measured on this machine.

        Raises:
            RecordError: there are none, or they are not all for the same hardware, target and versions.
        """
        if not records:
            raise RecordError("records: expected at least one to ship, found none")
        for name in ("hardware", "target", "versions"):
            found = {json.dumps(getattr(record, name), sort_keys=True) for record in records}
            if len(found) > 1:
                raise RecordError(f"{name}: expected the same in all records, found {', '.join(sorted(found))}")
        here, first = machine(), records[0]
        if first.hardware != here.fingerprint:
            raise RecordError(f"hardware: expected this machine, {here.fingerprint}, found {first.hardware}")
        return cls(
            cpu=here.cpu,
            hardware=first.hardware,
            target=first.target,
            versions=dict(first.versions),
            since=min(record.when for record in records),
            until=max(record.when for record in records),
            threads=sorted({record.threads for record in records}),
            layers=len({record.spec for record in records}),
            records=len(records),
            sources=[Path(source).name for source in sources],
            note=note,
        )

    def of_some(self, records: Sequence[TuningRecord]) -> Origin:
        """Of some of its records."""
        return replace(
            self,
            since=min(record.when for record in records),
            until=max(record.when for record in records),
            threads=sorted({record.threads for record in records}),
            layers=len({record.spec for record in records}),
            records=len(records),
        )

    @classmethod
    def read(cls, path: Path) -> Origin:
        """What the file says.

        Raises:
            RecordError: it cannot be read, or a field is missing, unknown or mistyped.
        """
        try:
            values: Any = json.loads(path.read_bytes())
        except OSError as error:
            raise RecordError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise RecordError(f"{path}: not JSON: {error}") from None
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise RecordError(f"{path}: expected the fields {', '.join(sorted(names))}, found {found}")
        for name, value in values.items():
            kind = _KINDS.get(name, str)
            if not isinstance(value, kind):
                raise RecordError(f"{path}: {name}: expected {kind.__name__}, found {type(value).__name__}")
        return cls(**values)


def write(path: Path, records: Sequence[TuningRecord], origin: Origin) -> None:
    """Write a database: ``path`` and, beside it, its origin. The records come first: without an origin
    they do not count.

    Raises:
        RecordError: the name does not end in ``.jsonl``, or a file cannot be written.
    """
    if path.suffix != ".jsonl":
        raise RecordError(f"{path}: expected a name that ends in .jsonl")
    records_of.cache_clear()
    _databases.cache_clear()
    write_lines(path, records)
    write_whole(path.with_suffix(".json"), [json.dumps(asdict(origin), indent=2, ensure_ascii=False) + "\n"])


def databases(folder: Path | None = None) -> list[tuple[Origin, Path]]:
    """The databases of a folder, the package's own by default: where each is from, and its records' file."""
    return list(_databases(FOLDER if folder is None else folder))


@functools.cache
def _databases(folder: Path) -> tuple[tuple[Origin, Path], ...]:
    paths = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".json"))
    return tuple((Origin.read(folder / name), (folder / name).with_suffix(".jsonl")) for name in paths)


@functools.cache
def records_of(path: Path, count: int) -> dict[str, list[TuningRecord]]:
    """A database's records by spec, each checked against its hash.

    Raises:
        RecordError: the file cannot be read, a line is not a record, or there are not ``count`` of them.
    """
    found: dict[str, list[TuningRecord]] = {}
    records = list(read_lines(path))
    if len(records) != count:
        raise RecordError(f"{path}: expected {count} records, as the file beside it says, found {len(records)}")
    for record in records:
        found.setdefault(record.spec, []).append(record)
    return found
