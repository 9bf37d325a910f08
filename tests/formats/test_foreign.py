"""Files of other kinds: ONNX models by content, and what is no model here by name."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from onnx import parser

from convgen.errors import SpecError
from convgen.formats.sources import read_specs

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,8,8] x, float[4,3,3,3] w) => (float[N,4,6,6] y) { y = Conv(x, w) }"""


def archive(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name in names:
            made.writestr(name, "x")
    return stream.getvalue()


def numpy_file() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


@pytest.mark.parametrize("name", ["model.pb", "model", "0123abcd", "model.onnx.bak", "MODEL.ONNX"])
def test_an_onnx_model_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(parser.parse_model(MODEL).SerializeToString())
    (entry,) = read_specs(path, {"N": 2})
    assert entry.spec.descriptor == "conv2d n2 ic3 oc4 i8x8 k3x3 s1x1 p0x0 nobias"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.onnx.gz", gzip.compress(b"model"), "a gzip archive: unpack it first"),
        ("m.pt", archive("m/data.pkl", "m/data/0"), r"torch\.save or TorchScript: export the module with torch\.onnx"),
        (
            "m.pt2",
            archive("archive_format", "m/models/model.json"),
            r"an exported program of PyTorch: .*convgen\.compile\(torch\.export\.load\(",
        ),
        ("m.pth", pickle.dumps({"a": 1}, protocol=2), "a pickle, as old PyTorch files are"),
        ("m.keras", archive("config.json", "model.weights.h5"), r"a model of Keras 3: write model\.to_json\(\)"),
        ("m.h5", b"\x89HDF\r\n\x1a\n\0", r"HDF5, as Keras's \.h5 is: write model\.to_json\(\)"),
        ("m.zip", archive("model.onnx"), "a zip archive: unpack it first"),
        ("m.safetensors", (20).to_bytes(8, "little") + b'{"w":{"dtype":"F32"}', "safetensors, which has weights"),
        ("m.tflite", b"\x1c\0\0\0TFL3\x14\0", r"a model of TensorFlow Lite: .*tf2onnx\.convert --tflite"),
        ("m.ort", b"\x1c\0\0\0ORTM\x14\0", r"ONNX Runtime's own format: give the \.onnx"),
        ("m.xml", b'<?xml version="1.0"?>\n<net name="m" version="11">', "a model of OpenVINO: give the ONNX model"),
        ("saved_model.pb", b"\x08\x01\x12\xff\x01\x0a\x05serve", r"a SavedModel of TensorFlow: .*--saved-model"),
        (
            "frozen.pb",
            b"\n1\n\x05input\x12\x0bPlaceholder*\x0b\n\x05dtype\x12\x020\x01\0",
            "a frozen graph of TensorFlow",
        ),
        ("m.npy", numpy_file(), "an array of NumPy"),
    ],
    ids=lambda value: "data" if isinstance(value, bytes) else None,  # archives have the time in them
)
def test_other_kinds_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    for skipped in (None, list[str]()):
        with pytest.raises(SpecError, match=f"file: expected layers or an ONNX model, found .*{message}") as caught:
            read_specs(path, skipped=skipped)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["layers", "layers.pb", "layers.txt", "layers.log"])
def test_text_is_text_whatever_its_suffix(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for text in ("\nconv1d ic1 oc1 i3 k1", "\ufeffconv1d ic1 oc1 i3 k1\n", "# \x12\n\nconv1d ic1 oc1 i3 k1"):
        path.write_text(text)
        assert len(read_specs(path)) == 1


def test_bytes_that_are_nothing(tmp_path: Path) -> None:
    path = tmp_path / "junk"
    path.write_bytes(b"\xff\xfe\0\1")
    with pytest.raises(SpecError, match="file: expected UTF-8 text, found byte 0xff at 0"):
        read_specs(path)
