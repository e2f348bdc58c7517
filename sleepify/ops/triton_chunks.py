"""The chunked recurrences in Triton, forward: four launches for any number of tokens, heads and rows.

A chunk is 64 tokens of one row and head; c is its number. With a_i = exp(g_1 + ... + g_i) and e_j = exp(g_{j+1} + ... )
inside a chunk, D_ij = exp(g_{j+1} + ... + g_i) for j <= i, S the state at the chunk's start:

    A_ij = beta_i (k_i.k_j) D_ij for j < i;   R = (I + A)^-1;   u = R (beta v);   w = R (beta a k)      parallel
    x = u - w S;   S <- a_last S + (e k)^T x                                                             chunk by chunk
    o = scale (a q) S + P x,  P_ij = scale (q_i.k_j) D_ij for j <= i                                     parallel

The gated Hebbian rule is the same with x = beta v. Tokens behind the last have g = beta = q = k = v = 0, which changes
nothing. Everything between the kernels is float32 and padded to whole chunks: [B*H, chunks * 64, ...], states
[B*H, chunks, K, V]. ``PRECISION`` is how tensor cores multiply float32 ("tf32", "tf32x3", "ieee"); they add in float32.
Each decay sums its own gates, as in ``chunking.decay_matrix``. No atomics: every result is the same in every run.
"""
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

# Kernels are compiled once for all numbers of tokens and heads, and so are those that were tried out once.
SIZES = ("n_tokens", "n_heads")
CHUNK = tl.constexpr(64)
_BLOCK = tl.constexpr(16)  # of the forward substitution
_BLOCKS = tl.constexpr(4)


@triton.jit
def place(n_tokens, n_heads, chunk, pair):
    """Of a chunk of a (row, head) pair: its number among all, row, head, first token, number of real tokens.

    In 64 bits: a long text times its channels passes 2^31.
    """
    pair, start = tl.cast(pair, tl.int64), tl.cast(chunk, tl.int64) * CHUNK
    number = pair * tl.cdiv(n_tokens, CHUNK) + chunk
    return number, pair // n_heads, pair % n_heads, start, tl.minimum(n_tokens - start, CHUNK)


@triton.jit
def own_place(n_tokens, n_heads):
    """``place`` of this program in a grid of pairs and chunks."""
    return place(n_tokens, n_heads, tl.program_id(1), tl.program_id(0))


@triton.jit
def first_of(x, row, head, start, row_stride, token_stride, WIDTH: tl.constexpr):
    """Where a chunk begins in q, k or v, whose heads and channels are adjacent in memory."""
    return x + row * row_stride + start * token_stride + head * WIDTH


@triton.jit
def tile(first, n_rows, row_stride, column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """[CHUNK, COLUMNS] in float32 from ``first``: n_rows rows and WIDTH columns exist; zeros elsewhere."""
    rows, columns = tl.arange(0, CHUNK)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    exists = (rows < n_rows) & (columns < WIDTH)
    return tl.load(first + rows * row_stride + columns, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def put_tile(first, value, n_rows, row_stride, column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of ``tile``, in the dtype of ``first``."""
    rows, columns = tl.arange(0, CHUNK)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    exists = (rows < n_rows) & (columns < WIDTH)
    tl.store(first + rows * row_stride + columns, value.to(first.dtype.element_ty), mask=exists)


@triton.jit
def state_cells(row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr):
    """Offsets [ROWS, COLUMNS] into a state [K,V] from a corner, and which of them exist."""
    rows, columns = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    return rows * VALUE + columns, (rows < KEY) & (columns < VALUE)


@triton.jit
def gates_of(gate, row, head, start, n_rows, n_tokens, n_heads):
    """[CHUNK] of g or beta [B,T,H], in float32, zeros behind the last token."""
    rows = tl.arange(0, CHUNK)
    first = gate + (row * n_tokens + start) * n_heads + head
    return tl.load(first + rows * n_heads, mask=rows < n_rows, other=0.0).to(tl.float32)


@triton.jit
def decay_matrix(gate):
    """D [CHUNK, CHUNK], zeros above the diagonal."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    total = tl.cumsum(tl.where(i > j, gate[:, None], 0.0), axis=0)
    return tl.where(i >= j, tl.exp(total), 0.0)


@triton.jit
def marks_of(marks, which: tl.constexpr, number):
    """[CHUNK] of marks [B*H, chunks, 4, 64]: 0 the factor that normalises q, 1 k; 2 a, 3 e."""
    return tl.load(marks + (number * 4 + which) * CHUNK + tl.arange(0, CHUNK))


@triton.jit
def products(
    x, y, row_stride_x, row_stride_y, n_rows, KEY: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """x_i . y_j over all of K, [CHUNK, CHUNK]. Of rows as loaded, not normalised: half precision is exact in TF32."""
    result = tl.zeros((CHUNK, CHUNK), tl.float32)
    for column in range(0, KEY, BLOCK_K):
        left = tile(x, n_rows, row_stride_x, column, KEY, BLOCK_K)
        right = tile(y, n_rows, row_stride_y, column, KEY, BLOCK_K)
        result = tl.dot(left, tl.trans(right), result, input_precision=PRECISION)
    return result


@triton.jit
def unit_lower_inverse(matrix):
    """(I + matrix)^-1 for a strictly lower triangular [CHUNK, CHUNK].

    The four blocks on the diagonal by forward substitution, all at once; then twice, from two inverses Y1, Y2 with N
    below, that of the block twice as large: [[Y1, 0], [-Y2 N Y1, Y2]]. Three TF32 products for each: an error here
    is in everything that follows.
    """
    four = tl.reshape(matrix, (_BLOCKS, _BLOCK, _BLOCKS, _BLOCK))
    over, down = tl.arange(0, _BLOCKS)[:, None, None, None], tl.arange(0, _BLOCKS)[None, None, :, None]
    diagonal = tl.sum(tl.where(over == down, four, 0.0), axis=2)
    i, j = tl.arange(0, _BLOCK)[None, :, None], tl.arange(0, _BLOCK)[None, None, :]
    inverse = tl.where(i == j, 1.0, 0.0) + tl.zeros_like(diagonal)
    for step in range(1, _BLOCK):
        factors = tl.sum(tl.where(i == step, diagonal, 0.0), axis=1)
        change = tl.sum(factors[:, :, None] * inverse, axis=1)
        inverse = tl.where(i == step, inverse - change[:, None, :], inverse)
    spread = tl.where(over == down, inverse[:, :, None, :], 0.0)
    result = tl.reshape(spread, (CHUNK, CHUNK))
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    for level in range(2):
        half = _BLOCK * (level + 1)
        below = tl.where((i // half != j // half) & (i // (2 * half) == j // (2 * half)), matrix, 0.0)
        product = tl.dot(result, below, input_precision="tf32x3")
        result -= tl.dot(product, result, input_precision="tf32x3")
    return result


@triton.jit(do_not_specialize=SIZES)
def prepare(
    q, k, g, beta, marks, inverse,
    q_row, q_token, k_row, k_token, n_tokens, n_heads,
    KEY: tl.constexpr, BLOCK_K: tl.constexpr,
    NORMALISE: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The marks of a chunk, and R. Grid: pairs, chunks."""
    number, row, head, start, n_rows = own_place(n_tokens, n_heads)
    q = first_of(q, row, head, start, q_row, q_token, KEY)
    k = first_of(k, row, head, start, k_row, k_token, KEY)
    gate = gates_of(g, row, head, start, n_rows, n_tokens, n_heads)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    q_factor, k_factor = tl.full((CHUNK,), 1.0, tl.float32), tl.full((CHUNK,), 1.0, tl.float32)
    if NORMALISE:
        q_square, k_square = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
        for column in range(0, KEY, BLOCK_K):
            q_tile = tile(q, n_rows, q_token, column, KEY, BLOCK_K)
            k_tile = tile(k, n_rows, k_token, column, KEY, BLOCK_K)
            q_square += tl.sum(q_tile * q_tile, axis=1)
            k_square += tl.sum(k_tile * k_tile, axis=1)
        q_factor, k_factor = 1 / tl.sqrt(q_square + 1e-6), 1 / tl.sqrt(k_square + 1e-6)
    first = marks + number * 4 * CHUNK + tl.arange(0, CHUNK)
    tl.store(first, q_factor)
    tl.store(first + CHUNK, k_factor)
    tl.store(first + 2 * CHUNK, tl.exp(tl.sum(tl.where(i <= j, gate[:, None], 0.0), axis=0)))
    tl.store(first + 3 * CHUNK, tl.exp(tl.sum(tl.where(i > j, gate[:, None], 0.0), axis=0)))
    if DELTA:
        strength = gates_of(beta, row, head, start, n_rows, n_tokens, n_heads)
        matrix = products(k, k, k_token, k_token, n_rows, KEY, BLOCK_K, PRECISION)
        matrix *= (strength * k_factor)[:, None] * k_factor[None, :] * decay_matrix(gate)
        result = unit_lower_inverse(tl.where(i > j, matrix, 0.0))
        put_tile(inverse + number * CHUNK * CHUNK, result, CHUNK, CHUNK, 0, CHUNK, CHUNK)


@triton.jit(do_not_specialize=SIZES)
def solve(
    k, v, beta, marks, inverse, w, u,
    k_row, k_token, v_row, v_token, n_tokens, n_heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u and w of a chunk; u = beta v alone for the Hebbian rule. Grid: pairs, chunks."""
    number, row, head, start, n_rows = own_place(n_tokens, n_heads)
    k = first_of(k, row, head, start, k_row, k_token, KEY)
    v = first_of(v, row, head, start, v_row, v_token, VALUE)
    strength = gates_of(beta, row, head, start, n_rows, n_tokens, n_heads)
    first = number * CHUNK
    if DELTA:
        solution = tile(inverse + first * CHUNK, CHUNK, CHUNK, 0, CHUNK, CHUNK)
        factor = strength * marks_of(marks, 1, number)
        factor *= marks_of(marks, 2, number)
        for column in range(0, KEY, BLOCK_K):
            keys = tile(k, n_rows, k_token, column, KEY, BLOCK_K) * factor[:, None]
            value = tl.dot(solution, keys, input_precision=PRECISION)
            put_tile(w + first * KEY, value, CHUNK, KEY, column, KEY, BLOCK_K)
    for column in range(0, VALUE, BLOCK_V):
        value = tile(v, n_rows, v_token, column, VALUE, BLOCK_V) * strength[:, None]
        if DELTA:
            value = tl.dot(solution, value, input_precision=PRECISION)
        put_tile(u + first * VALUE, value, CHUNK, VALUE, column, VALUE, BLOCK_V)


@triton.jit(do_not_specialize=SIZES)
def carry_states(
    k, marks, w, x, initial, states, final,
    k_row, k_token, n_tokens, n_heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, ALL_K: tl.constexpr, TILE_V: tl.constexpr,
    HAS_STATE: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All states, chunk after chunk, for some columns of V; x over u, in its place. Grid: pairs, tiles of V."""
    pair, column = tl.program_id(0), tl.program_id(1) * TILE_V
    n_chunks = tl.cdiv(n_tokens, CHUNK)
    cells, exist = state_cells(0, column, ALL_K, TILE_V, KEY, VALUE)
    of_pair = pair.to(tl.int64) * KEY * VALUE
    state = tl.zeros((ALL_K, TILE_V), tl.float32)
    if HAS_STATE:
        state = tl.load(initial + of_pair + cells, mask=exist, other=0.0).to(tl.float32)
    for chunk in range(n_chunks):
        number, row, head, start, n_rows = place(n_tokens, n_heads, chunk, pair)
        tl.store(states + number * KEY * VALUE + cells, state, mask=exist)
        written = tile(x + number * CHUNK * VALUE, CHUNK, VALUE, column, VALUE, TILE_V)
        if DELTA:
            known = tile(w + number * CHUNK * KEY, CHUNK, KEY, 0, KEY, ALL_K)
            written -= tl.dot(known, state, input_precision=PRECISION)
            put_tile(x + number * CHUNK * VALUE, written, CHUNK, VALUE, column, VALUE, TILE_V)
        factor = marks_of(marks, 1, number) * marks_of(marks, 3, number)
        keys = tile(first_of(k, row, head, start, k_row, k_token, KEY), n_rows, k_token, 0, KEY, ALL_K)
        keys *= factor[:, None]
        decay = tl.load(marks + (number * 4 + 3) * CHUNK - 1)
        state = tl.dot(tl.trans(keys), written, state * decay, input_precision=PRECISION)
    tl.store(final + of_pair + cells, state, mask=exist)


@triton.jit
def read_matrix(
    q, k, g, marks, row, head, start, n_rows, n_tokens, n_heads, number, q_token, k_token, scale,
    KEY: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P of a chunk; q and k point to its first token."""
    matrix = products(q, k, q_token, k_token, n_rows, KEY, BLOCK_K, PRECISION)
    matrix *= (scale * marks_of(marks, 0, number))[:, None]
    matrix *= marks_of(marks, 1, number)[None, :]
    return matrix * decay_matrix(gates_of(g, row, head, start, n_rows, n_tokens, n_heads))


@triton.jit(do_not_specialize=SIZES)
def read_out(
    q, k, g, marks, x, states, o,
    q_row, q_token, k_row, k_token, n_tokens, n_heads, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of a chunk. Grid: pairs, chunks."""
    number, row, head, start, n_rows = own_place(n_tokens, n_heads)
    q = first_of(q, row, head, start, q_row, q_token, KEY)
    k = first_of(k, row, head, start, k_row, k_token, KEY)
    o += ((row * n_tokens + start) * n_heads + head) * VALUE
    inside = read_matrix(
        q, k, g, marks, row, head, start, n_rows, n_tokens, n_heads, number, q_token, k_token,
        scale, KEY, BLOCK_K, PRECISION,
    )  # fmt: skip
    factor = scale * marks_of(marks, 0, number)
    factor *= marks_of(marks, 2, number)
    for column in range(0, VALUE, BLOCK_V):
        written = tile(x + number * CHUNK * VALUE, CHUNK, VALUE, column, VALUE, BLOCK_V)
        value = tl.dot(inside, written, input_precision=PRECISION)
        for key in range(0, KEY, BLOCK_K):
            queries = tile(q, n_rows, q_token, key, KEY, BLOCK_K) * factor[:, None]
            cells, exist = state_cells(key, column, BLOCK_K, BLOCK_V, KEY, VALUE)
            state = tl.load(states + number * KEY * VALUE + cells, mask=exist, other=0.0)
            value = tl.dot(queries, state, value, input_precision=PRECISION)
        put_tile(o, value, n_rows, n_heads * VALUE, column, VALUE, BLOCK_V)
