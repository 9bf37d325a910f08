"""What the programs that measure share: their arguments, and how they end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from convgen.errors import ConvgenError


def listed(text: str) -> list[str]:
    """The words between commas."""
    return [word for word in text.split(",") if word]


def threads_listed(text: str) -> list[int]:
    """Numbers of threads between commas."""
    return [int(word) for word in text.split(",")]


def add_kept_options(parser: argparse.ArgumentParser, rounds: int = 7) -> None:
    """What every program has that keeps rows: ``--rounds``, ``--results`` and ``--fresh``."""
    results = Path(__file__).parent / "results"
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds of timing")
    parser.add_argument("--results", type=Path, default=results, help="where results are kept")
    parser.add_argument("--fresh", action="store_true", help="measure known rows again")


def console_of_bench() -> Console:
    """Where a program says what it measures, as it is."""
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def problems(values: Mapping[str, Any]) -> str:
    """Why libraries of a row were not timed, to be said behind what is said of the others."""
    return "".join(f"; {part['problem']}" for part in values["parts"] if part["problem"])


def exit_status(work: Callable[[Console], None]) -> int:
    """Do the work, which is given a console: 0; 130 where it was interrupted, 2 where it failed, each with a line that
    says so.
    """
    console = console_of_bench()
    try:
        work(console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from here")
        return 130
    except (ConvgenError, OSError) as error:
        console.print(f"bench: {error}")
        return 2
    return 0
