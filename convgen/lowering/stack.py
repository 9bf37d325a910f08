"""How much of a thread's stack a kernel takes, read from its machine code.

LLVM tells nobody: what a schedule puts on the stack is in the TIR, what registers spill is not. But each function sets
its frame aside with one instruction that has the size in it.
"""

from __future__ import annotations

import re
import struct

from ..errors import BuildError

#: Bytes of stack that a call takes at most, of every thread that has a part in it; musl gives threads 128 KiB.
STACK = 64 << 10
#: Of these what is left for the runtime, the C library, saved registers and frames too small to be counted.
_RUNTIME = 8 << 10

_SUB_RSP = re.compile(rb"\x48\x81\xec(....)", re.DOTALL)
_SUB_SP = 0xD10003FF  # sub sp, sp, #imm12 {, lsl #12}
_IMMEDIATE, _SHIFTED = 0x003FFC00, 0x00400000
#: Larger numbers are no frame, but other bytes that look like the instruction.
_LARGEST = 16 << 20


def stack_bytes(object_file: bytes, arch: str) -> int:
    """The frames of all functions of an object file, which none calls again: no call takes more than all of them."""
    if arch == "aarch64":
        words = struct.unpack_from(f"<{len(object_file) // 4}I", object_file)
        found = [w for w in words if w & ~(_IMMEDIATE | _SHIFTED) == _SUB_SP]
        sizes = [((w & _IMMEDIATE) >> 10) << (12 if w & _SHIFTED else 0) for w in found]
    else:
        sizes = [int.from_bytes(match[1], "little") for match in _SUB_RSP.finditer(object_file)]
    return sum(size for size in sizes if size < _LARGEST and size % 8 == 0)


def check_stack(object_file: bytes, arch: str) -> None:
    """Refuse what takes too much of it.

    Raises:
        BuildError: says how much.
    """
    if (found := stack_bytes(object_file, arch)) > STACK - _RUNTIME:
        raise BuildError(f"expected functions with frames of at most {STACK - _RUNTIME} bytes, found {found}")
