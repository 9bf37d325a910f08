"""Shell completion, in the shells themselves."""

from __future__ import annotations

import os
import subprocess

import pytest
from commands import Run, python

# ---- completion -------------------------------------------------------------------------------


def test_completion_scripts(run: Run) -> None:
    for shell in ("bash", "zsh", "fish"):
        status, out, _ = run("completion", shell)
        assert status == 0
        assert f"{shell}_complete" in out
    checked = subprocess.run(["bash", "-n"], input=run("completion", "bash")[1], text=True, check=False)
    assert checked.returncode == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["b"], {"build", "bench"}),
        (["build", "convt"], {"convtranspose1d", "convtranspose2d", "convtranspose3d"}),
        (["show", "--schedule", "cpu_d"], {"cpu_direct"}),
        (["records", "m"], {"merge"}),
    ],
)
def test_completion_knows_commands_operators_and_schedules(words: list[str], expected: set[str]) -> None:
    line = " ".join(["convgen", *words])
    environment = {"_CONVGEN_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    done = python("-m", "convgen", env={**os.environ, **environment})
    assert expected <= {entry.partition(",")[2] for entry in done.stdout.split()}
