"""The gated delta rule: a fast-weight matrix that forgets, and writes only what it does not know yet.

    S <- exp(g_t) S;   S <- S + k_t (beta_t (v_t - k_t^T S))^T;   o_t = scale * q_t^T S

The paper (§3.1) writes S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T with a = exp(g), b = beta and S
transposed. Shapes: q, k [B,T,H,K]; v [B,T,H,V]; g (log of the decay, <= 0) and beta [B,T,H]; S [B,H,K,V].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sleepify.ops import chunking, kernels, trials


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    scale: float,
    qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over T tokens (paper §3.1), by the fastest implementation that is exact for these inputs.

    Args:
        q, k: [B,T,H,K]. With ``qk_l2norm`` each is divided by sqrt(sum of squares + 1e-6) first.
        v: [B,T,H,V].
        g: [B,T,H], log of the decay, <= 0.
        beta: [B,T,H], strength of the write. A token with g = 0 and beta = 0 leaves the state exactly as it is.
        state: [B,H,K,V] from an earlier call, or None for zeros. Never changed in place.
        scale: factor of the read, usually K^-0.5.

    Returns:
        o [B,T,H,V] in v's dtype, and the state after the last token, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit together.
    """
    chunking.check_inputs(q, k, v, g, beta, state)
    kernel = kernels.gated_delta_kernel(q, k, v, g, beta, state)
    return (kernel or gated_delta_chunked)(q, k, v, g, beta, state, scale=scale, qk_l2norm=qk_l2norm)


class UnitLowerInverse(torch.autograd.Function):
    """The inverse of I + the strictly lower triangle of a matrix [..., C, C].

    Its gradient is two products with the inverse itself; differentiating a triangular solve solves once more.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        inverse = torch.linalg.solve_triangular(matrix, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def gated_delta_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    scale: float,
    qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """``gated_delta_rule`` token by token, as the formula reads. Same arguments and results."""
    chunking.check_inputs(q, k, v, g, beta, state)
    dtype, out_dtype = chunking.accumulation_dtype(v), v.dtype
    with chunking.full_precision(v.device):
        q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
        s = chunking.zero_state(q, v) if state is None else state.to(dtype)
        if qk_l2norm:
            q, k = chunking.l2norm(q), chunking.l2norm(k)
        outputs = []
        for t in range(q.shape[1]):
            s = s * g[:, t, :, None, None].exp()
            error = v[:, t] - chunking.read(k[:, t], s)
            s = s + k[:, t].unsqueeze(-1) * (beta[:, t].unsqueeze(-1) * error).unsqueeze(-2)
            outputs.append(scale * chunking.read(q[:, t], s))
        return torch.stack(outputs, dim=1).to(out_dtype), s


def gated_delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    scale: float,
    qk_l2norm: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``gated_delta_rule`` in matrix products over chunks of ``chunk_size`` tokens or less. Same arguments and results.

    Inside a chunk the written values are the solution x of a unit triangular system, because each token's error reads
    what the earlier ones wrote:  x_i + beta_i sum_{j<i} (k_i.k_j) decay_ij x_j = beta_i (v_i - decay_i k_i^T S), with S
    the state at the chunk's start. It is linear in S, so it is solved once for all chunks as x = u - w S.
    """
    batch, n_tokens, heads, key_dim = q.shape
    if n_tokens == 1:
        return gated_delta_reference(q, k, v, g, beta, state, scale=scale, qk_l2norm=qk_l2norm)
    chunking.check_inputs(q, k, v, g, beta, state)
    dtype, out_dtype, value_dim = chunking.accumulation_dtype(v), v.dtype, v.shape[-1]
    with chunking.full_precision(v.device):
        s = (chunking.zero_state(q, v) if state is None else state.to(dtype)).reshape(-1, key_dim, value_dim)
        n_chunks, length = chunking.plan(n_tokens, chunk_size or chunking.default_size(v.device))
        q, k, v, g, beta = (chunking.split(x, n_chunks, length, dtype) for x in (q, k, v, g, beta))
        if qk_l2norm:
            q, k = chunking.l2norm(q), chunking.l2norm(k)
        decay = chunking.decay_matrix(g)
        since_start, until_end = g.cumsum(-1).exp().unsqueeze(-1), decay[..., -1, :].unsqueeze(-1)

        k_beta = k * beta.unsqueeze(-1)
        inverse = UnitLowerInverse.apply((k_beta @ k.mT) * decay)
        u, w = inverse @ (v * beta.unsqueeze(-1)), inverse @ (k_beta * since_start)
        k_end = (k * until_end).mT
        q = q * scale
        q_start, inside = q * since_start, (q @ k.mT) * decay
        outputs = []
        # Reads from the states one by one: all of them in one tensor would be the largest of all.
        for u_c, w_c, k_c, decay_c, q_c, inside_c in zip(
            *(x.unbind(0) for x in (u, w, k_end, since_start[:, :, -1:], q_start, inside)), strict=True
        ):
            x_c = torch.baddbmm(u_c, w_c, s, alpha=-1)
            outputs.append(torch.baddbmm(torch.bmm(q_c, s), inside_c, x_c))
            s = torch.baddbmm(s * decay_c, k_c, x_c)
        o = torch.stack(outputs)
        return chunking.join(o, batch, n_tokens).to(out_dtype), s.view(batch, heads, key_dim, value_dim)


trials.EXACT[True] = gated_delta_chunked
