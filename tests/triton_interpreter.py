"""Makes bfloat16 right in Triton's interpreter, which runs the kernels on a CPU (triton 3.6 to 3.9, triton issue
11584), and the interpreter faster.

The interpreter holds a bfloat16 as its 16 bits in a numpy uint16. Its `tl.dot` multiplies these as integers, and its
cast from float32 drops the low bits where a GPU rounds to nearest even. Both are repaired here. Any other arithmetic
on bfloat16 is refused: it would work on the bits too, and a kernel should do it in float32 anyway.
"""

import functools
import inspect

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype


def repair_bfloat16() -> None:
    """Replace the interpreter's cast, dot, unary and binary operations by ones that know bfloat16; call it once."""
    dot, unary_op, binary_op = InterpreterBuilder.create_dot, InterpreterBuilder.unary_op, InterpreterBuilder.binary_op

    def create_dot(self, a, b, d, *args):
        a, b = (cast_impl(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *args)

    def checked_unary_op(self, arg, op):
        _refuse_bfloat16(op, arg)
        return unary_op(self, arg, op)

    def checked_binary_op(self, lhs, rhs, op):
        _refuse_bfloat16(op, lhs, rhs)
        return binary_op(self, lhs, rhs, op)

    InterpreterBuilder.cast_impl = cast_impl  # every cast but those with an explicit rounding mode ends here
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.unary_op = checked_unary_op
    InterpreterBuilder.binary_op = checked_binary_op


def cast_impl(self, src, dst_type):
    data, dst_type = src.data, dst_type.scalar
    if src.dtype.scalar == tl.bfloat16:
        data = (data.astype(np.uint32) << 16).view(np.float32)
    if dst_type == tl.bfloat16:
        rounded = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), dst_type)
    with np.errstate(over="ignore"):  # beyond float16: infinity, as on a GPU
        return TensorHandle(data.astype(_get_np_dtype(dst_type)), dst_type)


def _refuse_bfloat16(op, *operands):
    if any(x.dtype.scalar == tl.bfloat16 for x in operands):
        raise TypeError(f"{op.__name__} on bfloat16 in Triton's interpreter; convert to float32 first, as on a GPU")


def remember_builtins() -> None:
    """Look through triton's language for what it replaces once, not at every call of a function in a kernel."""

    def patch_builtin(package, builder, scope):
        for name in _builtins(package):
            if tl.core.is_builtin(member := getattr(package, name)):  # no longer, where a caller has replaced it
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


@functools.cache
def _builtins(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
