"""Where a network's time goes, as tables and pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from network_models import model_of
from onnx import ModelProto, helper

from convgen.cli import main
from convgen.hardware.target import resolve
from convgen.lowering.candidates import parse_candidate, predicted
from convgen.network.network import compile_network
from convgen.report.figure import profiles
from convgen.report.model_page import model_page
from convgen.report.profile import NetworkProfile, StepTime, profile_network, profile_page

STEPS = (
    StepTime("first", "conv2d <1>", "cpu_direct", 3e-3, 6e-3, 2e-3),
    StepTime("a name that is far too long for a line of the figure, and then some", "relu", "", 1e-3, 1e-3),
)


def rects(svg: str, kind: str) -> list[dict[str, str]]:
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")
    return [dict(rect.attrib) for rect in found if rect.get("class") == kind and rect.get("width") != "10"]


def test_bars_are_as_long_as_steps_take() -> None:
    svg = profiles([NetworkProfile("net", 2, STEPS)])
    (own,), (between,), before = rects(svg, "p0"), rects(svg, "p1"), rects(svg, "before")
    assert float(own["width"]) == pytest.approx(3 * float(between["width"]), rel=1e-2)
    assert float(before[0]["width"]) == pytest.approx(2 * float(own["width"]), rel=1e-2)
    assert float(before[1]["width"]) == float(between["width"])
    texts = [text.text or "" for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "4.000 ms on 2 threads, 75% of it in convolutions; 7.000 ms with defaults, 1.75 times as much" in texts
    assert {"3000 µs", "75.0%", "first: conv2d <1>", "defaults"} <= set(texts)
    assert max(map(len, texts[4:])) < 60


def test_without_defaults() -> None:
    steps = tuple(StepTime(step.name, step.computes, step.schedule, step.seconds) for step in STEPS)
    svg = profiles([NetworkProfile("net", 1, steps), NetworkProfile("other", 1, ())])
    assert rects(svg, "before") == []
    assert "defaults" not in svg
    assert float(rects(svg, "p0")[0]["width"]) > 200


def test_the_table() -> None:
    page = profile_page([NetworkProfile("net", 1, STEPS)])
    assert "| first | conv2d \\<1> | cpu_direct | 3000 | 75.0% | 6000 | 2000 |" in page
    assert page.startswith("# net\n\n4.000 ms on 1 thread")


class Hosts(HTMLParser):
    """The texts of a page, the widths of its bars by their class, and what it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.widths: dict[str, list[float]] = defaultdict(list)
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.loaded += [given[name] or "" for name in ("src", "href") if name in given]
        if tag == "rect" and (given.get("width") or "").endswith("%"):
            self.widths[given.get("class") or ""].append(float((given["width"] or "").rstrip("%")))

    def handle_data(self, data: str) -> None:
        self.texts.append(" ".join(data.split()))


def test_the_page_of_a_model() -> None:
    page = Hosts(model_page([NetworkProfile("net", 2, STEPS)], "a processor"))
    assert page.loaded == ["data:,"]
    assert {"conv2d <1>", "3000 µs", "6000 µs, 2.00×", "75.0%", "a processor"} <= set(page.texts)
    assert page.widths["own"] == [pytest.approx(100 * 4 / 7, abs=0.01)]
    # All of the model, of each kind of steps, and each step before; the longest step is as wide as there is room.
    assert page.widths["track"] == pytest.approx([100, 600 / 7, 100 / 7, 100, 100 / 6], abs=0.01)
    assert page.widths["p0"] == pytest.approx([300 / 7, 50], abs=0.01)


def test_the_page_without_defaults() -> None:
    steps = tuple(StepTime(step.name, step.computes, step.schedule, step.seconds) for step in STEPS)
    page = Hosts(model_page([NetworkProfile("net N1", 1, steps), NetworkProfile("net N4", 1, steps)]))
    assert not page.widths["track"]
    assert {"net N1, 1 thread", "net N4, 1 thread"} <= set(page.texts)


def small() -> ModelProto:
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((8, 4, 3, 3)).astype("f4")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("MaxPool", ["c"], ["y"], kernel_shape=[2, 2], name="pool"),
    ]
    return model_of(nodes, {"x": (1, 4, 10, 10)}, ["y"], constants)


def test_a_network_beside_its_defaults() -> None:
    target = resolve("cpu").on(1)

    def reference(spec: Any) -> Any:
        return parse_candidate(spec, target, "reference")

    plain, changed = (compile_network(small(), target, 1, choose=choose) for choose in (None, reference))
    assert (plain.is_tuned, changed.is_tuned) == (False, True)
    profile = profile_network(changed, plain, turns=1, rounds=1)
    assert profile.steps[0].schedule == "reference"
    assert [step.name for step in profile.steps] == [layer["name"] for layer in plain.layers()]
    assert all(step.seconds > 0 and (step.before or 0) > 0 for step in profile.steps)
    assert [step.predicted is None for step in profile.steps] == [not step.schedule for step in profile.steps]
    assert profile.steps[0].predicted == predicted(plain.plan.graph.convolutions[0].spec, target)[0]
    assert profile.to_dict()["before"] == profile.before == sum(step.before or 0 for step in profile.steps)


def test_the_command_line_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.onnx").write_bytes(small().SerializeToString())
    picture = tmp_path / "profile.svg"
    command = [
        "compile",
        str(tmp_path / "small.onnx"),
        "--threads",
        "1",
        "--no-records",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--profile", str(picture), "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["profiles"]
    assert len(made["steps"]) == len(rects(picture.read_text(), "p0") + rects(picture.read_text(), "p1"))
    assert made["before"] is None
    assert main([*command, "--profile", "profile.png"]) == 2
