"""A compiled network: its library, loaded, and what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..folders import TemporaryFolder
from ..hardware.target import Target, check_native
from ..lowering.schedule import Candidate
from ..problem.spec import ConvSpec
from .compile import Built, compile_plan, with_candidates
from .library import NetworkLibrary
from .plan import Plan, plan
from .reading import read_graph
from .rewriting import rewrite

if TYPE_CHECKING:
    from onnx import ModelProto


class Network(NetworkLibrary):
    """A network that was compiled in this process.

    Attributes:
        plan: its steps, and where tensors lie.
        target: what it was compiled for.
        built: its files.
    """

    def __init__(self, made: Plan, built: Built, target: Target, threads: int, folder: TemporaryFolder) -> None:
        super().__init__(built.library, built.code.name, built.weights, threads)
        self.plan, self.built, self.target, self._folder = made, built, target, folder


def compile_network(
    source: str | Path | ModelProto,
    target: Target,
    threads: int,
    *,
    dims: Mapping[str, int] | None = None,
    accuracy: str = "standard",
    choose: Callable[[ConvSpec], Candidate | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    name: str | None = None,
) -> Network:
    """Read, plan, compile, link and load a model.

    Args:
        choose: the candidate of a convolution, where something better than the default is known.

    Raises:
        SpecError: it cannot be read, or is not an ONNX model.
        UnsupportedError: nodes that are not taken; or this machine cannot run the target's code.
        BuildError: TVM, LLVM or the C compiler failed.
    """
    check_native(target)
    graph = read_graph(source, dims)
    rewrite(graph)
    for number, node in enumerate(graph.nodes):
        graph.nodes[number] = _with_accuracy(node, accuracy)
    graph.name = name or graph.name
    made = plan(graph, target)
    if choose is not None:
        with_candidates(made, choose)
    folder = TemporaryFolder(runs=True)
    try:
        with folder.writing():
            built = compile_plan(made, target, folder.path, progress)
            return Network(made, built, target, threads, folder)
    except BaseException:
        folder.close()
        raise


def _with_accuracy(node: Any, accuracy: str) -> Any:
    from dataclasses import replace

    from .graph import Convolution

    return replace(node, spec=node.spec.with_(accuracy=accuracy)) if isinstance(node, Convolution) else node
