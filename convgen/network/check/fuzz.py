"""Whole networks as what is fuzzed: drawn ones through the full validation, shrunk to fewer nodes where that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from ...check.fuzz.outcome import Outcome
from ...check.fuzz.shrinking import Step
from ...errors import BuildError, ConvgenError
from ...hardware.target import Target, check_native, resolve
from ..network import compile_network
from .drawing import draw_network
from .drawn import Drawn
from .guarded import guarded_runs
from .validate import validate_network


@dataclass(frozen=True)
class NetworkCase:
    """A network of a seed, or some of its nodes: what the others compute are inputs then.

    Attributes:
        index: its number.
        nodes: numbers of the nodes that are kept; all where None.
    """

    seed: int
    index: int
    target: str
    threads: int
    nodes: tuple[int, ...] | None = None

    @property
    def command(self) -> str:
        """The command that repeats the check."""
        options = f"--seed {self.seed} --start {self.index} --specs 1 --target {self.target} --threads {self.threads}"
        kept = "" if self.nodes is None else f" --nodes {','.join(map(str, self.nodes))}"
        return f"convgen fuzz --networks {options}{kept}"

    @property
    def group(self) -> str:
        return "network"

    @property
    def operator(self) -> str:
        return "network"

    def flaw(self) -> Outcome | None:
        return None

    def job(self) -> Callable[[], Outcome]:
        """The validation of the compiled network."""
        return partial(check, self)


@dataclass(frozen=True)
class NetworkDraw:
    """A drawn network, what it is made of, and its only case."""

    cases: tuple[NetworkCase, ...]
    operators: tuple[str, ...]
    dtypes: tuple[str, ...]
    features: tuple[str, ...]
    skipped: tuple[str, ...] = ()


class Networks:
    """Drawn networks.

    Args:
        threads: that they run on.
        nodes: the only nodes that are kept; all where None.

    Raises:
        UnsupportedError: the target is unknown or does not run here.
    """

    def __init__(
        self, target: str | Target = "cpu", *, threads: int | None = None, nodes: tuple[int, ...] | None = None
    ) -> None:
        self.target, self.threads, self.nodes = resolve(target), threads or 2, nodes
        check_native(self.target)

    @property
    def options(self) -> str:
        """What the command says to draw the same."""
        return f" --networks --target {self.target} --threads {self.threads}"

    def draw(self, seed: int, index: int) -> NetworkDraw:
        """Network ``index`` of a seed."""
        drawn = draw_network(seed, index)
        kept = [node for number, node in enumerate(drawn.nodes) if self.nodes is None or number in self.nodes]
        features = [f"opset {drawn.opset}", f"inputs: {len(drawn.inputs)}"]
        case = NetworkCase(seed, index, self.target.spelling, self.threads, self.nodes)
        return NetworkDraw((case,) if kept else (), tuple(node.op_type for node in kept), ("f32",), tuple(features))

    def steps(self) -> list[Step[NetworkCase]]:
        """Fewer nodes, then fewer threads."""
        return [_fewer_nodes, _one_thread]


@lru_cache(maxsize=4)
def _drawn(seed: int, index: int) -> Drawn:
    return draw_network(seed, index)


def _fewer_nodes(case: NetworkCase) -> Iterable[NetworkCase]:
    """Half of the nodes, then all but some, then all but one."""
    nodes = case.nodes or tuple(range(len(_drawn(case.seed, case.index).nodes)))
    size = len(nodes) // 2
    while size:
        for begin in range(0, len(nodes), size):
            kept = nodes[:begin] + nodes[begin + size :]
            if kept:
                yield replace(case, nodes=kept)
        size //= 2


def _one_thread(case: NetworkCase) -> Iterable[NetworkCase]:
    if case.threads > 1:
        yield replace(case, threads=1)


def check(case: NetworkCase) -> Outcome:
    """Compile a drawn network and validate it; never raises."""
    drawn = _drawn(case.seed, case.index)
    model = drawn.model(case.nodes)
    inputs = {value.name: drawn.values[value.name] for value in model.graph.input}
    try:
        target = resolve(case.target).on(case.threads)
        network = compile_network(model, target, case.threads)
        report = validate_network(
            network.plans,
            network.built,
            model,
            threads=case.threads,
            accuracy=network.accuracy,
            inputs=inputs,
            expected={name: drawn.values[name] for name in network.outputs},
            is_drawn=True,
            run=guarded_runs,
        )
    except BuildError as error:
        return Outcome("build", str(error))
    except ConvgenError as error:
        return Outcome("refused", str(error))
    except Exception as error:  # whatever it is, it is a finding
        return Outcome("error", f"{type(error).__name__}: {error}")
    made = tuple(check.name for check in report.checks)
    for failed in report.checks:
        if not failed.passed:
            kind = {"float": "wrong", "places": "memory"}.get(failed.name, failed.name)
            return Outcome(kind, f"{failed.name}: {failed.found}", made)
    return Outcome("ok", "", made, report.worst_error)
