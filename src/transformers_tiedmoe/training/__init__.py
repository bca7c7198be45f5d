"""Training of tied models: text to blocks, healing after a conversion, parameter groups, soft routing's schedule.

For a Trainer of your own: `AnnealRouting`, `pool_parameter_groups`. `lora.check_adapters`, for a peft model.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .parameter_groups import pool_parameter_groups
    from .soft_routing import AnnealRouting

__all__ = ["AnnealRouting", "pool_parameter_groups"]


def __getattr__(name: str) -> Any:
    # Imported when first asked for: Trainer takes a second, and reading text needs none.
    if name == "AnnealRouting":
        from .soft_routing import AnnealRouting

        return AnnealRouting
    if name == "pool_parameter_groups":
        from .parameter_groups import pool_parameter_groups

        return pool_parameter_groups
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
