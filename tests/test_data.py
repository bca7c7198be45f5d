import gzip
import json
import lzma
import math
import random
import tracemalloc
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from checkpoints import TINY, make_text, make_tokenizer
from huggingface_hub.errors import HFValidationError
from transformers import OlmoeConfig, OlmoeForCausalLM

from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.training import data, text_files
from transformers_tiedmoe.training.data import load_blocks, perplexity


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return OlmoeForCausalLM(OlmoeConfig(**TINY))


def tokens_of(*parts):
    return [token for part in parts for row in part for token in row["input_ids"]]


zstd_compress = partial(pa.Codec("zstd").compress, asbytes=True)
COMPRESS = {".gz": gzip.compress, ".xz": partial(lzma.compress, preset=0), ".zst": zstd_compress}


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), *COMPRESS.items()])
def test_load_blocks_packs_a_text_file_in_order_and_holds_out_its_end(suffix, compress, tmp_path, tokenizer):
    text = make_text()
    name = "t.txt" + suffix
    (tmp_path / name).write_bytes(compress(text.encode()))
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
        ("t.json", "", {}, TiedMoeError, "it holds no text"),
        ("t.json", "[]", {}, TiedMoeError, "it holds no text"),
        ("t.json", "{}", {}, TiedMoeError, "line 1 has no column 'text', only"),
        ("t.json", "null", {}, TiedMoeError, "line 1 holds null where text is expected"),
        ("t.json", "[1, 2]", {}, TiedMoeError, "element 1 holds 1 where text is expected"),
        ("t.json", "[" * 100_000, {}, TiedMoeError, "recursion depth"),
        ("t.jsonl", '{"text":' * 100_000, {}, TiedMoeError, "line 1 is no JSON.*recursion depth"),
        ("t.jsonl", '{"text": "a"}\n{"text": 3}\n', {}, TiedMoeError, "line 2 holds 3 where text is expected"),
        ("t.jsonl", '{"text": "a"}\n{"text": ["b"]}\n', {}, TiedMoeError, r'line 2 holds \["b"\] where text'),
        ("t.jsonl", '{"text": "a"}\n{"x": "b"}\n', {}, TiedMoeError, r"line 2 has no column 'text', only \['x'\]"),
        ("t.jsonl", '{"text": null}\n', {}, TiedMoeError, "it holds no text"),
        ("t.jsonl", r'{"text": "\ud800"}', {}, TiedMoeError, "surrogates not allowed"),
        ("t.jsonl", b'{"text": "\xff"}', {}, TiedMoeError, "can't decode byte 0xff"),
        ("t.txt", b"\xff\xfea\0b\0", {}, TiedMoeError, "can't decode byte 0xff"),
        ("t.txt", b"first\na\0b\0", {}, TiedMoeError, "line 2 holds a NUL byte: binary data, or UTF-16"),
        (
            "t.txt",
            gzip.compress(b"text", mtime=0),
            {},
            TiedMoeError,
            "can't decode byte 0x8b",
        ),  # by its name it is no archive
        ("t.txt.xz", lzma.compress(b"text" * 999)[:-30], {}, TiedMoeError, "damaged: Compressed file ended"),
        ("t.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-3] + b"abc", {}, TiedMoeError, "damaged"),
        (
            "t.txt.gz",
            gzip.compress(random.Random(0).randbytes(9999), mtime=0)[:500] + b"x" * 99,
            {},
            TiedMoeError,
            "damaged",
        ),
        ("t.txt.zst", zstd_compress(b"text" * 999)[:-1], {}, TiedMoeError, "damaged: Truncated compressed stream"),
        ("t.txt.zst", b"text", {}, TiedMoeError, "damaged: ZSTD decompress failed"),
        ("t.txt.xz", b"text", {}, TiedMoeError, "damaged: Input format not supported"),
        ("t.parquet", b"PAR1" + bytes(99) + b"PAR1", {}, TiedMoeError, "cannot be read as parquet"),
        ("t.txt", "x", {"block_size": 1}, ValueError, "block_size=1"),
        ("t.txt", "x", {"validation_fraction": 1.0}, ValueError, "validation_fraction=1.0"),
    ],
)
def test_load_blocks_refuses(name, content, options, error, message, tmp_path, tokenizer):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message):
        load_blocks(path, tokenizer, **options)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "parquet"])
def test_load_blocks_expands_no_bomb(compression, suffix, tmp_path, tokenizer, monkeypatch):
    """Here beyond 64 KiB, in use beyond 64 MiB; and not one byte more is held than that."""
    monkeypatch.setattr(text_files, "SMALL_BYTES", 1 << 16)
    bomb = COMPRESS[compression]((b"[" if suffix == "json" else b"") + b"a" * (32 << 20))
    assert len(bomb) < 40_000
    path = tmp_path / f"t.{suffix}{compression}"
    path.write_bytes(bomb)
    most = max(1 << 16, text_files.MAX_EXPANSION * len(bomb))
    message = f"it expands to more than {most} bytes, 250 times its size"
    with pytest.raises(TiedMoeError, match=message):
        load_blocks(path, tokenizer)
    tracemalloc.start()
    with pytest.raises(TiedMoeError, match=message):
        list(text_files.read_rows([(str(path),)], "text"))
    assert tracemalloc.get_traced_memory()[1] < 4 * most + (4 << 20)
    tracemalloc.stop()


def test_load_blocks_reads_text_of_json_as_text_whatever_it_looks_like(tmp_path, tokenizer):
    """What looks like a date is no timestamp."""
    rows = ["2020-01-01", "12", "null"] * 20
    (tmp_path / "t.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps({"text": row}) for row in rows), "utf-8")
    (tmp_path / "t.json").write_text(json.dumps([{"text": row, "n": 1} for row in rows]))
    (tmp_path / "strings.json").write_text(json.dumps(rows))
    expected = [token for row in rows for token in [*tokenizer(row)["input_ids"], tokenizer.eos_token_id]]
    for name in ("t.jsonl", "t.json", "strings.json"):
        tokens = tokens_of(*load_blocks(tmp_path / name, tokenizer, block_size=8))
        assert tokens == expected[: len(tokens)], name


def test_load_blocks_hands_little_to_the_tokenizer_at_a_time(tmp_path, tokenizer, monkeypatch):
    """The same tokens: rows and lines are cut after a full stop here."""
    line = "the.cat.sat.on."
    monkeypatch.setattr(data, "TOKENIZED_AT_ONCE", 8 * len(line))
    monkeypatch.setattr(text_files, "LINE_LENGTH", 2 * len(line))
    given = []

    def counted(texts, **options):
        given.append(sum(map(len, texts)))
        return tokenizer(texts, **options)

    counted.eos_token_id = tokenizer.eos_token_id
    (tmp_path / "t.txt").write_text(line * 100)
    rows = [line, line * 100, line * 3]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    once = tokenizer(line)["input_ids"]
    tokens = tokens_of(*load_blocks(tmp_path / "t.txt", counted, block_size=8))
    assert tokens == (once * 100)[: len(tokens)]
    tokens = tokens_of(*load_blocks(tmp_path / "t.jsonl", counted, block_size=8))
    expected = [token for row in rows for token in [*once * (len(row) // len(line)), tokenizer.eos_token_id]]
    assert tokens == expected[: len(tokens)]
    assert len(given) > 20
    assert max(given) == 8 * len(line)


def test_load_blocks_sees_that_a_file_has_changed(tmp_path, tokenizer):
    for words in ("a cat sat ", "a dog ran "):
        (tmp_path / "t.txt").write_text(words * 100)
        train, _ = load_blocks(tmp_path / "t.txt", tokenizer, block_size=8)
        assert tokenizer.decode(train[0]["input_ids"]).startswith(words)


def test_load_blocks_refuses_a_parquet_column_that_is_no_text(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [[1, 2]] * 99, "n": [1] * 99}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(TiedMoeError, match=r"column 'text' holds list<.*> where text is expected"):
        load_blocks(tmp_path / "t.parquet", tokenizer)
    with pytest.raises(TiedMoeError, match=r"no column 'words', only \['text', 'n'\]"):
        load_blocks(tmp_path / "t.parquet", tokenizer, text_column="words")


@pytest.mark.parametrize(
    "kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_load_blocks_reads_text_however_arrow_keeps_it(kind, tmp_path, tokenizer):
    rows = pa.array(["a cat sat on the mat "] * 9)
    found = []
    for number, column in enumerate(
        (rows, rows.dictionary_encode() if pa.types.is_dictionary(kind) else rows.cast(kind))
    ):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{number}.parquet")
        found.append([part["input_ids"] for part in load_blocks(tmp_path / f"{number}.parquet", tokenizer, 8)])
    assert found[0][0][:] == found[1][0][:]


def test_load_blocks_refuses_two_columns_of_one_name(tmp_path, tokenizer):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "t.parquet")
    with pytest.raises(TiedMoeError, match="it has several columns 'text'; leave one of them"):
        load_blocks(tmp_path / "t.parquet", tokenizer)


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

    def refuse(name, config, **kwargs):
        raise ValueError("BuilderConfig 'x' not found") if config else HFValidationError("Repo id must use")

    with pytest.raises(FileNotFoundError, match="neither a file or folder here nor a dataset that the hub gives"):
        load_blocks("someone/nothing", tokenizer)  # the tests run offline
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_blocks("someone/novels", tokenizer, block_size=8)
    load_blocks("someone/novels:long", tokenizer, block_size=8)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(TiedMoeError, match=r"cannot be loaded: BuilderConfig 'x' not found; check its config"):
        load_blocks("someone/novels:x", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"my text is neither .* \(Repo id must use\)"):
        load_blocks("my text", tokenizer)
    assert calls == [(("someone/novels", config), {"split": "train"}) for config in (None, "long")]
