"""The pages that ``convgen help`` prints."""

from __future__ import annotations

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
