"""Symbols of ELF object files, renamed or made local: what ``objcopy`` does, for every architecture that has 64 bits.

The format is that of the System V ABI (chapter 4, "Object Files"), little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import numpy as np

from ..errors import BuildError

#: Types of sections: a table of symbols, relocations that carry their addend, a group that is linked together, and
#: LLVM's list of symbols whose address is taken.
_SYMTAB, _RELA, _GROUP, _ADDRSIG = 2, 4, 17, 0x6FFF4C03
#: Sections that have numbers of symbols and are not written by the compilers that are used here: an error.
_OTHERS = {9: "REL", 18: "SYMTAB_SHNDX"}
_PROGBITS = 1
_HEADER, _SECTION = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQIIQQ")
_SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
_RELOCATION = np.dtype([("offset", "<u8"), ("kind", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])


def edited(
    data: bytes, rename: Mapping[str, str] | None = None, keep: Callable[[str], bool] = lambda name: True
) -> bytes:
    """An object file with its symbols renamed; those that it defines and are not kept are seen in it alone.

    Args:
        data: of a relocatable file.
        rename: old names and new ones.
        keep: whether a symbol, by its new name, stays global.

    Raises:
        BuildError: it is no relocatable ELF file of 64 bits, little-endian, or has sections that are not known here.
    """
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < _HEADER.size or struct.unpack_from("<H", data, 16)[0] != 1:
        raise BuildError("object file: expected a relocatable ELF file of 64 bits, little-endian, found another")
    header = _HEADER.unpack_from(data)
    at, count = header[6], header[12]
    sections = [list(_SECTION.unpack_from(data, at + number * _SECTION.size)) for number in range(count)]
    if found := [_OTHERS[section[1]] for section in sections if section[1] in _OTHERS]:
        raise BuildError(f"object file: expected sections of symbols that are known here, found {found[0]}")
    file = bytearray(data)
    for number, section in enumerate(sections):
        if section[1] == _SYMTAB:
            order = _edit_symbols(file, section, sections[section[6]], rename or {}, keep)
            for other in sections:
                if other[1] == _RELA and other[6] == number:
                    relocations = np.frombuffer(file, _RELOCATION, other[5] // _RELOCATION.itemsize, other[4])
                    relocations["symbol"] = order[relocations["symbol"]]
                elif other[1] == _GROUP and other[6] == number:
                    other[7] = int(order[other[7]])
                elif other[1] == _ADDRSIG:  # a hint for linkers; they leave it out
                    other[1] = _PROGBITS
    for number, section in enumerate(sections):
        _SECTION.pack_into(file, at + number * _SECTION.size, *section)
    return bytes(file)


def _edit_symbols(
    file: bytearray, table: list[int], strings: list[int], rename: Mapping[str, str], keep: Callable[[str], bool]
) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """Edit a table of symbols and the section of their names, which moves to the end of the file; returns each
    symbol's new number.
    """
    symbols = np.frombuffer(file, _SYMBOL, table[5] // _SYMBOL.itemsize, table[4]).copy()
    text = bytearray(file[strings[4] : strings[4] + strings[5]])
    for symbol in symbols:
        begin = int(symbol["name"])
        old = text[begin : text.index(0, begin)].decode()
        new = rename.get(old, old)
        if new != old:
            symbol["name"] = len(text)
            text += new.encode() + b"\0"
        if symbol["section"] and symbol["info"] >> 4 and not keep(new):
            symbol["info"], symbol["other"] = symbol["info"] & 15, 0
    local = symbols["info"] >> 4 == 0
    order = np.argsort(~local, kind="stable")  # local ones come first
    table[7] = int(local.sum())
    file[table[4] : table[4] + table[5]] = symbols[order].tobytes()
    strings[4], strings[5] = len(file), len(text)
    file += text
    return np.argsort(order).astype(np.uint32)
