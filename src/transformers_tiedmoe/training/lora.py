"""LoRA for healing: low-rank adapters on attention and, through peft's `target_parameters`, on the pools.

peft at most warns of a target that matches nothing if another one does, and not of an adapter that gets no gradient:
`check_adapters` refuses both, for any model that peft has wrapped.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TiedMoeError

_T = TypeVar("_T")


def add_lora(
    model: PreTrainedModel,
    rank: int = 16,
    modules: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
):
    """Wrap a causal language model so that only adapters on its attention and its pools are trained.

    A pool has one adapter, as it has one set of weights: all layers of its group train it. Experts of untied layers,
    routers and norms get none. The adapter's scale alpha / rank is 2.

    Args:
        model: a tied model, or any other, which then gets adapters on attention only.
        rank: of each adapter; in a pool, of each expert.
        modules: names, or their ends, of linear modules, as peft's `target_modules`; attention's by default.
        parameters: the same of weights of experts, as peft's `target_parameters`; the pools' by default. Where either
            is given, the other is none by default.

    Returns:
        The `peft.PeftModel`; its adapters are float32 whatever the dtype of the model.

    Raises:
        ImportError: peft is not installed.
        TiedMoeError: a rank above that of a matrix to adapt, a target that matches nothing, or weights that are
            quantised.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            "LoRA needs peft, which is not installed; pip install 'transformers-tiedmoe[peft]'"
        ) from error
    if modules is None and parameters is None:
        modules, parameters = attention_linears(model), pool_matrices(model)
    linears = {name: each.weight for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 3}
    _refuse_unmatched("lora_target_modules", modules or (), linears, model)
    _refuse_unmatched("lora_target_parameters", parameters or (), matrices, model)
    _refuse_rank(rank, _matched(linears, modules or ()) | _matched(matrices, parameters or ()))
    _refuse_quantised(model, parameters or ())
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(modules or ()),
        target_parameters=list(parameters or ()) or None,
        modules_to_save=["expert_budget"] if _learns_budget(model) else None,  # L numbers: whole, no adapter
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def without_adapters(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """Return what a peft model holds by name, under the names of the model that it wraps and without adapters."""
    kept = {name: each for name, each in tensors.items() if "lora_" not in name and ".original_module." not in name}
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", ""): each
        for name, each in kept.items()
    }


def check_adapters(model: nn.Module) -> None:
    """Raise unless every target of a peft model's configs matches something, and every adapter gets a gradient.

    One forward and backward of a few tokens, without dropout; no gradient is left behind. Call it before training, on
    any model that peft has wrapped, tied or not.

    Args:
        model: a `peft.PeftModel` of a causal language model.

    Raises:
        TiedMoeError: it has no adapter that is trained, a target matches nothing, all experts that have adapters are
            those of untied layers although the model has pools, or an adapter would get no gradient.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    trained = {name: [p for n, p in module.named_parameters() if p.requires_grad and "base_layer" not in n]
               for name, module in adapters.items()}  # fmt: skip
    if not any(trained.values()):
        raise TiedMoeError(
            f"{type(model).__name__} has no layer with an adapter that is trained; expected a model of "
            "peft.get_peft_model: make one with a LoraConfig, or load its adapter with is_trainable=True"
        )
    adapted = [_adapted_name(name, module) for name, module in adapters.items()]
    for config in getattr(model, "peft_config", {}).values():
        for field in ("target_modules", "target_parameters"):
            if not isinstance(targets := getattr(config, field, None) or (), str):  # else a pattern: peft looks
                _refuse_unmatched(field, targets, adapted, model)
    pools = pool_matrices(model)
    experts = [name for name in adapted if re.search(r"\.experts\.\w+$", name)]
    if pools and experts and not any("expert_pools." in name for name in adapted):
        raise TiedMoeError(
            f"of the experts only those of untied layers have adapters: {experts[:3]}; those of tied layers lie in "
            f"pools: name {_short(pools)[:3]} in target_parameters as well"
        )
    _refuse_without_gradient(model, trained)


def _refuse_without_gradient(model: nn.Module, trained: dict[str, list[nn.Parameter]]) -> None:
    """Raise if all parameters of an adapter have the gradient zero, or none, on a few tokens."""
    parameters = [each for of_one in trained.values() for each in of_one]
    ids = torch.arange(1, 17, device=parameters[0].device).view(2, 8)  # one token alone would give attention none
    was_training = model.training
    model.eval()
    with torch.enable_grad():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss * 1024  # tiny gradients of float16 are zero
        found = (
            torch.autograd.grad(loss, parameters, allow_unused=True)
            if loss.requires_grad
            else [None] * len(parameters)
        )
    model.train(was_training)
    moved = {id(p) for p, grad in zip(parameters, found) if grad is not None and bool(grad.any())}
    dead = [name for name, of_one in trained.items() if of_one and not any(id(p) in moved for p in of_one)]
    if dead:
        raise TiedMoeError(
            f"{len(dead)} of {len(trained)} adapters would get no gradient, first {dead[0]}: nothing that the model "
            "computes depends on them; expected each to be used: leave these targets out"
        )


def _refuse_unmatched(field: str, targets: Collection[str], names: Collection[str], model: nn.Module) -> None:
    """Raise if a target is neither one of `names` nor the end of one, as peft matches them."""
    nothing = [each for each in targets if not any(name == each or name.endswith(f".{each}") for name in names)]
    if not nothing:
        return
    pools = pool_matrices(model)
    told = f"; experts of tied layers lie in pools, {_short(pools)[:3]} in target_parameters" if pools else ""
    raise TiedMoeError(
        f"{field}: {', '.join(sorted(nothing))} match nothing that can have an adapter; expected ends of names such "
        f"as {_short(names)[:8]}{told}"
    )


def _matched(tensors: Mapping[str, _T], targets: Collection[str]) -> dict[str, _T]:
    """Return those whose name is a target or ends with one, as peft matches them."""
    return {n: each for n, each in tensors.items() if any(n == t or n.endswith(f".{t}") for t in targets)}


def _refuse_rank(rank: int, weights: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        if weight.is_floating_point() and rank > min(weight.shape[-2:]):
            raise TiedMoeError(
                f"lora_rank={rank}, but {name} is a matrix of {weight.shape[-2]} by {weight.shape[-1]}; expected at "
                f"most {min(weight.shape[-2:])}, and far less to save anything: lower it, or leave this target out"
            )


def _refuse_quantised(model: nn.Module, targets: Collection[str]) -> None:
    for name, parameter in model.named_parameters():
        is_target = any(name == each or name.endswith(f".{each}") for each in targets)
        if is_target and (not parameter.is_floating_point() or parameter.dtype.itemsize < 2):
            raise TiedMoeError(
                f"{name} is stored as {parameter.dtype}; expected float32, bfloat16 or float16 below an adapter: "
                "convert the model with dequantised weights, or leave this target out"
            )


def _short(names: Collection[str]) -> list[str]:
    """Return the ends by which to name modules: of pools with their number, of others without the layer's."""
    return sorted({name[name.index("expert_pools.") :] if "expert_pools." in name else name.rpartition(".")[2]
                   for name in names})  # fmt: skip


def _adapted_name(name: str, module: nn.Module) -> str:
    """Return the name of what an adapter lies on; peft nests those of several weights of one module."""
    name = name.replace(".base_layer", "")
    parameter = getattr(module, "parameter_name", None)
    return f"{name}.{parameter}" if parameter else name


def _learns_budget(model: nn.Module) -> bool:
    return any(name.endswith("expert_budget.theta") for name, _ in model.named_parameters())


def attention_linears(model: nn.Module) -> list[str]:
    """Return the names of the linear modules inside `self_attn`, `linear_attn`, `attention` and the like."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in names if re.search(r"att(n|ention)[^.]*\.", name)]
    if not names:
        raise TiedMoeError(
            f"{type(model).__name__} has no linear layer inside an attention module to put an adapter on; "
            "heal it without lora"
        )
    return names


def pool_matrices(model: nn.Module) -> list[str]:
    """Return the names of the pools' `[E, out, in]` weights, without the biases that some families have."""
    return [
        name.replace(".base_layer", "")
        for name, parameter in model.named_parameters()
        if "expert_pools." in name and parameter.ndim == 3 and "lora_" not in name
    ]
