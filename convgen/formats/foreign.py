"""Files that are no layers and no ONNX model: what they are, by their first bytes, and the way from there to here."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from ..errors import SpecError

#: Files of a folder that are looked at for one that was meant.
_LOOKED_AT = 1000
_ONNX = "export the model to ONNX where it was made"
_TORCH = "export the module with torch.onnx.export, or read it with convgen.spec_from_torch"
_EXPORTED = "compile it with convgen.compile(torch.export.load(path))"
_KERAS = "write model.to_json() to a file, or export the model to ONNX with tf2onnx"
_TENSORFLOW = "convert it with python -m tf2onnx.convert"

#: (where the mark is, the mark, what begins so, the way)
_MARKS = (
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (0, b"BZh", "a bzip2 archive", "unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive", "unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first"),
    (0, b"\x89HDF", "HDF5, as Keras's .h5 is", _KERAS),
    (4, b"TFL3", "a model of TensorFlow Lite", f"{_TENSORFLOW} --tflite"),
    (4, b"ORTM", "a model in ONNX Runtime's own format", "give the .onnx it was made from"),
    (0, b"\x80\x02", "a pickle, as old PyTorch files are", _TORCH),
    (0, b"\x80\x04", "a pickle", _TORCH),
    (8, b'{"', "safetensors, which has weights and no graph", _ONNX),
    (0, b"GGUF", "GGUF, which has weights and no graph", _ONNX),
    (0, b"\x93NUMPY", "an array of NumPy", _ONNX),
    (0, b"\x7fELF", "a program or library", _ONNX),
    (0, b"\x08\x01\x12", "a SavedModel of TensorFlow", f"{_TENSORFLOW} --saved-model"),
    (0, b"7767517\n", "a model of ncnn", _ONNX),
    (0, b"version https://git-lfs", "a pointer of Git LFS", "git lfs pull fetches the file that it stands for"),
)
#: A name within a zip archive -> what the archive is then, the way.
_MEMBERS = (
    ("data.pkl", "a file of torch.save or TorchScript", _TORCH),
    ("serialized_exported_program.json", "an exported program of PyTorch", _EXPORTED),
    ("models/model.json", "an exported program of PyTorch", _EXPORTED),
    ("model.weights.h5", "a model of Keras 3", _KERAS),
)


def foreign(path: Path) -> tuple[str, str] | None:
    """What a file is that is not read here, and what to do instead; None where it may be a model, or text.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    for place, mark, what, way in _MARKS:
        if head[place : place + len(mark)] == mark:
            return what, way
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"<?xml", b"<net ")) and b"<net " in head:
        return "a model of OpenVINO", "give the ONNX model it was converted from"
    if text[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page", "download the file itself, not the page about it"
    if head.startswith(b"\n") and b"\x12" in head[:128] and b"\0" in head:  # its first field is a node
        return "a frozen graph of TensorFlow", f"{_TENSORFLOW} --graphdef"
    return None


def missing(path: Path) -> SpecError:
    """The error about a file that is not there; says which of its folder may have been meant."""
    from difflib import get_close_matches  # slow to load, and seldom needed

    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, _LOOKED_AT)]
    except OSError:
        names = []
    by_stem = {Path(name).stem: name for name in names}  # endings are too often the same to tell anything
    close = [by_stem[stem] for stem in get_close_matches(path.stem, by_stem, n=2, cutoff=0.7)]
    like = f"; did you mean {' or '.join(close)}?" if close else ""
    return SpecError("file", "an existing file", f"no such file{like}", str(path))


def is_onnx(path: Path) -> bool:
    """Whether a file begins as an ONNX model does, with the version of its format, and is not text.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(3)
    return len(head) == 3 and head[0] == 0x08 and 0 < head[1] < 0x80 and head[2] in _FIELDS


#: What follows the version in a ModelProto: producer_name, producer_version, domain, model_version, doc_string, graph,
#: opset_import, metadata_props.
_FIELDS = (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72)


def _archive(path: Path) -> tuple[str, str]:
    import zipfile  # only where there is one

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        names = []
    for member, what, way in _MEMBERS:
        if any(name == member or name.endswith(f"/{member}") for name in names):
            return what, way
    return "a zip archive", "unpack it first"
