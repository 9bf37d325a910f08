"""Shell completion, in the shells themselves."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SMALL, Run, python

# ---- scripts ----------------------------------------------------------------------------------


def test_completion_scripts(run: Run) -> None:
    for shell in ("bash", "zsh", "fish"):
        status, out, _ = run("completion", shell)
        assert status == 0
        assert f"{shell}_complete" in out
        if shutil.which(shell):
            checked = subprocess.run([shell, "-n"], input=out, text=True, check=False)
            assert checked.returncode == 0
    assert 'string split --max 1 ","' in run("completion", "fish")[1]  # lists have more commas


# ---- what is completed ------------------------------------------------------------------------

#: What was typed, and what it is completed to, in full.
LINES = [
    ("convgen b", {"build", "bench"}),
    ("convgen build convt", {"convtranspose1d", "convtranspose2d", "convtranspose3d"}),
    ("convgen show --schedule cpu_d", {"cpu_direct"}),
    ("convgen records m", {"merge"}),
    ("convgen records list --outcome ti", {"timeout"}),
    (f"convgen build '{SMALL}' --target c", {"cpu", "cpu:haswell", "cuda:sm_90a"}),
    ("convgen build --target cpu:zn", {"cpu:znver1", "cpu:znver4", "cpu:znver5"}),
    ("convgen build --target=cpu:zn", {"cpu:znver1", "cpu:znver4", "cpu:znver5"}),
    ("convgen build --target cpu:aarch64-neoverse-n", {"cpu:aarch64-neoverse-n1", "cpu:aarch64-neoverse-n2"}),
    ("convgen build --target cpu:cortex-a7", {"cpu:cortex-a72", "cpu:cortex-a76"}),
    ("convgen compile --target cuda:sm_9", {"cuda:sm_90", "cuda:sm_90a"}),
    ("convgen records best --target cuda:sm_7", {"cuda:sm_70", "cuda:sm_75"}),
    ("convgen tune --target cpu:haswell,cpu:znver", {"cpu:haswell,cpu:znver1", "cpu:haswell,cpu:znver4"}),
    ("convgen fleet pack --target cuda:sm_80,cuda:sm_8", {"cuda:sm_80,cuda:sm_86", "cuda:sm_80,cuda:sm_89"}),
    ("convgen bench --peers o", {"onnxruntime", "openvino"}),
    ("convgen bench --peers torch,o", {"torch,onnxruntime", "torch,openvino"}),
    ("convgen tune --exclude cpu_direct,cpu_d", set()),
    ("convgen tune --exclude cpu_rows,cpu_d", {"cpu_rows,cpu_direct"}),
    ("convgen fuzz --directions forward,", {"forward,data", "forward,weights"}),
    ("convgen build --accuracy head=str", {"head=strict"}),
    ("convgen build --libc m", {"musl"}),
]
#: The same, of which nothing else may come.
ALONE = {line for line, _ in LINES if "," in line or "peers" in line or "sm_" in line} - {
    line for line, _ in LINES if "znver" in line or "sm_80," in line
}


def asked(line: str, **variables: str) -> list[str]:
    done = python("-m", "convgen", env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line for line, _ in LINES])
def test_words_are_completed(line: str, expected: set[str]) -> None:
    """As zsh asks, which takes words as they are."""
    words = shlex.split(line) + [""] * line.endswith(" ")
    known = {"_CONVGEN_COMPLETE": "zsh_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    lines = asked(line, **known)
    found = set(lines[1::3])
    assert expected <= found
    assert expected == found or line not in ALONE


def test_fish_gets_lists_whole() -> None:
    line = "convgen bench --peers torch,open"
    known = {"_CONVGEN_COMPLETE": "fish_complete", "COMP_WORDS": line, "COMP_CWORD": line.split()[-1]}
    assert asked(line, **known) == ["plain,torch,openvino"]


BASH = """
eval "$({program} completion bash)"
complete_line() {{
    COMP_LINE="$1"; COMP_POINT=${{#1}}; COMP_WORDBREAKS=$2
    _convgen_completion convgen
    printf '%s\\n' "${{COMPREPLY[@]}}"
    echo --
}}
{calls}
"""
USUAL = " \t\n\"'><=;|&(:"


@pytest.mark.parametrize(
    ("breaks", "replaced"),
    [
        (USUAL, ["znver1", "znver1", "cpu:haswell,cpu:znver1", "openvino", "strict", "conv2d", "build"]),
        (
            USUAL.replace(":", "").replace("=", ""),
            [
                "cpu:znver1",
                "--target=cpu:znver1",
                "cpu:haswell,cpu:znver1",
                "--peers=openvino",
                "head=strict",
                "conv2d",
                "build",
            ],
        ),
    ],
    ids=["words end at colons", "words are whole"],
)
def test_bash_replaces_what_it_takes_for_a_word(breaks: str, replaced: list[str], tmp_path: Path) -> None:
    """Bash puts a completion in the place of what is behind the last sign that breaks words."""
    program = tmp_path / "convgen"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m convgen "$@"\n')
    program.chmod(0o755)
    lines = [
        "convgen build --target cpu:znver",
        "convgen build --target=cpu:znver",
        "convgen tune --target cpu:haswell,cpu:znver",
        "convgen bench --peers=openv",
        "convgen build --accuracy head=str",
        'convgen build "conv2',
        "convgen buil",
    ]
    calls = "\n".join(f"complete_line {shlex.quote(line)} {shlex.quote(breaks)}" for line in lines)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH.format(program=shlex.quote(str(program)), calls=calls)],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    answers = [answer.split() for answer in done.stdout.split("--\n")[:-1]]
    expected = [word.rpartition(":")[2] if ":" in breaks else word for word in replaced]
    for line, found, word in zip(lines, answers, expected, strict=True):
        assert word in found, (line, found, done.stderr)
