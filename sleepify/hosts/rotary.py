"""Rotary tables that do not depend on what else is read."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

# Kinds of scaling by which transformers makes the tables of all positions from the longest of the call.
_BY_LENGTH = {"dynamic", "longrope"}


def tables_of(rotary: nn.Module, config: PreTrainedConfig, window: int | None) -> Callable[..., Any]:
    """What makes a base's rotary tables of hidden states and positions.

    Under sliding eviction positions run on past what the base was first trained on, but no token looks further back
    than a window. Keys that are retained were rotated by one table, so a base that would go over to another one there
    keeps the first, whatever the other rows and pieces of a text are.

    Args:
        rotary: the base's module.
        config: the base's.
        window: L under sliding eviction, None under hard eviction.
    """
    return rotary if window is None or first_positions(config) is None else _Still(rotary)


def first_positions(config: PreTrainedConfig) -> int | None:
    """Positions up to which a base rotates by the table that it begins with; None where it has but one."""
    scaling: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if scaling.get("rope_type") not in _BY_LENGTH:
        return None
    return int(scaling.get("original_max_position_embeddings") or config.max_position_embeddings)


class _Still:
    """A rotary module with the table that it begins with."""

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, *positions: Any) -> Any:
        still = copy.copy(self.rotary)
        frequencies: Any = still.original_inv_freq
        still._buffers = still._buffers | {"inv_freq": frequencies.to(hidden_states.device)}
        # Without what would look at the positions and choose another one.
        return inspect.unwrap(type(still).forward)(still, hidden_states, *positions)
