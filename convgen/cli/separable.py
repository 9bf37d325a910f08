"""Commands about a separable problem, which is compiled as the network of its two convolutions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SpecError
from ..problem.separable import SeparableSpec
from .common import FAILED, emit, note, say, table
from .network import say_network, validate_model
from .steps import compiling
from .tune import tune_separable

if TYPE_CHECKING:
    from onnx import ModelProto

    from ..network.network import Network
    from ..records.opening import Records
    from ..report.whole import Bench


def model_of(spec: SeparableSpec, weights: Path | None) -> ModelProto:
    """The problem as a model, with the weights of a file.

    Raises:
        SpecError: the file is none of NumPy's, or arrays in it are wrong.
    """
    import numpy as np

    from ..check.onnx_separable import separable_model

    if weights is None:
        return separable_model(spec)
    try:
        with np.load(weights, allow_pickle=False) as arrays:
            found = dict(arrays)
    except (ValueError, OSError) as error:
        raise SpecError("weights", "a file that numpy.savez writes", str(error), str(weights)) from None
    return separable_model(spec, found)


def show_separable(spec: SeparableSpec, as_json: bool) -> None:
    """What a problem is."""
    parts = {name: part.descriptor for name, part in spec.parts.items()}
    weights = {name: list(shape) for name, shape in spec.parameters.items()}
    between = spec.depthwise.bytes["dst"]
    if as_json:
        emit({"spec": spec.descriptor, "flops": spec.flops, "between": between, "parts": parts, "weights": weights})
        return
    say(f"{spec}\n")
    rows = [[name, part.descriptor, f"{part.flops / 1e9:.4g}"] for name, part in spec.parts.items()]
    say(table(["part", "computes", "GFLOP>"], rows))
    say(f"\n{between / 1024:.4g} KiB are between the two.\n")
    say(table(["weights", "shape"], [[name, "x".join(map(str, shape))] for name, shape in weights.items()]))


def build_separable(
    spec: SeparableSpec,
    options: dict[str, Any],
    records: Records,
    *,
    weights: Path | None,
    strips: int | None,
    seconds: float | None,
    out: Path | None,
    name: str | None,
    libc: str | None,
    check: bool,
    as_json: bool,
) -> int:
    """Compile, validate and export; the exit status.

    Args:
        options: target and threads.
    """
    from ..api import compile as compile_network

    started, folder = time.monotonic(), out or Path("convgen-out", spec.name)
    model = model_of(spec, weights)
    options = {**options, "accuracy": spec.depthwise.accuracy}
    if seconds:
        strips = tune_separable(spec, model, options, records, seconds)
    with compiling(quiet=as_json) as progress:
        network: Network = compile_network(
            model, strips=strips, records=records, name=name or spec.name, progress=progress, **options
        )
    report = network.validate(model) if check else None
    if report is not None and not report.passed:
        failed = next(found for found in report.checks if not found.passed)
        note(f"convgen: {spec}: {failed.name}: {failed.found}")
        return FAILED
    facts: dict[str, Any] = {"spec": spec.descriptor, "parameters": "random" if weights is None else weights.name}
    facts["validation"] = None if report is None else report.to_dict()
    manifest = network.export(folder, facts=facts, libc=libc)
    taken = time.monotonic() - started
    if as_json:
        facts = {"networks": [], "profiles": [], "taken": True, "outside": []}
        emit({"folder": str(folder), "seconds": taken, "manifest": manifest, **facts})
        return 0
    say_network(network, manifest, folder, taken)
    if weights is None:
        note(f"convgen: weights are random; for others give --weights FILE.npz with {', '.join(spec.parameters)}")
    return 0


def validate_separable(spec: SeparableSpec, options: dict[str, Any], seed: int, as_json: bool) -> int:
    """Check what build makes of random weights; the exit status."""
    how = {"accuracy": spec.depthwise.accuracy, "strips": None, "name": spec.name}
    return validate_model(model_of(spec, None), seed, as_json, **how, **options)


def bench_separable(spec: SeparableSpec, bench: Bench, rows: Path | None, report: Path | None, as_json: bool) -> int:
    """Time it beside other libraries, which get it as a model; the exit status."""
    from .whole import bench_whole

    with _file_of(spec) as path:
        return bench_whole([str(path)], {}, bench, rows, report, as_json)


@contextmanager
def _file_of(spec: SeparableSpec) -> Iterator[Path]:
    """The problem as a file, for a while."""
    import onnx

    from ..folders import TemporaryFolder

    with TemporaryFolder() as folder:
        path = folder / f"{spec.name}.onnx"
        onnx.save(model_of(spec, None), path)
        yield path
