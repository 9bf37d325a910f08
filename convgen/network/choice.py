"""What a network is compiled for, and with which kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import SpecError, UnsupportedError, meant
from ..hardware.target import Target, check_threads, resolve
from ..lowering.schedule import Candidate
from ..problem.spec import ConvSpec
from ..problem.tokens import ACCURACIES, NETWORK_ACCURACIES
from ..records.answer import choose, find_record
from ..records.opening import Records, open_store

#: The candidate of a convolution; None where nothing better than the default is known.
Choose = Callable[[ConvSpec], Candidate | None]


def network_target(target: str | Target, threads: int | None, *, on_device: bool = False) -> tuple[Target, int]:
    """The target of a network, and its threads: all cores where None.

    Args:
        on_device: whether it may be a GPU.

    Raises:
        UnsupportedError: it is a GPU and may be none.
        SpecError: a wrong number of threads.
    """
    resolved = resolve(target)
    if resolved.on_device and not on_device:
        raise UnsupportedError(f"{resolved}: expected a CPU: for a GPU models are compiled to a library, no more")
    threads = check_threads(threads, resolved)
    return resolved.on(threads), threads


def check_accuracy(accuracy: object, field: str = "accuracy", *, on_device: bool = False) -> None:
    """Raise SpecError unless an accuracy is one that networks have on a CPU, or on a GPU."""
    known = NETWORK_ACCURACIES if on_device else ACCURACIES
    if accuracy in known:
        return
    where = " for a CPU" if accuracy in NETWORK_ACCURACIES else ""
    found = f"{accuracy!r}{meant(str(accuracy), known)}"
    raise SpecError(field, f"one of {', '.join(known)}{where}", found)


def check_strips(strips: object) -> None:
    """Raise SpecError unless strips have a number of rows, 0 or more, or None."""
    if strips is not None and (isinstance(strips, bool) or not isinstance(strips, int) or strips < 0):
        raise SpecError("strips", "an integer >= 0, or None", repr(strips))


@contextmanager
def recorded_choice(records: Records, target: Target, threads: int) -> Iterator[Choose]:
    """The candidates that a store's records say are better than the defaults, while it is open."""
    with open_store(records, write=False) as store:

        def recorded(spec: ConvSpec) -> Candidate | None:
            if store is None or not target.native:
                return None
            answer = find_record(store, spec, target, threads)
            candidate, record = choose(spec, target, answer.record, answer.rejected)
            return candidate if record or answer.rejected else None

        yield recorded
