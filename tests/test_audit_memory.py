"""Memory predicted from a config alone, against what torch allocates for the same model, and public figures.

The allocator's own record is the reference: torch's profiler reports every allocation of the CPU. Predictions are
equal to it but for some bytes, so 5 % leaves no room for a tensor of the model that is forgotten.
"""

import dataclasses
import gc
import json

import huggingface_hub
import pytest
import torch
from checkpoints import save_source
from families import text_families, tiny_config
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from tiedmoe_demo.figures import peak_bytes
from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.audit import memory
from transformers_tiedmoe.audit.memory import MemoryOptions
from transformers_tiedmoe.audit.memory_cache import prefill
from transformers_tiedmoe.audit.memory_parameters import Tensor, count_parameters, list_tensors
from transformers_tiedmoe.audit.memory_training import activation_bytes, plan_training
from transformers_tiedmoe.audit.subject import Subject, build_skeleton, layers_of, open_subject
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.training.muon import Muon, muon_parameter_groups

BATCH, BLOCK, CONTEXT, VOCABULARY = 2, 64, 100, 96
CONVOLUTIONS = {"inkling_text", "inkling2_text"}  # oneDNN's take room of their own


def config_of(family: str):
    """A tiny config with keys and values of one size.

    Of two sizes torch's CPU attends by a kernel that keeps every attention weight; GPUs have one that does not, which
    is what is predicted.
    """
    sizes = tiny_config(family).to_dict()
    is_latent = "qk_nope_head_dim" in sizes
    return tiny_config(
        family, **({"v_head_dim": sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]} if is_latent else {})
    )


def tied(config, **fields):
    own = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    return TiedMoeConfig(family=config.model_type, **{**own, **fields})


def subject_of(config, path="") -> Subject:
    return Subject(config.model_type, path, config, layers_of(build_skeleton(config)))


def parameters_of(config):
    model = build_skeleton(config)
    return count_parameters(list_tensors(model, subject_of(config), {}))


def training_step(model, tokens):
    return lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def real_model(config):
    """A model in training whose gradients are there already."""
    model = AutoModelForCausalLM.from_config(config).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, torch.randint(VOCABULARY, (BATCH, BLOCK))


def assert_activations(config, checkpointing: bool) -> None:
    model, tokens = real_model(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    predicted = activation_bytes(build_skeleton(config), BATCH, BLOCK, checkpointing)
    assert predicted == pytest.approx(peak_bytes(training_step(model, tokens)), rel=0.05)


def assert_cache(config) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT))
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    tensors = {id(tensor): tensor for tensor in _all_tensors(cache)}.values()  # keys may be the values too
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert prefill(build_skeleton(config), CONTEXT, BATCH).cache_bytes == held


def _all_tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        value = list(vars(value).values())
    return [t for each in value for t in _all_tensors(each)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize(("family", "checkpointing"), [("olmoe", False), ("gpt_oss", False), ("deepseek_v3", True)])
def test_activations_are_those_of_a_real_step(family, checkpointing):
    assert_activations(config_of(family), checkpointing)


SOFT = {"routing": "softmoe", "softmoe": {"budget": 9, "alpha": 0.05}}


@pytest.mark.parametrize("fields", [{}, {"residual_rank": 4}, SOFT], ids=["pools", "residual", "soft"])
def test_activations_of_a_tied_model(fields):
    assert_activations(tied(tiny_config("qwen3_moe"), group_size=2, skip_first=1, skip_last=1, **fields), False)


def test_activations_under_autocast():
    config = tiny_config("olmoe")
    model, tokens = real_model(config)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()

    predicted = activation_bytes(build_skeleton(config), BATCH, BLOCK, autocast=torch.bfloat16)
    assert predicted == pytest.approx(peak_bytes(step), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(text_families()) - CONVOLUTIONS - {"gemma4"}))
def test_activations_of_every_family(family):
    for checkpointing in (False, True):
        assert_activations(config_of(family), checkpointing)


@pytest.mark.parametrize("family", ["gpt_oss", "jamba", "minimax"])
def test_cache_is_what_a_real_prompt_leaves(family):
    assert_cache(tiny_config(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(text_families()) - {"gemma4"}))  # the config of its text is gemma4_text
def test_cache_of_every_family(family):
    assert_cache(tiny_config(family))


def test_sliding_windows_bound_the_cache():
    config = tiny_config("mixtral", sliding_window=8)
    one = 2 * BATCH * 2 * 8 * 4  # keys and values of a token in a layer: kv heads, head size, float32
    counter = 8  # of the tokens seen; the window is full with the next token
    assert prefill(build_skeleton(config), 1000, BATCH).cache_bytes == 6 * (7 * one + counter)


def test_multi_head_latent_attention_caches_the_latent():
    config = tiny_config("deepseek_v3", kv_lora_rank=16, qk_rope_head_dim=8)
    assert prefill(build_skeleton(config), CONTEXT, 1).cache_bytes == 6 * CONTEXT * (16 + 8) * 4


def test_inference_is_that_of_a_real_prompt():
    config = tiny_config("gpt_oss")
    found = memory.measure(
        subject_of(config), MemoryOptions(context=CONTEXT, batch_size=BATCH, dtypes=("float32",))
    ).inference[0]
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT))
    held = []

    def step():
        with torch.no_grad():
            held.append(model(input_ids=tokens, use_cache=True, logits_to_keep=1))

    assert found.cache_bytes + found.working_bytes == pytest.approx(peak_bytes(step), rel=0.05)
    tensors = [*model.parameters(), *model.buffers()]
    assert found.weight_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("group_size", [1, 2])
def test_training_is_that_of_a_real_adamw_step(group_size):
    config = tied(tiny_config("olmoe"), group_size=group_size, skip_first=1, skip_last=1)
    options = MemoryOptions(batch_size=BATCH, block_size=BLOCK, precision="float32")
    found = next(each for each in memory.measure(subject_of(config), options).training if each.strategy == "one")
    model, tokens = real_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = {
        "weight_bytes": [*model.parameters(), *model.buffers()],
        "gradient_bytes": [parameter.grad for parameter in model.parameters()],
        "optimizer_bytes": states,
    }
    total = 0
    for name, tensors in held.items():
        total += (num_bytes := sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        assert getattr(found, name) == pytest.approx(num_bytes, rel=0.05), name
    step = training_step(model, tokens)
    total += peak_bytes(lambda: (step(), optimizer.step()))
    assert found.total_bytes == pytest.approx(total, rel=0.05)


def test_muons_states_are_those_of_its_own_optimizer():
    """Residuals of tied layers, norms, biases, embeddings and the budget of soft routing are AdamW's there."""
    config = tied(tiny_config("olmoe"), group_size=2, residual_rank=2, **SOFT)
    options = MemoryOptions(batch_size=BATCH, block_size=BLOCK, precision="float32")
    found = next(
        each
        for each in memory.measure(subject_of(config), options).training
        if (each.strategy, each.optimizer) == ("one", "muon")
    )
    model, _ = real_model(config)
    optimizer = Muon(muon_parameter_groups(model))
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert found.optimizer_bytes == sum(state.nbytes for state in states)


# The published numbers of parameters, in billions: all of them, and those that a token uses. gpt-oss leaves the
# embedding out of the latter.
PUBLISHED = [
    ("OLMoE-1B-7B", OlmoeConfig(intermediate_size=1024), 6.9, 1.3),  # arXiv 2409.02060, section 2
    ("Mixtral-8x7B", MixtralConfig(), 46.7, 12.9),  # mistral.ai/news/mixtral-of-experts
    (
        "Qwen3-30B-A3B",  # its model card; the fields are those of arXiv 2505.09388, table 2
        Qwen3MoeConfig(
            hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
        ),
        30.5,
        3.3,
    ),
    (
        "Qwen3-235B-A22B",  # likewise
        Qwen3MoeConfig(
            hidden_size=4096, moe_intermediate_size=1536, num_hidden_layers=94, num_attention_heads=64,
            num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
        ),
        235,
        22,
    ),
    ("DeepSeek-V3", DeepseekV3Config(), 671, 37),  # arXiv 2412.19437, section 4.2
    ("gpt-oss-120b", GptOssConfig(), 116.83, 5.13),  # arXiv 2508.10925, table 1
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "total", "active"), PUBLISHED, ids=[each[0] for each in PUBLISHED])
def test_parameters_are_the_published_ones(name, config, total, active):
    found = parameters_of(config)
    used = found["total"].active - (found["embedding"].active if name.startswith("gpt-oss") else 0)
    assert found["total"].unique / 1e9 == pytest.approx(total, rel=0.005)
    assert used / 1e9 == pytest.approx(active, rel=0.02)


def test_tying_halves_the_experts_and_leaves_the_active_ones():
    config = OlmoeConfig(intermediate_size=1024)
    one, two, four = (parameters_of(tied(config, group_size=g)) for g in (1, 2, 4))
    assert two["experts"].unique == one["experts"].unique * 10 // 16  # 4 untied layers and 6 pools
    assert four["experts"].unique == one["experts"].unique * 7 // 16
    assert one["experts"].read == two["experts"].read == four["experts"].read
    assert one["total"].active == two["total"].active == four["total"].active


def test_a_pool_counts_once_and_is_read_by_every_layer():
    config = tied(tiny_config("olmoe"), groups=[[1, 2, 3]], residual_rank=2)
    found = memory.measure(subject_of(config), MemoryOptions(context=16, block_size=16))
    one = 4 * (48 * 32 + 32 * 24)  # gate_up [E, 2I, H] and down [E, H, I]
    residual = 4 * 2 * (48 + 32 + 32 + 24)
    experts = found.parameters["experts"]
    assert experts.unique == 4 * one + 3 * residual  # layers 0, 4, 5 and the pool
    assert experts.read == 6 * one + 3 * residual
    assert experts.active == experts.read // 2  # top-2 of 4
    by_layer = [layer.parameters.get("experts") for layer in found.layers]
    assert by_layer == [one, one + residual, residual, residual, one, one]
    real = AutoModelForCausalLM.from_config(config)
    assert found.parameters["total"].unique == sum(parameter.numel() for parameter in real.parameters())


def test_soft_routing_counts_its_mass():
    fields = {"routing": "softmoe", "softmoe": {"layers": [1.0, 1.5, 2.0, 2.0, 1.5, 1.0]}}
    config = tied(tiny_config("olmoe"), group_size=2, **fields)
    assert parameters_of(config)["experts"].active == 9 * (48 * 32 + 32 * 24)


def test_every_parameter_has_a_component_and_tied_embeddings_count_once():
    config = tiny_config("deepseek_v3", tie_word_embeddings=True)
    found = parameters_of(config)
    assert found["embedding"].unique == VOCABULARY * 32
    assert found["embedding"].read == 2 * VOCABULARY * 32
    assert found["head"].unique == found["other"].unique == 0
    assert min(found[name].unique for name in ("attention", "router", "shared_experts", "dense_mlp", "norm")) > 0


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "F32"), (torch.bfloat16, "BF16")])
def test_stored_bytes_are_those_of_the_file(dtype, name, tmp_path):
    save_source(tmp_path, dtype)
    content = (tmp_path / "model.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert memory.stored_bytes(open_subject(str(tmp_path))) == {name: len(content) - 8 - header}


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-4]), r"is truncated: it has [\d,]+ of [\d,]+ bytes"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "file is truncated"),
        (lambda file: file.rename(file.with_name("model-1.safetensors")), "No such file.*model-2.safetensors"),
        (lambda file: file.with_name("model.safetensors.index.json").write_text("{"), "cannot read the headers"),
    ],
    ids=["cut", "header cut", "shard missing", "index broken"],
)
def test_damaged_weight_files_are_an_error(damage, match, tmp_path):
    save_source(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    damage(tmp_path / "model.safetensors")
    if "index" in match or "headers" in match:
        (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    with pytest.raises(TiedMoeError, match=f"{match}.*copy or download them again"):
        memory.stored_bytes(open_subject(str(tmp_path)))


def save_quantised(folder) -> None:
    """A checkpoint as DeepSeek-V3's: fp8 values with float32 scales, and the rest in bfloat16."""
    tiny_config("deepseek_v3", quantization_config={"quant_method": "fp8"}).save_pretrained(folder)
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(24, 32, dtype=torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_inv": torch.zeros(1, 1),
        "lm_head.weight": torch.zeros(96, 32, dtype=torch.bfloat16),
    }
    save_file(tensors, folder / "model.safetensors")


def test_quantised_weights_count_as_they_are_stored(tmp_path):
    save_quantised(tmp_path)
    found = memory.measure(open_subject(str(tmp_path)), MemoryOptions(context=16, block_size=16))
    assert found.stored_dtypes == {"F8_E4M3": 24 * 32, "F32": 4, "BF16": 2 * 96 * 32}
    assert found.checkpoint_bytes == 24 * 32 + 4 + 2 * 96 * 32
    assert [(each.dtype, each.weight_bytes) for each in found.inference][1:] == [("as stored", found.checkpoint_bytes)]


def test_headers_of_the_hub(tmp_path, monkeypatch):
    save_quantised(tmp_path)
    metadata = huggingface_hub.get_local_safetensors_metadata(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", {"someone/model": metadata}.__getitem__)
    subject = dataclasses.replace(subject_of(tiny_config("olmoe")), path="someone/model")
    assert sum(memory.stored_bytes(subject).values()) == 24 * 32 + 4 + 2 * 96 * 32


def test_unreadable_headers_are_noted():
    subject = dataclasses.replace(subject_of(tiny_config("olmoe")), path="no/such/model")
    assert memory.stored_bytes(subject) == {}
    assert "could not be read" in subject.notes[0]


def fake_tensors():
    """A root, two layers that read a pool, and one with its own experts."""
    return [
        Tensor("embed.weight", (10, 10), "embedding", None, 1, 100),
        Tensor("layers.0.attn.weight", (20, 10), "attention", 0, 1, 200, is_muons=True),
        Tensor("layers.1.attn.weight", (20, 10), "attention", 1, 1, 200, is_muons=True),
        Tensor("expert_pools.0.up", (4, 10, 10), "experts", 0, 2, 400, pool=0, last=1, is_muons=True),
        Tensor("layers.2.experts.up", (4, 10, 5), "experts", 2, 1, 100, is_muons=True),
        Tensor("layers.2.norm.weight", (10,), "norm", 2, 1, 10),
    ]


def plan(strategy, **fields):
    given = {
        "tensors": fake_tensors(), "buffer_bytes": 0, "activations": 1, "precision": "float32", "optimizer": "adamw",
        "strategy": strategy, "num_gpus": 4, "tokens": 8, "hidden_size": 10, "top_k": {0: 2, 1: 2, 2: 2},
        "checkpointing": False,
    }  # fmt: skip
    return plan_training(**{**given, **fields})


def test_strategies_by_hand():
    everything, experts = 100 + 200 + 200 + 400 + 200 + 10, 600
    one, ddp, fsdp2, parallel = map(plan, ("one", "ddp", "fsdp2", "expert_parallel"))
    assert (one["weight_bytes"], one["gradient_bytes"], one["optimizer_bytes"]) == (
        4 * everything,
        4 * everything,
        8 * everything,
    )
    assert one["total_bytes"] == 16 * everything + 1
    assert one["communicated_bytes"] == 0
    assert ddp["gradient_bytes"] == 8 * everything
    assert ddp["communicated_bytes"] == 2 * 3 * everything
    # FSDP2: root 100; units 200, 200, 210 and the pool 400 of the first two; the last two layers and the pool are
    # gathered at a time, and a layer's gradients with the pool's wait whole
    assert fsdp2["weight_bytes"] == everything + 4 * (100 + 200 + 400 + 210)
    assert fsdp2["gradient_bytes"] == everything + (4 + 4) * (200 + 400)
    assert fsdp2["communicated_bytes"] == 3 * (100 + 2 * 1010 + everything)
    assert parallel["weight_bytes"] == 4 * (everything - experts) + experts
    assert parallel["communicated_bytes"] == 2 * 3 * (everything - experts) + 4 * 3 * 8 * 6 * 10
    # Muon keeps one number of a matrix: all but the embedding and the norm
    assert plan("one", optimizer="muon")["optimizer_bytes"] == 4 * (2 * 110 + 1000)
    mixed = plan("fsdp2", precision="mixed")
    assert mixed["weight_bytes"] == everything + 2 * (100 + 200 + 400 + 210)
    assert mixed["communicated_bytes"] == 3 * (100 + 2 * 1010) // 2 + 3 * everything


def test_fsdp2_sends_what_torch_sends_and_needs_no_more():
    """One process of four, whose collectives a stand-in of torch's own takes."""
    config, num_gpus = tiny_config("olmoe", hidden_size=128, num_hidden_layers=8), 4
    options = MemoryOptions(num_gpus=num_gpus, batch_size=BATCH, block_size=BLOCK, precision="float32")
    found = next(each for each in memory.measure(subject_of(config), options).training if each.strategy == "fsdp2")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_gpus)
    try:
        mesh = init_device_mesh("cpu", (num_gpus,))
        model, tokens = real_model(config)
        model.zero_grad()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        step = training_step(fully_shard(model, mesh=mesh), tokens)
        step()
        shards = sum(parameter.to_local().untyped_storage().nbytes() for parameter in model.parameters())
        needed = 4 * shards + peak_bytes(step)  # with the gradients' and AdamW's
        with Collectives() as sent:
            step()
    finally:
        torch.distributed.destroy_process_group()
    assert found.communicated_bytes == pytest.approx(sent.num_bytes * (num_gpus - 1) / num_gpus, rel=0.001)
    assert needed <= found.total_bytes <= 1.2 * needed  # the units' most and the activations' are not at one time


def test_ddp_keeps_buckets_of_all_gradients():
    config = tiny_config("olmoe")
    options = MemoryOptions(batch_size=BATCH, block_size=BLOCK, precision="float32")
    found = next(each for each in memory.measure(subject_of(config), options).training if each.strategy == "ddp")
    model, tokens = real_model(config)
    model.zero_grad()
    wrapped = []
    gc.collect()  # what earlier tests left would be freed while this one counts
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        # without the first broadcast, whose copy another thread may free after the buckets are there
        buckets = peak_bytes(lambda: wrapped.append(DistributedDataParallel(model, init_sync=False)))
        step = training_step(wrapped[0], tokens)
        for _ in range(3):  # the first makes the gradients, the second rebuilds the buckets
            step()
        needed = buckets + 4 * sum(parameter.nbytes for parameter in model.parameters())
        needed += min(peak_bytes(step) for _ in range(3))  # another thread's work only adds
    finally:
        torch.distributed.destroy_process_group()
    assert found.total_bytes == pytest.approx(needed, rel=0.05)


class Collectives(TorchDispatchMode):
    """Counts the bytes of whole tensors that are gathered or reduced."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.num_bytes += max(tensor.nbytes for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor))
        return func(*args, **(kwargs or {}))


def test_fits_compares_with_the_gpus_that_were_asked_for():
    options = MemoryOptions(context=16, block_size=16, gpus=("T4 16GB", "H100 80GB"))
    found = memory.measure(subject_of(tiny_config("olmoe")), options)
    assert found.gpus == {"T4 16GB": round(14.75 * 2**30), "H100 80GB": round(79.11 * 2**30)}
    assert found.inference[0].fits == {"T4 16GB": True, "H100 80GB": True}
    assert found.checkpoint_bytes is None
    assert not found.stored_dtypes
    assert {(each.optimizer, each.strategy, each.gradient_checkpointing) for each in found.training} == {
        (optimizer, strategy, checkpointing)
        for optimizer in ("adamw", "muon")
        for strategy in ("one", "ddp", "fsdp2", "expert_parallel")
        for checkpointing in (False, True)
    }


def test_options_are_checked():
    with pytest.raises(TiedMoeError, match="context=0"):
        MemoryOptions(context=0)
    with pytest.raises(TiedMoeError, match="dtypes has 'int8'"):
        MemoryOptions(dtypes=("int8",))
    with pytest.raises(TiedMoeError, match="precision='fp4'"):
        MemoryOptions(precision="fp4")
    with pytest.raises(TiedMoeError, match="gpus has 'TPU'"):
        MemoryOptions(gpus=("TPU",))
