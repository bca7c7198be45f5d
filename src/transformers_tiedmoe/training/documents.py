"""Documents in one block that do not see one another: positions begin anew at each, and attention follows them.

transformers masks by `position_ids` (`masking_utils.find_packed_sequence_indices`), with flash attention only a batch
of one sequence (`DataCollatorWithFlattening`). Whether a model does is tried, not looked up.
"""

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import TiedMoeError

IGNORED = -100


def document_columns(ids: np.ndarray, end: int) -> dict[str, np.ndarray]:
    """Return `input_ids`, `labels` and `position_ids` of blocks `[N, T]` in which `end` closes documents.

    The first token of a document is not predicted: nothing before it is seen.
    """
    is_first = np.ones_like(ids, dtype=bool)
    is_first[:, 1:] = ids[:, :-1] == end
    index = np.arange(ids.shape[1], dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(is_first, index, 0), axis=1)
    return {"input_ids": ids, "labels": np.where(is_first, IGNORED, ids), "position_ids": positions.astype(np.int32)}


def separate(blocks: datasets.Dataset, end: int) -> datasets.Dataset:
    """Return blocks with `document_columns`."""
    column = datasets.List(datasets.Value("int32"))
    return blocks.with_format("numpy").map(
        lambda rows: document_columns(rows["input_ids"].astype(np.int32), end),
        batched=True,
        features=datasets.Features(dict.fromkeys(("input_ids", "labels", "position_ids"), column)),
        desc="Separating documents",
    ).with_format(None)  # fmt: skip


@torch.no_grad()
def refuse_crossing(model: PreTrainedModel, name: str) -> None:
    """Raise `TiedMoeError` if a token of a model's sees the document before its own, however positions begin anew."""
    was_training = model.training
    model.eval()
    vocab_size, half = model.config.get_text_config().vocab_size, 8
    ids = (torch.arange(4 * half, device=model.device).view(2, -1) * 7 + 1) % vocab_size
    positions = torch.arange(half, device=model.device).repeat(2, 2)
    try:
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, half:]
        alone = model(input_ids=ids[:, half:], position_ids=positions[:, half:], use_cache=False).logits
    finally:
        model.train(was_training)
    if not bool(((together - alone).abs() <= 0.02 * alone.abs().max()).all()):
        raise TiedMoeError(
            f"{name} sees over the ends of documents, though positions begin anew (attention: "
            f"{model.config._attn_implementation}); leave separate_documents out, or load it with sdpa attention"
        )
