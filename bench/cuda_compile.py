"""What the compiler makes of layers for GPUs: registers, spills, shared memory, instructions; and how long the model
that chose a schedule says it takes. It needs no GPU.

It imports nothing else of this folder: worker processes do not know the folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convgen.cuda.code import compile_images, disassembled, generate
from convgen.errors import ConvgenError
from convgen.formats.sources import write_text
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate
from convgen.lowering.lower import lower
from convgen.lowering.versions import versions
from convgen.measure.workers import Workers
from convgen.problem.spec import ConvSpec
from convgen.processes import call_in_file
from convgen.records.outcome import Result
from convgen.report.markdown import code, escaped, markdown_table

#: What tells rows apart: a layer's descriptor and the spelling of a target.
Key = tuple[str, str]

#: Seconds that a layer may take to compile.
COMPILE_SECONDS = 300.0
#: Instructions that are counted: matrix units, asynchronous copies and stores, loads of matrices, sums of f32.
INSTRUCTIONS = ("HMMA", "HGMMA", "IMMA", "IGMMA", "LDGSTS", "UTMALDG", "UTMASTG", "LDSM", "FFMA")


def compiled(descriptor: str, spelling: str) -> dict[str, Any]:
    """The row of a layer's default kernel; runs in a worker process."""
    row: dict[str, Any] = {"spec": descriptor, "target": spelling, "versions": versions()}
    try:
        spec, target = ConvSpec.parse(descriptor), resolve(spelling)
        candidate = default_candidate(spec, target)
        cycles = candidate.schedule.cost(spec.core, target) * target.rates.clock
        predicted = round(cycles) if math.isfinite(cycles) else None
        row |= {"schedule": candidate.schedule.id, "candidate": str(candidate), "predicted_cycles": predicted}
        source = generate(lower(spec, target, candidate))
        images, resources = compile_images(source, target)
        counts = dict.fromkeys(INSTRUCTIONS, 0)
        for instruction in re.findall(rf"\b({'|'.join(INSTRUCTIONS)})\b", disassembled(dict(images)[target.arch])):
            counts[instruction] += 1
        row |= {"functions": [asdict(function) for function in resources], "instructions": counts, "error": ""}
    except ConvgenError as error:
        row["error"] = f"{type(error).__name__}: {error}"
    except Exception as error:  # a schedule's bug is what this is to find
        row["error"] = f"{type(error).__name__}: {error}".strip()
    return row


def compile_layers(wanted: Sequence[Key], results: Path, console: Console, *, jobs: int, fresh: bool = False) -> int:
    """Compile the layers that ``results`` has no row of, or one that is not whole; write rows and tables.

    Args:
        wanted: in the order of the tables.
        jobs: worker processes.
        fresh: compile all layers.

    Returns:
        How many of the layers failed.
    """
    path = results / "compile.jsonl"
    kept = _read(path)
    complete = {key for key, row in kept.items() if is_whole(row)}
    missing = [key for key in wanted if fresh or key not in complete]
    _compile_missing(missing, kept, path, console, jobs)
    rows = [kept[key] for key in wanted if key in kept]
    write_text("".join(json.dumps(row) + "\n" for row in kept.values()), path)
    write_text(compile_report(rows), results / "compile.md")
    failed = sum(bool(row["error"]) for row in rows)
    spilled = sum(any(function["spilled"] for function in row.get("functions", [])) for row in rows)
    console.print(f"{len(rows)} layers, {failed} failed, {spilled} spill; wrote {results / 'compile.md'}")
    return failed


def is_whole(row: dict[str, Any]) -> bool:
    """Whether a row has all there is to know, and nothing that was to be mended: an error, or registers in memory."""
    spilled = any(function["spilled"] for function in row.get("functions", []))
    return not row["error"] and "predicted_cycles" in row and not spilled


def _read(path: Path) -> dict[Key, dict[str, Any]]:
    """The rows of a file; a line that was cut off is left out."""
    kept: dict[Key, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError, KeyError):
                row = json.loads(line)
                kept[row["spec"], row["target"]] = row
    return kept


def _compile_missing(
    missing: Sequence[Key], kept: dict[Key, dict[str, Any]], path: Path, console: Console, jobs: int
) -> None:
    """Compile layers in worker processes; each row is in ``kept`` and in the file as soon as it is known."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    workers = Workers(jobs, "build_error", COMPILE_SECONDS, uses=64)
    try:
        with (
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
            path.open("a", encoding="utf-8") as file,
        ):
            task = progress.add_task("compiling", total=len(missing))
            futures = {workers.submit(call_in_file, __file__, compiled.__name__, *key): key for key in missing}
            for future in as_completed(futures):
                row = future.result()
                if isinstance(row, Result):  # the compiler crashed, or takes too long
                    spec, target = futures[future]
                    error = f"{row.outcome}: {row.error}"
                    row = {"spec": spec, "target": target, "versions": versions(), "error": error}
                kept[row["spec"], row["target"]] = row
                file.write(json.dumps(row) + "\n")
                file.flush()
                progress.advance(task)
                if row["error"]:
                    progress.print(f"{row['spec']} {row['target']}: {_last_line(row)}")
    finally:
        workers.close()


def _last_line(row: dict[str, Any]) -> str:
    """Of a row's error."""
    return str(row["error"]).strip().splitlines()[-1][:300]


def compile_report(rows: Sequence[dict[str, Any]]) -> str:
    """What the compiler says, as Markdown: the failures, then a table per architecture and mode."""
    made_with = ", ".join(f"{name} {version}" for name, version in rows[-1]["versions"].items()) if rows else ""
    today = datetime.now(UTC).date().isoformat()
    lines = ["# What the compiler makes of the defaults", "", f"{today}, {made_with}.", ""]
    lines += [
        "Predicted cycles are the cost model's, at the clock of the architecture's usual device: of no measurement.",
        "",
    ]
    if failures := [row for row in rows if row["error"]]:
        lines += ["## Failures", ""]
        lines += [f"- {code(row['spec'])} {row['target']}: {escaped(_last_line(row))}" for row in failures]
        lines.append("")
    header = [
        "layer",
        "schedule",
        "launches>",
        "registers>",
        "spilled bytes>",
        "shared KiB>",
        "threads>",
        "predicted cycles>",
    ]
    header += [f"{name}>" for name in INSTRUCTIONS]
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        spec = ConvSpec.parse(row["spec"])
        mode = "tf32" if spec.accuracy == "tf32" else spec.dtype
        cells = groups.setdefault(f"{row['target']}, {mode}", [])
        if not row["error"]:
            cells.append(_cells(row))
    for heading, cells in groups.items():
        lines += [f"## {heading}", "", *markdown_table((header, cells)), ""]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    """A line of the table: the largest need of the layer's functions, and what they spill together."""
    functions = row["functions"]
    most = {field: max(function[field] for function in functions) for field in ("registers", "shared", "threads")}
    spilled = sum(function["spilled"] for function in functions)
    figures = [len(functions), most["registers"], spilled, f"{most['shared'] / 1024:.1f}", most["threads"]]
    figures.append("–" if row["predicted_cycles"] is None else row["predicted_cycles"])
    figures += [row["instructions"][instruction] for instruction in INSTRUCTIONS]
    return [code(row["spec"]), row["schedule"], *map(str, figures)]
