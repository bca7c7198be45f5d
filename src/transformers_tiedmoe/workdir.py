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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from .errors import TiedMoeError
from .files import disk_errors_explained, flush, real_path, remove_file, resolved
from .journal import append, read_journal
from .output_place import check_output, check_owned, partial_folder, was_renamed
from .run_folder import DRAFT, JOURNAL, LOCK, PID, REPLACED, SCRATCH, STATE, STORED, Folder, Refused, Work


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
            work.told = told
            try:
                if was_renamed(output):
                    yield work
                else:
                    work.resume()
                    yield work
                    assert work.report is not None, "nobody said that the work is complete"
                    _tell_folders(output, work.owned)
                    _publish(work.folder, output, owned)
                _remove_state(partial)
            except Refused:
                raise
            except Exception:
                if not (work.keep and work.is_worth_keeping()):
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
            opened.told = told
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
        raise Refused(
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
    opened.tidy()
    return opened


def _close_folder(opened: Folder, temporary: bool) -> None:
    """Delete a folder that is to go, or into which nothing was written."""
    entries = read_journal(opened.journal)
    if temporary or len(entries) == 1:
        _discard(opened, opened.folder)
        _remove_state(opened.state, last=LOCK)
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
            each.note({"owned": sorted((inside / name).as_posix() for name in names)})


def _publish(folder: Path, output: Path, owned: Collection[str] | None) -> None:
    """Give the finished `folder` the name of `output`, in place of what may be replaced there."""
    replaced = folder.with_name(REPLACED)
    try:
        if output.is_dir():
            check_owned(output, owned or ())
            if any(output.iterdir()):
                output.rename(replaced)
            else:
                output.rmdir()
        folder.rename(output)
        flush(output.parent)
    except (OSError, TiedMoeError) as error:
        if replaced.is_dir() and not output.exists():
            replaced.rename(output)
        raise Refused(
            f"the work is finished, but cannot take the name {output}: {error}. It is kept: run the same command "
            "again when that is mended"
        ) from error


def _discard(work: Folder, output: Path) -> None:
    """Delete every file that runs of ours wrote into a folder, then the folder if nothing else is left."""
    replaced = work.state / REPLACED
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
