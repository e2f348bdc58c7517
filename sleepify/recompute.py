"""Activations that are dropped, and made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sleepify.memory import Memory
from sleepify.settings import Settings
from sleepify.snapshot import Window

T_ = TypeVar("T_")
_HOLDERS = (Tensor, Memory, Window)


def recompute(settings: Settings, level: str, function: Callable[..., T_], *arguments: Any) -> T_:
    """Call, and drop the activations to recompute them in the backward pass if that is to be done at this level."""
    if settings.checkpoint != level or not torch.is_grad_enabled():
        return function(*arguments)
    # Which devices' random state is to be the same the second time, checkpoint finds out from the tensors it is shown.
    held = [[each] if isinstance(each, Tensor) else each.tensors() for each in arguments if isinstance(each, _HOLDERS)]
    shown = {tensor.device: tensor for tensors in held for tensor in tensors}
    return checkpoint(lambda _: function(*arguments), list(shown.values()), use_reentrant=False)
