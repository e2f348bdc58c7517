"""sleepify(): give a pretrained model sleep."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from sleepify.config import SleepConfig
from sleepify.defaults import resolve
from sleepify.fingerprint import fingerprint
from sleepify.hosts import host_class, verify
from sleepify.modeling import SleepForCausalLM
from sleepify.settings import SETTINGS

# Fields of SleepConfig that describe a checkpoint, not a wish.
_OWN = {"text_config", "fast_weights_only", "base_fingerprint", "base_model_name_or_path", "tie_word_embeddings"}
KEYWORDS = (
    (frozenset(SETTINGS) | frozenset(SleepConfig.__annotations__))
    - _OWN
    - {"model_type", "sub_configs", "is_composition"}
)


def sleepify(
    model: PreTrainedModel | str | os.PathLike, *, config: SleepConfig | None = None, **keywords: Any
) -> SleepForCausalLM:
    """Give a model sleep.

    Everything is checked before anything is touched. At its start the inserted layers add nothing, so with N = 1 and
    a text no longer than the window the logits are the base's own (contract 4).

    Args:
        model: a causal LM of transformers, or the name or path of one.
        config: all settings at once; or
        keywords: single fields of `SleepConfig`: ``n_loops``, ``window_size``, ``eviction``, ``loop_range``,
            ``fast_weights`` (a `FastWeightConfig`, or the name or path of saved inserted weights), ``checkpoint``...

    Returns:
        The sleeping model. It contains ``model`` itself, not a copy.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: for a setting that this base cannot have; see `SleepConfig`.
        UnsupportedModelError: for a base that sleepify cannot drive; the message names what is missing.

    Example:
        >>> model = sleepify("Qwen/Qwen3-1.7B", n_loops=6, window_size=2000)
    """
    if unknown := sorted(keywords.keys() - KEYWORDS):
        raise TypeError(f"unknown keywords {unknown}; known are {sorted(KEYWORDS)}")
    if config is not None and keywords:
        raise TypeError(f"expected config or single keywords, got both (config and {sorted(keywords)})")
    revision = config.base_model_revision if config is not None else keywords.get("base_model_revision")
    if isinstance(model, (str, os.PathLike)):
        _check_before_loading(config, keywords)
        model = AutoModelForCausalLM.from_pretrained(model, revision=revision or "main")
    if isinstance(model, SleepForCausalLM):
        raise TypeError("expected a base model, got one that sleeps already; change its config, or call unload() first")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers PreTrainedModel or a name, got {type(model).__name__}; "
            "wrap with peft after sleepify, not before"
        )
    if isinstance(keywords.get("fast_weights"), (str, os.PathLike)):
        return SleepForCausalLM.attach(model, keywords.pop("fast_weights"), keywords)
    if config is None:
        config = SleepConfig(text_config=model.config, **keywords)
    else:
        config = SleepConfig(**{**_settings(config), "text_config": model.config})
    config.base_model_name_or_path = model.config._name_or_path or None
    host = host_class(model.config)(model)
    config = resolve(config)
    verify(host)
    config.base_fingerprint = fingerprint(model)
    return SleepForCausalLM.from_base(config, model)


def _check_before_loading(config: SleepConfig | None, keywords: dict[str, Any]) -> None:
    """Find what is wrong with the settings before gigabytes are read."""
    if config is None and not isinstance(keywords.get("fast_weights"), (str, os.PathLike)):
        SleepConfig(**keywords)


def _settings(config: SleepConfig) -> dict[str, Any]:
    """The fields of ours in a config, without those of transformers."""
    return {name: getattr(config, name) for name in KEYWORDS}
