"""A base that teaches: what it predicts with a whole text in its context, no token evicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import deepspeed

from sleepify.hosts import Host, host_class
from sleepify.memory import Memory
from sleepify.modeling import SleepForCausalLM


class Teacher:
    """A base whose predictions are given, never trained.

    Args:
        language_model: the base; adapters on it are off while it teaches, and dropout too.
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        self.language_model = language_model
        self.host: Host = host_class(language_model.config)(language_model)
        # Ouro is a base that loops; teaching, it does so as often as it was made to.
        self.n_loops = int(getattr(language_model.config, "total_ut_steps", 1))

    @classmethod
    def load(cls, name: str, student: SleepForCausalLM) -> Teacher:
        """Another base by name, in the dtype and on the device of the student; whole in every process.

        Raises:
            ValueError: for a model that sleeps, or one with another vocabulary.
        """
        like = next(student.parameters())
        with _not_partitioned():
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=like.dtype)
        if isinstance(model, SleepForCausalLM):
            raise ValueError(f"expected distill_teacher to be a base that keeps its context, got {name}, which sleeps")
        theirs, ours = model.config.get_text_config().vocab_size, student.config.text_config.vocab_size
        if theirs != ours:
            raise ValueError(
                f"expected distill_teacher with the student's vocabulary of {ours}, got {name} of {theirs}"
            )
        return cls(model.to(like.device).requires_grad_(False).eval())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The base as it was before adapters, without dropout."""
        adapters = [module for module in self.language_model.modules() if hasattr(module, "_disable_adapters")]
        modes = [(module, module.training) for module in self.language_model.modules()]
        off = [bool(module._disable_adapters) for module in adapters]
        self.language_model.eval()
        for module in adapters:
            # Not peft's own switch, which also says what is trained.
            module._disable_adapters = True  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, was_off in zip(adapters, off, strict=True):
                module._disable_adapters = was_off  # type: ignore[assignment]
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def read(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Hidden states [B, T, D] before the final norm of rows [B, T], each of so many tokens."""
        home = self.language_model.get_input_embeddings().weight
        device: Any = home.device
        batch = ids.shape[0]
        with self.alone():
            hidden, frame = self.host.open(ids.to(device), lengths, [0] * batch, Memory(batch), False)
            for loop in range(self.n_loops):
                hidden = self.host.close_loop(hidden) if loop else hidden
                hidden, _ = self.host.run(hidden, Memory(batch), frame, 0, self.host.n_layers)
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [m, V] of hidden states [m, D]."""
        with self.alone():
            return self.host.logits(hidden)


@contextmanager
def _not_partitioned() -> Iterator[None]:
    """Load models as they are under ZeRO-3 too, which would spread their weights over the processes, where only the
    model that is trained has hooks to gather them."""
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def own_teacher(model: SleepForCausalLM) -> Teacher:
    """The base inside a model that sleeps.

    Raises:
        ValueError: if its own weights are trained, so that it would not stay what it is.
    """
    trained = _trained(model.language_model)
    if trained:
        raise ValueError(
            f"expected a base that stays as it is to learn from, got one that is trained ({trained[0]} and "
            f"{len(trained) - 1} more); give train_only='fast_weights', LoRA, or distill_teacher, a base by name"
        )
    return Teacher(model.language_model)


def _trained(base: nn.Module) -> list[str]:
    """Names of parameters of the base that are trained and not an adapter's."""
    adapters = set()
    for module in base.modules():
        if hasattr(module, "_disable_adapters"):
            kept = module._modules.get("original_module", module._modules.get("base_layer"))
            adapters |= set(module.parameters()) - (set() if kept is None else set(kept.parameters()))
    return [name for name, each in base.named_parameters() if each.requires_grad and each not in adapters]
