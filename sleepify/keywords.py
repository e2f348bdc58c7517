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
    if sharding := _sharding(layers):
        raise SleepifyError(
            f"expected the ranks to agree on what they read, since {sharding} gathers layers from all of them, got a "
            "call without `awake`, which would wait for the others for ever: train with "
            "sleepify.training.SleepTrainer, or without sharding (DDP, ZeRO-1 or ZeRO-2)"
        )


def refuse_auto(training: bool, backprop_loops: int | None, layers: Iterable[nn.Module]) -> None:
    """See that as many passes may be made as the state needs.

    Raises:
        ValueError: in training, or where gradient flows through the last passes only, which are not known beforehand.
        SleepifyError: for layers that are sharded over processes: all must make the same passes.
    """
    if training:
        raise ValueError(
            'expected a number for n_loops in training, got "auto", which would train on whatever number of passes '
            "the weights of the moment ask for: call model.eval(), or train with numbers"
        )
    if backprop_loops is not None and torch.is_grad_enabled():
        raise ValueError(
            f'expected n_loops="auto" without backprop_loops, got backprop_loops={backprop_loops}: which passes are '
            "the last is not known beforehand; call it under torch.no_grad()"
        )
    if sharding := _sharding(layers):
        raise SleepifyError(
            f'expected a number for n_loops under {sharding}, which gathers layers from all ranks, got "auto": ranks '
            "would make different passes and wait for each other for ever"
        )


def _sharding(layers: Iterable[nn.Module]) -> str | None:
    """How layers are sharded over processes; None if they are not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    if torch.distributed.get_world_size() == 1:
        return None
    layer = next(iter(layers))
    if any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
        return "ZeRO-3"
    return "FSDP" if getattr(layer, "_is_fsdp_managed_module", False) else None
