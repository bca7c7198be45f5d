"""Expert tying for Mixture-of-Experts language models in Hugging Face transformers."""

from transformers import AutoConfig

from .configuration_tiedmoe import TiedMoeConfig
from .modeling_tiedmoe import (
    TiedMoeForCausalLM,
    TiedMoeForSequenceClassification,
    TiedMoeForTokenClassification,
    TiedMoeModel,
)
from .pools import tie_groups

__version__ = "0.1.0"

AutoConfig.register("tiedmoe", TiedMoeConfig)  # the models register family by family, in `register_heads`

__all__ = [
    "TiedMoeConfig",
    "TiedMoeForCausalLM",
    "TiedMoeForSequenceClassification",
    "TiedMoeForTokenClassification",
    "TiedMoeModel",
    "tie_groups",
]
