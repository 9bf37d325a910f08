"""The command line.

    python3 run.py                  measures what is not yet in results.jsonl, and compares the fastest
    python3 run.py --facts          prints what there is to know about this machine, as JSON

Every candidate runs in a process of its own, with limits of time and memory, and its output is compared with the
expected one before it is timed. A result is on the disk before the next candidate begins: the same command goes on
where it was stopped, however that was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Sequence

from . import LOCATION
from .bundle import Bundle
from .devices import DEVICES
from .errors import INTERRUPTED, OK, TROUBLE, Trouble
from .facts import facts
from .results import Results
from .session import Session
from .words import tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own where None); returns its exit status."""
    parser = argparse.ArgumentParser(description="Measure the candidates of this bundle; goes on where it stopped.")
    here = os.path.dirname(LOCATION)
    parser.add_argument("bundle", nargs="?", default=here, help="the unpacked bundle [default: where this file is]")
    parser.add_argument("-o", "--out", metavar="FILE", help="where results go [default: results.jsonl in the bundle]")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds a candidate may take [60]")
    parser.add_argument(
        "--memory", type=int, metavar="MIB", help="memory a candidate may take, 0: any [default: by the layer's size]"
    )
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
        session = Session(bundle, results, given.timeout, memory)
        try:
            session.measure()
        except KeyboardInterrupt:
            tell(f"interrupted; {len(session.done)} results are in {out}: the same command goes on from there")
            return INTERRUPTED
    except Trouble as trouble:
        tell(f"convgen: {trouble}")
        return TROUBLE
    tell(f"{len(session.done)} results in {out}: take them back with `convgen fleet import`")
    return TROUBLE if session.refused and not session.done else OK
