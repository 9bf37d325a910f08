"""Where libraries are exported to: a folder holds one, whole, whoever else writes there."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import ExportError
from ..folders import locked
from .load import MANIFEST, UNFINISHED

#: How the system says that a folder cannot take the place of what is there.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def check_destination(target: Path, library: str, files: Sequence[str]) -> None:
    """Whether an export of a library may write its files to a folder.

    Raises:
        ExportError: something else is there.
    """
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target}: expected a directory, found a file")
    for name in files:
        if (target / name).exists() and not (target / name).is_file():
            raise ExportError(f"{target / name}: expected a file or nothing, found a directory")
    path = target / MANIFEST
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["name"]
        except (ValueError, KeyError, TypeError):
            found = "something else"
        if found != library:
            raise ExportError(f"{target}: expected an earlier export of {library} or none, found {found}")
    elif others := [name for name in files if (target / name).exists()]:
        raise ExportError(
            f"{target}: expected an earlier export of {library} or none, found {', '.join(others)} without {MANIFEST}"
        )


def move(folder: Path, target: Path, library: str, files: Sequence[str]) -> None:
    """Put a folder's files, which are a library, into another one, the manifest last.

    Another export may have come first since :func:`check_destination` has looked. So a new folder is renamed into
    place, which fails where there is another one by now, and in one that is there the check is made again, with all
    others locked out. What the earlier export has left there and this one has not goes.

    Raises:
        ExportError: something else is there.
        OSError: the target cannot be written.
    """
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(folder, target)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        else:
            return
        check_destination(target, library, files)  # perhaps a file is there now
    with locked(target):
        check_destination(target, library, files)
        earlier = _listed(target)
        # Until the new manifest arrives there is no library, but a folder whose files may be replaced.
        unfinished = {"name": library, UNFINISHED: True, "files": dict.fromkeys(earlier)}
        (folder / UNFINISHED).write_text(json.dumps(unfinished), encoding="utf-8")
        os.replace(folder / UNFINISHED, target / MANIFEST)
        made = sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST)
        for name in set(earlier) - {path.name for path in made}:
            if (target / name).is_file():
                (target / name).unlink()
        for path in made:
            os.replace(path, target / path.name)


def _listed(target: Path) -> list[str]:
    """The files of an earlier export, as its manifest lists them; none where it lists what is no file beside it."""
    try:
        files = json.loads((target / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    plain = isinstance(files, dict) and all(name == Path(name).name != MANIFEST for name in files)
    return list(files) if plain else []
