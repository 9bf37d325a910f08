"""Kernels as what is fuzzed: random layers, and candidates of the schedules that apply to them."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import Inapplicable
from ...hardware.target import Target, check_native, resolve
from ...lowering.discover import schedule as find_schedule
from .cases import Case
from .drawing import Draw, draw
from .shrinking import Step, case_steps


class Kernels:
    """Layers with candidates.

    Args:
        threads, schedule, directions, seeds: as of :func:`~convgen.check.fuzz.drawing.draw`.

    Raises:
        UnsupportedError: the target is unknown or does not run here, or there is no such schedule.
        Inapplicable: the schedule applies to no layer on the target.
    """

    def __init__(
        self,
        target: str | Target = "cpu",
        *,
        threads: int | None = None,
        schedule: str | None = None,
        directions: Sequence[str] = (),
        seeds: int = 0,
    ) -> None:
        self.target, self.threads, self.schedule, self.directions = resolve(target), threads, schedule, directions
        self.seeds = seeds
        self._drawn: dict[tuple[int, int], Draw] = {}  # to see whether there is any, and not yet taken
        check_native(self.target)
        find_schedule(schedule or "reference")  # imports all of them
        if schedule is not None:
            self._check_applies(schedule)

    def _check_applies(self, schedule: str) -> None:
        """A draw looks at thousands of layers: where one finds none, a run would check nothing."""
        try:
            first = self._drawn[0, 0] = self.draw(0, 0)
        except Exception:  # a schedule that breaks is what the run is for
            return
        if not first.cases:
            raise Inapplicable(f"--schedule {schedule} on {self.target}: {'; '.join(first.skipped)}")

    @property
    def options(self) -> str:
        """What the command says to draw the same."""
        options = f" --target {self.target}" + (f" --threads {self.threads}" if self.threads else "")
        options += f" --schedule {self.schedule}" if self.schedule else ""
        options += f" --integers {self.seeds}" if self.seeds else ""
        return options + (f" --directions {','.join(self.directions)}" if self.directions else "")

    def draw(self, seed: int, index: int) -> Draw:
        """Layer ``index`` of a seed with its candidates."""
        if (seed, index) in self._drawn:
            return self._drawn.pop((seed, index))
        return draw(
            seed,
            index,
            self.target,
            threads=self.threads,
            schedule=self.schedule,
            directions=self.directions,
            seeds=self.seeds,
        )

    def steps(self) -> list[Step[Case]]:
        """What a failing case is made simpler by."""
        return case_steps(self.target)
