"""What every fast-weight mixer does, whatever its rule: project, convolve, gate, recur, project back.

    q, k, v = convolve(x);   b = sigmoid(W_b x);   log a = -exp(A_log) softplus(W_a x + dt_bias)
    o = rule(q, k, v, log a, b);   y = W_o ( RMSNorm(o) * silu(W_g x) )

The paper's §3.1 has a_t, b_t in (0, 1), computed from the input. The state is a value: a pair (conv_state [B,C,W],
recurrent_state [B,H,K,V]) goes in, a new pair comes out, and gradient flows through both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleepify.fast_weights.parts import GatedRMSNorm, Linear, ShortConv
from sleepify.ops.chunking import accumulation_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

    from sleepify.config import FastWeightConfig

FastWeightState = tuple[Tensor, Tensor]


class Mixer(nn.Module, ABC):
    """Base of the mixers. A subclass makes q, k, v (``_convolve``) and applies its rule (``_recur``).

    Args:
        hidden_size: D, the width of the input and output.
        num_heads: H, the same for q, k and v.
        head_dim: K, the width of a key.
        expand_v: V / K; V = int(K * expand_v).
        conv_size: W, the window of the short convolution.
        norm_eps: epsilon of the output norm.

    Raises:
        ValueError: K * expand_v is not an integer (to a relative 1e-5).
    """

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, expand_v: float, conv_size: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.head_dim, self.conv_size = hidden_size, num_heads, head_dim, conv_size
        self.value_dim = int(head_dim * expand_v)
        if not math.isclose(self.value_dim, head_dim * expand_v, rel_tol=1e-5):
            raise ValueError(
                f"head_dim * expand_v must be an integer, got {head_dim} * {expand_v} = {head_dim * expand_v}; "
                f"write expand_v with more digits, rounded up"
            )
        self.key_width, self.value_width = num_heads * head_dim, num_heads * self.value_dim
        self.q_proj = Linear(hidden_size, self.key_width, bias=False)
        self.k_proj = Linear(hidden_size, self.key_width, bias=False)
        self.v_proj = Linear(hidden_size, self.value_width, bias=False)
        self.a_proj = Linear(hidden_size, num_heads, bias=False)
        self.b_proj = Linear(hidden_size, num_heads, bias=False)
        self.g_proj = Linear(hidden_size, self.value_width, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.o_norm = GatedRMSNorm(self.value_dim, norm_eps)
        self.o_proj = Linear(self.value_width, hidden_size, bias=False)
        self._reset_decay()

    @classmethod
    def from_config(cls, config: FastWeightConfig, hidden_size: int) -> Self:
        """Build from a configuration whose ``num_heads`` and ``head_dim`` are set."""
        heads, head_dim = cls._head_shape(config)
        return cls(hidden_size, heads, head_dim, config.expand_v, config.conv_size, config.norm_eps)

    @staticmethod
    def _head_shape(config: FastWeightConfig) -> tuple[int, int]:
        if config.num_heads is None or config.head_dim is None:
            raise ValueError(f"num_heads and head_dim must be set, got {config.num_heads} and {config.head_dim}")
        return config.num_heads, config.head_dim

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's generator."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]
        self._reset_decay()

    def _reset_decay(self) -> None:
        """exp(A_log) uniform in (0, 16), step softplus(dt_bias) log-uniform in [1e-3, 0.1], as Jet starts."""
        decay = torch.empty_like(self.A_log, dtype=torch.float32).uniform_(0, 16).clamp(min=1e-3)
        step = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
        assign(self.A_log, decay.log())
        assign(self.dt_bias, step + torch.log(-torch.expm1(-step)))
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self,
        hidden_states: Tensor,
        state: FastWeightState | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, FastWeightState]:
        """Mix T tokens and return the state behind them.

        Args:
            hidden_states: [B,T,D].
            state: (conv_state [B,C,W], recurrent_state [B,H,K,V]) from an earlier call; None at a text's beginning.
            lengths: [B] integers, real tokens per row when rows are padded on the right. The state returned is that
                after each row's last real token; outputs behind it mean nothing.
            mask: [B,T] bool, True for real tokens, when rows are padded on the left, before all their real tokens.

        Returns:
            [B,T,D], and the new state; its matrix is float32 whatever the model's dtype (float64 for float64).

        Raises:
            ValueError: both ``lengths`` and ``mask``, or shapes that do not fit.
        """
        if lengths is not None and mask is not None:
            raise ValueError("give lengths (rows padded on the right) or mask (padded on the left), not both")
        conv_state, matrix = (None, None) if state is None else state
        q, k, v, conv_state = self._convolve(hidden_states, conv_state, lengths, mask)
        beta = self.b_proj(hidden_states).sigmoid()
        log_decay = self._log_decay(hidden_states)
        if lengths is not None:
            mask = torch.arange(hidden_states.shape[1], device=hidden_states.device) < lengths.unsqueeze(1)
        if mask is not None:
            padding = ~mask.bool().unsqueeze(-1)
            beta, log_decay = beta.masked_fill(padding, 0), log_decay.masked_fill(padding, 0)
        heads = (*hidden_states.shape[:2], self.num_heads, -1)
        o, matrix = self._recur(q.view(heads), k.view(heads), v.view(heads), log_decay, beta, matrix)
        o = self.o_norm(o, self.g_proj(hidden_states).view(heads))
        return self.o_proj(o.flatten(2)), (conv_state, matrix)

    def _log_decay(self, x: Tensor) -> Tensor:
        """log a_t [B,T,H] <= 0, in float32: an error of it grows with every token it decays."""
        dtype = accumulation_dtype(x)
        return -self.A_log.to(dtype).exp() * F.softplus(self.a_proj(x).to(dtype) + self.dt_bias.to(dtype))

    @abstractmethod
    def _convolve(
        self, x: Tensor, conv_state: Tensor | None, lengths: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B,T,D] -> q, k [B,T,H*K], v [B,T,H*V], conv_state [B,C,W]; inputs of the convolution zero where masked."""

    @abstractmethod
    def _recur(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The rule itself: q, k [B,T,H,K], v [B,T,H,V], gates [B,T,H], state [B,H,K,V] -> o [B,T,H,V], state."""


class ConvolvedMixer(Mixer):
    """A mixer with one short convolution of fixed kernels over the channels of q, k and v together."""

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, expand_v: float, conv_size: int, norm_eps: float
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim, expand_v, conv_size, norm_eps)
        self.conv1d = ShortConv(2 * self.key_width + self.value_width, conv_size)

    def _convolve(
        self, x: Tensor, conv_state: Tensor | None, lengths: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        if mask is not None:
            qkv = qkv.masked_fill(~mask.bool().unsqueeze(-1), 0)
        qkv, conv_state = self.conv1d(qkv, conv_state, lengths)
        q, k, v = qkv.split([self.key_width, self.key_width, self.value_width], dim=-1)
        return q, k, v, conv_state


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite a parameter unless it was just loaded: transformers marks those so, and ``nn.init`` heeds the mark."""
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            parameter.copy_(value)
