"""Sharding over processes: that it takes place if it was asked for, and what layers compute in under FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from sleepify.hosts.window_cache import WindowCache
from sleepify.training.arguments import SleepTrainingArguments

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_sharding(args: SleepTrainingArguments, accelerator: Accelerator) -> None:
    """See that sharding that was asked for takes place: Accelerate shards on accelerators only, and elsewhere quietly
    replicates.

    Raises:
        ValueError: if it does not.
    """
    chosen = accelerator.distributed_type
    for name in ("fsdp", "deepspeed"):
        asked = getattr(args, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true"
        if asked and chosen.value != name.upper():
            raise ValueError(
                f"expected {name} to be available, but Accelerate chose {chosen.value} here and would quietly "
                f"train without it; launch on several accelerators, or drop {name}"
            )


def autocast_under_fsdp(accelerator: Accelerator) -> Callable[[], AbstractContextManager[Any]]:
    """Have bf16 mean under FSDP2 what it means elsewhere: autocast over weights as they are.

    Accelerate has FSDP2 cast instead: all that goes into a layer or comes out of one, the state too, which would be
    rounded to 8 bits at every window, and the loss; and gradients, which would add up over passes and ranks so.

    Args:
        accelerator: that of a run; not yet asked to prepare the model.

    Returns:
        What to make a context of for every call of the model.
    """
    half = _HALVES.get(accelerator.mixed_precision)
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if half is None or plugin is None or plugin.fsdp_version != 2:
        return nullcontext
    plugin.mixed_precision_policy = None
    return partial(torch.autocast, accelerator.device.type, half)


def give_memory_out(layers: Iterable[nn.Module]) -> None:
    """Let layers of a base return what they leave in their cache, too, behind their hidden states.

    FSDP2 gathers a layer for the backward pass when a gradient reaches what it returned. The first may come by way of
    the state, or of keys, of a window that nothing else is asked of.

    Args:
        layers: not yet sharded.
    """
    for layer in layers:
        # Before FSDP2 looks at what is returned.
        layer.register_forward_hook(_with_memory, prepend=True, with_kwargs=True)


def _with_memory(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
    cache = next((each for each in given.values() if isinstance(each, WindowCache)), None)
    if cache is None:
        return output
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden, *cache.left()
