"""The backend of ``torch.compile``: ``torch.compile(model, backend="convgen")``."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
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
from ...network.apart import compiler
from ...network.choice import check_accuracy
from ...network.network import Network, compile_model
from .aten import PRODUCTS
from .outside import in_words, of_products
from .program import Divided, Program
from .steps import steps

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
        background: whether another process compiles; until it has, PyTorch runs the graph.
    """

    threads: int | None = None
    accuracy: str = "standard"
    background: bool = False

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> Options:
        """Raise SpecError where there is an option that is unknown, or of a wrong value."""
        known = tuple(cls.__dataclass_fields__)
        for name in given or {}:
            if name not in known:
                raise SpecError("options", f"one of {', '.join(known)}", f"{name!r}{meant(str(name), known)}")
        options = cls(**(given or {}))
        check_accuracy(options.accuracy, "options['accuracy']")
        check_threads(options.threads, resolve("cpu"))
        if not isinstance(options.background, bool):
            raise SpecError("options['background']", "True or False", repr(options.background))
        return options

    def compile(self, model: Any) -> Network:
        """An ONNX model, compiled."""
        return compile_model(model, "cpu", self.threads_now, accuracy=self.accuracy)

    @property
    def threads_now(self) -> int:
        return self.threads or torch.get_num_threads()


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


@dataclass(frozen=True)
class _Weights:
    """Weights as they were once."""

    tensors: list[Any]  # weak references: a program keeps no module alive
    versions: list[int]
    addresses: list[int]
    steps: list[int]
    total: int  # of all steps then: while it is the same, so are those of the weights

    @classmethod
    def of(cls, weights: list[Tensor]) -> _Weights:
        total, taken = steps.total, steps.of_all(weights)
        kept = [ref(weight) for weight in weights]
        return cls(kept, list(map(_version, weights)), list(map(_address, weights)), taken, total)

    def are(self, weights: list[Tensor]) -> bool:
        """Whether these are the same tensors."""
        return all(map(is_, [weight() for weight in self.tensors], weights))

    def fit(self, weights: list[Tensor]) -> bool:
        """Whether these are the same tensors, and nothing was written to them since, as far as PyTorch counts it, nor
        by an optimiser.
        """
        return (
            self.are(weights)
            and list(map(_version, weights)) == self.versions
            and list(map(_address, weights)) == self.addresses
            and (steps.total == self.total or steps.of_all(weights) == self.steps)
        )

    @property
    def are_alive(self) -> bool:
        return all(weight() is not None for weight in self.tensors)

    @property
    def identities(self) -> set[int]:
        return {id(weight()) for weight in self.tensors}


@dataclass(frozen=True)
class _Frozen:
    """A program, and the weights that it was compiled for."""

    weights: _Weights
    program: Program[Any]


@dataclass(frozen=True)
class _Pending:
    """A graph that another process compiles, and the weights that it does so for."""

    weights: _Weights
    divided: Divided
    made: Future[Any]


@dataclass
class FrozenGraph:
    """A traced graph that is compiled when it is called, for the weights it is called with.

    Called with other weights, or such as were changed since, it is compiled anew, :data:`LIMIT` times. What is not
    compiled is run by PyTorch: any more sets of weights; and in the background what is not yet, or cannot be.

    Args:
        traced: with all weights among its inputs.
        places: of inputs that are weights.
        options: how to compile.
    """

    traced: fx.GraphModule
    places: list[int]
    options: Options
    programs: list[_Frozen] = field(default_factory=list)
    pending: list[_Pending] = field(default_factory=list)
    count: int = 0
    said: bool = False
    failed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, *inputs: Any) -> Any:
        weights = [inputs[place] for place in self.places]
        for frozen in self.programs:
            if frozen.weights.fit(weights):
                return frozen.program(*inputs)
        program = self._background(weights) if self.options.background else self._compiled(weights)
        return program(*inputs) if program is not None else self.traced(*inputs)

    def _compiled(self, weights: list[Tensor]) -> Program[Any] | None:
        """The program for these weights; None where PyTorch shall run them."""
        if not self._is_taken(weights):
            return None
        divided = self._divided(weights)
        return self._keep(_Weights.of(weights), Program(divided, divided.compiled(self.options.compile)))

    def _background(self, weights: list[Tensor]) -> Program[Any] | None:
        """The program for these weights, once it is there: asks for it where that was not done; None until then.

        While weights go on to be changed, one program of theirs at most is being compiled.
        """
        with self.lock:
            for pending in self.pending:
                if not pending.weights.are(weights):
                    continue
                if not pending.made.done():
                    return None
                self.pending.remove(pending)
                if pending.weights.fit(weights) and (program := self._made(pending)) is not None:
                    return self._keep(pending.weights, program)
                break
            if self.failed or not self._is_taken(weights):
                return None
            threads, accuracy = self.options.threads_now, self.options.accuracy
            known, divided = _Weights.of(weights), self._divided(weights)
            models = list(divided.models())
            divided.forget()
            self.pending = [pending for pending in self.pending if pending.weights.are_alive]
            self.pending.append(_Pending(known, divided, compiler.submit(models, threads, accuracy)))
            return None

    def _made(self, pending: _Pending) -> Program[Any] | None:
        """What was compiled in the background; where that failed, a warning says so, and nothing more is tried."""
        try:
            return Program(pending.divided, pending.made.result())
        except CancelledError:  # this process was forked from the one that compiles
            return None
        except Exception as error:
            self.failed = True
            log.warning("a graph is left to PyTorch: it is not compiled: %s", error)
            return None

    def _is_taken(self, weights: list[Tensor]) -> bool:
        """Whether a program may be compiled for these weights."""
        if self.count >= LIMIT:
            return False
        if any(weight.is_inference() for weight in weights):
            if not self.said:
                self.said = True
                log.warning("a graph is left to PyTorch: of weights made in inference mode nothing tells what changes")
            return False
        return True

    def _divided(self, weights: list[Tensor]) -> Divided:
        placeholders = self.traced.graph.find_nodes(op="placeholder")
        parameters = {placeholders[place]: weight for place, weight in zip(self.places, weights, strict=True)}
        parameters |= {node: getattr(self.traced, node.target) for node in self.traced.graph.find_nodes(op="get_attr")}
        self.count += 1
        if self.count == LIMIT:
            log.warning("a graph was compiled for %d sets of weights: PyTorch runs it with any more", LIMIT)
        return Divided(self.traced, parameters, "network", views=True)

    def _keep(self, weights: _Weights, program: Program[Any]) -> Program[Any]:
        """In the place of what was compiled for the same tensors, as they were before."""
        refused = {} if program.networks else of_products(program.outside, PRODUCTS)
        if refused and not self.said:
            self.said = True
            log.warning("a graph is left to PyTorch: no network is made of it: %s", in_words(refused))
        self.programs = [
            frozen
            for frozen in self.programs
            if frozen.weights.are_alive and frozen.weights.identities != weights.identities
        ]
        self.programs.insert(0, _Frozen(weights, program))
        return program
