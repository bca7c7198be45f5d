"""The models that "Tying the Loop" (arXiv 2606.16825) pretrains, by name, and its recipe.

Sizes and rates are read from the paper's public code. Heads are not among what we read: here they are 128 wide, as
OLMoE's, or 64 in Qwen3's, whose sizes 128 does not divide evenly, with as many KV heads.
"""

from typing import Any

from .configuration_tiedmoe import TiedMoeConfig
from .errors import TiedMoeError

# Of the optimizer (`training.muon`) and the text: rates fall from `lr` to `final_lr` after `warmup_steps`.
RECIPE: dict[str, Any] = {
    "lr": 2e-2, "final_lr": 2e-3, "weight_decay": 0.1, "warmup_steps": 100, "max_grad_norm": 1.0,
    "block_size": 2048, "sequences_per_step": 256,
}  # fmt: skip
_OLMOE = {"family": "olmoe", "num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8}
_QWEN3 = {"family": "qwen3_moe", "num_hidden_layers": 28, "num_experts": 60, "num_experts_per_tok": 4}
FAMILIES = {"olmoe": _OLMOE, "qwen3": _QWEN3, "deepseek": {**_OLMOE, "num_experts_per_tok": 6}}
HIDDEN_SIZES = {"olmoe": (512, 1024, 2048), "qwen3": (384, 768, 1536), "deepseek": (512, 1024, 2048)}
# Layers per pool, and experts of a layer and of a pool, as multiples of the family's number.
VARIANTS = {
    "g1": (1, 1, 1), "g2": (2, 1, 1), "g4": (4, 1, 1), "narrow": (1, 1 / 4, 1 / 4),
    "g4-2x": (4, 1, 2), "g4-4x": (4, 1, 4),
}  # fmt: skip
NAMES = [f"{model}-{hidden}-{each}" for model in FAMILIES for hidden in HIDDEN_SIZES[model] for each in VARIANTS]


def preset(name: str, **fields) -> TiedMoeConfig:
    """Return the config of a preset, e.g. `preset("olmoe-1024-g4")`.

    Args:
        name: of `NAMES`, a model, its hidden size and a variant: `g1` untied, `g2` and `g4` tied by two and four
            layers, `narrow` untied with a quarter of the experts, `g4-2x` and `g4-4x` with pools that many times as
            wide, whose routers are as wide, too.
        fields: of the config, instead of the preset's; the variant's widths follow from `num_experts`.

    Raises:
        TiedMoeError: no such preset.
    """
    if name not in NAMES:
        raise TiedMoeError(f"no preset {name!r}; expected MODEL-HIDDEN-VARIANT, one of {', '.join(NAMES)}")
    model, hidden, variant = name.split("-", 2)
    hidden_size, group_size = int(hidden), VARIANTS[variant][0]
    head_dim = 64 if model == "qwen3" else 128
    width = "moe_intermediate_size" if model == "qwen3" else "intermediate_size"
    found = {
        **FAMILIES[model], "hidden_size": hidden_size, width: hidden_size // 2, "head_dim": head_dim,
        "num_attention_heads": hidden_size // head_dim, "num_key_value_heads": hidden_size // head_dim,
        "group_size": group_size, "skip_first": 2, "skip_last": 2, "vocab_size": 100277,
        "max_position_embeddings": RECIPE["block_size"], "output_router_logits": True, "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 1e-4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **fields,
    }  # fmt: skip
    in_layer, in_pool = (round(share * found["num_experts"]) for share in VARIANTS[variant][1:])
    return TiedMoeConfig(**{**found, "num_experts": in_layer, "pool_num_experts": in_pool})
