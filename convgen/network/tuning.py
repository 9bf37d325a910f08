"""Tuning a model as a whole: its convolutions are searched, and what wins must make the running network faster.

The network is planned once. Of every convolution the seconds that it takes there say how much of the budget is for it;
it is searched by itself, with cold weights, and compared with its default (:mod:`convgen.tuning.job_run`). Then the
network is compiled with the defaults, with what won and with what came next, and these run in turn: a kernel is kept
where it is certainly faster in the network, and all of them only where the network is faster with them
(:mod:`convgen.tuning.networks`). Records say so, and the next :func:`convgen.compile` uses them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConvgenError, MeasureError, SpecError
from ..formats.entries import SpecEntry
from ..hardware.machine import pinned
from ..hardware.target import Target
from ..kernel.arrays import drawn
from ..lowering.schedule import Candidate
from ..measure.workers import ChainSamples, LocalBuilder, LocalRunner, Pools
from ..problem.spec import ConvSpec
from ..records.opening import Records
from ..records.store import RecordStore
from ..tuning.job import Job
from ..tuning.job_run import JobRun
from ..tuning.job_state import JobState, Layer
from ..tuning.networks import ROUNDS, Choice, NetworkTimes
from ..tuning.search import Search
from .choice import network_target, recorded_choice
from .compile import with_candidates
from .network import Network, compile_planned, plan_model
from .plan import Plan, Product
from .sizes import Dims, labels_of

if TYPE_CHECKING:
    from onnx import ModelProto

#: Runs of the network by which the budget is divided.
LOOKS = 5


class ModelTuning:
    """A model whose convolutions are tuned by running it: what a job of tuning needs to know of it.

    Args:
        source: a path or a model.
        target: a CPU; the one that the kernels run on.
        threads: that the network runs on; all cores where None.
        dims: sizes of symbolic dimensions; with several, the network is judged at each size.
        accuracy: of its convolutions.
        strips: as :func:`convgen.network.network.plan_graph` takes them.

    Attributes:
        whole: times are of the whole network.

    Raises:
        SpecError: it cannot be read, or has no convolutions.
        NotTakenError: of nodes that are not taken.
        UnsupportedError: the target is no CPU, or not this machine's.
    """

    whole = True

    def __init__(
        self,
        source: str | Path | ModelProto,
        target: str | Target = "cpu",
        threads: int | None = None,
        *,
        dims: Dims | None = None,
        accuracy: str = "standard",
        strips: int | None = 0,
        name: str | None = None,
    ) -> None:
        self.target, self.threads = network_target(target, threads)
        self.accuracy = accuracy
        self.plans = plan_model(source, self.target, dims=dims, accuracy=accuracy, strips=strips, name=name)
        labels = labels_of([plan.graph.dims for plan in self.plans])
        own = self.plans[0].graph.name
        self._sizes = {f"{own} {label}".rstrip(): number for number, label in enumerate(labels)}
        if not any(plan.specs for plan in self.plans):
            raise SpecError("model", "one with convolutions to tune", "none", own)

    def job(self, job: Job) -> Job:
        """A job for the convolutions as they are planned; budget and the rest are the given one's."""
        planned = {
            model: tuple(
                SpecEntry(step.function.spec, 1, (step.name,))
                for step in self.plans[number].steps
                if isinstance(step.function, Product)
            )
            for model, number in self._sizes.items()
        }
        spelling = self.target.spelling
        return replace(job, models=tuple(planned), planned=planned, targets=(spelling,), threads=(self.threads,))

    def network(self, choice: Mapping[ConvSpec, Candidate]) -> Network:
        """The network with chosen kernels, and otherwise with the defaults.

        Raises:
            BuildError: TVM, LLVM or the C compiler failed.
        """
        plans: list[Plan] = [with_candidates(plan, choice.get) for plan in self.plans]
        return compile_planned(plans, self.target, self.threads, self.accuracy)

    def recorded(self, records: Records) -> Network:
        """The network with the kernels that a store has.

        Raises:
            RecordError: the store cannot be read.
            BuildError: TVM, LLVM or the C compiler failed.
        """
        specs = {spec for plan in self.plans for spec in plan.specs}
        with recorded_choice(records, self.target, self.threads) as choose:
            return self.network({spec: candidate for spec in specs if (candidate := choose(spec)) is not None})

    def expected(self) -> dict[ConvSpec, float]:
        """Seconds that each convolution takes in the network of defaults, the mean of its instances."""
        network, found = self.network({}), defaultdict[ConvSpec, list[float]](list)
        with pinned(self.threads):
            for number, plan in enumerate(self.plans):
                for spec, seconds in zip(plan.specs, _of_products(plan, network.profile(number, LOOKS)), strict=True):
                    found[spec].append(seconds)
        return {spec: statistics.fmean(seconds) for spec, seconds in found.items()}

    # ---- as what judges networks: convgen.tuning.networks.Timing ----

    def usable(self, search: Search, candidates: list[Candidate]) -> list[Candidate]:
        """All of them: each was compiled, and was right, when it was measured."""
        return candidates

    def times(self, model: str, order: Sequence[ConvSpec], choices: Sequence[Choice]) -> ChainSamples:
        """Seconds of the instances and of all other steps, of networks that run in turn.

        Raises:
            MeasureError: a network cannot be compiled.
        """
        number = self._sizes[model]
        plan = self.plans[number]
        try:
            networks = [self.network(choice) for choice in choices]
        except ConvgenError as error:
            raise MeasureError(f"{model}: cannot be compiled with what won: {error}") from error
        rng = np.random.default_rng(0)
        inputs = [drawn(rng, info) for info in networks[0].at[number].inputs.values()]
        taking_part = set(order)
        samples: ChainSamples = [[] for _ in networks]
        with pinned(self.threads):
            for network in networks:
                network(*inputs)
            for turn in range(ROUNDS):
                for which in range(len(networks))[:: 1 if turn % 2 == 0 else -1]:  # nobody always follows the same one
                    network = networks[which]
                    network(*inputs)  # caches are its own
                    steps = network.step_seconds(*inputs)
                    products = zip(plan.specs, _of_products(plan, steps), strict=True)
                    own = [seconds for spec, seconds in products if spec in taking_part]
                    samples[which].append([*own, sum(steps) - sum(own)])
        return samples


def _of_products(plan: Plan, seconds: Sequence[float]) -> list[float]:
    """What the convolutions' steps take, of what all steps do."""
    return [taken for step, taken in zip(plan.steps, seconds, strict=True) if isinstance(step.function, Product)]


def tune_model(
    tuning: ModelTuning,
    store: RecordStore | None,
    seconds: float | None,
    report: Callable[[JobState, Layer], None] | None = None,
) -> list[NetworkTimes]:
    """Tune a model on this machine; gives what the network takes before and after, at each of its sizes.

    Args:
        store: where records go, and what is gone on from.
        seconds: in all, earlier runs' included; until nothing more is gained where None.
        report: called after every trial.

    Raises:
        KeyboardInterrupt: what was measured until then is in the store.
        RecordError: the store cannot be read or written.
        MeasureError: nothing can be measured.
    """
    pools = Pools(LocalBuilder(tuning.target.cores), LocalRunner())
    try:
        job = tuning.job(Job((), seconds=seconds))
        run = JobRun(job, store, pools, report=report, timing=tuning, expected=tuning.expected())
        try:
            run.run()
        finally:
            run.close()
        return run.networks
    finally:
        pools.close()
