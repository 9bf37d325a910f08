"""What tuning did, in words: sentences that the page shows too, and a page of Markdown tables."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from datetime import datetime

from ..measure.busy import RELIABLE
from ..measure.standalone.words import printable
from .markdown import Markdown, Table, code, escaped, markdown_table
from .tuning import DEFAULT, Drift, Layer, Setting, Total, TuningReport, grouped, wins
from .words import NOT_MEASURED, factor, microseconds, milliseconds, picks_text, plural, span


def machine_text(setting: Setting) -> str:
    return f"{setting.cpu} ({setting.hardware})" if setting.cpu else setting.hardware


def versions_text(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def failures_text(failures: Mapping[str, int]) -> str:
    """``3 crash, 1 wrong``."""
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in Counter(failures).most_common())


def facts(setting: Setting) -> dict[str, str]:
    """What was measured, where, when and at what cost."""
    begin, end = (when[:16].replace("T", " ") for when in (setting.first, setting.last))
    lasted = (datetime.fromisoformat(setting.last) - datetime.fromisoformat(setting.first)).total_seconds()
    spent = span(setting.cost)
    if setting.cost is not None and setting.costed < setting.trials:
        spent += f" on {setting.costed} of the trials"
    failed = sum(setting.outcomes.values())
    texts = {
        "machine": machine_text(setting),
        "target": setting.target,
        "threads": str(setting.threads),
        "versions": "; ".join(map(versions_text, setting.versions)),
        "measured": f"{begin} to {end} UTC ({span(lasted)})",
        "trials": f"{setting.trials:,} on {plural(len(setting.layers), 'layer')}",
        "failures": f"{failed}: {failures_text(setting.outcomes)}" if failed else "none",
        "spent on trials": spent,
    }
    if setting.busy.watched:
        texts["other programs"] = busy_text(setting)
    if setting.peak:
        texts["measured peak"] = f"{setting.peak / 1e9:.0f} GFLOP/s"
    if setting.devices:
        texts["devices"] = ", ".join(f"{name} ({count})" for name, count in setting.devices.most_common())
    if setting.older:
        texts["left out"] = plural(setting.older, "record") + " of older versions of convgen, TVM or LLVM"
    return texts


def busy_text(setting: Setting) -> str:
    """How busy the machine was with other things, and which figures that makes doubtful."""
    busy = setting.busy
    measured = plural(busy.watched, "measurement")
    if not busy.disturbed:
        return f"used at most {busy.most:.0%} of the CPUs in {measured}"
    said = f"used more than {RELIABLE:.0%} of the CPUs in {busy.disturbed} of {measured}, up to {busy.most:.0%}"
    doubtful = sum((layer.busy or 0.0) > RELIABLE for layer in setting.layers)
    return f"{said}; the figures of {doubtful} of {plural(len(setting.layers), 'layer')} are not reliable"


def headline(total: Total) -> str:
    """What tuning brought. Each time stands beside those of the same layers alone."""
    if not total.tuned:
        return f"{total.name}: no layer has a kernel yet."
    whole = [f"{milliseconds(total.seconds)} ms tuned"]
    parts = []
    for name, other in total.others.items():
        label = "by default" if name == DEFAULT else f"with {name}"
        theirs = f"{milliseconds(other.seconds)} ms {label} ({other.ratio:.2f}×)"
        if total.is_whole(name):
            whole.append(theirs)
        else:
            parts.append(f"{other.layers} of these layers: {milliseconds(other.own)} ms tuned, {theirs}.")
    sentences = [f"{total.name}: {', '.join(whole)}.", *parts]
    if total.tuned < total.layers:
        sentences.append(f"Of {total.layers} layers {total.tuned} were tuned.")
    if total.searched:
        have = "layer has" if total.searched == 1 else "layers have"
        sentences.append(f"{total.searched} {have} no final comparison: the times are of the search.")
    return " ".join(sentences)


def limit_text(layer: Layer) -> str:
    return f"{layer.of_limit:.0%} {layer.limit[1]}" if layer.of_limit and layer.limit else NOT_MEASURED


def drift_text(drift: Drift) -> str:
    """The range of the reference kernel's time."""
    low, high, middle = min(drift.lows), max(drift.highs), statistics.median(drift.medians)
    return f"{low:.2f} to {high:.2f} of its first time in the run, {middle:.2f} in the median of {drift.count:,} trials"


def names_text(layer: Layer, models: int) -> str:
    """Where the layer occurs; with several models, in which of them."""
    names = [f"{model}: {name}" if models > 1 else name for model, name in layer.names]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} ×{layer.count}".strip() if layer.count > 1 else shown


# ---- Markdown ---------------------------------------------------------------------------------


def markdown(report: TuningReport) -> str:
    """The report as a Markdown page."""
    lines = [f"# Tuning: {escaped(report.title)}", ""]
    for setting in report.settings:
        heading = f"{setting.cpu or setting.hardware}, {plural(setting.threads, 'thread')}"
        listed = (f"- {name}: {escaped(value)}" for name, value in facts(setting).items())
        lines += [f"## {escaped(heading)}", "", *listed, ""]
        lines += [*(escaped(headline(total)) for total in setting.totals), ""]
        lines += ["### Layer by layer", "", *markdown_table(_layers(setting)), ""]
        if setting.no_limit:
            lines += [f"Of limit {NOT_MEASURED}: {escaped(setting.no_limit)}.", ""]
        if setting.missing:
            lines += [*(f"- no record: {escaped(model)} {code(spec)}" for model, spec in setting.missing), ""]
        lines += ["### Which schedule won where", "", *markdown_table(_wins(setting)), ""]
        lines += ["### Failures", ""]
        for group in grouped(setting.failures):
            lines += [f"{len(group)} × {escaped(group[0].outcome)}: {escaped(group[0].message)}", ""]
            lines += [*(f"    {printable(failure.command)}" for failure in group), ""]
        lines += [] if setting.failures else ["None.", ""]
        drift = drift_text(setting.drift) if setting.drift else NOT_MEASURED
        lines += [f"The reference kernel took {drift}." if setting.drift else f"Drift of the machine: {drift}.", ""]
    return "\n".join([*lines, *map(escaped, report.notes), ""]).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _layers(setting: Setting) -> Table:
    peers, models = setting.peers, len({model for layer in setting.layers for model, _ in layer.names})
    header = ["layer", "×>", "tuned µs>", "default / tuned>", *(f"{peer} / tuned>" for peer in peers)]
    header += ["of limit>", "schedule", "trials>", "failed>"]
    cells = []
    for layer in setting.layers:
        ratios = [layer.others.get(name) for name in (DEFAULT, *peers)]
        name = names_text(layer, models)
        cells.append(
            [
                Markdown(f"{code(layer.descriptor)} {escaped(name)}".rstrip()),
                str(layer.count),
                microseconds(layer.seconds),
                *(str(other.ratio) if other else NOT_MEASURED for other in ratios),
                limit_text(layer),
                f"{layer.schedule}({picks_text(layer.picks)})" if layer.schedule else "–",
                str(layer.trials),
                failures_text(layer.failures) or "0",
            ]
        )
    return header, cells


def _wins(setting: Setting) -> Table:
    header = ["class", "schedule", "layers>", "wins>", "best time / winner's>"]
    return header, [
        [kind, name, str(cell.layers), str(cell.wins), factor(cell.behind)]
        for kind, cells in wins(setting.layers).items()
        for name, cell in cells.items()
    ]
