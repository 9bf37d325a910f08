"""A compiled network: its library, loaded, and what it was made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError, NotTakenError, SpecError, UnsupportedError
from ..folders import TemporaryFolder
from ..hardware.target import Target, check_native
from ..kernel.arrays import Array
from ..kernel.library import Bytes
from ..kernel.names import check_export_name, free_name
from ..lowering.candidates import default_candidate, is_last_resort
from ..lowering.versions import versions
from ..problem.dtypes import UNIT_ROUNDOFF, narrow
from ..records.opening import Records
from .choice import Choose, check_accuracy, check_strips, network_target, recorded_choice
from .compile import Built, compile_plans, with_candidates
from .cuda_library import CudaNetworkLibrary
from .export import Example, write_network
from .graph import Convolution, Graph
from .helpers import Helpers
from .layouts import Costs
from .library import NetworkLibrary, Tensors
from .plan import Plan, Product, plan
from .reading import read_graph
from .rewriting import rewrite
from .sizes import Dims, Shared, every_size
from .storage import NARROW, store_narrow
from .strips import in_strips

if TYPE_CHECKING:
    from onnx import ModelProto

    from .check.guarded import Runs
    from .check.validate import NetworkReport


class Network(NetworkLibrary):
    """A network that was compiled in this process.

    Attributes:
        plans: for each of its sizes, its steps, and where tensors lie.
        target: what it was compiled for.
        built: its files.
        accuracy: the class that its convolutions keep to.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        built: Built,
        target: Target,
        threads: int,
        accuracy: str,
        folder: TemporaryFolder,
    ) -> None:
        self.plans, self.built, self.target, self._folder = tuple(plans), built, target, folder
        self.accuracy = accuracy
        super().__init__(built.library, built.code.name, built.weights, threads)

    @property
    def plan(self) -> Plan:
        """Of the first size."""
        return self.plans[0]

    @property
    def is_tuned(self) -> bool:
        """Whether a convolution is computed by another kernel than its default."""
        products = [step.function for made in self.plans for step in made.steps if isinstance(step.function, Product)]
        return any(made.candidate != default_candidate(made.spec, self.target) for made in products)

    def layers(self, size: int = 0) -> list[dict[str, Any]]:
        """Each step at one of the sizes, as JSON values: its node, what it computes, and of a convolution how."""
        found = []
        for step in self.plans[size].steps:
            facts: dict[str, Any] = {"name": step.name}
            if isinstance(step.function, Product):
                candidate = step.function.candidate
                facts |= {"spec": step.function.spec.descriptor, "schedule": candidate.schedule.id}
                facts["picks"] = dict(candidate.picks)
            else:
                facts["operators"] = step.function.descriptor
            found.append(facts)
        return found

    def slow(self) -> list[str]:
        """The convolutions that the slow reference computes as no fast schedule applies."""
        products = [(step.name, step.function) for made in self.plans for step in made.steps]
        return list(
            dict.fromkeys(
                name
                for name, made in products
                if isinstance(made, Product)
                and made.candidate.schedule.is_reference
                and is_last_resort(made.spec, self.target)
            )
        )

    def predicted(self, size: int = 0) -> list[float | None]:
        """Of each step at one of the sizes the seconds that a convolution's default is predicted to take; None of
        others.
        """
        costs, functions = Costs(self.target), [step.function for step in self.plans[size].steps]
        return [costs.convolution(made.spec)[0] if isinstance(made, Product) else None for made in functions]

    def validate(self, source: str | Path | ModelProto, *, seed: int = 0) -> NetworkReport:
        """Check every output against ONNX Runtime: at every size, in place, on any number of threads.

        Args:
            source: the model that it was compiled from.
            seed: of the inputs.

        Returns:
            What was checked and found; nothing is raised where a check fails.

        Raises:
            UnsupportedError: ONNX Runtime does not run the model; or nothing here emulates the CPU that it is for.
        """
        return self._validate(source, seed)

    def compare(self, source: str | Path | ModelProto, *, seed: int = 0) -> NetworkReport:
        """Run once at every size beside ONNX Runtime: in a second what :meth:`validate` says with a bound for each
        element. The arguments and errors are the same.
        """
        from .check.validate import compare_network  # imports ONNX Runtime

        how: dict[str, Any] = {"threads": self.threads, "accuracy": self.accuracy, "seed": seed}
        return compare_network(self.plans, self.built, self, source, **how)

    def _validate(self, source: str | Path | ModelProto, seed: int, **how: Any) -> NetworkReport:
        from .check.validate import validate_network  # imports ONNX Runtime

        threads, accuracy = self.threads, self.accuracy
        return validate_network(self.plans, self.built, source, threads=threads, accuracy=accuracy, seed=seed, **how)

    def export(
        self,
        directory: str | Path,
        *,
        facts: Mapping[str, Any] | None = None,
        libc: str | None = None,
        example: bool = True,
    ) -> dict[str, Any]:
        """Write the library, header, weights, manifest and C example; returns the manifest.

        Args:
            facts: what else the manifest should say.
            libc: the C library that it is for: ``musl``, or the oldest glibc, ``glibc-2.28`` say, which takes zig (the
                Python package ziglang). Whatever the C compiler has where None.
            example: whether ``example.c`` is written, with an input and its outputs at every size.

        Raises:
            ExportError: the folder cannot be written.
            BuildError: there is no compiler for that C library.
        """
        known: dict[str, Any] = {
            "target": self.target.spelling,
            "threads": self.threads,
            "accuracy": self.accuracy,
            "versions": versions(),
        }
        layers = [self.layers(size) for size in range(len(self.plans))]
        shown = self._example() if example else None
        return write_network(directory, self.built, shown, layers, {**known, **(facts or {})}, libc=libc)

    def _example(self) -> Example:
        """The outputs of an export's example: its own, to the last bit."""

        def outputs(arrays: Mapping[str, Array]) -> list[Array]:
            made = self(*arrays.values(), out={})
            return list(made.values()) if isinstance(made, dict) else [made]

        return Example(outputs, tolerance=0.0)


#: How far an example's outputs may be from ONNX Runtime's, as a fraction of the largest, where operands are rounded.
_APART = {"bf16": 2**-5, "tf32": 2**-6, "f16": 2**-6}
#: What a network's library finds when it is loaded.
_LOADED = ("_dll", "_run", "_sizes", "_error", "_version", "_network")


class CrossNetwork(Network):
    """A network for a CPU that this machine's is not: compiled, exported and emulated here, and called there.

    What calls it raises :class:`~convgen.errors.UnsupportedError`.
    """

    def __init__(self, source: str | Path | ModelProto | None, *arguments: Any) -> None:
        self._source = source
        super().__init__(*arguments)

    def _open(self, path: str | os.PathLike[str], weights: str | os.PathLike[str] | Bytes) -> tuple[Tensors, ...]:
        """Not here: the inputs and outputs are known."""
        return tuple(
            Tensors({info.name: info for info in size.inputs}, {info.name: info for info in size.outputs})
            for size in self.built.code.sizes
        )

    def __getattr__(self, name: str) -> Any:
        # What loading would have found. Of all other names it has to be an ordinary error: hasattr() asks so.
        if name in _LOADED:
            check_native(self.target)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def memory(self) -> int:
        return self.built.code.memory(self.threads)

    def _validate(self, source: str | Path | ModelProto, seed: int, **how: Any) -> NetworkReport:
        from .check.cross import run_emulated

        def run(*arguments: Any) -> Runs:
            return run_emulated(self.built, *arguments[3:])

        return super()._validate(source, seed, **{"run": run, **how})

    def compare(self, source: str | Path | ModelProto, *, seed: int = 0) -> NetworkReport:
        """It runs nowhere but emulated: as :meth:`validate`."""
        return self.validate(source, seed=seed)

    def _example(self) -> Example:
        """The outputs are ONNX Runtime's: other roundings than the library's."""
        from .check.validate import run_widened  # imports ONNX Runtime

        def outputs(arrays: Mapping[str, Array]) -> list[Array]:
            if self._source is None:
                raise ExportError(f"{self.name}: expected the model that it was compiled from, found none")
            found = run_widened(self._source, arrays)
            return [narrow(found[name], info.dtype) for name, info in self.outputs.items()]

        rounded = [UNIT_ROUNDOFF.get(info.dtype, 0.0) for info in self.outputs.values()]
        return Example(outputs, tolerance=max(_APART.get(self.accuracy, 2**-10), *(4 * error for error in rounded)))


class DeviceNetwork(CudaNetworkLibrary, CrossNetwork):
    """A network for a GPU: compiled and exported on any machine, called where there is such a device."""

    def _validate(self, source: str | Path | ModelProto, seed: int, **how: Any) -> NetworkReport:
        from .check.device import run_on_device

        def run(*arguments: Any) -> Runs:
            return run_on_device(self.built, self.plans, self.target, arguments[3])

        where = "in device memory, nothing else written"
        return Network._validate(self, source, seed, **{"run": run, "where": where, **how})


def compile_model(
    source: str | Path | ModelProto,
    target: str | Target,
    threads: int | None,
    *,
    dims: Dims | None = None,
    accuracy: str = "standard",
    strips: int | None = 0,
    records: Records = None,
    progress: Callable[[int, int], None] | None = None,
    name: str | None = None,
) -> Network:
    """A model with the kernels that a store has for it; see :func:`convgen.compile`."""
    resolved, threads = network_target(target, threads, on_device=True)
    with recorded_choice(records, resolved, threads) as choose, Helpers() as helpers:
        how: dict[str, Any] = {"dims": dims, "accuracy": accuracy, "choose": choose, "strips": strips, "name": name}
        plans = plan_model(source, resolved, helpers=helpers, **how)
        return compile_planned(plans, resolved, threads, accuracy, progress, source, helpers)


def plan_recorded(
    source: str | Path | ModelProto,
    target: str | Target,
    threads: int | None,
    dims: Dims | None,
    accuracy: str,
    strips: int | None,
    records: Records,
) -> list[Plan]:
    """What :func:`compile_model` compiles."""
    resolved, threads = network_target(target, threads, on_device=True)
    with recorded_choice(records, resolved, threads) as choose:
        return plan_model(source, resolved, dims=dims, accuracy=accuracy, choose=choose, strips=strips)


def plan_graph(
    graph: Graph,
    target: Target,
    accuracy: str,
    choose: Choose | None = None,
    strips: int | None = 0,
    costs: Costs | None = None,
) -> Plan:
    """The plan of a graph, which is changed, with convolutions of an accuracy class.

    Args:
        costs: what is known of the target's already.
        choose: the candidate of a convolution, where something better than the default is known.
        strips: rows of the strips in which depthwise convolutions and the 1×1 convolutions after them are computed
            (:mod:`convgen.network.strips`): what suits the caches where None, no strips where 0.

    Raises:
        SpecError: accuracy or strips are wrong.
    """
    check_accuracy(accuracy, on_device=target.on_device)
    check_strips(strips)
    if target.on_device:
        _check_for_device(graph, strips)
    rewrite(graph)
    if strips != 0:
        in_strips(graph, target, strips)
    if accuracy in NARROW:
        store_narrow(graph, accuracy)
    else:
        graph.nodes = [
            replace(node, spec=node.spec.with_(accuracy=accuracy))
            if isinstance(node, Convolution) and not node.spec.is_quantised
            else node
            for node in graph.nodes
        ]
    made = plan(graph, target, costs)
    return made if choose is None else with_candidates(made, choose)


def _check_for_device(graph: Graph, strips: int | None) -> None:
    """Raise NotTakenError where a GPU's network does not take a node, SpecError where it has no strips."""
    if strips != 0:
        raise SpecError("strips", "0 for a GPU, which computes all rows at once", repr(strips))
    refused = {}
    for node in graph.nodes:
        found = sorted({graph.dtype(name) for name in (*node.inputs, node.output)} & {"i8", "u8", "i32", "bool"})
        if found or (isinstance(node, Convolution) and node.spec.is_quantised):
            refused[f"node {node.name!r}"] = "expected floats for a GPU, found integers or truth values"
    if refused:
        raise NotTakenError(graph.name, refused, len(graph.nodes) - len(refused))


def compile_network(
    source: str | Path | ModelProto,
    target: Target,
    threads: int,
    *,
    dims: Dims | None = None,
    accuracy: str = "standard",
    choose: Choose | None = None,
    progress: Callable[[int, int], None] | None = None,
    name: str | None = None,
) -> Network:
    """Read, plan, compile, link and load a model.

    Args:
        dims: sizes of symbolic dimensions; of one that has several, the library is made for each.
        choose: the candidate of a convolution, where something better than the default is known.

    Raises:
        BuildError: TVM, LLVM or the C compiler failed; and what :func:`plan_model` raises.
    """
    with Helpers() as helpers:
        how: dict[str, Any] = {"dims": dims, "accuracy": accuracy, "choose": choose, "name": name}
        plans = plan_model(source, target, helpers=helpers, **how)
        return compile_planned(plans, target, threads, accuracy, progress, source, helpers)


def plan_model(
    source: str | Path | ModelProto,
    target: Target,
    *,
    dims: Dims | None = None,
    accuracy: str = "standard",
    choose: Choose | None = None,
    strips: int | None = 0,
    name: str | None = None,
    helpers: Helpers | None = None,
) -> list[Plan]:
    """Read a model and plan it at each of its sizes; arguments as of :func:`compile_network` and :func:`plan_graph`.

    Args:
        helpers: are started as soon as it is known how much there is to compile, unless all that is predicted has been
            before, and so, most likely, compiled.

    Raises:
        SpecError: it cannot be read, or is not an ONNX model; or sizes, accuracy or strips are wrong.
        NotTakenError: of nodes that are not taken.
        UnsupportedError: inputs and outputs depend on the size.
        ExportError: nothing may be called as it is; another ``name`` helps.
    """
    shared = Shared()
    graphs = [shared.take(read_graph(source, size)) for size in every_size(dims or {})]
    if wrong := [graph for graph in graphs if (graph.inputs, graph.names) != (graphs[0].inputs, graphs[0].names)]:
        raise UnsupportedError(
            f"dims: expected the same inputs and outputs at every size, found others at {wrong[0].dims}"
        )
    name = check_export_name(name) if name else free_name(graphs[0].name)  # before the minutes that compiling may take
    products = len({node.spec for graph in graphs for node in graph.convolutions})
    costs = Costs(target, (lambda: helpers.begin(products)) if helpers is not None else (lambda: None))
    plans = []
    for graph in graphs:
        graph.name = name
        plans.append(plan_graph(graph, target, accuracy, choose, strips, costs))
    return plans


def compile_planned(
    plans: Sequence[Plan],
    target: Target,
    threads: int,
    accuracy: str,
    progress: Callable[[int, int], None] | None = None,
    source: str | Path | ModelProto | None = None,
    helpers: Helpers | None = None,
) -> Network:
    """Compile, link and load what :func:`plan_model` gives.

    Args:
        source: the model, which a network for another CPU needs when it is exported.
        helpers: as of :func:`compile_plans`.

    Raises:
        BuildError: TVM, LLVM or the C compiler failed.
    """
    folder = TemporaryFolder(runs=True)
    try:
        with folder.writing():
            built = compile_plans(plans, target, folder.path, progress, helpers)
            made = plans, built, target, threads, accuracy, folder
            if target.on_device:
                return DeviceNetwork(source, *made)
            return Network(*made) if target.native else CrossNetwork(source, *made)
    except BaseException:
        folder.close()
        raise
