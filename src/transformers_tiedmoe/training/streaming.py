"""Text that is read while it is trained on: neither all of it nor its tokens are ever in memory or on the disk.

The blocks are those of `data.load_blocks`, in their order or drawn from a buffer, and begin anew when the text ends. A
continued run reads again what it has seen, and skips it (Trainer's way): it goes on with the very block that an
unbroken run would.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from torch.utils.data import IterableDataset

from ..errors import TiedMoeError
from .arguments import TiedMoeTrainingArguments
from .data import (
    ROWS_AT_ONCE,
    as_blocks,
    check_largest,
    check_tokens,
    encode_rows,
    file_versions,
    load_blocks,
    load_from_hub,
    local_files,
    local_path,
    tokens_digest,
)
from .documents import document_columns, separate
from .text_files import read_rows, text_of


def read_text(
    args: TiedMoeTrainingArguments, tokenizer: Any, vocab_size: int
) -> tuple["datasets.Dataset | StreamedBlocks", datasets.Dataset, dict[str, Any]]:
    """Return the blocks to train on, those held out, and what identifies them, JSON-able.

    Raises:
        FileNotFoundError: no such data.
        TiedMoeError: text that cannot be used, too little of it, or tokens that the model has not.
    """
    end = tokenizer.eos_token_id
    if args.separate_documents and end is None:
        raise TiedMoeError(f"the tokenizer of {args.model} has no end-of-text token; leave separate_documents out")
    block_size = args.block_size or 0
    if args.streaming:
        texts = open_texts(args.data, args.text_column)
        apart = open_texts(args.data, args.text_column, args.validation_split) if args.validation_split else texts
        held_out = list(itertools.islice(stream_blocks(apart, tokenizer, block_size), args.validation_blocks))
        if not held_out:
            raise TiedMoeError(
                f"{args.data} has not one block of {block_size} tokens to hold out; give more, or lower block_size"
            )
        validation = as_blocks(np.concatenate(held_out), block_size)
        skip = 0 if args.validation_split else len(held_out)
        seed = args.seed if args.data_seed is None else args.data_seed
        train = StreamedBlocks(
            texts,
            tokenizer,
            block_size,
            skip,
            args.model,
            vocab_size,
            args.separate_documents,
            args.shuffle_buffer,
            seed,
        )
        check_tokens(args.model, vocab_size, validation)
        identity = texts.identity | {"tokens_sha256": tokens_digest(validation, as_blocks(train.first(), block_size))}
    else:
        train, validation = load_blocks(
            args.data, tokenizer, block_size, args.validation_fraction, args.text_column
        )  # fmt: skip
        check_tokens(args.model, vocab_size, train, validation)
        identity = {"tokens_sha256": tokens_digest(train, validation)}
        train = separate(train, end) if args.separate_documents else train
    return train, separate(validation, end) if args.separate_documents else validation, identity


@dataclass(frozen=True)
class Texts:
    """Text that can be read again and again.

    Attributes:
        read: gives its rows.
        is_lines: whether these are lines of text files.
        identity: its version, JSON-able.
    """

    read: Callable[[], Iterator[str]]
    is_lines: bool
    identity: dict[str, Any]


def open_texts(data: str, text_column: str = "text", split: str = "train") -> Texts:
    """Open files, a folder of them or a split of a dataset of the Hub, to be read as a stream.

    Raises:
        FileNotFoundError: `data` is neither here nor on the hub.
        TiedMoeError: files of an unknown type, or no such split.
    """
    path = local_path(data)
    if path is None:
        rows = load_from_hub(data, split, streaming=True)

        def read() -> Iterator[str]:
            for number, row in enumerate(rows, 1):
                yield text_of(row, text_column, f"{data}, split {split}: row {number}") or ""

        return Texts(read, False, {"split": split})
    if split != "train":
        raise TiedMoeError(f"{data} has no splits, as it is no dataset of the Hub; leave validation_split out")
    kind, files = local_files(path)
    versions = file_versions(files)
    return Texts(
        lambda: (row["text"] for row in read_rows(versions, text_column)), kind == "text", {"files": versions}
    )


def stream_blocks(texts: Texts, tokenizer: Any, block_size: int) -> Iterator[np.ndarray]:
    """Yield the blocks of a text, int32 `[block_size]`, as `load_blocks` packs them."""
    rows, left = texts.read(), np.empty(0, np.int32)
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        left = np.concatenate(
            [left, *(np.array(ids, np.int32) for ids in encode_rows(batch, tokenizer, texts.is_lines))]
        )
        used = len(left) // block_size * block_size
        yield from left[:used].reshape(-1, block_size)
        left = left[used:]


def shuffled(blocks: Iterator[np.ndarray], buffer_size: int, seed: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield each block once, drawn from a buffer that the next one fills up: as `shuffle(buffer_size)` of `datasets`.

    That one takes a dataset of its own, whose source it hashes; these blocks come from any iterator.
    """
    draw, buffer = np.random.default_rng(seed), list[np.ndarray]()
    for block in blocks:
        if len(buffer) < buffer_size:
            buffer.append(block.copy())  # else it keeps all that was read with it
        else:
            place = draw.integers(buffer_size)
            yield buffer[place]
            buffer[place] = block.copy()
    draw.shuffle(buffer)
    yield from buffer


class StreamedBlocks(IterableDataset):
    """The blocks of a text without its first ones, again and again.

    Args:
        texts: what to read.
        tokenizer: a transformers tokenizer.
        block_size: tokens in a block.
        skip: blocks at the text's start that are held out.
        model: its name, for errors.
        vocab_size: of the model; a token beyond it is an error.
        separates: whether to give `document_columns`.
        buffer_size: of `shuffled`; 0 keeps the text's order.
        seed: of its order, which is another one each time the text begins anew.
    """

    def __init__(
        self,
        texts: Texts,
        tokenizer: Any,
        block_size: int,
        skip: int,
        model: str,
        vocab_size: int,
        separates: bool = False,
        buffer_size: int = 0,
        seed: int = 0,
    ):
        self.texts, self.tokenizer, self.block_size, self.skip = texts, tokenizer, block_size, skip
        self.model, self.vocab_size, self.separates = model, vocab_size, separates
        self.buffer_size, self.seed = buffer_size, seed

    def first(self) -> np.ndarray:
        """Return the first block.

        Raises:
            TiedMoeError: there is none.
        """
        for block in itertools.islice(stream_blocks(self.texts, self.tokenizer, self.block_size), self.skip, None):
            return block
        raise TiedMoeError(
            f"the text ends with the {self.skip} blocks of {self.block_size} tokens that are held out, and none is "
            "left to train on; give more text, or lower validation_blocks or block_size"
        )

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self.first()
        for epoch in itertools.count():
            blocks = itertools.islice(stream_blocks(self.texts, self.tokenizer, self.block_size), self.skip, None)
            for block in shuffled(blocks, self.buffer_size, (self.seed, epoch)) if self.buffer_size else blocks:
                check_largest(self.model, self.vocab_size, int(block.max()))
                if self.separates:
                    columns = document_columns(block[None], self.tokenizer.eos_token_id)
                    yield {name: column[0].astype(np.int64) for name, column in columns.items()}
                else:
                    yield dict.fromkeys(("input_ids", "labels"), block.astype(np.int64))
