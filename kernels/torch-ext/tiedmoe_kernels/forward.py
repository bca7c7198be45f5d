"""The forward kernels: gather + gate_up + activation, down + weighting, and the sum over each token's K slots.

A program computes one tile of rows of one expert (`metadata.Tiles`). Rows past an expert's last are computed on its
last row and never stored, so that the loop over the contraction needs no row mask.

Shape suffixes: T tokens, H hidden size, I expert intermediate size, E experts in the pool, E1 = E + 1, K top-k,
N = T*K slots, sorted by expert, M tiles of rows; 2I are gate and up in the weights' column order. `order_N`,
`offsets_E1`, `position_N`, `expert_M` and `first_M` are those of `metadata.py`. Without a suffix: any two sizes.
"""

import triton
import triton.language as tl

from .activations import gate


@triton.jit
def tile_of(pid, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Tiles in groups of GROUP_M rows, so that neighbouring programs share weights and rows in L2."""
    per_group = GROUP_M * num_tiles_n
    first_m = (pid // per_group) * GROUP_M
    rows = tl.minimum(num_tiles_m - first_m, GROUP_M)
    inside = pid % per_group
    return first_m + inside % rows, inside // rows


@triton.jit
def rows_of_tile(tile, tiles_n, offsets_E1, expert_M, first_M, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Return a tile's expert, its sorted rows, the last row of the expert, and its tile of columns, one of tiles_n.

    An expert's tiles are grouped by themselves: a group that went on into the next expert would read both's weights.
    """
    e = tl.load(expert_M + tile // tiles_n)
    start = tl.load(offsets_E1 + e)
    end = tl.load(offsets_E1 + e + 1)
    first = tl.load(first_M + tile // tiles_n) * tiles_n
    m, n = tile_of(tile - first, tl.cdiv(end - start, BLOCK_M), tiles_n, GROUP_M)
    return e, start + m * BLOCK_M + tl.arange(0, BLOCK_M), end - 1, n


@triton.jit
def first_column(tile, N_SIZE, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Return a tile's first column. The last tile ends where the matrix ends: it repeats columns, none is masked."""
    if EVEN:
        return tl.minimum(tile * BLOCK, N_SIZE - BLOCK)
    else:  # a matrix smaller than a block
        return tile * BLOCK


@triton.jit
def load_weight(
    w, e, k0, n0, k, n, n_mask, shift, K_SIZE, N_SIZE, stride_e, stride_k, stride_n,
    TMA: tl.constexpr, K_CONTIGUOUS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_K, BLOCK_N]` of expert e's matrix `[K_SIZE, N_SIZE]`, 0 where k or the mask is out of range.

    The elements are (k, n + shift) with an int64 shift, (k0, n0 + shift) the first of them; a descriptor lies over
    `[E * rows, columns]`.
    """
    if TMA:
        if K_CONTIGUOUS:
            return tl.trans(w.load([e * N_SIZE + (n0 + shift).to(tl.int32), k0]))
        else:
            return w.load([e * K_SIZE + k0, (n0 + shift).to(tl.int32)])
    else:
        within = k.to(tl.int64)[:, None] * stride_k + n.to(tl.int64)[None, :] * stride_n
        pointers = (w + e.to(tl.int64) * stride_e + shift * stride_n) + within
        if EVEN_K and EVEN_N:
            return tl.load(pointers)
        elif EVEN_N:
            return tl.load(pointers, mask=(k < K_SIZE)[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=(k < K_SIZE)[:, None] & n_mask[None, :], other=0.0)


@triton.jit
def gate_columns(n, I, INTERLEAVED: tl.constexpr):
    """Return the columns of gate for the hidden columns n, and how far from each its column of up is, int64."""
    if INTERLEAVED:
        return 2 * n, tl.full((), 1, tl.int64)
    else:
        return n, tl.zeros((), tl.int64) + I


@triton.jit
def gate_up_bias(bias_E2I, e, n, I, INTERLEAVED: tl.constexpr):
    """Return expert e's biases of gate and of up, float32, for the hidden columns n; 0 past the last."""
    gate_n, to_up = gate_columns(n, I, INTERLEAVED)
    pointers = bias_E2I + e.to(tl.int64) * 2 * I + gate_n
    bias_gate = tl.load(pointers, mask=n < I, other=0.0).to(tl.float32)
    return bias_gate, tl.load(pointers + to_up, mask=n < I, other=0.0).to(tl.float32)


@triton.jit
def halves(tile):
    """Return the left and the right half of the columns."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def load_added(added, row, last_row, n, shift, WIDTH, EVEN_N: tl.constexpr, mask):
    """`[rows, n]` float32 of added `[N, WIDTH]`, the last row again and again past it."""
    pointers = added + tl.minimum(row, last_row).to(tl.int64)[:, None] * WIDTH + shift + n[None, :]
    if EVEN_N:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def finish_gate_up(
    acc_gate, acc_up, n, row, last_row, e, bias, added_N2I, pre_N2I, hidden_NI, I, alpha, limit,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
    SAVE_PRE: tl.constexpr, SAVE_HIDDEN: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Add to the columns n of gate and up what is to be added, store them and hidden."""
    gate_n, to_up = gate_columns(n, I, INTERLEAVED)
    mask = (row <= last_row)[:, None]
    if not EVEN_N:
        mask = mask & (n < I)[None, :]
    if HAS_BIAS:
        bias_gate, bias_up = gate_up_bias(bias, e, n, I, INTERLEAVED)
        acc_gate += bias_gate[None, :]
        acc_up += bias_up[None, :]
    if HAS_ADDED:
        acc_gate += load_added(added_N2I, row, last_row, gate_n, 0 * to_up, 2 * I, EVEN_N, mask)
        acc_up += load_added(added_N2I, row, last_row, gate_n, to_up, 2 * I, EVEN_N, mask)
    if SAVE_PRE:
        pre_row = pre_N2I + row.to(tl.int64)[:, None] * (2 * I)
        tl.store(pre_row + gate_n[None, :], acc_gate.to(pre_N2I.dtype.element_ty), mask=mask)
        tl.store(pre_row + to_up + gate_n[None, :], acc_up.to(pre_N2I.dtype.element_ty), mask=mask)
    if SAVE_HIDDEN:
        h, _, _ = gate(acc_gate, acc_up, alpha, limit, ACTIVATION)
        tl.store(hidden_NI + row.to(tl.int64)[:, None] * I + n[None, :], h.to(hidden_NI.dtype.element_ty), mask=mask)


@triton.jit
def finish_rows(
    acc, n, row, last_row, e, bias, added, weights_TK, out, order_N, N_SIZE,
    WEIGHTED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Add to the columns n what is to be added, weight the rows and store them."""
    mask = (row <= last_row)[:, None]
    if not EVEN_N:
        mask = mask & (n < N_SIZE)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + e.to(tl.int64) * N_SIZE + n, mask=n < N_SIZE, other=0.0).to(tl.float32)[None, :]
    if HAS_ADDED:
        acc += load_added(added, row, last_row, n, tl.zeros((), tl.int64), N_SIZE, EVEN_N, mask)
    if WEIGHTED:
        acc *= tl.load(weights_TK + tl.load(order_N + tl.minimum(row, last_row))).to(tl.float32)[:, None]
    tl.store(out + row.to(tl.int64)[:, None] * N_SIZE + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_up_tile(
    tile, tiles_n, x_TH, w, bias, added_N2I, pre_N2I, hidden_NI, order_N, offsets_E1, expert_M, first_M,
    H, I, stride_we, stride_wk, stride_wn, alpha, limit,
    K: tl.constexpr, ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr, SAVE_PRE: tl.constexpr, SAVE_HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, K_CONTIGUOUS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of `gate_up_kernel`; its expert has rows."""
    e, row, last_row, tile_n = rows_of_tile(tile, tiles_n, offsets_E1, expert_M, first_M, BLOCK_M, GROUP_M)
    token = (tl.load(order_N + tl.minimum(row, last_row)) // K).to(tl.int64)
    n0 = first_column(tile_n, I, BLOCK_N, EVEN_N)
    n = n0 + tl.arange(0, BLOCK_N)
    gate_n, to_up = gate_columns(n, I, INTERLEAVED)

    acc_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, H, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        pointers = x_TH + token[:, None] * H + k[None, :]
        if EVEN_K:
            a = tl.load(pointers)
        else:
            a = tl.load(pointers, mask=(k < H)[None, :], other=0.0)
        b_gate = load_weight(
            w, e, k0, n0, k, gate_n, n < I, 0 * to_up, H, 2 * I, stride_we, stride_wk, stride_wn,
            TMA, K_CONTIGUOUS, EVEN_K, EVEN_N,
        )  # fmt: skip
        b_up = load_weight(
            w, e, k0, n0, k, gate_n, n < I, to_up, H, 2 * I, stride_we, stride_wk, stride_wn,
            TMA, K_CONTIGUOUS, EVEN_K, EVEN_N,
        )  # fmt: skip
        acc_gate = tl.dot(a, b_gate, acc_gate, input_precision=PRECISION)
        acc_up = tl.dot(a, b_up, acc_up, input_precision=PRECISION)

    if HAS_ADDED:  # one half of the columns after the other: what is added to a whole tile has no room in registers
        gate_l, gate_r = halves(acc_gate)
        up_l, up_r = halves(acc_up)
        l = n0 + tl.arange(0, BLOCK_N // 2)
        finish_gate_up(
            gate_l, up_l, l, row, last_row, e, bias, added_N2I, pre_N2I, hidden_NI, I, alpha, limit,
            ACTIVATION, INTERLEAVED, HAS_BIAS, True, SAVE_PRE, SAVE_HIDDEN, EVEN_N,
        )  # fmt: skip
        finish_gate_up(
            gate_r, up_r, l + BLOCK_N // 2, row, last_row, e, bias, added_N2I, pre_N2I, hidden_NI, I, alpha, limit,
            ACTIVATION, INTERLEAVED, HAS_BIAS, True, SAVE_PRE, SAVE_HIDDEN, EVEN_N,
        )  # fmt: skip
    else:
        finish_gate_up(
            acc_gate, acc_up, n, row, last_row, e, bias, added_N2I, pre_N2I, hidden_NI, I, alpha, limit,
            ACTIVATION, INTERLEAVED, HAS_BIAS, False, SAVE_PRE, SAVE_HIDDEN, EVEN_N,
        )  # fmt: skip


@triton.jit
def used_tiles(offsets_E1, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Count the tiles of rows, of which the host makes room for more."""
    e = tl.arange(0, BLOCK_E)
    rows = tl.load(offsets_E1 + e + 1, mask=e < E, other=0) - tl.load(offsets_E1 + e, mask=e < E, other=0)
    return tl.sum((rows + BLOCK_M - 1) // BLOCK_M, axis=0)


@triton.jit
def gate_up_kernel(
    x_TH, w, bias, added_N2I, pre_N2I, hidden_NI, order_N, offsets_E1, expert_M, first_M,
    E, H, I, stride_we, stride_wk, stride_wn, alpha, limit,
    K: tl.constexpr, ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr, SAVE_PRE: tl.constexpr, SAVE_HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, K_CONTIGUOUS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pre = x[token] @ gate_up^T + bias + added, columns as the weights have them; hidden = act(gate) * up.

    A persistent program walks over the tiles; its loads for one begin before the one before is stored.
    """
    tiles_n = tl.cdiv(I, BLOCK_N)
    if PERSISTENT:
        num_tiles = used_tiles(offsets_E1, E, BLOCK_M, BLOCK_E) * tiles_n
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            gate_up_tile(
                tile, tiles_n, x_TH, w, bias, added_N2I, pre_N2I, hidden_NI, order_N, offsets_E1, expert_M, first_M,
                H, I, stride_we, stride_wk, stride_wn, alpha, limit, K, ACTIVATION, INTERLEAVED, HAS_BIAS, HAS_ADDED,
                SAVE_PRE, SAVE_HIDDEN, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, TMA, K_CONTIGUOUS, EVEN_K, EVEN_N,
                PRECISION,
            )  # fmt: skip
    elif tl.load(expert_M + tl.program_id(0) // tiles_n) >= 0:
        gate_up_tile(
            tl.program_id(0), tiles_n, x_TH, w, bias, added_N2I, pre_N2I, hidden_NI, order_N, offsets_E1, expert_M,
            first_M, H, I, stride_we, stride_wk, stride_wn, alpha, limit, K, ACTIVATION, INTERLEAVED, HAS_BIAS,
            HAS_ADDED, SAVE_PRE, SAVE_HIDDEN, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, TMA, K_CONTIGUOUS, EVEN_K, EVEN_N,
            PRECISION,
        )  # fmt: skip


@triton.jit
def rows_tile(
    tile, tiles_n, a, w, bias, added, weights_TK, out, order_N, offsets_E1, expert_M, first_M,
    K_SIZE, N_SIZE, stride_we, stride_wk, stride_wn,
    K: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, K_CONTIGUOUS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of `rows_kernel`; its expert has rows."""
    e, row, last_row, tile_n = rows_of_tile(tile, tiles_n, offsets_E1, expert_M, first_M, BLOCK_M, GROUP_M)
    a_row = tl.minimum(row, last_row)
    if GATHER:
        a_row = tl.load(order_N + a_row) // K
    a_row = a_row.to(tl.int64)
    n0 = first_column(tile_n, N_SIZE, BLOCK_N, EVEN_N)
    n = n0 + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K_SIZE, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        pointers = a + a_row[:, None] * K_SIZE + k[None, :]
        if EVEN_K:
            block = tl.load(pointers)
        else:
            block = tl.load(pointers, mask=(k < K_SIZE)[None, :], other=0.0)
        b = load_weight(
            w, e, k0, n0, k, n, n < N_SIZE, tl.zeros((), tl.int64), K_SIZE, N_SIZE, stride_we, stride_wk, stride_wn,
            TMA, K_CONTIGUOUS, EVEN_K, EVEN_N,
        )  # fmt: skip
        acc = tl.dot(block, b, acc, input_precision=PRECISION)

    if HAS_ADDED:  # as in gate_up_kernel
        left, right = halves(acc)
        l = n0 + tl.arange(0, BLOCK_N // 2)
        finish_rows(
            left, l, row, last_row, e, bias, added, weights_TK, out, order_N, N_SIZE, WEIGHTED, HAS_BIAS, True, EVEN_N
        )
        finish_rows(
            right, l + BLOCK_N // 2, row, last_row, e, bias, added, weights_TK, out, order_N, N_SIZE,
            WEIGHTED, HAS_BIAS, True, EVEN_N,
        )  # fmt: skip
    else:
        finish_rows(
            acc, n, row, last_row, e, bias, added, weights_TK, out, order_N, N_SIZE, WEIGHTED, HAS_BIAS, False, EVEN_N
        )


@triton.jit
def rows_kernel(
    a, w, bias, added, weights_TK, out, order_N, offsets_E1, expert_M, first_M,
    E, K_SIZE, N_SIZE, stride_we, stride_wk, stride_wn,
    K: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, K_CONTIGUOUS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out `[N, N_SIZE]` = (a @ expert's matrix + bias + added) * slot's weight.

    a is `[N, K_SIZE]`, or `[T, K_SIZE]` gathered. Persistent programs as in `gate_up_kernel`.
    """
    tiles_n = tl.cdiv(N_SIZE, BLOCK_N)
    if PERSISTENT:
        num_tiles = used_tiles(offsets_E1, E, BLOCK_M, BLOCK_E) * tiles_n
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            rows_tile(
                tile, tiles_n, a, w, bias, added, weights_TK, out, order_N, offsets_E1, expert_M, first_M,
                K_SIZE, N_SIZE, stride_we, stride_wk, stride_wn, K, GATHER, WEIGHTED, HAS_BIAS, HAS_ADDED,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, TMA, K_CONTIGUOUS, EVEN_K, EVEN_N, PRECISION,
            )  # fmt: skip
    elif tl.load(expert_M + tl.program_id(0) // tiles_n) >= 0:
        rows_tile(
            tl.program_id(0), tiles_n, a, w, bias, added, weights_TK, out, order_N, offsets_E1, expert_M,
            first_M, K_SIZE, N_SIZE, stride_we, stride_wk, stride_wn, K, GATHER, WEIGHTED, HAS_BIAS, HAS_ADDED,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, TMA, K_CONTIGUOUS, EVEN_K, EVEN_N, PRECISION,
        )  # fmt: skip


@triton.jit
def combine_kernel(rows_NH, position_N, out_TH, H, K: tl.constexpr, BLOCK_H: tl.constexpr):
    """Sum each token's active rows in the order of k, in float32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(K):
        place = tl.load(position_N + token * K + k).to(tl.int64)
        width = tl.where(place >= 0, H, 0)
        acc += tl.load(rows_NH + place * H + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_TH + token * H + column, acc.to(out_TH.dtype.element_ty), mask=column < H)
