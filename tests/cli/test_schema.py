"""The fields of what commands print with --json: documented, and those there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import documents
import pytest
from commands import TINY, Run
from jsonschema import Draft202012Validator
from paths import ROOT

from convgen.cli.schema import DOCUMENTS, main, page, schema
from convgen.problem.spec import ConvSpec
from convgen.topics import topic_text

RunJson = Callable[..., Any]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_schemas_are_json_schemas(name: str) -> None:
    Draft202012Validator.check_schema(schema(name.removesuffix("[]")))


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"added": 1, "records": 2, "more": 3}, "more"),
        ({"added": 1}, "records"),
        ({"added": "one", "records": 2}, "added"),
    ],
)
def test_a_schema_refuses_what_is_not_described(document: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        documents.check(["records", "import"], document)


def test_the_page_is_made_of_the_schema() -> None:
    """`python -m convgen.cli.schema > docs/json.md` writes it."""
    assert (ROOT / "docs" / "json.md").read_text(encoding="utf-8") == page() == topic_text("json")


def test_an_untuned_build_says_its_time(run: Run, run_json: RunJson, tmp_path: Path) -> None:
    options = ["--no-records", "--threads", 1, "--no-validate", "--out", tmp_path / "out"]
    (layer,) = run_json("build", TINY, *options)["layers"]
    assert (layer["measured"], layer["record"]) == (True, None)
    assert 0 < layer["seconds"] < 1
    assert layer["gflops"] == pytest.approx(ConvSpec.parse(TINY).flops / layer["seconds"] / 1e9)
    assert "GFLOP/s, measured now" in run("build", TINY, *options)[1]


def test_the_schema_of_no_command_is_an_error_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nosuch"]) == 2
    assert "expected one of" in capsys.readouterr().err
    assert main(["compile"]) == 0
    assert "$schema" in capsys.readouterr().out
