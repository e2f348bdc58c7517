"""What transformers' decoders have in common: where their parts are, and what kinds of layer they are made of."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sleepify.errors import UnsupportedModelError

ATTENTION = {"full_attention", "sliding_attention"}
RECURRENT = {"linear_attention", "mamba"}
BOTH = {"hybrid", "hybrid_sliding"}
STATELESS = {"mlp", "moe"}


def find_decoder(language_model: PreTrainedModel) -> Any:
    """The decoder inside a causal LM.

    Raises:
        UnsupportedModelError: naming the part that is missing.
    """
    name = type(language_model).__name__
    if getattr(language_model.config, "is_encoder_decoder", False):
        raise _unsupported(name, "a decoder-only model (this one has an encoder)")
    decoder = getattr(language_model, language_model.base_model_prefix, None)
    if decoder is None or decoder is language_model:
        raise _unsupported(name, f"the decoder as attribute {language_model.base_model_prefix!r}")
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise _unsupported(name, "decoder blocks as `layers`")
    find_norm(decoder)
    if language_model.get_input_embeddings() is None or language_model.get_output_embeddings() is None:
        raise _unsupported(name, "input embeddings and a language-model head")
    return decoder


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """What each layer is, in transformers' words.

    Raises:
        UnsupportedModelError: for a kind that sleep does not know how to evict.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    if unknown := sorted(set(kinds) - ATTENTION - RECURRENT - BOTH - STATELESS):
        raise _unsupported(config.model_type, f"layers of known kinds (found {', '.join(unknown)})")
    return list(kinds)


def is_recurrent(kind: str) -> bool:
    """Whether a layer of this kind has a fast-weight state of its own."""
    return kind in RECURRENT | BOTH


def find_norm(decoder: Any) -> nn.Module:
    """The norm after a decoder's last layer.

    Raises:
        UnsupportedModelError: if there is none by a usual name.
    """
    names = ("norm", "final_layernorm", "final_layer_norm", "norm_f")
    for name in names:
        norm = getattr(decoder, name, None)
        if isinstance(norm, nn.Module):
            return norm
    raise _unsupported(type(decoder).__name__, f"a final norm named one of {', '.join(names)}")


def _unsupported(name: str, missing: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"expected {missing} in {name}, found none; `sleepify doctor` lists the tested families, and "
        "docs/add-a-host.md says how to add one"
    )
