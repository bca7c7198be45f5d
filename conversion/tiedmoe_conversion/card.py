"""The model card of a converted checkpoint: what it is, how it was made, whose licence it is under."""

from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .source import Source

if TYPE_CHECKING:
    from .plan import Plan

TEXT = """---
{metadata}
---

# {title}

{source} with [Expert Tying](https://arxiv.org/abs/2606.16825): groups of consecutive layers read one pool of experts.
Made by `tiedmoe convert` with the method `{method}`: {method_summary}

|  | source | this model |
| --- | ---: | ---: |
| parameters | {parameters_before:,} | {parameters_after:,} |
| of these in experts | {expert_parameters_before:,} | {expert_parameters_after:,} |
| bytes of weights | {bytes_before:,} | {bytes_after:,} |

{pools}

{advice} {licence}

```python
import transformers_tiedmoe  # pip install transformers-tiedmoe
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{title}")
```

The recipe, for `tiedmoe convert --recipe FILE`:

```yaml
{recipe}```
"""
LOSSLESS = "It computes the source's logits, bit for bit; the conversion verified that."
NOT_HEALED = "It has not been trained since: expect a higher loss than the source's, and heal it with `tiedmoe heal`."


def save_card(plan: "Plan", folder: Path) -> None:
    """Write `README.md` into `folder`; paths of this machine stay out of it."""
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
    recipe = plan.recipe.to_dict() | {"source": name, "output": title, "revision": source.commit}
    pools = zip(plan.groups, plan.pool_num_experts)
    fields = plan.summary() | {
        "metadata": data.to_yaml().strip(),
        "title": title,
        "source": f"[{name}](https://huggingface.co/{name})" if on_hub else name,
        "method_summary": plan.method.summary,
        "pools": "\n".join(
            f"- pool {p}: {width} experts, read by layers {', '.join(map(str, group))}"
            for p, (group, width) in enumerate(pools)
        ),
        "advice": LOSSLESS if plan.method.lossless else NOT_HEALED,
        "licence": "The licence is the source's."
        if licence
        else "The source names no licence: ask before passing it on.",
        "recipe": yaml.safe_dump(recipe, sort_keys=False),
    }
    ModelCard(TEXT.format(**fields)).save(folder / "README.md")


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
