"""The fields of what commands print with --json: documented, and those there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import documents
import pytest
import stores
from commands import SMALL, TINY, Run
from jsonschema import Draft202012Validator
from paths import ROOT

from convgen.cli.schema import DOCUMENTS, page, schema
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


def test_what_is_printed_quickly(run_json: RunJson, tmp_path: Path) -> None:
    """The fixture compares each with its schema; tests of the slower commands use it too."""
    net = tmp_path / "net.txt"
    net.write_text(f"{SMALL}\n{TINY}\n")
    store, other = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    records = stores.some(3)
    for path in (store, other):
        stores.fill(path, records)
    kept = ["--records", store]
    assert run_json("schedules")
    assert run_json("targets")
    assert run_json("help")
    assert run_json("help", "json")["topic"] == "json"
    assert run_json("show", SMALL, "--threads", 1)
    assert run_json("show", net)["convolutions"] == 2
    assert run_json("show", SMALL, "--ir", "tir", "--schedule", "reference")
    assert run_json("convert", net, "-o", tmp_path / "net.toml")["layers"] == 2
    assert len(run_json("records", "list", *kept)) == 3
    assert run_json("records", "best", *kept) == []
    assert run_json("records", "show", records[0].id, *kept)["command"]
    assert run_json("records", "diff", store, other)["common"] == 3
    assert run_json("records", "check", *kept)["ok"]
    assert run_json("records", "prune", *kept)["removed"] == 0
    assert run_json("records", "merge", store, "--records", other)["records"] == 3
    assert run_json("records", "export", "-o", tmp_path / "a.jsonl", *kept)["exported"] == 3
    assert run_json("records", "import", tmp_path / "a.jsonl", *kept)["added"] == 0
    assert run_json("records", "recover", store, tmp_path / "c.sqlite")["saved"] == 3
    assert run_json("report", store)["settings"]
    assert run_json("tune", SMALL, "--status", *kept)["layers"]


def test_an_untuned_build_says_its_time(run: Run, run_json: RunJson, tmp_path: Path) -> None:
    options = ["--no-records", "--threads", 1, "--no-validate", "--out", tmp_path / "out"]
    (layer,) = run_json("build", TINY, *options)["layers"]
    assert (layer["measured"], layer["record"]) == (True, None)
    assert 0 < layer["seconds"] < 1
    assert layer["gflops"] == pytest.approx(ConvSpec.parse(TINY).flops / layer["seconds"] / 1e9)
    assert "GFLOP/s, measured now" in run("build", TINY, *options)[1]
