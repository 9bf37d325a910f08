"""How many copies of packed weights make each call find its own in memory, as in a network."""

from __future__ import annotations

#: How many times the last cache the copies fill; and copies at most: of small weights fewer do, as they are fetched in
#: no time that matters.
CACHES, MOST_COPIES = 2, 256
#: Bytes of copies at most, whatever the cache; and what the last cache has where the system does not tell.
MOST_BYTES, ASSUMED = 1 << 30, 32 << 20


def copies_of(size: int, cache: int) -> int:
    """How many copies of so many bytes are cold when their turn comes again.

    Args:
        cache: bytes of the last cache; 0 where they are not known.
    """
    wanted = min(CACHES * (cache or ASSUMED), MOST_BYTES)
    return max(1, min(MOST_COPIES, -(-wanted // max(size, 1))))
