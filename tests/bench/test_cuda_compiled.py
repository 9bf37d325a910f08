"""The committed table of what NVIDIA's compiler makes of the defaults: every layer is there, and none spills."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest
from bench_module import load_bench
from paths import ROOT

from convgen.formats.sources import read_specs
from convgen.problem.spec import ConvSpec

RESULTS = ROOT / "bench" / "results" / "cuda"
TARGETS = ("cuda:sm_80", "cuda:sm_90a", "cuda:sm_100")
#: How a layer is compiled in a mode.
MODES: dict[str, dict[str, Any]] = {
    "f16": {"dtype": "f16", "layout": "nhwc"},
    "f32": {},
    "i8": {"dtype": "i8", "layout": "nhwc", "accuracy": "standard"},
}
LAYERS = sorted(
    {entry.spec for file in (ROOT / "bench" / "problems").glob("*.json") for entry in read_specs(file)}, key=str
)


def in_mode(spec: ConvSpec, mode: str) -> ConvSpec | None:
    """The layer whose row there must be; None where there is to be none."""
    changes = dict(MODES[mode])
    if mode == "i8":
        if spec.transposed:  # integers are what ONNX's QLinearConv says, which has no transposed form
            return None
        # No schedule for GPUs adds a residual of integers, and integers have no activations but relu and clip.
        changes["residual"] = False
        if spec.activation != "relu":
            changes["activation"] = "none"
    return spec.with_(**changes)


def wanted(mode: str) -> set[str]:
    return {spec.descriptor for layer in LAYERS if (spec := in_mode(layer, mode)) is not None}


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], dict[str, Any]]:
    lines = (RESULTS / "compile.jsonl").read_text(encoding="utf-8").splitlines()
    return {(row["spec"], row["target"]): row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def compiler() -> ModuleType:
    return load_bench("cuda_compile")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", MODES)
def test_every_layer_of_the_problems_is_in_the_table(
    rows: dict[tuple[str, str], dict[str, Any]], mode: str, target: str
) -> None:
    have = {spec for spec, compiled_for in rows if compiled_for == target}
    assert len(wanted(mode)) > 100
    assert wanted(mode) <= have, f"missing: {sorted(wanted(mode) - have)[:5]}"


def test_no_row_has_an_error_or_a_spilled_byte(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert [key for key, row in rows.items() if row["error"]] == []
    assert [key for key, row in rows.items() if not row.get("functions")] == []
    assert [key for key, row in rows.items() if any(function["spilled"] for function in row.get("functions", []))] == []


def test_the_page_says_what_the_rows_say(rows: dict[tuple[str, str], dict[str, Any]], compiler: ModuleType) -> None:
    shown = [rows[spec, target] for target in TARGETS for mode in MODES for spec in sorted(wanted(mode))]
    expected = {line for line in compiler.compile_report(shown).splitlines() if line.startswith("|")}
    page = (RESULTS / "compile.md").read_text(encoding="utf-8")
    assert {line for line in page.splitlines() if line.startswith("|")} == expected
    assert "## Failures" not in page


def test_layers_of_integers_lack_what_these_do_not_have() -> None:
    """The reasons for what is left out are true."""
    layers = [layer for layer in LAYERS if layer.transposed]
    assert layers
    assert all(in_mode(layer, "i8") is None and in_mode(layer, "f16") is not None for layer in layers)
    assert {spec.count(" residual") for mode in ("f16", "f32") for spec in wanted(mode)} == {0, 1}
    assert not any("residual" in spec for spec in wanted("i8"))
