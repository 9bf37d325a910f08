"""Kernel against ONNX Runtime: is what comes out right, everywhere, always?

Bounds (rounding analysis of a dot product; Higham, *Accuracy and Stability of Numerical Algorithms*,
2nd ed., §3; for the square root, Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019): element-wise

    |dst - reference| <= L * c * u * (conv(|src|, |weights|) + |bias| + |residual|) + the activation's own error

with ``u = 2**-24``, ``K`` products per element, ``L`` the activation's slope and

    ``c = f * (8 + 2 * sqrt(K))``,  ``f = 1`` (strict), ``8`` (standard), ``64`` (relaxed),

and ``2**15`` more than relaxed for tf32: two operands cut off after 11 bits.

A layer stored as f16 or bf16 is computed in f32 and rounded once: two results that far apart may round
to neighbours, so the bound grows by twice the rounding of what may come out.

Layers of i8 are exact: every element must be ONNX Runtime's, on data whose sums take the whole range of types,
saturate here and there, and on data half of whose outputs are ties.

On small integers every partial sum is exact, so a schedule that only reorders sums must match bit
for bit; one that transforms (Winograd) is held to its bound there too.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import dtypes
from .cuda.driver import device
from .dtypes import UNDERFLOW, distance, narrow, numpy_dtype, widen
from .errors import KernelError, MeasureError, ValidationError
from .sandbox import Arrays, Run, run_guarded
from .spec import ConvSpec

if TYPE_CHECKING:
    from .build import Kernel

F32 = npt.NDArray[np.float32]
Stored = npt.NDArray[Any]  # as the spec says

UNIT_ROUNDOFF = 2.0**-24
CLASS_FACTOR = {"strict": 1.0, "standard": 8.0, "relaxed": 64.0, "tf32": 64.0}
#: Of a product of TF32.
OPERAND_FACTOR = {"tf32": 2.0**15}
#: Rounding errors of the activation itself, in units of ``u`` times its input's magnitude plus 1: an
#: exp, tanh or erf that is a few ulp off near its saturation is that much of the input off in silu or gelu.
ACTIVATION_ERROR = 16.0
#: Seconds a kernel may take in the sandbox, per GFLOP and at least.
SECONDS_PER_GFLOP, SECONDS_AT_LEAST = 60.0, 120.0
EMULATED_SECONDS_PER_GFLOP = 10_000.0


def error_factor(spec: ConvSpec) -> float:
    """``c`` above: the admitted error in units of ``u * conv(|src|, |weights|)``; 0 of integers."""
    if spec.dtype == "i8":
        return 0.0
    sums = CLASS_FACTOR[spec.accuracy] * (8 + 2 * math.sqrt(spec.reduction_length))
    return sums + OPERAND_FACTOR.get(spec.accuracy, 0)


# ---- data -------------------------------------------------------------------------------------


def float_data(spec: ConvSpec, seed: int = 0) -> Arrays:
    """Standard normal tensors by name: ``src weights [bias] [slope] [scale] [residual]``; of i8, any integers, and
    scales with which outputs spread over the type's range and beyond.
    """
    rng = np.random.default_rng(seed)
    if spec.dtype == "i8":
        return _integers(spec, rng, 128, 2.0 ** rng.uniform(-1, 2, spec.oc))
    return {n: narrow(rng.standard_normal(shape, np.float32), spec.dtype) for n, shape in _shapes(spec).items()}


def exact_data(spec: ConvSpec, seed: int = 0) -> Arrays:
    """Small integers: every partial sum is below 2**24, so f32 arithmetic is exact in any order. Of i8, with scales
    that are powers of two: many outputs are ties.
    """
    rng = np.random.default_rng(seed)
    if spec.dtype == "i8":
        return _integers(spec, rng, 2, 2.0 ** -np.ones(spec.oc))
    largest = max(1, min(8, math.isqrt(2**22 // max(1, spec.reduction_length))))
    return {
        name: rng.integers(-largest, largest + 1, shape).astype(numpy_dtype(spec.dtype))
        for name, shape in _shapes(spec).items()
    }


def _integers(spec: ConvSpec, rng: np.random.Generator, largest: int, factors: npt.NDArray[np.float64]) -> Arrays:
    """Tensors of a layer of i8 from ``-largest`` to ``largest - 1``; scaled by ``factors`` so that some outputs
    saturate where the factor is 1 or more. Every other scale is a power of two.
    """
    rms = math.sqrt(spec.reduction_length) * largest**2 / 3
    scale = factors * min(1.0, 64 / rms)
    scale[::2] = 2.0 ** np.floor(np.log2(scale[::2]))
    bias = round(2 * rms)
    data: Arrays = {
        name: rng.integers(-largest, largest, shape).astype(np.int8)
        for name, shape in (("src", spec.src_shape), ("weights", spec.weights_shape))
    }
    if spec.bias:
        data["bias"] = rng.integers(-bias, bias + 1, spec.oc).astype(np.int32)
    return data | {"scale": scale.astype(np.float32)}


def special_data(spec: ConvSpec, seed: int = 0) -> Arrays:
    """Integers with a NaN and infinities of both signs here and there in src; no zero weights."""
    data = exact_data(spec, seed)
    rng = np.random.default_rng(seed + 1)
    data["weights"][data["weights"] == 0] = 1
    flat = data["src"].reshape(-1)
    if flat.size:
        for value in (np.nan, np.inf, -np.inf):
            flat[rng.integers(flat.size)] = value
    return data


def _shapes(spec: ConvSpec) -> dict[str, tuple[int, ...]]:
    """Of a call's inputs."""
    return {name: shape for name, shape in spec.shapes.items() if name != "dst"}


# ---- reference and bound ----------------------------------------------------------------------


def reference(spec: ConvSpec, data: Arrays, threads: int = 1) -> Stored:
    """ONNX Runtime's output for ``data``, computed in f32 and rounded to the spec's dtype."""
    if spec.n == 0:
        return np.empty(spec.dst_shape, numpy_dtype(spec.dtype))
    from .reference import run_onnxruntime

    return run_onnxruntime(spec, **data, threads=threads)


def tolerance(spec: ConvSpec, data: Arrays, threads: int = 1) -> F32:
    """The element-wise bound for ``data``, of the output's shape; of integers, zeros."""
    if spec.dtype == "i8":
        return np.zeros(spec.dst_shape, np.float32)
    plain = spec.with_(activation="none", dtype="f32")
    magnitude = reference(plain, {k: np.abs(widen(v)) for k, v in data.items() if k != "slope"}, threads)
    op = spec.activation_op
    slope = op.lipschitz
    if spec.has_slope and data["slope"].size:
        slope = max(1.0, float(np.abs(widen(data["slope"])).max()))
    bound = slope * error_factor(spec) * UNIT_ROUNDOFF * magnitude
    if op.name != "none":
        bound += np.float32(ACTIVATION_ERROR * UNIT_ROUNDOFF) * (magnitude + 1)
    if spec.dtype != "f32":
        largest = np.abs(widen(reference(spec, data, threads))) + bound
        bound += 2 * (np.float32(dtypes.UNIT_ROUNDOFF[spec.dtype]) * largest + np.float32(UNDERFLOW[spec.dtype]))
    return np.asarray(bound, np.float32)


def worst(error: F32, bound: F32) -> float:
    """Largest error as a fraction of its bound; infinite where an element is NaN."""
    if not error.size:
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(error == 0, 0, error / bound)
    return float(np.where(np.isnan(ratio), np.inf, ratio).max())


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

    ``worst_error`` is the largest error as a fraction of its bound, infinite where an element is NaN
    or there is no output; ``error_factor`` is the bound's ``c``; ``repro`` is the command line that
    repeats the run.
    """

    spec: str
    candidate: str
    threads: int
    checks: tuple[Check, ...]
    error_factor: float
    worst_error: float
    repro: str

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

    Exact integer data, float data against the bound, NaN and infinities; of i8, integers alone; each between guard
    pages with the output poisoned, on 1, the kernel's and one more thread; the same bits for any thread count;
    and the Python call refuses what is not contiguous. A GPU's kernel runs in its memory, with NaN
    around the buffers; where there is no such GPU, emulated (:mod:`convgen.cuda.emulate`), which is slow.

    A failed check is reported, not raised; see :meth:`Report.raise_if_failed`.
    """
    spec, threads = kernel.spec, kernel.threads
    checks: list[Check] = []
    ratio = math.inf
    cases = {"float": float_data(spec, seed), "exact": exact_data(spec, seed)}
    if kernel.exact and spec.dtype != "i8":
        cases["special"] = special_data(spec, seed)
    try:
        with tempfile.TemporaryDirectory(prefix="convgen-") as directory:
            library, driver = _runnable(kernel, Path(directory))
            limit = SECONDS_AT_LEAST + (EMULATED_SECONDS_PER_GFLOP if driver else SECONDS_PER_GFLOP) * spec.flops / 1e9
            outputs = run_guarded(
                library,
                kernel.name,
                spec,
                cases,
                threads,
                Path(directory),
                limit,
                on_device=kernel.on_device,
                environment={"CONVGEN_CUDA_DRIVER": str(driver)} if driver else {},
            )
    except MeasureError as error:
        checks.append(Check("memory", False, str(error)))
        outputs = {}
    else:
        found = (
            "in device memory, nothing else written" if kernel.on_device else "between guard pages, inputs read-only"
        )
        checks.append(Check("memory", True, f"{len(outputs)} runs {found}{', emulated' * bool(driver)}"))

    if outputs:
        firsts = {case: next(out for run, out in outputs.items() if run.case == case) for case in cases}
        checks.append(_same(kernel, outputs, firsts))
        expected = reference(spec, cases["float"], threads)
        bound = tolerance(spec, cases["float"], threads)
        ratio = worst(distance(firsts["float"], expected), bound)
        if spec.dtype == "i8":
            checks.append(_equal("integers", expected, firsts["float"]))
        else:
            found = f"largest error {ratio:.3g} of the bound (c = {error_factor(spec):.3g})"
            checks.append(Check("float", ratio <= 1, found))
        checks.append(_exact(kernel, cases["exact"], firsts["exact"]))
        if "special" in cases:
            checks.append(_special(spec, cases["special"], firsts["special"], threads))
    if not kernel.on_device:
        checks.append(_refusal(kernel))
    repro = (
        f'convgen validate "{spec.descriptor}" --target {kernel.target} --threads {threads} '
        f'--schedule {kernel.schedule} --picks "{kernel.picks}" --seed {seed}'
    )
    return Report(
        spec.descriptor, f"{kernel.schedule}({kernel.picks})", threads, tuple(checks), error_factor(spec), ratio, repro
    )


def _runnable(kernel: Kernel, directory: Path) -> tuple[Path, Path | None]:
    """The kernel's library, or the one that stands in for it and its driver: without a GPU that runs the kernel."""
    if not kernel.on_device:
        return kernel.path, None
    found = device()
    if kernel.target.native and found is not None and not found.emulated:
        return kernel.path, None
    from .cuda.standin import emulated_library

    return emulated_library(kernel.lowered, kernel.interface, kernel.object_file, directory)


def _same(kernel: Kernel, outputs: dict[Run, Stored], firsts: dict[str, Stored]) -> Check:
    for run, output in outputs.items():
        if output.tobytes() != firsts[run.case].tobytes():
            return Check("threads", False, f"expected the bits of the first run, found others: {run}")
    ways = "in every run" if kernel.on_device else "for every thread count and placement"
    return Check("threads", True, f"the same bits {ways}")


def _exact(kernel: Kernel, data: Arrays, output: Stored) -> Check:
    spec = kernel.spec
    expected = reference(spec, data, kernel.threads)
    if kernel.exact and spec.activation_op.exact:
        return _equal("exact", expected, output)
    why = f"activation {spec.activation}" if kernel.exact else "a transform"
    ratio = worst(distance(output, expected), tolerance(spec, data, kernel.threads))
    return Check("exact", ratio <= 1, f"integers through {why}: largest error {ratio:.3g} of the bound")


def _equal(name: str, expected: Stored, output: Stored) -> Check:
    wrong = np.argwhere(output != expected)
    if not len(wrong):
        return Check(name, True, f"{output.size} elements bit for bit")
    at = tuple(int(i) for i in wrong[0])
    differ = f"{len(wrong)} of {output.size} elements differ; at {at} expected {expected[at]}, found {output[at]}"
    return Check(name, False, differ)


def _special(spec: ConvSpec, data: Arrays, output: Stored, threads: int) -> Check:
    with np.errstate(invalid="ignore", over="ignore"):
        expected, bound = widen(reference(spec, data, threads)), tolerance(spec, data, threads)
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


def _refusal(kernel: Kernel) -> Check:
    """The Python call refuses an array it could only take with a copy."""
    spec = kernel.spec
    data = float_data(spec)
    layer = kernel.bind(**{name: data[name] for name in spec.parameters})
    strided = np.empty((*spec.src_shape, 2), numpy_dtype(spec.dtype))[..., 0]
    if strided.size < 2:
        return Check("refusal", True, "nothing to refuse: an array of one element is contiguous")
    try:
        layer(strided, residual=data.get("residual"))
    except KernelError as error:
        return Check("refusal", True, str(error))
    return Check("refusal", False, "expected a non-contiguous src to be refused, found it accepted")
