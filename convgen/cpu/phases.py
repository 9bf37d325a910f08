"""The phases of a transposed convolution, along one axis.

Tap k of input pixel i adds to output ``i * stride + k * dilation - begin``. Outputs that are equal modulo the stride
form a phase: pixel q of it is output ``stride * q + first``. What it reads is a convolution at stride 1 of the input
with every ``step``-th tap, ``step = stride / gcd(stride, dilation)``, last tap first: phase j has taps j, j + step, …
Further phases, if ``step < stride``, meet no tap at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..deferred import tirx
from ..lowering.compute import Expr, ceildiv, round_up
from ..problem.spec import ConvSpec


class Phase(NamedTuple):
    """A phase of an axis.

    Attributes:
        first: its first output pixel.
        source: the input pixel that the first of its taps meets for pixel 0; may lie outside.
        taps: how many there are.
        position: where its taps begin, of the axis' taps in the order of phases.
    """

    first: Expr
    source: Expr
    taps: Expr
    position: Expr


@dataclass(frozen=True)
class Axis:
    """One axis; of its ``size`` input pixels come ``out`` output pixels."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    begin: int

    @classmethod
    def of(cls, spec: ConvSpec, axis: int) -> Axis:
        """An axis of a spec; a negative one is an axis that it lacks.

        A single input pixel meets each output with one tap, whatever the stride: with one so large that every output
        is a phase of its own, no zero around the pixel is multiplied.
        """
        if axis < 0:
            return cls(1, 1, 1, 1, 1, 0)
        size, out, kernel = spec.in_spatial[axis], spec.out_spatial[axis], spec.kernel[axis]
        stride, dilation, begin = spec.stride[axis], spec.dilation[axis], spec.padding[axis][0]
        if size == 1 and kernel * dilation > stride:
            stride = round_up(max(out + begin, kernel * dilation), dilation)
        return cls(size, out, kernel, stride, dilation, begin)

    @cached_property
    def step(self) -> int:
        """From a tap of a phase to its next."""
        return self.stride // math.gcd(self.stride, self.dilation)

    @property
    def gap(self) -> int:
        """Input pixels from one tap to the next."""
        return self.dilation // math.gcd(self.stride, self.dilation)

    @property
    def taps(self) -> int:
        """Of the phases that have most."""
        return ceildiv(self.kernel, self.step)

    @property
    def longer(self) -> int:
        """How many phases have as many, the first ones; the others with taps have one less."""
        return self.kernel - (self.taps - 1) * self.step

    @property
    def pixels(self) -> int:
        """Of the phases that have most."""
        return ceildiv(self.out, self.stride)

    @cached_property
    def reads(self) -> tuple[int, int]:
        """The first and the last input pixel that pixel 0 of any phase meets."""
        phases = [phase for j in range(min(self.step, self.kernel)) if (phase := self.phase(j)).first < self.out]
        if not phases:
            return 0, 0
        return min(p.source for p in phases), max(p.source + (p.taps - 1) * self.gap for p in phases)

    def phase(self, j: Expr) -> Phase:
        """The j-th of ``stride`` phases."""
        if self.stride == 1:
            return Phase(0, self.begin - (self.kernel - 1) * self.dilation, self.kernel, 0)
        tap, empty = (j, 0) if self.step == self.stride else (j % self.step, j // self.step)
        first = (tap * self.dilation + empty + -self.begin % self.stride) % self.stride
        # Raised by whole strides, so that what is divided is not negative.
        raised = ceildiv(self.step * self.dilation, self.stride)
        middle = (first + (self.begin + raised * self.stride) - tap * self.dilation) // self.stride - raised
        taps, position = self._count(tap), tap * (self.taps - 1) + _least(tap, self.longer)
        if self.step < self.stride:
            taps = taps * _holds(empty < 1)
        return Phase(first, middle - (taps - 1) * self.gap, taps, position)

    def tap(self, position: Expr) -> Expr:
        """The kernel's tap at a position in the order of phases, last tap of a phase first."""
        if self.taps == 1:
            return position
        head = self.longer * self.taps
        long = position // self.taps + (self.taps - 1 - position % self.taps) * self.step
        if self.longer == self.step:
            return long
        short, rest = self.taps - 1, position - head
        other = self.longer + rest // short + (short - 1 - rest % short) * self.step
        return tirx.if_then_else(position < head, long, other)

    def _count(self, tap: Expr) -> Expr:
        """Taps of the phase of a first tap."""
        if self.longer == self.step:
            return self.taps
        return self.taps - 1 + _holds(tap < self.longer)


def _least(a: Expr, b: int) -> Expr:
    return min(a, b) if isinstance(a, int) else tirx.min(a, b)


def _holds(condition: Expr) -> Expr:
    """1 where a condition holds, else 0."""
    return (
        int(condition)
        if isinstance(condition, bool)
        else tirx.Select(condition, tirx.const(1, "int32"), tirx.const(0, "int32"))
    )
