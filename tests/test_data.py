import gzip
import json
import lzma
import math

import pytest
import torch
import torch.nn.functional as F
from checkpoints import TINY, make_text, make_tokenizer
from transformers import OlmoeConfig, OlmoeForCausalLM

from transformers_tiedmoe.training.data import load_blocks, perplexity


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return OlmoeForCausalLM(OlmoeConfig(**TINY))


def tokens_of(*parts):
    return [token for part in parts for row in part for token in row["input_ids"]]


@pytest.mark.parametrize(("name", "open_file"), [("t.txt", open), ("t.txt.gz", gzip.open), ("t.txt.xz", lzma.open)])
def test_load_blocks_packs_a_text_file_in_order_and_holds_out_its_end(name, open_file, tmp_path, tokenizer):
    text = make_text()
    with open_file(tmp_path / name, "wt") as file:
        file.write(text)
    train, validation = load_blocks(tmp_path / name, tokenizer, block_size=16, validation_fraction=0.1)
    expected = tokenizer(text)["input_ids"]
    num_blocks = len(expected) // 16
    assert tokens_of(train, validation) == expected[: num_blocks * 16]
    assert len(validation) == round(num_blocks * 0.1)
    assert all(row["labels"] == row["input_ids"] and len(row["labels"]) == 16 for row in validation)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_load_blocks_closes_each_row_of_a_table_with_the_end_token(suffix, tmp_path, tokenizer):
    rows = [{"text": line, "number": i} for i, line in enumerate(make_text().splitlines())]
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    expected = [token for row in rows for token in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    tokens = tokens_of(*load_blocks(str(path), tokenizer, block_size=8))
    assert tokens == expected[: len(tokens)]
    assert len(tokens) > len(expected) - 8


def test_load_blocks_reads_a_folder_in_order_of_name(tmp_path, tokenizer):
    lines = make_text().splitlines(keepends=True)
    (tmp_path / "b.txt").write_text("".join(lines[50:]))
    (tmp_path / "a.txt").write_text("".join(lines[:50]))
    (tmp_path / "notes.md").write_text("not text to train on")
    tokens = tokens_of(*load_blocks(tmp_path, tokenizer, block_size=8))
    assert tokens == tokenizer("".join(lines))["input_ids"][: len(tokens)]


@pytest.mark.parametrize(
    ("name", "content", "options", "error", "message"),
    [
        (None, None, {}, FileNotFoundError, "no file or folder .*missing.txt"),
        ("t.csv", "a,b", {}, ValueError, "holds no such file; expected .txt"),
        ("t.txt", "", {}, ValueError, "cannot be read as text"),
        ("t.jsonl", '{"text": 1\n', {}, ValueError, "cannot be read as json .*JSON"),
        ("t.parquet", "PAR2", {}, ValueError, "cannot be read as parquet"),
        ("t.txt", "\n", {}, ValueError, "has 1 tokens, but block_size=256 needs at least 512"),
        ("t.txt", "too short", {}, ValueError, "give more text or a smaller block_size"),
        ("t.jsonl", '{"content": "a"}\n', {}, ValueError, r"no column 'text', only \['content'\]"),
        ("t.txt", "x", {"block_size": 1}, ValueError, "block_size=1"),
        ("t.txt", "x", {"validation_fraction": 1.0}, ValueError, "validation_fraction=1.0"),
    ],
)
def test_load_blocks_refuses(name, content, options, error, message, tmp_path, tokenizer):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_text(content)
    with pytest.raises(error, match=message):
        load_blocks(path, tokenizer, **options)


def test_load_blocks_refuses_a_folder_of_two_kinds(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    with pytest.raises(ValueError, match=r"2 kinds \(json, text\)"):
        load_blocks(tmp_path, tokenizer)


def test_perplexity_is_the_mean_over_tokens_of_the_models_own_loss(tmp_path, tokenizer, model):
    (tmp_path / "t.txt").write_text(make_text())
    _, validation = load_blocks(tmp_path / "t.txt", tokenizer, block_size=16, validation_fraction=0.2)
    assert len(validation) % 5, "the last batch is to be a short one"
    model.config.output_router_logits = True  # which makes outputs.loss include the balance loss
    model.train()
    measured = perplexity(model, validation, batch_size=5)
    assert model.training
    ids = torch.tensor(validation["input_ids"])
    with torch.no_grad():
        logits = model.eval()(ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert measured["loss"] == pytest.approx(loss, rel=1e-6)
    assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert measured["tokens"] == len(validation) * 15


def test_perplexity_leaves_out_labels_of_minus_100(tokenizer, model):
    import datasets

    ids = torch.randint(0, 300, (1, 6))
    labels = ids.clone()
    labels[0, 4:] = -100
    row = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    short = datasets.Dataset.from_dict({"input_ids": ids[:, :4].tolist(), "labels": ids[:, :4].tolist()})
    assert perplexity(model, row)["tokens"] == 3
    assert perplexity(model, row)["loss"] == pytest.approx(perplexity(model, short)["loss"], rel=1e-5)


def test_load_blocks_asks_the_hub_for_what_is_not_here(tokenizer, monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": make_text().splitlines()})

    with pytest.raises(FileNotFoundError, match="neither a file or folder here nor a dataset that the hub gives"):
        load_blocks("someone/nothing", tokenizer)  # the tests run offline
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_blocks("someone/novels", tokenizer, block_size=8)
    load_blocks("someone/novels:long", tokenizer, block_size=8)
    assert calls == [(("someone/novels", config), {"split": "train"}) for config in (None, "long")]
