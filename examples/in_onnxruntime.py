"""Run a model in ONNX Runtime with what convgen makes of it, beside ONNX Runtime alone: ``in_onnxruntime.py MODEL``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime

import convgen

THREADS = 1


def open_model(model: Path, library: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def milliseconds(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(20):
        started = time.perf_counter()
        session.run(None, inputs)
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


def main(model: Path) -> None:
    with TemporaryDirectory() as folder:
        made = convgen.for_onnxruntime(model, Path(folder, "fast.onnx"), threads=THREADS)
        before, after = open_model(model), open_model(made.model, made.library)
    inputs = {
        value.name: np.random.default_rng(0).standard_normal(value.shape, np.float32) for value in before.get_inputs()
    }
    for wanted, found in zip(before.run(None, inputs), after.run(None, inputs), strict=True):
        print(f"largest difference: {np.abs(wanted - found).max() / np.abs(wanted).max():.1e} of the largest element")
    for node, reason in made.outside.items():
        print(f"ONNX Runtime computes {node}: {reason}")
    alone, together = milliseconds(before, inputs), milliseconds(after, inputs)
    print(f"ONNX Runtime alone {alone:.2f} ms, with convgen {together:.2f} ms")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
