"""``convgen records``: what it shows of stores, and what it does to them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from answers import OTHER, another, elsewhere, final, pretend, took
from commands import Run
from made_records import SPEC, TEXT, record
from stores import some

import convgen
from convgen.cli import main
from convgen.cli.common import chosen_records
from convgen.hardware.machine import machine
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.versions import versions
from convgen.problem.separable import SeparableSpec
from convgen.records import shipped as tuned
from convgen.records.answer import best_record
from convgen.records.outcome import Result
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore

OTHER_LAYER = "conv1d n1 ic4 oc4 i20 k3 s1 p1"


@pytest.fixture
def group() -> list[str]:
    return ["records"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs ``convgen records …`` here, where nothing ships; gives status, stdout and stderr."""
    (tmp_path / "tuned").mkdir()
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["records", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def filled(path: Path, *items: TuningRecord) -> Path:
    with RecordStore(path) as store:
        store.add_all(items)
    return path


def layer_file(folder: Path) -> Path:
    path = folder / "layers.txt"
    path.write_text(f"{TEXT}\n{OTHER_LAYER}\n")
    return path


# ---- looking ----------------------------------------------------------------------------------


def test_lists_are_filtered(tmp_path: Path, run_json: Callable[..., Any]) -> None:
    base = record(seconds=1.0)
    others = [record(threads=1), record(spec=OTHER_LAYER), record(outcome="memory", seconds=None), record(another())]
    store = ["--records", filled(tmp_path / "r.sqlite", base, *others, record(target="cpu:haswell"))]

    def listed(*arguments: object) -> int:
        return len(run_json("list", *arguments, *store))

    assert listed() == 6
    assert listed(*TEXT.split()) == listed("--spec", TEXT) == 5
    assert listed(OTHER_LAYER) == listed("--threads", 1) == listed("--outcome", "memory") == 1
    assert listed(layer_file(tmp_path)) == 6
    assert listed("--schedule", another().schedule.id) == 1
    assert listed("--target", "cpu") == listed("--target", resolve().spelling) == 5
    assert listed("--target", "cpu:haswell") == 1
    assert listed("--target", "cpu:native") == 5
    assert listed("conv1d ic1 oc1 i8 k1") == 0


def test_of_many_those_added_last_are_listed(
    tmp_path: Path, run: Run, run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the rest is told of, never dropped in silence; JSON has all unless it is told otherwise."""
    items = [record(seconds=1e-3 + i * 1e-6) for i in range(9)]
    store = ["--records", filled(tmp_path / "r.sqlite", *items, record(outcome="crash", seconds=None))]
    assert [found["id"] for found in run_json("list", "--outcome", "ok", *store)] == [item.id for item in items]
    assert [found["id"] for found in run_json("list", "--limit", 2, "--outcome", "ok", *store)] == [
        item.id for item in items[-2:]
    ]
    text = run("list", "--json", "--outcome", "ok", *store)[1]
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    assert run("list", "--json", "--outcome", "wrong", *store)[1] == "[]\n"
    monkeypatch.setattr(importlib.import_module("convgen.cli.records"), "SHOWN", 3)
    _, out, err = run("list", *store)
    assert [item.id[:12] in out for item in items] == [False] * 7 + [True] * 2
    assert "10 records in" in err
    assert "9 ok, 1 crash; 7 added before these are not shown (--limit N shows more)" in err
    assert "not shown" not in run("list", "--limit", 10, *store)[2]
    assert run("list", "--limit", 0, *store)[0] == 2


def test_a_record_is_shown_with_what_builds_it(
    tmp_path: Path, run: Run, run_json: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    item = final(another(), winner=True, samples=[1e-3, 2e-3])
    store = ["--records", filled(tmp_path / "r.sqlite", item, *some(40))]
    found = run_json("show", item.id[:12], *store)
    assert {name: found[name] for name in item.to_dict()} == item.to_dict()
    assert found["reason_against"] is None
    status, out, _ = run("show", item.id[:12].upper(), *store)
    assert status == 0
    shown = dict(line.split("  ", 1) for line in out.splitlines() if not line.startswith(" "))
    assert shown["record"].strip() == item.id
    assert shown["samples"].strip() == "1ms 2ms"
    assert f"convgen {versions()['convgen']}" in shown["versions"]
    assert shown["answers here"].strip().startswith("yes")
    assert found["command"] == shown["build it"].strip()

    program, *command = shlex.split(found["command"])
    assert program == "convgen"
    assert main([*command, "--no-records", "--no-validate", "--json", "--out", str(tmp_path / "out")]) == 0
    (built,) = json.loads(capsys.readouterr().out)["layers"]
    assert (built["schedule"], built["picks"], built["spec"]) == (item.schedule, dict(item.picks), item.spec)

    assert re.search("^answers here +no: ", run("show", some(1)[0].id, *store)[1], re.MULTILINE)
    for prefix, message in (("", "found several"), ("zz", "hexadecimal"), ("0" * 20, "found none")):
        status, _, err = run("show", prefix, *store)
        assert status == 3
        assert "id" in err
        assert message in err or prefix == ""
    shared = next(c for c in "0123456789abcdef" if sum(r.id[0] == c for r in some(40)) > 1)
    assert "expected it to begin one record's" in run("show", shared, *store)[2]


def test_the_best_are_those_that_answer(tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    winner, alike = final(another(), winner=True), final(another(), threads=1, hardware=elsewhere())
    old = final(another(), threads=3, versions=OTHER)
    store = ["--records", filled(tmp_path / "r.sqlite", winner, record(seconds=0.9e-3), alike, old, *some(3))]
    expected = sorted([winner.id, alike.id])
    assert sorted(r["id"] for r in run_json("best", *store)) == expected
    assert [r["id"] for r in run_json("best", "--threads", 2, *store)] == [winner.id]
    assert run_json("best", OTHER_LAYER, *store) == []
    status, out, err = run("best", TEXT, *store)
    assert (status, err) == (0, "")
    assert "from another machine, measured" in out
    assert run("best", "--threads", 7, *store)[2].startswith("no record for this machine")


def test_layers_that_cannot_be_read_are_named_and_have_no_records(
    tmp_path: Path, run: Run, run_json: Callable[..., Any]
) -> None:
    winner = final(another(), winner=True)
    store = ["--records", filled(tmp_path / "r.sqlite", winner)]
    (tmp_path / "net.txt").write_text(f"{winner.spec}\nconv1d ic4 oc4 i20 k99\n")
    for words in (["export", "--best"], ["export"], ["best"], ["list"], ["check"], ["prune"]):
        for options, expected in {(): 2, ("--skip",): 0}.items():
            status, out, err = run(*words, tmp_path / "net.txt", *options, *store)
            assert status == expected, err
            assert "net.txt: line 2: kernel[0]: expected" in err
            assert ("1 layer left out, as said above; with --skip" in err) == (expected == 2)
            assert out == winner.to_json() + "\n" or words[0] != "export"
    assert [r["id"] for r in run_json("best", tmp_path / "net.txt", *store, status=2)] == [winner.id]


def test_the_best_of_a_layer_may_be_shipped(tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    shipped = final(another(), threads=resolve().cores, winner=True)
    tuned.write(tuned.FOLDER / "x.jsonl", [shipped], tuned.Origin.of([shipped]))
    store = ["--records", filled(tmp_path / "r.sqlite", record(threads=1024))]
    assert shipped.id in [r["id"] for r in run_json("best", TEXT, *store)]
    assert "of those that ship with convgen" in run("best", TEXT, *store)[1]
    assert shipped.id not in [r["id"] for r in run_json("best", *store)]  # of all in the store


def test_two_stores_are_compared(tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    common, faster, slower = record(spec=OTHER_LAYER), record(seconds=1e-3), record(seconds=4e-3)
    a, b = (
        filled(tmp_path / "a.sqlite", common, slower),
        filled(tmp_path / "b.sqlite", common, faster, record(threads=1)),
    )
    found = run_json("diff", a, b)
    assert [r["id"] for r in found["only"]["a"]] == [slower.id]
    assert (len(found["only"]["b"]), found["common"]) == (2, 1)
    ratios = {(row["spec"], row["threads"]): row["ratio"] for row in found["problems"]}
    assert ratios == {(OTHER_LAYER, 2): 1.0, (TEXT, 2): 4.0, (TEXT, 1): None}
    assert len(run_json("diff", a, b, OTHER_LAYER)["problems"]) == 1
    status, out, err = run("diff", a, b)
    assert status == 0
    assert "4.000" in out
    assert "1 records only in" in err
    assert run("diff", a, tmp_path / "none.sqlite")[0] == 3
    assert not (tmp_path / "none.sqlite").exists()


# ---- upkeep -----------------------------------------------------------------------------------


def test_a_sample_is_measured_again(
    tmp_path: Path, run: Run, run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    default = default_candidate(SPEC, resolve().on(2))
    store = ["--records", filled(tmp_path / "r.sqlite", final(another(), winner=True), *some(3))]
    assert run_json("check", *store)["rows"] == 4
    calls = pretend(monkeypatch, {another(): took(1e-3), default: took(2e-3)})
    found = run_json("check", "--measure", 5, *store)
    (one,) = found["measured"]
    assert (one["outcome"], one["ratio_default"], one["record"]["spec"]) == ("ok", [2.0, 2.0, 2.0], TEXT)
    assert len(calls) == 1
    assert run_json("check", "--measure", 5, OTHER_LAYER, *store)["measured"] == []

    pretend(monkeypatch, {another(): took(2e-3), default: took(1e-3)})
    status, out, err = run("check", "--measure", 1, *store)
    assert status == 1
    assert "slower  0.500× the default" in err
    assert "0 right and no slower than the default" in out
    pretend(monkeypatch, {another(): Result("wrong", error="at 3"), default: took(1e-3)})
    (one,) = run_json("check", "--measure", 1, *store, status=1)["measured"]
    assert (one["outcome"], one["error"]) == ("wrong", "at 3")

    def failing(kernel: Any) -> Any:
        raise convgen.errors.ValidationError("planted")

    pretend(monkeypatch, {another(): took(1e-3), default: took(2e-3)})
    monkeypatch.setattr(importlib.import_module("convgen.tuning.recheck"), "validate", failing)
    (one,) = run_json("check", "--measure", 1, *store, status=1)["measured"]
    assert (one["outcome"], one["error"]) == ("wrong", "planted")


def test_what_can_go_is_told_and_then_goes(tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    trials = [record(another(), 1e-3 * i) for i in range(1, 6)]
    stays = [*trials[:2], final(winner=True), record(outcome="crash", seconds=None)]
    goes = [*trials[2:], final(winner=True, schedule_version=1000)]
    path = filled(tmp_path / "r.sqlite", *stays, *goes)
    arguments = ["prune", "--keep", 2, "--records", path]
    told = run_json(*arguments)
    assert (sum(told["reasons"].values()), told["removed"], told["records"]) == (4, 0, 8)
    assert "4 to drop (--yes does it), 4 stay" in run(*arguments)[1]
    assert run_json(*arguments, OTHER_LAYER, "--yes")["removed"] == 0
    with RecordStore(path) as store:
        assert set(store.trials()) == {*stays, *goes}
        before = best_record(store, SPEC, resolve(), 2)
    done = run_json(*arguments, "--yes")
    assert (done["removed"], done["records"]) == (4, 4)
    with RecordStore(path) as store:
        assert set(store.trials()) == set(stays)
        assert best_record(store, SPEC, resolve(), 2) == before
        assert store.check().ok
    assert run_json(*arguments, "--yes")["removed"] == 0
    assert run("prune", "--records", tmp_path / "none.sqlite")[0] == 3


def test_what_no_build_takes_any_more_goes_from_a_database(
    tmp_path: Path, run: Run, run_json: Callable[..., Any]
) -> None:
    stays = final(another(), winner=True, threads=1)
    gone = "conv2d n1 ic3 oc17 i6x7 k3x3 s1x1 p1x1 an_operator_of_another_version"
    goes = {
        "of another version of its schedule": final(winner=True, schedule_version=1000),
        "of picks that its schedule no longer admits": final(another(), winner=True, picks={"none": 1}),
        "of a layer or target that this version does not know": final(winner=True, spec=gone),
    }
    path = tmp_path / "x.jsonl"
    tuned.write(path, [stays, *goes.values()], tuned.Origin.of([stays, *goes.values()], ["net.json"], "a note"))
    before = path.read_bytes()
    told = run_json("prune", "--database", path)
    assert (told["reasons"], told["removed"], told["records"]) == (dict.fromkeys(sorted(goes), 1), 0, 4)
    assert "3 to drop (--yes does it), 1 stay" in run("prune", "--database", path)[1]
    assert path.read_bytes() == before
    done = run_json("prune", "--database", path, "--yes")
    assert (done["removed"], done["records"]) == (3, 1)
    ((origin, _),) = tuned.databases(tmp_path)
    assert tuned.records_of(path, origin.records) == {TEXT: [stays]}
    assert (origin.layers, origin.threads, origin.sources, origin.note) == (1, [1], ["net.json"], "a note")

    assert run_json("prune", "--database", path, "--yes")["removed"] == 0
    bad = [goes["of another version of its schedule"]]
    tuned.write(path, bad, tuned.Origin.of(bad))
    assert "expected a record that can still answer, found none" in run("prune", "--database", path, "--yes")[2]
    for beside in ([OTHER_LAYER], ["--records", path]):
        assert run("prune", "--database", path, *beside)[0] == 2


def test_what_the_default_beats_by_now_goes_from_a_database(
    tmp_path: Path, run: Run, run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stays, goes = tmp_path / "x.jsonl", final(winner=True, threads=1), final(another(), winner=True, threads=1)
    tuned.write(path, [stays, goes], tuned.Origin.of([stays, goes]))
    target = resolve().on(1)
    reference, default = parse_candidate(SPEC, target, "reference"), default_candidate(SPEC, target)
    pretend(monkeypatch, {reference: took(1e-3), default: took(2e-3), another(): took(3e-3)})
    assert run_json("prune", "--database", path, "--yes")["removed"] == 0
    done = run_json("prune", "--database", path, "--measure", "--yes")
    assert (done["reasons"], done["records"]) == ({"measured again: slower": 1}, 1)
    assert run("prune", "--measure")[0] == 2
    foreign = final(winner=True, hardware="another-machine-4")
    origin = dataclasses.replace(tuned.Origin.of([stays]), hardware="another-machine-4")
    tuned.write(path, [foreign], origin)
    assert "hardware: expected a machine as this" in run("prune", "--database", path, "--measure")[2]


# ---- travelling -------------------------------------------------------------------------------


def test_the_best_travel_in_a_file(tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    """``export --best LAYERS > FILE``, ``import FILE`` elsewhere, and builds are the same."""
    winner = final(another(), winner=True)
    here = filled(
        tmp_path / "r.sqlite", winner, *(record(seconds=s) for s in (0.8e-3, 0.9e-3)), final(spec=OTHER_LAYER)
    )
    status, out, err = run("export", "--best", TEXT, "--threads", 2, "--records", here)
    assert (status, err) == (0, "1 records\n")
    assert out == winner.to_json() + "\n"
    (tmp_path / "tuned.jsonl").write_text(out)
    there = tmp_path / "there.sqlite"
    assert run_json("import", tmp_path / "tuned.jsonl", "--records", there) == {"added": 1, "records": 1}
    kernels = [convgen.build(SPEC, threads=2, records=path) for path in (here, there)]
    assert kernels[0].picks == kernels[1].picks == another().picks
    assert kernels[0].source("tir") == kernels[1].source("tir")

    assert run("export", "--best", "-o", "-", "--records", here)[1].count("\n") == 2
    assert run("export", layer_file(tmp_path), "--records", here)[1].count("\n") == 4
    assert run_json("export", "-o", tmp_path / "all.jsonl", "--records", here)["exported"] == 4
    (tmp_path / "link").symlink_to("all.jsonl")
    assert run_json("export", "--best", "-o", tmp_path / "link", "--records", here)["exported"] == 2
    assert ((tmp_path / "link").is_symlink(), (tmp_path / "all.jsonl").read_text().count("\n")) == (True, 2)
    for extra in (["--json"], ["--note", "x"], ["--json", "-o", "-"]):
        assert run("export", *extra, "--records", here)[0] == 2


def test_one_command_makes_a_database_to_ship(tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    winner = final(another(), winner=True)
    here = filled(tmp_path / "r.sqlite", winner, record(), final(spec=OTHER_LAYER))
    path = tuned.FOLDER / "mine.jsonl"
    layers = layer_file(tmp_path)
    asked = ["--best", layers, "--threads", 2]
    made = run_json("export", *asked, "-o", path, "--note", "two layers", "--records", here)
    assert made["exported"] == 2
    ((origin, file),) = tuned.databases()
    assert (origin.hardware, origin.layers, origin.sources) == (machine().fingerprint, 2, ["layers.txt"])
    assert (origin.note, file) == ("two layers", path)
    kernel = convgen.build(SPEC, threads=2, records=tmp_path / "new.sqlite")
    assert (kernel.record, kernel.picks) == (winner, another().picks)
    status, _, err = run("export", OTHER_LAYER, "--threads", 9, "-o", path, "--note", "x", "--records", here)
    assert status == 3
    assert "expected at least one to ship" in err
    assert file.read_text().count("\n") == 2


@pytest.mark.parametrize("command", [["build", TEXT], ["compile", __file__, "--out", "out"], ["validate", TEXT]])
def test_what_reads_records_makes_no_store(command: list[str], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "typo.sqlite"
    assert main([*command, "--records", str(path)]) == 3
    assert capsys.readouterr().err == f"convgen: {path}: no such file\n"
    assert not path.exists()


def test_a_store_of_the_environment_that_cannot_be_made_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for name, said in (("file/x.sqlite", True), ("new/x.sqlite", False)):
        monkeypatch.setenv("CONVGEN_RECORDS", str(tmp_path / name))
        assert chosen_records(None, False) is None
        assert ("x.sqlite: cannot be made, so no records are used" in capsys.readouterr().err) == said
    assert chosen_records(None, True) is False
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ['"winner":', '"final":', '"llvm":', "the schedule's name"])
@pytest.mark.parametrize("command", [["records", "best"], ["build"], ["tune", "--trials", "1"]], ids=" ".join)
def test_a_damaged_record_is_not_passed_over(
    command: list[str], damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What answers is looked for by just what is damaged in it."""
    best = final(another(), 1e-3, True)
    path = filled(tmp_path / "a.sqlite", final(seconds=2e-3, winner=True), best)
    data = bytearray(path.read_bytes())
    word = (best.schedule if damage.startswith("the") else damage).encode()
    data[data.index(word) + 2] ^= 1  # the row added last comes first in a page
    path.write_bytes(data)
    assert main(["records", "check", "--records", str(path)]) == 3
    capsys.readouterr()
    assert main([*command, *TEXT.split(), "--threads", "2", "--records", str(path)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert str(path) in err
    if command[0] != "tune":  # which reads all, and stops at the first
        assert "1 damaged record among those that may answer, `convgen records check` lists all" in err
    else:
        assert "convgen records recover" in err


def test_a_damaged_trial_is_not_passed_over(tmp_path: Path, run: Run) -> None:
    """Nor one that no comparison has measured."""
    best = record(another(), 1e-4)
    path = filled(tmp_path / "a.sqlite", record(default_candidate(SPEC, resolve().on(2)), 2e-3), best)
    data = bytearray(path.read_bytes())
    data[data.index(best.schedule.encode())] ^= 1
    path.write_bytes(data)
    status, out, err = run("best", TEXT, "--threads", 2, "--records", path)
    assert (status, out) == (3, "")
    assert "1 damaged record" in err


def test_a_damaged_height_is_not_passed_over(tmp_path: Path, run: Run) -> None:
    text = "separable2d n1 ic8 oc16 i16x16 k3x3 s1x1 p1x1"
    spec = SeparableSpec.parse(text).descriptor
    note = {"final": True, "winner": True}
    fields: dict[str, Any] = {
        "spec": spec,
        "schedule": "strips",
        "schedule_version": 1,
        "picks": {"rows": 4},
        "note": note,
    }
    path = filled(tmp_path / "a.sqlite", record(**fields))
    assert "strips" in run("best", text, "--threads", 2, "--records", path)[1]
    data = bytearray(path.read_bytes())
    data[data.index(b"strips")] ^= 1
    path.write_bytes(data)
    assert run("best", text, "--threads", 2, "--records", path)[:2] == (3, "")


def test_of_a_damaged_store_no_half_of_a_document_is_printed(tmp_path: Path, run: Run) -> None:
    path = filled(tmp_path / "a.sqlite", *some(4))
    data = bytearray(path.read_bytes())
    data[data.rindex(b'"samples"') + 2] ^= 1  # a row that is listed after others, or before
    path.write_bytes(data)
    status, out, err = run("list", "--json", "--records", path)
    assert (status, out) == (3, "")
    assert str(path) in err
