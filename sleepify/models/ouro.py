"""Ouro, the looped language model (arXiv:2510.25741), as published in ByteDance/Ouro-1.4B and -2.6B; no remote code.

The whole stack of layers runs ``total_ut_steps`` times with the same weights, and the final norm closes every pass:
h_{t+1} = norm(layers(h_t)), h_0 = embed(ids). Positions, masks and rotary angles are the same in every pass. The state
after each pass feeds a linear exit gate, whose sigmoids give a distribution over the passes at which to stop.

Shape suffixes: B batch, T tokens, D width, H heads, K key dim, N loops (passes).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

logger = logging.get_logger(__name__)


@strict
class OuroConfig(PreTrainedConfig):
    """Configuration under the published field names.

    ``total_ut_steps`` (N), ``early_exit_threshold`` and ``early_exit_step`` are read from the config at every call, so
    changing them on ``model.config`` takes effect at once (a cache belongs to the N that filled it).

    Raises:
        ValueError: ``total_ut_steps`` below 1, or sliding attention asked for (no published Ouro has it).
    """

    model_type = "ouro"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_dropout: float | int = 0.0
    use_sliding_window: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    total_ut_steps: int = 4
    early_exit_threshold: float | int | None = 1.0
    early_exit_step: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.total_ut_steps < 1:
            raise ValueError(f"total_ut_steps must be at least 1, got {self.total_ut_steps}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.use_sliding_window or set(self.layer_types) != {"full_attention"}:
            raise ValueError(
                "Ouro attends fully: expected use_sliding_window=False and only full_attention in layer_types, "
                f"got use_sliding_window={self.use_sliding_window} and {sorted(set(self.layer_types))}"
            )
        self.sliding_window = None  # published files may carry the unused width
        kwargs.pop("auto_map", None)  # names the remote code that this class replaces
        super().__post_init__(**kwargs)


class OuroRMSNorm(nn.Module):
    """x / rms(x) in float32 (at least), cast back, and only then times the weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class OuroAttention(nn.Module):
    """Causal grouped-query attention without biases; the cache slot of a pass is the caller's to choose."""

    def __init__(self, config: OuroConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None  # filled by the config
        n_heads, n_kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = n_heads // n_kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        cache_slot: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        n_rows, n_tokens, _ = hidden_states.shape
        heads = (n_rows, n_tokens, -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(hidden_states).view(heads).transpose(1, 2) for project in projections)
        query, key = qwen2.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx if cache_slot is None else cache_slot)
        implementation, eager = self.config._attn_implementation, qwen2.eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(n_rows, n_tokens, -1)), weights


class OuroDecoderLayer(GradientCheckpointingLayer):
    """Sandwich norms: each sublayer's input and output are normalised, then the untouched input is added."""

    def __init__(self, config: OuroConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = OuroAttention(config, layer_idx)
        self.mlp = qwen2.Qwen2MLP(config)
        self.input_layernorm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm_2 = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache_slot: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B,T,D] -> [B,T,D]. ``cache_slot``: where keys and values go; by default the layer's own index."""
        normed = self.input_layernorm(hidden_states)
        kwargs |= {"position_ids": position_ids, "cache_slot": cache_slot}
        attended, _ = self.self_attn(normed, position_embeddings, attention_mask, past_key_values, **kwargs)
        hidden_states = hidden_states + self.input_layernorm_2(attended)
        mixed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.post_attention_layernorm_2(mixed)


class OuroPreTrainedModel(PreTrainedModel):
    config_class = OuroConfig
    config: OuroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OuroDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": OuroDecoderLayer, "attentions": OuroAttention}


@dataclass
class OuroModelOutput(BaseModelOutputWithPast):
    """``loop_hidden_states``: with ``output_loop_states``, the N states [B,T,D] after the norm that closes each pass.

    ``hidden_states``, where asked for, are the embeddings and then every layer's output of every pass (N * layers + 1
    entries); the last is normalised.
    """

    loop_hidden_states: tuple[Tensor, ...] | None = None


def reserve_slots(cache: Cache, n_layers: int, n_loops: int) -> None:
    """Makes room for ``n_layers * n_loops`` layers of keys and values: slot = pass * n_layers + layer.

    ``generate`` and ``DynamicCache(config=...)`` build a cache of ``n_layers``, static ones too; each pass gets layers
    of the same kind.

    Raises:
        ValueError: the cache was filled with another number of passes.
    """
    missing = n_layers * n_loops - len(cache.layers)
    lazy = cache.layer_class_to_replicate is not None
    filled = cache.get_seq_length(0) != 0
    if missing > 0 and not lazy and not filled:
        cache.layers.extend(copy.deepcopy(cache.layers[i % n_layers]) for i in range(missing))
    elif filled and (missing > 0 or cache.get_seq_length(n_layers * (n_loops - 1)) != cache.get_seq_length(0)):
        raise ValueError(
            f"this cache was not filled by {n_loops} passes over {n_layers} layers (it has {len(cache.layers)} slots): "
            "start a new cache after changing config.total_ut_steps"
        )


class OuroModel(OuroPreTrainedModel):
    """The looped decoder: ids in, normalised state of the last pass out."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OuroDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = qwen2.Qwen2RotaryEmbedding(config)  # type: ignore[arg-type]
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
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
        output_loop_states: bool = False,
        **kwargs: Any,
    ) -> OuroModelOutput:
        """N passes over [B,T] ids (or [B,T,D] embeddings).

        Args:
            position_ids: [B,T]; by default they count on from the cache's length, whatever the mask.
            output_loop_states: also return the state after every pass.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        n_layers, n_loops = len(self.layers), self.config.total_ut_steps
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            reserve_slots(past_key_values, n_layers, n_loops)
        if position_ids is None:
            n_past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None] + n_past
        if isinstance(attention_mask, dict):  # made beforehand by generate
            mask = attention_mask["full_attention"]
        else:
            mask = create_causal_mask(self.config, hidden_states, attention_mask, past_key_values, position_ids)
        kwargs |= {
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_embeddings": self.rotary_emb(hidden_states, position_ids),
        }
        loop_hidden_states: list[Tensor] = []
        for loop in range(n_loops):
            for i, layer in enumerate(self.layers):
                hidden_states = layer(hidden_states, cache_slot=loop * n_layers + i, **kwargs)
            hidden_states = self.norm(hidden_states)
            if output_loop_states:
                loop_hidden_states.append(hidden_states)
        return OuroModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            loop_hidden_states=tuple(loop_hidden_states) or None,
        )

    def exit_distribution(self, loop_hidden_states: tuple[Tensor, ...]) -> Tensor:
        """p_t = lambda_t * prod_{s<t} (1 - lambda_s), the last pass taking what is left: N x [B,T,D] -> [B,T,N].

        In float32 (at least) whatever the model's dtype: in bf16 a lambda above 0.998 would already round to 1.
        """
        first = loop_hidden_states[0][..., 0]
        remaining = torch.ones_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
        mass = []
        for state in loop_hidden_states[:-1]:
            stop = torch.sigmoid(self.early_exit_gate(state).squeeze(-1).to(remaining.dtype))
            mass.append(remaining * stop)
            remaining = remaining * (1 - stop)
        return torch.stack([*mass, remaining], dim=-1)

    def expected_state(self, loop_hidden_states: tuple[Tensor, ...]) -> Tensor:
        """sum_t p_t h_t, [B,T,D]. The head is linear without bias, so its logits are the expected logits."""
        mass = self.exit_distribution(loop_hidden_states)
        mixed = torch.zeros_like(loop_hidden_states[0], dtype=mass.dtype)
        for t, state in enumerate(loop_hidden_states):
            mixed = mixed + mass[..., t, None] * state
        return mixed.to(loop_hidden_states[0].dtype)

    def exit_steps(self, loop_hidden_states: tuple[Tensor, ...], threshold: float) -> Tensor:
        """[B,T]: the first pass whose cumulative exit probability reaches the threshold, else the last.

        A threshold of 1 or more is the last pass everywhere: rounding may lift a cumulative sum to 1 before it.
        """
        last = len(loop_hidden_states) - 1
        reached = self.exit_distribution(loop_hidden_states)[..., :last].cumsum(-1) >= threshold
        return (~reached | (threshold >= 1)).long().cumprod(-1).sum(-1)


class OuroForCausalLM(OuroPreTrainedModel, GenerationMixin):
    """Ouro with its language-model head. Every pass is always run; early exit only chooses whose state is read."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.model = OuroModel(config)
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
        exit_at_step: int | None = None,
        exit_threshold: float | None = None,
        use_weighted_exit: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B,T,V], and the loss with ``labels`` [B,T] (-100 is ignored; ``num_items_in_batch`` is honoured).

        With labels: always the expected logits over the exit distribution, and their next-token cross entropy. Without,
        the first rule that applies:

        1. ``exit_at_step`` (else ``config.early_exit_step``) within 0..N-1: that pass.
        2. ``exit_threshold`` (else ``config.early_exit_threshold``): per position, the first pass at which the
           cumulative exit probability reaches it; 1 or more means the last pass.
        3. ``use_weighted_exit``: the expected logits. The published config has a threshold, so this needs
           ``config.early_exit_threshold = None``.
        4. The last pass.
        """
        step = self.config.early_exit_step if exit_at_step is None else exit_at_step
        threshold = self.config.early_exit_threshold if exit_threshold is None else exit_threshold
        by_step = step is not None and 0 <= step < self.config.total_ut_steps
        threshold = None if by_step or labels is not None else threshold
        expected = labels is not None or (use_weighted_exit and not by_step and threshold is None)
        if use_weighted_exit and not expected:
            logger.warning_once("use_weighted_exit is ignored: an exit step or threshold is set and goes first")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_loop_states=by_step or expected or (threshold is not None and threshold < 1),
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        state = outputs.last_hidden_state[:, keep]
        if outputs.loop_hidden_states is not None:
            loops = tuple(each[:, keep] for each in outputs.loop_hidden_states)
            if expected:
                state = self.model.expected_state(loops)
            elif threshold is None:
                state = loops[step]  # type: ignore[index]
            else:
                steps = self.model.exit_steps(loops, threshold)[..., None]
                for t, earlier in enumerate(loops[:-1]):
                    state = torch.where(steps == t, earlier, state)
        logits = self.lm_head(state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        cache, states, weights = outputs.past_key_values, outputs.hidden_states, outputs.attentions
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache, hidden_states=states, attentions=weights
        )
