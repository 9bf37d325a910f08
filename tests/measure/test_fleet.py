"""Measuring on devices: a tracker, servers and a runner as real processes on the loopback interface."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted
import psutil
import pytest
from click.testing import CliRunner
from fleets import KEY, LONG, Fleet, free_port, until

from convgen import folders
from convgen.cli import cli
from convgen.errors import MeasureError, SpecError
from convgen.hardware.machine import machine
from convgen.hardware.target import resolve
from convgen.lowering.link import link
from convgen.measure import fleet
from convgen.measure.fleet import Devices, RemoteRunner, is_loopback, parse_address, status
from convgen.measure.fleet import device as fleet_device
from convgen.measure.fleet import remote as fleet_remote
from convgen.measure.trial import Expected
from convgen.records.outcome import INTERRUPTED, Result


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two of them, called a and b."""
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    (temporary := made.folder / "temporary").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        made.serve("a")
        made.serve("b")
    try:
        made.wait_for(2)
        yield made
    finally:
        made.close()


pytest.importorskip("tornado", reason="TVM's tracker needs tornado")


@pytest.fixture(scope="module")
def runner(devices: Fleet) -> Iterator[RemoteRunner]:
    made = RemoteRunner(devices.tracker, KEY, timeout=20.0, patience=LONG)
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return Expected(planted.SPEC, tmp_path_factory.mktemp("expected"), 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


def artifact(root: Path, before: str = "", store: str = "t.dst[at] = v") -> str:
    """A candidate in C that does this before it computes, and stores its results so."""
    folder = Path(tempfile.mkdtemp(dir=root))
    source = planted.SOURCE.replace("#include <math.h>", "#include <math.h>\n#include <signal.h>\n#include <unistd.h>")
    object_file = planted.compile_c(source.format(store=store, before=before), folder / "kernel.o")
    library = link(planted.interface(), object_file, folder / "libplanted.so")
    facts = {"spec": planted.SPEC.descriptor, "name": "planted", "exact": True}
    (folder / "candidate.json").write_text(json.dumps(facts))
    return str(library)


# ---- addresses --------------------------------------------------------------------------------


def test_addresses() -> None:
    assert parse_address("tracker", "host:9190") == ("host", 9190)
    assert parse_address("tracker", "[::1]:9190") == ("::1", 9190)
    for text in ("", "host", ":9190", "host:", "host:0", "host:65536", "host:x", "host:-1", "host:٣"):
        with pytest.raises(SpecError, match="tracker: expected HOST:PORT"):
            parse_address("tracker", text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("", False)],
)
def test_what_listens_here_only(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_listening_elsewhere_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "run_tracker", lambda *_: None)
    monkeypatch.setattr(fleet, "serve", lambda *_, **__: None)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for words in (["tracker"], ["serve", "--tracker", "h:1", "--key", "k"]):
            unsafe = CliRunner().invoke(cli, ["fleet", *words, "--host", "0.0.0.0"])
            assert (unsafe.exit_code, "no authentication" in unsafe.stderr) == (0, True)
            assert "no authentication" not in CliRunner().invoke(cli, ["fleet", *words]).stderr
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_a_server_needs_a_tracker_or_a_proxy_and_a_key() -> None:
    for tracker, proxy in ((None, None), ("h:1", "h:1")):
        with pytest.raises(SpecError, match="either a tracker or a proxy"):
            fleet.serve(tracker, "k", proxy=proxy)
    with pytest.raises(SpecError, match="key: expected a word"):
        fleet.serve("h:1", "a b")


# ---- trackers ---------------------------------------------------------------------------------


def test_no_tracker_is_an_error() -> None:
    port = free_port()
    with pytest.raises(MeasureError, match=f"expected TVM's RPC tracker at 127.0.0.1:{port}, found"):
        RemoteRunner(f"127.0.0.1:{port}", KEY)


def test_something_else_is_no_tracker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4)
                connection.sendall(b"HTTP/1.1 400")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MeasureError, match=r"expected TVM's RPC tracker at .* found another answer"):
            status(f"127.0.0.1:{listening.getsockname()[1]}")
        thread.join()


def test_the_status_of_a_fleet(devices: Fleet) -> None:
    until(lambda: devices.devices().free == 2, "both free")
    with pytest.raises(MeasureError, match=f"expected devices of key 'other', found {KEY}"):
        RemoteRunner(devices.tracker, "other")
    shown = CliRunner().invoke(cli, ["fleet", "status", "--tracker", devices.tracker, "--json"])
    assert json.loads(shown.stdout) == [{"key": KEY, "devices": 2, "free": 2, "busy": 0, "queued": 0}]
    shown = CliRunner().invoke(cli, ["fleet", "status", "--tracker", devices.tracker])
    assert shown.stdout.splitlines()[-1].split() == [KEY, "2", "2", "0", "0"]
    assert "127.0.0.1:" in devices.said("a")


# ---- a runner ---------------------------------------------------------------------------------


def test_both_devices_measure(runner: RemoteRunner, devices: Fleet, expected: Expected, root: Path) -> None:
    assert runner.devices == 2
    assert runner.isolated
    found = runner.machine()
    assert dataclasses.replace(found, llvm="") == machine()
    assert runner.hardware == machine().fingerprint
    assert resolve("cpu", machine=found) == resolve("cpu")

    # Each takes longer than a session needs to begin.
    slow, right = artifact(root, "usleep(150000)"), artifact(root)
    wrong = artifact(root, store="t.dst[at] = v + (at == 7)")
    jobs = [runner.submit(slow, expected, 1, seconds=0.1, hopeless=1e-9) for _ in range(2)]
    until(lambda: devices.devices().free == 0, "both in use")
    # TVM's folders of sessions, too, lie in those that are removed after a killed process.
    there = [path for path in (devices.folder / "temporary").iterdir() if path.is_dir()]
    names = {path.name for path in there} - {f"convgen-cpus-{os.geteuid()}"}
    assert len(names) >= 2
    assert all(folders._NAME.fullmatch(name) for name in names)
    jobs += [runner.submit(slow, expected, 1, seconds=0.1, hopeless=1e-9) for _ in range(4)]
    results = [job.result(LONG) for job in jobs]
    assert {result.outcome for result in results} == {"ok"}
    assert {result.device for result in results} == {"a", "b"}
    assert all(result.drift and result.seconds and result.seconds > 0.15 for result in results)

    failed = runner.submit(wrong, expected, 1, seconds=0.01).result(LONG)
    assert failed.outcome == "wrong"
    assert failed.error.startswith("1 of 350 elements; at (0, 0, 1, 0) ")
    samples = runner.duel([right, slow], expected, 1, 3).result(LONG)
    assert isinstance(samples, list)
    assert [len(taken) for taken in samples] == [3, 3]
    too_many = runner.submit(right, expected, machine().logical + 1, seconds=0.01)
    with pytest.raises(MeasureError, match=r"device [ab]: threads: expected at most"):
        too_many.result(LONG)


def test_a_candidate_that_crashes_costs_its_trial(runner: RemoteRunner, expected: Expected, root: Path) -> None:
    good = artifact(root)
    jobs = {
        "crash": runner.submit(artifact(root, "raise(SIGSEGV)"), expected, 1, seconds=0.01),
        "ok": runner.submit(good, expected, 1, seconds=0.01),
    }
    assert {name: job.result(LONG).outcome for name, job in jobs.items()} == {"crash": "crash", "ok": "ok"}
    crashed = runner.duel([good, artifact(root, "raise(SIGILL)")], expected, 1, 3).result(LONG)
    assert isinstance(crashed, Result)
    assert crashed.outcome == "crash"
    assert runner.submit(good, expected, 1, seconds=0.01).result(LONG).outcome == "ok"


def test_a_device_that_is_killed_costs_a_retry(
    runner: RemoteRunner, devices: Fleet, expected: Expected, root: Path
) -> None:
    """With all that it had started; when it is back, it is used again."""
    slow = artifact(root, "usleep(150000)")
    jobs = [runner.submit(slow, expected, 1, seconds=0.1, hopeless=1e-9) for _ in range(8)]
    until(lambda: devices.devices().free == 0, "both in use")
    started = psutil.Process(devices.processes["b"].pid).children(recursive=True)
    devices.processes["b"].kill()
    devices.processes["b"].wait(LONG)
    results = [job.result(LONG) for job in jobs]
    assert [(result.outcome, result.error) for result in results] == [("ok", "")] * 8
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    devices.serve("b")
    devices.wait_for(2)
    until(
        lambda: runner.submit(slow, expected, 1, seconds=0.1, hopeless=1e-9).result(LONG).device == "b",
        "b is used again",
    )


def test_without_devices_the_wait_ends(devices: Fleet, expected: Expected, root: Path) -> None:
    """And closing ends every process that was started here, whatever it does."""
    port = free_port()
    children = set(psutil.Process().children(recursive=True))
    devices.start("other", "serve", "--tracker", devices.tracker, "--key", "other", "--port", str(port))
    try:
        until(lambda: any(d.key == "other" and d.devices for d in status(devices.tracker)), "the other device")
        runner = RemoteRunner(devices.tracker, "other", timeout=60.0, retries=1, patience=1.0)
        slow = artifact(root, "sleep(30)")
        job = runner.submit(slow, expected, 1, seconds=0.01)
        until(lambda: all(d.free == 0 for d in status(devices.tracker) if d.key == "other"), "in use")
        devices.processes["other"].kill()
        with pytest.raises(MeasureError, match="key other: expected a device, found none at tracker"):
            job.result(LONG)
    finally:
        devices.processes.pop("other").kill()
    runner.close()
    assert runner.submit(slow, expected, 1, seconds=0.01).result() == INTERRUPTED
    started = set(psutil.Process().children(recursive=True)) - children
    _, alive = psutil.wait_procs(list(started), timeout=10)
    assert not [process for process in alive if process.pid != os.getpid()]


def describing(monkeypatch: pytest.MonkeyPatch, *said: dict[str, Any]) -> None:
    """Let devices say this of themselves, one after another."""
    answers = iter(said)

    def exchange(self: RemoteRunner, worker: Any, function: Any, arguments: Any, patience: float | None) -> Any:
        return next(answers)

    monkeypatch.setattr(RemoteRunner, "_exchange", exchange)
    monkeypatch.setattr(fleet_remote, "status", lambda tracker: [Devices(KEY, 1, 1, 0)])


def description(**facts: Any) -> dict[str, Any]:
    return {"name": "c", "convgen": fleet_device.version(), "machine": machine().to_dict() | facts}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fingerprint": "cray-1"}, f"fingerprint: expected {machine().fingerprint}, as the others have, found cray-1"),
        ({"cores": 99}, f"cores: expected {machine().cores}, as the others have, found 99"),
    ],
)
def test_devices_of_a_key_must_be_alike(change: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    describing(monkeypatch, description(**change))
    runner = RemoteRunner("h:1", KEY)
    runner._machine = machine()
    job = runner.submit("any.so", SimpleNamespace(directory="any", digest="any"), 1, seconds=0.01)  # type: ignore[arg-type]
    with pytest.raises(MeasureError, match=re.escape(f"device c of key {KEY}: {text}")):
        job.result(LONG)
    runner.close()


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (description() | {"convgen": "99.0"}, r"convgen on device c: expected \d.*, as here, found 99.0"),
        (description() | {"machine": {}}, "device c: expected the facts of a machine, found 'cpu'"),
    ],
)
def test_a_device_must_be_one_that_is_understood(
    said: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    describing(monkeypatch, said)
    runner = RemoteRunner("h:1", KEY)
    with pytest.raises(MeasureError, match=text):
        runner.machine()
    with pytest.raises(MeasureError, match=text):  # for good
        runner.machine()
    runner.close()


# ---- a device, in this process ------------------------------------------------------------------


def test_a_device_keeps_what_it_was_sent_and_not_more_than_it_may(
    expected: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.chdir(tmp_path)
    device = fleet_device.Device(kept, 1, "a")
    assert device.machine.logical == device.machine.cores == 1
    names = [path.name for path in expected.files]

    def send() -> None:
        for path in expected.files:
            shutil.copy(path, tmp_path)

    assert not device.has(expected.digest)
    send()
    with pytest.raises(MeasureError, match=f"expected the digest {'0' * 64}, found {expected.digest}"):
        device.keep({"digest": "0" * 64, "names": names})
    assert list(kept.iterdir()) == []
    (kept / ("f" * 64)).mkdir()
    (kept / ("f" * 64) / "src.npy").write_bytes(b"old")
    monkeypatch.setattr(fleet_device, "KEPT_BYTES", 1)
    send()
    device.keep({"digest": expected.digest, "names": names})
    assert [path.name for path in kept.iterdir()] == [expected.digest]
    assert device.has(expected.digest)
    for name in ("..", "x", "0" * 63, "/" + "0" * 63):
        with pytest.raises(MeasureError, match="digest: expected 64 hexadecimal digits"):
            device.has(name)
