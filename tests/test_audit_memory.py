"""Memory predicted from a config alone, against what torch allocates for the same model."""

import pytest
import torch
from families import tiny_config
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.audit import memory
from transformers_tiedmoe.audit.memory import MemoryOptions
from transformers_tiedmoe.audit.memory_training import activation_bytes
from transformers_tiedmoe.audit.subject import Subject, build_skeleton, layers_of
from transformers_tiedmoe.errors import TiedMoeError

BATCH, BLOCK, VOCABULARY = 2, 64, 96


def subject_of(config, path="") -> Subject:
    return Subject(config.model_type, path, config, layers_of(build_skeleton(config)))


def tied(family: str, **fields):
    return TiedMoeConfig(family=family, **{**tiny_config(family).to_dict(), **fields})


def peak_bytes(step) -> int:
    """Return the most bytes that torch's CPU allocator holds at a time while `step` runs, beside what it held."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    "config",
    [tiny_config("olmoe"), tied("qwen3_moe"), tied("gpt_oss")],
    ids=lambda config: getattr(config, "family", config.model_type),
)
def test_activations_of_a_real_step(config):
    model = AutoModelForCausalLM.from_config(config).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(VOCABULARY, (BATCH, BLOCK))

    def step():
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    predicted = activation_bytes(build_skeleton(config), BATCH, BLOCK, checkpointing=False)
    assert predicted == pytest.approx(peak_bytes(step), rel=0.05)


def test_a_pool_counts_once_and_is_read_by_every_layer():
    config = tied("olmoe", groups=[[1, 2, 3]])
    found = memory.measure(subject_of(config), MemoryOptions(context=16, block_size=16))
    one = 4 * (2 * 24 * 32 + 32 * 24)  # experts, gate_up [2I, H] and down [H, I]
    experts = found.parameters["experts"]
    assert experts.unique == 4 * one  # layers 0, 4, 5 and the pool
    assert experts.read == 6 * one
    assert experts.active == 6 * one // 2  # top-2 of 4
    assert [layer.parameters.get("experts", 0) for layer in found.layers] == [one, one, 0, 0, one, one]
    assert found.parameters["total"].unique == sum(
        p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()
    )


def test_options_are_checked():
    with pytest.raises(TiedMoeError, match="context=0"):
        MemoryOptions(context=0)
    with pytest.raises(TiedMoeError, match="dtypes has 'int8'"):
        MemoryOptions(dtypes=("int8",))
    with pytest.raises(TiedMoeError, match="gpus has 'TPU'"):
        MemoryOptions(gpus=("TPU",))
