"""One resumable folder: killed, interrupted, damaged, shared, planted in; each time the right files and no others."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conversions import unchanged_disk
from safetensors.torch import save_file

from transformers_tiedmoe import files, journal, run_folder, workdir
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.files import atomic_write_json, check_apart, file_digest
from transformers_tiedmoe.journal import append, read_journal
from transformers_tiedmoe.output_place import check_output, was_renamed
from transformers_tiedmoe.workdir import discard_work, open_folder, open_work

IDENTITY = {"recipe": {"steps": 3}}


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def interrupted(output, identity=IDENTITY, name="a.txt"):
    """Work on `output` that Ctrl-C has stopped after one file and in the middle of another."""
    with contextlib.suppress(KeyboardInterrupt), open_work(output, identity) as work:
        work.write_text(name, "whole")
        work.path("b.txt").write_text("ha")
        raise KeyboardInterrupt
    return output.parent / f".{output.name}.partial"


def finish(output, identity=IDENTITY, **options):
    with open_work(output, identity, **options) as work:
        for name in ("a.txt", "b.txt"):
            if name not in work.files:
                work.write_text(name, "whole")
        if work.report is None:
            work.complete({"done": 1})
    return work


def test_work_appears_in_one_rename_and_leaves_nothing_else(tmp_path):
    with open_work(tmp_path / "out", IDENTITY) as work:
        work.write_json("a.json", {"x": 1})
        with work.draft() as draft:
            (draft / "sub").mkdir()
            (draft / "sub" / "b.txt").write_text("b")
        work.remember("state", [1, None])
        assert not (tmp_path / "out").exists()
        assert work.files.keys() == {"a.json", "sub/b.txt"}
        work.complete({})
    assert tree(tmp_path) == ["out", "out/a.json", "out/sub", "out/sub/b.txt"]
    assert json.loads((tmp_path / "out" / "a.json").read_text()) == {"x": 1}


def test_work_goes_on_with_what_is_finished_and_sound(tmp_path):
    partial = interrupted(tmp_path / "out")
    with contextlib.suppress(KeyboardInterrupt), open_work(tmp_path / "out", IDENTITY) as work:
        assert work.files == {"a.txt": file_digest(partial / "output" / "a.txt")}
        assert tree(partial / "output") == ["a.txt"]  # the other half is gone
        raise KeyboardInterrupt
    (partial / "output" / "a.txt").write_text("whale")
    assert finish(tmp_path / "out").num_resumed == 0
    assert (tmp_path / "out" / "a.txt").read_text() == "whole"


def test_results_that_took_long_are_kept(tmp_path):
    """`store` and `load`: the same bytes and metadata after Ctrl-C, nothing after damage or at the end."""
    metadata = {"notes": ["a note"], "loss": 1.5}
    with contextlib.suppress(KeyboardInterrupt), open_work(tmp_path / "out", {}) as work:
        assert work.load("pool-0") is None
        work.store("pool-0", lambda path: path.write_bytes(b"pool"), metadata)
        raise KeyboardInterrupt
    with contextlib.suppress(KeyboardInterrupt), open_work(tmp_path / "out", {}) as work:
        path, found = work.load("pool-0")
        assert (path.read_bytes(), found) == (b"pool", metadata)
        raise KeyboardInterrupt
    path.write_bytes(b"pond")
    with open_work(tmp_path / "out", {}) as work:
        assert work.load("pool-0") is None
        work.write_text("file", "x")
        work.complete({})
    assert tree(tmp_path) == ["out", "out/file"]


def test_an_error_leaves_nothing_unless_the_work_is_to_be_kept(tmp_path):
    for keep, left in ((True, [".out.partial"]), (False, [])):
        with contextlib.suppress(RuntimeError), open_work(tmp_path / "new" / "out", IDENTITY, keep=keep) as work:
            (work.scratch / "checkpoint-1").mkdir(exist_ok=True)
            raise RuntimeError
        assert sorted(os.listdir(tmp_path / "new") if (tmp_path / "new").exists() else []) == left
    assert tree(tmp_path) == []


def test_an_error_before_anything_was_done_leaves_nothing_to_keep(tmp_path):
    with contextlib.suppress(RuntimeError), open_work(tmp_path / "out", IDENTITY, keep=True) as work:
        work.remember("dtype", "float32")
        assert work.scratch.is_dir()
        raise RuntimeError
    assert tree(tmp_path) == []


# Killed at every moment: before the n-th write, flush, rename or removal, after which none of these does anything
# more.

MOMENTS = [
    (files, "flush"), (journal, "flush"), (workdir, "flush"), (workdir, "append"), (workdir, "remove_file"),
    (run_folder, "flush"), (run_folder, "append"), (run_folder, "remove_file"),
    (workdir, "_remove_state"), (os, "truncate"), (shutil, "rmtree"), (Path, "rename"), (Path, "replace"),
        (Path, "rmdir"),
    (Path, "unlink"), (Path, "write_text"), (Path, "mkdir"),
]  # fmt: skip


class Killed(BaseException):
    pass


def killed(job, at):
    """Whether `job()` reached the moment `at`, where it was stopped for good: nothing is cleared up either."""
    left = at

    def counted(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in MOMENTS:
            patch.setattr(module, name, counted(getattr(module, name)))
        try:
            job()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("is_replacing", [False, True])
def test_work_killed_at_every_moment(tmp_path, is_replacing):
    """The same command ends well and leaves the output and nothing else; what was there before is whole until then."""
    expected = {"a.json": "[\n  1\n]\n", "sub/b.txt": "b", "c.txt": "c"}

    def job(output, owned=("old.txt",) if is_replacing else None):
        with open_work(output, IDENTITY, owned=owned) as work:
            if work.report is None:
                work.write_json("a.json", [1])
                work.store("long", lambda path: path.write_bytes(b"x"))
                with work.draft() as draft:
                    (draft / "sub").mkdir()
                    (draft / "sub" / "b.txt").write_text("b")
                work.path("c.txt").write_text("c")
                work.finish("c.txt")
                work.complete({"done": 1})
        assert work.report == {"done": 1}

    at, is_killed = 0, True
    while is_killed:
        output = tmp_path / str(at) / "out"
        if is_replacing:
            finish_one(output, "old.txt")
        is_killed = killed(lambda output=output: job(output), at)
        if not output.exists() or output.joinpath("old.txt").exists() or not any(output.iterdir()):
            job(output)
        else:  # complete, and so is the clearing up if the same command is given again
            with contextlib.suppress(TiedMoeError):
                job(check_output(output))
        found = {path.relative_to(output).as_posix(): path.read_text() for path in output.rglob("*") if path.is_file()}
        assert found == expected, at
        assert sorted(os.listdir(output.parent)) == ["out"], at
        at += 1
    assert at > 50


def finish_one(output, name):
    with open_work(output, IDENTITY) as work:
        work.write_text(name, "old")
        work.complete({})


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_killed_at_every_moment(tmp_path, overwrite):
    """What the journal calls finished is whole, the user's file stays, and the next run makes the rest."""

    def job(folder):
        with open_demo(folder, steps=4 if overwrite else 3, overwrite=overwrite) as demo:
            if not demo.is_sound("a.txt"):
                demo.write_text("a.txt", "new")
            demo.remember("seconds", 1.5)
            output = folder / "tied"
            if not output.exists() or was_renamed(output):
                finish(output)
        return demo

    at, is_killed = 0, True
    while is_killed:
        folder = tmp_path / str(at)
        with open_demo(folder) as demo:
            demo.write_text("a.txt", "old")
            finish_one(folder / "tied", "old.txt")
        (folder / "tied" / "notes.txt").write_text("mine")
        if overwrite:
            (folder / "tied" / "notes.txt").rename(folder / "notes.txt")
        is_killed = killed(lambda folder=folder: job(folder), at)
        demo = job(folder)
        assert demo.values == {"seconds": 1.5}
        names = {name for name in tree(folder) if ".tiedmoe" not in name}
        if overwrite:
            assert names == {"a.txt", "notes.txt", "tied", "tied/a.txt", "tied/b.txt"}, at
            assert demo.owned == {"a.txt", "tied/a.txt", "tied/b.txt"}
        else:
            assert names == {"a.txt", "tied", "tied/old.txt", "tied/notes.txt"}, at
        assert (folder / "a.txt").read_text() == ("new" if overwrite else "old")
        at += 1
    assert at > (40 if overwrite else 5)


def test_another_identity_says_what_differs(tmp_path):
    interrupted(tmp_path / "out")
    message = r"differs in its recipe: steps was 3 and is 4; .*repeat the old command to go on, or delete that folder"
    with (
        unchanged_disk(tmp_path),
        pytest.raises(TiedMoeError, match=message),
        open_work(tmp_path / "out", {"recipe": {"steps": 4}}),
    ):
        pass
    message = "differs in its recipe: steps was 3 and is None"
    with pytest.raises(TiedMoeError, match=message), open_work(tmp_path / "out", {}):
        pass
    finish(tmp_path / "out", {"recipe": {"steps": 4}}, owned=())  # may be replaced
    assert tree(tmp_path) == ["out", "out/a.txt", "out/b.txt"]


def test_what_no_run_wrote_goes_into_no_output_and_is_not_deleted(tmp_path):
    """Planted before a resumed run, during a run, and where no work was begun."""
    partial = interrupted(tmp_path / "out")
    (partial / "output" / "planted.txt").write_text("mine")
    with (
        unchanged_disk(tmp_path),
        pytest.raises(TiedMoeError, match=r"holds \['planted.txt'\], which no run of ours wrote"),
        open_work(tmp_path / "out", IDENTITY),
    ):
        pass
    (partial / "output" / "planted.txt").rename(tmp_path / "planted.txt")

    def planting():
        with open_work(tmp_path / "out", IDENTITY) as work:
            work.write_text("b.txt", "whole")
            (tmp_path / "planted.txt").rename(partial / "output" / "planted.txt")
            work.complete({})

    with pytest.raises(TiedMoeError, match=r"holds \['planted.txt'\], which this run did not write"):
        planting()
    assert (partial / "output" / "planted.txt").read_text() == "mine"
    with contextlib.suppress(RuntimeError), open_work(tmp_path / "new", IDENTITY) as work:
        (work.folder / "planted.txt").write_text("mine")
        raise RuntimeError
    assert tree(tmp_path / ".new.partial") == ["output", "output/planted.txt"]
    with pytest.raises(TiedMoeError, match=r"holds \['output'\], which no run of ours wrote"):
        finish(tmp_path / "new")
    (partial / "output" / "planted.txt").unlink()
    finish(tmp_path / "out")
    assert tree(tmp_path / "out") == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    "line",
    [
        "{}", "[]", "7", "null", "nonsense", '"text"', "[" * 10000,
        {"identity": [], "made": []}, {"identity": {"recipe": 3}, "made": []}, {"identity": {}, "made": [1]},
        {"file": "../a.txt", "written": {"bytes": 1, "xxh3_128": "0" * 32}},
        {"file": "/a.txt", "written": {"bytes": 1, "xxh3_128": "0" * 32}},
        {"file": "a.txt", "written": {"bytes": -1, "xxh3_128": "0" * 32}},
        {"file": "a.txt", "written": None}, {"file": None, "written": None},
        {"file": "a.txt", "written": {"bytes": 1, "xxh3_128": 0}},
        {"begun": [None]}, {"begun": "a.txt"}, {"owned": ["a/../../b"]}, {"deleted": ["."]},
        {"stored": "x", "written": {}, "metadata": {}}, {"complete": None}, {"complete": []}, {"other": 1},
    ],
    ids=lambda line: str(line)[:60],
)  # fmt: skip
@pytest.mark.parametrize("is_first", [True, False])
def test_a_journal_that_claims_what_it_cannot(tmp_path, line, is_first):
    """Of a wrong type, or well hashed and out of range: one error for each, and nothing is touched."""
    partial = interrupted(tmp_path / "out")
    journal = partial / "journal.jsonl"
    if is_first:
        journal.unlink()
    if isinstance(line, str):
        with open(journal, "a") as file:
            file.write(line + "\n")
    else:
        append(journal, line)
    with (
        unchanged_disk(tmp_path),
        pytest.raises(TiedMoeError, match=r"journal.jsonl is damaged: line \d+ .*; delete the folder .*partial"),
        open_work(tmp_path / "out", IDENTITY),
    ):
        pass


def test_a_changed_or_cut_line_of_a_journal(tmp_path):
    partial = interrupted(tmp_path / "out")
    journal = partial / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole.replace(b'"steps": 3', b'"steps": 4'))
    with pytest.raises(TiedMoeError, match="line 1 is not one"):
        read_journal(journal)
    journal.write_bytes(whole[:-20])
    entries = read_journal(journal)
    assert len(entries) == whole.count(b"\n") - 1
    assert journal.stat().st_size == len(whole) - 20  # read by who may not hold the lock
    assert read_journal(journal, mend=True) == entries
    assert journal.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("place", ["work", "folder"])
def test_two_at_once(tmp_path, place):
    def enter():
        if place == "work":
            return open_work(tmp_path / "out", IDENTITY)
        return open_folder(tmp_path / "out", IDENTITY, what="a demo")

    message = rf"another process \(process {os.getpid()}\) (is writing|uses) .*out; .*wait until it is done"
    with pytest.raises(TiedMoeError, match=message), enter(), enter():
        pass
    assert tree(tmp_path) == []


def test_other_processes_of_one_run_read_and_leave_the_rest_to_the_first(tmp_path):
    with open_work(tmp_path / "out", IDENTITY) as work:
        work.remember("step", 5)
        with open_work(tmp_path / "out", IDENTITY, is_main=False) as other:
            assert other.values == {"step": 5}
            assert other.scratch == work.scratch
        work.write_text("a.txt", "x")
        work.complete({})
    assert tree(tmp_path) == ["out", "out/a.txt"]


def test_an_output_is_replaced_at_the_end_if_a_run_wrote_all_of_it(tmp_path):
    output = tmp_path / "out"
    owned = set(finish(output).files)
    (output / "notes.txt").write_text("mine")
    with unchanged_disk(tmp_path), pytest.raises(TiedMoeError, match=r"holds \['notes.txt'\], which .* did not write"):
        check_output(output, owned=owned)
    (output / "notes.txt").unlink()
    assert check_output(str(output), owned=owned) == output
    with open_work(output, IDENTITY, owned=owned) as work:
        work.write_text("c.txt", "new")
        assert tree(output) == ["a.txt", "b.txt"]
        work.complete({})
    assert tree(tmp_path) == ["out", "out/c.txt"]


def test_an_output_that_somebody_fills_meanwhile_keeps_both(tmp_path):
    output = tmp_path / "out"

    def overtaken():
        with open_work(output, IDENTITY) as work:
            work.write_text("a.txt", "whole")
            work.complete({})
            output.mkdir()
            (output / "notes.txt").write_text("mine")

    with pytest.raises(TiedMoeError, match=r"is finished, but cannot take the name .*notes.txt.*It is kept"):
        overtaken()
    (output / "notes.txt").unlink()
    with open_work(output, IDENTITY) as work:
        assert work.report == {}
    assert tree(tmp_path) == ["out", "out/a.txt"]


def test_discarded_work(tmp_path):
    partial = interrupted(tmp_path / "out")
    (partial / "output" / "planted.txt").write_text("mine")
    discard_work(tmp_path / "out")
    assert tree(partial) == ["output", "output/planted.txt"]
    discard_work(tmp_path / "none")


def open_demo(folder, steps=3, **options):
    return open_folder(folder, {"settings": {"steps": steps}}, what="a demo", advice="take another", **options)


def test_a_folder_stays_and_is_continued(tmp_path):
    with open_demo(tmp_path / "demo") as demo:
        demo.write_json("a.json", 1)
        demo.remember("seconds", {"a": 2.5})
        demo.path("half").write_text("ha")
    with open_demo(tmp_path / "demo") as demo:
        assert demo.is_sound("a.json")
        assert demo.values == {"seconds": {"a": 2.5}}
        assert not (tmp_path / "demo" / "half").exists()
    (tmp_path / "demo" / "a.json").write_text("2")
    with open_demo(tmp_path / "demo") as demo:
        assert not demo.is_sound("a.json")
    with (
        unchanged_disk(tmp_path),
        pytest.raises(
            TiedMoeError, match=r"holds a demo that differs in its settings: steps was 3 and is 4; .*take another"
        ),
        open_demo(tmp_path / "demo", steps=4),
    ):
        pass


def test_what_no_run_wrote_is_not_written_over(tmp_path):
    with open_demo(tmp_path / "demo") as demo:
        demo.remember("x", 1)
        (tmp_path / "demo" / "report.md").write_text("mine")
        with pytest.raises(TiedMoeError, match=r"report.md exists, and no run of ours wrote it"):
            demo.write_text("report.md", "ours")
    assert (tmp_path / "demo" / "report.md").read_text() == "mine"


def test_outputs_made_in_an_open_folder_are_its_own(tmp_path):
    """But not those that somebody makes there afterwards, nor what comes to them."""
    with open_demo(tmp_path / "demo"):
        finish(tmp_path / "demo" / "tied")
        finish(tmp_path / "beside")
    finish(tmp_path / "demo" / "mine")
    (tmp_path / "demo" / "tied" / "notes.txt").write_text("mine")
    with open_demo(tmp_path / "demo", overwrite=True):
        assert sorted(name for name in tree(tmp_path) if ".tiedmoe" not in name) == [
            *("beside", "beside/a.txt", "beside/b.txt"),
            *("demo", "demo/mine", "demo/mine/a.txt", "demo/mine/b.txt", "demo/tied", "demo/tied/notes.txt"),
        ]


def test_overwriting_a_folder_deletes_what_runs_wrote_and_nothing_else(tmp_path):
    folder, outside = tmp_path / "demo", tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("mine")
    with open_demo(folder) as demo:
        for name in ("tied", "linked"):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text("{}")
            demo.own(name)
        demo.write_text("report.md", "x")
    (folder / "tied" / "notes.txt").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "linked" / "config.json").unlink()
    (folder / "linked").rmdir()
    (folder / "linked").symlink_to(outside)
    with open_demo(folder, steps=4, overwrite=True) as demo:
        assert demo.owned == set()
    assert {name for name in tree(folder) if ".tiedmoe" not in name} == {
        "linked",
        "notes.txt",
        "tied",
        "tied/notes.txt",
    }
    assert (outside / "config.json").read_text() == "mine"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        for overwrite in (False, True):
            with (
                unchanged_disk(tmp_path),
                pytest.raises(TiedMoeError, match=r"a demo.*take another"),
                open_demo(folder, overwrite=overwrite),
            ):
                pass


def test_a_temporary_folder_goes_but_for_ctrl_c(tmp_path):
    for error, stays in ((None, False), (RuntimeError, False), (KeyboardInterrupt, True)):
        with (
            contextlib.suppress(RuntimeError, KeyboardInterrupt),
            open_demo(tmp_path / "a" / "b", temporary=True) as demo,
        ):
            demo.write_text("x.txt", "x")
            if error:
                raise error
        assert (tmp_path / "a").exists() == stays


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full; nothing is left of the attempt"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "is full; nothing is left of the attempt"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), r"cannot write .*out: Permission denied \(/x\)"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot write .*out: Read-only file system"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "is full"),  # as safetensors says it
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), "is full"),  # as torch does
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "is full"),
    ],
)
def test_what_a_disk_can_do_wrong_is_one_paragraph(tmp_path, error, message):
    with unchanged_disk(tmp_path), pytest.raises(TiedMoeError, match=message), open_work(tmp_path / "out", {}):
        raise error


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TiedMoeError, match=r"cannot write .*Permission denied"), open_work(tmp_path / "out", {}):
        pass


@pytest.mark.parametrize("library", ["safetensors", "torch", "python"])
def test_a_disk_that_is_really_full_or_read_only(small_disk, library):
    tensor = torch.zeros(100_000)
    write = {
        "safetensors": lambda path: save_file({"x": tensor}, path),
        "torch": lambda path: torch.save(tensor, path),
        "python": lambda path: path.write_bytes(tensor.numpy().tobytes()),
    }[library]

    def work_on(output, **options):
        with open_work(output, IDENTITY, **options) as work:
            write(work.scratch / "checkpoint")

    with pytest.raises(
        TiedMoeError, match=r"the disk of .*out is full; nothing is left of the attempt\. Free some space"
    ):
        work_on(small_disk / "out")
    assert tree(small_disk) == []
    with pytest.raises(TiedMoeError, match="is full; what is done is kept"), open_demo(small_disk / "demo") as demo:
        write(demo.path("x"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for enter in (lambda: work_on(small_disk / "out"), lambda: open_demo(small_disk / "other").__enter__()):
        with pytest.raises(TiedMoeError, match=r"cannot write .*: Read-only file system .*choose another folder"):
            enter()


def test_inputs_in_the_output_and_around_it(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source)
    cases = [
        (source, source, "is also the model"),
        (tmp_path / "link", source, "is also the model"),
        (source / "sub" / "..", source, "is also the model"),
        (source / "out", source, "lies in the model"),
        (tmp_path / "link" / "sub", source, "lies in the model"),
        (tmp_path, source, "the model .* lies in output"),
        (source, source / "config.json", "the model .* lies in output"),
        (source, tmp_path / "link" / "config.json", "the model .* lies in output"),
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").symlink_to(source / "config.json")
    cases.append((source, tmp_path / "other", "the model .* links to .*config.json, which lies in output"))
    for output, model, message in cases:
        with pytest.raises(TiedMoeError, match=message):
            check_apart(output, {"teacher": None, "model": str(model)})
    check_apart(tmp_path / "out", {"model": str(source), "data": "no/such"})
    check_apart(tmp_path / "no", {"data": "no/such"})  # a hub id, perhaps
    check_apart(tmp_path / "no", {"data": "a" * 5000, "model": "\ud800", "teacher": "a\0b"})  # for others to refuse
    with pytest.raises(TiedMoeError, match=r"statistics=.* is also the output"):
        check_apart(tmp_path / "out", {"output": tmp_path / "out"}, "statistics")


@pytest.mark.parametrize("output", ["", "sub/..", ".", "a\0b", "n" * 250, "/", "\ud800"])
def test_outputs_that_can_be_no_folder_are_refused_first(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with unchanged_disk(tmp_path), pytest.raises(TiedMoeError, match="choose another"):
        check_output(output)


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/x") == tmp_path / "x"


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    atomic_write_json(tmp_path / "a.json", {"x": 1})

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        atomic_write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
