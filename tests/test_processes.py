"""Worker processes: limits, ends of all kinds, and that nothing of the caller's runs in them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import worker_jobs
from paths import SUPPORT
from worker_jobs import in_worker

from convgen.measure.workers import Workers
from convgen.processes import JobError, MemoryLimitError, Worker, call_in_file
from convgen.records.outcome import INTERRUPTED, Result

LONG = 60.0


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.stop()


def written(path: Path) -> int:
    """The process id that a job has written, once it has."""
    give_up = time.monotonic() + LONG
    while not (text := path.read_text() if path.exists() else ""):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    return int(text)


def ends(process: int) -> bool:
    try:
        psutil.Process(process).wait(10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


# ---- one process ----------------------------------------------------------------------------------


def test_a_worker_answers_one_job_after_another(worker: Worker) -> None:
    assert worker.call(divmod, 17, 5) == (3, 2)
    assert worker.call(in_worker(worker_jobs.process_id)) == worker.pid != os.getpid()


def test_what_a_job_raises_is_said_and_the_worker_stays(worker: Worker) -> None:
    with pytest.raises(JobError, match=r"(?s)^ValueError: Traceback .*worker_jobs.*ValueError: planted"):
        worker.call(in_worker(worker_jobs.fail))
    with pytest.raises(JobError, match=r"^BuildError: planted$"):
        worker.call(in_worker(worker_jobs.fail_to_build))
    with pytest.raises(MemoryError):
        worker.call(in_worker(worker_jobs.ask_for_all_memory))
    with pytest.raises(JobError, match=r"local object .*lambda"):
        worker.call(in_worker(worker_jobs.answer_with_a_lambda))
    with pytest.raises(JobError, match="no_such_name"):
        worker.call(call_in_file, worker_jobs.__file__, "no_such_name")
    with pytest.raises(AttributeError, match="lambda"):
        worker.call(lambda: None)
    assert worker.call(in_worker(worker_jobs.process_id)) == worker.pid


@pytest.mark.parametrize("job", [worker_jobs.crash, worker_jobs.leave])
def test_a_job_that_ends_its_process_is_said(worker: Worker, job: Any) -> None:
    with pytest.raises(ChildProcessError, match="terminated"):
        worker.call(in_worker(job))
    assert ends(worker.pid)


def test_a_job_that_takes_too_long_ends_with_what_it_has_started(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        worker.call(in_worker(worker_jobs.spawn_and_sleep, str(tmp_path / "pid")), seconds=3.0)
    assert ends(worker.pid)
    assert ends(written(tmp_path / "pid"))


def test_a_job_that_takes_too_much_memory_ends(worker: Worker) -> None:
    with pytest.raises(MemoryLimitError) as error:
        worker.call(in_worker(worker_jobs.eat_memory), memory=300 << 20)
    assert error.value.added > 300 << 20
    assert ends(worker.pid)


def test_another_thread_can_kill_it(worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "pid"

    def kill() -> None:
        written(path)
        worker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ChildProcessError):
        worker.call(in_worker(worker_jobs.write_id_and_sleep, str(path)))
    killer.join()
    worker.kill()  # does no harm


def test_a_job_costs_little(worker: Worker) -> None:
    """In time of this process's, which the machine's other work does not change: below 5 ms each."""
    worker.call(divmod, 1, 1)
    start = time.process_time()
    for _ in range(100):
        worker.call(divmod, 1, 1)
    assert time.process_time() - start < 0.5


# ---- what it takes of the caller: nothing -----------------------------------------------------------


def test_it_imports_nothing_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pickle.py").write_text("raise SystemExit('imported from the working directory')")
    (tmp_path / "numpy.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    with closing(Workers(1, "run_error", LONG)) as pool:
        facts = pool.submit(in_worker(worker_jobs.facts)).result()
    assert not {"", ".", str(tmp_path)} & set(facts["path"])


def test_it_is_none_of_the_terminals(worker: Worker) -> None:
    facts = worker.call(in_worker(worker_jobs.facts))
    assert facts["group"] == worker.pid != os.getpgrp()  # which Ctrl-C does not reach
    assert facts["input"]


def test_a_script_is_not_run_again(tmp_path: Path) -> None:
    """It has no guard, and is alone in its folder: neither is needed."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
print("once", flush=True)
import worker_jobs
from convgen.measure.workers import Workers
pool = Workers(2, "run_error", {LONG})
jobs = [pool.submit(worker_jobs.in_worker(worker_jobs.facts)) for _ in range(3)]
mains = {{job.result()["main"] for job in jobs}}
pool.close()
print(len(mains), __file__ in mains)
""")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=LONG, check=True
    )
    assert (out.stdout.split(), out.stderr) == (["once", "1", "False"], "")


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """However that ends, and whatever it is doing."""
    script = f"""
import sys, time
sys.path.append({str(SUPPORT)!r})
from worker_jobs import in_worker, write_id_and_sleep
from convgen.measure.workers import Workers
pool = Workers(1, "run_error", 1000)
pool.submit(in_worker(write_id_and_sleep, {str(tmp_path / "pid")!r}))
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", script]) as starter:
        process = written(tmp_path / "pid")
        starter.kill()
    assert ends(process)


# ---- a pool -----------------------------------------------------------------------------------------


def process_ids(pool: Workers, count: int) -> list[int]:
    return [pool.submit(in_worker(worker_jobs.process_id)).result() for _ in range(count)]


def test_a_pool_keeps_its_workers_and_replaces_those_that_are_used_up() -> None:
    with closing(Workers(3, "run_error", LONG)) as pool:
        assert len(set(process_ids(pool, 5))) == 1
    with closing(Workers(1, "run_error", LONG, uses=2)) as pool:
        first, second, third = process_ids(pool, 3)
        assert first == second != third
        assert ends(first)


@pytest.mark.parametrize("forgiving", [True, False])
def test_a_worker_whose_job_raised_is_kept_where_that_is_harmless(forgiving: bool) -> None:
    with closing(Workers(1, "run_error", LONG, forgiving=forgiving)) as pool:
        (before,) = process_ids(pool, 1)
        failed = pool.submit(in_worker(worker_jobs.fail)).result()
        assert failed.outcome == "run_error"
        (after,) = process_ids(pool, 1)
        assert (after == before) == forgiving


def test_a_crash_costs_its_own_job_only(tmp_path: Path) -> None:
    with closing(Workers(2, "run_error", LONG)) as pool:
        kinds = [worker_jobs.process_id, worker_jobs.crash, worker_jobs.process_id, worker_jobs.leave] * 2
        answers = [job.result() for job in [pool.submit(in_worker(kind)) for kind in kinds]]
    failed = [answer for answer in answers if isinstance(answer, Result)]
    assert failed == [Result("crash", error="the worker process died: Subprocess terminated")] * 4
    assert all(isinstance(answer, int) for answer in answers[::2])


def test_a_job_that_waits_can_be_cancelled(tmp_path: Path) -> None:
    with closing(Workers(1, "run_error", LONG)) as pool:
        running = pool.submit(in_worker(worker_jobs.write_id_and_sleep, str(tmp_path / "pid")))
        waiting = pool.submit(in_worker(worker_jobs.process_id))
        process = written(tmp_path / "pid")
        assert waiting.cancel()
        assert not running.cancel()
        pool.close()
        assert running.result() == INTERRUPTED
    assert ends(process)


def test_closing_ends_everything_at_once(tmp_path: Path) -> None:
    before = {*threading.enumerate()}
    pool = Workers(2, "run_error", 1000)
    jobs = [pool.submit(in_worker(worker_jobs.spawn_and_sleep, str(tmp_path / str(number)))) for number in range(2)]
    jobs += [pool.submit(in_worker(worker_jobs.process_id)) for _ in range(5)]
    processes = [written(tmp_path / str(number)) for number in range(2)]
    pool.close()
    assert [job.result() for job in jobs] == [INTERRUPTED] * 7
    assert all(ends(process) for process in processes)
    assert {*threading.enumerate()} == before
    pool.close()  # does no harm
