"""Candidates for a GPU under NVIDIA's compute-sanitizer, which sees accesses out of bounds and races.

Source: "Compute Sanitizer" of the CUDA Toolkit's documentation; its last line counts what a tool found.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from typing import Any

from .child import answer

TOOLS = ("memcheck", "racecheck", "synccheck")
#: Where the CUDA Toolkit puts it, if not on the path.
_PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")
_SUMMARY = re.compile(r"SUMMARY: (\d+) (?:error|hazard)")


def find() -> str:
    """The program's path; empty where there is none."""
    return shutil.which("compute-sanitizer") or next((place for place in _PLACES if os.path.exists(place)), "")


def sanitized(program: str, tool: str, job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """What a tool finds in a job of kind ``check``.

    Returns:
        ``found``: how many errors, None where the tool itself does not run here; ``said``: its last lines, or why.
    """
    with tempfile.TemporaryDirectory(dir=job["root"]) as folder:
        log = os.path.join(folder, "log")
        ended = answer(job, timeout, [program, "--tool", tool, "--log-file", log])
        text = ""
        if os.path.exists(log):
            with open(log, errors="replace") as file:
                text = file.read().strip()
    count = _SUMMARY.search(text)
    if count is None:
        said = text or ended.get("refused") or ended.get("error", "")
        return {"found": None, "said": f"{ended.get('outcome', 'refused')}: {said}"[-1000:]}
    return {"found": int(count[1]), "said": text[-1000:] if int(count[1]) else ""}
