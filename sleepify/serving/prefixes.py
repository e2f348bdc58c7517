"""Texts that begin alike: digests of their beginnings, by which a long one finds those that it goes on from."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

NOTHING = hashlib.sha256(b"").hexdigest()
"""The digest of a text of no ids."""


def extended(digest: hashlib._Hash, ids: Sequence[int]) -> hashlib._Hash:
    """The same digest, of so many more ids."""
    digest.update(array("Q", ids).tobytes())
    return digest


def digests(ids: Sequence[int], counts: Iterable[int]) -> list[str]:
    """Of the first so many ids, for every count, in rising order."""
    digest, done, found = hashlib.sha256(), 0, []
    for count in counts:
        digest, done = extended(digest, ids[done:count]), count
        found.append(digest.copy().hexdigest())
    return found


def common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two texts begin with alike."""
    for place, (a, b) in enumerate(zip(some, others, strict=False)):
        if a != b:
            return place
    return min(len(some), len(others))
