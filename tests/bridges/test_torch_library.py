"""Libraries of exported programs: their inputs and outputs are the module's, by name, in its order, with its axes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

import convgen  # noqa: E402
from convgen.errors import ConvgenError, KernelError, UnsupportedError  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"), pytest.mark.timeout(600)]


class Model(nn.Module):
    """A function of itself, an image, and a convolution of that."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Conv2d(3, 8, 3, padding=1), function
        self.anchors = nn.Buffer(torch.arange(6.0).view(2, 3))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x, self.layer(x))


def exported(module: nn.Module, inputs: tuple[Any, ...], where: Path) -> Any:
    program = convgen.compile(torch.export.export(module, inputs), threads=1, name="net")
    with torch.no_grad():
        torch.testing.assert_close(program(*inputs), module(*inputs), rtol=2e-5, atol=2e-5)
    program.export(where)
    return convgen.load(where)


def check(module: nn.Module, inputs: tuple[Tensor, ...], wanted: dict[str, Tensor], where: Path) -> None:
    """The library gives what is wanted, of square images too, whose axes shapes do not tell apart."""
    library = exported(module, inputs, where)
    assert [info.shape for info in library.inputs.values()] == [tuple(given.shape) for given in inputs]
    assert list(library.outputs) == list(wanted)
    found = library(*(given.contiguous() for given in inputs))
    found = found if isinstance(found, dict) else {next(iter(wanted)): found}
    for name, tensor in wanted.items():
        torch.testing.assert_close(torch.as_tensor(found[name]), tensor, rtol=2e-5, atol=2e-5, check_stride=False)


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda y: y.transpose(2, 3),
    "permute": lambda y: y.permute(0, 2, 3, 1),
    "flatten_1": lambda y: y.flatten(2).transpose(1, 2),
    "permute_1": lambda y: y.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", MOVED)
def test_an_output_whose_memory_has_another_order(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Model(lambda _, __, y: {"moved": MOVED[name](y)}).eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        check(module, (x,), module(x), tmp_path / "net")


def test_a_program_of_channels_last_has_the_modules_axes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)).eval()
    module, x = module.to(memory_format=torch.channels_last), torch.randn(2, 3, 9, 9)
    x = x.to(memory_format=torch.channels_last)
    library = exported(module, (x,), tmp_path / "net")
    assert list(library.inputs) == ["input"]
    with torch.no_grad():
        torch.testing.assert_close(library(x), module(x), rtol=2e-5, atol=2e-5, check_stride=False)


def test_all_that_is_returned_is_an_output(tmp_path: Path) -> None:
    """What is an input, a constant, or returned before, too; numbers, which are always the same, the manifest has."""

    def returned(module: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
        grid = torch.arange(4.0) * 2
        made = {"z": y, "again": y, "image": x, "anchors": module.anchors, "grid": grid, "x": y.mean((2, 3))}
        return {**made, "count": y.shape[1], "aux": None}

    torch.manual_seed(0)
    module, x = Model(returned).eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        wanted = module(x)
    named = {{"x": "x_out"}.get(name, name): tensor for name, tensor in wanted.items() if isinstance(tensor, Tensor)}
    check(module, (x,), named, tmp_path / "net")
    assert json.loads((tmp_path / "net/manifest.json").read_text())["values"] == {"count": 8, "aux": None}


def test_outputs_without_names_and_parts_of_one_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Model(lambda _, x, y: (y[:, 4:], y, y[:, :4], y, x)).eval(), torch.randn(1, 3, 8, 8)
    library = exported(module, (x,), tmp_path / "net")
    with torch.no_grad():
        wanted = module(x)
    assert len(library.outputs) == len(wanted)
    assert "x" not in library.outputs
    for found, tensor in zip(library(x).values(), wanted, strict=True):
        torch.testing.assert_close(found, tensor, rtol=2e-5, atol=2e-5, check_stride=False)


def test_inputs_are_in_the_modules_order_also_those_that_nothing_reads(tmp_path: Path) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, first: Tensor, unread: Tensor, last: Tensor) -> Tensor:
            made: Tensor = self.layer(last) + first
            return made

    torch.manual_seed(0)
    module, inputs = Several().eval(), (torch.randn(1, 4, 5, 5), torch.randn(2), torch.randn(1, 3, 5, 5))
    library = exported(module, inputs, tmp_path / "net")
    assert list(library.inputs) == ["first", "unread", "last"]
    with torch.no_grad():
        torch.testing.assert_close(library(*inputs), module(*inputs), rtol=2e-5, atol=2e-5)


def test_weights_of_the_library_are_those_of_the_export(tmp_path: Path) -> None:
    """Though it is compiled only when it is wanted."""
    module, x = Model(lambda _, __, y: y.transpose(2, 3)).eval(), torch.randn(1, 3, 8, 8)
    program = convgen.compile(torch.export.export(module, (x,)), threads=1, name="net")
    with torch.no_grad():
        wanted = module(x)
        module.layer.weight.zero_()
    program.export(tmp_path / "net")
    library = convgen.load(tmp_path / "net")
    (name,), found = library.outputs, library(x)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5, check_stride=False)
    for out in (torch.empty(found.shape), {name: torch.empty(found.shape)}):
        library(x, out=out)
        torch.testing.assert_close(out[name] if isinstance(out, dict) else out, found)
    with pytest.raises(KernelError, match="expected a NumPy array or one with __dlpack__, found list"):
        library(x, out=[1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.float64])
def test_an_output_of_a_type_that_libraries_do_not_have_is_named(dtype: Any, tmp_path: Path) -> None:
    module, x = Model(lambda m, _, y: {"y": y, "odd": m.anchors}).eval(), torch.randn(1, 3, 8, 8)
    module.anchors = module.anchors.to(dtype)
    with pytest.raises(ConvgenError, match=r"output 'odd': expected"):
        convgen.compile(torch.export.export(module, (x,)), threads=1).export(tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_a_program_without_networks_says_why() -> None:
    module = nn.Conv2d(3, 4, 1).bfloat16().eval()
    program = convgen.compile(torch.export.export(module, (torch.ones(1, 3, 4, 4).bfloat16(),)), threads=1)
    assert "torch.bfloat16; torch.float32 is supported" in repr(program)
    with pytest.raises(UnsupportedError, match=r"found 0 networks and 1 node outside: conv"):
        program.export("nowhere")
