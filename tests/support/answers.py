"""Records that may answer a build, and measurements made up."""

from __future__ import annotations

from typing import Any

import pytest
from made_records import SPEC, record

from convgen.hardware.machine import machine
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate
from convgen.lowering.schedule import Candidate
from convgen.records.outcome import Result
from convgen.tuning import recheck as recheck_module

OTHER = {"convgen": "0.0.1", "tvm": "0.26.0", "llvm": "19"}


def another() -> Candidate:
    """A candidate that is neither the default nor the reference."""
    target = resolve().on(2)  # as the records are: what the default is depends on it
    default = default_candidate(SPEC, target)
    found = (Candidate(default.schedule, picks) for picks in default.schedule.space(SPEC, target))
    return next(c for c in found if c != default and not c.schedule.reason_against(SPEC, target, c.picks))


def final(candidate: Candidate | None = None, seconds: float = 1e-3, winner: bool | None = None, **changes: Any) -> Any:
    """A record of a final comparison, where the default took as long."""
    note: dict[str, Any] = {"final": True, "default_seconds": seconds} | ({} if winner is None else {"winner": winner})
    return record(candidate, seconds, **{"note": note, **changes})


def elsewhere(change: int = 1) -> str:
    """The fingerprint of a machine like this one, with other CPUs in number."""
    model, _, count = machine().fingerprint.rpartition("-")
    return f"{model}-{int(count) + change}"


def pretend(monkeypatch: pytest.MonkeyPatch, results: dict[Candidate, Result]) -> list[list[Candidate]]:
    """Measurements that end so; returns what was measured, call by call."""
    calls = []

    def measured(spec: Any, target: Any, threads: int, candidates: Any, pools: Any) -> dict[Candidate, Result]:
        calls.append(list(dict.fromkeys(candidates)))
        return {candidate: results[candidate] for candidate in calls[-1]}

    monkeypatch.setattr(recheck_module, "measure_in_turn", measured)
    return calls


def took(seconds: float) -> Result:
    return Result("ok", (seconds,) * 5)
