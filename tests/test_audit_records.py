"""What a pass over a text records, against loops over tokens written out here; and that watching changes nothing."""

import itertools

import datasets
import pytest
import torch
from families import text_families, tiny_config
from test_families import UNSUPPORTED
from transformers import AutoModelForCausalLM

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.audit import metrics
from transformers_tiedmoe.audit.records import Records, most_frequent, record
from transformers_tiedmoe.audit.routing import RoutingWatch, layer_experts
from transformers_tiedmoe.errors import TiedMoeError

FAMILIES = [family for family in text_families() if family not in UNSUPPORTED]
HASHED = {("deepseek_v4", layer) for layer in (0, 1, 2)}  # routed by the token's number: there are no scores
BLOCKS, SIZE = 5, 12


def blocks(num_blocks=BLOCKS, size=SIZE):
    tokens = torch.randint(3, 90, (num_blocks, size), generator=torch.Generator().manual_seed(2)).tolist()
    return datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def tied(**fields):
    torch.manual_seed(0)
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), group_size=2, skip_first=1, skip_last=1, **fields)
    return TiedMoeForCausalLM(config).eval()


def shared_rows():
    """Slot maps that send two slots of layer 1 to one row of its pool."""
    model = tied(pool_num_experts=6, slot_maps=True)
    for layer, module in layer_experts(model).items():
        if getattr(module, "slot_map", None) is not None:
            module.slot_map.copy_(torch.tensor([0, 1, 1, 5] if layer % 2 else [1, 0, 5, 2]))
    return model


def soft():
    from test_softmoe import soft_model  # here, as an older transformers skips that file

    return soft_model(budget=9.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_watching_changes_no_bit_and_every_router_is_understood(family):
    torch.manual_seed(0)
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(config).eval()
    text = blocks(2)
    tokens = torch.tensor(text["input_ids"])
    seen = []
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        with RoutingWatch(model, lambda layer, choices: seen.append((layer, choices)), with_scores=True):
            assert model(tokens, use_cache=False).logits.equal(expected)
    assert [layer for layer, _ in seen] == list(layer_experts(model))
    for layer, choices in seen:
        if (family, layer) in HASHED:
            assert choices.scores is None
        else:
            torch.testing.assert_close(choices.scores.sum(-1), torch.ones(tokens.numel()))
    found = record(model, text)
    for layer, choices in seen:
        assert int(found.counts[layer].sum()) == choices.slots.numel()
        assert found.counts[layer].sum(0).equal(metrics.expert_counts(choices.slots, choices.num_slots))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_watching_a_tied_model_changes_no_bit(family):
    config = TiedMoeConfig.from_family(tiny_config(family), group_size=2, skip_first=1, skip_last=1)
    torch.manual_seed(0)
    model = TiedMoeForCausalLM(config).eval()
    tokens = torch.tensor(blocks(2)["input_ids"])
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        with RoutingWatch(model, lambda *_: None, with_scores=True):
            assert model(tokens, use_cache=False).logits.equal(expected)


def choices_by_hand(model, text):
    """Every router's own output: by layer, for each token, its slots with their weights and its scores."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            layer = int(name.split(".")[2])
            hooks.append(module.register_forward_hook(
                lambda module, args, output, layer=layer: found.setdefault(layer, []).append(output)))  # fmt: skip
    with torch.no_grad():
        for row in text["input_ids"]:
            model(torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    tokens = {}
    for layer, outputs in found.items():
        tokens[layer] = []
        for logits, weights, index in outputs:
            for of_token in range(SIZE):
                slots = [
                    (int(slot), float(weight))
                    for slot, weight in zip(index[of_token], weights[of_token])
                    if slot < logits.shape[-1]
                ]
                tokens[layer].append((slots, logits[of_token].float().softmax(-1)))
    return tokens


@pytest.mark.parametrize("make", [tied, shared_rows, soft])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_records_equal_loops_over_tokens(make, batch_size):
    model, text = make(), blocks()
    found, by_hand = record(model, text, batch_size), choices_by_hand(model, text)
    rows_of, groups = {}, model.config.groups
    for layer, module in layer_experts(model).items():
        slot_map = getattr(module, "slot_map", None)
        rows_of[layer] = (lambda slot: slot) if slot_map is None else (lambda slot, m=slot_map: int(m[slot]))

    num_tokens = BLOCKS * SIZE
    total = [0] * num_tokens
    for layer, tokens in by_hand.items():
        counts = torch.zeros_like(found.counts[layer])
        active = [0] * len(found.active[layer])
        positions = [0] * SIZE
        entropy = [0.0] * BLOCKS
        for place, (slots, scores) in enumerate(tokens):
            for slot, _ in slots:
                counts[place // SIZE, slot] += 1
            active[len(slots)] += 1
            positions[place % SIZE] += len(slots)
            total[place] += len(slots)
            entropy[place // SIZE] += float(metrics.entropy(scores)) / torch.tensor(float(len(scores))).log().item()
        assert found.counts[layer].equal(counts)
        assert found.active[layer].tolist() == active
        assert found.positions[layer].tolist() == positions
        assert found.token_entropy[layer].tolist() == pytest.approx(entropy)
    assert found.per_token["all"].tolist() == [total.count(n) for n in range(max(total) + 1)]
    assert found.tokens["all"].tolist() == [SIZE] * BLOCKS

    keys = [(p, *pair) for p, group in enumerate(groups) for pair in [tuple(group)]]
    assert sorted(found.agreement) == keys
    for pool, first, second in keys:
        expected = [[0, 0] for _ in range(BLOCKS)]
        for place, ((ours, _), (theirs, _)) in enumerate(zip(by_hand[first], by_hand[second])):
            other = {rows_of[second](slot) for slot, _ in theirs}
            expected[place // SIZE][0] += sum(rows_of[first](slot) in other for slot, _ in ours)
            expected[place // SIZE][1] += len(ours)
        assert found.agreement[pool, first, second].tolist() == expected
        for layer in (first, second):
            rows = [[rows_of[layer](slot) for slot, _ in slots] for slots, _ in by_hand[layer]]
            size = len(found.row_counts[layer])
            assert found.row_counts[layer].tolist() == [sum(each.count(row) for each in rows) for row in range(size)]
            assert found.row_tokens[layer].tolist() == [sum(row in each for each in rows) for row in range(size)]

    ids = [token for row in text["input_ids"] for token in row]
    frequent = sorted(set(ids))  # there are fewer than are counted
    for layer, tokens in by_hand.items():
        together, by_token = torch.zeros_like(found.together[layer]), torch.zeros_like(found.by_token[layer])
        for token, (slots, _) in zip(ids, tokens):
            for slot, _ in slots:
                by_token[frequent.index(token), slot] += 1
                for other, _ in slots:
                    together[slot, other] += 1
        assert found.together[layer].equal(together)
        assert found.by_token[layer].equal(by_token)

    layers = sorted(by_hand)
    assert sorted(found.flows) == list(itertools.pairwise(layers))
    for first, second in found.flows:
        joint = torch.zeros_like(found.flows[first, second])
        for (ours, _), (theirs, _) in zip(by_hand[first], by_hand[second]):
            best = [max(each, key=lambda choice: choice[1])[0] for each in (ours, theirs)]
            joint[rows_of[first](best[0]), rows_of[second](best[1])] += 1
        assert found.flows[first, second].equal(joint)


def test_only_the_most_frequent_tokens_are_counted():
    text = datasets.Dataset.from_dict({"input_ids": [[5, 5, 7, 8], [5, 7, 9, 9]]})
    assert most_frequent([text, text], 3).tolist() == [5, 7, 9]
    assert most_frequent([text]).tolist() == [5, 7, 9, 8]
    found = record(tied(), text, frequent=torch.tensor([9, 5]))
    assert [int(each.sum()) for each in found.by_token[0]] == [3 * 2, 2 * 2]  # of 5 and of 9, two experts each


def test_records_survive_a_file(tmp_path):
    found = record(tied(), blocks(), keep_choices=True)
    found.save(tmp_path / "records.safetensors")
    again = Records.load(tmp_path / "records.safetensors")
    for (name, tensor), (other_name, other) in zip(found._named(), again._named(), strict=True):
        assert name in dict(again._named())
        assert dict(again._named())[name].equal(tensor)
        assert other_name in dict(found._named())
        assert other.equal(dict(found._named())[other_name])


@pytest.mark.parametrize("make", [tied, soft])
def test_choices_are_compared_with_a_source(make):
    source = record(make(), blocks(), batch_size=3, keep_choices=True)
    other = tied()
    found = record(other, blocks(), batch_size=2, source=source)
    theirs, ours = choices_by_hand(make(), blocks()), choices_by_hand(other, blocks())
    for layer in theirs:
        expected = [[0, 0] for _ in range(BLOCKS)]
        for place, ((reference, _), (chosen, _)) in enumerate(zip(theirs[layer], ours[layer])):
            expected[place // SIZE][0] += len({slot for slot, _ in reference} & {slot for slot, _ in chosen})
            expected[place // SIZE][1] += len(reference)
        assert found.source_agreement[layer].tolist() == expected


def test_experts_that_get_a_part_of_the_tokens_are_refused(monkeypatch):
    model = tied()
    block = model.model.layers[0].mlp
    forward = type(block).forward
    monkeypatch.setattr(
        type(block), "forward", lambda self, hidden_states: forward(self, hidden_states[:, 1:].contiguous())
    )
    monkeypatch.setattr(
        type(model.model.layers[0]),
        "forward",
        lambda self, hidden_states, **kwargs: torch.nn.functional.pad(self.mlp(hidden_states), (0, 0, 1, 0)),
    )
    with pytest.raises(TiedMoeError, match=r"the experts of layer 0 were called with 22 of 24 tokens"):
        record(model, blocks(2), batch_size=2)
