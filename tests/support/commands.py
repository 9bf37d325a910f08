"""Running the command line, and scripts in a Python of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx import parser
from paths import SUPPORT

SMALL = "conv2d n1 ic8 oc16 i10x10 k3x3 s1x1 p1x1 relu"


TINY = "conv1d n1 ic4 oc4 i20 k3 s1 p1"


#: A network of one convolution, as text of ONNX's.
MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[1,3,6,6] x) => (float[1,4,4,4] y)
<float[4,3,3,3] w = {WEIGHTS}> { c = Conv(x, w)  y = Relu(c) }""".replace("WEIGHTS", ", ".join(["0.5"] * 108))


Run = Callable[..., tuple[int, str, str]]


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def run_script(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script that finds the modules beside this one; variables are added to the environment."""
    given = {**os.environ, "PYTHONPATH": str(SUPPORT), **environment}
    return python("-W", "ignore", "-c", textwrap.dedent(code), *arguments, env=given)


def model_file(path: Path, text: str = MODEL) -> Path:
    """A model of that text, written to a file."""
    path.write_bytes(parser.parse_model(text).SerializeToString())
    return path
