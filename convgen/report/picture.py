"""Rows of a bench as pictures: a page per network, and one figure of all networks.

Written by hand rather than with a plotting library: a few kinds of marks placed in percent of their
box make a page that is read on a telephone, in print and in dark mode, where a drawing of fixed size
would only shrink; and the packages for it are ten times the size of this one's dependencies or need
a script from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .rows import Row
from .tables import (
    ABOVE_NOTE,
    LIMIT_NOTE,
    Totals,
    by_accuracy,
    by_threads,
    class_of,
    facts,
    limit,
    microseconds,
    milliseconds,
    peer_names,
    plural,
    rated,
)

#: A mark per peer, around (0, 0): told apart without colours, too. Then the colours, light and dark.
_MARKS = ("M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z", "M-4.5-4.5h9v9h-9Z", "M0-6 6 0 0 6-6 0Z", "M0-6 6 5H-6Z")
_COLOURS = (("#0b62c4", "#6cb2ff"), ("#c2410c", "#ff9a5c"), ("#8a2fb5", "#d794ff"), ("#7a6a00", "#e0cc45"))
#: Where an axis may begin, end and have its lines; ratios beyond are drawn at the edge, with their number.
_TICKS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #59636e; --line: #d1d9e0; --back: #fff; --own: #1a7f37;
  --bad: #c4232b; --track: #eaeef2; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --back: #0d1117;
  --own: #4cc269; --bad: #ff7b72; --track: #262c36; DARK } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --back: #fff; --own: #1a7f37;
  --bad: #c4232b; --track: #e4e4e4; LIGHT } body { font-size: 11px } main { padding: 0; max-width: none } }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact }
body { margin: 0; background: var(--back); color: var(--ink); font: 14px/1.45 system-ui, sans-serif }
main { max-width: 72rem; margin: auto; padding: 1rem }
h1 { font-size: 1.5rem; margin: 0 0 .5rem } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem } h3 { font-size: 1rem }
p { margin: .4rem 0; max-width: 60rem } .soft, small { color: var(--soft) }
svg { display: block; width: 100%; overflow: visible }
code { font: .8rem/1.35 ui-monospace, monospace; overflow-wrap: anywhere }
.bar { display: grid; grid-template-columns: 7.5rem 1fr 9.5rem; gap: .6rem; align-items: center }
.bar span:last-child, .figures { font-variant-numeric: tabular-nums; text-align: right }
.layer { display: grid; grid-template-columns: minmax(12rem, 6fr) minmax(9rem, 5fr) 6.5rem 9.5rem; column-gap: 1.3rem;
  align-items: center; border-top: 1px solid var(--line); break-inside: avoid }
.layer > div { padding: .25rem 0 } .strip { height: 0; min-height: 100% }
.axis { border: 0; color: var(--soft); font-size: .8rem; align-items: end }
.axis > .strip { height: 16px; min-height: 0 }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem } .legend svg { width: 14px; display: inline-block }
.legend span { white-space: nowrap }
.grid { stroke: var(--line) } .one { stroke: var(--soft); stroke-width: 1.5 }
.interval { stroke: var(--ink); stroke-width: 2 } .own { fill: var(--own) } .track { fill: var(--track) }
.faster { color: var(--own) } .slower { color: var(--bad) } text { fill: var(--soft); font-size: 11px }
PEERS
@media (max-width: 46rem) {
  .layer { grid-template-columns: 1fr 1fr; padding: .3rem 0 }
  .layer > .name, .layer > .strip { grid-column: 1 / -1 } .strip { width: calc(100% - 2rem); margin: 0 1rem;
    height: 26px; min-height: 0 }
  .axis > .figures, .axis > .limit, .axis > .name { display: none }
  .bar { grid-template-columns: 6rem 1fr 8.4rem; gap: .3rem }
}
"""


def style() -> str:
    """The style sheet of a page, with the colours of its marks."""

    def colours(shade: int) -> str:
        return " ".join(f"--p{index}: {pair[shade]};" for index, pair in enumerate(_COLOURS))

    peers = " ".join(f".p{index} {{ fill: var(--p{index}) }}" for index in range(len(_COLOURS)))
    return _STYLE.replace("LIGHT", colours(0)).replace("DARK", colours(1)).replace("PEERS", peers).strip()


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis with a line at each of its ticks."""

    ticks: tuple[float, ...]

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Scale:
        """An axis with all of them as far as it goes, and some room on both sides of 1."""
        low = max([tick for tick in _TICKS if tick <= min([0.75, *ratios])], default=_TICKS[0])
        high = min([tick for tick in _TICKS if tick >= max([1.5, *ratios])], default=_TICKS[-1])
        inside = [tick for tick in _TICKS if low <= tick <= high]
        if high / low > 8:  # lines at powers of two are enough
            inside = [tick for tick in inside if tick in (low, high) or math.log2(tick).is_integer()]
        return cls(tuple(inside))

    def place(self, ratio: float) -> float:
        """Where a ratio is, from 0 to 1; beyond the ends, at them."""
        low, high = self.ticks[0], self.ticks[-1]
        return math.log(min(max(ratio, low), high) / low) / math.log(high / low)

    def holds(self, ratio: float) -> bool:
        return self.ticks[0] <= ratio <= self.ticks[-1]


def times_text(ratio: float) -> str:
    """``1.5×``."""
    return f"{ratio:g}×"


# ---- a page per network -----------------------------------------------------------------------


def page(title: str, rows: Sequence[Row]) -> str:
    """A network's rows as one HTML file that needs nothing else."""
    sections = [
        _section(group, accuracy)
        for accuracy, chosen in by_accuracy(rows).items()
        for group in by_threads(chosen).values()
    ]
    about = (
        "A mark is a library's time over convgen's: to the right of 1×, convgen is faster. The line through the best"
        " library's mark is the 95 % interval. "
    )
    above = f" {ABOVE_NOTE}" if any((row.of_limit or 0) > 1 for row in rows) else ""
    cold = " Every call found the caches empty." if rows and rows[0].mode == "cold" else ""
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style()}</style>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="soft">{about}{escape(LIMIT_NOTE)}{above}{cold}</p>\n' + "\n".join(sections) + "\n</main>\n</html>\n"
    )


def _section(rows: Sequence[Row], accuracy: str) -> str:
    heading = plural(rows[0].threads, "thread") + (f", {accuracy}" if accuracy != "standard" else "")
    peers, totals = peer_names(rows), Totals.of(rows)
    scale = Scale.of([seconds / row.seconds for row in rows for seconds in row.peers.values() if seconds])
    said = totals.sentences()[0] if totals.mean else ""
    axis = "".join(
        f'<text x="{percent(scale, tick)}" y="12" text-anchor="middle">{times_text(tick)}</text>'
        for tick in scale.ticks
    )
    return "\n".join(
        [
            f"<section>\n<h2>{escape(heading)}</h2>",
            f'<p class="soft">{escape(facts(rows))}</p>',
            f"<p>{escape(said)}</p>" if said else "",
            "<h3>All layers with their counts</h3>",
            *_bars(totals, peers),
            "<h3>Layer by layer</h3>",
            f'<p class="legend">{"".join(_legend(index, peer) for index, peer in enumerate(peers))}</p>',
            '<div class="layer axis"><span class="name">layer</span>',
            f'<svg class="strip">{axis}</svg>',
            '<span class="limit">of limit</span><span class="figures">µs, ratio</span></div>',
            *(_layer(row, peers, scale) for row in rows),
            "</section>",
        ]
    )


def _bars(totals: Totals, peers: Sequence[str]) -> list[str]:
    times = {"convgen": totals.seconds, **{peer: totals.peers[peer] for peer in peers}}
    longest = max(seconds for seconds in times.values() if seconds)
    lines = []
    for index, (name, seconds) in enumerate(times.items()):
        if seconds is None:
            figure, bar = "not all layers", ""
        else:
            figure = f"{milliseconds(seconds)} ms" + (f" · {seconds / totals.seconds:.2f}×" if index else "")
            kind = f"p{(index - 1) % len(_COLOURS)}" if index else "own"
            bar = f'<rect class="{kind}" y="3" width="{100 * seconds / longest:.2f}%" height="12" rx="2"/>'
        lines.append(
            f'<div class="bar"><span>{escape(name)}</span><svg height="18">{bar}</svg><span>{figure}</span></div>'
        )
    return lines


def _legend(index: int, peer: str) -> str:
    return f'<span><svg height="14">{mark(index, "7")}</svg> {escape(peer)}</span>'


def mark(index: int, x: str, y: float | str = 7) -> str:
    """The mark of a peer at a place of the SVG around it."""
    kind = index % len(_MARKS)
    return f'<svg x="{x}" y="{y}" class="p{kind}" overflow="visible"><path d="{_MARKS[kind]}"/></svg>'


def _layer(row: Row, peers: Sequence[str], scale: Scale) -> str:
    """One layer: its name, the marks on the axis, how much of the limit it reaches, the figures."""
    about = ", ".join([*([f"×{row.count}"] if row.count > 1 else []), class_of(row.spec), row.schedule])
    ratios = {peer: seconds / row.seconds for peer in peers if (seconds := row.peers.get(peer))}
    told = "; ".join(f"{peer} {microseconds(row.peers[peer])} µs, {ratio:.2f}×" for peer, ratio in ratios.items())
    parts = [grid_line(scale, tick) for tick in scale.ticks]
    if row.interval:
        ends = " ".join(f'x{i}="{percent(scale, end)}"' for i, end in enumerate(row.interval, 1))
        parts.append(f'<line class="interval" {ends} y1="50%" y2="50%"/>')
    parts += [mark(peers.index(peer), percent(scale, ratio), "50%") for peer, ratio in ratios.items()]
    outside = ", ".join(times_text(round(ratio, 1)) for ratio in sorted(ratios.values()) if not scale.holds(ratio))
    if outside:
        right = max(ratios.values()) > scale.ticks[-1]
        place = 'x="100%" dx="-10" text-anchor="end"' if right else 'x="0" dx="10"'
        parts.append(f'<text {place} y="50%" dy="4">{outside}</text>')
    meter = ""
    if row.of_limit is not None:
        meter = (
            '<svg height="6"><rect class="track" width="100%" height="6" rx="3"/>'
            f'<rect class="own" width="{100 * min(row.of_limit, 1):.1f}%" height="6" rx="3"/></svg>'
        )
    return "\n".join(
        [
            f'<div class="layer"><div class="name"><code>{escape(str(row.spec))}</code><br>',
            f"<small>{escape(about)}</small></div>",
            f'<svg class="strip" role="img"><title>{escape(told or "no library was timed")}</title>',
            *parts,
            "</svg>",
            f'<div class="limit">{meter}<small>{escape(limit(row))}</small></div>',
            f'<div class="figures">{microseconds(row.seconds)} µs<br>',
            f'<small class="{row.verdict}">{escape(rated(row))}</small></div></div>',
        ]
    )


def percent(scale: Scale, ratio: float) -> str:
    """Where a ratio is on an axis as wide as what it is drawn in."""
    return f"{100 * scale.place(ratio):.2f}%"


def grid_line(scale: Scale, tick: float) -> str:
    """The line of a tick; the one of 1 stands out."""
    x = percent(scale, tick)
    return f'<line class="{"one" if tick == 1 else "grid"}" x1="{x}" x2="{x}" y2="100%"/>'


# ---- all networks -----------------------------------------------------------------------------

_WIDTH, _MARGIN, _STEP = 760, 24, 27
#: Where the axis begins and ends.
_BEGIN, _END = 200, 720
_FIGURE_STYLE = """
.card { fill: #fff; stroke: #d1d9e0 } .ink { fill: #1c2128 } .soft { fill: #59636e } .grid { stroke: #d8dee4 }
.one { stroke: #59636e; stroke-width: 1.5 } .span { stroke: #8c959f; stroke-width: 2 } LIGHT
text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
.small { font-size: 12px } .head { font-weight: 600; font-size: 15px }
@media (prefers-color-scheme: dark) { .card { fill: #0d1117; stroke: #3d444d } .ink { fill: #e6edf3 }
.soft { fill: #9da7b1 } .grid { stroke: #2b323b } .one { stroke: #9da7b1 } .span { stroke: #6e7781 } DARK }
"""


def summary(networks: Mapping[str, Sequence[Row]]) -> str:
    """One figure of all networks, for a page that shows images: the time of all convolutions of each
    peer over convgen's, per thread count. Standard accuracy, warm caches.

    It brings its own background: the viewer's dark mode may be another than the page's.
    """
    kept = {
        name: by_threads(row for row in rows if row.mode == "warm" and row.spec.accuracy == "standard")
        for name, rows in networks.items()
    }
    counts = sorted({threads for groups in kept.values() for threads in groups})
    panels = {
        threads: {name: Totals.of(groups[threads]) for name, groups in kept.items() if threads in groups}
        for threads in counts
    }
    peers = peer_names(row for groups in kept.values() for rows in groups.values() for row in rows)
    everything = [totals for panel in panels.values() for totals in panel.values()]
    scale = Scale.of([ratio for totals in everything for ratio in _ratios(totals).values()])

    title = "Time of all convolutions of a network, over convgen’s"
    y = _MARGIN + 14
    parts = [_text("ink head", _MARGIN, y, title)]
    y += 26
    x = _MARGIN
    for index, peer in enumerate(peers):
        parts += [mark(index, str(x + 6), y - 5), _text("ink", x + 18, y, peer)]
        x += 40 + 8 * len(peer)
    parts.append(_text("soft small", _WIDTH - _MARGIN, y, "right of 1×: convgen is faster", "end"))
    for threads, panel in panels.items():
        y += 34
        parts += [_text("ink head", _MARGIN, y, plural(threads, "thread")), *_panel(panel, peers, scale, y + 10)]
        y += 10 + _STEP * len(panel)
    height = y + _MARGIN
    light, dark = (
        " ".join(f".p{index} {{ fill: {pair[shade]} }}" for index, pair in enumerate(_COLOURS)) for shade in (0, 1)
    )
    style = _FIGURE_STYLE.replace("LIGHT", light).replace("DARK", dark).strip()
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
            f"<title>{title}</title>\n<style>{style}</style>",
            f'<rect class="card" x=".5" y=".5" width="{_WIDTH - 1}" height="{height - 1}" rx="8"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _panel(panel: Mapping[str, Totals], peers: Sequence[str], scale: Scale, top: int) -> list[str]:
    """A line per network below ``top``, on the axis."""
    parts = []
    for tick in scale.ticks:
        x = f"{_across(scale, tick):.1f}"
        kind = "one" if tick == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{top}" y2="{top + _STEP * len(panel)}"/>')
        parts.append(_text("soft small", x, top - 8, times_text(tick), "middle"))
    for number, (name, totals) in enumerate(panel.items()):
        y = top + _STEP * number + _STEP // 2
        parts.append(_text("ink", _MARGIN, y + 5, name))
        places = {peer: _across(scale, ratio) for peer, ratio in _ratios(totals).items()}
        if places:
            ends = f'x1="{min(places.values()):.1f}" x2="{max(places.values()):.1f}"'
            parts.append(f'<line class="span" {ends} y1="{y}" y2="{y}"/>')
        parts += [mark(peers.index(peer), f"{x:.1f}", y) for peer, x in places.items()]
    return parts


def _ratios(totals: Totals) -> dict[str, float]:
    """Each peer's time over convgen's, of those that ran all layers."""
    return {peer: seconds / totals.seconds for peer, seconds in totals.peers.items() if seconds}


def _across(scale: Scale, ratio: float) -> float:
    return _BEGIN + scale.place(ratio) * (_END - _BEGIN)


def _text(kind: str, x: float | str, y: float, words: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
