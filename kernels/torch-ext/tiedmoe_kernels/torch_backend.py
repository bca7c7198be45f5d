"""The three functions of a backend (`spec.py`) for a CPU, in plain torch: one GEMM per expert in use.

Rows are gathered once, sorted by expert, and every GEMM writes straight into its rows of the output. Everything
elementwise and every sum over K is in float32 (float64 for float64), whatever the dtype of the GEMMs.

Shape suffixes as in `spec.py`, n active slots of the N, m of them of one expert; P and Q are any two sizes.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_indices
from .low_rank import LowRank, Residual, offsets_of_pool
from .spec import Segment, Spec

_SUM = 0  # torch.embedding_bag's mode
_FEW_ROWS = 3  # an expert with as many goes through `_few_rows`
_PIECES = 32  # 2 to 64 are as fast on two cores; a thread takes one at least
_IN_CACHE = 1 << 16  # elements of a matrix that is read fast in any case


def forward(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    slot_map: Tensor | None,
    spec: Spec,
    save_pre: bool,
    residual: Residual | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the layer's output, and what its backward needs.

    Args:
        x: `[T, H]`; it, the projections and the biases have one dtype, the compute dtype.
        index: `[T, K]` int64 in `[0, R]`, R the width of `slot_map`, else E; R is an inactive slot.
        weights: `[T, K]`, any floating dtype; not read at inactive slots.
        gate_up: `[E, 2I, H]`, or `[E, H, 2I]` if `spec.is_transposed`.
        down: `[E, H, I]`, or `[E, I, H]` if `spec.is_transposed`.
        gate_up_bias: `[E, 2I]` or None.
        down_bias: `[E, H]` or None.
        slot_map: `[R]` int64 rows of the pool, or None. With a residual: slots of the residual.
        spec: activation and layout.
        save_pre: whether the pre-activation is to be returned.
        residual: what `low_rank.ordered_by_pool_row` makes, the compute dtype, or None.

    Returns:
        y `[T, H]` as x; pre `[N, 2I]` as x, columns as the weights have them, `[0]` without `save_pre`; order `[N]`
        int32; offsets `[E + 1]` int32, or `[R + 1]` by slot with a residual.

    Raises:
        ValueError: an index out of range.
    """
    order, offsets = _sort(index, slot_map, gate_up.size(0) if residual is None else residual.down_to_rank.size(0))
    rows, up_residual, down_residual = _rows_and_residuals(order, offsets, weights, residual, spec)
    pre = _pre_activation(x, gate_up, gate_up_bias, up_residual, rows, spec)
    gate_nI, up_nI = _halves(_wide(pre[: rows.n]), spec)
    hidden_nI = _activate(gate_nI, up_nI, spec)[0]
    weights_n1 = rows.weights(weights, gate_nI.dtype)[:, None]
    hidden_nI = hidden_nI.mul_(weights_n1).to(x.dtype)
    out_nH = _plus(_matmul(hidden_nI, _right(down, not spec.is_transposed), rows), down_residual.added(hidden_nI))
    if down_bias is not None:
        out_nH = torch.addcmul(_wide(out_nH), weights_n1, _wide(down_bias)[rows.experts()]).to(x.dtype)
    return rows.sum_per_token(out_nH), pre if save_pre else x.new_empty(0), order, offsets


def backward_data(
    grad_output: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    order: Tensor,
    offsets: Tensor,
    spec: Spec,
    needs_hidden_grad: bool,
    needs_segment: bool,
    residual: Residual | None = None,
    needs_residual_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Return every gradient but the weights', and what those need.

    Args:
        grad_output: dy `[T, H]`, the compute dtype as everything but `weights`.
        x, weights, gate_up, down, gate_up_bias, down_bias, spec, residual: as in `forward`.
        pre, order, offsets: from `forward`; a pre of `[0]` is computed again.
        needs_hidden_grad: whether grad_x is wanted.
        needs_segment: whether grad_pre and hidden are wanted.
        needs_residual_grad: whether grad_residual is wanted.

    Returns:
        grad_x `[T, H]`; grad_weights `[T, K]` as `weights`, 0 at inactive slots; grad_pre `[N, 2I]`; hidden
        `[N, I]` = w * act(gate) * up; grad_residual, the gradients of the four factors, 0 at slots not in use.
        `[0]`, and `()` of the last, for each that is not wanted.
    """
    T, K = weights.shape
    N, n = T * K, int(offsets[-1])
    rows, up_residual, down_residual = _rows_and_residuals(order, offsets, weights, residual, spec)
    if not pre.numel():
        pre = _pre_activation(x, gate_up, gate_up_bias, up_residual, rows, spec)
    gate_nI, up_nI = _halves(_wide(pre[:n]), spec)
    value_nI, grad_gate_nI, grad_up_nI = _activate(gate_nI, up_nI, spec, with_gradient=True)

    grad_rows_nH = grad_output[rows.tokens]
    grad_unweighted_nI = _matmul(grad_rows_nH, _right(down, spec.is_transposed), rows)
    grad_unweighted_nI = _wide(_plus(grad_unweighted_nI, down_residual.added_to_grad(grad_rows_nH)))
    weight_grad_n = torch.linalg.vecdot(grad_unweighted_nI, value_nI)
    if down_bias is not None:
        weight_grad_n += torch.linalg.vecdot(_wide(grad_rows_nH), _wide(down_bias)[rows.experts()])
    grad_weights = weights.new_zeros(N).index_copy_(0, rows.slots, weight_grad_n.to(weights.dtype)).view(T, K)
    if not (needs_hidden_grad or needs_segment or needs_residual_grad):
        return x.new_empty(0), grad_weights, x.new_empty(0), x.new_empty(0), ()

    weights_n1 = rows.weights(weights, gate_nI.dtype)[:, None]
    grad_hidden_nI = grad_unweighted_nI.mul_(weights_n1)
    grad_pre = x.new_empty(N, 2 * up_nI.size(1))
    to_gate_nI, to_up_nI = _halves(grad_pre[:n], spec)
    to_gate_nI.copy_(grad_gate_nI.mul_(grad_hidden_nI))
    to_up_nI.copy_(grad_up_nI.mul_(grad_hidden_nI))
    added = up_residual.added_to_grad(grad_pre[:n])
    grad_x = hidden = x.new_empty(0)
    grad_residual: tuple[Tensor, ...] = ()
    if needs_hidden_grad:
        grad_x = rows.sum_per_token(_plus(_matmul(grad_pre[:n], _right(gate_up, spec.is_transposed), rows), added))
    if needs_segment or needs_residual_grad:
        hidden = x.new_empty(N, up_nI.size(1))
        hidden[:n].copy_(value_nI.mul_(weights_n1))
    if needs_residual_grad:
        grad_residual = (
            *up_residual.gradients(x, grad_pre[:n], x_by_token=True),
            *down_residual.gradients(hidden[:n], grad_rows_nH),
        )
    if not needs_segment:
        return grad_x, grad_weights, x.new_empty(0), x.new_empty(0), grad_residual
    return grad_x, grad_weights, grad_pre, hidden, grad_residual


def backward_weight(
    segments: Sequence[Segment],
    spec: Spec,
    out_dtype: torch.dtype,
    needs: tuple[bool, bool, bool, bool],
    into: Sequence[Tensor | None] = (None,) * 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of one pool's weights over all `segments`: per expert one GEMM over all their rows.

    Args:
        segments: what the layers that read the pool have left, at least one.
        spec: as in `forward`.
        out_dtype: dtype of the gradients; the compute dtype, or float32 to keep what the GEMM accumulates.
        needs: which of gate_up, down, gate_up_bias, down_bias are wanted.
        into: for each a gradient in `out_dtype` to add to in place, or None.

    Returns:
        grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias, shaped as the weights, 0 at experts not in use, or
        the given ones that were added to; `[0]` for each that is not wanted.
    """
    first = segments[0]
    H, I = first.hidden_states.size(1), first.hidden.size(1)
    none, wide = first.hidden.new_empty(0, dtype=out_dtype), _wide(first.hidden[:0]).dtype
    all_rows = [_Rows.of(s.order, s.offsets, *s.weights.shape) for s in segments]
    rows = _Rows.merged(all_rows)

    def of_slots(name: str) -> Tensor:
        pieces = [getattr(s, name)[: r.n] for s, r in zip(segments, all_rows)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)[rows.slots]

    def of_tokens(name: str) -> Tensor:
        pieces = [getattr(s, name) for s in segments]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[rows.tokens]

    def product(slot_rows: Tensor, token_rows: Tensor, slots_first: bool, into: Tensor | None) -> Tensor:
        a, b = (slot_rows, token_rows) if slots_first else (token_rows, slot_rows)
        return _matmul_over_rows(a, b, rows, out_dtype, into)

    def sums(values: Tensor, size: int, into: Tensor | None) -> Tensor:
        found = rows.sum_per_expert(values, size)
        return found.to(out_dtype) if into is None else into.add_(found)

    grad_gate_up = grad_down = grad_gate_up_bias = grad_down_bias = none
    if needs[0]:
        grad_gate_up = product(of_slots("grad_pre"), of_tokens("hidden_states"), not spec.is_transposed, into[0])
    if needs[1]:
        grad_down = product(of_slots("hidden"), of_tokens("grad_output"), spec.is_transposed, into[1])
    if needs[2]:
        grad_gate_up_bias = sums(_wide(of_slots("grad_pre")), 2 * I, into[2])
    if needs[3]:
        weights = torch.cat([r.weights(s.weights, wide) for s, r in zip(segments, all_rows)])
        weights = weights if len(segments) == 1 else weights[rows.slots]
        grad_down_bias = sums(_wide(of_tokens("grad_output")) * weights[:, None], H, into[3])
    return grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias


class _Rows(NamedTuple):
    """Where the n active slots are, sorted by expert."""

    order: Tensor  # [N] int64
    slots: Tensor  # [n] int64, order of the active ones
    tokens: Tensor  # [n] int64
    sizes: list[int]  # rows per expert, E of them
    n: int
    T: int
    K: int

    @classmethod
    def of(cls, order: Tensor, offsets: Tensor, T: int, K: int) -> "_Rows":
        ends = offsets.tolist()
        order, n = order.long(), ends[-1]
        slots = order[:n]
        return cls(order, slots, slots // K, [b - a for a, b in itertools.pairwise(ends)], n, T, K)

    def weights(self, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the routing weight of each row, `[n]`."""
        return weights_TK.flatten()[self.slots].to(dtype)

    @classmethod
    def merged(cls, parts: "Sequence[_Rows]") -> "_Rows":
        """Return the rows of several layers sorted by expert.

        `slots` number the active rows of all layers one after the other, `tokens` their tokens.
        """
        if len(parts) == 1:
            return parts[0]
        order = torch.cat([part.experts() for part in parts]).argsort(stable=True)
        first_tokens = itertools.accumulate((part.T for part in parts[:-1]), initial=0)
        tokens = torch.cat([part.tokens + first for part, first in zip(parts, first_tokens)])[order]
        sizes = [sum(expert) for expert in zip(*(part.sizes for part in parts))]
        return cls(order, order, tokens, sizes, len(order), sum(part.T for part in parts), 1)

    def offsets(self) -> Tensor:
        """Return where each expert's rows end, `[E]` int32."""
        ends = list(itertools.accumulate(self.sizes))
        return torch.tensor(ends, dtype=torch.int32, device=self.order.device)

    def sum_per_expert(self, rows_nC: Tensor, columns: int) -> Tensor:
        """Return `[E, columns]`, each expert's sum over its rows."""
        if not self.n:
            return rows_nC.new_zeros(len(self.sizes), columns)
        return torch.stack([piece.sum(0) for piece in rows_nC.split(self.sizes)])

    def experts(self) -> Tensor:
        """Return the expert of each row, `[n]`."""
        device = self.order.device  # spelt out everywhere here: torch.set_default_device may say something else
        sizes = torch.tensor(self.sizes, device=device)
        return torch.arange(len(self.sizes), device=device).repeat_interleave(sizes)

    def sum_per_token(self, rows_nH: Tensor) -> Tensor:
        """Return `[T, H]`, each token's sum over its active slots' rows."""
        if self.T == 1:
            return rows_nH.sum(0, keepdim=True)
        position = torch.empty_like(self.order)
        position[self.order] = torch.arange(len(self.order), device=self.order.device)
        if self.n == len(self.order):
            first = torch.arange(0, len(position), self.K, device=position.device)
        else:
            is_active = (position < self.n).view(self.T, self.K)
            first = is_active.sum(1).cumsum(0).roll(1)
            first[0] = 0
            position = position[is_active.flatten()]
        return torch.embedding_bag(rows_nH, position, first, False, _SUM)[0]


def _sort(index: Tensor, slot_map: Tensor | None, E: int) -> tuple[Tensor, Tensor]:
    """Sort the slots by pool row: order `[N]` int32 (stable, inactive last) and offsets `[E + 1]` int32."""
    check_indices(index, slot_map, E)
    row = index.flatten()
    if slot_map is not None:
        row = torch.cat([slot_map, slot_map.new_full((1,), E)])[row]
    offsets = torch.zeros(E + 1, dtype=torch.int32, device=index.device)
    torch.cumsum(torch.bincount(row, minlength=E + 1)[:E], 0, out=offsets[1:])
    return row.argsort(stable=True).int(), offsets


def _rows_and_residuals(
    order: Tensor, offsets: Tensor, weights: Tensor, residual: Residual | None, spec: Spec
) -> tuple[_Rows, LowRank, LowRank]:
    """Return the rows by pool row, and what a residual adds to gate_up and to down, whose rows are sorted by slot."""
    rows = slots = _Rows.of(order, offsets_of_pool(offsets, residual), *weights.shape)
    if residual is not None and residual.first_slot is not None:
        slots = _Rows.of(order, offsets, *weights.shape)

    def product(a: Tensor, factor: Tensor, k_is_last: bool, by_token: bool) -> Tensor:
        return _matmul(a[slots.tokens] if by_token else a, _right(factor, k_is_last), slots)

    def weight_grad(a: Tensor, grad: Tensor, a_by_token: bool, grad_by_token: bool) -> Tensor:
        a, grad = a[slots.tokens] if a_by_token else a, grad[slots.tokens] if grad_by_token else grad
        first, second = (a, grad) if spec.is_transposed else (grad, a)
        return _matmul_over_rows(first, second, slots, a.dtype, None)

    factors = (None, None) if residual is None else (residual[:2], residual[2:4])
    up, down = (LowRank(pair, spec.is_transposed, product, weight_grad) for pair in factors)
    return rows, up, down


def _plus(rows: Tensor, added: Tensor | None) -> Tensor:
    return rows if added is None else rows.add_(added)


def _pre_activation(
    x: Tensor, gate_up: Tensor, bias: Tensor | None, residual: LowRank, rows: _Rows, spec: Spec
) -> Tensor:
    """Return gate and up of every active slot, `[N, 2I]`, columns as the weights have them."""
    right = _right(gate_up, not spec.is_transposed)
    x_rows = x[rows.tokens]
    pre = _plus(_matmul(x_rows, right, rows), residual.added(x_rows))
    if bias is not None:
        pre += bias[rows.experts()]
    return F.pad(pre, (0, 0, 0, len(rows.order) - rows.n)) if rows.n < len(rows.order) else pre


def _right(weight: Tensor, transpose: bool) -> Tensor:
    return weight.transpose(1, 2) if transpose else weight


def _matmul(a: Tensor, weight: Tensor, rows: _Rows) -> Tensor:
    """Multiply `a [n, P]` by each row's `weight[e] [P, Q]` -> `[n, Q]`."""
    active = [(e, size) for e, size in enumerate(rows.sizes) if size]
    pieces = _pieces(weight)
    few = _FEW_ROWS if pieces is not None else 0
    if rows.n >= len(rows.sizes) and rows.n > few * len(active) and _grouped_mm_serves(a, weight):
        return F.grouped_mm(a, weight, offs=rows.offsets())
    out = a.new_empty(a.size(0), weight.size(2))
    narrow = not _has_fast_gemm(a.dtype)
    sizes = [size for _, size in active]
    for (e, size), piece, into in zip(active, torch.split_with_sizes(a, sizes), torch.split_with_sizes(out, sizes)):
        if pieces is not None and size <= few:
            _few_rows(piece, pieces[e], into)
        elif narrow and size > 2:
            into.copy_(torch.mm(piece.float(), weight[e].float()))
        else:
            torch.mm(piece, weight[e], out=into)
    return out


def _pieces(weight: Tensor) -> Tensor | None:
    """Return `weight [E, P, Q]` as `[E, B, Q / B, P]` for `_few_rows`, or None where a plain product is as fast.

    That is: where its columns do not lie one after the other, in another dtype than float32, in a cache, without MKL.
    """
    E, P, Q = weight.shape
    is_plain = weight.stride(1) != 1 or weight.stride(2) != P or Q % _PIECES or P * Q < _IN_CACHE
    if is_plain or weight.dtype != torch.float32 or not torch.backends.mkl.is_available():
        return None
    return weight.transpose(1, 2).view(E, _PIECES, Q // _PIECES, P)


def _few_rows(x: Tensor, pieces: Tensor, out: Tensor) -> None:
    """Write x w^T as (w x^T)^T, x `[m, P]` and w in pieces `[B, Q / B, P]`, to out `[m, Q]`.

    Few rows' time is the reading of w, and MKL's batched product reads faster than its plain one: 2048x2048 and one
    row at 33 GB/s on one core of an EPYC and 60 on two, against 23 and 22; two and three rows take 1/2 and 3/4 of mm.
    """
    columns = x.T.expand(_PIECES, x.size(1), x.size(0))
    if x.size(0) == 1:
        torch.bmm(pieces, columns, out=out.view(_PIECES, -1, 1))
    else:
        out.copy_(torch.bmm(pieces, columns).flatten(0, 1).T)


def _matmul_over_rows(a: Tensor, b: Tensor, rows: _Rows, dtype: torch.dtype, into: Tensor | None) -> Tensor:
    """Multiply per expert a^T b over its rows of `a [n, P]` and `b [n, Q]` -> `[E, P, Q]` in `dtype`.

    Accumulated in float32. With `into [E, P, Q]` added to that in place, which leaves the experts not in use alone.
    """
    if into is None and dtype == a.dtype and rows.n and _grouped_mm_serves(a, b):
        return F.grouped_mm(a.T, b, offs=rows.offsets())
    out = a.new_empty(len(rows.sizes), a.size(1), b.size(1), dtype=dtype) if into is None else into
    gemm = a.dtype if a.dtype == dtype and _has_fast_gemm(dtype) else torch.promote_types(dtype, torch.float32)
    for e, (a_e, b_e) in enumerate(zip(a.split(rows.sizes), b.split(rows.sizes))):
        if not a_e.size(0):
            if into is None:
                out[e].zero_()
        elif gemm == dtype:
            torch.addmm(out[e], a_e.to(gemm).T, b_e.to(gemm), beta=0 if into is None else 1, out=out[e])
        elif into is None:
            out[e].copy_(torch.mm(a_e.to(gemm).T, b_e.to(gemm)))
        else:
            out[e].add_(torch.mm(a_e.to(gemm).T, b_e.to(gemm)))
    return out


def _grouped_mm_serves(a: Tensor, b: Tensor) -> bool:
    """Tell whether torch's loop over the experts can be used, which is C++; it wants rows of 16 bytes.

    It takes 4 % less time than ours at 4 rows an expert.
    """
    if a.dtype not in (torch.float32, torch.bfloat16) or not _has_fast_gemm(a.dtype):
        return False
    return all(t.data_ptr() % 16 == 0 and max(t.stride()) * t.element_size() % 16 == 0 for t in (a, b)) and all(
        stride == 1 or stride * t.element_size() % 16 == 0 for t in (a, b) for stride in t.stride()
    )


@functools.cache
def _has_fast_gemm(dtype: torch.dtype) -> bool:
    """Tell whether this CPU's GEMM for `dtype` beats float32's on the converted operands.

    Without the instructions (AVX-512 or AMX on x86) torch's is a plain loop: slower from three rows on, at 64 rows 7
    times.
    """
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _halves(columns: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Return gate and up, views of `[n, I]` each."""
    if spec.is_concatenated:
        I = columns.size(1) // 2
        return columns[:, :I], columns[:, I:]
    return columns[:, ::2], columns[:, 1::2]


def _activate(gate: Tensor, up: Tensor, spec: Spec, with_gradient: bool = False) -> tuple[Tensor, ...]:
    """Return act(gate) * up `[n, I]`; with its derivatives by gate and by up if `with_gradient`."""
    is_clamped = spec.activation in ("clamped_swiglu", "clamped_silu")
    limit = spec.swiglu_limit
    gate_in, up_in = gate, up
    if is_clamped:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if spec.activation == "clamped_swiglu":
        up = up + 1
        activated = F.silu(gate * spec.swiglu_alpha).div_(spec.swiglu_alpha)
    elif spec.activation in ("silu", "clamped_silu"):
        activated = F.silu(gate)
    elif spec.activation == "relu":
        activated = F.relu(gate)
    else:
        activated = F.gelu(gate, approximate="tanh" if spec.activation == "gelu_pytorch_tanh" else "none")
    if not with_gradient:
        return (activated.mul_(up),)

    aten = torch.ops.aten
    if spec.activation == "clamped_swiglu":
        grad_gate = aten.silu_backward(up, gate * spec.swiglu_alpha)
    elif spec.activation in ("silu", "clamped_silu"):
        grad_gate = aten.silu_backward(up, gate)
    elif spec.activation == "relu":
        grad_gate = aten.threshold_backward(up, gate, 0)
    else:
        grad_gate = aten.gelu_backward(
            up, gate, approximate="tanh" if spec.activation == "gelu_pytorch_tanh" else "none"
        )
    value, grad_up = activated * up, activated
    if is_clamped:  # at the limit itself the gradient passes, as torch's clamp has it
        grad_gate = grad_gate.masked_fill_(gate_in > limit, 0)
        grad_up = grad_up.masked_fill_(up_in.abs() > limit, 0)
    return value, grad_gate, grad_up
