"""What sessions on disk say of the model that made them: whose they are, and what their state came of."""

from __future__ import annotations

import torch

from sleepify.cache import SleepCache
from sleepify.fingerprint import fingerprint
from sleepify.modeling import SleepForCausalLM


def owner_of(model: SleepForCausalLM) -> str:
    """What the model's sessions say of it; also the first sign of a model that does not run."""
    cache = SleepCache()
    with torch.no_grad():
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        model.eval()(ids, past_key_values=cache)
    assert cache.owner is not None
    return cache.owner


def made_by(model: SleepForCausalLM) -> str:
    """What else its state of a text depends on: the owner says nothing of trained weights, N and the looped layers."""
    settings = model.options()
    return f"{fingerprint(model)}, N={settings.n_loops}, layers {settings.loop_range}"
