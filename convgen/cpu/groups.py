"""Grouped convolutions with output channels of whole groups in the vector lanes: which lanes hold which channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..deferred import tirx
from ..lowering.compute import Expr, ceildiv, widen
from ..problem.spec import ConvSpec
from .vector import load, permuted


class GroupVectors:
    """Which output channels of a grouped convolution the lanes of a vector hold.

    Attributes:
        depth: input channels of a group.
        count: channels that a vector holds, of ``groups`` groups or a part of one.
        parts: vectors of a group that has more channels than a vector has lanes; else 1.
        permuted: whether a vector of inputs is permuted from loaded ones: else it is loaded as it is, or broadcast.
        number: vectors of all channels.
    """

    def __init__(self, spec: ConvSpec, lanes: int) -> None:
        self.lanes = lanes
        self._all = spec.groups
        self.depth, self._outputs = spec.ic // spec.groups, spec.oc // spec.groups
        self.groups = min(max(1, self.lanes // self._outputs), spec.groups)
        self.parts = ceildiv(self._outputs, self.lanes)
        self.count = min(self.lanes, self.groups * self._outputs)
        self.permuted = self.groups > 1 and self.depth * self._outputs > 1
        self.number: int = ceildiv(spec.groups, self.groups) * self.parts

    def within(self, block: int, channels: int, inputs: bool) -> bool:
        """Whether no vector of inputs, or of outputs, lies in two blocks of channels."""
        if block == channels or (inputs and self.groups == 1):
            return True
        size = self.groups * self.depth if inputs else self.count
        whole = self.count == self.lanes and (self._outputs % self.lanes == 0 or self.lanes % self._outputs == 0)
        return whole and block % size == 0

    def _group(self, v: Expr) -> Expr:
        """The first group of a vector."""
        return tirx.min(v // self.parts * self.groups, self._all - self.groups)

    def first(self, v: Expr) -> Expr:
        """The first output channel."""
        within = tirx.min(v % self.parts * self.lanes, self._outputs - self.count) if self.parts > 1 else 0
        return self._group(v) * self._outputs + within

    def source(self, v: Expr) -> Expr:
        """The first input channel."""
        return self._group(v) * self.depth

    @property
    def loaded(self) -> int:
        """Loads of a pixel's vector."""
        return self.groups if self.permuted and (self.lanes < 8 or self.groups * self.depth > self.lanes) else 1

    @property
    def order(self) -> list[int]:
        """The group of each lane, counted from the vector's first one."""
        return [min(t // self._outputs, self.groups - 1) for t in range(self.lanes)]

    def read(self, src: tirx.Buffer, dtype: str, place: Callable[[Expr], Sequence[Expr]], first: Expr, c: Expr) -> Expr:
        """A vector of a pixel's inputs: in each lane the c-th channel of the lane's group.

        ``place`` is the index of one of the pixel's channels, ``first`` the first group's first one.
        """
        lanes, groups = self.lanes, self.order
        if not self.permuted and self.groups > 1:
            return load(src, dtype, place(first), lanes, self.groups)
        if self.groups > 1 and self.loaded == 1:
            order = [tirx.const(group * self.depth, "int32") for group in groups]
            index = tirx.Shuffle(order, list(range(lanes))) + tirx.Broadcast(tirx.const(0, "int32") + c, lanes)
            return permuted(load(src, dtype, place(first), lanes, self.groups * self.depth), index, lanes)
        value: Expr = None
        for group in range(self.groups):
            one = tirx.Broadcast(widen(src[tuple(place(first + c + group * self.depth))], dtype), lanes)
            blend = [t + lanes * (groups[t] == group) for t in range(lanes)]
            value = one if value is None else tirx.Shuffle([value, one], blend)
        return value
