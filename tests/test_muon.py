"""Muon: torch's own slice by slice, what it takes and what AdamW takes; the two-process case is in fsdp2_worker.py."""

import copy

import pytest
import torch
from checkpoints import TINY
from transformers import default_data_collator

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.training.arguments import TiedMoeTrainingArguments
from transformers_tiedmoe.training.lora import add_lora
from transformers_tiedmoe.training.muon import Muon, muon_parameter_groups
from transformers_tiedmoe.training.trainer import HealTrainer


def tied_model(**fields):
    torch.manual_seed(0)
    return TiedMoeForCausalLM(TiedMoeConfig(family="olmoe", groups=[[0], [1, 2, 3]], **TINY | fields))


def train(model, optimizer, steps):
    tokens = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(3, 90, (2, 12), generator=tokens)
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 12, 8), (5, 8, 12), (1, 8, 8), (3, 1, 7)])  # tall, wide, one expert, one row
def test_a_pool_moves_as_torchs_muon_moves_its_slices(shape, dtype):
    torch.manual_seed(0)
    start = torch.randn(shape, dtype=dtype)
    pool, slices = torch.nn.Parameter(start.clone()), [torch.nn.Parameter(each.clone()) for each in start]
    ours, torchs = Muon([pool], lr=0.02), torch.optim.Muon(slices, lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(3):
        pool.grad = torch.randn(shape, dtype=dtype)
        for each, grad in zip(slices, pool.grad):
            each.grad = grad.clone()
        ours.step()
        torchs.step()
    # one rounding of bfloat16 in an update of 0.02, where a batched product sums in another order
    torch.testing.assert_close(pool, torch.stack(slices), rtol=0, atol=2e-4 if dtype == torch.float32 else 1e-2)
    assert (pool - start).abs().max() > 0.01


def test_matrices_of_layers_are_muons_and_the_rest_is_adamws_at_a_tenth():
    model = tied_model()
    groups = muon_parameter_groups(model, lr=2e-2, weight_decay=0.1)
    found = {
        id(p): (group["use_muon"], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_matrix = ("layers." in name and "norm" not in name) or "expert_pools" in name
        rate = 2e-2 * 3**-0.5 if "expert_pools.1." in name else 2e-2 if is_matrix else 2e-3
        decay = 0.1 if is_matrix else 0.0 if "norm" in name else 0.01
        assert found[id(parameter)] == (is_matrix, pytest.approx(rate), pytest.approx(decay)), name
    with pytest.raises(ValueError, match="no trainable matrix of a layer"):
        muon_parameter_groups(add_lora(tied_model(), 2))
    with pytest.raises(ValueError, match=r"shape \[3\]; expected a matrix"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_adamws_part_is_torchs_adamw():
    model = tied_model()
    other = copy.deepcopy(model)
    groups = [group for group in muon_parameter_groups(model) if not group["use_muon"]]
    own = [group for group in muon_parameter_groups(other) if not group["use_muon"]]
    train(model, Muon(groups), 3)
    train(other, torch.optim.AdamW(own, betas=(0.9, 0.95)), 3)
    for (name, mine), its in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(mine, its, rtol=0, atol=0, msg=name)
    assert not torch.equal(model.lm_head.weight, tied_model().lm_head.weight)


def test_a_resumed_training_ends_where_an_unbroken_one_does(tmp_path):
    """Trainer's own checkpoint and schedule, with `--optimizer muon`."""
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 300, (8, 16)).tolist()]
    ends = []
    for name, checkpoint in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-2")):
        args = TiedMoeTrainingArguments(
            model="tied", data="text", output_dir=str(tmp_path / name), optimizer="muon", max_steps=4, save_steps=2,
            learning_rate=1e-2, per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        args.eval_strategy, args.eval_on_start = "no", False
        model = tied_model()
        trainer = HealTrainer(model, args, train_dataset=rows, data_collator=default_data_collator, lr_divisor="sqrt")
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        assert {group["use_muon"] for group in trainer.optimizer.param_groups} == {True, False}
        ends.append(model.state_dict())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=0, atol=0, msg=name)
    assert not torch.equal(ends[0]["model.expert_pools.1.down_proj"], tied_model().expert_pools[1].down_proj)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"optimizer": "moun"}, "'moun' is unknown; give muon"), ({"lora": True}, "give one of them")],
)
def test_arguments_refuse_what_muon_cannot(given, message):
    with pytest.raises(ValueError, match=message):
        TiedMoeTrainingArguments(model="tied", data="text", output_dir="out", **{"optimizer": "muon"} | given)
