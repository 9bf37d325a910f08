"""``convgen bench``: kernels beside other libraries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..sources import SpecEntry
from .common import (
    INTERRUPTED,
    candidate_options,
    check_names,
    check_picks,
    chosen_records,
    duration,
    emit,
    forced_candidates,
    json_option,
    label,
    layers_argument,
    note,
    read_layers,
    records_options,
    table,
    target_option,
)
from .generate import Work, chosen, describe, working

if TYPE_CHECKING:
    from ..schedule import Candidate

#: Names in :data:`convgen.peers.PEERS`, which is not imported for a wrong argument.
PEER_NAMES = ("onnxruntime", "torch", "openvino")


def _parse_threads(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    if text is None:
        return None
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= count <= 1024 for count in counts):
        raise click.BadParameter(f"expected numbers between 1 and 1024 joined by commas, found {text!r}")
    return list(dict.fromkeys(counts))


@click.command()
@layers_argument
@target_option
@click.option("--threads", callback=_parse_threads, metavar="N,…", help="Thread counts, as 1,2.  [default: all cores]")
@click.option(
    "--peers", default=",".join(PEER_NAMES), show_default=True, metavar="NAME,…", help="Libraries to compare with."
)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Rounds of timing.")
@records_options
@candidate_options
@json_option
def bench(
    spec: tuple[str, ...],
    dims: dict[str, int],
    target: str,
    threads: list[int] | None,
    peers: str,
    repeats: int,
    records: Path | None,
    no_records: bool,
    schedule: str | None,
    picks: str | None,
    as_json: bool,
) -> int:
    """Time kernels beside ONNX Runtime, PyTorch and OpenVINO.

    The same data and threads for all. They run in turn, several rounds, with a pause before each
    turn; times are medians. A ratio is the best peer's time over convgen's, above 1 where convgen is
    faster, with its 95 % confidence interval. Each peer's output is checked before it is timed.

    Each layer's kernel is its best record (then its default is timed too), or the default.
    """
    check_picks(schedule, picks)
    names = check_names("peers", peers, PEER_NAMES)
    entries = read_layers(spec, dims)
    results: list[dict[str, Any]] = []
    interrupted = False
    counts: list[int | None] = [*threads] if threads else [None]
    for count in counts:
        with working(entries, target, count, chosen_records(records, no_records)) as work:
            forced = forced_candidates(entries, work.target, schedule, picks)
            for entry, candidate in zip(work.layers(), forced, strict=True):
                result = _bench_layer(work, entry, candidate, names, repeats)
                results.append(result)
                work.view.finish(_line(result))
        interrupted = work.interrupted
        if interrupted:
            break

    if as_json:
        emit(
            {"target": work.target.spelling, "interrupted": interrupted, "layers": results, "totals": _totals(results)}
        )
    else:
        click.echo(_table(entries, results))
    if interrupted:
        note(f"convgen: interrupted: {len(results)} of {len(entries) * len(counts)} comparisons made")
        return INTERRUPTED
    return 0


def _bench_layer(
    work: Work, entry: SpecEntry, forced: Candidate | None, peers: list[str], repeats: int
) -> dict[str, Any]:
    from ..build import compile_candidate, default_candidate
    from ..machine import measured_peak
    from ..peers import compare

    kernels = {"convgen": work.kernel(entry, forced)}
    default = default_candidate(entry.spec, work.target)
    if kernels["convgen"].lowered.candidate != default:
        kernels["default"] = compile_candidate(entry.spec, work.target, default, work.threads)
    peak = measured_peak(work.threads)
    work.view.phase(f"timing {', '.join([*kernels, *peers])} on {work.threads} threads")
    comparison = compare(kernels, peers, work.threads, rounds=repeats)
    seconds = comparison.kernels[0].seconds or math.inf
    return describe(entry) | {
        **chosen(kernels["convgen"]),
        **comparison.to_dict(),
        "seconds": seconds,
        "gflops": entry.spec.flops / seconds / 1e9,
        "peak_gflops": peak / 1e9,
        "percent_of_peak": 100 * entry.spec.flops / seconds / peak,
    }


def _line(result: dict[str, Any]) -> str:
    facts = f"{duration(result['seconds'])}  {result['gflops']:.4g} GFLOP/s"
    return f"{facts}  {_ratio(result)} {result['best_peer'] or ''}".rstrip()


def _ratio(result: dict[str, Any]) -> str:
    if result["ratio"] is None:
        return "–"
    low, high = result["interval"]
    return f"{result['ratio']:.2f}× [{low:.2f}, {high:.2f}]"


def _table(entries: list[SpecEntry], results: list[dict[str, Any]]) -> str:
    """A row per layer and thread count, then what is not in it: totals, and peers with a problem."""
    if not results:
        return ""
    peers = [peer["name"] for peer in results[0]["peers"]]
    with_default = any(len(result["kernels"]) > 1 for result in results)
    header = ["layer", "threads>", "convgen>", *(["default>"] * with_default), *(f"{name}>" for name in peers)]
    rows = []
    for result, entry in zip(results, entries * len(results), strict=False):
        default = [duration(result["kernels"][-1]["seconds"])] * with_default
        times = [duration(peer["seconds"]) for peer in result["peers"]]
        rows.append(
            [
                label(entry) or result["spec"],
                result["threads"],
                duration(result["seconds"]),
                *default,
                *times,
                _ratio(result),
                f"{result['gflops']:.4g}",
                f"{result['percent_of_peak']:.0f} %",
            ]
        )
    lines = [table([*header, "best peer / convgen>", "GFLOP/s>", "of peak>"], rows)]
    if len(results) > 1:
        lines += [_total_line(total) for total in _totals(results)]
    problems = {peer["name"]: peer["problem"] for result in results for peer in result["peers"] if peer["problem"]}
    lines += [f"{name}: {problem}" for name, problem in problems.items()]
    return "\n".join(lines)


def _totals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per thread count: the time of all layers with their counts, of convgen and of each peer that
    ran them all, and the geometric mean of the ratios.
    """
    totals = []
    for threads in dict.fromkeys(result["threads"] for result in results):
        group = [result for result in results if result["threads"] == threads]
        peers = {}
        for name in (peer["name"] for peer in group[0]["peers"]):
            times = [next(p["seconds"] for p in result["peers"] if p["name"] == name) for result in group]
            if all(times):
                peers[name] = sum(t * result["count"] for t, result in zip(times, group, strict=True))
        ratios = [result["ratio"] for result in group if result["ratio"]]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
        own = sum(result["seconds"] * result["count"] for result in group)
        totals.append({"threads": threads, "convgen": own, "peers": peers, "mean_ratio": mean})
    return totals


def _total_line(total: dict[str, Any]) -> str:
    threads = f"{total['threads']} thread{'s' * (total['threads'] > 1)}"
    times = [
        f"{name} {duration(seconds)}" for name, seconds in ({"convgen": total["convgen"]} | total["peers"]).items()
    ]
    mean = f"; geometric mean of the ratios {total['mean_ratio']:.2f}×" if total["mean_ratio"] else ""
    return f"all layers with their counts, {threads}: {', '.join(times)}{mean}"
