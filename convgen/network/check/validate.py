"""A compiled network against ONNX Runtime: is what comes out right, on any number of threads, and nothing touched?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ...check.bounds import apart, worst
from ...check.reference import session_options
from ...check.validate import Check
from ...errors import MeasureError, UnsupportedError, ValidationError
from ...formats.onnx.halves import as_f32
from ...kernel.arrays import drawn
from ...lowering.interface import MAX_THREADS, TensorInfo
from ...measure.network_model import CHOSEN_ERROR, ROUNDED, allowed_error
from ..plan import Plan, Product
from ..reading import read_graph
from .bounds import Measured, measure
from .guarded import Runs, run_guarded
from .integers import defined, differences, is_exact, quantises
from .places import check_places

if TYPE_CHECKING:
    from onnx import ModelProto

    from ..compile import Built
    from ..source import Size

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class NetworkReport:
    """All checks of one network.

    Attributes:
        name: of the network.
        threads: that it runs on.
        checks: each with what was found.
        worst_error: the largest error as a fraction of its bound, of all outputs; infinite where an output is NaN and
            must not be, or there is none.
    """

    name: str
    threads: int
    checks: tuple[Check, ...]
    worst_error: float

    def __repr__(self) -> str:
        failed = [check.name for check in self.checks if not check.passed]
        how = f"failed {', '.join(failed)}" if failed else "passed"
        count = f"{how}, {len(self.checks)} checks, error {self.worst_error:.3g} of its bound"
        return f"<{type(self).__name__} {self.name}: {count}>"

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raise:
        ValidationError: a check failed; names it.
        """
        for check in self.checks:
            if not check.passed:
                raise ValidationError(f"{self.name}: {check.name}: {check.found}")

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``passed`` as JSON values; an infinite error is None."""
        error = self.worst_error if math.isfinite(self.worst_error) else None
        return asdict(self) | {"worst_error": error, "passed": self.passed}


def validate_network(
    plans: Sequence[Plan],
    built: Built,
    source: str | Path | ModelProto,
    *,
    threads: int,
    accuracy: str,
    inputs: Arrays | None = None,
    expected: Arrays | None = None,
    seed: int = 0,
    is_drawn: bool = False,
    run: Callable[..., Runs] = run_guarded,
    where: str = "between guard pages, inputs read-only",
) -> NetworkReport:
    """Check a network, at each of its sizes, against ONNX Runtime's outputs of the model that it was compiled from; of
    one of f16 or bf16, of the same in f32.

    Every output element within its bound (:mod:`convgen.network.check.bounds`), and, as the bounds of deep networks
    grow beyond their outputs, no further than :func:`compare_network` allows; the same bits on one, the network's and
    one more thread, and for other places of the buffers; nothing touched outside of inputs, outputs and workspace, all
    of the outputs written, and nothing read that was not; no two tensors in one place at once.

    A failed check is reported, not raised.

    Args:
        plans, built: the compiled network's.
        source, accuracy: as it was compiled from.
        threads: that it runs on.
        inputs: by name, of the only size; standard normal ones where None.
        expected: ONNX Runtime's outputs for these, where they are known.
        seed: of these.
        is_drawn: whether the graph is a random one, of which only the bound says how far errors may grow.
        run: :func:`~convgen.network.check.guarded.guarded_runs` in a process that may crash anyway.
        where: what it does that for.

    Raises:
        UnsupportedError: ONNX Runtime does not run the model.
    """
    sizes = [Sized.of(plan, size) for plan, size in zip(plans, built.code.sizes, strict=True)]
    files, first = Files(built.library, built.code.name, built.weights), [_places(plans)]
    how: dict[str, Any] = {"threads": threads, "accuracy": accuracy, "seed": seed, "run": run, "where": where}
    return check_files(files, sizes, source, inputs=inputs, expected=expected, first=first, is_drawn=is_drawn, **how)


class Files(NamedTuple):
    """A network's library, the prefix of its functions, and its weights."""

    library: Path
    name: str
    weights: Path


@dataclass(frozen=True)
class Sized:
    """A network at one of its sizes.

    Attributes:
        label: what tells it from the others; empty where there is only one.
        dims: the model's symbolic dimensions.
        inputs, outputs: by the model's names.
        transformed: names of the steps that compute convolutions by a transform.
    """

    label: str
    dims: Mapping[str, int]
    inputs: Sequence[TensorInfo]
    outputs: Sequence[TensorInfo]
    transformed: frozenset[str]

    @classmethod
    def of(cls, plan: Plan, size: Size) -> Sized:
        transformed = frozenset(
            step.name
            for step in plan.steps
            if isinstance(step.function, Product) and step.function.candidate.schedule.transforms
        )
        return cls(size.label, plan.graph.dims, size.inputs, size.outputs, transformed)


def check_files(
    files: Files,
    sizes: Sequence[Sized],
    source: str | Path | ModelProto,
    *,
    threads: int,
    accuracy: str,
    inputs: Arrays | None = None,
    expected: Arrays | None = None,
    seed: int = 0,
    is_drawn: bool = False,
    run: Callable[..., Runs] = run_guarded,
    where: str,
    first: Sequence[Check] = (),
) -> NetworkReport:
    """The report of :func:`validate_network` on a library; the arguments are the same but for ``first``: checks that
    were made before.
    """
    rng, reference = np.random.default_rng(seed), as_f32(source) or source
    given = [inputs] if inputs is not None else [_drawn(rng, size.inputs) for size in sizes]
    checks, runs = run_files(files, given, threads, run, where)
    limit = math.inf if is_drawn else allowed_error(is_f32=accuracy not in ROUNDED and reference is source)
    ratio = math.inf if runs is None else 0.0
    for size, arrays, found in zip(sizes, given, runs or (), strict=runs is not None):
        known = expected if reference is source else None
        wanted = run_onnxruntime(reference, _as_f32(arrays)) if known is None else known
        made = next(iter(found.values()))
        check, worst_error = _compared(size, source, arrays, made, wanted, accuracy, limit)
        checks.append(labelled(size, check))
        ratio = max(ratio, worst_error)
    return NetworkReport(files.name, threads, (*first, *checks), ratio)


def run_files(
    files: Files, given: Sequence[Arrays], threads: int, run: Callable[..., Runs], where: str
) -> tuple[list[Check], Runs | None]:
    """A library's runs at each of its sizes on one, its own and one more thread, None where they failed; and what that
    says of memory and of threads.
    """
    try:
        runs = run(*files, given, sorted({1, threads, min(threads + 1, MAX_THREADS)}))
    except MeasureError as error:
        return [Check("memory", False, str(error))], None
    return [Check("memory", True, f"{sum(map(len, runs))} runs {where}"), _same(runs)], runs


def labelled(size: Sized, check: Check) -> Check:
    """A check that says which of several sizes it is of."""
    return replace(check, found=f"{size.label}: {check.found}") if size.label else check


def run_widened(source: str | Path | ModelProto, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
    """A whole model's outputs by name, of one of f16 or bf16 those of the same in f32.

    Raises:
        UnsupportedError: ONNX Runtime does not run the model.
    """
    return run_onnxruntime(as_f32(source) or source, _as_f32(inputs))


def compare_network(
    plans: Sequence[Plan],
    built: Built,
    call: Callable[..., Any],
    source: str | Path | ModelProto,
    *,
    threads: int,
    accuracy: str,
    seed: int = 0,
) -> NetworkReport:
    """One run at each size beside ONNX Runtime's of the model: what shows, in a second, that all is not wrong.

    How far outputs are apart is :func:`convgen.check.bounds.apart`.

    Args:
        plans, built, threads, accuracy, source: as of :func:`validate_network`.
        call: the network.
        seed: of the inputs.

    Raises:
        UnsupportedError: ONNX Runtime does not run the model.
    """
    rng, reference, worst_apart = np.random.default_rng(seed), as_f32(source) or source, 0.0
    rounded = accuracy in ROUNDED or reference is not source
    is_quantised = any(quantises(plan.graph) for plan in plans)
    limit, checks, ratios = allowed_error(is_f32=not rounded), list[Check](), [0.0]
    for plan, size in zip(plans, built.code.sizes, strict=True):
        given = _drawn(rng, size.inputs)
        made = call(*given.values(), out={})
        wanted = run_onnxruntime(reference, _as_f32(given))
        found = made if isinstance(made, dict) else dict.fromkeys(wanted, made)
        if is_quantised and not rounded:
            sized = Sized.of(plan, size)
            check, ratio = _compared_integers(sized, source, given, found, wanted, accuracy)
            checks.append(labelled(sized, check))
            ratios.append(ratio)
        worst_apart = max([worst_apart, *(apart(found[name], array) for name, array in wanted.items())])
    if not checks:
        text = f"outputs differ by {worst_apart:.1e} of the largest element, {limit} is allowed"
        checks.append(Check("onnxruntime", worst_apart <= limit, text))
        ratios.append(worst_apart / limit)
    return NetworkReport(built.code.name, threads, tuple(checks), max(ratios))


def _compared_integers(
    size: Sized, source: str | Path | ModelProto, inputs: Arrays, found: Arrays, wanted: Arrays, accuracy: str
) -> tuple[Check, float]:
    """Outputs of a quantised model: the same as ONNX Runtime's, or a step apart where floats are added up, there or
    here. Where they are further apart, as steps add up in deep models, they are compared with what it computes with
    integers where it can, with what the graph is defined to be, and in the end with the bound that is accumulated
    through it.
    """
    graph, exact = read_graph(source, size.dims), is_exact(source)
    first = differences(graph, found, wanted, exact)
    if first.share <= 1 or exact:
        return Check("onnxruntime", first.share <= 1, first.text), first.share
    fused = run_onnxruntime(source, inputs, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
    second = differences(graph, found, fused, exact)
    if second.share <= 1:
        text = f"from ONNX Runtime's integers {second.text}; from its sums of floats {first.text}"
        return Check("onnxruntime", True, text), second.share
    far = max(apart(found[name], array) for name, array in wanted.items())
    third = differences(graph, found, defined(graph, inputs), exact)
    if max(third.share, far / CHOSEN_ERROR) <= 1:
        text = f"from the definition, step by step, {third.text}; from ONNX Runtime's outputs {first.text}"
        return Check("onnxruntime", True, text), max(third.share, far / CHOSEN_ERROR)
    bounded, ratio = _compared(size, source, inputs, found, wanted, accuracy)
    text = f"{first.text}; {bounded.found}; outputs differ by {far:.1e} of the largest element"
    ratio = max(ratio, far / CHOSEN_ERROR)
    return Check("onnxruntime", ratio <= 1, f"{text}, {CHOSEN_ERROR} is allowed"), ratio


def _as_f32(arrays: Arrays) -> Arrays:
    """Those of f16 or bf16 as f32; others as they are."""
    return {name: array.astype(np.float32) if array.dtype.itemsize == 2 else array for name, array in arrays.items()}


def _drawn(rng: np.random.Generator, tensors: Iterable[TensorInfo]) -> dict[str, npt.NDArray[Any]]:
    return {info.name: drawn(rng, info) for info in tensors}


def _compared(
    size: Sized,
    source: str | Path | ModelProto,
    inputs: Arrays,
    found: Arrays,
    wanted: Arrays,
    accuracy: str,
    limit: float = math.inf,
) -> tuple[Check, float]:
    """One size's outputs and ONNX Runtime's. ``limit``: of how far they may be apart besides, of f32."""
    graph = read_graph(source, size.dims)
    if quantises(graph):
        limit = max(limit, CHOSEN_ERROR)
    bounds = measure(graph, inputs, size.transformed, accuracy)
    named = {name: bounds[tensor] for name, tensor in zip(graph.names, graph.outputs, strict=True)}
    return _within(found, wanted, named, limit)


def run_onnxruntime(
    source: str | Path | ModelProto,
    inputs: Arrays,
    level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
) -> dict[str, npt.NDArray[Any]]:
    """A whole model's outputs by name, without optimisations unless a level says so, on one thread.

    Raises:
        UnsupportedError: ONNX Runtime does not run the model.
    """
    options = session_options(1, level)
    options.log_severity_level = 4  # what it refuses is raised
    model = str(source) if isinstance(source, str | Path) else source.SerializeToString()
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:  # of a dozen types that have no common base
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedError(f"expected a model that ONNX Runtime runs, found: {reason}") from error


def _places(plans: Sequence[Plan]) -> Check:
    try:
        count = sum(map(check_places, plans))
    except ValidationError as error:
        return Check("places", False, str(error))
    return Check("places", True, f"{count} tensors are read where they were written")


def _same(runs: Runs) -> Check:
    for size in runs:
        first = next(iter(size.values()))
        for run, outputs in size.items():
            for name, array in outputs.items():
                if array.tobytes() != first[name].tobytes():
                    return Check("threads", False, f"{name}: expected the bits of the first run, found others: {run}")
    return Check("threads", True, "the same bits for every thread count and placement")


def _within(found: Arrays, expected: Arrays, bounds: Mapping[str, Measured], limit: float) -> tuple[Check, float]:
    """``limit``: of how far outputs may be apart, of the largest element, whatever their bounds are."""
    ratio, largest, judged, count = 0.0, 0.0, 0, 0
    for name, wanted in expected.items():
        array, bound = found[name], bounds[name].error
        if array.shape != wanted.shape:
            return Check("float", False, f"{name}: expected shape {wanted.shape}, found {array.shape}"), math.inf
        promised = np.isfinite(bound) & np.isfinite(wanted)
        error = np.abs(array.astype(np.float64) - wanted)[promised]
        both = 2 * bound[promised]  # each of two results is within its bound of what is exact
        ratio = max(ratio, worst(error, both))  # type: ignore[arg-type]
        largest = max(largest, float(error.max(initial=0.0) / (np.abs(wanted[promised]).max(initial=0.0) or 1.0)))
        judged, count = judged + int(promised.sum()), count + array.size
    # Whatever is computed wrongly before it may not show in such an output.
    flat = [name for name, wanted in expected.items() if wanted.size > 1 and (wanted == wanted.flat[0]).all()]
    text = f"largest error {ratio:.3g} of the bound accumulated through the graph, {largest:.1e} of the largest element"
    if largest > limit:
        text += f", {limit} is allowed"
    if judged < count:
        text += f"; nothing is promised of {count - judged} of {count} elements"
    if flat:
        text += f"; all elements of {', '.join(flat)} are the same, which shows little"
    ratio = max(ratio, largest / limit if largest > limit else 0.0)
    return Check("float", ratio <= 1, text), ratio
