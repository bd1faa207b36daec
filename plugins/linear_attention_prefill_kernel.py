"""LynxLinearAttention for a prefill, chunk after chunk: products of matrices in place of a token's small sums.

With decays G_i summed up from a chunk's first token and its updates u_i (beta v, or of the delta rule beta times the
error), the state that token i sees is exp(G_i) S + sum over j of exp(G_i - G_j) k_j u_j^T. So with the delta rule

    (1 + A) u = beta (v - exp(G) k S),    A_ij = beta_i exp(G_i - G_j) k_i k_j for j < i, else 0.

Whatever needs no state `linear_attention_chunks_kernel` makes for all chunks side by side: (1 + A)^-1 by forward
substitution, the queries' products with the keys, norms and decays. `linear_attention_prefill_kernel` goes along a
sequence and has products with the state alone. float32 stays with `linear_attention_kernel`: its products have no exact
factor.

Where each key decays by itself, exp(G_i - G_j) is inside of the products of keys. As a factor of each token it would
overflow, so `linear_attention_key_chunks_kernel` sums up all pairs of a chunk by themselves, and writes the queries and
keys with their decays down, as float32 in three parts: what the next kernel multiplies with the state are these.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code=assignment
# ruff: noqa: N803, N806 -- sizes are named as in export/ops.py: T tokens, B sequences, S = T / B, N and G heads of
# states and keys, D keys by M values

import triton
import triton.language as tl

from lynx_trt.plugins.linear_attention_kernel import load_block


@triton.jit
def leading(a):
    """The leading eight bits of float32 numbers, as such and as bfloat16: cut off, for rounding takes the slow unit."""
    bits = a.to(tl.int32, bitcast=True)
    return (bits & -65536).to(tl.float32, bitcast=True), (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def thirds(a):
    """float32 as three bfloat16 whose sum it is."""
    first, high = leading(a)
    second, middle = leading(a - first)
    _, low = leading(a - first - second)
    return high, middle, low


@triton.jit
def product(a, b, added):
    """`added` and float32 by 16 bits, exact but for the sum: `a` is taken apart, into three times 8 bits or two of 11.

    Three of bfloat16 are 24 bits and cost three products of the fastest kind. Those of float16 would overflow, so that
    there the parts are of TF32, as which a float16 is exact too.
    """
    if b.dtype == tl.bfloat16:
        high, middle, low = thirds(a)
        return tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b, added)))
    exact = b.to(tl.float32)
    high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return tl.dot(high, exact, tl.dot(a - high, exact, added, input_precision="tf32"), input_precision="tf32")


@triton.jit
def store_thirds(row, value, mask, D: tl.constexpr):
    """A block of float32 in three parts, which lie D apart."""
    high, middle, low = thirds(value)
    tl.store(row, high, mask=mask)
    tl.store(row + D, middle, mask=mask)
    tl.store(row + 2 * D, low, mask=mask)


@triton.jit
def product_of_thirds(a, row, mask, D: tl.constexpr, TRANSPOSED: tl.constexpr, added):
    """`added` and float32 by float32 that lies in thirds: six products, and what is left out is below the last bit."""
    high, middle, low = thirds(a)
    b_high = tl.load(row, mask=mask, other=0.0)
    b_middle = tl.load(row + D, mask=mask, other=0.0)
    b_low = tl.load(row + 2 * D, mask=mask, other=0.0)
    if TRANSPOSED:
        b_high, b_middle, b_low = tl.trans(b_high), tl.trans(b_middle), tl.trans(b_low)
    small = tl.dot(low, b_high, tl.dot(high, b_low, tl.dot(middle, b_middle, added)))
    return tl.dot(high, b_high, tl.dot(middle, b_high, tl.dot(high, b_middle, small)))


@triton.jit
def factors_of(squares, EPSILON: tl.constexpr):
    """What queries or keys with such sums of squares are multiplied with: 1 if EPSILON is 0."""
    return 1 / tl.sqrt(squares + EPSILON) if EPSILON > 0 else tl.full(squares.shape, 1.0, tl.float32)


@triton.jit
def inverse_of(a, CHUNK: tl.constexpr):
    """(1 + A)^-1 of an A that lies transposed, rows j and columns i above them: by forward substitution."""
    place = tl.arange(0, CHUNK)
    result = (place[:, None] == place[None, :]).to(tl.float32)
    for i in range(1, CHUNK):
        entries = tl.sum(tl.where(place[None, :] == i, a, 0.0), axis=1)
        total = tl.sum(entries[:, None] * result, axis=0)
        result -= tl.where(place[:, None] == i, total[None, :], 0.0)
    return result


@triton.jit(do_not_specialize=["T", "B"])
def linear_attention_chunks_kernel(
    query,  # [T,G D] 16 bits
    key,  # [T,G D] 16 bits
    decay,  # [T,N] float32
    beta,  # [T,N] float32
    lengths,  # [B] int64
    factors,  # [T,N,4] float32, out: of q S, of k S, of k in the state after the chunk, and the chunk's whole decay
    scores,  # [T,N,CHUNK] float32, out: a token's row of what the output is of the updates, without DELTA of the values
    inverse,  # [T,N,CHUNK] float32, out: a token's row of (1 + A)^-1 beta; not written without DELTA
    T,
    B,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DELTA: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLAB: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: (N * number of chunks,) or more. What is of tokens that are not real is not written."""
    S = T // B
    chunks = (S + CHUNK - 1) // CHUNK
    head = tl.program_id(0) % N
    sequence = (tl.program_id(0) // N // chunks).to(tl.int64)
    place = tl.arange(0, CHUNK)
    token = tl.program_id(0) // N % chunks * CHUNK + place
    length = tl.minimum(tl.load(lengths + sequence, mask=sequence < B, other=0), S)
    real = token < length
    at = sequence * S + token
    at_key = (at * G + head // (N // G))[:, None] * D
    key_squares, query_squares = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    of_keys, of_queries = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
    for slab in tl.static_range(BLOCK_D // SLAB):
        row = slab * SLAB + tl.arange(0, SLAB)
        here = real[:, None] & (row < D)[None, :]
        k = tl.load(key + at_key + row[None, :], mask=here, other=0.0)
        q = tl.load(query + at_key + row[None, :], mask=here, other=0.0)
        if EPSILON > 0:
            key_squares += tl.sum(k.to(tl.float32) * k.to(tl.float32), axis=1)
            query_squares += tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1)
        # Transposed, rows j and columns i: so a row of A lies as the sum over the rows of the inverse wants it.
        of_queries = tl.dot(k, tl.trans(q), of_queries)
        if DELTA:
            of_keys = tl.dot(k, tl.trans(k), of_keys)
    key_norms, query_norms = factors_of(key_squares, EPSILON), factors_of(query_squares, EPSILON) * SCALE
    g = load_block(decay + at * N + head, real)
    b = load_block(beta + at * N + head, real)
    # Each sum by itself, not as the difference of two that may be large.
    later = place[:, None] < place[None, :]
    between = tl.exp(tl.cumsum(tl.where(later, g[None, :], 0.0), axis=1))
    between = tl.where(place[:, None] <= place[None, :], between, 0.0)
    since = tl.exp(tl.cumsum(g, axis=0))
    # The last column has those until the chunk's end.
    until = key_norms * tl.sum(tl.where(place[None, :] == CHUNK - 1, between, 0.0), axis=1)
    whole = tl.exp(tl.sum(g, axis=0))
    each = (at * N + head)[None, :] * CHUNK + place[:, None]
    rows = key_norms if DELTA else key_norms * b
    tl.store(scores + each, rows[:, None] * query_norms[None, :] * between * of_queries, mask=real[None, :])
    at_factors = factors + (at * N + head) * 4
    tl.store(at_factors, since * query_norms, mask=real)
    tl.store(at_factors + 1, since * key_norms, mask=real)
    tl.store(at_factors + 2, until if DELTA else until * b, mask=real)
    tl.store(at_factors + 3, tl.zeros([CHUNK], tl.float32) + whole, mask=real)
    if DELTA:
        a = tl.where(later, key_norms[:, None] * (b * key_norms)[None, :] * between * of_keys, 0.0)
        each = (at * N + head)[:, None] * CHUNK + place[None, :]
        tl.store(inverse + each, inverse_of(a, CHUNK) * b[None, :], mask=real[:, None])


@triton.jit(do_not_specialize=["T", "B"])
def linear_attention_key_chunks_kernel(
    query,  # [T,G D] 16 bits
    key,  # [T,G D] 16 bits
    decay,  # [T,N D] float32
    beta,  # [T,N] float32
    lengths,  # [B] int64
    factors,  # [T,N,4] float32, out: of q S, of k S, of k in the state after the chunk; norms alone
    scores,  # [T,N,CHUNK] float32, out, and so the next: as of linear_attention_chunks_kernel
    inverse,  # [T,N,CHUNK] float32
    decayed,  # [T,N,3,3,D] bfloat16, out: queries and keys since the chunk began, keys until it ends, each in thirds
    wholes,  # [T,N,D] float32, out: of a chunk's first token, the whole chunk's decay
    T,
    B,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DELTA: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLAB: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: (N * number of chunks,) or more. What is of tokens that are not real is not written."""
    S = T // B
    chunks = (S + CHUNK - 1) // CHUNK
    head = tl.program_id(0) % N
    sequence = (tl.program_id(0) // N // chunks).to(tl.int64)
    place = tl.arange(0, CHUNK)
    first = tl.program_id(0) // N % chunks * CHUNK
    token = first + place
    length = tl.minimum(tl.load(lengths + sequence, mask=sequence < B, other=0), S)
    real = token < length
    begin = sequence * S + first
    at = begin + place
    # Of the chunk's first token; rows of others are so many apart.
    keys_at, decays_at = (begin * G + head // (N // G)) * D, (begin * N + head) * D
    key_squares, query_squares = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    of_keys, of_queries = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
    for slab in tl.static_range(BLOCK_D // SLAB):
        row = slab * SLAB + tl.arange(0, SLAB)
        inside = row < D
        here = real[:, None] & inside[None, :]
        at_key = keys_at + (place * (G * D))[:, None] + row[None, :]
        at_decay = decays_at + (place * (N * D))[:, None] + row[None, :]
        k, q = load_block(key + at_key, here), load_block(query + at_key, here)
        key_squares += tl.sum(k * k, axis=1)
        query_squares += tl.sum(q * q, axis=1)
        g = load_block(decay + at_decay, here)
        since = tl.exp(tl.cumsum(g, axis=0))
        # Each sum by itself, not as the difference of two that may be large.
        later = ((token + 1 < length) & (place + 1 < CHUNK))[:, None] & inside[None, :]
        until = tl.exp(tl.cumsum(load_block(decay + N * D + at_decay, later), axis=0, reverse=True))
        thirds_at = decayed + 9 * decays_at + (place * (9 * N * D))[:, None] + row[None, :]
        store_thirds(thirds_at, q * since, here, D)
        store_thirds(thirds_at + 3 * D, k * since, here, D)
        store_thirds(thirds_at + 6 * D, k * until, here, D)
        tl.store(wholes + decays_at + row, tl.exp(tl.sum(g, axis=0)), mask=inside & (first < length))
        # From the last token to the first: what lies between it and each later one.
        between = tl.zeros([CHUNK, SLAB], tl.float32)
        for back in range(CHUNK):
            j = CHUNK - 1 - back
            there = inside & (first + j < length)
            each = tl.exp(between) * load_block(key + keys_at + j * (G * D) + row, there)[None, :]
            column = (place[None, :] == j) & (place[:, None] >= j)
            of_keys += tl.where(column, tl.sum(k * each, axis=1)[:, None], 0.0)
            of_queries += tl.where(column, tl.sum(q * each, axis=1)[:, None], 0.0)
            own = load_block(decay + decays_at + j * (N * D) + row, there)
            between += tl.where(place[:, None] >= j, own[None, :], 0.0)
    key_norms, query_norms = factors_of(key_squares, EPSILON), factors_of(query_squares, EPSILON) * SCALE
    b = load_block(beta + at * N + head, real)
    at_factors = factors + (at * N + head) * 4
    tl.store(at_factors, query_norms, mask=real)
    tl.store(at_factors + 1, key_norms, mask=real)
    tl.store(at_factors + 2, key_norms if DELTA else key_norms * b, mask=real)
    rows = key_norms if DELTA else key_norms * b
    each = (at * N + head)[:, None] * CHUNK + place[None, :]
    tl.store(scores + each, query_norms[:, None] * rows[None, :] * of_queries, mask=real[:, None])
    if DELTA:
        before = place[None, :] < place[:, None]
        a = tl.where(before, (b * key_norms)[:, None] * key_norms[None, :] * of_keys, 0.0)
        tl.store(inverse + each, inverse_of(tl.trans(a), CHUNK) * b[None, :], mask=real[:, None])


@triton.jit(do_not_specialize=["T", "B"])
def linear_attention_prefill_kernel(
    query,  # [T,G D] 16 bits
    key,  # [T,G D] 16 bits
    value,  # [T,N M] 16 bits
    past_state,  # [B,N,D,M] float32
    lengths,  # [B] int64
    factors,  # [T,N,4] float32, as the kernel before makes it, and so the next two
    scores,  # [T,N,CHUNK] float32
    inverse,  # [T,N,CHUNK] float32; not read without DELTA
    decayed,  # [T,N,3,3,D] bfloat16: in place of queries and keys; not read without PER_KEY, and so the next
    wholes,  # [T,N,D] float32
    output,  # [T,N M] 16 bits, out
    present_state,  # [B,N,D,M] float32, out
    T,
    B,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PER_KEY: tl.constexpr,
    DELTA: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: (B * N * ceil(M / BLOCK_M),). BLOCK_D is D at least.

    All is transposed, values by keys and values by tokens: so the state is each product's left factor or its sum,
    which lie alike in registers, and a warp has its values to itself.
    """
    N_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    part = tl.program_id(0) // N_TILES
    head = part % N
    sequence = (part // N).to(tl.int64)
    column = tl.program_id(0) % N_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    values = column < M
    place = tl.arange(0, CHUNK)
    S = T // B
    length = tl.minimum(tl.maximum(tl.load(lengths + sequence), 0), S)
    past_state += (sequence * N + head) * (D * M)
    present_state += (sequence * N + head) * (D * M)
    within = tl.arange(0, SLAB)[None, :] * M + column[:, None]
    state = ()
    for slab in tl.static_range(BLOCK_D // SLAB):
        row = slab * SLAB + tl.arange(0, SLAB)
        inside = (row < D)[None, :] & values[:, None]
        state = state + (tl.load(past_state + slab * SLAB * M + within, mask=inside, other=0.0),)  # noqa: RUF005
    # Places of a chunk's tokens, to go with one address of them all.
    KEYS: tl.constexpr = 9 * N if PER_KEY else G
    at_key = (place * (KEYS * D))[:, None] + tl.arange(0, SLAB)[None, :]
    at_value = (place * (N * M))[None, :] + column[:, None]
    at_row = (place * (N * CHUNK))[None, :] + place[:, None]
    at_factor = place * (N * 4)
    begin = sequence * S
    for first in range(0, length, CHUNK):
        real = first + place < length
        each = (begin + first) * N + head
        of_group = ((begin + first) * G + head // (N // G)) * D
        known, result = tl.zeros([BLOCK_M, CHUNK], tl.float32), tl.zeros([BLOCK_M, CHUNK], tl.float32)
        for slab in tl.static_range(BLOCK_D // SLAB):
            row = slab * SLAB + tl.arange(0, SLAB)
            here = real[:, None] & (row < D)[None, :]
            if PER_KEY:
                queries = decayed + each * (9 * D) + slab * SLAB + at_key
                if DELTA:
                    known = product_of_thirds(state[slab], queries + 3 * D, here, D, True, known)
                result = product_of_thirds(state[slab], queries, here, D, True, result)
            else:
                if DELTA:
                    k = tl.load(key + of_group + slab * SLAB + at_key, mask=here, other=0.0)
                    known = product(state[slab], tl.trans(k), known)
                q = tl.load(query + of_group + slab * SLAB + at_key, mask=here, other=0.0)
                result = product(state[slab], tl.trans(q), result)
        u = load_block(value + each * M + at_value, real[None, :] & values[:, None])
        if DELTA:
            u -= load_block(factors + each * 4 + 1 + at_factor, real)[None, :] * known
            u = tl.dot(u, load_block(inverse + each * CHUNK + at_row, real[None, :]), input_precision="tf32x3")
        of_chunk = tl.dot(u, load_block(scores + each * CHUNK + at_row, real[None, :]), input_precision="tf32x3")
        result = load_block(factors + each * 4 + at_factor, real)[None, :] * result + of_chunk
        there = real[None, :] & values[:, None]
        tl.store(output + each * M + at_value, result.to(output.dtype.element_ty), mask=there)
        u *= load_block(factors + each * 4 + 2 + at_factor, real)[None, :]
        whole = 1.0 if PER_KEY else tl.load(factors + each * 4 + 3)
        after = ()
        for slab in tl.static_range(BLOCK_D // SLAB):
            row = slab * SLAB + tl.arange(0, SLAB)
            here = real[:, None] & (row < D)[None, :]
            # By itself, and not into the state: small parts lose no digits, and nothing spills.
            change = tl.zeros([BLOCK_M, SLAB], tl.float32)
            if PER_KEY:
                keys = decayed + each * (9 * D) + 6 * D + slab * SLAB + at_key
                change = product_of_thirds(u, keys, here, D, False, change)
                kept = tl.load(wholes + each * D + row, mask=row < D, other=0.0)
                after = after + (kept[None, :] * state[slab] + change,)  # noqa: RUF005
            else:
                k = tl.load(key + of_group + slab * SLAB + at_key, mask=here, other=0.0)
                after = after + (whole * state[slab] + product(u, k, change),)  # noqa: RUF005
        state = after
    for first in range(length // CHUNK * CHUNK, S, CHUNK):
        there = ((first + place >= length) & (first + place < S))[None, :] & values[:, None]
        zeros = tl.zeros([BLOCK_M, CHUNK], output.dtype.element_ty)
        tl.store(output + ((begin + first) * N + head) * M + at_value, zeros, mask=there)

    # No thread may write what another has not read yet.
    tl.debug_barrier()
    for slab in tl.static_range(BLOCK_D // SLAB):
        row = slab * SLAB + tl.arange(0, SLAB)
        inside = (row < D)[None, :] & values[:, None]
        tl.store(present_state + slab * SLAB * M + within, state[slab], mask=inside)
