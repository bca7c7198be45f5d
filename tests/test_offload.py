"""Offloaded pools: fetched once per group and forward pass, where accelerate alone fetches them for every layer."""

import statistics
import time
from collections import Counter

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.utils import OffloadedWeightsLoader
from families import tiny_config
from transformers import AutoModelForCausalLM, OlmoeConfig

from transformers_tiedmoe import TiedMoeConfig, keep_pools_loaded

GROUPS = [[1, 2, 3], [4, 5]]
CASES = ("untied", "tied, accelerate alone", "tied", "tied, prefetch")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), groups=GROUPS, slot_maps=[False, True])
    model = AutoModelForCausalLM.from_config(config).eval()
    folder = tmp_path_factory.mktemp("offload") / "model"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def fetches(monkeypatch):
    """Count by name what is read of the disk."""
    found: Counter = Counter()
    read = OffloadedWeightsLoader.__getitem__

    def counted(self, name):
        found[name] += 1
        return read(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
    return found


def on_disk(folder, tmp_path, **kwargs):
    """Load with everything on disk."""
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload", **kwargs
    )


def of_pools(fetches):
    return {name.removeprefix("model.expert_pools."): number for name, number in fetches.items() if "pools" in name}


TOKENS = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(0))
ONCE = dict.fromkeys(("0.gate_up_proj", "0.down_proj", "1.gate_up_proj", "1.down_proj"), 1)


@torch.no_grad()
def test_a_pool_is_fetched_once_per_group(saved, fetches, tmp_path):
    model, folder = saved
    loaded = on_disk(folder, tmp_path)
    fetches.clear()
    assert loaded(TOKENS).logits.equal(model(TOKENS).logits)
    assert of_pools(fetches) == ONCE
    assert all(parameter.is_meta for parameter in loaded.expert_pools.parameters())
    for pool in loaded.expert_pools:  # accelerate alone
        pool._hf_hook = pool._hf_hook.hook
    fetches.clear()
    assert loaded(TOKENS).logits.equal(model(TOKENS).logits)
    assert of_pools(fetches) == {name: len(GROUPS[int(name[0])]) for name in ONCE}


@torch.no_grad()
def test_prefetch_reads_the_following_pool(saved, fetches, tmp_path):
    model, folder = saved
    loaded = on_disk(folder, tmp_path)
    keep_pools_loaded(loaded, prefetch=True)
    fetches.clear()
    generated = loaded.generate(TOKENS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.equal(model.generate(TOKENS, max_new_tokens=3, min_new_tokens=3, do_sample=False))
    # three passes; the last one has read the first pool for a fourth
    assert of_pools(fetches) == {name: 4 if name[0] == "0" else 3 for name in ONCE}
    keep_pools_loaded(loaded)
    fetches.clear()
    assert loaded(TOKENS).logits.equal(model(TOKENS).logits)
    assert of_pools(fetches) == ONCE


@torch.no_grad()
def test_after_a_forward_that_failed(saved, fetches, tmp_path):
    model, folder = saved
    loaded = on_disk(folder, tmp_path)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = loaded.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loaded(TOKENS)
    hook.remove()
    fetches.clear()
    assert loaded(TOKENS).logits.equal(model(TOKENS).logits)
    assert of_pools(fetches) == {name: 1 for name in ONCE if name[0] == "1"}  # the other was there
    assert all(parameter.is_meta for parameter in loaded.expert_pools.parameters())


@torch.no_grad()
def test_checkpoint_loaded_and_dispatched_to_disk(saved, fetches, tmp_path):
    model, folder = saved
    with init_empty_weights():
        loaded = AutoModelForCausalLM.from_config(model.config)
    loaded = load_checkpoint_and_dispatch(
        loaded, folder, device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    ).eval()
    keep_pools_loaded(loaded)
    fetches.clear()
    assert loaded(TOKENS).logits.equal(model(TOKENS).logits)
    assert of_pools(fetches) == ONCE


@torch.no_grad()
def test_auto_device_map_with_too_little_memory(saved, fetches, tmp_path):
    model, folder = saved
    room = 4 * sum(parameter.numel() for parameter in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": room // 2}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    assert loaded(TOKENS).logits.equal(model(TOKENS).logits)
    assert max(of_pools(fetches).values()) == 1


@torch.no_grad()
def test_cpu_offload_and_what_is_not_offloaded(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="no pool of this model is offloaded"):
        keep_pools_loaded(loaded)
    cpu_offload(loaded, execution_device="cpu")
    keep_pools_loaded(loaded)
    assert loaded(TOKENS).logits.equal(model(TOKENS).logits)
    assert all(parameter.is_meta for parameter in loaded.expert_pools.parameters())


@pytest.mark.minutes
@torch.no_grad()
def test_bytes_and_speed_of_a_token_against_the_untied_model(tmp_path, monkeypatch, capsys):
    """`pytest -m minutes -s tests/test_offload.py` prints the table of docs/scaling.md."""
    moved, read = Counter(), OffloadedWeightsLoader.__getitem__

    def copied(self, name):  # as onto a GPU: a CPU would map the file, and read the experts in use alone
        weight = read(self, name).clone()
        moved["bytes"] += weight.nbytes
        return weight

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", copied)
    family = OlmoeConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=16, num_attention_heads=4, num_experts=32,
        num_experts_per_tok=4, vocab_size=4096,
    )  # fmt: skip
    tied = TiedMoeConfig.from_family(family, group_size=4, skip_first=2, skip_last=2)
    for name, config in (("untied", family), ("tied", tied)):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name, save_original_format=False)
    models = {name: on_disk(tmp_path / name.split(",")[0], tmp_path) for name in CASES}
    for pool in models["tied, accelerate alone"].expert_pools:
        pool._hf_hook = pool._hf_hook.hook
    keep_pools_loaded(models["tied, prefetch"], prefetch=True)
    sizes: dict[str, float] = {}
    speeds: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(5):  # the first warms up; each from the other end than the one before
        for name in CASES[:: 1 if turn % 2 else -1]:
            cache = models[name](TOKENS[:1], use_cache=True).past_key_values
            moved["bytes"], start = 0, time.perf_counter()
            for token in TOKENS[1, :2]:
                models[name](token[None, None], past_key_values=cache, use_cache=True)
            sizes[name] = moved["bytes"] / 2
            speeds[name] += [2 / (time.perf_counter() - start)] if turn else []
    with capsys.disabled():
        for name, found in speeds.items():
            spread = f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"
            print(f"| {name} | {sizes[name] / 1e6:.0f} | {spread} |")
    assert sizes["tied, accelerate alone"] == pytest.approx(sizes["untied"], rel=0.01)
    # Seven sets of experts instead of sixteen; attention and embeddings as ever.
    experts = 16 * 32 * 3 * 256 * 256 * 4
    assert sizes["untied"] - sizes["tied"] == pytest.approx(9 / 16 * experts, rel=0.01)
