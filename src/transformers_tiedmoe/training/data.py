"""Text in, fixed blocks of tokens out, and the perplexity of a causal language model on them.

Blocks are packed: documents are tokenized, joined and cut every `block_size` tokens, so there is no padding and no
attention mask. The last part of the text is held out, never a random sample: neighbouring blocks of one novel would
otherwise leak into the validation set.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import HFValidationError

from ..audit import metrics
from ..errors import TiedMoeError
from .text_files import COMPRESSIONS, KINDS, kind_of, read_rows

BUNDLED = {"austen": "austen.txt.xz"}  # texts that ship with the package
TOKENIZED_AT_ONCE = 1 << 20  # characters
ROWS_AT_ONCE = 1000
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def load_blocks(
    data: str | Path,
    tokenizer,
    block_size: int = 256,
    validation_fraction: float = 0.05,
    text_column: str = "text",
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Read text, tokenize it and pack it into blocks of equal length.

    Args:
        data: a `.txt`, `.json`, `.jsonl` or `.parquet` file (`.xz`, `.gz` or `.zst` compressed or not), a folder of
            such files of one kind, or a dataset of the hub, `id` or `id:config`, whose `train` split is read; "austen"
            is Jane Austen's novels, which ship with the package.
        tokenizer: a transformers tokenizer. No special token is added, but its end-of-text token, where it has one,
            closes every row of a `.json`, `.parquet` or hub dataset. A text file is one document.
        block_size: tokens in a block.
        validation_fraction: share of the blocks, taken from the end, that is held out (at least one block).
        text_column: the column to read where `data` has columns.

    Returns:
        `(train, validation)`, each with int32 columns `input_ids` and `labels` of shape `[block_size]`; the labels are
        the inputs, as transformers' models shift them themselves. The tokens are held in memory, 4 bytes each.

    Raises:
        FileNotFoundError: `data` is neither here nor on the hub.
        TiedMoeError: an unknown file type, a damaged file, no such text column, or too little text for one block in
            each part.
    """
    if not 0 < validation_fraction < 1:
        raise TiedMoeError(f"validation_fraction={validation_fraction} must lie between 0 and 1, e.g. 0.05")
    packed, num_tokens = _pack(data, tokenizer, block_size, text_column)
    if len(packed) < 2:
        raise TiedMoeError(
            f"{data} has {num_tokens} tokens, but block_size={block_size} needs at least {2 * block_size}: one block "
            "to train on and one held out; give more text or a smaller block_size"
        )
    num_validation = min(max(1, round(len(packed) * validation_fraction)), len(packed) - 1)
    num_train = len(packed) - num_validation
    return packed.select(range(num_train)), packed.select(range(num_train, len(packed)))


def load_last_blocks(
    data: str | Path,
    tokenizer,
    block_size: int = 256,
    share: float = 1.0,
    num_blocks: int | None = None,
    text_column: str = "text",
) -> datasets.Dataset:
    """Read text as `load_blocks` does, and return its last blocks: what healing holds out comes last.

    Args:
        data: as in `load_blocks`, as are `tokenizer`, `block_size` and `text_column`.
        share: of the text, at its end; at least one block. What `load_blocks` holds out is `validation_fraction`.
        num_blocks: at most so many of these, the last ones; all if None.

    Raises:
        FileNotFoundError: `data` is neither here nor on the hub.
        TiedMoeError: an unknown file type, a damaged file, no such text column, or too little text for one block.
    """
    if not 0 < share <= 1:
        raise TiedMoeError(f"share={share} must lie above 0 and be at most 1, e.g. 0.05")
    packed, num_tokens = _pack(data, tokenizer, block_size, text_column)
    if len(packed) == 0:
        raise TiedMoeError(
            f"{data} has {num_tokens} tokens, but block_size={block_size}; expected a block at least: give more text "
            "or a smaller block_size"
        )
    kept = max(1, round(len(packed) * share))
    kept = kept if num_blocks is None else min(kept, num_blocks)
    return packed.select(range(len(packed) - kept, len(packed)))


def tokens_digest(*parts: datasets.Dataset) -> str:
    """Return the sha256 of all tokens of blocks, in order."""
    digest = hashlib.sha256()
    for block in _columns(*parts):
        digest.update(block.tobytes())
    return digest.hexdigest()


def check_tokens(model: str, vocab_size: int, *parts: datasets.Dataset) -> None:
    """Raise `TiedMoeError` if blocks hold a token that a model of `vocab_size` has not."""
    check_largest(model, vocab_size, max(int(block.max()) for block in _columns(*parts)))


def check_largest(model: str, vocab_size: int, most: int) -> None:
    """Raise `TiedMoeError` if the largest token is one that a model of `vocab_size` has not."""
    if most >= vocab_size:
        raise TiedMoeError(
            f"{model}: its tokenizer gives token {most}, but its vocab_size is {vocab_size}; expected the "
            "tokenizer that belongs to the weights"
        )


def _columns(*parts: datasets.Dataset) -> Iterator[np.ndarray]:
    for part in parts:
        for chunk in part.with_format("numpy").iter(4096):
            yield np.asarray(chunk["input_ids"], dtype=np.int32)


def _pack(data: str | Path, tokenizer, block_size: int, text_column: str) -> tuple[datasets.Dataset, int]:
    """Return all blocks of a text, and how many tokens it has."""
    if block_size < 2:
        raise TiedMoeError(f"block_size={block_size}, but predicting a token needs at least 2; use 128 or more")
    texts, is_lines = load_texts(data, text_column)
    tokens = _tokenize(texts, tokenizer, is_lines)
    return as_blocks(tokens, block_size), len(tokens)


def as_blocks(tokens: np.ndarray, block_size: int) -> datasets.Dataset:
    """Cut int32 tokens `[num_tokens]` into the rows of a dataset; what is left at the end is dropped."""
    used = len(tokens) // block_size * block_size
    blocks = pa.FixedSizeListArray.from_arrays(pa.array(tokens[:used]), block_size).cast(pa.list_(pa.int32()))
    return datasets.Dataset(pa.table({"input_ids": blocks, "labels": blocks}))


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that decide the logits; without mask and positions a padded batch would give others."""
    return {name: inputs[name] for name in MODEL_INPUTS if inputs.get(name) is not None}


def sequence_losses(
    model, input_ids: torch.Tensor, labels: torch.Tensor, **inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the next-token cross-entropy of each sequence, without the auxiliary losses in `outputs.loss`.

    Args:
        model: a causal language model, called without labels.
        input_ids: int64 `[B, T]`.
        labels: int64 `[B, T]`, -100 where a token is not to be predicted.
        inputs: further inputs of the model, such as `attention_mask` and `position_ids` of a padded batch.

    Returns:
        The sum of the losses in nats, fp32 `[B]`, and the number of tokens predicted, int64 `[B]`.
    """
    logits = model(input_ids=input_ids, use_cache=False, **inputs).logits[:, :-1]
    targets = labels[:, 1:]
    # One sequence at a time: the fp32 copy of the logits of a whole batch is what runs out of memory.
    sums = [F.cross_entropy(row.float(), target, reduction="sum") for row, target in zip(logits, targets, strict=True)]
    return torch.stack(sums), (targets != -100).sum(-1)


@torch.no_grad()  # not inference_mode: what a model caches in its forward must stay usable in training
def perplexity(model, dataset: datasets.Dataset, batch_size: int = 8) -> dict[str, float | int]:
    """Compute the token-weighted mean cross-entropy of `model` on `dataset`, and its exponential.

    Args:
        model: a causal language model; evaluated on its own device, its train or eval mode is restored.
        dataset: rows of equal length with `input_ids` and `labels`, as `load_blocks` returns them, and maybe
            `position_ids`.
        batch_size: rows in one forward.

    Returns:
        `loss` in nats per token, `perplexity`, and `tokens`, the number of tokens predicted.
    """
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for batch in dataset.with_format("torch").iter(batch_size):
            found = {name: column.to(model.device, torch.int64) for name, column in batch.items()}
            sums, counts = sequence_losses(model, labels=found["labels"], **model_inputs(found))
            total += sum(sums.tolist())
            tokens += int(counts.sum())
    finally:
        model.train(was_training)
    if tokens == 0:
        raise TiedMoeError("perplexity needs at least one token to predict, but the dataset holds none")
    loss = total / tokens
    return {"loss": loss, "perplexity": metrics.perplexity(loss), "tokens": tokens}


def load_texts(data: str | Path, text_column: str) -> tuple[datasets.Dataset, bool]:
    """Load the rows of `data` as one column `text`; tell whether they are lines of text files."""
    path = local_path(data)
    if path is not None:
        kind, files = local_files(path)
        # Read once and kept in the cache of datasets, which knows a file by its path, its size and its time.
        try:
            texts = datasets.Dataset.from_generator(
                read_rows,
                features=datasets.Features({"text": datasets.Value("string")}),
                gen_kwargs={"files": file_versions(files), "text_column": text_column},
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
        return texts, kind == "text"
    texts = load_from_hub(data, "train")
    if text_column not in texts.column_names:
        raise TiedMoeError(
            f"{data} has no column {text_column!r}, only {texts.column_names}; name the column of "
            "the text (text_column)"
        )
    if texts.features[text_column] not in (datasets.Value("string"), datasets.Value("large_string")):
        raise TiedMoeError(
            f"{data} holds {texts.features[text_column]} in column {text_column!r}; expected text: "
            "name its column (text_column)"
        )
    texts = texts.select_columns(text_column)
    return texts if text_column == "text" else texts.rename_column(text_column, "text"), False


def local_path(data: str | Path) -> Path | None:
    """Return the file or folder that `data` names, or the text that ships with the package; None for one of the Hub.

    Raises:
        FileNotFoundError: it can only be a file, and there is none.
    """
    if str(data) in BUNDLED:
        return Path(str(resources.files("transformers_tiedmoe") / "data" / BUNDLED[str(data)]))
    path = Path(data).expanduser()
    if path.exists():
        return path
    if kind_of(path) or path.is_absolute() or str(data).startswith(".") or str(data).count("/") > 1:
        raise FileNotFoundError(f"no file or folder {data}; give text that exists, or the id of a dataset of the hub")
    return None


def load_from_hub(data: str | Path, split: str, **options: Any) -> Any:
    """Load a split of a dataset of the Hub, `id` or `id:config`.

    Raises:
        FileNotFoundError: there is none.
        TiedMoeError: it has no such split.
    """
    name, _, config = str(data).partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split, **options)
    except (DatasetNotFoundError, ConnectionError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{data} is neither a file or folder here nor a dataset that the hub gives ({error}); "
            "check the path, or the id and the connection"
        ) from error
    except ValueError as error:  # of datasets, for an unknown split or config
        raise TiedMoeError(f"{data} cannot be loaded: {error}; check its config and its splits") from error


def file_versions(files: Sequence[Path]) -> list[tuple[str, ...]]:
    """Return path, size and time of files: another version of a file differs in these."""
    return [(str(file), str(file.stat().st_size), str(file.stat().st_mtime_ns)) for file in files]


def local_files(path: Path) -> tuple[str, list[Path]]:
    """Return the kind of a file, or of all files in a folder, and the files to read, by name."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file))
    kinds = {kind for file in files if (kind := kind_of(file))}
    if len(kinds) != 1:
        found = f"files of {len(kinds)} kinds ({', '.join(sorted(kinds))})" if kinds else "no such file"
        raise TiedMoeError(
            f"{path} holds {found}; expected {', '.join(KINDS)} ({', '.join(COMPRESSIONS)} compressed or not), "
            "and in a folder only one of these kinds"
        )
    return kinds.pop(), files


def _tokenize(texts: datasets.Dataset, tokenizer, is_lines: bool) -> np.ndarray:
    """Tokenize `texts` into one int32 array `[num_tokens]`."""

    def encode(batch):
        return {"tokens": encode_rows(batch["text"], tokenizer, is_lines)}

    features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"))})
    encoded = texts.map(
        encode,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        remove_columns=texts.column_names,
        features=features,
        desc="Tokenizing the text",
    )
    chunks = encoded.data.column("tokens").chunks
    return np.concatenate([chunk.flatten().to_numpy() for chunk in chunks] or [np.empty(0, np.int32)])


def encode_rows(rows: Sequence[str | None], tokenizer, is_lines: bool) -> list[list[int]]:
    """Tokenize rows of text; lines of a file are joined first, other rows closed by the end-of-text token."""
    end = [] if is_lines or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = [row for row in rows if row]
    return [ids + end for ids in _encode(["".join(texts)] if is_lines and texts else texts, tokenizer)]


def _encode(rows: list[str], tokenizer) -> list[list[int]]:
    """Tokenize every row, at most `TOKENIZED_AT_ONCE` characters in one call of the tokenizer.

    The tokenizer takes some hundred bytes a character, and ends the process if memory is short of that.
    """
    tokens: list[list[int]] = [[] for _ in rows]
    pieces: list[tuple[int, str]] = []

    def empty() -> None:
        # verbose=False: a document longer than the model's context is no problem here, it is cut into blocks.
        encoded = tokenizer(
            [text for _, text in pieces], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        for (row, _), ids in zip(pieces, encoded["input_ids"]):
            tokens[row] += ids
        pieces.clear()

    num_characters = 0
    for row, text in enumerate(rows):
        for start in range(0, len(text), TOKENIZED_AT_ONCE):
            piece = text[start : start + TOKENIZED_AT_ONCE]
            num_characters += len(piece)
            if pieces and num_characters > TOKENIZED_AT_ONCE:
                empty()
                num_characters = len(piece)
            pieces.append((row, piece))
    if pieces:
        empty()
    return tokens
