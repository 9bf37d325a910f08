"""What all test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_records(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The default record store of this run: never the user's. (The cache of compiled runtimes stays shared.)"""
    path: Path = tmp_path_factory.mktemp("records") / "records.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVGEN_RECORDS", str(path))
        yield
