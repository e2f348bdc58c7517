"""The gated Hebbian rule (the paper's Eq. 3, Mamba-2's form): forget a little, add the new association.

    S <- exp(g_t) S + k_t (beta_t v_t)^T;   o_t = scale * q_t^T S

Eq. 3 is S_t = a_t S_{t-1} + b_t v_t k_t^T with a = exp(g), b = beta and S transposed. Shapes as in ``gated_delta``:
q, k [B,T,H,K]; v [B,T,H,V]; g (log of the decay, <= 0) and beta [B,T,H]; S [B,H,K,V].
"""

from __future__ import annotations

from torch import Tensor

from sleepify.ops import chunking, kernels, trials
from sleepify.ops.recurrence import chunk_by_chunk, token_by_token


def gated_hebbian_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None,
    *, scale: float, qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gated Hebbian rule over T tokens (Eq. 3). Arguments, results and errors as in ``gated_delta_rule``."""
    chunking.check_inputs(q, k, v, g, beta, state)
    kernel = kernels.gated_hebbian_kernel(q, k, v, g, beta, state)
    return (kernel or gated_hebbian_chunked)(q, k, v, g, beta, state, scale=scale, qk_l2norm=qk_l2norm)


def _value(state: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value


def gated_hebbian_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None,
    *, scale: float, qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``gated_hebbian_rule`` token by token, as the formula reads. Same arguments and results."""
    return token_by_token(_value, q, k, v, g, beta, state, scale, qk_l2norm)


def _solve(k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, since_start: Tensor) -> tuple[Tensor, None]:
    return v * beta, None


def gated_hebbian_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None,
    *, scale: float, qk_l2norm: bool = False, chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``gated_hebbian_rule`` in matrix products over chunks of ``chunk_size`` tokens or less. Same arguments."""
    return chunk_by_chunk(_value, _solve, q, k, v, g, beta, state, scale, qk_l2norm, chunk_size)


trials.EXACT[False] = gated_hebbian_chunked
