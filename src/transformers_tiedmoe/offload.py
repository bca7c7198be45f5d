"""Pools on CPU or disk, fetched once per group: what accelerate's offload lacks for tied models.

accelerate fetches an offloaded module before each of its calls and drops it after: a pool g times in a forward pass,
for the g layers that read it. Here the pool's hook fetches at the group's first layer and drops after its last.
Notable: accelerate's own hook does both, only less often; a forward pass that fails within a group leaves the pool in
place, for the next one to use.
"""

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook
from accelerate.utils import send_to_device
from torch import nn

from .errors import TiedMoeError


class PoolHook(ModelHook):
    """Takes the place of accelerate's hook on an offloaded pool, and calls it once per group.

    Args:
        hook: accelerate's, which knows the pool's device and its weights' place.
        reader: a thread to read the following pool in, or None.
    """

    def __init__(self, hook: AlignDevicesHook, reader: ThreadPoolExecutor | None):
        self.hook, self.reader = hook, reader
        self.is_fetched = False
        self.following: tuple[nn.Module, PoolHook] | None = None  # the pool to read while this one computes
        self._ahead: Future | None = None

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        if self.is_fetched:
            device = self.hook.execution_device
            return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=self.hook.skip_keys)
        with self._weights_read_ahead():
            args, kwargs = self.hook.pre_forward(module, *args, **kwargs)
        self.is_fetched = True
        if self.following is not None and self.reader is not None:
            pool, hook = self.following
            hook.read_ahead(pool, self.reader)
        return args, kwargs

    def drop(self, module: nn.Module) -> None:
        """Free the pool's weights."""
        if self.is_fetched:
            self.hook.post_forward(module, None)
            self.is_fetched = False

    def detach_hook(self, module: nn.Module) -> nn.Module:
        return self.hook.detach_hook(module)

    def read_ahead(self, module: nn.Module, reader: ThreadPoolExecutor) -> None:
        """Begin to read the pool's weights onto its device, in the background."""
        if not self.is_fetched and self._ahead is None:
            names = [name for name, _ in module.named_parameters(recurse=self.hook.place_submodules)]
            self._ahead = reader.submit(_read, self.hook, names)

    @contextlib.contextmanager
    def _weights_read_ahead(self):
        """Let accelerate's hook find the weights that were read in the background."""
        if self._ahead is None:
            yield
            return
        weights, self._ahead = self._ahead.result(), None
        for weight in weights.values():
            if weight.is_cuda:  # it is of the reader's stream, which must not reuse its memory too early
                weight.record_stream(torch.cuda.current_stream(weight.device))
        place, self.hook.weights_map = self.hook.weights_map, weights
        try:
            yield
        finally:
            self.hook.weights_map = place


def _read(hook: AlignDevicesHook, names: list[str]) -> dict[str, torch.Tensor]:
    device = torch.device(hook.execution_device)
    if device.type != "cuda":
        return {name: hook.weights_map[name].to(device) for name in names}
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        weights = {name: hook.weights_map[name].to(device) for name in names}
    stream.synchronize()
    return weights


def keep_pools_loaded(model: Any, prefetch: bool = False) -> None:
    """Make a dispatched model fetch each offloaded pool once per group and forward pass, not once per layer.

    `from_pretrained(device_map=...)` does so by itself; call it after accelerate's `dispatch_model`, `cpu_offload`,
    `disk_offload` or `load_checkpoint_and_dispatch`, or again to change `prefetch`. For inference, as accelerate's
    offload.

    Args:
        model: a tied model with hooks of accelerate's, of which pools at least are offloaded.
        prefetch: whether a thread reads the following pool while one computes, after the last the first. Two pools
            are in memory then, and one stays there between forward passes.

    Raises:
        TiedMoeError: no pool is offloaded.
    """
    base = model.base_model
    found = {p: pool for p, pool in enumerate(base.expert_pools) if _offload_hook(pool) is not None}
    if not found:
        raise TiedMoeError(
            "no pool of this model is offloaded by accelerate; expected a model that was dispatched with pools on "
            'disk, or on "cpu" beside a GPU: see device_map in from_pretrained'
        )
    reader = ThreadPoolExecutor(1, thread_name_prefix="tiedmoe-prefetch") if prefetch and len(found) > 1 else None
    hooks = []
    for p, pool in found.items():
        is_new = not isinstance(pool._hf_hook, PoolHook)
        pool._hf_hook = PoolHook(_offload_hook(pool), reader)
        hooks.append((pool, pool._hf_hook))
        if is_new:
            views = [module for module in base.modules() if getattr(module, "pool_index", None) == p]
            last = max(views, key=lambda view: view.position)
            last.register_forward_hook(_Drop(pool), always_call=True)
    for (_, hook), following in zip(hooks, [*hooks[1:], hooks[0]]):
        hook.following = following


def is_offloaded(model: Any) -> bool:
    """Tell whether accelerate offloads any pool of a tied model."""
    return any(_offload_hook(pool) is not None for pool in model.base_model.expert_pools)


class _Drop:
    """Called after a group's last layer."""

    def __init__(self, pool: Any):
        self.pool = pool

    def __call__(self, *_: Any) -> None:
        if isinstance(hook := getattr(self.pool, "_hf_hook", None), PoolHook):
            hook.drop(self.pool)


def _offload_hook(pool: Any) -> AlignDevicesHook | None:
    """Return accelerate's hook that offloads a pool, if one does."""
    hook = getattr(pool, "_hf_hook", None)
    hook = hook.hook if isinstance(hook, PoolHook) else hook
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None
