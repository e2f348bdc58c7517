"""Mamba-2's form of the fast weights: a Hebbian write that does not look at what the state already holds (Eq. 3).

S_t = a_t S_{t-1} + b_t v_t k_t^T,   o_t = S_t q_t,   a_t, b_t in (0, 1) computed from x_t
"""

from __future__ import annotations

from torch import Tensor

from sleepify.fast_weights.mixer import ConvolvedMixer
from sleepify.ops.gated_hebbian import gated_hebbian_rule


class Mamba2(ConvolvedMixer):
    """Short convolution over [q|k|v], then the gated Hebbian rule. Arguments as in ``Mixer``.

    Keys and queries have unit norm: without the delta rule's correction nothing else bounds what repeated keys add up.
    """

    def _recur(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scale = self.head_dim**-0.5
        return gated_hebbian_rule(q, k, v, log_decay, beta, state, scale=scale, qk_l2norm=True)
