"""Reuses the memory of tensors that were freed.

Memory that is touched for the first time must be found and cleared by the kernel, and for a virtual machine by its
host: that can take ten times as long as reading a cached file into it. `malloc` gives a large block back to the system
with every tensor that is freed, so this package keeps some.
"""

import math
import weakref

import numpy as np
import torch

MOST_FREE = 4  # blocks that wait to be used again


class Buffers:
    """Gives out uninitialised tensors; the memory of a freed one goes to the next of the same size."""

    def __init__(self):
        self._free: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor, as `torch.empty`."""
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        place = next((i for i, block in enumerate(self._free) if block.nbytes == size), None)
        block = np.empty(size, np.uint8) if place is None else self._free.pop(place)
        view = block[:]  # only the tensor keeps this view alive
        weakref.finalize(view, self._give_back, block).atexit = False
        return torch.from_numpy(view).view(dtype).reshape(shape)

    def clear(self) -> None:
        """Free the blocks that no tensor uses."""
        self._free.clear()

    def _give_back(self, block: np.ndarray) -> None:
        self._free.append(block)
        del self._free[:-MOST_FREE]
