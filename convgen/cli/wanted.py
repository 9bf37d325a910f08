"""Which records a command of ``convgen records`` looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from ..errors import SpecError, UnsupportedError, meant
from ..formats.sources import is_model, read_specs, split_sources
from ..problem.separable import SEPARABLE, SeparableSpec
from ..problem.spec import ConvSpec
from ..problem.tokens import ACCURACIES
from .common import Choice, dim_option, grouped, layers_of, skip_option, status_of, threads_option
from .completion import one_of, schedules_beginning, targets_beginning

if TYPE_CHECKING:
    from ..records.answer import Answer
    from ..records.record import TuningRecord
    from ..records.store import Filters, RecordStore

#: The layers, ``--target`` and so on that limit what a command looks at; for :meth:`Wanted.of`.
filters = grouped(
    click.argument("sources", nargs=-1, metavar="[SPEC|FILE|MODEL.onnx]…"),
    dim_option,
    click.option("--spec", metavar="SPEC", help="Only records of this layer."),
    click.option(
        "--target", shell_complete=one_of(targets_beginning), metavar="TARGET", help="Only records for this target."
    ),
    threads_option("Only records for N threads."),
    click.option(
        "--schedule",
        shell_complete=one_of(schedules_beginning),
        metavar="ID",
        help="Only records of this schedule.",
    ),
    click.option(
        "--whole",
        is_flag=True,
        help="Only records of one model's convolutions as `convgen compile` plans them, which `convgen tune --whole` "
        "tunes; for all cores unless --threads says otherwise.",
    ),
    click.option(
        "--accuracy",
        type=Choice(ACCURACIES),
        metavar="CLASS",
        help="With --whole: the accuracy that the model is compiled with.  [default: standard]",
    ),
    skip_option,
)


def separable(text: str) -> SeparableSpec | None:
    """The separable problem that a text is; None where it is something else."""
    return SeparableSpec.parse(text) if text.partition(" ")[0] in SEPARABLE else None


def recorded_target(spelling: str, *stores: RecordStore) -> str:
    """The one of a target's spellings that records have; of a processor that is not known here, but of which these
    stores have records, as of another version, as it is.

    Raises:
        UnsupportedError: there is no such target, neither here nor there, or this machine has no such device.
    """
    from ..hardware.target import resolve

    try:
        return resolve(spelling).spelling
    except UnsupportedError:
        if any(store.outcomes(target=spelling) for store in stores):
            return spelling
        raise


def _planned(
    sources: Sequence[str],
    spec: str | None,
    dims: dict[str, int],
    target: str | None,
    threads: int | None,
    accuracy: str | None,
) -> tuple[list[str], str, int]:
    """Descriptors of a model's convolutions as they are compiled; the target's spelling, and the threads."""
    from ..network.choice import network_target
    from ..network.network import plan_model

    if spec is not None or len(sources) != 1 or not is_model(sources[0]):
        raise click.UsageError("--whole: expected one ONNX model, and no --spec")
    resolved, count = network_target(target or "cpu", threads)
    plans = plan_model(sources[0], resolved, dims=dims, accuracy=accuracy or "standard")
    names = dict.fromkeys(spec.descriptor for plan in plans for spec in plan.specs)
    return list(names), resolved.spelling, count


@dataclass(frozen=True)
class Wanted:
    """Which records a command looks at; None: all.

    Attributes:
        hint: what is said where there are none.
        left_out: why there are layers that could not be read; ``skip``: that this is no failure.
    """

    specs: list[str] | None
    target: str | None
    threads: int | None
    schedule: str | None
    hint: str = ""
    left_out: tuple[str, ...] = ()
    skip: bool = False

    @classmethod
    def of(
        cls,
        sources: Sequence[str],
        dims: dict[str, int],
        spec: str | None,
        target: str | None,
        threads: int | None,
        schedule: str | None,
        whole: bool,
        accuracy: str | None,
        skip: bool,
    ) -> Wanted:
        """From the values of :data:`filters`; layers that cannot be read have no records, and are named."""
        hint, left_out = "", list[str]()
        if whole:
            names, target, threads = _planned(sources, spec, dims, target, threads, accuracy)
            return cls(names, target, threads, schedule)
        if accuracy is not None:
            raise click.UsageError("--accuracy needs --whole: a layer has its own")
        if problem := separable(spec or " ".join(sources)):
            names = [problem.descriptor]
        else:
            given = split_sources(sources)
            models, left_out = layers_of(given, dims, fits=False)
            if any(map(is_model, given)):
                hint = "; with --whole those of `convgen tune --whole` are found"
            layers = [entry for entries in models for entry in entries]
            layers += read_specs(spec) if spec else []
            names = list(dict.fromkeys(entry.spec.descriptor for entry in layers))
        return cls(names if sources or spec else None, target, threads, schedule, hint, tuple(left_out), skip)

    def status(self) -> int:
        """The exit status of a command that did what it could."""
        return status_of(self.left_out, self.skip)

    def among(self, *stores: RecordStore) -> Wanted:
        """The same, by the names that records of these stores have.

        Raises:
            UnsupportedError: there is no such target or schedule, neither here nor in a record.
        """
        from ..lowering.discover import schedule_ids
        from ..records.strips import SCHEDULE as STRIPS

        name, known = self.schedule, [*schedule_ids(), STRIPS]
        if name is not None and name not in known and not any(store.outcomes(schedule=name) for store in stores):
            expected = f"--schedule: expected one of {', '.join(known)}, or one that records have"
            raise UnsupportedError(f"{expected}, found {name!r}{meant(name, known)}")
        return self if self.target is None else replace(self, target=recorded_target(self.target, *stores))

    @property
    def filters(self) -> Filters:
        """As stores take them."""
        return {"spec": self.specs, "target": self.target, "threads": self.threads, "schedule": self.schedule}

    def trials(self, store: RecordStore, spec: str, target: str, hardware: str, threads: int) -> list[TuningRecord]:
        """The wanted records of a problem."""
        schedule = self.schedule
        return store.trials(spec=spec, target=target, hardware=hardware, threads=threads, schedule=schedule)

    def problems(self, store: RecordStore) -> Iterator[list[TuningRecord]]:
        """The wanted records of a store, problem by problem: what is held at once is small."""
        for place in store.problems(**self.filters):
            found = self.trials(store, *place)
            if found:  # none where they were removed meanwhile
                yield found

    def answers(self, store: RecordStore) -> Iterator[Answer]:
        """What builds on this machine would use: for the layers asked for, or for all of the store."""
        from ..hardware.target import resolve
        from ..records.answer import Answer, find_record
        from ..records.strips import best_height

        target = resolve(self.target or "cpu")
        problems: dict[str, set[int]] = {}
        wanted: Filters = {"spec": self.specs, "target": target.spelling, "threads": self.threads, "outcome": "ok"}
        for name, _, _, count in store.problems(**wanted):
            problems.setdefault(name, set()).add(count)
        for name in problems if self.specs is None else self.specs:
            counts = problems.get(name, set()) | ({self.threads or target.cores} if self.specs else set())
            try:
                if problem := separable(name):
                    yield from (Answer(best_height(store, problem, target, count)) for count in sorted(counts))
                    continue
                spec = ConvSpec.parse(name)
            except SpecError:  # a record of another version
                continue
            for count in sorted(counts):
                answer = find_record(store, spec, target, count, measure=False)
                if answer.record is None or self.schedule in (None, answer.record.schedule):
                    yield answer
