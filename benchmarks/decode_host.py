"""What the host does for one decoding call of an OLMoE layer, in microseconds, with everything but the launch itself.

    python benchmarks/decode_host.py

No GPU: a driver names one (sm_90), the kernels are compiled for it, and where Triton hands a launch to the GPU's
driver nothing happens. TRITON_INTERPRET must not be set.
"""

import functools
from collections.abc import Callable

import torch
import triton
from compile_table import TARGETS, driver_of
from shapes import OLMOE
from torch.utils.benchmark import Timer
from triton.compiler.compiler import CompiledKernel

from tiedmoe_kernels import backends, experts_forward, triton_backend
from tiedmoe_kernels.tune import SPEC


def stand_in_for_a_gpu(launched: Callable[..., None]) -> None:
    """Let this process launch kernels without a GPU: `launched` gets the kernel and what its launcher would get."""

    def handles(kernel: CompiledKernel) -> None:
        kernel.module = kernel.function = 1
        kernel._run = lambda *args: launched(kernel, *args)

    CompiledKernel._init_handles = handles
    triton.runtime.driver.set_active(driver_of(TARGETS["sm_90"]))
    backends.backend_of = lambda device_type: triton_backend


def main() -> None:
    stand_in_for_a_gpu(lambda *_: None)
    T, (_, E, H, I, K) = 1, OLMOE
    empty = functools.partial(torch.empty, dtype=torch.bfloat16)
    pool = (empty(E, 2 * I, H), empty(E, H, I))
    x, index, weights = empty(T, H), torch.arange(T * K).view(T, K) % E, empty(T, K)
    calls = {
        "experts_forward": lambda: experts_forward(x, index, weights, *pool),
        "backend only": lambda: triton_backend.forward(x, index, weights, *pool, None, None, None, SPEC, False),
    }
    with torch.no_grad():
        for name, call in calls.items():
            call()  # compiles
            times = Timer("call()", globals={"call": call}).blocked_autorange()
            print(f"{name}: {times.median * 1e6:.1f} us a call, least {min(times.times) * 1e6:.1f}")


if __name__ == "__main__":
    main()
