"""The gated Hebbian rule (the paper's Eq. 3, Mamba-2's form): forget a little, add the new association.

    S <- exp(g_t) S + k_t (beta_t v_t)^T;   o_t = scale * q_t^T S

Eq. 3 is S_t = a_t S_{t-1} + b_t v_t k_t^T with a = exp(g), b = beta and S transposed. Shapes as in ``gated_delta``:
q, k [B,T,H,K]; v [B,T,H,V]; g (log of the decay, <= 0) and beta [B,T,H]; S [B,H,K,V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from sleepify.ops import chunking, kernels, trials


def gated_hebbian_rule(
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
    """The gated Hebbian rule over T tokens (Eq. 3). Arguments, results and errors as in ``gated_delta_rule``."""
    chunking.check_inputs(q, k, v, g, beta, state)
    kernel = kernels.gated_hebbian_kernel(q, k, v, g, beta, state)
    return (kernel or gated_hebbian_chunked)(q, k, v, g, beta, state, scale=scale, qk_l2norm=qk_l2norm)


def gated_hebbian_reference(
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
    """``gated_hebbian_rule`` token by token, as the formula reads. Same arguments and results."""
    chunking.check_inputs(q, k, v, g, beta, state)
    dtype, out_dtype = chunking.accumulation_dtype(v), v.dtype
    with chunking.full_precision(v.device):
        q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
        s = chunking.zero_state(q, v) if state is None else state.to(dtype)
        if qk_l2norm:
            q, k = chunking.l2norm(q), chunking.l2norm(k)
        outputs = []
        for t in range(q.shape[1]):
            write = k[:, t].unsqueeze(-1) * (beta[:, t].unsqueeze(-1) * v[:, t]).unsqueeze(-2)
            s = s * g[:, t, :, None, None].exp() + write
            outputs.append(scale * chunking.read(q[:, t], s))
        return torch.stack(outputs, dim=1).to(out_dtype), s


def gated_hebbian_chunked(
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
    """``gated_hebbian_rule`` in matrix products over chunks of ``chunk_size`` tokens or less. Same arguments."""
    batch, n_tokens, heads, key_dim = q.shape
    if n_tokens == 1:
        return gated_hebbian_reference(q, k, v, g, beta, state, scale=scale, qk_l2norm=qk_l2norm)
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
        v, q, k_end = v * beta.unsqueeze(-1), q * scale, (k * until_end).mT
        q_start, inside = q * since_start, (q @ k.mT) * decay
        outputs = []
        # Reads and writes of the states one by one: all of them in one tensor would be the largest of all.
        for v_c, k_c, decay_c, q_c, inside_c in zip(
            *(x.unbind(0) for x in (v, k_end, since_start[:, :, -1:], q_start, inside)), strict=True
        ):
            outputs.append(torch.baddbmm(torch.bmm(q_c, s), inside_c, v_c))
            s = torch.baddbmm(s * decay_c, k_c, v_c)
        o = torch.stack(outputs)
        return chunking.join(o, batch, n_tokens).to(out_dtype), s.view(batch, heads, key_dim, value_dim)


trials.EXACT[False] = gated_hebbian_chunked
