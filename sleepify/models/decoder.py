"""What Ouro and Jet-Nemotron have in common: fields of the config, the way into and out of a decoder, and its head.

Both are Qwen2-style decoders. Attention, MLP and rotary tables are transformers' own (``Qwen2Attention`` with biases on
q, k and v, ``LlamaAttention`` without), and so is the forward pass with the head.

Shape suffixes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

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
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

MASKS: dict[str, Callable] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "linear_attention": create_recurrent_attention_mask,
}


@strict
class DecoderConfig(PreTrainedConfig):
    """The published fields that both have; the defaults are those of Jet-Nemotron 2B where it has them."""

    keys_to_ignore_at_inference = ["past_key_values"]

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
    sliding_window: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        kwargs.pop("auto_map", None)  # names the remote code that our classes replace
        super().__post_init__(**kwargs)


class NativePreTrainedModel(PreTrainedModel):
    """What transformers asks of a family of models before it has seen one."""

    config: Any
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class Decoder(NativePreTrainedModel):
    """Ids in, normalised states out. A family says what a layer and a norm are, and how the layers are run."""

    layer_class: ClassVar[type[nn.Module]]
    norm_class: ClassVar[type[nn.Module]]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = self.norm_class(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = qwen2.Qwen2RotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """[B,T] ids or [B,T,D] embeddings -> [B,T,D].

        Args:
            attention_mask: [B, past + T], nonzero for real tokens; or a mask per kind of layer, as generate makes them.
            position_ids: [B,T]; by default they count on from the cache's length, whatever the mask.
            kwargs: goes to ``run`` and from there to every layer.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        kinds: list[str] = self.config.layer_types
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            self.reserve(past_key_values)
        if position_ids is None:
            # Recurrent layers know no positions, and a cache of them alone no length.
            counted = past_key_values is not None and set(kinds) != {"linear_attention"}
            n_past = past_key_values.get_seq_length() if past_key_values is not None and counted else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None] + n_past
        masks = attention_mask
        if not isinstance(masks, dict):
            given = (self.config, hidden_states, attention_mask, past_key_values)
            masks = {
                # Left to itself, transformers before 5.23 reads the lengths off a layer of another kind.
                kind: MASKS[kind](*given, position_ids=position_ids, layer_idx=kinds.index(kind))
                for kind in sorted(set(kinds))
            }
        kwargs |= {
            "position_ids": position_ids,
            "use_cache": use_cache,
            "position_embeddings": self.rotary_emb(hidden_states, position_ids),
        }
        return self.run(hidden_states, masks, past_key_values, **kwargs)

    def reserve(self, cache: Cache) -> None:
        """Make room in a cache that may have been made without knowing the family."""

    def run(
        self, hidden_states: Tensor, masks: dict[str, Any], past_key_values: Cache | None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """All layers and the final norm, [B,T,D] -> [B,T,D]; ``masks`` by kind of layer."""
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(hidden_states, attention_mask=masks[kind], past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class CausalLM(NativePreTrainedModel, GenerationMixin):
    """A decoder with its language-model head; logits [B,T,V], and the loss with ``labels`` [B,T] (-100 is ignored).

    ``num_items_in_batch`` is honoured: the loss is then the sum over it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    decoder_class: ClassVar[type[Decoder]]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = qwen2.Qwen2ForCausalLM.forward
