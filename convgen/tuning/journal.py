"""Where trials go: the store, the claims beside it, and the time they cost."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..records.claims import Claims, claims_path
from ..records.record import TuningRecord
from ..records.store import RecordStore


class Journal:
    """Where trials go: the store, the claims beside it, and the time they cost.

    Tuners that share one also share a clock: a trial costs what has passed since the last one ended,
    so that the costs add up to the time spent.

    Args:
        store: None: nothing is kept, and nothing claimed.
        job: the id that records are marked with.
        now: the clock, in seconds.
    """

    def __init__(self, store: RecordStore | None, job: str = "", *, now: Callable[[], float] = time.monotonic) -> None:
        self.store, self.job, self.now = store, job, now
        self._claims: Claims | None = None
        self._mark = now()
        self._added = 0

    def add(self, *records: TuningRecord) -> None:
        """Keep records for good, all or none."""
        if self.store is not None:
            self._added += self.store.add_all(records)

    def has(self, key: str) -> bool:
        return self.store is not None and self.store.has(key)

    def claim(self, key: str) -> bool:
        """Whether the trial may be measured here: no other job is doing so."""
        if self.store is None or self.store.readonly:
            return True
        if self._claims is None:
            self._claims = Claims(claims_path(self.store.path))
        return self._claims.take(key)

    def release(self, key: str) -> None:
        if self._claims is not None:
            self._claims.drop(key)

    def foreign(self) -> int:
        """How many records came from elsewhere: where it has grown, there is something to learn."""
        return 0 if self.store is None else self.store.last() - self._added

    def charge(self) -> float:
        """Seconds since this was called last."""
        before, self._mark = self._mark, self.now()
        return self._mark - before

    @property
    def uncharged(self) -> float:
        """Seconds since :meth:`charge` was called last."""
        return self.now() - self._mark

    def close(self) -> None:
        """Give all claims back."""
        if self._claims is not None:
            self._claims.close()
            self._claims = None
