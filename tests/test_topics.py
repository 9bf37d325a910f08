"""The pages that ``convgen help`` prints."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from paths import ROOT

from convgen.errors import UnsupportedError
from convgen.topics import topic_text, topics


def test_every_page_is_a_topic_with_a_title() -> None:
    titles = topics()
    assert set(titles) == {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert titles["networks"] == "Whole networks"
    assert all(topic_text(topic).startswith(f"# {title}\n") for topic, title in titles.items())


def test_an_unknown_topic_names_those_there_are() -> None:
    with pytest.raises(UnsupportedError, match=r"networks.*found 'network'"):
        topic_text("network")


def convgen_help(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convgen", "help", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_lists_prints_and_completes() -> None:
    listed = convgen_help().stdout
    assert all(title in listed for title in topics().values())
    assert convgen_help("networks").stdout == topic_text("networks").rstrip("\n") + "\n"
    assert convgen_help("validate").stdout.startswith("Usage: convgen validate ")
    wrong = convgen_help("network")
    assert wrong.returncode == 2
    assert "did you mean networks?" in wrong.stderr


def test_help_in_a_terminal_is_set() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "convgen", "help", "limits"]
    with subprocess.Popen(command, stdout=theirs, env=environment) as process:
        os.close(theirs)
        chunks = []
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
    os.close(ours)
    text = b"".join(chunks).decode()
    assert process.returncode == 0
    assert "Limits" in text
    assert "# Limits" not in text
    assert "`" not in text
