"""The same layer calls on all ranks.

FSDP and ZeRO gather a layer's weights when it is called and reduce its gradient when it is called backwards, so all
ranks must call the same layers in the same order. A sleeping model calls its layers N times for every window that a row
fills, and once for every window that is supervised: as often as the batch at hand asks for. Before a step the ranks
therefore agree on the windows of all of them. A rank whose rows are too short gets one more, of padding tokens, and
windows that are supervised elsewhere are read awake here too (the model's ``awake``); what that computes has no target,
so that its gradient is exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sleepify.tasks.base import IGNORE


@dataclass(frozen=True)
class Rounds:
    """What a batch makes the model do, for rows [B] and windows [n].

    Attributes:
        sleeps: how often each row sleeps, [B].
        awake: windows in which a row makes a prediction, [B, n] bool.
    """

    sleeps: Tensor
    awake: Tensor

    @classmethod
    def of(cls, labels: Tensor, mask: Tensor, window_size: int) -> Rounds:
        """From labels and attention mask, [B, T] each, padded on either side."""
        lengths = mask.sum(1)
        # The place of a token in its row, and of the token before it, which makes the prediction.
        predictor = mask.cumsum(1) - 2
        row, column = ((labels != IGNORE) & mask.bool() & (predictor >= 0)).nonzero(as_tuple=True)
        awake = torch.zeros(mask.shape[0], -(-mask.shape[1] // window_size), dtype=torch.bool, device=mask.device)
        awake[row, predictor[row, column] // window_size] = True
        # A full window sleeps only when a token follows.
        return cls((lengths - 1) // window_size, awake)

    def signature(self, n_windows: int, truncated: bool) -> Tensor:
        """What decides the layer calls of this batch, forwards and backwards: equal vectors, equal calls.

        The windows read awake and the longest row's sleeps, [2 n]. Truncated backpropagation sleeps with and without
        gradient by how many sleeps a row has left: then all numbers of sleeps count, and how far each is supervised,
        [2 n + n (n + 1)].
        """
        awake = self.awake.new_zeros(n_windows)
        used = min(n_windows, self.awake.shape[1])
        awake[:used] = self.awake.any(0)[:used]
        slept = torch.zeros_like(awake)
        slept[self.sleeps if truncated else self.sleeps.max()] = True
        parts = [awake, slept]
        if truncated:
            last = (self.awake * torch.arange(1, self.awake.shape[1] + 1, device=awake.device)).amax(1)
            pairs = awake.new_zeros(n_windows, n_windows + 1)
            pairs[self.sleeps, last] = True
            parts.append(pairs.flatten())
        return torch.cat(parts)


def equalise(batch: dict[str, Any], window_size: int, truncated: bool) -> dict[str, Any]:
    """The batch, with rows of padding added so that the model calls its layers as on all other ranks.

    A collective: every rank calls it with its own batch.

    Args:
        batch: ``input_ids``, ``labels``, and ``attention_mask`` if rows are padded, [B, T] each.
        window_size: L.
        truncated: whether gradient flows through the last sleeps of a row only.

    Returns:
        The batch right-padded, with ``awake``, and with more rows where something was missing.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    rounds = Rounds.of(labels, mask, window_size)
    n_windows = rounds.sleeps.max() + 1
    dist.all_reduce(n_windows, dist.ReduceOp.MAX)
    n = int(n_windows)
    mine = rounds.signature(n, truncated)
    both = torch.cat([mine, ~mine]).to(torch.int32)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    on_any, not_on_any = both.bool().chunk(2)
    mine, everyone = mine.cpu(), on_any.cpu()
    differ = bool((on_any & not_on_any).any())
    # With truncation a row's calls depend on where it itself is supervised: then all rows are woken alike.
    wake = [window for window in range(n) if differ and everyone[window] and (truncated or not mine[window])]
    longest = int(everyone[n : 2 * n].nonzero().max())
    wanted = range(n) if truncated else [longest]
    extra = [sleeps for sleeps in wanted if everyone[n + sleeps] and not mine[n + sleeps]]

    order = mask.argsort(dim=1, descending=True, stable=True)
    width = max(ids.shape[1], longest * window_size + 1)
    padded = {
        name: _grow(tensor.gather(1, order), width, len(extra), fill)
        for name, tensor, fill in (("input_ids", ids, 0), ("labels", labels, IGNORE), ("attention_mask", mask, 0))
    }
    for place, sleeps in enumerate(extra, start=len(ids)):
        padded["attention_mask"][place, : sleeps * window_size + 1] = 1
    lengths = padded["attention_mask"].sum(1)
    padded["awake"] = torch.zeros_like(padded["input_ids"], dtype=torch.bool)
    woken = slice(None) if truncated else lengths.argmax()
    padded["awake"][woken, [window * window_size for window in wake]] = True
    if truncated:
        # Rows are slept on in the order they come: on all ranks those without gradient, which are longer, come first.
        rows = lengths.argsort(descending=True)
        padded = {name: tensor[rows] for name, tensor in padded.items()}
    return batch | padded


def _grow(tensor: Tensor, width: int, rows: int, fill: int) -> Tensor:
    """[B, T] to [B + rows, width], filled."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1], 0, rows), value=fill)
