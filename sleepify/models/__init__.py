"""Architectures that transformers lacks, under their published names; importing this registers them.

After ``import sleepify`` (or this module) ``AutoModelForCausalLM.from_pretrained`` loads published Ouro and
Jet-Nemotron checkpoints without ``trust_remote_code``; code named in a checkpoint's ``auto_map`` is not run.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sleepify.models.jet_nemotron import JetNemotronConfig, JetNemotronForCausalLM, JetNemotronModel
from sleepify.models.ouro import OuroConfig, OuroForCausalLM, OuroModel

for _config, _model, _causal_lm in (
    (JetNemotronConfig, JetNemotronModel, JetNemotronForCausalLM),
    (OuroConfig, OuroModel, OuroForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal_lm)
    # By its name transformers' Trainer knows that label smoothing is of the labels of the next tokens.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _causal_lm.__name__

__all__ = [
    "JetNemotronConfig",
    "JetNemotronForCausalLM",
    "JetNemotronModel",
    "OuroConfig",
    "OuroForCausalLM",
    "OuroModel",
]
