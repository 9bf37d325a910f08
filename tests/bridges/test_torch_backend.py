"""``torch.compile(model, backend="convgen")`` and exported programs: what they give, and when they compile anew."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bench_module import load_bench
from onnx import numpy_helper
from paths import ROOT, SUPPORT

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812
from torch_modules import Halves  # noqa: E402

import convgen  # noqa: E402
from convgen.bridges.torch import backend as module  # noqa: E402
from convgen.bridges.torch.backend import FrozenGraph, backend  # noqa: E402
from convgen.bridges.torch.program import Program  # noqa: E402
from convgen.errors import KernelError, SpecError, UnsupportedError  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"), pytest.mark.timeout(600)]


class Block(nn.Module):
    """A residual block, and what classifies its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.last = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return F.relu(self.second(x) + x)

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        return {"scores": self.last(features.mean((2, 3))), "features": features, "pair": (x, 3)}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is compiled meanwhile, by PyTorch's compiler begun anew."""
    found: list[Any] = []

    def program(*args: Any, **options: Any) -> Any:
        found.append(Program(*args, **options))
        return found[-1]

    monkeypatch.setattr(module, "Program", program)
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield found
    torch._dynamo.reset()


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_a_module_in_both_memory_formats_and_of_another_batch(compiled: list[Any]) -> None:
    block = Block().eval()
    block.norm.running_mean.uniform_()
    fast = torch.compile(block, backend=backend)
    for x in (torch.randn(1, 8, 12, 10), torch.randn(1, 8, 12, 10).to(memory_format=torch.channels_last)):
        wanted, found = block(x), fast(x)
        close(found, wanted)
        assert found["pair"][0] is x
        assert found["features"].stride() == wanted["features"].stride()
    assert [program.outside for program in compiled] == [{}, {}]
    x = torch.randn(3, 8, 12, 10)
    close(fast(x), block(x))
    close(fast(x + 1), block(x + 1))
    assert len(compiled) == 3


def test_a_real_module_is_one_network(compiled: list[Any]) -> None:
    model, x = load_bench("networks.modules").module("squeezenet1_1", side=64), torch.randn(1, 3, 64, 64)
    wanted, found = model(x), torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=float(2e-5 * wanted.abs().max()))
    (program,) = compiled
    assert (len(program.networks), program.outside) == (1, {})
    assert sum("spec" in layer for layer in program.networks[0].layers()) == 26


def test_what_is_unknown_stays_with_pytorch_and_is_named(compiled: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    halves, x = Halves().eval(), torch.randn(2, 4, 9, 9)
    with caplog.at_level(logging.INFO, "convgen.bridges.torch"):
        close(torch.compile(halves, backend=backend)(x), halves(x))
    (program,) = compiled
    assert len(program.networks) == 2
    assert list(program.outside.values()) == ["aten.cumsum.default: no such operator is known here"]
    assert "cumsum" in caplog.text


def test_weights_that_change_are_taken_anew(compiled: list[Any]) -> None:
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
    fast = torch.compile(layer, backend=backend)
    for change in (
        lambda: None,
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict(nn.Conv2d(4, 4, 3).state_dict()),
    ):
        change()
        close(fast(x), layer(x))
        close(fast(x), layer(x))
    assert len(compiled) == 3


def test_modules_that_share_their_code_keep_their_weights(compiled: list[Any]) -> None:
    layers, x = [nn.Conv2d(4, 4, 3) for _ in range(2)], torch.randn(1, 4, 6, 6)
    fast = [torch.compile(layer, backend=backend) for layer in layers]
    for _ in range(2):
        for layer, made in zip(layers, fast, strict=True):
            close(made(x), layer(x))
    assert len(compiled) == 2


def test_more_weights_than_the_limit_are_left_to_pytorch(
    compiled: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LIMIT", 1)
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
    fast = torch.compile(layer, backend=backend)
    for _ in range(3):
        close(fast(x), layer(x))
        layer.weight.mul_(2)
    assert len(compiled) == 1
    assert "PyTorch runs it" in caplog.text


def test_weights_made_in_inference_mode_are_left_to_pytorch_which_is_said_once(
    compiled: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        layer = nn.Conv2d(3, 4, 3).eval()
        frozen = torch.compile(layer, backend=backend)
        with caplog.at_level("WARNING", "convgen.bridges.torch"):
            for _ in range(2):
                assert torch.equal(frozen(x), layer(x))
    assert [record.message for record in caplog.records if "inference mode" in record.message] == [
        "a graph is left to PyTorch: of weights made in inference mode nothing tells what changes"
    ]
    assert not compiled


def test_gradients_are_pytorchs(compiled: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
    fast = torch.compile(layer, backend=backend)
    with torch.enable_grad():
        fast(x).sum().backward()
        found, layer.weight.grad = layer.weight.grad, None
        layer(x).sum().backward()
        close(found, layer.weight.grad)
    assert not compiled
    assert "torch.no_grad()" in caplog.text
    close(fast(x), layer(x))
    assert len(compiled) == 1


def test_what_is_written_to_inputs_is_written(compiled: list[Any]) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, total: Tensor) -> Tensor:
            made: Tensor = self.layer(x)
            total += made
            return made[:, ::2]

    writes, x, totals = Writes(), torch.randn(1, 4, 6, 6), [torch.ones(1, 4, 6, 6) for _ in range(2)]
    close(torch.compile(writes, backend=backend)(x, totals[0]), writes(x, totals[1]))
    close(totals[0], totals[1])


class Views(nn.Module):
    """A tensor, views of it, one of them read on; halves of another tensor alone; an input's view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        left, right = self.second(x).split(3, 1)
        return y, y[0], y.view(-1), self.second(y.transpose(2, 3)), left, right, x[:1]


def test_outputs_that_are_views_of_each_other_share_their_memory(compiled: list[Any]) -> None:
    model, x = Views(), torch.randn(2, 4, 6, 5)
    wanted = model(x)
    found = torch.compile(model, backend=backend)(x)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for made in (found, wanted):
        made[0].add_(1)
        made[4].add_(1)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert [f.untyped_storage().data_ptr() == found[4].untyped_storage().data_ptr() for f in found[4:6]] == [True] * 2
    assert found[6].data_ptr() == x.data_ptr()


def test_tensors_whose_memory_has_the_opposite_sign(compiled: list[Any], tmp_path: Path) -> None:
    """As inputs, as weights, and as what a library of the exported program is given."""
    layer, x = nn.Conv2d(4, 4, 3), torch._neg_view(torch.randn(1, 4, 6, 6))
    layer.weight = nn.Parameter(torch._neg_view(torch.randn(4, 4, 3, 3)), requires_grad=False)
    close(torch.compile(layer, backend=backend)(x), layer(x))
    assert compiled[0].outside == {}
    program = convgen.compile(torch.export.export(layer, (x.resolve_neg(),)), threads=1, name="turned")
    close(program(x), layer(x))
    program.export(tmp_path / "out")
    close(convgen.load(tmp_path / "out")(x), layer(x))


def test_options(compiled: list[Any]) -> None:
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
    close(torch.compile(layer, backend=backend, options={"threads": 2, "accuracy": "strict"})(x), layer(x))
    (network,) = compiled[0].networks
    assert network.threads == 2
    assert "strict" in str(network.layers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": 2}, "options: expected one of threads, accuracy, background, found 'thread'; did you mean threads"),
        ({"threads": 0}, "threads: expected"),
        ({"accuracy": "best"}, r"options\['accuracy'\]: expected one of strict, standard"),
        ({"background": 1}, r"options\['background'\]: expected True or False, found 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        backend(torch.fx.symbolic_trace(nn.ReLU()), [], options=options)


def test_a_mode_is_refused(compiled: list[Any]) -> None:
    """As PyTorch hands it to backends."""
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
    call = torch._TorchCompileWrapper(backend, "max-autotune", None, False)
    message = "mode: expected none: options has threads, accuracy, background, found 'max-autotune'"
    with pytest.raises(SpecError, match=message):
        call(torch.fx.symbolic_trace(layer), [x])
    close(torch.compile(layer, backend=backend, mode="default")(x), layer(x))


# ---- exported programs -------------------------------------------------------------------------


def test_an_exported_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(1, 8, 12, 10)
    program = convgen.compile(torch.export.export(block, (x,)), threads=1, name="block")
    with torch.no_grad():
        wanted = block(x)
    found = program(x)
    close(found, wanted)
    assert set(found) == set(wanted)
    manifest = program.export(tmp_path / "out")
    assert manifest["name"] == "block"
    (name,) = convgen.load(tmp_path / "out").inputs
    made = convgen.load(tmp_path / "out")(**{name: x})
    assert all(isinstance(tensor, Tensor) for tensor in made.values())
    close(found["features"], made["features"])
    close(found["scores"], made["scores"])
    for given, message in ((torch.randn(2, 8, 12, 10), "expected .1, 8, 12, 10."), (x.double(), "float64"), (3, "int")):
        with pytest.raises(KernelError, match=message):
            program(given)
    for hand_on in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(UnsupportedError, match=r"expected export\(\) to hand it on"):
            hand_on(program)
    with pytest.raises(KernelError, match=r"^arguments: expected 1 input, found 2 inputs$"):
        program(x, x)
    with pytest.raises(KernelError, match=r"^arguments: expected 1 input, found y by name$"):
        program(y=x)
    with pytest.raises(KernelError, match=r"^arguments: expected 1 input, found 1 input with 2 values in them$"):
        program([x, x])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"accuracy": "fast"}, SpecError, "accuracy: expected one of strict, .*'fast'"),
        ({"accuracy": "0.*=strict"}, SpecError, "accuracy: expected one of strict"),
        ({"target": "nonsense"}, UnsupportedError, "nonsense"),
        ({"threads": 0}, SpecError, "threads: expected"),
        ({"threads": 1.5}, SpecError, "threads: expected"),
        ({"threads": 10**6}, SpecError, "threads: expected"),
        ({"strips": "x"}, SpecError, "strips: expected an integer >= 0, or None, found 'x'"),
        ({"strips": -1}, SpecError, "strips: expected"),
    ],
)
def test_a_wrong_argument_is_no_reason_to_leave_nodes_to_pytorch(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    """An exported program's and a model's errors are the same."""
    exported = torch.export.export(nn.Conv2d(4, 4, 1).eval(), (torch.randn(1, 4, 6, 6),))
    graph = onnx.parser.parse_graph(
        "g (float[1, 4, 6, 6] x, float[4, 4, 1, 1] w) => (float[1, 4, 6, 6] y) { y = Conv(x, w) }"
    )
    graph.initializer.append(numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "w"))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    said = []
    for source in (exported, model):
        with pytest.raises(error, match=message) as raised:
            convgen.compile(source, **wrong)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_programs_are_for_cpus() -> None:
    """Models are compiled for a GPU to a library; parts of a program between PyTorch's would wait for these."""
    exported = torch.export.export(nn.Conv2d(4, 4, 1).eval(), (torch.randn(1, 4, 6, 6),))
    with pytest.raises(UnsupportedError, match="expected a CPU"):
        convgen.compile(exported, target="cuda:sm_90a")


class Heads(nn.Module):
    """Returns by name: one tensor twice, lists, and names that inner nodes, an input and operators of Python have."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        body = torch.relu(self.body(x))
        scores = self.head(body)
        named = {
            "class scores": scores,
            "x": scores.sigmoid(),
            "conv2d": body,
            "pyramid": [body + 1, {"2nd": body * 2}],
        }
        return {**named, "again": scores}


def test_what_is_returned_by_name_is_called_so(tmp_path: Path) -> None:
    module, x = Heads().eval(), torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        right = module(x)
    program = convgen.compile(torch.export.export(module, (x,)), threads=1, name="heads")
    assert not program.outside
    found = program(x)
    assert found.keys() == right.keys()
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    flat = {
        "class_scores": right["class scores"],
        "x_out": right["x"],
        "conv2d": right["conv2d"],
        "pyramid_0": right["pyramid"][0],
        "pyramid_1_2nd": right["pyramid"][1]["2nd"],
        "again": right["again"],
    }
    program.export(tmp_path / "heads")
    loaded = convgen.load(tmp_path / "heads")
    assert list(loaded.outputs) == list(flat)
    assert set(loaded.inputs) == {"x"}
    for name, array in loaded(x.numpy()).items():
        torch.testing.assert_close(torch.from_numpy(array), flat[name], rtol=1e-4, atol=1e-5)


def test_a_program_that_is_partly_pytorchs_has_no_library(tmp_path: Path) -> None:
    halves, x = Halves().eval(), torch.randn(2, 4, 9, 9)
    program = convgen.compile(torch.export.export(halves, (x,)), threads=1)
    assert list(program.outside) == ["cumsum"]
    message = r"found 2 networks and 1 node outside: cumsum: aten\.cumsum\.default: no such operator"
    assert repr(program).endswith("; 1 node left to PyTorch>")
    with pytest.raises(UnsupportedError, match=message):
        program.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_program_of_open_sizes_is_refused() -> None:
    dims = {"x": {0: torch.export.Dim("n", min=2, max=8)}}

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.layer(x)
            return made

    exported = torch.export.export(Layer(), (torch.randn(2, 4, 6, 6),), dynamic_shapes=dims)
    with pytest.raises(SpecError, match=r"exported for known sizes, found the size s\d+; as ONNX, .* dims"):
        convgen.compile(exported)


# ---- where it is found -------------------------------------------------------------------------


def run(program: str, *paths: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_pytorch_finds_the_backend_by_its_name(tmp_path: Path) -> None:
    """Through the entry point that an installation has."""
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torch_dynamo_backends"]
    made = tmp_path / "convgen-9.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: convgen\nVersion: 9\n")
    lines = "".join(f"{name} = {place}\n" for name, place in group.items())
    (made / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{lines}")
    program = (
        "import torch._dynamo as d; print(d.list_backends().count('convgen'), d.lookup_backend('convgen').__module__)"
    )
    assert run(program, tmp_path) == "1 convgen.bridges.torch.backend"


def test_convgen_does_not_import_pytorch() -> None:
    assert run("import sys, convgen.api, convgen.network.library; print('torch' in sys.modules)") == "False"
    run("import convgen.network.network", SUPPORT / "without_torch")


def test_a_graph_is_compiled_for_weights_as_they_were() -> None:
    """What is asked of weights before each call sees every way in which PyTorch counts changes."""
    layer = nn.Conv2d(2, 2, 1).eval()
    x = torch.randn(1, 2, 3, 3)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda w, b, x: torch.conv2d(x, w, b), tracing_mode="fake")(
        layer.weight, layer.bias, x
    )
    graph = FrozenGraph(traced, [0, 1], module.Options(threads=1))
    with torch.no_grad():
        close(graph(layer.weight, layer.bias, x), layer(x))
        layer.weight.data = torch.randn(2, 2, 1, 1)
        close(graph(layer.weight, layer.bias, x), layer(x))
        close(graph(layer.weight, torch.zeros(2), x), layer(x) - layer.bias.view(2, 1, 1))
        assert graph.count == 3


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_a_warning_says_why_a_graph_with_convolutions_has_no_network(
    how: str, compiled: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    layer, x = nn.Conv2d(4, 4, 3).eval(), torch.randn(1, 4, 6, 6)
    if how == "bfloat16":
        layer, x = layer.bfloat16(), x.bfloat16()
    fast = torch.compile(layer, backend=backend)
    with caplog.at_level("WARNING", "convgen.bridges.torch"), torch.autocast("cpu", enabled=how == "autocast"):
        for _ in range(2):
            torch.testing.assert_close(fast(x), layer(x))
    (record,) = caplog.records
    assert "no network is made of it: convolution: " in record.getMessage()
    assert "is of torch.bfloat16; torch.float32 is supported" in record.getMessage()


def test_what_stays_outside_is_said_once_for_each_cause(compiled: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    class Enlarged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(self.layer(x), scale_factor=2, mode="bicubic")

    model, x = Enlarged().eval(), torch.randn(1, 3, 8, 8)
    with caplog.at_level("INFO", "convgen.bridges.torch"):
        close(torch.compile(model, backend=backend)(x), model(x))
    (program,) = compiled
    said = [record.getMessage() for record in caplog.records if "left to PyTorch" in record.getMessage()]
    assert 0 < len(said) <= len(program.outside) // 2
    assert any(" more: " in line for line in said)
