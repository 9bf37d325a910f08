"""Rows of a damaged SQLite file, read page by page.

SQLite's own reader gives up at the first bad page on the way to a row, so one damaged page near
the root of a table hides all of it. Rows sit in pages that can be read on their own (see
https://www.sqlite.org/fileformat2.html); this module reads every one it finds. What it returns is
not to be trusted: the caller checks each row.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

Value = None | int | float | str | bytes

_TABLE, _INDEX, _TABLE_LEAF, _INDEX_LEAF = 0x05, 0x02, 0x0D, 0x0A  # kinds of pages: inner ones and leaves
_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
_MAGIC = b"SQLite format 3\0"


class File(NamedTuple):
    """What is left of a file.

    Attributes:
        pages: pages by number: the newest that the log has committed, else the file's own.
        all_pages: every page of the file and of the log.
        missing_pages: how many pages the header tells of that are missing.
        has_header: whether the file begins with a header.
    """

    pages: dict[int, bytes]
    all_pages: list[bytes]
    page_size: int
    missing_pages: int
    has_header: bool

    def cells(self) -> Iterator[tuple[int, list[Value]]]:
        """(rowid, columns) of every cell that can be read. The table's rows have their columns, an index's entries
        the columns that are indexed, cells of the table's inner pages none. A cell may come twice.
        """
        budget = 4 * self.page_size * len(self.all_pages)  # all cells of a hostile file may be the same one
        for page in self.all_pages:
            if len(page) == self.page_size and page[0] in (_TABLE, _INDEX, _TABLE_LEAF, _INDEX_LEAF):
                for length, rowid, values in _cells(page, self.pages):
                    budget -= length
                    if budget < 0:
                        return
                    yield rowid, values


def read(path: Path) -> File:
    """The file at ``path``, or what is left of it in its write-ahead log.

    Raises:
        OSError: the file is missing, or cannot be read.
    """
    path = path.resolve()  # the log is beside the file, not beside a link to it
    log_path = path.with_name(path.name + "-wal")
    log = log_path.read_bytes() if log_path.is_file() else b""
    if not path.is_file() and (path.exists() or not log):
        raise FileNotFoundError(errno.ENOENT, "no such file")
    data = path.read_bytes() if path.exists() else b""
    size = int.from_bytes(data[16:18], "big") if data.startswith(_MAGIC) else 0
    if size < 512 or size & (size - 1):
        size = 4096  # SQLite's default: the header is damaged, or says 65536, which no store uses
    pages = {at // size + 1: data[at : at + size] for at in range(0, len(data), size)}
    all_pages = list(pages.values())

    pending: dict[int, bytes] = {}
    for at in range(32, len(log) - size - 23, size + 24):
        page = log[at + 24 : at + 24 + size]
        all_pages.append(page)
        if log[at + 8 : at + 16] != log[16:24]:
            continue  # the salt of an earlier round: it has been overtaken
        pending[int.from_bytes(log[at : at + 4], "big")] = page
        if log[at + 4 : at + 8] != bytes(4):  # the last page of a committed transaction
            pages |= pending
            pending = {}
    header = pages.get(1, b"")[:100]
    has_header = len(header) == 100 and header.startswith(_MAGIC)
    count = int.from_bytes(header[28:32], "big") if has_header else 0
    present = sum(number <= count and len(page) == size for number, page in pages.items())
    return File(pages, all_pages, size, max(0, count - present), has_header)


def _cells(page: bytes, pages: dict[int, bytes]) -> Iterator[tuple[int, int, list[Value]]]:
    """(bytes of payload, rowid, columns) of the readable cells of a page."""
    kind, size = page[0], len(page)
    inner = kind in (_TABLE, _INDEX)
    is_index = kind in (_INDEX, _INDEX_LEAF)
    largest = (size - 12) * 64 // 255 - 23 if is_index else size - 35
    least = (size - 12) * 32 // 255 - 23
    start, skipped = (12, 4) if inner else (8, 0)  # an inner page and its cells have numbers of pages
    count = int.from_bytes(page[3:5], "big")
    for pointer in range(start, min(start + 2 * count, size), 2):
        try:
            at = int.from_bytes(page[pointer : pointer + 2], "big") + skipped
            length, at = _varint(page, at) if kind != _TABLE else (0, at)
            rowid, at = _varint(page, at) if not is_index else (0, at)
            if length > len(pages) * size:
                continue  # no such payload: a damaged cell
            local = length
            if length > largest:  # the rest is in a chain of overflow pages
                local = least + (length - least) % (size - 4)
                local = least if local > largest else local
            payload = page[at : at + local]
            if local < length:
                payload += _overflow(int.from_bytes(page[at + local : at + local + 4], "big"), length - local, pages)
            values = _record(payload) if kind != _TABLE else []
            if is_index:
                last = values.pop()
                rowid = last if isinstance(last, int) else 0
        except (IndexError, KeyError, ValueError):
            continue  # a damaged cell
        yield length, rowid, values


def _overflow(number: int, length: int, pages: dict[int, bytes]) -> bytes:
    """The rest of a payload; every page of the chain starts with the next one's number."""
    parts = []
    while length > 0:
        page = pages[number]
        parts.append(page[4 : 4 + length])
        length -= max(1, len(parts[-1]))  # a damaged page may be empty: end even so
        number = int.from_bytes(page[:4], "big")
    return b"".join(parts)


def _record(payload: bytes) -> list[Value]:
    """Decode SQLite's record format.

    Raises:
        IndexError, ValueError: the payload is shorter than it says, or not a record.
    """
    end, at = _varint(payload, 0)
    kinds = []
    while at < end:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    values: list[Value] = []
    for kind in kinds:
        size = (kind - 12) // 2 if kind >= 12 else 8 if kind == 7 else _INTEGER_BYTES.get(kind, 0)
        raw = payload[at : at + size]
        if len(raw) != size or kind in (10, 11):
            raise ValueError("not a record")
        at += size
        if kind == 0:
            values.append(None)
        elif kind in _INTEGER_BYTES:
            values.append(int.from_bytes(raw, "big", signed=True))
        elif kind == 7:
            values.append(struct.unpack(">d", raw)[0])
        elif kind in (8, 9):
            values.append(kind - 8)
        else:
            values.append(raw.decode() if kind % 2 else raw)
    return values


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer and the offset after it."""
    value = 0
    for at_byte in range(at, at + 8):
        value = value << 7 | data[at_byte] & 0x7F
        if data[at_byte] < 0x80:
            return value, at_byte + 1
    return value << 8 | data[at + 8], at + 9
