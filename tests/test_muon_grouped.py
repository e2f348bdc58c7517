"""Matrices of one shape are orthogonalised together: torch's own updates, in far fewer operations."""

from __future__ import annotations

import pytest
import torch
from tolerances import MUON_IN_NORM
from torch.utils._python_dispatch import TorchDispatchMode

from sleepify.training import muon
from sleepify.training.muon import GroupedMuon

SHAPES = [(12, 8)] * 5 + [(8, 12), (8, 8), (12, 8), (8, 8)]


def parameters(n_steps: int = 3):
    """The same for both, with the gradients of some steps; one matrix has none."""
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=draw) for shape in SHAPES] for _ in range(n_steps)]
    return [torch.nn.Parameter(value.clone()) for value in values], gradients


def walk(optimizer, weights, gradients):
    """How far each step moves each matrix."""
    moves = []
    for step in gradients:
        for index, (weight, gradient) in enumerate(zip(weights, step, strict=True)):
            weight.grad = None if index == 1 else gradient.clone()
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        moves.append([weight.detach() - old for weight, old in zip(weights, before, strict=True)])
    return moves


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
        {"nesterov": False, "momentum": 0.5, "ns_steps": 3},
    ],
)
@pytest.mark.parametrize("together", [1 << 26, 2 * 96, 1])
def test_updates_are_those_of_torch(how, together, monkeypatch):
    monkeypatch.setattr(muon, "_TOGETHER", together)
    (mine, gradients), (theirs, _) = parameters(), parameters()
    ours, torchs = GroupedMuon(mine, lr=0.1, **how), torch.optim.Muon(theirs, lr=0.1, **how)
    for step, expected in zip(walk(ours, mine, gradients), walk(torchs, theirs, gradients), strict=True):
        for index, (moved, known) in enumerate(zip(step, expected, strict=True)):
            assert (moved - known).norm() <= MUON_IN_NORM * known.norm(), index
    assert mine[1].equal(parameters()[0][1])
    for one, other in zip(mine, theirs, strict=True):
        assert ours.state[one].keys() == torchs.state[other].keys()
        for name, value in ours.state[one].items():
            assert value.equal(torchs.state[other][name])
    again = torch.optim.Muon(theirs, lr=0.1, **how)
    again.load_state_dict(ours.state_dict())


def test_a_closure_gives_its_loss():
    weight = torch.nn.Parameter(torch.eye(3))
    optimizer = GroupedMuon([weight], lr=0.1)

    def loss():
        optimizer.zero_grad()
        value = weight.square().sum()
        value.backward()
        return value

    assert optimizer.step(loss) == 3 and not weight.detach().equal(torch.eye(3))


class Operations(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_it_takes_a_fraction_of_the_operations():
    counts = []
    for kind in (GroupedMuon, torch.optim.Muon):
        weights = [torch.nn.Parameter(torch.randn(16, 16)) for _ in range(20)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = kind(weights, lr=0.1)
        optimizer.step()
        with Operations() as seen:
            optimizer.step()
        counts.append(seen.count)
    assert 4 * counts[0] < counts[1], counts
