"""JetBlock: the fast-weight layer of Jet-Nemotron, a gated DeltaNet whose convolution over v has kernels made from x.

    kernel_t = W_2 silu(W_1 x_t) + b_2;   v = silu(dynamic_conv(W_v x, kernel));   q, k = silu(W_q x), silu(W_k x)

Parameter names are those of the published checkpoints, so the native Jet-Nemotron port uses this class as its
``self_attn``. The paper inserts six of these (without MLP) into Ouro (§6.3, §6.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from sleepify.fast_weights.mixer import Mixer
from sleepify.fast_weights.parts import Linear
from sleepify.ops.conv import dynamic_conv
from sleepify.ops.gated_delta import gated_delta_rule

if TYPE_CHECKING:
    from typing_extensions import Self

    from sleepify.config import FastWeightConfig


class KernelGenerator(nn.Module):
    """x [B,T,D] -> convolution kernels [B,T,C,W], through a bottleneck of C // reduction."""

    def __init__(self, hidden_size: int, n_channels: int, width: int, reduction: int) -> None:
        super().__init__()
        if n_channels < reduction:
            raise ValueError(f"dconv_generator_reduction must be at most the value width {n_channels}, got {reduction}")
        self.width = width
        self.w1 = Linear(hidden_size, n_channels // reduction, bias=False)
        self.w2 = Linear(n_channels // reduction, n_channels * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from the static kernel b_2. W_1 is not zero beside W_2: neither would ever receive a gradient."""
        self.w1.reset_parameters()
        nn.init.zeros_(self.w2.weight)
        nn.init.normal_(self.w2.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x))).unflatten(-1, (-1, self.width))


class DynamicConv(nn.Module):
    """The convolution of v; holds the generator under its published name."""

    def __init__(self, hidden_size: int, n_channels: int, width: int, reduction: int) -> None:
        super().__init__()
        self.kernel_generator = KernelGenerator(hidden_size, n_channels, width, reduction)

    def reset_parameters(self) -> None:
        self.kernel_generator.reset_parameters()

    def forward(self, u: Tensor, x: Tensor, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """u [B,T,C] convolved with the kernels of x [B,T,D]; state [B,C,W]."""
        return dynamic_conv(u, self.kernel_generator(x), state, lengths, activation="silu")


class JetBlock(Mixer):
    """Jet-Nemotron's mixer. Arguments as in ``Mixer``, and:

    Args:
        dconv_generator_reduction: r, the kernel generator's bottleneck is H*V // r wide.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        expand_v: float,
        conv_size: int,
        dconv_generator_reduction: int,
        norm_eps: float,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim, expand_v, conv_size, norm_eps)
        self.dynamic_conv1d = DynamicConv(hidden_size, self.value_width, conv_size, dconv_generator_reduction)

    @classmethod
    def from_config(cls, config: FastWeightConfig, hidden_size: int) -> Self:
        heads, head_dim = cls._head_shape(config)
        return cls(
            hidden_size, heads, head_dim, config.expand_v, config.conv_size, config.dconv_reduction, config.norm_eps
        )

    def _convolve(
        self, x: Tensor, conv_state: Tensor | None, lengths: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u = self.v_proj(x)
        if mask is not None:
            u = u.masked_fill(~mask.bool().unsqueeze(-1), 0)
        v, conv_state = self.dynamic_conv1d(u, x, conv_state, lengths)
        return F.silu(self.q_proj(x)), F.silu(self.k_proj(x)), v, conv_state

    def _recur(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return gated_delta_rule(q, k, v, log_decay, beta, state, scale=self.head_dim**-0.5, qk_l2norm=True)
