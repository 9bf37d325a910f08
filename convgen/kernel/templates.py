"""The parts that headers and examples of all exported libraries have in common."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from string import Template

from ..lowering.runtime import source


def filled(template: str, **values: object) -> str:
    """A template of ``runtime/`` with its values."""
    return Template(source(template)).substitute(values)


def header_parts(name: str) -> dict[str, str]:
    """What templates of headers call ``types``, ``cpu`` and ``end``."""
    parts = {part: filled(f"header_{part}.template.h", name=name).rstrip() for part in ("cpu", "end")}
    return {"types": source("types.h").strip(), **parts}


def example_helpers(name: str) -> str:
    """What templates of examples call ``helpers``."""
    return filled("example_helpers.template.c", name=name).rstrip()


def example_driver(name: str) -> str:
    """What templates of examples for GPUs call ``driver``."""
    return filled("example_driver.template.c", name=name).rstrip()


def needed_cpu(isa: Sequence[str]) -> str:
    """What a library of these instructions needs, as lines of a comment."""
    said = f"Needs a CPU with {', '.join(isa)}." if isa else "Runs on every CPU of its kind."
    return "\n * ".join(textwrap.wrap(said, 96))


def byte_constants(prefix: str, sizes: Mapping[str, int]) -> list[str]:
    """``#define conv_SRC_BYTES 1024`` for each name in lower case."""
    return [f"#define {prefix}_{name.upper()}_BYTES {size}" for name, size in sizes.items()]


def element_constants(prefix: str, counts: Mapping[str, int]) -> list[str]:
    """``#define conv_SRC_ELEMENTS 256`` for each name in lower case."""
    return [f"#define {prefix}_{name.upper()}_ELEMENTS {count}" for name, count in counts.items()]


def workspace_constant(prefix: str, fixed: int, share: int) -> str:
    """``#define conv_WORKSPACE_BYTES(threads)``, of a CPU's library: a ``size_t`` (unsigned long, on Linux), whatever
    integer the number of threads is. ``#if`` takes a suffix and no cast.
    """
    return f"#define {prefix}_WORKSPACE_BYTES(threads) ({fixed}UL + (threads) * {share}UL)"
