"""Kernels that are one parallel loop over tasks: what they have, and the head of their statements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ..deferred import tirx
from ..lowering.compute import Expr, unflat
from ..lowering.schedule import Picks
from ..problem.spec import ConvSpec
from .vector import Block


@dataclass(frozen=True)
class TaskKernel(ABC):
    """The statements of a whole layer.

    Attributes:
        src, residual, parameters, dst: its buffers, as :func:`convgen.cpu.vector.written` gives them.
        spec, picks: what is computed, and how.
    """

    src: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer
    spec: ConvSpec
    picks: Picks

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
