"""Folders that are not the exported libraries they say they are."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attacked_library import SPEC
from naive import compile_naive, link_naive

from convgen.errors import ExportError
from convgen.kernel import library as library_module
from convgen.kernel import mapped
from convgen.kernel.export import write_library
from convgen.kernel.library import Library
from convgen.kernel.load import load
from convgen.lowering.interface import ABI
from convgen.problem.spec import ConvSpec

# ---- folders that are not what they say ------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    interface, path = compile_naive(SPEC, folder, "shared", name="layer")
    write_library(folder / "out", interface, path, {"threads": 2})
    return folder / "out"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    _, path = link_naive(SPEC, tmp_path_factory.mktemp("library"), "shared")
    return Library(path, SPEC, SPEC.name, 2)


@pytest.fixture
def exported(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


def altered(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The folder with its manifest changed."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return folder


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON document."""
    for key in list(value if isinstance(value, dict) else range(len(value))):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def test_any_value_in_any_place_of_a_manifest(exported: Path) -> None:
    """What is loaded is the layer that was exported; all else is refused, with the manifest's path."""
    path = exported / "manifest.json"
    whole = json.loads(path.read_text())
    rng, loaded, refused, count = random.Random(2), 0, 0, sum(1 for _ in places(whole))
    values: list[Any] = [None, True, -1, 0, 2, 10**30, 1.5, "", "x", "f16", [], {}, [[]], {"n": 1}]
    for index in range(count):
        for value in rng.sample(values, 4):
            manifest = copy.deepcopy(whole)
            container, key = list(places(manifest))[index]
            container[key] = value
            path.write_text(json.dumps(manifest))
            try:
                library = load(exported)
            except ExportError as error:
                refused += str(exported) in str(error)
            else:
                loaded += (library.spec, library.name) == (SPEC, "layer")
    assert loaded + refused == 4 * count
    assert min(loaded, refused) > 60


TEXTS: dict[str, tuple[str | bytes, str]] = {
    "nested": ("[" * 100_000, "expected JSON"),
    "a number of digits without end": ('{"abi": ' + "1" * 100_000 + "}", "expected JSON"),
    "not UTF-8": (b'{"abi": "\xff"}', "expected JSON"),
    "empty": ("", "expected JSON"),
    "an array": ("[]", "expected the manifest of a library"),
    "huge": (" " * 2**20 + "{}", "expected a manifest of at most 1048576 bytes, found more"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_manifest_is_refused(exported: Path, name: str) -> None:
    text, message = TEXTS[name]
    (exported / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ExportError, match=rf"manifest\.json: {message}"):
        load(exported)


@pytest.mark.parametrize("file", ["manifest.json", "liblayer.so"])
def test_what_is_no_file_is_refused(exported: Path, file: str, tmp_path: Path) -> None:
    """Without waiting for it or reading it to its end."""
    path = exported / file
    original = path.rename(tmp_path / file)
    with pytest.raises(ExportError, match="found No such file"):
        load(exported)
    os.mkfifo(path)
    with pytest.raises(ExportError, match="found no file but something else"):
        load(exported)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ExportError, match="found no file but something else"):
        load(exported)
    path.unlink()
    path.symlink_to(original)  # a link to the right bytes is right
    assert load(exported).spec == SPEC


def test_every_flipped_byte_of_a_library_is_seen(exported: Path) -> None:
    path, rng = exported / "liblayer.so", random.Random(3)
    data = path.read_bytes()
    for at in rng.sample(range(len(data)), 40):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        with pytest.raises(ExportError, match="expected SHA-256"):
            load(exported)
    path.write_bytes(data[:-1])
    with pytest.raises(ExportError, match="expected SHA-256"):
        load(exported)


def test_what_loading_does_not_need_may_be_gone(exported: Path) -> None:
    for file in ("liblayer.a", "layer.h", "example.c"):
        (exported / file).unlink()
    assert load(exported).spec == SPEC


OTHER = [
    SPEC.with_(activation="none"),
    SPEC.with_(n=1),
    SPEC.with_(residual=False),
    SPEC.with_(layout="nhwc"),
    SPEC.with_(accuracy="strict"),
]


@pytest.mark.parametrize("spec", OTHER, ids=str)
def test_a_manifest_of_another_layer_is_refused(exported: Path, spec: ConvSpec) -> None:
    """The hash is right. Smaller arrays would pass the checks in Python and be read beyond their end."""
    fields = {"descriptor": spec.descriptor, "key": spec.key, "fields": spec.to_dict()}
    with pytest.raises(
        ExportError, match=rf"liblayer\.so: expected convgen ABI {ABI}; conv2d .*, found convgen ABI {ABI}; conv2d "
    ):
        load(altered(exported, lambda manifest: manifest.update(spec=fields)))


def test_a_library_that_lies_about_its_layer_is_refused(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sizes tell, which is what its checks go by."""
    spec = SPEC.with_(n=1)
    monkeypatch.setattr(Library, "version", library.version.replace(SPEC.descriptor, spec.descriptor))
    with pytest.raises(ExportError, match=r"src: expected 4800 bytes, found 9600"):
        Library(library._dll._name, spec, SPEC.name, 1)


def test_another_library_under_the_same_name_is_refused(exported: Path, tmp_path: Path) -> None:
    """As a whole, hash and all: only the layer it tells of is another one."""
    interface, path = compile_naive(SPEC.with_(activation="none"), tmp_path, "shared", name="layer")
    write_library(tmp_path / "other", interface, path, {"threads": 1})
    shutil.copy(tmp_path / "other" / "liblayer.so", exported)
    with pytest.raises(ExportError, match="expected SHA-256"):
        load(exported)
    data = (exported / "liblayer.so").read_bytes()
    files = {"liblayer.so": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    with pytest.raises(ExportError, match=f"expected convgen ABI {ABI}; "):
        load(altered(exported, lambda manifest: manifest.update(files=files)))


@pytest.mark.parametrize("how", ["replaced", "written over"])
def test_a_library_that_changes_while_it_is_loaded_is_refused(
    exported: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the hash and the loader: what was loaded is not what was checked."""
    interface, path = compile_naive(SPEC, tmp_path, "reference", name="layer")  # the same layer, other code
    write_library(tmp_path / "other", interface, path, {"threads": 1})
    opened = mapped.open_library

    def late(file: str) -> Any:
        if how == "replaced":
            os.replace(tmp_path / "other" / "liblayer.so", file)
        else:
            Path(file).write_bytes((tmp_path / "other" / "liblayer.so").read_bytes())
        return opened(file)

    monkeypatch.setattr(library_module, "open_library", late)
    with pytest.raises(ExportError, match="expected the file that was checked, found one that was put in its place"):
        load(exported)


def test_an_interrupted_export_is_refused_until_it_is_repeated(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended between any two of its files: the manifest says so first, and the right one is the last to arrive."""
    interface, path = compile_naive(SPEC.with_(activation="none"), tmp_path, "shared", name="layer")
    replace = os.replace
    for done in range(1, 6):
        folder = shutil.copytree(made, tmp_path / str(done))
        moves = iter(range(done))

        def interrupted(old: Any, new: Any, *, folder: Path = folder, moves: Iterator[int] = moves) -> None:
            if Path(new).parent == folder and next(moves, None) is None:
                raise KeyboardInterrupt
            replace(old, new)

        monkeypatch.setattr("convgen.kernel.export.os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_library(folder, interface, path, {"threads": 1})
        assert not list(tmp_path.glob(".*"))
        with pytest.raises(ExportError, match="expected a whole library, found an export that was interrupted"):
            load(folder)
        monkeypatch.undo()
        write_library(folder, interface, path, {"threads": 1})
        assert load(folder).spec.activation == "none"
