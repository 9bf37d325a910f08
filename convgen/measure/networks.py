"""Other libraries on whole models: what a model takes there, and what of it its convolutions take.

Each is used as its users would for speed, and timed only after its outputs agree with those of ONNX Runtime
without optimisations. What a library's convolutions take inside the model is in its own profile
(:mod:`convgen.measure.profiles`), of sessions that are opened for a turn and closed again.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check.reference import open_session
from ..errors import MeasureError, UnsupportedError
from ..folders import TemporaryFolder
from .chain import Chain
from .compare import REST, Contestant, ratio_interval, take_turns
from .peers import Entrant, OnnxRuntime, OpenVino
from .profiles import Profile, median_profile, onnxruntime_profiles, openvino_profile

Array = npt.NDArray[Any]

#: What outputs may differ by, relative to the largest, where a library computes in f32 and where it chooses.
F32_ERROR, CHOSEN_ERROR = 1e-3, 0.2
#: Runs of a session that profiles: before what counts, and those that count.
BEFORE, COUNTED = 3, 5

#: What a part of a comparison is about.
MODEL, CONVOLUTIONS = "model", "convolutions"


@dataclass(frozen=True)
class NetworkModel:
    """A model to run, with its inputs.

    Attributes:
        path: the ONNX file.
        dims: sizes of symbolic dimensions.
        module: makes the PyTorch module that the file is from; None where there is none.
        seed: of the inputs.
    """

    path: Path
    dims: Mapping[str, int] = field(default_factory=dict)
    module: Callable[[], Any] | None = None
    seed: int = 0

    @cached_property
    def data(self) -> bytes:
        return self.path.read_bytes()

    @cached_property
    def inputs(self) -> dict[str, Array]:
        """Standard normal arrays, by name.

        Raises:
            UnsupportedError: an input that is no f32 tensor, or a dimension whose size is not known.
        """
        rng = np.random.default_rng(self.seed)
        arrays = {}
        for info in _plain_session(self.data).get_inputs():
            shape = [self.dims.get(str(size), size) for size in info.shape]
            if info.type != "tensor(float)" or not all(isinstance(size, int) for size in shape):
                raise UnsupportedError(
                    f"{self.path.name}: {info.name}: expected an f32 tensor of known shape, found {info.type} {shape}"
                )
            arrays[info.name] = rng.standard_normal(shape, np.float32)
        return arrays

    @cached_property
    def expected(self) -> dict[str, Array]:
        """The outputs by name, from ONNX Runtime without optimisations.

        Raises:
            MeasureError: they are not finite: other libraries could not be checked, and may be timed on slow numbers.
        """
        session = _plain_session(self.data)
        names = [info.name for info in session.get_outputs()]
        outputs = dict(zip(names, map(np.asarray, session.run(names, self.inputs)), strict=True))
        for name, array in outputs.items():
            if not np.isfinite(array).all():
                raise MeasureError(f"{self.path.name}: {name}: expected finite outputs, found others")
        return outputs

    def error(self, outputs: Sequence[Array]) -> float:
        """The largest difference from the expected outputs, relative to the largest element of each."""
        worst = 0.0
        for found, array in zip(outputs, self.expected.values(), strict=True):
            if found.size != array.size:
                raise UnsupportedError(f"output: expected {array.size} elements, found {found.size}")
            scale = float(np.abs(array).max()) or 1.0
            difference = float(np.abs(found.reshape(-1).astype(np.float32) - array.reshape(-1)).max())
            worst = max(worst, difference / scale)
        return worst


@dataclass
class Part:
    """A library's way of running a model, or the convolutions of it.

    Attributes:
        library, version: whose.
        what: ``model`` or ``convolutions``.
        precision: what it computes in: ``f32``, ``bf16`` ….
        seconds: the median of ``rounds``; None where there was a ``problem``.
        error: of its outputs (:meth:`NetworkModel.error`).
        profiles: one for each round, of ``convolutions``.
    """

    library: str
    version: str | None
    what: str = MODEL
    precision: str = "f32"
    problem: str = ""
    error: float | None = None
    contestant: Contestant | None = None
    profiles: list[Profile] = field(default_factory=list)

    @property
    def rounds(self) -> list[float]:
        return self.contestant.rounds if self.contestant else []

    @property
    def seconds(self) -> float | None:
        return statistics.median(self.rounds) if self.rounds else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can say it."""
        names = ("library", "version", "what", "precision", "problem", "error", "seconds", "rounds")
        values = {name: getattr(self, name) for name in names}
        if self.profiles:
            values["profile"] = vars(median_profile(self.profiles))
        return values


def _plain_session(data: bytes) -> Any:
    import onnxruntime

    return open_session(data, 1, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)


@dataclass(frozen=True)
class Running:
    """A model that is ready to run: ``run`` runs it and nothing else, ``outputs`` are what it computed last, in the
    model's order, and ``context`` is entered around all runs of a turn.
    """

    run: Callable[[], Any]
    outputs: Callable[[], list[Array]]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def _ready(model: NetworkModel, part: Part, start: Callable[[], Running]) -> Part:
    """The part with what takes turns, its outputs checked; or with the problem."""
    with _problem_of(part):
        running = start()
        with running.context():
            running.run()
            part.error = model.error(running.outputs())
        limit = F32_ERROR if part.precision == "f32" else CHOSEN_ERROR
        if not part.error <= limit:
            raise UnsupportedError(f"wrong outputs: they differ by {part.error:.2g} of the largest, not by {limit}")
        part.contestant = Contestant(
            part.library, Entrant(part.precision, running.run, lambda: running.outputs()[0], running.context)
        )
    return part


def _profiled(part: Part, profile: Callable[[], Profile]) -> Part:
    """The part with what takes turns by itself: a profile each, tried once; or with the problem."""

    def turn() -> float:
        part.profiles.append(profile())
        return part.profiles[-1].convolutions

    with _problem_of(part):
        if not profile().nodes:
            raise UnsupportedError("its profile shows no convolution")
        part.contestant = Contestant(
            part.library, Entrant(part.precision, turn, lambda: np.zeros(0, np.float32), turn=turn)
        )
    return part


@contextlib.contextmanager
def _problem_of(part: Part) -> Iterator[None]:
    """Whatever fails is the part's problem: libraries fail in their own ways, and that is part of the answer."""
    if part.version is None:
        part.problem = 'not installed; get it with: pip install "convgen[peers]"'
    try:
        yield
    except Exception as error:
        if not part.problem:
            said = (str(error).strip() or type(error).__name__).splitlines()
            part.problem = said[0][:200]


# ---- ONNX Runtime ---------------------------------------------------------------------------------


def onnxruntime_parts(model: NetworkModel, threads: int) -> list[Part]:
    """The whole model with everything bound, and its convolutions."""
    version = OnnxRuntime.version()
    return [
        _ready(model, Part("onnxruntime", version), lambda: _onnxruntime(model, threads)),
        _profiled(Part("onnxruntime", version, CONVOLUTIONS), lambda: _onnxruntime_profile(model, threads)),
    ]


def _onnxruntime(model: NetworkModel, threads: int) -> Running:
    import onnxruntime

    session = open_session(model.data, threads, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    binding = session.io_binding()
    for name, array in model.inputs.items():
        binding.bind_cpu_input(name, array)
    outputs = {name: np.empty_like(array) for name, array in model.expected.items()}
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return Running(lambda: session.run_with_iobinding(binding), lambda: list(outputs.values()))


def _onnxruntime_profile(model: NetworkModel, threads: int) -> Profile:
    """The median over a few runs of a new session."""
    import onnxruntime

    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with TemporaryFolder() as folder:
        session = open_session(model.data, threads, level, profile=folder / "profile")
        for _ in range(BEFORE + COUNTED):
            session.run(None, model.inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    return median_profile(onnxruntime_profiles(events)[-COUNTED:])


# ---- OpenVINO -------------------------------------------------------------------------------------


def openvino_parts(model: NetworkModel, threads: int) -> list[Part]:
    """The whole model in f32 and in the precision that OpenVINO chooses, and the convolutions of both."""
    version = OpenVino.version()
    chosen = "chosen"
    with contextlib.suppress(Exception):  # where it fails, the parts say why
        chosen = str(_compiled(model, threads, "").get_property("INFERENCE_PRECISION_HINT").to_string())
    parts = []
    for precision in dict.fromkeys(("f32", chosen)):
        hint = "f32" if precision == "f32" else ""
        start = partial(_openvino, model, threads, hint)
        parts.append(_ready(model, Part("openvino", version, MODEL, precision), start))
        profile = partial(_openvino_profile, model, threads, hint)
        parts.append(_profiled(Part("openvino", version, CONVOLUTIONS, precision), profile))
    return parts


def _compiled(model: NetworkModel, threads: int, precision: str, profile: bool = False) -> Any:
    """The model compiled for latency; in the precision that OpenVINO chooses where none is named."""
    import openvino

    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": profile,
    }
    if precision:
        options["INFERENCE_PRECISION_HINT"] = precision
    core = openvino.Core()
    read = core.read_model(model.data)
    if model.dims:
        read.reshape({name: list(array.shape) for name, array in model.inputs.items()})
    return core.compile_model(read, "CPU", options)


def _openvino(model: NetworkModel, threads: int, precision: str) -> Running:
    request = _openvino_request(model, _compiled(model, threads, precision))

    def outputs() -> list[Array]:
        return [np.array(request.get_tensor(name).data) for name in model.expected]

    return Running(partial(request.infer, share_outputs=True), outputs)


def _openvino_request(model: NetworkModel, compiled: Any) -> Any:
    import openvino

    request = compiled.create_infer_request()
    for name, array in model.inputs.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
    return request


def _openvino_profile(model: NetworkModel, threads: int, precision: str) -> Profile:
    """Of a new request. Its times are averages over all runs so far: the slow first ones are taken out again."""
    request = _openvino_request(model, _compiled(model, threads, precision, profile=True))

    def sums(runs: int) -> list[tuple[str, float]]:
        for _ in range(runs):
            request.infer(share_outputs=True)
        executed = [info for info in request.profiling_info if "NOT_RUN" not in str(info.status)]
        return [(info.node_type, info.real_time.total_seconds()) for info in executed]

    first, all_ = sums(BEFORE), sums(COUNTED)
    runs = BEFORE + COUNTED
    return openvino_profile(
        [(kind, max(0.0, runs * b - BEFORE * a) / COUNTED) for (kind, b), (_, a) in zip(all_, first, strict=True)]
    )


# ---- all of them ----------------------------------------------------------------------------------


#: Libraries by name, in the order in which they take turns.
NETWORK_PEERS: dict[str, Callable[[NetworkModel, int], list[Part]]] = {
    "onnxruntime": onnxruntime_parts,
    "openvino": openvino_parts,
}


@dataclass(frozen=True)
class NetworkComparison:
    """A model's convolutions here, beside what other libraries take.

    Attributes:
        rounds: seconds of the chain, by turn.
        parts: what else was timed, or why not.
        best: whose convolutions are the fastest of those in f32; None where none were timed.
        ratio: their time over the chain's, and ``interval`` its 95 % confidence interval.
    """

    rounds: tuple[float, ...]
    parts: tuple[Part, ...]
    best: str | None
    ratio: float | None
    interval: tuple[float, float] | None

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can say it."""
        return {
            "seconds": self.seconds,
            "rounds": list(self.rounds),
            "parts": [part.to_dict() for part in self.parts],
            "best": self.best,
            "ratio": self.ratio,
            "interval": self.interval,
        }


def compare_network(
    model: NetworkModel, chain: Chain, peers: Sequence[str], threads: int, *, rounds: int = 7
) -> NetworkComparison:
    """Time a model's convolutions and other libraries on the whole model, in turn, several times over.

    Raises:
        UnsupportedError: no such peer, or inputs that cannot be made.
        MeasureError: the model's outputs are not finite.
    """
    for name in peers:
        if name not in NETWORK_PEERS:
            raise UnsupportedError(f"peers: expected some of {', '.join(NETWORK_PEERS)}, found {name!r}")
    _ = model.expected
    own = Contestant("convgen", Entrant("chain", chain, chain.output), is_kernel=True)
    parts = [part for name in peers for part in NETWORK_PEERS[name](model, threads)]
    ready = [part.contestant for part in parts if part.contestant]
    take_turns([own, *ready], rounds, REST if threads > 1 else 0.0, all_stay=True)
    comparable = [part for part in parts if part.seconds and part.what == CONVOLUTIONS and part.precision == "f32"]
    best = min(comparable, key=lambda part: part.seconds or 0.0, default=None)
    return NetworkComparison(
        tuple(own.rounds),
        tuple(parts),
        best.library if best else None,
        (best.seconds or 0.0) / own.seconds if best else None,
        ratio_interval(best.rounds, own.rounds) if best else None,
    )
