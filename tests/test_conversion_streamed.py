"""The source run layer by layer: the family's own loss, one layer's experts in memory."""

import pytest
import torch
import torch.nn.functional as F
from conversions import save_source
from transformers import AutoModelForCausalLM

from tiedmoe_conversion.calibration import streamed_model as streamed
from tiedmoe_conversion.calibration.streamed_model import StreamedModel
from tiedmoe_conversion.checkpoint.reader import open_source
from tiedmoe_conversion.layout.source_model import SourceModel, read_config

# Why each: per-expert keys; interleaved and biased; a float32 buffer beside the router; state-space layers; linear
# attention; several kinds of layers and per-layer inputs; several residual streams; logits that are scaled.
FAMILIES = ["olmoe", "gpt_oss", "deepseek_v3", "jamba", "qwen3_next", "gemma4_text", "deepseek_v4", "granitemoe"]


def open_model(folder, keeps=True):
    opened = open_source(str(folder))
    source = SourceModel.map(opened, read_config(opened))
    return source, StreamedModel(source.model, source.tensors.read, 0 if keeps else 10**18)


def expected_losses(model, tokens):
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.stack([F.cross_entropy(row.float(), target).double() for row, target in zip(logits, tokens[:, 1:])])


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "streamed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_familys(tmp_path, monkeypatch, family, keeps):
    """In parts of two sequences out of five, in layers and in the head."""
    model = save_source(tmp_path / "source", family, dtype=torch.float32)
    monkeypatch.setattr(streamed, "TOKENS_AT_A_TIME", 24)
    _, streamed_model = open_model(tmp_path / "source", keeps)
    tokens = torch.randint(3, 96, (5, 12))
    seen = {}
    losses = streamed_model.loss(tokens, lambda layer, states, *_: seen.setdefault(layer, []).append(len(states)))
    torch.testing.assert_close(losses, expected_losses(model, tokens), rtol=1e-5, atol=1e-5)
    assert seen == {layer: [24, 24, 12] for layer in streamed_model.experts}
    torch.testing.assert_close(streamed_model.loss(tokens), losses)


def test_one_layer_of_experts_in_memory(tmp_path):
    save_source(tmp_path / "source")
    _, model = open_model(tmp_path / "source", keeps=False)
    found = []

    def look(layer, *_):
        there = [i for i, path in model.experts.items() if not model.model.get_submodule(path).down_proj.is_meta]
        found.append((layer, there))

    model.loss(torch.randint(3, 96, (2, 8)), look)
    assert found == [(layer, [layer]) for layer in range(6)]
    assert all(model.model.get_submodule(path).down_proj.is_meta for path in model.experts.values())


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "streamed"])
def test_replaced_weights_are_used_and_go_again(tmp_path, keeps):
    model = save_source(tmp_path / "source", dtype=torch.float32)
    _, streamed_model = open_model(tmp_path / "source", keeps)
    tokens = torch.randint(3, 96, (2, 8))
    before = streamed_model.loss(tokens)
    other = torch.randn_like(model.model.layers[2].mlp.experts.down_proj)
    with streamed_model.replaced({"model.layers.2.mlp.experts.down_proj": other}):
        replaced = streamed_model.loss(tokens)
    assert torch.equal(streamed_model.loss(tokens), before)
    model.model.layers[2].mlp.experts.down_proj.data.copy_(other)
    torch.testing.assert_close(replaced, expected_losses(model, tokens), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(replaced, before)


def test_replacements_are_made_a_layer_at_a_time(tmp_path):
    """They are rows of pools: all of them at once would be the untied model."""
    save_source(tmp_path / "source", dtype=torch.float32)
    _, model = open_model(tmp_path / "source", keeps=False)
    names = [f"{path}.down_proj" for path in model.experts.values()]
    seen = []

    class Rows(dict):
        def __getitem__(self, name):
            seen.append(name)
            return super().__getitem__(name)

    with model.replaced(Rows({name: torch.zeros(4, 32, 24) for name in names})):
        model.loss(torch.randint(3, 96, (2, 8)), lambda *_: seen.append(""))
    assert seen == [each for name in names for each in (name, "")]


def test_bfloat16_is_computed_in_float32_on_a_cpu(tmp_path):
    save_source(tmp_path / "source")
    _, streamed_model = open_model(tmp_path / "source")
    tokens = torch.randint(3, 96, (2, 8))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    torch.testing.assert_close(streamed_model.loss(tokens), expected_losses(model, tokens), rtol=1e-5, atol=1e-5)
