"""How good predictions are: the bench end to end on a small layer, and its tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_module import load_bench

from convgen.errors import BuildError
from convgen.hardware.machine import machine
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate
from convgen.problem.spec import ConvSpec
from convgen.report.networks import processor_slug

SPEC = ConvSpec.parse("conv2d n1 ic32 oc32 i6x6 k3x3 s1x1 p1x1 residual relu")


@pytest.fixture(scope="module")
def regret() -> ModuleType:
    return load_bench("regret")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / processor_slug(machine()) / "regret.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_layer_end_to_end(regret: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tmp_path / "net.txt"
    problem.write_text(SPEC.descriptor)
    options = ["--problems", str(problem), "--models", "", "--rounds", "2", "--results", str(tmp_path)]
    assert regret.main(options) == 0
    (row,) = rows_of(tmp_path)
    inside = ConvSpec.parse(row["spec"])
    assert inside == SPEC.with_(dst_layout="nchw16c")  # as at the beginning of a network
    assert row["chosen"] == default_candidate(inside, resolve().on(1)).schedule.id
    assert row["chosen"] in row["measured"].keys() <= row["predicted"].keys()
    assert all(seconds > 0 for seconds in row["measured"].values())
    assert (row["threads"], row["failed"]) == (1, {})
    assert row["picks"].keys() == row["measured"].keys()
    page = (tmp_path / processor_slug(machine()) / "regret.md").read_text()
    assert "## 1 thread, 1 layer" in page
    monkeypatch.setattr(regret, "measure", None)  # known rows are not measured again
    assert regret.main(options) == 0
    assert regret.main([*options, "--tables"]) == 0
    assert rows_of(tmp_path) == [row]


def test_what_fails_to_build_is_said(regret: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = default_candidate(SPEC, resolve().on(1)).schedule.id
    compiled = regret.compile_candidate

    def failing(spec: ConvSpec, target: Any, candidate: Any, threads: int) -> Any:
        if candidate.schedule.id == chosen:
            raise BuildError("planted")
        return compiled(spec, target, candidate, threads)

    monkeypatch.setattr(regret, "compile_candidate", failing)
    row = regret.measure(regret.Question.of(SPEC, resolve(), 1), 1)
    assert row.values["failed"] == {chosen: "planted"}
    assert chosen not in row.values["measured"]
    assert row.regret == math.inf
    assert regret.page([row])


def test_a_row_answers_while_the_same_would_be_measured(regret: ModuleType) -> None:
    question = regret.Question.of(SPEC, resolve(), 1)
    measured = dict.fromkeys(question.picks, 1.0)
    values = {"chosen": "another", "picks": question.picks, "predicted": {"another": 1.0}, "measured": measured}
    answer = question.answered(regret.RegretRow(values))
    assert answer.values == {**values, "chosen": question.chosen, "predicted": question.predicted}
    assert question.answered(None) is None
    assert question.answered(regret.RegretRow({**values, "picks": {}})) is None
    older = {name: {**picks, "version": picks["version"] - 1} for name, picks in question.picks.items()}
    assert question.answered(regret.RegretRow({**values, "picks": older})) is None


def test_the_order_is_drawn_and_stays(regret: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specs = [SPEC.with_(oc=16 * number) for number in range(1, 21)]
    order = regret.drawn(specs)
    assert sorted(order, key=specs.index) == specs != order == regret.drawn(reversed(specs))
    assert [spec for spec in order if spec in specs[:10]] == regret.drawn(specs[:10])
    problem = tmp_path / "net.txt"
    problem.write_text(SPEC.descriptor)
    options = ["--problems", str(problem), "--models", "", "--results", str(tmp_path), "--minutes", "0"]
    assert regret.main(options) == 0
    assert "the time is over after 0 of 1 layer" in capsys.readouterr().err


def test_regret_is_what_the_choice_costs(regret: ModuleType) -> None:
    facts = {"threads": 1, "failed": {}, "cpu": "a", "date": "2026-01-01"}
    seconds = [{"a": 1.5, "b": 1.0}, {"a": 2.0, "b": 4.0}]
    rows = [
        regret.RegretRow({"spec": f"s{i}", "chosen": "a", "predicted": {"a": 1.0, "b": 2.0}, "measured": each, **facts})
        for i, each in enumerate(seconds)
    ]
    assert [row.regret for row in rows] == [1.5, 1.0]
    assert [row.fastest for row in rows] == ["b", "a"]
    page = regret.page(rows)
    assert "mean 25.0 %, largest 50 %" in page
    assert "| `s0` | a | b | 50 % |" in page
    assert "| a | 2 | 1.73 | ×1.15 |" in page  # sqrt(1.5 * 2), and the spread around it


def test_a_model_that_there_is_not_is_a_usage_error(regret: ModuleType) -> None:
    with pytest.raises(SystemExit, match="2"):
        regret.main(["--models", "no_such_model"])
