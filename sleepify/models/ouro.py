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
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from sleepify.models.decoder import CausalLM, Decoder, DecoderConfig, NativePreTrainedModel

logger = logging.get_logger(__name__)


@strict
class OuroConfig(DecoderConfig):
    """Configuration under the published field names.

    ``total_ut_steps`` (N), ``early_exit_threshold`` and ``early_exit_step`` are read from the config at every call, so
    changing them on ``model.config`` takes effect at once (a cache belongs to the N that filled it).

    Raises:
        ValueError: ``total_ut_steps`` below 1, or sliding attention asked for (no published Ouro has it).
    """

    model_type = "ouro"
    attention_bias = False  # for LlamaAttention; no field, as the published files have none

    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    total_ut_steps: int = 4
    early_exit_threshold: float | int | None = 1.0
    early_exit_step: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.total_ut_steps < 1:
            raise ValueError(f"total_ut_steps must be at least 1, got {self.total_ut_steps}")
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.use_sliding_window or set(self.layer_types) != {"full_attention"}:
            raise ValueError(
                "Ouro attends fully: expected use_sliding_window=False and only full_attention in layer_types, "
                f"got use_sliding_window={self.use_sliding_window} and {sorted(set(self.layer_types))}"
            )
        self.sliding_window = None  # published files may carry the unused width
        super().__post_init__(**kwargs)


class OuroRMSNorm(nn.RMSNorm):
    """x / rms(x) in float32 (at least), cast back to x's dtype, and only then times the weight."""

    def forward(self, x: Tensor) -> Tensor:
        unit = F.rms_norm(x, self.normalized_shape, eps=self.eps)  # autocast leaves it in float32
        return self.weight * unit.to(x.dtype)


class OuroDecoderLayer(GradientCheckpointingLayer):
    """Sandwich norms: each sublayer's input and output are normalised, then the untouched input is added."""

    def __init__(self, config: OuroConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = llama.LlamaAttention(config, layer_idx)  # type: ignore[arg-type]
        self.mlp = qwen2.Qwen2MLP(config)
        self.input_layernorm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm_2 = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[B,T,D] -> [B,T,D]; what else ``LlamaAttention`` takes by keyword."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.input_layernorm_2(attended)
        mixed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.post_attention_layernorm_2(mixed)


class OuroPreTrainedModel(NativePreTrainedModel):
    config_class = OuroConfig
    config: OuroConfig
    _no_split_modules = ["OuroDecoderLayer"]
    _can_record_outputs = {"hidden_states": OuroDecoderLayer, "attentions": llama.LlamaAttention}


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


class PassCache:
    """One pass's layers of a cache that holds those of all: what ``LlamaAttention`` asks of a cache."""

    def __init__(self, cache: Cache, first: int) -> None:
        self.cache = cache
        self.first = first

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B,H,T,K] of layer ``layer_idx`` of this pass in, all that it has by now out."""
        return self.cache.update(keys, values, self.first + layer_idx)


class OuroModel(OuroPreTrainedModel, Decoder):
    """The looped decoder: ids in, normalised state of the last pass out.

    With ``output_loop_states=True`` its forward pass also returns the state after every pass.
    """

    layer_class = OuroDecoderLayer
    norm_class = OuroRMSNorm

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def reserve(self, cache: Cache) -> None:
        reserve_slots(cache, len(self.layers), self.config.total_ut_steps)

    def run(
        self,
        hidden_states: Tensor,
        masks: dict[str, Any],
        past_key_values: Cache | None,
        output_loop_states: bool = False,
        **kwargs: Any,
    ) -> OuroModelOutput:
        """N passes, each closed by the norm; slots of the cache are reserved."""
        loop_hidden_states: list[Tensor] = []
        for loop in range(self.config.total_ut_steps):
            if past_key_values is not None:
                kwargs["past_key_values"] = PassCache(past_key_values, loop * len(self.layers))
            for layer in self.layers:
                hidden_states = layer(hidden_states, attention_mask=masks["full_attention"], **kwargs)
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


class OuroForCausalLM(OuroPreTrainedModel, CausalLM):
    """Ouro with its language-model head. Every pass is always run; early exit only chooses whose state is read."""

    decoder_class = OuroModel
    model: OuroModel

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
