"""A tiny tokenizer, text and checkpoints on disk, for tests of healing, command line and examples."""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "was", "quick", "old"]
TINY = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "pad_token_id": None,
    "bos_token_id": None,
}


def make_text(num_lines=120):
    draw = random.Random(0)
    return "".join(" ".join(draw.choices(WORDS, k=12)) + ".\n" for _ in range(num_lines))


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"],
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save_source(folder, dtype=torch.float32, **fields):
    """An untied OLMoE as the family saves it: one tensor per expert."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**TINY | fields)).to(dtype)
    return _save(model, folder)


def save_tied(folder, dtype=torch.float32, **fields):
    """Layers 1 and 2 read pool 0."""
    torch.manual_seed(0)
    config = TiedMoeConfig(**{"family": "olmoe", "group_size": 2, "skip_first": 1, "skip_last": 1} | TINY | fields)
    return _save(TiedMoeForCausalLM(config).to(dtype), folder)


def _save(model, folder):
    model.generation_config.max_new_tokens = 7  # something to recognise it by
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
