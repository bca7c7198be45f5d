"""What the host does for one decoding call of an OLMoE layer, in microseconds, with everything but the launch itself.

    python benchmarks/decode_host.py --tokens 1

No GPU: a driver names one (sm_90), the kernels are compiled for it, and where Triton hands a launch to the GPU's
driver nothing happens. TRITON_INTERPRET must not be set.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import compile_table
import torch
import triton
from triton.compiler.compiler import CompiledKernel

from tiedmoe_kernels import backends, experts_forward, triton_backend


def stand_in_for_a_gpu(launched: Callable[..., None]) -> None:
    """Let this process launch kernels without a GPU: `launched` gets the kernel and what its launcher would get."""

    def handles(kernel: CompiledKernel) -> None:
        kernel.module = kernel.function = 1
        kernel._run = lambda *args: launched(kernel, *args)

    CompiledKernel._init_handles = handles
    triton.runtime.driver.set_active(compile_table._Driver(compile_table.TARGETS["sm_90"]))
    backends.backend_of = lambda device_type: triton_backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40, help="of 50 calls each")
    arguments = parser.parse_args()
    stand_in_for_a_gpu(lambda *_: None)
    torch.set_num_threads(1)
    E, H, I, K, _, _ = compile_table.OLMOE
    T, empty = arguments.tokens, torch.empty
    x, weights = empty(T, H, dtype=torch.bfloat16), torch.ones(T, K, dtype=torch.bfloat16)
    index = torch.arange(T * K).view(T, K) % E
    pool = empty(E, 2 * I, H, dtype=torch.bfloat16), empty(E, H, I, dtype=torch.bfloat16)
    calls = {
        "experts_forward": lambda: experts_forward(x, index, weights, *pool),
        "backend only": lambda: triton_backend.forward(
            x, index, weights, *pool, None, None, None, compile_table.OLMOE.spec, False
        ),
    }
    with torch.no_grad():
        for name, call in calls.items():
            times = []
            for _ in range(arguments.rounds + 1):  # the first compiles
                start = time.perf_counter()
                for _ in range(50):
                    call()
                times.append((time.perf_counter() - start) / 50 * 1e6)
            times = sorted(times[1:])
            print(f"{name}: {statistics.median(times):.1f} us a call, least {times[0]:.1f}")


if __name__ == "__main__":
    main()
