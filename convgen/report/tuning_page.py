"""What tuning did, as one HTML page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .render import MARKS, Bar, meter, render
from .scale import Scale
from .tables import ABOVE_NOTE, LIMIT_NOTE
from .tuning import (
    DEFAULT,
    ONNXRUNTIME,
    Cell,
    Drift,
    Failure,
    Layer,
    Other,
    Setting,
    Total,
    TuningReport,
    grouped,
    wins,
)
from .tuning_text import drift_text, facts, failures_text, headline, limit_text, names_text
from .words import NOT_MEASURED, factor, microseconds, milliseconds, picks_text, plural, span, times_text

#: The mark and colour of each peer; all others share one.
_MARK_OF = {ONNXRUNTIME: 0, "torch": 1, "openvino": 2, DEFAULT: MARKS - 1}
_OTHER_MARK = 2
#: A search curve is drawn down to this part of the fastest candidate's speed.
_FLOOR = 0.25
#: The units of a search curve and of the line of the drift, stretched to the size of their box.
_WIDE, _HIGH = 1000, 100
#: The room that the name of a tick takes, as a part of the axis.
_ROOM = 0.21
#: Up to so many failures are shown unfolded.
_UNFOLDED = 12


def page(report: TuningReport) -> str:
    """A report as one HTML file."""
    return render(
        "tuning.html",
        title=f"Tuning: {report.title}",
        settings=[_setting(setting) for setting in report.settings],
        notes=report.notes,
        not_measured=NOT_MEASURED,
        view_box=f"0 0 {_WIDE} {_HIGH}",
    )


def _setting(setting: Setting) -> dict[str, Any]:
    """What the page shows of a setting."""
    scale = Scale.of([ratio for layer in setting.layers for ratio in _drawn_ratios(layer)])
    models = len({model for layer in setting.layers for model, _ in layer.names})
    return {
        "heading": f"{setting.cpu or setting.hardware}, {setting.target}, {plural(setting.threads, 'thread')}",
        "headlines": [headline(total) for total in setting.totals],
        "facts": facts(setting),
        "totals": [{"name": total.name, "bars": _bars(total)} for total in setting.totals],
        "legend": [(_mark(name), name) for name in (DEFAULT, *setting.peers)],
        "explanation": _explanation(setting),
        "ticks": scale.lines(),
        "labelled": scale.lines(_labelled(scale)),
        "layers": [_layer(layer, scale, models) for layer in setting.layers],
        "missing": setting.missing,
        "missing_heading": f"Without a record: {plural(len(setting.missing), 'layer')}",
        "matrix": _matrix(setting.layers),
        "failures": [_failures(group) for group in grouped(setting.failures)],
        "unfolded": len(setting.failures) <= _UNFOLDED,
        "drift": _drift(setting.drift) if setting.drift else None,
    }


def _mark(name: str) -> int:
    """The kind of mark of a peer or of the default."""
    return _MARK_OF.get(name, _OTHER_MARK)


# ---- models -----------------------------------------------------------------------------------


def _bars(total: Total) -> list[Bar]:
    """The times of a model's layers; none where no layer has a kernel."""
    if not total.tuned:
        return []
    longest = max([total.seconds, *(other.seconds for other in total.others.values())])
    bars = [Bar("tuned", f"{milliseconds(total.seconds)} ms", "own", total.seconds / longest)]
    for name, other in total.others.items():
        if total.is_whole(name):
            figure = f"{milliseconds(other.seconds)} ms · {other.ratio:.2f}×"
            bars.append(Bar(name, figure, f"p{_mark(name)}", other.seconds / longest))
        else:  # a bar of some layers would be too short
            bars.append(Bar(name, f"{other.ratio:.2f}× on {other.layers} of {plural(total.tuned, 'layer')}"))
    return bars + [Bar(name, NOT_MEASURED) for name in (DEFAULT, ONNXRUNTIME) if name not in total.others]


# ---- layers -----------------------------------------------------------------------------------


def _explanation(setting: Setting) -> str:
    """How the rows of the layers are to be read."""
    sentences = [
        "Right of 1×, the tuned kernel is faster; lines are 95 % intervals of times taken in turn.",
        "The curve is the speed of the best kernel so far, as a part of the fastest of the search, trial after trial.",
        "A dot is a trial, a tick below one that failed; the default’s speed is dashed.",
    ]
    apart = [
        peer
        for peer in setting.peers
        if any(peer in layer.others and layer.others[peer].apart for layer in setting.layers)
    ]
    if apart:
        sentences.append(f"Timed in another run, so without an interval: {', '.join(apart)}.")
    if any(layer.seconds and not layer.compared for layer in setting.layers):
        sentences.append("“search only”: the search has not ended with a comparison in turn.")
    sentences.append(f"Of limit {NOT_MEASURED}: {setting.no_limit}." if setting.no_limit else LIMIT_NOTE)
    if any((layer.of_limit or 0) > 1 for layer in setting.layers):
        sentences.append(ABOVE_NOTE)
    return " ".join(sentences)


def _labelled(scale: Scale) -> list[float]:
    """The ticks that there is room to name: 1, and those that are not too near to another."""
    chosen = [1.0]
    for tick in sorted(scale.ticks, key=lambda tick: abs(math.log(tick)), reverse=True):
        if all(abs(scale.place(tick) - scale.place(other)) > _ROOM for other in chosen):
            chosen.append(tick)
    return sorted(chosen)


def _drawn_ratios(layer: Layer) -> Iterator[float]:
    """The ratios that an axis must have room for."""
    for other in layer.others.values():
        yield from (other.ratio.value, other.ratio.low or other.ratio.value, other.ratio.high or other.ratio.value)


def _layer(layer: Layer, scale: Scale, models: int) -> dict[str, Any]:
    """A row of the page; ``models``: how many models have layers in its setting."""
    others = layer.others.items()
    told = "; ".join(f"{name} {microseconds(other.seconds)} µs, {other.ratio}" for name, other in others)
    return {
        "descriptor": layer.descriptor,
        "about": ", ".join(text for text in (names_text(layer, models), layer.kind) if text),
        "schedule": layer.schedule,
        "picks": picks_text(layer.picks),
        "told": told or f"others {NOT_MEASURED}",
        "ratios": [_ratio(name, other, scale) for name, other in others],
        "curve": _curve(layer),
        "meter": meter(layer.of_limit),
        "limit": limit_text(layer),
        "time": None if layer.seconds is None else f"{microseconds(layer.seconds)} µs",
        "remark": "the default" if layer.kept_default else "" if layer.compared else "search only",
        "figures": [
            {
                "title": f"{name}: {microseconds(other.seconds)} µs",
                "mark": _mark(name),
                "verdict": other.ratio.verdict,
                "ratio": other.ratio,
            }
            for name, other in others
            if not (name == DEFAULT and layer.kept_default)
        ],
    }


def _ratio(name: str, other: Other, scale: Scale) -> dict[str, Any]:
    """A ratio on the axis: that of the default above, those of the peers below."""
    ratio = other.ratio
    has_interval = ratio.low is not None and ratio.high is not None
    return {
        "mark": _mark(name),
        "x": scale.percent(ratio.value),
        "y": "28%" if name == DEFAULT else "68%",
        "interval": [scale.percent(end) for end in (ratio.low, ratio.high) if end is not None] if has_interval else [],
        "beyond": "" if scale.holds(ratio.value) else times_text(round(ratio.value, 1)),
        "is_right": scale.is_right(ratio.value),
    }


# ---- the search -------------------------------------------------------------------------------


def _curve(layer: Layer) -> dict[str, Any]:
    """Trials from left to right; upwards their speed, logarithmic, from a quarter of the fastest's."""
    fastest = layer.fastest
    if not layer.trials or fastest is None:
        said = "no trial was right" if layer.trials else "the search is not in the records"
        return {"paths": [], "note": said + _spent(layer)}

    def x(trial: int) -> float:
        return _WIDE * (trial - 0.5) / layer.trials

    def y(seconds: float) -> float:
        return _HIGH * min(1.0, math.log(seconds / fastest) / -math.log(_FLOOR))

    dots = {(round(x(i)), round(y(s))): None for i, s in enumerate(layer.search, 1) if s > 0}
    lost = {round(x(i)): None for i, s in enumerate(layer.search, 1) if math.isnan(s)}
    steps = "".join(f"H{x(trial):.0f}V{y(seconds):.1f}" for trial, seconds in layer.curve)
    first_trial, first_seconds = layer.curve[0]
    paths = {
        "level": "",
        "dots": "".join(f"M{a} {b}h0" for a, b in dots),
        "lost": "".join(f"M{a} {_HIGH}v-12" for a in lost),
        "best": f"M{x(first_trial):.0f} {y(first_seconds):.1f}{steps}H{_WIDE}",
    }

    def place(trial: int | None) -> tuple[str, str] | None:
        """Where a trial is in percent; None where it is not known, or failed."""
        if trial is None or math.isnan(seconds := layer.search[trial - 1]):
            return None
        return f"{x(trial) / 10:.2f}%", f"{y(seconds):.1f}%"

    default = place(layer.default_trial)
    if default and layer.default_trial:
        paths["level"] = f"M0 {y(layer.search[layer.default_trial - 1]):.1f}H{_WIDE}"
    elif DEFAULT in layer.others:  # known, but not from this search
        paths["level"] = f"M0 {y(max(1.0, layer.others[DEFAULT].ratio.value) * fastest):.1f}H{_WIDE}"
    near = next(trial for trial, seconds in layer.curve if seconds <= fastest / 0.95)
    told = f"95 % after {near}, best at {layer.curve[-1][0]} of {plural(layer.trials, 'trial')}"
    return {
        "paths": [(kind, path) for kind, path in paths.items() if path],
        "default": default,
        "default_mark": _mark(DEFAULT),
        "winner": place(layer.winner_trial),
        "told": told,
        "note": told + _spent(layer),
    }


def _spent(layer: Layer) -> str:
    failed = f"; {failures_text(layer.failures)}" if layer.failures else ""
    return f"{failed}; {span(layer.cost)}" if layer.cost is not None else failed


# ---- which schedule won where, failures, drift --------------------------------------------------


def _matrix(layers: Sequence[Layer]) -> dict[str, Any] | None:
    """Classes of layers by schedules; None where nothing was tried."""
    won = wins(layers)
    if not won:
        return None
    totals: dict[str, int] = {}
    for cells in won.values():
        for name, cell in cells.items():
            totals[name] = totals.get(name, 0) + cell.wins
    schedules = sorted(totals, key=lambda name: -totals[name])
    rows = []
    for kind, cells in won.items():
        count = sum(cell.wins for cell in cells.values())
        size = sum(layer.kind == kind and bool(layer.attempts) for layer in layers)
        drawn = [_cell(cells[name], count) if name in cells else None for name in schedules]
        rows.append({"kind": kind, "size": size, "cells": drawn})
    return {"schedules": schedules, "rows": rows}


def _cell(cell: Cell, count: int) -> dict[str, Any]:
    """A schedule on a class of layers, of which ``count`` were won by some schedule."""
    return {
        "share": f"{cell.wins / count:.2f}" if cell.wins else "",
        "wins": cell.wins,
        "behind": f"{factor(cell.behind)}×" if cell.behind else "✗",
    }


def _failures(group: Sequence[Failure]) -> dict[str, Any]:
    """Failures that ended alike; a message is repeated only where it is another than the first."""
    first = group[0]
    return {
        "count": len(group),
        "outcome": first.outcome.replace("_", " "),
        "message": first.message,
        "commands": [
            {"command": failure.command, "message": failure.message if failure.message != first.message else ""}
            for failure in group
        ],
    }


def _drift(drift: Drift) -> dict[str, str]:
    low, high = min(0.95, *drift.lows), max(1.05, *drift.highs)

    def y(value: float) -> float:
        return _HIGH * (high - value) / (high - low)

    def x(part: int) -> float:
        return _WIDE * (part + 0.5) / len(drift.medians)

    ranges = [
        f"M{x(i):.0f} {y(least):.1f}V{y(most):.1f}"
        for i, (least, most) in enumerate(zip(drift.lows, drift.highs, strict=True))
        if least < most
    ]
    medians = [f"{x(i):.0f} {y(value):.1f}" for i, value in enumerate(drift.medians)]
    return {
        "text": drift_text(drift),
        "low": f"{low:.2f}",
        "high": f"{high:.2f}",
        "one": f"{y(1):.1f}%",
        "ranges": "".join(ranges),
        "line": "M" + "L".join(medians),
    }
