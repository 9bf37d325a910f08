"""A network's file of weights: a header, then constants and packed weights, those that are alike once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from ..kernel.library import Bytes
from ..lowering.interface import HEADER_BYTES, DeviceCode, Launch, TensorInfo, TensorMap, round_up
from ..lowering.lower import Workspace
from .plan import Plan, Product, packed


@dataclass(frozen=True)
class Compiled:
    """A function's code.

    Attributes:
        object_file: its bytes.
        workspace: scratch memory that it takes.
        packed: of a convolution, its packed tensors.
        packer: of a convolution for a CPU, code that packs its weights on this machine.
        device: of a function for a GPU, its code; the object file then has what packs alone, or nothing.
    """

    object_file: bytes
    workspace: Workspace
    packed: tuple[TensorInfo, ...] = ()
    packer: bytes = b""
    device: DeviceCode | None = None

    def to_bytes(self) -> bytes:
        """All of it, for :meth:`from_bytes`."""
        packed = [[info.name, info.shape, info.dtype] for info in self.packed]
        sizes = [self.workspace.main, self.workspace.task]
        facts: dict[str, Any] = {"workspace": sizes, "packed": packed, "code": len(self.object_file)}
        images = b""
        if self.device is not None:
            launches = [dataclasses.asdict(launch) for launch in self.device.launches]
            parts = [[what, len(image)] for what, image in self.device.images]
            facts["device"] = {"images": parts, "launches": launches, "workspace": self.device.workspace}
            images = b"".join(image for _, image in self.device.images)
        return json.dumps(facts).encode() + b"\n" + zlib.compress(self.object_file + self.packer + images, 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Compiled:
        """What :meth:`to_bytes` gave."""
        head, _, code = data.partition(b"\n")
        facts = json.loads(head)
        packed = tuple(TensorInfo(name, tuple(shape), dtype) for name, shape, dtype in facts["packed"])
        files, size = zlib.decompress(code), facts["code"]
        made = cls(files[:size], Workspace(*facts["workspace"]), packed)
        if "device" not in facts:
            return dataclasses.replace(made, packer=files[size:])
        return dataclasses.replace(made, device=_device(facts["device"], files[size:]))


def _device(facts: Mapping[str, Any], data: bytes) -> DeviceCode:
    """What :meth:`Compiled.to_bytes` wrote of it; ``data`` are the images."""

    def tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

    images, begin = [], 0
    for what, size in facts["images"]:
        images.append((what, data[begin : begin + size]))
        begin += size
    launches = [
        Launch(**tuples(launch) | {"maps": {name: TensorMap(**tuples(made)) for name, made in launch["maps"].items()}})
        for launch in facts["launches"]
    ]
    return DeviceCode(tuple(images), tuple(launches), tuple(facts["workspace"]))


#: Packs a convolution's parameters.
Pack: TypeAlias = Callable[[Product, Mapping[str, Any]], Bytes]


@dataclass(frozen=True)
class Sections:
    """Where a plan's weights lie in the file.

    Attributes:
        constants: what is added to the offsets that its constants have in the plan.
        packed: of each step, where its packed tensors begin; 0 of a step without any.
    """

    constants: int
    packed: tuple[int, ...]


def write_weights(plans: Sequence[Plan], pack: Pack, path: Path) -> tuple[list[Sections], int]:
    """Write the file but for its header, which stays zero; returns each plan's sections, and the file's size.

    Weights that several plans, or several steps of one, pack alike lie there once.
    """
    with open(path, "wb") as opened:
        file = _File(opened)

        def add(plan: Plan) -> Sections:
            constants = file.add(b"".join(packed(plan.graph.constants[name]) for name in plan.constants))
            offsets = [
                file.add(pack(step.function, step.parameters).data) if isinstance(step.function, Product) else 0
                for step in plan.steps
            ]
            return Sections(constants - HEADER_BYTES, tuple(offsets))

        return [add(plan) for plan in plans], file.end


class _File:
    """The file while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._file.write(bytes(HEADER_BYTES))
        self._known: dict[bytes, int] = {}
        self.end = HEADER_BYTES

    def add(self, data: bytes | memoryview) -> int:
        """Where the data lies, a multiple of 64 bytes."""
        known = self._known.setdefault(hashlib.sha256(data).digest(), self.end)
        if known == self.end:
            self._file.write(data)
            self.end += memoryview(data).nbytes
        return known


def packed_offsets(tensors: Sequence[TensorInfo], begin: int) -> list[int]:
    """Where each of a convolution's packed tensors lies, the first at ``begin``."""
    offsets = []
    for info in tensors:
        offsets.append(begin)
        begin += round_up(info.bytes)
    return offsets
