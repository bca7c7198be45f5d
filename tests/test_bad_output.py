"""Places where a conversion cannot write, and disks that fail: an error that says what to do, and nothing left."""

import errno
import importlib
import os
import subprocess
from collections import namedtuple

import pytest
from bad_sources import attempt, edit_index, folder_fixture, pristine_fixture, refuse, sharded_fixture  # noqa: F401
from conversions import unchanged_disk

from tiedmoe_conversion import ConversionError, ConversionRecipe, execute, make_plan, untie
from tiedmoe_conversion.checkpoint import reader, writer
from transformers_tiedmoe.errors import TiedMoeError


def test_output_folder_that_is_not_empty(folder):
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "notes.txt").write_text("mine")
    refuse(folder, r"is not empty: it holds \['notes.txt'\]; expected a new or empty one", TiedMoeError)


def test_output_that_becomes_not_empty_after_the_plan(folder):
    plan = make_plan(ConversionRecipe(source=str(folder), output=str(folder.parent / "out"), method="average"))
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "notes.txt").write_text("mine")
    with unchanged_disk(folder.parent), pytest.raises(TiedMoeError, match="is not empty"):
        execute(plan)


def test_output_that_is_the_source(folder):
    refuse(folder, "is not empty", TiedMoeError, output=str(folder))


def test_output_in_or_around_an_input_is_refused_before_the_work(folder, monkeypatch):
    """For convert, plan and untie; with links followed, and for an OUTPUT that is only seen to be another when it is
    resolved.
    """
    (folder.parent / "link").symlink_to(folder)
    (folder.parent / "text").mkdir()
    (folder.parent / "text" / "a.txt").write_text("text")
    refuse(folder, "lies in the source", TiedMoeError, output=str(folder / "out"))
    refuse(folder, "lies in the source", TiedMoeError, output=str(folder.parent / "link" / "out"))
    refuse(
        folder,
        "lies in the source",
        TiedMoeError,
        source=str(folder.parent / "link"),
        output=str(folder / "a" / "out"),
    )
    text = {"calibration": str(folder.parent / "text"), "output": str(folder.parent / "text" / "out")}
    refuse(folder, "lies in the calibration text", TiedMoeError, **text)
    monkeypatch.chdir(folder.parent)
    refuse(folder, "is not empty", TiedMoeError, output="x/..")
    for output, message in (("link/out", "lies in the source"), ("x/..", "is not empty"), ("source", "is not empty")):
        with unchanged_disk(folder.parent), pytest.raises(TiedMoeError, match=message):
            untie(folder, output)


def test_output_that_is_a_file_or_below_one(folder):
    refuse(folder, "exists and is not a folder", TiedMoeError, output=str(folder / "config.json"))
    refuse(
        folder, r"cannot be made: .*config\.json is a file", TiedMoeError, output=str(folder / "config.json" / "below")
    )


def test_output_that_is_a_link_to_nowhere(folder):
    (folder.parent / "out").symlink_to("nowhere")
    refuse(folder, "exists and is not a folder", TiedMoeError)


def test_disk_that_is_known_to_be_too_small(folder, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage(1000))
    refuse(
        folder, "has 1,000 bytes free, and .* are needed; free some", run=True, output=str(folder.parent / "a" / "out")
    )


@pytest.mark.parametrize("at", [0, 1, 20])
def test_disk_that_fills_up(folder, monkeypatch, at):
    """The write of the nth tensor fails as on a full disk; new parent folders vanish, too."""
    calls, real = [], writer._write

    def full(file, data):
        calls.append(data)
        if len(calls) > at:
            file.write(b"a piece")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    monkeypatch.setattr(writer, "_write", full)
    refuse(
        folder,
        "is full; nothing is left of the attempt",
        TiedMoeError,
        run=True,
        output=str(folder.parent / "new" / "out"),
    )
    assert len(calls) == at + 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk takes root")
def test_disk_that_is_really_full(folder, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        recipe = ConversionRecipe(source=str(folder), output=str(small / "out"), method="average")
        plan = make_plan(recipe)
        with unchanged_disk(tmp_path), pytest.raises(ConversionError, match="bytes free, and"):
            execute(plan)
        module = importlib.import_module("tiedmoe_conversion.run")  # the package's name is the function
        monkeypatch.setattr(module, "check_space", lambda *args: None)
        with unchanged_disk(tmp_path), pytest.raises(TiedMoeError, match="is full"):
            execute(plan)
    finally:
        subprocess.run(["umount", small], check=True)


def test_source_that_fails_while_it_is_read_leaves_nothing(folder, monkeypatch):
    plan = make_plan(ConversionRecipe(source=str(folder), output=str(folder.parent / "out"), method="average"))
    real = reader.Source.read

    def fail(self, name, *rows, **into):
        if name == "model.norm.weight":
            raise OSError(errno.EIO, "Input/output error")
        return real(self, name, *rows, **into)

    monkeypatch.setattr(reader.Source, "read", fail)
    with unchanged_disk(folder.parent), pytest.raises(OSError, match="Input/output error"):
        execute(plan)
