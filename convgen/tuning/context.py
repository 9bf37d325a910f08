"""What the searches of one target and thread count share."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from ..folders import TemporaryFolder
from ..hardware.machine import machine
from ..hardware.target import Target, check_native
from ..problem.spec import ConvSpec
from .journal import Journal
from .ranker import Ranker

if TYPE_CHECKING:  # what measures is loaded where something is measured: how a job stands is asked without it
    from ..measure.trial import Expected
    from ..measure.workers import Pools

#: Layers whose inputs and expected outputs are kept on the disk at once.
EXPECTED = 4


class SearchContext:
    """What the searches of one target and thread count share: a journal, workers, a ranker, the layers' data.

    Args:
        target: where the kernels run: this machine, or the one the runner measures on.
        threads: threads of the kernels.
        journal: where trials go; it is left open.
        pools: who compiles and measures; processes of this machine by default. Those that are given
            are left open.
        ranker: ranks candidates before they are measured; by default one that learns from the store.

    Raises:
        UnsupportedError: kernels for the target do not run on this machine, which is to measure them.
    """

    def __init__(
        self,
        target: Target,
        threads: int,
        journal: Journal,
        *,
        pools: Pools | None = None,
        ranker: Ranker | None = None,
    ) -> None:
        if pools is None or not pools.runner.isolated:
            check_native(target)
        self.target, self.threads, self.journal = target.on(threads), threads, journal
        self._pools, self._own_pools, self._ranker = pools, pools is None, ranker
        self._expected: OrderedDict[ConvSpec, tuple[TemporaryFolder, Expected]] = OrderedDict()

    @property
    def ranker(self) -> Ranker:
        """Learns from every layer of the store, and from every trial made here."""
        if self._ranker is None:
            self._ranker = Ranker.from_store(self.journal.store, self.target, self.threads)
        return self._ranker

    @property
    def pools(self) -> Pools:
        if self._pools is None:
            from ..measure.workers import LocalBuilder, LocalRunner, Pools

            self._pools = Pools(LocalBuilder(machine().cores), LocalRunner())
        return self._pools

    def expected(self, spec: ConvSpec) -> Expected:
        """Inputs and expected output of a layer in a folder, which is kept for a while."""
        if spec not in self._expected:
            from ..measure.trial import Expected

            self.forget(EXPECTED - 1)
            folder = TemporaryFolder()
            threads = machine().cores if self.target.on_device else self.threads
            with folder.writing():
                self._expected[spec] = folder, Expected(spec, folder.path, threads)
        self._expected.move_to_end(spec)
        return self._expected[spec][1]

    def forget(self, keep: int = 0) -> None:
        """Remove the data of all layers but those used last."""
        while len(self._expected) > keep:
            self._expected.popitem(last=False)[1][0].close()

    def close(self) -> None:
        """End the workers that were started here, and remove the layers' data."""
        if self._pools and self._own_pools:
            self._pools.close()
        self.forget()
