"""The gated delta and Hebbian rules by the kernels of ``triton_chunks``, as operations that torch.compile leaves whole.

Four launches forward, seven backward, whatever B, H and T. For the backward pass nothing of the state's size is kept:
the inputs, R [B*H, T, 64] and four numbers a token; states are made again.

How float32 is multiplied on tensor cores: half precision inputs fit into TF32 as they are, and what is computed from
them is rounded to 11 bits, where the inputs and outputs have 8 (bfloat16) or 11 (float16); for float32 inputs each
factor is split in two, 22 bits. Sums, decays and the state are float32 in both cases, so that nothing rounds what is
already stored. Importing this needs Triton; ``kernels`` decides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from sleepify.ops import triton_chunks as forward
from sleepify.ops import triton_chunks_backward as backward

MAX_KEY_DIM = 256  # a program holds 64 whole keys in shared memory
_CHUNK = forward.CHUNK.value


def _precision(*inputs: Tensor) -> str:
    """How products of these inputs are made: "tf32" for half precision, "tf32x3" for float32."""
    return "tf32x3" if any(x.dtype == torch.float32 for x in inputs) else "tf32"


def run_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    *, scale: float, qk_l2norm: bool, delta: bool, precision: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gated delta rule, or with ``delta`` False the gated Hebbian; differentiable once.

    Args:
        q, k, v, g, beta, state, scale, qk_l2norm: as in ``gated_delta_rule``; float16, bfloat16 or float32 each.
        delta: which of the two rules.
        precision: "tf32", "tf32x3" or "ieee"; None is "tf32x3" where q, k or v is float32, else "tf32".

    Returns:
        o [B,T,H,V] in v's dtype, and the last state [B,H,K,V] in float32.
    """
    o, final, _, _ = chunked_rule(q, k, v, g, beta, state, scale, qk_l2norm, delta, precision)
    return o, final


class _Launch:
    """What the kernels of one call share: sizes, strides, grids, empty results."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, delta: bool, precision: str | None) -> None:
        batch, self.n_tokens, self.n_heads, self.key_dim = q.shape
        self.value_dim, self.device = v.shape[-1], v.device
        self.n_pairs, self.n_chunks = batch * self.n_heads, triton.cdiv(self.n_tokens, _CHUNK)
        self.block_k, self.block_v = (min(64, _power(width)) for width in (self.key_dim, self.value_dim))
        # Pairs first: a grid's other axes end at 65,535, which many short texts in one call pass.
        self.by_chunk = (self.n_pairs, self.n_chunks)
        strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
        self.qk, self.k, self.kv, self.qkv = strides[:4], strides[2:4], strides[2:], strides
        self.sizes = (self.n_tokens, self.n_heads)
        self.scaled = (*self.sizes, scale)
        self.blocks = {"BLOCK_K": self.block_k, "BLOCK_V": self.block_v}
        # For the two that keep several products at once: blocks of 64 do not fit into 255 registers a thread.
        self.small = {"BLOCK_K": min(32, self.block_k), "BLOCK_V": min(32, self.block_v), "num_stages": 2}
        self.tiles_k = triton.cdiv(self.key_dim, self.small["BLOCK_K"])
        self.by_chunk_and_key = (*self.by_chunk, self.tiles_k)
        self.widths = {"KEY": self.key_dim, "VALUE": self.value_dim}
        self.precision = {"PRECISION": precision or _precision(q, k, v)}
        self.rule = {"DELTA": delta, **self.precision}
        # The walk over the chunks is by columns of V, the narrower the more programs there are for the whole GPU. With
        # whole keys in shared memory nothing is left for loads ahead of their use when K is beyond 128.
        wide = self.key_dim > 128
        tile_v = min(16 if wide else 32, _power(self.value_dim))
        self.by_column = (self.n_pairs, triton.cdiv(self.value_dim, tile_v))
        self.walk = {"ALL_K": _power(self.key_dim), "TILE_V": tile_v, "num_stages": 1, "num_warps": 8 if wide else 4}

    def empty(self, *shape: int) -> Tensor:
        """Of the float32 that lies between kernels."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def by_token(self, width: int) -> Tensor:
        return self.empty(self.n_pairs, self.n_chunks * _CHUNK, width)

    def states(self, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None, marks: Tensor, inverse: Tensor) -> Any:
        """w, x, the states before each chunk and the last, in two launches."""
        delta = self.rule["DELTA"]
        w, x = self.by_token(self.key_dim if delta else 0), self.by_token(self.value_dim)
        states = self.empty(self.n_pairs, self.n_chunks, self.key_dim, self.value_dim)
        final = self.empty(self.n_pairs // self.n_heads, self.n_heads, self.key_dim, self.value_dim)
        forward.solve[self.by_chunk](
            k, v, beta, marks, inverse, w, x, *self.kv, *self.sizes, **self.widths, **self.blocks, **self.rule
        )
        forward.carry_states[self.by_column](
            k, marks, w, x, final if state is None else state, states, final, *self.k, *self.sizes,
            HAS_STATE=state is not None, **self.widths, **self.walk, **self.rule,
        )  # fmt: skip
        return w, x, states, final


def _power(width: int) -> int:
    """The least power of two that holds ``width`` and that a matrix product takes."""
    return max(16, triton.next_power_of_2(width))


def _rows(x: Tensor) -> Tensor:
    """[B,T,H,D] with heads and channels adjacent in memory; q, k and v are often parts of one tensor, and stay so."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


@custom_op("sleepify::chunked_rule", mutates_args=())
def chunked_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    scale: float, qk_l2norm: bool, delta: bool, precision: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the last state, and for the backward pass the marks and R."""
    q, k, v, g, beta = _rows(q), _rows(k), _rows(v), g.contiguous(), beta.contiguous()
    state = None if state is None else state.contiguous()
    at = _Launch(q, k, v, scale, delta, precision)
    marks = at.empty(at.n_pairs, at.n_chunks, 4, _CHUNK)
    inverse = at.by_token(_CHUNK if delta else 0)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with torch.cuda.device_of(v):  # Triton launches on the current device, wherever the tensors are
        forward.prepare[at.by_chunk](
            q, k, g, beta, marks, inverse, *at.qk, *at.sizes,
            KEY=at.key_dim, BLOCK_K=at.block_k, NORMALISE=qk_l2norm, **at.rule,
        )  # fmt: skip
        _, x, states, final = at.states(k, v, beta, state, marks, inverse)
        forward.read_out[at.by_chunk](
            q, k, g, marks, x, states, o, *at.qk, *at.scaled, **at.widths, **at.blocks, **at.precision
        )
    return o, final, marks, inverse


@chunked_rule.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, n_tokens, n_heads, key_dim), delta = q.shape, others[5]
    n_chunks = (n_tokens + _CHUNK - 1) // _CHUNK
    single: dict[str, Any] = {"dtype": torch.float32, "device": v.device}
    return (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        torch.empty(batch, n_heads, key_dim, v.shape[-1], **single),
        torch.empty(batch * n_heads, n_chunks, 4, _CHUNK, **single),
        torch.empty(batch * n_heads, n_chunks * _CHUNK, _CHUNK if delta else 0, **single),
    )


@custom_op("sleepify::chunked_rule_backward", mutates_args=())
def chunked_rule_backward(
    do: Tensor, dfinal: Tensor,
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    marks: Tensor, inverse: Tensor, scale: float, qk_l2norm: bool, delta: bool, precision: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, g, beta, in their dtypes, and of the state, in float32."""
    q, k, v, g, beta, do = _rows(q), _rows(k), _rows(v), g.contiguous(), beta.contiguous(), do.contiguous()
    state, dfinal = None if state is None else state.contiguous(), dfinal.contiguous()
    at = _Launch(q, k, v, scale, delta, precision)
    dq, dk, dv, dg, dbeta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta))
    dx, dstate = at.by_token(at.value_dim), torch.empty_like(dfinal)
    dread, dpairs = at.by_token(_CHUNK), at.by_token(_CHUNK if delta else 0)
    inside = at.empty(at.n_pairs, at.n_chunks, 2, _CHUNK)
    partial = at.empty(at.n_pairs, at.n_chunks, at.tiles_k, 3, _CHUNK)
    dq_normal, dk_normal = at.by_token(at.key_dim), at.by_token(at.key_dim)
    with torch.cuda.device_of(v):
        w, x, states, _ = at.states(k, v, beta, state, marks, inverse)
        dstates = torch.empty_like(states)
        backward.spread_back[at.by_chunk](
            q, k, g, marks, do, dx, *at.qk, *at.scaled, **at.widths, **at.blocks, **at.precision
        )
        backward.carry_back[at.by_column](
            q, k, marks, w, do, dfinal, dx, dstates, dstate, *at.qk, *at.scaled, **at.widths, **at.walk, **at.rule
        )
        backward.values_back[at.by_chunk](
            q, k, v, g, beta, marks, inverse, x, do, dx, dv, dread, dpairs, inside, *at.qkv, *at.scaled,
            **at.widths, **at.small, **at.rule,
        )  # fmt: skip
        backward.keys_back[at.by_chunk_and_key](
            q, k, beta, marks, x, dx, do, states, dstates, dread, dpairs, dq_normal, dk_normal, partial,
            *at.qk, *at.scaled, **at.widths, **at.small, **at.rule,
        )  # fmt: skip
        backward.finish[at.by_chunk](
            q, k, marks, dq_normal, dk_normal, inside, partial, dq, dk, dg, dbeta, *at.qk, *at.sizes,
            KEY=at.key_dim, BLOCK_K=at.block_k, TILES=at.tiles_k, NORMALISE=qk_l2norm, DELTA=delta,
        )  # fmt: skip
    return dq, dk, dv, dg, dbeta, dstate


@chunked_rule_backward.register_fake
def _(do: Tensor, dfinal: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (*inputs[:5], dfinal))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, qk_l2norm, delta, precision = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.settings = scale, qk_l2norm, delta, precision
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *inputs, state, marks, inverse = ctx.saved_tensors
    v = inputs[2]
    do = v.new_zeros(v.shape) if do is None else do
    if dfinal is None:
        batch, _, n_heads, key_dim = inputs[0].shape
        dfinal = v.new_zeros(batch, n_heads, key_dim, v.shape[-1], dtype=torch.float32)
    *grads, dstate = chunked_rule_backward(do, dfinal, *inputs, state, marks, inverse, *ctx.settings)
    return *grads, None if state is None else dstate.to(state.dtype), None, None, None, None


chunked_rule.register_autograd(_differentiate, setup_context=_save)
