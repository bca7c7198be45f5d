"""Expert kernels that know layers are tied: y = sum_k w_k * down_e(act(gate_e(x)) * up_e(x)).

Only the plain torch reference is here yet, the function that every kernel will be compared with.
"""

from .reference import experts_forward_reference

__version__ = "0.1.0"

__all__ = ["__version__", "experts_forward_reference"]
