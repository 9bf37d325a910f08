"""A library to attack."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from paths import SUPPORT

from convgen.problem.spec import ConvSpec

SPEC = ConvSpec.parse("conv2d n2 ic3 oc5 i20x20 k3x3 p1 relu residual")


PROGRAM = SUPPORT / "library_attack.c"


WARNINGS = ("-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-pthread")


def succeed(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout
