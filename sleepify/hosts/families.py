"""What families of bases do differently, and which families have been tested."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from sleepify.hosts.driver import Frame, Host
from sleepify.hosts.narrowing import ALONE
from sleepify.hosts.window_cache import WindowCache


class OuroHost(Host):
    """Ouro closes every pass with its final norm; slept, it runs one step awake (spec: ``total_ut_steps=1``)."""

    def close_loop(self, hidden_states: Tensor) -> Tensor:
        return self.norm(hidden_states)

    def base_logits(self, input_ids: Tensor) -> Tensor:
        return self.language_model(input_ids=input_ids, use_cache=False, exit_at_step=0).logits

    def idle_parameters(self) -> list[nn.Parameter]:
        """Of the gate that decides after which step to stop: there is one step awake."""
        return list(self.decoder.early_exit_gate.parameters())


class MultimodalRotaryHost(Host):
    """Text of a vision-language family: its rotary tables take three positions per token, the same three for text."""

    def rotary(self, hidden_states: Tensor, position_ids: Tensor) -> dict[str, Any]:
        return super().rotary(hidden_states, position_ids.expand(3, *position_ids.shape))


class ClampedMambaHost(Host):
    """transformers clamps the time step of these Mamba-2 layers from below, but not when it reads a single token.

    softplus is monotone, so the clamp is put before it: on the projection that the time step comes from.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mixers = [
            [
                (mixer, math.log(math.expm1(limits[0])))
                for mixer in layer.modules()
                if hasattr(mixer, "in_proj") and (limits := getattr(mixer, "time_step_limit", (0.0,)))[0] > 0
            ]
            for layer in self.layers
        ]
        self._clamped: dict[int, _Clamped] = {}

    @property
    def changes_modules(self) -> bool:
        return True

    def layer(self, index: int, hidden_states: Tensor, frame: Frame, cache: WindowCache) -> Tensor:
        if hidden_states.shape[1] > 1:
            return super().layer(index, hidden_states, frame, cache)
        with ALONE:
            return self._clamping(index, hidden_states, frame, cache)

    def _clamping(self, index: int, hidden_states: Tensor, frame: Frame, cache: WindowCache) -> Tensor:
        """The layer, reading one token."""
        # For the length of the call, so that the base itself stays as it is; in the place of the projection that is
        # there now, since peft puts another module there.
        places = [(mixer._modules, mixer.in_proj) for mixer, _ in self._mixers[index]]
        for mixer, least in self._mixers[index]:
            known = self._clamped.get(id(mixer))
            if known is None or known.projection is not mixer.in_proj:
                known = self._clamped[id(mixer)] = _Clamped(mixer, least)
            mixer._modules["in_proj"] = known
        try:
            return super().layer(index, hidden_states, frame, cache)
        finally:
            for modules, projection in places:
                modules["in_proj"] = projection


class _Clamped(nn.Module):
    """A mixer's projection, with its time step clamped; it holds both without being their parent."""

    projection: nn.Module
    mixer: Any

    def __init__(self, mixer: Any, least: float) -> None:
        super().__init__()
        self.__dict__ |= {"mixer": mixer, "projection": mixer.in_proj, "least": least}

    def forward(self, hidden_states: Tensor) -> Tensor:
        bias = self.mixer.dt_bias
        projected = self.projection(hidden_states)
        step = torch.maximum(projected[..., -len(bias) :], (self.least - bias).to(projected.dtype))
        return torch.cat([projected[..., : -len(bias)], step], -1)


class Zamba2Host(ClampedMambaHost):
    """Zamba2's shared attention blocks read the embeddings again, and its layers are told which one they are."""

    def layer_arguments(self, index: int, frame: Frame, cache: WindowCache) -> dict[str, Any]:
        arguments = super().layer_arguments(index, frame, cache)
        mask = arguments.pop("attention_mask")
        return arguments | {"original_hidden_states": frame.embeddings, "layer_idx": index, "causal_mask": mask}


# Families with a test row. Others work if `verify` finds them to follow the convention.
FAMILIES: dict[str, type[Host]] = {
    "llama": Host,
    "mistral": Host,
    "qwen2": Host,
    "qwen3": Host,
    "qwen3_moe": Host,
    "gemma2": Host,
    "gemma3_text": Host,
    "phi3": Host,
    "olmo2": Host,
    "smollm3": Host,
    "gpt_neox": Host,
    "qwen3_next": Host,
    "qwen3_5_text": MultimodalRotaryHost,
    "olmo_hybrid": Host,
    "falcon_h1": Host,
    "bamba": Host,
    "granitemoehybrid": Host,
    "nemotron_h": ClampedMambaHost,
    "zamba2": Zamba2Host,
    "jet_nemotron": Host,
    "ouro": OuroHost,
}


def host_class(config: PreTrainedConfig) -> type[Host]:
    """The host of a family."""
    return FAMILIES.get(config.model_type, Host)
