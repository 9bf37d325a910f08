"""A program in the place of QEMU that runs what it is given, which is for this machine."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest


def take_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine's architecture be emulated by itself."""
    program = folder / "qemu"
    program.write_text('#!/bin/sh\nshift 2 # -cpu max\nexec "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv(f"QEMU_{platform.machine().upper()}", str(program))
