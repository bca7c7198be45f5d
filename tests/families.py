"""Tiny configurations of every MoE family that the installed transformers has, for tests."""

import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Set where the family has the field; everything else stays at the family's own default.
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 8,
    "initializer_range": 0.2,
}

MLA = {"num_key_value_heads": 4}  # multi-head latent attention has no grouped queries
# What a family needs besides, each because its own checks or shapes ask for it.
EXTRA: dict[str, dict] = {
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": MLA,
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": {"moe_intermediate_size": 16},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        **MLA,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "index_topk": 4,
        "shared_experts_intermediate_size": 16,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "global_head_dim": 8,
    },
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "layer_types": ["mamba", "attention"] * 3,
    },
    "kimi_linear": {**MLA, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe", "moe", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "hc_lowrank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def transformers_before(version: str) -> bool:
    """Whether the installed transformers is older than `version`."""
    return Version(transformers.__version__) < Version(version)


def moe_families() -> list[str]:
    """The model types of causal LMs whose experts use `@use_experts_implementation`."""
    return sorted(
        name
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name in CONFIG_MAPPING
        and MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]._can_set_experts_implementation()
    )


def text_families() -> list[str]:
    """Those of `moe_families` that have a config of their own: "qwen3_5_moe" has that of "qwen3_5_moe_text"."""
    families = moe_families()
    types = {each: MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[each]].config_class.model_type for each in families}
    return [each for each in families if types[each] == each or types[each] not in families]


def tiny_config(family: str, **fields):
    """The family's own configuration at tiny size, `fields` on top; a multimodal family's text configuration."""
    config_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]].config_class
    known = config_class()
    tiny = {name: value for name, value in TINY.items() if name in vars(known)}
    return config_class(**{**tiny, **EXTRA.get(config_class.model_type, {}), **fields})
