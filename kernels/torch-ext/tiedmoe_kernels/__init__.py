"""Expert kernels that know layers are tied: y = sum_k w_k * down_e(act(gate_e(x)) * up_e(x)).

`experts_forward` runs Triton kernels on a GPU and plain torch on a CPU. Layers that read the same weights inside
`deferred_weight_gradients()` have their weight gradient computed once. triton is imported at the first call on a GPU.
"""

from .deferred import deferred_weight_gradients
from .eager import experts_forward
from .reference import experts_forward_reference
from .spec import ACTIVATIONS

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "__version__",
    "deferred_weight_gradients",
    "experts_forward",
    "experts_forward_reference",
]
