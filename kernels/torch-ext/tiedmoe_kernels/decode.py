"""Few tokens: every active expert's weights are read once for each 16 of its slots, and nothing is sorted.

A program owns one expert and one tile of columns. It looks at all N slots itself (some KB, in L2), takes those of its
expert in chunks of BLOCK_M rows, and stores by slot. Where N < E a program is given a slot instead and returns unless
that slot is its expert's first, so that the grid is never larger than it must be.

With PDL (programmatic dependent launch, sm_90 and newer) a kernel starts while the one before still runs, and waits
for it in `gdc_wait` before it reads what that one writes. Each waits before it lets the next one start, so what was
there before all three may be read at once: the slots, and the first block of down's weights.

Shape suffixes: T tokens, H hidden size, I expert intermediate size, K top-k, N = T*K slots (buffers are by slot, not
sorted), R router width; in a program S all slots, filled up to BLOCK_S, and M the rows that it multiplies at once.
"""

import triton
import triton.language as tl

from .activations import gate
from .forward import first_column, gate_columns, gate_up_bias, load_weight
from .metadata import pool_row


@triton.jit
def _expert_of(row_S, slots_S, E, BY_SLOT: tl.constexpr):
    """Return the expert of program (., pid), E if there is nothing to do; row_S: the slots' pool rows."""
    pid = tl.program_id(1)
    if BY_SLOT:
        e = tl.sum(tl.where(slots_S == pid, row_S, 0), axis=0)
        repeats = tl.sum(((row_S == e) & (slots_S < pid)).to(tl.int32), axis=0)
        return tl.where(repeats == 0, e, E)
    else:
        return pid


@triton.jit
def _slots_of_program(
    index_TK, slot_map_R, slots_S, num_slots, R, E, HAS_SLOT_MAP: tl.constexpr, BY_SLOT: tl.constexpr
):
    """Return this program's expert, which slots are its, their ranks among those, and their number."""
    row_S = pool_row(index_TK, slot_map_R, slots_S, num_slots, R, E, HAS_SLOT_MAP)
    e = _expert_of(row_S, slots_S, E, BY_SLOT)
    mine_S = row_S == e
    return e, mine_S, tl.cumsum(mine_S.to(tl.int32), axis=0) - 1, tl.sum(mine_S.to(tl.int32), axis=0)


@triton.jit
def _slots_of(mine_S, rank_S, slots_S, first, BLOCK_M: tl.constexpr):
    """Return `[BLOCK_M]` slots of rank first, first + 1, ... among those that are mine, -1 past the last."""
    wanted_M = first + tl.arange(0, BLOCK_M)
    hit_MS = mine_S[None, :] & (rank_S[None, :] == wanted_M[:, None])
    return tl.max(tl.where(hit_MS, slots_S[None, :], -1), axis=1)


@triton.jit(do_not_specialize=["num_slots"])
def decode_gate_up_kernel(
    x_TH, w, bias, hidden_NI, index_TK, slot_map_R, num_slots, H, I, R, E,
    stride_we, stride_wk, stride_wn, alpha, limit,
    HAS_SLOT_MAP: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr, BY_SLOT: tl.constexpr, PDL: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden `[N, I]` by slot = act(gate) * up of x[token]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slots_S = tl.arange(0, BLOCK_S)
    e, mine_S, rank_S, count = _slots_of_program(index_TK, slot_map_R, slots_S, num_slots, R, E, HAS_SLOT_MAP, BY_SLOT)
    if e >= E:
        return
    n = first_column(tl.program_id(0), I, BLOCK_N, EVEN_N) + tl.arange(0, BLOCK_N)
    gate_n, to_up = gate_columns(n, I, INTERLEAVED)
    for first in range(0, count, BLOCK_M):
        slot = _slots_of(mine_S, rank_S, slots_S, first, BLOCK_M)
        token = (tl.maximum(slot, 0) // K).to(tl.int64)
        acc_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, H, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            mask = (slot >= 0)[:, None] & (k < H)[None, :]
            a = tl.load(x_TH + token[:, None] * H + k[None, :], mask=mask, other=0.0)
            b_gate = load_weight(
                w, e, k0, 0, k, gate_n, n < I, 0 * to_up, H, 2 * I, stride_we, stride_wk, stride_wn,
                False, K_CONTIGUOUS, EVEN_K, EVEN_N,
            )  # fmt: skip
            b_up = load_weight(
                w, e, k0, 0, k, gate_n, n < I, to_up, H, 2 * I, stride_we, stride_wk, stride_wn,
                False, K_CONTIGUOUS, EVEN_K, EVEN_N,
            )  # fmt: skip
            acc_gate = tl.dot(a, b_gate, acc_gate, input_precision=PRECISION)
            acc_up = tl.dot(a, b_up, acc_up, input_precision=PRECISION)
        if HAS_BIAS:
            bias_gate, bias_up = gate_up_bias(bias, e, n, I, INTERLEAVED)
            acc_gate += bias_gate[None, :]
            acc_up += bias_up[None, :]
        h, _, _ = gate(acc_gate, acc_up, alpha, limit, ACTIVATION)
        mask = (slot >= 0)[:, None] & (n < I)[None, :]
        tl.store(hidden_NI + slot.to(tl.int64)[:, None] * I + n[None, :], h.to(hidden_NI.dtype.element_ty), mask=mask)


@triton.jit
def _load_hidden(hidden_NI, a_row, k, I, EVEN_K: tl.constexpr):
    """Return `[BLOCK_M, BLOCK_K]` of hidden; a row past the last slot is that of slot 0, and is not stored."""
    pointers = hidden_NI + a_row[:, None] * I + k[None, :]
    if EVEN_K:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(k < I)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_slots"])
def decode_down_kernel(
    hidden_NI, w, bias, weights_TK, out_NH, index_TK, slot_map_R, num_slots, I, H, R, E,
    stride_we, stride_wk, stride_wn,
    HAS_SLOT_MAP: tl.constexpr, HAS_BIAS: tl.constexpr, BY_SLOT: tl.constexpr, PDL: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out `[N, H]` float32 by slot = (hidden @ down + bias) * weight of the slot."""
    slots_S = tl.arange(0, BLOCK_S)
    e, mine_S, rank_S, count = _slots_of_program(index_TK, slot_map_R, slots_S, num_slots, R, E, HAS_SLOT_MAP, BY_SLOT)
    if e >= E:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    n = first_column(tl.program_id(0), H, BLOCK_N, EVEN_N) + tl.arange(0, BLOCK_N)
    first_k = tl.arange(0, BLOCK_K)
    if PDL:
        first_b = load_weight(
            w, e, 0, 0, first_k, n, n < H, tl.zeros((), tl.int64), I, H, stride_we, stride_wk, stride_wn,
            False, K_CONTIGUOUS, EVEN_K, EVEN_N,
        )  # fmt: skip
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for first in range(0, count, BLOCK_M):
        slot = _slots_of(mine_S, rank_S, slots_S, first, BLOCK_M)
        a_row = tl.maximum(slot, 0).to(tl.int64)
        if PDL:
            first_a = _load_hidden(hidden_NI, a_row, first_k, I, EVEN_K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(BLOCK_K if PDL else 0, I, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            a = _load_hidden(hidden_NI, a_row, k, I, EVEN_K)
            b = load_weight(
                w, e, k0, 0, k, n, n < H, tl.zeros((), tl.int64), I, H, stride_we, stride_wk, stride_wn,
                False, K_CONTIGUOUS, EVEN_K, EVEN_N,
            )  # fmt: skip
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if PDL:  # last: the loop's first loads do not wait for it
            acc = tl.dot(first_a, first_b, acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias + e.to(tl.int64) * H + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
        acc *= tl.load(weights_TK + a_row).to(tl.float32)[:, None]
        mask = (slot >= 0)[:, None] & (n < H)[None, :]
        tl.store(out_NH + a_row[:, None] * H + n[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["num_slots"])
def decode_combine_kernel(
    rows_NH, index_TK, slot_map_R, out_TH, num_slots, H, R, E,
    HAS_SLOT_MAP: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out `[T, H]`: the sum of each token's active rows `[N, H]` in the order of k, in float32."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(K):
        slot = token * K + k
        width = tl.where(pool_row(index_TK, slot_map_R, slot, num_slots, R, E, HAS_SLOT_MAP) < E, H, 0)
        acc += tl.load(rows_NH + slot * H + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_TH + token * H + column, acc.to(out_TH.dtype.element_ty), mask=column < H)
