"""How a running command looks: a live display on a terminal, log lines anywhere else.

All but pages of the documentation goes to standard error.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..formats.entries import SpecEntry
from ..measure.standalone.words import one_line
from ..report.words import plural, shortened
from .common import duration, label, note, rate, say

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from ..tuning.job_state import JobState, Layer
    from ..tuning.search import Progress

#: Seconds between two updates: on a terminal, and in a log.
LIVE_SECONDS, LOG_SECONDS = 0.03, 15.0
#: Columns that the figures beside a layer's name take.
_FIGURES = 60
#: Order in which a job's layers are shown.
STATES = ("comparing", "searching", "begun", "out of budget", "done", "failed", "waiting", "skipped")


def _text(line: str, style: str = "") -> Text:
    """A line of a live display: neither rich's marks nor a terminal's codes in it mean anything."""
    from rich.text import Text

    return Text(one_line(line), style)


def page(text: str) -> None:
    """Print Markdown of the package's own, formatted where standard output is a terminal."""
    if not sys.stdout.isatty():
        say(text.rstrip("\n"))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.print(Markdown(text, hyperlinks=False), width=min(console.width, 110))


class _Display:
    """A live display where standard error is a terminal; ``_live`` is None elsewhere, and when it has ended."""

    _live: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True, highlight=False)
            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None


class View(_Display):
    """The progress of a command through its layers.

    Drawn only when something was reported, never from a thread: what is timed meanwhile is not
    disturbed.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._title = self._spec = ""
        self._drawn = 0.0
        self._best: float | None = None

    def start(self, number: int, entry: SpecEntry) -> None:
        """A layer begins."""
        position = f"[{number}/{self.layers}] " if self.layers > 1 else ""
        # A layer without a name goes by its descriptor, which is not said twice.
        name, spec = (label(entry), entry.spec.descriptor) if entry.names else (f"{entry.spec} {label(entry)}", "")
        self._title, self._spec, self._best = f"{position}{name}".strip(), spec, None
        if self._live:
            self.phase("")
        elif self.layers > 1:
            note(self._heading())

    def phase(self, text: str) -> None:
        """What is being done with the layer now."""
        if self._live:
            from rich.console import Group

            lines = [self._heading(), f"  {text}"] if text else [self._heading()]
            self._show(Group(*map(_text, lines)))

    def progress(self, state: Progress) -> None:
        """The tuner's report after a trial."""
        is_better, self._best = state.best != self._best, state.best
        now = time.monotonic()
        if self._live:
            if now - self._drawn >= LIVE_SECONDS or state.phase == "final":
                self._drawn = now
                self._show(self._panel(state))
        elif state.done > state.known and (is_better or now - self._drawn >= LOG_SECONDS):
            self._drawn = now
            note("  " + "  ".join(self._facts(state)))

    def finish(self, text: str) -> None:
        """One line that stays, where there are several layers: how this one ended."""
        if self.layers == 1:
            return
        if self._live:
            self._live.console.print(_text(f"{self._title}  {text}"), soft_wrap=True)
        else:
            note(f"  {text}")

    # ---- drawing ------------------------------------------------------------------------------

    def _heading(self) -> str:
        return f"{self._title}  {self._spec}".strip()

    def _show(self, content: Any) -> None:
        self._live.update(content, refresh=True)

    def _panel(self, state: Progress) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        count, left, best, *failures = self._facts(state)
        lines: list[Any] = [_text(self._heading(), style="bold")]
        if (fraction := _fraction(state)) is not None:
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(total=1.0, completed=fraction, width=32), _text(f"{count}, {left}"))
            lines.append(bar)
        else:
            lines.append(_text(f"{count}, {left}"))
        lines.append(_text(best, style="green"))
        lines += [_text(text, style="yellow") for text in failures]
        return Group(*lines)

    def _facts(self, state: Progress) -> list[str]:
        """Trials, time left, best so far and, where there are any, failures by kind."""
        count = f"{state.done}/{state.trials} trials" if state.trials else plural(state.done, "trial")
        best = f"best {duration(state.best)}  {rate(state.spec.flops, state.best)} GFLOP/s"
        if state.best and state.default:
            best += f"  {state.default / state.best:.2f}× the default"
        facts = [count, _left(state), f"{best}  {state.best_candidate}" if state.best else "none measured yet"]
        if state.failures:
            facts.append("failed: " + _failures(state))
        return facts


def _fraction(state: Progress) -> float | None:
    """How much of the budget is spent; None where there is no limit."""
    spent = []
    if state.trials:
        spent.append(state.done / state.trials)
    if state.seconds:
        spent.append(state.elapsed / state.seconds)
    return min(1.0, max(spent)) if spent else None


def _left(state: Progress) -> str:
    if state.phase == "final":
        return "comparing the best"
    times = []
    if state.seconds is not None:
        times.append(state.seconds - state.elapsed)
    if state.trials and state.done - state.known >= 4:  # the first ones wait for the workers to start
        times.append((state.trials - state.done) * state.elapsed / (state.done - state.known))
    if not times and not state.trials:
        return f"{state.elapsed:.0f} s so far, until nothing more is gained"
    return f"{max(0.0, min(times)):.0f} s left" if times else f"{state.elapsed:.0f} s so far"


# ---- jobs -------------------------------------------------------------------------------------


def clock(seconds: float) -> str:
    """``1:02:03``, ``12:34`` or ``56 s``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def remaining(run: JobState) -> str:
    """What is left of a job's budget, or what is done beyond it."""
    over = f", {clock(run.over)} over the budget" if run.running and run.over else ""
    if run.judging:
        return f"timing networks with what won{over}"
    if over:
        return f"comparing what was found{over}"
    parts = []
    if run.left is not None:
        parts.append(f"{clock(run.left)} left")
    if run.job.trials is not None:
        parts.append(f"{plural(max(0, run.job.trials - run.trials), 'trial')} left")
    if run.job.trials_per_layer is not None:
        parts.append(f"up to {plural(run.job.trials_per_layer, 'trial')} a layer")
    return ", ".join(parts) or "until nothing more is gained"


class JobView(_Display):
    """A tuning job at work: a table of its layers on a terminal, log lines anywhere else.

    Drawn only when something was reported, never from a thread.
    """

    def __init__(self) -> None:
        self._drawn = 0.0
        self._said: dict[int, tuple[object, ...]] = {}

    def update(self, run: JobState, layer: Layer) -> None:
        """Something has happened to a layer."""
        now = time.monotonic()
        if self._live:
            if now - self._drawn >= LIVE_SECONDS or layer.state != "searching":
                self._drawn = now
                self._live.update(self._panel(run, layer), refresh=True)
            return
        state = layer.progress
        saying = layer.state, state.best if state else None, run.judging
        said, self._said[id(layer)] = self._said.get(id(layer)), saying
        if said != self._said[id(layer)] or now - self._drawn >= LOG_SECONDS:
            self._drawn = now
            note("  ".join([f"[{clock(run.spent)}]", *self._facts(run, layer)]))

    # ---- drawing ------------------------------------------------------------------------------

    def _facts(self, run: JobState, layer: Layer) -> list[str]:
        """A log line's parts."""
        state = layer.progress
        facts = [f"{_name(layer)}  {layer.problem.threads}T", layer.state]
        if state and state.done:
            facts.append(plural(state.done, "trial"))
        if state and state.best:
            facts.append(f"best {duration(state.best)}  {rate(state.spec.flops, state.best)} GFLOP/s")
            facts += [f"{_times(state.default, state.best)} the default"] if state.default else []
            facts += [f"{_times(state.onnxruntime, state.best)} ONNX Runtime"] if state.onnxruntime else []
        if state and state.failures:
            facts.append("failed: " + _failures(state))
        return [*facts, layer.reason or remaining(run)]

    def _panel(self, run: JobState, current: Layer) -> Group:
        from rich import box
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        counts = {state: sum(layer.state == state for layer in run.layers) for state in STATES}
        layers = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        lines: list[Any] = [_text(f"{layers}; {run.trials} trials in {clock(run.spent)}, {remaining(run)}")]
        if run.job.seconds:
            done = min(1.0, run.spent / run.job.seconds)
            lines.append(ProgressBar(total=1.0, completed=done, width=48))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        table.add_column("layer", no_wrap=True, overflow="ellipsis")
        for name in ("best", "× default", "× ORT", "trials"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("state", "failed"):
            table.add_column(name, no_wrap=True)
        size = self._live.console.size
        height = max(3, size.height - 8)
        order = sorted(run.layers, key=lambda layer: (layer is not current, STATES.index(layer.state), -layer.share))
        names = shortened([_name(layer) for layer in order[:height]], max(16, min(48, size.width - _FIGURES)))
        for layer, name in zip(order, names, strict=False):
            state = layer.progress
            best = state.best if state else None
            cells = [
                name + (f"  {layer.problem.threads}T" if len(run.job.threads) > 1 else ""),
                f"best {duration(best)}" if layer is current else duration(best),
                _times(state.default if state else None, best),
                _times(state.onnxruntime if state else None, best),
                str(state.done) if state else "",
                layer.state,
                _failures(state) if state else "",
            ]
            table.add_row(*map(_text, cells), style="bold" if layer is current else "")
        lines.append(table)
        if len(order) > height:
            lines.append(_text(f"and {len(order) - height} more"))
        return Group(*lines)


def _name(layer: Layer) -> str:
    """A layer's name and how often it occurs, else its descriptor."""
    problem = layer.problem
    entry = SpecEntry(problem.spec, problem.count, problem.names)
    return label(entry) if problem.names else f"{problem.spec} {label(entry)}".strip()


def _times(other: float | None, best: float | None) -> str:
    return f"{other / best:.2f}×" if other and best else "–"


def _failures(state: Progress) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in state.failures.most_common())
