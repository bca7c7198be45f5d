"""What a run writes into: files that are finished one by one, and the journal that says which are. For `workdir.py`.

Only files that the journal names are ever deleted or put into an output.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import TiedMoeError
from .files import atomic_write_text, disk_errors_explained, file_digest, files_in, flush, others_in, remove_file
from .journal import append, read_journal

JOURNAL, LOCK, PID, FILES, STORED, DRAFT, SCRATCH, REPLACED = (
    *("journal.jsonl", "lock", "pid", "output", "work", "draft", "scratch", "replaced"),
)
STATE = ".tiedmoe"


class Refused(TiedMoeError):
    """A file that is not ours is in the way; what was done so far is kept."""


class Folder:
    """A folder that a run writes, and its journal; `open_folder` and `open_work` make one.

    Attributes:
        folder: where the files are.
        files: the finished ones by relative name, `{name: {"bytes": …, "xxh3_128": …}}`.
        values: what `remember` was given.
    """

    def __init__(self, folder: Path, state: Path, entries: Iterable[Mapping[str, Any]]):
        self.folder, self.state, self.journal = folder, state, state / JOURNAL
        self.files: dict[str, dict[str, Any]] = {}
        self.values: dict[str, Any] = {}
        self._owned: set[str] = set()
        self.begun: set[str] = set()
        self._stored: dict[str, Mapping[str, Any]] = {}
        self.told = (folder, "what is done is kept")  # when a disk fails
        for entry in entries:
            self._apply(entry)

    @property
    def owned(self) -> set[str]:
        """Relative names of all files here that this run and the earlier ones wrote."""
        return self._owned | self.begun

    @property
    def scratch(self) -> Path:
        """A folder for the run's temporary files, such as Trainer's checkpoints; all of it is the run's own."""
        path = self.state / SCRATCH
        path.mkdir(exist_ok=True)
        return path

    def path(self, name: str) -> Path:
        """Return where to write the file `name`, after noting that it is ours; `finish` it when it is complete.

        Raises:
            TiedMoeError: something is there that no run wrote.
        """
        path = self.folder / name
        if name not in self.owned:
            if os.path.lexists(path):
                raise Refused(
                    f"{path} exists, and no run of ours wrote it; move it elsewhere, and run the same command again"
                )
            self.note({"begun": [name]})
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, name: str, written: dict[str, Any] | None = None) -> None:
        """Note that the file `name` is complete and on the disk.

        Args:
            name: relative to the folder.
            written: its `file_digest`, if the caller has it.
        """
        found = written or file_digest(self.folder / name)
        assert found is not None, f"{name} was never written"
        self.note({"file": name, "written": found})

    def write_text(self, name: str, text: str) -> None:
        """Write a small file, whole or not at all."""
        path = self.path(name)
        with self.draft() as draft:
            atomic_write_text(path, text, draft / path.name)
        self.finish(name)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as JSON, whole or not at all."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """Give an empty folder to write into; every file in it at the end moves to its place here, complete."""
        with disk_errors_explained(*self.told):
            (self.state / DRAFT).mkdir(exist_ok=True)
            draft = Path(tempfile.mkdtemp(dir=self.state / DRAFT))
            try:
                yield draft
                self.take(draft)
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def take(self, folder: Path) -> None:
        """Move every file of `folder`, of the run's own making and on the same disk, to its place here."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            target = self.path(name)
            flush(path)
            path.replace(target)
            self.finish(name)

    def own(self, name: str) -> None:
        """Note that the files in the folder `name`, which a command has just made for this run, are ours.

        Does nothing if some are ours already: files added since are not.
        """
        found = sorted(path.relative_to(self.folder).as_posix() for path in files_in(self.folder / name))
        if found and not any(each.startswith(f"{name}/") for each in self.owned):
            self.note({"owned": found})

    def is_sound(self, name: str) -> bool:
        """Tell whether the file `name` is finished and has the bytes that were written."""
        return name in self.files and file_digest(self.folder / name) == self.files[name]

    def remember(self, name: str, value: Any) -> None:
        """Keep a JSON-able value for later runs, in `values`."""
        self.note({"value": name, "is": value})

    def delete(self, *names: str) -> None:
        """Delete these files, and what is ours in these folders; nothing else."""
        for entry in read_journal(self.journal)[1:]:  # what others noted meanwhile
            self._apply(entry)
        gone = {each for each in self.owned if any(each == name or each.startswith(f"{name}/") for name in names)}
        for name in sorted(gone):
            remove_file(self.folder, name)
        if gone:
            self.note({"deleted": sorted(gone)})

    def store(self, name: str, write: Callable[[Path], Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Keep a result that took long to compute, for the next run after a kill; it is deleted with the state.

        Args:
            name: a plain file name.
            write: called with the path of the file to write.
            metadata: JSON-able.
        """
        folder = self.state / STORED
        folder.mkdir(exist_ok=True)
        write(folder / name)
        flush(folder / name)
        flush(folder)
        self.note({"stored": name, "written": file_digest(folder / name), "metadata": dict(metadata or {})})

    def load(self, name: str) -> tuple[Path, dict[str, Any]] | None:
        """Return the file and metadata that `store` kept under `name`; None if missing or damaged."""
        entry, path = self._stored.get(name), self.state / STORED / name
        if entry is None or file_digest(path) != entry["written"]:
            return None
        return path, entry["metadata"]

    def note(self, entry: dict[str, Any]) -> None:
        append(self.journal, entry)
        self._apply(json.loads(json.dumps(entry)))

    def _apply(self, entry: Mapping[str, Any]) -> None:
        if "begun" in entry:
            self.begun.update(entry["begun"])
            for name in entry["begun"]:
                self.files.pop(name, None)
        elif "owned" in entry:
            self._owned.update(entry["owned"])
        elif "file" in entry:
            self.files[entry["file"]] = entry["written"]
            self.begun.discard(entry["file"])
            self._owned.add(entry["file"])
        elif "deleted" in entry:
            for name in entry["deleted"]:
                self.files.pop(name, None)
            self.begun.difference_update(entry["deleted"])
            self._owned.difference_update(entry["deleted"])
        elif "stored" in entry:
            self._stored[entry["stored"]] = entry
        elif "value" in entry:
            self.values[entry["value"]] = entry["is"]

    def is_worth_keeping(self) -> bool:
        scratch = self.state / SCRATCH
        return bool(self.owned or self._stored or (scratch.is_dir() and any(scratch.iterdir())))

    def tidy(self) -> None:
        """Delete what a killed run left unfinished."""
        shutil.rmtree(self.state / DRAFT, ignore_errors=True)
        for name in self.begun:
            remove_file(self.folder, name)
        if self.begun:
            self.note({"deleted": sorted(self.begun)})


class Work(Folder):
    """The folder that becomes an output; `open_work` makes one.

    Attributes:
        report: what `complete` was given, by this run or by one that was killed after it; None before.
        num_resumed: how many files an earlier run had finished.
        keep: as `open_work` was asked; may be changed in its block.
    """

    keep = False

    def __init__(self, partial: Path, entries: list[dict[str, Any]]):
        super().__init__(partial / FILES, partial, entries)
        self.report: dict[str, Any] | None = entries[-1].get("complete") if entries else None
        self.num_resumed = len(self.files)

    def complete(self, report: dict[str, Any]) -> None:
        """Note that every file is there and verified: all that is left to do is the rename."""
        if foreign := others_in(self.folder, self.owned):
            raise Refused(
                f"{self.folder} holds {foreign[:3]}, which this run did not write; expected its own files only: move "
                "them elsewhere, and run the same command again"
            )
        unfinished = self.begun | {name for name in self.files if not (self.folder / name).is_file()}
        assert not unfinished, f"never finished: {sorted(unfinished)}"
        for path in [*self.folder.rglob("*"), self.folder]:
            flush(path)
        self.note({"complete": report})
        self.report = report

    def resume(self) -> None:
        """Keep what an earlier run finished, drop what was damaged since, and refuse files that it did not write."""
        for name in [name for name in self.files if not self.is_sound(name)]:
            del self.files[name]  # it is made again
            self.report = None
        self.num_resumed = len(self.files)
        self.folder.mkdir(exist_ok=True)
        if foreign := others_in(self.folder, self.owned):
            raise Refused(
                f"{self.folder} holds {foreign[:3]}, which no run of ours wrote; expected the files of the unfinished "
                "work only: move them elsewhere, and run the same command again"
            )
        self.tidy()
