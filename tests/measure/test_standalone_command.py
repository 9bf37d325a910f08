"""Numbers on the command line of a bundle."""

from __future__ import annotations

import pytest

from convgen.measure.standalone.command import main


@pytest.mark.parametrize("option", ["--timeout", "--minutes"])
@pytest.mark.parametrize("word", ["inf", "nan", "-1", "1e999", "soon"])
def test_what_is_no_time_is_refused(option: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is looked for: no bundle is there."""
    with pytest.raises(SystemExit) as raised:
        main([f"{option}={word}"])
    assert raised.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err
