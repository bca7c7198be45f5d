"""The demo's source: a tokenizer and a small OLMoE trained on the text, saved as any OLMoE checkpoint is."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from transformers_tiedmoe.configuration_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.files import read_json
from transformers_tiedmoe.modeling_tiedmoe import TiedMoeForCausalLM
from transformers_tiedmoe.output_place import was_renamed
from transformers_tiedmoe.run_folder import Work
from transformers_tiedmoe.training.callbacks import ProgressReport
from transformers_tiedmoe.training.data import load_blocks, load_texts
from transformers_tiedmoe.workdir import open_work

from .config import VALIDATION_FRACTION, DemoConfig

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
REPORT = "training.json"


def train_source(config: DemoConfig, folder: Path, progress: Callable[[int, int, str], None]) -> dict:
    """Train the source from random weights and save it, with its tokenizer, into `folder`.

    Returns:
        `steps`, `tokens` and `seconds` of the training, also in `folder/training.json`; of an earlier run if the
        folder exists.
    """
    if folder.exists() and not was_renamed(folder):
        return read_json(folder / REPORT)
    with open_work(folder, {"settings": config.settings()}) as work:
        if work.report is None:
            work.complete(_train(config, work, progress))
    assert work.report is not None
    return work.report


def _train(config: DemoConfig, work: Work, progress: Callable[[int, int, str], None]) -> dict:
    progress(0, config.source_steps, "training the tokenizer")
    tokenizer = train_tokenizer(config.text, config.vocab_size)
    set_seed(config.seed)
    model = OlmoeForCausalLM(source_config(config, tokenizer))
    if config.balance_by_layer:  # the same model and weights without a group; what differs is the loss
        untied = TiedMoeConfig.from_family(model.config, groups=[])
        trained = TiedMoeForCausalLM(untied)
        trained.load_state_dict(model.state_dict())
    else:
        trained = model
    start = time.perf_counter()
    train_on_text(trained, tokenizer, config, work.scratch, progress)
    report = {
        "steps": config.source_steps,
        "tokens": config.source_steps * config.batch_size * config.block_size,
        "seconds": round(time.perf_counter() - start, 1),
    }
    model.load_state_dict(trained.state_dict())
    with work.draft() as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    work.write_json(REPORT, report)
    return report


def train_on_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: DemoConfig,
    folder: Path,
    progress: Callable[[int, int, str], None],
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """`config.source_steps` steps of AdamW on the text but its held-out part; `folder` is for what Trainer writes."""
    train, _ = load_blocks(config.text, tokenizer, config.block_size, VALIDATION_FRACTION)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=config.source_steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.source_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.source_steps // 20,
            adam_beta2=0.95,  # 0.99 was much worse over so few steps: docs/log.md
            weight_decay=0.1,
            logging_steps=10,
            save_strategy="no",
            seed=config.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train,
        data_collator=default_data_collator,  # blocks need no padding
        callbacks=[
            ProgressReport(lambda done, total, what: progress(done, total, what.replace("healing", "training"))),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.config.use_cache = True  # Trainer switched it off


def source_config(config: DemoConfig, tokenizer: PreTrainedTokenizerBase) -> OlmoeConfig:
    """Return the source's own configuration, a small OLMoE."""
    return OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        initializer_range=0.06,  # so narrow a model leaves the start sooner than with the family's 0.02
        max_position_embeddings=max(512, config.block_size),
        tie_word_embeddings=True,
        norm_topk_prob=True,
        output_router_logits=True,  # the balance loss is part of the training loss
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_tokenizer(data: str | Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens on all of the text but the held-out part."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        _training_text(data), vocab_size, special_tokens=[PAD, BOS, EOS], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def _training_text(data: str | Path) -> Iterator[str]:
    """Yield the text without its held-out end, a page at a time, so that paragraph breaks are seen too."""
    rows, _ = load_texts(data, "text")
    num_characters = sum(len(row) for row in rows["text"])
    seen, page = 0, []
    for row in rows["text"]:
        seen += len(row)
        if seen > (1 - VALIDATION_FRACTION) * num_characters:
            break
        page.append(row)
        if len(page) == 100:
            yield "".join(page)
            page = []
    yield "".join(page)
