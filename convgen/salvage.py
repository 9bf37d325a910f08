"""Rows of a damaged SQLite file, read page by page.

SQLite's own reader gives up at the first bad page on the way to a row, so one damaged page near
the root of a table hides all of it. Rows sit in leaf pages that can be read on their own (see
https://www.sqlite.org/fileformat2.html); this module reads every leaf it finds. What it returns is
not to be trusted: the caller checks each row.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

Value = None | int | float | str | bytes

_TABLE_LEAF, _INDEX_LEAF = 0x0D, 0x0A
_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
_MAGIC = b"SQLite format 3\0"


def cells(path: Path) -> Iterator[tuple[int, list[Value]]]:
    """(rowid, columns) of every leaf cell that ``path``, or its write-ahead log, still holds: rows
    of a table; of an index its columns, then the rowid. The schema's page is left out.

    Raises:
        OSError: the file cannot be read.
    """
    pages, usable = _pages(path)
    for number, page in pages.items():
        if number > 1 and len(page) == usable and page[0] in (_TABLE_LEAF, _INDEX_LEAF):
            yield from _leaf(page, pages, usable)


def _pages(path: Path) -> tuple[dict[int, bytes], int]:
    """Page number -> content, the log's committed pages over the file's, and the page size."""
    data = path.read_bytes()
    size = int.from_bytes(data[16:18], "big") if data.startswith(_MAGIC) else 0
    if size < 512 or size & (size - 1):
        size = 4096  # SQLite's default: the header is damaged, or says 65536, which no store uses
    pages = {at // size + 1: data[at : at + size] for at in range(0, len(data), size)}

    log_path = path.with_name(path.name + "-wal")
    log = log_path.read_bytes() if log_path.exists() else b""
    pending: dict[int, bytes] = {}
    for at in range(32, len(log) - size - 23, size + 24):
        if log[at + 8 : at + 16] != log[16:24]:
            break  # the salt of an earlier round: what follows has been overtaken
        pending[int.from_bytes(log[at : at + 4], "big")] = log[at + 24 : at + 24 + size]
        if log[at + 4 : at + 8] != bytes(4):  # the last page of a committed transaction
            pages |= pending
            pending = {}
    return pages, size


def _leaf(page: bytes, pages: dict[int, bytes], usable: int) -> Iterator[tuple[int, list[Value]]]:
    """The readable cells of a leaf page."""
    is_table = page[0] == _TABLE_LEAF
    largest = usable - 35 if is_table else (usable - 12) * 64 // 255 - 23
    least = (usable - 12) * 32 // 255 - 23
    count = int.from_bytes(page[3:5], "big")
    for pointer in range(8, min(8 + 2 * count, usable), 2):
        try:
            length, at = _varint(page, int.from_bytes(page[pointer : pointer + 2], "big"))
            rowid, at = _varint(page, at) if is_table else (0, at)
            if length > len(pages) * usable:
                continue  # no such payload: a damaged cell
            local = length
            if length > largest:  # the rest is in a chain of overflow pages
                local = least + (length - least) % (usable - 4)
                local = least if local > largest else local
            payload = page[at : at + local]
            if local < length:
                payload += _overflow(int.from_bytes(page[at + local : at + local + 4], "big"), length - local, pages)
            values = _record(payload)
            if not is_table:
                last = values.pop()
                rowid = last if isinstance(last, int) else 0
        except (IndexError, KeyError, ValueError):
            continue  # a damaged cell
        yield rowid, values


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
