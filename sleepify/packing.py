"""Where texts begin in a batch, by what transformers' callers say of it.

Packed rows hold several texts one after the other (TRL's packing, ``DataCollatorWithFlattening``). Callers mark them by
positions that begin at 0 again, by numbered texts, or by the boundaries that flash attention takes. All of it is read
here; what means nothing beyond what is known anyway is checked and let through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Marks:
    """What a caller says about positions and texts, each None if not said.

    Attributes:
        position_ids: [B, T], [1, T] or [T]; 0, 1, 2, ... in every text, and going on where a session stopped.
        cache_position: [T], columns since the session began.
        token_type_ids: [B, T], all zero.
        seq_idx: [B, T], the number of the text that a token belongs to.
        cu_seq_lens_q, cu_seq_lens_k: [texts + 1], where texts begin among all real tokens, and the end; both the same.
        max_length_q, max_length_k: tokens of the longest text, which follows from the others.
    """

    position_ids: Tensor | None = None
    cache_position: Tensor | None = None
    token_type_ids: Tensor | None = None
    seq_idx: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    max_length_q: int | Tensor | None = None
    max_length_k: int | Tensor | None = None

    def tensors(self, batch: int, width: int) -> dict[str, Tensor]:
        """What must be looked at, as int32 or bool, to be brought to the CPU with the rest.

        Raises:
            TypeError, ValueError: for what is no tensor, or of another shape.
        """
        rows = ((batch, width), (1, width), (width,))
        shapes = {"position_ids": rows, "seq_idx": rows, "token_type_ids": rows, "cache_position": ((width,),)}
        found = {}
        for name, value in vars(self).items():
            if value is None or name.startswith("max_length"):
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}")
            fits = tuple(value.shape) in shapes[name] if name in shapes else value.dim() == 1 and value.numel() > 1
            if not fits or value.is_floating_point() or value.is_complex():
                wanted = f"shape {shapes[name][0]}" if name in shapes else "shape [texts + 1]"
                raise ValueError(
                    f"expected {name} of whole numbers and {wanted}, got {tuple(value.shape)} of {value.dtype}"
                )
            found[name] = (value != 0).any()[None] if name == "token_type_ids" else value.to(torch.int32)
        return found

    @staticmethod
    def begins(
        here: dict[str, np.ndarray], real: np.ndarray, seen: Sequence[int] | None, columns: int
    ) -> np.ndarray | None:
        """Which real tokens begin a text, [tokens] bool over all rows; None if every row is one text.

        Args:
            here: what `tensors` gave, on the CPU.
            real: [B, T] bool.
            seen: tokens of each row that were read before in this session; None without one.
            columns: the same with padding, the same for all rows.

        Raises:
            ValueError: for what contradicts itself, leaves a gap or cannot be followed; it is named.
        """
        if "token_type_ids" in here and here["token_type_ids"].any():
            raise ValueError(
                "expected token_type_ids of 0 only, got others: a causal model knows but one kind of token"
            )
        if "cache_position" in here:
            place = here["cache_position"]
            if not np.array_equal(place, np.arange(columns, columns + real.shape[1])):
                raise ValueError(
                    f"expected cache_position {columns} to {columns + real.shape[1] - 1} (columns since the session "
                    f"began), got {place.tolist()[:8]}; leave it out"
                )
        rows, _ = real.nonzero()
        heads = np.append(True, rows[1:] != rows[:-1])[: len(rows)]
        said: dict[str, np.ndarray] = {}
        if "position_ids" in here:
            positions = np.broadcast_to(here["position_ids"], real.shape)[real]
            said["position_ids"] = _restarts(positions, rows, heads, np.asarray(seen or [0] * len(real)))
        if "seq_idx" in here:
            numbers = np.broadcast_to(here["seq_idx"], real.shape)[real]
            said["seq_idx"] = heads | np.append(True, numbers[1:] != numbers[:-1])[: len(rows)]
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            if name in here:
                said[name] = _boundaries(name, here[name], heads)
        if not said:
            return None
        name, begins = next(iter(said.items()))
        for other, others in said.items():
            if not np.array_equal(begins, others):
                raise ValueError(
                    f"expected {name} and {other} to have texts begin at the same tokens, got "
                    f"{begins.nonzero()[0].tolist()[:8]} and {others.nonzero()[0].tolist()[:8]}"
                )
        if np.array_equal(begins, heads):
            return None
        if seen is not None:
            raise ValueError(
                f"expected one text per row with a cache, got packed rows (by {name}): which of its texts would a "
                "session go on with? Give each text a row of its own, or set use_cache=False"
            )
        return begins


def texts(real: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Texts as rows of their own: where each token was among the B * T given, [texts, longest], and tokens of each.

    Args:
        real: [B, T] bool.
        begins: which of the real tokens begin a text.
    """
    places, number = real.reshape(-1).nonzero()[0], begins.cumsum() - 1
    lengths = np.bincount(number)
    source = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    source[number, np.arange(len(places)) - begins.nonzero()[0][number]] = places
    return source, lengths.tolist()


def _restarts(positions: np.ndarray, rows: np.ndarray, heads: np.ndarray, seen: np.ndarray) -> np.ndarray:
    begins = np.where(heads, positions == seen[rows], positions == 0)
    follows = ~heads & (positions == np.append(0, positions[:-1])[: len(positions)] + 1)
    if not (begins | follows).all():
        at = int((~(begins | follows)).argmax())
        told = "0" if not seen[rows[at]] else f"{seen[rows[at]]} (what its session has read)"
        raise ValueError(
            f"expected position_ids that count up by one from {told}, and from 0 where another text begins in the row, "
            f"got {positions[max(0, at - 1) : at + 2].tolist()} in row {rows[at]}: positions with a gap are not taken"
        )
    return begins


def _boundaries(name: str, bounds: np.ndarray, heads: np.ndarray) -> np.ndarray:
    if bounds[0] != 0 or bounds[-1] != len(heads) or (bounds[1:] < bounds[:-1]).any():
        raise ValueError(
            f"expected {name} to ascend from 0 to {len(heads)}, the number of real tokens, got {bounds.tolist()[:8]}"
        )
    begins = np.zeros(len(heads) + 1, dtype=bool)
    begins[bounds] = True
    if (heads & ~begins[:-1]).any():
        raise ValueError(f"expected {name} to have a text begin where a row begins, got {bounds.tolist()[:8]}")
    return begins[:-1]
