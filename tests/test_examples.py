"""The examples run as they stand, in a folder of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from paths import ROOT

EXAMPLES = ROOT / "examples"


def test_the_demo_ends_with_a_kernel_and_its_time_beside_onnx_runtime(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "conv2d n1 ic4 oc8 i8x8 k3x3 p1x1 relu", "--seconds", "1"]
    environment = {**os.environ, "CONVGEN_RECORDS": str(tmp_path / "records.sqlite"), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (library,) = (tmp_path / "build" / "demo").glob("lib*.so")
    assert library.name in done.stdout
    assert re.search(r"of its limit\W+\d+ %", done.stdout)
    assert re.search(r"ratio\W+[\d.]+× as fast \(95 % interval [\d.]+ to [\d.]+\)", done.stdout)
