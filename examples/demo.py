"""Generate a kernel for a ResNet-50 layer: tuned, validated, exported to build/demo, called from C.

    make demo

Everything is done by two commands, shown as they run, and a C compiler; ``python_api.py`` beside
this file does the same from Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path("build", "demo")

console = Console(stderr=True, highlight=False)


def convgen(*words: str) -> dict[str, Any]:
    """What a convgen command prints as JSON; its progress shows on the terminal."""
    show("convgen", *words)
    command = [sys.executable, "-m", "convgen", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def show(*words: str) -> None:
    console.print(f"[bold]$ {shlex.join(words)}")


def run_example(folder: Path) -> str:
    """Compile the exported C program, which checks the library against plain loops, and run it."""
    (library,) = folder.glob("lib*.a")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, "-std=c11", "-Wall", "-Werror", "-O2", "-o", "example", "example.c", library.name]
    command += ["-lm", "-lpthread"]
    show("cd", str(folder))
    show(*command)
    subprocess.run(command, cwd=folder, check=True)
    show("./example")
    return subprocess.run(["./example"], cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="A tuned, validated, exported kernel, beside ONNX Runtime.")
    parser.add_argument("spec", nargs="?", default="conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1 relu", help="the layer")
    parser.add_argument("--seconds", default="45", help="tuning time")
    options = parser.parse_args()
    built = convgen("build", options.spec, "--seconds", options.seconds, "--out", str(FOLDER))["layers"][0]
    said = run_example(FOLDER)
    console.print(said)
    timed = convgen("bench", options.spec, "--peers", "onnxruntime")["layers"][0]

    peer = timed["peers"][0]
    low, high = timed["interval"]
    threads = f"{timed['threads']} thread{'s' * (timed['threads'] > 1)}"
    validation = built["validation"]
    rows = {
        "layer": built["spec"],
        "schedule": built["schedule"],
        "picks": " ".join(f"{name}={value}" for name, value in built["picks"].items()),
        "time": f"{timed['seconds'] * 1e6:.1f} µs on {threads}",
        "speed": f"{timed['gflops']:.1f} GFLOP/s",
        "of its limit": f"{timed['percent_of_limit']:.0f} % ({timed['roofline']['limited_by']})",
        f"ONNX Runtime {peer['version']}": f"{peer['seconds'] * 1e6:.1f} µs, same input and threads",
        "ratio": f"{timed['ratio']:.2f}× as fast (95 % interval {low:.2f} to {high:.2f})",
        "error": f"{validation['worst_error']:.3f} of its bound; {len(validation['checks'])} checks passed",
        "library": f"{FOLDER}/lib{built['name']}.so",
    }
    table = Table(show_header=False, title="The kernel")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)
    if built["schedule"] == "cpu_winograd":
        console.print("GFLOP/s count the multiplications of the definition; Winograd needs fewer.")


if __name__ == "__main__":
    main()
