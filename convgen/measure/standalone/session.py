"""One run over a bundle: every trial that has no result yet, and each layer's comparison of its fastest."""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any

from .bundle import IDENTITY, Bundle
from .child import answer
from .cudnn import timed
from .facts import physical_memory
from .results import Results, now
from .sanitizer import TOOLS, sanitized
from .words import candidate, duration, problem, tell

#: Addresses that the C library sets aside for a thread: its stack and a heap.
_THREAD_BYTES = 256 << 20


class Session:
    """One run over a bundle.

    Args:
        timeout: seconds a candidate may take.
        memory: bytes it may take, 0: no limit; None: what the bundle says of the layer.
        minutes: after which no candidate is begun; None: no limit.

    Attributes:
        refused: targets whose code does not run here, and why.
        done: the line of each trial that has a result, by the trial's key.
    """

    def __init__(
        self, bundle: Bundle, results: Results, timeout: float, memory: int | None, minutes: float | None = None
    ) -> None:
        self.bundle, self.results, self.timeout, self.memory = bundle, results, timeout, memory
        self.trials: list[dict[str, Any]] = bundle.manifest["trials"]
        self.timing: dict[str, Any] = bundle.manifest["timing"]
        self.refused: dict[str, str] = {}
        self.done = {line["key"]: line for line in results.lines if line["kind"] == "trial"}
        self._compared = {line["group"] for line in results.lines if line["kind"] == "final"}
        self._sanitized = {(line["key"], line["tool"]) for line in results.lines if line["kind"] == "sanitized"}
        self._beside = {line["group"] for line in results.lines if line["kind"] == "peer"}
        self._without_cudnn = bundle.manifest["device"] != "cuda"
        self._start, self._count = time.monotonic(), 0
        self._end = None if minutes is None else self._start + 60 * minutes

    @property
    def is_over(self) -> bool:
        """Whether no candidate is begun any more."""
        return self._end is not None and time.monotonic() >= self._end

    def measure(self) -> None:
        """Measure every group of trials that race with each other, each to its end."""
        groups: dict[int, list[dict[str, Any]]] = {}
        for trial in self.trials:
            groups.setdefault(trial["group"], []).append(trial)
        here = platform.machine()
        for target in self.bundle.manifest["targets"]:
            if target["architecture"] != here:
                self._refuse(target["spelling"], f"for {target['architecture']}, and this machine is {here}")
        for number, trials in groups.items():
            for trial in trials:
                if self.is_over:
                    return
                if self._is_left(trial):
                    self._trial(trial, trials)
            if self.bundle.feature(trials[0]):  # whether it is right counts, not which is the fastest
                continue
            if trials[0]["target"] not in self.refused and number not in self._compared:
                self._final(number, trials)
            if not self._without_cudnn and number not in self._beside:
                self._peer(number, trials[0])

    def sanitize(self, program: str) -> None:
        """Run what is right of the layers of a self-check under compute-sanitizer, which takes its time."""
        for tool in TOOLS:
            for trial in self.trials:
                line = self.done.get(trial["key"])
                is_right = line is not None and line["outcome"] == "ok"
                if not self.bundle.feature(trial) or not is_right or (trial["key"], tool) in self._sanitized:
                    continue
                if self.is_over:
                    return
                found = sanitized(program, tool, self._job("check", [trial], 0.0), self.timeout)
                self.results.add({"kind": "sanitized", "key": trial["key"], "tool": tool, **found, "when": now()})
                clean = {0: "nothing found", None: f"does not run here: {found['said']}"}
                tell(f"{tool}: {clean.get(found['found'], found['said'])}: {trial['spec']}: {candidate(trial)}")

    def _is_left(self, trial: dict[str, Any]) -> bool:
        """Whether a trial is still to be measured."""
        return trial["key"] not in self.done and not trial["known"] and trial["target"] not in self.refused

    def _trial(self, trial: dict[str, Any], rivals: list[dict[str, Any]]) -> None:
        """Measure one, and write its line."""
        start = time.monotonic()
        if trial["failed"]:  # to compile
            result: dict[str, Any] = trial["failed"]
        else:
            best = min((seconds for seconds, _ in self._ranked(rivals)), default=0.0)
            result = self._ask("trial", [trial], self.timing["hopeless"] * best)
        if "refused" in result:
            self._refuse(trial["target"], result["refused"])
            return
        line = {name: trial[name] for name in ("key", "library_sha256", *IDENTITY)}
        line.update(outcome=result["outcome"], samples=result.get("samples", []), error=result.get("error", ""))
        line.update(kind="trial", when=now(), cost=round(time.monotonic() - start, 3))
        line.update(reference=result.get("reference"))
        self.results.add(line)
        self.done[trial["key"]] = line
        self._count += 1
        self._report(trial, line)

    def _final(self, number: int, trials: list[dict[str, Any]]) -> None:
        """Time the fastest and the default in turn, and write the group's line."""
        good = [trial for _, trial in self._ranked(trials)]
        finalists = good[: self.timing["finalists"]]
        finalists += [trial for trial in good if trial["default"] and trial not in finalists]
        finalists = [trial for trial in finalists if trial["library"]]
        samples: list[list[float]] = []
        if finalists:
            result = self._ask("final", finalists, 0.0)
            if "refused" in result:
                self._refuse(finalists[0]["target"], result["refused"])
                return
            samples = result.get("samples", [])
            if not samples:  # one of them fails now and then: it shows when each runs by itself
                alone = [(trial, self._ask("trial", [trial], 0.0)) for trial in finalists]
                right = [(trial, found["samples"]) for trial, found in alone if found.get("outcome") == "ok"]
                finalists = [trial for trial, _ in right]
                samples = [taken for _, taken in right]
        entries = [{name: trial[name] for name in ("key", "default", *IDENTITY)} for trial in finalists]
        self.results.add({"kind": "final", "group": number, "trials": entries, "samples": samples, "when": now()})
        if finalists:
            seconds, winner = min((statistics.median(taken), i) for i, taken in enumerate(samples))
            best = finalists[winner]
            tell(f"         {duration(seconds)}  is the best of {problem(best)}: {candidate(best)}")

    def _peer(self, number: int, trial: dict[str, Any]) -> None:
        """Time what cuDNN makes of a group's layer, and write its line; not again where there is no cuDNN."""
        layer = self.bundle.manifest["layers"][trial["layer"]].get("convolution")
        if layer is None or trial["target"] in self.refused:
            return
        found = timed(layer, self.timeout)
        if "missing" in found:
            self._without_cudnn = True
            tell("cuDNN: left out: {}".format(found["missing"]))
            return
        self.results.add({"kind": "peer", "group": number, "peer": "cudnn", "when": now(), **found})
        seconds = min(map(statistics.median, found["samples"].values()))
        tell(f"         {duration(seconds)}  cuDNN takes for {problem(trial)}")

    def _ranked(self, trials: list[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
        """Median seconds and trial of those that are right, fastest first."""
        right = []
        for trial in trials:
            line = self.done.get(trial["key"])
            if line is not None and line["outcome"] == "ok":
                right.append((statistics.median(line["samples"]), trial))
            elif trial["known"]:
                right.append((trial["known"], trial))
        return sorted(right, key=lambda pair: pair[0])

    def _ask(self, kind: str, trials: list[dict[str, Any]], hopeless: float) -> dict[str, Any]:
        """What a process of its own answers for one trial, or for several that are compared."""
        return answer(self._job(kind, trials, hopeless), self.timeout * len(trials))

    def _job(self, kind: str, trials: list[dict[str, Any]], hopeless: float) -> dict[str, Any]:
        """What a process is asked for."""
        manifest, first = self.bundle.manifest, trials[0]
        return {
            "kind": kind,
            "root": self.bundle.root,
            "device": manifest["device"],
            "check": next(t["check"] for t in manifest["targets"] if t["spelling"] == first["target"]),
            "layer": manifest["layers"][first["layer"]],
            "trials": trials,
            "timing": self.timing,
            "hopeless": hopeless,
            "memory": self._memory_limit(trials),
        }

    def _memory_limit(self, trials: list[dict[str, Any]]) -> int:
        """Bytes of address space for a process that loads these trials; 0: no limit."""
        layer = self.bundle.manifest["layers"][trials[0]["layer"]]
        size: int = min(layer["memory"], physical_memory() // 10 * 9) if self.memory is None else self.memory
        # Threads take addresses for their stacks and heaps that they hardly use.
        return size and size * len(trials) + trials[0]["threads"] * _THREAD_BYTES

    def _refuse(self, target: str, why: str) -> None:
        self.refused[target] = why
        tell(f"{target}: left out: {why}")

    def _report(self, trial: dict[str, Any], line: dict[str, Any]) -> None:
        """Tell how a trial ended, and how long the others will take."""
        left = sum(map(self._is_left, self.trials))
        total = self._count + left
        rate = (time.monotonic() - self._start) / self._count
        ended = duration(statistics.median(line["samples"])) if line["outcome"] == "ok" else f"{line['outcome']:>11}"
        seconds = round(left * rate)
        rest = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        tell(f"[{self._count:>{len(str(total))}}/{total}] {ended}  {problem(trial)}: {candidate(trial)}  ({rest})")
