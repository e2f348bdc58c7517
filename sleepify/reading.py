"""What one call is asked to read, and what it has read: hidden states, and what a caller wants to have of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleepify.cache import SleepCache
from sleepify.hosts import Host
from sleepify.loss import Asked, Objective
from sleepify.packing import Marks
from sleepify.rows import Rows
from sleepify.schedule import Schedule
from sleepify.settings import Loops
from sleepify.snapshot import Snapshot


@dataclass(frozen=True)
class Call:
    """What is read, as `SleepForCausalLM.forward` explains it; ``marks`` are its keywords about positions."""

    input_ids: Tensor
    attention_mask: Tensor | None = None
    past_key_values: SleepCache | None = None
    n_loops: Loops | None = None
    marks: Marks | None = None
    awake: Tensor | None = None
    ephemeral: Tensor | None = None
    use_cache: bool | None = None
    labels: Tensor | None = None
    logits_to_keep: int | Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """One call's hidden states.

    Attributes:
        blocks: the model that read.
        pieces: hidden states before the final norm [m, D], in the order of the plan.
        plan: which tokens they are of.
        tokens: the batch as it was given.
        cache: the session.
        after: what becomes of it; None if none is kept.
        objective: the loss.
        whole: whether the head is called as often whatever the batch.
    """

    blocks: Host
    pieces: Sequence[Tensor]
    plan: Schedule
    tokens: Rows
    cache: SleepCache | None
    after: Snapshot | None
    objective: Objective
    whole: bool

    def predict(self, num_items: int | Tensor | None, n_pieces: int = 1) -> tuple[Tensor | None, Tensor | None]:
        """Loss, if there are labels, and logits [B, columns, V], if some are asked for.

        Args:
            num_items: what to divide the summed loss by; None for the number of labels.
            n_pieces: in how many pieces the loss is made where all ranks must make as many.
        """
        blocks, plan, tokens, hidden = self.blocks, self.plan, self.tokens, self._hidden()
        scores = blocks.logits(hidden) if tokens.columns.size else None
        loss = None
        if tokens.labels is not None:
            targets, count = tokens.targets(plan.rows, plan.columns)
            divisor = max(1, count) if num_items is None else num_items
            places = (plan.rows, plan.columns)
            asked = Asked(blocks, tokens, *places, hidden, targets, divisor, scores, self.whole, n_pieces)
            loss = self.objective(asked)
        return loss, None if scores is None else tokens.spread(scores, plan.rows, plan.columns)

    def last_hidden_state(self) -> Tensor:
        """What the head reads, [B, columns, D]: the final norm is applied; 0 at padding."""
        return self.tokens.spread(self.blocks.normed(self._hidden()), self.plan.rows, self.plan.columns)

    def keep(self) -> SleepCache | None:
        """Move the session forward, as the last thing that a call does: one that fails leaves it as it was."""
        if self.cache is None or self.after is None:
            return None
        self.cache.now = self.after
        return self.cache

    def _hidden(self) -> Tensor:
        if self.pieces:
            return self.pieces[0] if len(self.pieces) == 1 else torch.cat(list(self.pieces))
        embeddings: Any = self.blocks.language_model.get_input_embeddings()
        return embeddings.weight.new_zeros(0, embeddings.weight.shape[-1])
