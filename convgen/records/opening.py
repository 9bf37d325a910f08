"""Opening the record store that a caller means: the default one, a path, an open one or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .store import RecordStore, default_path

#: What a caller may say of the store; see :func:`open_store`.
Records = RecordStore | str | Path | bool | None


@contextmanager
def open_store(records: Records, *, write: bool = True) -> Iterator[RecordStore | None]:
    """The store that ``records`` means, open inside the ``with`` block.

    Args:
        records: None or True: the default store; False: no store; a path; or an open store, which stays open.
        write: whether the caller writes to it. Otherwise a store that this process may only read will do.
    """
    if isinstance(records, RecordStore):
        yield records
    elif records is False:
        yield None
    else:
        path = default_path() if records is None or records is True else Path(records)
        readonly = not write and path.exists() and not _is_writable(path)
        with RecordStore(path, readonly=readonly) as store:
            yield store


def _is_writable(path: Path) -> bool:
    """Whether this process may write to a store, and to its folder, where SQLite writes the log."""
    path = path.resolve()
    return all(os.access(each, os.W_OK, effective_ids=True) for each in (path, path.parent))
