"""The backend of ``torch.compile``: ``torch.compile(model, backend="convgen")``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any
from weakref import ref

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

from ...errors import SpecError, meant
from ...hardware.target import check_threads, resolve
from ...network.choice import check_accuracy
from ...network.network import Network, compile_model
from .program import Program

log = logging.getLogger("convgen.bridges.torch")
#: How often one traced graph is compiled, for other weights; after that PyTorch runs it.
LIMIT = 32

_version, _address = attrgetter("_version"), Tensor.data_ptr


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options={...})`` may say.

    Attributes:
        threads: as many as PyTorch has when the graph is compiled, where None.
        accuracy: of convolutions: ``strict``, ``standard``, ``relaxed`` or ``bf16``.
    """

    threads: int | None = None
    accuracy: str = "standard"

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> Options:
        """Raise SpecError where there is an option that is unknown, or of a wrong value."""
        known = tuple(cls.__dataclass_fields__)
        for name in given or {}:
            if name not in known:
                raise SpecError(f"options[{name!r}]", f"one of {', '.join(known)}", f"another one{meant(name, known)}")
        options = cls(**(given or {}))
        check_accuracy(options.accuracy, "options['accuracy']")
        check_threads(options.threads, resolve("cpu"))
        return options

    def compile(self, model: Any) -> Network:
        """An ONNX model, compiled."""
        threads = self.threads or torch.get_num_threads()
        return compile_model(model, "cpu", threads, accuracy=self.accuracy)


def backend(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """What PyTorch calls with a graph that it has traced; ``options`` as :class:`Options` has them.

    A graph that gradients are wanted of is left to PyTorch.

    Raises:
        SpecError: an unknown option, or a wrong value; or a ``mode``, of which there are none but PyTorch's default.
    """
    if mode is not None:
        raise SpecError("mode", f"none: options has {', '.join(Options.__dataclass_fields__)}", repr(mode))
    chosen = Options.read(options)
    for given in inputs:  # one size of each axis is compiled for; PyTorch traces others anew
        sizes = given.shape if isinstance(given, Tensor) else [given] if isinstance(given, torch.SymInt) else []
        for size in sizes:
            int(size)
    if torch.is_grad_enabled() and any(isinstance(given, Tensor) and given.requires_grad for given in inputs):
        log.warning("a graph is left to PyTorch, which wants its gradients: call the model within torch.no_grad()")
        forward: Callable[..., Any] = graph.forward
        return forward

    def compiled(traced: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        context = TracingContext.try_get()
        metadata = context.fw_metadata if context else None
        places = sorted(metadata.static_input_indices or ()) if metadata else []
        made: Callable[..., Any] = make_boxed_func(FrozenGraph(traced, places, chosen))
        return made

    made: Callable[..., Any] = aot_autograd(fw_compiler=compiled, keep_inference_input_mutations=False)(graph, inputs)
    return made


@dataclass
class _Frozen:
    """A program, and the weights that it was compiled for as they were then."""

    program: Program
    weights: list[Any]  # weak references: a program keeps no module alive
    versions: list[int]
    addresses: list[int]

    def fits(self, weights: list[Tensor]) -> bool:
        """Whether these are the same tensors, and nothing was written to them since, as far as PyTorch counts it."""
        return (
            all(map(is_, [weight() for weight in self.weights], weights))
            and list(map(_version, weights)) == self.versions
            and list(map(_address, weights)) == self.addresses
        )

    @property
    def is_alive(self) -> bool:
        return all(weight() is not None for weight in self.weights)


@dataclass
class FrozenGraph:
    """A traced graph that is compiled when it is called, for the weights it is called with.

    Called with other weights, or such as were changed since, it is compiled anew, :data:`LIMIT` times.

    Args:
        traced: with all weights among its inputs.
        places: of inputs that are weights.
        options: how to compile.
    """

    traced: fx.GraphModule
    places: list[int]
    options: Options
    programs: list[_Frozen] = field(default_factory=list)
    count: int = 0
    said: bool = False

    def __call__(self, *inputs: Any) -> Any:
        weights = [inputs[place] for place in self.places]
        for frozen in self.programs:
            if frozen.fits(weights):
                return frozen.program(*inputs)
        if self.count >= LIMIT:
            return self.traced(*inputs)
        if any(weight.is_inference() for weight in weights):
            if not self.said:
                self.said = True
                log.warning("a graph is left to PyTorch: of weights made in inference mode nothing tells what changes")
            return self.traced(*inputs)
        return self._compile(weights).program(*inputs)

    def _compile(self, weights: list[Tensor]) -> _Frozen:
        placeholders = self.traced.graph.find_nodes(op="placeholder")
        parameters = {placeholders[place]: weight for place, weight in zip(self.places, weights, strict=True)}
        parameters |= {node: getattr(self.traced, node.target) for node in self.traced.graph.find_nodes(op="get_attr")}
        self.count += 1
        if self.count == LIMIT:
            log.warning("a graph was compiled for %d sets of weights: PyTorch runs it with any more", LIMIT)
        program = Program(self.traced, parameters, self.options.compile, "network", views=True)
        identity = [ref(weight) for weight in weights]
        frozen = _Frozen(program, identity, list(map(_version, weights)), list(map(_address, weights)))
        same = {id(weight) for weight in weights}
        self.programs = [
            kept for kept in self.programs if kept.is_alive and {id(weight()) for weight in kept.weights} != same
        ]
        self.programs.insert(0, frozen)
        return frozen
