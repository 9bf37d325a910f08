"""A real network, SqueezeNet, the ways that it is used: as the guide to C has it, from programs with threads of their
own, by several processes at once, and inside ONNX Runtime.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bench_module import load_bench
from network_models import furthest
from paths import ROOT, SUPPORT

import convgen
from convgen.measure.network_model import NetworkModel
from convgen.network.network import Network

pytestmark = pytest.mark.timeout(900)

NAME = "light_squeezenet"
#: What outputs may differ by, relative to the largest element.
ERROR = 2e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NetworkModel:
    """With random weights."""
    made: NetworkModel = load_bench("networks").network_model(NAME, tmp_path_factory.mktemp("model"))
    return made


@pytest.fixture(scope="module")
def network(model: NetworkModel) -> Network:
    made = convgen.compile(model.path, threads=2, records=False, name="net")
    assert isinstance(made, Network)
    return made


@pytest.fixture(scope="module")
def folder(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "net"
    network.export(out)
    return out


def run(*command: object, **options: Any) -> str:
    words = [*map(str, command)]
    done: subprocess.CompletedProcess[str] = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_element_is_within_its_bound_between_guard_pages(
    network: Network, folder: Path, model: NetworkModel
) -> None:
    report = network.validate(model.path)
    report.raise_if_failed()
    assert 0 < report.worst_error < 1
    found = {check.name: check.found for check in report.checks}
    assert list(found) == ["places", "memory", "threads", "float"]
    assert found["memory"].startswith("6 runs between guard pages")
    convgen.validate_folder(folder, model.path).raise_if_failed()


# ---- from C --------------------------------------------------------------------------------------


def test_what_the_guide_to_c_says(folder: Path) -> None:
    text = (ROOT / "docs" / "guide-c.md").read_text(encoding="utf-8")
    ((building, running, said),) = re.findall(r"^cd net\n(cc .*)\n(\S+) +# (net: .*)$", text, re.MULTILINE)
    run(*building.split(), cwd=folder)
    assert run(running, cwd=folder) == f"{said}\n"


LINKED = {
    "shared": [["--cflags", "--libs"]],
    "archive": [["--cflags"], ["--variable=archive"]],
}


@pytest.fixture(scope="module", params=LINKED)
def program(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with threads of its own, built with what pkg-config says."""
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    asked, path = LINKED[request.param], tmp_path_factory.mktemp("program") / "own_threads"
    where = {"PKG_CONFIG_PATH": str(folder)}
    flags = [word for words in asked for word in run("pkg-config", *words, "net", env=where).split()]
    flags += ["-lm", "-lpthread"] if request.param == "archive" else [f"-Wl,-rpath,{folder}"]
    run("cc", "-std=c11", "-O1", "-Wall", "-Werror", SUPPORT / "own_threads.c", *flags, "-pthread", "-o", path)
    assert run("pkg-config", "--variable=weights", "net", env=where).strip() == f"{folder}/net.weights"
    needed = re.findall(r"NEEDED +(\S+)", run("objdump", "-p", path))
    assert ("libnet.so" in needed) == (request.param == "shared")
    return path


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_programs_own_threads_compute_the_same(program: Path, folder: Path, threads: int) -> None:
    """Each part of each loop runs on one of these, and outputs are those of the library's own threads to the bit."""
    said = run(program, folder, threads, 2, stdin=subprocess.DEVNULL)
    loops, elsewhere = map(int, re.findall(r"\d+", said))
    assert loops > 2 * 26 * (threads > 1)
    assert elsewhere == (loops * threads if threads > 1 else 0)


@contextmanager
def waiting(program: Path, folder: Path) -> Iterator[tuple[int, str]]:
    """A process that has run the network and has its weights open; and what it said."""
    command = [str(program), str(folder), "1", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline()
    assert process.returncode == 0


def mapped(pid: int, path: Path) -> dict[str, int]:
    """How many KiB of a file a process has mapped, and how: from what the system counts."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    (found,) = [one for one in maps if one.partition("\n")[0].endswith(f" {path}")]
    assert found.split()[1] == "r--s"
    return {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB", found, re.MULTILINE)}


def test_processes_share_the_weights(program: Path, folder: Path) -> None:
    weights = folder / "net.weights"
    with waiting(program, folder) as (first, said), waiting(program, folder) as (second, too):
        assert said == too
        for pid in (first, second):
            sizes = mapped(pid, weights.resolve())
            assert sizes["Rss"] * 1024 >= weights.stat().st_size
            assert sizes["Pss"] <= sizes["Rss"] / 2 + 1  # each page is at least two processes'
            assert sizes["Private_Dirty"] == sizes["Anonymous"] == 0


def test_the_library_needs_the_systems_libraries_alone(folder: Path) -> None:
    if shutil.which("ldd") is None:
        pytest.skip("ldd is not installed")
    said = run("ldd", folder / "libnet.so")
    names = {Path(line.split()[0]).name.partition(".so")[0] for line in said.splitlines()}
    assert "libc" in names or "musl" in said
    loaders = {name for name in names if name.startswith(("ld-", "linux-vdso", "linux-gate"))}
    assert names - loaders <= {"libc", "libm", "libpthread"}
    needed = set(re.findall(r"NEEDED +(\S+?)\.so", run("objdump", "-p", folder / "libnet.so")))
    assert {name for name in needed if not name.startswith("ld-")} <= {"libc", "libm", "libpthread"}


# ---- inside ONNX Runtime -------------------------------------------------------------------------


def test_inside_onnx_runtime(network: Network, model: NetworkModel, tmp_path: Path) -> None:
    """One node, beside ONNX Runtime alone; to the bit what the network gives, on any number of threads."""
    made = convgen.for_onnxruntime(model.path, tmp_path / "bridged.onnx", threads=2, records=False)
    assert (len(made.parts), made.outside) == (1, {})
    (output,) = model.expected
    wanted = network(*model.inputs.values())
    for threads in (1, 2, 3):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.register_custom_ops_library(str(made.library))
        session = onnxruntime.InferenceSession(str(made.model), options, providers=["CPUExecutionProvider"])
        (found,) = session.run([output], model.inputs)
        assert found.tobytes() == wanted.tobytes()
    assert furthest(wanted, model.expected) < ERROR
    assert np.std(wanted) > 0.01 * np.abs(wanted).max()
