"""What worker processes run: one check of one candidate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache

import numpy as np

from ...errors import BuildError, Inapplicable, SpecError, UnsupportedError
from ...hardware.target import Target, resolve
from ...kernel.kernel import Kernel, compile_candidate
from ...lowering.candidates import default_candidate, parse_candidate
from ...problem.spec import ConvSpec
from ..bounds import differences
from ..data import Arrays, exact_data, float_data, odd_data
from ..validate import validate
from .outcome import Outcome


def check(spec: str, target: str, threads: int, seed: int, schedule: str | None, picks: str | None) -> Outcome:
    """Build a candidate and validate it, as ``convgen validate`` does; never raises."""

    def validated() -> Outcome:
        report = validate(_built(spec, target, threads, schedule, picks), seed=seed)
        made = tuple(made.name for made in report.checks)
        for failed in report.checks:
            if not failed.passed:
                kind = "wrong" if failed.name in ("float", "exact", "integers", "odd", "autograd") else failed.name
                return Outcome(kind, f"{failed.name}: {failed.found}", made)
        return Outcome("ok", "", made, report.worst_error)

    return _caught(validated)


def check_values(
    spec: str, target: str, threads: int, seed: int, schedule: str | None, picks: str | None, seeds: int
) -> Outcome:
    """Build a candidate of a layer of integers and compare its values with ONNX Runtime's, or the formula's in ONNX's
    operators, on the data with which ``convgen validate`` would of each of ``seeds`` seeds; never raises.

    It is quick as everything is in this process, where nothing guards the memory beside the buffers.
    """

    def compared() -> Outcome:
        from ..reference import OrtDefinition  # imports ONNX Runtime

        kernel = _built(spec, target, threads, schedule, picks)
        layer, made, layers = kernel.spec, list[str](), dict[str, None]()
        expected = OrtDefinition(layer) if layer.n else lambda data: np.empty(layer.dst_shape)
        for number in range(seed, seed + seeds):
            for name, draw in _DATA.items():
                data = draw(layer, number)
                if differs := differences(expected(data), kernel(**data)):
                    return Outcome("wrong", f"{name} of seed {number}: {differs}", tuple(made), layers=tuple(layers))
                made.append(name)
                layers[_identity(layer, data)] = None
        return Outcome("ok", "", tuple(made), layers=tuple(layers))

    return _caught(compared)


#: Data that layers of integers are checked with, as :mod:`convgen.check.validate` names them.
_DATA: dict[str, Callable[[ConvSpec, int], Arrays]] = {"integers": float_data, "exact": exact_data, "odd": odd_data}


def _identity(spec: ConvSpec, data: Arrays) -> str:
    """What tells a layer of integers apart from others: its spec, zero points and scales."""
    digest = hashlib.sha256(spec.descriptor.encode())
    for name in spec.parameters:
        if name not in ("weights", "bias"):
            digest.update(data[name].tobytes())
    return digest.hexdigest()[:32]


def _built(spec: str, target: str, threads: int, schedule: str | None, picks: str | None) -> Kernel:
    layer, where = ConvSpec.parse(spec), _resolved(target)
    chosen = default_candidate(layer, where) if schedule is None else parse_candidate(layer, where, schedule, picks)
    return compile_candidate(layer, where, chosen, threads)


def _caught(checked: Callable[[], Outcome]) -> Outcome:
    """How a check ended; an error of building is how it did, too."""
    try:
        return checked()
    except BuildError as error:
        return Outcome("build", str(error))
    except (SpecError, Inapplicable, UnsupportedError) as error:
        return Outcome("refused", str(error))
    except Exception as error:  # whatever it is, it is a finding
        return Outcome("error", f"{type(error).__name__}: {error}")


@cache
def _resolved(target: str) -> Target:
    return resolve(target)
