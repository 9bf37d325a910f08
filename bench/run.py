"""Measure networks against the other libraries, layer by layer; stops and resumes anywhere.

    python bench/run.py bench/problems/resnet50.json --threads 1,2 --seconds 30

For each layer and thread count: tune it (``--seconds 0``: don't), then time the zero-trial kernel, the
tuned one and every peer in turn, in this process. Each row is appended to a JSON-lines file the moment
it is known; a row that is there is not measured again. At the end the table is written beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
from pathlib import Path
from typing import Any

from rich.console import Console

import convgen
from convgen.build import compile_candidate, default_candidate, record_candidate, versions
from convgen.machine import machine, measured_peak
from convgen.peers import PEERS, compare
from convgen.records import RecordStore
from convgen.sources import SpecEntry, read_specs
from convgen.target import resolve
from convgen.tune import Tuner

RESULTS = Path(__file__).parent / "results"


def measure(entry: SpecEntry, threads: int, options: argparse.Namespace, tuner: Tuner) -> dict[str, Any]:
    """One row: the layer's times here, and what it was measured with."""
    spec, target = entry.spec, tuner.target
    default = default_candidate(spec, target)
    kernels = {"default": compile_candidate(spec, target, default, threads)}
    record = tuner.tune(spec, seconds=options.seconds) if options.seconds else None
    if record is not None and (candidate := record_candidate(record, spec, target)):
        tuned = compile_candidate(spec, target, candidate, threads, record=record)
        kernels = {"tuned": tuned, **kernels}
    comparison = compare(kernels, options.peers, threads, rounds=options.rounds)
    first = next(iter(kernels.values()))
    return {
        **comparison.to_dict(),
        "names": list(entry.names),
        "count": entry.count,
        "candidates": {name: f"{k.schedule}({k.picks})" for name, k in kernels.items()},
        "schedule": first.schedule,
        "peak": measured_peak(threads),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": machine().cpu,
        "fingerprint": machine().fingerprint,
        "python": platform.python_version(),
        "versions": versions(),
    }


def spread(row: dict[str, Any]) -> float:
    """The factor that the interval of a row's ratio spans."""
    return row["interval"][1] / row["interval"][0] if row["interval"] else 1.0


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def microseconds(timings: list[dict[str, Any]], name: str) -> str:
    seconds = next((t["seconds"] for t in timings if t["name"] == name), None)
    return f"{seconds * 1e6:.0f}" if seconds else "–"


def table(rows: list[dict[str, Any]], peers: list[str]) -> str:
    """The rows as Markdown: one table per thread count, times in µs, ratios to the best peer."""
    lines = []
    for threads in sorted({row["threads"] for row in rows}):
        chosen = [row for row in rows if row["threads"] == threads]
        one = chosen[0]
        found = {t["name"]: t["version"] for row in chosen for t in row["peers"] if t["version"]}
        packages = ", ".join(f"{name} {version}" for name, version in {**one["versions"], **found}.items())
        lines += [
            f"## {threads} thread{'s' * (threads > 1)}",
            "",
            f"{one['cpu']} ({one['fingerprint']}), {one['date']}, Python {one['python']}, {packages}.",
            f"Measured FMA peak {one['peak'] / 1e9:.0f} GFLOP/s. Times in µs, medians of alternating turns;",
            "ratio = best peer / convgen (tuned where there is one), with its 95 % interval.",
            "",
            f"| layer | × | convgen | default | {' | '.join(peers)} | ratio | of peak | schedule |",
            "|---|--:|--:|--:|" + "--:|" * len(peers) + "--:|--:|---|",
        ]
        for row in chosen:
            seconds = row["kernels"][0]["seconds"]
            cells = [microseconds(row["peers"], peer) for peer in peers]
            ratio = "–"
            if row["ratio"]:
                low, high = row["interval"]
                ratio = f"**{row['ratio']:.2f}** ({low:.2f}–{high:.2f})"
            own = [f"{seconds * 1e6:.0f}", microseconds(row["kernels"], "default")]
            rest = [ratio, f"{row['flops'] / seconds / row['peak']:.0%}", row["schedule"]]
            lines.append("| " + " | ".join(["`" + row["spec"] + "`", str(row["count"]), *own, *cells, *rest]) + " |")
        rated = [row for row in chosen if row["ratio"]]
        if rated:
            defaults = [r["ratio"] * r["kernels"][0]["seconds"] / r["kernels"][-1]["seconds"] for r in rated]
            mean, default_mean = geometric_mean([r["ratio"] for r in rated]), geometric_mean(defaults)
            faster = sum(r["ratio"] > 1 for r in rated)
            slower = sum(r["interval"][1] < 1 for r in rated)
            lines += [
                "",
                f"Geometric mean of the ratios: **{mean:.2f}** (default: {default_mean:.2f});",
                f"{faster} of {len(rated)} layers faster than the best peer, {slower} slower beyond the interval.",
            ]
            own = sum(r["kernels"][0]["seconds"] * r["count"] for r in rated)
            best = sum(min(t["seconds"] for t in r["peers"] if t["seconds"]) * r["count"] for r in rated)
            lines += [
                "",
                f"All convolutions of the network: {own * 1e3:.1f} ms, best peer per layer {best * 1e3:.1f} ms.",
            ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("problems", type=Path, nargs="+", help="spec files or ONNX models")
    parser.add_argument("--threads", type=lambda s: [int(t) for t in s.split(",")], default=[1, 2])
    parser.add_argument("--seconds", type=float, default=30.0, help="tuning time per layer; 0: defaults only")
    parser.add_argument("--peers", type=lambda s: s.split(","), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--records", type=Path, help="record store; the default one unless given")
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are there")
    parser.add_argument(
        "--unsteady",
        type=float,
        default=math.inf,
        metavar="F",
        help="measure rows again whose ratio's interval spans more than a factor F: the machine was disturbed",
    )
    options = parser.parse_args()
    console = Console(stderr=True)
    RESULTS.mkdir(exist_ok=True)
    for problem in options.problems:
        kept = RESULTS / f"{problem.stem}.jsonl"
        lines = kept.read_text().splitlines() if kept.exists() and not options.fresh else []
        rows = {(r["spec"], r["threads"]): r for r in map(json.loads, lines)}
        entries = read_specs(problem)
        for threads in options.threads:
            with Tuner(resolve("cpu"), threads, RecordStore(options.records)) as tuner:
                for index, entry in enumerate(entries, 1):
                    key = (entry.spec.descriptor, threads)
                    if key in rows and spread(rows[key]) <= options.unsteady:
                        continue
                    row = rows[key] = measure(entry, threads, options, tuner)
                    kept.write_text("".join(json.dumps(r) + "\n" for r in rows.values()))
                    ratio = f"{row['ratio']:.2f}" if row["ratio"] else "no peer"
                    console.print(
                        f"{problem.stem} {threads}T {index}/{len(entries)} {key[0]}: {ratio} {row['schedule']}"
                    )
        order = [(e.spec.descriptor, t) for t in options.threads for e in entries]
        text = table([rows[key] for key in order], options.peers)
        title = f"# {problem.stem}: convgen {convgen.__version__}"
        (RESULTS / f"{problem.stem}.md").write_text(f"{title}\n\n{text}")
        console.print(f"wrote {RESULTS / problem.stem}.md")


if __name__ == "__main__":
    main()
