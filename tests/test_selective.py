"""Recomputing all but projections and attention: the same gradients, no product made twice, memory in between."""

from __future__ import annotations

import pytest
import torch
from families import tiny_base, tokens
from small import sleeping
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import peak_bytes


class Calls(TorchDispatchMode):
    """Counts projections and everything else."""

    def __init__(self):
        super().__init__()
        self.projections = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_projection = func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.projections, self.others = self.projections + is_projection, self.others + (not is_projection)
        return func(*args, **(kwargs or {}))


def step(model):
    """Loss and gradients of a step; random numbers begin anew."""
    model.zero_grad()
    torch.manual_seed(0)
    ids = tokens(2, 23)
    loss = model(ids, labels=ids.masked_fill(torch.arange(23) < 15, -100)).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["qwen3", "jet_nemotron"])
def test_gradients_are_the_same_to_the_bit_and_no_projection_is_made_twice(family):
    base = tiny_base(family, torch.float64, **({"attention_dropout": 0.2} if family == "qwen3" else {}))
    model = sleeping(base).train()
    found, counts = {}, {}
    for mode in ("none", "loop", "selective"):
        model.config.checkpoint = mode
        with Calls() as calls:
            found[mode] = step(model)
        counts[mode] = calls
    assert all(torch.equal(a, b) for a, b in zip(found["selective"], found["none"], strict=True))
    assert counts["selective"].projections == counts["none"].projections < counts["loop"].projections
    assert counts["selective"].others > counts["none"].others


def test_memory_is_between_all_and_what_enters_a_pass():
    model = sleeping(dtype=torch.float32, window_size=32, n_loops=3).train()
    ids = tokens(1, 2 * 32 + 4)
    labels = ids.masked_fill(torch.arange(2 * 32 + 4) < 2 * 32 + 2, -100)
    peaks = {}
    for mode in ("none", "selective", "loop"):
        model.config.checkpoint = mode
        model.zero_grad()
        peaks[mode] = peak_bytes(lambda: model(ids, labels=labels).loss.backward(), "cpu")
    assert peaks["loop"] < peaks["selective"] < 0.7 * peaks["none"]
