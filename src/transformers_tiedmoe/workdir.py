"""One resumable folder, for everything that writes one: it can be killed at any moment and started again.

Two kinds, with the same lock, identity, journal and atomic writes:

- `open_work`: all or nothing. The files are made in `.OUTPUT.partial/output` and take OUTPUT's name in one rename.
- `open_folder`: a folder that stays and is continued in place; its state is in `FOLDER/.tiedmoe`.

The state is a `journal.jsonl` (what is being made of what, then a line for everything that was written, with its
hash), `lock` and `pid` (one process at a time), `draft/` (files before they are complete), `work/` (results that took
long to compute) and `scratch/` (free for the run's use). Only files that the journal names are ever deleted or put
into an output.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from .errors import TiedMoeError
from .files import (
    MAX_NAME_BYTES,
    atomic_write_text,
    check_apart,
    disk_errors_explained,
    file_digest,
    files_in,
    flush,
    others_in,
    real_path,
    remove_file,
    resolved,
)
from .journal import append, read_journal

JOURNAL, LOCK, PID, FILES, STORED, DRAFT, SCRATCH, REPLACED = (
    *("journal.jsonl", "lock", "pid", "output", "work", "draft", "scratch", "replaced"),
)
STATE = ".tiedmoe"


def partial_folder(output: Path) -> Path:
    """Return the folder in which `output` is made."""
    return output.parent / f".{output.name}.partial"


def check_output(
    output: str | Path, inputs: Mapping[str, str | Path | None] | None = None, owned: Collection[str] | None = None
) -> Path:
    """Return the absolute path of a folder that can be made: new, empty, or to be replaced.

    Args:
        output: as the user gave it.
        inputs: by name what the run reads, or writes elsewhere: no such file or folder may be in `output`, nor
            `output` in it. A str that does not exist (a hub id) and None are left out, a Path is not.
        owned: relative names of the files that an earlier run wrote into `output`, which may then hold these and no
            others; None if it must be new or empty.

    Raises:
        TiedMoeError: one of these is not so, or no folder can have that name.
    """
    path = resolved(output)
    with disk_errors_explained(path, "nothing was written"):
        _check_place(path, output, owned)
    check_apart(path, inputs or {})
    return path


def _check_place(path: Path, output: str | Path, owned: Collection[str] | None) -> None:
    """Raise unless a folder can be made at `path`, or replaced, or is empty."""
    if len(os.fsencode(partial_folder(path).name)) > MAX_NAME_BYTES or path.is_mount():
        raise TiedMoeError(
            f"output {output} cannot be made: its name is too long, or a disk is mounted there; choose another one"
        )
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise TiedMoeError(f"output {output} exists and is not a folder; choose another one")
    if path.is_dir() and not was_renamed(path):
        with contextlib.suppress(OSError):
            partial_folder(path).rmdir()  # empty: of a run that was killed just before its end
        if owned is None and (found := sorted(p.name for p in path.iterdir())):
            raise TiedMoeError(
                f"output folder {output} is not empty: it holds {found[:3]}; expected a new or empty one, as nothing "
                "is overwritten: choose another, or empty it"
            )
        if owned is not None:
            _check_owned(path, owned)
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir():
        raise TiedMoeError(f"output {output} cannot be made: {parent} is a file; choose another one")


def was_renamed(output: Path) -> bool:
    """Tell whether a run was killed after `output` took its name and before its working folder was gone."""
    partial = partial_folder(output)
    if not output.is_dir() or (partial / FILES).exists():
        return False
    entries = read_journal(partial / JOURNAL)
    if not entries or "complete" not in entries[-1]:
        return False
    written = Folder(output, partial, entries).files
    return all(_size(output / name) == found["bytes"] for name, found in written.items())


class Folder:
    """A folder that a run writes, and its journal; `open_folder` and `open_work` make one.

    Attributes:
        folder: where the files are.
        files: the finished ones by relative name, `{name: {"bytes": …, "xxh3_128": …}}`.
        values: what `remember` was given.
    """

    def __init__(self, folder: Path, state: Path, entries: Iterable[Mapping[str, Any]]):
        self.folder, self._state, self._journal = folder, state, state / JOURNAL
        self.files: dict[str, dict[str, Any]] = {}
        self.values: dict[str, Any] = {}
        self._owned: set[str] = set()
        self._begun: set[str] = set()
        self._stored: dict[str, Mapping[str, Any]] = {}
        self._told = (folder, "what is done is kept")  # when a disk fails
        for entry in entries:
            self._apply(entry)

    @property
    def owned(self) -> set[str]:
        """Relative names of all files here that this run and the earlier ones wrote."""
        return self._owned | self._begun

    @property
    def scratch(self) -> Path:
        """A folder for the run's temporary files, such as Trainer's checkpoints; all of it is the run's own."""
        path = self._state / SCRATCH
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
                raise _Refused(
                    f"{path} exists, and no run of ours wrote it; move it elsewhere, and run the same command again"
                )
            self._note({"begun": [name]})
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
        self._note({"file": name, "written": found})

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
        with disk_errors_explained(*self._told):
            (self._state / DRAFT).mkdir(exist_ok=True)
            draft = Path(tempfile.mkdtemp(dir=self._state / DRAFT))
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
            self._note({"owned": found})

    def is_sound(self, name: str) -> bool:
        """Tell whether the file `name` is finished and has the bytes that were written."""
        return name in self.files and file_digest(self.folder / name) == self.files[name]

    def remember(self, name: str, value: Any) -> None:
        """Keep a JSON-able value for later runs, in `values`."""
        self._note({"value": name, "is": value})

    def delete(self, *names: str) -> None:
        """Delete these files, and what is ours in these folders; nothing else."""
        for entry in read_journal(self._journal)[1:]:  # what others noted meanwhile
            self._apply(entry)
        gone = {each for each in self.owned if any(each == name or each.startswith(f"{name}/") for name in names)}
        for name in sorted(gone):
            remove_file(self.folder, name)
        if gone:
            self._note({"deleted": sorted(gone)})

    def store(self, name: str, write: Callable[[Path], Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Keep a result that took long to compute, for the next run after a kill; it is deleted with the state.

        Args:
            name: a plain file name.
            write: called with the path of the file to write.
            metadata: JSON-able.
        """
        folder = self._state / STORED
        folder.mkdir(exist_ok=True)
        write(folder / name)
        flush(folder / name)
        flush(folder)
        self._note({"stored": name, "written": file_digest(folder / name), "metadata": dict(metadata or {})})

    def load(self, name: str) -> tuple[Path, dict[str, Any]] | None:
        """Return the file and metadata that `store` kept under `name`; None if missing or damaged."""
        entry, path = self._stored.get(name), self._state / STORED / name
        if entry is None or file_digest(path) != entry["written"]:
            return None
        return path, entry["metadata"]

    def _note(self, entry: dict[str, Any]) -> None:
        append(self._journal, entry)
        self._apply(json.loads(json.dumps(entry)))

    def _apply(self, entry: Mapping[str, Any]) -> None:
        if "begun" in entry:
            self._begun.update(entry["begun"])
            for name in entry["begun"]:
                self.files.pop(name, None)
        elif "owned" in entry:
            self._owned.update(entry["owned"])
        elif "file" in entry:
            self.files[entry["file"]] = entry["written"]
            self._begun.discard(entry["file"])
            self._owned.add(entry["file"])
        elif "deleted" in entry:
            for name in entry["deleted"]:
                self.files.pop(name, None)
            self._begun.difference_update(entry["deleted"])
            self._owned.difference_update(entry["deleted"])
        elif "stored" in entry:
            self._stored[entry["stored"]] = entry
        elif "value" in entry:
            self.values[entry["value"]] = entry["is"]

    def _is_worth_keeping(self) -> bool:
        scratch = self._state / SCRATCH
        return bool(self.owned or self._stored or (scratch.is_dir() and any(scratch.iterdir())))

    def _tidy(self) -> None:
        """Delete what a killed run left unfinished."""
        shutil.rmtree(self._state / DRAFT, ignore_errors=True)
        for name in self._begun:
            remove_file(self.folder, name)
        if self._begun:
            self._note({"deleted": sorted(self._begun)})


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
            raise _Refused(
                f"{self.folder} holds {foreign[:3]}, which this run did not write; expected its own files only: move "
                "them elsewhere, and run the same command again"
            )
        unfinished = self._begun | {name for name in self.files if not (self.folder / name).is_file()}
        assert not unfinished, f"never finished: {sorted(unfinished)}"
        for path in [*self.folder.rglob("*"), self.folder]:
            flush(path)
        self._note({"complete": report})
        self.report = report

    def _resume(self) -> None:
        """Keep what an earlier run finished, drop what was damaged since, and refuse files that it did not write."""
        for name in [name for name in self.files if not self.is_sound(name)]:
            del self.files[name]  # it is made again
            self.report = None
        self.num_resumed = len(self.files)
        self.folder.mkdir(exist_ok=True)
        if foreign := others_in(self.folder, self.owned):
            raise _Refused(
                f"{self.folder} holds {foreign[:3]}, which no run of ours wrote; expected the files of the unfinished "
                "work only: move them elsewhere, and run the same command again"
            )
        self._tidy()


class _Refused(TiedMoeError):
    """A file that is not ours is in the way; what was done so far is kept."""


@contextlib.contextmanager
def open_work(
    output: Path,
    identity: Mapping[str, Mapping[str, Any]],
    *,
    owned: Collection[str] | None = None,
    keep: bool = False,
    is_main: bool = True,
) -> Iterator[Work]:
    """Open the working folder of `output`, which takes its name when the block ends without an error.

    An error removes the folder, unless `keep`; a kill or Ctrl-C leaves it, and the next run with the same `identity`
    continues it.

    Example:
        >>> output = check_output("healed", {"model": "tied", "data": "text.txt"})
        >>> with open_work(output, {"options": {"steps": 100}}, keep=True) as work:
        ...     if work.report is None:  # else an earlier run was killed after it had finished
        ...         train(output_dir=work.scratch)  # goes on with the checkpoints there
        ...         with work.draft() as draft:
        ...             model.save_pretrained(draft)
        ...         work.complete({"loss": 1.25})

    Args:
        output: as `check_output` returns it.
        identity: what decides the output's bytes, JSON-able, one mapping per aspect: recipe, source, versions, ...
        owned: as in `check_output`: an output of these files is replaced at the end, and unfinished work of another
            identity now. None replaces nothing.
        keep: leave the working folder for the next run after an error too, if it holds a file, a stored result, or
            something in `scratch`.
        is_main: whether this process, of several that run the same, holds the lock and finishes. The others enter
            after it, and may read; what they write goes into `scratch`.

    Raises:
        TiedMoeError: another process works on `output`, or what was begun there has another identity; the disk is full
            or cannot be written.
    """
    output = resolved(output)
    partial = partial_folder(output)
    if not is_main:
        yield Work(partial, read_journal(partial / JOURNAL))
        return
    if partial.is_symlink():
        raise TiedMoeError(f"{partial} is a link; expected a folder of ours, or nothing: remove it")
    made = [str(parent) for parent in output.parents if not parent.exists()]
    told = (output, "what is done is kept" if keep else "nothing is left of the attempt")
    with disk_errors_explained(*told):
        try:
            partial.mkdir(parents=True, exist_ok=True)
            lock = _acquire(partial, f"is writing {output}", "choose another output")
            try:
                entries = _begin(partial, output, json.loads(json.dumps(identity)), made, owned)
            except BaseException:
                lock.release()
                raise
        except OSError:
            if not (partial / JOURNAL).exists():
                _remove_state(partial)
                _remove_parents(made, output)
            raise
        try:
            work = Work(partial, entries)
            work.keep = keep
            work._told = told
            try:
                if was_renamed(output):
                    yield work
                else:
                    work._resume()
                    yield work
                    assert work.report is not None, "nobody said that the work is complete"
                    _tell_folders(output, work.owned)
                    _publish(work.folder, output, owned)
                _remove_state(partial)
            except _Refused:
                raise
            except Exception:
                if not (work.keep and work._is_worth_keeping()):
                    _discard(work, output)
                    _remove_state(partial, last=LOCK)  # nobody else may begin while something is left
                    _remove_parents(entries[0]["made"], output)
                raise
        finally:
            lock.release()


@contextlib.contextmanager
def open_folder(
    folder: str | Path,
    identity: Mapping[str, Mapping[str, Any]],
    *,
    what: str,
    advice: str = "give another folder",
    overwrite: bool = False,
    temporary: bool = False,
    is_main: bool = True,
) -> Iterator[Folder]:
    """Open a folder that stays, and that later runs with the same `identity` continue in place.

    What `open_work` publishes inside it during the block is the folder's own, too.

    Args:
        folder: new, empty, or one that this function has given before.
        identity: as in `open_work`.
        what: what the folder holds, for errors: "a demo".
        advice: what to do if it holds something else.
        overwrite: delete what earlier runs have written, and begin anew.
        temporary: delete all of it at the end of the block, except after Ctrl-C.
        is_main: as in `open_work`.

    Raises:
        TiedMoeError: another process uses the folder, or it holds something else; the disk is full or cannot be
            written.
    """
    path = real_path(resolved(folder))
    state = path / STATE
    if not is_main:
        with _registered(Folder(path, state, read_journal(state / JOURNAL))) as opened:
            yield opened
        return
    if any(each.is_symlink() or (each.exists() and not each.is_dir()) for each in (path, state)):
        raise TiedMoeError(f"{folder} cannot hold {what}: it is no folder, or {STATE} in it is none of ours; {advice}")
    if path.is_dir() and not state.exists() and (found := sorted(each.name for each in path.iterdir())):
        raise TiedMoeError(
            f"{folder} holds something that is not {what}: {found[:3]}; expected a new or empty one: {advice}"
        )
    made = [str(each) for each in (path, *path.parents) if not each.exists()]
    told = (path, "nothing is left of the attempt" if temporary else "what is done is kept")
    with disk_errors_explained(*told):
        state.mkdir(parents=True, exist_ok=True)
        lock = _acquire(state, f"uses {folder}", advice)
        try:
            opened = _open_state(
                path, json.loads(json.dumps(identity)), made, f"{folder} holds {what}", advice, overwrite
            )
            opened._told = told
            try:
                with _registered(opened):
                    yield opened
            except KeyboardInterrupt:
                raise
            except BaseException:
                _close_folder(opened, temporary)
                raise
            _close_folder(opened, temporary)
        finally:
            lock.release()


_open_folders: list[Folder] = []  # of this process


@contextlib.contextmanager
def _registered(folder: Folder) -> Iterator[Folder]:
    """Note outputs that are published inside `folder` within the block as its own."""
    _open_folders.append(folder)
    try:
        yield folder
    finally:
        _open_folders.remove(folder)


def discard_work(output: Path) -> None:
    """Delete the unfinished work on `output`, whatever its identity.

    Raises:
        TiedMoeError: a process is at it.
    """
    output = resolved(output)
    _discard_state(partial_folder(output), output, Work)


def discard_folder(folder: str | Path) -> None:
    """Delete what runs have written into a folder of `open_folder`, and its state.

    Raises:
        TiedMoeError: a process uses it.
    """
    path = real_path(resolved(folder))
    _discard_state(path / STATE, path, lambda state, entries: Folder(path, state, entries))
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def _discard_state(state: Path, output: Path, make: Callable[[Path, list[dict[str, Any]]], Folder]) -> None:
    if state.is_symlink() or not state.is_dir():
        return
    with disk_errors_explained(output, "what is done is kept"):
        lock = _acquire(state, f"is writing {output}", "choose another output")
        try:
            if entries := read_journal(state / JOURNAL, mend=True):
                _discard(make(state, entries), output)
            _remove_state(state, last=LOCK)
        finally:
            lock.release()


def _begin(
    partial: Path, output: Path, identity: dict[str, Any], made: list[str], owned: Collection[str] | None
) -> list[dict[str, Any]]:
    """Return the entries of the journal: an earlier run's if it made the same output, else a first one."""
    entries = read_journal(partial / JOURNAL, mend=True)
    if entries and (difference := _difference(entries[0]["identity"], identity)):
        if was_renamed(output):
            _remove_state(partial, but=(LOCK, PID))
            try:
                check_output(output, owned=owned)  # says that it holds something else
            except TiedMoeError:
                _remove_state(partial)
                raise
        elif owned is None:
            _refuse(f"{partial} holds unfinished work on {output}", difference, "delete that folder to start anew")
        else:
            _discard(Work(partial, entries), output)
            _remove_state(partial, but=(LOCK, PID))
        entries = []
    if entries:
        return entries
    if foreign := [each.name for each in partial.iterdir() if each.name not in (LOCK, PID, JOURNAL)]:
        raise _Refused(
            f"{partial} holds {sorted(foreign)[:3]}, which no run of ours wrote; expected unfinished work, or "
            "nothing: move them elsewhere, and run the same command again"
        )
    append(partial / JOURNAL, {"identity": identity, "made": made})
    return read_journal(partial / JOURNAL)


def _open_state(
    path: Path, identity: dict[str, Any], made: list[str], begin: str, advice: str, overwrite: bool
) -> Folder:
    """Return the folder as earlier runs left it, or a new one."""
    state = path / STATE
    entries = read_journal(state / JOURNAL, mend=True)
    if entries and overwrite:
        _discard(Folder(path, state, entries), path)
        _remove_state(state, but=(LOCK, PID))
        path.mkdir(exist_ok=True)
        entries = []
    if entries and (difference := _difference(entries[0]["identity"], identity)):
        _refuse(begin, difference, advice)
    if not entries:
        append(state / JOURNAL, {"identity": identity, "made": made})
        entries = read_journal(state / JOURNAL)
    opened = Folder(path, state, entries)
    opened._tidy()
    return opened


def _close_folder(opened: Folder, temporary: bool) -> None:
    """Delete a folder that is to go, or into which nothing was written."""
    entries = read_journal(opened._journal)
    if temporary or len(entries) == 1:
        _discard(opened, opened.folder)
        _remove_state(opened._state, last=LOCK)
        made = entries[0]["made"]
        _remove_parents([str(opened.folder), *made] if temporary else made, opened.folder)


def _acquire(state: Path, doing: str, advice: str) -> FileLock:
    lock = FileLock(state / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError) as error:  # the latter: the other one has just finished and removes the folder
        try:
            pid = f" (process {int((state / PID).read_text())})"
        except (OSError, ValueError):
            pid = ""
        raise TiedMoeError(
            f"another process{pid} {doing}; expected to be the only one: wait until it is done, or {advice}"
        ) from error
    (state / PID).write_text(f"{os.getpid()}\n")
    return lock


def _difference(begun: dict[str, Any], asked: dict[str, Any]) -> tuple[str, str] | None:
    """Return the first aspect in which two identities differ, and how; None if they are equal."""
    for aspect in {**asked, **begun}:
        old, new = begun.get(aspect, {}), asked.get(aspect, {})
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if names:
            return aspect, ", ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names[:3])
    return None


def _refuse(begin: str, difference: tuple[str, str], advice: str) -> NoReturn:
    aspect, what = difference
    if aspect == "source":
        raise TiedMoeError(
            f"{begin}, whose source has changed since: {what}; expected the same source: restore it to go on, or "
            f"{advice}"
        )
    raise TiedMoeError(
        f"{begin} that differs in its {aspect}: {what}; expected the same: repeat the old command to go on, or "
        f"{advice}"
    )


def _tell_folders(output: Path, names: Collection[str]) -> None:
    """Note in every open folder of this process around `output` that the published files are its own."""
    for each in _open_folders:
        if each.folder in output.parents:
            inside = output.relative_to(each.folder)
            each._note({"owned": sorted((inside / name).as_posix() for name in names)})


def _publish(folder: Path, output: Path, owned: Collection[str] | None) -> None:
    """Give the finished `folder` the name of `output`, in place of what may be replaced there."""
    replaced = folder.with_name(REPLACED)
    try:
        if output.is_dir():
            _check_owned(output, owned or ())
            if any(output.iterdir()):
                output.rename(replaced)
            else:
                output.rmdir()
        folder.rename(output)
        flush(output.parent)
    except (OSError, TiedMoeError) as error:
        if replaced.is_dir() and not output.exists():
            replaced.rename(output)
        raise _Refused(
            f"the work is finished, but cannot take the name {output}: {error}. It is kept: run the same command "
            "again when that is mended"
        ) from error


def _discard(work: Folder, output: Path) -> None:
    """Delete every file that runs of ours wrote into a folder, then the folder if nothing else is left."""
    replaced = work._state / REPLACED
    if replaced.is_dir() and not output.exists():  # killed between the two renames
        replaced.rename(output)
    for name in work.owned:
        with contextlib.suppress(OSError):
            remove_file(work.folder, name)
    with contextlib.suppress(OSError):
        work.folder.rmdir()


def _remove_state(state: Path, but: Collection[str] = (), last: str = JOURNAL) -> None:
    """Delete a state's files, `last` last for the next run to see, then its folder if nothing else is left."""
    for name in sorted((DRAFT, SCRATCH, STORED, REPLACED, PID, LOCK, JOURNAL), key=lambda each: each == last):
        path = state / name
        if name in but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):
        state.rmdir()


def _remove_parents(made: Iterable[str], folder: Path) -> None:
    """Delete `folder` and the folders around it that were made for it, the deepest first, if they are empty."""
    for path in map(Path, made):
        if path in (folder, *folder.parents):
            with contextlib.suppress(OSError):
                path.rmdir()


def _check_owned(output: Path, owned: Collection[str]) -> None:
    if foreign := others_in(output, owned):
        raise TiedMoeError(
            f"output folder {output} holds {foreign[:3]}, which the run to be replaced did not write; nothing of that "
            "kind is deleted: move it elsewhere, or choose another output"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
