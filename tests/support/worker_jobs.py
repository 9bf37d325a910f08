"""Functions for worker processes to run in tests; they are named by file, because workers cannot import tests."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from convgen.errors import BuildError
from convgen.processes import call_in_file

if TYPE_CHECKING:  # what is heavy is imported by the jobs that need it: to load this file is part of each one's time
    from convgen.measure.trial import CandidateModule


def in_worker(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """One of the functions below as workers can run it; they get these arguments and those of the job."""
    return partial(call_in_file, __file__, function.__name__, *arguments)


# ---- jobs that end in all ways ------------------------------------------------------------------


def process_id(*_: object) -> int:
    return os.getpid()


def sleep(*_: object) -> None:
    time.sleep(1000)


def write_id_and_sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(1000)


def spawn_and_sleep(path: str) -> None:
    """Start a process, as a compiler's driver does, and wait for ever."""
    child = subprocess.Popen(["sleep", "1000"])
    Path(path).write_text(str(child.pid))
    child.wait()


def crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(*_: object) -> None:
    os._exit(3)


def fail(*_: object) -> None:
    raise ValueError("planted")


def fail_to_build(*_: object) -> None:
    raise BuildError("planted")


def answer_with_a_lambda(*_: object) -> Any:
    return lambda: None


def ask_for_all_memory(*_: object) -> bytearray:
    return bytearray(1 << 60)


def eat_memory(*_: object) -> None:
    """Take it page by page, in code that is not Python's."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    while True:
        libc.memset(ctypes.c_void_p(libc.malloc(1 << 24)), 1, 1 << 24)


def facts(*_: object) -> dict[str, Any]:
    """What a worker is, and what it can see."""
    import sys

    return {
        "path": sys.path,
        "main": getattr(sys.modules["__main__"], "__file__", ""),
        "group": os.getpgrp(),
        "input": os.fstat(0).st_rdev == os.stat(os.devnull).st_rdev,
    }


# ---- builds with a fault planted ------------------------------------------------------------------

#: C statements of a kernel that does not compute the layer -> the outcome of its trial.
BODIES = {
    "crash": "*(volatile int *)0 = 1;",
    "timeout": "for (volatile int i = 0;;) i = 0;",
    "wrong": "",  # dst stays NaN
    "run_error": "return -1;",
}


def build_with_fault(outcome: str, module: CandidateModule, root: str) -> str:
    """Build a candidate whose trial ends as told: with a kernel in C, or not at all."""
    from convgen.lowering.lower import compile_object
    from convgen.measure.trial import build_artifact

    def replaced(lowered: Any, path: Path) -> Any:
        workspace = compile_object(lowered, path)
        text = "int __tvm_ffi_pack(void *s, void *a, int n, void *r) { return 0; }"
        text += f"int __tvm_ffi_main(void *s, void *a, int n, void *r) {{ {BODIES[outcome]} return 0; }}"
        path.with_suffix(".c").write_text(text)
        subprocess.run(["cc", "-fPIC", "-w", "-c", path.with_suffix(".c"), "-o", path], check=True)
        return workspace

    if outcome == "build_error":
        raise RuntimeError("planted")
    if outcome not in BODIES:
        return build_artifact(module, root)
    with mock.patch("convgen.kernel.kernel.compile_object", replaced):
        return build_artifact(module, root)


def build_spilling(module: CandidateModule, root: str) -> str:
    """Build a candidate for a GPU with a compiler that has few registers."""
    from convgen.cuda.code import compile_images
    from convgen.measure.trial import build_artifact

    def spilling(source: Any, target: Any) -> Any:
        images, resources = compile_images(source, target)
        return images, tuple(replace(resource, spilled=16) for resource in resources)

    with mock.patch("convgen.measure.gpu.compile_images", spilling):
        return build_artifact(module, root)
