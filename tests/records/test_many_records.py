"""Stores of any size: what is asked is answered from the indexes, and few records are decoded or held."""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_records import record
from many_records import TRIALS, fill_many, here, layers
from paths import SUPPORT

from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate
from convgen.problem.spec import ConvSpec
from convgen.records import database
from convgen.records import store as store_module
from convgen.records.answer import find_record
from convgen.records.store import RecordStore
from convgen.tuning.context import SearchContext
from convgen.tuning.journal import Journal
from convgen.tuning.ranker import NEAREST, READ, Ranker
from convgen.tuning.search import Search

COUNT = 30_000
LAYER = next(itertools.islice(layers(), 10, None))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_many(tmp_path_factory.mktemp("many") / "r.sqlite", here(COUNT))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the records that are decoded."""
    seen: list[str] = []

    def checked(row: database.Row) -> Any:
        seen.append(row[database.ID])
        return database.checked(row)

    monkeypatch.setattr(store_module, "checked", checked)
    return seen


def plans(store: RecordStore, ask: Callable[[RecordStore], object]) -> list[str]:
    """How SQLite finds what is asked: a line for every table or index that it goes through."""
    statements: list[str] = []
    store._run(lambda db: db.set_trace_callback(statements.append))
    ask(store)
    store._run(lambda db: db.set_trace_callback(None))
    explained = ["EXPLAIN QUERY PLAN " + text for text in statements if text.startswith("SELECT")]
    rows = store._run(lambda db: [row for text in explained for row in db.execute(text)])
    return [row[3] for row in rows]


def test_rows_are_records_that_were_measured_here(many: Path) -> None:
    with RecordStore(many, readonly=True) as store:
        assert len(store) == store.last() == COUNT
        sample = store.trials(spec=LAYER, threads=2)
        assert len(sample) == TRIALS
        assert store.check().ok


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.trials(spec=LAYER, target=resolve().spelling, limit=1000),
        lambda store: store.trials(spec=[LAYER], threads=2, outcome="crash", limit=10),
        lambda store: store.trials(target="cpu:none", limit=10),
        lambda store: store.trials(threads=1, outcome="crash", limit=10),
        lambda store: store.trials(trial_key="0" * 64),
        lambda store: store.outcomes(target=resolve().spelling, threads=1),
        lambda store: store.problems(target=resolve().spelling, last=10),
        lambda store: store.has("0" * 64),
        lambda store: find_record(store, ConvSpec.parse(LAYER), resolve(), 2),
    ],
    ids=["a layer", "layers", "a target", "threads", "a trial", "counts", "problems", "has", "an answer"],
)
def test_nothing_goes_through_the_table(ask: Callable[[RecordStore], object], many: Path) -> None:
    with RecordStore(many, readonly=True) as store:
        found = plans(store, ask)
        (newest,) = store.trials(limit=1)
        found += plans(store, lambda store: store.find(newest.id[:12]))
    assert len(found) > 1
    assert [line for line in found if line.startswith("SCAN records") and "COVERING INDEX" not in line] == []


def test_few_records_are_decoded(many: Path, decoded: list[str]) -> None:
    spec = ConvSpec.parse(LAYER)
    with RecordStore(many, readonly=True) as store:
        answer = find_record(store, spec, resolve(), 2)
        assert answer.record is not None
        assert len(decoded) < 20  # those of its comparisons are all checked
        decoded.clear()
        assert len(store.trials(threads=1, limit=20)) == len(decoded) == 20


def test_one_layer_may_have_most_of_them(tmp_path: Path, decoded: list[str]) -> None:
    """Also then the answer is found at once, and the ranker reads the newest."""
    path = fill_many(tmp_path / "r.sqlite", here(10_000, trials=10_000))
    spec = ConvSpec.parse(next(layers()))
    with RecordStore(path) as store:
        found = find_record(store, spec, resolve(), 1)
        assert found.record is not None
        assert len(decoded) < 50  # made-up picks: some faster records have no candidate any more
        decoded.clear()
        ranker = Ranker.from_store(store, resolve(), 1)
        ranker.predict(spec, [default_candidate(spec, resolve())])
        assert len(decoded) <= NEAREST


def test_a_ranker_reads_what_is_near(many: Path, decoded: list[str]) -> None:
    spec = ConvSpec.parse(LAYER).with_(ic=48)
    with RecordStore(many, readonly=True) as store:
        ranker = Ranker.from_store(store, resolve(), 2)
        assert decoded == []
        ranker.predict(spec, [default_candidate(spec, resolve())])
        assert NEAREST / 2 < len(decoded) <= READ + NEAREST
        ids = set(decoded)
        read = {item.spec for item in store.trials() if item.id in ids}
        assert LAYER in read
        assert len(read) < 20
        decoded.clear()
        ranker.predict(spec, [default_candidate(spec, resolve())])
        assert decoded == []  # each once


def test_a_search_reads_its_layer_once(many: Path, decoded: list[str]) -> None:
    with RecordStore(many) as store:
        context = SearchContext(resolve(), 2, Journal(store))
        search = Search(context, ConvSpec.parse(LAYER))
        assert search.state.known > 0
        assert len(decoded) <= TRIALS + READ + NEAREST
        decoded.clear()
        store.add(record(threads=2))
        search.refresh()
        assert decoded == []  # of another layer: nothing new


def test_what_reads_everything_holds_little(many: Path, tmp_path: Path) -> None:
    """Export, import, merge and check of all: a thousand at a time, not all."""

    def most(work: Callable[[], object]) -> int:
        tracemalloc.start()
        work()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    part = fill_many(tmp_path / "part.sqlite", here(3000))
    lines = tmp_path / "r.jsonl"
    limit = 9 * 2**20  # 3000 records take 15 MiB
    with RecordStore(part) as store, RecordStore(tmp_path / "a.sqlite") as a, RecordStore(tmp_path / "b.sqlite") as b:
        assert most(lambda: store.export(lines)) < limit
        assert most(lambda: a.import_(lines)) < limit
        assert most(lambda: b.merge(part)) < limit
        assert most(store.check) < limit
        assert len(a) == len(b) == 3000
        assert (a.import_(lines), b.merge(part)) == (0, 0)


def test_what_is_read_slowly_holds_up_no_writer(many: Path) -> None:
    """And what is removed meanwhile is left out, without a gap or a record twice."""
    with RecordStore(many) as store:
        there = store.trials(spec=LAYER, threads=1)
        reading = store.each(spec=LAYER, threads=1)
        assert next(reading) == there[0]
        with RecordStore(many) as other:
            start = time.monotonic()
            assert other.add(record(seconds=2.5))
            assert time.monotonic() - start < 30
        assert [there[0], *reading] == there


def test_rows_that_move_while_they_are_read(tmp_path: Path) -> None:
    path = fill_many(tmp_path / "r.sqlite", here(3000))
    with RecordStore(path) as store, RecordStore(path) as other:
        there = store.trials()
        reading = store.each()
        first = list(itertools.islice(reading, 1000))
        other.remove(item.id for item in there[500:2500:2])
        rest = list(reading)
    gone = {item.id for item in there[500:2500:2]}
    assert first == there[:1000]
    assert rest == [item for item in there[1000:] if item.id not in gone]


# ---- a million --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("million") / "r.sqlite"
    subprocess.run([sys.executable, str(SUPPORT / "many_records.py"), str(path), "1000000"], check=True)
    yield path
    path.unlink()


START = """
import resource, sys, time
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate
from convgen.problem.spec import ConvSpec
from convgen.records.store import RecordStore
from convgen.records.answer import find_record
from convgen.tuning.context import SearchContext
from convgen.tuning.journal import Journal
from convgen.tuning.search import Search
target, spec = resolve(), ConvSpec.parse(sys.argv[2])
default_candidate(spec, target)
def used():
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime, found.ru_maxrss
before = used()
with RecordStore(sys.argv[1]) as store:
    find_record(store, spec, target, 2)
    search = Search(SearchContext(target, 2, Journal(store)), spec)
    assert search.draw(4)
    search.close()
after = used()
print(after[0] - before[0], (after[1] - before[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_million_records(million: Path) -> None:
    """In seconds of the processor, which other work changes little, and MiB; beside what TVM takes by itself."""
    for words in ([], [*LAYER.split()], ["--schedule", "cpu_direct"], ["--outcome", "crash"], ["--target", "cpu:no"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "convgen", "records", "list", *words, "--records", str(million)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    done = subprocess.run(
        [sys.executable, "-c", START, str(million), LAYER], check=True, capture_output=True, text=True
    )
    seconds, mib = map(float, done.stdout.split())
    assert seconds < 4  # of two threads, some of it NumPy's
    assert mib < 300
