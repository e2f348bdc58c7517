"""What a call of the model is refused for before anything is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sleepify.errors import SleepifyError


def refuse(**switches: Any) -> None:
    """See that what cannot be is not asked for.

    Args:
        switches: what must be None or off, by the name by which it was given.

    Raises:
        ValueError: if not.
    """
    asked = [name for name, value in switches.items() if value is not None and value is not False]
    if "output_router_logits" in asked:
        raise ValueError(
            "expected output_router_logits to be off, got it on: the auxiliary loss of a router is not computed; set "
            "router_aux_loss_coef=0.0 in the trainer's arguments, or in config.text_config"
        )
    if asked:
        raise ValueError(f"expected {', '.join(asked)} to be off, got it on: sleep replays the ids of a window")


def refuse_unequal_ranks(layers: Iterable[nn.Module]) -> None:
    """See that layers are not sharded over processes, where nobody has seen to it that all call the same ones.

    FSDP and ZeRO-3 gather a layer's weights whenever it is called. A sleeping model calls its layers as often as the
    batch at hand asks for, so that processes with different batches would wait for each other for ever.

    Raises:
        SleepifyError: if they are.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() == 1:
        return
    layer = next(iter(layers))
    zero = any(hasattr(parameter, "ds_id") for parameter in layer.parameters())
    if zero or getattr(layer, "_is_fsdp_managed_module", False):
        raise SleepifyError(
            f"expected the ranks to agree on what they read, since {'ZeRO-3' if zero else 'FSDP'} gathers layers from "
            "all of them, got a call without `awake`, which would wait for the others for ever: train with "
            "sleepify.training.SleepTrainer, or without sharding (DDP, ZeRO-1 or ZeRO-2)"
        )
