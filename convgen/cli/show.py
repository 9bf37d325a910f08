"""``convgen show``, ``schedules`` and ``targets``: what is known before anything is built."""

from __future__ import annotations

import importlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import BuildError, MeasureError, UnsupportedError
from ..formats.entries import AccuracyRule, SpecEntry
from ..report.words import picks_text, plural
from .common import (
    SPEC_HELP,
    Choice,
    candidate_options,
    check_picks,
    duration,
    emit,
    forced_candidates,
    json_option,
    layers_argument,
    note,
    note_busy,
    note_left_out,
    read_layers,
    say,
    size,
    target_option,
    threads_option,
)
from .separable_options import refuse_for_separable, separable_of
from .tables import fitted, say_table, table

if TYPE_CHECKING:
    from ..hardware.target import Target
    from ..problem.spec import ConvSpec

KINDS = ("tir", "ll", "asm", "cuda", "ptx", "sass")
#: Columns of what a core waits for (``Waits`` of ``cpu/model.py``).
WAITS = ("crowded", "paged", "phased", "strips", "sums", "scattered")


@click.command(epilog=SPEC_HELP, short_help="Explain a layer: work, limits, schedules.")
@layers_argument
@target_option
@threads_option()
@candidate_options
@click.option(
    "--ir",
    type=Choice(KINDS),
    help="Print the code of a candidate instead: scheduled TIR; for a CPU LLVM IR or assembly; for a GPU CUDA C++, "
    "PTX or machine code.",
)
@json_option
def show(
    spec: tuple[str, ...],
    dims: dict[str, int],
    accuracy: tuple[AccuracyRule, ...],
    target: str,
    threads: int | None,
    schedule: str | None,
    picks: str | None,
    ir: str | None,
    as_json: bool,
) -> None:
    """Explain a layer: shapes, work, limits, and the schedules that apply.

    A file or model with several layers is shown as a list: each layer with its share of the work of all
    these convolutions, and the reasons why other layers could not be read.

    The roofline is the least time that the layer takes on this machine's CPU: its arithmetic at the
    measured peak, or reading and writing its tensors once at the measured bandwidth of the nearest of
    L2, L3 and memory that holds them all.
    """
    check_picks(schedule, picks)
    if schedule and not ir:
        raise click.UsageError("--schedule needs --ir: it chooses the candidate to print")
    if (separable := separable_of(spec, accuracy)) is not None:
        refuse_for_separable(schedule=schedule, ir=ir)
        from .separable import show_separable  # and what compiles networks

        show_separable(separable, as_json)
        return
    skipped: list[str] = []
    # Where nothing could be read the second one raises: it says what is wrong.
    entries = read_layers(spec, dims, accuracy, skipped) or read_layers(spec, dims, accuracy)
    if ir:
        if len(entries) > 1:
            raise click.UsageError(f"--ir: expected a single layer, found {len(entries)}")
        _print_source(entries[0].spec, target, schedule, picks, ir, as_json)
    elif len(entries) > 1 or skipped:
        _print_layers(entries, skipped, _separables(spec, dims), as_json)
    else:
        _print_layer(entries[0], target, threads, as_json)


def _print_source(
    spec: ConvSpec, target: str, schedule: str | None, picks: str | None, kind: str, as_json: bool
) -> None:
    from ..hardware.target import resolve
    from ..kernel.kernel import source
    from ..lowering.candidates import default_candidate
    from ..lowering.lower import lower

    resolved = resolve(target)
    (forced,) = forced_candidates([SpecEntry(spec)], resolved, schedule, picks)
    candidate = forced or default_candidate(spec, resolved)
    text = source(lower(spec, resolved, candidate), kind)
    if as_json:
        facts = {"spec": spec.descriptor, "target": resolved.spelling, "schedule": candidate.schedule.id}
        emit(facts | {"picks": dict(candidate.picks), "kind": kind, "text": text})
    else:
        say(text)


# ---- several layers ---------------------------------------------------------------------------


def _separables(words: tuple[str, ...], dims: dict[str, int]) -> list[str]:
    """The separable problems in a file, each once."""
    from ..formats.separable import read_separables

    path = Path(" ".join(words))
    return list(dict.fromkeys(map(str, read_separables(path, dims)))) if path.is_file() else []


def _print_layers(entries: list[SpecEntry], skipped: list[str], separables: list[str], as_json: bool) -> None:
    total = sum(entry.count * entry.spec.flops for entry in entries)
    layers: list[dict[str, Any]] = [
        {
            "names": list(entry.names),
            "count": entry.count,
            "spec": entry.spec.descriptor,
            "flops": entry.spec.flops,
            "share": entry.count * entry.spec.flops / total if total else 0.0,
        }
        for entry in entries
    ]
    if as_json:
        count = sum(entry.count for entry in entries)
        emit({"flops": total, "convolutions": count, "layers": layers, "skipped": skipped, "separable": separables})
        return
    rows = [
        [_names(layer["names"]), layer["count"], f"{layer['flops'] / 1e9:.4g}", f"{layer['share']:.1%}", layer["spec"]]
        for layer in layers
    ]
    say_table(table(["layer", "count>", "GFLOP>", "share>", "spec"], rows))
    count = sum(entry.count for entry in entries)
    layers_text = f"{plural(len(entries), 'different layer')}, {count} in all"
    say(f"{layers_text}; shares are of their {total / 1e9:.4g} GFLOP together")
    if separables:
        say("\nA depthwise and a 1×1 convolution that reads it are a problem of their own, too, which build takes:")
        say("\n".join(f"  {text}" for text in separables))
    note_left_out(skipped)


def _names(names: list[str]) -> str:
    """The first name, and how many more there are."""
    first = names[0] if names else ""
    return f"{first} +{len(names) - 1}" if len(names) > 1 else first


# ---- one layer --------------------------------------------------------------------------------


def _print_layer(entry: SpecEntry, target: str, threads: int | None, as_json: bool) -> None:
    from ..hardware.target import check_threads, resolve

    spec, resolved = entry.spec, resolve(target)
    count = check_threads(threads, resolved)
    document = {
        "names": list(entry.names),
        "spec": spec.descriptor,
        "key": spec.key,
        "name": spec.name,
        "fields": spec.to_dict(),
        "shapes": {name: list(shape) for name, shape in spec.shapes.items()},
        "flops": spec.flops,
        "bytes": spec.bytes,
        "intensity": spec.flops / sum(spec.bytes.values()),
        "target": resolved.spelling,
        "roofline": _roofline(spec, count) if resolved.native and not resolved.on_device else None,
        "schedules": _schedules(spec, resolved),
    }
    if as_json:
        emit(document)
    else:
        say(_text(document))
    note_busy([], [count] if document["roofline"] else [])


def _roofline(spec: ConvSpec, threads: int) -> dict[str, Any] | None:
    """The least times of the arithmetic and of the traffic; None where the machine cannot be measured."""
    from ..hardware.roofline import roofline

    try:
        return roofline(spec, threads).to_dict()
    except (BuildError, MeasureError) as error:
        note(f"convgen: no roofline: {error}")
        return None


def _schedules(spec: ConvSpec, target: Target) -> list[dict[str, Any]]:
    """Every schedule: its space and default picks where it applies, the reason where it does not."""
    from ..lowering.candidates import default_candidate
    from ..lowering.discover import schedules_of

    core, chosen = spec.core, default_candidate(spec, target).schedule
    found = []
    for schedule in schedules_of(target.kind).values():
        reason = schedule.reason_against(core, target)
        facts: dict[str, Any] = {"id": schedule.id, "version": schedule.version, "reason_against": reason}
        if reason is None:
            facts["candidates"] = schedule.space(core, target).size
            facts["default"] = dict(schedule.default(core, target))
            facts["is_default"] = schedule is chosen
        found.append(facts)
    return found


def _text(document: dict[str, Any]) -> str:
    lines = [fitted(document["spec"])]
    for name, shape in document["shapes"].items():
        lines.append(f"  {name:<9} {' × '.join(map(str, shape)):<24} {size(document['bytes'][name]):>10}")
    work, traffic = document["flops"], sum(document["bytes"].values())
    limits = [f"  work       {work / 1e9:.4g} GFLOP over {size(traffic)}: {document['intensity']:.4g} FLOP/byte"]
    if roofline := document["roofline"]:
        threads = roofline["threads"]
        compute, memory = (duration(roofline[f"{kind}_seconds"] or None) for kind in ("compute", "memory"))
        peak, bandwidth = (f"{roofline[kind] / 1e9:.4g}" for kind in ("peak_flops", "bandwidth"))
        rate = f"{peak} GFLOP/s of {roofline['peak_of']}"
        limits += [
            f"  compute    {compute} at {rate}, measured on {plural(threads, 'thread')}",
            f"  memory     {memory} at {bandwidth} GB/s from {roofline['level']}: limited by {roofline['limited_by']}",
        ]
    lines += ["", *(fitted(limit, 13) for limit in limits), "", f"  schedules on {document['target']}"]
    width = max(len(facts["id"]) for facts in document["schedules"])
    for facts in document["schedules"]:
        if facts["reason_against"] is not None:
            lines.append(fitted(f"    {facts['id']:<{width}} no: {facts['reason_against']}", width + 5))
            continue
        picks = picks_text(facts["default"])
        mark = "  ← default" if facts["is_default"] else ""
        count = facts["candidates"]
        candidates = plural(count, "candidate") if count < 10**6 else f"10^{math.log10(count):.0f} candidates"
        lines.append(fitted(f"    {facts['id']:<{width}} {candidates}: {picks or 'no picks'}{mark}", width + 5))
    return "\n".join(lines)


# ---- lists ------------------------------------------------------------------------------------


def _summary(documented: object) -> str:
    """The first line of a docstring, its code quoted as on the command line."""
    return (getattr(documented, "__doc__", None) or "").strip().partition("\n")[0].replace("``", "`")


@click.command()
@json_option
def schedules(as_json: bool) -> None:
    """List the schedules."""
    from ..lowering.discover import schedules as found

    listed = [
        {"id": s.id, "version": s.version, "summary": _summary(importlib.import_module(type(s).__module__))}
        for s in found().values()
    ]
    if as_json:
        emit(listed)
    else:
        rows = [list(row.values()) for row in listed]
        say_table(table(["schedule", "version>", "what it does"], rows, prose="what it does"))


def _cores(listed: list[dict[str, Any]]) -> list[list[Any]]:
    """What is known of each CPU target's cores."""
    rows = []
    for entry in listed:
        if core := entry["core"]:
            rates = [f"{core[name]:.3g}" for name in ("fmas", "loads", "stores", "l2", "l3", "memory")]
            rows.append([entry["target"], f"{core['hertz'] / 1e9:.3g}", *rates, core["origin"]])
    return rows


def _waits(listed: list[dict[str, Any]]) -> list[list[Any]]:
    """What each CPU target's cores lose, as far as that is known."""
    found = [(entry["target"], entry["core"]["waits"]) for entry in listed if entry["core"]]
    return [[name, *(f"{waits[column]:.3g}" for column in WAITS), waits["origin"]] for name, waits in found]


@click.command()
@json_option
def targets(as_json: bool) -> None:
    """List the targets: families, and spellings worth knowing."""
    from ..cpu.model import core_of
    from ..hardware.discover import target_families
    from ..hardware.target import resolve

    listed = []
    for family, module in target_families().items():
        for spelling in module.known():
            try:
                found: Target | None = resolve(spelling)
            except UnsupportedError:  # this machine's GPU, where there is none
                found = None
            listed.append(
                {
                    "target": spelling,
                    "family": family,
                    "summary": _summary(module),
                    "resolved": found.spelling if found else None,
                    "vector_bits": found.vector_bits if found else None,
                    "cores": found.cores if found else None,
                    "native": found is not None and found.native,
                    "core": asdict(core_of(found)) if found and not found.on_device else None,
                }
            )
    if as_json:
        emit(listed)
        return
    rows = [
        [t["target"], t["resolved"] or "–", t["vector_bits"] or "–", "yes" if t["native"] else "no"] for t in listed
    ]
    say_table(table(["target", "means", "vector bits>", "runs here"], rows))
    say(f"\n{fitted('A core per cycle, as costs are predicted: FMAs, vectors, bytes.')}\n")
    say_table(table(["target", "GHz>", "FMAs>", "loads>", "stores>", "L2>", "L3>", "memory>", "facts"], _cores(listed)))
    lost = "What it loses besides: times as long, or cycles of a row, of a vector of sums, of a line."
    say(f"\n{fitted(lost)}\n")
    say_table(table(["target", *(f"{column}>" for column in WAITS), "facts"], _waits(listed)))
    say("")
    for family, module in target_families().items():
        say(fitted(f"{family}: {_summary(module)}"))
