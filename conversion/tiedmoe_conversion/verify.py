"""Checks a checkpoint that a conversion wrote: headers, the Auto class, numbers of sample layers, the logits.

Logits are compared with the source's for methods that promise to lose nothing. A model too large to load twice is
compared on its first and last tied layers instead, expert by expert, and the report says which of the two was done.
`verify_folder` checks a folder that was written earlier, or healed since, and says what it could not check.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.utils import logging

from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.families import expert_layers
from transformers_tiedmoe.files import file_digest
from transformers_tiedmoe.manifest import MANIFEST, check_manifest

from .checkpoint.quantised import BlockScaled
from .checkpoint.reader import Source, open_source, regular_file
from .checkpoint.writer import Planned
from .errors import ConversionError
from .layout.keys import map_tensors
from .layout.source_model import SourceModel, family_model, read_config, read_tied_config
from .layout.tied_view import LayerTensors

MAX_BYTES_FOR_LOGITS = 2 * 10**9  # of a model that is loaded to compare its logits; the two are loaded one by one
SAMPLE_LENGTH = 32  # tokens of the input whose logits are compared
SAMPLE_TOKENS = 4  # random tokens that a compared expert is given
DEQUANTISING = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
_PIECE = 1 << 14
# Files that only people read: to edit them is no damage.
FOR_PEOPLE = ("README.md", "LICENSE*", "NOTICE*")
# Files that some program takes from a checkpoint's folder by their name.
LOADED = (
    *(
        "*.py",
        "*.safetensors",
        "*.bin",
        "*.pt",
        "*.pth",
        "*.ckpt",
        "*.gguf",
        "*.h5",
        "*.msgpack",
        "*.pkl",
        "*.index.json",
    ),
    *("*.jinja", "tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json"),
    *("*config.json", "adapter_*", "added_tokens.json", "chat_template*", "tekken.json"),
)
# What the figure of `compare_layers` says, beside it wherever it is shown.
ERROR_MEANS = (
    "how far one expert of a tied layer is from the source's on random input, relative to its size: 0 is unchanged, "
    "about 1 is what a pool in the place of several experts has; what it costs is the held-out loss in the card, not "
    "this"
)


class VerificationError(ConversionError):
    """What was written is not what was planned: a mistake of ours or of the disk, never of the user's."""

    def __init__(self, found: str):
        super().__init__(f"{found}. Nothing is kept of it: convert again, and report a bug if it stays")


def verify_output(folder: Path, planned: Iterable[Planned]) -> dict[str, Any]:
    """Reopen `folder` and check that it holds the planned tensors, and that the Auto class wants just these.

    Raises:
        VerificationError: with what is different.
    """
    expected = {tensor.target: (tensor.shape, tensor.dtype, tensor.file) for tensor in planned}
    found = {name: (info.shape, info.dtype, info.file) for name, info in open_source(str(folder)).tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise VerificationError(f"{folder}: tensors differ from the plan: {wrong[:5]}")
    if problems := _loading_problems(folder):
        raise VerificationError(f"{folder}: the Auto class does not load it cleanly: {problems}")
    return {"tensors": len(found), "headers": True, "auto_class": True, "finite": True}


def verify_sample(
    source: SourceModel, output: LayerTensors, groups: Sequence[Sequence[int]], is_lossless: bool
) -> dict[str, Any]:
    """Compare real numbers: how far an expert of the first and of the last tied layer is from the source's.

    Args:
        source: what was converted.
        output: the converted checkpoint's layers.
        groups: the layers that are tied.
        is_lossless: whether the method promised to lose nothing.

    Returns:
        `{"layers": {"2": relative error, ...}}`, and under `not_compared` why a layer is not there.

    Raises:
        VerificationError: a method that loses nothing has an error.
    """
    found = compare_layers(source, output, _sample_layers(groups))
    wrong = {layer: error for layer, error in found["layers"].items() if error != 0}
    if is_lossless and wrong:
        raise VerificationError(
            f"{output.tensors.source.name}: relative errors of experts by layer are {wrong}; a lossless method has 0"
        )
    return found


def compare_layers(source: SourceModel, output: LayerTensors, layers: Iterable[int]) -> dict[str, Any]:
    """Return the relative error of the output's middle expert in each of `layers`, by the family's own code."""
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for layer in layers:
        names = source.expert_names(layer)
        slots, width = source.tensors.meta[names[0]].shape[0], output.meta(names[0]).shape[0]
        if slots != width:
            reasons[str(layer)] = f"its router has {width} experts, and the source's {slots}"
            continue
        try:
            expected, found = (
                _expert_output(source, layer, slots // 2, each.read) for each in (source.tensors, output)
            )
        except (TypeError, RuntimeError, AttributeError) as error:  # the family's own code
            reasons[str(layer)] = f"the family's experts cannot be run here: {type(error).__name__}: {error}"
            continue
        errors[str(layer)] = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return {"layers": errors, **({"not_compared": reasons} if reasons else {})}


def lost_expert(source: SourceModel, output: LayerTensors, layers: Iterable[int]) -> str | None:
    """Return the first expert in `layers` that is not the source's, bit for bit; reads one at a time."""
    for layer in layers:
        for name in source.expert_names(layer):
            for first, last in source.tensors.rows(name):
                if not _same_bits(source.tensors.read(name, first, last), output.read(name, first, last)):
                    return f"expert {first} of {name}"
    return None


def tied_layers(output: Source, config: TiedMoeConfig) -> LayerTensors:
    """Return the layers of the tied checkpoint `output` as the family's own."""
    model, tied = family_model(config.to_family()), family_model(config)
    return LayerTensors(config, map_tensors(output, tied, rules=model), expert_layers(model), tied.base_model_prefix)


def _sample_layers(groups: Sequence[Sequence[int]]) -> list[int]:
    return sorted({groups[0][0], groups[-1][-1]}) if groups else []


def _expert_output(source: SourceModel, layer: int, expert: int, read) -> torch.Tensor:
    """Compute an expert's output on `SAMPLE_TOKENS` tokens, float32 `[T, H]`.

    `read(name, first, last)` gives its weights.
    """
    path = source.experts[layer]
    module = copy.deepcopy(source.model.get_submodule(path))
    module.config._experts_implementation = "eager"
    weights = {name.removeprefix(f"{path}."): read(name, expert, expert + 1) for name in source.expert_names(layer)}
    dtype = next(iter(weights.values())).dtype
    hidden_size = source.model.config.hidden_size
    generator = torch.Generator().manual_seed(expert)
    hidden_states = torch.randn(SAMPLE_TOKENS, hidden_size, generator=generator).to(dtype)
    chosen = torch.zeros(SAMPLE_TOKENS, 1, dtype=torch.int64)
    with torch.inference_mode():
        return functional_call(
            module, weights, (hidden_states, chosen, torch.ones(SAMPLE_TOKENS, 1, dtype=dtype))
        ).float()


def verify_folder(output: str | Path, source: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Check a converted checkpoint again, whatever has happened to it since.

    Args:
        output: a local folder that `tiedmoe convert` made.
        source: the folder or hub id that it was made of, to compare with; None compares with nothing.
        revision: of a source on the Hub.

    Returns:
        JSON-able: what was found, by check, and `not_checked`, each with its reason.

    Raises:
        ConversionError: the first thing that is wrong: what was found, what was expected, what to do.
    """
    opened = open_source(str(output))
    manifest = None
    if regular_file(opened.folder, MANIFEST):
        manifest = check_manifest(opened.read_json(MANIFEST), opened.folder / MANIFEST)
    report: dict[str, Any] = {"output": str(output), "not_checked": {}}
    if manifest is None:
        report["not_checked"]["hashes"] = f"there is no {MANIFEST}: made by another command, such as a healing"
    else:
        report["hashes"] = _check_hashes(opened, manifest)
    config = read_tied_config(opened)
    try:
        tensors = tied_layers(opened, config)
    except ValueError as error:
        raise ConversionError(f"{output} is not what its config.json says: {error}") from error
    report["tensors"], report["config"] = len(opened.tensors), _check_config(config, tensors)
    if problems := _loading_problems(opened.folder):
        raise ConversionError(
            f"{output}: the Auto class does not load it cleanly: {problems}; convert the source again"
        )
    report["auto_class"] = True
    for name in sorted(tensors.tensors.meta):
        tensors.tensors.read(name)  # raises where it is not finite
    report["finite"] = True
    if source is None:
        report["not_checked"]["source"] = "no source was named"
    else:
        allow_pickle = bool(((manifest or {}).get("recipe") or {}).get("allow_pickle"))
        opened_source = open_source(source, revision, allow_pickle)
        report["source"] = _check_source(opened_source, manifest, config, tensors, report["not_checked"])
    return report


def _check_hashes(output: Source, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Compare every file with its hash; report edited cards, and files without a hash."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise ConversionError(
            f"{output.name}: {MANIFEST} names no files; expected their hashes: convert the source again"
        )
    edited = []
    for name, expected in files.items():
        found = file_digest(output.folder / name) if regular_file(output.folder, name) else None
        if found is not None and found != expected and _matches(name, FOR_PEOPLE):
            edited.append(name)
        elif found != expected:
            raise ConversionError(
                f"{output.name}: {name} is {found or 'missing'}; expected {expected} by {MANIFEST}: it is damaged, "
                f"copy or convert it again; if it was changed on purpose, such as by a healing, delete {MANIFEST}"
            )
    unlisted = {info.file for info in output.tensors.values()} - files.keys()
    if unlisted:
        raise ConversionError(
            f"{output.name} has its weights in {sorted(unlisted)[:3]}, which {MANIFEST} does not name; expected the "
            f"files that were converted: delete {MANIFEST} if they were changed on purpose"
        )
    paths = (path.relative_to(output.folder) for path in output.folder.rglob("*") if not path.is_dir())
    others = sorted(path.as_posix() for path in paths if path.as_posix() not in {*files, MANIFEST})
    if loaded := [name for name in others if _matches(name, LOADED)]:
        raise ConversionError(
            f"{output.name} holds {loaded[:3]}, which {MANIFEST} does not name and programs would load or run; "
            f"expected only what was converted: remove it, or delete {MANIFEST} if it was added on purpose"
        )
    return {"files": len(files), "edited_since": edited, "not_covered": others}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_config(config: TiedMoeConfig, tensors: LayerTensors) -> dict[str, Any]:
    """Check that slot maps stay within their pools; report the pool experts that no slot reads."""
    reached: dict[str, set[int]] = {}
    for path, pool in tensors.pools.items():
        slots = tensors.slot_map(path)
        width = next(len(tensor) for name, tensor in tensors.tensors.meta.items() if name.startswith(pool))
        reached.setdefault(pool, set()).update(range(width) if slots is None else slots)
    assert config.pool_num_experts is not None
    unreachable = {}
    for pool, rows in reached.items():
        p = int(pool.rstrip(".").rsplit(".", 1)[1])
        if missing := sorted(set(range(config.pool_num_experts[p])) - rows):  # type: ignore[index]  # resolved to a list
            unreachable[str(p)] = missing
    return {"pools": len(reached), "unreachable_experts": unreachable}


def _check_source(
    opened: Source,
    manifest: Mapping[str, Any] | None,
    config: TiedMoeConfig,
    output: LayerTensors,
    not_checked: dict[str, str],
) -> dict[str, Any]:
    """Compare with the source: its hash, every tensor accounted for, equal copies, and sampled experts."""
    if manifest is not None:
        expected = manifest.get("source", {}).get("headers_and_config_sha256")
        if (found := opened.fingerprint()) != expected:
            raise ConversionError(
                f"{opened.name} has the hash {found}; {output.tensors.source.name} was made of one with {expected} "
                f"({manifest.get('source')}): name the source that it was made of"
            )
    source = SourceModel.map(opened, read_config(opened))
    tied_experts = {
        name for layer in source.experts if config.group_of(layer) is not None for name in source.expert_names(layer)
    }
    of_output, of_source = output.tensors.meta, source.tensors.meta
    absent = sorted(name for name in of_source.keys() - of_output.keys() - tied_experts - source.tensors.copies.keys())
    if absent:
        raise ConversionError(
            f"{output.tensors.source.name} lacks {len(absent)} tensors of {opened.name}, such as {absent[:3]}; "
            "expected every one that no pool stands for: convert the source again"
        )
    if manifest is not None:
        named = {entry["tensor"] for entry in manifest.get("dropped", [])}
        if unnamed := sorted(source.tensors.dropped.keys() - named):
            raise ConversionError(
                f"{opened.name} holds {unnamed[:3]}, which the output neither has nor names as dropped in {MANIFEST}; "
                "convert the source again"
            )
    different = [name for name in sorted(of_source.keys() & of_output.keys()) if not _same(source, output, name)]
    widened = [name for name in different if of_source[name].shape != of_output[name].shape]
    # Its weights may have been trained, so they need not be the source's.
    trained = manifest is None or manifest.get("made_by") == "tiedmoe heal"
    if different != widened and not trained:
        raise ConversionError(
            f"{output.tensors.source.name}: {[name for name in different if name not in widened][:3]} are not those "
            f"of {opened.name}, and nothing but experts is changed by a conversion: convert the source again"
        )
    if trained:
        not_checked["copies"] = "it was healed, or may have been trained since: its weights need not be the source's"
    assert config.groups is not None
    sample = compare_layers(source, output, _sample_layers(config.groups)) if config.groups else {"layers": {}}
    lossless = ((manifest or {}).get("verification") or {}).get("lossless")
    if lossless and (lost := lost_expert(source, output, _sample_layers(config.groups))):
        raise ConversionError(
            f"{output.tensors.source.name}: {lost} is not that of {opened.name}, bit for bit; expected it, as the "
            "method loses nothing: convert the source again"
        )
    return {
        "equal_tensors": len(of_source.keys() & of_output.keys()) - len(different),
        "changed_tensors": different,
        "experts_relative_error": sample | {"means": ERROR_MEANS},
    }


def _same(source: SourceModel, output: LayerTensors, name: str) -> bool:
    if source.tensors.meta[name].shape != output.tensors.meta[name].shape:
        return False
    return _same_bits(source.tensors.read(name), output.tensors.read(name))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # Piece by piece, in the processor's cache: torch.equal takes twenty times as long.
    bits = torch.uint8 if one.nbytes % 8 else torch.int64
    mine, others = (each.contiguous().reshape(-1).view(torch.uint8).view(bits).numpy() for each in (one, other))
    return all(np.array_equal(mine[i : i + _PIECE], others[i : i + _PIECE]) for i in range(0, len(mine), _PIECE))


def _loading_problems(folder: Path) -> dict[str, list[str]]:
    """Return what the Auto class finds missing, unexpected or misshapen when it loads `folder` on the meta device."""
    with _quietly():
        try:
            _, loading = AutoModelForCausalLM.from_pretrained(folder, device_map="meta", output_loading_info=True)
        except Exception as error:  # a shape, or whatever else in the folder makes transformers raise
            return {"error": [f"{type(error).__name__}: {error}"]}
    return {key: sorted(map(str, value)) for key, value in loading.items() if value}


def verify_lossless(source: SourceModel, output: LayerTensors, groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Check that the output computes what the source computes, bit for bit: on a sample input, or else layer by layer.

    Returns:
        `{"compared": "logits", "tokens": 32, "equal": True}`, or `{"compared": "experts", "layers": [...], "equal":
        True, "because": ...}` if the model is too large to be loaded or its family cannot run it here.

    Raises:
        VerificationError: they differ.
    """
    opened, folder = source.opened, output.tensors.source.folder
    size = max(sum(info.num_bytes for info in each.tensors.values()) for each in (opened, output.tensors.source))
    because = f"a model of {size:,} bytes is more than the {MAX_BYTES_FOR_LOGITS:,} that are loaded to compare logits"
    uneven = [info.name for info in opened.tensors.values() if isinstance(info, BlockScaled) and not info.is_even]
    if uneven:
        because = f"transformers reads an fp8 weight wrongly whose size its blocks do not divide, such as {uneven[0]}"
    elif size <= MAX_BYTES_FOR_LOGITS:
        try:
            expected = _logits(opened.folder, opened.quantisation)
        except Exception as error:  # the family's own code, before ours has been run
            because = f"the source's own forward pass fails here: {type(error).__name__}: {error}"
        else:
            if not torch.equal(expected.view(torch.uint8), _logits(folder).view(torch.uint8)):
                raise VerificationError(f"{folder}: the logits are not those of {source.name}")
            return {"compared": "logits", "tokens": SAMPLE_LENGTH, "equal": True}
    layers = _sample_layers(groups)
    if lost := lost_expert(source, output, layers):
        raise VerificationError(f"{folder}: {lost} is not the source's")
    return {"compared": "experts", "layers": layers, "equal": True, "because": because}


def _logits(folder: Path, quantisation: str | None = None) -> torch.Tensor:
    """Compute logits `[1, SAMPLE_LENGTH, vocab]` on fixed random tokens, by transformers' plain loop over experts."""
    extra = {} if quantisation is None else {"quantization_config": DEQUANTISING[quantisation](dequantize=True)}
    with _quietly():
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager", dtype="auto", **extra
        )
    for tensor in (*model.parameters(), *model.buffers()):
        # A tensor's place in its file decides its alignment in memory, which decides how a matrix product rounds.
        tensor.data = tensor.data.clone()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, SAMPLE_LENGTH), generator=generator)
    with torch.inference_mode():
        return model.eval()(input_ids=tokens, use_cache=False).logits.contiguous()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide transformers' progress bars, which would be drawn over ours, within the block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
