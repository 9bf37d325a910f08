"""``convgen validate DIR``: what build or compile has exported, checked as it lies there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import ExportError
from .common import FAILED, OK, emit, note, say
from .network import say_report

if TYPE_CHECKING:
    from ..check.validate import Report

#: What lists the layers of a model that were exported together.
INDEX = "index.json"
#: Options that go with a folder; all others are about what is built.
_OPTIONS = ("spec", "model", "threads", "seed", "as_json")


def exported_folder(words: Sequence[str]) -> Path | None:
    """The folder that a command was given in place of layers."""
    path = Path(words[0]) if len(words) == 1 else None
    return path if path is not None and path.is_dir() else None


def refuse_options(context: click.Context) -> None:
    """Raise a usage error where an option was given that says what to build."""
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in _OPTIONS:
            raise click.UsageError(f"{parameter.opts[-1]}: expected layers or a model, found the folder of an export")


def validate_exports(folder: Path, model: Path | None, threads: int | None, seed: int, as_json: bool) -> int:
    """Check the library in a folder, or those that an index lists; the exit status.

    Raises:
        ExportError: there is neither, or a file is not the one that a manifest describes.
    """
    from ..kernel.load import MANIFEST

    if (folder / MANIFEST).exists():
        return _validate_one(folder, model, threads, seed, as_json)
    if not (folder / INDEX).exists():
        expected = f"{MANIFEST}, which build and compile write for C, or {INDEX}, which lists several layers"
        raise ExportError(f"{folder}: expected {expected}, found neither")
    if model is not None:
        raise click.UsageError("--model: expected the folder of a network, found one with several layers")
    index = _read_index(folder / INDEX)
    checked = []
    for name in index["folders"]:
        report = _kernel_report(folder / name, threads, seed)
        checked.append(_layer(folder / name, report))
        if not as_json:
            print_checks(checked[-1])
    for text in index["others"]:
        note(f"convgen: not exported: {text}")
    return _finish(checked, index["target"], threads or index["threads"], as_json)


def _validate_one(folder: Path, model: Path | None, threads: int | None, seed: int, as_json: bool) -> int:
    from ..kernel.load import read_manifest
    from ..network.check.exported import validate_folder  # imports ONNX Runtime
    from ..network.check.validate import NetworkReport

    report = validate_folder(folder, model, threads=threads, seed=seed)
    if isinstance(report, NetworkReport):
        if model is None and any(check.name == "example" for check in report.checks):
            note("convgen: compared with the example that was exported with it; --model MODEL.onnx asks ONNX Runtime")
        return say_report(report, as_json)
    found = _layer(folder, report)
    if not as_json:
        print_checks(found)
    return _finish([found], read_manifest(folder)["target"], report.threads, as_json)


def _kernel_report(folder: Path, threads: int | None, seed: int) -> Report:
    from ..check.exported import validate_exported

    return validate_exported(folder, threads=threads, seed=seed)


def _layer(folder: Path, report: Report) -> dict[str, Any]:
    """A kernel and its checks as JSON values."""
    from ..kernel.load import read_manifest
    from ..problem.spec import ConvSpec

    facts = read_manifest(folder)
    seconds = facts.get("seconds")
    return {
        "names": [],
        "count": 1,
        "spec": report.spec,
        "schedule": facts["schedule"],
        "picks": facts["picks"],
        "record": facts.get("record"),
        "seconds": seconds,
        "gflops": ConvSpec.parse(report.spec).flops / seconds / 1e9 if seconds else None,
        "note": "",
    } | report.to_dict()


def _finish(checked: list[dict[str, Any]], target: str, threads: int, as_json: bool) -> int:
    passed = all(layer["passed"] for layer in checked)
    if as_json:
        facts = {"target": target, "threads": threads, "interrupted": False, "passed": passed}
        emit(facts | {"layers": checked, "skipped": []})
    return OK if passed else FAILED


def _read_index(path: Path) -> dict[str, Any]:
    """The target, threads and ``folders`` of an index, and why ``others`` have none.

    Raises:
        ExportError: it is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        layers = [dict(layer) for layer in values["layers"]]
        folders = [str(layer["folder"]) for layer in layers if "folder" in layer]
        if any(Path(name).name != name for name in folders):
            raise ValueError("a folder that is not below it")
        others = [f"{layer['spec']}: {layer['error']}" for layer in layers if "folder" not in layer]
        facts = {"target": str(values["target"]), "threads": int(values["threads"])}
        return {**facts, "folders": folders, "others": others}
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ExportError(f"{path}: expected the index of exported layers, found {found}") from error


def print_checks(result: dict[str, Any]) -> None:
    """A layer's checks for people, or why there are none."""
    say(f"{result['spec']}  {result.get('candidate', '')}".rstrip())
    if "error" in result:
        say(f"  FAIL  {result['error']}")
        return
    for check in result["checks"]:
        say(f"  {'ok  ' if check['passed'] else 'FAIL'}  {check['name']:<8}  {check['found']}")
    if not result["passed"]:
        say(f"  repeat with: {result['repro']}")
