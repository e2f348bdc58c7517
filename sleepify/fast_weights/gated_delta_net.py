"""Gated DeltaNet: the fast-weight layer of the paper's experiments from scratch (§3.1, §4).

S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T,   o_t = S_t q_t,   |k_t| = |q_t| = 1
"""

from __future__ import annotations

from torch import Tensor

from sleepify.fast_weights.mixer import ConvolvedMixer
from sleepify.ops.gated_delta import gated_delta_rule


class GatedDeltaNet(ConvolvedMixer):
    """Short convolution over [q|k|v], then the gated delta rule. Arguments as in ``Mixer``."""

    def _recur(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return gated_delta_rule(q, k, v, log_decay, beta, state, scale=self.head_dim**-0.5, qk_l2norm=True)
