"""SleepConfig and FastWeightConfig: how a model sleeps and what is inserted into it. Validated, JSON round trip."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from sleepify.loader import AUTO_MAP
from sleepify.settings import Settings

RULES = ("gdn", "jet", "mamba2")
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""Keywords of ``from_pretrained`` that transformers puts into a configuration, behind an underscore."""

_INCIDENTAL = {
    *("dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "router_aux_loss_coef", "output_router_logits"),
}


@dataclass
class FastWeightConfig:
    """The fast-weight layers to insert.

    Args:
        rule: how the state is written: "gdn" (Gated DeltaNet), "jet" (with a dynamic convolution), "mamba2" (Eq. 3).
        num_layers: how many, spread evenly over the depth; 0 for none, None for the default of the base.
        layers: after which layers of the base instead (0-based, ascending); overrides ``num_layers``.
        num_heads: H; None so that the values are as wide as the base.
        head_dim: K, width of a key; None for 128, or a quarter of a base narrower than 512.
        expand_v: V / K.
        conv_size: W, taps of the short convolution.
        dconv_reduction: jet: how much narrower than the values the kernel generator is.
        norm_eps: of the norms.

    Raises:
        ValueError: for a value that no layer can have.
    """

    rule: str = "gdn"
    num_layers: int | None = None
    layers: list[int] | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    expand_v: float = 2.0
    conv_size: int = 4
    dconv_reduction: int = 8
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"expected a fast-weight rule among {', '.join(RULES)}, got {self.rule!r}")
        if self.layers is not None:
            self.layers = [int(layer) for layer in self.layers]
            if self.layers != sorted(set(self.layers)) or any(layer < 0 for layer in self.layers):
                raise ValueError(f"expected ascending layer indices from 0, got layers={self.layers}")
            self.num_layers = len(self.layers)
        for name, least in (("num_layers", 0), ("num_heads", 1), ("head_dim", 1), ("conv_size", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"expected {name} to be a whole number of at least {least}, got {value!r}")
        if self.expand_v <= 0 or self.dconv_reduction < 1 or self.norm_eps <= 0:
            raise ValueError(
                "expected expand_v > 0, dconv_reduction >= 1 and norm_eps > 0, got "
                f"{self.expand_v}, {self.dconv_reduction} and {self.norm_eps}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FastWeightConfig:
        """From JSON; an unknown field is an error that names it."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown fields of FastWeightConfig: {unknown}; known are {sorted(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class SleepConfig(Settings, PreTrainedConfig):
    """How a model sleeps. Saved as the ``config.json`` of a sleep-enabled checkpoint, with the base's inside.

    Args:
        text_config: the configuration of the base model.
        n_loops: N, passes over a full window (§5). Awake it is always one.
        window_size: L, tokens; None for the base's maximal position, 2048 at most.
        eviction: "hard" drops all keys and values at the end of a window, "sliding" keeps the latest L-1.
        loop_range: layers [start, stop) of the base that are looped; None for all (Jet-Nemotron: the middle half).
        fast_weights: the layers to insert, a `FastWeightConfig` or its dict; None for the base's default.
        checkpoint: recompute activations in the backward pass, per "window" or per "loop", or "none"; "selective" is
            per loop, but keeps what projections and attention give and recomputes the rest.
        backprop_loops: gradient through the last k passes of a sleep only; None for all.
        backprop_windows: gradient through the last k sleeps of a row only; None for all.
        offload: with ``checkpoint="window"``, keep the memory at window boundaries on the CPU until the backward pass.
        check_finite: look for NaN and infinity in the state after each sleep (costs a host-device sync).
        auto_threshold: of the calls with ``n_loops="auto"``, under which a state has settled; see `calibrate`.
        fast_weights_only: the checkpoint holds the inserted weights alone; set by ``save_pretrained``.
        base_model_name_or_path, base_model_revision, base_fingerprint: the base that they belong to.

    Raises:
        ValueError: for a value out of range, naming the field.
    """

    model_type = "sleepify"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    is_composition: ClassVar[bool] = True
    # For files only (`to_dict`): whoever has a SleepConfig has sleepify. transformers cannot do with None.
    auto_map = dict[str, str]()

    text_config: Any = None
    # None until the base is known.
    window_size: int | None = None
    fast_weights: Any = None
    fast_weights_only: bool = False
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_fingerprint: str | None = None
    tie_word_embeddings: bool = False

    def __getattr__(self, name: str) -> Any:
        """What the base does to its logits, for trainers that do it themselves and look for it here.

        They know a factor by one name; families have several.
        """
        if name == "final_logit_softcapping":
            return getattr(self.text_config, name)
        if name == "logit_scale" and (scale := _logit_scale(self.text_config)) is not None:
            return scale
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def num_labels(self) -> int | None:
        """As in transformers; no use is made of it."""
        return len(self.id2label) if self.id2label is not None else None

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        if num_labels == 1:
            raise ValueError(
                "expected a model that predicts tokens, got num_labels=1, that of a reward model: a sleeping model has "
                "no head that scores texts; train the reward model from the base"
            )
        inherited: Any = PreTrainedConfig.num_labels
        inherited.__set__(self, num_labels)

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = _nested(self.text_config)
        if isinstance(self.fast_weights, dict):
            self.fast_weights = FastWeightConfig.from_dict(self.fast_weights)
        # transformers hands these down to the nested configuration, also when they are not given: keep the base's own.
        for name in IMPLEMENTATIONS:
            kwargs.setdefault(name, getattr(self.text_config, f"_{name}", None))
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        self.validate_sleep()

    def validate_sleep(self) -> None:
        """Check every field of its own (those that need the base are checked where the base is known)."""
        if self.fast_weights is not None and not isinstance(self.fast_weights, FastWeightConfig):
            raise TypeError(f"expected fast_weights to be a FastWeightConfig or a dict, got {self.fast_weights!r}")
        self.check()
        if self.loop_range is not None:
            self.loop_range = list(self.loop_range)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; says what to install to open the checkpoint."""
        output = super().to_dict()
        if isinstance(self.fast_weights, FastWeightConfig):
            output["fast_weights"] = self.fast_weights.to_dict()
        output["requires"] = "pip install sleepify, then `import sleepify` before AutoModelForCausalLM.from_pretrained"
        output["auto_map"] = dict(AUTO_MAP)
        return output

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """What transformers calls for a class from a checkpoint's file; of this one it shall copy nothing."""


def essential(base: dict[str, Any]) -> dict[str, Any]:
    """What of a base's configuration says what its weights compute.

    Trainers write their tokenizer's special tokens into it, and what acts in training alone may be changed for it.
    """
    return {
        name: value
        for name, value in base.items()
        if name not in _INCIDENTAL and not any(mark in name for mark in ("dropout", "pdrop"))
    }


def _logit_scale(base: Any) -> float | None:
    """What a base's logits are multiplied by in all; None if it names nothing of the kind."""
    factors = [getattr(base, name, None) for name in ("logit_scale", "lm_head_multiplier")]
    divisor = getattr(base, "logits_scaling", None)
    known = [factor for factor in (*factors, None if divisor is None else 1 / divisor) if factor is not None]
    return math.prod(known) if known else None


def _nested(values: dict[str, Any]) -> PreTrainedConfig:
    """The base's configuration out of its JSON."""
    values = dict(values)
    model_type = values.pop("model_type", None)
    if not model_type:
        raise ValueError("expected text_config to name the model_type of the base, found none")
    return AutoConfig.for_model(model_type, **values)
