"""Bundles: packed here, measured by a bare interpreter, taken back."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted
import pytest
from archives import untar
from bundles import BARE, kernel, lines, plant, run, write
from mounts import mounted
from paths import ROOT

from convgen.api import tune
from convgen.cli import main
from convgen.errors import BuildError, ExportError, MeasureError, RecordError, UnsupportedError
from convgen.formats.sources import read_specs
from convgen.hardware.machine import machine, parse_cpuinfo
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate
from convgen.lowering.versions import versions
from convgen.measure import standalone
from convgen.measure import trial as measure
from convgen.measure.standalone import child, timing
from convgen.measure.standalone.errors import Trouble
from convgen.measure.standalone.facts import facts as machine_facts
from convgen.measure.standalone.facts import processors
from convgen.measure.standalone.results import Results
from convgen.measure.standalone.summary import summary
from convgen.problem.spec import ConvSpec
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
from convgen.tuning.bundle import (
    import_results,
    machine_from_facts,
    pack,
    read_facts,
    read_results,
    target_on,
    trial_id,
    unpacked,
)
from convgen.tuning.bundle.archive import read_manifest, write_archive, write_runner

SPEC = planted.SPEC


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "layer.tar.gz"
    packed = pack([SPEC], [resolve()], [1], out, candidates=3)
    assert (packed.layers, packed.trials, packed.failed, packed.bytes) == (1, 3, 0, out.stat().st_size)
    return out


@pytest.fixture
def folder(archive: Path, tmp_path: Path) -> Path:
    untar(archive, tmp_path)
    return tmp_path / "layer"


@pytest.fixture(scope="module")
def results(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a bare interpreter wrote."""
    folder = tmp_path_factory.mktemp("device")
    untar(archive, folder)
    run(folder / "layer", "-o", folder / "results.jsonl")
    return folder / "results.jsonl"


def test_what_libraries_have_in_common_is_there_once_in_an_xz_archive(tmp_path: Path) -> None:
    common = random.Random(0).randbytes(100_000)
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer" / "manifest.json").write_text("{}")
    for number in range(4):
        (tmp_path / "layer" / f"{number}.so").write_bytes(common + bytes([number]))
    for ending in (".tar.gz", ".tar.xz"):
        write_archive(tmp_path / "layer", tmp_path / f"layer{ending}")
    assert (tmp_path / "layer.tar.xz").stat().st_size * 3 < (tmp_path / "layer.tar.gz").stat().st_size
    with unpacked(tmp_path / "layer.tar.xz") as folder:
        assert [(folder / f"{number}.so").read_bytes()[-1] for number in range(4)] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_bundle_of_large_layers_is_small(tmp_path: Path) -> None:
    """ResNet-50's 24 layers of 16 images, 16 candidates each, take less than 5 MB: large tensors are drawn there."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'convgen[cuda]'")
    specs = [
        ConvSpec.parse(f"conv2d n16 {layer} relu f16 nhwc")
        for layer in ("ic256 oc1024 i14x14 k1x1 s1 p0", "ic512 oc512 i7x7 k3x3 s1 p1")
    ]
    packed = pack(specs, [resolve("cuda:sm_90a")], [1], tmp_path / "layers.tar.xz", candidates=16)
    assert packed.trials == 32
    assert packed.bytes < 2 * 5e6 / 24
    assert packed.bytes < sum(sum(spec.bytes.values()) for spec in specs) / 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_bundle_of_a_whole_model_is_small(tmp_path: Path) -> None:
    """ResNet-50's 24 layers of 16 images, three candidates each, take less than their share of 5 MB for 16."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'convgen[cuda]'")
    entries = read_specs(ROOT / "bench" / "problems" / "resnet50.json")
    specs = [entry.spec.with_(n=16, dtype="f16", layout="nhwc") for entry in entries]
    packed = pack(specs, [resolve("cuda:sm_90a")], [1], tmp_path / "model.tar.xz", candidates=3)
    assert (packed.layers, packed.trials) == (24, 72)
    assert packed.bytes < 5e6 * 3 / 16


@pytest.mark.parametrize("kind", ["a link", "outside", "absolute"])
def test_an_archive_that_writes_elsewhere_is_refused(tmp_path: Path, kind: str) -> None:
    path, inner = tmp_path / "hostile.tar", tarfile.TarInfo("layer/manifest.json")
    if kind == "a link":
        inner.type, inner.linkname = tarfile.SYMTYPE, "/etc/hostname"
    else:
        inner.name = "../manifest.json" if kind == "outside" else str(tmp_path / "manifest.json")
    with tarfile.open(path, "w") as tar:
        tar.addfile(inner)
    with pytest.raises(
        ExportError, match=r"hostile\.tar: expected a bundle, found '.*', which is no file or folder inside"
    ):
        read_manifest(path)
    assert sorted(tmp_path.iterdir()) == [path]


# ---- there and back ------------------------------------------------------------------------------


def test_the_interpreter_is_bare() -> None:
    done = subprocess.run([*BARE, "-c", "import numpy"], env={}, capture_output=True, text=True, check=False)
    assert "No module named 'numpy'" in done.stderr


def test_records_are_those_of_measuring_live(results: Path, archive: Path, tmp_path: Path) -> None:
    with RecordStore(tmp_path / "imported.sqlite") as store, RecordStore(tmp_path / "live.sqlite") as live:
        count, added = import_results(results, store, archive)
        assert count == added == len(store)
        tune(SPEC, threads=1, trials=1, records=live)
        imported = {r.trial_key: r for r in store.trials() if not (r.note or {}).get("final")}
        measured = {r.trial_key: r for r in live.trials() if not (r.note or {}).get("final")}
        finals = [r.note or {} for r in store.trials() if (r.note or {}).get("final")]
        live_final = next(r.note or {} for r in live.trials() if (r.note or {}).get("final"))
        assert import_results(results, store, archive) == (count, 0)
    assert len(imported) == 3
    # Which candidates a search goes on with depends on times; it begins with the default, as a bundle does.
    common = imported.keys() & measured.keys()
    assert common
    times = {"seconds", "samples", "when", "note", "id"}
    for key in common:
        one, other = imported[key].to_dict(), measured[key].to_dict()
        assert {k: v for k, v in one.items() if k not in times} == {k: v for k, v in other.items() if k not in times}
        assert imported[key].outcome == "ok"
    default = default_candidate(SPEC, resolve())
    assert any(r.schedule == default.schedule.id and r.picks == default.picks for r in imported.values())
    assert sum(note["winner"] for note in finals) == 1
    for note in finals:
        assert note.keys() <= live_final.keys()
        low, high = note["ratio_default"][1:]
        assert low <= note["ratio_default"][0] <= high


def test_this_machine_is_told_as_it_is_known_here(results: Path, tmp_path: Path) -> None:
    # In a process of its own: an emulated driver that other tests have loaded in this one stays.
    program = "import json; from convgen.measure.standalone.facts import facts; print(json.dumps(facts()))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
    here = machine_from_facts(json.loads(told))
    assert here == machine()
    (tmp_path / "facts.json").write_text(json.dumps(here.to_dict()))
    assert read_facts(tmp_path / "facts.json") == read_facts(results) == here
    assert target_on(resolve(), here) == resolve()
    with pytest.raises(UnsupportedError, match=r"cpu:aarch64-cortex-a72: expected a machine that has asimd, found"):
        target_on(resolve("cpu:aarch64-cortex-a72"), replace(here, arch="x86_64"))
    for damaged in ("[]", "{}", '{"cpuinfo": 3}', "nothing"):
        (tmp_path / "facts.json").write_text(damaged)
        with pytest.raises(MeasureError, match=r"facts.json: .*expected"):
            read_facts(tmp_path / "facts.json")


def test_a_machine_of_cores_of_two_kinds() -> None:
    text = "\n\n".join(
        f"processor\t: {i}\nBogoMIPS\t: 50\nFeatures\t: fp asimd {extra}\nCPU implementer\t: 0x41\nCPU part\t: {part}"
        for i, (part, extra) in enumerate([("0xd03", ""), ("0xd03", ""), ("0xd09", "crc32")])
    )
    text += "\n\nHardware\t: board\nSerial\t\t: 0123456789"
    kept = processors(text)
    assert parse_cpuinfo(kept) == parse_cpuinfo(text)
    assert kept.count("CPU part") == 2
    assert "Serial" not in kept


def test_measuring_live_takes_times_by_the_same_functions() -> None:
    used = vars(measure)
    assert (used["time_calls"], used["alternate"]) == (timing.time_calls, timing.alternate)


def test_the_runner_is_for_python_3_8_and_its_library() -> None:
    newer = {"removeprefix", "removesuffix", "UTC", "pairwise", "strict", "file_digest"}
    for path in sorted(Path(standalone.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert all(node.level == 1 for node in relative), path
        absolute = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
        known = sys.stdlib_module_names | ({"torch"} if path.name == "cudnn.py" else set())  # where it is installed
        assert imported | {str(node.module) for node in absolute} <= known, path
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not newer & (names | {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}), path


def test_equal_sources_make_equal_runners(folder: Path, tmp_path: Path) -> None:
    write_runner(tmp_path / "run.py")
    assert (tmp_path / "run.py").read_bytes() == (folder / "run.py").read_bytes()
    with zipfile.ZipFile(tmp_path / "run.py") as file:
        sources = {f"standalone/{path.name}" for path in Path(standalone.__file__).parent.glob("*.py")}
        assert set(file.namelist()) == {"__main__.py", *sources}


# ---- what goes wrong there -----------------------------------------------------------------------


def test_what_fails_costs_one_trial(folder: Path, tmp_path: Path) -> None:
    keys = plant(
        folder,
        {
            "right": kernel(tmp_path / "right"),
            "wrong": kernel(tmp_path / "wrong", store="t.dst[at] = at == 37 ? v + 1 : v"),
            "crash": kernel(tmp_path / "crash", before="*(volatile int *)8 = 1"),
            "hang": kernel(tmp_path / "hang", before="for (volatile int i = 1; i;);"),
            "memory": kernel(tmp_path / "memory", workspace=1 << 44),
            "unwritten": kernel(tmp_path / "unwritten", store="if (at != 3) t.dst[at] = v"),
            "exits": kernel(tmp_path / "exits", before="exit(0)"),
            "also-right": kernel(tmp_path / "also-right"),
        },
    )
    said = run(folder, "--timeout", 5)
    found = {line["schedule"]: line for line in lines(folder / "results.jsonl") if line["kind"] == "trial"}
    outcomes = {name: line["outcome"] for name, line in found.items()}
    expected = {"right": "ok", "wrong": "wrong", "crash": "crash", "hang": "timeout", "memory": "memory"}
    assert outcomes == {**expected, "unwritten": "wrong", "exits": "crash", "also-right": "ok"}
    assert "8 results" in said
    assert found["wrong"]["error"].startswith("1 of 350 elements; at (0, 1, 0, 2) expected ")
    assert "nan" in found["unwritten"]["error"]
    assert "SIGSEGV" in found["crash"]["error"]
    (final,) = [line for line in lines(folder / "results.jsonl") if line["kind"] == "final"]
    assert {trial["key"] for trial in final["trials"]} == {keys["right"], keys["also-right"]}
    records = read_results(folder / "results.jsonl", folder)
    assert {r.schedule: r.outcome for r in records if not (r.note or {}).get("final")} == outcomes


def test_a_transform_is_held_to_its_bound(folder: Path, tmp_path: Path) -> None:
    within, beyond = "t.dst[at] = v * (1 + 1e-7f)", "t.dst[at] = v * 1.01f"
    plant(folder, {"within": kernel(tmp_path / "a", store=within), "beyond": kernel(tmp_path / "b", store=beyond)})
    manifest = json.loads((folder / "manifest.json").read_text())
    if "bound" not in manifest["layers"][0]["data"]:  # none of the packed candidates needed it
        data = folder / "data" / "0"
        measure.Expected(SPEC, tmp_path, 1)
        import numpy as np

        (data / "bound.bin").write_bytes(np.load(tmp_path / "bound.npy").tobytes())
        manifest["layers"][0]["data"]["bound"] = "data/0/bound.bin"
    for trial in manifest["trials"]:
        trial["exact"] = False
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run(folder)
    outcomes = {
        line["schedule"]: line["outcome"] for line in lines(folder / "results.jsonl") if line["kind"] == "trial"
    }
    assert outcomes == {"within": "ok", "beyond": "wrong"}


def test_large_tensors_are_drawn_where_they_are_measured(tmp_path: Path) -> None:
    """Whatever fits into the bundle's 64 KiB a tensor is there; of the rest, seeds and digests."""
    spec = ConvSpec.parse("conv2d n2 ic32 oc48 i26x26 k3x3 p1")
    assert pack([spec], [resolve()], [1], tmp_path / "large.tar.gz", candidates=3).failed == 0
    untar(tmp_path / "large.tar.gz", tmp_path)
    folder = tmp_path / "large"
    manifest = json.loads((folder / "manifest.json").read_text())
    (layer,) = manifest["layers"]
    assert {name for name, made in layer["data"].items() if not isinstance(made, str)} == {"src"}
    assert len(layer["digests"]) == 1
    assert max(path.stat().st_size for path in (folder / "data").rglob("*.bin")) <= 1 << 16
    run(folder, "-o", tmp_path / "right.jsonl")
    trials = [line for line in lines(tmp_path / "right.jsonl") if line["kind"] == "trial"]
    assert [trial["outcome"] for trial in trials] == ["ok"] * 3
    for change in ("digests", "samples"):
        changed = json.loads(json.dumps(manifest))
        if change == "digests":
            changed["layers"][0]["digests"] = [f"{int(layer['digests'][0], 16) ^ 1:016x}"]
        else:  # judged by samples, which are others than those of this seed
            (folder / "data" / "0" / "expected.bin").write_bytes(bytes(4 << 14))
            (folder / "data" / "0" / "bound.bin").write_bytes(bytes(4 << 14))
            changed["layers"][0] |= {"samples": 1 << 14}
            names = ("expected", "bound")
            changed["layers"][0]["data"] |= {name: f"data/0/{name}.bin" for name in names}
            for name in names:
                changed["files"][f"data/0/{name}.bin"] = hashlib.sha256(bytes(4 << 14)).hexdigest()
        for trial in changed["trials"]:
            trial["exact"] = change == "digests"
        (folder / "manifest.json").write_text(json.dumps(changed))
        run(folder, "-o", tmp_path / f"{change}.jsonl")
        errors = [line["error"] for line in lines(tmp_path / f"{change}.jsonl") if line["kind"] == "trial"]
        said = "1 of 1 parts of 65536 elements" if change == "digests" else "of 16384 elements; at "
        assert all(said in error for error in errors)
        assert len(errors) == 3


def test_it_goes_on_after_a_kill(folder: Path, tmp_path: Path) -> None:
    slow = kernel(tmp_path / "slow", before="extern int usleep(unsigned); usleep(50000)")
    plant(folder, {"one": slow, "two": slow, "three": slow})
    out = folder / "results.jsonl"
    process = subprocess.Popen([*BARE, str(folder / "run.py")], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not out.exists() or out.read_bytes().count(b"\n") < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        assert "another process is writing it" in run(folder, status=3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = out.read_bytes()
    out.write_bytes(before + b'{"kind": "trial", "sch')  # what a kill may leave
    if len(before.splitlines()) < 5:
        with pytest.raises(RecordError, match=r"line \d: expected a whole line, found one cut short: run the bundle"):
            read_results(out)
    run(folder)
    assert out.read_bytes().startswith(before)
    kinds = [line["kind"] for line in lines(out)]
    assert kinds == ["run", "trial", "trial", "trial", "final"]
    assert len({line["key"] for line in lines(out)[1:4]}) == 3
    after = out.read_bytes()
    run(folder)
    assert out.read_bytes() == after


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(str(tmp_path / "r.jsonl"), "0", machine_facts())
    before = (tmp_path / "r.jsonl").read_bytes()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Trouble, match=r"r.jsonl: No space left on device; what was measured"):
        results.add({"kind": "trial"})
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_a_temporary_folder_that_cannot_be_written_is_no_fault_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(Trouble, match=r"a temporary file cannot be made: No such file.*; set TMPDIR"):
        child.answer({}, 1.0)


def test_a_bundle_on_a_file_system_mounted_noexec_says_so(tmp_path: Path) -> None:
    code = """if True:
    import os, shutil, sys, types
    from convgen.measure.standalone.devices import Cpu
    from convgen.measure.standalone.errors import Refused
    shutil.copy(sys.argv[1], root := os.environ["TMPDIR"])
    try:
        Cpu.open(types.SimpleNamespace(root=root), os.path.basename(sys.argv[1]))
    except Refused as refused:
        print(refused)
    """
    done = mounted("noexec", sys.executable, "-c", code, str(kernel(tmp_path / "kernel")))
    assert done.stdout.endswith(": it lies on a file system mounted noexec\n"), done


@pytest.mark.parametrize("name", ["lib/*.so", "data/0/expected.bin", "run.py"])
def test_a_damaged_bundle_is_not_run(folder: Path, name: str) -> None:
    path = sorted(folder.glob(name))[0]
    data = bytearray(path.read_bytes())
    if name == "run.py":
        data += b"\n"
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{path}: expected SHA-256" in run(folder, status=3)
    assert not (folder / "results.jsonl").exists()


def test_results_of_another_bundle_or_machine_are_not_continued(folder: Path, results: Path) -> None:
    out = folder / "results.jsonl"
    header, *rest = lines(results)
    write(out, [{**header, "manifest": "0" * 64}, *rest])
    assert "expected results of this bundle" in run(folder, status=3)
    write(out, [{**header, "facts": {**header["facts"], "cpus": 999}}, *rest])
    assert "expected results of this machine" in run(folder, status=3)
    out.write_text("text\n")
    assert "line 1: expected a line of results, found a damaged one" in run(folder, status=3)


def test_a_target_of_another_architecture_is_left_out(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["targets"][0]["architecture"] = "m68k"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "left out: for m68k" in run(folder, status=3)
    assert [line["kind"] for line in lines(folder / "results.jsonl")] == ["run"]


# ---- taking results in ---------------------------------------------------------------------------

Change = Callable[[list[dict[str, Any]]], Any]

_DAMAGE: list[tuple[Change, str]] = [
    (lambda v: v[0].update(format=1), r"line 1: format: expected 2, found 1"),
    (lambda v: v[0].update(extra=1), r"line 1: extra: expected one of .* found an unknown field"),
    (lambda v: v[0].pop("python"), r"line 1: python: expected a value, found none"),
    (lambda v: v[0]["facts"].update(cpus="two"), r"line 1: facts: cpus: expected an integer >= 1, found 'two'"),
    (lambda v: v[0]["facts"].update(caches={"1": -1}), r"line 1: facts: caches.1: expected bytes"),
    (lambda v: v[0].update(facts=[]), r"line 1: facts: expected a JSON object"),
    (lambda v: v.insert(0, v[1]), r"line 1: kind: expected the run's own line first"),
    (lambda v: v.insert(1, dict(v[0])), r"line 2: "),
    (lambda v: v[1].update(kind="x"), r"line 2: kind: expected one of run, trial, final, sanitized, peer, found 'x'"),
    (
        lambda v: v[1].update(spec="conv2d ic3 oc5 i6x7 k3x3"),
        r"line 2: spec: expected a descriptor in its one spelling",
    ),
    (lambda v: v[1].update(spec="conv9d"), r"line 2: spec: "),
    (lambda v: v[1].update(threads=7), r"line 2: key: expected the trial's own"),
    (lambda v: v[1].update(samples=[]), r"line 2: samples: expected times where, and only where, it is ok"),
    (lambda v: v[1].update(samples=[-1.0]), r"line 2: samples: expected positive numbers of seconds, found -1"),
    (lambda v: v[1].update(samples=[True]), r"line 2: samples: expected positive numbers of seconds"),
    (lambda v: v[1].update(samples="fast"), r"line 2: samples: expected a list of seconds"),
    (lambda v: v[1].update(outcome="great"), r"line 2: outcome: expected one of .* found 'great'"),
    (lambda v: v[1].update(cost="much"), r"line 2: cost: expected seconds"),
    (lambda v: v[1].update(error=1), r"line 2: error: expected text"),
    (lambda v: v[1].update(when="today"), r"line 2: when: expected ISO 8601"),
    (lambda v: v.insert(2, v[1]), r"line 3: key: expected each trial once"),
    (lambda v: v[-1].update(group="g"), r"line 5: group: expected each group once"),
    (lambda v: v[-1].update(samples=[[1.0]]), r"line 5: samples: expected a list per trial"),
    (lambda v: v[-1]["trials"][0].pop("picks"), r"line 5: trials\[0\].picks: expected a value, found none"),
    (lambda v: v[-1]["samples"][0].clear(), r"line 5: samples\[0\]: expected times"),
]


@pytest.mark.parametrize(("change", "message"), _DAMAGE, ids=[message for _, message in _DAMAGE])
def test_a_wrong_line_is_named_and_nothing_is_taken(
    change: Change, message: str, results: Path, tmp_path: Path
) -> None:
    values = lines(results)
    change(values)
    write(tmp_path / "r.jsonl", values)
    with RecordStore(tmp_path / "s.sqlite") as store:
        with pytest.raises(RecordError, match=rf"r.jsonl: {message}"):
            import_results(tmp_path / "r.jsonl", store)
        assert len(store) == 0


def test_a_changed_byte_shows_or_changes_nothing(results: Path, tmp_path: Path) -> None:
    data = results.read_bytes()
    records = read_results(results)
    refused = 0
    for at in range(0, len(data), max(1, len(data) // 60)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        (tmp_path / "r.jsonl").write_bytes(damaged)
        try:
            found = read_results(tmp_path / "r.jsonl")
        except RecordError as error:
            message = str(error)
        else:  # the last digit of a number need not make it another one
            assert found == records
            continue
        assert re.match(rf"{tmp_path}/r.jsonl: line \d+: ", message)
        refused += 1
    assert refused > 40
    (tmp_path / "r.jsonl").write_text("")
    with pytest.raises(RecordError, match="expected results, found an empty file"):
        read_results(tmp_path / "r.jsonl")


def test_results_must_be_of_the_bundle(results: Path, archive: Path, folder: Path, tmp_path: Path) -> None:
    assert read_results(results, archive) == read_results(results)
    values = lines(results)
    values[1]["library_sha256"] = "0" * 64
    write(tmp_path / "r.jsonl", values)
    with pytest.raises(RecordError, match=r"line 2: library_sha256: expected [0-9a-f]{64}, found '0000"):
        read_results(tmp_path / "r.jsonl", archive)
    values = lines(results)
    values[1]["schedule"] = "other"
    values[1]["key"] = trial_id(values[1])
    write(tmp_path / "r.jsonl", values)
    with pytest.raises(RecordError, match=r"line 2: key: expected a trial of the bundle"):
        read_results(tmp_path / "r.jsonl", folder)
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text() + "\n")
    with pytest.raises(RecordError, match=r"line 1: manifest: expected the bundle's"):
        read_results(results, folder)
    with pytest.raises(ExportError, match="expected a bundle, found"):
        read_results(results, results)


def test_the_summary_says_what_won_where_the_best_were_timed_in_turn() -> None:
    where: dict[str, Any] = {"spec": "conv1d", "target": "cpu:haswell", "threads": 2, "picks": {"x": 1}, "group": 0}
    trials = [{**where, "key": name, "schedule": name} for name in ("alone", "together")]
    bundle: Any = SimpleNamespace(manifest={"trials": trials}, feature=lambda trial: "")
    made = [{"kind": "trial", "key": t["key"], "outcome": "ok", "samples": [i * 1e-6]} for i, t in enumerate(trials, 1)]
    results: Any = SimpleNamespace(lines=[{"kind": "run", "facts": {}}, *made])
    what = "conv1d, cpu:haswell, 2 threads"
    assert summary(bundle, results).endswith(f"fastest:\n       1.0 µs  {what}: alone(x=1)\n")
    results.lines.append({"kind": "final", "group": 0, "trials": trials, "samples": [[5e-6], [4e-6]]})
    assert summary(bundle, results).endswith(f"fastest:\n       4.0 µs  {what}: together(x=1)\n")


# ---- packing -------------------------------------------------------------------------------------


def test_what_the_store_has_of_a_machine_is_not_packed(results: Path, tmp_path: Path) -> None:
    first = read_results(results)
    with RecordStore(tmp_path / "s.sqlite") as store:
        store.add_all(first)
        packed = pack(
            [SPEC], [resolve()], [1], tmp_path / "b.zip", candidates=2, machine=read_facts(results), store=store
        )
    assert (packed.trials, packed.known) == (2, 1)  # the default is there for the comparison
    with zipfile.ZipFile(tmp_path / "b.zip") as file:
        trials = json.loads(file.read("b/manifest.json"))["trials"]
    known = {trial_id(record.to_dict()) for record in first}
    assert [trial["key"] in known for trial in trials] == [trial["known"] is not None for trial in trials]
    with unpacked(tmp_path / "b.zip") as folder:
        run(folder)
        kinds = [line["kind"] for line in lines(folder / "results.jsonl")]
        final = lines(folder / "results.jsonl")[-1]
    assert kinds == ["run", "trial", "trial", "final"]
    assert [trial["default"] for trial in final["trials"]].count(True) == 1


def raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*_: object) -> Any:
        raise error

    return raise_it


def test_a_bundle_is_written_into_a_pipe(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "layer.tar.gz"
    os.mkfifo(path)
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as reader:
        packed = pack([SPEC], [resolve()], [1], path, candidates=1)
        data = reader.communicate(timeout=60)[0]
    assert (len(data), list(tmp_path.iterdir()), path.is_fifo()) == (packed.bytes, [path], True)
    (tmp_path / "got.tar.gz").write_bytes(data)
    (tmp_path / "unpacked").mkdir()
    untar(tmp_path / "got.tar.gz", tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "layer" / "run.py").is_file()


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"expected a name that ends in .tar.gz or .tgz or .tar.xz or .zip"):
        pack([SPEC], [resolve()], [1], tmp_path / "b.rar")
    with pytest.raises(ExportError, match="expected a layer to measure, found none"):
        pack([SPEC.with_(n=0)], [resolve()], [1], tmp_path / "b.zip")
    with pytest.raises(ExportError, match="No such file"):
        pack([SPEC], [resolve()], [1], tmp_path / "absent" / "b.zip")
    facts = machine_facts()
    facts["cpuinfo"] = "vendor_id\t: X\nflags\t: sse"
    with pytest.raises(UnsupportedError, match=r"expected a machine that has .*avx"):
        pack([SPEC], [resolve("cpu:haswell")], [1], tmp_path / "b.zip", machine=machine_from_facts(facts))
    with pytest.MonkeyPatch.context() as patch:
        missing = UnsupportedError("target cuda: expected NVIDIA's compiler library, found none")
        patch.setattr("convgen.cuda.code._compiler", raising(missing))
        with pytest.raises(UnsupportedError, match="expected NVIDIA's compiler library, found none"):
            pack([], [resolve("cuda:sm_90a")], [1], tmp_path / "b.zip", self_check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convgen.tuning.bundle.packing.candidate_module", raising(BuildError("planted\nand more")))
        with pytest.raises(ExportError, match=r"expected trials that compile, found none of 2: planted$"):
            pack([SPEC], [resolve()], [1], tmp_path / "b.zip", candidates=2)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["conv2d", "ic4", "oc8", "i5x5", "k1x1"]
    assert main(["fleet", "pack", *words, "--threads", "1,zero", "--no-records"]) == 2
    assert "expected numbers from 1 to 1024" in capsys.readouterr().err
    targets = ["--target", "cpu,cpu"]
    assert (
        main(["fleet", "pack", *words, *targets, "--threads", "1", "--candidates", "1", "--no-records", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["trials"] == 1
    assert main(["fleet", "run", "bundle.tar.gz"]) == 0
    assert main(["fleet", "import", "bundle.results.jsonl", "--bundle", str(archive), "--records", "s.sqlite"]) == 3
    assert "line 1: manifest: expected the bundle's" in capsys.readouterr().err
    assert not Path("s.sqlite").exists()
    assert main(["fleet", "import", "bundle.results.jsonl", "--records", "s.sqlite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"results": 2, "added": 2, "records": 2}
    with RecordStore("s.sqlite") as store:
        found: list[TuningRecord] = store.trials(outcome="ok")
    assert {(r.spec, r.threads, r.hardware) for r in found} == {
        (ConvSpec.parse(" ".join(words)).descriptor, 1, machine().fingerprint)
    }
    assert all(r.versions == versions() for r in found)
