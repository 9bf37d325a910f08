"""The runner over whole networks, end to end on a tiny one; and the networks themselves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from bench_module import load_bench
from tiny_network import chain_model

from convgen.formats.onnx.reader import instances_from_onnx
from convgen.hardware.machine import machine
from convgen.report.networks import NetworkRow, networks_page, processor_slug


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return load_bench("network")


def test_a_model_end_to_end(runner: ModuleType, tmp_path: Path) -> None:
    chain_model(tmp_path / "tiny.onnx")
    fixed = ["--models", str(tmp_path / "tiny.onnx"), "--results", str(tmp_path), "--rounds", "2"]
    assert runner.main([*fixed, "--threads", "1", "--peers", "onnxruntime,torch"]) == 0
    folder = tmp_path / processor_slug(machine())
    (row,) = [json.loads(line) for line in (folder / "network.jsonl").read_text().splitlines()]
    assert (row["model"], row["threads"], row["accuracy"], row["kernels"]) == ("tiny", 1, "standard", "default")
    assert row["best"] == "onnxruntime"
    assert len(row["rounds"]) == 2
    assert [each["name"] for each in row["instances"]] == ["first", "second", "third", "fourth"]
    assert row["warm_seconds"] == pytest.approx(sum(each["warm_seconds"] for each in row["instances"]))
    assert row["flops"] == sum(layer.spec.flops for layer in instances_from_onnx(tmp_path / "tiny.onnx"))
    assert {"date", "cpu", "fingerprint", "python", "versions", "busy", "layers"} <= set(row)
    problems = {part["library"]: part["problem"] for part in row["parts"]}
    assert problems["onnxruntime"] == ""
    assert problems["torch"]  # there is no module, or no PyTorch
    page = (folder / "network.md").read_text()
    assert "`tiny`: torch" in page
    assert "## 1 thread, standard, default kernels" in page


def written(model: str = "net", seconds: float = 2e-3, **more: Any) -> NetworkRow:
    def part(library: str, what: str, seconds: float | None, precision: str = "f32", problem: str = "") -> Any:
        return {
            "library": library,
            "version": "1",
            "what": what,
            "precision": precision,
            "seconds": seconds,
            "problem": problem,
        }

    parts = [
        part("onnxruntime", "model", 5e-3),
        part("onnxruntime", "convolutions", 4e-3),
        part("openvino", "model", 3e-3, "bf16"),
        part("ncnn", "model", None, problem="failed"),
    ]
    facts = {"date": "2026-01-01", "cpu": "CPU", "fingerprint": "cpu-0", "versions": {"convgen": "0.1.0"}}
    values = {"model": model, "threads": 1, "accuracy": "standard", "kernels": "default", "seconds": seconds}
    values |= {"warm_seconds": 1e-3, "ratio": 4e-3 / seconds, "interval": [1.9, 2.1], "layers": "", "best": "x"}
    return NetworkRow(facts | values | {"parts": parts, "busy": 0.0} | more)


def test_what_is_known_is_not_measured_again(runner: ModuleType, tmp_path: Path) -> None:
    chain_model(tmp_path / "tiny.onnx")
    asked = []

    def measurer(name: str, _model: Any, layers: Any, _kernels: Any, _peers: Any, threads: int, **rest: Any) -> Any:
        asked.append((name, threads, rest["facts"]["accuracy"]))
        digest = runner.layers_digest(layers)
        return written(name, threads=threads, layers=digest, **rest["facts"])

    def run(*arguments: str) -> list[tuple[str, int, str]]:
        asked.clear()
        fixed = ["--models", str(tmp_path / "tiny.onnx"), "--results", str(tmp_path)]
        assert runner.main([*fixed, *arguments], measurer) == 0
        return list(asked)

    assert run("--threads", "1") == [("tiny", 1, "standard")]
    assert run("--threads", "1,2") == [("tiny", 2, "standard")]
    assert run("--threads", "1", "--accuracy", "strict") == [("tiny", 1, "strict")]
    assert run("--threads", "1,2") == []
    assert run("--threads", "1", "--fresh") == [("tiny", 1, "standard")]
    chain_model(tmp_path / "tiny.onnx", strange=False)
    assert run("--threads", "1") == []


def test_wrong_arguments(runner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--models", "nothing"], "--models: expected ONNX files or some of resnet18"),
        (["--peers", "nobody"], "--peers: expected some of onnxruntime"),
        (["--threads", "0"], "threads"),
        (["--dim", "N"], "--dim: expected NAME=SIZE, found 'N'"),
    ):
        with pytest.raises(SystemExit):
            runner.main(arguments)
        assert said in capsys.readouterr().err


def test_the_page() -> None:
    page = networks_page([written("a"), written("b|c", 1e-3, busy=0.4)])
    assert "| `a` | 2.000 | 1.000 | 4.000 | – | 2.00 | 1.90–2.10 |" in page
    assert "(busy)" in page
    assert "geometric mean of 2 ratios: **2.83**" in page
    assert "OpenVINO bf16" in page
    assert "- `a`: ncnn f32 model: failed" in page
    assert "at most 40% of the CPUs" in page


def test_every_network_is_a_module_or_a_light_model(runner: ModuleType) -> None:
    pytest.importorskip("torch")
    modules = load_bench("networks.modules").MODULES
    light = load_bench("networks.light").LIGHT
    assert (*modules, *light) == runner.NAMES


def test_a_network_is_quantised_as_users_do_it(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    made = load_bench("networks").network_model("squeezenet1_1_int8", tmp_path)
    assert made.precision == "i8"
    kinds = Counter(node.op_type for node in onnx.load(made.path).graph.node)
    assert kinds["Conv"] == 26
    assert kinds["DequantizeLinear"] > kinds["QuantizeLinear"] > 26


@pytest.mark.parametrize("name", ["shufflenet_v2", "vocoder", "light_squeezenet"])
def test_a_networks_numbers_are_of_ordinary_scale(runner: ModuleType, name: str, tmp_path: Path) -> None:
    if not name.startswith("light"):
        pytest.importorskip("torch")
    model = runner.network_model(name, tmp_path)
    (output,) = model.expected.values()
    assert 1e-6 < np.abs(output).max() < 1e3
    assert np.abs(output).min() > 0 or name == "vocoder"
    assert len(instances_from_onnx(model.path)) == {"shufflenet_v2": 56, "vocoder": 78, "light_squeezenet": 26}[name]
