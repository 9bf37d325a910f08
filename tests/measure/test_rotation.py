"""Weights that rotate: as many copies as the last cache cannot hold, and the same result from each."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

import convgen
from convgen.check.data import float_data
from convgen.kernel.library import Library
from convgen.measure import rotation
from convgen.measure.rotation import rotating
from convgen.measure.standalone import devices
from convgen.measure.standalone.interface import aligned
from convgen.measure.standalone.rotation import MOST_BYTES, MOST_COPIES, copies_of
from convgen.problem.spec import ConvSpec

SPEC = ConvSpec.parse("conv2d n1 ic16 oc16 i5x6 k3x3 p1x1 residual relu")


def test_copies_are_more_than_the_last_cache_holds() -> None:
    for size in (1 << 18, 1 << 20, 5 << 20, 100 << 20):
        copies = copies_of(size, 32 << 20)
        assert (copies - 1) * size < 64 << 20 <= copies * size
    assert copies_of(1, 32 << 20) == copies_of(0, 32 << 20) == MOST_COPIES
    assert copies_of(64 << 20, 4 << 30) * (64 << 20) == MOST_BYTES
    assert copies_of(1 << 20, 0) > 1  # where the system does not tell


@pytest.mark.parametrize("threads", [1, 2])
def test_every_call_reads_the_next_copy_and_computes_the_same(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "copies_of", lambda size, cache: 3)
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


def test_calls_of_a_bundle_rotate_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = convgen.build(SPEC, threads=1, records=False)
    assert isinstance(kernel, Library)
    data, other = float_data(SPEC, 0), float_data(SPEC, 1)
    parameters = {name: other[name] for name in SPEC.parameters}
    expected = np.empty(SPEC.dst_shape, np.float32)
    kernel.run(data["src"], kernel.pack(**{name: data[name] for name in SPEC.parameters}), expected, data["residual"])
    changed, taken = kernel.pack(**parameters), list[tuple[int, ctypes.c_void_p]]()

    def recorded(size: int) -> ctypes.c_void_p:
        taken.append((size, aligned(size)))
        return taken[-1][1]

    monkeypatch.setattr(devices, "copies_of", lambda size, cache: 3)
    monkeypatch.setattr(devices, "aligned", recorded)
    for name, array in data.items():
        (tmp_path / name).write_bytes(array.tobytes())
    device = devices.Cpu(str(tmp_path), {"data": {name: name for name in data}}, str(kernel.path), 1)
    call, output = device.prepare({"library": str(kernel.path), "name": kernel.name, "target": "cpu"})
    copies = [place for size, place in taken if size == changed.size]
    assert len(copies) == 3
    ctypes.memmove(copies[1], changed.ctypes.data, changed.size)
    same = []
    for _ in range(6):
        call()
        same.append(bytes(output()) == expected.tobytes())
    assert same == [True, False, True, True, False, True]
