"""Programs that tests run; a test whose program is missing is skipped, and says so."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def cmake(*arguments: object, fails: bool = False) -> str:
    """Run CMake; returns what it said on standard error."""
    if (program := shutil.which("cmake")) is None:
        pytest.skip("cmake is not installed")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stderr
