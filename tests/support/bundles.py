"""Bundles for tests: run by a bare interpreter, with kernels planted and results forged."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import planted

from convgen.lowering import link
from convgen.lowering.interface import Interface
from convgen.measure.standalone.results import digest
from convgen.tuning.bundle import trial_id

#: An interpreter that finds nothing but the standard library, in an environment without variables.
BARE = (sys.executable, "-I", "-S")


def run(folder: Path, *arguments: object, status: int = 0) -> str:
    command = [*BARE, str(folder / "run.py"), *map(str, arguments)]
    done = subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, values: list[dict[str, Any]]) -> None:
    """Results as a forger would write them: with digests that are right."""
    run_digest = ""
    text = ""
    for i, line in enumerate(values):
        line = {**line, "run": run_digest} if i else dict(line)
        line["digest"] = digest(line)
        run_digest = run_digest or line["digest"]
        text += json.dumps(line) + "\n"
    path.write_text(text)


def kernel(folder: Path, workspace: int = 0, **statements: str) -> Path:
    """A library with the kernel in C, with a bug or without."""
    folder.mkdir()
    plain = planted.interface()
    interface = Interface("planted", planted.SPEC, plain.packed, workspace, 64, ())
    text = planted.SOURCE.format(**{"store": "t.dst[at] = v", "before": "", **statements})
    return link.link(interface, planted.compile_c(text, folder / "kernel.o"), folder / "libplanted.so")


def plant(folder: Path, libraries: dict[str, Path]) -> dict[str, str]:
    """Replace a bundle's trials by one per library; returns the keys by name."""
    manifest = json.loads((folder / "manifest.json").read_text())
    pattern = manifest["trials"][0]
    trials, keys = [], {}
    for name, path in libraries.items():
        shutil.copy(path, folder / "lib" / f"{name}.so")
        trial = {**pattern, "schedule": name, "default": name == "right", "name": "planted", "exact": True}
        trial |= {"library": f"lib/{name}.so", "library_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        trial["key"] = keys[name] = trial_id(trial)
        manifest["files"][trial["library"]] = trial["library_sha256"]
        trials.append(trial)
    manifest["trials"] = trials
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return keys
