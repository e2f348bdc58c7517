"""How far a long reading is, on the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers.utils import logging

Progress = Callable[[int, int], None]


@contextmanager
def bar(total: int) -> Iterator[Progress]:
    """A progress bar of transformers, where there is anything to show."""
    if not total:
        yield lambda read, whole: None
        return
    done = 0
    with logging.tqdm(total=total, unit=" tokens", desc="reading", leave=False) as shown:

        def advance(read: int, whole: int) -> None:
            # Counted here: a bar that transformers was told to hide counts nothing.
            nonlocal done
            shown.update(read - done)
            done = read

        yield advance
