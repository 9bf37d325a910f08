"""Commands that see other file systems than the tests do."""

from __future__ import annotations

import os
import subprocess
import tempfile

import pytest


def mounted(options: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose TMPDIR is a file system of its own, with these options of ``mount``."""
    with tempfile.TemporaryDirectory() as at:
        return _run(f"mount -t tmpfs -o {options} tmpfs {at} && export TMPDIR={at}", command)


def read_only(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that can write to no file system but a new one, where TMPDIR and OUT are folders.

    Its home, caches and working directory are where it cannot.
    """
    with tempfile.TemporaryDirectory() as at:
        home = "export HOME=/nowhere XDG_CACHE_HOME=/nowhere/cache; unset CONVGEN_RECORDS; cd /"
        own = f"mount -t tmpfs tmpfs {at} && mkdir {at}/tmp {at}/out && export TMPDIR={at}/tmp OUT={at}/out"
        return _run(f"{own} && mount -o remount,bind,ro / && {home}", command)


def _run(setup: str, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run a command after commands of the shell that only it sees what is mounted by."""
    space = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*space, "sh", "-c", setup], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    script = f'{setup} && exec "$@"'
    return subprocess.run([*space, "sh", "-c", script, "sh", *command], capture_output=True, text=True, check=False)
