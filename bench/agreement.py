"""Whole networks beside ONNX Runtime: how often the first choice is the same, how far outputs are apart, and memory.

    python bench/agreement.py [--models light_squeezenet,resnet18] [--inputs 1000]

For each model: random inputs through convgen's network and through ONNX Runtime; the validation's largest error as a
share of its bound; the memory that each takes in a process of its own, from before it is loaded to the most while it
runs; and the seconds there from before it is loaded to its first result. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np
import onnxruntime

from bench.command import listed
from bench.networks import NAMES, check_models, network_model
from bench.starting import LOADED, SESSION, start
from convgen.api import compile as compile_network
from convgen.check.reference import open_session
from convgen.folders import TemporaryFolder
from convgen.network.network import Network
from convgen.report.markdown import markdown_table


@dataclass(frozen=True)
class Agreement:
    """What was found of one model.

    Attributes:
        same, inputs: how many inputs had the same first choice, and how many there were.
        apart: the largest difference of an output, relative to the largest element.
        share: the validation's largest error as a share of its bound; its failures, where there are some.
        memory, other_memory: bytes that convgen and ONNX Runtime added to a process.
        first, other_first: seconds until the first result.
    """

    model: str
    same: int
    inputs: int
    apart: float
    share: str
    memory: int
    other_memory: int
    first: float
    other_first: float


def agreement(name: str, inputs: int, folder: Path) -> Agreement:
    """Compile a model and compare."""
    model = network_model(name, folder)
    network = compile_network(model.path, threads=1, dims=model.dims, records=False)
    session = open_session(model.data, 1, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    rng, same, apart = np.random.default_rng(0), 0, 0.0
    for _ in range(inputs):
        given = {key: rng.standard_normal(info.shape, np.float32) for key, info in network.inputs.items()}
        wanted = np.asarray(session.run(list(network.outputs)[:1], given)[0])
        found = network(*given.values())
        first = next(iter(found.values())) if isinstance(found, dict) else found
        same += bool(first.argmax() == wanted.argmax())
        apart = max(apart, float(np.abs(first - wanted).max() / np.abs(wanted).max()))
    report = network.validate(model.path)
    failed = [check.name for check in report.checks if not check.passed]
    own = start(LOADED, _exported(network, folder / f"{name}-exported"), model)
    other = start(SESSION, model.path, model)
    return Agreement(
        model=name,
        same=same,
        inputs=inputs,
        apart=apart,
        share=f"failed: {', '.join(failed)}" if failed else f"{report.worst_error:.1g}",
        memory=own.memory,
        other_memory=other.memory,
        first=own.seconds,
        other_first=other.seconds,
    )


def _exported(network: Network, folder: Path) -> Path:
    network.export(folder)
    return folder


def _row(found: Agreement) -> list[str]:
    memory, other = found.memory / (1 << 20), found.other_memory / (1 << 20)
    choices = f"{found.same} of {found.inputs}"
    sizes, times = (f"{memory:.1f}", f"{other:.1f}"), (f"{found.first:.2f}", f"{found.other_first:.2f}")
    return [found.model, choices, f"{found.apart:.1e}", found.share, *sizes, *times]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--models", type=listed, default=list(NAMES), help="names of bench/networks, or ONNX files")
    parser.add_argument("--inputs", type=int, default=1000, help="random inputs of each model")
    options = parser.parse_args(arguments)
    check_models(parser, options.models)
    rows = []
    with TemporaryFolder() as folder:
        for name in options.models:
            rows.append(_row(agreement(name, options.inputs, folder)))
            print(" ".join(map(str, rows[-1])), file=sys.stderr, flush=True)
    header = [
        "model",
        "same first choice>",
        "largest difference>",
        "of the bound>",
        "memory, MiB>",
        "ONNX Runtime's, MiB>",
        "first result, s>",
        "ONNX Runtime's, s>",
    ]
    print("\n".join(markdown_table((header, rows))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
