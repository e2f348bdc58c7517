"""The small modules that fast-weight mixers are made of: two norms and the short convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleepify.ops.chunking import accumulation_dtype
from sleepify.ops.conv import short_conv


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32 (float64 for float64)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def _scaled(self, x: Tensor) -> Tensor:
        x = x.to(accumulation_dtype(x))
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._scaled(x).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """``RMSNorm(x) * silu(gate)``, the gate after the weight, all in float32 (float64 for float64)."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return (self._scaled(x) * F.silu(gate.to(accumulation_dtype(gate)))).to(x.dtype)


class ShortConv(nn.Module):
    """Causal depthwise convolution and silu, see ``sleepify.ops.conv.short_conv``.

    The weight is [C,1,W] as in ``nn.Conv1d``: an optimiser for matrices must not take it for one.
    """

    def __init__(self, n_channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_channels, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B,T,C], state [B,C,W] -> y [B,T,C], state [B,C,W]."""
        return short_conv(x, self.weight.squeeze(1), None, state, lengths)
