"""Controls that no conversion makes: a tied model trained from scratch, a source with fewer experts in every layer."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from tiedmoe_demo import DemoConfig
from tiedmoe_demo.train_source import source_config, train_on_text
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM


def train_tied(config: DemoConfig, source: Path, folder: Path) -> None:
    """Train a tied model from random weights, exactly as `train_source` trains the source, unless `folder` is there.

    `source_steps`, sizes and tying fields of `config` count; the tokenizer is the `source`'s.
    """
    if folder.exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(source)
    set_seed(config.seed)
    tying = {name: getattr(config, name) for name in ("group_size", "skip_first", "skip_last")}
    model = AutoModelForCausalLM.from_config(TiedMoeConfig.from_family(source_config(config, tokenizer), **tying))
    draft = folder.with_name(f".{folder.name}.draft")
    train_on_text(model, tokenizer, config, draft, lambda done, total, what: None)
    for each in (model, tokenizer):
        each.save_pretrained(draft)
    draft.rename(folder)


def prune(source: Path, folder: Path, share: float, keep: str = "magnitude", seed: int = 0) -> None:
    """Save the source with `share` of the experts of every layer, and those rows of its router, into `folder`.

    It is saved as a tied model without a group, the family's own but for a balance loss in every layer: what all the
    study's models are healed with. `keep` is "random", or "magnitude": those of the largest product of the Frobenius
    norm of the expert's weights and the norm of its row of the router.
    """
    model = AutoModelForCausalLM.from_pretrained(source)
    num_kept = round(share * model.config.num_experts)
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for index in range(model.config.num_hidden_layers):
        layer = f"model.layers.{index}.mlp."
        parts = [layer + part for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")]
        router, gate_up, down = (state[part].flatten(1) for part in parts)
        magnitude = router.norm(dim=1) * torch.cat([gate_up, down], 1).norm(dim=1)
        scores = {"magnitude": magnitude, "random": torch.rand(len(router), generator=generator)}[keep]
        chosen = scores.topk(num_kept).indices.sort().values
        state.update({part: state[part][chosen] for part in parts})
    model.config.num_experts = num_kept
    pruned = TiedMoeForCausalLM(TiedMoeConfig.from_family(model.config, groups=[]))
    pruned.load_state_dict(state)
    for each in (pruned, AutoTokenizer.from_pretrained(source)):
        each.save_pretrained(folder)
