"""What the layers' experts are given on calibration text, and the loss on the part of it that is held out.

The source runs once over all of the text, layer by layer (`StreamedModel`); each layer's inputs and routing are written to
a folder as it ends, so that one layer's experts and inputs are in memory at a time, a killed run goes on where it was, and
another conversion of the same source and text reads them again.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from transformers_tiedmoe.hub import versions

from ..checkpoint.writer import Progress
from ..errors import ConversionError
from ..layout.source_model import SourceModel, family_model
from ..methods.base import Pool, RoutedInputs
from ..methods.residual import Residuals
from ..recipe import ConversionRecipe
from .streamed_model import StreamedModel
from .text import CalibrationText

IDENTITY = "statistics.json"


@contextlib.contextmanager
def statistics_folder(recipe: ConversionRecipe) -> Iterator[Path]:
    """Where a recipe's statistics are: the folder it names, which stays, or a hidden one beside OUTPUT, which goes.

    The hidden one stays after Ctrl-C and after a kill, so that the same command goes on with it. Within a process that holds
    the folder it may be entered again.

    Raises:
        ConversionError: another process uses the same folder.
    """
    if recipe.calibration is None:
        yield Path()  # nothing asks for it
        return
    output = Path(recipe.output).expanduser().absolute()
    folder = output.parent / f".{output.name}.statistics"
    if recipe.statistics is not None:
        folder = Path(recipe.statistics).expanduser().absolute()
    with _held(folder):
        try:
            yield folder
        except KeyboardInterrupt:
            raise
        except BaseException:
            _remove_hidden(folder, recipe)
            raise
        _remove_hidden(folder, recipe)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """No other process is in the block for the same `folder`; the lock stands beside it and goes with its last holder."""
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name.lstrip('.')}.lock"), is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConversionError(
            f"another process uses the statistics in {folder}; expected to be the only one: wait until it is done, or choose "
            "another output and another statistics folder"
        ) from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        for parent in made:  # the deepest first; only those that nobody has written into
            with contextlib.suppress(OSError):
                parent.rmdir()


def _remove_hidden(folder: Path, recipe: ConversionRecipe) -> None:
    if recipe.statistics is None:
        shutil.rmtree(folder, ignore_errors=True)


def open_calibration(recipe: ConversionRecipe, source: SourceModel, folder: Path) -> "Calibration | None":
    """The calibration that the recipe asks for, None where it names no text."""
    if recipe.calibration is None:
        return None
    positions = getattr(source.model.config, "max_position_embeddings", None) or recipe.calibration_block_size
    if recipe.calibration_block_size > positions:
        raise ConversionError(
            f"calibration_block_size={recipe.calibration_block_size}, but {source.name} knows {positions} positions; lower it"
        )
    text = CalibrationText(recipe.calibration, recipe.calibration_tokens, recipe.calibration_block_size, recipe.seed)
    return Calibration(text, source, folder)


class Calibration:
    """The source on calibration text; computed when first asked for, and kept in a folder.

    Args:
        text: which text.
        source: the source; it is read layer by layer.
        folder: where statistics are kept; made when something is written.

    Raises:
        ConversionError: the folder holds statistics of another source, text or seed.
    """

    def __init__(self, text: CalibrationText, source: SourceModel, folder: Path):
        self.text, self.source, self.folder = text, source, folder
        self.tokens, self.num_fit = text.tokens(source.opened)
        vocab_size = source.model.config.vocab_size
        if int(self.tokens.max()) >= vocab_size:
            raise ConversionError(
                f"{source.name}: its tokenizer gives token {int(self.tokens.max())}, but its vocab_size is {vocab_size}; expected "
                "the tokenizer that belongs to the weights"
            )
        digest = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        self._identity = {
            **asdict(text),
            "tokens_sha256": digest,
            "source": [source.opened.fingerprint(), source.opened.stamps()],
        }
        self._identity |= versions()
        self._record = self._read_record()

    @property
    def digest(self) -> str:
        """A hash of the tokens themselves, whatever the file was called."""
        return self._identity["tokens_sha256"]

    @property
    def held_out(self) -> torch.Tensor:
        """The held-out sequences, int64 `[N, block_size]`."""
        return self.tokens[self.num_fit :]

    @cached_property
    def model(self) -> StreamedModel:
        """The source's model."""
        num_bytes = sum(tensor.nbytes for tensor in self.source.tensors.meta.values())
        return StreamedModel(family_model(self.source.model.config), self.source.tensors.read, num_bytes)

    def gather(self, layers: Iterable[int], progress: Progress | None = None) -> None:
        """See that the inputs of `layers` are in the folder; one run of the source over the text if they are not."""
        missing = [layer for layer in layers if not self._file(layer).is_file()]
        if not missing:
            return
        self._write_record()
        writer = _Writer(self, missing, progress)
        losses = self.model.loss(self.tokens, writer.capture)
        writer.flush()
        self._record["source_loss"] = float(losses[self.num_fit :].mean())
        self._write_record()

    def inputs(self, layer: int) -> RoutedInputs:
        """What `layer`'s experts are given on all of the text."""
        self.gather([layer])
        found = load_file(self._file(layer))
        num_fit = self.num_fit * self.text.block_size
        return RoutedInputs(found["hidden_states"], found["top_k_index"].long(), found["top_k_weights"], num_fit)

    @property
    def source_loss(self) -> float:
        """The source's loss on the held-out text, nats per token."""
        if "source_loss" not in self._record:
            self._record["source_loss"] = float(self.model.loss(self.held_out).mean())
            self._write_record()
        return self._record["source_loss"]

    def loss(self, tied: "TiedTensors") -> float:
        """The loss on the held-out text of the source with some groups tied."""
        with self.model.replaced(tied):
            return float(self.model.loss(self.held_out).mean())

    def remember(self, key: str, measure: Callable[[], Any]) -> Any:
        """`measure()`, or what it gave the last time: JSON-able, kept with the statistics."""
        if key not in self._record:
            self._record[key] = measure()
            self._write_record()
        return self._record[key]

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"

    def _read_record(self) -> dict[str, Any]:
        path = self.folder / IDENTITY
        if not path.is_file():
            drafts = f".{IDENTITY}.draft"  # of a run that was killed while it wrote the first file
            if self.folder.is_dir() and any(path.name != drafts for path in self.folder.iterdir()):
                raise ConversionError(f"statistics folder {self.folder} holds something else; give a new or empty one")
            return {}
        try:
            record = json.loads(path.read_text())
            identity = record.pop("identity")
        except (ValueError, KeyError, AttributeError) as error:
            raise ConversionError(
                f"{path} cannot be read: {error!r}; delete the folder, or give another one"
            ) from error
        expected = json.loads(json.dumps(self._identity))
        different = [key for key, value in expected.items() if identity.get(key) != value]
        if different:
            raise ConversionError(
                f"statistics folder {self.folder} holds those of another {', '.join(different)}; give another folder, or "
                "delete it"
            )
        return record

    def _write_record(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".{IDENTITY}.draft"
        draft.write_text(json.dumps({"identity": self._identity, **self._record}, indent=1) + "\n")
        draft.replace(self.folder / IDENTITY)


class TiedTensors(Mapping[str, torch.Tensor]):
    """What tied layers' experts would be in an untied model, made when asked for: the rows of their pool, by state-dict name.

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
        """One call of a layer's experts."""
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
        names = ("hidden_states", "top_k_index", "top_k_weights")
        tensors = {name: torch.cat(each).contiguous() for name, each in zip(names, zip(*self.parts))}
        path = self.calibration._file(self.layer)
        draft = path.with_name(f".{path.name}.draft")
        save_file(tensors, draft)
        draft.replace(path)
        self.layer, self.parts, self.done = None, [], self.done + 1
