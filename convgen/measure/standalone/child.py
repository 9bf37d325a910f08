"""A process for each trial: what it crashes, or uses up, costs that trial only."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from typing import IO, Any, Sequence

from . import LOCATION
from .devices import DEVICES, Cpu
from .errors import OK, TROUBLE, Refused, Trouble
from .facts import pin

#: Runs :func:`main` in an interpreter that finds the standard library and this package, and nothing else.
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from standalone.child import main; sys.exit(main())"
_PR_SET_PDEATHSIG = 1


def answer(job: dict[str, Any], timeout: float, under: Sequence[str] = ()) -> dict[str, Any]:
    """What a process of its own answers to a job; how it ended where that is no answer.

    Args:
        job: ``kind`` (``trial``; ``final`` where several are compared; ``check``: verified only), ``root`` (the
            bundle's folder), ``device``, ``check``, ``layer``, ``trials`` and ``timing`` as the manifest has them,
            ``hopeless``, and ``memory`` (bytes of address space; 0: no limit).
        timeout: seconds after which it is killed.
        under: a command that runs the process, such as a checker of memory.

    Raises:
        Trouble: the system's temporary folder cannot be written.
    """
    command = [*under, sys.executable, "-I", "-S", "-c", _PROGRAM, LOCATION]
    with _temporary_file() as errors:
        # It has a session of its own: Ctrl-C reaches this process only, which ends it and whatever it has started.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        ) as process:
            try:
                output, _ = process.communicate(json.dumps({**job, "parent": os.getpid()}).encode(), timeout)
            except subprocess.TimeoutExpired:
                return {"outcome": "timeout", "error": f"killed after {timeout:.0f} s"}
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        try:
            result: dict[str, Any] = json.loads(output)
            return result
        except ValueError:
            errors.seek(0)
            said = errors.read(1 << 16).decode(errors="replace").strip()[-1000:]
    code = process.returncode
    if code == -signal.SIGKILL:
        return {"outcome": "memory", "error": "killed by the system: memory ran out"}
    why = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return {"outcome": "crash", "error": f"the process died: {why} {said}".strip()}


def _temporary_file() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        hint = "set TMPDIR to a folder that can be written"
        raise Trouble("a temporary file cannot be made: {}; {}".format(error.strerror, hint)) from None


# ---- in the process ------------------------------------------------------------------------------


def main() -> int:
    """Do the job that standard input describes; the answer, a line of JSON, goes to standard output."""
    job = json.load(sys.stdin)
    answers = os.dup(1)
    os.dup2(2, 1)  # what a candidate prints is no answer
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))  # never outlive the parent
    if os.getppid() != job["parent"] and job["kind"] != "check":  # a checker is between them
        return TROUBLE
    is_limited = DEVICES[job["device"]].is_limited
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))  # standard error is a file
    if job["memory"] and is_limited:
        resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
    pin(job["trials"][0]["threads"])
    try:
        result = {"trial": _measure, "final": _compare, "check": _check}[job["kind"]](job)
    except Refused as error:
        result = {"refused": str(error)}
    except MemoryError as error:
        limit = f"expected at most {job['memory']} bytes; " if is_limited else ""
        result = {"outcome": "memory", "error": f"{limit}{error}".rstrip("; ")}
    except Exception as error:  # whatever it raised is this trial's outcome
        result = {"outcome": "run_error", "error": f"{type(error).__name__}: {error}"[-2000:]}
    os.write(answers, json.dumps(result).encode())
    return OK


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    """Verify a candidate, then time it."""
    trial, device = job["trials"][0], _device(job)
    call, output = device.prepare(trial)
    call()
    difference, samples = device.difference(output(), trial["exact"]), []
    if not difference:
        samples = device.time(call, job["timing"], job["hopeless"])
        # A kernel with a race is wrong now and then.
        difference = device.difference(output(), trial["exact"])
    if difference:
        return {"outcome": "wrong", "error": difference}
    return {"outcome": "ok", "samples": samples, "reference": device.reference()}


def _check(job: dict[str, Any]) -> dict[str, Any]:
    """Verify a candidate, each of its buffers memory of its own, whose end a checker knows."""
    trial, device = job["trials"][0], _device(job)
    call, output = device.prepare(trial, apart=True)
    call()
    difference = device.difference(output(), trial["exact"])
    return {"outcome": "wrong", "error": difference} if difference else {"outcome": "ok"}


def _compare(job: dict[str, Any]) -> dict[str, Any]:
    """Time several candidates in turn."""
    device = _device(job)
    calls = [device.prepare(trial)[0] for trial in job["trials"]]
    return {"outcome": "ok", "samples": device.compare(calls, job["timing"])}


def _device(job: dict[str, Any]) -> Cpu:
    return DEVICES[job["device"]](job["root"], job["layer"], job["check"], job["trials"][0]["threads"])
