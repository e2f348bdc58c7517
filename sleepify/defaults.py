"""What a base gets where the user does not say, and the checks that need to know the base."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from sleepify.config import FastWeightConfig, SleepConfig
from sleepify.hosts import first_positions, is_recurrent, layer_kinds
from sleepify.settings import SETTINGS, Settings

MAX_DEFAULT_WINDOW = 2048


def resolve(config: SleepConfig) -> SleepConfig:
    """A copy with every field that was left open filled in, checked, also where that takes the base.

    Raises:
        ValueError: for a window, a loop range or a place of insertion that this base does not have.
        UnsupportedModelError: for a base whose layers sleep does not know.
    """
    base = config.text_config
    if base is None:
        raise ValueError("expected text_config, the configuration of the base model, got None")
    config = copy.copy(config)
    config.validate_sleep()
    kinds = layer_kinds(base)
    longest = getattr(base, "max_position_embeddings", None)
    window_size = config.window_size
    if window_size is None:
        window_size = min(MAX_DEFAULT_WINDOW, first_positions(base) or longest or MAX_DEFAULT_WINDOW)
    if longest is not None and window_size > longest:
        raise ValueError(
            f"expected window_size to be at most {longest}, the positions that {base.model_type} supports, "
            f"got {window_size}; choose a smaller window"
        )
    first = first_positions(base)
    if first is not None and window_size > first:
        raise ValueError(
            f"expected window_size to be at most {first}, up to where {base.model_type} rotates all positions by one "
            f"table, got {window_size}: beyond, what else is read would change its tokens; choose a smaller window"
        )
    fast_weights = _fast_weights(config.fast_weights, base, kinds)
    loop_range = _loop_range(config.loop_range, base, kinds, fast_weights.layers or [])
    config.window_size, config.fast_weights, config.loop_range = window_size, fast_weights, loop_range
    return config


class LiveSettings:
    """A checked view of a model's settings, made anew only when one of them has changed.

    Args:
        inserted: the layers that the model was built with.
    """

    def __init__(self, inserted: FastWeightConfig) -> None:
        self.inserted = replace(inserted)
        self._raw: tuple[Any, ...] = ()
        self._settings: Settings | None = None

    def of(self, config: Any, recompute: bool | None = None) -> Settings:
        """The settings as they are now.

        Args:
            config: the model's `SleepConfig`.
            recompute: whether activations are recomputed; None for what the configuration says.

        Raises:
            ValueError: for a value that this base cannot have.
        """
        # Read past transformers' attribute lookup, which takes longer than a small layer: this runs for every token.
        attributes = vars(config)
        values = [attributes[name] for name in SETTINGS]
        raw = (*map(_typed, values), recompute)
        if (found := attributes["fast_weights"]) != self.inserted:
            raise ValueError(
                f"expected config.fast_weights as they were inserted, {self.inserted}, got {found}; "
                "layers cannot be changed in place: unload() and sleepify() again"
            )
        if self._settings is None or raw != self._raw:
            whole: Any = resolve(config)
            settings = Settings(**{name: getattr(whole, name) for name in SETTINGS})
            settings.loop_range = tuple(whole.loop_range)
            if recompute is not None:
                settings.checkpoint = "none" if not recompute else settings.checkpoint.replace("none", "loop")
            self._raw, self._settings = raw, settings
        return self._settings


def _typed(value: Any) -> Any:
    """A value that is equal to others of its type only: True is no 1."""
    return tuple(map(_typed, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _fast_weights(asked: FastWeightConfig | None, base: PreTrainedConfig, kinds: list[str]) -> FastWeightConfig:
    n_layers, width = len(kinds), base.hidden_size
    count = max(1, n_layers // 4)
    if asked is None:
        if any(is_recurrent(kind) for kind in kinds):
            return FastWeightConfig(num_layers=0, layers=[])
        asked = FastWeightConfig(rule="jet" if base.model_type == "ouro" else "gdn")
    resolved = FastWeightConfig(**asked.to_dict())
    if resolved.layers is None:
        count = count if resolved.num_layers is None else resolved.num_layers
        if count > n_layers:
            raise ValueError(f"expected at most one fast-weight layer per layer ({n_layers}), got num_layers={count}")
        # In the middle of each of `count` equal parts of the depth.
        resolved.layers = [(2 * place + 1) * n_layers // (2 * count) for place in range(count)]
        resolved.num_layers = count
    if resolved.layers and resolved.layers[-1] >= n_layers:
        raise ValueError(f"expected layers of the base from 0 to {n_layers - 1} to insert after, got {resolved.layers}")
    if resolved.head_dim is None:
        resolved.head_dim = min(128, max(1, width // 4))
    if resolved.num_heads is None:
        resolved.num_heads = max(1, round(width / (resolved.head_dim * resolved.expand_v)))
    return resolved


def _loop_range(asked: list[int] | None, base: PreTrainedConfig, kinds: list[str], inserted: list[int]) -> list[int]:
    n_layers = len(kinds)
    if asked is None:
        # The paper loops blocks 7-20 of Jet-Nemotron 2B's 28, and all blocks of every other model.
        asked = [n_layers // 4, n_layers - n_layers // 4] if base.model_type == "jet_nemotron" else [0, n_layers]
    start, stop = asked
    if stop > n_layers:
        raise ValueError(f"expected loop_range within the {n_layers} layers of the base, got {(start, stop)}")
    if not any(is_recurrent(kinds[i]) or i in inserted for i in range(start, stop)):
        raise ValueError(
            f"expected at least one fast-weight layer in loop_range={(start, stop)}, found none (inserted after "
            f"{inserted}); without one a loop would leave nothing behind: widen the range or insert layers"
        )
    return [start, stop]
