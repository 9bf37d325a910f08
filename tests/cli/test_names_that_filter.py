"""Names that say which records a command looks at: those of this version and of the store's records, no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from answers import final
from commands import Run, model_file
from made_records import TEXT, record

from convgen.network.tuning import ModelTuning
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
from convgen.tuning.job import Job

#: What other versions of convgen and of LLVM called so.
OLD: dict[str, Any] = {"schedule": "cpu_of_old", "target": "cpu:of-another-llvm"}


def filled(path: Path, *items: TuningRecord) -> Path:
    with RecordStore(path) as store:
        store.add_all(items)
    return path


@pytest.mark.parametrize(("option", "typed", "right"), [("--schedule", "refernce", "reference"),
                                                        ("--target", "cpu:haswel", "cpu:haswell"),
                                                        ("--target", "haswell", "cpu:haswell")])  # fmt: skip
@pytest.mark.parametrize("command", ["list", "best", "export", "check", "prune", "diff", "report"])
def test_a_name_that_nothing_has_is_refused(
    command: str, option: str, typed: str, right: str, tmp_path: Path, run: Run
) -> None:
    """An empty list would say that there are no such records."""
    path = filled(tmp_path / "a.sqlite", record())
    where = {"diff": [path, path], "report": [path]}.get(command, ["--records", path])
    status, out, err = run(*["records"] * (command != "report"), command, *where, option, typed)
    assert (status, out) == (2, "")
    if command == "report" and option == "--schedule":  # which has no such option
        return
    assert option.removeprefix("--") in err
    assert f"found {typed.rpartition(':')[2]!r}" in err or f"found {typed!r}" in err
    assert right in err.partition("did you mean ")[2], err


@pytest.mark.parametrize("name", OLD)
def test_a_name_that_records_have_is_one(name: str, tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    """Also where this version has nothing of that name."""
    known = filled(tmp_path / "a.sqlite", record(), record(**{name: OLD[name]}))
    other = filled(tmp_path / "b.sqlite", record())
    asked = [f"--{name}", OLD[name]]
    (found,) = run_json("records", "list", *asked, "--records", known)
    assert found[name] == OLD[name]
    assert run("records", "list", *asked, "--records", other)[0] == 2
    assert len(run_json("records", "diff", other, known, *asked)["only"]["b"]) == 1  # one of both has it


def test_heights_of_strips_have_a_name_as_schedules_do(tmp_path: Path, run_json: Callable[..., Any]) -> None:
    store = ["--records", filled(tmp_path / "a.sqlite", record())]
    assert run_json("records", "list", "--schedule", "strips", *store) == []
    assert run_json("records", "list", "--schedule", "reference", TEXT, *store) != []


def test_records_of_a_whole_model_are_found_by_the_model(tmp_path: Path, run_json: Callable[..., Any]) -> None:
    """Its convolutions are those of the network: of its accuracy, in its layouts, on its threads."""
    model = model_file(tmp_path / "net.onnx")
    (problem,) = ModelTuning(model, threads=1, accuracy="strict").job(Job(())).problems()
    planned = problem.spec.descriptor
    made, other = (final(spec=planned, threads=threads, winner=True) for threads in (1, 2))
    store = ["--records", filled(tmp_path / "a.sqlite", made, record(), other)]
    asked = [model, "--whole", "--threads", 1, "--accuracy", "strict"]
    for command in ("list", "best"):
        (found,) = run_json("records", command, *asked, *store)
        assert found["id"] == made.id
    out = tmp_path / "tuned.jsonl"
    exported = run_json("records", "export", "--best", *asked, "-o", out, *store)
    assert (exported["exported"], out.read_text()) == (1, made.to_json() + "\n")
    assert run_json("records", "list", *asked[:-2], *store) == run_json("records", "list", model, *store) == []


@pytest.mark.parametrize("command", [["list"], ["best"], ["export"], ["export", "--best"]])
def test_who_asks_for_a_models_layers_is_told_of_the_whole(command: list[str], tmp_path: Path, run: Run) -> None:
    model = model_file(tmp_path / "net.onnx")
    store = ["--records", filled(tmp_path / "a.sqlite", record())]
    hint = "with --whole those of `convgen tune --whole` are found"
    assert hint in run("records", *command, model, *store)[2]
    assert hint not in run("records", *command, model, "--whole", *store)[2]
    assert hint not in run("records", *command, "conv1d ic1 oc1 i8 k1", *store)[2]


def test_a_whole_is_one_model(tmp_path: Path, run: Run) -> None:
    model = model_file(tmp_path / "net.onnx")
    store = ["--records", filled(tmp_path / "a.sqlite", record())]
    for words in ([], [TEXT], [model, model], [model, "--spec", TEXT]):
        status, _, err = run("records", "list", *words, "--whole", *store)
        assert (status, "--whole: expected one ONNX model" in err) == (2, True)
    status, _, err = run("records", "list", model, "--accuracy", "strict", *store)
    assert (status, "--accuracy needs --whole" in err) == (2, True)
