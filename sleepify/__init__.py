"""Sleep for pretrained language models (Lee et al., arXiv:2605.26099).

    >>> from sleepify import sleepify
    >>> model = sleepify("Qwen/Qwen3-1.7B", n_loops=6, window_size=2000)

Importing this package makes transformers' Auto classes know sleeping models, Jet-Nemotron and Ouro.
"""

import sys
from types import ModuleType

import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sleepify import models as models  # registers jet_nemotron and ouro
from sleepify.cache import SleepCache
from sleepify.calibration import calibrate
from sleepify.config import FastWeightConfig, SleepConfig
from sleepify.errors import (
    CacheMismatchError,
    CheckpointError,
    NonFiniteStateError,
    SleepifyError,
    UnsupportedModelError,
)
from sleepify.modeling import SleepForCausalLM
from sleepify.peft import lora_config
from sleepify.peft import register as register_with_peft
from sleepify.retrofit import sleepify
from sleepify.session import Session
from sleepify.version import __version__

AutoConfig.register("sleepify", SleepConfig, exist_ok=True)
AutoModelForCausalLM.register(SleepConfig, SleepForCausalLM, exist_ok=True)
# By its name transformers' Trainer knows that label smoothing is of the labels of the next tokens.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[SleepConfig.model_type] = SleepForCausalLM.__name__
# `transformers serve` and `chat` look a checkpoint's architecture up by its name. transformers imports itself a second
# time while it loads, so that there may be two of it, and who holds the first no longer finds it in `sys.modules`.
_held = (getattr(module, "__dict__", {}).get("transformers") for module in list(sys.modules.values()))
for _module in (transformers, sys.modules["transformers"], *_held):
    if isinstance(_module, ModuleType) and _module.__name__ == "transformers":
        _module.SleepForCausalLM = SleepForCausalLM  # type: ignore[attr-defined]
register_with_peft()

__all__ = [
    "CacheMismatchError",
    "CheckpointError",
    "FastWeightConfig",
    "NonFiniteStateError",
    "Session",
    "SleepCache",
    "SleepConfig",
    "SleepForCausalLM",
    "SleepifyError",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "lora_config",
    "sleepify",
]
