"""What all test modules share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from paths import SUPPORT

from convgen.lowering.kept import VARIABLE
from convgen.records import shipped

# Tests make no assertions about time, and a machine may be busy.
settings.register_profile("convgen", deadline=None)
settings.load_profile("convgen")

# A shell that starts the tests in the background lets them ignore Ctrl-C, and all processes they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The default record store of this run: never the user's, nor the records that ship: what a test sees does not
    depend on the machine. (The cache of compiled runtimes stays shared.)
    """
    path: Path = tmp_path_factory.mktemp("records") / "records.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVGEN_RECORDS", str(path))
        patch.setattr(shipped, "FOLDER", tmp_path_factory.mktemp("tuned"))
        patch.setenv(VARIABLE, "")  # tests compile what they test
        patch.delenv("COLUMNS", raising=False)  # tables are as wide as that
        yield


@pytest.fixture(autouse=True, scope="session")
def _processes_without_torch() -> Iterator[None]:
    """TVM imports PyTorch wherever it is installed: two seconds for each process that tests start, and there are many.
    Those do not find it; tests that use it import it themselves.
    """
    path = [str(SUPPORT / "without_torch"), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        yield
