"""Names that say which records a command looks at: those of this version and of the store's records, no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from made_records import TEXT, record

from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore

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
