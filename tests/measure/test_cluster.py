"""Compiling on a Dask cluster: a local one, of processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convgen.errors import BuildError, UnsupportedError
from convgen.hardware.target import resolve
from convgen.lowering.candidates import parse_candidate
from convgen.lowering.schedule import Picks
from convgen.lowering.versions import versions
from convgen.measure import cluster
from convgen.measure.cluster import DaskBuilder
from convgen.measure.trial import CandidateModule, Expected, candidate_module, run_artifact
from convgen.problem.spec import ConvSpec
from convgen.records.outcome import INTERRUPTED, Result

SPEC = ConvSpec.parse("conv2d n1 ic3 oc5 i6x7 k3x3 p1")
LONG = 120.0
BROKEN = CandidateModule("{}", SPEC.descriptor, resolve(), "cpu_direct", Picks(), 0, ())

needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="needs Dask: pip install distributed"
)


def module() -> CandidateModule:
    return candidate_module(SPEC, resolve(), parse_candidate(SPEC, resolve(), "cpu_direct"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler and two workers, each a process with one thread."""
    script = """
import sys
import time
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        assert running.stdin
        yield running.stdout.readline().strip()
        running.stdin.close()
        running.wait(LONG)


@pytest.fixture
def builder(address: str) -> Iterator[DaskBuilder]:
    made = DaskBuilder(address)
    yield made
    made.close()


@needs_dask
def test_candidates_are_compiled_by_the_workers(builder: DaskBuilder, tmp_path: Path) -> None:
    assert builder.workers == 2
    good, broken, again = (builder.submit(each) for each in (module(), BROKEN, module()))
    path, other = good.result(LONG), again.result(LONG)
    assert isinstance(path, str)
    assert isinstance(other, str)
    assert Path(path).is_relative_to(builder.root)
    assert Path(path).parent != Path(other).parent
    result = run_artifact(path, str(Expected(SPEC, tmp_path, 1).directory), 1, seconds=0.01, hopeless=0.0)
    assert result["outcome"] == "ok"
    failed = broken.result(LONG)
    assert isinstance(failed, Result)
    assert failed.outcome == "build_error"


@needs_dask
def test_what_dies_is_an_outcome(builder: DaskBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that takes every other down with it, as well."""

    def dies(module: CandidateModule, timeout: float) -> None:
        os._exit(3)

    with monkeypatch.context() as patch:
        patch.setattr(cluster, "compile_there", dies)
        result = builder.submit(BROKEN).result(LONG)
    assert isinstance(result, Result)
    assert result.outcome == "crash"
    assert "KilledWorker" in result.error
    assert isinstance(builder.submit(module()).result(LONG), str)


@needs_dask
def test_closing_ends_what_is_being_compiled(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = DaskBuilder(address)
    monkeypatch.setattr(cluster, "compile_there", lambda *_: time.sleep(3))
    jobs = [builder.submit(BROKEN) for _ in range(3)]
    builder.close()
    assert [job.result(LONG) for job in jobs] == [INTERRUPTED] * 3
    assert not builder.root.exists()


@needs_dask
def test_versions_must_be_the_same(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = versions()
    monkeypatch.setattr(cluster, "_said", lambda found: json.dumps(found, sort_keys=True))
    builder = DaskBuilder(address)
    try:

        def elsewhere(module: CandidateModule, timeout: float) -> Any:
            return here | {"tvm": "0.1"}, Result("ok")

        monkeypatch.setattr(cluster, "compile_there", elsewhere)
        with pytest.raises(BuildError, match=f'expected the versions here, .*{here["tvm"]}.* found .*"tvm": "0.1"'):
            builder.submit(BROKEN).result(LONG)
    finally:
        builder.close()


@needs_dask
def test_there_must_be_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT", 0.5)
    with pytest.raises(BuildError, match=r"cluster: expected a Dask scheduler at tcp://127\.0\.0\.1:9, found "):
        DaskBuilder("tcp://127.0.0.1:9")


def test_without_dask_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UnsupportedError, match="pip install distributed"):
        DaskBuilder("tcp://127.0.0.1:8786")
