"""Measuring where there is no compiler and no network: candidates go there as a bundle, results come back as a file.

:func:`pack` compiles candidates and writes them with their inputs, the expected outputs and a runner that needs
Python's standard library only (:mod:`convgen.measure.standalone`). :func:`read_results` makes the records that
measuring live would have made out of what the runner wrote.
"""

from __future__ import annotations

from .archive import bundle_name, unpacked
from .machine import machine_from_facts, read_facts, target_on
from .packing import Packed, pack, trial_id
from .results import import_results, read_results

__all__ = [
    "Packed",
    "bundle_name",
    "import_results",
    "machine_from_facts",
    "pack",
    "read_facts",
    "read_results",
    "target_on",
    "trial_id",
    "unpacked",
]
