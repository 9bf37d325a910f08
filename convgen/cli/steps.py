"""What commands that compile models share: how far it is, and what each step takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..formats.sources import write_text
from ..report.words import plural
from .common import OK, emit, note, note_busy, say, tidy

if TYPE_CHECKING:
    from ..network.network import Network
    from ..records.opening import Records
    from ..report.profile import NetworkProfile

#: Seconds between the lines that say how far compiling is, where no terminal shows it.
LINE_SECONDS = 10.0


def check_picture(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse the name of a file that is no page, picture or table."""
    if path is not None and path.suffix not in (".html", ".md", ".svg"):
        raise click.BadParameter(f"expected a file name that ends in .html, .svg or .md, found {path.name!r}")
    return path


@contextmanager
def compiling(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal while a network is compiled, elsewhere a line now and then; gives what is told how many
    functions are, and of how many.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    off = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=off) as bar:
        task, said = bar.add_task("planning", total=None), time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal said
            if off and not quiet and done < total and time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                note(f"compiled {done} of {plural(total, 'function')}")
            bar.update(task, description="compiling" if done < total else "packing", completed=done, total=total)

        yield tell


def timed_steps(network: Network, compiled: Callable[[Records], Network]) -> list[NetworkProfile]:
    """What the steps take at each size, beside the defaults.

    Args:
        compiled: makes the network with the kernels of a store; with the defaults where that is False.
    """
    from ..measure.busy import BusyWatch
    from ..report.profile import profile_network

    defaults = compiled(False) if network.is_tuned else None
    watch = BusyWatch()
    profiles = [profile_network(network, defaults, size) for size in range(len(network.plans))]
    note_busy([watch.share()], [network.threads])
    return profiles


def write_steps(profiles: list[NetworkProfile], target: str, out: Path) -> None:
    """Write what the steps take: a page, a picture or tables, as the file's name ends."""
    if out.suffix == ".md":
        from ..report.profile import profile_page

        text = profile_page(profiles)
    elif out.suffix == ".html":
        from ..hardware.machine import machine
        from ..report.model_page import model_page  # loads Jinja

        text = model_page(profiles, f"{machine().cpu}, {target}")
    else:
        from ..report.figure import profiles as figure  # loads Jinja

        text = figure(profiles)
    write_text(text, out)
    note(f"wrote {tidy(out)}")


def report_model(model: Path, records: Path | None, out: Path | None, as_json: bool, **options: Any) -> int:
    """Time a model's steps with a store's kernels and with the defaults, and show that; the exit status.

    Args:
        options: of :func:`convgen.compile`.
    """
    from ..api import compile as compile_network
    from ..report.profile import profile_page

    def compiled(kept: Records) -> Network:
        with compiling(quiet=as_json) as progress:
            made: Network = compile_network(model, records=kept, progress=progress, **options)
        return made

    network = compiled(records)
    profiles = timed_steps(network, compiled)
    if out is not None:
        write_steps(profiles, network.target.spelling, out)
    if as_json:
        emit({"profiles": [made.to_dict() for made in profiles]})
    elif out is None:
        say(profile_page(profiles).rstrip())
    return OK
