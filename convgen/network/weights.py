"""A network's file of weights: a header, then constants and packed weights, those that are alike once."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..folders import TemporaryFolder
from ..kernel.library import Library
from ..lowering.interface import HEADER_BYTES, Interface, TensorInfo, round_up
from ..lowering.link import link
from ..lowering.lower import Workspace
from ..problem.spec import ConvSpec
from .plan import Function, Plan, Product, packed


@dataclass(frozen=True)
class Compiled:
    """A function's code.

    Attributes:
        object_file: its bytes.
        workspace: scratch memory that it takes.
        packed: of a convolution, its packed tensors.
    """

    object_file: bytes
    workspace: Workspace
    packed: tuple[TensorInfo, ...] = ()

    def to_bytes(self) -> bytes:
        """All of it, for :meth:`from_bytes`."""
        packed = [[info.name, info.shape, info.dtype] for info in self.packed]
        facts = json.dumps({"workspace": [self.workspace.main, self.workspace.task], "packed": packed})
        return facts.encode() + b"\n" + zlib.compress(self.object_file, 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Compiled:
        """What :meth:`to_bytes` gave."""
        head, _, code = data.partition(b"\n")
        facts = json.loads(head)
        packed = tuple(TensorInfo(name, tuple(shape), dtype) for name, shape, dtype in facts["packed"])
        return cls(zlib.decompress(code), Workspace(*facts["workspace"]), packed)


@dataclass(frozen=True)
class Sections:
    """Where a plan's weights lie in the file.

    Attributes:
        constants: what is added to the offsets that its constants have in the plan.
        packed: of each step, where its packed tensors begin; 0 of a step without any.
    """

    constants: int
    packed: tuple[int, ...]


def write_weights(
    plans: Sequence[Plan], compiled: Mapping[Function, Compiled], isa: tuple[str, ...], path: Path
) -> tuple[list[Sections], int]:
    """Write the file but for its header, which stays zero; returns each plan's sections, and the file's size.

    Weights that several plans, or several steps of one, pack alike lie there once.
    """
    with open(path, "wb") as opened, TemporaryFolder(runs=True) as folder:
        file = _File(opened)
        packers: dict[Function, Library] = {}

        def add(plan: Plan) -> Sections:
            constants = file.add(b"".join(packed(plan.graph.constants[name]) for name in plan.constants))
            offsets = []
            for step in plan.steps:
                function, offset = step.function, 0
                if isinstance(function, Product):
                    if function not in packers:
                        packers[function] = _packer(function.spec, compiled[function], isa, folder, len(packers))
                    offset = file.add(packers[function].pack(**step.parameters)[HEADER_BYTES:].tobytes())
                offsets.append(offset)
            return Sections(constants - HEADER_BYTES, tuple(offsets))

        return [add(plan) for plan in plans], file.end


class _File:
    """The file while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._file.write(bytes(HEADER_BYTES))
        self._known: dict[bytes, int] = {}
        self.end = HEADER_BYTES

    def add(self, data: bytes) -> int:
        """Where the data lies, a multiple of 64 bytes."""
        known = self._known.setdefault(hashlib.sha256(data).digest(), self.end)
        if known == self.end:
            self._file.write(data)
            self.end += len(data)
        return known


def _packer(spec: ConvSpec, compiled: Compiled, isa: tuple[str, ...], folder: Path, number: int) -> Library:
    """A convolution's kernel by itself, which packs its weights."""
    workspace = compiled.workspace
    interface = Interface(f"packer{number}", spec, compiled.packed, workspace.main, workspace.task, isa)
    object_file = folder / f"packer{number}.o"
    object_file.write_bytes(compiled.object_file)
    return Library(link(interface, object_file, folder / f"libpacker{number}.so"), spec, interface.name, 1)


def packed_offsets(tensors: Sequence[TensorInfo], begin: int) -> list[int]:
    """Where each of a convolution's packed tensors lies, the first at ``begin``."""
    offsets = []
    for info in tensors:
        offsets.append(begin)
        begin += round_up(info.bytes)
    return offsets
