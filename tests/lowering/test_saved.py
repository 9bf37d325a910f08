"""Modules that are looked at and edited as text."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("tvm")

import tvm
from tvm import te

from convgen.errors import BuildError
from convgen.lowering.saved import Saved


def module() -> Any:
    """A module with a text in which a node seems to begin."""
    src = te.placeholder((4, 4), name='s{"type":"ir.Var","data":1}')
    dst = te.compute((4, 4), lambda i, j: src[i, j] + 1.0, name="dst")
    return tvm.IRModule({"main": te.create_prim_func([src, dst])})


def test_nodes_are_those_of_the_json_that_tvm_writes() -> None:
    nodes = json.loads(tvm.ir.save_json(module()))["nodes"]
    saved = Saved(module())
    assert [saved[number] for number in range(len(saved))] == nodes
    variables = [number for number, node in enumerate(nodes) if node["type"] == "ir.Var"]
    assert list(saved.of_type("ir.Var")) == variables
    assert variables


def test_a_module_that_is_not_edited_is_the_same() -> None:
    assert tvm.ir.save_json(Saved(module()).module()) == tvm.ir.save_json(module())


def test_an_edit_changes_one_node_alone() -> None:
    saved = Saved(module())
    number = next(n for n in saved.having('"data":"dst"'))
    saved[number] = {"type": "ffi.String", "data": "other"}
    assert saved[number] == {"type": "ffi.String", "data": "other"}
    text = str(saved.module().script())
    assert "other" in text
    assert "dst" not in text


def test_another_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm.ir, "save_json", lambda _: '{"root": 1}')
    with pytest.raises(BuildError, match="expected an array of nodes"):
        Saved(module())
