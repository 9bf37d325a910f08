"""What a schedule is: an algorithm, the space of its numbers, and how one point of it is lowered.

A file in ``schedules/`` holds one subclass of :class:`Scheduled` or :class:`Written`; :mod:`convgen.lowering.discover`
finds it.
"""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from ..errors import Inapplicable
from ..problem.dtypes import EXACT, RANGES
from ..problem.layout import PLAIN

if TYPE_CHECKING:
    import numpy.typing as npt
    from tvm import te
    from tvm.s_tir import Schedule as TirSchedule

    from ..hardware.target import Target
    from ..problem.spec import ConvSpec
    from .interface import Persistent, TensorMap

Pick = int | str | bool
Array: TypeAlias = "npt.NDArray[Any]"


def require(condition: bool, why: str) -> None:
    """Raise :class:`Inapplicable` with the reason unless the condition holds."""
    if not condition:
        raise Inapplicable(why)


def busiest(work: Sequence[float], cores: int) -> float:
    """How much the busiest core has to do, where each task takes ``work``.

    Tasks are dealt to cores in consecutive runs, and no core gets over one task more than another.
    """
    ends = [-(-len(work) * core // cores) for core in range(cores + 1)]
    return max(sum(work[start:end]) for start, end in itertools.pairwise(ends))


class Picks(Mapping[str, Pick]):
    """One point of a :class:`Space`: an immutable mapping whose values are attributes too."""

    __slots__ = ("_items",)
    _items: dict[str, Any]

    def __init__(self, **values: Pick) -> None:
        object.__setattr__(self, "_items", dict(values))

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._items[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"picks are immutable: cannot set {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._items == dict(other)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._items.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return _picks, (self._items,)

    def __repr__(self) -> str:
        return f"Picks({self})"

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in sorted(self._items.items()))

    def replace(self, **changes: Pick) -> Picks:
        return Picks(**{**self._items, **changes})


def _picks(values: dict[str, Pick]) -> Picks:
    return Picks(**values)


class Space:
    """Finite named domains: the product of all values of all picks.

    >>> Space(tile_ow=[7, 14], unroll_kw=[False, True]).size
    4
    """

    def __init__(self, **domains: Sequence[Any]) -> None:
        self.domains = {name: tuple(dict.fromkeys(values)) for name, values in domains.items()}

    def __repr__(self) -> str:
        return f"Space({', '.join(f'{name}={list(values)}' for name, values in self.domains.items())})"

    @property
    def size(self) -> int:
        return math.prod(map(len, self.domains.values()))

    def __iter__(self) -> Iterator[Picks]:
        for values in itertools.product(*self.domains.values()):
            yield Picks(**dict(zip(self.domains, values, strict=True)))

    def __contains__(self, picks: object) -> bool:
        return (
            isinstance(picks, Picks)
            and picks.keys() == self.domains.keys()
            and all(picks[name] in values for name, values in self.domains.items())
        )

    def sample(self, rng: random.Random) -> Picks:
        """A point drawn uniformly."""
        return Picks(**{name: rng.choice(values) for name, values in self.domains.items()})

    def neighbours(self, picks: Picks) -> Iterator[Picks]:
        """All points that differ from ``picks`` in one value."""
        for name, values in self.domains.items():
            for value in values:
                if value != picks[name]:
                    yield picks.replace(**{name: value})


@dataclass(frozen=True)
class Program:
    """The tensor expressions of one candidate.

    ``pack``: placeholders ``weights [bias] [slope] [scale]``, then the packed tensors computed from them.
    ``main``: placeholders ``src [residual]``, one placeholder per packed tensor, then ``dst``.
    """

    pack: list[te.Tensor]
    main: list[te.Tensor]


@dataclass(frozen=True)
class Magnitudes:
    """A convolution of absolute values, whose output is what an algorithm's rounding errors are relative to."""

    spec: ConvSpec
    src: Array
    weights: Array


class Schedule(ABC):
    """An algorithm for a class of specs; stateless.

    ``id`` and ``version`` are written into records: raise the version when the code that some
    picks produce changes, so that old measurements no longer answer for it. ``transforms`` says
    that it does more than reorder sums (Winograd), so that integers need not come out bit for bit; accuracy
    ``strict`` admits none that does.
    ``sums_integers`` says that sums of a layer of integers are integers; elsewhere they are f32.
    ``directions`` are those of specs that it takes; a gradient of src is a forward layer wherever it can be.
    ``only_integers`` says that it is for layers of integers alone.
    ``is_reference`` says that it is the definition itself, which the others are checked against; one schedule is.
    ``merged`` names schedules of earlier versions in whose place it is: records of theirs stay readable.
    """

    id: ClassVar[str]
    version: ClassVar[int]
    transforms: ClassVar[bool] = False
    sums_integers: ClassVar[bool] = False
    directions: ClassVar[tuple[str, ...]] = ("forward",)
    only_integers: ClassVar[bool] = False
    is_reference: ClassVar[bool] = False
    merged: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        return f"<Schedule {self.id}, version {self.version}>"

    def takes_layouts(self, src: str, dst: str) -> bool:
        """Whether it reads src in one layout and writes dst in the other: plain ones, if they are the same, unless a
        schedule says otherwise. Most tell NCHW from everything else, so they must be kept from what they do not know.
        """
        return src == dst and src in PLAIN

    def takes_integers(self, spec: ConvSpec) -> bool:
        """Whether it knows the types and zero points of a layer of integers: of i8 without any, unless a schedule says
        otherwise. Most know nothing of zero points, so they must be kept from them.
        """
        return spec.is_plainly_quantised

    @abstractmethod
    def applies(self, spec: ConvSpec, target: Target) -> None:
        """Raise :class:`Inapplicable` with the reason where the algorithm does not apply; see :meth:`check`."""

    @abstractmethod
    def space(self, spec: ConvSpec, target: Target) -> Space:
        """The domains of all picks, including those that change the program's structure, such as a packing width."""

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:  # noqa: B027
        """Raise :class:`Inapplicable` with the reason where a point cannot or must not be built."""

    @abstractmethod
    def default(self, spec: ConvSpec, target: Target) -> Picks:
        """The zero-trial answer, in constant time, always valid."""

    @abstractmethod
    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        """The tensor expressions; structure may depend on the picks."""

    def instructions(self, spec: ConvSpec) -> tuple[str, ...]:
        """Features of CPUs, of :data:`~convgen.hardware.isa.WRITTEN`, whose instructions its code has: a kernel asks
        for them.
        """
        return ()

    def maps(self, spec: ConvSpec, picks: Picks) -> dict[str, TensorMap]:
        """What a GPU's copy engine reads, by the names of :class:`~convgen.lowering.interface.Launch`."""
        return {}

    def persistent(self, spec: ConvSpec, picks: Picks) -> Persistent | None:
        """How blocks of a GPU take one tile after another, where they do."""
        return None

    def plain_points(self, spec: ConvSpec, target: Target) -> Iterator[Picks]:
        """Points whose code has one part each that others do without, and one that has none: what a device is checked
        with besides the default, so that a part that is wrong is known from the others.
        """
        return iter(())

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        """What rounding errors of this point are relative to: for sums in any order, the products' absolute values.

        A schedule that ``transforms`` says here what it adds before it multiplies.

        Args:
            src, weights: absolute values, f32, of the shapes that ``spec`` says, with its layout.

        Returns:
            a convolution with as many outputs as ``spec`` has, in the same order.
        """
        return Magnitudes(spec, src, weights)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        """Predicted seconds of the default, to rank schedules when nothing was measured."""
        return math.inf

    def repacked(self, spec: ConvSpec, target: Target) -> tuple[Picks, float]:
        """The default of weights that are packed at every call, as training does, and its predicted seconds. Without
        those of a copy of the weights, which any schedule packs: what a schedule packs beside that, it adds here.
        """
        return self.default(spec, target), self.cost(spec, target)

    # ---- shared -------------------------------------------------------------------------------

    def check(self, spec: ConvSpec, target: Target) -> None:
        """Raise :class:`Inapplicable` with the reason where the schedule does not apply, or is not exact for i8."""
        require(spec.direction in self.directions, f"needs a direction among {', '.join(self.directions)}")
        layouts = f"does not know src as {spec.layout} with dst as {spec.dst_layout}"
        require(self.takes_layouts(spec.layout, spec.dst_layout), layouts)
        require(spec.is_quantised or not self.only_integers, "needs a layer of integers")
        require(not self.transforms or spec.accuracy != "strict", "transforms, which accuracy strict does not admit")
        require(
            not spec.is_quantised or self.takes_integers(spec), "does not know such types and zero points of integers"
        )
        self.applies(spec, target)
        if spec.dtype == "i8" and not self.sums_integers:
            require(not self.transforms, "its transform is not exact for i8")
            length, types = spec.reduction_length, (spec.src_dtype, spec.weights_dtype)
            most = EXACT // math.prod(max(-RANGES[dtype][0], RANGES[dtype][1]) for dtype in types)
            what = "i8" if set(types) == {"i8"} else " by ".join(types)
            require(length <= most, f"sums in f32, exact for {most} products of {what}; there are {length}")

    def reason_against(self, spec: ConvSpec, target: Target, picks: Picks | None = None) -> str | None:
        """Why the schedule (or one point of it) does not apply; None where it does."""
        try:
            self.check(spec, target)
            if picks is not None:
                require(picks in self.space(spec, target), f"{picks} is not in the space")
                self.valid(spec, target, picks)
        except Inapplicable as error:
            return str(error)
        return None


class Scheduled(Schedule):
    """A schedule that says what is computed as tensor expressions, and how by TIR's primitives."""

    @abstractmethod
    def apply(self, sch: TirSchedule, spec: ConvSpec, target: Target, picks: Picks) -> None:
        """Schedule the ``main`` function in place."""


class Written(Schedule):
    """A schedule that places every statement itself: what its program says of ``main`` is final."""


@dataclass(frozen=True)
class Candidate:
    """A schedule and one point of its space."""

    schedule: Schedule
    picks: Picks

    def is_exact(self, spec: ConvSpec) -> bool:
        """Whether integer-valued data must match bit for bit."""
        return spec.dtype == "i8" or not self.schedule.transforms

    def __str__(self) -> str:
        return f"{self.schedule.id}({self.picks})"
