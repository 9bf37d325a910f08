"""Words that are almost right get the right one."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import SMALL, Run

from convgen.errors import ConvgenError, meant
from convgen.problem.activation import DEFAULTS
from convgen.problem.layout import LAYOUTS
from convgen.problem.spec import OPERATORS, ConvSpec
from convgen.problem.tokens import ACCURACIES
from convgen.topics import topics


def test_a_file_of_another_kind_is_told_which_are_read(tmp_path: Path, run: Run) -> None:
    (tmp_path / "layers.csv").write_text("name,ic,oc\na,3,8\n")
    status, _, err = run("show", tmp_path / "layers.csv")
    assert status == 2
    assert "layers.csv: line 1: operator: expected one of conv1d, " in err
    assert "(layers by fields: a file that ends in .toml, .yaml, .yml, .json), found 'name,ic,oc'" in err


#: What was typed, and what was meant.
TYPOS: list[tuple[list[str], str]] = [
    (["tnue", SMALL], "tune"),
    (["records", "lst"], "list"),
    (["tune", SMALL, "--secnds", "3"], "--seconds"),
    (["build", SMALL.replace("conv2d", "con2d")], "conv2d"),
    (["build", SMALL.replace("relu", "rleu")], "relu"),
    (["build", SMALL, "stritc"], "strict"),
    (["build", SMALL, "nhcw"], "nhwc"),
    (["build", SMALL, "--accuracy", "strcit"], "strict"),
    (["compile", __file__, "--accuracy", "strcit", "--out", "out"], "strict"),
    (["build", SMALL, "--schedule", "cpu_drect"], "cpu_direct"),
    (["tune", SMALL, "--exclude", "cpu_wingrad"], "cpu_winograd"),
    (["fleet", "pack", SMALL, "--target", "cpu:haswell", "--exclude", "cpu_wingrad"], "cpu_winograd"),
    (["build", "seperable2d", "ic8", "oc8", "i12x10", "k3x3"], "separable2d"),
    (["build", SMALL, "--target", "cpy"], "cpu"),
    (["build", SMALL, "--target", "cpu:haswel"], "cpu:haswell"),
    (["tune", SMALL, "--target", "haswell"], "cpu:haswell"),
    (["build", SMALL, "--target", "cuda:sm90a"], "cuda:sm_90a"),
    (["build", SMALL, "--target", "cuda:h100"], "cuda:sm_90a"),
    (["build", SMALL, "--target", "a100"], "cuda:sm_80"),
    (["build", SMALL, "--target", "nvidia"], "cuda"),
    (["build", SMALL, "--target", "native"], "cpu"),
    (["build", SMALL, "--target", "cpu:apple-m1"], "cpu:aarch64-apple-a14"),
    (["build", SMALL, "--target", "cpu:raspberrypi4"], "cpu:aarch64-cortex-a72"),
    (["build", SMALL, "--target", "cpu:x86_64"], "cpu:x86-64"),
    (["build", SMALL, "--target", "x86:haswell"], "cpu:haswell"),
    (["bench", SMALL, "--peers", "onnxrutime"], "onnxruntime"),
    (["show", SMALL, "--ir", "asn"], "asm"),
    (["convert", SMALL, "-o", "-", "--to", "benchdn"], "benchdnn"),
    (["records", "list", "--outcome", "build_eror"], "build_error"),
    (["help", "netwoks"], "networks"),
    (["help", "records", "bst"], "best"),
]


@pytest.mark.parametrize(("words", "right"), TYPOS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_typo_gets_the_word_that_was_meant(words: list[str], right: str, run: Run) -> None:
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert right in err.lower().partition("did you mean ")[2], err


@pytest.mark.parametrize("command", ["show", "build", "convert", "tune"])
@pytest.mark.parametrize(("name", "typed"), [("resnet.onnx", "resnt.onnx"), ("layers.toml", "layres.toml")])
def test_files_are_suggested(command: str, name: str, typed: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    status, out, err = run(command, tmp_path / typed, *(["-o", "-"] if command == "convert" else []))
    assert (status, out) == (2, "")
    assert err.endswith(f"found no such file; did you mean {name}?\n")


def test_layer_names_are_suggested(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "net.toml"
    file.write_text(f'[[layers]]\nname = "head.conv"\nspec = "{SMALL}"\n')
    status, _, err = run("build", file, "--accuracy", "hed.conv=strict")
    assert status == 2
    assert "did you mean head.conv?" in err
    file.write_text(f'[[layrs]]\nname = "head.conv"\nspec = "{SMALL}"\n[[layers]]\nspec = "{SMALL}"\n')
    assert "did you mean layers?" in run("build", file)[2]


@pytest.mark.parametrize("word", [*OPERATORS, *DEFAULTS, *LAYOUTS, *ACCURACIES])
def test_every_word_of_specs_is_found_with_a_letter_too_many(word: str) -> None:
    """Where the mistaken word is no spec's."""
    text = f"{word}x n1" if word in OPERATORS else f"{SMALL.removesuffix(' relu')} {word}x"
    with pytest.raises(ConvgenError) as raised:
        ConvSpec.parse(text)
    if len(word) > 2:
        assert word in str(raised.value).partition("did you mean ")[2]


def test_what_is_like_nothing_gets_no_suggestion() -> None:
    assert meant("quite another thing", topics()) == ""
    assert meant("", ["a"]) == ""


def test_help_prints_pages_and_the_help_of_commands(run: Run) -> None:
    status, out, _ = run("help")
    assert status == 0
    for topic, title in topics().items():
        assert topic in out
        assert title in out
    status, out, _ = run("help", "networks")
    assert status == 0
    assert out.startswith("# ")
    assert run("help", "records", "best")[1].startswith("Usage: convgen records best [OPTIONS]")
