"""LoRA for healing: low-rank adapters on attention and, through peft's `target_parameters`, on the pools."""

import re

from torch import nn
from transformers import PreTrainedModel

from ..errors import TiedMoeError


def add_lora(model: PreTrainedModel, rank: int = 16):
    """Wrap a causal language model so that only adapters on its attention and its pools are trained.

    A pool has one adapter, as it has one set of weights: all layers of its group train it. Experts of untied layers,
    routers and norms get none. The adapter's scale alpha / rank is 2.

    Args:
        model: a tied model, or any other, which then gets adapters on attention only.
        rank: of each adapter; in a pool, of each expert.

    Returns:
        The `peft.PeftModel`; its adapters are float32 whatever the dtype of the model.

    Raises:
        ImportError: peft is not installed.
        TiedMoeError: a rank above the model's hidden size.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            "LoRA needs peft, which is not installed; pip install 'transformers-tiedmoe[peft]'"
        ) from error
    if rank > (hidden_size := model.config.get_text_config().hidden_size):
        raise TiedMoeError(
            f"lora_rank={rank}, but the model's hidden size is {hidden_size}; expected at most that, and far less to "
            "save anything"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=attention_linears(model),
        target_parameters=pool_matrices(model) or None,
        modules_to_save=["expert_budget"] if _learns_budget(model) else None,  # L numbers: whole, no adapter
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


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
    return [name for name, parameter in model.named_parameters() if "expert_pools." in name and parameter.ndim == 3]
