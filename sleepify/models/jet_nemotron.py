"""Jet-Nemotron (arXiv:2508.15884), as published in jet-ai/Jet-Nemotron-2B and -4B; no remote code.

A Qwen2-style decoder whose layers mix tokens by full attention, sliding-window attention, or the JetBlock, a gated
delta rule with dynamic convolution (``sleepify.fast_weights.jet_block``): x += mixer(norm(x)); x += mlp(norm(x)).

Shape suffixes: B batch, T tokens, D width, H heads, K/V key/value dims, C channels, W conv window.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from sleepify.fast_weights.jet_block import JetBlock
from sleepify.fast_weights.parts import RMSNorm

PUBLISHED_LAYER_TYPES = {"attn": "full_attention", "swa": "sliding_attention", "jet": "linear_attention"}
MASKS: dict[str, Callable] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "linear_attention": create_recurrent_attention_mask,
}
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
class JetNemotronConfig(PreTrainedConfig):
    """Configuration under the published field names; the defaults are those of the 2B model where it has them.

    ``layer_types`` takes the published names ("attn", "swa", "jet"), also as a string holding a Python list, or those
    of transformers, into which it is translated; missing means attention everywhere.
    ``efficient_attention_config`` is kept as given: ``{"swa": {"window_size": w}, "jet": {...}}``.

    Raises:
        TypeError: an unknown field of the "jet" block.
        ValueError: unknown layer types, or sliding layers without a usable window.
    """

    model_type = "jet_nemotron"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 1_000_000.0

    vocab_size: int = 151936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int | None = 2
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    attention_dropout: float | int = 0.0
    layer_types: list[str] | str | None = None
    efficient_attention_config: dict | None = None
    sliding_window: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.layer_types = self._translate(self.layer_types)
        self.sliding_window = self._window()
        self.jet_arguments()
        kwargs.pop("auto_map", None)  # names the remote code that this class replaces
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


class JetNemotronAttention(nn.Module):
    """Causal grouped-query attention, full or over a sliding window; q, k and v have biases, the output has none."""

    def __init__(self, config: JetNemotronConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None and config.head_dim is not None  # filled by the config
        n_heads, n_kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = n_heads // n_kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.q_proj = nn.Linear(config.hidden_size, n_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, n_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, n_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(n_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        n_rows, n_tokens, _ = hidden_states.shape
        heads = (n_rows, n_tokens, -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(hidden_states).view(heads).transpose(1, 2) for project in projections)
        query, key = qwen2.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation, eager = self.config._attn_implementation, qwen2.eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        kwargs["sliding_window"] = self.sliding_window
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(n_rows, n_tokens, -1)), weights


class JetNemotronDecoderLayer(GradientCheckpointingLayer):
    """Mixer and MLP, each behind a norm and added to its input. The mixer is always named ``self_attn``."""

    def __init__(self, config: JetNemotronConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None  # filled by the config
        self.layer_idx = layer_idx
        if config.layer_types[layer_idx] == "linear_attention":
            self.self_attn: nn.Module = JetBlock(config.hidden_size, **config.jet_arguments())
        else:
            self.self_attn = JetNemotronAttention(config, layer_idx)
        self.mlp = qwen2.Qwen2MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B,T,D] -> [B,T,D].

        Args:
            attention_mask: what the attention implementation takes; for a jet layer [B,T], nonzero for real tokens of
                rows padded on the left, or None.
            lengths: [B], real tokens per row when rows are padded on the right; attention does not need it.
        """
        normed = self.input_layernorm(hidden_states)
        if isinstance(self.self_attn, JetBlock):
            mixed = self._mix_jet(normed, attention_mask, past_key_values, lengths)
        else:
            kwargs["position_ids"] = position_ids
            mixed, _ = self.self_attn(normed, position_embeddings, attention_mask, past_key_values, **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def _mix_jet(self, x: Tensor, mask: Tensor | None, cache: Cache | None, lengths: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.bool()
        if cache is None:
            return self.self_attn(x, None, lengths, mask)[0]
        state = None
        if cache.has_previous_state(self.layer_idx):
            held: Any = cache.layers[self.layer_idx]
            state = (held.conv_states[0], held.recurrent_states[0])
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


class JetNemotronPreTrainedModel(PreTrainedModel):
    config_class = JetNemotronConfig
    config: JetNemotronConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["JetNemotronDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True  # a recurrent state cannot be rolled back: generate refuses assisted decoding by this
    _can_record_outputs = {"hidden_states": JetNemotronDecoderLayer, "attentions": JetNemotronAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range) except in the JetBlock, which starts as an inserted one does.

        The published code draws the kernel generator's weights there too and zeroes its static kernel.
        """
        super()._init_weights(module)
        if isinstance(module, JetBlock):
            module.reset_parameters()


class JetNemotronModel(JetNemotronPreTrainedModel):
    """The decoder: ids in, normalised states out."""

    def __init__(self, config: JetNemotronConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([JetNemotronDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = qwen2.Qwen2RotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """[B,T] ids or [B,T,D] embeddings -> [B,T,D]. Positions count on from the cache's length, whatever the mask."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        layer_types = self.config.layer_types
        assert isinstance(layer_types, list)  # translated by the config
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            # Jet layers know no positions, and a cache of them alone no length.
            counted = past_key_values is not None and set(layer_types) != {"linear_attention"}
            n_past = past_key_values.get_seq_length() if past_key_values is not None and counted else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None] + n_past
        masks = attention_mask
        if not isinstance(masks, dict):  # else made beforehand by generate
            given = (self.config, hidden_states, attention_mask, past_key_values)
            masks = {
                # Left to itself, transformers before 5.23 reads the lengths off a layer of another kind.
                kind: MASKS[kind](*given, position_ids=position_ids, layer_idx=layer_types.index(kind))
                for kind in sorted(set(layer_types))
            }
        kwargs |= {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_embeddings": self.rotary_emb(hidden_states, position_ids),
        }
        for layer, kind in zip(self.layers, layer_types, strict=True):
            hidden_states = layer(hidden_states, attention_mask=masks[kind], **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class JetNemotronForCausalLM(JetNemotronPreTrainedModel, GenerationMixin):
    """Jet-Nemotron with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: JetNemotronConfig) -> None:
        super().__init__(config)
        self.model = JetNemotronModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B,T,V]; with ``labels`` [B,T] (-100 is ignored) the loss, ``num_items_in_batch`` honoured."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        cache, states, weights = outputs.past_key_values, outputs.hidden_states, outputs.attentions
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache, hidden_states=states, attentions=weights
        )
