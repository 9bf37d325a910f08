"""What tuning did, as one HTML page: no script, nothing loaded from elsewhere.

Drawn like the pages of a bench, with their style, axis and marks; see :mod:`convgen.report.picture`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from .picture import Scale, grid_line, mark, percent, style, times_text
from .tables import ABOVE_NOTE, LIMIT_NOTE, factor, microseconds, milliseconds, plural
from .tuning import (
    DEFAULT,
    NOT_MEASURED,
    ONNXRUNTIME,
    Cell,
    Drift,
    Failure,
    Layer,
    Other,
    Setting,
    Total,
    TuningReport,
    drift_text,
    facts,
    failures_text,
    grouped,
    headline,
    limit_text,
    names_text,
    picks_text,
    span,
    wins,
)

#: The mark and colour of each peer; others take turns.
_MARK_OF = {ONNXRUNTIME: 0, "torch": 1, "openvino": 2, DEFAULT: 3}
#: Where a search curve ends below: this part of the final best's speed.
_FLOOR = 0.25
#: The units of a search curve, stretched to the size of its box.
_WIDE, _HIGH = 1000, 100
#: What the name of a tick takes, as a part of the axis.
_ROOM = 0.21
#: So many failures are shown unfolded.
_UNFOLDED = 12

_STYLE = """
.bar { grid-template-columns: 7.5rem 1fr 12rem }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .5rem 1.5rem; margin: 1rem 0 }
dt { color: var(--soft); font-size: .8rem } dd { margin: 0; overflow-wrap: anywhere }
.lead { font-size: 1.05rem } h3 { margin: 1.8rem 0 .4rem } h4 { font-size: .9rem; margin: 1rem 0 .2rem }
.tuned { grid-template-columns: minmax(13rem, 6fr) minmax(8rem, 4fr) minmax(10rem, 5fr) 5.2rem 10.5rem }
.tuned > div { padding: .45rem 0; min-width: 0 } .tuned.axis { position: sticky; top: 0; z-index: 1;
  background: var(--back); border-bottom: 1px solid var(--line); padding-top: .4rem; align-items: end }
.tuned.axis > .curve { padding: 0; font-size: inherit }
.tuned + .tuned { border-top: 1px solid var(--line) } .axis + .tuned { border-top: 0 }
.name code { display: block } .won { color: var(--own) } .picks { color: var(--soft); font-size: .72rem }
.curve { display: grid; grid-template-columns: 2.6rem 1fr; column-gap: .4rem; color: var(--soft); font-size: .7rem }
.curve > svg { height: 52px } .curve .ends { display: flex; flex-direction: column; justify-content: space-between;
  text-align: right; line-height: 1; margin: -.3em 0 } .curve small { grid-column: 2; padding-top: .35rem }
.dots, .best, .lost, .level, .range, .line { fill: none; vector-effect: non-scaling-stroke }
.dots { stroke: var(--soft); stroke-width: 3.5; stroke-linecap: round; opacity: .45 }
.best { stroke: var(--own); stroke-width: 2 } .lost { stroke: var(--bad); stroke-width: 1.5 }
.level { stroke: var(--p3); stroke-width: 1.5; stroke-dasharray: 5 4 } .range { stroke: var(--line); stroke-width: 3 }
.ring { fill: var(--own); stroke: var(--back); stroke-width: 2 }
.figures div { white-space: nowrap } .figures svg { display: inline-block; width: 14px; vertical-align: -2px }
.scroll { overflow-x: auto; margin: .6rem 0 } table { border-collapse: collapse; font-size: .85rem }
th { font-weight: 400; text-align: left; white-space: nowrap } thead th { vertical-align: bottom; padding: .3rem }
thead th span { writing-mode: vertical-rl; transform: rotate(180deg); font: .78rem/1.2 ui-monospace, monospace }
tbody th { position: sticky; left: 0; background: var(--back); padding-right: .8rem }
td { border: 1px solid var(--line); text-align: center; min-width: 3.1rem; padding: .15rem .3rem; line-height: 1.25;
  background: color-mix(in srgb, var(--own) calc(var(--share, 0) * 45%), var(--back)) }
td b { font-weight: 600 } td small { display: block; font-variant-numeric: tabular-nums }
details { border-top: 1px solid var(--line); padding: .4rem 0 } summary { cursor: pointer; overflow-wrap: anywhere }
details ol { margin: .4rem 0; padding-left: 2.2rem } details li { margin: .35rem 0 }
details code { user-select: all; -webkit-user-select: all }
.drift { display: grid; grid-template-columns: 2.6rem 1fr; column-gap: .4rem; color: var(--soft); font-size: .7rem }
.drift svg { height: 70px } .drift .ends { display: flex; flex-direction: column; justify-content: space-between;
  text-align: right; line-height: 1; margin: -.3em 0 }
.line { stroke: var(--p0); stroke-width: 1.5 } footer { margin-top: 2rem; color: var(--soft); font-size: .85rem }
@media print { html, body { font-size: 11.5px } summary { break-after: avoid } .tuned.axis { position: static }
  details::details-content { content-visibility: visible; height: auto }
  summary { list-style: none } thead { display: table-header-group } h2, h3, h4 { break-after: avoid }
  .scroll { overflow: visible } .tuned { column-gap: .8rem } .tuned.axis text { font-size: 8px } }
@media (max-width: 62rem) and (min-width: 46.01rem) { .tuned { column-gap: .8rem;
  grid-template-columns: minmax(9rem, 5fr) minmax(6rem, 3fr) minmax(8rem, 4fr) 4.6rem 9.6rem } }
@media (max-width: 46rem) { dl { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)) }
  .bar { grid-template-columns: 6rem 1fr 8.6rem } .tuned { grid-template-columns: 1fr 1fr }
  .tuned > div { padding: .2rem 0 }
  .tuned > .name, .tuned > .strip, .tuned > .curve { grid-column: 1 / -1 } .tuned > .strip { height: 34px }
  .tuned.axis > .strip { height: 16px } .tuned.axis > .curve { display: none }
  .curve { margin-top: .4rem } .tuned + .tuned { padding: .6rem 0 } }
"""


def page(found: TuningReport) -> str:
    """A report as one HTML file that needs nothing else."""
    title = escape(f"Tuning: {found.title}")
    several = len(found.settings) > 1
    contents = ""
    if several:
        links = (f'<a href="#s{i}">{escape(_heading(setting))}</a>' for i, setting in enumerate(found.settings))
        contents = f"<p>{' · '.join(links)}</p>"
    about = [f"<p>{escape(text)}</p>" for text in [*found.notes]]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',  # or a browser asks the server for one
            f"<title>{title}</title>\n<style>{style()}\n{_STYLE.strip()}</style>\n</head>\n<body>\n<main>",
            f"<h1>{title}</h1>",
            contents,
            *(line for i, setting in enumerate(found.settings) for line in _setting(setting, i, several)),
            f"<footer>{''.join(about)}</footer>" if about else "",
            "</main>\n</body>\n</html>\n",
        ]
    )


def _heading(setting: Setting) -> str:
    return f"{setting.cpu or setting.hardware}, {setting.target}, {plural(setting.threads, 'thread')}"


def _setting(setting: Setting, number: int, several: bool) -> Iterator[str]:
    yield f'<section id="s{number}">'
    if several:
        yield f"<h2>{escape(_heading(setting))}</h2>"
    for total in setting.totals:
        yield f'<p class="lead">{escape(headline(total))}</p>'
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts(setting).items())
    yield f"<dl>{''.join(items)}</dl>"
    yield "<h3>All convolutions together</h3>"
    for total in setting.totals:
        yield from _bars(total, len(setting.totals) > 1)
    yield from _layers(setting)
    if setting.missing:
        yield f"<h4>Without a record: {plural(len(setting.missing), 'layer')}</h4>"
        lines = (f"<li>{escape(model)}: <code>{escape(spec)}</code></li>" for model, spec in setting.missing)
        yield f"<ul>{''.join(lines)}</ul>"
    yield from _matrix(setting.layers)
    yield from _failures(setting.failures)
    yield from _drift(setting.drift)
    yield "</section>"


# ---- models -----------------------------------------------------------------------------------


def _bars(total: Total, several: bool) -> Iterator[str]:
    if several:
        yield f"<h4>{escape(total.name)}</h4>"
    if not total.tuned:
        yield '<p class="soft">No layer has a kernel yet.</p>'
        return
    longest = max([total.seconds, *(found.seconds for found in total.others.values())])
    yield _bar("tuned", "own", total.seconds / longest, f"{milliseconds(total.seconds)} ms")
    for name in [*total.others, *({DEFAULT, ONNXRUNTIME} - total.others.keys())]:
        if name not in total.others:
            yield _bar(name, "", 0, NOT_MEASURED)
            continue
        found = total.others[name]
        if total.is_whole(name):
            figure = f"{milliseconds(found.seconds)} ms · {found.ratio:.2f}×"
            yield _bar(name, _kind(name), found.seconds / longest, figure)
        else:  # a bar of some layers would be too short
            yield _bar(name, "", 0, f"{found.ratio:.2f}× on {found.layers} of {plural(total.tuned, 'layer')}")


def _bar(name: str, kind: str, share: float, figure: str) -> str:
    drawn = f'<rect class="{kind}" y="3" width="{100 * share:.2f}%" height="12" rx="2"/>' if share else ""
    return f'<div class="bar"><span>{escape(name)}</span><svg height="18">{drawn}</svg><span>{figure}</span></div>'


def _kind(name: str) -> str:
    return f"p{_MARK_OF.get(name, 2)}"


# ---- layers -----------------------------------------------------------------------------------


def _layers(setting: Setting) -> Iterator[str]:
    scale = Scale.of([value for layer in setting.layers for value in _drawn(layer)])
    models = len({model for layer in setting.layers for model, _ in layer.names})
    shown = [DEFAULT, *setting.peers]
    legend = [f"{_icon(name)} {escape(name)} over tuned" for name in shown]
    legend += [f"{_ring()} winner, in its search"]
    yield "<h3>Layer by layer</h3>"
    yield f'<p class="legend">{"".join(f"<span>{entry}</span>" for entry in legend)}</p>'
    said = [
        "Right of 1×, the tuned kernel is faster; lines are 95 % intervals of times taken in turn.",
        "The curve is the speed of the best kernel so far, as a part of the fastest of the search, trial after trial.",
        "A dot is a trial, a tick below one that failed; the default’s speed is dashed.",
    ]
    apart = [
        peer for peer in setting.peers if any(peer in one.others and one.others[peer].apart for one in setting.layers)
    ]
    if apart:
        said.append(f"Timed in another run, so without an interval: {', '.join(apart)}.")
    if any(layer.seconds and not layer.compared for layer in setting.layers):
        said.append("“search only”: the search has not ended with a comparison in turn.")
    said.append(f"{LIMIT_NOTE}" if not setting.no_limit else f"Of limit {NOT_MEASURED}: {setting.no_limit}.")
    if any((layer.of_limit or 0) > 1 for layer in setting.layers):
        said.append(ABOVE_NOTE)
    yield f'<p class="soft">{escape(" ".join(said))}</p>'
    axis = "".join(
        f'<text x="{percent(scale, tick)}" y="12" text-anchor="middle">{times_text(tick)}</text>'
        for tick in _labelled(scale)
    )
    yield (
        '<div class="tuned layer axis"><span class="name">layer, schedule that won</span>'
        f'<svg class="strip">{axis}</svg><div class="curve"><span></span><span>search, trial by trial</span></div>'
        '<span class="limit">of limit</span><span class="figures">µs, ratios</span></div>'
    )
    for layer in setting.layers:
        yield from _layer(layer, scale, models)


def _labelled(scale: Scale) -> list[float]:
    """The ticks that there is room to name: 1, and those that are not too near to another."""
    chosen = [1.0]
    for tick in sorted(scale.ticks, key=lambda tick: abs(math.log(tick)), reverse=True):
        if all(abs(scale.place(tick) - scale.place(other)) > _ROOM for other in chosen):
            chosen.append(tick)
    return sorted(chosen)


def _drawn(layer: Layer) -> Iterator[float]:
    """The ratios that an axis must have room for."""
    for other in layer.others.values():
        yield from (other.ratio.value, other.ratio.low or other.ratio.value, other.ratio.high or other.ratio.value)


def _layer(layer: Layer, scale: Scale, models: int) -> Iterator[str]:
    about = [text for text in (names_text(layer, models), layer.kind) if text]
    yield '<div class="tuned layer"><div class="name">'
    yield f"<code>{escape(layer.descriptor)}</code><small>{escape(', '.join(about))}</small>"
    if layer.schedule:
        yield f'<code class="won">{escape(layer.schedule)}</code>'
        yield f'<code class="picks">{escape(picks_text(layer.picks))}</code>'
    yield "</div>"
    yield _strip(layer, scale)
    yield _curve(layer)
    meter = ""
    if layer.of_limit is not None:
        meter = (
            '<svg height="6"><rect class="track" width="100%" height="6" rx="3"/>'
            f'<rect class="own" width="{100 * min(layer.of_limit, 1):.1f}%" height="6" rx="3"/></svg>'
        )
    yield f'<div class="limit">{meter}<small>{escape(limit_text(layer))}</small></div>'
    yield f'<div class="figures">{_figures(layer)}</div></div>'


def _figures(layer: Layer) -> str:
    if layer.seconds is None:
        return "no kernel"
    only = " <small>search only</small>" if not layer.compared else ""
    only = " <small>the default</small>" if layer.kept_default else only
    lines = [f"<div>{microseconds(layer.seconds)} µs{only}</div>"]
    for name, other in layer.others.items():
        if name == DEFAULT and layer.kept_default:
            continue
        kind = other.ratio.verdict
        title = f"{name}: {microseconds(other.seconds)} µs"
        lines.append(f'<div title="{escape(title)}">{_icon(name)} <small class="{kind}">{other.ratio}</small></div>')
    if not layer.others:
        lines.append(f'<div><small class="soft">others {NOT_MEASURED}</small></div>')
    return "".join(lines)


def _strip(layer: Layer, scale: Scale) -> str:
    """The ratios on the axis: the default above, the peers below."""
    told = "; ".join(f"{name} {microseconds(other.seconds)} µs, {other.ratio}" for name, other in layer.others.items())
    parts = [grid_line(scale, tick) for tick in scale.ticks]
    for name, other in layer.others.items():
        parts += _placed(name, other, scale, "28%" if name == DEFAULT else "68%")
    return (
        f'<svg class="strip" role="img"><title>{escape(told or f"others {NOT_MEASURED}")}</title>{"".join(parts)}</svg>'
    )


def _placed(name: str, other: Other, scale: Scale, y: str) -> Iterator[str]:
    ratio = other.ratio
    if ratio.low is not None and ratio.high is not None:
        ends = f'x1="{percent(scale, ratio.low)}" x2="{percent(scale, ratio.high)}"'
        yield f'<line class="interval" {ends} y1="{y}" y2="{y}"/>'
    yield mark(_MARK_OF.get(name, 2), percent(scale, ratio.value), y)
    if not scale.holds(ratio.value):
        right = ratio.value > scale.ticks[-1]
        place = 'x="100%" dx="-10" text-anchor="end"' if right else 'x="0" dx="10"'
        yield f'<text {place} y="{y}" dy="4">{times_text(round(ratio.value, 1))}</text>'


def _icon(name: str) -> str:
    return f'<svg height="14" width="14" aria-hidden="true">{mark(_MARK_OF.get(name, 2), "7")}</svg>'


def _ring(x: str = "7", y: str = "7", around: bool = True) -> str:
    circle = f'<circle class="ring" cx="{x}" cy="{y}" r="5"/>'
    return f'<svg height="14" width="14" aria-hidden="true">{circle}</svg>' if around else circle


# ---- the search -------------------------------------------------------------------------------


def _curve(layer: Layer) -> str:
    """Trials from left to right; upwards their speed, logarithmic, from a quarter of the fastest's."""
    fastest = layer.fastest
    if not layer.trials or fastest is None:
        said = "no trial was right" if layer.trials else "the search is not in the records"
        return f'<div class="curve"><span></span><small>{said}{_spent(layer)}</small></div>'

    def x(trial: int) -> float:
        return _WIDE * (trial - 0.5) / layer.trials

    def y(seconds: float) -> float:
        return _HIGH * min(1.0, math.log(seconds / fastest) / -math.log(_FLOOR))

    lines = [f'<line class="grid" x2="100%" y1="{level}%" y2="{level}%"/>' for level in (0, 50, 100)]
    dots = {(round(x(i)), round(y(s))): None for i, s in enumerate(layer.search, 1) if s > 0}
    lost = {round(x(i)): None for i, s in enumerate(layer.search, 1) if math.isnan(s)}
    steps = "".join(f"H{x(trial):.0f}V{y(seconds):.1f}" for trial, seconds in layer.curve)
    begin = layer.curve[0]
    paths = [
        _path("dots", "".join(f"M{a} {b}h0" for a, b in dots)),
        _path("lost", "".join(f"M{a} {_HIGH}v-12" for a in lost)),
        _path("best", f"M{x(begin[0]):.0f} {y(begin[1]):.1f}{steps}H{_WIDE}"),
    ]
    marks = []
    default = layer.search[layer.default_trial - 1] if layer.default_trial else math.nan
    if default > 0:
        paths.insert(0, _path("level", f"M0 {y(default):.1f}H{_WIDE}"))
        marks.append(mark(_MARK_OF[DEFAULT], f"{x(layer.default_trial or 1) / 10:.2f}%", f"{y(default):.1f}%"))
    elif DEFAULT in layer.others:  # known, but not from this search
        paths.insert(0, _path("level", f"M0 {y(max(1.0, layer.others[DEFAULT].ratio.value) * fastest):.1f}H{_WIDE}"))
    if layer.winner_trial and (seconds := layer.search[layer.winner_trial - 1]) > 0:
        marks.append(_ring(f"{x(layer.winner_trial) / 10:.2f}%", f"{y(seconds):.1f}%", around=False))
    near = next(trial for trial, seconds in layer.curve if seconds <= fastest / 0.95)
    told = f"95 % after {near}, best at {layer.curve[-1][0]} of {plural(layer.trials, 'trial')}"
    return (
        '<div class="curve"><span class="ends" aria-hidden="true"><span>100 %</span><span>50 %</span>'
        f'<span>25 %</span></span><svg role="img"><title>{told}</title>{"".join(lines)}'
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" preserveAspectRatio="none" width="100%" height="100%">{"".join(paths)}'
        f"</svg>{''.join(marks)}</svg><small>{told}{_spent(layer)}</small></div>"
    )


def _spent(layer: Layer) -> str:
    failed = f"; {failures_text(layer.failures)}" if layer.failures else ""
    return f"{failed}; {span(layer.cost)}" if layer.cost is not None else failed


def _path(kind: str, steps: str) -> str:
    return f'<path class="{kind}" d="{steps}"/>' if steps else ""


# ---- which schedule won where -----------------------------------------------------------------


def _matrix(layers: Sequence[Layer]) -> Iterator[str]:
    found = wins(layers)
    if not found:
        return
    totals = {
        name: sum(cells[name].wins for cells in found.values() if name in cells)
        for name in dict.fromkeys(name for cells in found.values() for name in cells)
    }
    schedules = sorted(totals, key=lambda name: -totals[name])
    yield "<h3>Which schedule won where</h3>"
    yield (
        '<p class="soft">Layers won, and below it the schedule’s best time over the best of all, the geometric mean of'
        " the layers of a class. Empty: not tried; ✗: every trial failed.</p>"
    )
    yield '<div class="scroll" tabindex="0"><table><thead><tr><th></th>'
    yield "".join(f"<th><span>{escape(name)}</span></th>" for name in schedules) + "</tr></thead><tbody>"
    for kind, cells in found.items():
        count = sum(cell.wins for cell in cells.values())
        size = sum(layer.kind == kind and bool(layer.attempts) for layer in layers)
        yield f"<tr><th>{escape(kind)} <small>{size}</small></th>"
        yield "".join(_cell(cells.get(name), count) for name in schedules) + "</tr>"
    yield "</tbody></table></div>"


def _cell(cell: Cell | None, count: int) -> str:
    if cell is None:
        return "<td></td>"
    share = f' style="--share:{cell.wins / count:.2f}"' if cell.wins else ""
    won = f"<b>{cell.wins}</b>" if cell.wins else "·"
    return f"<td{share}>{won}<small>{f'{factor(cell.behind)}×' if cell.behind else '✗'}</small></td>"


# ---- failures, drift --------------------------------------------------------------------------


def _failures(failures: Sequence[Failure]) -> Iterator[str]:
    yield "<h3>Failures</h3>"
    if not failures:
        yield "<p>None.</p>"
        return
    yield (
        '<p class="soft">Every trial that failed, with the command that repeats it. Each cost its trial and nothing'
        " else.</p>"
    )
    unfolded = " open" if len(failures) <= _UNFOLDED else ""
    for group in grouped(failures):
        first = group[0]
        head = f"<b>{len(group)} × {escape(first.outcome.replace('_', ' '))}</b> {escape(first.message)}"
        yield f"<details{unfolded}><summary>{head}</summary><ol>"
        yield from _commands(group)
        yield "</ol></details>"


def _commands(group: Iterable[Failure]) -> Iterator[str]:
    said = ""
    for failure in group:
        other = f"<br><small>{escape(failure.message)}</small>" if said and failure.message != said else ""
        said = said or failure.message
        yield f"<li><code>{escape(failure.command)}</code>{other}</li>"


def _drift(drift: Drift | None) -> Iterator[str]:
    yield "<h3>Drift of the machine</h3>"
    if drift is None:
        yield f'<p class="soft">{NOT_MEASURED.capitalize()}: no record says how a reference kernel did meanwhile.</p>'
        return
    yield f"<p>A reference kernel, timed now and then, took {escape(drift_text(drift))}.</p>"
    low, high = min(0.95, *drift.lows), max(1.05, *drift.highs)

    def y(value: float) -> float:
        return _HIGH * (high - value) / (high - low)

    xs = [_WIDE * (i + 0.5) / len(drift.medians) for i in range(len(drift.medians))]
    ranges = "".join(
        f"M{x:.0f} {y(a):.1f}V{y(b):.1f}" for x, a, b in zip(xs, drift.lows, drift.highs, strict=True) if a < b
    )
    line = "L".join(f"{x:.0f} {y(value):.1f}" for x, value in zip(xs, drift.medians, strict=True))
    yield (
        f'<div class="drift"><span class="ends"><span>{high:.2f}</span><span>{low:.2f}</span></span><svg role="img">'
        f'<title>{escape(drift_text(drift))}</title><line class="one" x2="100%" y1="{y(1):.1f}%" y2="{y(1):.1f}%"/>'
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" preserveAspectRatio="none" width="100%" height="100%">'
        f"{_path('range', ranges)}{_path('line', f'M{line}')}</svg></svg></div>"
    )
