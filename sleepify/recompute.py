"""Whether activations are recomputed in the backward pass, by the names that transformers has for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sleepify.settings import Settings


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
