"""All convolutions of a network, one after another: what they take where they are used.

A layer that is repeated alone finds its weights in the caches; in a network it finds them in memory, and its input
where the layer before left it. A :class:`Chain` has that, and nothing of what stands between convolutions: each
instance of a layer has packed weights of its own, and the activations are two buffers used back and forth.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check.data import Arrays, float_data
from ..errors import MeasureError, SpecError, UnsupportedError
from ..formats.entries import SpecEntry
from ..hardware.machine import pinned
from ..kernel.library import Library, aligned
from ..problem.dtypes import BYTES, RANGES, narrow, numpy_dtype, widen
from ..problem.spec import ConvSpec
from .standalone.timing import DUEL_SECONDS, preemptions, repeats, sample
from .trial import load_artifact

#: Standard deviation of a bias: with weights that keep the scale, outputs neither vanish (subnormal numbers take
#: processors a hundred times longer) nor grow, however long the chain.
BIAS_SCALE = 0.5
#: Rounds of a comparison of chains that are too few to tell anything.
FEW = 5


class Chain:
    """A network's convolutions, ready to run one after another; calling it runs all of them once.

    A layer that needs a larger input than the layer before has written reads on in what the buffer held before: only
    sizes matter. The loop over layers, in Python, takes about 0.3 µs of each.

    Attributes:
        layers: one entry per instance, in the order in which they run.
        calls: a function for each of them, which runs it and does nothing else.
        src: the first layer's input; the third layer's input is written over it.

    Args:
        layers: the instances (:func:`convgen.formats.onnx.reader.instances_from_onnx`); an entry that occurs
            several times stands for as many in a row.
        kernels: the kernel of each spec: instances share its code. It may be of another layout or dtype, and is then
            measured on tensors of its own spec.
        threads: of each call; the kernels' own where None.
        seed: of weights and activations.
        parameters: what each instance packs, by name, instead of random numbers.

    Raises:
        SpecError: there are no layers, or an empty batch.
        UnsupportedError: the kernels' dtypes differ, or a spec has no kernel.
        MeasureError: what the chain computes is not finite.
    """

    def __init__(
        self,
        layers: Sequence[SpecEntry],
        kernels: Mapping[ConvSpec, Library],
        threads: int | None = None,
        seed: int = 0,
        parameters: Sequence[Arrays] | None = None,
    ) -> None:
        self.layers = [SpecEntry(layer.spec, 1, _names(layer, i)) for layer in layers for i in range(layer.count)]
        self.kernels = kernels
        chosen = _chosen(self.layers, kernels)
        specs = [kernel.spec for kernel in chosen]
        rng = np.random.default_rng(seed)
        size = max(spec.bytes[name] for spec in specs for name in ("src", "dst"))
        back, forth, residual = (_Buffer(size, specs[0].src_dtype, rng) for _ in range(3))
        # Not of size 0, where an array's address is any.
        workspace = aligned(max(1, *(kernel.sizes(threads).workspace for kernel in chosen)))
        self.src = back.shaped(specs[0].src_shape, specs[0].src_dtype)
        self.calls: list[Callable[[], None]] = []
        for number, (spec, kernel) in enumerate(zip(specs, chosen, strict=True)):
            packed = kernel.pack(**(parameters[number] if parameters else _parameters(spec, seed + number)))
            added = residual.shaped(spec.dst_shape, spec.dst_dtype) if spec.residual else None
            src = back.shaped(spec.src_shape, spec.src_dtype)
            dst = forth.shaped(spec.dst_shape, spec.dst_dtype)
            self.calls.append(kernel.prepare(src, packed, dst, added, workspace, threads))
            back, forth = forth, back
        self._output = back.shaped(specs[-1].dst_shape, specs[-1].dst_dtype)
        self()
        if not np.isfinite(widen(self._output)).all():
            raise MeasureError(f"chain of {len(specs)} layers: expected finite outputs, found others")

    def __call__(self) -> None:
        for call in self.calls:
            call()

    def output(self) -> npt.NDArray[Any]:
        """What the last layer has written."""
        return self._output

    def timed(self) -> list[float]:
        """Run all of them once; seconds of each instance, the clock read between two layers."""
        clock, seconds = time.perf_counter, []
        for call in self.calls:
            start = clock()
            call()
            seconds.append(clock() - start)
        return seconds

    def instance_seconds(self, rounds: int = 7) -> list[float]:
        """Seconds of each instance within the chain: medians over ``rounds`` runs of all."""
        return [statistics.median(taken) for taken in zip(*(self.timed() for _ in range(rounds)), strict=True)]

    def warm_seconds(self, samples: int = 5) -> dict[ConvSpec, float]:
        """Seconds of each spec where its first instance alone is repeated, its weights in the caches."""
        seconds = {}
        for layer, call in zip(self.layers, self.calls, strict=True):
            if layer.spec not in seconds:
                count = repeats(call, DUEL_SECONDS)
                seconds[layer.spec] = statistics.median(sample(call, count) for _ in range(samples))
        return seconds


def _names(layer: SpecEntry, index: int) -> tuple[str, ...]:
    """The name of an entry's ``index``-th occurrence, where it has one."""
    return layer.names[index : index + 1]


def _chosen(layers: Sequence[SpecEntry], kernels: Mapping[ConvSpec, Library]) -> list[Library]:
    """The kernel of each instance."""
    if not layers:
        raise SpecError("layers", "at least one convolution", "none")
    for layer in layers:
        if layer.spec not in kernels:
            raise UnsupportedError(f"kernels: expected one for {layer.spec.descriptor}, found none")
    chosen = [kernels[layer.spec] for layer in layers]
    dtypes = sorted({kernel.spec.dtype for kernel in chosen})
    if len(dtypes) > 1:
        raise UnsupportedError(f"kernels: expected one dtype, as they share buffers, found {', '.join(dtypes)}")
    for kernel in chosen:
        if kernel.spec.n == 0:
            raise SpecError("n", "a batch of at least 1 to time", 0, kernel.spec.descriptor)
    return chosen


class _Buffer:
    """Memory that layers write and read, of any shape and type up to ``size`` bytes."""

    def __init__(self, size: int, dtype: str, rng: np.random.Generator) -> None:
        self._bytes = aligned(size)
        elements = self.shaped((size // BYTES[dtype],), dtype)
        if dtype in RANGES:
            elements[:] = rng.integers(*RANGES[dtype], elements.size, endpoint=True)
        else:
            elements[:] = rng.standard_normal(elements.size, np.float32)

    def shaped(self, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        return self._bytes[: math.prod(shape) * BYTES[dtype]].view(numpy_dtype(dtype)).reshape(shape)


def _parameters(spec: ConvSpec, seed: int) -> Arrays:
    """An instance's parameters. Floats are such that outputs have about the scale of inputs."""
    if spec.dtype == "i8":
        return {name: array for name, array in float_data(spec, seed).items() if name in spec.parameters}
    scales = {"weights": spec.reduction_length**-0.5, "bias": BIAS_SCALE, "slope": BIAS_SCALE}
    rng, shapes = np.random.default_rng(seed), spec.shapes
    return {
        name: narrow(np.float32(scales[name]) * rng.standard_normal(shapes[name], np.float32), spec.dtype)
        for name in spec.parameters
    }


# ---- in a worker ------------------------------------------------------------------------------


def run_chains(
    order: Sequence[str], choices: Sequence[Mapping[str, str]], threads: int, rounds: int, limit: float
) -> list[list[list[float]]]:
    """Time a network with several choices of kernels, taken in turn on CPUs of their own: of each choice, round by
    round, the seconds of each instance.

    A round in which another program got one of the CPUs is taken again, at most ``rounds`` times in all.

    Args:
        order: the instances' descriptors as they run.
        choices: each layer's library (see :mod:`convgen.measure.trial`), by its descriptor.
        limit: seconds that the rounds may take: of a slow network there are fewer.

    Raises:
        MeasureError: there is no time for a few rounds.
    """
    layers = [SpecEntry(ConvSpec.parse(text)) for text in order]
    with pinned(threads):
        chains = [
            Chain(layers, {ConvSpec.parse(text): load_artifact(path, threads)[0] for text, path in choice.items()})
            for choice in choices
        ]
        start = time.perf_counter()
        for chain in chains:
            chain()
        once = time.perf_counter() - start
        rounds = min(rounds, int(limit / once))
        if rounds < FEW:
            raise MeasureError(f"chain: expected {FEW} rounds within {limit:.0f} s, found one to take {once:.1f} s")
        samples: list[list[list[float]]] = [[] for _ in chains]
        again = min(rounds, int(limit / once) - rounds)
        while len(samples[0]) < rounds:
            # Back and forth: nobody always follows the same neighbour.
            turns = list(enumerate(chains))[:: 1 if len(samples[0]) % 2 == 0 else -1]
            before = preemptions()
            taken = {number: chain.timed() for number, chain in turns}
            if preemptions() != before and again:
                again -= 1
                continue
            for number, seconds in taken.items():
                samples[number].append(seconds)
    return samples
