"""A fast-weight layer to insert into a pretrained decoder: norm, mixer, residual, no MLP.

    h <- h + mixer(RMSNorm(h))

Its output projection starts at zero, so that a freshly inserted layer changes nothing. This is the paper's way of
giving Ouro fast weights (§6.3): Jet layers without MLP between the pretrained blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from sleepify.fast_weights.gated_delta_net import GatedDeltaNet
from sleepify.fast_weights.jet_block import JetBlock
from sleepify.fast_weights.mamba2 import Mamba2
from sleepify.fast_weights.mixer import FastWeightState, Mixer
from sleepify.fast_weights.parts import RMSNorm

if TYPE_CHECKING:
    from sleepify.config import FastWeightConfig

LAYERS: dict[str, type[Mixer]] = {"gdn": GatedDeltaNet, "jet": JetBlock, "mamba2": Mamba2}


class FastWeightLayer(nn.Module):
    """``h + mixer(norm(h))`` with the mixer that ``config.rule`` names.

    Args:
        config: rule and sizes; ``num_heads`` and ``head_dim`` must be set.
        hidden_size: D of the decoder.

    Raises:
        ValueError: a rule that is not in ``LAYERS``, or sizes that do not fit.
    """

    def __init__(self, config: FastWeightConfig, hidden_size: int) -> None:
        super().__init__()
        if config.rule not in LAYERS:
            raise ValueError(f"expected a rule among {', '.join(LAYERS)}, got {config.rule!r}")
        self.norm = RMSNorm(hidden_size, config.norm_eps)
        self.mixer = LAYERS[config.rule].from_config(config, hidden_size)
        nn.init.zeros_(self.o_proj.weight)

    @property
    def o_proj(self) -> nn.Linear:
        """The mixer's output projection."""
        return self.mixer.o_proj

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's generator, the output projection zero."""
        self.norm.reset_parameters()
        self.mixer.reset_parameters()
        nn.init.zeros_(self.o_proj.weight)

    def forward(
        self, hidden_states: Tensor, state: FastWeightState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, FastWeightState]:
        """[B,T,D] -> [B,T,D] and the new state. ``state`` and ``lengths`` as in ``Mixer.forward``."""
        mixed, state = self.mixer(self.norm(hidden_states), state, lengths)
        return hidden_states + mixed, state
