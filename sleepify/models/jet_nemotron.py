"""Jet-Nemotron (arXiv:2508.15884), as published in jet-ai/Jet-Nemotron-2B and -4B; no remote code.

A Qwen2-style decoder whose layers mix tokens by full attention, sliding-window attention, or the JetBlock, a gated
delta rule with dynamic convolution (``sleepify.fast_weights.jet_block``): x += mixer(norm(x)); x += mlp(norm(x)).

Shape suffixes: B batch, T tokens, D width, H heads, K/V key/value dims, C channels, W conv window.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from sleepify.fast_weights.jet_block import JetBlock
from sleepify.models.decoder import MASKS, CausalLM, Decoder, DecoderConfig, NativePreTrainedModel

PUBLISHED_LAYER_TYPES = {"attn": "full_attention", "swa": "sliding_attention", "jet": "linear_attention"}
JET_DEFAULTS: dict[str, Any] = {
    "num_heads": 6,
    "head_dim": 256,
    "expand_v": 2.0,
    "conv_size": 4,
    "dconv_generator_reduction": 8,
    "norm_eps": 1e-5,
}
# They choose among kernels that compute the same; ours are chosen in sleepify.ops.
JET_KERNEL_CHOICES = {"mode", "dconv_implementation"}


@strict
class JetNemotronConfig(DecoderConfig):
    """Configuration under the published field names; the defaults are those of the 2B model where it has them.

    ``layer_types`` takes the published names ("attn", "swa", "jet"), also as a string holding a Python list, or those
    of transformers, into which it is translated; missing means attention everywhere.
    ``efficient_attention_config`` is kept as given: ``{"swa": {"window_size": w}, "jet": {...}}``.

    Raises:
        TypeError: an unknown field of the "jet" block.
        ValueError: unknown layer types, or sliding layers without a usable window.
    """

    model_type = "jet_nemotron"
    default_theta = 1_000_000.0

    layer_types: list[str] | str | None = None
    efficient_attention_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.layer_types = self._translate(self.layer_types)
        self.sliding_window = self._window()
        self.jet_arguments()
        super().__post_init__(**kwargs)

    def _translate(self, layer_types: list[str] | str | None) -> list[str]:
        if layer_types is None:
            return ["full_attention"] * self.num_hidden_layers
        if isinstance(layer_types, str):
            try:
                layer_types = list(ast.literal_eval(layer_types))
            except (SyntaxError, TypeError, ValueError) as error:
                raise ValueError(f"layer_types must be a list or a string holding one, got {layer_types!r}") from error
        translated = [PUBLISHED_LAYER_TYPES.get(kind, kind) for kind in layer_types]
        if unknown := set(translated) - set(MASKS):
            names = [*PUBLISHED_LAYER_TYPES, *MASKS]
            raise ValueError(f"layer_types must be among {names}, got {sorted(map(str, unknown))}")
        if len(translated) != self.num_hidden_layers:
            raise ValueError(
                f"expected {self.num_hidden_layers} layer_types (num_hidden_layers), got {len(translated)}"
            )
        return translated

    def _window(self) -> int | None:
        assert self.layer_types is not None
        if "sliding_attention" not in self.layer_types:
            return None
        named = (self.efficient_attention_config or {}).get("swa", {}).get("window_size", self.sliding_window)
        if self.sliding_window not in (None, named):
            raise ValueError(
                f"sliding_window {self.sliding_window} contradicts efficient_attention_config's window_size {named}"
            )
        if not isinstance(named, int) or named < 2:
            raise ValueError(
                "sliding attention layers need an integer window of at least 2 tokens in "
                f"efficient_attention_config['swa']['window_size'], got {named!r}"
            )
        return named

    def jet_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``JetBlock`` (all but ``hidden_size``)."""
        given = (self.efficient_attention_config or {}).get("jet", {})
        if unknown := sorted(set(given) - set(JET_DEFAULTS) - JET_KERNEL_CHOICES):
            raise TypeError(
                f"unknown keys {unknown} in efficient_attention_config['jet'], "
                f"expected some of {[*JET_DEFAULTS, *sorted(JET_KERNEL_CHOICES)]}"
            )
        arguments = {key: given.get(key, default) for key, default in JET_DEFAULTS.items()}
        return {**arguments, "norm_eps": float(arguments["norm_eps"])}  # published as the string "1e-5"


class JetNemotronRMSNorm(nn.RMSNorm):
    """x / rms(x) times the weight in float32 (at least), and only then cast back to x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)  # autocast leaves it in float32


class JetNemotronDecoderLayer(GradientCheckpointingLayer):
    """Mixer and MLP, each behind a norm and added to its input. The mixer is always named ``self_attn``."""

    def __init__(self, config: JetNemotronConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None  # filled by the config
        self.layer_idx = layer_idx
        if config.layer_types[layer_idx] == "linear_attention":
            self.self_attn: nn.Module = JetBlock(config.hidden_size, **config.jet_arguments())
        else:
            self.self_attn = qwen2.Qwen2Attention(config, layer_idx)  # type: ignore[arg-type]
        self.mlp = qwen2.Qwen2MLP(config)
        self.input_layernorm = JetNemotronRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = JetNemotronRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B,T,D] -> [B,T,D].

        Args:
            attention_mask: what the attention implementation takes; for a jet layer [B,T], nonzero for real tokens of
                rows padded on the left, or None.
            lengths: [B], real tokens per row when rows are padded on the right; attention does not need it.
            kwargs: what else ``Qwen2Attention`` takes.
        """
        normed = self.input_layernorm(hidden_states)
        if isinstance(self.self_attn, JetBlock):
            mixed = self._mix_jet(normed, attention_mask, past_key_values, lengths)
        else:
            kwargs |= {"attention_mask": attention_mask, "past_key_values": past_key_values}
            mixed, _ = self.self_attn(normed, **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def _mix_jet(self, x: Tensor, mask: Tensor | None, cache: Cache | None, lengths: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.bool()
        if cache is None:
            return self.self_attn(x, None, lengths, mask)[0]
        state = None
        if cache.has_previous_state(self.layer_idx):
            held: Any = cache.layers[self.layer_idx]
            # A session from a file may lie on another device than this layer.
            parts = (held.conv_states[0], held.recurrent_states[0])
            state = tuple(part if part is None else part.to(x.device) for part in parts)
            if torch.is_grad_enabled():
                # transformers' own caches write in place, which would spoil what the backward pass has saved.
                state = (_own(state[0]), _own(state[1]))
        output, (conv_state, matrix) = self.self_attn(x, state, lengths, mask)
        # A cache appends what it is given and keeps the last W, so handing it the whole new window replaces the old.
        cache.update_conv_state(conv_state, self.layer_idx)
        cache.update_recurrent_state(matrix, self.layer_idx)
        return output


def _own(tensor: Any) -> Any:
    return None if tensor is None else tensor.clone()


class JetNemotronPreTrainedModel(NativePreTrainedModel):
    config_class = JetNemotronConfig
    config: JetNemotronConfig
    _no_split_modules = ["JetNemotronDecoderLayer"]
    _is_stateful = True  # a recurrent state cannot be rolled back: generate refuses assisted decoding by this
    _can_record_outputs = {"hidden_states": JetNemotronDecoderLayer, "attentions": qwen2.Qwen2Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range) except in the JetBlock, which starts as an inserted one does.

        The published code draws the kernel generator's weights there too and zeroes its static kernel.
        """
        super()._init_weights(module)
        if isinstance(module, JetBlock):
            module.reset_parameters()


class JetNemotronModel(JetNemotronPreTrainedModel, Decoder):
    """The decoder: ids in, normalised states out."""

    layer_class = JetNemotronDecoderLayer
    norm_class = JetNemotronRMSNorm

    def __init__(self, config: JetNemotronConfig) -> None:
        super().__init__(config)
        self.post_init()


class JetNemotronForCausalLM(JetNemotronPreTrainedModel, CausalLM):
    """Jet-Nemotron with its language-model head."""

    decoder_class = JetNemotronModel
