"""One row per family of hosts: a tiny base model, built from its configuration with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 2,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
}
# transformers' grouped matmul has no float64.
EAGER = {"experts_implementation": "eager"}
EXPERTS = EAGER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

ATTENTION: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS | {"decoder_sparse_step": 1},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "phi3": {"partial_rotary_factor": 1.0},
    "olmo2": {},
    "smollm3": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "ouro": {"num_key_value_heads": 4, "total_ut_steps": 3},
}
HYBRID: dict[str, dict[str, Any]] = {
    "qwen3_next": GATED_DELTA | EXPERTS | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3_5_text": GATED_DELTA,
    "olmo_hybrid": GATED_DELTA | {"num_key_value_heads": 4},
    "falcon_h1": MAMBA
    | {"mamba_d_ssm": 64, "embedding_multiplier": 1.5, "lm_head_multiplier": 0.5, "key_multiplier": 0.7},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": MAMBA
    | EAGER
    | {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_mem_blocks": 1,
        "attention_head_dim": 16,
        "use_mem_rope": True,
        "chunk_size": 8,
    },
    "jet_nemotron": {
        "layer_types": ["jet", "attn", "jet", "swa"],
        "efficient_attention_config": {
            "swa": {"window_size": 5},
            "jet": {"num_heads": 2, "head_dim": 8, "expand_v": 2, "conv_size": 4, "norm_eps": "1e-5"},
        },
    },
}
FAMILIES = ATTENTION | HYBRID


def tiny_base(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A tiny model of a family, in evaluation mode; the same weights every time."""
    config = CONFIG_MAPPING[family](**(COMMON | FAMILIES[family] | changes))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Larger than usual, and no norm or bias at its neutral value: a layer that is left out must show.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            elif "norm" in name or "bias" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def randomise(module: torch.nn.Module, std: float = 0.2) -> None:
    """Draw the matrices of inserted layers so that they do something (their output projections start at zero)."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(11)
        for parameter in module.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=std)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids [batch, length] without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


@contextmanager
def true_float64() -> Iterator[None]:
    """Let transformers' modules compute in the float64 that their model has.

    Their norms and recurrent layers cast to float32 whatever the dtype of the model, which hides an error of 1e-7
    behind rounding of the same size. Here a cast to float32 is one to float64, and exactness can be asserted.
    """
    to = torch.Tensor.to

    def widened(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return to(self, *args, **kwargs)

    softmax = torch.nn.functional.softmax

    def wide_softmax(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return softmax(*args, dtype=torch.float64 if dtype is torch.float32 else dtype, **kwargs)

    with (
        patch.object(torch.Tensor, "to", widened),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
        # Eager attention and routers.
        patch.object(torch.nn.functional, "softmax", wide_softmax),
    ):
        yield
