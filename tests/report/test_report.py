"""Rows of a bench in files, tables and pictures."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from bench_rows import A, B, new, row
from paths import ROOT

from convgen.formats.sources import read_specs
from convgen.problem.spec import ConvSpec
from convgen.report.bench_page import page
from convgen.report.figure import summary as figure
from convgen.report.rows import RowFile
from convgen.report.scale import Scale
from convgen.report.tables import (
    CLASSES,
    Totals,
    class_of,
    classes,
    geometric_mean,
    layers,
    network,
    problems,
    summary,
)

# ---- files ------------------------------------------------------------------------------------


def test_rows_are_read_back(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "net.jsonl")
    for one in (row(A), row(B), row(A, 2), row(A, own=2e-3)):
        file.add(one)
        assert RowFile(file.path).rows == file.rows  # the moment it is known
    assert len(file.path.read_text().splitlines()) == 4
    again = RowFile(file.path)
    assert again.rows[A, 1].seconds == 2e-3
    file.add(row(B, 2))  # by another process
    again.compact([(B, 1), ("not measured", 1)])
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [(line["spec"], line["threads"]) for line in lines] == [(B, 1), (A, 1), (A, 2), (B, 2)]


def test_a_line_cut_off_costs_its_row_only(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "net.jsonl")
    file.add(row(A))
    file.add(row(B))
    file.path.write_text(file.path.read_text()[:-50])
    left = RowFile(file.path)
    assert list(left.rows) == [(A, 1)]
    left.add(row(A, 2))
    assert list(RowFile(file.path).rows) == [(A, 1), (A, 2)]


# ---- figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("descriptor", "expected"),
    [
        ("conv2d ic3 oc64 i224x224 k7x7 s2x2 p3x3", "stem"),
        ("conv1d ic1 oc512 i32000 k16 s8 p8", "stem"),
        ("conv3d ic3 oc64 i16x112x112 k3 p1", "stem"),
        ("conv2d ic16 oc96 i112x112 k1", "1×1, many pixels"),
        ("conv1d ic32 oc512 i16000 k1", "1×1, many pixels"),
        ("conv2d ic256 oc512 i56x56 k1", "1×1"),
        ("conv2d ic512 oc64 i13x13 k1", "1×1"),
        ("conv3d ic512 oc64 i4x4x4 k1", "1×1"),
        ("conv2d ic256 oc512 i56x56 k1 s2", "1×1 strided"),
        ("conv2d ic64 oc64 i28x28 k3 p1", "2-D, large plane"),
        ("conv2d ic64 oc64 i27x27 k3 p1", "2-D, small plane"),
        ("conv2d ic64 oc64 i56x56 k3 s2 p1", "2-D strided"),
        ("conv2d ic64 oc64 i56x56 k3 s1 p2 d2", "2-D dilated"),
        ("conv2d ic64 oc64 g32 i56x56 k3 s2 p1", "grouped"),
        ("conv2d ic64 oc64 g64 i56x56 k3 p1", "depthwise 2-D"),
        ("conv2d ic64 oc128 g64 i56x56 k3 s2 p1", "depthwise 2-D strided"),
        ("conv1d ic64 oc64 g64 i56 k3 s2", "depthwise 1-D"),
        ("conv3d ic64 oc64 g64 i5x6x7 k3 s2", "depthwise 3-D"),
        ("convtranspose2d ic512 oc256 i4x4 k4 s2 p1", "transposed"),
        ("convtranspose1d ic512 oc1 i4001 k16 s8 p8", "transposed"),
        ("conv1d ic512 oc512 i3000 k3 s2 p1", "1-D"),
        ("conv1d ic32 oc32 i16000 k2 p2_0 d2", "1-D dilated"),
        ("conv3d ic64 oc128 i16x56x56 k3 p1", "3-D"),
    ],
)
def test_classes_of_layers(descriptor: str, expected: str) -> None:
    assert class_of(ConvSpec.parse(descriptor)) == expected
    assert expected in CLASSES


def test_the_sample_has_all_classes_of_the_networks() -> None:
    folder = ROOT / "bench"
    sample = [(entry.spec, name) for entry in read_specs(folder / "sample.json") for name in entry.names]
    everything = {entry.spec for path in folder.glob("problems/*.json") for entry in read_specs(path)}
    assert len(sample) == len({spec for spec, _ in sample}) == 24
    assert {spec for spec, _ in sample} <= everything
    assert all(class_of(spec) == name for spec, name in sample)
    assert {name for _, name in sample} == {class_of(spec) for spec in everything}


def test_totals() -> None:
    rows = [row(A, default=2e-3, count=3), row(B, torch=None, ort=0.5e-3, interval=(0.4, 0.6))]
    found = Totals.of(rows)
    assert (found.layers, found.rated, found.faster, found.slower) == (2, 2, 1, 1)
    assert found.mean == pytest.approx(1.0)
    assert found.default_mean == pytest.approx(0.5**0.5)
    assert found.seconds == pytest.approx(4e-3)
    assert found.default_seconds == pytest.approx(7e-3)
    assert found.peers == {"onnxruntime": pytest.approx(6.5e-3), "torch": None}
    assert found.best_peers == pytest.approx(6.5e-3)
    assert geometric_mean([]) is None


def test_totals_without_a_peer() -> None:
    found = Totals.of([row(ort=None, torch=None)])
    assert (found.rated, found.mean, found.best_peers) == (0, None, None)
    assert found.sentences() == ["All layers with their counts: convgen 1.000 ms."]


def test_a_ratio_within_its_interval_is_neither() -> None:
    verdicts = [row(interval=interval).verdict for interval in ((0.9, 1.1), (1.01, 1.1), (0.8, 0.99))]
    assert verdicts == ["even", "faster", "slower"]


# ---- tables -----------------------------------------------------------------------------------


def test_layers_of_new_and_old_rows() -> None:
    rows = [new(default=2e-3), row(B, torch=None)]
    header, cells = layers(rows, lambda row: row.values["spec"])
    assert header[:5] == ["layer", "×>", "convgen>", "default>", "onnxruntime>"]
    assert cells[0] == [A, "1", "1000", "2000", "2000", "3000", "2.00 (1.80–2.10)", "231", "50% compute", "cpu_direct"]
    assert cells[1][5:] == ["–", "2.00 (1.80–2.10)", "103", "–", "cpu_direct"]
    assert "default>" not in layers(rows[1:], lambda row: "")[0]
    assert problems([*rows, row(A, torch=None)]) == ["torch: not installed (2 layers)"]


def test_classes_have_means_of_their_own() -> None:
    _, cells = classes([row(A), row(B), row(B, 2, own=0.5e-3)])
    assert cells == [
        ["1×1, many pixels", "2", "2.83", "2.83", "2", "0"],
        ["2-D, large plane", "1", "2.00", "2.00", "1", "0"],
        ["all", "3", "2.52", "2.52", "3", "0"],
    ]


def test_a_network_as_markdown() -> None:
    strict = f"{A} strict"
    rows = [new(), new(B, own=2e-4), row(A, 2), new(strict, own=1.5e-3, interval=(1.2, 1.4))]
    text = network("net", rows)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## 1 thread", "## 2 threads", "## 1 thread, strict"]
    assert f"| `{A}` | 1000 | 1500 | 1.50 | cpu_direct | cpu_direct |" in text
    assert "Above 100 %" in text  # the second row's limit is over its time
    assert "Above 100 %" not in network("net", rows[:1])
    assert "caches empty" in network("net", [row(mode="cold")])
    assert "kept to its vectors of 256 bits" in network("net", [row(target="cpu:haswell", restricted=256)])
    assert network("net", []).startswith("# net")


def test_a_summary_of_networks() -> None:
    networks = {
        "one": [new(count=2), row(A, 2), new(f"{A} strict")],
        "two": [row(A), row(B, own=4e-3, interval=(0.4, 0.6))],
        "two.cold": [row(A, mode="cold")],
    }
    text = summary(networks)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## 1 thread",
        "## 2 threads",
        "## 1 thread, strict",
        "## 1 thread, cold caches",
        "## Slower than the best peer beyond the interval",
    ]
    assert "| [one](one.md) | 1 | 2.00 | 2.00 | 1 | 0 | 2.000 | 2.000 | 4.000 | 6.000 | 4.000 |" in text
    assert "| 2-D, large plane | 1 | 2.00" in text  # the layer of both networks, once
    assert text.count(f"| `{B}` | two | 1 | 0.50 (0.40–0.60) |") == 1
    assert summary({}).endswith("None.\n")
    checks = {"sample.nhwc": [new(), new(B, own=4e-3, interval=(0.4, 0.6)), row(A, 2)]}
    text = summary({"one": [row(A)]}, checks)
    assert "| [sample.nhwc](sample.nhwc.md) | 1 | 2 | 1.00 | 1.00 | 0.50 (0.40–0.60) | 1 | 1 |" in text
    assert "| [sample.nhwc](sample.nhwc.md) | 2 | 1 | 2.00 |" in text
    assert f"| `{B}` | sample.nhwc | 1 | 0.50" in text


# ---- pictures ---------------------------------------------------------------------------------


class Balance(HTMLParser):
    """Elements that were opened and not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.marks = 0

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        self.marks += tag == "path"

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.marks += tag == "path"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_needs_nothing_else() -> None:
    rows = [new(), row(B, torch=None), row(A, 2, ort=30e-3, torch=40e-3), row(B, 2, ort=None, torch=None)]
    text = page("a <net>", [*rows, new(f"{A} strict")])
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert parser.marks == (2 + 3) + (2 + 2) + (2 + 2)  # per section the legend's, then the layers'
    assert "<script" not in text
    assert "http" not in text
    assert "src=" not in text
    assert "a &lt;net&gt;" in text
    assert "30×, 40×" in text  # beyond the axis


def test_scale() -> None:
    scale = Scale.of([1.1, 2.5])
    assert scale.ticks == (0.75, 1.0, 1.5, 2.0, 3.0)
    assert (scale.place(0.1), scale.place(0.75), scale.place(3.0), scale.place(99)) == (0, 0, 1, 1)
    assert 0 < scale.place(1.0) < scale.place(2.0) < 1
    assert Scale.of([]).ticks == (0.75, 1.0, 1.5)
    assert Scale.of([0.01, 100]).ticks == (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def test_a_figure_of_networks_is_one_drawing() -> None:
    networks = {"one": [row(A), row(A, 2)], "<two>": [row(A, torch=None)], "cold": [row(A, mode="cold")]}
    root = ElementTree.fromstring(figure(networks))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in ("one", "<two>", "cold")] == ["one", "<two>", "one"]
    paths = list(root.iter("{http://www.w3.org/2000/svg}path"))
    assert len(paths) == 2 + 2 + 1 + 2  # the legend's, then the networks'
    ElementTree.fromstring(figure({}))
