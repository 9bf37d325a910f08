"""Rows of whole models: what tells them apart, and how they are shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from answers import final
from tiny_network import chain_model

from convgen.cli import main
from convgen.hardware.target import resolve
from convgen.lowering.candidates import parse_candidate
from convgen.measure.network_model import NetworkModel
from convgen.network.network import plan_recorded
from convgen.network.plan import Product
from convgen.records.store import RecordStore
from convgen.report.whole import WholeRow, lines_of, model_digest, summary, whole_file, whole_page


def part(library: str, seconds: float | None, precision: str = "f32", problem: str = "") -> dict[str, Any]:
    return {"library": library, "precision": precision, "seconds": seconds, "problem": problem}


def row(**values: Any) -> WholeRow:
    parts = [
        part("convgen", 0.02),
        part("onnxruntime", 0.03),
        part("openvino", 0.01, "bf16"),
        part("ncnn", None, problem="absent"),
    ]
    fixed = {"model": "m", "digest": "d", "threads": 1, "parts": parts, "best": "onnxruntime"}
    return WholeRow({**fixed, "ratio": 1.5, "interval": [1.4, 1.6], "busy": 0.0, **values})


def test_a_line_for_each_library() -> None:
    assert lines_of(row()) == [
        ["convgen", "f32", "20.0", "", ""],
        ["onnxruntime", "f32", "30.0", "1.50 (1.40–1.60)", ""],
        ["openvino", "bf16", "10.0", "0.50", ""],
        ["ncnn", "f32", "–", "", "absent"],
    ]


def test_a_model_in_bf16_is_beside_the_fastest_in_any_precision() -> None:
    parts = [part("convgen", 0.008, "bf16"), part("openvino", 0.02), part("openvino", 0.012, "bf16")]
    made = row(parts=parts, best="openvino", accuracy="bf16")
    assert lines_of(made)[1:] == [
        ["openvino", "f32", "20.0", "2.50", ""],
        ["openvino", "bf16", "12.0", "1.50 (1.40–1.60)", ""],
    ]
    quantised = row(parts=[part("convgen", 0.004, "i8"), part("openvino", 0.006, "i8")], digest="q")
    page = whole_page([made, row(), quantised])
    assert page.index("## 1 thread\n") < page.index("## 1 thread, accuracy bf16\n")
    assert "## 1 thread, quantised models\n" in page
    assert "| m | 8.000 | – | 20.0 | – | – | 12.0 | 1.50 (1.40–1.60) |" in page


def test_the_page_says_how_the_models_are_in_the_mean() -> None:
    page = whole_page([row(), row(model="n", digest="e", ratio=6.0)])
    assert page.count("| m |") == page.count("| n |") == 1
    assert f"Geometric mean {math.sqrt(1.5 * 6):.2f} over 2 models, least 1.50." in page
    assert summary([row(ratio=None)]) == []


def test_models_are_told_apart_by_what_they_are(tmp_path: Path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    chain_model(first)
    second.write_bytes(first.read_bytes())
    assert model_digest(NetworkModel(first)) == model_digest(NetworkModel(second))
    assert model_digest(NetworkModel(first)) != model_digest(NetworkModel(second, {"N": 1}))
    chain_model(second, strange=True)
    assert model_digest(NetworkModel(first)) != model_digest(NetworkModel(second))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain_model(tmp_path / "tiny.onnx")
    kept, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    command = ["bench", "--whole", str(tmp_path / "tiny.onnx"), "--threads", "1", "--peers", "onnxruntime"]
    command += ["--no-records", "--rows", str(kept), "--repeats", "2"]
    assert main([*command, "--report", str(page)]) == 0
    told = capsys.readouterr()
    assert "tiny, 1 thread" in told.out
    assert [line.split()[0] for line in told.out.splitlines() if " f32 " in line] == ["convgen", "onnxruntime"]
    assert max(map(len, told.out.splitlines())) <= 80
    assert "| tiny |" in page.read_text()
    (written,) = whole_file(kept).rows.values()
    assert main(command) == 0  # nothing is measured again
    assert f"tiny, 1 thread; of {written.values['date']}, from {kept}\n" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"interrupted": False, "rows": [dict(written.values)], "kept": [True]}
    fields = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
    assert [name for name in document["rows"][0] if f"`{name}`" not in fields] == []
    assert len(kept.read_text().splitlines()) == 1


def test_what_other_kernels_compute_is_measured_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After tuning, that is: another store's records answer for a convolution."""
    chain_model(tmp_path / "tiny.onnx")
    rows, store = tmp_path / "rows.jsonl", tmp_path / "s.sqlite"
    plain = plan_recorded(tmp_path / "tiny.onnx", "cpu", 1, None, "standard", 0, False)
    spec = next(step.function.spec for step in plain[0].steps if isinstance(step.function, Product))
    other = parse_candidate(spec, resolve(), "reference")
    with RecordStore(store) as kept:
        kept.add_all([final(other, winner=True, spec=spec.descriptor, threads=1)])
    command = ["bench", "--whole", str(tmp_path / "tiny.onnx"), "--threads", "1", "--peers", "onnxruntime"]
    command += ["--rows", str(rows), "--repeats", "2", "--json"]
    found = []
    for records in (["--no-records"], ["--records", str(store)], ["--no-records"], ["--records", str(store)]):
        assert main([*command, *records]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [document["kept"] for document in found] == [[False], [False], [True], [True]]
    assert found[2:] == [{**document, "kept": [True]} for document in found[:2]]
    assert len(rows.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--whole", "conv2d", "ic4", "oc4", "i4x4", "k1"], "expected files of ONNX models, found 'conv2d'"),
        (["--whole", "MODEL", "--cold"], "expected neither --cold"),
        (["--whole", "MODEL", "--accuracy", "head.*=strict"], "expected an accuracy class for the whole model"),
        (["--whole", "MODEL", "--report", "page.html"], "FILE.md for --report"),
        (["--whole", "MODEL", "--peers", "tvm"], "expected some of onnxruntime"),
        (["MODEL", "--rows", "rows.jsonl"], "--rows needs --whole"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain_model(tmp_path / "tiny.onnx")
    given = [word.replace("MODEL", str(tmp_path / "tiny.onnx")) for word in arguments]
    assert main(["bench", *given]) == 2
    assert said in capsys.readouterr().err
