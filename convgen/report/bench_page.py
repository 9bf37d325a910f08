"""Rows of a bench as a page: per network one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .render import MARKS, Bar, meter, render
from .rows import Row
from .scale import Scale
from .tables import (
    ABOVE_NOTE,
    LIMIT_NOTE,
    Totals,
    by_accuracy,
    by_threads,
    class_of,
    facts,
    limit,
    peer_names,
    rated,
)
from .words import microseconds, milliseconds, plural, times_text


def page(title: str, rows: Sequence[Row]) -> str:
    """The rows of a network as one HTML file."""
    notes = [LIMIT_NOTE]
    if any((row.of_limit or 0) > 1 for row in rows):
        notes.append(ABOVE_NOTE)
    if rows and rows[0].mode == "cold":
        notes.append("Every call found the caches empty.")
    sections = [
        _section(group, accuracy)
        for accuracy, chosen in by_accuracy(rows).items()
        for group in by_threads(chosen).values()
    ]
    return render("bench.html", title=title, notes=notes, sections=sections)


def _section(rows: Sequence[Row], accuracy: str) -> dict[str, Any]:
    """What the page shows of the rows of one thread count and accuracy."""
    peers, totals = peer_names(rows), Totals.of(rows)
    scale = Scale.of([seconds / row.seconds for row in rows for seconds in row.peers.values() if seconds])
    return {
        "heading": plural(rows[0].threads, "thread") + (f", {accuracy}" if accuracy != "standard" else ""),
        "facts": facts(rows),
        "summary": totals.sentences()[0] if totals.mean else "",
        "bars": _bars(totals, peers),
        "legend": [(_mark(peers, peer), peer) for peer in peers],
        "ticks": scale.lines(),
        "layers": [_layer(row, peers, scale) for row in rows],
    }


def _mark(peers: Sequence[str], peer: str) -> int:
    """The kind of a peer's mark."""
    return peers.index(peer) % MARKS


def _bars(totals: Totals, peers: Sequence[str]) -> list[Bar]:
    times = {peer: totals.peers[peer] for peer in peers}
    longest = max([totals.seconds, *(seconds for seconds in times.values() if seconds)])
    bars = [Bar("convgen", f"{milliseconds(totals.seconds)} ms", "own", totals.seconds / longest)]
    for peer, seconds in times.items():
        if seconds is None:
            bars.append(Bar(peer, "not all layers"))
        else:
            figure = f"{milliseconds(seconds)} ms · {seconds / totals.seconds:.2f}×"
            bars.append(Bar(peer, figure, f"p{_mark(peers, peer)}", seconds / longest))
    return bars


def _layer(row: Row, peers: Sequence[str], scale: Scale) -> dict[str, Any]:
    """One layer: its name, the marks on the axis, how much of the limit it reaches, the figures."""
    ratios = {peer: seconds / row.seconds for peer in peers if (seconds := row.peers.get(peer))}
    told = "; ".join(f"{peer} {microseconds(row.peers[peer])} µs, {ratio:.2f}×" for peer, ratio in ratios.items())
    outside = [ratio for ratio in sorted(ratios.values()) if not scale.holds(ratio)]
    return {
        "spec": str(row.spec),
        "about": ", ".join([*([f"×{row.count}"] if row.count > 1 else []), class_of(row.spec), row.schedule]),
        "told": told or "no library was timed",
        "interval": [scale.percent(end) for end in row.interval] if row.interval else None,
        "marks": [(_mark(peers, peer), scale.percent(ratio)) for peer, ratio in ratios.items()],
        "beyond": ", ".join(times_text(round(ratio, 1)) for ratio in outside),
        "is_right": scale.is_right(max(ratios.values(), default=0.0)),
        "meter": meter(row.of_limit),
        "limit": limit(row),
        "time": microseconds(row.seconds),
        "verdict": row.verdict,
        "rated": rated(row),
    }
