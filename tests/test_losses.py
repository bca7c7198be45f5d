"""`losses.py` against sums written out by hand and against transformers' own function where that applies."""

import inspect

import pytest
import torch
from families import moe_families, tiny_config, transformers_before
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.losses import Routing, load_balancing_loss, router_z_loss, scores_of, watch_routers
from transformers_tiedmoe.routing.softmoe import SoftRouter


def test_balance_loss_of_one_layer_is_transformers():
    logits, mask = torch.randn(12, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    for m in (None, mask):
        expected = load_balancing_loss_func((logits,), num_experts=6, top_k=2, attention_mask=m)
        torch.testing.assert_close(load_balancing_loss([logits], top_k=2, attention_mask=m), expected)


def test_layers_of_unequal_width_are_averaged():
    layers = [torch.randn(12, 6), torch.randn(12, 9)]
    alone = [load_balancing_loss([logits], top_k=2) for logits in layers]
    torch.testing.assert_close(load_balancing_loss(layers, top_k=2), torch.stack(alone).mean())


def test_balance_loss_is_top_k_when_balanced_and_more_otherwise():
    balanced = torch.eye(4).repeat(5, 1) * 20
    torch.testing.assert_close(load_balancing_loss([balanced], top_k=1), torch.tensor(1.0))
    collapsed = torch.tensor([20.0, 0, 0, 0]).repeat(20, 1)
    torch.testing.assert_close(load_balancing_loss([collapsed], top_k=1), torch.tensor(4.0))


def test_z_loss():
    first, second = torch.randn(8, 4), torch.randn(8, 5)
    expected = (torch.logsumexp(first, 1).pow(2).mean() + torch.logsumexp(second, 1).pow(2).mean()) / 2
    torch.testing.assert_close(router_z_loss([first, second]), expected)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    kept = first[mask.flatten().bool()]
    torch.testing.assert_close(router_z_loss([first], mask), torch.logsumexp(kept, 1).pow(2).mean())


def test_gradients_reach_the_logits():
    logits = torch.randn(10, 4, requires_grad=True)
    (load_balancing_loss([logits], top_k=2) + router_z_loss([logits])).backward()
    assert logits.grad.abs().sum() > 0


def reporting_families():
    found = []
    for name in moe_families():
        head = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]
        signature = inspect.signature(head.forward)
        returns = "output_router_logits" in signature.parameters or "MoeCausalLMOutput" in str(signature)
        if returns and "router_logits" in (head._can_record_outputs or {}):
            found.append(name)
    return found


# Routers whose weights are no share of the scores of what they chose, so that the check below cannot be made.
NOT_BY_SHARE = {
    "phimoe": "sparsemixer masks the logits anew for each of the two experts; it chooses by softmax",
    "zaya": "one expert a token",
}


@pytest.mark.parametrize("family", reporting_families())
def test_scores_are_what_each_family_routes_by(family):
    """A router's weights of the chosen experts are their scores, up to one factor a token; the chosen are its own."""
    torch.manual_seed(0)
    config = TiedMoeConfig.from_family(tiny_config(family), groups=[])
    if family in ("ernie4_5_moe", "jamba") and transformers_before("5.23"):
        pytest.skip("its routers, in that transformers, have no initial value or do not say which experts they chose")
    if family == "qwen4_exp":
        pytest.skip("its base model, which is multimodal, records no router; qwen4_exp_text is the text model")
    model = TiedMoeForCausalLM(config).eval()
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            tensor.data.normal_(0, 0.3)
    watch_routers(model.base_model)
    seen, weights = [], []
    for module in model.modules():
        for hook in list(module._forward_hooks.values()):
            if getattr(hook, "func", None) is not None and hook.func.__name__ == "_record":
                module.register_forward_hook(lambda module, args, output: weights.append(output))
    tokens = torch.randint(3, 96, (2, 7))
    with torch.no_grad():
        out = model(tokens, output_router_logits=True, labels=tokens)
        from transformers_tiedmoe import losses

        token = losses._recorded.set({"routings": seen})
        try:
            weights.clear()
            model.base_model(tokens)
        finally:
            losses._recorded.reset(token)
    assert len(weights) == len(out.router_logits) > 0
    seen = [Routing(logits, scores(logits.float()), chosen) for logits, scores, chosen in seen]
    for routing, output in zip(seen, weights):
        given = [each for each in output if each.is_floating_point()][-1]
        torch.testing.assert_close(routing.scores.sum(-1), torch.ones(14))
        if family not in NOT_BY_SHARE:
            share = given.flatten(0, -2).float() / routing.scores.gather(-1, routing.chosen)
            torch.testing.assert_close(share, share[:, :1].expand_as(share), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out.aux_loss, load_balancing_loss(seen, config.experts_per_token))


@pytest.mark.parametrize("family", ["deepseek_v3", "olmoe"])
def test_a_softened_router_has_the_scores_of_its_family(family):
    config = TiedMoeConfig.from_family(
        tiny_config(family), group_size=2, skip_first=1, skip_last=1, routing="softmoe", softmoe={"alpha": 0.0}
    )
    routers = [each for each in TiedMoeForCausalLM(config).modules() if isinstance(each, SoftRouter)]
    logits = torch.randn(5, 4)
    scores = logits.softmax(-1) if family == "olmoe" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    assert routers
    for router in routers:
        torch.testing.assert_close(scores_of(router)(logits), scores)


def test_balance_loss_counts_what_was_chosen():
    logits, chosen = torch.randn(6, 4), torch.tensor([[0, 1]] * 6)
    scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    expected = 4 * scores.mean(0)[:2].sum()
    torch.testing.assert_close(load_balancing_loss([Routing(logits, scores, chosen)], top_k=2), expected)


MIXTRAL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def tied_mixtral(**fields):
    torch.manual_seed(0)
    return TiedMoeForCausalLM(TiedMoeConfig(family="mixtral", skip_first=0, skip_last=0, **MIXTRAL, **fields))


def test_attention_mask_by_position_is_the_mask_by_name():
    model, tokens = (
        tied_mixtral(router_z_loss_coef=0.1, output_router_logits=True).eval(),
        torch.randint(1, 64, (2, 32)),
    )
    mask = torch.ones_like(tokens)
    mask[0, :28] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    by_name = model(input_ids=tokens, attention_mask=mask, labels=labels)
    by_place = model(tokens, mask, labels=labels)
    assert torch.equal(by_name.aux_loss, by_place.aux_loss)
    assert torch.equal(by_name.loss, by_place.loss)
    assert not torch.equal(by_name.aux_loss, model(tokens, labels=labels).aux_loss)


def test_mask_that_covers_a_cache():
    model, tokens = tied_mixtral().eval(), torch.randint(1, 64, (2, 6))
    cache = model(tokens[:, :5], use_cache=True).past_key_values
    last = model(tokens[:, 5:], attention_mask=torch.ones(2, 6), past_key_values=cache, output_router_logits=True)
    expected = load_balancing_loss(last.router_logits, top_k=2)
    torch.testing.assert_close(last.aux_loss, expected)


def test_outputs_are_in_the_familys_order():
    model, tokens = tied_mixtral().eval(), torch.randint(1, 64, (2, 8))
    family = model._family_class(model.config.to_family()).eval()
    for return_dict in (True, False):
        found, expected = (
            each(tokens, labels=tokens, output_router_logits=True, output_hidden_states=True, return_dict=return_dict)
            for each in (model, family)
        )
        if return_dict:
            assert list(found) == list(expected)
        else:
            assert [type(each) for each in found] == [type(each) for each in expected]
            assert found[1].dim() == 0  # the auxiliary loss, before the logits


@pytest.mark.parametrize("lengths", [(32, 32, 32, 32), (32, 20, 9, 3)])
def test_router_losses_count_once_a_step_however_many_forwards_it_has(lengths, tmp_path):
    """Four micro-batches by Trainer: the auxiliary loss's gradient is its mean, weighted as the cross-entropy is."""
    rows = torch.randint(1, 64, (4, 32))
    data = [
        {"input_ids": row, "labels": [token if i < n else -100 for i, token in enumerate(row)]}
        for row, n in zip(rows.tolist(), lengths)
    ]

    def gradient(coefficient):
        model, found = tied_mixtral(router_aux_loss_coef=coefficient, output_router_logits=True), {}

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                found["g"] = model.model.layers[1].mlp.gate.weight.grad.clone()

        args = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4, use_cpu=True,
            max_grad_norm=0.0, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, args, train_dataset=data, data_collator=default_data_collator, callbacks=[Keep()]).train()
        return found["g"]

    model = tied_mixtral(output_router_logits=True).train()
    predicted = [n - 1 for n in lengths]
    expected = 0
    for row, n in zip(rows, predicted):
        loss = model(input_ids=row[None]).aux_loss * n / sum(predicted)
        expected = expected + torch.autograd.grad(loss, model.model.layers[1].mlp.gate.weight)[0]
    torch.testing.assert_close(gradient(1.0) - gradient(0.0), expected, rtol=1e-3, atol=1e-6)


def test_no_labels_no_loss_with_router_logits_in_the_config():
    out = tied_mixtral(output_router_logits=True).eval()(torch.randint(1, 64, (2, 8)))
    assert out.loss is None
    assert out.aux_loss is not None
