"""Soft routing of every family: equal to the family's own at alpha 0, to formulas written out here above it."""

import copy
import pickle

import pytest
import torch
from families import moe_families, tiny_config
from test_families import UNSUPPORTED
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.routing import active_experts, soft_top_k, softmoe
from transformers_tiedmoe.routing.softmoe import EAGER_WITHOUT_SENTINEL, SoftRouter

# Families whose router cannot be replaced, and what the error says of it.
NOT_SOFT = {
    "deepseek_v4": "it routes by input_ids, too",
    "gemma4_text": "depends on the other chosen ones by more than their sum",
    "inkling_text": "it does not choose by one top-k over its experts",
    "phimoe": "it does not choose by one top-k over its experts",
    "zaya": "its code takes no tokens",
}
SOFT = [family for family in moe_families() if family not in {**NOT_SOFT, **UNSUPPORTED}]
TYING = {"group_size": 2, "skip_first": 1, "skip_last": 1}


def soft_model(family="olmoe", dtype=None, tying=TYING, fields=(), implementation=None, **softmoe):
    config = TiedMoeConfig.from_family(
        tiny_config(family, **dict(fields)), **tying, routing="softmoe", softmoe={"alpha": 0.1, **softmoe}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=implementation).eval()
    for module in model.modules():
        if isinstance(module, SoftRouter):
            for tensor in module.parameters():  # some families start with routers of zero: all scores equal
                tensor.data.normal_(std=0.3)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            tensor.data.normal_(std=0.1)
    return model


def with_top_k(model):
    """The same weights under the family's own routing."""
    fields = {**model.config.to_dict(), "routing": "top_k", "softmoe": None}
    other = TiedMoeForCausalLM(type(model.config).from_dict(fields)).eval()
    other.load_state_dict({name: t for name, t in model.state_dict().items() if "expert_budget" not in name})
    return other


def routers(model):
    return [module for module in model.modules() if isinstance(module, SoftRouter)]


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


# Every family


@pytest.mark.parametrize("family", SOFT)
def test_alpha_0_is_the_family_s_own_and_small_alpha_nearly(family, tokens):
    model = soft_model(family, alpha=0)
    expected = with_top_k(model)(tokens).logits
    assert model(tokens).logits.equal(expected)
    assert not active_experts(model)
    model.config.softmoe["alpha"] = 1e-7
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=2e-5)
    top_k = model.config.experts_per_token
    assert {each["p50"] for each in active_experts(model)} == {top_k}  # a few tokens have scores that are nearly equal


@pytest.mark.parametrize("family", SOFT)
def test_backends_agree_on_slots_that_are_not_used(family, tokens):
    model = soft_model(family, threshold=0.3)
    found = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        if implementation == "eager" and family in EAGER_WITHOUT_SENTINEL:
            with pytest.raises(ValueError, match='load with experts_implementation="grouped_mm"'):
                model(tokens)
            implementation = "tiedmoe" if family != "nemotron_h" else "grouped_mm"
            model.set_experts_implementation(implementation)
        found.append(model(tokens).logits)
    used = active_experts(model)
    assert any(each["mean"] != each["p99"] for each in used), "every token uses the same number"
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "reason"), NOT_SOFT.items())
def test_a_router_that_cannot_be_replaced_is_told(family, reason):
    with pytest.raises(ValueError, match=f"cannot be routed softly: .*{reason}.*; use routing='top_k'"):
        soft_model(family)


# The formula: p_i times the family's weight, then its normalisation; written out for four kinds of routers


def weights_by_hand(family, router, hidden_states, k, alpha, threshold):
    logits = hidden_states @ router.weight.T
    if family in ("olmoe", "mixtral"):
        scores = weights = logits.softmax(-1)
    elif family == "granitemoe":
        scores, weights = logits, logits.softmax(-1)
    else:
        weights = logits.sigmoid()
        scores = weights + router.e_score_correction_bias
    p = soft_top_k(scores, k, alpha)
    keeps = (p >= threshold) | (p == p.max(-1, keepdim=True).values)
    combined = torch.where(keeps, p * weights, 0.0)
    if family != "olmoe":
        combined = combined / combined.sum(-1, keepdim=True)
    return combined * getattr(router, "routed_scaling_factor", 1.0)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "granitemoe", "deepseek_v3"])
@pytest.mark.parametrize("alpha", [0.02, 0.1, 1.0])
def test_weights_are_the_formula(family, alpha):
    router = routers(soft_model(family, alpha=alpha, threshold=0.2, budget=9, learn_budget=False))[1]
    hidden_states = torch.randn(40, 32)
    _, weights, index = router(hidden_states)
    found = torch.zeros(40, 5).scatter_(-1, index, weights)
    assert (found[:, 4] == 0).all()  # the sentinel
    num_layers = len(routers(router._owner[0]))
    expected = weights_by_hand(family, router, hidden_states, 9 / num_layers, alpha, 0.2)
    torch.testing.assert_close(found[:, :4], expected)


def test_group_limits_stay():
    """DeepSeek-V3: experts of groups that a token does not choose are out, however soft the routing."""
    fields = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
    model = soft_model("deepseek_v3", fields=fields, alpha=10.0, threshold=0.01)
    _, _, index = routers(model)[1](torch.randn(40, 32))
    assert index.shape == (40, 4)
    assert all(len({int(i) // 2 for i in row if i < 8}) == 2 for row in index)


# What users do with it


@pytest.mark.parametrize(
    "tying",
    [
        {"groups": []},
        TYING,
        {**TYING, "slot_maps": True},
        {**TYING, "slot_maps": True, "pool_num_experts": 6},
        {**TYING, "pool_num_experts": 6},
        {**TYING, "residual_rank": 2},
    ],
    ids=["untied", "tied", "slot maps", "wider behind slot maps", "wider", "residuals"],
)
def test_a_token_does_not_depend_on_its_batch_or_its_cache(tying, tokens, tmp_path):
    model = soft_model(tying=tying, threshold=0.2)
    together = model(tokens).logits
    for row in range(2):
        torch.testing.assert_close(model(tokens[row : row + 1]).logits[0], together[row], rtol=1e-4, atol=1e-5)
    cached = model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=True)
    assert cached.equal(model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=False))

    model.base_model.expert_budget.theta.data.normal_()
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.softmoe == model.config.softmoe
    torch.testing.assert_close(loaded(tokens).logits, expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(tokens).logits, expected)
        assert all(router._owner[0] is copied.base_model for router in routers(copied))


def test_padding_and_packing_do_not_change_a_token(tokens):
    model = soft_model(threshold=0.2)
    expected = model(tokens[:1]).logits
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens[:1]], 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    packed = torch.cat([tokens[1:], tokens[:1]], 1)
    positions = torch.arange(9).repeat(2)[None]  # two sequences, told apart by where positions start anew
    found = model(packed, position_ids=positions, use_cache=False).logits[:, 9:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_our_experts_spend_nothing_on_slots_that_are_not_used(tokens):
    """What is given to the kernels holds the sentinel there; their tests count the rows."""
    model = soft_model(implementation="tiedmoe", threshold=0.3)
    expected = model(tokens).logits
    model.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(expected, model(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tokens):
    model = soft_model(dtype=dtype)
    assert model(tokens).logits.isfinite().all()
    assert routers(model)[0](torch.randn(4, 32, dtype=dtype))[1].dtype == dtype


def test_the_budget_is_learned_and_kept(tokens):
    model = soft_model(budget=11.0)
    torch.nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theta = model.base_model.expert_budget.theta
    assert theta.grad.abs().min() > 0
    with torch.no_grad():
        theta.add_(100 * theta.grad)
    model(tokens)
    used = active_experts(model)
    assert len({each["k"] for each in used}) > 1
    assert sum(each["k"] for each in used) == pytest.approx(11.0, rel=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, tokens):
    model = soft_model(threshold=0.2).train()
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert "model.expert_budget.theta" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_compiles_as_one_graph(tokens):
    model = soft_model(threshold=0.2, implementation="grouped_mm", fields={"num_hidden_layers": 4})
    expected = model(tokens).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_lora_on_pools(tokens):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=2, target_parameters=["expert_pools.0.down_proj"], modules_to_save=["expert_budget"], init_lora_weights=False
    )
    model = get_peft_model(soft_model(), lora)
    model(tokens).logits.logsumexp(-1).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lora_B" in name for name in trained)
    assert any("expert_budget" in name for name in trained)


def test_router_losses_and_active_experts_in_the_outputs(tokens):
    """Balance: the share of tokens that use an expert, times its mean share of the mass, layer by layer."""
    model = soft_model(fields={"output_router_logits": True}, threshold=0.2)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    seen = []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    out = model(tokens, attention_mask=mask, labels=tokens)
    kept, losses, active = mask.flatten().bool(), [], []
    for router, (_, (logits, _, index)) in zip(routers(model), seen):
        p = soft_top_k(logits.softmax(-1), model.base_model.expert_budget(router.place, model.config.softmoe), 0.1)[
            kept
        ]
        used = torch.stack([(index[kept] == expert).any(-1) for expert in range(4)], -1).float()
        losses.append(4 * (used.mean(0) * (p / p.sum(-1, keepdim=True)).mean(0)).sum())
        active.append(used.sum(-1).mean())
    torch.testing.assert_close(out.aux_loss, torch.stack(losses).mean())
    torch.testing.assert_close(out.active_experts, torch.stack(active))


def test_statistics_count_what_tokens_use(tokens):
    model = soft_model(threshold=0.3)
    seen = []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, output: seen.append((output[2] < 4).sum(-1).double()))
    model(tokens)
    for each, used in zip(active_experts(model, reset=True), seen):
        assert each["tokens"] == 18
        assert each["mean"] == pytest.approx(used.mean())
        assert each["p50"] == used.quantile(0.5, interpolation="lower")
        assert each["p99"] == used.max()
    assert not active_experts(model)


def test_trainer_trains_it_and_saves_what_loads(tokens, tmp_path):
    model = soft_model(fields={"output_router_logits": True})
    rows = [{"input_ids": row, "labels": row} for row in tokens] * 4
    args = TrainingArguments(
        tmp_path / "run", max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[], learning_rate=0.1
    )
    trainer = Trainer(model, args, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    assert model.base_model.expert_budget.theta.abs().max() > 0
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.base_model.expert_budget.theta.equal(model.base_model.expert_budget.theta)


# Bad input


@pytest.mark.parametrize(
    ("softmoe", "message"),
    [
        ({"budget": 5.9}, "softmoe.budget=5.9; expected a number of at least 6 and at most 24"),
        ({"budget": 24.1}, "softmoe.budget=24.1"),
        ({"budget": float("nan")}, "softmoe.budget=nan"),
        ({"budget": "many"}, "softmoe.budget='many'"),
        ({"budget": True}, "softmoe.budget=True"),
        ({"layers": [1, 2, 3]}, "expected 6 numbers, one for each layer with experts"),
        ({"layers": [0.5, 2, 2, 2, 2, 2]}, r"softmoe.layers\[0\]=0.5; expected a number of at least 1 and at most 4"),
        ({"layers": [2, 2, 2, 2, 2, 2], "budget": 11}, "softmoe.budget=11, but softmoe.layers sum to 12"),
        ({"alpha": -0.1}, "softmoe.alpha=-0.1; expected a number of at least 0"),
        ({"alpha": float("inf")}, "softmoe.alpha=inf"),
        ({"threshold": 0}, "softmoe.threshold=0; expected a number above 0 and below 1"),
        ({"threshold": 1}, "softmoe.threshold=1"),
        ({"cap": 5}, "softmoe.cap=5; expected a number of at least 1 and at most 4"),
        ({"max_active": 0}, "softmoe.max_active=0; expected an integer from 1 to 4"),
        ({"max_active": 2.5}, "softmoe.max_active=2.5"),
        ({"learn_budget": "yes"}, "softmoe.learn_budget='yes'; expected true or false"),
        ({"alhpa": 1}, "softmoe has no field 'alhpa'"),
        ([1], r"softmoe=\[1\]; expected a mapping"),
    ],
)
def test_options_out_of_range_are_refused(softmoe, message):
    with pytest.raises(ValueError, match=message):
        TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING, routing="softmoe", softmoe=softmoe)


def test_routing_must_be_known_and_softmoe_needs_it():
    with pytest.raises(ValueError, match="routing='soft'; expected 'top_k' or 'softmoe'"):
        TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING, routing="soft")
    with pytest.raises(ValueError, match="softmoe has no effect with routing='top_k'"):
        TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING, softmoe={})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(value, tokens):
    model = soft_model()
    routers(model)[2].weight.data[1] = value
    with pytest.raises(ValueError, match="layer 2 with experts: the router's scores are not all finite"):
        model(tokens)


def test_a_checkpoint_of_other_layers_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    soft_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.expert_budget.theta"] = torch.zeros(5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expert_budget.theta has the shape \[5\] in the files and \[6\] by config"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_max_active_drops_and_says_so(tokens, monkeypatch):
    said = []
    monkeypatch.setattr(softmoe.logger, "warning_once", said.append)
    model = soft_model(max_active=2, alpha=5.0)
    assert set(said) == {
        "max_active=2 is below the 4 experts of a token that can pass the threshold 0.05: some tokens lose experts."
    }
    model(tokens)
    assert max(each["p99"] for each in active_experts(model)) == 2
