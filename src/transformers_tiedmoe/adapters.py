"""LoRA adapters beside a model's weights: Auto classes apply them, code that reads the weights alone does not.

Every command therefore refuses such a checkpoint and says how to merge the adapter, or merges it if asked to.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME, cached_file

from .errors import TiedMoeError
from .files import misplaced

ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)


def find_adapter(model: str | Path, revision: str | None = None) -> str | None:
    """Return the name of an adapter's file in `model`, a folder or hub id; None if there is none.

    Raises:
        TiedMoeError: it is neither.
    """
    folder = Path(model)
    if (why := misplaced(model)) is not None:
        raise TiedMoeError(why)
    for name in ADAPTER_FILES:
        if folder.is_dir():
            if (folder / name).exists():
                return name
        elif cached_file(
            str(model),
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        ):
            return name
    return None


def refuse_adapter(model: str | Path, revision: str | None = None, merge: str | None = None) -> None:
    """Raise `TiedMoeError` if an adapter lies beside the weights of `model`.

    Args:
        model: a folder or hub id.
        revision: of a hub id.
        merge: a flag that has it merged, if the command has one.
    """
    if (found := find_adapter(model, revision)) is not None:
        flag = f"{merge}, or " if merge else ""
        raise TiedMoeError(
            f"{model} holds an adapter ({found}), which Auto classes load on top of the weights; expected the weights "
            f"alone: merge it ({flag}PeftModel.from_pretrained(base, folder).merge_and_unload() and save_pretrained "
            "into a new folder), or move its files away"
        )


def load_merged(model: str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal language model with the adapter that lies beside its weights merged into them, in its own dtype.

    Raises:
        TiedMoeError: there is no adapter, its base is nowhere to be found, or it does not fit.
        ImportError: peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(
            "merging an adapter needs peft, which is not installed; pip install 'transformers-tiedmoe[peft]'"
        ) from error
    if find_adapter(model) is None:
        raise TiedMoeError(f"{model} holds no adapter to merge; leave merge_adapter out")
    try:
        with tempfile.TemporaryDirectory() as empty:
            base = AutoModelForCausalLM.from_pretrained(
                _base_of(Path(model), Path(empty)), dtype="auto", trust_remote_code=trust_remote_code
            )
            return PeftModel.from_pretrained(base, str(model)).merge_and_unload(safe_merge=True)
    # Whatever peft makes of files it cannot use.
    except (ValueError, OSError, RuntimeError, KeyError, TypeError) as error:
        raise TiedMoeError(
            f"the adapter in {model} cannot be merged: {error}; merge it with the peft that wrote it, or move its "
            "files away"
        ) from error


def _base_of(model: Path, empty: Path) -> str:
    """Return where the weights of an adapter's base model are: beside it, or what its config names.

    Auto classes would load the adapter again, so weights beside it are linked into the folder `empty` without it.
    """
    beside = [path for path in model.iterdir() if path.is_file() and path.name not in ADAPTER_FILES]
    if any(
        path.name.startswith(("model", "pytorch_model")) and path.suffix in (".safetensors", ".bin") for path in beside
    ):
        for path in beside:
            (empty / path.name).symlink_to(path.resolve())
        return str(empty)
    found: Any = json.loads((model / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    if not isinstance(base, str) or not base:
        raise TiedMoeError(f"{model} holds an adapter whose {ADAPTER_CONFIG_NAME} names no base model; expected one")
    return base
