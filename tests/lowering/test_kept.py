"""Values that processes share: found where all that they depend on is the same, and never otherwise."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from network_models import arrays_for, expected, furthest, model_of
from onnx import ModelProto, helper

from convgen.hardware.target import resolve
from convgen.lowering import kept as kept_module
from convgen.lowering.kept import VARIABLE, Kept, kept, key_of
from convgen.network import compile as compile_module
from convgen.network import layouts
from convgen.network.compile import RecentCode
from convgen.network.network import compile_network


def test_what_was_added_is_found_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "code.sqlite"
    Kept(path).add({b"a": b"1", b"b": bytes(3)})
    assert Kept(path).find([b"a", b"b", b"c"]) == {b"a": b"1", b"b": bytes(3)}
    Kept(path).add({b"a": b"2"})
    assert Kept(path).find([b"a"]) == {b"a": b"2"}


def test_every_field_counts_whatever_is_shown() -> None:
    @dataclass(frozen=True)
    class Part:
        name: str
        size: int

        def __repr__(self) -> str:
            return f"<{self.name}>"

    parts = [Part("a", 1), Part("a", 2), Part("b", 1), (Part("a", 1),), {"a": Part("a", 2)}, "a", b"a", 1, 1.0, None]
    assert len({key_of(part) for part in parts}) == len(parts)
    assert key_of(Part("a", 1)) == key_of(Part("a", 1))
    target = resolve("cpu:znver4")
    assert key_of(target) != key_of(replace(target, l2=target.l2 // 2))
    with pytest.raises(TypeError, match="expected text, numbers and what consists of them, found ndarray"):
        key_of(np.zeros(3))


def test_the_least_recently_used_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000_000.0]
    monkeypatch.setattr("convgen.lowering.kept.time.time", lambda: now[0])
    values = Kept(tmp_path / "code.sqlite", most=100)
    for name in (b"a", b"b", b"c"):
        now[0] += 10 * kept_module.USED_SECONDS
        values.add({name: bytes(30)})
    now[0] += 10 * kept_module.USED_SECONDS
    assert values.find([b"a"])
    values.add({b"d": bytes(15)})
    assert values.find([b"a", b"b", b"c", b"d"]).keys() == {b"a", b"d"}


def test_a_damaged_value_is_none(tmp_path: Path) -> None:
    path = tmp_path / "code.sqlite"
    Kept(path).add({b"a": b"right", b"b": b"right"})
    with sqlite3.connect(path) as db:
        db.execute("UPDATE kept SET value = ? WHERE key = ?", (b"wrong", b"a"))
    db.close()
    assert Kept(path).find([b"a", b"b"]) == {b"b": b"right"}


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "code.sqlite"
    path.write_bytes(b"no database" * 1000)
    values = Kept(path)
    assert values.find([b"a"]) == {}
    values.add({b"a": b"1"})
    assert values.find([b"a"]) == {b"a": b"1"}


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    values = Kept(tmp_path / "file" / "code.sqlite")
    values.add({b"a": b"1"})
    assert values.find([b"a"]) == {}


def test_an_empty_variable_means_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "")
    kept().add({b"a": b"1"})
    assert kept().find([b"a"]) == {}
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine.sqlite"))
    assert kept().path == tmp_path / "mine.sqlite"


def test_keys_differ_where_anything_does(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of("what", 1.5, ("a",))
    assert key == key_of("what", 1.5, ("a",))
    assert len({key, key_of("what", 1.5, ("b",)), key_of("other", 1.5, ("a",)), key_of("what", 1.25, ("a",))}) == 4
    monkeypatch.setattr(kept_module, "sources_digest", lambda: b"changed")
    assert key_of("what", 1.5, ("a",)) != key


def test_processes_write_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "code.sqlite"
    program = (
        "import sys; from pathlib import Path; from convgen.lowering.kept import Kept\n"
        "for i in range(30): Kept(Path(sys.argv[1])).add({f'{sys.argv[2]} {i}'.encode(): bytes(1000)})"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(path), name], env=os.environ) for name in "abc"]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(Kept(path).find([f"{name} {i}".encode() for name in "abc" for i in range(30)])) == 90


def small() -> ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["c"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    weights = arrays_for(model_of(nodes, {"w": (16, 3, 3, 3)}, ["y"]))
    return model_of(nodes, {"x": (1, 3, 12, 12)}, ["y"], weights)


def test_a_network_compiled_before_compiles_and_predicts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "code.sqlite"))
    model, target = small(), resolve("cpu").on(1)
    inputs = arrays_for(model)

    def forgotten() -> None:  # as in a process that has just started
        monkeypatch.setattr(compile_module, "recent_code", RecentCode(8))
        monkeypatch.setattr(layouts, "_known", {})

    forgotten()
    first = compile_network(model, target, 1)
    forgotten()

    def refused(*_: object) -> None:
        raise AssertionError("this was kept")

    monkeypatch.setattr(compile_module, "compile_one", refused)
    monkeypatch.setattr(layouts, "predicted", refused)
    again = compile_network(model, target, 1)
    assert again.built.objects == first.built.objects
    assert again.layers() == first.layers()
    assert furthest(again(inputs["x"]), expected(model, inputs)) < 2e-5


def test_a_process_that_finds_everything_loads_no_compiler(tmp_path: Path) -> None:
    onnx.save(small(), tmp_path / "small.onnx")
    program = (
        "import sys, numpy, convgen\n"
        "network = convgen.compile('small.onnx', threads=1, records=False)\n"
        "print(network(numpy.ones((1, 3, 12, 12), 'f4')).sum(), 'tvm' in sys.modules)"
    )
    environment = {**os.environ, VARIABLE: str(tmp_path / "code.sqlite")}
    command = [sys.executable, "-c", program]
    said = [subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).split() for _ in range(2)]
    assert said[0][0] == said[1][0]
    assert [loaded for _, loaded in said] == ["True", "False"]
