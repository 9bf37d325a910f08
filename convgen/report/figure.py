"""Figures, for a page that shows images: all networks of a bench, and the steps of one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .profile import NetworkProfile, StepTime
from .render import MARKS, render
from .rows import Row
from .scale import Scale, Tick
from .tables import Totals, by_threads, peer_names
from .words import microseconds, plural, shortened

#: Sizes in the drawing's units: its width, the space around it, the height of a network's line, and of a panel's name.
_WIDTH, _MARGIN, _STEP, _HEADING = 760, 24, 27, 34
#: Where the axis begins and ends.
_BEGIN, _END = 200, 720
#: Of the steps of a network: a step's height, where the bars begin and end, and letters of a name.
_LINE, _BARS_BEGIN, _BARS_END, _LETTERS = 20, 430, 690, 42


def summary(networks: Mapping[str, Sequence[Row]]) -> str:
    """The figure as SVG: the time of all convolutions of each peer over convgen's, per thread count. Standard
    accuracy, warm caches.
    """
    kept = {
        name: by_threads(row for row in rows if row.mode == "warm" and row.spec.accuracy == "standard")
        for name, rows in networks.items()
    }
    panels = {
        threads: {name: Totals.of(groups[threads]) for name, groups in kept.items() if threads in groups}
        for threads in sorted({threads for groups in kept.values() for threads in groups})
    }
    peers = peer_names(row for groups in kept.values() for rows in groups.values() for row in rows)
    everything = [totals for panel in panels.values() for totals in panel.values()]
    scale = Scale.of([ratio for totals in everything for ratio in _ratios(totals).values()])
    heading_y = _MARGIN + 14
    legend_y = heading_y + 26
    y, drawn = legend_y, []
    for threads, panel in panels.items():
        drawn.append(_panel(threads, panel, peers, scale, y + _HEADING))
        y = drawn[-1]["bottom"]
    return render(
        "figure.svg",
        width=_WIDTH,
        height=y + _MARGIN,
        margin=_MARGIN,
        heading_y=heading_y,
        legend_y=legend_y,
        legend=_legend(peers),
        ticks=[Tick(ratio, _across(scale, ratio)) for ratio in scale.ticks],
        panels=drawn,
    )


def _legend(peers: Sequence[str]) -> list[dict[str, Any]]:
    x, entries = _MARGIN, []
    for index, peer in enumerate(peers):
        entries.append({"kind": index % MARKS, "x": x, "peer": peer})
        x += 40 + 8 * len(peer)
    return entries


def _panel(threads: int, panel: Mapping[str, Totals], peers: Sequence[str], scale: Scale, y: int) -> dict[str, Any]:
    """A line per network on the axis, below the name of the panel at ``y``."""
    top = y + 10
    networks = []
    for number, (name, totals) in enumerate(panel.items()):
        ratios = _ratios(totals)
        networks.append(
            {
                "name": name,
                "y": top + _STEP * number + _STEP // 2,
                "span": [_across(scale, end(ratios.values())) for end in (min, max)] if ratios else None,
                "marks": [(peers.index(peer) % MARKS, _across(scale, ratio)) for peer, ratio in ratios.items()],
            }
        )
    bottom = top + _STEP * len(panel)
    return {"heading": plural(threads, "thread"), "y": y, "top": top, "bottom": bottom, "networks": networks}


def _ratios(totals: Totals) -> dict[str, float]:
    """Each peer's time over convgen's, of those that ran all layers."""
    return {peer: seconds / totals.seconds for peer, seconds in totals.peers.items() if seconds}


def _across(scale: Scale, ratio: float) -> str:
    """Where a ratio is on the drawing's axis."""
    return f"{_BEGIN + scale.place(ratio) * (_END - _BEGIN):.1f}"


def profiles(networks: Sequence[NetworkProfile]) -> str:
    """The figure as SVG: of each network a bar for each step, in the order in which they run; behind it that of the
    step's default, where it is known.
    """
    y, panels = _MARGIN + 20, []
    for network in networks:
        top = y + 34
        longest = max((max(step.seconds, step.before or 0.0) for step in network.steps), default=0.0) or 1.0
        names = shortened([f"{step.name}: {step.computes}" for step in network.steps], _LETTERS)
        steps = [
            _step(step, name, network, longest, top + _LINE * number)
            for number, (step, name) in enumerate(zip(network.steps, names, strict=True))
        ]
        panels.append({"heading": network.title, "about": network.headline, "y": y, "steps": steps})
        y = top + _LINE * len(steps) + _HEADING
    has_before = any(network.before is not None for network in networks)
    return render("profile.svg", width=_WIDTH, height=y, margin=_MARGIN, panels=panels, has_before=has_before)


def _step(step: StepTime, name: str, network: NetworkProfile, longest: float, y: int) -> dict[str, Any]:
    def wide(seconds: float | None) -> str:
        return f"{(seconds or 0.0) / longest * (_BARS_END - _BARS_BEGIN):.1f}"

    predicted = f", {microseconds(step.predicted)} µs predicted" if step.predicted is not None else ""
    return {
        "name": name,
        "told": f"{step.name}: {step.computes}{f' by {step.schedule}' if step.schedule else ''}{predicted}",
        "kind": "p0" if step.schedule else "p1",
        "x": _BARS_BEGIN,
        "y": y,
        "width": wide(step.seconds),
        "before": wide(step.before) if step.before is not None else "",
        "time": f"{microseconds(step.seconds)} µs",
        "share": f"{step.seconds / network.seconds:.1%}" if network.seconds else "",
    }
