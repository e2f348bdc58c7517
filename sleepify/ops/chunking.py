"""What the chunked forms of the recurrences share: layout, decay inside a chunk, precision.

A chunk is C consecutive tokens of one row and head. All chunks of a call lie in one tensor [n, B*H, C, ...], so that
everything but the hand-over of the state from chunk to chunk is one batched matrix product.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype sums and states are kept in: float64 for float64 inputs, float32 for every other."""
    return torch.promote_types(x.dtype, torch.float32)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    if torch.compiler.is_compiling():
        # torch 2.9 cannot trace the question whether a kind of device has autocast at all; these have.
        return device.type in ("cpu", "cuda", "xpu", "mps") and torch.is_autocast_enabled(device.type)
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast: it would round the state to half precision at every product."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> None:
    """Raise ValueError unless q, k [B,T,H,K], v [B,T,H,V], g, beta [B,T,H] and state [B,H,K,V] fit together, T >= 1."""
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, K] with T >= 1, got {tuple(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}; repeat the heads beforehand")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with [B, T, H] = {tuple(q.shape[:3])}, got {tuple(v.shape)}")
    for name, gate in (("g", g), ("beta", beta)):
        if gate.shape != q.shape[:3]:
            raise ValueError(f"{name} must be [B, T, H] = {tuple(q.shape[:3])}, got {tuple(gate.shape)}")
    expected = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"state must be [B, H, K, V] = {expected}, got {tuple(state.shape)}")


def zero_state(q: Tensor, v: Tensor) -> Tensor:
    """The empty state [B,H,K,V] in accumulation dtype for q [B,T,H,K] and v [B,T,H,V]."""
    return v.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=accumulation_dtype(v))


def default_size(device: torch.device) -> int:
    """Tokens per chunk: a CPU pays for the quadratic part of a chunk, a GPU for the number of launches."""
    return 32 if device.type == "cpu" else 64


def plan(n_tokens: int, chunk_size: int) -> tuple[int, int]:
    """Number of chunks and their common length: as few as ``chunk_size`` allows, then as short as covers the tokens."""
    n_chunks = -(-n_tokens // chunk_size)
    return n_chunks, -(-n_tokens // n_chunks)


def split(x: Tensor, n_chunks: int, length: int, dtype: torch.dtype) -> Tensor:
    """x [B,T,H,...] -> [n_chunks, B*H, length, ...], zeros behind the last token.

    Zeros are the neutral token: no decay (g = 0), nothing written (beta = 0).
    """
    batch, tokens, heads, *rest = x.shape
    x = x.to(dtype)
    missing = n_chunks * length - tokens
    if missing:
        x = F.pad(x, (0, 0) * (len(rest) + 1) + (0, missing))
    x = x.reshape(batch, n_chunks, length, heads, *rest).transpose(0, 1).transpose(2, 3)
    return x.reshape(n_chunks, batch * heads, length, *rest)


def join(x: Tensor, batch: int, n_tokens: int) -> Tensor:
    """The inverse of ``split``: [n_chunks, B*H, length, V] -> [B,T,H,V]."""
    n_chunks, rows, length, width = x.shape
    x = x.view(n_chunks, batch, rows // batch, length, width).permute(1, 0, 3, 2, 4)
    return x.reshape(batch, n_chunks * length, rows // batch, width)[:, :n_tokens]


def decay_matrix(g: Tensor) -> Tensor:
    """exp(g_{j+1} + ... + g_i) for j <= i, else 0: how much of token j is left at token i. [..., C] -> [..., C, C].

    Each entry sums its own decays. A difference of two running sums would cancel after a strong decay, and overflow in
    the upper triangle, where 0 * inf makes gradients nan.
    """
    return g.unsqueeze(-1).expand(*g.shape, g.shape[-1]).tril(-1).cumsum(-2).exp().tril()
