"""A compiled network: its library, loaded, and what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..folders import TemporaryFolder
from ..hardware.target import Target, check_native, resolve
from ..kernel.kernel import check_threads
from ..kernel.names import check_export_name
from ..lowering.schedule import Candidate
from ..lowering.versions import versions
from ..problem.spec import ConvSpec
from ..records.answer import choose as choose_candidate
from ..records.answer import find_record
from ..records.opening import Records, open_store
from .compile import Built, compile_plan, with_candidates
from .export import write_network
from .graph import Convolution
from .library import NetworkLibrary
from .plan import Plan, Product, plan
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

    def layers(self) -> list[dict[str, Any]]:
        """Each step as JSON values: its node, what it computes, and of a convolution how."""
        found = []
        for step in self.plan.steps:
            facts: dict[str, Any] = {"name": step.name}
            if isinstance(step.function, Product):
                candidate = step.function.candidate
                facts |= {"spec": step.function.spec.descriptor, "schedule": candidate.schedule.id}
                facts["picks"] = dict(candidate.picks)
            else:
                facts["operators"] = step.function.descriptor
            found.append(facts)
        return found

    def export(self, directory: str | Path, *, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write the library, header, weights, manifest and C example; returns the manifest.

        Args:
            facts: what else the manifest should say.

        Raises:
            ExportError: the folder cannot be written.
        """
        known: dict[str, Any] = {
            "target": self.target.spelling,
            "threads": self.threads,
            "layers": self.layers(),
            "versions": versions(),
        }
        return write_network(directory, self.built, self, {**known, **(facts or {})})


def compile_model(
    source: str | Path | ModelProto,
    target: str | Target,
    threads: int | None,
    *,
    dims: Mapping[str, int] | None = None,
    accuracy: str = "standard",
    records: Records = None,
    progress: Callable[[int, int], None] | None = None,
    name: str | None = None,
) -> Network:
    """A model with the kernels that a store has for it; see :func:`convgen.compile`."""
    resolved = resolve(target)
    if resolved.on_device:
        raise UnsupportedError(f"{resolved}: expected a CPU: networks are compiled for those")
    threads = check_threads(threads, resolved)
    resolved = resolved.on(threads)
    with open_store(records, write=False) as store:

        def recorded(spec: ConvSpec) -> Candidate | None:
            if store is None or not resolved.native:
                return None
            answer = find_record(store, spec, resolved, threads)
            candidate, record = choose_candidate(spec, resolved, answer.record, answer.rejected)
            return candidate if record or answer.rejected else None

        return compile_network(
            source, resolved, threads, dims=dims, accuracy=accuracy, choose=recorded, progress=progress, name=name
        )


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
        ExportError: nothing may be called as it is; another ``name`` helps.
        BuildError: TVM, LLVM or the C compiler failed.
    """
    check_native(target)
    graph = read_graph(source, dims)
    rewrite(graph)
    graph.nodes = [
        replace(node, spec=node.spec.with_(accuracy=accuracy)) if isinstance(node, Convolution) else node
        for node in graph.nodes
    ]
    graph.name = check_export_name(name or graph.name)  # before the minutes that compiling may take
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
