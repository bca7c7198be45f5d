"""FSDP2 (torch's `fully_shard`) of tied models: a pool is gathered once for the whole group that reads it.

FSDP2 gathers a unit when its module is called and frees it when the call returns. A pool is called by every layer of
its group, and so would be gathered once a layer, in forward and in backward. Here the unit begins with the call of the
group's first view and ends with that of its last, whoever made the unit: accelerate, transformers or the user. Layers
stay units of their own, so that one pool and one layer are whole at a time. `tests/test_distributed.py` counts it.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .errors import TiedMoeError


def shard_pools(model: Any, **options: Any) -> None:
    """Make every pool of a tied model an FSDP2 unit of its own; layers and the model are sharded as usual.

    Args:
        model: a tied model whose layers are not sharded yet.
        options: of `torch.distributed.fsdp.fully_shard`, such as `mesh`, `mp_policy` and `reshard_after_forward`.

    Example:
        >>> shard_pools(model, mesh=mesh)
        >>> for layer in model.model.layers:
        ...     fully_shard(layer, mesh=mesh)
        >>> fully_shard(model, mesh=mesh)
    """
    from torch.distributed.fsdp import fully_shard  # takes over a second to import

    for pool in map(_bare, model.expert_pools):
        fully_shard(pool, **options)


def gather_once_per_group(forward: Callable) -> Callable:
    """Wrap a base model's `forward`: pools that are FSDP2 units by now are gathered once per group."""

    @functools.wraps(forward)
    def gathering(self, *args, **kwargs):
        for p, pool in enumerate(map(_bare, self.expert_pools)):
            if _is_unit(pool) and not getattr(pool, "_spans_its_group", False):
                _span_group(pool, [each for each in self.modules() if getattr(each, "pool_index", None) == p])
                pool._spans_its_group = True
        return forward(self, *args, **kwargs)

    return gathering


def end_with_loss(head: nn.Module | None, is_asked: Callable[[], bool]) -> Callable[[Tensor], Tensor] | None:
    """Let the FSDP2 unit of a model's head end with a loss that calls the head more than once.

    accelerate makes the final norm and the head one unit. FSDP2 ends it when both have run, and takes a later call of
    the head for another pass: its backward reduces and frees the unit, the norm's weight included, before the norm's
    own backward reads that.

    Args:
        head: of a causal LM.
        is_asked: whether this forward computes such a loss, rather than logits.

    Returns:
        What the loss has to go through, in the same forward; None if `head` is no unit of FSDP2, or of the root's.
    """
    if head is None or not _is_unit(head):
        return None
    from torch.distributed.fsdp import fully_shard

    state = fully_shard.state(head)  # type: ignore[attr-defined]  # its decorator adds it
    try:
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for module in state._modules:
            module.register_forward_pre_hook(functools.partial(_begin, state), prepend=True, with_kwargs=True)
    except AttributeError as error:
        raise _other_torch(error) from error

    def end(module: nn.Module, args: Any, output: Any) -> Any:
        return output if is_asked() else state._post_forward(module, args, output)

    head.register_forward_hook(end)
    return lambda loss: state._post_forward(head, (), loss)


def _begin(state: Any, module: nn.Module, args: tuple, kwargs: dict) -> tuple:
    if state._training_state.name != "FORWARD":
        return state._pre_forward(module, args, kwargs)
    return _cast(state._mp_policy, args), kwargs


def _bare(module: Any) -> Any:
    """Return the module below peft's adapters: they add to weights that have to be whole by then."""
    while (below := getattr(module, "base_layer", None)) is not None:
        module = below
    return module


def _is_unit(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)  # importing it takes over a second


def _span_group(pool: Any, views: list[nn.Module]) -> None:
    """Move the hooks of FSDP2 from `pool` to the views: before the first it gathers, after the last it frees.

    The same hooks follow the tensors that they see into the backward pass: there the pool is gathered for the gradient
    of the last view's output, and reduced and freed after that of the first view's inputs. The views between find it
    gathered; only where a checkpointed layer is computed again before the pool's turn do they gather it themselves.
    """
    from torch.distributed.fsdp import fully_shard

    first, *others = views
    state = fully_shard.state(pool)  # type: ignore[attr-defined]  # its decorator adds it
    try:
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        first.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
        views[-1].register_forward_hook(state._post_forward)
        policy = state._mp_policy
    except AttributeError as error:
        raise _other_torch(error) from error
    for view in others:
        view.register_forward_pre_hook(functools.partial(_enter, pool, policy))


def _enter(pool: Any, policy: Any, view: nn.Module, args: tuple) -> tuple:
    pool.unshard()
    return _cast(policy, args)


def _cast(policy: Any, args: tuple) -> tuple:
    if not (policy.cast_forward_inputs and policy.param_dtype):
        return args
    is_float = [isinstance(each, Tensor) and each.is_floating_point() for each in args]
    return tuple(each.to(policy.param_dtype) if cast else each for each, cast in zip(args, is_float, strict=True))


def _other_torch(error: AttributeError) -> TiedMoeError:
    return TiedMoeError(
        f"this torch has another FSDP2 than the one of torch 2.11 to 2.13 that this package knows ({error}); install "
        "one of these"
    )
