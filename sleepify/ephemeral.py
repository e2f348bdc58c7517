"""Ephemeral tokens: read awake between the others of an open window, and never consolidated.

A row's are kept apart from the ids that sleep replays, in order, each as (how many ordinary ones of the open window
stand before it, its id).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Ephemeral = tuple[tuple[int, int], ...]


def note(ids: Tensor, columns: Sequence[int], start: int, have: int) -> Ephemeral:
    """Those in these columns of a row's ids [T] that goes on from column ``start`` behind ``have`` ordinary ones."""
    before = (have + column - start - number for number, column in enumerate(columns))
    return tuple(zip(before, ids[list(columns)].tolist(), strict=True)) if columns else ()


def among(ids: Tensor, ephemeral: Ephemeral) -> tuple[Tensor, list[int]]:
    """The ordinary ids [n] of an open window with its ephemeral ones between them, and where these are."""
    if not ephemeral:
        return ids, []
    pieces = ids.tensor_split([before for before, _ in ephemeral])
    own = ids.new_tensor([id_ for _, id_ in ephemeral]).split(1)
    whole = [part for pair in zip(pieces[:-1], own, strict=True) for part in pair]
    return torch.cat([*whole, pieces[-1]]), [before + number for number, (before, _) in enumerate(ephemeral)]


def take_back(length: int, ephemeral: Ephemeral, count: int) -> tuple[int, Ephemeral]:
    """How many of the last ``count`` tokens are ordinary, in an open window with ``length`` of these, and the ephemeral
    ones before them.
    """
    left = length + len(ephemeral) - count
    kept = tuple(each for number, each in enumerate(ephemeral) if each[0] + number < left)
    return length - (left - len(kept)), kept
