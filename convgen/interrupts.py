"""Ctrl-C where it must not raise: inside TVM.

A KeyboardInterrupt that crosses TVM comes out as a RuntimeError, which would be taken for a failure
of the candidate at hand. So it is held back there, and raised at the end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Interrupts:
    """Whether one ``came`` since the block began."""

    came: bool = False


@contextmanager
def interrupts_held() -> Iterator[Interrupts]:
    """Hold back KeyboardInterrupt until the end of the block; long work in it looks at ``came``.

    Blocks may be nested: the outermost one holds. Only Python's own handler is replaced, and only
    the main thread can do so.
    """
    held = Interrupts()
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield held
        return

    def note(number: int, frame: object) -> None:
        held.came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if held.came:
            raise KeyboardInterrupt


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Start threads and processes that never see an interrupt: they inherit the signals blocked here."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
