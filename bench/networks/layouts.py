"""Layouts inside a network, where nobody asks for NCHW: what lies between two layers is as both want it."""

from __future__ import annotations

from collections.abc import Sequence

from convgen.formats.entries import SpecEntry
from convgen.problem.layout import BLOCKS

#: What a network may have between its layers: ``blocked`` is blocks of 16 channels where channels are a multiple of 16,
#: NHWC elsewhere.
CHOICES = ("blocked", "nhwc", "nchw")


def between_layers(layers: Sequence[SpecEntry], choice: str) -> list[SpecEntry]:
    """Layers in order, each with the layouts it has in the network; the network itself takes NCHW."""
    found = []
    for number, layer in enumerate(layers):
        src = _layout(layer.spec.ic, choice) if number else "nchw"
        spec = layer.spec.with_(layout=src, dst_layout=_layout(layer.spec.oc, choice))
        found.append(SpecEntry(spec, layer.count, layer.names))
    return found


def _layout(channels: int, choice: str) -> str:
    if choice != "blocked":
        return choice
    return "nchw16c" if channels % BLOCKS["nchw16c"] == 0 else "nhwc"
