"""Optimizer parameter groups: a slower rate for pools, and one of its own for the budget that soft layers share.

A pool's gradient, as that of a shared router or attention, is the sum over the layers that read it. "Tying the Loop"
(arXiv 2606.16825) divides the learning rate of the pools by sqrt(group_size) when it trains a tied model from scratch.

The budget's few numbers decide by differences of about 1, whatever the size of the weights, and Adam moves each by at
most its learning rate a step: at the weights' rate they stand still in any short training. They never decay: towards
zero is towards an even budget.
"""

import math
import re

from transformers import PreTrainedModel

from ..errors import TiedMoeError

POOL_NAME = re.compile(r"(?:^|\.)(?:expert_pools|shared_routers|shared_attentions)\.(\d+)\.")
BUDGET_NAME = re.compile(r"(?:^|\.)expert_budget\.(?:.*\.)?theta$")
NO_DECAY = re.compile(r"(?:^|[._])(?:bias|norm|layernorm|rmsnorm|ln)\d*(?:$|[._])", re.IGNORECASE)
BUDGET_LR = 0.03  # 80 steps of a cosine schedule move a number by up to 1.2; docs/routing.md says what was tried
LR_DIVISORS = {"none": lambda group_size: 1.0, "sqrt": math.sqrt}


def pool_parameter_groups(
    model: PreTrainedModel,
    lr: float,
    weight_decay: float = 0.0,
    lr_divisor: str = "sqrt",
    budget_lr: float = BUDGET_LR,
) -> list[dict]:
    """Make groups of the trainable parameters for any torch optimizer: `AdamW(pool_parameter_groups(model, 1e-4))`.

    Args:
        model: a tied model (wrapped by peft or not), whose `config.groups` holds the layers of each pool, or any other
            model, which then has no pools.
        lr: learning rate of everything else.
        weight_decay: of everything but biases, norms and the budget of soft routing, which get none.
        lr_divisor: what a pool's learning rate is divided by: `"sqrt"`, the square root of the number of layers that
            read it, or `"none"`.
        budget_lr: learning rate of the numbers by which soft layers share their budget.

    Returns:
        One dict of `params`, `lr` and `weight_decay` for each pair of values that occurs; a parameter is in exactly
        one.
    """
    if lr_divisor not in LR_DIVISORS:
        raise TiedMoeError(f"lr_divisor={lr_divisor!r} is unknown; choose one of {', '.join(LR_DIVISORS)}")
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        pool = POOL_NAME.search(name)
        is_budget = BUDGET_NAME.search(name)
        rate = lr / LR_DIVISORS[lr_divisor](len(model.config.groups[int(pool[1])])) if pool else lr
        # A bias of a pool's experts is a matrix [E, 2I]: only the name says what it is.
        decay = 0.0 if NO_DECAY.search(name) or is_budget else weight_decay
        groups.setdefault((budget_lr if is_budget else rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
