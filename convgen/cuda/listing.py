"""A GPU kernel's code as text: CUDA C++, PTX or machine code."""

from __future__ import annotations

from ..lowering.lower import Lowered
from .code import compiled, disassembled, generate


def listing(lowered: Lowered, kind: str) -> str:
    """A lowered candidate as ``cuda``, ``ptx`` or ``sass`` for its target.

    Raises:
        UnsupportedError: the compiler or the disassembler is not installed.
        BuildError: TVM or the compiler failed.
    """
    text = generate(lowered).text
    if kind == "cuda":
        return text
    cubin, ptx, _ = compiled(text, lowered.target.arch)
    return disassembled(cubin) if kind == "sass" else ptx.rstrip(b"\0").decode()
