"""A whole model to run in other libraries, and a library's part in comparing it.

A library is timed only after its outputs agree with those of ONNX Runtime without optimisations.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check.bounds import apart
from ..check.reference import open_session
from ..errors import MeasureError, UnsupportedError
from ..formats.onnx.halves import HALVES
from ..kernel.arrays import drawn
from ..lowering.interface import TensorInfo
from .compare import Contestant
from .peers import Entrant
from .profiles import Profile, median_profile

Array = npt.NDArray[Any]

#: What outputs may differ by, relative to the largest, where a library computes in f32, and where it rounds more.
F32_ERROR, CHOSEN_ERROR = 1e-3, 0.2
#: Accuracy classes whose products are of numbers that are rounded before.
ROUNDED = ("bf16", "f16", "tf32")
#: ONNX Runtime's words for the types that inputs may have.
_INPUTS = {
    "tensor(float)": "f32",
    "tensor(uint8)": "u8",
    "tensor(int8)": "i8",
    "tensor(int32)": "i32",
    "tensor(bool)": "bool",
    "tensor(float16)": "f16",
    "tensor(bfloat16)": "bf16",
}
#: What a part of a comparison is about.
MODEL, CONVOLUTIONS = "model", "convolutions"


def allowed_error(*, is_f32: bool) -> float:
    """What outputs may differ by of one that computes in f32, or not."""
    return F32_ERROR if is_f32 else CHOSEN_ERROR


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
    def precision(self) -> str:
        """What it says its products are of: ``i8`` where it has nodes that quantise, ``f16`` or ``bf16`` where it has
        weights of these, else ``f32``.
        """
        import onnx

        graph = onnx.load_model_from_string(self.data).graph
        if any("Quantize" in node.op_type or node.op_type.startswith("QLinear") for node in graph.node):
            return "i8"
        return next((HALVES[one.data_type] for one in graph.initializer if one.data_type in HALVES), "f32")

    @cached_property
    def inputs(self) -> dict[str, Array]:
        """Random arrays, by name.

        Raises:
            UnsupportedError: an input that is neither of f32 nor of integers or truth values, a dimension whose size is
            not known, or a model that ONNX Runtime cannot run.
        """
        rng = np.random.default_rng(self.seed)
        arrays = {}
        for info in _plain_session(self.path, self.data).get_inputs():
            shape = [self.dims.get(str(size), size) for size in info.shape]
            if info.type not in _INPUTS or not all(isinstance(size, int) for size in shape):
                expected = f"a tensor of {', '.join(_INPUTS.values())} of known shape"
                raise UnsupportedError(f"{self.path.name}: {info.name}: expected {expected}, found {info.type} {shape}")
            arrays[info.name] = drawn(rng, TensorInfo(info.name, tuple(shape), _INPUTS[info.type]))
        return arrays

    @cached_property
    def expected(self) -> dict[str, Array]:
        """The outputs by name, from ONNX Runtime without optimisations.

        Raises:
            MeasureError: they are not finite: other libraries could not be checked, and may be timed on slow numbers.
        """
        session = _plain_session(self.path, self.data)
        names = [info.name for info in session.get_outputs()]
        outputs = dict(zip(names, map(np.asarray, session.run(names, self.inputs)), strict=True))
        for name, array in outputs.items():
            if not np.isfinite(array).all():
                raise MeasureError(f"{self.path.name}: {name}: expected finite outputs, found others")
        return outputs

    def error(self, outputs: Sequence[Array]) -> float:
        """How far these are from the expected outputs, each in any shape (:func:`convgen.check.bounds.apart`)."""
        worst = 0.0
        for found, array in zip(outputs, self.expected.values(), strict=True):
            if found.size != array.size:
                raise UnsupportedError(f"output: expected {array.size} elements, found {found.size}")
            worst = max(worst, apart(found.reshape(array.shape), array))
        return worst


@dataclass
class Part:
    """A library's way of running a model, or the convolutions of it.

    Attributes:
        library, version: whose.
        what: ``model`` or ``convolutions``.
        precision: what it multiplies in: ``f32``, ``bf16`` …; of a model that quantises, which says so itself, ``i8``.
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


def _plain_session(path: Path, data: bytes) -> Any:
    """ONNX Runtime without optimisations.

    Raises:
        UnsupportedError: it cannot run the model.
    """
    import onnxruntime

    try:
        return open_session(data, 1, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    except Exception as error:  # of its own kinds
        found = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"{path.name}: expected a model that ONNX Runtime can run, found {found}") from error


@dataclass(frozen=True)
class Running:
    """A model that is ready to run: ``run`` runs it and nothing else, ``outputs`` are what it computed last, in the
    model's order, and ``context`` is entered around all runs of a turn.
    """

    run: Callable[[], Any]
    outputs: Callable[[], list[Array]]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def ready(model: NetworkModel, part: Part, start: Callable[[], Running]) -> Part:
    """The part with what takes turns, its outputs checked; or with the problem."""
    if part.precision == "f32":
        part.precision = model.precision

    def prepare() -> None:
        running = start()
        with running.context():
            running.run()
            part.error = model.error(running.outputs())
        limit = allowed_error(is_f32=part.precision == "f32")
        if not part.error <= limit:
            raise UnsupportedError(f"wrong outputs: they differ by {part.error:.2g} of the largest, not by {limit}")
        entrant = Entrant(part.precision, running.run, lambda: running.outputs()[0], running.context)
        part.contestant = Contestant(part.library, entrant)

    return _attempted(part, prepare)


def profiled(part: Part, profile: Callable[[], Profile]) -> Part:
    """The part with what takes turns by itself: a profile each, tried once; or with the problem."""

    def turn() -> float:
        part.profiles.append(profile())
        return part.profiles[-1].convolutions

    def prepare() -> None:
        if not profile().nodes:
            raise UnsupportedError("its profile shows no convolution")
        entrant = Entrant(part.precision, turn, lambda: np.zeros(0, np.float32), turn=turn)
        part.contestant = Contestant(part.library, entrant)

    return _attempted(part, prepare)


def _attempted(part: Part, prepare: Callable[[], None]) -> Part:
    """Whatever fails is the part's problem: libraries fail in their own ways, and that is part of the answer."""
    if part.version is None:
        part.problem = f"not installed: pip install {part.library}"
        return part
    try:
        prepare()
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()
        part.problem = said[0][:200]
    return part
