"""Programs that ``torch.export`` has made: ``convgen.compile(torch.export.export(model, (x,)))``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from .aten import is_read
from .onnx_graph import Known, value
from .program import Compile, Divided, Program

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class TorchProgram:
    """An exported program, compiled with its weights as they were: called as the module was, it gives what that gave.

    Attributes:
        networks: what convgen computes, in order.
        outside: nodes that PyTorch computes, by name, and why.
    """

    def __init__(self, program: ExportedProgram, compiled: Compile, name: str) -> None:
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
        _name_outputs(program.graph, self._tree.out_spec)
        divided = Divided(program.graph_module, {**weights, **_attributes(program.graph_module)}, name)
        self._program = Program(divided, divided.compiled(compiled))
        self.networks, self.outside = self._program.networks, self._program.outside
        reads = set(self._program.reads)
        self._weights = [weights.get(node) if place in reads else None for place, node in enumerate(placeholders)]
        self._places = [placeholders.index(node) for node in self._given]

    def __repr__(self) -> str:
        names = ", ".join(network.name for network in self.networks)
        networks = f"network{'s' * (len(self.networks) != 1)} {names}" if names else "no network"
        return f"<TorchProgram: {networks}; {_counted(len(self.outside), 'node')} left to PyTorch>"

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

    def export(self, directory: str | Path, *, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write it as a C library; see :meth:`convgen.network.network.Network.export`.

        Raises:
            UnsupportedError: nodes stay PyTorch's: names each of them, and why.
        """
        if self.outside or len(self.networks) != 1:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.outside.items())
            found = f"{_counted(len(self.networks), 'network')} and {_counted(len(self.outside), 'node')} outside"
            raise UnsupportedError(f"expected a program that is one network, found {found}: {reasons}")
        return self.networks[0].export(directory, facts=facts)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _name_outputs(graph: fx.Graph, tree: TreeSpec) -> None:
    """Call what the module returns by names as these are: networks call their outputs as nodes are called.

    ``{"logits": …, "features": [a, b]}`` gives ``logits``, ``features_0`` and ``features_1``. Another node of such a
    name changes names with it; where that is an input, the output's has ``_out`` behind it. What lies under the empty
    name keeps its node's.
    """
    (output,) = graph.find_nodes(op="output")
    results: list[Any] = list(output.args[0])
    paths, _ = tree_flatten_with_path(tree_unflatten(list(range(len(results))), tree))
    called = {node.name: node for node in graph.nodes}
    named = set(graph.find_nodes(op="placeholder"))
    for path, place in paths:
        node = results[place]
        has_key = any(isinstance(step, MappingKey | GetAttrKey) for step in path)
        if not isinstance(node, fx.Node) or node in named or not has_key:
            continue
        name = re.sub(r"\W", "_", "_".join(map(_key, path)))
        name = f"_{name}" if name[:1].isdigit() else name
        if not name:
            continue
        while called.get(name) in named:
            name += "_out"
        if (other := called.get(name)) is not None:
            other.name = node.name
            called[other.name] = other
        node.name = name
        called[name] = node
        named.add(node)


def _key(step: Any) -> str:
    """A step into what a module returns: a key, a field or a place."""
    return str(step.key if isinstance(step, MappingKey) else step.name if isinstance(step, GetAttrKey) else step.idx)


def _described(tree: TreeSpec) -> str:
    """What a call gives, in words: its arguments, and what lies in them where that is more."""
    positional, named = tree.children()
    count, names = positional.num_children, list(named.context)
    text = f"{count} input{'s' * (count != 1)}" + f" and {', '.join(names)}" * bool(names)
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
