"""Norms while a model trains: what the log shows of the state, and whether a step may be made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sleepify.memory import LayerKey, Memory
from sleepify.modeling import SleepForCausalLM
from sleepify.schedule import Sleep


def not_finite(loss_is_bad: Tensor, norm: Tensor | float) -> bool:
    """Whether a loss was not finite or the gradient's norm is not; the device is waited for once."""
    # (A sharded norm, of FSDP2, does not go together with what is not.)
    if isinstance(norm, Tensor) and not hasattr(norm, "full_tensor") and norm.device == loss_is_bad.device:
        return bool(loss_is_bad | ~torch.isfinite(norm))
    return bool(loss_is_bad) or not math.isfinite(norm)


@contextmanager
def state_norms(model: SleepForCausalLM) -> Iterator[dict[str, float]]:
    """Norm of each layer's fast weights after the latest sleep of each row, the mean over rows; by layer of the base.

    Filled when the context ends.
    """
    latest: dict[LayerKey, dict[int, Tensor]] = {}
    norms: dict[str, float] = {}

    def note(each: Sleep, memory: Memory) -> None:
        for key, layer in memory.state.items():
            if layer.recurrent is not None:
                sizes = layer.recurrent.detach().flatten(1).norm(dim=1)
                latest.setdefault(key, {}).update(zip(each.rows, sizes.unbind(), strict=True))

    model.watch = note
    try:
        yield norms
    finally:
        model.watch = None
    for (index, inserted), rows in sorted(latest.items()):
        place = "inserted_after" if inserted else "layer"
        norms[f"state_norm/{place}_{index}"] = torch.stack(list(rows.values())).mean().item()
