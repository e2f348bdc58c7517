"""What a session adds to a wake token, counted: nothing beyond what the base does for its own cache."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from benchmarks.wake import small_qwen
from sleepify import SleepCache


class Operations(TorchDispatchMode):
    """Counts them, views too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(action: Callable[[], None]) -> int:
    with Operations() as seen:
        action()
    return seen.count


def calls(action: Callable[[], None]) -> int:
    """Of functions, of Python and of C."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


@pytest.fixture(scope="module")
def actions() -> dict[str, Callable[[], None]]:
    """A token of the base, of the inserted layers by themselves, and of the sleeping model, with as many keys."""
    torch.set_grad_enabled(False)
    window, half = 64, 32
    model = small_qwen(True, window, 2)
    base, ids = model.unload(), torch.randint(0, 4096, (1, window + half), generator=torch.Generator().manual_seed(1))
    session, fixed, keys = SleepCache(), SleepCache(fixed_shapes=True), DynamicCache(config=base.config)
    for cache in (session, fixed):
        model(ids, past_key_values=cache, logits_to_keep=1)
    base(ids[:, window:], past_key_values=keys, logits_to_keep=1)
    token, layers = ids[:, :1], model.blocks.inserted
    states = {index: session.memory.state[index, 1] for index in layers}
    hidden = torch.randn(1, 1, base.config.hidden_size)

    def own() -> None:
        base(token, past_key_values=keys, logits_to_keep=1)
        keys.crop(-1)

    def inserted() -> None:
        for index, layer in layers.items():
            layer(hidden, states[index], None)

    def slept() -> None:
        model(token, past_key_values=session.clone(), logits_to_keep=1)

    def replayed() -> None:
        model(token, past_key_values=fixed, logits_to_keep=1)

    found = {"base": own, "inserted": inserted, "slept": slept, "replayed": replayed}
    with model.captured(lambda function: lambda: None):
        for action in (*found.values(), *found.values()):
            action()
        yield found
    torch.set_grad_enabled(True)


def test_a_wake_token_launches_what_the_base_and_the_inserted_layers_launch(actions):
    counts = {name: operations(action) for name, action in actions.items()}
    assert counts["slept"] <= counts["base"] + counts["inserted"], counts


def test_the_host_does_no_more_for_a_session_than_for_the_base_s_own_cache(actions):
    counts = {name: calls(action) for name, action in actions.items()}
    assert counts["slept"] <= 1.02 * (counts["base"] + counts["inserted"]), counts


def test_a_graph_leaves_little_to_launch(actions):
    """Copies to it and from it, the final norm, the head, and what the session counts."""
    counts = {name: operations(actions[name]) for name in ("base", "replayed")}
    assert 10 * counts["replayed"] < counts["base"], counts
