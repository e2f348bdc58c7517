"""The same layer calls on all ranks.

FSDP and ZeRO gather a layer's weights when it is called and reduce its gradient when it is called backwards, so all
ranks must call the same layers in the same order. A sleeping model calls its layers N times for every window that a row
sleeps on, and once for every window in which something is predicted: as often as the batch at hand asks for, which its
`schedule` says. Before a step the ranks therefore agree on the rounds of all of them. A rank whose rows end too early
gets one more, of padding tokens, and rounds that are awake elsewhere are awake here too (the model's ``awake``); what
that computes has no target, so that its gradient is exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sleepify.loss import n_pieces_of
from sleepify.packing import Marks
from sleepify.schedule import schedule
from sleepify.tasks.base import IGNORE

PACKED = frozenset(field.name for field in fields(Marks))


@dataclass(frozen=True)
class Calls:
    """What decides a batch's layer calls, forwards and backwards, when its rows are given ``awake``.

    Attributes:
        awake: whether a round has a wake pass, [rounds].
        ends: the round in which each row ends, [B]; -1 for one of which nothing is asked.
    """

    awake: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, labelled: np.ndarray, real: np.ndarray, window_size: int, every: bool = False) -> Calls:
        """From where labels and real tokens are, [B, T] bool each, real ones first; ``every`` real one may be asked."""
        wanted = real if every else np.zeros_like(labelled)
        if not every:
            wanted[:, :-1] = (labelled & real)[:, 1:]
        lengths = real.sum(1).tolist()
        rounds = schedule([0] * len(lengths), lengths, wanted, window_size, keep=False).rounds
        ends = np.full(len(lengths), -1)
        for number, each in enumerate(rounds):
            ends[list(each.rows)] = number
        return cls(np.array([bool(each.wakes) for each in rounds], dtype=bool), ends)

    def signature(self, n_rounds: int) -> np.ndarray:
        """Rounds that are awake and rounds in which rows end, [2 n_rounds] bool."""
        awake, ending = np.zeros((2, n_rounds), dtype=bool)
        awake[: len(self.awake)] = self.awake
        ending[self.ends[self.ends >= 0]] = True
        return np.concatenate([awake, ending])


def equalise(batch: dict[str, Any], window_size: int, apart: bool, every: bool = False) -> dict[str, Any]:
    """The batch, with rows of padding added so that the model calls its layers as on all other ranks.

    A collective: every rank calls it with its own batch.

    Args:
        batch: ``input_ids``, ``labels``, ``attention_mask`` if rows are padded, and what else there is of [B, T].
        window_size: L.
        apart: whether rows that end in different rounds are different matters: gradient flows through the last sleeps
            of a row only, so that they sleep in different groups, or something is asked of the last sleep alone.
        every: whether logits are asked of all tokens, and not only the loss.

    Returns:
        The batch right-padded, with ``awake``, in how many pieces the loss is made, and with more rows where something
        was missing.

    Raises:
        ValueError: for packed rows.
    """
    if packed := sorted(batch.keys() & PACKED):
        raise ValueError(
            f"expected one text per row where layers are sharded over processes, got {', '.join(packed)}: collate "
            "without packing, or train without sharding"
        )
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    order = mask.argsort(dim=1, descending=True, stable=True)
    given = {name: t for name, t in batch.items() if isinstance(t, torch.Tensor) and t.shape == ids.shape}
    rows = {name: t.gather(1, order) for name, t in (given | {"attention_mask": mask}).items()}
    labelled, real = torch.stack([rows["labels"] != IGNORE, rows["attention_mask"].bool()]).cpu().numpy()
    mine = Calls.of(labelled, real, window_size, every)

    most = torch.tensor([len(mine.awake), int(labelled.sum())], device=ids.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    n_rounds, n_labels = most.tolist()
    # Whatever is added below is at most a place per round and a place per row, of which there is one per round.
    n_pieces = n_pieces_of(n_labels + 2 * n_rounds)
    union = torch.from_numpy(mine.signature(n_rounds)).to(ids.device, torch.int32)
    dist.all_reduce(union, dist.ReduceOp.MAX)
    awake_anywhere, ends_anywhere = union.bool().cpu().numpy().reshape(2, n_rounds)
    awake_here, ends_here = mine.signature(n_rounds).reshape(2, n_rounds)

    matters = ends_anywhere if apart else np.arange(n_rounds) == n_rounds - 1
    # Where nobody is asked anything, a token each: gradient, though it is 0, must come from somewhere.
    extra = (matters & ~ends_here).nonzero()[0].tolist() if n_rounds else [0]
    ends = [*mine.ends.tolist(), *extra]
    lengths = [end * window_size + 1 for end in extra]
    width = max([ids.shape[1], *lengths])
    fills = {"input_ids": 0, "attention_mask": 0}
    padded = {name: _grow(t, width, len(extra), fills.get(name, IGNORE)) for name, t in rows.items()}
    awake = np.zeros((len(ends), width), dtype=bool)
    if every:
        awake[: len(real), : real.shape[1]] = real
    for row, length in enumerate(lengths, start=len(ids)):
        padded["attention_mask"][row, :length] = 1
        awake[row, length - 1] = True
    if n_rounds:
        woken = (awake_anywhere & ~awake_here).nonzero()[0]
        awake[int(np.argmax(ends)), woken * window_size] = True
    return batch | padded | {"awake": torch.from_numpy(awake).to(ids.device), "loss_pieces": n_pieces}


def restore(values: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
    """What was made of an equalised batch, [rows, width, ...], in the rows and columns [B, T] that were given.

    Args:
        mask: [B, T] as it was given; None if all tokens are real.
        shape: [B, T].
    """
    mine = values[: shape[0], : shape[1]]
    if mask is None:
        return mine
    back = mask.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return mine.gather(1, back[..., None].expand_as(mine))


def _grow(tensor: Tensor, width: int, rows: int, fill: int) -> Tensor:
    """[B, T] to [B + rows, width], filled."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1], 0, rows), value=fill)
