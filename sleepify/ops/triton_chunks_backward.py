"""The chunked recurrences in Triton, backward: five launches, after ``solve`` and ``carry_states`` have run again.

Notation as in ``triton_chunks``; d before a name is the gradient of it, dS that of the state behind a chunk.

    dx = P^T do + (e k) dS;   dS <- a_last dS + scale (a q)^T do - w^T dx                      chunk by chunk, backwards
    y = R^T dx;   dv = beta y;   dA = -y x^T below the diagonal;   dP = do x^T

since u - w S = x turns what reaches A through R, which is R^T (du (beta v)^T + dw (beta a k)^T) R^T, into y x^T. q, k,
beta and g follow from these by their products alone. A gate is in every decay that spans it: dg_r = sum over j < r <= i
of D_ij dD_ij, and likewise of a_i from r on and of e_j up to r.
"""
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from sleepify.ops.triton_chunks import (
    CHUNK,
    SIZES,
    decay_matrix,
    first_of,
    gates_of,
    marks_of,
    own_place,
    place,
    products,
    put_tile,
    read_matrix,
    state_cells,
    tile,
)


@triton.jit(do_not_specialize=SIZES)
def spread_back(
    q, k, g, marks, do, dx,
    q_row, q_token, k_row, k_token, n_tokens, n_heads, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P^T do, the first part of dx. Grid: pairs, chunks."""
    number, row, head, start, n_rows = own_place(n_tokens, n_heads)
    do += ((row * n_tokens + start) * n_heads + head) * VALUE
    q = first_of(q, row, head, start, q_row, q_token, KEY)
    k = first_of(k, row, head, start, k_row, k_token, KEY)
    inside = read_matrix(
        q, k, g, marks, row, head, start, n_rows, n_tokens, n_heads, number, q_token, k_token,
        scale, KEY, BLOCK_K, PRECISION,
    )  # fmt: skip
    for column in range(0, VALUE, BLOCK_V):
        grad = tile(do, n_rows, n_heads * VALUE, column, VALUE, BLOCK_V)
        value = tl.dot(tl.trans(inside), grad, input_precision=PRECISION)
        put_tile(dx + number * CHUNK * VALUE, value, CHUNK, VALUE, column, VALUE, BLOCK_V)


@triton.jit(do_not_specialize=SIZES)
def carry_back(
    q, k, marks, w, do, dfinal, dx, dstates, dinitial,
    q_row, q_token, k_row, k_token, n_tokens, n_heads, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, ALL_K: tl.constexpr, TILE_V: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all states, from the last chunk to the first, and the rest of dx. Grid: pairs, tiles of V."""
    pair, column = tl.program_id(0), tl.program_id(1) * TILE_V
    n_chunks = tl.cdiv(n_tokens, CHUNK)
    cells, exist = state_cells(0, column, ALL_K, TILE_V, KEY, VALUE)
    of_pair = pair.to(tl.int64) * KEY * VALUE
    dstate = tl.load(dfinal + of_pair + cells, mask=exist, other=0.0)
    for step in range(n_chunks):
        chunk = n_chunks - 1 - step
        number, row, head, start, n_rows = place(n_tokens, n_heads, chunk, pair)
        tl.store(dstates + number * KEY * VALUE + cells, dstate, mask=exist)
        factor = marks_of(marks, 1, number) * marks_of(marks, 3, number)
        keys = tile(first_of(k, row, head, start, k_row, k_token, KEY), n_rows, k_token, 0, KEY, ALL_K)
        keys *= factor[:, None]
        dwritten = tile(dx + number * CHUNK * VALUE, CHUNK, VALUE, column, VALUE, TILE_V)
        dwritten = tl.dot(keys, dstate, dwritten, input_precision=PRECISION)
        put_tile(dx + number * CHUNK * VALUE, dwritten, CHUNK, VALUE, column, VALUE, TILE_V)
        decay = tl.load(marks + (number * 4 + 3) * CHUNK - 1)
        factor = marks_of(marks, 0, number) * marks_of(marks, 2, number)
        queries = tile(first_of(q, row, head, start, q_row, q_token, KEY), n_rows, q_token, 0, KEY, ALL_K)
        queries *= (scale * factor)[:, None]
        grad = tile(
            do + ((row * n_tokens + start) * n_heads + head) * VALUE, n_rows, n_heads * VALUE, column, VALUE, TILE_V
        )
        dstate = tl.dot(tl.trans(queries), grad, dstate * decay, input_precision=PRECISION)
        if DELTA:
            known = tile(w + number * CHUNK * KEY, CHUNK, KEY, 0, KEY, ALL_K)
            dstate -= tl.dot(tl.trans(known), dwritten, input_precision=PRECISION)
    tl.store(dinitial + of_pair + cells, dstate, mask=exist)


@triton.jit(do_not_specialize=SIZES)
def values_back(
    q, k, v, g, beta, marks, inverse, x, do, dx, dv, dread, dpairs, partial,
    q_row, q_token, k_row, k_token, v_row, v_token, n_tokens, n_heads, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv; y over dx, in its place; dq.k products ``dread`` and dk.k products ``dpairs`` [B*H, chunks * 64, 64]; the
    parts of dg and dbeta that come from inside the chunk, ``partial`` [B*H, chunks, 2, 64]. Grid: pairs, chunks."""
    number, row, head, start, n_rows = own_place(n_tokens, n_heads)
    q = first_of(q, row, head, start, q_row, q_token, KEY)
    k = first_of(k, row, head, start, k_row, k_token, KEY)
    v = first_of(v, row, head, start, v_row, v_token, VALUE)
    do += ((row * n_tokens + start) * n_heads + head) * VALUE
    dv += ((row * n_tokens + start) * n_heads + head) * VALUE
    first = number * CHUNK
    strength = gates_of(beta, row, head, start, n_rows, n_tokens, n_heads)
    dstrength = tl.zeros((CHUNK,), tl.float32)
    dinside, dmatrix = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    if DELTA:
        solution = tl.trans(tile(inverse + first * CHUNK, CHUNK, CHUNK, 0, CHUNK, CHUNK))
    for column in range(0, VALUE, BLOCK_V):
        written = tl.trans(tile(x + first * VALUE, CHUNK, VALUE, column, VALUE, BLOCK_V))
        grad = tile(do, n_rows, n_heads * VALUE, column, VALUE, BLOCK_V)
        dinside = tl.dot(grad, written, dinside, input_precision=PRECISION)
        y = tile(dx + first * VALUE, CHUNK, VALUE, column, VALUE, BLOCK_V)
        if DELTA:
            y = tl.dot(solution, y, input_precision=PRECISION)
            put_tile(dx + first * VALUE, y, CHUNK, VALUE, column, VALUE, BLOCK_V)
            dmatrix = tl.dot(y, written, dmatrix, input_precision=PRECISION)
        dstrength += tl.sum(y * tile(v, n_rows, v_token, column, VALUE, BLOCK_V), axis=1)
        put_tile(dv, y * strength[:, None], n_rows, n_heads * VALUE, column, VALUE, BLOCK_V)

    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    decay = decay_matrix(gates_of(g, row, head, start, n_rows, n_tokens, n_heads))
    q_factor = marks_of(marks, 0, number)
    k_factor = marks_of(marks, 1, number)
    dinside *= decay * scale
    put_tile(dread + first * CHUNK, dinside, CHUNK, CHUNK, 0, CHUNK, CHUNK)
    read = products(q, k, q_token, k_token, n_rows, KEY, BLOCK_K, PRECISION) * q_factor[:, None] * k_factor[None, :]
    dspan = dinside * read
    if DELTA:
        pairs = products(k, k, k_token, k_token, n_rows, KEY, BLOCK_K, PRECISION)
        pairs *= k_factor[:, None] * k_factor[None, :]
        dmatrix = tl.where(i > j, -dmatrix * decay, 0.0)
        dstrength += tl.sum(dmatrix * pairs, axis=1)
        dmatrix *= strength[:, None]
        dspan += dmatrix * pairs
        put_tile(dpairs + first * CHUNK, dmatrix + tl.trans(dmatrix), CHUNK, CHUNK, 0, CHUNK, CHUNK)
    dspan = tl.cumsum(tl.where(i > j, dspan, 0.0), axis=0, reverse=True)
    dgate = tl.sum(tl.where(i > j, dspan, 0.0), axis=1)
    tl.store(partial + 2 * first + tl.arange(0, CHUNK), dgate)
    tl.store(partial + 2 * first + CHUNK + tl.arange(0, CHUNK), dstrength)


@triton.jit(do_not_specialize=SIZES)
def keys_back(
    q, k, beta, marks, x, y, do, states, dstates, dread, dpairs, dq, dk, partial,
    q_row, q_token, k_row, k_token, n_tokens, n_heads, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the normalised q and k, float32, for some columns of K, and these columns' parts of those of log a,
    log e and beta, ``partial`` [B*H, chunks, tiles of K, 3, 64]. Grid: pairs, chunks, tiles of K."""
    number, row, head, start, n_rows = own_place(n_tokens, n_heads)
    key_tile = tl.program_id(2)
    column_k = key_tile * BLOCK_K
    do += ((row * n_tokens + start) * n_heads + head) * VALUE
    first = number * CHUNK
    # do S^T, x dS^T, y S^T; and S dS, summed over V
    from_read, from_write = tl.zeros((CHUNK, BLOCK_K), tl.float32), tl.zeros((CHUNK, BLOCK_K), tl.float32)
    from_known, carried = tl.zeros((CHUNK, BLOCK_K), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for column in range(0, VALUE, BLOCK_V):
        cells, exist = state_cells(column_k, column, BLOCK_K, BLOCK_V, KEY, VALUE)
        state = tl.load(states + number * KEY * VALUE + cells, mask=exist, other=0.0)
        dstate = tl.load(dstates + number * KEY * VALUE + cells, mask=exist, other=0.0)
        carried += tl.sum(state * dstate, axis=1)
        grad = tile(do, n_rows, n_heads * VALUE, column, VALUE, BLOCK_V)
        from_read = tl.dot(grad, tl.trans(state), from_read, input_precision=PRECISION)
        written = tile(x + first * VALUE, CHUNK, VALUE, column, VALUE, BLOCK_V)
        from_write = tl.dot(written, tl.trans(dstate), from_write, input_precision=PRECISION)
        if DELTA:
            error = tile(y + first * VALUE, CHUNK, VALUE, column, VALUE, BLOCK_V)
            from_known = tl.dot(error, tl.trans(state), from_known, input_precision=PRECISION)

    queries = tile(first_of(q, row, head, start, q_row, q_token, KEY), n_rows, q_token, column_k, KEY, BLOCK_K)
    queries *= marks_of(marks, 0, number)[:, None]
    keys = tile(first_of(k, row, head, start, k_row, k_token, KEY), n_rows, k_token, column_k, KEY, BLOCK_K)
    keys *= marks_of(marks, 1, number)[:, None]
    since_start = marks_of(marks, 2, number)
    until_end = marks_of(marks, 3, number)
    from_read *= (scale * since_start)[:, None]
    from_write *= until_end[:, None]
    inside = tile(dread + first * CHUNK, CHUNK, CHUNK, 0, CHUNK, CHUNK)
    dqueries = tl.dot(inside, keys, from_read, input_precision=PRECISION)
    put_tile(dq + first * KEY, dqueries, CHUNK, KEY, column_k, KEY, BLOCK_K)
    dkeys = tl.dot(tl.trans(inside), queries, from_write, input_precision=PRECISION)
    dsince = tl.sum(queries * from_read, axis=1)
    duntil = tl.sum(keys * from_write, axis=1)
    rows = tl.arange(0, CHUNK)
    partial += (number * tl.num_programs(2) + key_tile) * 3 * CHUNK + rows
    if DELTA:
        strength = gates_of(beta, row, head, start, n_rows, n_tokens, n_heads)
        from_known *= since_start[:, None]
        dstrength = -tl.sum(keys * from_known, axis=1)
        dsince += strength * dstrength
        dkeys -= from_known * strength[:, None]
        dkeys = tl.dot(
            tile(dpairs + first * CHUNK, CHUNK, CHUNK, 0, CHUNK, CHUNK), keys, dkeys, input_precision=PRECISION
        )
        tl.store(partial + 2 * CHUNK, dstrength)
    # The state itself decays by the last a.
    last = tl.sum(tl.where(rows == CHUNK - 1, since_start, 0.0), axis=0)
    dsince += tl.where(rows == CHUNK - 1, last * tl.sum(carried, axis=0), 0.0)
    put_tile(dk + first * KEY, dkeys, CHUNK, KEY, column_k, KEY, BLOCK_K)
    tl.store(partial, dsince)
    tl.store(partial + CHUNK, duntil)


@triton.jit(do_not_specialize=SIZES)
def finish(
    q, k, marks, dq_normal, dk_normal, inside, partial, dq, dk, dg, dbeta,
    q_row, q_token, k_row, k_token, n_tokens, n_heads,
    KEY: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
    NORMALISE: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k, g and beta [B,T,H,...] from the parts. Grid: pairs, chunks."""
    number, row, head, start, n_rows = own_place(n_tokens, n_heads)
    first = number * CHUNK
    rows = tl.arange(0, CHUNK)
    dsince, duntil = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    dgate, dstrength = tl.load(inside + 2 * first + rows), tl.load(inside + 2 * first + CHUNK + rows)
    for part in tl.static_range(TILES):
        mine = partial + (number * TILES + part) * 3 * CHUNK + rows
        dsince += tl.load(mine)
        duntil += tl.load(mine + CHUNK)
        if DELTA:
            dstrength += tl.load(mine + 2 * CHUNK)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    dgate += tl.sum(tl.where(i >= j, dsince[:, None], 0.0), axis=0)
    dgate += tl.sum(tl.where(i < j, duntil[:, None], 0.0), axis=0)
    gates = ((row * n_tokens + start) * n_heads + head) + rows * n_heads
    tl.store(dg + gates, dgate.to(dg.dtype.element_ty), mask=rows < n_rows)
    tl.store(dbeta + gates, dstrength.to(dbeta.dtype.element_ty), mask=rows < n_rows)

    q = first_of(q, row, head, start, q_row, q_token, KEY)
    k = first_of(k, row, head, start, k_row, k_token, KEY)
    to = ((row * n_tokens + start) * n_heads + head) * KEY
    q_factor = marks_of(marks, 0, number)
    k_factor = marks_of(marks, 1, number)
    q_along, k_along = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    if NORMALISE:
        for column in range(0, KEY, BLOCK_K):
            dqueries = tile(dq_normal + first * KEY, CHUNK, KEY, column, KEY, BLOCK_K)
            q_along += tl.sum(dqueries * tile(q, n_rows, q_token, column, KEY, BLOCK_K), axis=1)
            dkeys = tile(dk_normal + first * KEY, CHUNK, KEY, column, KEY, BLOCK_K)
            k_along += tl.sum(dkeys * tile(k, n_rows, k_token, column, KEY, BLOCK_K), axis=1)
        q_along *= q_factor * q_factor
        k_along *= k_factor * k_factor
    for column in range(0, KEY, BLOCK_K):
        dqueries = tile(dq_normal + first * KEY, CHUNK, KEY, column, KEY, BLOCK_K)
        dkeys = tile(dk_normal + first * KEY, CHUNK, KEY, column, KEY, BLOCK_K)
        if NORMALISE:
            dqueries -= tile(q, n_rows, q_token, column, KEY, BLOCK_K) * q_along[:, None]
            dkeys -= tile(k, n_rows, k_token, column, KEY, BLOCK_K) * k_along[:, None]
        put_tile(dq + to, dqueries * q_factor[:, None], n_rows, n_heads * KEY, column, KEY, BLOCK_K)
        put_tile(dk + to, dkeys * k_factor[:, None], n_rows, n_heads * KEY, column, KEY, BLOCK_K)
