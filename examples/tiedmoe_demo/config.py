"""`DemoConfig`: everything that decides a run of the demo; each field is a flag of `tiedmoe demo`."""

import os
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

NOVELS = "austen.txt.xz"
VALIDATION_FRACTION = 0.05  # of the text, from its end


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DemoConfig:
    """What the demo trains, ties, heals and measures, and where it writes.

    The defaults were chosen by held-out perplexity for two CPU cores and about ten minutes: docs/log.md.

    Raises:
        TiedMoeError: a field that is wrong whatever the source is.
    """

    output: str = _option("demo", "folder to write; one that holds an interrupted run of the same demo is continued")
    source: str | None = _option(None, "folder or hub id of a MoE checkpoint to tie, instead of training one")
    data: str | None = _option(None, "text to train and measure on instead of the novels that ship with the package")
    group_size: int = _option(4, "consecutive MoE layers that share one pool of experts")
    skip_first: int = _option(2, "MoE layers left untied at the start")
    skip_last: int = _option(2, "MoE layers left untied at the end")
    method: str = _option("least_squares", "how a group's experts become a pool, as in `tiedmoe convert`")
    method_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": 'the method\'s own options, such as {"layer": "last"}'}
    )
    calibration_tokens: int = _option(
        32768, "tokens of the text that the pools are fitted on, where the method needs any"
    )
    heal_steps: int = _option(150, "steps of healing, and extra steps of the control")
    heal_learning_rate: float = _option(5e-4, "peak learning rate of healing and of the control")
    distill: bool = _option(True, "heal with the source as the teacher as well as on the text")
    source_steps: int = _option(1400, "steps that the source is trained for")
    source_learning_rate: float = _option(8e-3, "peak learning rate of the source's training")
    batch_size: int = _option(8, "sequences in a step")
    block_size: int = _option(128, "tokens in a sequence")
    vocab_size: int = _option(2048, "tokens of the byte-level BPE that is trained for the source")
    hidden_size: int = _option(64, "width of the source")
    intermediate_size: int = _option(128, "width of each of the source's experts")
    num_hidden_layers: int = _option(12, "layers of the source")
    num_attention_heads: int = _option(2, "attention heads of the source")
    num_experts: int = _option(16, "experts of each of the source's layers")
    num_experts_per_tok: int = _option(2, "experts active per token")
    prompt: str = _option("Elinor could hardly believe", "what source, tied and healed model continue")
    new_tokens: int = _option(80, "tokens to generate")
    balance_by_layer: bool = _option(
        False, "train the source with a balance loss in every layer instead of OLMoE's own, over all layers at once"
    )
    seed: int = _option(0, "of the source's weights, of the order of the text and of the generated text")
    overwrite: bool = _option(False, "begin anew where output holds an earlier demo")

    def __post_init__(self):
        from transformers_tiedmoe.errors import TiedMoeError  # here, as it imports torch, which takes seconds

        for name in ("output", "source", "data"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        positive = (
            *("heal_steps", "source_steps", "batch_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_experts", "num_experts_per_tok", "new_tokens"),
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise TiedMoeError(f"{name}={getattr(self, name)}, but it must be at least 1")
        if self.vocab_size < 300:
            raise TiedMoeError(
                f"vocab_size={self.vocab_size}, but 256 bytes and the special tokens take 259; use 300 or more"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise TiedMoeError(
                f"num_experts_per_tok={self.num_experts_per_tok} experts are to be active, but num_experts="
                f"{self.num_experts}; lower the one or raise the other"
            )
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 2:
            raise TiedMoeError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size} into "
                "heads of even width"
            )
        if not self.prompt:
            raise TiedMoeError("prompt is empty, but generation begins with it; give a few words")

    @property
    def text(self) -> str:
        """Path, or hub id, of the text."""
        return self.data or str(files("transformers_tiedmoe") / "data" / NOVELS)

    def path(self, *parts: str) -> Path:
        """Return a path below the output folder."""
        return Path(self.output, *parts)

    def settings(self) -> dict[str, Any]:
        """Return the fields that a result depends on, JSON-able: all but where and whether to write."""
        return {name: value for name, value in asdict(self).items() if name not in ("output", "overwrite")}
