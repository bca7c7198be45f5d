"""Expert tying for Mixture-of-Experts language models in Hugging Face transformers."""

from transformers import AutoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .auto_files import register_tokenizer
from .configuration_tiedmoe import TiedMoeConfig
from .experts_interface import tiedmoe_experts_forward
from .modeling_tiedmoe import (
    TiedMoeForCausalLM,
    TiedMoeForSequenceClassification,
    TiedMoeForTokenClassification,
    TiedMoeModel,
)
from .offload import keep_pools_loaded
from .pools import tie_groups
from .version import __version__

AutoConfig.register("tiedmoe", TiedMoeConfig)  # its models are registered family by family, in `families.config_class`
register_tokenizer()
ALL_EXPERTS_FUNCTIONS.register("tiedmoe", tiedmoe_experts_forward)

__all__ = [
    "TiedMoeConfig",
    "TiedMoeForCausalLM",
    "TiedMoeForSequenceClassification",
    "TiedMoeForTokenClassification",
    "TiedMoeModel",
    "__version__",
    "keep_pools_loaded",
    "tie_groups",
]
