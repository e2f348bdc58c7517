"""Which of the two splits a puzzle belongs to: a property of the puzzle itself, so no seed can put it in both.

>>> [key for key in "abcdefgh" if in_split(key, "test")]
['h']
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from sleepify.tasks.base import Split

TEST_SHARE = 1 / 8
"""The share of all puzzles that is kept for the test split."""


def in_split(key: str, split: Split) -> bool:
    """Whether the puzzle written as ``key`` belongs to ``split``; every key belongs to exactly one.

    Raises:
        ValueError: ``split`` is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    bucket = blake2b(key.encode(), digest_size=1).digest()[0]
    return (bucket < 256 * TEST_SHARE) == (split == "test")


def cycle_key(cycle: Sequence[int]) -> str:
    """The key of a cycle of numbers, the same wherever one starts to read it."""
    first = cycle.index(min(cycle))
    return "-".join(map(str, [*cycle[first:], *cycle[:first]]))
