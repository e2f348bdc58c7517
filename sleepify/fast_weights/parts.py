"""The small modules that fast-weight mixers are made of: two norms, the projection and the short convolution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleepify.ops.chunking import accumulation_dtype, autocasts
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
        dtype = accumulation_dtype(x)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._scaled(x).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """``RMSNorm(x) * silu(gate)``, the gate after the weight, all in float32 (float64 for float64)."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return (self._scaled(x) * F.silu(gate.to(accumulation_dtype(gate)))).to(x.dtype)


class Linear(nn.Linear):
    """``nn.Linear`` in the dtype of its input, or autocast's, whatever that of the weight.

    A weight that is wider (float32 in a bfloat16 model) collects its gradient in its own dtype, use by use: N passes
    over every window use it often, and a sum of many small terms is what bfloat16 is worst at.
    """

    _cast: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float64 and autocasts(x.device):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        cast = self._cast  # looked up once: another thread's answer may end meanwhile
        if cast is not None and cast[0].dtype == x.dtype and not torch.is_grad_enabled():
            return F.linear(x, *cast)
        result: Tensor = CastLinear.apply(x, self.weight, self.bias)
        return result

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weights may change.
        return {name: value for name, value in self.__dict__.items() if name != "_cast"}


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Keep the weights of every `Linear` in ``dtype``, too, for all that is computed without gradient.

    For a stretch in which nothing changes them, like the tokens of an answer: cast anew for each, they are a large part
    of what a token moves. Within another such stretch they are brought up to date where they are, which graphs rely on.
    A weight that is not whole or not here (sharded, offloaded) is cast as ever.
    """
    mine = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for each in model.modules():
                if not isinstance(each, Linear) or each.weight.dtype == dtype or not _is_plain(each):
                    continue
                cast = each._cast  # looked up once, as above
                if cast is None:
                    mine.append(each)
                    each._cast = each.weight.to(dtype), None if each.bias is None else each.bias.to(dtype)
                    continue
                for kept, now in zip(cast, (each.weight, each.bias), strict=True):
                    if kept is not None:
                        kept.copy_(now)
        yield
    finally:
        for each in mine:
            each._cast = None


def _is_plain(linear: Linear) -> bool:
    weight, shape = linear.weight, (linear.out_features, linear.in_features)
    # Offloaded to where a hook will fetch it from; made of other tensors, as in FSDP2 or quantized; ZeRO-3's.
    if weight.is_meta or hasattr(weight, "__tensor_flatten__") or hasattr(weight, "ds_id"):
        return False
    return weight.is_floating_point() and weight.shape == shape


class CastLinear(torch.autograd.Function):
    """x [...,D] times a weight [E,D] of another dtype, plus a bias [E], computed in x's dtype.

    The backward pass casts the weight once more. Otherwise every use would keep a copy of it until then.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (rows.mT @ x.flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0, dtype=weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


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
