"""A temporary folder that is full ends a job with what it says, and with nothing else on standard error."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import Any

import pytest
from fake_tuning import FakeSchedule, fake_pools, fake_tuning

from convgen.errors import FolderError
from convgen.folders import TemporaryFolder
from convgen.lowering.versions import versions
from convgen.measure.cluster import DaskBuilder
from convgen.tuning.job import Job
from convgen.tuning.job_run import JobRun

FAST = "conv1d n1 ic4 oc4 i20 k3 s1 p0"


def failed(error: Exception) -> Future[Any]:
    answer: Future[Any] = Future()
    answer.set_exception(error)
    return answer


def test_what_was_being_compiled_beside_is_left_in_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of a round's candidates fails alike; the first one's error is the job's."""
    fake_tuning(monkeypatch, FakeSchedule())
    pools = fake_pools(lambda *_: 1e-3)
    asked: list[object] = []
    compiled = pools.builder.submit

    def full(module: Any) -> Future[Any]:
        asked.append(module)
        return compiled(module) if len(asked) == 1 else failed(FolderError("no space left"))

    monkeypatch.setattr(pools.builder, "submit", full)
    run = JobRun(Job((FAST,), threads=(1,)), None, pools)
    with caplog.at_level(logging.DEBUG), pytest.raises(FolderError, match="no space left"):
        run.run()
    run.close()
    assert len(asked) > 2
    assert caplog.records == []  # as of a callback that raised


def test_what_a_cluster_has_compiled_may_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no candidate's fault, and the folder is named."""

    class Made:
        def cancelled(self) -> bool:
            return False

        def result(self) -> Any:
            return versions(), ("lib.so", {"lib.so": b"code"})

    builder = DaskBuilder.__new__(DaskBuilder)
    builder.address, builder._folder = "here", TemporaryFolder()
    builder.root = builder._folder.path

    def full(**_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convgen.measure.cluster.tempfile.mkdtemp", full)
    with pytest.raises(FolderError, match="no space left; set TMPDIR"):
        builder._outcome(Made())
    builder._folder.close()
