"""A record store of any size, written in seconds: ``python tests/support/many_records.py PATH COUNT``.

Each row is a valid record, as if many layers had been tuned one after the other; its JSON is put together from pieces,
which is what takes no time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from convgen.records.database import INSERT
from convgen.records.record import dump
from convgen.records.store import RecordStore

#: Trials of each problem, the last two of them a final comparison.
TRIALS = 200
_SAMPLES = 9


def layers() -> Iterator[str]:
    """Descriptors of different layers, without end."""
    for more in itertools.count():
        for kernel, ic, oc, plane in itertools.product(
            (3, 1, 5), (32, 64, 96, 128), (32, 64, 128, 256), (7, 14, 28, 56)
        ):
            pad = kernel // 2
            yield f"conv2d n1 ic{ic + more} oc{oc} i{plane}x{plane} k{kernel}x{kernel} s1x1 p{pad}x{pad} relu"


#: What may have been tried for a layer: ids of schedules, their versions, and picks as JSON.
Tries = list[tuple[str, int, str]]


def rows(
    count: int,
    target: str,
    hardware: str,
    tries: Callable[[str], Tries],
    versions: dict[str, str],
    trials: int = TRIALS,
) -> Iterator[tuple[object, ...]]:
    """Rows of the store's table, in the order of its columns: every layer on one thread and on two."""
    start, made = datetime(2026, 1, 1, tzinfo=UTC), 0
    said, place = dump(versions), json.dumps(hardware)
    for spec, threads in ((spec, threads) for spec in layers() for threads in (1, 2)):
        known = tries(spec)
        for trial in range(min(trials, count - made)):
            final, (schedule, version, picks) = trials - 2 <= trial, known[trial * 7 % len(known)]
            key = hashlib.sha256(
                f'{{"hardware":{place},"picks":{picks},"schedule":"{schedule}",'
                f'"schedule_version":{version},"spec":"{spec}","target":"{target}",'
                f'"threads":{threads},"versions":{said}}}'.encode()
            ).hexdigest()
            slower = (trial * 37) % trials / trials
            seconds = None if trial % 20 == 7 and not final else 1e-4 + 2e-4 * slower  # none beyond doubt
            outcome = "crash" if seconds is None else "ok"
            samples = "[]" if seconds is None else f"[{','.join([repr(seconds)] * _SAMPLES)}]"
            note = '{"cost":0.5'
            note += f',"default_seconds":0.0002,"final":true,"winner":{str(trial % 2 > 0).lower()}}}' if final else "}"
            when = (start + timedelta(seconds=made)).isoformat(timespec="microseconds").replace("+00:00", "Z")
            error = "" if seconds is not None else "it ended with signal 11"
            content = f'["{key}","{outcome}",{json.dumps(seconds)},{samples},"{error}","{when}",{note}]'
            id_ = hashlib.sha256(content.encode()).hexdigest()
            detail = f'{{"note":{note},"picks":{picks},"samples":{samples},"versions":{said}}}'
            yield (detail, spec, target, hardware, threads, schedule, version, outcome, seconds, error, when, key, id_)
            made += 1
        if made == count:
            return


def fill_many(path: Path, found: Iterator[tuple[object, ...]]) -> Path:
    """A new store with these rows: its indexes are made after them."""
    RecordStore(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -1000000")
        indexes = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL").fetchall()
        for name, _ in indexes:
            db.execute(f"DROP INDEX {name}")
        db.execute("BEGIN")
        db.executemany(INSERT, found)
        for _, sql in indexes:
            db.execute(sql)
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL")
    return path


def here(count: int, trials: int = TRIALS) -> Iterator[tuple[object, ...]]:
    """Rows as this machine and these versions would have measured them, with picks that schedules have."""
    from convgen.hardware.target import resolve
    from convgen.lowering.discover import schedules_of
    from convgen.lowering.versions import versions
    from convgen.problem.spec import ConvSpec

    target = resolve()
    known: dict[str, Tries] = {}

    def tries(text: str) -> Tries:
        like = re.sub(r" ic\d+", " ic64", text)  # how many input channels there are changes little
        if like not in known:
            spec, rng = ConvSpec.parse(like), random.Random(like)
            able = [one for one in schedules_of("cpu").values() if one.reason_against(spec, target) is None]
            spaces = [(one.id, one.version, one.space(spec, target)) for one in able]
            drawn = {(id_, version, dump(dict(space.sample(rng)))) for id_, version, space in spaces for _ in range(60)}
            known[like] = sorted(drawn)
        return known[like]

    return rows(count, target.spelling, target.hardware, tries, versions(), trials)


if __name__ == "__main__":
    fill_many(Path(sys.argv[1]), here(int(sys.argv[2]), *map(int, sys.argv[3:])))
