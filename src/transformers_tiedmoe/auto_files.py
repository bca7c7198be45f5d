"""Makes Auto classes decide for a tied checkpoint as they do for its source, above all which tokenizer to load.

`AutoTokenizer` picks its class by `model_type` and by the class that tokenizer_config.json names, which it overrules
for some types only. A tied checkpoint's type is "tiedmoe", and an untied one of a multimodal source has the type of
the source's text model: the same files may load as another class, which splits text differently. Two things prevent
it:

- `settle_tokenizer` writes the class that the source's files load as into tokenizer_config.json, so that the folder is
  right wherever it is read, and compares what it loads as with the source's tokenizer;
- `TiedMoeTokenizer` takes the family's class for a folder without that entry, wherever this package is imported.

What else goes by `model_type` is listed in docs/conversion.md and tested in tests/test_auto_files.py.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import tokenization_auto

from .errors import TiedMoeError

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
# A field of the tokenizer_config.json that we write: the class that the source's file names.
NAMED_BY_SOURCE = "source_tokenizer_class"
# transformers 5 names its fallback class anew; the old name is known to every version, and to other readers.
FALLBACK = {"TokenizersBackend": "PreTrainedTokenizerFast"}


class TiedMoeTokenizer:
    """Stands in `AutoTokenizer`'s tables for the tokenizer class of tied checkpoints, and loads their family's."""

    @classmethod
    def from_pretrained(cls, name: str | Path, *inputs: Any, **kwargs: Any) -> Any:
        """Load what `AutoTokenizer` gives for the same files beside a config of the family.

        The class that `settle_tokenizer` wrote is used as it is, and so is any class in a folder without config.json.
        """
        fields, _ = PreTrainedConfig.get_config_dict(name, **kwargs) if _has_config(name, kwargs) else ({}, None)
        family = fields.get("family")
        is_settled = NAMED_BY_SOURCE in tokenization_auto.get_tokenizer_config(name, **kwargs)
        config = CONFIG_MAPPING[family]() if family in CONFIG_MAPPING and not is_settled else PreTrainedConfig()
        config.tokenizer_class = fields.get("tokenizer_class")
        return AutoTokenizer.from_pretrained(name, *inputs, config=config, **kwargs)


def _has_config(name: str | Path, kwargs: dict[str, Any]) -> bool:
    return not Path(name).is_dir() or (Path(name) / kwargs.get("subfolder", "") / CONFIG).is_file()


def register_tokenizer() -> None:
    """Make `AutoTokenizer` ask the family of a tied checkpoint which class its tokenizer files load as.

    transformers has these tables for types whose checkpoints name the wrong class: it then takes the registered one.
    """
    tokenization_auto.REGISTERED_TOKENIZER_CLASSES[TiedMoeTokenizer.__name__] = TiedMoeTokenizer
    tokenization_auto.TOKENIZER_MAPPING_NAMES["tiedmoe"] = TiedMoeTokenizer.__name__
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add("tiedmoe")


def load_tokenizer(folder: str | Path, name: str | None = None) -> PreTrainedTokenizerBase:
    """Load what `AutoTokenizer.from_pretrained(name)` gives, from the files in `folder`; no code of theirs is run.

    Args:
        folder: a checkpoint's folder, or a hub id.
        name: what the user calls the checkpoint, by which transformers decides too: the hub id of a snapshot.

    Raises:
        Exception: whatever a missing or broken tokenizer makes transformers raise.
    """
    if name in (None, str(folder)):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError):  # as AutoTokenizer itself
        config = PreTrainedConfig.from_pretrained(folder)
    config._name_or_path = name
    return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)


def settle_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """Make the tokenizer files in a checkpoint's `folder` load as `tokenizer`, and check that they do.

    Only tokenizer_config.json is written, and only if needed: it gets the class of `tokenizer`, and loses entries for
    code and processors that are not in the folder. Where transformers overrules every class, as in an untied folder of
    another type than the source's, the tokenizer is saved as the class that is loaded there. The class that the source
    named is kept under `source_tokenizer_class`, and comes back when the checkpoint is untied, if it then gives the
    same tokenizer.

    Args:
        tokenizer: the source's, as `load_tokenizer` gives it; None if it cannot be loaded without running its code.
        folder: with config.json and the tokenizer's files in it, copied or saved.

    Raises:
        TiedMoeError: no class written there gives that tokenizer.
    """
    folder = Path(folder)
    if tokenizer is None:
        warnings.warn(
            f"{folder.name} has no tokenizer that loads: its source's needs code of its own, or is broken, and no "
            "code is run or copied; put a tokenizer that gives the same tokens beside the weights",
            stacklevel=2,
        )
        return
    path = folder / TOKENIZER_CONFIG
    copied = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = {name: value for name, value in copied.items() if name != "processor_class"}  # no processor travels
    if _is_local_code(kept.get("auto_map")):
        del kept["auto_map"]
    tried = []
    for fields in _candidates(kept, type(tokenizer).__name__):
        if fields != copied:
            _write_json(path, fields)
            copied = fields
        try:
            found = _loads_as(folder)
        except Exception as error:  # what transformers makes of files that this class cannot read
            tried.append(f"{fields.get('tokenizer_class')} does not load: {error}")
            continue
        if all(_is_same(each, tokenizer) for each in found):
            return
        tried.append(f"{fields.get('tokenizer_class')} loads as {', '.join(type(each).__name__ for each in found)}")
    if tokenizer.is_fast:
        tokenizer.save_pretrained(folder)
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved = {name: value for name, value in saved.items() if name not in ("auto_map", "processor_class")}
        saved |= {"tokenizer_class": FALLBACK["TokenizersBackend"], NAMED_BY_SOURCE: copied[NAMED_BY_SOURCE]}
        _write_json(path, saved)
        if all(_is_same(each, tokenizer, of_any_class=True) for each in _loads_as(folder)):
            return
    raise TiedMoeError(
        f"the source's tokenizer is a {type(tokenizer).__name__}, and nothing written into {folder.name}'s "
        f"{TOKENIZER_CONFIG} gives the same tokens there ({'; '.join(tried)}): remove auto_map and tokenizer_class "
        "from the source's own, see whether it still gives the tokens that the model was trained with, and try again"
    )


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _candidates(fields: dict[str, Any], actual: str) -> list[dict[str, Any]]:
    """List the contents to try for tokenizer_config.json, the source's own first."""
    candidates = []
    if NAMED_BY_SOURCE in fields:
        restored = {name: value for name, value in fields.items() if name not in (NAMED_BY_SOURCE, "tokenizer_class")}
        named = fields[NAMED_BY_SOURCE]
        candidates.append(restored | ({} if named is None else {"tokenizer_class": named}))
    candidates.append(fields)
    named = fields.get(NAMED_BY_SOURCE, fields.get("tokenizer_class"))
    candidates.append({**fields, "tokenizer_class": FALLBACK.get(actual, actual), NAMED_BY_SOURCE: named})
    return candidates


def _loads_as(folder: Path) -> list[PreTrainedTokenizerBase]:
    """Load the folder's tokenizer with transformers; for a tied one also as if this package were not imported."""
    path = folder / CONFIG
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if fields.get("model_type", "tiedmoe") != "tiedmoe":
        return [load_tokenizer(folder)]
    unknown = PreTrainedConfig()  # a type that transformers does not know
    unknown.tokenizer_class = fields.get("tokenizer_class")
    elsewhere = AutoTokenizer.from_pretrained(folder, config=unknown, trust_remote_code=False)
    return [elsewhere, TiedMoeTokenizer.from_pretrained(folder)]


def _is_same(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, of_any_class: bool = False) -> bool:
    """Tell whether both give the same tokens for every text: the same class, and the same pipeline inside."""
    if one.is_fast != other.is_fast or one.special_tokens_map != other.special_tokens_map:
        return False
    if type(one) is not type(other) and not (one.is_fast and of_any_class):
        return False
    return _pipeline(one) == _pipeline(other) if one.is_fast else one.get_vocab() == other.get_vocab()


def _pipeline(tokenizer: Any) -> dict[str, Any]:
    """Return the tokenizer's pipeline without padding and truncation, which calls switch on and off."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}


def _is_local_code(auto_map: Any) -> bool:
    """Tell whether a tokenizer's `auto_map` names a file of its own folder, and not one of another repository."""
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    return any(isinstance(each, str) and "--" not in each for each in (named if isinstance(named, list) else [named]))
