"""Depthwise convolutions and the 1×1 convolutions that read them, strip by strip of rows.

What stands between the two is then as large as a strip, and lies in the cache when it is read again: every strip of it
has the same place in the arena. In NHWC a strip of an image is one piece of memory, so nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..hardware.target import Target
from .graph import Convolution, Graph, Node, Operator

#: The share of a core's L2 that a strip's tensors take at most: the rest is for weights and what else is there.
SHARE = 0.5
#: Strips of one pair at most: each is two steps, which start all threads.
MOST = 64


@dataclass(frozen=True)
class Pair:
    """A depthwise convolution, and the 1×1 convolution that alone reads it."""

    depthwise: Convolution
    pointwise: Convolution

    @property
    def rows(self) -> int:
        """That are between the two."""
        return self.depthwise.spec.out_spatial[0]

    def strips(self, height: int) -> list[tuple[int, int]]:
        """The first row of each strip and the one after its last."""
        return [(begin, min(begin + height, self.rows)) for begin in range(0, self.rows, height)]

    def reads(self, begin: int, end: int) -> tuple[int, int, tuple[int, int]]:
        """The rows of src that rows of dst are computed from, first and one after the last; what pads these."""
        spec = self.depthwise.spec
        first = begin * spec.stride[0] - spec.padding[0][0]
        last = (end - 1) * spec.stride[0] - spec.padding[0][0] + spec.window[0]
        low, high = max(0, first), min(spec.in_spatial[0], last)
        return low, high, (low - first, last - high)


def pairs(graph: Graph) -> Iterator[Pair]:
    """Those that can be computed in strips: of one image, and at stride 1 the second."""
    users, producers = graph.users(), graph.producers()
    for node in graph.convolutions:
        first = producers.get(node.inputs[0])
        if not isinstance(first, Convolution) or first.output in graph.outputs or len(users[first.output]) > 1:
            continue
        spec, next_spec = first.spec, node.spec
        is_depthwise = spec.is_depthwise and not spec.transposed and not spec.residual
        if is_depthwise and next_spec.is_pointwise and next_spec.groups == 1 and spec.n == 1 and not node.rows:
            yield Pair(first, node)


def height_of(pair: Pair, target: Target) -> int:
    """The rows of a strip whose tensors lie in L2, or of the least that there may be; 0, no strips, where all do."""
    spec, pointwise = pair.depthwise.spec, pair.pointwise.spec
    room = SHARE * target.l2 * target.cores  # cores have parts of a strip
    moved = sum(spec.bytes[name] for name in ("src", "dst")) + pointwise.bytes["dst"]
    height = max(math.floor(pair.rows * room / moved), math.ceil(pair.rows / MOST))
    return height if height < pair.rows else 0


def in_strips(graph: Graph, target: Target, height: int | None = None) -> None:
    """Compute the pairs of a graph in strips.

    Args:
        height: rows of a strip; what suits the caches where None.
    """
    replaced: dict[str, list[Node]] = {}
    for pair in list(pairs(graph)):
        rows = height_of(pair, target) if height is None else max(height, math.ceil(pair.rows / MOST))
        if 0 < rows < pair.rows and all(low < high for low, high, _ in (pair.reads(*s) for s in pair.strips(rows))):
            replaced[pair.depthwise.output] = []
            replaced[pair.pointwise.output] = _nodes(graph, pair, rows)
    graph.nodes = [made for node in graph.nodes for made in replaced.get(node.output, [node])]
    graph.order()


def _nodes(graph: Graph, pair: Pair, height: int) -> list[Node]:
    """What computes a pair in strips: in the end the strips, which lie where they belong, are the output."""
    depthwise, pointwise = pair.depthwise, pair.pointwise
    nodes: list[Node] = []

    def rows_of(name: str, begin: int, end: int) -> str:
        """Some rows of a tensor."""
        shape = graph.shapes[name]
        part, starts = (
            _tensor(graph, name, begin, end - begin),
            tuple(begin * (axis == 2) for axis in range(len(shape))),
        )
        nodes.append(Operator(name, "slice", (name,), part, {"starts": starts, "steps": (1,) * len(shape)}))
        return part

    parts = []
    for begin, end in pair.strips(height):
        low, high, padding = pair.reads(begin, end)
        spec = depthwise.spec
        sizes, pads = (high - low, *spec.in_spatial[1:]), (padding, *spec.padding[1:])
        between = _tensor(graph, depthwise.output, begin, end - begin)
        spec = spec.with_(in_spatial=sizes, padding=pads)
        src = rows_of(depthwise.inputs[0], low, high)
        nodes.append(replace(depthwise, spec=spec, inputs=(src,), output=between))
        others = tuple(rows_of(name, begin, end) for name in pointwise.inputs[1:])
        spec = pointwise.spec.with_(in_spatial=(end - begin, *pointwise.spec.in_spatial[1:]))
        parts.append(_tensor(graph, pointwise.output, begin, end - begin))
        nodes.append(replace(pointwise, spec=spec, inputs=(between, *others), output=parts[-1]))
    nodes.append(Operator(pointwise.name, "concat", tuple(parts), pointwise.output, {"axis": 2}))
    return nodes


def _tensor(graph: Graph, whole: str, begin: int, rows: int) -> str:
    """A new tensor of so many rows of another."""
    n, channels, _, *others = graph.shapes[whole]
    part = graph.fresh(f"{whole}[{begin}:{begin + rows}]")
    graph.shapes[part] = (n, channels, rows, *others)
    if (dtype := graph.dtype(whole)) != "f32":
        graph.dtypes[part] = dtype
    return part
