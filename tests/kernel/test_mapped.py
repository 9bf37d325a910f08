"""Libraries are unmapped when nothing uses them, and never before."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import SPEC as DEVICE_SPEC
from fake_cuda import Fake
from naive import convolve, link_naive, operands

import convgen
from convgen.kernel.cuda_library import CudaLibrary
from convgen.kernel.kernel import CpuKernel
from convgen.kernel.library import Library
from convgen.problem.spec import ConvSpec

SPEC = ConvSpec.parse("conv2d n2 ic3 oc5 i20x20 k3x3 p1 relu")


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_naive(SPEC, tmp_path_factory.mktemp("mapped"), "shared")[1]


def mapped(path: Path) -> int:
    """How many maps of a file this process has."""
    return Path("/proc/self/maps").read_text().count(f" {path.resolve()}\n")


def folders_maps(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f" {folder.resolve()}/")


def test_what_dozens_of_libraries_take_is_given_back(linked: Path, tmp_path: Path) -> None:
    given = operands(SPEC)
    expected = convolve(SPEC, given)
    before = len(os.listdir("/proc/self/fd"))
    layers = []
    for index in range(50):
        path = Path(shutil.copy(linked, tmp_path / f"lib{index}.so"))
        layers.append(Library(path, SPEC, SPEC.name, 1 + index % 2).bind(given["weights"], given["bias"]))
        np.testing.assert_array_equal(layers[-1](given["src"]), expected)
    assert folders_maps(tmp_path) >= 50 * 3  # code, constants, data
    del layers
    gc.collect()
    assert folders_maps(tmp_path) == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_kernel_gives_back_its_maps_and_its_folder() -> None:
    text = "conv1d n1 ic1 oc1 i9 k3"
    kernel = convgen.build(text, records=False)
    assert isinstance(kernel, CpuKernel)
    path, folder = kernel.path, kernel.path.parent
    x, weights, bias = np.ones((1, 1, 9), np.float32), np.ones((1, 1, 3), np.float32), np.zeros(1, np.float32)
    layer = kernel.bind(weights, bias)
    call = kernel.prepare(x, layer.packed, out := np.empty((1, 1, 7), np.float32))
    del kernel
    gc.collect()
    assert mapped(path)
    assert layer(x).tolist() == [[[3.0] * 7]]
    del layer
    gc.collect()
    assert mapped(path)
    call()
    assert out.tolist() == [[[3.0] * 7]]
    del call
    gc.collect()
    assert not mapped(path)
    assert not folder.exists()


def test_threads_outlive_the_library_that_made_them_and_end_with_the_last_user(linked: Path, tmp_path: Path) -> None:
    """A pool's threads run code of the library that made them, whichever library uses them."""
    given = operands(SPEC)
    first, second = (Path(shutil.copy(linked, tmp_path / f"lib{name}.so")) for name in ("first", "second"))
    gc.collect()
    before = len(os.listdir("/proc/self/task"))
    maker = Library(first, SPEC, SPEC.name, 7).bind(given["weights"], given["bias"])
    maker(given["src"])
    user = Library(second, SPEC, SPEC.name, 7).bind(given["weights"], given["bias"])
    np.testing.assert_array_equal(user(given["src"]), convolve(SPEC, given))
    del maker
    gc.collect()
    assert mapped(first)
    assert len(os.listdir("/proc/self/task")) == before + 6
    np.testing.assert_array_equal(user(given["src"]), convolve(SPEC, given))
    del user
    gc.collect()
    assert not mapped(first)
    assert not mapped(second)
    assert len(os.listdir("/proc/self/task")) == before


def test_a_library_stays_while_a_thread_is_in_it(linked: Path, tmp_path: Path) -> None:
    """Threads that call layers of their own, which others drop meanwhile and make anew."""
    given = operands(SPEC)
    expected, wrong = convolve(SPEC, given), []
    paths = [Path(shutil.copy(linked, tmp_path / f"lib{index}.so")) for index in range(3)]

    def work(index: int) -> None:
        for repeat in range(40):
            path = paths[(index + repeat) % 3]
            layer = Library(path, SPEC, SPEC.name, 1 + repeat % 4).bind(given["weights"], given["bias"])
            if not np.array_equal(layer(given["src"]), expected):
                wrong.append((index, repeat))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
    assert folders_maps(tmp_path) == 0


def test_a_replaced_file_is_loaded_anew_whatever_was_unloaded_before(linked: Path, tmp_path: Path) -> None:
    other = ConvSpec.parse("conv2d n1 ic2 oc2 i5x5 k1x1")
    path = Path(shutil.copy(linked, tmp_path / "lib.so"))
    old = Library(path, SPEC, SPEC.name, 1)
    os.replace(link_naive(other, tmp_path, "reference")[1], path)
    assert Library(path, other, other.name, 1).version != old.version  # while the old one is in use
    del old
    gc.collect()
    new = Library(path, other, other.name, 1)
    assert other.descriptor in new.version
    assert mapped(path)


def test_code_on_devices_is_given_back(fake: Fake, path: Path) -> None:
    made = CudaLibrary(path, DEVICE_SPEC, "kernel")
    made.load()
    assert mapped(path)
    del made
    gc.collect()
    loads, unloads = (sum(line.startswith(word) for line in fake.log) for word in ("load", "unload"))
    assert loads == unloads == 1
    assert not mapped(path)
