"""The Conv, ConvTranspose, QLinearConv and ConvInteger nodes of a model with what can be folded into them.

``python -m convgen.formats.onnx.layers`` reads a model in a process of its own; :mod:`convgen.formats.onnx.reader`
starts it.
"""

from __future__ import annotations

import json
import resource
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx import ModelProto, NodeProto

from ...errors import ConvgenError, SpecError, UnsupportedError
from ...problem.dtypes import save
from .constants import ROOTS
from .file import CONTRADICTIONS, ModelFile, contradiction
from .fold import Fold
from .graph import Scope, static, text
from .node import OnnxLayer, convolves, why_unread
from .prepare import prepare
from .quantised import QuantisedFold, is_quantised, refuse_other_integers

#: Conv has always meant the same, but before this opset Add and others were broadcast another way.
FOLDING_OPSET = 7
CONVOLUTIONS = ("Conv", "ConvTranspose", "QLinearConv", "ConvInteger")


def _is_read(node: NodeProto) -> bool:
    return node.op_type in CONVOLUTIONS and node.domain in ROOTS


def read_layers(source: str | Path | ModelProto, dims: Mapping[str, int], arrays: bool) -> list[OnnxLayer]:
    """See :func:`convgen.formats.onnx.reader.layers_from_onnx`; this one works in this process."""
    with ModelFile(source) as file:
        folded = folded_graphs(file, dims, arrays)
    layers = [layer for _, found in folded for layer in found]
    if not layers:
        raise SpecError("model", f"a node {', '.join(CONVOLUTIONS)}", "none", file.where)
    return layers


def folded_graphs(
    file: ModelFile, dims: Mapping[str, int], arrays: bool, *, strict: bool = True
) -> list[tuple[Scope, list[OnnxLayer]]]:
    """A model's graphs, each with its convolutions: first the model's own, then those inside its nodes.

    Args:
        strict: a convolution of dequantised integers that has no form in integers is refused; else it is read as what
            the graph says, one of f32.

    Raises:
        SpecError: see :func:`convgen.formats.onnx.prepare.prepare`.
    """
    graphs, unknown = prepare(file, dims)
    old = any(opset.domain in ROOTS and opset.version < FOLDING_OPSET for opset in file.proto.opset_import)
    return [(graph, _Reader(graph, unknown, not old, strict).layers(arrays)) for graph in graphs]


class _Reader:
    """Reads the convolutions of one graph."""

    def __init__(self, scope: Scope, unknown: list[str], folds: bool, strict: bool) -> None:
        self.scope, self.unknown, self.folds, self.where = scope, unknown, folds, scope.file.where
        self.strict = strict
        self.taken: set[str] = set()  # outputs of additions that are some convolution's residual
        self._lost: dict[str, str] = {}

    def layers(self, arrays: bool) -> list[OnnxLayer]:
        nodes = [i for i, n in enumerate(self.scope.nodes) if _is_read(n) or convolves(n)]
        depth: dict[str, int] = defaultdict(int)  # value -> number of convolutions on the longest path to it
        for node in self.scope.nodes:
            before = max((depth[name] for name in node.input), default=0)
            depth.update(dict.fromkeys(node.output, before + _is_read(node)))
        # The deepest convolution first, so that it is the one that takes an addition in which several meet.
        order = sorted(nodes, key=lambda index: (depth[self.scope.nodes[index].output[0]], index), reverse=True)
        layers = {index: self._layer(self.scope.nodes[index], arrays) for index in order}
        return [layers[index] for index in nodes]

    def lost(self, name: str) -> str:
        """Names, for a message, the node after which shapes are unknown although those of its inputs are known."""
        way = []
        while name not in self._lost and (index := self.scope.producers.get(name)) is not None:
            node = self.scope.nodes[index]
            way.append(name)
            reason = self.scope.reason(name)
            self._lost[name] = f" after {node.op_type} {(node.name or node.output[0])!r}{reason and ': '}{reason}"
            name = next((i for i in node.input if i and "?" in text(self.scope.shape(i))), "")
        culprit = self._lost.get(name) or (self._lost[way[-1]] if way else "")
        self._lost.update(dict.fromkeys(way, culprit))
        return culprit

    def _layer(self, node: NodeProto, arrays: bool) -> OnnxLayer:
        name = self.scope.name(node)
        where = f"{self.where}: {node.op_type} {name!r}"
        if not _is_read(node):
            return OnnxLayer(name, node.op_type, None, UnsupportedError(f"{where}: {why_unread(node)}"))
        try:
            fold = self._fold(node, where)
            dst = self.scope.shape(fold.dst)
            if static(dst) and dst != fold.spec.dst_shape:
                raise SpecError("dst", f"shape {text(fold.spec.dst_shape)} as src and weights give", text(dst))
            layer = OnnxLayer(name, node.op_type, fold.spec, None, fold.src, fold.dst, fold.residual)
            return replace(layer, arrays=fold.arrays(), unknown=fold.unknown()) if arrays else layer
        except SpecError as error:
            place = error.where.removeprefix(self.where).removeprefix(": ")  # of a tensor's data
            found = SpecError(error.field, error.expected, error.found, f"{where}: {place}" if place else where)
            return OnnxLayer(name, node.op_type, None, found)
        except UnsupportedError as error:
            return OnnxLayer(name, node.op_type, None, error)
        except CONTRADICTIONS as error:
            found = SpecError("node", "attributes and operands that fit each other", contradiction(error), where)
            return OnnxLayer(name, node.op_type, None, found)

    def _fold(self, node: NodeProto, where: str) -> Fold:
        if node.op_type in ("QLinearConv", "ConvInteger"):
            return QuantisedFold(self, node, where)
        if not self.folds or not is_quantised(self.scope, node):
            if self.strict:
                refuse_other_integers(self.scope, node, where)
            return Fold(self, node, where)
        try:
            return QuantisedFold(self, node, where)
        except (SpecError, UnsupportedError):
            if self.strict:
                raise
            return Fold(self, node, where)


# ---- in a process of its own ------------------------------------------------------------------


def _child() -> None:
    """Reads one job from standard input and prints what ``layers_from_onnx`` makes of it."""
    job = json.load(sys.stdin)
    for limit, value in job["limits"].items():
        kind = getattr(resource, limit)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    answer: dict[str, Any] = {}
    try:
        layers = read_layers(Path(job["path"]), job["dims"], job["directory"] is not None)
        answer["layers"] = [_plain(layer) for layer in layers]
        for index, layer in enumerate(layers):
            for name, array in layer.arrays.items():
                save(Path(job["directory"]) / f"{index}.{name}.npy", array)
    except MemoryError:
        limit = f"{job['limits']['RLIMIT_AS'] >> 20} MiB"
        answer = {"error": ["file", f"a model that can be read in {limit} of memory", "a larger one", job["path"]]}
    except ConvgenError as error:
        answer = {"error": _told(error)}
    json.dump(answer, sys.stdout)


def _plain(layer: OnnxLayer) -> dict[str, Any]:
    """A layer as JSON values."""
    plain = {name: getattr(layer, name) for name in ("name", "operator", "src", "dst", "residual", "unknown")}
    plain["spec"] = layer.spec.to_dict() if layer.spec else None
    plain["refusal"] = _told(layer.refusal) if layer.refusal else None
    return plain | {"arrays": list(layer.arrays)}


def _told(error: ConvgenError) -> list[str]:
    """An error as its arguments: four texts for a SpecError, one for an UnsupportedError."""
    if isinstance(error, SpecError):
        return [error.field, error.expected, str(error.found), error.where]
    return [str(error)]


if __name__ == "__main__":
    _child()
