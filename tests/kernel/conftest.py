"""Fixtures of this folder."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_cuda import (
    DEVICE,
    SPEC,
    STRICT,
    Fake,
    compile_cuda,
)
from paths import SUPPORT

from convgen.kernel.cuda_library import CudaLibrary
from convgen.lowering.link import link


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Iterator[Fake]:
    """The driver that all libraries of this module find."""
    path = folder / "libcuda.so.1"
    source = SUPPORT / "fake_cuda_driver.c"
    command = ["cc", *STRICT, "-O1", "-fPIC", "-shared", "-pthread", "-o", str(path), str(source)]
    subprocess.run(command, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVGEN_CUDA_DRIVER", str(path))
        yield Fake(path)


@pytest.fixture
def fake(loaded: Fake) -> Iterator[Fake]:
    loaded.reset()
    yield loaded
    loaded.reset()


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    interface, object_file = compile_cuda(SPEC, folder, DEVICE)
    return link(interface, object_file, folder / "libkernel.so")


@pytest.fixture
def library(fake: Fake, path: Path) -> Iterator[CudaLibrary]:
    made = CudaLibrary(path, SPEC, "kernel")
    yield made
    fake.reset()
    for number in (0, 1):
        made.unload(number)
