"""When weights that are used many times are cast: anew for each use in training, once for all of an answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sleepify.fast_weights.parts import cast_once
from sleepify.ops.chunking import autocasts


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


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Compute without gradient while nobody changes the weights: inserted layers keep a cast in the base's dtype."""
    base: Any = model
    device = base.device
    with cast_once(model, torch.get_autocast_dtype(device.type) if autocasts(device) else base.dtype):
        yield
