"""Short causal convolutions over the tokens, one kernel per channel, with a state that continues across calls.

    y[t, c] = activation( sum_w kernel[c, w] * x[t - (W-1) + w, c] + bias[c] )        tap W-1 meets the current token

``short_conv`` has fixed kernels, ``dynamic_conv`` (Jet) another one for every token. The state [B,C,W] is the last W
raw inputs, newest last, zeros where the text has not begun. Shapes: x [B,T,C].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sleepify.ops import chunking
from sleepify.ops.kernels import dynamic_conv_kernel, short_conv_kernel


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, lengths: Tensor | None = None,
    *, activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal depthwise convolution with fixed kernels, continued from ``state``.

    Args:
        x: [B,T,C], T >= 1.
        weight: [C,W].
        bias: [C] or None.
        state: [B,C,W] from an earlier call, or None for the beginning of the text. Never changed in place.
        lengths: [B] integers, the number of real tokens of each row where rows are padded on the right; None means T.
            The returned state is that after each row's own last real token (0: the given state).
        activation: "silu" or None.

    Returns:
        y [B,T,C] in x's dtype (without meaning behind a row's length), and the new state [B,C,W] in x's dtype.

    Raises:
        ValueError: shapes that do not fit together, an unknown activation.
    """
    _check(x, weight.shape[-1], state, lengths, activation)
    if weight.shape[0] != x.shape[2]:
        raise ValueError(f"weight must be [C, W] with C = {x.shape[2]}, got {tuple(weight.shape)}")
    if x.shape[1] == 1 and state is not None and lengths is None:
        return _next(x, weight, bias, state, activation)
    inputs, new_state = _continued(x, state, lengths, weight.shape[1])
    kernel = short_conv_kernel(inputs, weight)
    if kernel is not None:
        return kernel(inputs, weight, bias, activation), new_state
    return _convolve(inputs, weight, bias, activation), new_state


def dynamic_conv(
    x: Tensor, kernels: Tensor, state: Tensor | None = None, lengths: Tensor | None = None,
    *, activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal depthwise convolution with a kernel per token, [B,T,C,W]; that of the output token counts.

    Other arguments, results and errors as in ``short_conv``.
    """
    _check(x, kernels.shape[-1], state, lengths, activation)
    if kernels.shape[:-1] != x.shape:
        raise ValueError(f"kernels must be [B, T, C, W] with [B, T, C] = {tuple(x.shape)}, got {tuple(kernels.shape)}")
    if x.shape[1] == 1 and state is not None and lengths is None:
        return _next(x, kernels[:, 0], None, state, activation)
    inputs, new_state = _continued(x, state, lengths, kernels.shape[-1])
    kernel = dynamic_conv_kernel(inputs, kernels)
    if kernel is not None:
        return kernel(inputs, kernels, activation), new_state
    return _convolve(inputs, kernels, None, activation), new_state


def short_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, lengths: Tensor | None = None,
    *, activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``short_conv`` token by token, as the formula reads. Same arguments and results."""
    kernels = weight.expand(*x.shape, weight.shape[1])
    return _reference(x, kernels, bias, state, lengths, activation)


def dynamic_conv_reference(
    x: Tensor, kernels: Tensor, state: Tensor | None = None, lengths: Tensor | None = None,
    *, activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``dynamic_conv`` token by token, as the formula reads. Same arguments and results."""
    return _reference(x, kernels, None, state, lengths, activation)


def _reference(
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    dtype = chunking.accumulation_dtype(x)
    _check(x, kernels.shape[-1], state, lengths, activation)
    window = x.new_zeros(x.shape[0], x.shape[2], kernels.shape[-1]) if state is None else state.to(x.dtype)
    last, outputs = window, []
    for t in range(x.shape[1]):
        window = torch.cat([window[..., 1:], x[:, t].unsqueeze(-1)], dim=-1)
        y = (kernels[:, t].to(dtype) * window.to(dtype)).sum(-1) + (0 if bias is None else bias.to(dtype))
        outputs.append(_activate(y, activation).to(x.dtype))
        last = window if lengths is None else torch.where((t < lengths)[:, None, None], window, last)
    return torch.stack(outputs, dim=1), last


def _check(x: Tensor, width: int, state: Tensor | None, lengths: Tensor | None, activation: str | None) -> None:
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x must be [B, T, C] with T >= 1, got {tuple(x.shape)}")
    if activation not in ("silu", None):
        raise ValueError(f'activation must be "silu" or None, got {activation!r}')
    if state is not None and state.shape != (x.shape[0], x.shape[2], width):
        raise ValueError(f"state must be [B, C, W] = {(x.shape[0], x.shape[2], width)}, got {tuple(state.shape)}")
    if lengths is not None and lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths must be [B] = {tuple(x.shape[:1])}, got {tuple(lengths.shape)}")


def _next(x: Tensor, taps: Tensor, bias: Tensor | None, state: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    """One more token, x [B,1,C] and taps [C,W] or [B,C,W]: a wake token has no time for the layout that many need."""
    dtype = chunking.accumulation_dtype(x)
    state = torch.cat([state[..., 1:].to(x.dtype), x.mT], -1)
    y = (state.to(dtype) * taps.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return _activate(y, activation).to(x.dtype).unsqueeze(1), state


def _continued(x: Tensor, state: Tensor | None, lengths: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """All inputs of the T outputs, [B,W-1+T,C]: the last W-1 of the state and then x. And the new state."""
    history = F.pad(x, (0, 0, width, 0)) if state is None else torch.cat([state.mT.to(x.dtype), x], dim=1)
    return history[:, 1:], _last_inputs(history, x.shape[1], lengths, width)


def _last_inputs(history: Tensor, n_tokens: int, lengths: Tensor | None, width: int) -> Tensor:
    """The W inputs up to each row's last real token, [B,C,W]. A copy: a view would keep the whole text alive."""
    if lengths is None:
        return history[:, n_tokens:].mT.clone(memory_format=torch.contiguous_format)
    index = lengths.to(history.device, torch.long)[:, None, None] + torch.arange(width, device=history.device)[:, None]
    return history.gather(1, index.expand(-1, -1, history.shape[2])).mT.contiguous()


class WeightedSum(torch.autograd.Function):
    """sum_w taps[..., w] * inputs[:, w : w + T] for inputs [B,T+W-1,C] and taps [B,T,C,W] or [C,W].

    Differentiated as it stands, every tap would make a padded copy of all inputs for its share of their gradient.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, taps)
        n_tokens, width = inputs.shape[1] - taps.shape[-1] + 1, taps.shape[-1]
        y = inputs[:, :n_tokens] * taps[..., 0]
        for w in range(1, width):
            y.addcmul_(inputs[:, w : w + n_tokens], taps[..., w])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inputs, taps = ctx.saved_tensors
        n_tokens, width = grad.shape[1], taps.shape[-1]
        grad_inputs = grad_taps = None
        if ctx.needs_input_grad[0]:
            grad_inputs = grad.new_zeros(inputs.shape)
            for w in range(width):
                grad_inputs[:, w : w + n_tokens].addcmul_(grad, taps[..., w])
        if ctx.needs_input_grad[1]:
            products = (grad * inputs[:, w : w + n_tokens] for w in range(width))
            grad_taps = torch.stack([x if taps.dim() == 4 else x.sum((0, 1)) for x in products], -1)
        return grad_inputs, grad_taps


def _convolve(inputs: Tensor, taps: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    dtype = chunking.accumulation_dtype(inputs)
    y: Tensor = WeightedSum.apply(inputs.to(dtype), taps.to(dtype))
    if bias is not None:
        y = y + bias.to(dtype)
    return _activate(y, activation).to(inputs.dtype)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else F.silu(y)
