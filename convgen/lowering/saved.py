"""TVM's serialised form of a module, looked at and edited as text.

It is an array of nodes that name each other by their numbers. Parsed as a whole it would be hundreds of thousands of
objects, among which Python's garbage collector looks for cycles while they are made: most of the time that it takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..errors import BuildError

_NODE = '{"type":"'
_decoder = json.JSONDecoder()


class Saved:
    """A module's nodes.

    Raises:
        BuildError: TVM writes another form than is known here.
    """

    def __init__(self, module: Any) -> None:
        import tvm

        # Within a text a quotation mark has a backslash before it, so that a node begins wherever this is found.
        self._head, *self._nodes = tvm.ir.save_json(module).split(_NODE)
        if not self._head.endswith('"nodes":['):
            raise BuildError(f"TVM's serialised modules: expected an array of nodes, found {self._head[:80]!r}")

    def __len__(self) -> int:
        return len(self._nodes)

    def of_type(self, name: str, having: str = "") -> Iterator[int]:
        """The numbers of the nodes of a type, of those whose text has something."""
        begin = f'{name}"'
        return (number for number, text in enumerate(self._nodes) if text.startswith(begin) and having in text)

    def having(self, text: str) -> Iterator[int]:
        """The numbers of the nodes whose text has something."""
        return (number for number, node in enumerate(self._nodes) if text in node)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A node: its ``type``, and its ``data``."""
        found: dict[str, Any] = _decoder.raw_decode(_NODE + self._nodes[number])[0]
        return found

    def __setitem__(self, number: int, node: dict[str, Any]) -> None:
        text = _NODE + self._nodes[number]
        end = _decoder.raw_decode(text)[1]
        self._nodes[number] = json.dumps(node, separators=(",", ":")).removeprefix(_NODE) + text[end:]

    def module(self) -> Any:
        """The module of these nodes."""
        from tvm_ffi.serialization import from_json_graph_str  # tvm.ir.load_json first walks them for old versions

        return from_json_graph_str(_NODE.join((self._head, *self._nodes)))
