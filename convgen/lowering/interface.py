"""What the C runtime must know about one compiled kernel: its tensors, workspace and ISA.

Lowering produces an :class:`Interface` beside the object file; linking, the Python library and the
export read it. Plain data: importing this module needs neither NumPy nor TVM.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import BuildError
from ..problem.dtypes import BYTES
from ..problem.spec import ConvSpec

#: Version of the C functions and structs (``runtime/types.h``) and of the manifest that goes with them: the major
#: version of packages, so that a change of a network's functions after which programs no longer compile raises it, too.
ABI = 4
#: Alignment in bytes of packed tensors, of the workspace and of each allocation within it.
ALIGNMENT = 64
#: Bytes before the first packed tensor: magic, ABI version, identity, size, checksum.
HEADER_BYTES = 64
#: CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapL2promotion of the CUDA driver, by dtype and by bytes.
TENSOR_TYPES, SWIZZLES = {"i8": 0, "f16": 6, "f32": 7, "bf16": 9}, {0: 0, 32: 1, 64: 2, 128: 3}
PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}
#: Most packed tensors one kernel may have, and most threads it may run on (``runtime.h``, ``types.h``).
MAX_PACKED, MAX_THREADS = 16, 1024

#: A C identifier that leaves room for ``lib….so`` in a file name. Exported symbols are ``<name>_run``
#: and the like, so ``convgen`` itself would collide with the shared types.
_NAME = re.compile(r"(?!convgen\Z)[A-Za-z][A-Za-z0-9_]{0,199}\Z")
_FEATURE = re.compile(r"[a-z0-9][a-z0-9._-]*\Z")


def abi_text(device: bool) -> str:
    """How a library names its ABI; a library for a GPU has other functions, and so another name."""
    return f"convgen CUDA ABI {ABI}" if device else f"convgen ABI {ABI}"


def round_up(size: int) -> int:
    """``size`` in bytes, rounded up to :data:`ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def check_name(name: object) -> str:
    """The name of a kernel, checked.

    Raises:
        BuildError: it is not a C identifier of at most 200 letters, digits and underscores.
    """
    if not isinstance(name, str) or not _NAME.match(name):
        expected = "a C identifier that begins with a letter, of at most 200 characters, other than 'convgen'"
        raise BuildError(f"name: expected {expected}, found {name!r}")
    return name


@dataclass(frozen=True)
class TensorInfo:
    """One dense row-major tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "f32"

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape)


def boundary(spec: ConvSpec) -> dict[str, TensorInfo]:
    """The tensors at the user's boundary by name, in the C functions' order; those the spec lacks are absent."""
    dtypes = spec.dtypes
    return {name: TensorInfo(name, shape, dtypes[name]) for name, shape in spec.shapes.items()}


class Architecture(NamedTuple):
    """Which GPUs a piece of code runs on.

    Attributes:
        virtual: PTX, compiled when it is loaded.
        major, minor: the compute capability.
        exact: of this capability only.
    """

    virtual: bool
    major: int
    minor: int
    exact: bool


def read_architecture(text: str) -> Architecture:
    """What a name such as ``sm_90a`` or ``compute_80`` says.

    Raises:
        BuildError: it is not like these.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)", text)
    if match is None:
        raise BuildError(f"images: expected one for sm_90a, compute_80 or the like, found {text!r}")
    return Architecture(match[1] == "compute", int(match[2]), int(match[3]), bool(match[4]))


@dataclass(frozen=True)
class TensorMap:
    """How the copy engine of a GPU reads or writes a tensor: what ``cuTensorMapEncodeTiled``, or ``…Im2col`` where
    there are corners, is told. Axes are innermost first; what is outside the tensor reads as zero, and is not written.

    Attributes:
        dtype, dims: the tensor.
        strides: bytes from one element to the next, of every axis but the innermost.
        box: elements of a copy along each axis; in im2col mode, channels and pixels.
        swizzle: bytes of the rows that are swizzled in shared memory.
        lower, upper: in im2col mode, per spatial axis, where pixels begin and end, from the first and the last one.
        steps: in im2col mode, elements from one that is read to the next, per axis.
        promotion: bytes that L2 reads of memory together, at least.
    """

    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    lower: tuple[int, ...] = ()
    upper: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    promotion: int = 128


@dataclass(frozen=True)
class Persistent:
    """How blocks of a GPU take one tile after another: :mod:`convgen.cuda.persistent`.

    Attributes:
        type: ``cg_persistent`` of hopper.h, with its arguments.
        blocks: that have something to do, at most.
        warpgroups: of a block, that multiply; one more fetches.
        piece_sums: sums of a piece that a thread has.
        operands: bytes of shared memory for operands and barriers.
        resident: blocks that a core holds at once.
        cluster: blocks that run together.
        dst: how the copy engine stores pieces; None where threads do.
    """

    type: str
    blocks: int
    warpgroups: int
    piece_sums: int
    operands: int
    resident: int
    cluster: int = 1
    dst: TensorMap | None = None


@dataclass(frozen=True)
class Launch:
    """One launch of a device function.

    Attributes:
        function: its name in the images.
        grid, block: blocks, and threads of a block, along x, y and z.
        shared: bytes of dynamic shared memory.
        arguments: what its pointers point to: ``src``, ``residual``, ``packed0`` …, ``dst``, or ``workspace0`` ….
        maps: of those that are no pointers but maps, by their names.
    """

    function: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: tuple[str, ...]
    maps: Mapping[str, TensorMap] = dataclasses.field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class DeviceCode:
    """A kernel's code for GPUs: launched one after the other on one stream.

    Attributes:
        images: code by what it is for, the best first: a cubin for ``sm_80``, PTX for ``compute_80`` and later.
        launches: in order.
        workspace: bytes of what the launches hand to each other, ``workspace0`` ….
    """

    images: tuple[tuple[str, bytes], ...]
    launches: tuple[Launch, ...]
    workspace: tuple[int, ...] = ()


@dataclass(frozen=True)
class Interface:
    """One compiled kernel as its caller sees it.

    The object file defines two functions of the TVM FFI ABI, their arguments in this order::

        __tvm_ffi_pack(weights, [bias], [slope], [scale], [src_zero], [weights_zero], [dst_zero], [sum],
                       *packed)
        __tvm_ffi_main(src, [residual], *packed, dst)

    Args:
        name: prefix of the exported C functions.
        spec: the layer; gives the shapes of all tensors but the packed ones.
        packed: outputs of pack and trailing inputs of main, of any rank; at most 16.
        workspace_main: upper bound of the bytes main holds at once outside parallel regions, each
            allocation rounded up to 64.
        workspace_task: the same for one task of a parallel region.
        isa: CPU features the code needs, as :mod:`convgen.hardware.isa` names them; ``()`` = baseline.
        device: of a kernel that runs on a GPU; the object file then defines ``__tvm_ffi_pack`` only, and there
            is no CPU workspace.

    Raises:
        BuildError: a field is not what it must be.
    """

    name: str
    spec: ConvSpec
    packed: tuple[TensorInfo, ...]
    workspace_main: int
    workspace_task: int
    isa: tuple[str, ...]
    device: DeviceCode | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 1 <= len(self.packed) <= MAX_PACKED:
            raise BuildError(f"packed: expected 1 to {MAX_PACKED} tensors, found {len(self.packed)}")
        for tensor in self.packed:
            if tensor.dtype not in BYTES or not tensor.shape or min(tensor.shape) < 1:
                raise BuildError(f"packed: expected tensors of known dtype and sizes >= 1, found {tensor}")
        for field in ("workspace_main", "workspace_task"):
            if getattr(self, field) < 0:
                raise BuildError(f"{field}: expected bytes >= 0, found {getattr(self, field)}")
        for feature in self.isa:
            if not _FEATURE.match(feature):
                raise BuildError(f"isa: expected names of CPU features, found {feature!r}")

    @property
    def arguments(self) -> dict[str, TensorInfo]:
        """The tensors the user passes, by name."""
        return boundary(self.spec)

    @property
    def lowered_arguments(self) -> dict[str, TensorInfo]:
        """The same buffers under the shapes the object file was compiled for (``spec.core``)."""
        return boundary(self.spec.core)

    @property
    def packed_offsets(self) -> tuple[int, ...]:
        """Byte offset of every packed tensor in the packed buffer."""
        offsets, end = [], HEADER_BYTES
        for tensor in self.packed:
            offsets.append(end)
            end += round_up(tensor.bytes)
        return tuple(offsets)

    @property
    def packed_size(self) -> int:
        """Bytes of the packed buffer, its header included."""
        return HEADER_BYTES + sum(round_up(tensor.bytes) for tensor in self.packed)

    def workspace_size(self, threads: int) -> int:
        """Bytes of workspace a call on ``threads`` threads needs."""
        return round_up(self.workspace_main) + threads * round_up(self.workspace_task)
