"""The demo's source: a tokenizer and a small OLMoE trained on the text, saved as any OLMoE checkpoint is.

Training is `heal` from random weights: for a model without pools that is transformers' Trainer and nothing more.
"""

from collections.abc import Iterator
from pathlib import Path

from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast, set_seed

from ..training.data import _load_texts
from .config import VALIDATION_FRACTION, DemoConfig

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_tokenizer(data: str | Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, trained on all of the text but the part that is held out."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        _training_text(data), vocab_size, special_tokens=[PAD, BOS, EOS], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def save_untrained(config: DemoConfig, folder: Path) -> None:
    """Save the source as it is before training, with its tokenizer: random weights, the norms at one."""
    tokenizer = train_tokenizer(config.text, config.vocab_size)
    set_seed(config.seed)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            max_position_embeddings=max(512, config.block_size),
            tie_word_embeddings=True,
            norm_topk_prob=True,
            output_router_logits=True,  # the balance loss is part of the training loss
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _training_text(data: str | Path) -> Iterator[str]:
    """The text but its last part, a page at a time: paragraph breaks are to be seen, too."""
    rows, _ = _load_texts(data, "text")
    num_characters = sum(len(row) for row in rows["text"])
    seen, page = 0, []
    for row in rows["text"]:
        seen += len(row or "")
        if seen > (1 - VALIDATION_FRACTION) * num_characters:
            break
        page.append(row)
        if len(page) == 100:
            yield "".join(page)
            page = []
    yield "".join(page)
