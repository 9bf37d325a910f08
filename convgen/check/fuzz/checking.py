"""What a worker process runs: one check of one candidate."""

from __future__ import annotations

from functools import cache

from ...errors import BuildError, Inapplicable, SpecError, UnsupportedError
from ...hardware.target import Target, resolve
from ...kernel.kernel import compile_candidate
from ...lowering.candidates import default_candidate, parse_candidate
from ...problem.spec import ConvSpec
from ..validate import validate
from .outcome import Outcome


def check(spec: str, target: str, threads: int, seed: int, schedule: str | None, picks: str | None) -> Outcome:
    """Build a candidate and validate it, as ``convgen validate`` does; never raises."""
    try:
        layer, where = ConvSpec.parse(spec), _resolved(target)
        if schedule is None:
            candidate = default_candidate(layer, where)
        else:
            candidate = parse_candidate(layer, where, schedule, picks)
        report = validate(compile_candidate(layer, where, candidate, threads), seed=seed)
    except BuildError as error:
        return Outcome("build", str(error))
    except (SpecError, Inapplicable, UnsupportedError) as error:
        return Outcome("refused", str(error))
    except Exception as error:  # whatever it is, it is a finding
        return Outcome("error", f"{type(error).__name__}: {error}")
    made = tuple(made.name for made in report.checks)
    for failed in report.checks:
        if not failed.passed:
            kind = "wrong" if failed.name in ("float", "exact", "integers", "odd", "autograd") else failed.name
            return Outcome(kind, f"{failed.name}: {failed.found}", made)
    return Outcome("ok", "", made, report.worst_error)


@cache
def _resolved(target: str) -> Target:
    return resolve(target)
