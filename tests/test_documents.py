"""README and the pages of docs/: commands that exist, links that lead somewhere, figures that were measured."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from paths import ROOT

from convgen.cli import cli
from convgen.formats import sources
from convgen.formats.sources import read_specs
from convgen.problem.activation import ALIASES, DEFAULTS
from convgen.problem.dtypes import DTYPES
from convgen.problem.layout import PLAIN
from convgen.problem.spec import OPERATORS, ConvSpec
from convgen.problem.tokens import DIRECTIONS, FLAGS, PADDING_WORDS, read_token
from convgen.topics import topic_text, topics

RESULTS = ROOT / "bench" / "results"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *sorted((ROOT / "examples").glob("*.md"))]
#: Machines whose whole models README has figures of.
ZEN_4, SAPPHIRE_RAPIDS = "amd-epyc-25-17-1", "intel-r-xeon-r-processor-6-167-1"
PLACEHOLDER = re.compile(r"[\[\]…|]|\bN\b|CLASS|HOST:PORT|DIR/|\bSPEC\b|\bLAYER\b|\bID\b|\bTOPIC\b")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_files_of_layers_that_are_shown_can_be_read_whole(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    shown.append(re.sub(r"(?m)^    ", "", sources.__doc__.partition("::\n\n")[2].partition("\n\n")[0]))
    for text, names in zip(shown, (["conv1", "conv2", "fc"], ["conv1", "fc"]), strict=True):
        (tmp_path / "net.toml").write_text(text)
        left_out: list[str] = []
        entries = read_specs(tmp_path / "net.toml", skipped=left_out)
        assert (left_out, [entry.names for entry in entries]) == ([], [(name,) for name in names])
    (one,) = re.findall(r"may be a descriptor instead: `(.*)`", page)
    (tmp_path / "net.toml").write_text(f"layers = [{one}]")
    assert read_specs(tmp_path / "net.toml")[0].spec == entries[-1].spec


# ---- commands ---------------------------------------------------------------------------------


def shell_lines(text: str) -> Iterator[str]:
    """The lines of blocks that are shell, those continued by a backslash joined, without comments."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in ("", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                yield re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").strip()


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Command lines of convgen, and whether it is one that can be typed, in a block, or a mention in running text."""
    for line in shell_lines(text):
        if line.startswith("convgen ") and "─" not in line:  # nor a picture
            yield line.replace("$model", "model.onnx"), not PLACEHOLDER.search(line)
    without_blocks = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`(convgen\s[a-z][^`]*)`", without_blocks):
        yield " ".join(code.split()), False


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that words name, and the words behind it."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_are_understood(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line, complete in commands(document.read_text(encoding="utf-8")):
        command, words = command_of(shlex.split(re.split(r" [|>&] ", line)[0])[1:])
        assert not isinstance(command, click.Group) or not words or words[0].startswith(("-", "…")), line
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} - {"--help", "--version"}
        assert {option.rstrip("],") for option in given} <= known, line
        if complete and "--help" not in words:
            for word in words:
                if re.search(r"\.(toml|jsonl?|sqlite|onnx|tar\.gz)$", word):
                    Path(word).parent.mkdir(parents=True, exist_ok=True)
                    Path(word).touch()
            command.make_context("convgen", words)  # raises where click does not understand


def test_the_check_of_commands_sees_them() -> None:
    found = [line for document in DOCUMENTS for line, _ in commands(document.read_text(encoding="utf-8"))]
    assert len(found) > 100
    assert command_of(["fleet", "pack", "model.onnx"])[0].name == "pack"
    assert list(commands("```\nconvgen show x  # what\n```\nand `convgen\nbuild y`")) == [
        ("convgen show x", True),
        ("convgen build y", False),
    ]


# ---- links ------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """The headings of a page as the web pages of repositories, and the site, name them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "bench" / "README.md"], ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", text):
        target = (document.parent / link).resolve() if link else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), f"{link}#{anchor}"


def test_readme_has_no_links_that_only_a_repository_has() -> None:
    assert re.findall(r"\]\((?!https?:)[^)]*\)", (ROOT / "README.md").read_text(encoding="utf-8")) == []


def test_every_page_is_in_the_site_and_every_topic_exists() -> None:
    index = (ROOT / "docs" / "index.rst").read_text(encoding="utf-8")
    entries = re.findall(r"^   ([a-z/-]+)$", index, re.MULTILINE)
    assert len(entries) == len(set(entries))
    assert {entry for entry in entries if "/" not in entry} == {page.stem for page in PAGES}
    _, reading = (ROOT / "README.md").read_text(encoding="utf-8").split("## Where to read on")
    named = re.findall(r"`(?:convgen help )?([a-z][a-z-]+)`", reading)
    assert set(named) <= set(topics())
    assert len(named) > 15


# ---- the language of specs --------------------------------------------------------------------


def test_the_page_about_specs_has_every_token() -> None:
    words = set(re.findall(r"[\w-]+", " ".join(re.findall(r"`([^`\n]+)`", topic_text("spec")))))
    assert words >= {*OPERATORS, *DEFAULTS, *PADDING_WORDS, *DIRECTIONS, *FLAGS, *DTYPES, *PLAIN, *ALIASES} - {
        "leakyrelu"
    }


def test_tokens_that_the_page_about_specs_names_are_read() -> None:
    rows = re.findall(r"^\| (`.*?) \|", topic_text("spec"), re.MULTILINE)
    tokens = [token for row in rows for token in re.findall(r"`([^`]+)`", row)]
    assert len(tokens) > 60
    for token in tokens:
        if token not in (*OPERATORS, "i8"):  # which in 1-D is a size, too: read by ConvSpec.parse
            rank = (
                1 if token in ("ncw", "nwc", "ncw8c") else 3 if "d" in token and token.startswith(("nc", "nd")) else 2
            )
            read_token(token.replace("lo,hi", "0,1"), rank)
    block, *_ = re.findall(r"```\n(conv2d .*?)\n```", topic_text("spec"))
    assert ConvSpec.parse(block).descriptor == block


# ---- figures ----------------------------------------------------------------------------------


def whole_models(machine: str, threads: int = 1) -> list[list[str]]:
    """The rows of f32: model, convgen, ONNX Runtime, OpenVINO f32, …, OpenVINO default, ratio."""
    text = (RESULTS / machine / "whole.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text, flags=re.MULTILINE)[threads]
    assert section.startswith(f"{threads} thread")
    lines = [line.strip("|\n ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if len(cells) == 8 and cells[0] not in ("model", "---")]


def rounds_to(shown: str, measured: str) -> bool:
    """Whether a figure is one of a table, with fewer digits."""
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - float(measured.split()[0])) <= 0.5001 * 10.0**-digits + 1e-9


def test_the_table_of_readme_is_the_measured_one() -> None:
    """Every library on one and on two threads."""
    measured = [{name: cells for name, *cells in whole_models(ZEN_4, threads)} for threads in (1, 2)]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in readme.splitlines() if line.startswith("| `") and "**" in line]
    assert {row[0].strip("`") for row in rows} == set(measured[0]) == set(measured[1])
    for name, *libraries, ratio, default in rows:
        for cell, both in zip(
            (*libraries, default, ratio), zip(*(of[name.strip("`")] for of in measured), strict=True), strict=True
        ):
            shown = [cell] * 2 if cell == "–" else cell.replace("*", "").split(" / ")
            for figure, wanted in zip(shown, both, strict=True):
                assert figure == wanted or rounds_to(figure, wanted), (name, cell)


def test_means_are_those_of_committed_tables() -> None:
    results = "\n".join(path.read_text(encoding="utf-8") for path in RESULTS.rglob("*.md"))
    for document in (ROOT / "README.md", ROOT / "docs" / "performance.md"):
        text = document.read_text(encoding="utf-8")
        ratios = re.findall(r"(\d\.\d\d)×", text)
        assert len(ratios) >= 4
        assert [ratio for ratio in ratios if not re.search(rf"(?<![\d.]){re.escape(ratio)}(?!\d)", results)] == []
        for ratio, count in re.findall(r"(\d\.\d\d)×\*{0,2} over (\d+)(?: models)?", text):
            assert re.search(rf"ean {ratio} over {count} models|mean of {count} ratios: \*\*{ratio}", results), (
                ratio,
                count,
            )


def test_the_range_that_readme_begins_with_is_that_of_the_tables() -> None:
    shown = re.findall(r"(\d\.\d) to (\d\.\d) times", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(shown) == 2
    for machine, (least, most) in zip((ZEN_4, SAPPHIRE_RAPIDS), shown, strict=True):
        ratios = [float(cells[-1].split()[0]) for cells in whole_models(machine)]
        assert rounds_to(least, str(min(ratios)))
        assert rounds_to(most, str(max(ratios)))


def test_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
