"""Programs that ``torch.export`` has made: ``convgen.compile(torch.export.export(model, (x,)))``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import (
    GetAttrKey,
    MappingKey,
    TreeSpec,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

from ...errors import KernelError, SpecError, UnsupportedError
from ...network.network import Network
from .aten import PRODUCTS, is_read
from .onnx_graph import Known, value
from .outside import in_words, of_products
from .program import Compile, Divided, Program
from .whole import Ends, is_whole, whole_model

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class TorchProgram:
    """An exported program, compiled with its weights as they were: called as the module was, it gives what that gave.

    Attributes:
        networks: what convgen computes, in order.
        outside: nodes that PyTorch computes, by name, and why.
    """

    def __init__(self, program: ExportedProgram, compiled: Compile, name: str) -> None:
        with warnings.catch_warnings():  # PyTorch warns of itself, when it copies a program
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            program = program.run_decompositions(_composites())
        _drop_checks(program.graph_module)
        signature = program.graph_signature
        changed = [spec.target for spec in signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
        if changed:
            raise UnsupportedError(
                f"expected a program that changes nothing, found that it writes {changed}; call eval()"
            )
        placeholders = program.graph.find_nodes(op="placeholder")
        kinds = list(zip(placeholders, signature.input_specs, strict=True))
        self._given = [node for node, spec in kinds if spec.kind is InputKind.USER_INPUT]
        odd = sorted({spec.kind.name for _, spec in kinds} - {kind.name for kind in (*_WEIGHTS, InputKind.USER_INPUT)})
        if odd:
            raise UnsupportedError(f"expected parameters, buffers and inputs, found {', '.join(odd)}")
        _check_sizes(self._given)
        values = {**program.constants, **program.state_dict}
        weights = {node: values[str(spec.target)] for node, spec in kinds if spec.kind in _WEIGHTS}
        self._tree = program.call_spec
        called = _name_outputs(program.graph, self._tree.out_spec)
        divided = Divided(program.graph_module, {**weights, **_attributes(program.graph_module)}, name)
        self._program = Program(divided, divided.compiled(compiled))
        self.networks, self.outside = self._program.networks, self._program.outside
        self._make_library = self._library_of(divided, compiled, called)
        reads = set(self._program.reads)
        self._weights = [weights.get(node) if place in reads else None for place, node in enumerate(placeholders)]
        self._places = [placeholders.index(node) for node in self._given]

    def __repr__(self) -> str:
        names = ", ".join(network.name for network in self.networks)
        networks = f"network{'s' * (len(self.networks) != 1)} {names}" if names else "no network"
        why = "" if names else f": {in_words(of_products(self.outside, PRODUCTS) or self.outside)}"
        return f"<TorchProgram: {networks}; {_counted(len(self.outside), 'node')} left to PyTorch{why}>"

    def __reduce__(self) -> Any:
        raise UnsupportedError("a compiled program: expected export() to hand it on, found a copy or a pickle of it")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives.

        Raises:
            KernelError: an argument is not shaped as when the module was exported, or the arguments are others.
        """
        given, tree = tree_flatten((args, kwargs))
        if tree != self._tree.in_spec:
            raise KernelError(f"arguments: expected {_described(self._tree.in_spec)}, found {_described(tree)}")
        for node, tensor in zip(self._given, given, strict=True):
            _check_input(node, tensor)
        inputs = list(self._weights)
        for place, tensor in zip(self._places, given, strict=True):
            inputs[place] = tensor
        with torch.no_grad():
            results = self._program(*inputs)
        return tree_unflatten(list(results), self._tree.out_spec)

    def _library_of(
        self, divided: Divided, compiled: Compile, called: Mapping[str, Any]
    ) -> Callable[[], Network] | None:
        """What makes the network that the library is, for the weights as they are now; None where nodes stay
        PyTorch's.

        It is the program's own where that takes and gives what the module does. The axes of others' tensors are in
        the order of their memory, say: the library's is compiled when it is wanted.
        """
        outputs = {name: node for name, node in called.items() if _is_tensor(node)}
        ends = Ends(tuple(filter(_is_tensor, self._given)), tuple(outputs.items()))
        rest = {name: node for name, node in called.items() if name not in outputs}
        self._rest = {name: value(node) if isinstance(node, fx.Node) else node for name, node in rest.items()}
        parts = divided.partition.parts
        if not self.outside and len(self.networks) == 1 and is_whole(parts[0], list(self.networks[0].outputs), ends):
            return lambda: self.networks[0]
        if len(self.networks) != len(parts):
            return None
        try:
            model = whole_model(divided.graph.graph, divided.partition, ends, divided.name)
        except UnsupportedError as error:  # of the library alone: the program can be called
            return partial(_refuse, error)
        return None if model is None else cache(lambda: compiled(model))

    def export(self, directory: str | Path, *, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write it as a C library; see :meth:`convgen.network.network.Network.export`.

        It takes and gives what the module does, each tensor with its axes, by name, in the module's order. What else
        the module gives is the same at every call: ``values`` of the manifest.

        Raises:
            UnsupportedError: nodes stay PyTorch's: names each of them, and why; or a tensor is of a type that no
                library takes or gives.
        """
        if self._make_library is None:
            found = f"{_counted(len(self.networks), 'network')} and {_counted(len(self.outside), 'node')} outside"
            raise UnsupportedError(f"expected a program that is one network, found {found}: {in_words(self.outside)}")
        values = {"values": self._rest} if self._rest else {}
        return self._make_library().export(directory, facts={**values, **(facts or {})})


def _refuse(error: UnsupportedError) -> NoReturn:
    raise error


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(value(node), Tensor)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _name_outputs(graph: fx.Graph, tree: TreeSpec) -> dict[str, Any]:
    """Call what the module returns by names as these are: networks call their outputs as nodes are called.

    ``{"logits": …, "features": [a, b]}`` gives ``logits``, ``features_0`` and ``features_1``. Another node of such a
    name changes names with it; where that is an input, or returned, the output's has ``_out`` behind it. What lies
    under the empty name, or under none, keeps its node's.

    Returns:
        All that is returned by name, nodes and else, in order. What is returned again, an input or a weight has a name
        that is no node's.
    """
    (output,) = graph.find_nodes(op="output")
    results: list[Any] = list(output.args[0])
    paths, _ = tree_flatten_with_path(tree_unflatten(list(range(len(results))), tree))
    called = {node.name: node for node in graph.nodes}
    named = set(graph.find_nodes(op="placeholder"))
    names: dict[int, str] = {}

    def call(place: int, wanted: str) -> None:
        node = results[place]
        while wanted in names.values() or called.get(wanted) in named:
            wanted += "_out"
        names[place] = wanted
        other = called.get(wanted)
        if isinstance(node, fx.Node) and node not in named:
            if other is not None and other is not node:
                other.name = node.name
                called[other.name] = other
            node.name = wanted
            called[wanted] = node
            named.add(node)
        elif other is not None:
            free = f"{wanted}_inner"
            while free in called or free in names.values():
                free += "_inner"
            other.name = free
            called[free] = called.pop(wanted)

    for path, place in paths:
        if any(isinstance(step, MappingKey | GetAttrKey) for step in path):
            name = re.sub(r"\W", "_", "_".join(map(_key, path)))
            if name:
                call(place, f"_{name}" if name[:1].isdigit() else name)
    for place, node in enumerate(results):
        if place not in names:
            call(place, node.name if isinstance(node, fx.Node) else f"output_{place}")
    return {names[place]: node for place, node in enumerate(results)}


def _key(step: Any) -> str:
    """A step into what a module returns: a key, a field or a place."""
    return str(step.key if isinstance(step, MappingKey) else step.name if isinstance(step, GetAttrKey) else step.idx)


def _described(tree: TreeSpec) -> str:
    """What a call gives, in words: its arguments, and what lies in them where that is more."""
    positional, named = tree.children()
    count, names = positional.num_children, list(named.context)
    by_place, by_name = f"{count} input{'s' * (count != 1)}", f"{', '.join(names)} by name"
    text = by_place if not names else by_name if not count else f"{by_place} and {by_name}"
    more = any(not child.is_leaf() for child in (*positional.children(), *named.children()))
    return f"{text} with {tree.num_leaves} values in them" if more else text


def _composites() -> dict[Any, Any]:
    """What makes operators that consist of others into these, where the former are not taken themselves."""
    known = torch.export.default_decompositions().items()
    return {operation: make for operation, make in known if operation._can_decompose() and not is_read(operation)}


def _drop_checks(traced: fx.GraphModule) -> None:
    """Take out what checks dtypes that tracing has found already."""
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        traced.graph.erase_node(node)
    traced.recompile()


def _attributes(graph: fx.GraphModule) -> Known:
    return {node: getattr(graph, str(node.target)) for node in graph.graph.find_nodes(op="get_attr")}


def _check_sizes(inputs: list[fx.Node]) -> None:
    """Raise SpecError unless the sizes of inputs are known."""
    for node in inputs:
        found = value(node)
        open_sizes = [size for size in found.shape if not isinstance(size, int)] if isinstance(found, Tensor) else []
        if open_sizes:
            raise SpecError(
                f"input {node.name!r}",
                "a program exported for known sizes",
                f"the size {open_sizes[0]}; as ONNX, by torch.onnx.export, convgen.compile takes it with dims",
            )


def _check_input(node: fx.Node, given: Any) -> None:
    """Raise KernelError unless an argument is as the module was exported with."""
    expected = value(node)
    if not isinstance(expected, Tensor):
        if given != expected:
            raise KernelError(f"{node.name}: expected {expected!r} as when it was exported, found {given!r}")
    elif not isinstance(given, Tensor):
        raise KernelError(f"{node.name}: expected a tensor, found {type(given).__name__}")
    elif given.shape != expected.shape or given.dtype != expected.dtype or given.device != expected.device:
        wanted, found = (f"{list(t.shape)} of {t.dtype} on {t.device}" for t in (expected, given))
        raise KernelError(f"{node.name}: expected {wanted}, found {found}")
