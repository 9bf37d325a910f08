"""Layouts inside a network, where nobody asks for NCHW: what lies between two layers is as both want it."""

from __future__ import annotations

from collections.abc import Sequence

from convgen.formats.entries import SpecEntry
from convgen.problem.layout import BLOCKS
from convgen.problem.spec import ConvSpec

#: What a network may have between its layers: ``blocked`` is blocks of 16 channels where all layers that a tensor of so
#: many channels meets take whole blocks, NHWC elsewhere.
CHOICES = ("blocked", "nhwc", "nchw")


def between_layers(layers: Sequence[SpecEntry], choice: str) -> list[SpecEntry]:
    """Layers in order, each with the layouts it has in the network; the network itself takes NCHW."""
    split = {c for layer in layers for c in _split(layer.spec)}

    def layout(channels: int) -> str:
        if choice != "blocked":
            return choice
        return "nhwc" if channels in split else "nchw16c"

    found = []
    for number, layer in enumerate(layers):
        src = layout(layer.spec.ic) if number else "nchw"
        spec = layer.spec.with_(layout=src, dst_layout=layout(layer.spec.oc))
        found.append(SpecEntry(spec, layer.count, layer.names))
    return found


def _split(spec: ConvSpec) -> list[int]:
    """Numbers of channels of which a block would be in two groups, or not be whole."""
    groups = 1 if spec.is_depthwise else spec.groups
    return [channels for channels in (spec.ic, spec.oc) if channels // groups % BLOCKS["nchw16c"]]
