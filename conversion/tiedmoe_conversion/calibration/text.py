"""Which text the source is run on, in the source's own tokens: what is fitted on, and what is held out."""

from dataclasses import dataclass
from typing import Any

import torch

from transformers_tiedmoe.auto_files import load_tokenizer
from transformers_tiedmoe.training.data import load_blocks

from ..checkpoint.reader import Source
from ..errors import ConversionError

HELD_OUT_SHARE = 0.25  # of the calibration tokens, held out in addition to them
DEFAULT_BLOCK_SIZE = 512  # tokens in a sequence, if the source knows so many positions
LEFT_ALONE = 0.05  # of the text, at its end, which `tiedmoe heal` holds out: no decision is taken on it


@dataclass(frozen=True)
class CalibrationText:
    """Which text the source is run on.

    Attributes:
        data: a file, a folder or a dataset of the Hub, as `tiedmoe heal --data`; "austen" is Jane Austen's novels,
            which ship with the package.
        num_tokens: tokens to fit on; a quarter as many again are held out, from the end of what is used. The last 5 %
            of the text are left alone.
        block_size: tokens in a sequence.
        seed: of the choice of sequences.
    """

    data: str
    num_tokens: int
    block_size: int
    seed: int

    def tokens(self, source: Source) -> tuple[torch.Tensor, int]:
        """Return all sequences, int64 `[N, block_size]` in the source's tokens, and how many of them are to fit on.

        Raises:
            ConversionError: no such text, less of it than asked for, or a source without a tokenizer.
        """
        tokenizer = _tokenizer(source)
        num_fit = max(1, round(self.num_tokens / self.block_size))
        num_held_out = max(1, round(self.num_tokens * HELD_OUT_SHARE / self.block_size))
        try:
            blocks = load_blocks(self.data, tokenizer, self.block_size, LEFT_ALONE)[0]["input_ids"]
        except (ValueError, OSError) as error:
            raise ConversionError(f"calibration text: {error}") from error
        if len(blocks) < num_fit + num_held_out:
            raise ConversionError(
                f"calibration text {self.data} is too short: without its last {LEFT_ALONE:.0%} it has "
                f"{len(blocks) * self.block_size} tokens, and {(num_fit + num_held_out) * self.block_size} are "
                f"needed, calibration_tokens={self.num_tokens} and a quarter held out; give more text, or lower "
                "calibration_tokens"
            )
        found = torch.tensor(blocks[:]).long()
        usable, held_out = found[:-num_held_out], found[-num_held_out:]
        chosen = torch.randperm(len(usable), generator=torch.Generator().manual_seed(self.seed))[:num_fit]
        return torch.cat([usable[chosen.sort().values], held_out]), num_fit


def _tokenizer(source: Source) -> Any:
    try:
        tokenizer = load_tokenizer(source.folder, source.name)
        # Without files transformers makes one up, which gives no tokens for any text.
        problem = None if tokenizer("Some text.").input_ids else "the one that transformers finds knows no text"
    except Exception as error:  # whatever a missing or broken tokenizer makes transformers raise
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise ConversionError(
            f"{source.name} has no tokenizer to read calibration text with ({problem}); put its tokenizer files "
            "beside its weights"
        )
    return tokenizer
