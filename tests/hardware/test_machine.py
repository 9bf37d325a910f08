"""Facts about machines: read from the system's own words, and measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from convgen.errors import BuildError, MeasureError
from convgen.hardware import machine as module
from convgen.hardware.machine import Machine, machine, measured, measured_bandwidth, measured_peak, pinned
from convgen.hardware.target import resolve

X86 = """\
processor\t: {cpu}
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8480+
stepping\t: 8
cpu MHz\t\t: 2000.{cpu}
flags\t\t: fpu sse ssse3 fma sse4_1 sse4_2 avx avx2 avx512f avx512_vnni avx512_vbmi2 avx_vnni amx_tile bmi1 bmi2 nopl
"""
ARM = """\
processor\t: {cpu}
BogoMIPS\t: 50.00
Features\t: fp asimd {features}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: {part}
CPU revision\t: 1
"""


def detect(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> Machine:
    (folder / "cpuinfo").write_text(text)
    monkeypatch.setattr(module, "_CPUINFO", folder / "cpuinfo")
    return Machine.detect()


def test_x86(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = detect(monkeypatch, tmp_path, "\n".join(X86.format(cpu=cpu) for cpu in range(2)))
    assert found.cpu == "Intel(R) Xeon(R) Platinum 8480+"
    assert found.fingerprint.startswith("GenuineIntel-6-143-8-")
    assert {
        "sse4.1",
        "sse4.2",
        "fma",
        "avx512vnni",
        "avx512vbmi2",
        "avxvnni",
        "amx-tile",
        "bmi",
        "bmi2",
    } <= found.features


def test_the_fingerprint_is_of_the_model_and_what_it_can_compute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = X86.format(cpu=0)
    first = detect(monkeypatch, tmp_path, text).fingerprint
    same = text.replace("2000", "3100").replace("nopl", "nopl some_new_kernel_word")
    assert detect(monkeypatch, tmp_path, same).fingerprint == first
    for other in (
        text.replace("143", "207"),
        text.replace("avx512f ", ""),
        text.replace("stepping\t: 8", "stepping\t: 7"),
    ):
        assert detect(monkeypatch, tmp_path, other).fingerprint != first
    monkeypatch.setattr(os, "cpu_count", lambda: 999)
    assert detect(monkeypatch, tmp_path, text).fingerprint != first


def test_arm_with_cores_of_two_kinds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    big, little = (
        ARM.format(cpu=cpu, features=features, part=part)
        for cpu, features, part in ((0, "sve", "0xd0c"), (1, "", "0xd05"))
    )
    found = detect(monkeypatch, tmp_path, big + "\n" + little)
    assert found.fingerprint.startswith("0x41-0xd05-0x3-1+0x41-0xd0c-0x3-1-")
    assert found.features == {"fp", "asimd"}
    swapped = detect(monkeypatch, tmp_path, little + "\n" + big)
    assert swapped.fingerprint == found.fingerprint
    assert detect(monkeypatch, tmp_path, big).features == {"fp", "asimd", "sve"}


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(module, "_SYSFS", tmp_path / "none")
    found = Machine.detect()
    assert found.fingerprint
    assert (found.features, found.l1, found.l2, found.l3) == (frozenset(), None, None, None)
    assert found.cores == found.logical >= 1


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def test_caches_and_cores(tmp_path: Path) -> None:
    cache = tmp_path / "cpu0" / "cache"
    write(cache / "index0", level="1", type="Data", size="48K")
    write(cache / "index1", level="1", type="Instruction", size="32K")
    write(cache / "index2", level="2", type="Unified", size="2M")
    write(cache / "index3", level="3", type="Unified")  # some virtual machines leave the size out
    assert module._caches(cache) == {1: 48 << 10, 2: 2 << 20}
    for cpu, siblings in ((0, "0,2"), (1, "1,3"), (2, "0,2"), (3, "1,3")):
        write(tmp_path / f"cpu{cpu}" / "topology", thread_siblings_list=siblings)
    assert [module._physical(usable, tmp_path) for usable in ({0, 1, 2, 3}, {0, 2}, {0, 9}, {1})] == [2, 1, 2, 1]


def test_this_machine() -> None:
    here = machine()
    assert here is machine()
    assert 1 <= here.cores <= here.logical == len(os.sched_getaffinity(0))
    assert here.memory > 1 << 28
    assert here.l1 is None or 1 << 12 < here.l1 < 1 << 24
    code = (
        "import sys; from convgen.hardware.machine import machine; print(machine().fingerprint, 'tvm' in sys.modules)"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert again == [here.fingerprint, "False"]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "convgen" / "machine"


def test_other_programs_take_nothing_from_what_is_measured(cache: Path) -> None:
    """Three of them share the CPU meanwhile: of the wall's time a quarter is left."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        alone = measured(1).peak
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
        try:
            assert measured(1, refresh=True).peak > 0.6 * alone
        finally:
            for other in others:
                other.kill()
                other.wait()
    finally:
        os.sched_setaffinity(0, cpus)


def test_what_is_measured_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured(1)
    assert measured_peak(1) == first.peak > 1e8
    assert measured_bandwidth(1) == first.dram > 1e7
    isa = set(resolve().isa)
    assert (first.peak_i8 is not None) == bool(isa & {"avx512vnni", "avxvnni", "avx512bw", "avx2", "asimddp"})
    assert (first.peak_bf16 is not None) == ("avx512bf16" in isa)
    (path,) = cache.iterdir()
    assert json.loads(path.read_text())["fingerprint"] == machine().fingerprint

    other = replace(first, peak=1.5e9)
    monkeypatch.setattr(module, "_measure", lambda here, threads: other)
    assert measured(1) == first
    assert measured(1, refresh=True) == other
    assert measured_peak(1) == 1.5e9
    for text in ("", "[]", "{", '{"peak": 0}', path.read_text().replace("1500000000.0", '"fast"')):
        path.write_text(text)
        assert measured(1) == other


def test_more_threads_than_cpus_are_one_per_cpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(here: Machine, threads: int) -> module.Measured:
        asked.append(threads)
        return module.Measured(1e9, None, None, 1e9, "")

    monkeypatch.setattr(module, "_measure", measure)
    measured(10_000)
    assert asked == [machine().logical]


def test_a_cache_that_cannot_be_written_is_done_without(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "convgen").touch()
    made = module.Measured(1e9, None, None, 1e9, "")
    monkeypatch.setattr(module, "_measure", lambda here, threads: made)
    assert measured(1) == made


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler(compiler: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(BuildError, match=compiler):
        measured(1)
    assert not cache.exists()


def test_a_program_that_fails(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "machine"
    monkeypatch.setattr(module, "_compile", lambda folder: program)
    with pytest.raises(MeasureError, match="No such file"):
        measured(1)
    for script in ("exit 1", "echo peak", "echo peak 1"):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        with pytest.raises(MeasureError, match="with 1 threads failed"):
            measured(1)


def test_wrong_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (0, True, 1.0, "2"):
        with pytest.raises(MeasureError, match="threads: expected"):
            measured(threads)  # type: ignore[arg-type]
    with pytest.raises(MeasureError, match="level: expected one of l2, l3, dram, found 'l4'"):
        measured_bandwidth(1, "l4")
    monkeypatch.setattr(module, "_measure", lambda here, threads: module.Measured(1e9, None, None, 1e9, ""))
    with pytest.raises(MeasureError, match="level: expected a cache whose size the system tells, found l3"):
        measured_bandwidth(1, "l3")


def test_buffers_lie_where_they_should() -> None:
    here = replace(machine(), l2=1 << 20, l3=32 << 20)
    for threads in (1, 2, 8):
        sizes = module._buffers(here, threads)
        assert sizes["l2"] <= 1 << 19
        assert 1 << 20 < sizes["l3"] <= 16 << 20
        assert threads * sizes["dram"] >= 64 << 20
    assert set(module._buffers(replace(here, l3=None), 1)) == {"l2", "dram"}
    assert set(module._buffers(replace(here, l2=None), 1)) == {"dram"}


# ---- CPUs of one's own ---------------------------------------------------------------------------


def test_processes_that_measure_have_different_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
import os, sys
from convgen.hardware.machine import pinned
with pinned(1):
    print(*os.sched_getaffinity(0), flush=True)
    sys.stdin.read()
"""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    with start() as one, start() as other:
        found = []
        for process in (one, other):
            assert process.stdout
            found.append(process.stdout.readline().split())
        for process in (one, other):
            assert process.stdin
            process.stdin.close()
    assert sorted(len(cpus) for cpus in found) == [1, 1]
    assert found[0] != found[1]
    assert [path.name for path in tmp_path.iterdir()] == [f"convgen-cpus-{os.getuid()}"]


@pytest.mark.parametrize("kind", ["a link to a folder", "a folder that others may write", "a file", "a link in it"])
def test_what_another_user_puts_in_the_shared_folder_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """CPUs are shared then, and the file that was to be emptied keeps its content."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    folder, victim = tmp_path / f"convgen-cpus-{os.getuid()}", tmp_path / "victim"
    victim.write_text("precious")
    if kind == "a link to a folder":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    elif kind == "a file":
        folder.symlink_to(victim)
    else:
        folder.mkdir(mode=0o700)
        for cpu in os.sched_getaffinity(0):
            (folder / str(cpu)).symlink_to(victim)
        if kind == "a folder that others may write":
            folder.chmod(0o777)
    with pinned(1):
        assert victim.read_text() == "precious"
    assert victim.read_text() == "precious"
    assert not (tmp_path / "theirs").exists() or not any((tmp_path / "theirs").iterdir())
