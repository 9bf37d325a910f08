"""Weights that rotate: as many copies as the last cache cannot hold, and the same result from each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import convgen
from convgen.check.data import float_data
from convgen.hardware.machine import machine
from convgen.kernel.library import Library
from convgen.measure import rotation
from convgen.measure.rotation import MOST_BYTES, MOST_COPIES, copies_of, rotating
from convgen.problem.spec import ConvSpec

SPEC = ConvSpec.parse("conv2d n1 ic16 oc16 i5x6 k3x3 p1x1 residual relu")


def last_cache(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """This machine as if its last cache had so many bytes."""
    other = replace(machine(), l3=size)
    monkeypatch.setattr(rotation, "machine", lambda: other)


def test_copies_are_more_than_the_last_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    last_cache(monkeypatch, 32 << 20)
    for size in (1 << 18, 1 << 20, 5 << 20, 100 << 20):
        assert (copies_of(size) - 1) * size < 64 << 20 <= copies_of(size) * size
    assert copies_of(1) == copies_of(0) == MOST_COPIES
    last_cache(monkeypatch, 4 << 30)
    assert copies_of(64 << 20) * (64 << 20) == MOST_BYTES


def test_a_machine_whose_caches_are_not_known_has_copies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    last_cache(monkeypatch, 0)
    assert copies_of(1 << 20) > 1


@pytest.mark.parametrize("threads", [1, 2])
def test_every_call_reads_the_next_copy_and_computes_the_same(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "copies_of", lambda size: 3)
    kernel = convgen.build(SPEC, threads=threads, records=False)
    assert isinstance(kernel, Library)
    taken, prepare = [], kernel.prepare

    def prepared(src: object, packed: rotation.Bytes, *rest: object) -> object:
        taken.append(packed)
        return prepare(src, packed, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel, "prepare", prepared)
    data, other = float_data(SPEC, 0), float_data(SPEC, 1)
    packed, changed = (kernel.pack(**{name: given[name] for name in SPEC.parameters}) for given in (data, other))
    expected, dst = np.empty(SPEC.dst_shape, np.float32), np.empty(SPEC.dst_shape, np.float32)
    kernel.run(data["src"], packed, expected, data["residual"])
    call = rotating(kernel, data["src"], packed, dst, data["residual"], threads)
    assert len({copy.ctypes.data for copy in taken}) == 3
    for _ in range(7):
        dst.fill(np.nan)
        call()
        np.testing.assert_array_equal(dst, expected)
    taken[1][:] = changed  # every third call sees it
    seen = []
    for _ in range(6):
        call()
        seen.append(bool((dst == expected).all()))
    assert sorted(seen) == [False, False, True, True, True, True]
    assert seen[:3] == seen[3:]
