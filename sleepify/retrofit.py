"""sleepify(): give a pretrained model sleep."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from transformers import AutoModelForCausalLM, PreTrainedModel

from sleepify.config import FastWeightConfig, SleepConfig
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
P_ = ParamSpec("P_")
T_ = TypeVar("T_")


def _told_from_defaults(retrofit: Callable[P_, T_]) -> Callable[P_, T_]:
    """Look at which keywords were given, which the signature with its defaults no longer tells.

    An unknown one is refused, and so are single ones beside ``config``; saved inserted weights bring settings of their
    own, which only what was given goes before.
    """

    @wraps(retrofit)
    def checked(*args: P_.args, **keywords: P_.kwargs) -> T_:
        given: dict[str, Any] = {name: value for name, value in keywords.items() if name not in ("model", "config")}
        if unknown := sorted(given.keys() - KEYWORDS):
            raise TypeError(f"unknown keywords {unknown}; known are {sorted(KEYWORDS)}")
        if keywords.get("config") is not None and given:
            raise TypeError(f"expected config or single keywords, got both (config and {sorted(given)})")
        if isinstance(given.get("fast_weights"), (str, os.PathLike)):
            base = _load(args[0] if args else keywords.get("model"), given.get("base_model_revision"))
            return cast(T_, SleepForCausalLM.attach(base, given.pop("fast_weights"), given))
        return retrofit(*args, **keywords)

    return checked


@_told_from_defaults
def sleepify(
    model: PreTrainedModel | str | os.PathLike,
    *,
    config: SleepConfig | None = None,
    n_loops: int = 4,
    window_size: int | None = None,
    eviction: str = "hard",
    loop_range: Sequence[int] | None = None,
    fast_weights: FastWeightConfig | dict[str, Any] | str | os.PathLike | None = None,
    checkpoint: str = "none",
    backprop_loops: int | None = None,
    backprop_windows: int | None = None,
    offload: bool = False,
    check_finite: bool = False,
    auto_threshold: float | None = None,
    base_model_revision: str | None = None,
) -> SleepForCausalLM:
    """Give a model sleep.

    Everything is checked before anything is touched. At its start the inserted layers add nothing, so with N = 1 and
    a text no longer than the window the logits are the base's own (contract 4).

    Args:
        model: a causal LM of transformers, or the name or path of one.
        config: all settings at once, instead of single keywords.
        n_loops: N, passes over a full window. Awake it is always one.
        window_size: L, tokens; None for the base's maximal position, 2048 at most.
        eviction: "hard" drops all keys and values at the end of a window, "sliding" keeps the latest L-1.
        loop_range: layers [start, stop) of the base that are looped; None for all (Jet-Nemotron: the middle half).
        fast_weights: the layers to insert, or the name or path of saved inserted weights, which come with the settings
            that they were trained with; None for the base's default.
        checkpoint: recompute activations in the backward pass, per "window" or per "loop", or "none"; "selective" is
            per loop, but keeps what projections and attention give and recomputes the rest.
        backprop_loops: gradient through the last k passes of a sleep only; None for all.
        backprop_windows: gradient through the last k sleeps of a row only; None for all.
        auto_threshold: of the calls with ``n_loops="auto"``, under which a state has settled; see `calibrate`.
        offload: with ``checkpoint="window"``, keep the memory at window boundaries on the CPU until the backward pass.
        check_finite: look for NaN and infinity in the state after each sleep (costs a host-device sync).
        base_model_revision: branch, tag or commit of a model that is given by name.

    Returns:
        The sleeping model. It contains ``model`` itself, not a copy.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: for a setting that this base cannot have; see `SleepConfig`.
        UnsupportedModelError: for a base that sleepify cannot drive; the message names what is missing.

    Examples:
        >>> model = sleepify("Qwen/Qwen3-1.7B", n_loops=6, window_size=2000)
    """
    if config is None:
        # What is wrong with the settings is found before gigabytes are read.
        config = SleepConfig(
            n_loops=n_loops,
            window_size=window_size,
            eviction=eviction,
            loop_range=loop_range,
            fast_weights=fast_weights,
            checkpoint=checkpoint,
            backprop_loops=backprop_loops,
            backprop_windows=backprop_windows,
            offload=offload,
            check_finite=check_finite,
            auto_threshold=auto_threshold,
            base_model_revision=base_model_revision,
        )
    base = _load(model, config.base_model_revision)
    config = SleepConfig(**{**_settings(config), "text_config": base.config})
    config.base_model_name_or_path = base.config._name_or_path or None
    host = host_class(base.config)(base)
    config = resolve(config)
    verify(host)
    config.base_fingerprint = fingerprint(base)
    return SleepForCausalLM.from_base(config, base)


def _load(model: Any, revision: str | None) -> PreTrainedModel:
    """The base itself, loaded if it was named.

    Raises:
        TypeError: for anything but a base model or a name.
    """
    if isinstance(model, (str, os.PathLike)):
        model = AutoModelForCausalLM.from_pretrained(model, revision=revision or "main")
    if isinstance(model, SleepForCausalLM):
        raise TypeError("expected a base model, got one that sleeps already; change its config, or call unload() first")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers PreTrainedModel or a name, got {type(model).__name__}; "
            "wrap with peft after sleepify, not before"
        )
    return model


def _settings(config: SleepConfig) -> dict[str, Any]:
    """The fields of ours in a config, without those of transformers."""
    return {name: getattr(config, name) for name in KEYWORDS}
