"""Fast-weight layers to insert into attention-only models: ``LAYERS`` maps a rule's name to its mixer."""

from __future__ import annotations

from sleepify.fast_weights.gated_delta_net import GatedDeltaNet
from sleepify.fast_weights.jet_block import JetBlock
from sleepify.fast_weights.layer import FastWeightLayer
from sleepify.fast_weights.mamba2 import Mamba2
from sleepify.fast_weights.mixer import FastWeightState, Mixer

LAYERS: dict[str, type[Mixer]] = {"gdn": GatedDeltaNet, "jet": JetBlock, "mamba2": Mamba2}

__all__ = ["LAYERS", "FastWeightLayer", "FastWeightState", "GatedDeltaNet", "JetBlock", "Mamba2", "Mixer"]
