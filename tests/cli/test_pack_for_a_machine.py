"""What ``fleet pack --facts`` compiles for where no processor is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import TINY, Run

from convgen.hardware.machine import machine
from convgen.measure.standalone.facts import facts


@pytest.mark.parametrize(("options", "found"), [([], "none"), (["--target", "cpu"], "cpu")])
def test_facts_of_an_unknown_processor_need_a_target(options: list[str], found: str, tmp_path: Path, run: Run) -> None:
    """Bare Python does not know what LLVM calls it; this machine's processor is not meant."""
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(facts()))
    status, out, err = run("fleet", "pack", TINY, "--facts", path, *options, "-o", tmp_path / "b.zip")
    assert (status, out) == (2, "")
    assert f"--target: expected cpu:<LLVM processor> beside --facts, found {found}: {path} has no name" in err
    assert machine().cpu in err
    assert not (tmp_path / "b.zip").exists()


def test_a_processor_that_is_named_is_that_machines(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(replace(machine(), llvm="haswell").to_dict()))
    asked: list[Any] = []

    def packed(specs: Any, targets: Any, *_: object, **__: object) -> None:
        asked.extend(target.spelling for target in targets)
        raise KeyboardInterrupt

    monkeypatch.setattr("convgen.tuning.bundle.pack", packed)
    assert run("fleet", "pack", TINY, "--facts", path, "-o", tmp_path / "b.zip")[0] == 130
    assert asked == ["cpu:haswell"]
