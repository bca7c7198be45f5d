"""The backward kernels: through the activation to the pre-activation, and the weight gradients of a whole group.

The products with down and gate_up are `rows_kernel`, the sum over a token's slots is `combine_kernel` (`forward.py`).
Every sum is in a fixed order, so two runs are equal bit by bit.

Shape suffixes: T tokens, H hidden size, I expert intermediate size, E experts in the pool, E1 = E + 1, K top-k,
N = T*K slots, sorted by expert, P and Q any two sizes; 2I are gate and up in the weights' column order. `order_N` and
`offsets_E1` are those of `metadata.py`. Tuples hold one tensor a segment (`spec.py`).
"""

import triton
import triton.language as tl

from .activations import gate
from .forward import first_column, gate_columns, halves, tile_of


@triton.jit(do_not_specialize=["num_slots"])
def gate_backward_kernel(
    pre_N2I, hidden_NI, grad_pre_N2I, weights_TK, grad_weights_TK, grad_output_TH, bias_EH, order_N, offsets_E1,
    num_slots, H, I, E, alpha, limit,
    K: tl.constexpr, ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One sorted row, whose hidden holds a = dy[token] @ down: hidden becomes w h, grad_pre w a dh/d(pre).

    grad_weights `[N]` by slot: <dy, down h + bias> = <a, h> + <dy, bias>; 0 where the slot is inactive.
    """
    row = tl.program_id(0)
    slot = tl.load(order_N + row)
    if row >= tl.load(offsets_E1 + E):
        tl.store(grad_weights_TK + slot, 0.0)
        return
    weight = tl.load(weights_TK + slot).to(tl.float32)
    hidden_NI += row.to(tl.int64) * I
    pre_N2I += row.to(tl.int64) * (2 * I)
    grad_pre_N2I += row.to(tl.int64) * (2 * I)

    products = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, I, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        gate_i, to_up = gate_columns(i, I, INTERLEAVED)
        mask = i < I
        a = tl.load(hidden_NI + i, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(pre_N2I + gate_i, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(pre_N2I + to_up + gate_i, mask=mask, other=0.0).to(tl.float32)
        # Several threads may hold the same elements of a short row: all must have read before one writes in place.
        tl.debug_barrier()
        h, dh_dg, dh_du = gate(g, u, alpha, limit, ACTIVATION)
        products += a * h
        grad_h = a * weight
        tl.store(grad_pre_N2I + gate_i, (grad_h * dh_dg).to(grad_pre_N2I.dtype.element_ty), mask=mask)
        tl.store(grad_pre_N2I + to_up + gate_i, (grad_h * dh_du).to(grad_pre_N2I.dtype.element_ty), mask=mask)
        tl.store(hidden_NI + i, (weight * h).to(hidden_NI.dtype.element_ty), mask=mask)
    grad_weight = tl.sum(products, axis=0)

    if HAS_BIAS:
        expert = tl.arange(0, BLOCK_E)
        end = tl.load(offsets_E1 + 1 + expert, mask=expert < E, other=num_slots + 1)
        e = tl.sum((end <= row).to(tl.int32), axis=0)
        bias_EH += e.to(tl.int64) * H
        grad_output_TH += (slot // K).to(tl.int64) * H
        shares = tl.zeros((BLOCK_H,), tl.float32)
        for start in range(0, H, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H)
            dy = tl.load(grad_output_TH + column, mask=column < H, other=0.0).to(tl.float32)
            shares += dy * tl.load(bias_EH + column, mask=column < H, other=0.0).to(tl.float32)
        grad_weight += tl.sum(shares, axis=0)
    tl.store(grad_weights_TK + slot, grad_weight.to(grad_weights_TK.dtype.element_ty))


@triton.jit
def output_tile(out_EPQ, e, p, q, first_p, first_q, P, Q):
    """Pointers to the tile (p, q) of out `[E, P, Q]`; which are no other tile's: the last one repeats columns."""
    pointers = out_EPQ + (e.to(tl.int64) * P + p.to(tl.int64)[:, None]) * Q + q[None, :]
    return pointers, ((p >= first_p) & (p < P))[:, None] & ((q >= first_q) & (q < Q))[None, :]


@triton.jit
def add_to(out_EPQ, tile, e, p, q, first_p, first_q, P, Q):
    """Add the tile (p, q) to out `[E, P, Q]`."""
    pointers, mine = output_tile(out_EPQ, e, p, q, first_p, first_q, P, Q)
    tile += tl.load(pointers, mask=mine, other=0.0).to(tl.float32)
    tl.store(pointers, tile.to(out_EPQ.dtype.element_ty), mask=mine)


@triton.jit
def next_segment(first, number, row, rest, offsets, e):
    """Of the first segment from `first` on with rows of expert e: number, first row, rows; else what was given."""
    for s in tl.static_range(len(offsets) - 1, -1, -1):
        start = tl.load(offsets[s] + e)
        num_rows = tl.load(offsets[s] + e + 1) - start
        if (s >= first) & (num_rows > 0):
            number = tl.full((), s, tl.int32)
            row = start
            rest = num_rows
    return number, row, rest


@triton.jit
def of_segment(tensors, number):
    """One segment's tensor, chosen at every block: triton 3.6 fails for AMD on pointers that a loop carries."""
    found = tensors[0]
    for s in tl.static_range(1, len(tensors)):
        found = tl.where(number == s, tensors[s], found)
    return found


@triton.jit
def load_slots(order_N, row, rest, i):
    """Load the slots of the sorted rows row + i; the last one again from i = rest on; nothing is read without any."""
    return tl.load(order_N + row + tl.minimum(i, tl.maximum(rest - 1, 0)), mask=rest > 0 * i, other=0)


@triton.jit
def load_rows(
    rows, row, rest, i, slot, column, SIZE: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """`[BLOCK_K, columns]`: the rows of the slots' tokens, or the sorted rows row + i, 0 from i = rest on.

    Zeros in one operand are enough, and the sorted one needs them: its rows past the last active one are undefined.
    """
    if GATHER:
        pointers = (rows + column)[None, :] + (slot.to(tl.uint32) // K).to(tl.uint64)[:, None] * SIZE
        if EVEN:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(column < SIZE)[None, :], other=0.0)
    else:
        pointers = rows + row.to(tl.int64) * SIZE + (i[:, None] * SIZE + column[None, :])
        mask = (i < rest)[:, None]
        if not EVEN:
            mask = mask & (column < SIZE)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def weight_grad_kernel(
    a_segments, b_segments, orders, offsets, out_EPQ, P: tl.constexpr, Q: tl.constexpr, E,
    K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out `[E, P, Q]`: per expert A^T B over the rows of all segments, in float32; written once or added to out.

    A segment's A `[., P]` and B `[., Q]` are read by sorted row, or by the row's token, order // K, where gathered.

    One loop over the blocks of all segments, so that the pipeline of loads fills once; a segment's tail is a block
    with zeros in it. The slots of a block are loaded during the one before: an indirect load would take a stage.
    """
    tiles_p = tl.cdiv(P, BLOCK_M)
    tiles_q = tl.cdiv(Q, BLOCK_N)
    e = tl.program_id(0) // (tiles_p * tiles_q)
    tile_p, tile_q = tile_of(tl.program_id(0) % (tiles_p * tiles_q), tiles_p, tiles_q, GROUP_M)
    p = first_column(tile_p, P, BLOCK_M, EVEN) + tl.arange(0, BLOCK_M)
    first_q = first_column(tile_q, Q, BLOCK_N, EVEN)
    q = first_q + tl.arange(0, BLOCK_N)

    num_blocks = 0
    for s in tl.static_range(len(orders)):
        num_blocks += tl.cdiv(tl.load(offsets[s] + e + 1) - tl.load(offsets[s] + e), BLOCK_K)
    if ADD:  # noqa: SIM102  # a constexpr: what is inside is not compiled without it
        if num_blocks == 0:
            return

    i = tl.arange(0, BLOCK_K)
    zero = tl.zeros((), tl.int32)
    number, row, rest = next_segment(0, zero, zero, zero, offsets, e)
    slot = load_slots(of_segment(orders, number), row, rest, i)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(num_blocks):
        a = load_rows(of_segment(a_segments, number), row, rest, i, slot, p, P, K, GATHER_A, EVEN)
        b = load_rows(of_segment(b_segments, number), row, rest, i, slot, q, Q, K, GATHER_B, EVEN)
        row += BLOCK_K
        rest -= BLOCK_K
        if rest <= 0:
            number, row, rest = next_segment(number + 1, number, row, rest, offsets, e)
        slot = load_slots(of_segment(orders, number), row, rest, i)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

    if ADD:  # one half of the columns after the other: the old gradient of the whole tile has no room in registers
        left, right = halves(acc)
        add_to(out_EPQ, left, e, p, first_q + tl.arange(0, BLOCK_N // 2), tile_p * BLOCK_M, tile_q * BLOCK_N, P, Q)
        first_q += BLOCK_N // 2
        add_to(out_EPQ, right, e, p, first_q + tl.arange(0, BLOCK_N // 2), tile_p * BLOCK_M, tile_q * BLOCK_N, P, Q)
    else:
        pointers, mine = output_tile(out_EPQ, e, p, q, tile_p * BLOCK_M, tile_q * BLOCK_N, P, Q)
        tl.store(pointers, acc.to(out_EPQ.dtype.element_ty), mask=mine)


@triton.jit
def bias_grad_kernel(
    a_segments, weights, orders, offsets, out_EP, P,
    K: tl.constexpr, GATHER: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out `[E, P]`: per expert the sum of A's rows over all segments; gathered rows count with their slot's weight."""
    e = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for s in tl.static_range(len(a_segments)):
        start = tl.load(offsets[s] + e)
        end = tl.load(offsets[s] + e + 1)
        for r0 in range(start, end, BLOCK_M):
            row = r0 + tl.arange(0, BLOCK_M)
            a_row = row.to(tl.int64)
            if GATHER:
                slot = tl.load(orders[s] + row, mask=row < end, other=0)
                a_row = (slot // K[s]).to(tl.int64)
            mask = (row < end)[:, None] & (column < P)[None, :]
            a = tl.load(a_segments[s] + a_row[:, None] * P + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if GATHER:
                a *= tl.load(weights[s] + slot, mask=row < end, other=0.0).to(tl.float32)[:, None]
            acc += tl.sum(a, axis=0)
    pointers = out_EP + e.to(tl.int64) * P + column
    if ADD:
        acc += tl.load(pointers, mask=column < P, other=0.0).to(tl.float32)
    tl.store(pointers, acc.to(out_EP.dtype.element_ty), mask=column < P)
