"""Fixtures of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import documents
import pytest
from commands import Run

from convgen.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line here; gives status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def group() -> list[str]:
    """The command that ``run`` puts before what it is given."""
    return []


@pytest.fixture
def run_json(run: Run, group: list[str]) -> Callable[..., Any]:
    """Runs a command line with --json; gives the document, which must be all of stdout, and as its schema says."""

    def call(*arguments: object, status: int = 0) -> Any:
        found, out, err = run(*arguments, "--json")
        assert found == status, err
        document = json.loads(out)
        documents.check([*group, *map(str, arguments)], document)
        return document

    return call
