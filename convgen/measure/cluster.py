"""Compiling candidates on a Dask cluster: of the two costs of a trial, the one that any machine can bear.

The optional extra ``convgen[cluster]``. Dask's ``distributed`` is Python only and light, its futures are
those of the standard library, and whoever has a cluster, of Slurm, Kubernetes or SSH, has a way to start its
workers there; Ray does the same with hundreds of megabytes of its own.

A worker of the cluster compiles in child processes, as :class:`~convgen.measure.workers.LocalBuilder` does here: a
compiler that crashes or hangs costs its candidate and not the worker. The library comes back as bytes.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ..errors import BuildError, ConvgenError, UnsupportedError
from ..folders import TemporaryFolder
from ..interrupts import interrupts_blocked, interrupts_held
from ..lowering.versions import versions
from ..records.outcome import INTERRUPTED, Result
from .trial import CandidateModule
from .workers import Builder, LocalBuilder

#: Seconds to wait for the cluster's scheduler.
CONNECT = 30.0


class DaskBuilder(Builder):
    """The workers of a Dask cluster.

    Args:
        address: of its scheduler, ``tcp://host:8786``.
        timeout: seconds after which a compilation is killed.

    Raises:
        UnsupportedError: ``distributed`` is not installed.
        BuildError: no scheduler answers there, it has no workers, or they have other versions of convgen or TVM.
    """

    def __init__(self, address: str, *, timeout: float = 60.0) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise UnsupportedError("cluster: needs Dask: pip install distributed") from error
        self.address, self.timeout = address, timeout
        try:
            with interrupts_blocked():
                self._client: Any = Client(address, timeout=CONNECT, set_as_default=False, name="convgen")
        except (OSError, ValueError) as error:
            text = f"cluster: expected a Dask scheduler at {address}, found {error or type(error).__name__}"
            raise BuildError(text) from error
        try:
            self._check_workers()
        except BaseException:
            self._client.close()
            raise
        self._folder = TemporaryFolder(runs=True)
        self.root = self._folder.path
        self._pending: dict[Future[Any], Any] = {}
        self._lock = threading.Lock()

    @property
    def workers(self) -> int:  # type: ignore[override]
        """Compilations at once: the threads that the cluster has at the moment."""
        return max(1, int(sum(self._client.nthreads().values())))

    def submit(self, module: CandidateModule) -> Future[str | Result]:
        """The path of the library; an error where a worker has other versions.

        Raises (from the future):
            UnsupportedError, BuildError: the worker's versions are not those here, or it lacks a compiler.
        """
        answer: Future[str | Result] = Future()
        job = self._client.submit(compile_there, module, self.timeout, pure=False)
        with self._lock:
            self._pending[answer] = job
        job.add_done_callback(lambda job: self._finish(job, answer))
        return answer

    def _finish(self, job: Any, answer: Future[Any]) -> None:
        """Runs in a thread of Dask's when a job has ended."""
        with self._lock:
            if self._pending.pop(answer, None) is None:
                return  # closed meanwhile
        try:
            answer.set_result(self._outcome(job))
        except Exception as error:
            answer.set_exception(error)

    def _outcome(self, job: Any) -> str | Result:
        if job.cancelled():
            return INTERRUPTED
        try:
            versions_there, made = job.result()
        except ConvgenError:  # no compiler there
            raise
        except Exception as error:  # of Dask: too many workers died with it, or one cannot run it at all
            return Result("crash", error=f"{type(error).__name__}: {error}"[-2000:])
        _check_versions(f"cluster {self.address}", versions_there)
        if isinstance(made, Result):
            return made
        name, files = made
        with self._folder.writing():
            folder = Path(tempfile.mkdtemp(dir=self.root))
            for file, data in files.items():
                (folder / file).write_bytes(data)
        return str(folder / name)

    def _check_workers(self) -> None:
        try:
            self._client.wait_for_workers(1, timeout=CONNECT)
            workers = self._client.run(versions)
        except Exception as error:
            text = f"cluster {self.address}: expected workers with convgen installed, found {type(error).__name__}"
            raise BuildError(f"{text}: {error}") from error
        for worker, versions_there in workers.items():
            _check_versions(f"worker {worker}", versions_there)

    def close(self) -> None:
        with interrupts_held():
            with self._lock:
                pending, self._pending = self._pending, {}
            for answer, job in pending.items():
                job.cancel(force=True)
                answer.set_result(INTERRUPTED)
            self._client.close()
            self._folder.close()


def _check_versions(where: str, there: dict[str, str]) -> None:
    if there != (here := versions()):
        raise BuildError(f"{where}: expected the versions here, {_said(here)}, found {_said(there)}")


def _said(programs: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in programs.items())


# ---- in a worker of the cluster -----------------------------------------------------------------

_builder: LocalBuilder | None = None
_making = threading.Lock()


def compile_there(
    module: CandidateModule, timeout: float
) -> tuple[dict[str, str], Result | tuple[str, dict[str, bytes]]]:
    """The versions here, and the artifact of a candidate: the library's name and all files; or how it failed."""
    path = _local_builder(timeout).submit(module).result()
    if isinstance(path, Result):
        return versions(), path
    folder = Path(path).parent
    try:
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return versions(), (Path(path).name, files)


def _local_builder(timeout: float) -> LocalBuilder:
    """This worker's own, with a process for each of its threads."""
    from distributed import get_worker

    global _builder
    with _making:
        if _builder is None:
            _builder = LocalBuilder(get_worker().state.nthreads, timeout=timeout)
            atexit.register(_builder.close)
        return _builder
