"""The dynamic convolution in Triton, forward and backward; nothing of the kernels' size is made but their gradient.

    z[t, c] = sum_w kernels[t, c, w] * inputs[t + w, c];   y = silu(z) or z
    dz = dy * silu'(z);   dkernels[t, c, w] = dz[t, c] * inputs[t + w, c]
    dinputs[p, c] = sum_w kernels[p - w, c, w] * dz[p - w, c]                    over 0 <= p - w < T

``inputs`` [B,W-1+T,C] begins with the W-1 inputs before the text, so that the gradient of a state is a gradient of
inputs. Products and sums are in float32 for every dtype. No atomics: each entry of a result is summed by one program,
in a fixed order. Importing this needs Triton, which comes with a torch built for CUDA on Linux; ``kernels`` decides.
"""
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

_TOKENS, _CHANNELS = 16, 128  # of one program, at most


def convolve(inputs: Tensor, kernels: Tensor, activation: str | None) -> Tensor:
    """Convolve tokens with a kernel for each; differentiable once.

    Args:
        inputs: [B,W-1+T,C], float16, bfloat16 or float32.
        kernels: [B,T,C,W], likewise; the two may differ.
        activation: "silu" or None.

    Returns:
        [B,T,C] in the dtype of ``inputs``.
    """
    result: Tensor = dynamic_conv(inputs, kernels, activation)
    return result


@custom_op("sleepify::dynamic_conv", mutates_args=())
def dynamic_conv(inputs: Tensor, kernels: Tensor, activation: str | None) -> Tensor:
    """An operation that torch.compile leaves whole. Saves its inputs only: the backward pass computes z again."""
    inputs, kernels = _rows(inputs), kernels.contiguous()
    y = torch.empty(kernels.shape[:-1], dtype=inputs.dtype, device=inputs.device)
    grid, sizes = _launch(y, kernels.shape[-1])
    with torch.cuda.device_of(inputs):  # Triton launches on the current device, wherever the tensors are
        _forward[grid](inputs, kernels, y, inputs.stride(0), SILU=activation == "silu", **sizes)
    return y


@dynamic_conv.register_fake
def _(inputs: Tensor, kernels: Tensor, activation: str | None) -> Tensor:
    return torch.empty(kernels.shape[:-1], dtype=inputs.dtype, device=inputs.device)


@custom_op("sleepify::dynamic_conv_backward", mutates_args=())
def dynamic_conv_backward(dy: Tensor, inputs: Tensor, kernels: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    """The gradients of inputs and kernels, in their dtypes."""
    inputs, kernels, dy = _rows(inputs), kernels.contiguous(), dy.contiguous()
    width, silu = kernels.shape[-1], activation == "silu"
    dinputs = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
    dkernels = torch.empty(kernels.shape, dtype=kernels.dtype, device=kernels.device)
    # A float32 copy of the gradient before the activation, W times smaller than the kernels: with it no program needs
    # the pre-activations of its neighbours.
    dz = torch.empty(dy.shape, dtype=torch.float32, device=dy.device) if silu else dy
    with torch.cuda.device_of(inputs):
        grid, sizes = _launch(dy, width)
        _backward_kernels[grid](inputs, kernels, dy, dz, dkernels, inputs.stride(0), SILU=silu, **sizes)
        grid, sizes = _launch(dinputs, width)
        _backward_inputs[grid](kernels, dz, dinputs, **sizes)
    return dinputs, dkernels


@dynamic_conv_backward.register_fake
def _(dy: Tensor, inputs: Tensor, kernels: Tensor, activation: str | None) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (inputs, kernels))


def _save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.activation = inputs[2]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *dynamic_conv_backward(dy, *ctx.saved_tensors, ctx.activation), None


dynamic_conv.register_autograd(_differentiate, setup_context=_save)


def _rows(inputs: Tensor) -> Tensor:
    """Tokens and channels adjacent in memory; rows may lie apart, as where a state's first input is cut off."""
    return inputs if inputs.stride()[1:] == (inputs.shape[2], 1) else inputs.contiguous()


def _launch(cells: Tensor, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid that covers [B,T,C] with blocks of tokens and channels, and the sizes that every kernel takes."""
    batch, n_tokens, n_channels = cells.shape
    block_t = min(_TOKENS, triton.next_power_of_2(n_tokens))
    block_c = min(_CHANNELS, triton.next_power_of_2(n_channels))
    grid = (batch * triton.cdiv(n_tokens, block_t), triton.cdiv(n_channels, block_c))
    sizes = {"n_tokens": n_tokens, "n_channels": n_channels, "WIDTH": width, "BLOCK_T": block_t, "BLOCK_C": block_c}
    return grid, sizes


@triton.jit
def _block(n_tokens, n_channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row, tokens [BLOCK_T,1] and channels [1,BLOCK_C] of this program, and which of its cells exist.

    In 64 bits: a long text times its channels times W passes 2^31.
    """
    n_blocks = tl.cdiv(n_tokens, BLOCK_T)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    tokens = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return row, tokens, channels, (tokens < n_tokens) & (channels < n_channels)


@triton.jit
def _outputs(row_stride, n_tokens, n_channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where this program's outputs [B,T,C] lie, and the first input of each; and which of them exist."""
    row, tokens, channels, exists = _block(n_tokens, n_channels, BLOCK_T, BLOCK_C)
    cell = (row * n_tokens + tokens) * n_channels + channels
    return cell, row * row_stride + tokens * n_channels + channels, exists


@triton.jit
def _weighted_sum(inputs, kernels, source, cell, exists, n_channels, WIDTH: tl.constexpr):
    """z of a block, in float32."""
    z = tl.zeros(exists.shape, tl.float32)
    for w in tl.static_range(WIDTH):
        x = tl.load(inputs + source + w * n_channels, mask=exists, other=0.0).to(tl.float32)
        z += tl.load(kernels + cell * WIDTH + w, mask=exists, other=0.0).to(tl.float32) * x
    return z


@triton.jit
def _forward(
    inputs, kernels, y, row_stride, n_tokens, n_channels,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cell, source, exists = _outputs(row_stride, n_tokens, n_channels, BLOCK_T, BLOCK_C)
    z = _weighted_sum(inputs, kernels, source, cell, exists, n_channels, WIDTH)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + cell, z.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _backward_kernels(
    inputs, kernels, dy, dz, dkernels, row_stride, n_tokens, n_channels,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cell, source, exists = _outputs(row_stride, n_tokens, n_channels, BLOCK_T, BLOCK_C)
    grad = tl.load(dy + cell, mask=exists, other=0.0).to(tl.float32)
    if SILU:
        z = _weighted_sum(inputs, kernels, source, cell, exists, n_channels, WIDTH)
        gate = tl.sigmoid(z)
        grad = grad * gate * (1 + z * (1 - gate))
        tl.store(dz + cell, grad, mask=exists)
    for w in tl.static_range(WIDTH):
        x = tl.load(inputs + source + w * n_channels, mask=exists, other=0.0).to(tl.float32)
        tl.store(dkernels + cell * WIDTH + w, (grad * x).to(dkernels.dtype.element_ty), mask=exists)


@triton.jit
def _backward_inputs(
    kernels, dz, dinputs, n_tokens, n_channels, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    # n_tokens counts the inputs here, W-1 more than there are outputs.
    row, positions, channels, exists = _block(n_tokens, n_channels, BLOCK_T, BLOCK_C)
    n_outputs = n_tokens - (WIDTH - 1)
    total = tl.zeros(exists.shape, tl.float32)
    for w in tl.static_range(WIDTH):
        tokens = positions - w
        reached = exists & (tokens >= 0) & (tokens < n_outputs)
        cell = (row * n_outputs + tokens) * n_channels + channels
        tap = tl.load(kernels + cell * WIDTH + w, mask=reached, other=0.0).to(tl.float32)
        total += tap * tl.load(dz + cell, mask=reached, other=0.0).to(tl.float32)
    cell = (row * n_tokens + positions) * n_channels + channels
    tl.store(dinputs + cell, total.to(dinputs.dtype.element_ty), mask=exists)
