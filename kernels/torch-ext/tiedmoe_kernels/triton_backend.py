"""The three functions of a backend (`spec.py`) on a GPU: what is launched, on which grid, with which tiles.

Nothing here reads a tensor, so nothing waits for the device. A result is the same bit by bit at every run.

Shape suffixes as in `spec.py`.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import backward as bwd
from . import decode, metadata, tuning
from . import forward as fwd
from .low_rank import LowRank, Residual, offsets_of_pool
from .spec import Segment, Spec

MAX_DECODE_SLOTS = 256  # beyond this, sorting once costs less than every program's look at all slots
_DECODE_ROWS = 16  # an expert's slots that one read of its weights serves
_SEGMENTS_PER_LAUNCH = 8  # more unrolled loops make no faster kernel, only a longer one
_ROW_COLUMNS = 1024
_LONG = 2**16  # a contraction over rows, whose number only the device knows: no block is cut to it


class _Matrices:
    """The experts' matrices `[K_SIZE, N_SIZE]` of a projection as a kernel reads them: pointer or descriptor, strides.

    The last dimension of `weight` is the one that is contiguous: a transposed view is taken as what it is a view of.
    """

    def __init__(self, weight: Tensor, k_is_last: bool):
        if weight.stride(2) != 1:
            weight, k_is_last = weight.mT, not k_is_last
        self.weight, self.k_is_last = weight, k_is_last
        self.n_size, self.k_size = weight.shape[1:] if k_is_last else reversed(weight.shape[1:])

    def can_use_tma(self) -> bool:
        """Whether a tensor descriptor can lie over the rows of all experts as over one matrix."""
        (e, row, column), (_, rows, columns) = self.weight.stride(), self.weight.shape
        is_one_matrix = e == rows * row and row >= columns and column == 1
        return is_one_matrix and row * self.weight.element_size() % 16 == 0 and self.weight.data_ptr() % 16 == 0

    def flags(self, config: tuning.Config, n_size: int) -> tuple[tuple[str, bool], ...]:
        """Return the kernel's flags; `n_size` columns are tiled (I, where gate and up are two halves)."""
        return (
            ("K_CONTIGUOUS", self.k_is_last),
            ("EVEN_K", self.k_size % config.block_k == 0),
            ("EVEN_N", n_size >= config.block_n),
        )

    def arguments(self, config: tuning.Config, n_size: int) -> tuple[object, dict]:
        """Return the kernel's argument `w` and its flags."""
        flags = dict(self.flags(config, n_size))
        if not config.tma:
            return self.weight, flags
        block = [config.block_n, config.block_k] if self.k_is_last else [config.block_k, config.block_n]
        return TensorDescriptor.from_tensor(self.weight.flatten(0, 1), block), flags

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of the expert, of k and of n, in elements."""
        e, first, last = self.weight.stride()
        return (e, last, first) if self.k_is_last else (e, first, last)


class _Rows:
    """The sorted rows of one call, and the tile maps that its kernels share."""

    def __init__(self, order: Tensor, offsets: Tensor, top_k: int):
        self.order, self.offsets, self.top_k = order, offsets, top_k
        self.N, self.E = order.numel(), offsets.numel() - 1
        self.made: dict[int, metadata.Tiles] = {}

    def tiles(self, block_m: int) -> metadata.Tiles:
        if block_m not in self.made:
            self.made[block_m] = metadata.make_tiles(self.offsets, self.N, block_m)
        return self.made[block_m]

    def num_tiles(self, block_m: int) -> int:
        return metadata.num_row_tiles(self.N, self.E, block_m)


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
    """y `[T, H]`, pre `[N, 2I]` or `[0]`, order `[N]` int32, offsets int32; see `torch_backend.py`.

    Without `save_pre`, up to `MAX_DECODE_SLOTS` slots over enough experts are computed without sorting them, unless
    there is a residual; order and offsets are then undefined.
    """
    x, index, weights = x.contiguous(), index.contiguous(), weights.contiguous()
    (T, K), E, H = index.shape, gate_up.size(0), x.size(1)
    decodes = not save_pre and residual is None and 0 < T * K <= MAX_DECODE_SLOTS
    with _on_device_of(x):
        if decodes and metadata.cdiv(T * K, min(T * K, E)) <= _DECODE_ROWS:
            y = _decode(x, index, weights, gate_up, down, gate_up_bias, down_bias, slot_map, spec)
            return (
                y,
                x.new_empty(0),
                index.new_empty(T * K, dtype=torch.int32),
                index.new_empty(E + 1, dtype=torch.int32),
            )
        num_slots = E if residual is None else residual.down_to_rank.size(0)
        block_m, tiles = _gate_up_config(x, gate_up, T * K, E, spec).block_m if T * K else 0, None
        if block_m and (residual is None or residual.first_slot is None):  # one launch less: offsets are the pool's
            tiles = metadata.empty_tiles(T * K, num_slots, block_m, x.device)
        order, offsets, position = metadata.sort_slots(index, slot_map, num_slots, tiles, block_m)
        rows, up_residual, down_residual = _rows_and_residuals(order, offsets, weights, residual, spec)
        if tiles is not None:
            rows.made[block_m] = tiles
        added = up_residual.added(x, by_token=True)
        pre, hidden = _gate_up(x, gate_up, gate_up_bias, rows, spec, save_pre, save_hidden=True, added=added)
        added = down_residual.added(hidden)
        out = _rows(hidden, _Matrices(down, not spec.is_transposed), down_bias, weights, rows, added=added)
        return _combine(out, position, (T, K, H)), pre, order, offsets


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
    """grad_x `[T, H]` or `[0]`, grad_weights `[T, K]`, grad_pre `[N, 2I]`, hidden `[N, I]`, grad_residual.

    See `torch_backend.py`. An empty pre is computed again. grad_pre and hidden are returned in any case: the others
    are made from them.
    """
    x, grad_output, weights = x.contiguous(), grad_output.contiguous(), weights.contiguous()
    (T, K), H, (N, two_i) = weights.shape, x.size(1), (order.numel(), _two_i(gate_up, spec))
    grad_residual: tuple[Tensor, ...] = ()
    if N == 0:
        if residual is not None and needs_residual_grad:
            grad_residual = tuple(torch.zeros_like(factor) for factor in residual[:4])
        grad_x = torch.zeros_like(x) if needs_hidden_grad else x.new_empty(0)
        return grad_x, torch.empty_like(weights), x.new_empty(N, two_i), x.new_empty(N, two_i // 2), grad_residual
    with _on_device_of(x):
        rows, up_residual, down_residual = _rows_and_residuals(order, offsets, weights, residual, spec)
        if pre.numel() == 0:
            added = up_residual.added(x, by_token=True)
            pre, _ = _gate_up(x, gate_up, gate_up_bias, rows, spec, save_pre=True, save_hidden=False, added=added)
        added = down_residual.added_to_grad(grad_output, by_token=True)
        matrices = _Matrices(down, k_is_last=spec.is_transposed)
        hidden = _rows(grad_output, matrices, None, None, rows, gather=True, added=added)
        grad_weights, grad_pre = _gate_backward(grad_output, down_bias, weights, pre, hidden, rows, spec)
        added = up_residual.added_to_grad(grad_pre) if needs_hidden_grad or needs_residual_grad else None
        if needs_residual_grad:
            grad_residual = (
                *up_residual.gradients(x, grad_pre, x_by_token=True),
                *down_residual.gradients(hidden, grad_output, grad_by_token=True),
            )
        if not needs_hidden_grad:
            return x.new_empty(0), grad_weights, grad_pre, hidden, grad_residual
        out = _rows(grad_pre, _Matrices(gate_up, k_is_last=spec.is_transposed), None, None, rows, added=added)
        grad_x = _combine(out, metadata.invert(order, offsets), (T, K, H))
        return grad_x, grad_weights, grad_pre, hidden, grad_residual


def backward_weight(
    segments: list[Segment],
    spec: Spec,
    out_dtype: torch.dtype,
    needs: tuple[bool, bool, bool, bool],
    into: Sequence[Tensor | None] = (None,) * 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of gate_up, down and their biases over all segments, `[0]` where not needed.

    See `torch_backend.py`.
    """
    parts = [segments[i : i + _SEGMENTS_PER_LAUNCH] for i in range(0, len(segments), _SEGMENTS_PER_LAUNCH)]
    if len(parts) > 1:  # their sum is made in float32, whatever it is written in
        sums: Sequence[Tensor | None] = (None,) * 4
        for part in parts:
            sums = tuple(
                g if need else None for g, need in zip(backward_weight(part, spec, torch.float32, needs, sums), needs)
            )
        empty = segments[0].hidden.new_empty(0, dtype=out_dtype)
        grads = [empty if g is None else g.to(out_dtype) if old is None else old.add_(g) for g, old in zip(sums, into)]
        return grads[0], grads[1], grads[2], grads[3]
    segments = [
        s._replace(hidden_states=s.hidden_states.contiguous(), grad_output=s.grad_output.contiguous())
        for s in segments
    ]
    group = _Group(segments, out_dtype)
    x, dy = tuple(s.hidden_states for s in segments), tuple(s.grad_output for s in segments)
    grad_pre, hidden = tuple(s.grad_pre for s in segments), tuple(s.hidden for s in segments)
    weights = tuple(s.weights for s in segments)
    empty = hidden[0].new_empty(0, dtype=out_dtype)
    with _on_device_of(empty):
        return (
            _weight_grad(x, grad_pre, group, spec.is_transposed, into[0]) if needs[0] else empty,
            _weight_grad(dy, hidden, group, not spec.is_transposed, into[1]) if needs[1] else empty,
            _bias_grad(grad_pre, None, group, into[2]) if needs[2] else empty,
            _bias_grad(dy, weights, group, into[3]) if needs[3] else empty,
        )


class _Group:
    """What the weight gradients of all segments have in common."""

    def __init__(self, segments: list[Segment], out_dtype: torch.dtype):
        self.orders, self.offsets = tuple(s.order for s in segments), tuple(s.offsets for s in segments)
        self.top_k, self.out_dtype = tuple(s.weights.size(1) for s in segments), out_dtype
        self.E, self.N = self.offsets[0].numel() - 1, max(1, sum(order.numel() for order in self.orders))
        # The weight gradient's kernel takes one K for all segments: where they differ it is handed tokens, not slots.
        one_k = len(set(self.top_k)) == 1
        self.gather_k = self.top_k[0] if one_k else 1
        self.gather_orders = self.orders if one_k else tuple(o // k for o, k in zip(self.orders, self.top_k))


def _on_device_of(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _block_of_row(size: int) -> tuple[int, int]:
    """Columns of a row that a program takes at once, and warps for them; both powers of two, as triton wants them."""
    block = min(_ROW_COLUMNS, metadata.next_power_of_2(size))
    return block, max(1, min(4, block // 32))


def _two_i(gate_up: Tensor, spec: Spec) -> int:
    return gate_up.size(2 if spec.is_transposed else 1)


def _precision(like: Tensor) -> str:
    """As torch's own matmul: full float32 unless torch is told otherwise, by its old switches or its new ones."""
    if like.dtype != torch.float32:
        return "ieee"
    allowed = torch.backends.cuda.matmul.fp32_precision
    if allowed == "none":
        allowed = getattr(torch.backends, "fp32_precision", "none")
    has_tf32 = torch.version.hip is None or tuning.architecture() == "gfx942"
    return "tf32" if allowed == "tf32" and has_tf32 else "ieee"


def _choose(kernel: str, like: Tensor, N: int, E: int, n_size: int, k_size: int, tma: bool = False) -> tuning.Config:
    rows_per_expert = metadata.next_power_of_2(metadata.cdiv(N, min(N, E)))  # rounded: fewer entries in the cache
    index = like.device.index if like.is_cuda else None
    return tuning.choose(kernel, like.element_size(), rows_per_expert, n_size, k_size, tma, index)


def _options(config: tuning.Config, like: Tensor) -> dict:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PRECISION": _precision(like),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _rows_and_residuals(
    order: Tensor, offsets: Tensor, weights: Tensor, residual: Residual | None, spec: Spec
) -> tuple[_Rows, LowRank, LowRank]:
    """Return the rows by pool row, and what a residual adds to gate_up and to down, whose rows go by slot."""
    rows = slots = _Rows(order, offsets, weights.size(1))
    if residual is not None and residual.first_slot is not None:
        rows = _Rows(order, offsets_of_pool(offsets, residual), weights.size(1))

    def product(a: Tensor, factor: Tensor, k_is_last: bool, by_token: bool) -> Tensor:
        return _rows(a, _Matrices(factor, k_is_last), None, None, slots, gather=by_token)

    def weight_grad(a: Tensor, grad: Tensor, a_by_token: bool, grad_by_token: bool) -> Tensor:
        group = _Group([Segment(a, grad, grad, a, order, offsets, weights)], a.dtype)
        if grad_by_token:
            return _weight_grad((grad,), (a,), group, not spec.is_transposed, None)
        return _weight_grad((a,), (grad,), group, spec.is_transposed, None, gather=a_by_token)

    factors = (None, None) if residual is None else (residual[:2], residual[2:4])
    up, down = (LowRank(pair, spec.is_transposed, product, weight_grad) for pair in factors)
    return rows, up, down


def _grid(rows: _Rows, config: tuning.Config, n_size: int, like: Tensor) -> tuple[int]:
    """Return the programs of a grouped GEMM: one a tile, or a processor."""
    num_programs = rows.num_tiles(config.block_m) * metadata.cdiv(n_size, config.block_n)
    if config.persistent:
        num_programs = min(num_programs, tuning.num_processors(like.device.index if like.is_cuda else None))
    return (num_programs,)


def _gate_up_config(x: Tensor, gate_up: Tensor, N: int, E: int, spec: Spec) -> tuning.Config:
    tma = spec.is_concatenated and _Matrices(gate_up, k_is_last=not spec.is_transposed).can_use_tma()
    return _choose("gate_up", x, N, E, _two_i(gate_up, spec) // 2, x.size(1), tma)


def _gate_up(
    x, gate_up, bias, rows: _Rows, spec: Spec, save_pre: bool, save_hidden: bool, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """pre `[N, 2I]` and hidden `[N, I]`, `[0]` where not saved; `added [N, 2I]` is part of pre."""
    matrices, I = _Matrices(gate_up, k_is_last=not spec.is_transposed), _two_i(gate_up, spec) // 2
    pre = x.new_empty((rows.N, 2 * I) if save_pre else 0)
    hidden = x.new_empty((rows.N, I) if save_hidden else 0)
    if rows.N == 0:
        return pre, hidden
    config = _gate_up_config(x, gate_up, rows.N, rows.E, spec)
    w, flags = matrices.arguments(config, I)
    fwd.gate_up_kernel[_grid(rows, config, I, x)](
        x, w, bias, added, pre, hidden, rows.order, rows.offsets, *rows.tiles(config.block_m),
        rows.E, x.size(1), I, *matrices.strides, spec.swiglu_alpha, spec.swiglu_limit,
        K=rows.top_k, ACTIVATION=spec.activation, INTERLEAVED=not spec.is_concatenated, HAS_BIAS=bias is not None,
        HAS_ADDED=added is not None, SAVE_PRE=save_pre, SAVE_HIDDEN=save_hidden,
        BLOCK_E=metadata.next_power_of_2(rows.E), GROUP_M=config.group_m, TMA=config.tma,
        PERSISTENT=config.persistent, **flags, **_options(config, x),
    )  # fmt: skip
    return pre, hidden


def _rows(
    a: Tensor,
    matrices: _Matrices,
    bias: Tensor | None,
    weights: Tensor | None,
    rows: _Rows,
    gather: bool = False,
    added: Tensor | None = None,
) -> Tensor:
    """`[N, N_SIZE]`: the rows a `[N, K_SIZE]`, or gathered from `[T, K_SIZE]`, through their expert's matrix.

    `added [N, N_SIZE]` and the expert's bias are added, the sum multiplied by the slot's weight.
    """
    out = a.new_empty(rows.N, matrices.n_size)
    if rows.N == 0:
        return out
    config = _choose("rows", a, rows.N, rows.E, matrices.n_size, matrices.k_size, matrices.can_use_tma())
    w, flags = matrices.arguments(config, matrices.n_size)
    fwd.rows_kernel[_grid(rows, config, matrices.n_size, a)](
        a, w, bias, added, weights, out, rows.order, rows.offsets, *rows.tiles(config.block_m),
        rows.E, matrices.k_size, matrices.n_size, *matrices.strides,
        K=rows.top_k, GATHER=gather, WEIGHTED=weights is not None, HAS_BIAS=bias is not None,
        HAS_ADDED=added is not None, BLOCK_E=metadata.next_power_of_2(rows.E), GROUP_M=config.group_m, TMA=config.tma,
        PERSISTENT=config.persistent, **flags, **_options(config, a),
    )  # fmt: skip
    return out


def _combine(out: Tensor, position: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """`[T, H]` in the dtype of the sorted rows `out [N, H]`."""
    T, K, H = shape
    y = out.new_empty(T, H)
    if T:
        block, _ = _block_of_row(H)
        fwd.combine_kernel[(T, metadata.cdiv(H, block))](out, position, y, H, K=K, BLOCK_H=block)
    return y


def _gate_backward(grad_output, bias, weights, pre, hidden, rows: _Rows, spec: Spec) -> tuple[Tensor, Tensor]:
    """grad_weights `[T, K]` and grad_pre `[N, 2I]`; hidden `[N, I]`, which holds dy @ down, becomes w h in place."""
    H, I = grad_output.size(1), hidden.size(1)
    grad_weights, grad_pre = torch.empty_like(weights), torch.empty_like(pre)
    (block_i, num_warps), (block_h, _) = _block_of_row(I), _block_of_row(H)
    bwd.gate_backward_kernel[(rows.N,)](
        pre, hidden, grad_pre, weights, grad_weights, grad_output, bias, rows.order, rows.offsets,
        rows.N, H, I, rows.E, spec.swiglu_alpha, spec.swiglu_limit,
        K=rows.top_k, ACTIVATION=spec.activation, INTERLEAVED=not spec.is_concatenated, HAS_BIAS=bias is not None,
        BLOCK_I=block_i, BLOCK_H=block_h, BLOCK_E=metadata.next_power_of_2(rows.E), num_warps=num_warps,
    )  # fmt: skip
    return grad_weights, grad_pre


def _weight_grad(
    by_token: tuple[Tensor, ...],
    by_row: tuple[Tensor, ...],
    group: _Group,
    token_first: bool,
    into: Tensor | None,
    gather: bool = True,
) -> Tensor:
    """`[E, P, Q]`: A^T B per expert; A is by_token `[T, .]` and B by_row `[N, .]` if token_first, else the reverse.

    Without `gather` by_token is `[N, .]`, too.
    """
    a, b = (by_token, by_row) if token_first else (by_row, by_token)
    P, Q = a[0].size(1), b[0].size(1)
    out = a[0].new_empty(group.E, P, Q, dtype=group.out_dtype) if into is None else into
    config = _choose("weight_grad", a[0], group.N, group.E, Q, _LONG)
    config = config._replace(block_m=tuning.at_most(config.block_m, P))
    bwd.weight_grad_kernel[(group.E * metadata.cdiv(P, config.block_m) * metadata.cdiv(Q, config.block_n),)](
        a, b, group.gather_orders, group.offsets, out, P, Q, group.E,
        K=group.gather_k, GATHER_A=gather and token_first, GATHER_B=gather and not token_first, ADD=into is not None,
        EVEN=min(P // config.block_m, Q // config.block_n) > 0, GROUP_M=config.group_m, **_options(config, a[0]),
    )  # fmt: skip
    return out


def _bias_grad(
    rows: tuple[Tensor, ...], weights: tuple[Tensor, ...] | None, group: _Group, into: Tensor | None
) -> Tensor:
    """`[E, P]`: the sums of each expert's rows; rows by token count with their slot's weight."""
    P = rows[0].size(1)
    out = rows[0].new_empty(group.E, P, dtype=group.out_dtype) if into is None else into
    block = min(128, metadata.next_power_of_2(P))
    bwd.bias_grad_kernel[(group.E, metadata.cdiv(P, block))](
        rows, weights, group.orders, group.offsets, out, P,
        K=group.top_k, GATHER=weights is not None, ADD=into is not None, BLOCK_M=32, BLOCK_N=block,
    )  # fmt: skip
    return out


class _Launch:
    """One kernel with its grid and compile-time arguments, of which Triton's own lookup takes several microseconds.

    It is looked up once and kept, so all later calls must agree in what Triton specialises on: the tensors' dtypes and
    alignment, and every integer.
    """

    def __init__(self, kernel, grid: tuple[int, int, int], constants: dict, keep: bool):
        self.kernel, self.grid, self.constants, self.keep = kernel, grid, constants, keep
        self.run: Callable | None = None
        self.trailing: list[object] = []

    def __call__(self, *args: object) -> None:
        if self.run is not None:
            self.run(*args, *self.trailing)
            return
        compiled = self.kernel[self.grid](*args, **self.constants)
        if self.keep and compiled is not None:  # None: interpreted
            self.trailing = [self.constants[name] for name in self.kernel.arg_names[len(args) :]]
            self.run = compiled[self.grid]


@functools.cache
def _decode_launches(
    N: int, sizes: tuple[int, ...], strides: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: int | None,
    has: tuple[bool, bool, bool], spec: Spec, configs: tuple[tuning.Config, tuning.Config], flags: tuple[tuple, tuple],
    precision: str, pdl: tuple, aligned: bool,
) -> tuple[_Launch, _Launch, _Launch]:  # fmt: skip
    """Return the launches of `_decode`; strides, dtypes and device only tell them apart."""
    K, H, I, E, _ = sizes
    has_map, has_gate_up_bias, has_down_bias = has
    by_slot = N < E
    common = {"HAS_SLOT_MAP": has_map, **dict(pdl)}
    slots = {"BY_SLOT": by_slot, "BLOCK_S": max(16, metadata.next_power_of_2(N)), "PRECISION": precision, **common}
    up, down = (
        {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "num_warps": c.num_warps}
        | {"num_stages": c.num_stages, **dict(flag), **slots}
        for c, flag in zip(configs, flags)
    )
    up |= {"K": K, "ACTIVATION": spec.activation, "INTERLEAVED": not spec.is_concatenated}
    programs, (block, _) = N if by_slot else E, _block_of_row(H)
    columns = [metadata.cdiv(size, config.block_n) for size, config in zip((I, H), configs)]
    return (
        _Launch(decode.decode_gate_up_kernel, (columns[0], programs, 1), up | {"HAS_BIAS": has_gate_up_bias}, aligned),
        _Launch(decode.decode_down_kernel, (columns[1], programs, 1), down | {"HAS_BIAS": has_down_bias}, aligned),
        _Launch(
            decode.decode_combine_kernel,
            (N // K, metadata.cdiv(H, block), 1),
            {"K": K, "BLOCK_H": block, **common},
            aligned,
        ),
    )


def _pdl() -> tuple[tuple[str, bool], ...]:
    """How a kernel of decoding is launched: while the one before still runs, where the device can do so."""
    return (("PDL", True), ("launch_pdl", True)) if tuning.has_pdl() else (("PDL", False),)


def _decode(x, index, weights, gate_up, down, gate_up_bias, down_bias, slot_map, spec: Spec) -> Tensor:
    """y `[T, H]` for few slots, by programs that find their slots themselves."""
    (T, K), H, E, I = index.shape, x.size(1), gate_up.size(0), _two_i(gate_up, spec) // 2
    N, R = T * K, E if slot_map is None else slot_map.numel()
    hidden, out, y = x.new_empty(N, I), x.new_empty(N, H, dtype=torch.float32), torch.empty_like(x)
    up, to_h = (_Matrices(w, k_is_last=not spec.is_transposed) for w in (gate_up, down))
    configs = _choose("decode_gate_up", x, N, 1, I, H), _choose("decode_down", x, N, 1, H, I)
    pointers = 0
    for tensor in (x, up.weight, to_h.weight, gate_up_bias, down_bias, index, slot_map, weights, hidden, out, y):
        pointers |= 0 if tensor is None else tensor.data_ptr()
    gate_up_kernel, down_kernel, combine_kernel = _decode_launches(
        N, (K, H, I, E, R), up.strides + to_h.strides, (x.dtype, weights.dtype), x.device.index,
        (slot_map is not None, gate_up_bias is not None, down_bias is not None), spec, configs,
        (up.flags(configs[0], I), to_h.flags(configs[1], H)), _precision(x), _pdl(), pointers % 16 == 0,
    )  # fmt: skip
    gate_up_kernel(
        x, up.weight, gate_up_bias, hidden, index, slot_map, N, H, I, R, E, *up.strides,
        spec.swiglu_alpha, spec.swiglu_limit,
    )  # fmt: skip
    down_kernel(hidden, to_h.weight, down_bias, weights, out, index, slot_map, N, I, H, R, E, *to_h.strides)
    combine_kernel(out, index, slot_map, y, N, H, R, E)
    return y
