"""The loss: cross entropy of wanted tokens, without all their logits at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from sleepify.rows import IGNORE, Rows

PIECE = 512
"""Places whose logits exist at a time."""


@dataclass(frozen=True)
class Asked:
    """The wanted places of one call, M in all, with what a loss is made of.

    Attributes:
        blocks: the model as the algorithm drives it; ``blocks.logits`` is its final norm and head.
        tokens: the batch as its rows.
        rows, columns: of each place among the aligned tokens, [M] each.
        hidden: [M, D], before the final norm.
        targets: [M], labels of the tokens that follow; -100 where there is none.
        count: what to divide a summed loss by.
        scores: logits [M, V] if they were made in any case.
        whole: whether the head is to be called as often whatever the batch: once for all places, or ``n_pieces`` times.
        n_pieces: how often then, for cross entropy; at least one for every `PIECE` places.
    """

    blocks: Any
    tokens: Rows
    rows: np.ndarray
    columns: np.ndarray
    hidden: Tensor
    targets: Tensor
    count: int | Tensor
    scores: Tensor | None
    whole: bool
    n_pieces: int = 1


Objective = Callable[[Asked], Tensor]


def cross_entropy(asked: Asked) -> Tensor:
    """The loss of a language model: what a call's labels cost on average."""
    n_pieces = asked.n_pieces if asked.whole else n_pieces_of(asked.hidden.shape[0])
    total = summed_cross_entropy(asked.blocks.logits, asked.hidden, asked.targets, asked.scores, n_pieces)
    return total / (asked.count.to(total.device) if isinstance(asked.count, Tensor) else asked.count)


def rooted(loss: Tensor, parameters: Iterable[nn.Parameter], was_read: bool) -> Tensor:
    """A loss that gradient can flow back from, also where nothing is predicted: then it is 0 for all that is trained.

    A batch without a label is not read at all. Head and norm alone would be in the graph, of a frozen base not even
    they, and DDP would wait for ever for the gradients of the rest.

    Args:
        loss: [].
        parameters: of the model.
        was_read: whether anything was.
    """
    if loss.requires_grad and was_read or not torch.is_grad_enabled():
        return loss
    return loss + sum(0.0 * each.reshape(-1)[:1].sum().to(loss) for each in parameters if each.requires_grad)


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


def n_pieces_of(n_places: int) -> int:
    """How many pieces the logits of so many places are made in."""
    return max(1, -(-n_places // PIECE))


def summed_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, scores: Tensor | None, n_pieces: int
) -> Tensor:
    """Summed cross entropy, in float32 at least, over the places that have a target.

    Logits of a few hundred places are as large as all the rest of a step, so they are made and dropped piece by piece:
    in so many pieces, the last of which may be empty, so that the head is called as often on every rank.
    """
    if scores is not None:
        return _cross_entropy(scores, targets)
    if n_pieces == 1:
        return _cross_entropy(head(hidden), targets)
    size = max(PIECE, -(-hidden.shape[0] // n_pieces))
    losses = []
    for begin in range(0, n_pieces * size, size):
        piece = (hidden[begin : begin + size], targets[begin : begin + size])
        losses.append(recompute(summed_cross_entropy, head, *piece, None, 1, use_reentrant=False))
    return torch.stack(losses).sum()


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return nn.functional.cross_entropy(scores, targets.to(scores.device), ignore_index=IGNORE, reduction="sum")
