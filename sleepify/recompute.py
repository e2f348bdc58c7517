"""Activations that are dropped, and made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sleepify.memory import Memory
from sleepify.settings import Settings
from sleepify.snapshot import Window

T_ = TypeVar("T_")
# Before, FSDP2 takes a layer for whole once a gradient has reached it, though it has been sharded again since: called
# once more in the same backward pass, the layer would compute with its shards.
_LAYERS_ARE_WHOLE = torch.__version__ >= torch.torch_version.TorchVersion("2.11")
_HOLDERS = (Tensor, Memory, Window)
# What takes long for what it leaves: projections, by whatever name, and attention. Products inside the chunks of a
# recurrence are small and leave much.
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
_KEPT = [
    getattr(torch.ops.aten, name).default for name in ("mm", "addmm", *_ATTENTION) if hasattr(torch.ops.aten, name)
]


def recompute(settings: Settings, level: str, function: Callable[..., T_], *arguments: Any) -> T_:
    """Call, and drop the activations to recompute them in the backward pass if that is to be done at this level.

    "selective" is the level "loop", but for the results of projections and attention, which are kept.
    """
    selective = settings.checkpoint == "selective" and level == "loop"
    if not (selective or settings.checkpoint == level) or not torch.is_grad_enabled():
        return function(*arguments)
    # Which devices' random state is to be the same the second time, checkpoint finds out from the tensors it is shown.
    held = [[each] if isinstance(each, Tensor) else each.tensors() for each in arguments if isinstance(each, _HOLDERS)]
    shown = {tensor.device: tensor for tensors in held for tensor in tensors}
    how: dict[str, Any] = {}
    if selective:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
    calls = count()

    def call(_: Any) -> T_:
        with _whole_layers() if next(calls) else nullcontext():
            return function(*arguments)

    return checkpoint(call, list(shown.values()), use_reentrant=False, **how)


@contextmanager
def _whole_layers() -> Iterator[None]:
    """While a backward pass calls layers again: those that FSDP2 has sharded are made whole before."""
    if _LAYERS_ARE_WHOLE or not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    def unshard(module: nn.Module, _: Any) -> None:
        if isinstance(module, FSDPModule):
            module.unshard()

    hook = register_module_forward_pre_hook(unshard)
    try:
        yield
    finally:
        hook.remove()


class SleepRecompute:
    """transformers' switches for gradient checkpointing, of a model that does it per pass or per window itself."""

    # None: as config.checkpoint says.
    _recompute: bool | None
    options: Callable[..., Settings]

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute per pass (or as ``config.checkpoint`` says), never re-entrant: layers of the base alone cannot,
        because their state must come out of the recomputed part as its value."""
        if gradient_checkpointing_kwargs and gradient_checkpointing_kwargs.get("use_reentrant"):
            raise ValueError("expected use_reentrant=False, got True: the state crosses windows as a value")
        # transformers' activation_checkpointing_enable, which Trainer calls, arrives here with its defaults.
        if other := {name: value for name, value in kwargs.items() if value not in (None, False, 1)}:
            raise ValueError(f"expected every_n_layers=1 and offload=False, got {other}; set config.checkpoint instead")
        self._recompute = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self._recompute = False

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self.options().checkpoint != "none"

    @property
    def is_gradient_checkpointing(self) -> bool:
        """What transformers before 5.23 asks."""
        return self.is_activation_checkpointing
