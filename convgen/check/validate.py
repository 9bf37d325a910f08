"""Kernel against ONNX Runtime: is what comes out right, everywhere, always?

The bounds that floats are held to are in :mod:`convgen.check.bounds`. On small integers every partial sum is exact, so
a schedule that only reorders sums must match bit for bit; one that transforms (Winograd) is held to its bound there,
too. Layers of i8 are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..cuda.driver import device
from ..errors import KernelError, MeasureError, SpecError, ValidationError
from ..folders import TemporaryFolder
from ..problem.accuracy import ACTIVATION_ERROR, UNIT_ROUNDOFF, error_factor
from ..problem.dtypes import distance, narrow, numpy_dtype, widen
from ..problem.spec import ConvSpec
from . import autograd
from .bounds import F32, Stored, differences, even_tolerance, reference, tolerance, worst
from .cross import run_emulated
from .data import Arrays, exact_data, float_data, odd_data, special_data
from .sandbox import Run, run_guarded

if TYPE_CHECKING:
    from ..hardware.target import Target
    from ..kernel.kernel import Kernel
    from ..lowering.schedule import Candidate
#: Seconds a kernel may take in the sandbox, per GFLOP and at least.
SECONDS_PER_GFLOP, SECONDS_AT_LEAST = 60.0, 120.0
EMULATED_SECONDS_PER_GFLOP = 10_000.0


# ---- report -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One check: what it looked at, whether it passed, and what was found."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Report:
    """All checks of one kernel.

    ``worst_error`` is the largest error on random floats as a fraction of its bound, infinite where an element is
    NaN or there is no output; ``error_factor`` is that bound's ``c``; ``repro`` is the command line that
    repeats the run.
    """

    spec: str
    candidate: str
    threads: int
    checks: tuple[Check, ...]
    error_factor: float
    worst_error: float
    repro: str

    def __repr__(self) -> str:
        failed = [check.name for check in self.checks if not check.passed]
        how = f"failed {', '.join(failed)}" if failed else "passed"
        count = f"{how}, {len(self.checks)} checks, error {self.worst_error:.3g} of its bound"
        return f"<{type(self).__name__} {self.spec} {self.candidate}: {count}>"

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raise:
        ValidationError: a check failed; names it, and ends with the reproducing command.
        """
        for check in self.checks:
            if not check.passed:
                raise ValidationError(f"{self.spec}: {check.name}: {check.found}; repeat with: {self.repro}")

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``passed`` as JSON values; an infinite error is None."""
        error = self.worst_error if math.isfinite(self.worst_error) else None
        return asdict(self) | {"worst_error": error, "passed": self.passed}


def validate(kernel: Kernel, *, seed: int = 0) -> Report:
    """Check a kernel against ONNX Runtime.

    Exact integer data, of gradients by PyTorch's autograd too where that is installed, float data against the bound,
    floats of very different scales, NaN and infinities; of i8, integers alone, with scales of every kind; each between
    guard pages with the output poisoned, on 1, the kernel's and one more thread; the same bits for any thread count;
    and the Python call refuses what is not contiguous. A GPU's kernel runs in its memory, with NaN around the buffers;
    where there is no such GPU, emulated (:mod:`convgen.check.emulation.emulate`), which is slow. So is another CPU's,
    in QEMU (:mod:`convgen.check.cross`).

    A failed check is reported, not raised; see :meth:`Report.raise_if_failed`.

    Raises:
        SpecError: it is no kernel.
        UnsupportedError: the kernel is for another CPU, which nothing here emulates.
        BuildError: there is no C compiler for it.
    """
    if not hasattr(kernel, "spec") or not hasattr(kernel, "lowered"):
        instead = "; convgen.validate_folder(DIR) checks an exported one" * hasattr(kernel, "spec")
        raise SpecError("kernel", "what convgen.build gives", f"a {type(kernel).__qualname__}{instead}")
    words = f'"{kernel.spec.descriptor}" --target {kernel.target} --threads {kernel.threads}'
    repro = f'convgen validate {words} --schedule {kernel.schedule} --picks "{kernel.picks}" --seed {seed}'
    return check_outputs(kernel, partial(_outputs, kernel), seed, repro)


class Checked(Protocol):
    """What is checked: a kernel, or the library of one that was exported."""

    @property
    def spec(self) -> ConvSpec: ...

    @property
    def threads(self) -> int: ...

    @property
    def target(self) -> Target: ...

    @property
    def candidate(self) -> Candidate: ...

    def bind(self, weights: object = None, bias: object = None, slope: object = None, **others: Any) -> Any:
        """A layer with these weights; called of what runs on this machine's CPU."""


#: Runs cases in a folder: the outputs, and, as the end of a sentence, what emulated them.
Runner = Callable[[dict[str, Arrays], Path], tuple[dict[Run, Stored], str]]


def check_outputs(kernel: Checked, run: Runner, seed: int, repro: str, first: Sequence[Check] = ()) -> Report:
    """The report of :func:`validate` on what ``run`` gives.

    Args:
        repro: the command that repeats it.
        first: checks that were made before.
    """
    spec, threads, candidate = kernel.spec, kernel.threads, kernel.candidate
    on_device, exact = kernel.target.on_device, candidate.is_exact(spec)
    factor = error_factor(spec, transforms=candidate.schedule.transforms)
    checks: list[Check] = [*first]
    ratio = math.inf
    cases = {"float": float_data(spec, seed), "exact": exact_data(spec, seed), "odd": odd_data(spec, seed)}
    if exact and spec.dtype != "i8":
        cases["special"] = special_data(spec, seed)
    try:
        with TemporaryFolder(runs=True) as directory:
            outputs, emulated = run(cases, directory)
    except MeasureError as error:
        checks.append(Check("memory", False, str(error)))
        outputs = {}
    else:
        found = "in device memory, nothing else written" if on_device else "between guard pages, inputs read-only"
        checks.append(Check("memory", True, f"{len(outputs)} runs {found}{emulated}"))

    if outputs:
        firsts = {case: next(out for run, out in outputs.items() if run.case == case) for case in cases}
        checks.append(_same(kernel, outputs, firsts))
        expected = reference(spec, cases["float"], threads)
        bound = _even_bound(kernel, cases["float"])
        ratio = worst(distance(firsts["float"], expected), bound)
        if spec.dtype == "i8":
            checks.append(_equal("integers", expected, firsts["float"]))
        else:
            found = f"largest error {ratio:.3g} of the bound (c = {factor:.3g})"
            checks.append(Check("float", ratio <= 1, found))
        checks.append(_exact(kernel, cases["exact"], firsts["exact"], reference(spec, cases["exact"], threads)))
        if spec.direction != "forward" and spec.n and autograd.is_installed():
            gradients = narrow(autograd.gradients(spec, cases["exact"]).astype(np.float32), spec.dtype)
            checks.append(_exact(kernel, cases["exact"], firsts["exact"], gradients, "autograd"))
        checks.append(_odd(kernel, cases["odd"], firsts["odd"]))
        if "special" in cases:
            checks.append(_special(spec, cases["special"], firsts["special"], threads))
    if not on_device and kernel.target.native:
        checks.append(_refusal(kernel))
    described = f"{candidate.schedule.id}({candidate.picks})"
    return Report(spec.descriptor, described, threads, tuple(checks), factor, ratio, repro)


def _outputs(kernel: Kernel, cases: dict[str, Arrays], directory: Path) -> tuple[dict[Run, Stored], str]:
    """The kernel's outputs, and, as the end of a sentence, what emulated it."""
    if not kernel.on_device and not kernel.target.native:
        return run_emulated(kernel, cases, directory, emulated_seconds(kernel.spec)), ", emulated by QEMU"
    library, driver = _runnable(kernel, directory)
    return run_library(kernel, library, kernel.name, driver, cases, directory)


def emulated_seconds(spec: ConvSpec) -> float:
    """How long a layer may take in an emulator."""
    return SECONDS_AT_LEAST + EMULATED_SECONDS_PER_GFLOP * spec.flops / 1e9


def run_library(
    kernel: Checked, library: Path, name: str, driver: Path | None, cases: dict[str, Arrays], directory: Path
) -> tuple[dict[Run, Stored], str]:
    """The outputs of a library that runs on this machine, or with a driver that emulates a GPU."""
    per_gflop = EMULATED_SECONDS_PER_GFLOP if driver else SECONDS_PER_GFLOP
    outputs = run_guarded(
        library,
        name,
        kernel.spec,
        cases,
        kernel.threads,
        directory,
        SECONDS_AT_LEAST + per_gflop * kernel.spec.flops / 1e9,
        on_device=kernel.target.on_device,
        environment={"CONVGEN_CUDA_DRIVER": str(driver)} if driver else {},
    )
    return outputs, ", emulated" if driver else ""


def _runnable(kernel: Kernel, directory: Path) -> tuple[Path, Path | None]:
    """The kernel's library, or the one that stands in for it and its driver: without a GPU that runs the kernel."""
    if not kernel.on_device:
        return kernel.path, None
    found = device()
    if kernel.target.native and found is not None and not found.emulated:
        return kernel.path, None
    from .emulation.standin import emulated_library  # imports TVM

    return emulated_library(kernel.lowered, kernel.interface, kernel.object_file, directory)


def _same(kernel: Checked, outputs: dict[Run, Stored], firsts: dict[str, Stored]) -> Check:
    for run, output in outputs.items():
        if output.tobytes() != firsts[run.case].tobytes():
            return Check("threads", False, f"expected the bits of the first run, found others: {run}")
    ways = "in every run" if kernel.target.on_device else "for every thread count and placement"
    return Check("threads", True, f"the same bits {ways}")


def _even_bound(kernel: Checked, data: Arrays) -> F32:
    """The bound for data of one scale; where sums are only reordered, that for any data."""
    bound = even_tolerance if kernel.candidate.schedule.transforms else tolerance
    return bound(kernel.spec, data, threads=kernel.threads)


def _odd(kernel: Checked, data: Arrays, output: Stored) -> Check:
    """Whether the bound for any data holds on data that are not of one scale, wherever something is promised."""
    spec, expected = kernel.spec, reference(kernel.spec, data, kernel.threads)
    if spec.dtype == "i8":
        return _equal("odd", expected, output)
    bound = tolerance(spec, data, kernel, kernel.threads)
    judged = np.isfinite(bound)
    error = distance(output, expected)
    ratio = worst(error[judged], bound[judged])
    found = f"floats of very different scales: largest error {ratio:.3g} of the bound"
    if beyond := int((~judged).sum()):
        found += f"; {beyond} of {judged.size} outputs beyond the range of numbers"
    return Check("odd", ratio <= 1, found)


def _exact(kernel: Checked, data: Arrays, output: Stored, expected: Stored, name: str = "exact") -> Check:
    spec, exact = kernel.spec, kernel.candidate.is_exact(kernel.spec)
    if exact and spec.activation_op.exact:
        return _equal(name, expected, output)
    why = f"activation {spec.activation}" if exact else "a transform"
    ratio = worst(distance(output, expected), _even_bound(kernel, data))
    return Check(name, ratio <= 1, f"integers through {why}: largest error {ratio:.3g} of the bound")


def _equal(name: str, expected: Stored, output: Stored) -> Check:
    differ = differences(expected, output)
    return Check(name, not differ, differ or f"{output.size} elements bit for bit")


def _special(spec: ConvSpec, data: Arrays, output: Stored, threads: int) -> Check:
    with np.errstate(invalid="ignore", over="ignore"):
        expected, bound = widen(reference(spec, data, threads)), tolerance(spec, data, threads=threads)
        output = widen(output)
        error = np.abs(output - expected)
    for kind, where in (("NaN", np.isnan), ("infinity", np.isinf)):
        differ = np.argwhere(where(expected) != where(output))
        if len(differ):
            at = tuple(int(i) for i in differ[0])
            return Check("special", False, f"{kind}: at {at} expected {expected[at]}, found {output[at]}")
    infinite, finite = np.isinf(expected), np.isfinite(expected)
    if (expected[infinite] != output[infinite]).any():
        return Check("special", False, "an infinity of the other sign")
    # Where an activation made an infinity finite, it is as exact as a saturated value can be.
    saturated = np.float32(ACTIVATION_ERROR * UNIT_ROUNDOFF) * (np.abs(expected) + 1)
    bound = np.where(np.isfinite(bound), bound, saturated)
    wrong = np.argwhere(finite & ~(error <= bound))
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        return Check(
            "special", False, f"beside NaN and infinities: at {at} expected {expected[at]}, found {output[at]}"
        )
    found = f"{int(np.isnan(expected).sum())} NaN and {int(infinite.sum())} infinities where ONNX Runtime has them"
    return Check("special", True, found)


def _refusal(kernel: Checked) -> Check:
    """The Python call refuses an output that it could not write where it is."""
    spec = kernel.spec
    data = float_data(spec)
    layer = kernel.bind(**{name: data[name] for name in spec.parameters})
    strided = np.empty((*spec.dst_shape, 2), numpy_dtype(spec.dtypes["dst"]))[..., 0]
    if strided.size < 2:
        return Check("refusal", True, "nothing to refuse: an array of one element is contiguous")
    try:
        layer(data["src"], residual=data.get("residual"), out=strided)
    except KernelError as error:
        return Check("refusal", True, str(error))
    return Check("refusal", False, "expected a non-contiguous out to be refused, found it accepted")
