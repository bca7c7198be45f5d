"""Soft routing of every family: equal to the family's own at alpha 0, to formulas written out here above it."""

import copy
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import text_families, tiny_config, transformers_before
from test_families import UNSUPPORTED
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    QuantizedCache,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from tiedmoe_kernels import torch_backend
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.configuration_tiedmoe import SOFT_SINCE
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.routing import active_experts, soft_top_k, softmoe
from transformers_tiedmoe.routing.options import most_active
from transformers_tiedmoe.routing.softmoe import EAGER_WITHOUT_SENTINEL, SoftRouter
from transformers_tiedmoe.training import AnnealRouting, pool_parameter_groups, soft_routing

if transformers_before(SOFT_SINCE):
    pytest.skip(f"soft routing needs transformers {SOFT_SINCE}", allow_module_level=True)

# Families whose router cannot be replaced, and what the error says of it.
NOT_SOFT = {
    "deepseek_v4": "it routes by input_ids, too",
    "gemma4_text": "depends on the other chosen ones by more than their sum",
    "inkling_text": "it does not choose by one top-k over its experts",
    "phimoe": "it does not choose by one top-k over its experts",
    "zaya": "its code takes no tokens",
}
SOFT = [family for family in text_families() if family not in {**NOT_SOFT, **UNSUPPORTED}]
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
    most = soft_model("deepseek_v3", fields=fields, layers=[4.0] * 5)  # all that are left
    _, _, index = routers(most)[1](torch.randn(40, 32))
    assert index.shape == (40, 4)
    assert (index < 8).all()
    with pytest.raises(TiedMoeError, match=r"softmoe\.budget=21; expected a number of at least 5 and at most 20"):
        soft_model("deepseek_v3", fields=fields, budget=21)


def test_k_max_holds_all_that_can_pass_and_one_stays():
    """Six equal experts share a mass of 2, a third each, and pass 0.3; no seventh could."""
    assert [most_active(2.0, threshold, 8) for threshold in (0.3, 0.25, 0.01, 0.9)] == [6, 7, 8, 2]
    fields = {"num_experts": 8}
    router = routers(soft_model(fields=fields, tying={"groups": []}, alpha=0.01, threshold=0.3, learn_budget=False))[0]
    router.weight.data[:6], router.weight.data[6:] = 0.1, -0.1
    _, _, index = router(torch.ones(3, 32))
    assert index.sort().values.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    router._owner[0].config.softmoe["threshold"] = 0.9  # none passes: the first one stays
    _, weights, index = router(torch.ones(3, 32))
    assert index.shape == (3, 1)
    assert (index < 6).all()
    assert (weights > 0).all()


# What users do with it


VIEWS = {
    "untied": {"groups": []},
    "tied": TYING,
    "slot maps": {**TYING, "slot_maps": True},
    "wider behind slot maps": {**TYING, "slot_maps": True, "pool_num_experts": 6},
    "wider": {**TYING, "pool_num_experts": 6},
    "residuals": {**TYING, "residual_rank": 2},
}


@pytest.mark.parametrize("tying", VIEWS.values(), ids=VIEWS)
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


@pytest.mark.parametrize("tying", VIEWS.values(), ids=VIEWS)
def test_implementations_agree_on_every_view_of_a_pool(tying, tokens):
    model = soft_model(tying=tying, threshold=0.3, implementation="eager")
    model.base_model.expert_budget.theta.data.normal_()
    expected = model(tokens).logits
    for implementation in ("grouped_mm", "batched_mm", "tiedmoe"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "tiedmoe"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_experts_compute_the_slots_that_are_used_and_the_flops_are_theirs(family, implementation, tokens, monkeypatch):
    """Rows of every product with an expert's weights are counted, beneath torch: none is of a slot without a use."""
    model = soft_model(family, implementation=implementation, threshold=0.3)
    model(tokens)  # ours looks for the activation once
    active_experts(model, reset=True)
    rows, weights = [], {p.data_ptr() for name, p in model.named_parameters() if "expert" in name and p.dim() == 3}
    ranges = [(p.data_ptr(), p.data_ptr() + p.nbytes) for _, p in model.named_parameters() if p.data_ptr() in weights]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                left, right = args[-2:]
                if any(first <= right.data_ptr() < last for first, last in ranges):
                    rows.append(2 * left.shape[0] * right.shape[0] * right.shape[1])
            return func(*args, **(kwargs or {}))

    if implementation == "tiedmoe":  # an op of its own, beneath which no mode looks: its one product is counted
        product = torch_backend._matmul

        def counted(a, weight, each):
            rows.append(2 * a.shape[0] * weight.shape[1] * weight.shape[2])
            return product(a, weight, each)

        monkeypatch.setattr(torch_backend, "_matmul", counted)
        model(tokens)
    else:
        with Count():
            model(tokens)
    used = active_experts(model)
    assert sum(each["mean"] for each in used) < len(used) * 4
    assert sum(rows) == pytest.approx(sum(each["flops"] * each["tokens"] for each in used))


def test_slots_that_are_not_used_take_no_time():
    """Our experts on 32 slots of which 4 are used take as long as on these 4, and not as on 32: seconds of the CPU."""
    sizes = {"num_experts": 32, "num_experts_per_tok": 4, "hidden_size": 128, "intermediate_size": 128}
    config = TiedMoeConfig.from_family(tiny_config("olmoe", num_hidden_layers=2, **sizes), groups=[[0, 1]])
    pool = TiedMoeForCausalLM(config).expert_pools[0]
    pool.config._experts_implementation = "tiedmoe"
    x, weights = torch.randn(512, 128), torch.rand(512, 32)
    index = torch.stack([torch.randperm(32) for _ in range(512)])
    padded = index.masked_fill(torch.arange(32) >= 4, 32)
    assert pool(x, padded, weights).allclose(pool(x, index[:, :4], weights[:, :4]), atol=1e-5)
    seconds = {"few": [], "padded": [], "all": []}
    for _ in range(7):
        for name, slots in (("few", index[:, :4]), ("padded", padded), ("all", index)):
            start = time.thread_time()
            with torch.no_grad():
                pool(x, slots, weights[:, : slots.shape[1]])
            seconds[name].append(time.thread_time() - start)
    least = {name: min(each) for name, each in seconds.items()}
    assert least["padded"] < (least["few"] + least["all"]) / 2, least


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision(dtype, tolerance, tokens):
    model = soft_model(dtype=dtype)
    hidden_states = torch.randn(64, 32, dtype=dtype)
    full = soft_model()
    for router, reference in zip(routers(model), routers(full)):
        reference.load_state_dict(router.state_dict())
        _, weights, index = router(hidden_states)
        _, expected, expected_index = reference(hidden_states.float())
        assert weights.dtype == dtype
        found = torch.zeros(64, 5).scatter_(-1, index, weights.float())
        wanted = torch.zeros(64, 5).scatter_(-1, expected_index, expected)
        torch.testing.assert_close(found[:, :4], wanted[:, :4], rtol=0, atol=tolerance)
    expected = full.load_state_dict(model.state_dict()) and full(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(model(tokens).logits.float().log_softmax(-1), expected, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])  # those that need no GPU and no other package
def test_generation_is_the_same_with_every_cache(cache, tokens):
    fields = {"family": "mixtral", "fields": {"sliding_window": 8}} if cache == "sliding" else {}
    model = soft_model(threshold=0.2, **fields)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, use_cache=False, **greedy)
    named = {} if cache == "sliding" else {"cache_implementation": cache}
    assert model.generate(tokens, **named, **greedy).equal(expected)


QUANTISED = {  # and the mean error of a logit, by the logits' standard deviation
    "quanto": ({"q_group_size": 8, "nbits": 4}, 0.1),
    "hqq": ({"q_group_size": 8, "nbits": 8, "axis_key": 1, "axis_value": 1}, 0.005),
    "fp8": ({}, 0.07),  # of transformers itself, in newer versions
}


@pytest.mark.parametrize("backend", QUANTISED)
def test_a_quantised_cache_costs_what_it_rounds(backend, tokens):
    """Cached logits are near those of the full forward, and not equal: routing sees what the cache gives back."""
    if backend != "fp8":
        pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    model, (options, most) = soft_model(threshold=0.2), QUANTISED[backend]
    try:
        cache = QuantizedCache(backend, model.config, **options)
    except ValueError as error:
        pytest.skip(str(error))  # an older transformers
    expected = model(tokens).logits
    model(tokens[:, :6], past_key_values=cache)
    error = (model(tokens[:, 6:], past_key_values=cache).logits - expected[:, 6:]).abs().mean()
    assert 0 < error < most * expected.std()


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_generation_is_the_same_with_an_offloaded_cache(cache, tokens):
    """These copy by CUDA streams, whatever device the model is on."""
    model, tokens = soft_model(threshold=0.2).cuda(), tokens.cuda()
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, use_cache=False, **greedy)
    assert model.generate(tokens, cache_implementation=cache, **greedy).equal(expected)


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "transformers_tiedmoe" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.load(sys.argv[1] + "/tokens.pt")).logits, sys.argv[1] + "/logits.pt")
"""


def test_the_remote_stub_loads_it_without_an_import(tokens, tmp_path):
    model = soft_model(threshold=0.2)
    model.base_model.expert_budget.theta.data.normal_()
    model.save_pretrained(tmp_path)
    torch.save(tokens, tmp_path / "tokens.pt")
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", REMOTE, str(tmp_path)], check=True, env=env)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(tokens).logits)


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
    # K_max is static: what the tokens use decides no shape, and nothing is compiled anew
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(tokens.flip(1)).logits, model(tokens.flip(1)).logits, rtol=1e-4, atol=1e-5)
        routers(model)[2].weight.data[1] = torch.nan
        with pytest.raises(RuntimeError, match=NOT_FINITE):  # by a kernel of the graph, as on a GPU
            compiled(tokens)


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
    routers(model)[0].weight.data[3] = -9.0 * model.base_model.embed_tokens.weight[tokens].mean((0, 1))
    seen, chosen = [], []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, output: seen.append((output[2] < 4).sum(-1).double()))
        router.register_forward_hook(lambda module, args, output: chosen.append(set(output[2].flatten().tolist())))
    model(tokens)
    for each, used, experts in zip(active_experts(model, reset=True), seen, chosen):
        assert each["tokens"] == 18
        assert each["dead"] == len({0, 1, 2, 3} - experts)
        assert each["flops"] == pytest.approx(float(used.mean()) * 2 * 3 * 32 * 24)
        assert each["tokens_cut"] == each["experts_cut"] == 0
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
        ({"alpha": 10**400}, "softmoe.alpha=1000.*; expected a number of at least 0"),
        ({"alpha": 1e-300}, "softmoe.alpha=1e-300; expected 0, the family's top-k, or at least 1e-30"),
        ({"target_alpha": 1e-300}, "softmoe.target_alpha=1e-300"),
        ({"layers": [2, 2, 2, 2, 2, 4.5]}, r"softmoe.layers\[5\]=4.5; expected a number of at least 1 and at most 4"),
        ({"threshold": 0}, "softmoe.threshold=0; expected a number above 0 and below 1"),
        ({"threshold": 1}, "softmoe.threshold=1"),
        ({"cap": 5}, "softmoe.cap=5; expected a number of at least 1 and at most 4"),
        ({"max_active": 0}, "softmoe.max_active=0; expected an integer from 1 to 4"),
        ({"max_active": 2.5}, "softmoe.max_active=2.5"),
        ({"max_active": 1}, "softmoe.max_active=1 cannot hold .* 2 of each layer on average; expected 2 to 4"),
        ({"max_active": 2, "layers": [2, 2, 2, 2, 1, 2.5]}, "softmoe.max_active=2 cannot hold .*; expected 3 to 4"),
        ({"learn_budget": "yes"}, "softmoe.learn_budget='yes'; expected true or false"),
        ({"alhpa": 1}, "softmoe has no field 'alhpa'"),
        ([1], r"softmoe=\[1\]; expected a mapping"),
    ],
)
def test_options_out_of_range_are_refused(softmoe, message):
    with pytest.raises(ValueError, match=message):
        TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING, routing="softmoe", softmoe=softmoe)


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_top_k_that_the_router_cannot_have_is_refused(top_k):
    config = tiny_config("olmoe", num_experts_per_tok=top_k)
    with pytest.raises(TiedMoeError, match=f"num_experts_per_tok={top_k}; expected 1 to 4, the experts that a token"):
        TiedMoeConfig.from_family(config, groups=[], routing="softmoe", softmoe={"budget": 12})


@pytest.mark.parametrize("softmoe", [{"budget": 24}, {"budget": 24, "learn_budget": False}, {"layers": [4] * 6}])
def test_a_budget_of_all_experts_uses_them_all(softmoe, tokens):
    model = soft_model(**softmoe)
    model(tokens).logits.sum().backward()
    assert [(each["k"], each["p50"], each["mean"]) for each in active_experts(model)] == [(4, 4, 4)] * 6
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_an_older_transformers_is_told(monkeypatch):
    monkeypatch.setattr("transformers_tiedmoe.configuration_tiedmoe.SOFT_SINCE", "99.1")
    with pytest.raises(TiedMoeError, match=r"routing='softmoe' needs transformers 99.1 or newer, .* this is 5\."):
        TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING, routing="softmoe")


def test_routing_must_be_known_and_softmoe_needs_it():
    with pytest.raises(ValueError, match="routing='soft'; expected 'top_k' or 'softmoe'"):
        TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING, routing="soft")
    with pytest.raises(ValueError, match="softmoe has no effect with routing='top_k'"):
        TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING, softmoe={})


def test_router_losses_of_soft_routing_are_those_by_hand(tokens):
    """The z-loss takes the routers' own logits, every layer alike; it is added to the balance loss."""
    tying = {**TYING, "router_z_loss_coef": 0.1}
    model = soft_model(tying=tying, fields={"output_router_logits": True})
    plain = model(tokens, labels=tokens, output_router_logits=False).loss
    outputs = model(tokens, labels=tokens)
    squares = [each.float().exp().sum(-1).log().square().mean() for each in outputs.router_logits]
    assert len(squares) == model.config.num_hidden_layers
    expected = 0.1 * sum(squares) / len(squares) + model.config.router_aux_loss_coef * outputs.aux_loss
    torch.testing.assert_close(outputs.loss - plain, expected)


NOT_FINITE = "layer 2 with experts: the router's scores are not all finite"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(value, tokens):
    model = soft_model()
    routers(model)[2].weight.data[1] = value
    with pytest.raises(TiedMoeError, match=NOT_FINITE):
        model(tokens)


ON_A_GPU = """
import sys, torch
from transformers_tiedmoe.routing.softmoe import check_finite
scores = torch.zeros(4, 8, device="cuda")
check_finite(scores, 2)  # what it needs is there before a graph is captured
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    check_finite(scores, 2)
graph.replay()
torch.cuda.synchronize()
print("finite scores pass")
scores[1, 1] = torch.nan
graph.replay() if sys.argv[1] == "graph" else check_finite(scores, 2)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["eager", "graph"])
def test_scores_that_are_no_numbers_are_refused_on_a_gpu(how):
    done = subprocess.run([sys.executable, "-c", ON_A_GPU, how], capture_output=True, text=True)
    assert done.stdout == "finite scores pass\n", done.stderr
    assert done.returncode != 0
    assert NOT_FINITE in done.stderr
    assert "device-side assert" in done.stderr


def test_shares_that_are_no_numbers_are_refused(tokens):
    """But in training, where the loss is no number then."""
    model = soft_model()
    model.base_model.expert_budget.theta.data[2] = torch.nan
    with pytest.raises(TiedMoeError, match=r"its share of the budget is no finite number; .* expert_budget\.theta"):
        model(tokens)
    assert model.train()(tokens, labels=tokens).loss.isnan()


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
    seen = []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, output: seen.append((module, args[0], output[0])))
    model(tokens)
    for each, (router, _, logits) in zip(active_experts(model), seen):
        k = model.base_model.expert_budget(router.place, model.config.softmoe)
        passing = (soft_top_k(logits.softmax(-1), k, 5.0) >= 0.05).sum(-1)
        assert each["p99"] == 2
        assert each["tokens_cut"] == int((passing > 2).sum()) > 0
        assert each["experts_cut"] == int((passing - 2).clamp(min=0).sum())


# Training by a plain Trainer


def rows_of(tokens):
    return [{"input_ids": row, "labels": row} for row in tokens] * 16


class Report(TrainerCallback):
    """A reporting integration, such as TensorBoard's: it is there before any other callback."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep what is reported."""
        self.logs.append(dict(logs))


class LossTrainer(Trainer):
    """Tells a soft run's annealing the loss."""

    def training_step(self, *args, **kwargs):
        """Tell it."""
        loss = super().training_step(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, AnnealRouting):
                callback.add_loss(loss)
        return loss


def train(model, folder, tokens, callbacks, resume=None, kind=Trainer, **fields):
    args = TrainingArguments(
        folder, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=2,
        **{"max_steps": 8, "save_strategy": "no", "per_device_train_batch_size": 2, **fields},
    )  # fmt: skip
    optimizer = torch.optim.AdamW(pool_parameter_groups(model, 1e-3, weight_decay=0.1))
    trainer = kind(
        model, args, train_dataset=rows_of(tokens), data_collator=default_data_collator, optimizers=(optimizer, None)
    )
    for callback in callbacks:
        callback.attach(trainer) if isinstance(callback, AnnealRouting) else trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


TARGETS = {"alpha": 0.0, "target_alpha": 0.2, "target_budget": 9.0, "target_active": 9.0, "threshold": 0.1}


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        """Stop after a checkpoint."""
        control.should_training_stop = state.global_step == 5


def test_a_plain_trainer_anneals_logs_and_goes_on_after_a_kill(tokens, tmp_path):
    """Killed between two looks, at what tokens use and at the loss, which here always makes it wait."""
    whole, report = soft_model(**TARGETS).train(), Report()
    looks = {"interval": 2, "tolerance": -100.0}
    annealing = AnnealRouting(whole, **looks)
    fields = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12, "kind": LossTrainer}
    trainer = train(whole, tmp_path / "whole", tokens, [report, annealing], **fields)
    assert annealing.held == 3  # half of the six steps that `share` leaves
    soft = whole.config.softmoe
    assert (soft["alpha"], soft["budget"], soft["target_alpha"], soft["target_budget"]) == (0.2, 9.0, None, None)
    assert soft["threshold"] != 0.1
    logs = [each for each in trainer.state.log_history if "active_experts" in each]
    assert len(logs) == 6
    assert all(1 <= each["active_experts"] <= 4 and each["dead_experts"] >= 0 for each in logs)
    assert [each["routing_alpha"] for each in logs] == sorted(each["routing_alpha"] for each in logs)
    assert [logs[-1][f"routing_{name}"] for name in ("alpha", "threshold")] == [0.2, soft["threshold"]]
    assert sum(logs[-1][f"router_k/layer_{layer}"] for layer in range(6)) == pytest.approx(9.0)
    reported = [each["active_experts"] for each in report.logs if "loss" in each]
    assert reported == [each["active_experts"] for each in logs]

    first, second = soft_model(**TARGETS).train(), soft_model(**TARGETS).train()
    train(first, tmp_path / "twice", tokens, [AnnealRouting(**looks), Kill()], **fields)
    again = AnnealRouting(**looks)
    train(second, tmp_path / "twice", tokens, [again], str(tmp_path / "twice/checkpoint-5"), **fields)
    assert second.config.softmoe == whole.config.softmoe
    assert again.state() == annealing.state()
    for name, tensor in whole.state_dict().items():
        assert second.state_dict()[name].equal(tensor), name


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "routing.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "AnnealRouting" in block]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/routing.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "0.05 9.0"


def test_experts_that_die_are_warned_of_once(tokens, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(soft_routing.logger, "warning", said.append)
    model = soft_model(alpha=0.01).train()
    for router in routers(model)[:1]:
        router.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]),))
        router.weight.data.copy_(torch.tensor([0.02, 0.01, -0.2, -0.2])[:, None])
    train(model, tmp_path, tokens, [AnnealRouting()], per_device_train_batch_size=16)
    assert len([each for each in said if "{0: [2, 3]" in each]) == 1
    assert "no token has used these experts since the last log, by layer: {0: [2, 3]" in said[0]


def test_a_budget_that_decays_is_warned_of(tokens, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(soft_routing.logger, "warning", said.append)
    model = soft_model()
    args = TrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to=[], weight_decay=0.1, save_strategy="no")
    Trainer(model, args, default_data_collator, rows_of(tokens), callbacks=[AnnealRouting()]).train()
    assert [each for each in said if "shares of the budget decay by weight_decay=0.1, towards even ones" in each]


def test_annealing_needs_soft_routing():
    with pytest.raises(ValueError, match="that is not routed softly; expected routing='softmoe' in its config"):
        AnnealRouting(with_top_k(soft_model(alpha=0)))
