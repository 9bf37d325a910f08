"""Claims: who measures which trial, and that no claim outlives its process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convgen.errors import RecordError
from convgen.records.claims import Claims, claims_path

KEY, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return claims_path(tmp_path / "records.sqlite")


def test_a_trial_is_claimed_once(path: Path) -> None:
    with Claims(path) as one, Claims(path) as two:
        assert one.take(KEY)
        assert one.take(KEY)  # its own
        assert not two.take(KEY)
        assert two.take(OTHER)
        assert (len(one), len(two)) == (1, 1)
        one.drop(KEY)
        assert two.take(KEY)
        one.drop(KEY)  # not its own any more
        assert not one.take(KEY)
    assert path.stat().st_size == 0


def test_closing_gives_all_back(path: Path) -> None:
    one = Claims(path)
    assert one.take(KEY)
    one.close()
    one.close()
    with Claims(path) as two:
        assert two.take(KEY)


@settings(deadline=None, max_examples=50)
@given(st.sets(st.binary(), min_size=2, max_size=40))
def test_any_keys_are_kept_apart(tmp_path_factory: pytest.TempPathFactory, seeds: set[bytes]) -> None:
    keys = {hashlib.sha256(seed).hexdigest() for seed in seeds}
    path = tmp_path_factory.mktemp("claims") / "x.claims"
    with Claims(path) as one, Claims(path) as two:
        assert all(one.take(key) for key in keys)
        assert not any(two.take(key) for key in keys)
        gone = sorted(keys)[0]
        one.drop(gone)
        assert {key for key in keys if two.take(key)} == {gone}


def test_a_claim_ends_with_its_process(path: Path) -> None:
    code = f"""
from convgen.records.claims import Claims
claims = Claims({str(path)!r})
print(claims.take({KEY!r}), flush=True)
input()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with Claims(path) as mine:
            assert not mine.take(KEY)
            process.kill()
            process.wait()
            assert mine.take(KEY)
    finally:
        process.kill()
        process.communicate()


def test_links_to_a_store_share_its_claims(tmp_path: Path) -> None:
    (tmp_path / "link.sqlite").symlink_to(tmp_path / "records.sqlite")
    assert claims_path(tmp_path / "link.sqlite") == claims_path(tmp_path / "records.sqlite")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=f"{tmp_path}/none/x.claims: No such file"):
        Claims(tmp_path / "none" / "x.claims")


def test_a_file_without_locks_is_named(path: Path) -> None:
    """A descriptor that only reads cannot hold a claim."""
    with Claims(path) as claims:
        os.dup2(os.open(path, os.O_RDONLY), claims._file)
        with pytest.raises(RecordError, match=r"\.claims: locking: "):
            claims.take(KEY)
