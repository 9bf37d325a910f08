"""Compiling in the background of ``torch.compile``: what is given before it is done, and after."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from paths import ROOT

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_modules import Halves  # noqa: E402

import convgen.torch  # noqa: E402
from convgen.bridges.torch import backend as module  # noqa: E402
from convgen.bridges.torch.program import Program  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"), pytest.mark.timeout(600)]
LOG = "convgen.bridges.torch"
#: Seconds after which something will never happen.
LONG = 300.0


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The programs that take PyTorch's place meanwhile."""
    found: list[Any] = []

    def program(*args: Any) -> Any:
        found.append(Program(*args))
        return found[-1]

    monkeypatch.setattr(module, "Program", program)
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield found
    convgen.torch.wait()
    torch._dynamo.reset()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend=module.backend, options={"background": True, "threads": 1})


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_pytorch_runs_the_graph_until_it_is_compiled(used: list[Any]) -> None:
    model, x = Halves().eval(), torch.randn(2, 4, 9, 9)
    fast, wanted = compiled(model), model(x)
    assert torch.equal(fast(x), wanted)
    assert not used
    assert convgen.torch.wait()
    for _ in range(2):
        close(fast(x), wanted)
    (program,) = used
    assert len(program.networks) == 2
    assert list(program.outside.values()) == ["aten.cumsum.default: no such operator is known here"]


def test_weights_that_change_meanwhile_are_compiled_for_anew(used: list[Any]) -> None:
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
    fast = compiled(layer)
    fast(x)
    for _ in range(3):
        layer.weight.mul_(2)
        close(fast(x), layer(x))
    convgen.torch.wait()
    close(fast(x), layer(x))
    assert not used
    convgen.torch.wait()
    close(fast(x), layer(x))
    assert len(used) == 1


def test_modules_that_share_their_code_keep_their_weights(used: list[Any]) -> None:
    layers, x = [nn.Conv2d(4, 4, 3) for _ in range(2)], torch.randn(1, 4, 6, 6)
    fast = [compiled(layer) for layer in layers]
    for _ in range(3):
        for layer, made in zip(layers, fast, strict=True):
            close(made(x), layer(x))
        convgen.torch.wait()
    assert len(used) == 2


def test_what_cannot_be_compiled_stays_pytorchs_which_is_said_once(
    used: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
    fast = compiled(layer)
    with caplog.at_level("WARNING", LOG):
        for _ in range(3):
            assert torch.equal(fast(x), layer(x))
            convgen.torch.wait()
    (said,) = [record.message for record in caplog.records if record.name == LOG]
    assert said.startswith("a graph is left to PyTorch: it is not compiled: BuildError: /nowhere/cc: ")
    assert not used


def test_a_process_that_is_killed_is_a_failure_and_the_next_one_is_another(
    used: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    layers, x = [nn.Conv2d(4, 4, k) for k in (3, 1)], torch.randn(1, 4, 6, 6)
    first, second = map(compiled, layers)
    first(x)
    give_up = time.monotonic() + LONG
    while not (found := [child for child in psutil.Process().children() if "convgen.processes" in child.cmdline()]):
        assert time.monotonic() < give_up
    found[0].kill()
    convgen.torch.wait()
    with caplog.at_level("WARNING", LOG):
        assert torch.equal(first(x), layers[0](x))
    assert "the process that compiles ended" in caplog.text
    for _ in range(2):
        close(second(x), layers[1](x))
        convgen.torch.wait()
    assert len(used) == 1


def test_the_interpreter_ends_while_a_compiler_runs(tmp_path: Path) -> None:
    """A C compiler that never ends: neither it nor a folder is left."""
    started, cc = tmp_path / "started", tmp_path / "cc"
    cc.write_text(f"#!/bin/sh\necho $$ > {started}.new\nmv {started}.new {started}\nexec sleep 3600\n")
    cc.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    program = f"""
import os, time, torch
from convgen.bridges.torch.backend import backend
layer, x = torch.nn.Conv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
with torch.no_grad():
    torch.compile(layer, backend=backend, options={{"background": True}})(x)
while not os.path.exists({str(started)!r}):
    time.sleep(0.05)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CC": str(cc), "TMPDIR": str(tmp_path / "tmp")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=LONG)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(started.read_text())).wait(LONG)
    assert not list((tmp_path / "tmp").glob("convgen-*/*/*.onnx"))


def test_a_forked_process_compiles_for_itself() -> None:
    """What its parent compiles does not come there."""
    program = """
import os, warnings, torch
import convgen.torch
from convgen.bridges.torch.backend import backend
warnings.simplefilter("ignore")
layer, x = torch.nn.Conv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
torch.set_num_threads(1)
with torch.no_grad():
    fast = torch.compile(layer, backend=backend, options={"background": True})
    fast(x)
    if child := os.fork():
        print(os.waitpid(child, 0)[1], convgen.torch.wait())
    else:
        before = convgen.torch.wait(0)
        fast(x)
        begun = not convgen.torch.wait(0)
        ended = convgen.torch.wait()
        right = torch.allclose(fast(x), layer(x), atol=1e-5)
        os._exit(0 if before and begun and ended and right else 1)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, timeout=LONG, capture_output=True
    )
    assert done.stdout.split() == [b"0", b"True"]
