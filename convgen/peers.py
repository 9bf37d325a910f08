"""The libraries convgen is measured against, each used as its users would for speed.

Constant weights, converted beforehand; the same data; the same number of threads; output allocated
once where the library takes one. A peer is timed only after its output agrees with ONNX Runtime's.
"""

from __future__ import annotations

import importlib.metadata
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .errors import SpecError, UnsupportedError
from .library import Library
from .measure import repeats, sample
from .sandbox import Arrays
from .spec import ConvSpec
from .validate import float_data, reference, tolerance, worst

F32 = npt.NDArray[np.float32]

#: Pause in seconds before another library's turn: the last one's idle threads spin for up to 0.2 s.
REST = 0.35
#: Samples a turn takes, and their length in seconds.
SAMPLES, SAMPLE_SECONDS = 5, 5e-3
#: Seconds a turn runs before its first sample, to wake threads and fill caches.
WARM_UP = 0.02


@dataclass(frozen=True)
class Entrant:
    """One way to run a layer.

    ``run`` runs it and nothing else; ``output`` is what it computed last, of ``spec.dst_shape``.
    ``context`` is entered around all runs of a turn. ``way`` tells a library's several ways apart.
    """

    way: str
    run: Callable[[], Any]
    output: Callable[[], F32]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Peer(ABC):
    """A library that runs convolutions."""

    name: ClassVar[str]
    package: ClassVar[str]

    @classmethod
    def version(cls) -> str | None:
        """The installed version; None where it is not installed."""
        try:
            return importlib.metadata.version(cls.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    @abstractmethod
    def entrants(self, spec: ConvSpec, data: Arrays, threads: int) -> list[Entrant]:
        """The ways to run the layer on ``data``; the fastest of them counts.

        Raises:
            Exception: of the library's own kinds, where it cannot run this layer.
        """


class OnnxRuntime(Peer):
    """ONNX Runtime: a session with full graph optimisation, inputs and output bound."""

    name, package = "onnxruntime", "onnxruntime"

    def entrants(self, spec: ConvSpec, data: Arrays, threads: int) -> list[Entrant]:
        from .reference import OrtReference

        prepared = OrtReference(spec, **data, threads=threads)
        return [Entrant("", prepared, lambda: prepared.output)]


class Torch(Peer):
    """PyTorch in inference mode, on oneDNN: contiguous tensors and, where there is one, the
    channels-last format that its documentation recommends. The activation overwrites the
    convolution's output.
    """

    name, package = "torch", "torch"

    def entrants(self, spec: ConvSpec, data: Arrays, threads: int) -> list[Entrant]:
        import torch

        torch.set_num_threads(threads)
        last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(spec.rank)
        formats = [("channels last", last)] if last else []
        if spec.layout == "nchw" or not last:
            formats.insert(0, ("contiguous", torch.contiguous_format))
        return [self._entrant(spec, data, label, form) for label, form in formats]

    def _entrant(self, spec: ConvSpec, data: Arrays, way: str, form: Any) -> Entrant:
        import torch

        # An NHWC array is a channels-last tensor as it lies in memory.
        order = (0, spec.rank + 1, *range(1, spec.rank + 1)) if spec.layout == "nhwc" else tuple(range(spec.rank + 2))
        back = tuple(int(axis) for axis in np.argsort(order))

        def tensor(name: str) -> Any:
            array = data.get(name)
            if array is None:
                return None
            shared = torch.from_numpy(array)
            if name in ("src", "residual"):
                shared = shared.permute(order)
            return shared.contiguous(memory_format=form) if shared.dim() > 1 else shared

        src, residual = tensor("src"), tensor("residual")
        convolve = self._convolution(spec, tensor("weights"), tensor("bias"))
        activate = self._activation(spec, tensor("slope"))
        result: list[Any] = [None]

        def run() -> None:
            dst = convolve(src)
            if residual is not None:
                dst.add_(residual)
            result[0] = activate(dst)

        return Entrant(way, run, lambda: np.ascontiguousarray(result[0].permute(back).numpy()), torch.inference_mode)

    def _convolution(self, spec: ConvSpec, weights: Any, bias: Any) -> Callable[[Any], Any]:
        import torch

        functional = torch.nn.functional
        even = [min(pair) for pair in spec.padding]
        rest = [(begin - p, end - p) for (begin, end), p in zip(spec.padding, even, strict=True)]
        if not spec.transposed:
            conv = getattr(functional, f"conv{spec.rank}d")
            args = (weights, bias, spec.stride, even, spec.dilation, spec.groups)
            if not any(map(any, rest)):
                return lambda src: conv(src, *args)
            pad = [amount for pair in reversed(rest) for amount in pair]
            return lambda src: conv(functional.pad(src, pad), *args)
        transposed = getattr(functional, f"conv_transpose{spec.rank}d")
        options = (weights, bias, spec.stride, even, spec.output_padding, spec.groups, spec.dilation)
        if not any(map(any, rest)):
            return lambda src: transposed(src, *options)
        crop = (slice(None), slice(None), *(slice(begin, -end or None) for begin, end in rest))
        return lambda src: transposed(src, *options)[crop].contiguous()

    def _activation(self, spec: ConvSpec, slope: Any) -> Callable[[Any], Any]:
        import torch

        functional = torch.nn.functional
        name, p = spec.activation_op.name, spec.activation_op.params
        bounds = [None if np.isinf(value) else value for value in p]
        table: dict[str, Callable[[Any], Any]] = {
            "none": lambda y: y,
            "relu": torch.relu_,
            "leaky_relu": lambda y: functional.leaky_relu_(y, p[0]),
            "prelu": lambda y: functional.prelu(y, slope),
            "clip": lambda y: y if bounds == [None, None] else y.clamp_(*bounds),
            "sigmoid": torch.sigmoid_,
            "tanh": torch.tanh_,
            "silu": lambda y: functional.silu(y, inplace=True),
            "mish": lambda y: functional.mish(y, inplace=True),
            "hardswish": lambda y: functional.hardswish(y, inplace=True),
            "hardsigmoid": lambda y: y.mul_(p[0]).add_(p[1]).clamp_(0, 1),
            "elu": lambda y: functional.elu_(y, p[0]),
            "gelu": functional.gelu,
            "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
        }
        if name not in table:
            raise UnsupportedError(f"activation: expected one torch is asked for, found {name}")
        return table[name]


class OpenVino(Peer):
    """OpenVINO: the layer's ONNX model compiled for latency in f32, tensors shared."""

    name, package = "openvino", "openvino"

    def entrants(self, spec: ConvSpec, data: Arrays, threads: int) -> list[Entrant]:
        import openvino

        from .onnx_model import onnx_model

        model = onnx_model(spec, *(data.get(name) for name in ("weights", "bias", "slope")))
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = openvino.Core()
        request = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options).create_infer_request()
        output = np.empty(spec.dst_shape, np.float32)
        inputs = {name: data[name] for name in ("src", "residual") if name in data}
        for name, array in inputs.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        request.set_tensor("dst", openvino.Tensor(output, shared_memory=True))

        def run(_memory: object = inputs) -> None:
            request.infer(share_outputs=True)

        return [Entrant("", run, lambda: output)]


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (OnnxRuntime, Torch, OpenVino)}


# ---- comparing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """How a kernel or a peer did: ``seconds`` per call, the median of ``rounds``; or the ``problem``
    why it was not timed. ``way`` is a peer's fastest of several.
    """

    name: str
    version: str | None
    way: str = ""
    seconds: float | None = None
    rounds: tuple[float, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Comparison:
    """A layer's times side by side.

    ``ratio`` is the best peer's time over the kernel's, above 1 where the kernel is faster, and
    ``interval`` its 95 % confidence interval; None where no peer was timed.
    """

    spec: str
    threads: int
    flops: int
    kernels: tuple[Timing, ...]
    peers: tuple[Timing, ...]
    ratio: float | None
    interval: tuple[float, float] | None

    @property
    def best_peer(self) -> Timing | None:
        return _fastest(self.peers)

    def to_dict(self) -> dict[str, Any]:
        best = self.best_peer
        return asdict(self) | {"best_peer": best.name if best else None}


def compare(
    kernels: Mapping[str, Library],
    peers: Sequence[str],
    threads: int,
    *,
    rounds: int = 7,
    seed: int = 0,
    rest: float = REST,
) -> Comparison:
    """Time kernels of one spec and peers, in turn, several times over.

    Args:
        kernels: by the name to report; the first is the one that ratios are about.
        peers: names in :data:`PEERS`.
        rounds: turns each of them gets.
        seed: of the data.
        rest: pause before each turn, in seconds.

    Raises:
        SpecError: the spec's batch is empty: there is nothing to time.
        UnsupportedError: no such peer, or another dtype than f32.
    """
    spec = next(iter(kernels.values())).spec
    if spec.n == 0:
        raise SpecError("n", "a batch of at least 1 to time", 0, spec.descriptor)
    if spec.dtype != "f32":
        raise UnsupportedError(f"{spec.descriptor}: expected an f32 layer to compare, found {spec.dtype}")
    data = float_data(spec, seed)
    expected = reference(spec, data, threads)
    # Another algorithm in a peer is no reason not to time it.
    bound = tolerance(spec.with_(accuracy="relaxed"), data, threads)

    found: dict[str, Timing] = {}
    ready = [(name, _kernel_entrant(kernel, data, threads)) for name, kernel in kernels.items()]
    for name in peers:
        peer = find_peer(name)
        version = peer.version()
        if version is None:
            found[name] = Timing(name, None, problem='not installed; get it with: pip install "convgen[peers]"')
            continue
        try:
            entrants = peer().entrants(spec, data, threads)
            for entrant in entrants:
                _check(entrant, expected, bound)
        except Exception as error:  # a peer's failures are of its own kinds, and part of the answer
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            found[name] = Timing(name, version, problem=first[:200])
        else:
            ready += [(name, entrant) for entrant in entrants]

    for (name, entrant), times in zip(ready, _turns([entrant for _, entrant in ready], rounds, rest), strict=True):
        version = _own_version() if name in kernels else PEERS[name].version()
        timing = Timing(name, version, entrant.way, statistics.median(times), tuple(times))
        if name not in found or (timing.seconds or 0.0) < (found[name].seconds or 0.0):
            found[name] = timing

    own = tuple(found[name] for name in kernels)
    others = tuple(found[name] for name in dict.fromkeys(peers))
    ratio = interval = None
    if best := _fastest(others):
        ratio = statistics.median(best.rounds) / statistics.median(own[0].rounds)
        interval = ratio_interval(best.rounds, own[0].rounds)
    return Comparison(spec.descriptor, threads, spec.flops, own, others, ratio, interval)


def _fastest(timings: Sequence[Timing]) -> Timing | None:
    return min((t for t in timings if t.seconds), key=lambda timing: timing.seconds or 0.0, default=None)


def _check(entrant: Entrant, expected: F32, bound: F32) -> None:
    """Run once, and raise UnsupportedError unless the output is right."""
    with entrant.context():
        entrant.run()
        error = worst(np.abs(entrant.output() - expected), bound)
    if not error <= 1:
        raise UnsupportedError(f"wrong output: its error is {error:.3g} of the bound")


def find_peer(name: str) -> type[Peer]:
    """The peer of that name.

    Raises:
        UnsupportedError: there is none.
    """
    if name not in PEERS:
        raise UnsupportedError(f"peers: expected some of {', '.join(PEERS)}, found {name!r}")
    return PEERS[name]


def _kernel_entrant(kernel: Library, data: Arrays, threads: int) -> Entrant:
    packed = kernel.pack(data["weights"], data.get("bias"), data.get("slope"))
    dst = np.empty(kernel.spec.dst_shape, np.float32)
    call = kernel.prepare(data["src"], packed, dst, data.get("residual"), threads=threads)
    return Entrant("", call, lambda: dst)


def _own_version() -> str:
    return importlib.metadata.version("convgen")


def _turns(entrants: Sequence[Entrant], rounds: int, rest: float) -> list[list[float]]:
    """Seconds per call of each entrant in each round."""
    taken: list[list[float]] = [[] for _ in entrants]
    for turn in range(rounds):
        order = range(len(entrants))
        # Back and forth: nobody always follows the same neighbour.
        for index in order if turn % 2 == 0 else reversed(order):
            entrant = entrants[index]
            time.sleep(rest)
            with entrant.context():
                end = time.perf_counter() + WARM_UP
                count = repeats(entrant.run, SAMPLE_SECONDS)
                while time.perf_counter() < end:
                    entrant.run()
                samples = [sample(entrant.run, count) for _ in range(SAMPLES)]
            taken[index].append(statistics.median(samples))
    return taken


def ratio_interval(above: Sequence[float], below: Sequence[float], *, draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of ``median(above) / median(below)``; the rounds are drawn in pairs."""
    rng = random.Random(0)
    pairs = list(zip(above, below, strict=True))
    ratios = []
    for _ in range(draws):
        drawn = rng.choices(pairs, k=len(pairs))
        ratios.append(statistics.median(a for a, _ in drawn) / statistics.median(b for _, b in drawn))
    ratios.sort()
    return ratios[round(0.025 * (draws - 1))], ratios[round(0.975 * (draws - 1))]
