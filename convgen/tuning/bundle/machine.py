"""The machine that measures a bundle, as its runner describes it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ...errors import MeasureError, UnsupportedError
from ...hardware.machine import ISA, MODEL_FIELDS, Device, Machine, parse_cpuinfo
from ...hardware.target import Target, resolve
from ...records.record import load_json


def machine_from_facts(facts: object, where: str = "facts") -> Machine:
    """The machine that a bundle's runner describes (``python3 run.py --facts``).

    Raises:
        MeasureError: a fact is missing or mistyped; ``where`` leads its message.
    """
    if not isinstance(facts, dict):
        raise MeasureError(f"{where}: expected a JSON object, found {type(facts).__name__}")

    def fact(name: str, kind: type) -> Any:
        value = facts.get(name)
        if type(value) is not kind or (isinstance(value, int) and value < 1):
            expected = "text" if kind is str else "an object" if kind is dict else "an integer >= 1"
            raise MeasureError(f"{where}: {name}: expected {expected}, found {value!r:.80}")
        return value

    gpu = facts.get("gpu")  # None, or missing where an early runner did not look for one
    cpuinfo, cpus = fact("cpuinfo", str), fact("cpus", int)
    caches = fact("caches", dict)
    for level, size in caches.items():
        if type(size) is not int or size < 1:
            raise MeasureError(f"{where}: caches.{level}: expected bytes, found {size!r:.80}")
    # As Machine.detect() does it.
    name, model, features = parse_cpuinfo(cpuinfo)
    if not any(names[0] in cpuinfo for names in MODEL_FIELDS):
        model = fact("architecture", str)
    isa = hashlib.sha256(" ".join(sorted(f for f in features if ISA.match(f))).encode()).hexdigest()[:12]
    return Machine(
        cpu=name,
        fingerprint=f"{model}-{isa}-{cpus}",
        features=features,
        cores=fact("cores", int),
        logical=fact("logical", int),
        l1=caches.get("1"),
        l2=caches.get("2"),
        l3=caches.get("3"),
        memory=fact("memory", int),
        arch=fact("architecture", str),
        gpu=Device.from_dict(gpu, f"{where}: gpu") if gpu is not None else None,
    )


def read_facts(path: Path) -> Machine:
    """The machine that a file describes: the output of ``run.py --facts``, results, or
    :meth:`convgen.hardware.machine.Machine.to_dict` as JSON.

    Raises:
        MeasureError: it is neither.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        values = load_json(data)
    except (ValueError, RecursionError):
        try:
            values = load_json(data.partition(b"\n")[0])["facts"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise MeasureError(f"{path}: expected what run.py --facts prints, found {error}") from None
    if isinstance(values, dict) and "fingerprint" in values:
        return Machine.from_dict(values, str(path))
    if isinstance(values, dict) and "facts" in values:  # results that have their first line only
        values = values["facts"]
    return machine_from_facts(values, str(path))


def target_on(target: Target, machine: Machine) -> Target:
    """A target with the facts of the machine that will run its code.

    Raises:
        UnsupportedError: that machine cannot run it.
    """
    there = resolve(target.spelling, machine)
    if not there.native:
        gpu = machine.gpu.name if machine.gpu else "none with a GPU"
        found = gpu if target.on_device else machine.cpu
        raise UnsupportedError(f"{target}: expected a machine that has {there.missing(machine)}, found {found}")
    return there
