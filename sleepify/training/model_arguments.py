"""Which model a recipe trains: a base or a sleeping checkpoint by name, or random weights; with LoRA if asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedModel,
)

from sleepify.config import SleepConfig
from sleepify.defaults import resolve
from sleepify.peft import lora_config
from sleepify.retrofit import sleepify
from sleepify.tasks.gsm_infinite import PETS, THEMES, TREES, WordTokenizer
from sleepify.training.settings import json_object, suggest
from sleepify.training.sleep_arguments import SleepArguments

DTYPES = ("float32", "bfloat16")
_ELSEWHERE = ("head_dim", "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")
"""Fields of configurations that they keep elsewhere, or some of them only."""


@dataclass
class ModelArguments:
    """Which model; exactly one of ``model`` and ``architecture``."""

    model: str | None = field(
        default=None, metadata={"help": "Name or path of a base model, or of a sleeping one to go on with."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    model_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of the model's own configuration to change, as JSON."}
    )
    architecture: dict | str | None = field(
        default=None,
        metadata={
            "help": "A model with random weights instead: a configuration of transformers as JSON, with its "
            "model_type, or the name of a model whose configuration to take. The task fills in vocab_size."
        },
    )
    embedding_std: float | None = field(
        default=None, metadata={"help": "Of a new architecture's embeddings at the start; by default the family's."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Name or path, by default the model's; 'words' or 'bytes' for one made on the spot."},
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32 or bfloat16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention; by default the base's."}
    )
    lora_r: int = field(
        default=0, metadata={"help": "Rank of LoRA on a frozen base, trained together with what is inserted; 0: none."}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "Scale of LoRA, over its rank; by default 2 r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA."})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "Names of the base's linear layers to adapt; by default all but its head."}
    )

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if (self.model is None) == (self.architecture is None):
            raise ValueError(f"expected either model or architecture, got {self.model!r} and {self.architecture!r}")
        if self.lora_r < 0:
            raise ValueError(f"expected lora_r to be a rank of 1 or more, or 0 for no LoRA, got {self.lora_r!r}")
        lora = {"lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout, "lora_targets": self.lora_targets}
        if not self.lora_r and (given := [name for name, value in lora.items() if value]):
            raise ValueError(f"expected lora_r, a rank, with {', '.join(given)}, got none; give it, or leave them out")
        self.model_config = json_object("model_config", self.model_config)
        if self.model_config and self.architecture is not None:
            raise ValueError("model_config changes a pretrained model's configuration; write it into architecture")
        if isinstance(self.architecture, str) and self.architecture.lstrip().startswith("{"):
            self.architecture = json_object("architecture", self.architecture)


def check_dtype(name: str) -> None:
    """See that weights can be of this type.

    Raises:
        ValueError: if not.
    """
    if name not in DTYPES:
        raise ValueError(f"expected dtype to be one of {', '.join(DTYPES)}, got {name!r}")


def build_model(arguments: ModelArguments, sleep: SleepArguments, vocab_size: int | None = None) -> PreTrainedModel:
    """The model to train: loaded or from random weights, sleeping unless told not to, with LoRA if asked for."""
    settings = sleep.settings()
    options = {"dtype": getattr(torch, arguments.dtype)}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    if arguments.architecture is not None:
        model = AutoModelForCausalLM.from_config(new_architecture(arguments.architecture, vocab_size), **options)
        if arguments.embedding_std is not None:
            torch.nn.init.normal_(model.get_input_embeddings().weight, std=arguments.embedding_std)
    else:
        name, revision = str(arguments.model), arguments.model_revision
        config = pretrained_config(arguments)
        if isinstance(config, SleepConfig):
            config, settings = _change(config, settings), {}
        model = AutoModelForCausalLM.from_pretrained(name, config=config, revision=revision, **options)
    if sleep.sleep and not isinstance(model.config, SleepConfig):
        model = sleepify(model, base_model_revision=arguments.model_revision, **settings)
    return add_lora(model, arguments) if arguments.lora_r else model


def new_architecture(architecture: dict | str, vocab_size: int | None) -> Any:
    """The configuration of a model with random weights."""
    if isinstance(architecture, str):
        return AutoConfig.from_pretrained(architecture)
    values = dict(architecture)
    if "model_type" not in values:
        raise ValueError(f"architecture: expected a model_type among its fields, got {sorted(values)}")
    if vocab_size is not None:
        values.setdefault("vocab_size", vocab_size)
    if (model_type := values.pop("model_type")) not in CONFIG_MAPPING:
        raise ValueError(
            f"architecture: expected a model_type of transformers, got {model_type!r}"
            f"{suggest(str(model_type), list(CONFIG_MAPPING))}"
        )
    _check_fields("architecture", AutoConfig.for_model(model_type), values)
    return AutoConfig.for_model(model_type, **values)


def pretrained_config(arguments: ModelArguments) -> Any:
    """The configuration of the model that is named, changed as it is asked for.

    Raises:
        ValueError, OSError: if there is none, or a field to change is misspelt.
    """
    name, revision = str(arguments.model), arguments.model_revision
    config = AutoConfig.from_pretrained(name, revision=revision)
    changes: Any = arguments.model_config
    if not changes:
        return config
    _check_fields("model_config", config, changes)
    return AutoConfig.from_pretrained(name, revision=revision, **changes)


def _check_fields(which: str, config: Any, values: dict[str, Any]) -> None:
    """See that no field is a misspelt one: transformers takes any, and a model of other sizes is trained.

    Raises:
        ValueError: naming what may have been meant.
    """
    known = [*dir(config), *_ELSEWHERE]
    for name in values:
        if name not in known and (hint := suggest(name, known, 0.85)):
            raise ValueError(f"{which}: a {config.model_type} has no field {name!r}{hint}")


def _change(config: SleepConfig, settings: dict[str, Any]) -> SleepConfig:
    """A sleeping checkpoint's configuration with other settings; its layers stay."""
    if fixed := sorted(settings.keys() & {"fast_weights"}):
        raise ValueError(f"a model that sleeps already has its layers; leave out {fixed}")
    for name, value in settings.items():
        setattr(config, name, value)
    config.validate_sleep()
    return resolve(config)


def add_lora(model: PreTrainedModel, arguments: ModelArguments) -> Any:
    """LoRA on the base, frozen; inserted layers are trained whole and saved beside the adapters."""
    import peft

    alpha = 2 * arguments.lora_r if arguments.lora_alpha is None else arguments.lora_alpha
    chosen: dict[str, Any] = {"lora_alpha": alpha, "lora_dropout": arguments.lora_dropout}
    if arguments.lora_targets:
        chosen["target_modules"] = arguments.lora_targets
    if not isinstance(model.config, SleepConfig):
        chosen.setdefault("target_modules", "all-linear")
        return peft.get_peft_model(model, peft.LoraConfig(r=arguments.lora_r, **chosen))
    # Without a task type peft hands all arguments through, n_loops among them.
    return peft.get_peft_model(model, lora_config(model, arguments.lora_r, task_type=None, **chosen))


def load_tokenizer(arguments: ModelArguments) -> Any:
    """The tokenizer, or None for a model from random weights that was given none."""
    name = arguments.tokenizer or arguments.model
    if name == "words":
        return WordTokenizer([*THEMES, PETS, TREES])
    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    return None if name is None else AutoTokenizer.from_pretrained(name, revision=arguments.model_revision)


def pad_token(tokenizer: Any) -> int:
    """What to pad with: attention never sees it, so any token will do."""
    return next((i for name in ("pad", "eos") if (i := getattr(tokenizer, f"{name}_token_id", None)) is not None), 0)
