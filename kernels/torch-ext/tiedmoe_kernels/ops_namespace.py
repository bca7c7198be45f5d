"""The namespace of our custom ops; every Hub build of this package has another, so that a process can hold several.

A Hub build is imported under a name of its own, `_tiedmoe_kernels_<backend>_<revision>`, and brings `_ops.py`, which
Hugging Face's kernel-builder writes; that file must not be committed (the builder stops if it exists).
"""

if __package__ == "tiedmoe_kernels":

    def add_op_namespace_prefix(op_name: str) -> str:
        """Return `op_name` with the package's namespace before it: "forward" -> "tiedmoe_kernels::forward"."""
        return f"tiedmoe_kernels::{op_name}"

else:
    from ._ops import add_op_namespace_prefix  # type: ignore[import-not-found, no-redef]

__all__ = ["add_op_namespace_prefix"]
