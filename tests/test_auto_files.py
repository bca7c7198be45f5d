"""What transformers decides by `model_type`, for tied and untied folders: the source's answer, of every family.

The tokenizers have the shapes of real ones, because a class that transformers takes for another one builds the
pipeline
anew from the vocabulary: an own split, a Metaspace or a normaliser of the file is lost then.
"""

import json
import logging
import shutil

import pytest
import torch
from conversions import save_source
from families import moe_families, tiny_config
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto import tokenization_auto

from tiedmoe_conversion import ConversionRecipe, convert, untie
from tiedmoe_conversion.calibration.text import _tokenizer
from tiedmoe_conversion.checkpoint.reader import open_source
from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.auto_files import NAMED_BY_SOURCE, load_tokenizer, settle_tokenizer
from transformers_tiedmoe.errors import TiedMoeError

TEXT = "The cat sat, in 2023 and 650841823, on नमस्ते   mats.\n</s> A Dog don't\tcrème"
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def byte_level():
    """As MiniMax, DeepSeek and Qwen have it: a split of its own, digits in groups of at most three."""
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"\p{N}{1,3}|[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def byte_fallback():
    """As Mixtral and Phi have it: no pre-tokenizer, "▁" in front by a normaliser, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL + BYTES, show_progress=False)


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )


# The classes that files on the Hub name beside each; None: no class, which leaves it to the type alone.
SHAPES = {
    byte_level: ("GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast", None),
    byte_fallback: ("LlamaTokenizer", None),
    word_piece: ("BertTokenizer",),
    unigram: ("T5Tokenizer", "PreTrainedTokenizerFast"),
}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """By shape, the file tokenizer.json."""
    files = {}
    for shape in SHAPES:
        tokenizer, trainer = shape()
        tokenizer.train_from_iterator([TEXT] * 20, trainer)
        files[shape] = tmp_path_factory.mktemp(shape.__name__) / "tokenizer.json"
        tokenizer.save(str(files[shape]))
    return files


def write_tokenizer(folder, file, named, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / "tokenizer.json")
    fields = {"legacy": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | fields
    fields |= {} if named is None else {"tokenizer_class": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def ids(tokenizer):
    return tokenizer(TEXT)["input_ids"]


def unregistered(folder):
    """The tokenizer that AutoTokenizer gives where this package is not imported: vLLM's, or a script's."""
    return AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig())


@pytest.mark.parametrize("family", moe_families())
def test_tokens_are_the_source_s_of_every_family(tmp_path, vocabularies, family):
    if family == "gemma4":
        pytest.skip("transformers has no text-only causal LM of it: conversion refuses it")
    config = tiny_config(family)
    (tmp_path / "source").mkdir()
    source_config = AutoConfig.for_model(family) if family != config.model_type else config
    source_config.save_pretrained(tmp_path / "source")
    config.save_pretrained(tmp_path / "untied")
    TiedMoeConfig.from_family(config, skip_first=0, skip_last=0).save_pretrained(tmp_path / "tied")
    for shape, classes in SHAPES.items():
        for named in classes:
            write_tokenizer(tmp_path / "source", vocabularies[shape], named)
            source = AutoTokenizer.from_pretrained(tmp_path / "source", config=source_config)
            for kind in ("tied", "untied"):
                write_tokenizer(tmp_path / kind, vocabularies[shape], named)
                settle_tokenizer(source, tmp_path / kind)
                load = unregistered if kind == "tied" else load_tokenizer
                assert ids(load(tmp_path / kind)) == ids(source), (kind, shape, named)
    assert_same(AutoTokenizer.from_pretrained(tmp_path / "tied"), source)


def assert_same(found, expected):
    assert (type(found), ids(found)) == (type(expected), ids(expected))


@pytest.fixture(scope="module")
def minimax(tmp_path_factory, vocabularies):
    """Folders of a MiniMax-M2 whose tokenizer class transformers overrules, and what is made of it."""
    root = tmp_path_factory.mktemp("minimax")
    save_source(root / "source", "minimax_m2", vocab_size=360)
    write_tokenizer(root / "source", vocabularies[byte_level], "GPT2Tokenizer", processor_class="AnyProcessor")
    (root / "source" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    GenerationConfig(max_new_tokens=5, temperature=0.5, do_sample=True).save_pretrained(root / "source")
    fields = {"method": "union", "groups": [[0, 1], [2, 3]]}
    convert(ConversionRecipe(source=str(root / "source"), output=str(root / "tied"), **fields))
    untie(root / "tied", root / "untied")
    return root


@pytest.mark.parametrize("made", ["tied", "untied"])
def test_converted_and_untied(minimax, made):
    source = AutoTokenizer.from_pretrained(minimax / "source")
    assert type(source).__name__ == "TokenizersBackend"  # the case that this is about
    assert_same(AutoTokenizer.from_pretrained(minimax / made), source)
    assert_same(AutoTokenizer.from_pretrained(minimax / made, trust_remote_code=True), source)
    assert_same(_tokenizer(open_source(str(minimax / made))), source)  # what calibration text is read with
    encoded = Tokenizer.from_file(str(minimax / made / "tokenizer.json")).encode(TEXT)
    assert encoded.ids == ids(source)


def test_the_class_is_written_and_given_back(minimax):
    tied, untied = (json.loads((minimax / made / "tokenizer_config.json").read_text()) for made in ("tied", "untied"))
    assert (tied["tokenizer_class"], tied[NAMED_BY_SOURCE]) == ("PreTrainedTokenizerFast", "GPT2Tokenizer")
    assert untied["tokenizer_class"] == "GPT2Tokenizer"
    assert NAMED_BY_SOURCE not in untied
    assert_same(unregistered(minimax / "tied"), AutoTokenizer.from_pretrained(minimax / "source"))


def test_saved_after_healing(minimax, tmp_path):
    """Healing saves what it loaded."""
    tokenizer = load_tokenizer(minimax / "tied")
    for made in ("tied", "untied"):
        (tmp_path / made).mkdir()
        shutil.copyfile(minimax / made / "config.json", tmp_path / made / "config.json")
        tokenizer.save_pretrained(tmp_path / made)
        settle_tokenizer(tokenizer, tmp_path / made)
        assert_same(load_tokenizer(tmp_path / made), tokenizer)


def test_a_tied_folder_of_before_asks_its_family(minimax, tmp_path):
    """Its tokenizer_config.json is the source's, word for word."""
    shutil.copytree(minimax / "tied", tmp_path / "old")
    shutil.copyfile(minimax / "source" / "tokenizer_config.json", tmp_path / "old" / "tokenizer_config.json")
    assert_same(AutoTokenizer.from_pretrained(tmp_path / "old"), AutoTokenizer.from_pretrained(minimax / "source"))


def test_a_tied_folder_with_a_tokenizer_alone(minimax, tmp_path):
    write_tokenizer(tmp_path, minimax / "source" / "tokenizer.json", "PreTrainedTokenizerFast")
    config = AutoConfig.from_pretrained(minimax / "tied")
    assert_same(
        AutoTokenizer.from_pretrained(tmp_path, config=config), AutoTokenizer.from_pretrained(minimax / "source")
    )


def test_transformers_decides_by_the_hub_s_name_too(minimax, tmp_path, vocabularies):
    """A snapshot in the cache is read as the repository that it is of."""
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    write_tokenizer(tmp_path, vocabularies[byte_level], "Qwen2Tokenizer")
    assert type(load_tokenizer(tmp_path)).__name__ == "Qwen2Tokenizer"
    named = load_tokenizer(tmp_path, "deepseek-ai/DeepSeek-Coder-V2-Lite")
    assert type(named).__name__ == "TokenizersBackend"
    settle_tokenizer(named, tmp_path)
    assert_same(load_tokenizer(tmp_path), named)


def test_no_code_travels(tmp_path, vocabularies):
    """kimi_linear's tokenizer has code beside it, which is neither run nor copied: transformers' own class reads the
    files.
    """
    tiny_config("kimi_linear").save_pretrained(tmp_path)
    code = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    write_tokenizer(tmp_path, vocabularies[byte_level], "TikTokenTokenizer", auto_map=code)
    source = load_tokenizer(tmp_path)
    TiedMoeConfig.from_family(tiny_config("kimi_linear"), skip_first=0, skip_last=0).save_pretrained(tmp_path)
    settle_tokenizer(source, tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert_same(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True), source)


def save_with_code(folder, file, family):
    """A source that names a tokenizer of its own code, which makes transformers believe the class beside it."""
    tiny_config(family).save_pretrained(folder)
    code = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
    write_tokenizer(folder, file, "Qwen2Tokenizer", auto_map=code)
    source = load_tokenizer(folder)
    assert type(source).__name__ == "Qwen2Tokenizer"
    return source


def test_a_class_that_transformers_overrules_is_written_out(tmp_path, vocabularies):
    """Mixtral's files are not believed without that code: tokenizer.json itself does what the class did."""
    source = save_with_code(tmp_path / "untied", vocabularies[byte_level], "mixtral")
    shutil.copytree(tmp_path / "untied", tmp_path / "tied")
    TiedMoeConfig.from_family(tiny_config("mixtral"), skip_first=0, skip_last=0).save_pretrained(tmp_path / "tied")
    for made in ("tied", "untied"):
        settle_tokenizer(source, tmp_path / made)
        assert ids(AutoTokenizer.from_pretrained(tmp_path / made)) == ids(source)
    assert ids(unregistered(tmp_path / "tied")) == ids(source)


@pytest.mark.skipif(
    "qwen3_5_moe_text" not in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    reason="this transformers (5.17) overrules no family by a class that splits text its own way",
)
def test_what_cannot_be_written_is_refused(tmp_path, vocabularies):
    """transformers knows one class for Qwen3.5, which splits text its own way whatever the files say."""
    source = save_with_code(tmp_path, vocabularies[byte_level], "qwen3_5_moe_text")
    with pytest.raises(TiedMoeError, match=r"source's tokenizer is a Qwen2Tokenizer.*remove auto_map"):
        settle_tokenizer(source, tmp_path)


def test_a_tokenizer_that_cannot_be_loaded_is_told(tmp_path):
    save_source(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match="no tokenizer that loads"):
        open_source(str(tmp_path / "source")).copy_travelling_files(tmp_path)


# Everything else that goes by `model_type`; the table is in docs/conversion.md.


def test_processors(minimax):
    source = AutoTokenizer.from_pretrained(minimax / "source")
    for made in ("tied", "untied"):
        assert_same(AutoProcessor.from_pretrained(minimax / made), source)
        for auto in (AutoFeatureExtractor, AutoImageProcessor):
            with pytest.raises((OSError, ValueError, ImportError)):
                auto.from_pretrained(minimax / made)


def test_generation_config_and_chat_template(minimax):
    source = GenerationConfig.from_pretrained(minimax / "source").to_dict()
    for made in ("tied", "untied"):
        model = AutoModelForCausalLM.from_pretrained(minimax / made)
        assert model.generation_config.to_dict() == source
        chat = [{"role": "user", "content": "Hello"}]
        assert AutoTokenizer.from_pretrained(minimax / made).apply_chat_template(chat, tokenize=False) == "Hello!"


def test_pipeline(minimax, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    texts = {}
    for made in ("source", "tied", "untied"):
        generate = pipeline("text-generation", str(minimax / made))
        texts[made] = generate("The cat", do_sample=False, max_new_tokens=4)[0]["generated_text"]
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert texts["tied"] == texts["untied"] == texts["source"]
    assert "is not supported for" not in caplog.text


def test_label_smoothing_shifts_the_labels(minimax, tmp_path):
    """Trainer tells causal LMs by the class's name."""
    losses = {}
    for made in ("source", "tied", "untied"):
        model = AutoModelForCausalLM.from_pretrained(minimax / made)
        trainer = Trainer(model, TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[]))
        batch = {"input_ids": torch.arange(2, 20)[None], "labels": torch.arange(2, 20)[None]}
        losses[made] = trainer.compute_loss(model, batch).item()
    assert losses["tied"] == pytest.approx(losses["source"])
    assert losses["untied"] == losses["source"]


def test_attention_is_the_family_s_default(minimax):
    models = {made: AutoModelForCausalLM.from_pretrained(minimax / made) for made in ("source", "tied", "untied")}
    assert len({model.config._attn_implementation for model in models.values()}) == 1
    assert not any(getattr(model, "is_quantized", False) for model in models.values())


def test_image_text_to_text_knows_none_of_them(minimax):
    for made in ("source", "tied", "untied"):
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            AutoModelForImageTextToText.from_pretrained(minimax / made)
