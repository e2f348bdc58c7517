"""Tiny models that sleep, as the tests want them: inserted layers do something, and the weights are always the same."""

from __future__ import annotations

from typing import Any

import torch
from families import randomise, tiny_base
from transformers import PreTrainedModel

from sleepify import FastWeightConfig, SleepForCausalLM, sleepify


def sleeping(
    base: str | PreTrainedModel = "qwen3", dtype: torch.dtype = torch.float64, **keywords: Any
) -> SleepForCausalLM:
    """Three passes over windows of 5, with layers inserted after 0 and 2, unless the keywords of `sleepify` say else.

    Args:
        base: a family, or a base model (of whatever dtype).
    """
    defaults = {"n_loops": 3, "window_size": 5, "fast_weights": FastWeightConfig(layers=[0, 2])}
    model = sleepify(tiny_base(base, dtype) if isinstance(base, str) else base, **(defaults | keywords))
    randomise(model.fast_weights)
    return model


def trainable(
    family: str = "qwen3", dtype: torch.dtype = torch.float32, layers: int | None = 2, **keywords: Any
) -> SleepForCausalLM:
    """A smaller one for training: two base layers (None: the family's), two passes over windows of 8, one inserted."""
    torch.manual_seed(3)
    base = tiny_base(family, dtype, **({"num_hidden_layers": layers} if layers else {}))
    return sleeping(base, **({"n_loops": 2, "window_size": 8, "fast_weights": None} | keywords))
