"""What the layers' experts are given on calibration text, and the loss on the part of it that is held out.

The source runs once over all of the text, layer by layer (`StreamedModel`); each layer's inputs and routing are
written to a folder as it ends, so that one layer's experts and inputs are in memory at a time, a killed run goes on
where it was, and another conversion of the same source and text reads them again.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from transformers_tiedmoe.manifest import versions
from transformers_tiedmoe.run_folder import Folder
from transformers_tiedmoe.workdir import open_folder

from ..checkpoint.writer import Progress
from ..errors import ConversionError
from ..folders import statistics_folder
from ..layout.source_model import SourceModel, family_model
from ..methods.base import Pool, RoutedInputs
from ..methods.residual import Residuals
from ..recipe import ConversionRecipe
from .streamed_model import StreamedModel
from .text import DEFAULT_BLOCK_SIZE, CalibrationText

NAMES = ("hidden_states", "top_k_index", "top_k_weights")  # in a layer's file


def file_name(layer: int) -> str:
    """Name the file of a layer's inputs."""
    return f"layer-{layer}.safetensors"


@contextlib.contextmanager
def open_calibration(recipe: ConversionRecipe, source: SourceModel) -> Iterator["Calibration | None"]:
    """Open the calibration that the recipe asks for, None if it names no text; once per conversion.

    Its statistics go into the folder that the recipe names, which stays, or into a hidden one beside OUTPUT, which is
    deleted at the end; after Ctrl-C or a kill it stays, so that the same command continues with it.

    Raises:
        TiedMoeError: another process uses the folder, or it holds statistics of another source or text, or something
            else.
        ConversionError: the text does not fit the source.
    """
    if recipe.calibration is None:
        yield None
        return
    positions = getattr(source.model.config, "max_position_embeddings", None) or math.inf
    block_size = recipe.calibration_block_size or int(min(DEFAULT_BLOCK_SIZE, positions))
    if block_size > positions:
        raise ConversionError(
            f"calibration_block_size={block_size}, but {source.name} knows {positions} positions; lower it"
        )
    text = CalibrationText(recipe.calibration, recipe.calibration_tokens, block_size, recipe.seed)
    tokens, num_fit = text.tokens(source.opened)
    vocab_size = source.model.config.vocab_size
    if int(tokens.max()) >= vocab_size:
        raise ConversionError(
            f"{source.name}: its tokenizer gives token {int(tokens.max())}, but its vocab_size is {vocab_size}; "
            "expected the tokenizer that belongs to the weights"
        )
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    identity = {
        "text": {**asdict(text), "tokens_sha256": digest},
        "source": {"headers_and_config": source.opened.fingerprint(), **source.opened.stamps()},
        "versions": versions(),
    }
    with open_folder(
        statistics_folder(recipe),
        identity,
        what="a calibration",
        advice="give another folder for statistics",
        temporary=recipe.statistics is None,
    ) as folder:
        yield Calibration(text, source, folder, tokens, num_fit, digest)


class Calibration:
    """The source on calibration text; computed when first asked for, and kept in a folder.

    Args:
        text: which text.
        source: the source; it is read layer by layer.
        folder: where statistics are kept.
        tokens: all sequences, int64 `[N, block_size]`.
        num_fit: how many of them are to fit on; the others are held out.
        digest: a hash of the tokens themselves, whatever the file was called.
    """

    def __init__(
        self,
        text: CalibrationText,
        source: SourceModel,
        folder: Folder,
        tokens: torch.Tensor,
        num_fit: int,
        digest: str,
    ):
        self.text, self.source, self.folder = text, source, folder
        self.tokens, self.num_fit, self.digest = tokens, num_fit, digest
        self._sound: set[int] = set()  # layers whose file was checked

    @property
    def held_out(self) -> torch.Tensor:
        """The held-out sequences, int64 `[N, block_size]`."""
        return self.tokens[self.num_fit :]

    @cached_property
    def model(self) -> StreamedModel:
        """The source's model."""
        source = self.source
        return StreamedModel(family_model(source.model.config), source.tensors.read, source.bytes_as_read)

    def gather(self, layers: Iterable[int], progress: Progress | None = None) -> None:
        """Make sure that the inputs of `layers` are in the folder; if not, run the source over the text once."""
        missing = [layer for layer in layers if not self._is_there(layer)]
        if not missing:
            return
        writer = _Writer(self, missing, progress)
        losses = self.model.loss(self.tokens, writer.capture)
        writer.flush()
        self._sound.update(missing)
        self.folder.remember("source_loss", float(losses[self.num_fit :].mean()))

    def inputs(self, layer: int) -> RoutedInputs:
        """Return what `layer`'s experts are given on all of the text."""
        self.gather([layer])
        path = self.folder.folder / file_name(layer)
        found = load_file(path)
        self._check(found, layer, path)
        num_fit = self.num_fit * self.text.block_size
        return RoutedInputs(found["hidden_states"], found["top_k_index"].long(), found["top_k_weights"], num_fit)

    @property
    def source_loss(self) -> float:
        """The source's loss on the held-out text, nats per token."""
        return self.remember("source_loss", lambda: float(self.model.loss(self.held_out).mean()))

    def loss(self, tied: "TiedTensors") -> float:
        """Return the loss on the held-out text of the source with some groups tied."""
        with self.model.replaced(tied):
            return float(self.model.loss(self.held_out).mean())

    def remember(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return `measure()`, or what it gave the last time: JSON-able, kept with the statistics."""
        if key not in self.folder.values:
            self.folder.remember(key, measure())
        return self.folder.values[key]

    def _is_there(self, layer: int) -> bool:
        """Tell whether a layer's file is as it was written; its hash is computed once."""
        if layer not in self._sound and self.folder.is_sound(file_name(layer)):
            self._sound.add(layer)
        return layer in self._sound

    def _check(self, found: Mapping[str, torch.Tensor], layer: int, path: Path) -> None:
        """Raise unless the file has, in type and range, what `_Writer` writes."""
        num_experts, num_tokens = (
            self.source.tensors.meta[self.source.expert_names(layer)[0]].shape[0],
            self.tokens.numel(),
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        states, index, weights = (shapes.get(name, ()) for name in NAMES)
        is_right = len(states) == len(index) == 2 and states[0] == index[0] == num_tokens and index == weights
        is_right = (
            is_right and found["top_k_index"].dtype == torch.int32 and found["top_k_weights"].dtype == torch.float32
        )
        if is_right and found["top_k_index"].numel():
            least, most = (int(each) for each in found["top_k_index"].aminmax())
            is_right = least >= 0 and most < num_experts  # no family leaves a slot of its source inactive
            is_right = is_right and all(found[name].isfinite().all() for name in ("hidden_states", "top_k_weights"))
        if not is_right:
            raise ConversionError(
                f"{path} holds {shapes}, or routing indices out of range, or no numbers; expected the inputs of "
                f"{num_tokens} tokens and their routing to {num_experts} experts: delete the folder, or give another "
                "one"
            )


class TiedTensors(Mapping[str, torch.Tensor]):
    """The experts of tied layers as untied tensors by state-dict name: rows of their pool, made when read.

    Args:
        source: whose layers they are.
        pools: by layer index its pool, and the residuals of its group's layers.
        parameters: names of an expert's parameters.
    """

    def __init__(self, source: SourceModel, pools: Mapping[int, tuple[Pool, Residuals]], parameters: Iterable[str]):
        self.pools = pools
        self._names = {f"{source.experts[layer]}.{name}": (layer, name) for layer in pools for name in parameters}

    def __getitem__(self, key: str) -> torch.Tensor:
        layer, name = self._names[key]
        pool, residuals = self.pools[layer]
        rows = pool.read(name)
        if layer in pool.slot_maps:
            rows = rows[pool.slot_maps[layer]]
        if name in residuals.get(layer, {}):
            b, a = residuals[layer][name]
            rows = rows.float().baddbmm(b.float(), a.float()).to(rows.dtype)
        return rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Writer:
    """Writes a layer's inputs when the model has gone on to the next."""

    def __init__(self, calibration: Calibration, layers: list[int], progress: Progress | None):
        self.calibration, self.layers, self.progress = calibration, layers, progress
        self.layer: int | None = None
        self.parts: list[tuple[torch.Tensor, ...]] = []
        self.done = 0

    def capture(self, layer: int, *arguments: torch.Tensor) -> None:
        """Keep one call of a layer's experts."""
        if layer not in self.layers:
            return
        if layer != self.layer:
            self.flush()
            self.layer = layer
            if self.progress:
                self.progress(self.done, len(self.layers), f"calibrating layer {layer}")
        hidden_states, top_k_index, top_k_weights = arguments
        dtype = self.calibration.source.tensors.meta[self.calibration.source.expert_names(layer)[0]].dtype
        self.parts.append(
            (hidden_states.to("cpu", dtype), top_k_index.to("cpu", torch.int32), top_k_weights.to("cpu").float())
        )

    def flush(self) -> None:
        """Write the layer that is complete."""
        if self.layer is None:
            return
        tensors = {name: torch.cat(each).contiguous() for name, each in zip(NAMES, zip(*self.parts))}
        with self.calibration.folder.draft() as draft:
            save_file(tensors, draft / file_name(self.layer))
        self.layer, self.parts, self.done = None, [], self.done + 1
