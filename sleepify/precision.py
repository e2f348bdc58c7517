"""What autocast does to weights that are used many times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cast_per_use() -> Iterator[None]:
    """Let autocast cast a weight anew in every pass, so that the gradients of all passes add up in float32.

    By itself it keeps the cast, whose gradient is a sum in bfloat16.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
