"""The bytes of an ONNX model: its graph parsed, the data of its tensors left where it is.

A graph is small and its weights are not, and a reader of shapes needs the graph alone. So a model is
walked on the level of protobuf's wire format, and what is large (a tensor's data) becomes a reference
into the file, of the kind that ONNX has for external data: a model of any size is read in the time and
memory of its graph. :meth:`ModelFile.array` reads one tensor's data when it is wanted.
"""

from __future__ import annotations

import errno
import io
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy.typing as npt
from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ...errors import SpecError
from ..foreign import foreign, missing

#: A message up to this size is taken as it is; also the largest tensor whose data stays with the graph.
SMALL = 1024
#: Limits of a graph without its tensors' data: bytes, and fields visited while they are collected.
MAX_GRAPH, MAX_FIELDS = 64 << 20, 1 << 20
_MAX_DEPTH = 100  # protobuf's own limit

#: Kind of message -> field -> the kind inside, or what to do with it.
_DROP, _DATA = "drop", "data"
_FIELDS: dict[str, dict[int, str]] = {
    "model": {6: _DROP, 7: "graph", 20: _DROP, 25: "function"},
    "graph": {1: "node", 5: "tensor", 10: _DROP, 14: _DROP, 15: "sparse", 16: _DROP},
    "function": {7: "node", 8: _DROP, 11: "attribute", 14: _DROP},
    "node": {5: "attribute", 6: _DROP, 9: _DROP},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 13: _DROP, 22: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    # float_data, raw_data and double_data have the same layout: little-endian, packed.
    "tensor": {4: _DATA, 9: _DATA, 10: _DATA, 12: _DROP, 16: _DROP},
}

#: The key under which a tensor's external data says which type it is stored as, where that is not the tensor's.
STORED = "convgen.stored"

#: What Python and NumPy raise of a node whose attributes, operands and shapes contradict each other.
CONTRADICTIONS = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)

_HALF_BYTES = frozenset({TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1})


class ModelFile:
    """A model whose tensors above :data:`SMALL` bytes refer to their data.

    Args:
        source: a path, or a model (whose external data stays unknown, as it has no folder).

    Raises:
        SpecError: it cannot be read, or is not an ONNX model; names the file.
    """

    def __init__(self, source: str | Path | ModelProto) -> None:
        self.folder: Path | None = None
        if isinstance(source, ModelProto):
            self.where = "model"
            try:
                self._file: BinaryIO = io.BytesIO(source.SerializeToString())
            except (EncodeError, ValueError) as error:
                raise SpecError("model", "below 2 GiB, or the path of a saved one", first_line(error)) from error
            size = self._file.seek(0, os.SEEK_END)
        else:
            self.where, self.folder = str(source), Path(source).parent
            self._file, size = _open(Path(source))
        try:
            self.proto = self._parse(size)
        except SpecError as error:
            self._file.close()
            if self.folder is not None and (known := foreign(Path(self.where))):
                raise SpecError("file", "an ONNX model", ": ".join(known), self.where) from error
            raise

    def _parse(self, size: int) -> ModelProto:
        proto = ModelProto()
        try:
            proto.ParseFromString(_Walk(self._file, self.where).message("model", 0, size, 0))
        except DecodeError as error:
            raise SpecError("file", "an ONNX model", first_line(error), self.where) from error
        # A damaged or other protobuf file can parse into next to nothing.
        if not proto.graph.node or not proto.opset_import:
            raise SpecError("file", "an ONNX model", "no graph in it", self.where)
        return proto

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def array(self, tensor: TensorProto) -> npt.NDArray[Any]:
        """The data of a tensor.

        Raises:
            SpecError: it is damaged, its external file is missing, too short, or not a regular file inside
                the model's folder; names the tensor.
        """
        where = f"{self.where}: tensor {tensor.name!r}"
        try:
            wanted = tensor.data_type
            if tensor.data_location == TensorProto.EXTERNAL:
                info = {entry.key: entry.value for entry in tensor.external_data}
                dtype = int(info.get(STORED, wanted))
                raw = self._external(info, tensor.dims, dtype, where)
                tensor = TensorProto(dims=tensor.dims, data_type=dtype, raw_data=raw)
            array: npt.NDArray[Any] = numpy_helper.to_array(tensor)
            return array.astype(helper.tensor_dtype_to_np_dtype(wanted), copy=False)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError("data", "that of its shape and dtype", first_line(error), where) from error

    def _external(self, info: Mapping[str, str], dims: Sequence[int], dtype: int, where: str) -> bytes:
        count = math.prod(dims)
        itemsize = helper.tensor_dtype_to_np_dtype(dtype).itemsize
        size = -(-count // 2) if dtype in _HALF_BYTES else count * itemsize
        numbers = []
        for key, default in (("offset", 0), ("length", size)):
            text = info.get(key) or str(default)
            if not (text.isascii() and text.isdecimal() and len(text) <= 18):
                raise SpecError(key, "a number of bytes", repr(text), where)
            numbers.append(int(text))
        offset, length = numbers
        if length != size or any(dim < 0 for dim in dims):
            raise SpecError("length", f"{size} bytes as its shape and dtype have", length, where)
        location = info.get("location", "")
        if not location:  # the data is in the model's own file
            return self._read(self._file, offset, length, where)
        if self.folder is None:
            raise SpecError("location", "a path to the model, for its external data", "a model in memory", where)
        with _open_external(self.folder, Path(self.where), location, where) as file:
            return self._read(file, offset, length, where)

    @staticmethod
    def _read(file: BinaryIO, offset: int, length: int, where: str) -> bytes:
        size = file.seek(0, os.SEEK_END)
        if offset + length > size:
            raise SpecError("length", f"at most the {size} bytes of the file", f"{offset} + {length}", where)
        file.seek(offset)
        return file.read(length)


def _open(path: Path) -> tuple[BinaryIO, int]:
    """A regular file and its size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not wait for a pipe's writer
    except FileNotFoundError:
        raise missing(path) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise SpecError("file", "a readable file", reason, repr(str(path))) from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return open(descriptor, "rb"), status.st_size
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise SpecError("file", "some content", "an empty file", str(path))
    kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
    raise SpecError("file", "a file", kind, str(path))


def _open_external(folder: Path, model: Path, location: str, where: str) -> BinaryIO:
    """A regular file below the model's folder; or, where that has links, below what holds the real model.

    A cache such as Hugging Face's has links ``snapshots/REVISION/…`` into ``blobs/``: data may lie beside the real
    model, or in that cache's ``blobs``. A link to anywhere else is refused.
    """
    parts = PurePosixPath(location).parts
    if not parts or "\0" in location or location.startswith("/") or ".." in parts:
        raise SpecError("location", "a relative path inside the model's folder", repr(location), where)
    try:
        return _open_below(folder, parts)
    except OSError as error:
        linked = error.errno in (errno.ELOOP, errno.ENOTDIR)
        failure, found = error, "one through a link or a file" if linked else error.strerror
    if linked:
        real = Path(os.path.realpath(folder.joinpath(*parts)))
        for root in _roots(folder, model):
            if real.is_relative_to(root):
                try:
                    return _open_below(root, real.relative_to(root).parts)
                except OSError as error:
                    failure, found = error, error.strerror
    raise SpecError("location", "a file inside the model's folder", f"{location!r}: {found}", where) from failure


def _roots(folder: Path, model: Path) -> Iterator[Path]:
    """Real folders that data which is reached by a link may be in."""
    yield Path(os.path.realpath(folder))
    yield Path(os.path.realpath(model)).parent
    for parent in Path(os.path.abspath(folder)).parents:
        if parent.name == "snapshots":
            yield Path(os.path.realpath(parent.parent / "blobs"))


def _open_below(folder: Path, parts: Sequence[str]) -> BinaryIO:
    """A regular file, reached without a link.

    Every step is opened relative to the one before, so that nothing can be exchanged in between.

    Raises:
        OSError: there is none; ELOOP or ENOTDIR where a link is on the way.
    """
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, part in enumerate(parts, 1):
            kind = os.O_DIRECTORY if number < len(parts) else os.O_NONBLOCK
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=at)
            os.close(at)
            at = inner
        if not stat.S_ISREG(os.fstat(at).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return open(at, "rb")
    except OSError:
        os.close(at)
        raise


class _Walk:
    """Copies a message without the data of large tensors and without documentation."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.file, self.where = file, where
        self.copied = self.fields = 0

    def message(self, kind: str, start: int, end: int, depth: int) -> bytes:
        """The message of that kind in the bytes from ``start`` to ``end`` of the file."""
        if depth > _MAX_DEPTH:
            raise SpecError("file", f"at most {_MAX_DEPTH} messages inside each other", "more", self.where)
        known = _FIELDS[kind]
        pieces: list[bytes] = []
        references: list[bytes] = []  # come last, as what a tensor says of its data's location must not replace them
        at = start
        while at < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise SpecError("file", f"a graph of at most {MAX_FIELDS} nodes, tensors and so on", "more", self.where)
            self.file.seek(at)
            key, at = self._varint(at, end)
            field, wire = key >> 3, key & 7
            if wire == 0:
                value, at = self._varint(at, end)
                pieces.append(_varint(key) + _varint(value))
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
                pieces.append(_varint(key) + self._bytes(size, at, end))
                at += size
            elif wire == 2:
                size, at = self._varint(at, end)
                if at + size > end:
                    raise SpecError("file", "an ONNX model", f"an end before byte {at + size}", self.where)
                inside = known.get(field) if size > SMALL else None
                if inside is None:
                    pieces.append(_field(field, self._bytes(size, at, end)))
                elif inside == _DATA:
                    references.append(_reference(at, size))
                elif inside != _DROP:
                    pieces.append(_field(field, self.message(inside, at, at + size, depth + 1)))
                at += size
            else:
                raise SpecError("file", "an ONNX model", f"a field of wire type {wire} at byte {at}", self.where)
        return b"".join(pieces + references)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at the file's position, and the position after it."""
        value = 0
        for shift in range(0, 70, 7):
            if at + shift // 7 >= end:
                break
            byte = self.file.read(1)
            if not byte:
                break
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value, at + shift // 7 + 1
        raise SpecError("file", "an ONNX model", f"a broken number at byte {at}", self.where)

    def _bytes(self, size: int, at: int, end: int) -> bytes:
        self.copied += size
        if self.copied > MAX_GRAPH:
            limit = f"at most {MAX_GRAPH >> 20} MiB beside the data of its tensors"
            raise SpecError("file", limit, "more", self.where)
        data = self.file.read(size)
        if len(data) < size or at + size > end:
            raise SpecError("file", "an ONNX model", f"an end after {at + len(data)} bytes", self.where)
        return data


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _reference(offset: int, length: int) -> bytes:
    """Fields of a TensorProto: external data without a location, which is the model's own file."""
    stub = TensorProto(data_location=TensorProto.EXTERNAL)
    for key, value in (("offset", offset), ("length", length)):
        stub.external_data.add(key=key, value=str(value))
    content: bytes = stub.SerializeToString()
    return content


def contradiction(error: Exception) -> str:
    """One of :data:`CONTRADICTIONS` in words, which what raised it need not have."""
    return f"attributes and operands that contradict each other ({type(error).__name__}: {first_line(error)})"


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
