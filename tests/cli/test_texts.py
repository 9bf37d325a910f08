"""What tuning brought in words, and tables that fit."""

from __future__ import annotations

from typing import Any

import click
import pytest
from commands import SMALL, Run

from convgen.cli.tables import fitted, say_table, table
from convgen.cli.tuned import brought
from convgen.lowering.schedule import Picks
from convgen.report.words import picks_text


def layer(count: int, before: float | None, after: float | None, **changes: Any) -> dict[str, Any]:
    """A layer's result: ``before`` and ``after`` in µs, of a final comparison where there is a ``before``."""
    return {
        "models": ["net.onnx"],
        "target": "cpu:x",
        "threads": 1,
        "count": count,
        "compared": before is not None,
        "default_seconds": before and before * 1e-6,
        "best": after and {"seconds": after * 1e-6},
        **changes,
    }


def test_what_tuning_brought_counts_each_layer_as_often_as_it_occurs() -> None:
    (line,) = brought([layer(3, 200, 100), layer(1, 400, 300)])
    assert line == "net.onnx: 600 µs tuned, 1 ms with the defaults (1.67×): 2 layers, each as often as it occurs"


def test_times_of_the_search_are_not_added_to_those_of_comparisons() -> None:
    (line,) = brought([layer(1, 200, 100), layer(1, None, 50), layer(1, None, None)])
    assert line == (
        "net.onnx: 100 µs tuned, 200 µs with the defaults (2.00×): 1 layer, each as often as it occurs"
        "; 2 layers without a final comparison left out"
    )
    assert brought([layer(1, None, 50)]) == ["net.onnx: 1 layer without a final comparison"]


def test_settings_are_told_apart() -> None:
    lines = brought([layer(1, 200, 100), layer(1, 200, 50, threads=2, models=["a", "b"])])
    assert [line.partition(": ")[0] for line in lines] == [
        "net.onnx on cpu:x, 1 thread",
        "2 models on cpu:x, 2 threads",
    ]
    assert "(4.00×)" in lines[1]


def test_picks_are_shown_in_one_order() -> None:
    picks: dict[str, Any] = {"tile": 3, "block": 2, "order": "ic"}
    assert picks_text(picks) == str(Picks(**picks)) == "block=2 order=ic tile=3"
    assert str(Picks(**dict(reversed(picks.items())))) == str(Picks(**picks))


@pytest.mark.parametrize("columns", [40, 80, 130])
def test_tables_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    header = ["spec", *(f"number {i}>" for i in range(12)), "candidate"]
    rows = [["conv2d n1 ic8 oc16 i10x10 k3x3 s1x1 p1x1 relu", *range(12), "cpu_direct(tile_oc=32 tile_ow=14 block=28)"]]
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = table(header, rows)
    monkeypatch.setenv("COLUMNS", str(columns))  # as what reads a pipe may say
    fitting = table(header, rows)
    widest = max(map(len, fitting.splitlines()))
    assert widest <= columns
    assert widest > columns - len("  number 11")  # there is no room for one column more
    assert fitting.startswith("spec")
    assert "candidate" in fitting
    assert "number 11" in whole
    assert ("number 7" in fitting) == (columns == 130)


@pytest.mark.parametrize("columns", [40, 80, 130, None])
def test_what_is_cut_is_said_once(
    columns: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And how it is seen whole."""
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    spec = "conv2d n1 ic8 oc16 i10x10 k3x3 s1x1 p1x1 relu"
    narrow, wide = (
        table(["spec"], [["conv1d"]]),
        table(["spec", *(f"number {i}>" for i in range(9))], [[spec, *range(9)]]),
    )
    reasons = table(["spec", "because"], [["a", spec * 3]], prose="because")
    assert (narrow.is_cut, wide.is_cut, reasons.is_cut) == (False, columns is not None, False)
    with click.Context(click.Command("show")):
        for shown in (narrow, wide, wide):
            say_table(shown)
    out, err = capsys.readouterr()
    assert out == f"{narrow}\n{wide}\n{wide}\n"
    said = f"convgen: cut to {columns} columns; with COLUMNS=999 before the command it is whole\n"
    assert err == ("" if columns is None else said)
    monkeypatch.setenv("COLUMNS", "999")
    assert not table(["spec"], [[spec]]).is_cut


@pytest.mark.parametrize("columns", [60, 80])
def test_what_is_shown_of_a_layer_fits_the_terminal(columns: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is cut, and without a terminal nothing is wrapped."""
    spec = f"{SMALL} strict"
    monkeypatch.setattr("convgen.cli.show._roofline", lambda *_: None)
    whole = run("show", spec)[1]
    assert max(map(len, whole.splitlines())) > columns
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, _ = run("show", spec)
    assert status == 0
    assert max(map(len, out.splitlines())) <= columns
    assert out.split() == whole.split()


def test_reasons_are_wrapped_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to type next stands at their end."""
    monkeypatch.setenv("COLUMNS", "60")
    reason = "expected a known shape (--dim), found [N, 3, 32, 32]; such as --dim N=1"
    text = table(["not taken", "because"], [("input 'x'", reason), ("b", "short")], prose="because")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 60
    assert " ".join(" ".join(lines[2:-1]).split()) == f"input 'x' {reason}"
    assert lines[-1].split() == ["b", "short"]
    assert fitted(f"cpu: {reason}").splitlines()[1].startswith("  ")
    monkeypatch.delenv("COLUMNS")
    assert fitted(reason) == reason
