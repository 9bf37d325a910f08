"""The command line.

    python3 run.py                  measures what is not yet in results.jsonl, and compares the fastest
    python3 run.py --minutes 10     begins nothing after ten minutes
    python3 run.py --sanitizer      small layers for a GPU under NVIDIA's compute-sanitizer too
    python3 run.py --facts          prints what there is to know about this machine, as JSON

Every candidate runs in a process of its own, with limits of time and memory, and its output is compared with the
expected one before it is timed. A result is on the disk before the next candidate begins: the same command goes on
where it was stopped, however that was. summary.txt beside the results says what is right, wrong and fastest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from typing import Sequence

from . import LOCATION
from .bundle import Bundle
from .devices import DEVICES
from .errors import INTERRUPTED, OK, TROUBLE, Trouble
from .facts import facts
from .results import Results
from .sanitizer import find
from .session import Session
from .summary import summary
from .words import tell


def finite(text: str) -> float:
    """A number that is neither negative nor infinite, of an option."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError("expected a finite number >= 0, found %r" % text)
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own where None); returns its exit status."""
    parser = argparse.ArgumentParser(description="Measure the candidates of this bundle; goes on where it stopped.")
    here = os.path.dirname(LOCATION)
    parser.add_argument("bundle", nargs="?", default=here, help="the unpacked bundle [default: where this file is]")
    parser.add_argument("-o", "--out", metavar="FILE", help="where results go [default: results.jsonl in the bundle]")
    parser.add_argument("--timeout", type=finite, default=60.0, metavar="S", help="seconds a candidate may take [60]")
    parser.add_argument(
        "--memory", type=int, metavar="MIB", help="memory a candidate may take, 0: any [default: by the layer's size]"
    )
    parser.add_argument("--minutes", type=finite, metavar="M", help="begin no candidate later than that [no limit]")
    parser.add_argument("--sanitizer", action="store_true", help="small layers under NVIDIA's compute-sanitizer too")
    parser.add_argument("--facts", action="store_true", help="print what there is to know about this machine")
    given = parser.parse_args(arguments)
    if given.facts:
        sys.stdout.write(json.dumps(facts(), indent=1) + "\n")
        return OK
    try:
        machine = facts()
        memory = None if given.memory is None else given.memory << 20
        bundle = Bundle(given.bundle)
        out = given.out or os.path.join(bundle.root, "results.jsonl")
        results = Results(out, bundle.digest, machine, DEVICES[bundle.manifest["device"]].machine_facts)
        session = Session(bundle, results, given.timeout, memory, given.minutes)
        try:
            session.measure()
            if given.sanitizer:
                _sanitize(session)
        except KeyboardInterrupt:
            tell(f"interrupted; {len(session.done)} results are in {out}: the same command goes on from there")
            return INTERRUPTED
        finally:
            _write(summary(bundle, results), out)
    except Trouble as trouble:
        tell(f"convgen: {trouble}")
        return TROUBLE
    if session.is_over:
        tell("the minutes are over: the same command goes on from here")
    tell(f"{len(session.done)} results in {out}: take them back with `convgen fleet import`")
    return TROUBLE if session.refused and not session.done else OK


def _sanitize(session: Session) -> None:
    program = find()
    if session.bundle.manifest["device"] != "cuda":
        tell("--sanitizer: left out: it checks a GPU's kernels, and the bundle is for CPUs")
    elif not program:
        tell("--sanitizer: left out: expected compute-sanitizer of the CUDA Toolkit on the path, found none")
    else:
        session.sanitize(program)


def _write(text: str, results: str) -> None:
    """The summary, beside the results."""
    path = os.path.join(os.path.dirname(os.path.abspath(results)), "summary.txt")
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        tell(f"{path}: {error.strerror}")
