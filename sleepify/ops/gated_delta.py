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
from sleepify.ops.recurrence import chunk_by_chunk, token_by_token


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None,
    *, scale: float, qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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


def _error(state: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value - torch.bmm(key, state)


def gated_delta_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None,
    *, scale: float, qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``gated_delta_rule`` token by token, as the formula reads. Same arguments and results."""
    return token_by_token(_error, q, k, v, g, beta, state, scale, qk_l2norm)


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


def _solve(k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, since_start: Tensor) -> tuple[Tensor, Tensor]:
    k_beta = k * beta
    inverse = UnitLowerInverse.apply((k_beta @ k.mT) * decay)
    return inverse @ (v * beta), inverse @ (k_beta * since_start)


def gated_delta_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None,
    *, scale: float, qk_l2norm: bool = False, chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``gated_delta_rule`` in matrix products over chunks of ``chunk_size`` tokens or less. Same arguments and results.

    Inside a chunk the written values are the solution x of a unit triangular system, because each token's error reads
    what the earlier ones wrote:  x_i + beta_i sum_{j<i} (k_i.k_j) decay_ij x_j = beta_i (v_i - decay_i k_i^T S), with S
    the state at the chunk's start. It is linear in S, so it is solved once for all chunks as x = u - w S.
    """
    return chunk_by_chunk(_error, _solve, q, k, v, g, beta, state, scale, qk_l2norm, chunk_size)


trials.EXACT[True] = gated_delta_chunked
