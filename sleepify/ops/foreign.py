"""Kernels of other packages, called as they want it, and as operations that torch.compile leaves whole.

Called directly they are differentiated by their own backward. Dynamo would trace into them or stop before them, so in a
compiled graph they are custom operations, whose backward runs the forward once more: what theirs saves for it is
private to them, and differs from version to version.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from sleepify.ops import chunking


def run_fla_delta(
    function: Callable[..., Any],
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    *, scale: float, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gated delta rule by a function of flash-linear-attention."""
    return _run_fla(function, q, k, v, g, state, beta=beta, scale=scale, use_qk_l2norm_in_kernel=qk_l2norm)


def run_fla_hebbian(
    function: Callable[..., Any],
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    *, scale: float, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gated Hebbian rule by flash-linear-attention's simple gated linear attention."""
    if qk_l2norm:
        q, k = chunking.l2norm(q.float()), chunking.l2norm(k.float())
    return _run_fla(function, q, k, (v.float() * beta.float().unsqueeze(-1)).to(v.dtype), g, state, scale=scale)


def _run_fla(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, **others: Any
) -> tuple[Tensor, Tensor]:
    # The state is [B,H,K,V] by default there too; layers of theirs ask for [B,H,V,K].
    o, new_state = function(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=v,
        g=g.float(),
        initial_state=None if state is None else state.float(),
        output_final_state=True,
        **others,
    )
    return o.to(v.dtype), new_state.float()


def run_causal_conv1d(
    function: Callable[..., Any], inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """The short convolution by causal-conv1d: inputs [B,W-1+T,C] -> [B,T,C]."""
    # [B,C,T'] with the channels adjacent in memory, as the kernel wants them. The state goes in as ordinary inputs and
    # its outputs are dropped: that needs no layout of initial_states, and gradient reaches the state.
    # Never None: without a bias, the backward pass of version 1.5.0 fails.
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(weight.dtype)
    y = function(x=inputs.mT, weight=weight.contiguous(), bias=bias, activation=activation)
    return y.mT[:, weight.shape[1] - 1 :]


def traced_rule(
    module: str, name: str,
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    *, scale: float, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A rule of flash-linear-attention, module and name, as an operation of a compiled graph."""
    result: tuple[Tensor, Tensor] = fla_rule(q, k, v, g, beta, state, module, name, scale, qk_l2norm)
    return result


def traced_conv(
    module: str, name: str, inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """causal-conv1d, as an operation of a compiled graph."""
    result: Tensor = causal_conv(inputs, weight, bias, module, name, activation)
    return result


def _rule(module: str, name: str, scale: float, qk_l2norm: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    run = run_fla_delta if "delta" in name else run_fla_hebbian
    function = getattr(importlib.import_module(module), name)
    return lambda *tensors: run(function, *tensors, scale=scale, qk_l2norm=qk_l2norm)


def _conv(module: str, name: str, activation: str | None) -> Callable[..., tuple[Tensor]]:
    function = getattr(importlib.import_module(module), name)

    def convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
        return (run_causal_conv1d(function, inputs, weight, bias, activation).contiguous(),)

    return convolve


def _gradients(
    function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Of all tensors, by what ``function`` brings along. An empty tensor stands for the gradient of None."""
    # Inside of an operation torch has turned autograd off, in the dispatcher too; this turns it on again.
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
        found = iter(torch.autograd.grad(function(*leaves), [x for x in leaves if x is not None], grads))
    return [grads[0].new_empty(0) if x is None else next(found).contiguous() for x in leaves]


def _empty_gradients(grad: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """What ``_gradients`` returns, without values."""
    return [grad.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]


def _save_rule(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


@custom_op("sleepify::fla_rule", mutates_args=())
def fla_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    module: str, name: str, scale: float, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and the last state."""
    o, last = _rule(module, name, scale, qk_l2norm)(q, k, v, g, beta, state)
    return o.contiguous(), last.contiguous()


@fla_rule.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return o, v.new_empty(q.shape[0], *q.shape[2:], v.shape[-1], dtype=torch.float32)


@custom_op("sleepify::fla_rule_backward", mutates_args=())
def fla_rule_backward(
    do: Tensor, dlast: Tensor,
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    module: str, name: str, scale: float, qk_l2norm: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, v, g, beta and the state."""
    return _gradients(_rule(module, name, scale, qk_l2norm), (q, k, v, g, beta, state), (do, dlast))


@fla_rule_backward.register_fake
def _(do: Tensor, dlast: Tensor, *inputs: Any) -> list[Tensor]:
    return _empty_gradients(do, inputs[:6])


def _differentiate_rule(ctx: Any, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    *grads, dstate = fla_rule_backward(do, dlast, *ctx.saved_tensors, *ctx.settings)
    return *grads, None if ctx.saved_tensors[5] is None else dstate, None, None, None, None


fla_rule.register_autograd(_differentiate_rule, setup_context=_save_rule)


@custom_op("sleepify::causal_conv1d", mutates_args=())
def causal_conv(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, module: str, name: str, activation: str | None
) -> Tensor:
    """[B,T,C]."""
    return _conv(module, name, activation)(inputs, weight, bias)[0]


@causal_conv.register_fake
def _(inputs: Tensor, weight: Tensor, *_: Any) -> Tensor:
    batch, length, n_channels = inputs.shape
    return inputs.new_empty(batch, length - (weight.shape[1] - 1), n_channels)


@custom_op("sleepify::causal_conv1d_backward", mutates_args=())
def causal_conv_backward(
    dy: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    module: str,
    name: str,
    activation: str | None,
) -> list[Tensor]:
    """The gradients of inputs, weight and bias."""
    return _gradients(_conv(module, name, activation), (inputs, weight, bias), (dy,))


@causal_conv_backward.register_fake
def _(dy: Tensor, *inputs: Any) -> list[Tensor]:
    return _empty_gradients(dy, inputs[:3])


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _differentiate_conv(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dinputs, dweight, dbias = causal_conv_backward(dy, *ctx.saved_tensors, *ctx.settings)
    return dinputs, dweight, None if ctx.saved_tensors[2] is None else dbias, None, None, None


causal_conv.register_autograd(_differentiate_conv, setup_context=_save_conv)
