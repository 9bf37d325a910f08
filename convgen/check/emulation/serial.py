"""A GPU's schedule as code for the CPU that does what the threads do, one after the other.

Thread-bound loops become serial ones, and memory of every scope plain memory. Threads that fill shared memory
together are a loop of their own within the loop over threads, so that each thread's turn fills it anew: the same
values many times over, slow and right.

What it proves: index maps, tails, types and the epilogue, on this machine. What it does not: barriers, races
between threads, and anything the CUDA compiler does.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ...hardware.target import Target, resolve
from ...lowering.lower import Lowered

#: TIR's numbers of a loop's kinds.
_SERIAL, _UNROLLED, _THREAD_BINDING = 0, 3, 4


def serialised(lowered: Lowered, target: Target | None = None) -> Lowered:
    """The candidate for a CPU, this machine's where none is given.

    TIR has no mutator in Python: the serialised form is edited.
    """
    import tvm

    graph = json.loads(tvm.ir.save_json(lowered.module))
    nodes = graph["nodes"]
    none = next(i for i, node in enumerate(nodes) if node["type"] == "None")
    plain = len(nodes)
    nodes.append({"type": "ffi.String", "data": "global"})
    for node in nodes:
        if node["type"] == "tirx.For":
            if node["data"]["kind"] in (_UNROLLED, _THREAD_BINDING):  # LLVM unrolls by itself
                node["data"] |= {"kind": _SERIAL, "thread_binding": none}
            annotations = nodes[node["data"]["annotations"]]
            annotations["data"] = _without_pipelines(nodes, annotations["data"])
        elif node["type"] == "tirx.BufferType":
            node["data"]["storage_scope"] = plain
    return replace(lowered, target=target or resolve("cpu"), module=tvm.ir.load_json(json.dumps(graph)))


def _without_pipelines(nodes: list[dict[str, Any]], annotations: list[int]) -> list[int]:
    """Annotations as keys and values in turn, without those that start copies ahead of their use."""
    pairs = zip(annotations[::2], annotations[1::2], strict=True)
    kept = [pair for pair in pairs if not str(nodes[pair[0]]["data"]).startswith("software_pipeline")]
    return [index for pair in kept for index in pair]
