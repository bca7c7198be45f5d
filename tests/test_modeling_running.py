"""The tied model where it runs: generation, copies, devices, backends, parallelism, export, remote code."""

import copy
import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_config
from test_families import family_model, make_experts_equal, tie
from tied_models import (
    OLDEST,
    TYING,
    tiny_model,
    tokens_fixture,  # noqa: F401
)
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
)
from transformers.initialization import no_init_weights

import transformers_tiedmoe
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.parallel import POOLS


def test_beam_search_sampling_and_left_padding(tokens):
    source = family_model("olmoe")
    model = tie(source, **TYING)
    make_experts_equal(source, model.config.groups)
    common = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    beams = {"num_beams": 3, "do_sample": False, **common}
    assert torch.equal(model.generate(tokens, **beams), source.generate(tokens, **beams))
    for _ in range(2):
        drawn = []
        for m in (model, source):
            torch.manual_seed(7)
            drawn.append(m.generate(tokens, do_sample=True, top_k=5, **common))
        assert torch.equal(*drawn)
    short = tokens[:, 4:]
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), short], dim=1)
    mask = (torch.arange(10) >= 4).long().expand(2, -1)
    alone = model.generate(short, do_sample=False, **common)
    together = model.generate(padded, attention_mask=mask, do_sample=False, **common)
    assert torch.equal(together[:, 4:], alone)


def test_resize_token_embeddings(tokens):
    model = tiny_model()
    before = model(tokens).logits
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == 120
    torch.testing.assert_close(model(tokens).logits[..., :96], before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(how, tokens):
    model = tiny_model(slot_maps=True, residual_rank=2)
    if how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert type(again) is type(model)
    logits = model(tokens).logits
    torch.testing.assert_close(again(tokens).logits, logits)
    with torch.no_grad():
        again.expert_pools[0].down_proj.zero_()  # the copy's views read the copy's pools
    assert not torch.allclose(again(tokens).logits, logits)
    torch.testing.assert_close(model(tokens).logits, logits)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_set_experts_implementation(implementation, tokens, tmp_path):
    model = tiny_model()
    expected = model(tokens).logits
    model.set_experts_implementation(implementation)
    assert model.expert_pools[0].config._experts_implementation == implementation
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
    assert loaded.config._experts_implementation == implementation
    with pytest.raises(ValueError, match="not supported"):
        model.set_experts_implementation("no_such_backend")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation(attention, tokens):
    model = tiny_model()
    model.set_attn_implementation(attention)
    assert model.model.layers[2].self_attn.config._attn_implementation == attention
    assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("device_map", ["auto", "offload"])
def test_device_map_and_offload(device_map, tokens, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    if device_map == "offload":  # the pools and two layers live on disk, between calls
        on_disk = ("model.expert_pools", "model.layers.2", "model.layers.3")
        on_cpu = (
            "model.embed_tokens",
            "model.norm",
            "model.rotary_emb",
            "lm_head",
            *(f"model.layers.{i}" for i in (0, 1, 4, 5)),
        )
        places = dict.fromkeys(on_disk, "disk") | dict.fromkeys(on_cpu, "cpu")
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
        )
        assert loaded.expert_pools[0].down_proj.is_meta
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_pools_are_never_split_between_devices():
    assert {"PoolOlmoeExperts", "OlmoeDecoderLayer"} <= tiny_model()._no_split_modules


@pytest.mark.parametrize("as_dict", [False, True])
def test_pipeline_parallelism_is_refused(as_dict, tmp_path):
    from transformers.distributed import DistributedConfig

    tiny_model().save_pretrained(tmp_path)
    plan = {"pp_size": 2} if as_dict else DistributedConfig(pp_size=2)
    with pytest.raises(ValueError, match="pp_size=2 on a tied model, whose groups may lie in two stages"):
        AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=plan)


def test_tensor_parallelism_needs_a_transformers_with_plans_by_module(monkeypatch):
    from transformers.distributed.mixin import DistributedMixin

    monkeypatch.delattr(DistributedMixin, "_expand_parallel_plan", raising=False)
    with pytest.raises(ValueError, match=r"tp_size=2 on a tied model needs transformers 5\.23"):
        type(tiny_model()).prepare_distribute_model({"tp_size": 2})


def test_meta_device_and_init_empty_weights():
    from accelerate import init_empty_weights

    config = TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING)
    with torch.device("meta"):
        assert all(p.is_meta for p in TiedMoeForCausalLM(config).parameters())
    with init_empty_weights():
        model = TiedMoeForCausalLM(config)
    assert all(p.is_meta for p in model.parameters())
    buffers = dict(model.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    for name, buffer in TiedMoeForCausalLM(config).named_buffers():
        assert buffers[name].equal(buffer)  # real, as of the family's own model


@pytest.mark.parametrize("slot_maps", [False, True])
def test_without_initialisation_parameters_are_unset_and_buffers_right(slot_maps, tokens):
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING, slot_maps=slot_maps)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_config(config).eval()
    assert all(parameter.isnan().all() for parameter in model.parameters())
    for name, buffer in expected.named_buffers():
        assert model.get_buffer(name).equal(buffer), name
    torch.manual_seed(0)
    model.init_weights()
    assert model(tokens).logits.equal(expected(tokens).logits)


@pytest.mark.parametrize("slot_maps", [False, True])
def test_dispatch_of_a_model_built_without_memory(slot_maps, tokens, tmp_path):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    loaded = tiny_model(slot_maps=slot_maps)
    loaded.save_pretrained(tmp_path / "model")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(loaded.config)
    model = load_checkpoint_and_dispatch(
        model, tmp_path / "model", device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert model.eval()(tokens).logits.equal(loaded(tokens).logits)


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("groups", [[], [[1, 2], [3, 4]]])
def test_export_with_our_experts(groups, family, tokens):
    config = TiedMoeConfig.from_family(tiny_config(family, use_cache=False), groups=groups)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="tiedmoe").eval()
    exported = torch.export.export(model, (tokens,), strict=False).module()
    torch.testing.assert_close(exported(tokens).logits, model(tokens).logits)


def test_continuous_batching_of_a_model_that_reports_router_logits(tokens):
    """`generate_batch` packs requests and gives no labels: there is no loss to add router losses to."""
    model = tiny_model(output_router_logits=True, num_hidden_layers=4)
    generation = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    size = "block_size" if OLDEST else "page_size"
    small = ContinuousBatchingConfig(**{size: 16}, num_blocks=8, max_batch_tokens=64, max_requests_per_batch=4)
    found = model.generate_batch(tokens.tolist(), generation, small)
    expected = model.generate(tokens, generation_config=generation)[:, tokens.shape[1] :]
    assert sorted(each.generated_tokens for each in found.values()) == sorted(expected.tolist())


@pytest.mark.parametrize("groups", [[], [[1, 2], [3, 4]], [[0, 1, 2], [3, 4, 5]]])
def test_plans_name_the_experts_that_a_model_has(groups):
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), groups=groups)
    model = TiedMoeForCausalLM(config)
    parameters = {re.sub(r"\.\d+", ".*", name) for name, _ in model.named_parameters()}
    experts = {name for name in parameters if "experts." in name or "expert_pools." in name}
    for plan in (model._tp_plan, model._ep_plan):
        named = {name for name in plan if name.endswith("_proj") and "attn" not in name}
        assert named == experts
        assert {name.rpartition(".")[0] for name in named} <= plan.keys()  # and the module, whose calls are hooked
        assert not any(POOLS in name for name in plan) or groups
    assert model._ep_plan.get(f"model.{POOLS}.down_proj") == ("grouped_gemm" if groups else None)
    assert any(POOLS in name for name in model._fsdp_plan) == bool(groups)
    assert not model.base_model._pp_plan


def run_python(code: str, *path_entries: Path, without_us: bool) -> subprocess.CompletedProcess:
    block = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'transformers_tiedmoe':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", (block if without_us else "") + code], capture_output=True, text=True, timeout=300
    )


def test_trust_remote_code_in_a_process_that_never_imported_us(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    load = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})\n"
        "print(type(model).__module__, len(model.expert_pools))\n"
    )
    done = run_python(load, without_us=False)
    assert done.stdout.split() == ["transformers_tiedmoe.modeling_tiedmoe", "2"], done.stderr
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again.keys() == {path.name for path in (tmp_path / "model").iterdir()}
    assert again["tiedmoe_remote.py"] == (tmp_path / "model" / "tiedmoe_remote.py").read_bytes()

    refused = run_python(load, without_us=True)
    assert refused.returncode != 0
    assert f"pip install 'transformers-tiedmoe>={transformers_tiedmoe.__version__}'" in refused.stderr
