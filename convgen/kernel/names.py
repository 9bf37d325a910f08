"""What an exported library may be called: so that neither its functions nor its files get in the way of others."""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import cache

from ..errors import ExportError
from ..lowering.interface import check_name
from ..lowering.runtime import source
from ..lowering.toolchain import NATIVE, compiler

#: Whether there is a header, and whether it is one of ours.
_PROBE = """\
#if __has_include(<{name}.h>)
#include <{name}.h>
#ifdef CONVGEN_ABI
convgen:own
#else
convgen:other
#endif
#endif
"""


def check_export_name(name: object) -> str:
    """The name of a library that is exported, checked.

    Keywords, macros and ``main`` are fine: every function has more after the name. What a name must not be is

    - ``convgen``, or begin with ``convgen_``: what all libraries share is called so;
    - reserved for C++, as every identifier with two underscores in a row is;
    - another library's name with ``_driver`` after it: ``a`` for a GPU has a function ``a_driver_error``;
    - what makes one of its functions one of the C library's, as ``argp`` does with ``argp_error``;
    - a header or a library that this machine's C compiler finds: in the folder of an export ``<math.h>`` or ``-lm``
      would be the kernel's own, and no program there would compile. An earlier export that was installed is none.

    Raises:
        BuildError: it is not a C identifier of at most 200 characters.
        ExportError: it is one of these; says which.
    """
    text = check_name(name)
    if reason := _reserved(text) or _taken(text):
        raise ExportError(f"name: expected one that nothing else has, found {text!r}: {reason}")
    return text


def free_name(name: str) -> str:
    """A name that a library may have: a C identifier itself, or where something else has it, ``model_<name>_network``.

    Raises:
        BuildError, ExportError: as of :func:`check_export_name`, of both.
    """
    try:
        return check_export_name(name)
    except ExportError:
        return check_export_name(f"model_{name}_network")


def _reserved(name: str) -> str:
    if name.startswith("convgen_"):
        return "names that begin with convgen_ are what all exported libraries share"
    if "__" in f"{name}_":
        return "names with two underscores in a row, or with one at the end, are reserved for C++"
    for part in sorted(_middles()):
        if name.endswith(f"_{part}"):
            other = name.removesuffix(f"_{part}")
            return f"a library called {other} may have the same functions"
    return ""


@cache
def _functions() -> frozenset[str]:
    """What follows a library's name in the names of its functions."""
    kinds = ("header", "header_cuda", "header_network", "header_cpu", "header_end")
    headers = "".join(source(f"{kind}.template.h") for kind in kinds)
    return frozenset(re.findall(r"\$\{name\}_(\w+)\(", headers))


def _middles() -> set[str]:
    """What stands between two names in functions such as ``driver_error``, which end as others are called."""
    functions = _functions()
    ends = ((one, other) for one in functions for other in functions if one.endswith(f"_{other}"))
    return {one.removesuffix(f"_{other}") for one, other in ends}


def _taken(name: str) -> str:
    """What this machine has of that name; a compiler that does not answer fails when the library is linked."""
    for file in ("libc.so.6", "libm.so.6"):
        library = ctypes.CDLL(file)
        for function in sorted(_functions()):
            if hasattr(library, f"{name}_{function}"):
                return f"{name}_{function} is a function of the C library"
    header = _said("-E", "-x", "c", "-", text=_PROBE.format(name=name))
    if "convgen:own" in header:
        return ""
    if "convgen:other" in header:
        return f"<{name}.h> is a header that the C compiler finds"
    for file in (f"lib{name}.so", f"lib{name}.a"):
        if "/" in _said(f"-print-file-name={file}"):  # else the answer is the name itself
            return f"{file} is a library that the C compiler finds"
    return ""


def _said(*arguments: str, text: str = "") -> str:
    """What this machine's C compiler answers."""
    command = [*compiler(NATIVE), *arguments]
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
