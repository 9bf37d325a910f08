"""The architecture, as imports: a folder of ``convgen`` imports from those above it in a list."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

#: The folders and modules of the package, top to bottom. ``schedules`` and ``targets`` stand at the top of the tree.
ORDER = (
    "errors",
    "topics",
    "interrupts",
    "folders",
    "deferred",
    "processes",
    "problem",
    "hardware",
    "formats",
    "lowering",
    "cpu",
    "records",
    "cuda",
    "targets",
    "schedules",
    "kernel",
    "check",
    "measure",
    "tuning",
    "network",
    "bridges",
    "report",
    "api",
    "cli",
)
#: Modules of the package itself, which give names of others to the outside.
OUTSIDE = ("", "__main__", "onnx_reader", "torch")


def modules() -> dict[str, Path]:
    """Every module by its dotted name below ``convgen``."""
    found = {}
    for base, prefix in ((ROOT / "convgen", ""), (ROOT / "schedules", "schedules"), (ROOT / "targets", "targets")):
        for path in base.rglob("*.py"):
            if base.name == "convgen" and path.relative_to(base).parts[0] in ("schedules", "targets"):
                continue  # links of a development checkout
            parts = [*filter(None, [prefix]), *path.relative_to(base).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[tuple[str, str, int]]:
    """What a module imports of the package, inside functions and for types too: module, name and line."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            elif base == "convgen" or base.startswith("convgen."):
                base = base.removeprefix("convgen").lstrip(".")
            else:
                continue
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield (inner, "", node.lineno) if inner in MODULES else (base, alias.name, node.lineno)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("convgen."):
                    yield alias.name.removeprefix("convgen."), "", node.lineno


def folder(module: str) -> str:
    return module.partition(".")[0]


INSIDE = [module for module in MODULES if module not in OUTSIDE]


def test_every_folder_has_its_place() -> None:
    assert {folder(module) for module in INSIDE} <= set(ORDER)


@pytest.mark.parametrize("module", INSIDE)
def test_imports_go_up_the_list(module: str) -> None:
    own = folder(module)
    wrong = [
        f"line {line}: {other or 'convgen'}"
        for other, _, line in imports(module)
        if folder(other) != own and (not other or ORDER.index(folder(other)) > ORDER.index(own))
    ]
    assert not wrong


@pytest.mark.parametrize("module", INSIDE)
def test_private_names_stay_in_their_module(module: str) -> None:
    assert not [f"line {line}: {other}.{name}" for other, name, line in imports(module) if name.startswith("_")]


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: {other for other, _, _ in imports(module)} - {module} for module in INSIDE}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_a_cpu_s_schedule_says_what_it_takes_and_no_more() -> None:
    """At most 150 lines; how it is computed lies in ``convgen/cpu``, whose modules other schedules share."""
    lengths = {path.name: path.read_text().count("\n") for path in (ROOT / "schedules").glob("cpu_*.py")}
    assert len(lengths) > 10
    assert {name: length for name, length in lengths.items() if length > 150} == {}
    assert sum(lengths.values()) <= 2400


def test_schedules_name_no_machine() -> None:
    """What they know of one is a fact of ``convgen/cpu/model.py`` or ``convgen/hardware``: no rates, no processors."""
    processors = (
        "zen|epyc|ryzen|xeon|haswell|broadwell|skylake|icelake|sapphire|granite|graviton|neoverse|cortex|hopper"
    )
    machine = re.compile(rf"\d(?:\.\d*)?e[+]?(?:9|1[0-9])\b|\b(?:znver\d|{processors})", re.IGNORECASE)
    found = {
        f"{path.name}:{number}": token.string
        for path in (ROOT / "schedules").glob("*.py")
        for number, token in _code(path)
        if machine.search(token.string)
    }
    assert found == {}


def _code(path: Path) -> Iterator[tuple[int, tokenize.TokenInfo]]:
    """The words of a file that are no comments and no docstrings."""
    with path.open("rb") as file:
        before = tokenize.ENCODING
        for token in tokenize.tokenize(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            if token.type != tokenize.STRING or before not in (tokenize.ENCODING, tokenize.NEWLINE, tokenize.INDENT):
                yield token.start[0], token
            before = token.type
