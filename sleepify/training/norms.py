"""Norms of the fast weights while a model trains: what the log shows of the state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sleepify.memory import LayerKey, Memory
from sleepify.modeling import SleepForCausalLM
from sleepify.schedule import Sleep


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
