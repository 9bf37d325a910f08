"""Unpacking archives as people do on the machine they carry them to."""

from __future__ import annotations

import subprocess
from pathlib import Path


def untar(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder, by the program of the system."""
    subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
