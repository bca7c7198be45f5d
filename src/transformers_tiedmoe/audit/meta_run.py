"""Run a model on the meta device and count what it would allocate: shapes only, no memory, no arithmetic.

Every tensor's storage is counted from its making until its last reference is gone, as torch's allocators do. So a run
says what transformers' own code keeps: activations, caches, temporary tensors.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

aten = torch.ops.aten


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors made while it is entered: `live` now, and `peak`.

    Args:
        known: tensors that exist already and are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self.is_backward = False  # set it before `backward()`
        self._seen: Any = weakref.WeakSet()
        for tensor in known:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.add.Tensor and self._sums_gradients(*args[:2]):
            made = args[0]
        else:
            made = _without_values(func, args, kwargs or {})
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _sums_gradients(self, total: Any, other: Any) -> bool:
        """Tell whether autograd adds the gradients of a tensor's uses, which it does in place but under a mode."""
        return (
            self.is_backward
            and not torch.is_grad_enabled()  # or a layer is computed again
            and isinstance(other, torch.Tensor)
            and (total.shape, total.dtype) == (other.shape, other.dtype)
        )

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        num_bytes = storage.nbytes()
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, num_bytes)

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _without_values(func: Any, args: tuple, kwargs: dict) -> Any:
    """Call an operator, or say what it would return where torch has no rule for the meta device."""
    if func is aten._grouped_mm.default:  # torch's rule takes bfloat16 only
        left, right, offsets = args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"]
        if right.dim() == 3:
            return left.new_empty(left.shape[0], right.shape[2])
        return left.new_empty(offsets.shape[0], left.shape[0], right.shape[1])
    if func is aten.nonzero.default and args[0].is_meta:  # at most
        return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
    return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """Attention as fused kernels do it: they keep queries, keys, values, the output and a number for every query.

    On the meta device torch would take the kernel that keeps every attention weight (FlashAttention, arXiv 2205.14135,
    section 3.1, is what GPUs run).
    """

    @staticmethod
    def forward(ctx, query, key, value, mask):
        batch, heads, length, size = query.shape
        if size == value.shape[-1]:
            output = torch.empty_like(query)  # in the layout of the queries, as the kernels do
        else:
            output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, sums)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


MATRIX_PRODUCTS = {
    torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm,
    torch.addmm, torch.mm, torch.einsum, torch.conv1d, torch.nn.functional.scaled_dot_product_attention,
}  # fmt: skip


class _Answers(TorchFunctionMode):
    """Answers what code asks of values that are not there, runs attention as a fused kernel, and casts as autocast.

    Args:
        autocast: the dtype that `torch.autocast` would compute matrix products in, which has no rules for the meta
            device; a weight's copy is kept until `forget`. transformers' experts are not among these products.
    """

    def __init__(self, autocast: torch.dtype | None = None):
        super().__init__()
        self.autocast = autocast
        self._copies: dict[int, torch.Tensor] = {}

    def forget(self) -> None:
        """Drop the copies of weights, as the end of an autocast region does."""
        self._copies.clear()

    def __exit__(self, *error):
        self.forget()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True  # "is this batch one sequence a row?"
        if self.autocast is not None and func in MATRIX_PRODUCTS:
            args, kwargs = tree_map_only(torch.Tensor, self._cast, (args, kwargs))
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].is_meta:
            query, key, value = args[:3]
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if mask is not None and mask.dtype is torch.bool:
                mask = query.new_empty(mask.shape)
            return _FusedAttention.apply(query, key, value, mask)
        return func(*args, **kwargs)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is not torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self.autocast)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(self.autocast)
        return self._copies[id(tensor)]


@contextlib.contextmanager
def counted_on_meta(
    known: Iterable[torch.Tensor], autocast: torch.dtype | None = None
) -> Iterator[tuple[Allocations, _Answers]]:
    """Count what is allocated on the meta device within the block, beside the tensors of `known`."""
    with Allocations(known) as allocations, _Answers(autocast) as answers:
        yield allocations, answers


def recomputing_on_meta(
    autocast: torch.dtype | None = None,
) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return the contexts of a checkpointed layer's two passes: torch runs the second outside of the mode above."""
    return contextlib.nullcontext(), _Answers(autocast)
