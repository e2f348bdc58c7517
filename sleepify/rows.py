"""A padded batch as its rows: real tokens left-aligned, so that windows begin at the same columns, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sleepify.cache import SleepCache

IGNORE = -100
"""Label of a token of which no prediction is asked."""


@dataclass(frozen=True)
class Rows:
    """One batch.

    Attributes:
        ids: [B, T], row r real in its first ``lengths[r]`` columns.
        order: [B, T], the original column of each aligned one; None if none moved.
    """

    ids: Tensor
    lengths: list[int]
    order: Tensor | None
    right_padded: bool

    @classmethod
    def align(cls, input_ids: Tensor, mask: Tensor | None, cache: SleepCache | None) -> Rows:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in (torch.long, torch.int):
            raise ValueError(
                "expected input_ids [batch, tokens] of whole numbers, "
                f"got {tuple(input_ids.shape)} of {input_ids.dtype}"
            )
        batch, width = input_ids.shape
        if mask is None:
            return cls(input_ids, [width] * batch, None, False)
        past = 0 if cache is None else cache.columns
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (width, past + width):
            expected = f"{(batch, width)}" + (f" or {(batch, past + width)}" if past else "")
            raise ValueError(f"expected attention_mask of shape {expected}, got {tuple(mask.shape)}")
        real = mask[:, -width:].bool()
        counts = torch.cat([real.sum(1), real[:, :-1].gt(real[:, 1:]).any(1)]).tolist()
        lengths, right_padded = counts[:batch], any(counts[batch:])
        if right_padded and cache is not None:
            raise ValueError(
                "expected left-padded rows with a cache (as in generation), got right-padded ones; "
                "set tokenizer.padding_side = 'left'"
            )
        if cache is None and (empty := [row for row, length in enumerate(lengths) if length == 0]):
            raise ValueError(f"expected at least one real token per row, rows {empty} are all padding")
        if all(length == width for length in lengths):
            return cls(input_ids, lengths, None, False)
        order = real.int().argsort(dim=1, descending=True, stable=True)
        return cls(input_ids.gather(1, order), lengths, order, right_padded)

    def real(self) -> Tensor:
        """[B, T] bool, in aligned columns."""
        width = self.ids.shape[1]
        counts = torch.tensor(self.lengths, device=self.ids.device)[:, None]
        return torch.arange(width, device=self.ids.device)[None, :] < counts

    def targets(self, labels: Tensor) -> Tensor:
        """The label of the token after each, [B, T], in aligned columns; -100 after the last."""
        labels = labels if self.order is None else labels.gather(1, self.order)
        labels = labels.masked_fill(~self.real(), IGNORE)
        return torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORE)], 1)

    def places(self, chosen: Tensor) -> Tensor:
        """Which aligned places are chosen, and real: [B, T] bool."""
        return (chosen if self.order is None else chosen.gather(1, self.order)) & self.real()

    def columns(self, keep: int | Tensor | None, default_all: bool) -> Tensor:
        """Original columns whose logits are returned."""
        every = torch.arange(self.ids.shape[1], device=self.ids.device)
        if keep is None:
            return every if default_all else every[:0]
        if isinstance(keep, Tensor):
            return every[keep.to(self.ids.device)]
        return every if keep == 0 else every[-keep:]

    def aligned(self, columns: Tensor) -> Tensor:
        """Which aligned columns are among these original ones, and real: [B, T] bool."""
        chosen = torch.zeros(self.ids.shape[1], dtype=torch.bool, device=self.ids.device)
        chosen[columns] = True
        if self.order is None:
            return chosen.expand(self.ids.shape[0], -1)
        return chosen[self.order] & self.real()

    def spread(self, scores: Tensor, rows: Tensor, aligned: Tensor, columns: Tensor) -> Tensor | None:
        """Logits [M, V] of aligned places into [B, columns, V], 0 where there is none."""
        if columns.numel() == 0:
            return None
        batch, width = self.ids.shape
        original = aligned if self.order is None else self.order.to(aligned.device)[rows, aligned]
        place = torch.full((width,), -1, dtype=torch.long, device=scores.device)
        place[columns.to(scores.device)] = torch.arange(columns.numel(), device=scores.device)
        at = place[original]
        kept = at >= 0
        output = scores.new_zeros(batch, columns.numel(), scores.shape[-1])
        return output.index_put((rows[kept], at[kept]), scores[kept])
