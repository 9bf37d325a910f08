"""What commands print with --json, against its schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonschema import Draft202012Validator

from convgen.cli.schema import schema

#: Commands with subcommands.
GROUPS = ("records", "fleet")


def command_of(arguments: Sequence[str], document: Any) -> str:
    """Which of the schema's documents a command line prints."""
    name = " ".join(arguments[:2] if arguments[0] in GROUPS else arguments[:1])
    if name == "show" and "--ir" in arguments:
        return "show --ir"
    if name == "show" and "between" in document:
        return "show (separable)"
    if name == "show" and "shapes" not in document:
        return "show (several layers)"
    if name == "compile" and "onnxruntime" in arguments:
        return "compile --for onnxruntime"
    if name == "help" and len(arguments) > 1:
        return "help TOPIC"
    separable = len(arguments) > 1 and str(arguments[1]).startswith("separable")
    if name == "build" and separable:
        return "compile"
    if name == "report" and "--whole" in arguments:
        return "report --whole"
    if name == "validate" and "layers" not in document:  # of a model, or of the folder of a network
        return "validate --whole"
    if name == "bench" and ("--whole" in arguments or separable):
        return "bench --whole"
    return "tune --status" if name == "tune" and "--status" in arguments else name


def check(arguments: Sequence[str], document: Any) -> None:
    """Raise:
    AssertionError: the document is not as the schema says.
    """
    validator = Draft202012Validator(schema(command_of(arguments, document)))
    wrong = [f"{error.json_path}: {error.message}"[:300] for error in validator.iter_errors(document)]
    if wrong:
        raise AssertionError("; ".join(wrong))
