"""The model card of a converted checkpoint: what it is, how it was made, whose licence it is under."""

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .checkpoint.reader import Source

if TYPE_CHECKING:
    from .plan import Plan

PACKAGES = ("transformers-tiedmoe", "transformers", "torch")
TEXT = """---
{metadata}
---

# {title}

{source} with [Expert Tying](https://arxiv.org/abs/2606.16825): groups of consecutive layers read one pool of experts.
Made by `tiedmoe convert` from {provenance}.

{methods}

|  | source | this model |
| --- | ---: | ---: |
| parameters | {parameters_before:,} | {parameters_after:,} |
| of these in experts | {expert_parameters_before:,} | {expert_parameters_after:,} |
| bytes of weights | {bytes_before:,} | {bytes_after:,} |

{pools}

{advice} {licence}
{measured}
```python
import transformers_tiedmoe  # pip install transformers-tiedmoe
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{title}")
```

The recipe, for `tiedmoe convert --recipe FILE` (made with {versions}):

```yaml
{recipe}```
"""
MEASURED = """
## What it cost, before any healing

On {tokens:,} held-out tokens of the calibration text ({text}, tokens' sha256 `{digest}`):

|  | source | this model |
| --- | ---: | ---: |
| loss (nats per token) | {loss_before:.4f} | {loss_after:.4f} |
| perplexity | {perplexity_before:.2f} | {perplexity_after:.2f} |

The routers choose {agreement:.1%} of the experts that the source's choose. {dead_slots} of {slots} slots of the tied layers were
chosen by no token ({dead_before} in the source), and {dead_experts} of {experts} experts of the pools were reached by none.
"""
LOSSLESS = "It computes the source's logits, bit for bit; the conversion verified that."
NOT_HEALED = "It has not been trained since: expect a higher loss than the source's, and heal it with `tiedmoe heal`."


def save_card(plan: "Plan", folder: Path, measured: Mapping[str, Any] | None = None, text_digest: str = "") -> None:
    """Write `README.md` into `folder`; paths of this machine stay out of it.

    Args:
        plan: what was done.
        folder: where.
        measured: what `measure` returned, None where nothing was measured.
        text_digest: of the calibration text's tokens.
    """
    source, title = plan.source.opened, PurePath(plan.recipe.output).name
    on_hub = source.commit is not None
    name = source.name if on_hub else PurePath(source.name).name
    licence = source_licence(source)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["moe", "expert-tying", "tiedmoe"],
        base_model=source.name if on_hub else None,
        **licence,
    )
    recipe = public_recipe(plan)
    pools = zip(plan.groups, plan.pool_num_experts)
    fields = plan.summary() | {
        "metadata": data.to_yaml().strip(),
        "title": title,
        "source": f"[{name}](https://huggingface.co/{name})" if on_hub else name,
        "provenance": (f"revision `{source.commit}`" if on_hub else "a local folder")
        + f", sha256 of its config and headers `{source.fingerprint()}`",
        "methods": "\n".join(
            [f"- `{method.name}`: {method.summary}" for method, _ in plan.recipe.steps]
            + [f"- a residual of rank {plan.recipe.residual_rank} in every tied layer"]
            * bool(plan.recipe.residual_rank)
        ),
        "measured": _measured(plan, measured, text_digest) if measured else "",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "pools": "\n".join(
            f"- pool {p}: {width} experts, read by layers {', '.join(map(str, group))}"
            for p, (group, width) in enumerate(pools)
        ),
        "advice": LOSSLESS if plan.is_lossless else NOT_HEALED,
        "licence": "The licence is the source's."
        if licence
        else "The source names no licence: ask before passing it on.",
        "recipe": yaml.safe_dump(recipe, sort_keys=False),
    }
    ModelCard(TEXT.format(**fields)).save(folder / "README.md")


def public_recipe(plan: "Plan") -> dict[str, Any]:
    """The recipe as others can use it: names instead of this machine's paths."""
    source, recipe = plan.source.opened, plan.recipe.to_dict()
    name = source.name if source.commit is not None else PurePath(source.name).name
    texts = {key: recipe[key] and PurePath(recipe[key]).name for key in ("calibration",) if _is_path(recipe[key])}
    return {
        **recipe,
        **texts,
        "source": name,
        "output": PurePath(plan.recipe.output).name,
        "revision": source.commit,
        "statistics": None,
        "push_to_hub": None,
    }


def _is_path(text: str | None) -> bool:
    return text is not None and Path(text).expanduser().exists()


def _measured(plan: "Plan", measured: Mapping[str, Any], text_digest: str) -> str:
    slots, experts = measured["dead_slots"].values(), measured["dead_experts"].values()
    before, after = measured["loss_before"], measured["loss_after"]
    return MEASURED.format(
        tokens=measured["tokens"],
        text=public_recipe(plan)["calibration"],
        digest=text_digest,
        loss_before=before,
        loss_after=after,
        perplexity_before=_exp(before),
        perplexity_after=_exp(after),
        agreement=measured["routing_agreement"]["mean"],
        slots=sum(each["of"] for each in slots),
        dead_slots=sum(each["tied"] for each in slots),
        dead_before=sum(each["source"] for each in slots),
        experts=sum(each["of"] for each in experts),
        dead_experts=sum(each["dead"] for each in experts),
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def source_licence(source: Source) -> dict[str, Any]:
    """The licence fields of the source's own model card; empty where there is no card or it names none."""
    path = source.folder / "README.md"
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError, UnicodeDecodeError):
        return {}  # a card that cannot be read names no licence; ours says so
    fields = ("license", "license_name", "license_link")
    return {name: data[name] for name in fields if isinstance(data.get(name), str)} if data.get("license") else {}
