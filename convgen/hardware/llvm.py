"""What LLVM says of processors.

Loading it, within TVM, takes a second, and the same release always says the same: answers are kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..folders import replacing, user_cache
from .machine import machine


def features_of(config: Mapping[str, Any]) -> set[str]:
    """What LLVM may use of a target, and what steers it, by its own names.

    Args:
        config: TVM's, with ``kind``, ``mcpu``, and if need be ``mtriple`` and ``mattr``.
    """
    described = {name: value for name, value in config.items() if name != "num-cores"}

    def ask() -> list[str]:
        from tvm.target import Target as TvmTarget
        from tvm.target import codegen

        return sorted(str(name) for name in codegen.llvm_get_cpu_features(TvmTarget(described)))

    return set(_answer(f"features {json.dumps(described, sort_keys=True)}", ask))


def processors_of(config: Mapping[str, Any]) -> set[str]:
    """The processors that LLVM knows of an architecture, those of 32 bits among them.

    Args:
        config: TVM's, with ``kind`` and if need be ``mtriple``.
    """
    described = {name: config[name] for name in ("kind", "mtriple") if name in config}

    def ask() -> list[str]:
        from tvm.target import Target as TvmTarget
        from tvm.target import codegen

        return sorted(str(name) for name in codegen.llvm_get_cpu_archlist(TvmTarget(described)))

    return set(_answer(f"processors {json.dumps(described, sort_keys=True)}", ask))


def numbered_processor() -> str:
    """The name of the processor whose number this machine's says."""

    def ask() -> list[str]:
        from tvm.target import codegen

        return [str(codegen.llvm_get_system_cpu())]

    return _answer(f"here {machine().fingerprint}", ask)[0]


def llvm_version() -> str:
    """The major number of its release."""
    return _answer(_VERSION, _ask_version)[0]


def _ask_version() -> list[str]:
    from tvm.target import codegen

    return [str(codegen.llvm_version_major())]


# ---- kept answers -----------------------------------------------------------------------------

_VERSION = "version"


def _answer(question: str, ask: Callable[[], list[str]]) -> list[str]:
    """The kept answer, else that of ``ask``, which is kept."""
    known = _kept()
    if question not in known:
        known[question] = ask()
        known[_VERSION] = _ask_version()  # which every record is compared with; now it takes no time
        if path := _path():
            with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as new:
                    new.write_text(json.dumps(_read(path) | known, indent=1, sort_keys=True))
    return known[question]


@cache
def _kept() -> dict[str, list[str]]:
    path = _path()
    return _read(path) if path else {}


@cache
def _path() -> Path | None:
    """Where the answers of this TVM are: another one may have another LLVM, though it has the same version."""
    folder, spec = user_cache(), importlib.util.find_spec("tvm")
    if folder is None or spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    which = f"{version('apache-tvm')} {origin} {origin.stat().st_mtime_ns}"
    return folder / "llvm" / f"{hashlib.sha256(which.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> dict[str, list[str]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or damaged: asked again
        return {}
    sound = isinstance(found, dict) and all(
        isinstance(answer, list) and answer and all(isinstance(word, str) for word in answer)
        for answer in found.values()
    )
    return found if sound else {}
