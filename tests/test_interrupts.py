"""Ctrl-C is held where it must not raise, and never lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from convgen.interrupts import interrupts_blocked, interrupts_held


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_held_until_the_end() -> None:
    seen = []

    def work() -> None:
        with interrupts_held() as interrupts:
            seen.append(interrupts.came)
            press()
            seen.append(interrupts.came)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == [False, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("pressed", "error"), [(True, KeyboardInterrupt), (False, RuntimeError)])
def test_it_comes_before_what_else_was_raised(pressed: bool, error: type[BaseException]) -> None:
    @interrupts_held()
    def work() -> None:
        if pressed:
            press()
        raise RuntimeError("what TVM makes of it")

    with pytest.raises(error):
        work()


def test_the_outermost_block_holds() -> None:
    steps = []

    def work() -> None:
        with interrupts_held():
            with interrupts_held():
                press()
            steps.append("after the inner block")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["after the inner block"]


def test_other_handlers_and_threads_are_left_alone() -> None:
    seen: list[str | bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("own"))
    try:
        with interrupts_held():
            press()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["own"]

    def work() -> None:
        with interrupts_held() as interrupts:
            seen.append(interrupts.came)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["own", False]


def test_processes_started_while_blocked_never_see_one() -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
    with interrupts_blocked():
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
