"""RouterHealth: values by hand, nothing of the training changed, warnings, reports, adapters, two processes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_text, save_tied
from datasets import Dataset
from router_health_worker import arguments, rows, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback

from transformers_tiedmoe.training.heal import HealConfig, heal
from transformers_tiedmoe.training.router_health import RouterHealth

HERE = Path(__file__).parent


class Report(TrainerCallback):
    """A reporting integration, which is there before any other callback."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep what is reported."""
        self.logs.append(dict(logs))


def train(model, folder, data=None, health=True, **fields):
    report = Report()
    trainer = Trainer(model, arguments(folder, **fields), train_dataset=data or rows(), callbacks=[report])
    found = RouterHealth().attach(trainer) if health else None
    trainer.train()
    return [log for log in report.logs if "loss" in log], found, trainer


def by_hand(model, input_ids, layers, keeps=None, top_k=2):
    """Entropy, largest share, dead experts, active experts and agreement out of the router logits, token by token."""
    with torch.no_grad():
        logits = model(input_ids, output_router_logits=True).router_logits
    chosen = {
        layer: [set(token.topk(top_k).indices.tolist()) for token in logits[layer].flatten(end_dim=-2)]
        for layer in layers
    }
    keeps = [True] * input_ids.numel() if keeps is None else keeps.flatten().tolist()
    found = {}
    for layer, tokens in chosen.items():
        tokens = [token for token, keep in zip(tokens, keeps) if keep]
        loads = [sum(expert in token for token in tokens) for expert in range(4)]
        shares = [load / sum(loads) for load in loads]
        found[f"router_entropy/layer_{layer}"] = -sum(p * math.log(p) for p in shares if p) / math.log(4)
        found[f"router_max_share/layer_{layer}"] = max(shares)
        found[f"router_dead_experts/layer_{layer}"] = loads.count(0)
        found[f"router_active_experts/layer_{layer}"] = top_k
    pairs = [(a, b) for a, b, keep in zip(chosen[1], chosen[2], keeps) if keep]
    found["router_agreement/layer_2"] = sum(len(a & b) for a, b in pairs) / (top_k * len(pairs))
    return found


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "not_reentrant"])
def test_values_are_those_by_hand_and_training_is_the_same_bit_by_bit(tmp_path, checkpointing):
    """Layers 1 and 2 of four read one pool. Two accumulated batches are one step; repeated forwards count once."""
    options = {"gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 5}
    if checkpointing is not None:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    model, other = tiny_model(), tiny_model()
    data = rows(num=8)  # two steps of two batches of two
    logs, health, trainer = train(model, tmp_path / "a", data, **options)
    train(other, tmp_path / "b", data, health=False, **options)
    assert all(tensor.equal(other.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert [sum(name.startswith("router_") for name in log) for log in logs] == [17, 17]
    assert [log["router_entropy/layer_0"] for log in logs] == [
        log["router_entropy/layer_0"] for log in trainer.state.log_history if "loss" in log
    ]
    assert not health.warnings
    frozen = tiny_model()
    logs, _, _ = train(frozen, tmp_path / "c", data, **(options | {"max_steps": 1, "logging_steps": 1}))
    batch = torch.tensor(data[:4]["input_ids"])
    expected = by_hand(tiny_model(), batch, range(4))
    assert {name: value for name, value in logs[0].items() if name.startswith("router_")} == pytest.approx(expected)


def test_hooks_are_there_in_steps_that_are_logged_alone(tmp_path):
    model, seen = tiny_model(), []

    def num_hooks():
        return sum(len(each._forward_pre_hooks) for each in model.modules())

    before = num_hooks()
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(num_hooks() > before))
    train(model, tmp_path, logging_steps=3, max_steps=4)
    assert seen == [False, False, True, False]
    assert num_hooks() == before


def test_padding_does_not_count(tmp_path):
    ids, mask = torch.tensor(rows(num=2)[:2]["input_ids"]), torch.ones(2, 16, dtype=torch.int64)
    mask[0, 3:] = 0
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist(), "attention_mask": mask.tolist()})
    logs, _, _ = train(tiny_model(), tmp_path, data, max_steps=1, logging_steps=1)
    expected = by_hand(tiny_model(), ids, range(4), mask.bool())  # causal: what comes later changes nothing
    assert {name: value for name, value in logs[0].items() if name.startswith("router_")} == pytest.approx(expected)


def test_a_collapsed_router_and_dead_experts_are_warned_of_once(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight.zero_()  # all experts alike: every token takes the same two
    model.model.layers[2].mlp.gate.weight.requires_grad_(False)
    _, health, _ = train(
        model, tmp_path, rows(num=64), max_steps=9, logging_steps=1, per_device_train_batch_size=8, learning_rate=1e-4
    )
    collapse, dead = health.warnings
    assert "the routers of layers [2] have collapsed" in collapse
    assert "no token uses these experts any more, by layer: {2: [" in dead
    assert all("output_router_logits=True" in warning for warning in health.warnings)


def test_families_of_transformers_and_dense_models(tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    logs, _, _ = train(MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)), tmp_path, logging_steps=1)
    assert 0 < logs[0]["router_entropy/layer_1"] <= 1
    assert not any("agreement" in name for name in logs[0])
    logs, health, _ = train(LlamaForCausalLM(LlamaConfig(**sizes)), tmp_path, logging_steps=1)
    assert not any(name.startswith("router_") for name in logs[0])
    assert health.warnings == ["LlamaForCausalLM has no experts: RouterHealth has nothing to record"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_heal_logs_it(tmp_path, lora, monkeypatch):
    kept, log = [], Trainer.log

    def spy(self, *args, **kwargs):
        log(self, *args, **kwargs)
        kept.append(dict(self.state.log_history[-1]))

    monkeypatch.setattr(Trainer, "log", spy)
    (tmp_path / "text.txt").write_text(make_text())
    config = HealConfig(
        save_tied(tmp_path / "tied"), str(tmp_path / "text.txt"), str(tmp_path / "healed"), max_steps=2, block_size=16,
        batch_size=4, lora=lora, lora_rank=2, logging_steps=1,
    )  # fmt: skip
    heal(config)
    logged = [log for log in kept if "loss" in log]
    assert len(logged) == 2
    assert all(0 <= each["router_agreement/layer_2"] <= 1 for each in logged)
    assert all(each["router_active_experts/layer_0"] == 2 for each in logged)


@pytest.mark.minutes
@pytest.mark.xdist_group("two_processes")
def test_two_processes_log_what_one_does(tmp_path):
    worker = str(HERE / "router_health_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker]
    for command, batch, name in ((launch, 2, "two"), ([sys.executable, worker], 4, "one")):
        done = subprocess.run(
            [*command, str(tmp_path / name), str(batch)], cwd=HERE, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "logs.json").read_text()) for name in ("one", "two"))
    assert any(name.startswith("router_agreement") for name in one[0])
    for log, expected in zip(two, one, strict=True):
        found = {name: log[name] for name in expected if name.startswith("router_")}
        # After a step the weights differ in their last bits, which may turn a choice.
        assert found == pytest.approx({name: expected[name] for name in found}, abs=0 if log["step"] == 1 else 0.02)
