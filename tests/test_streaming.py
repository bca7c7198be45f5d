"""Text read while it is trained on gives the blocks of text read before."""

import itertools
import json
import lzma
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from checkpoints import TINY, make_text, make_tokenizer
from transformers import OlmoeConfig, OlmoeForCausalLM

from transformers_tiedmoe.training import data as text_data
from transformers_tiedmoe.training.data import as_blocks, load_blocks, perplexity
from transformers_tiedmoe.training.documents import document_columns, refuse_crossing, separate
from transformers_tiedmoe.training.heal import HealConfig
from transformers_tiedmoe.training.streaming import StreamedBlocks, Texts, open_texts, read_text, stream_blocks


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The name of a model, and 120 documents."""
    folder = tmp_path_factory.mktemp("streaming")
    rows = "".join(json.dumps({"text": line}) + "\n" for line in make_text().splitlines())
    (folder / "rows.jsonl").write_text(rows)
    return "tied", str(folder / "rows.jsonl")


def arguments(places, **fields):
    options = {"model": places[0], "data": places[1], "output": "o", "block_size": 16, "streaming": True}
    return HealConfig(**{**options, "validation_blocks": 3, **fields})


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl", "a.parquet", "folder"])
def test_streamed_blocks_are_those_of_load_blocks(name, tmp_path, tokenizer):
    lines = make_text().splitlines()
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        for part, chosen in (("a.txt", lines[:50]), ("b.txt", lines[50:])):
            (path / part).write_text("\n".join(chosen))
    elif name.endswith("jsonl"):
        path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    elif name.endswith("parquet"):
        datasets.Dataset.from_dict({"text": lines}).to_parquet(path)
    else:
        text = "\n".join(lines).encode()
        path.write_bytes(lzma.compress(text) if name.endswith("xz") else text)
    parts = load_blocks(path, tokenizer, block_size=16)
    expected = [row["input_ids"] for part in parts for row in part]
    assert [block.tolist() for block in stream_blocks(open_texts(path), tokenizer, 16)] == expected


def test_streamed_text_is_read_as_far_as_it_is_asked_for_and_begins_anew(places, tokenizer):
    """What is held out is never trained on, and what is left at the end makes no block with the beginning."""
    whole = [block.tolist() for block in stream_blocks(open_texts(places[1]), tokenizer, 16)]
    train, validation, identity = read_text(arguments(places), tokenizer, 320)
    assert [row["input_ids"] for row in validation] == whole[:3]
    rows = list(itertools.islice(train, 2 * len(whole)))
    assert [row["labels"].tolist() for row in rows] == (2 * whole[3:] + whole[3:])[: len(rows)]
    assert Path(identity["files"][0][0]).samefile(places[1])
    given = []

    def endless():
        for row in itertools.count():
            given.append(row)
            yield "the cat sat on the mat . " * 10

    train = StreamedBlocks(Texts(endless, False, {}), tokenizer, 16, 3, "model", 320)
    next(iter(train))
    assert len(given) <= 2 * text_data.ROWS_AT_ONCE + 2


def test_a_shuffle_buffer_gives_every_block_once_a_pass_in_an_order_of_its_own(places, tokenizer):
    rows = {}
    for size, seed in ((0, 0), (3, 0), (3, 0), (3, 1), (10**6, 0)):
        train, _, _ = read_text(arguments(places, shuffle_buffer=size, data_seed=seed), tokenizer, 320)
        found = [tuple(row["labels"].tolist()) for row in itertools.islice(train, 2 * len(list(blocks_of(train))))]
        assert rows.setdefault((size, seed), found) == found
    in_order = rows[0, 0]
    half = len(in_order) // 2
    for key in ((3, 0), (3, 1), (10**6, 0)):
        first, second = rows[key][:half], rows[key][half:]
        assert sorted(first) == sorted(second) == sorted(in_order[:half])
        assert len({tuple(first), tuple(second), tuple(in_order[:half])}) == 3
    assert rows[3, 0] != rows[3, 1]
    # the block that is given as number n is one of the first n + 3 of the text
    assert all(block in in_order[: n + 3] for n, block in enumerate(rows[3, 0][:half]))


def blocks_of(train):
    return itertools.islice(stream_blocks(train.texts, train.tokenizer, train.block_size), train.skip, None)


def test_streaming_from_the_hub_and_its_splits(places, tokenizer, monkeypatch):
    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        if split == "none":
            raise ValueError("Bad split: none. Available splits: ['train', 'validation']")
        words = "a cat" if split == "train" else "a dog"
        return datasets.Dataset.from_dict({"words": [words] * 200}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = arguments(places, data="some/novels:long", text_column="words", validation_split="validation")
    train, validation, _ = read_text(args, tokenizer, 320)
    assert "dog" in tokenizer.decode(validation[0]["input_ids"])
    assert "dog" not in tokenizer.decode(next(iter(train))["input_ids"])
    assert calls[0] == ("some/novels", "long", "train", True)
    assert {split for *_, split, _ in calls} == {"train", "validation"}
    for fields, message in (
        ({"text_column": "text"}, r"some/novels, split train: row 1 has no column 'text', only \['words'\]"),
        ({"text_column": "words", "validation_split": "none"}, r"some/novels cannot be loaded: Bad split: none"),
        ({"data": places[1], "validation_split": "test"}, "has no splits, as it is no dataset of the Hub"),
        ({"data": places[1], "validation_blocks": 10**6}, r"ends with the \d+ blocks .* none is left to train on"),
        ({"data": places[1], "block_size": 10**5}, "has not one block of 100000 tokens to hold out"),
    ):
        with pytest.raises(ValueError, match=message):
            read_text(arguments(places, **{"data": "some/novels", **fields}), tokenizer, 320)
    with pytest.raises(ValueError, match=r"gives token \d+, but its vocab_size is 5"):
        next(iter(StreamedBlocks(open_texts(places[1]), tokenizer, 16, 0, "m", 5)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataloader_num_workers": 2}, "streaming has one reader"),
        ({"teacher_cache": "c", "teacher": "t"}, "leave teacher_cache out"),
        ({"streaming": False, "validation_split": "v"}, "validation_split=v needs streaming"),
        ({"streaming": False, "shuffle_buffer": 8}, "shuffle_buffer=8 needs streaming"),
        ({"shuffle_buffer": -1}, "shuffle_buffer=-1 must not be negative"),
        ({"validation_blocks": 0}, "validation_blocks=0, but it must be at least 1"),
    ],
)
def test_streaming_arguments_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        arguments(("m", "d"), **fields)


def test_the_novels_that_ship_are_text_to_heal_on(tokenizer):
    assert len(next(stream_blocks(open_texts("austen"), tokenizer, 16))) == 16


def test_document_columns():
    ids = np.array([[5, 6, 2, 7, 8, 9], [2, 2, 5, 6, 7, 2]], dtype=np.int32)
    found = document_columns(ids, end=2)
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 3]]
    assert found["labels"].tolist() == [[-100, 6, 2, -100, 8, 9], [-100, -100, -100, 6, 7, 2]]
    rows = separate(as_blocks(ids.flatten(), 6), 2)
    assert rows[:] == {name: column.tolist() for name, column in found.items()}


def test_separate_documents_are_predicted_as_if_each_were_alone():
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**{**TINY, "initializer_range": 0.2})).eval()
    ids = torch.randint(3, 300, (24,)).int().numpy()
    ids[[4, 11, 12]] = 2
    together = perplexity(model, separate(as_blocks(ids, 12), 2))
    alone = [np.split(block, np.flatnonzero(block[:-1] == 2) + 1) for block in ids.reshape(2, 12)]
    losses = [perplexity(model, as_blocks(each, len(each))) for block in alone for each in block if len(each) > 1]
    assert together["tokens"] == sum(each["tokens"] for each in losses)
    assert together["loss"] * together["tokens"] == pytest.approx(
        sum(e["loss"] * e["tokens"] for e in losses), rel=1e-5
    )
    assert together["loss"] != pytest.approx(perplexity(model, as_blocks(ids, 12))["loss"], rel=1e-3)


def test_a_model_that_sees_over_the_ends_of_documents_is_refused(monkeypatch):
    model = OlmoeForCausalLM(OlmoeConfig(**{**TINY, "initializer_range": 0.2}))
    refuse_crossing(model, "m")
    real = OlmoeForCausalLM.forward
    monkeypatch.setattr(OlmoeForCausalLM, "forward", lambda self, position_ids=None, **kwargs: real(self, **kwargs))
    with pytest.raises(ValueError, match=r"m sees over the ends of documents, .* leave separate_documents out"):
        refuse_crossing(model, "m")
