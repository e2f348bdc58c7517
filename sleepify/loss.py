"""The loss: cross entropy of wanted tokens, without all their logits at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from sleepify.rows import IGNORE

PIECE = 512
"""Places whose logits exist at a time."""


def check_count(num_items: int | Tensor | None) -> None:
    """See that a loss can be divided by it, where looking costs nothing.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not above 0.
    """
    if num_items is None:
        return
    is_number = num_items.numel() == 1 if isinstance(num_items, Tensor) else isinstance(num_items, Real)
    if not is_number:
        raise TypeError(f"expected num_items_in_batch to be one number, got {num_items!r}")
    looked_at = not isinstance(num_items, Tensor) or num_items.device.type == "cpu"
    if looked_at and not 0 < float(num_items) < math.inf:
        raise ValueError(f"expected num_items_in_batch above 0, got {num_items}: a batch without labels has no loss")


def summed_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, scores: Tensor | None, whole: bool
) -> Tensor:
    """Summed cross entropy, in float32 at least, over the places that have a target.

    Logits of a few hundred places are as large as all the rest of a step, so they are made and dropped piece by piece.
    """
    if scores is not None:
        return _cross_entropy(scores, targets)
    if hidden.shape[0] > PIECE and not whole:
        pieces = zip(hidden.split(PIECE), targets.split(PIECE), strict=True)
        losses = [recompute(summed_cross_entropy, head, *piece, None, True, use_reentrant=False) for piece in pieces]
        return torch.stack(losses).sum()
    return _cross_entropy(head(hidden), targets)


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return nn.functional.cross_entropy(scores, targets.to(scores.device), ignore_index=IGNORE, reduction="sum")
