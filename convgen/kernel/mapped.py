"""Shared libraries, mapped for as long as something uses them.

A process may have 65,530 maps (``vm.max_map_count``), and a library takes five.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import weakref

from ..folders import TemporaryFolder

_dlclose = ctypes.CDLL(None).dlclose
_dlclose.argtypes = (ctypes.c_void_p,)

#: The file at each path that libraries are loaded from, from before one is until after it no longer is.
_loaded: dict[object, tuple[str, tuple[int, int]]] = {}


def open_library(path: str) -> ctypes.CDLL:
    """Load a library; it is unmapped when the object, and every function taken from it by ``[]``, is gone.

    The system's loader knows libraries by their paths: where a file was replaced, it would give the old one again.
    So a file that takes the place of one that is loaded is loaded from a copy.
    """
    path = os.path.realpath(path)
    status = os.stat(path)
    file, key = (status.st_dev, status.st_ino), object()
    _loaded[key] = path, file
    try:
        if all(known == file for at, known in list(_loaded.values()) if at == path):
            library = ctypes.CDLL(path)
        else:
            with TemporaryFolder(runs=True) as folder:
                library = ctypes.CDLL(str(shutil.copy(path, folder)))
    except BaseException:
        del _loaded[key]
        raise
    # Not when the process ends: other threads may still be in there.
    weakref.finalize(library, _close, library._handle, key).atexit = False
    return library


def _close(handle: int, key: object) -> None:
    _dlclose(handle)
    del _loaded[key]
