"""A fast-weight layer to insert into a pretrained decoder: norm, mixer, residual, no MLP.

    h <- h + mixer(RMSNorm(h))

Its output projection starts at zero, so that a freshly inserted layer changes nothing. This is the paper's way of
giving Ouro fast weights (§6.3): Jet layers without MLP between the pretrained blocks.
"""

from __future__ import annotations

from torch import Tensor, nn

from sleepify.fast_weights.mixer import FastWeightState, Mixer
from sleepify.fast_weights.parts import RMSNorm


class FastWeightLayer(nn.Module):
    """``h + mixer(norm(h))``.

    Args:
        mixer: one of ``sleepify.fast_weights.LAYERS``; its output projection is set to zero.
        norm_eps: epsilon of the input norm.
    """

    def __init__(self, mixer: Mixer, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(mixer.hidden_size, norm_eps)
        self.mixer = mixer
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
