"""A padded batch as its rows: real tokens left-aligned, so that windows begin at the same columns, and the way back.

What decides the schedule (masks, where labels are) is brought to the CPU in one copy; everything that follows from it
is worked out there, in whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sleepify.packing import Marks, texts

IGNORE = -100
"""Label of a token of which no prediction is asked."""

NO_COLUMNS = torch.zeros(0, dtype=torch.long)
"""As ``logits_to_keep``: logits of no column."""


@dataclass(frozen=True)
class Rows:
    """One batch, given in T columns, as B rows: those given, or one per text where several are packed into a row.

    Attributes:
        ids: [B, W], row r real in its first ``lengths[r]`` columns.
        lengths: tokens per row.
        batch: rows given.
        width: T.
        source: [B, W], where each aligned token was among the batch * T given; None if none moved.
        columns: of which logits are asked, as they were given.
        wanted: [B, W] bool, aligned tokens of which something is asked; None for all.
        labelled: [B, W] bool, aligned tokens whose next token has a label; None without labels.
        labels: [batch, T] as given.
        right_padded: whether a row ends in padding.
        ephemeral: [B, W] bool, aligned tokens that are read awake and never consolidated; None if there are none.
    """

    ids: Tensor
    lengths: list[int]
    batch: int
    width: int
    source: np.ndarray | None
    columns: np.ndarray
    wanted: np.ndarray | None
    labelled: np.ndarray | None
    labels: Tensor | None
    right_padded: bool
    ephemeral: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        awake: Tensor | None,
        keep: int | Tensor | None,
        vocabulary: int,
        past: int | None = None,
        marks: Marks | None = None,
        seen: Sequence[int] | None = None,
        ephemeral: Tensor | None = None,
    ) -> Rows:
        """Check a batch and take it apart.

        Args:
            input_ids: [B, T].
            mask: [B, T] or, with a session, [B, past + T]; 1 where a token is real.
            labels: [B, T]; -100 where there is none.
            awake: [B, T] bool, tokens of which something is asked in any case.
            keep: columns of which logits are asked: the last so many, or those given; 0 or None for all.
            vocabulary: number of ids and labels there are.
            past: columns read before in this session; None without one.
            marks: what else the caller says: positions, and where texts begin.
            seen: tokens of each row read before in this session; None without one.
            ephemeral: [B, T] bool, tokens that are read awake and never consolidated.

        Raises:
            TypeError, ValueError: for what is no batch, saying what was expected.
        """
        ids = _whole(input_ids, "input_ids")
        batch, width = ids.shape
        given: dict[str, Tensor] = {}
        if mask is not None:
            _check_mask(mask, batch, width, past or 0)
            given["mask"] = torch.where(mask == 1, 1, torch.where(mask == 0, 0, 2)).to(torch.uint8)
        if labels is not None:
            labels = _whole(labels, "labels", like=ids)
            given["labels"] = labels != IGNORE
        for name, chosen in (("awake", awake), ("ephemeral", ephemeral)):
            if chosen is None:
                continue
            if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != ids.shape:
                raise ValueError(f"expected {name} to be bool of shape {tuple(ids.shape)}, got {_describe(chosen)}")
            given[name] = chosen
        if marks is not None:
            given |= marks.tensors(batch, width)
        _check_range("input_ids", ids, vocabulary)
        if labels is not None:
            _check_range("labels", labels, vocabulary, but=IGNORE)
        if not given and width == 1 and (keep is None or (type(keep) is int and keep in (0, 1))):
            # A token of every row, as in decoding.
            return cls(ids, [1] * batch, batch, 1, None, np.zeros(1, dtype=np.int64), None, None, None, False)
        here = _fetch(given)
        is_float = mask is not None and mask.is_floating_point()
        real, lengths, right_padded = _real(here.get("mask"), batch, width, past, is_float)
        columns = _columns(keep, width)

        if not given and columns.size == width:
            return cls(ids, lengths, batch, width, None, columns, None, None, None, False)
        begins = None if marks is None else marks.begins(here, real, seen, past or 0)
        source = None
        if begins is not None:
            source, lengths = texts(real, begins)
            ids = ids.reshape(-1)[torch.from_numpy(source).to(ids.device, non_blocking=True)]
        elif any(length != width for length in lengths):
            order = np.argsort(~real, axis=1, kind="stable")
            source = order + np.arange(batch)[:, None] * width
            ids = ids.reshape(-1)[torch.from_numpy(source).to(ids.device, non_blocking=True)]
        aligned = np.arange(ids.shape[1])[None, :] < np.asarray(lengths)[:, None]
        asked = np.zeros(width, dtype=bool)
        asked[columns] = True
        wanted = np.broadcast_to(asked, (batch, width)).copy()
        if "awake" in here:
            wanted |= here["awake"].astype(bool)
        wanted = _move(wanted, source) & aligned
        labelled = None
        if "labels" in here:
            labelled = np.zeros(aligned.shape, dtype=bool)
            labelled[:, :-1] = (_move(here["labels"].astype(bool), source) & aligned)[:, 1:]
            wanted |= labelled
        everything = wanted.all()
        wanted = None if everything else wanted
        passing = _move(here["ephemeral"].astype(bool), source) & aligned if "ephemeral" in here else None
        passing = passing if passing is not None and passing.any() else None
        return cls(ids, lengths, batch, width, source, columns, wanted, labelled, labels, right_padded, passing)

    @property
    def packed(self) -> bool:
        """Whether a row given held several texts."""
        return len(self.lengths) != self.batch

    @classmethod
    def nothing(cls, batch: int, device: torch.device) -> Rows:
        """Rows without a token."""
        ids, none = torch.zeros(batch, 0, dtype=torch.long, device=device), np.zeros(0, dtype=np.int64)
        return cls(ids, [0] * batch, batch, 0, None, none, np.zeros((batch, 0), dtype=bool), None, None, False)

    def after(self, first: Sequence[Tensor], ephemeral: Sequence[Sequence[int]]) -> Rows:
        """The same rows behind other tokens [n], of which nothing is asked; ``ephemeral`` says which of them are."""
        batch, extra = len(first), [len(ids) for ids in first]
        lengths = [more + length for more, length in zip(extra, self.lengths, strict=True)]
        whole = [torch.cat([a.to(b.device), b[:n]]) for a, b, n in zip(first, self.ids, self.lengths, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        given = np.arange(batch * self.width).reshape(batch, self.width) if self.source is None else self.source
        known = np.ones(self.ids.shape, dtype=bool) if self.wanted is None else self.wanted
        source = np.full(tuple(ids.shape), -1, dtype=np.int64)
        wanted = np.zeros(tuple(ids.shape), dtype=bool)
        labelled = None if self.labelled is None else wanted.copy()
        passing = wanted.copy()
        for row, (more, length) in enumerate(zip(extra, self.lengths, strict=True)):
            here = slice(more, more + length)
            source[row, here], wanted[row, here] = given[row, :length], known[row, :length]
            if labelled is not None and self.labelled is not None:
                labelled[row, here] = self.labelled[row, :length]
            passing[row, list(ephemeral[row])] = True
            if self.ephemeral is not None:
                passing[row, here] = self.ephemeral[row, :length]
        own = passing if passing.any() else None
        return replace(self, ids=ids, lengths=lengths, source=source, wanted=wanted, labelled=labelled, ephemeral=own)

    def lasting_columns(self) -> int:
        """How many of the T columns do not hold ephemeral tokens only."""
        if self.ephemeral is None:
            return self.width
        rows, columns = np.arange(len(self.ephemeral))[:, None], np.arange(self.ephemeral.shape[1])[None, :]
        given = self._given(rows, columns) % self.width
        real = columns < np.asarray(self.lengths)[:, None]
        real &= True if self.source is None else self.source >= 0
        fleeting = set(given[real & self.ephemeral].tolist()) - set(given[real & ~self.ephemeral].tolist())
        return self.width - len(fleeting)

    def targets(self, rows: np.ndarray, columns: np.ndarray) -> tuple[Tensor, int]:
        """The labels of the tokens after these aligned ones [M], -100 where there is none, and how many there are."""
        assert self.labels is not None and self.labelled is not None
        has = self.labelled[rows, columns]
        at = self._given(rows, np.minimum(columns + 1, self.ids.shape[1] - 1))
        index, real = torch.from_numpy(np.stack([at, has.astype(np.int64)])).to(self.labels.device, non_blocking=True)
        return self.labels.reshape(-1)[index].masked_fill(real == 0, IGNORE), int(has.sum())

    def spread(self, scores: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
        """Values [M, V] of aligned tokens into [batch, asked columns, V] as they were given, 0 where there is none."""
        batch, width = self.batch, self.width
        if batch == width == self.columns.size == scores.shape[0] == 1:
            # The one token given; of a longer row, a value may be there for its label, and its column not asked for.
            return scores[None]
        asked, back = np.unique(self.columns, return_inverse=True)
        place = np.full(width, -1, dtype=np.int64)
        place[asked] = np.arange(asked.size)
        given = self._given(rows, columns)
        at = place[given % width]
        kept = (at >= 0).nonzero()[0]
        target = (given // width * asked.size + at)[kept]
        n_places = batch * asked.size
        if kept.size == n_places:
            # Every place is filled: at most another order.
            where = np.empty(n_places, dtype=np.int64)
            where[target] = kept
            same = np.array_equal(where, np.arange(scores.shape[0]))
            picked = scores if same else scores[_on(where, scores)]
        else:
            chosen = scores if kept.size == scores.shape[0] else scores[_on(kept, scores)]
            picked = scores.new_zeros(n_places, scores.shape[-1]).index_copy(0, _on(target, scores), chosen)
        logits = picked.view(batch, asked.size, scores.shape[-1])
        return logits if np.array_equal(asked, self.columns) else logits[:, _on(back, scores)]

    def _given(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Where aligned tokens were among the batch * T given."""
        return rows * self.width + columns if self.source is None else self.source[rows, columns]


def _on(index: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(index).to(like.device, non_blocking=True)


def _move(values: np.ndarray, source: np.ndarray | None) -> np.ndarray:
    return values if source is None else values.reshape(-1)[source]


def _fetch(given: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Small tensors on the CPU, all by one copy."""
    if not given:
        return {}
    home = next(iter(given.values())).device
    flat = [tensor.to(home).reshape(-1).contiguous().view(torch.uint8) for tensor in given.values()]
    parts = np.split(torch.cat(flat).cpu().numpy(), np.cumsum([len(part) for part in flat])[:-1])
    kinds = (np.int32 if tensor.dtype == torch.int32 else np.uint8 for tensor in given.values())
    arrays = (part.view(kind) for part, kind in zip(parts, kinds, strict=True))
    return {name: array.reshape(tuple(given[name].shape)) for name, array in zip(given, arrays, strict=True)}


def _whole(value: Any, name: str, like: Tensor | None = None) -> Tensor:
    """Ids or labels as int64 [B, T]."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected {name} to be a tensor [batch, tokens], got {type(value).__name__}; torch.tensor(...) makes one"
        )
    shape = "[batch, tokens]" if like is None else f"of the shape of input_ids, {tuple(like.shape)},"
    fits = value.dim() == 2 and value.numel() > 0 if like is None else value.shape == like.shape
    if not fits or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"expected {name} {shape} of whole numbers, got {_describe(value)}")
    return value.long()


def _check_range(name: str, values: Tensor, vocabulary: int, but: int | None = None) -> None:
    """Only where looking costs nothing; elsewhere the lookup itself fails."""
    if values.device.type != "cpu":
        return
    least, most = (values,) * 2 if values.numel() == 1 else values.aminmax()
    if int(least) >= 0 and int(most) < vocabulary:
        return
    wrong = (values < 0) | (values >= vocabulary)
    if but is not None:
        wrong &= values != but
    if wrong.any():
        also = "" if but is None else f" (or {but})"
        found = values[wrong].unique().tolist()[:5]
        raise ValueError(f"expected {name} from 0 to {vocabulary - 1}{also}, got {found}")


def _check_mask(mask: Any, batch: int, width: int, past: int) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"expected attention_mask to be a tensor, got {type(mask).__name__}")
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (width, past + width):
        expected = f"{(batch, width)}" + (f" or {(batch, past + width)}" if past else "")
        raise ValueError(f"expected attention_mask of shape {expected}, got {tuple(mask.shape)}")


def _real(
    mask: np.ndarray | None, batch: int, width: int, past: int | None, is_float: bool
) -> tuple[np.ndarray, list[int], bool]:
    """Which tokens are real [B, T], how many per row, and whether a row ends in padding."""
    if mask is None:
        return np.ones((batch, width), dtype=bool), [width] * batch, False
    # With a session a row may be all padding, but not if 0 might be meant as an additive mask that hides nothing.
    if (mask > 1).any() or (is_float and past is not None and not (mask == 1).any(1).all()):
        raise ValueError(
            "expected attention_mask of 1 (real) and 0 (padding), whole numbers or bool, got other values; additive "
            "masks are not taken"
        )
    real = mask[:, -width:].astype(bool)
    lengths = real.sum(1)
    right_padded = bool(((lengths > 0) & ~real[:, -1]).any())
    if right_padded and past is not None:
        raise ValueError(
            "expected left-padded rows with a cache (as in generation), got right-padded ones; "
            "set tokenizer.padding_side = 'left' or use_cache=False"
        )
    if past is None and (empty := (lengths == 0).nonzero()[0].tolist()):
        raise ValueError(f"expected at least one real token per row, rows {empty} are all padding")
    return real, lengths.tolist(), right_padded


def _columns(keep: int | Tensor | None, width: int) -> np.ndarray:
    """Columns of which logits are asked, as given."""
    every = np.arange(width)
    if keep is None:
        return every
    if isinstance(keep, Tensor):
        chosen = keep.detach().cpu().numpy()
        if chosen.ndim != 1 or chosen.dtype.kind not in "ib" or (chosen.dtype == bool and chosen.size != width):
            raise ValueError(f"expected logits_to_keep to list columns, or {width} booleans, got {_describe(keep)}")
        if chosen.dtype != bool and chosen.size and not -width <= chosen.min() <= chosen.max() < width:
            raise ValueError(f"expected logits_to_keep to list columns from 0 to {width - 1}, got {chosen.tolist()}")
        return every[chosen]
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
        raise ValueError(
            f"expected logits_to_keep to say how many columns, 0 for all, or which (a tensor), got {keep!r}"
        )
    return every if keep == 0 else every[-keep:]


def _describe(value: Any) -> str:
    return (
        f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
    )
