"""Training on many GPUs, predicted: the table of docs/scaling.md and `tiedmoe plan --gpus` against hand arithmetic."""

import json
import sys
from pathlib import Path

import pytest
from families import tiny_config

from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.audit.scaling import Setup, predict, setups

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402


def test_setups():
    assert setups(1, [64]) == [Setup("one", 1)]
    assert setups(64, [64, 96]) == [Setup("ddp", 64), Setup("fsdp2", 64), Setup("fsdp2", 64, 8)]
    assert setups(6, [64, 64])[2] == Setup("fsdp2", 6, 2)
    assert len(setups(8, [15])) == len(setups(8, [])) == 2
    with pytest.raises(ValueError, match="gpus=0; expected an integer of at least 1"):
        setups(0, [])


def test_predict_by_hand():
    """Two groups of two layers between two untied ones; 4 experts of 3 x 32 x 24 weights."""
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), group_size=2, skip_first=1, skip_last=1)
    one, ddp, fsdp, both = predict(config, [1, 4], batch_size=2, block_size=8)
    experts = 4 * 3 * 32 * 24  # of a pool or a layer: there are four
    root = 2 * 96 * 32 + 32
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 4 * 32 + 32 + 16 + 2 * 32  # q, o; k, v; router; norms
    everything = root + 6 * layer + 4 * experts
    assert one["optimizer_bytes"] == 8 * everything
    assert one["communicated_bytes"] == 0
    assert ddp["communicated_bytes"] == round(2 * 3 / 4 * 4 * everything)
    assert fsdp["communicated_bytes"] == round(3 / 4 * (2 * (root + 12 * layer + 8 * experts) + 4 * everything))
    # at a time: the untied layer, and a tied one with its pool
    most = 2 * (root + 2 * (layer + experts))
    assert fsdp["weight_bytes"] == pytest.approx(everything + most, abs=1000)  # and buffers
    assert (both["ep_size"], both["optimizer_bytes"]) == (4, fsdp["optimizer_bytes"])
    # no expert is gathered or reduced; 6 exchanges of 16 tokens for 2 experts in 6 layers, 32 numbers of 2 bytes
    exchanged = 6 * 16 * 2 * 6 * 32 * 2
    assert both["communicated_bytes"] == round(3 / 4 * (2 * (root + 12 * layer) + 4 * (root + 6 * layer) + exchanged))
    assert fsdp["weight_bytes"] - both["weight_bytes"] == 2 * 2 * experts * 3 // 4


def test_groups_of_experts_are_gathered_from_the_rest():
    """Of 8 GPUs with experts over 4, two hold the same expert."""
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), group_size=2, skip_first=1, skip_last=1)
    rows = predict(config, [4, 8], block_size=8)
    four, eight = rows[2], rows[5]
    assert (four["ep_size"], eight["ep_size"]) == (4, 4)
    dense = four["communicated_bytes"] - 3 / 4 * 6 * 8 * 2 * 6 * 32 * 2
    share = 4 * 4 * 3 * 32 * 24 / 4  # a GPU's of all experts
    grown = eight["communicated_bytes"] - four["communicated_bytes"]
    assert grown == pytest.approx(dense / (3 / 4) * (7 / 8 - 3 / 4) + 1 / 2 * share * (2 * 2 + 4), abs=2)


def test_soft_routing_and_residuals_have_no_expert_parallelism():
    soft = {"routing": "softmoe", "softmoe": {"alpha": 0.1, "threshold": 0.2}}
    tiny = tiny_config("olmoe", num_hidden_layers=2)
    config = TiedMoeConfig.from_family(tiny, groups=[[0, 1]], **soft)
    assert [row["name"] for row in predict(config, [4], block_size=8)] == ["DDP", "FSDP2"]
    plain, residual = (TiedMoeConfig.from_family(tiny, groups=[[0, 1]], residual_rank=rank) for rank in (0, 2))
    rows, others = predict(residual, [1, 4], block_size=8), predict(plain, [1, 4], block_size=8)
    assert [row["name"] for row in rows] == ["one GPU", "DDP", "FSDP2"]
    factors = 2 * 4 * 2 * (32 + 2 * 24 + 24 + 32)  # in two layers, of four experts, of rank 2, gate_up's and down's
    assert rows[0]["optimizer_bytes"] - others[0]["optimizer_bytes"] == 8 * factors


def test_the_table_of_the_docs_by_hand():
    """Cells of the committed results, from published sizes; the page shows these rows."""
    rows = json.loads(scaling.RESULTS.read_text())
    by = {(row["model"], row["group_size"], row["num_gpus"], row["name"]): row for row in rows}
    assert len(by) == len(rows) == 4 * 3 * (1 + 3 * 3)
    # parameters are an eighth of AdamW's bytes, two float32 each: as published, in billions
    for model, billions in (
        ("OLMoE-1B-7B", 6.92), ("Mixtral-8x7B", 46.7), ("Qwen3-235B-A22B", 235.1), ("DeepSeek-V3", 671.0),
    ):  # fmt: skip
        found = by[model, 1, 1, "one GPU"]["optimizer_bytes"] / 8e9
        assert found == pytest.approx(billions, rel=0.001), model
    # Mixtral at g=4: 28 of 32 layers read 7 pools; a set of experts has 8 x 3 x 4096 x 14336 weights
    experts = 8 * 3 * 4096 * 14336
    whole, tied = (by["Mixtral-8x7B", g, 64, "FSDP2"] for g in (1, 4))
    saved = 21 * experts
    assert whole["optimizer_bytes"] - tied["optimizer_bytes"] == pytest.approx(8 * saved / 64, abs=2)
    sent = whole["communicated_bytes"] - tied["communicated_bytes"]
    assert sent == pytest.approx(63 / 64 * saved * (2 * 2 + 4), abs=2)
    text = "\n".join(scaling.markdown(rows))
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert page.split(f"{scaling.BEGIN}\n")[1].split(scaling.END)[0].strip() == text.strip()
