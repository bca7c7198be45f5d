"""Opens a checkpoint, in a local folder or on the Hub, by its headers alone, and reads single tensors on request.

Tensors are read by offset rather than through a memory map, so that what a conversion holds in memory is what it asked
for. A Hub source is planned from its headers; a weight file is downloaded when a tensor of it is first read. Nobody
has checked a checkpoint: only regular files inside its folder are opened.
"""

import fnmatch
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from transformers_tiedmoe.adapters import refuse_adapter
from transformers_tiedmoe.auto_files import load_tokenizer, settle_tokenizer
from transformers_tiedmoe.files import misplaced

from ..errors import ConversionError
from .buffers import Buffers
from .headers import TensorInfo, read_header, tensors_from_header
from .quantised import MXFP4_BLOCKS, SUFFIXES, Quantised, fold_scales

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# Files beside the weights that a user expects to find again. Never code: a checkpoint's .py files are not run here.
TRAVELLING_FILES = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*.jinja",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")  # one at least makes a tokenizer
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "README.md", "LICENSE*", "NOTICE*")


class Source:
    """A checkpoint that has been opened but not read; `open_source` makes one.

    Attributes:
        name: the folder or hub id as it was given.
        folder: a local folder with the checkpoint's small files (config, tokenizer, ...).
        commit: the commit of a hub source, None for a local folder.
        tensors: every tensor by name, from the headers; a quantised weight and its scales are one, in the dtype and
            shape it is read in.
        buffers: gives the memory to read into.
    """

    def __init__(self, name: str, folder: Path, commit: str | None = None, allow_pickle: bool = False):
        self.name, self.folder, self.commit, self.allow_pickle = name, folder, commit, allow_pickle
        self.buffers = Buffers()
        self._data_start: dict[str, int] = {}  # where the tensors of a local file begin
        self._stamps: dict[str, tuple[int, int]] = {}  # a local file's size and time when its header was read
        self._pickle: tuple[str, dict[str, torch.Tensor]] | None = None  # the one .bin file that is open
        for pattern in SMALL_FILES:  # transformers reads some of them by itself
            for path in folder.glob(pattern):
                if not path.is_dir():
                    regular_file(folder, path.name)
        refuse_adapter(folder)
        self.tensors = self._read_headers()
        if any(name.endswith(SUFFIXES) for name in self.tensors):
            config = self.read_json("config.json")
            if config.get("quantization_config"):
                self.tensors = fold_scales(self.tensors, config, name)
        kinds = {each.name: _quantised_kind(each) for each in self.tensors.values()}
        if left := [each for each, kind in kinds.items() if kind]:
            raise ConversionError(
                f"{name} holds {len(left)} {kinds[left[0]]} tensors, such as {left[0]!r}, and its config.json has no "
                "quantization_config that says how they are scaled; expected one, or plain weights: use the "
                "config.json that belongs to the weights"
            )

    @property
    def quantisation(self) -> str | None:
        """Name what some of the tensors are dequantised from, "fp8" or "mxfp4"; None where all are plain."""
        return next((info.method for info in self.tensors.values() if isinstance(info, Quantised)), None)

    def read(
        self, name: str, first: int = 0, last: int | None = None, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read one tensor, or its rows `first` to `last` (not included) along dimension 0.

        Args:
            into: a contiguous tensor of the same shape and dtype to read into; a new one by default.

        Raises:
            ConversionError: the file ends early or is no longer the one whose header was read.
        """
        info = self.tensors[name]
        if isinstance(info, Quantised):
            tensor = info.read(self._read, first, last)
        elif info.offset is None:
            tensor = self._read_pickle(info.file)[name]
            tensor = tensor.clone() if tensor.dim() == 0 else tensor[first:last].clone()
        else:
            return self._read(info, first, last, into)
        return tensor if into is None else into.copy_(tensor)

    def _read(
        self, info: TensorInfo, first: int = 0, last: int | None = None, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        path, name = self._path(info.file), info.name
        if info.file not in self._data_start and self._open_header(info.file).get(name) != info:
            raise ConversionError(f"{path} is not the file that was planned with: {name!r} differs; plan again")
        assert info.offset is not None
        if _stamp(path) != self._stamps[info.file]:
            raise ConversionError(f"{path} changed while it was read; expected a source that nobody writes to")
        shape, start = info.shape, self._data_start[info.file] + info.offset
        if last is not None or first:
            start += first * (info.num_bytes // shape[0])
            shape = (len(range(*slice(first, last).indices(shape[0]))), *shape[1:])
        tensor = self.buffers.empty(shape, info.dtype) if into is None else into
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, info.dtype, True), name
        buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < len(buffer):  # one read is at most 2 GiB on Linux
                count = file.readinto(buffer[done:])
                if not count:
                    raise ConversionError(f"{path} ends inside tensor {name!r}; it is truncated: download it again")
                done += count
        return tensor

    def travelling_files(self) -> list[str]:
        """List the files to copy along, such as tokenizer and chat template: paths relative to `folder`, sorted."""
        found = [path for pattern in TRAVELLING_FILES for path in self.folder.glob(pattern) if not path.is_dir()]
        names = {str(path.relative_to(self.folder)) for path in found}
        return sorted(
            name
            for name in names
            if not name.endswith((".py", ".safetensors", ".bin")) and regular_file(self.folder, name)
        )

    def fingerprint(self) -> str:
        """Return the sha256 of the config and of every tensor's name, dtype, shape and place, but of no weight."""
        digest = hashlib.sha256(json.dumps(self.read_json("config.json"), sort_keys=True).encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"\n{name} {info.dtype} {info.shape} {info.file} {info.offset} {info.num_bytes}".encode())
        return digest.hexdigest()

    def stamps(self) -> dict[str, list[int]]:
        """Return size and time of change of the weight files, to notice a write; a commit never changes."""
        return {} if self.commit is not None else {file: list(stamp) for file, stamp in sorted(self._stamps.items())}

    def copy_travelling_files(self, folder: Path) -> None:
        """Copy `travelling_files` into `folder`, as files where they are links into the Hub's cache.

        The tokenizer's files are made to load there, beside the config.json that is in `folder` already, as the
        source's.
        """
        names = self.travelling_files()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)
        if any(fnmatch.fnmatch(name, pattern) for name in names for pattern in VOCABULARIES):
            settle_tokenizer(self._tokenizer(), folder)

    def _tokenizer(self) -> Any:
        """Load the source's tokenizer; None if transformers would need the source's code, or would make one up."""
        try:
            tokenizer = load_tokenizer(self.folder, self.name)
            return tokenizer if tokenizer("Some text.").input_ids else None  # a made-up one knows no text
        except Exception:  # whatever a broken tokenizer, or one with code of its own, makes transformers raise
            return None

    def read_json(self, file: str) -> dict[str, Any]:
        """Return the JSON object in one of the small files."""
        path = self.folder / file
        regular_file(self.folder, file)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConversionError(f"cannot read {path}: {error}; expected a JSON object") from error
        if not isinstance(value, dict):
            raise ConversionError(f"{path} holds a {type(value).__name__}; expected a JSON object")
        return value

    def _read_headers(self) -> dict[str, TensorInfo]:
        index: str | None
        for single, index in ((WEIGHTS, WEIGHTS_INDEX), (PICKLE, PICKLE_INDEX)):  # the order of transformers
            if self._exists(single):
                index = None
                break
            if self._exists(index):
                break
        else:
            found = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf"))
            raise ConversionError(
                f"{self.name} has no weights: expected {WEIGHTS} or {WEIGHTS_INDEX}, found {found or 'neither'}"
            )
        pickle = single == PICKLE
        if pickle and not self.allow_pickle:
            raise ConversionError(
                f"{self.name} has its weights in a .bin pickle only, which can run code when it is loaded; expected "
                "safetensors. Save it as safetensors with transformers first, or pass allow_pickle=True "
                "(--allow-pickle) to read it with torch.load(weights_only=True)"
            )
        weight_map = self._read_index(index) if index else {}
        tensors: dict[str, TensorInfo] = {}
        for file in sorted(set(weight_map.values())) or [single]:
            for name, info in (self._open_pickle(file) if pickle else self._open_header(file)).items():
                if name in tensors:
                    raise ConversionError(
                        f"tensor {name!r} is in {tensors[name].file} and in {file}; expected it once: "
                        "delete the stale file or tensor"
                    )
                tensors[name] = info
        for name, file in weight_map.items():
            if name not in tensors or tensors[name].file != file:
                raise ConversionError(f"{index} says that {name!r} is in {file}, which does not hold it")
        if index and (unlisted := sorted(tensors.keys() - weight_map.keys())):
            raise ConversionError(f"{tensors[unlisted[0]].file} holds {unlisted[:3]}, which {index} does not list")
        return tensors

    def _read_index(self, index: str) -> dict[str, str]:
        weight_map = self.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{self.name}: {index} has no weight_map; expected tensor names and their files")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
                raise ConversionError(
                    f"{self.name}: {index} puts {name!r} in {file!r}; expected the plain name of a file in the same "
                    "folder"
                )
        return weight_map

    def _open_header(self, file: str) -> dict[str, TensorInfo]:
        if self.commit is not None and not self._downloaded(file) and file not in self._stamps:
            parsed = _ask_hub(
                self.name, HfApi().parse_safetensors_file_metadata, self.name, file, revision=self.commit
            )
            self._stamps[file] = (-1, -1)  # not downloaded yet; `read` comes here again
            header = {n: vars(t) for n, t in parsed.tensors.items()}
            return tensors_from_header(header, file, f"{self.name}/{file}")
        path = self._path(file)
        if not regular_file(path.parent, path.name):
            raise ConversionError(f"{self.name} has no file {file!r}, which its index names; download it again")
        self._stamps[file] = _stamp(path)
        self._data_start[file], tensors = read_header(path)
        return tensors

    def _open_pickle(self, file: str) -> dict[str, TensorInfo]:
        tensors = self._read_pickle(file)
        return {name: TensorInfo(name, file, t.dtype, tuple(t.shape), None) for name, t in tensors.items()}

    def _read_pickle(self, file: str) -> dict[str, torch.Tensor]:
        if self._pickle is None or self._pickle[0] != file:
            self._pickle = None  # close the file before
            path = self._path(file)
            if not regular_file(path.parent, path.name):
                raise ConversionError(f"{self.name} has no file {file!r}, which its index names; download it again")
            self._stamps[file] = _stamp(path)
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # a hostile pickle may raise anything
                raise ConversionError(f"torch.load(weights_only=True) refuses {path}: {error}") from error
            if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
                raise ConversionError(f"{path} holds a {type(tensors).__name__}; expected a state dict of tensors")
            self._pickle = (file, tensors)
        return self._pickle[1]

    def _downloaded(self, file: str) -> bool:
        return regular_file(self.folder, file)

    def _exists(self, file: str) -> bool:
        if self.commit is None or self._downloaded(file):
            return self._downloaded(file)
        return _ask_hub(self.name, HfApi().file_exists, self.name, file, revision=self.commit)

    def _path(self, file: str) -> Path:
        if self.commit is None or self._downloaded(file):
            return self.folder / file
        return Path(_ask_hub(self.name, hf_hub_download, self.name, file, revision=self.commit))


def regular_file(folder: Path, name: str) -> bool:
    """Tell whether `folder / name` is there, as a regular file of this checkpoint.

    A link may lead to another file of the folder, or, in a snapshot of the Hub's cache, to that cache's own blobs.

    Raises:
        ConversionError: a link that leads elsewhere, as in a checkpoint that wants a file of yours to be copied, a
            link to nowhere, or a pipe, a device or a folder.
    """
    path = folder / name
    if not os.path.lexists(path):
        return False
    root, real = os.path.realpath(folder), os.path.realpath(path)
    places = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        places.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    if not any(real.startswith(place.rstrip(os.sep) + os.sep) for place in places):
        raise ConversionError(
            f"{path} is a link to {real}, outside of the checkpoint's folder; expected the file itself: put a copy of "
            "it there if you trust where it leads"
        )
    if not os.path.exists(real):
        raise ConversionError(f"{path} is a link to {real}, which does not exist; download the file again")
    if not stat.S_ISREG(os.stat(real).st_mode):
        raise ConversionError(f"{path} is no regular file; expected one, not a folder, a pipe or a device")
    return True


def open_source(source: str, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """Open a local folder or a hub id by its small files and headers.

    Raises:
        ConversionError: no such folder or repository, no weights, a truncated or missing file, a header or index that
            contradicts itself, or a pickle that was not asked for.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConversionError(f"{source} is a local folder, which has no revision {revision!r}; leave it out")
        return Source(source, folder, allow_pickle=allow_pickle)
    if (why := misplaced(source)) is not None:
        raise ConversionError(why)
    snapshot = Path(_ask_hub(source, snapshot_download, source, revision=revision, allow_patterns=list(SMALL_FILES)))
    return Source(source, snapshot, commit=snapshot.name, allow_pickle=allow_pickle)


def _ask_hub(source: str, call, *args, **kwargs) -> Any:
    """Call a function of huggingface_hub; turn whatever goes wrong into a `ConversionError`."""
    try:
        return call(*args, **kwargs)
    except Exception as error:  # HTTP, connection, authentication, a bad name: all have their own classes
        raise ConversionError(
            f"{source!r} is not a folder here, and the Hub cannot serve it: {error}. Check the name, the revision, "
            "your network and, for a gated repository, your login (hf auth login)"
        ) from error


def _quantised_kind(info: TensorInfo) -> str:
    """Name what an unfolded tensor must be quantised as, "fp8" or "mxfp4"; "" for a plain one."""
    if info.dtype.itemsize == 1 and info.dtype.is_floating_point:
        return "fp8"
    return "mxfp4" if info.dtype == torch.uint8 and info.name.endswith(MXFP4_BLOCKS) else ""


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
