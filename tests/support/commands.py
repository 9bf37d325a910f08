"""Running the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

SMALL = "conv2d n1 ic8 oc16 i10x10 k3x3 s1x1 p1x1 relu"


TINY = "conv1d n1 ic4 oc4 i20 k3 s1 p1"


Run = Callable[..., tuple[int, str, str]]


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
