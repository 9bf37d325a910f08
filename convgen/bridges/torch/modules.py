"""``torch.nn``'s convolutions, by convgen's kernels; and a model's own, put in their place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SpecError
from .functional import convolve

#: Seconds that a layer is timed for, each way.
TIMED = 0.2


class _Named:
    def _get_name(self) -> str:
        """What it is called where a model is printed."""
        return f"convgen.torch.{type(self).__name__}"


class _Convolution(_Named):
    """What a subclass of ``torch.nn``'s convolutions computes in another way."""

    weight: Tensor
    padding_mode: str

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        padding = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)  # noqa: A001
            padding = 0
        rank = weight.dim() - 2
        return convolve(rank, input, weight, bias, self.stride, padding, self.dilation, self.groups)


class _Transposed(_Named):
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        rank = self.weight.dim() - 2
        extra = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation
        )
        sizes = self.stride, self.padding, self.dilation, self.groups, extra
        return convolve(rank, input, self.weight, self.bias, *sizes)


class Conv1d(_Convolution, nn.Conv1d):  # type: ignore[misc]
    """``torch.nn.Conv1d``."""


class Conv2d(_Convolution, nn.Conv2d):  # type: ignore[misc]
    """``torch.nn.Conv2d``."""


class Conv3d(_Convolution, nn.Conv3d):  # type: ignore[misc]
    """``torch.nn.Conv3d``."""


class ConvTranspose1d(_Transposed, nn.ConvTranspose1d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose1d``."""


class ConvTranspose2d(_Transposed, nn.ConvTranspose2d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose2d``."""


class ConvTranspose3d(_Transposed, nn.ConvTranspose3d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose3d``."""


OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
}


def replace(model: nn.Module, *inputs: Any, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Put convgen's layers in the place of a model's convolutions; its parameters, hooks and state dict stay.

    Subclasses of ``torch.nn``'s layers are left as they are; so are those that
    ``torch.nn.utils.parametrizations`` has given another class, and lazy layers before their first call.

    Args:
        inputs: of the model. Where there are any, it is run once, and only layers are replaced whose step, forward and
            backward, was faster in turn with PyTorch's at the sizes that they met.
        progress: called with the number of layers that are settled, and of all; a layer's kernels are compiled before
            it is timed, which takes seconds.

    Returns:
        The names of the layers that were replaced.

    Raises:
        SpecError: the model is no module.
    """
    _check_module(model)
    layers = {name: module for name, module in model.named_modules() if type(module) in OURS}
    met = _met(model, layers, inputs) if inputs else dict.fromkeys(layers, ())
    replaced = []
    for done, (name, module) in enumerate(layers.items(), 1):
        theirs = type(module)
        if name in met:
            module.__class__ = OURS[theirs]
            if inputs and not _gains(module, theirs, met[name]):
                module.__class__ = theirs
            else:
                replaced.append(name)
        if progress is not None:
            progress(done, len(layers))
    return replaced


def restore(model: nn.Module) -> list[str]:
    """Put ``torch.nn``'s layers in the place of convgen's: what :func:`replace` did, undone, to export a model, say.

    Returns:
        The names of the layers that are PyTorch's again.

    Raises:
        SpecError: the model is no module.
    """
    _check_module(model)
    theirs = {ours: kind for kind, ours in OURS.items()}
    layers = {name: module for name, module in model.named_modules() if type(module) in theirs}
    for module in layers.values():
        module.__class__ = theirs[type(module)]
    return list(layers)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise SpecError("model", "a torch.nn.Module", type(model).__name__)


def _met(model: nn.Module, layers: dict[str, nn.Module], inputs: Any) -> dict[str, tuple[Any, ...]]:
    """What the layers of a model are called with, the first time."""
    met: dict[str, tuple[Any, ...]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
            met.setdefault(name, tuple(given))

        return keep

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()), _as_it_was(model):
            model(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return met


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Buffers, such as means over batches, are what they were when this ends, whatever ran."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in kept:
            module._buffers[name] = buffer.copy_(before)


def _gains(module: nn.Module, theirs: type[nn.Module], given: tuple[Any, ...]) -> bool:
    """Whether a step of our layer takes less time than one of PyTorch's: the shortest of each, in turn."""
    ours = type(module)
    images = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in given]
    parameters = [p for p in module.parameters() if p.requires_grad]

    def step() -> float:
        start = time.perf_counter()
        made = module.forward(*images)
        torch.autograd.grad(made.sum(), [*images, *parameters])
        return time.perf_counter() - start

    best = {ours: float("inf"), theirs: float("inf")}
    for kind in (ours, theirs):
        module.__class__ = kind
        step()  # builds kernels
    end = time.perf_counter() + 2 * TIMED
    while time.perf_counter() < end:
        for kind in (ours, theirs):
            module.__class__ = kind
            best[kind] = min(best[kind], step())
    module.__class__ = ours
    return best[ours] < best[theirs]
