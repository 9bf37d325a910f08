"""What computing depthwise and 1×1 convolutions tile by tile in the cache could save of a network, at most.

    python bench/in_cache.py mobilenet_v2 efficientnet_b0

Each such step whose input and output are larger than the L2 cache is timed in its network, and alone on so few rows
that all lies in L2, scaled by the rows. Prints both, and the sum of what is saved as a share of the network.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np

from bench.networks import network_model
from convgen.api import build
from convgen.api import compile as compile_network
from convgen.check.data import float_data
from convgen.folders import TemporaryFolder
from convgen.hardware.machine import pinned
from convgen.kernel.kernel import CpuKernel
from convgen.kernel.library import aligned
from convgen.measure.standalone.timing import repeats, sample
from convgen.network.network import Network
from convgen.network.plan import Product
from convgen.problem.spec import ConvSpec

#: The share of L2 that input and output of a few rows take at most.
SHARE = 0.4
#: Samples, of which the fastest counts, and the seconds of each.
SAMPLES, SAMPLE_SECONDS = 7, 2e-3


def seconds_in_cache(spec: ConvSpec, l2: int) -> float:
    """Seconds of a layer whose input and output were in L2."""
    moved = spec.bytes["src"] + spec.bytes["dst"]
    rows = max(spec.kernel[0], math.ceil(spec.in_spatial[0] * min(1.0, SHARE * l2 / moved)))
    few = spec.with_(in_spatial=(rows, *spec.in_spatial[1:]))
    kernel, data = build(few, threads=1, records=False), float_data(few, 0)
    assert isinstance(kernel, CpuKernel)
    packed = kernel.pack(**{name: data[name] for name in few.parameters})
    workspace, dst = aligned(max(1, kernel.sizes(1).workspace)), np.empty(few.dst_shape, np.float32)
    call = kernel.prepare(data["src"], packed, dst, data.get("residual"), workspace, 1)
    call()
    count = repeats(call, SAMPLE_SECONDS)
    fastest: float = min(sample(call, count) for _ in range(SAMPLES))
    return fastest * spec.out_spatial[0] / few.out_spatial[0]


def could_gain(spec: ConvSpec, l2: int) -> bool:
    """Whether it is one of these layers, and does not lie in L2 as it is."""
    is_one = spec.rank == 2 and (spec.groups > 1 or spec.kernel == (1, 1))
    return is_one and spec.bytes["src"] + spec.bytes["dst"] > SHARE * l2 * 2


def savings(network: Network) -> float:
    """The share of a network's time that could be saved; prints each step."""
    l2 = network.target.l2
    with pinned(1):
        taken = [min(times) for times in zip(*(network.profile() for _ in range(3)), strict=True)]
        saved = 0.0
        for step, now in zip(network.plan.steps, taken, strict=True):
            if isinstance(step.function, Product) and could_gain(step.function.spec, l2):
                cached = seconds_in_cache(step.function.spec, l2)
                saved += max(0.0, now - cached)
                print(f"{1e6 * now:6.0f} µs, {1e6 * cached:6.0f} µs in L2: {step.function.spec.descriptor}")
    share: float = saved / sum(taken)
    return share


def main(names: list[str]) -> None:
    with TemporaryFolder() as folder:
        for name in names:
            model = network_model(name, folder)
            share = savings(compile_network(model.path, threads=1, dims=model.dims, records=False))
            print(f"{name}: at most {share:.1%} could be saved")


if __name__ == "__main__":
    main(sys.argv[1:] or ["mobilenet_v2"])
