"""The two forms of a gated recurrence: token by token, as its formula reads, and in matrix products over chunks.

    S <- exp(g_t) S + k_t (beta_t w_t)^T;   o_t = scale * q_t^T S

with w_t = v_t, or whatever else a rule writes: it comes as a function, one for each form. Shapes as in ``gated_delta``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sleepify.ops import chunking

Write = Callable[[Tensor, Tensor, Tensor], Tensor]
Solve = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], "tuple[Tensor, Tensor | None]"]


def token_by_token(
    write: Write, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    scale: float, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The slow form for many tokens, and for a single one the only one: there every call counts, however little it
    computes.

    Args:
        write: of the decayed state [B*H,K,V], a token's key [B*H,1,K] and value [B*H,1,V], what is written there, like
            the value.
    """
    chunking.check_inputs(q, k, v, g, beta, state)
    batch, n_tokens, heads, key_dim = q.shape
    dtype, out_dtype, value_dim = chunking.accumulation_dtype(v), v.dtype, v.shape[3]
    with chunking.full_precision(v.device):
        q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
        s = (chunking.zero_state(q, v) if state is None else state.to(dtype)).reshape(-1, key_dim, value_dim)
        if qk_l2norm:
            q, k = chunking.l2norm(torch.stack((q, k)))
        # Of every token, all rows' heads one after the other: [B*H,1,...].
        tokens = ([x_t.reshape(batch * heads, 1, -1) for x_t in x.unbind(1)] for x in (q, k, v, g.exp(), beta))
        outputs = []
        for q_t, k_t, v_t, decay_t, beta_t in zip(*tokens, strict=True):
            s = s * decay_t
            s = s + k_t.mT * (beta_t * write(s, k_t, v_t))
            outputs.append(torch.bmm(q_t, s) * scale)
        o = outputs[0] if n_tokens == 1 else torch.cat(outputs, 1)
        o = o.view(batch, heads, n_tokens, value_dim).transpose(1, 2)
        return o.to(out_dtype), s.view(batch, heads, key_dim, value_dim)


def chunk_by_chunk(
    write: Write, solve: Solve, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    scale: float, qk_l2norm: bool, chunk_size: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The fast form, in chunks of ``chunk_size`` tokens or less; for a single token that is the slow one.

    Args:
        write: as in ``token_by_token``.
        solve: of k [n,B*H,C,K], v [n,B*H,C,V], beta [n,B*H,C,1], the decay matrix [n,B*H,C,C] and the decay since the
            chunk's start [n,B*H,C,1], what the tokens of a chunk write: u - w S with S the state at its start, u like v
            and w like k, or w None.
    """
    batch, n_tokens, heads, key_dim = q.shape
    if n_tokens == 1:
        return token_by_token(write, q, k, v, g, beta, state, scale, qk_l2norm)
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
        u, w = solve(k, v, beta.unsqueeze(-1), decay, since_start)
        k_end = (k * until_end).mT
        q = q * scale
        q_start, inside = q * since_start, (q @ k.mT) * decay
        known: Any = [None] * n_chunks if w is None else w.unbind(0)
        outputs = []
        # Reads from the states one by one: all of them in one tensor would be the largest of all.
        for u_c, w_c, k_c, decay_c, q_c, inside_c in zip(
            u.unbind(0), known, *(x.unbind(0) for x in (k_end, since_start[:, :, -1:], q_start, inside)), strict=True
        ):
            x_c = u_c if w_c is None else torch.baddbmm(u_c, w_c, s, alpha=-1)
            outputs.append(torch.baddbmm(torch.bmm(q_c, s), inside_c, x_c))
            s = torch.baddbmm(s * decay_c, k_c, x_c)
        o = torch.stack(outputs)
        return chunking.join(o, batch, n_tokens).to(out_dtype), s.view(batch, heads, key_dim, value_dim)
