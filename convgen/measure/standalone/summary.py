"""What came of a run, for people: which candidates are right, by schedule; what is wrong, and with which feature."""

from __future__ import annotations

import statistics
from typing import Any, Dict, List

from .bundle import Bundle
from .results import Results
from .words import candidate, duration, one_line, problem


def summary(bundle: Bundle, results: Results) -> str:
    """Lines about the machine, each schedule, everything that is not right, and each layer's fastest."""
    trials = {trial["key"]: trial for trial in bundle.manifest["trials"]}
    done = [(trials[line["key"]], line) for line in results.lines if line["kind"] == "trial"]
    facts = results.lines[0]["facts"]
    device = facts.get("gpu") or {}
    lines = ["# {}".format(device.get("name") or "CPU"), ""]
    lines += (
        _right(done, len(trials)) + _wrong(bundle, done) + _sanitized(trials, results) + _fastest(bundle, done, results)
    )
    return "\n".join(one_line(line) for line in lines) + "\n"


def _right(done: List[Any], count: int) -> List[str]:
    by_schedule: Dict[str, List[bool]] = {}
    for trial, line in done:
        by_schedule.setdefault(trial["schedule"], []).append(line["outcome"] == "ok")
    lines = [f"{len(done)} of {count} candidates were tried; right:"]
    return (
        lines + [f"  {schedule:<20} {sum(ok):>5} of {len(ok)}" for schedule, ok in sorted(by_schedule.items())] + [""]
    )


def _wrong(bundle: Bundle, done: List[Any]) -> List[str]:
    lines = []
    for trial, line in done:
        if line["outcome"] != "ok":
            feature = bundle.feature(trial) or trial["spec"]
            lines.append(f"  {line['outcome']:<12} {feature}: {problem(trial)}: {candidate(trial)}: {line['error']}")
    return ["not right:", *lines, ""] if lines else []


def _sanitized(trials: Dict[str, Any], results: Results) -> List[str]:
    ran = [line for line in results.lines if line["kind"] == "sanitized"]
    if not ran:
        return []
    lines = []
    for tool in sorted({line["tool"] for line in ran}):
        found = [line for line in ran if line["tool"] == tool]
        clean = sum(line["found"] == 0 for line in found)
        lines.append(f"compute-sanitizer {tool}: nothing found in {clean} of {len(found)}")
        for line in found:
            if line["found"] != 0:
                what = "does not run here" if line["found"] is None else f"{line['found']} errors"
                trial = trials[line["key"]]
                lines.append(f"  {what}: {trial['spec']}: {candidate(trial)}: {line['said']}")
    return [*lines, ""]


def _fastest(bundle: Bundle, done: List[Any], results: Results) -> List[str]:
    """Of each layer that which is fastest where the best were timed in turn; before that was done, of its trials."""
    best: Dict[int, Any] = {}
    for trial, line in done:
        if line["outcome"] == "ok" and not bundle.feature(trial):
            taken = statistics.median(line["samples"])
            if trial["group"] not in best or taken < best[trial["group"]][0]:
                best[trial["group"]] = (taken, trial)
    for line in results.lines:
        if line["kind"] == "final" and line["samples"]:
            taken, index = min((statistics.median(samples), i) for i, samples in enumerate(line["samples"]))
            best[line["group"]] = (taken, line["trials"][index])
    beside = {line["group"]: _peer(line) for line in results.lines if line["kind"] == "peer"}
    lines = []
    for group, (taken, trial) in best.items():
        against = f"; cuDNN {duration(beside[group]).strip()}, {beside[group] / taken:.2f}x" if group in beside else ""
        lines.append(f"  {duration(taken)}  {problem(trial)}: {candidate(trial)}{against}")
    return ["fastest:", *lines] if lines else []


def _peer(line: Dict[str, Any]) -> float:
    """Median seconds of the faster way to lay tensors out."""
    seconds: float = min(map(statistics.median, line["samples"].values()))
    return seconds
