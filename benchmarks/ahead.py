"""Compile kernels for chips that are not here: launches are made under a driver that names one."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tiedmoe_kernels import backends, triton_backend, tuning

TARGETS = {f"sm_{chip}": GPUTarget("cuda", chip, 32) for chip in (80, 86, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)


class Driver:
    """What `JITFunction` asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return hash(self.target)  # what is compiled is kept by device: every target is one of its own

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(target: GPUTarget, found: Callable[[str, dict, Any], object] | None = None) -> Iterator[None]:
    """Compile every launch for the target instead; tensors of any device reach the kernels.

    `found` is told a launch's kernel by its name, the options it was launched with, and what triton made of it.
    """

    def compile_instead(self, grid):
        def launch(*arguments, **options) -> None:  # None: there is no kernel to keep and launch again
            kernel = self.warmup(*arguments, grid=grid, **options)
            if found:
                found(self.fn.__name__.removesuffix("_kernel"), options, kernel)

        return launch

    triton.runtime.driver.set_active(Driver(target))
    tuning.choose.cache_clear()
    with (
        mock.patch.object(JITFunction, "__getitem__", compile_instead),
        mock.patch.object(backends, "backend_of", return_value=triton_backend),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),  # it does not know meta
    ):
        yield
    tuning.choose.cache_clear()
