"""Kernels that are one parallel loop over tasks: what they have, and the head of their statements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..deferred import tirx
from ..lowering.compute import Expr, unflat
from ..lowering.schedule import Picks
from ..problem.spec import ConvSpec
from .vector import Block


class Buffers(NamedTuple):
    """What :func:`convgen.cpu.vector.written` gives: ``residual`` is None where there is none."""

    src: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer


@dataclass(frozen=True)
class TaskKernel(ABC):
    """The statements of a whole layer: what is computed, how, and where."""

    buffers: Buffers
    spec: ConvSpec
    picks: Picks

    @property
    def src(self) -> tirx.Buffer:
        return self.buffers.src

    @property
    def residual(self) -> tirx.Buffer:
        return self.buffers.residual

    @property
    def parameters(self) -> dict[str, tirx.Buffer]:
        return self.buffers.parameters

    @property
    def dst(self) -> tirx.Buffer:
        return self.buffers.dst

    @property
    @abstractmethod
    def tasks(self) -> Sequence[int]:
        """How many tasks there are along each of the axes that tell them apart, the outermost first."""

    @abstractmethod
    def work(self, body: Block, place: Sequence[Expr]) -> None:
        """What a task does.

        Args:
            place: which one it is, along each of the axes.
        """

    @property
    def src_zero(self) -> Expr:
        """The zero point of src; None where it has none."""
        return self.parameters["src_zero"][0] if self.spec.src_zero else None

    def statement(self) -> tirx.Stmt:
        """The parallel loop over tasks around what each does."""
        whole, tasks = Block(), self.tasks
        with whole.loop(math.prod(tasks), parallel=True) as (body, index):
            self.work(body, [body.let(i) for i in unflat(index, tasks)])
        return whole.statement()
