"""Killed at any moment, started again: the same bytes. One process at a time; nothing left after an error."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest
from checkpoints import make_text, make_tokenizer
from conversions import edit_config, save_source, unchanged_disk
from safetensors.torch import load_file, save_file

from tiedmoe_conversion import ConversionRecipe, execute, make_plan, untie
from tiedmoe_conversion.checkpoint import writer
from transformers_tiedmoe import workdir
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.output_place import was_renamed
from transformers_tiedmoe.workdir import open_work

# Runs a conversion in a process that sends itself SIGKILL at the n-th of the moments counted below, or when a timer
# says so.
KILLED = textwrap.dedent(
    """
    import json, os, shutil, signal, sys, threading
    import torch
    torch.set_num_threads(1)
    from pathlib import Path
    from tiedmoe_conversion import ConversionRecipe, execute, make_plan, untie
    from tiedmoe_conversion.checkpoint import writer
    from transformers_tiedmoe import files, journal, run_folder, workdir

    def count(module, name, real):
        def counted(*args, **kwargs):
            reach()
            return real(*args, **kwargs)
        setattr(module, name, counted)

    moments = 0
    def reach():
        global moments
        moments += 1
        if moments == at:
            os.kill(os.getpid(), signal.SIGKILL)

    for module, name in (
        (writer, "_write"), (writer, "flush"), (workdir, "flush"), (files, "flush"), (journal, "flush"),
        (workdir, "append"), (workdir, "remove_file"),
        (run_folder, "flush"), (run_folder, "append"), (run_folder, "remove_file"),
        (workdir, "_remove_state"), (os, "truncate"), (shutil, "rmtree"), (Path, "rename"), (Path, "replace"),
        (Path, "rmdir"), (Path, "unlink"), (Path, "write_text"), (Path, "mkdir"),
    ):
        count(module, name, getattr(module, name))
    def convert(name, kill_at, **fields):
        global at, moments
        at, moments = kill_at, 0
        recipe = dict(source="../source", output=name, method="select", skip_first=1, skip_last=1)
        recipe["max_shard_size"] = "40KB"
        execute(make_plan(ConversionRecipe(**recipe | fields)))

    def calibrated(name, kill_at):
        fields = dict(calibration="../text.txt", calibration_tokens=64, calibration_block_size=16, measure=False)
        convert(name, kill_at, method="least_squares", **fields)

    def untied(name, kill_at):
        global at, moments
        at, moments = kill_at, 0
        untie("../tied", name, max_shard_size="40KB")

    commands = {"convert": convert, "calibrated": calibrated, "untie": untied}
    # One child per kill, forked: torch and transformers are imported once, and what a conversion itself imports.
    is_warm = False
    for line in sys.stdin:
        folder, command, name, kill_at = line.split()
        if not is_warm:
            os.chdir(folder)
            convert("warm", 0)
            shutil.rmtree("warm")
            is_warm = True
        child = os.fork()
        if child == 0:
            try:
                os.chdir(folder)
                commands[command](name, int(kill_at))
            except BaseException as error:
                print("error", type(error).__name__, error, flush=True)
                os._exit(1)
            print("done", moments, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            print("killed", flush=True)
    """
)


class Killer:
    """A process that runs a command in children, each killed at a given moment."""

    def __init__(self):
        arguments = [sys.executable, "-c", KILLED]
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, folder, command, name, kill_at=0):
        """ "killed", "done MOMENTS" or "error ..."."""
        self.process.stdin.write(f"{folder} {command} {name} {kill_at}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self):
        self.process.stdin.close()
        assert self.process.wait() == 0


@pytest.fixture(scope="module")
def killer():
    """One for the module: the imports take longer than the conversions."""
    process = Killer()
    yield process
    process.close()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize(
    ("command", "num_moments", "seed"),
    [("convert", 4, 0), ("untie", 3, 0), ("calibrated", 3, 0), pytest.param("convert", 16, 1, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments(tmp_path, killer, command, num_moments, seed):
    """Before every write, flush, rename and removal that is drawn; one run is killed again and again."""
    save_source(tmp_path / "source", vocab_size=320)
    make_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(make_text(40))
    execute(plan_of(tmp_path / "source", output=str(tmp_path / "tied"), method="select"))
    runs = tmp_path / "runs"
    runs.mkdir()
    if command == "calibrated":
        killer.run(runs, command, "first")  # datasets caches the text
    moments = int(killer.run(runs, command, "whole").removeprefix("done "))
    expected = contents(runs / "whole")
    assert moments > 60
    for moment in [*random.Random(seed).sample(range(1, moments - 1), num_moments - 2), moments - 1, moments]:
        # The last moments remove the hidden statistics, the last of all an empty folder.
        name, is_done = f"at-{moment}", moment > moments - (2 if command == "calibrated" else 1)
        assert killer.run(runs, command, name, moment) == "killed"
        outcome = killer.run(runs, command, name)
        assert outcome.startswith("error TiedMoeError output folder" if is_done else "done"), (moment, outcome)
        assert contents(runs / name) == _named(expected, "whole", name), moment
        assert not (runs / f".{name}.partial").exists()
        assert not (runs / f".{name}.statistics").exists()
    outcome, at = "killed", moments // 3
    while outcome == "killed":  # a little further every time
        outcome = killer.run(runs, command, "often", at)
        at += moments // 6
    assert outcome.startswith(
        ("done", "error TiedMoeError output folder often")
    )  # the latter: killed at its last moment
    assert contents(runs / "often") == _named(expected, "whole", "often")
    assert not [path for path in runs.iterdir() if path.name.startswith(".")]


def _named(files, before, after):
    """`files` of a conversion whose output was called otherwise: the card and the manifest name it."""
    renamed = {**files}
    for name in {"README.md", "tiedmoe_conversion.json"} & files.keys():
        renamed[name] = renamed[name].replace(before.encode(), after.encode())
    if "tiedmoe_conversion.json" in files:
        manifest = json.loads(renamed["tiedmoe_conversion.json"])
        card = manifest["files"]["README.md"]
        card.update(bytes=len(renamed["README.md"]), xxh3_128=writer.xxhash.xxh3_128(renamed["README.md"]).hexdigest())
        renamed["tiedmoe_conversion.json"] = json.dumps(manifest, indent=2).encode() + b"\n"
    return renamed


@pytest.fixture
def source(tmp_path):
    save_source(tmp_path / "source")
    return tmp_path / "source"


def plan_of(source, **fields):
    fields = {"method": "union", "max_shard_size": "40KB", "output": str(source.parent / "out")} | fields
    return make_plan(ConversionRecipe(source=str(source), **fields))


def interrupt(source, share=0.5, **fields):
    """Start a conversion and stop it with Ctrl-C; returns its working folder."""

    def progress(done, total, what):
        if done > total * share:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan_of(source, **fields), progress=progress)
    assert not (source.parent / "out").exists()
    return source.parent / ".out.partial"


def finished_files(partial):
    """Names that the journal in `partial` calls complete."""
    entries = map(json.loads, (partial / "journal.jsonl").read_text().splitlines())
    return {entry["file"] for entry in entries if "file" in entry}


def test_ctrl_c_keeps_the_work_and_the_next_run_goes_on(source, monkeypatch):
    partial = interrupt(source)
    finished = finished_files(partial)
    assert len(finished) >= 2
    written = []
    real = writer.write_file
    monkeypatch.setattr(writer, "write_file", lambda path, *args: written.append(path.name) or real(path, *args))
    report = execute(plan_of(source))
    assert report["resumed_files"] == len(finished)
    assert not finished & set(written)
    assert not partial.exists()


def test_a_finished_file_that_was_damaged_since_is_made_again(source):
    partial = interrupt(source)
    name = sorted(name for name in finished_files(partial) if name.endswith(".safetensors"))[0]
    path = partial / "output" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    execute(plan_of(source))
    assert (source.parent / "out" / name).read_bytes() == content


def test_a_line_that_a_kill_cut_off_is_ignored(source):
    partial = interrupt(source)
    journal_file = partial / "journal.jsonl"
    journal_file.write_bytes(journal_file.read_bytes()[:-20])
    execute(plan_of(source))


def test_another_recipe_is_refused_and_says_what_differs(source):
    partial = interrupt(source)
    with (
        unchanged_disk(source.parent),
        pytest.raises(TiedMoeError, match=r"method was 'union' and is 'average'") as error,
    ):
        execute(plan_of(source, method="average"))
    assert "repeat the old command to go on, or delete that folder" in str(error.value)
    execute(plan_of(source))
    assert not partial.exists()


def test_untie_does_not_go_on_with_a_conversion(source):
    execute(plan_of(source, output=str(source.parent / "tied")))
    interrupt(source)
    with unchanged_disk(source.parent), pytest.raises(TiedMoeError, match="command was 'convert' and is 'untie'"):
        untie(source.parent / "tied", source.parent / "out")


def test_other_versions_are_refused(source, monkeypatch):
    interrupt(source)
    from transformers_tiedmoe import manifest

    monkeypatch.setattr(manifest, "version", lambda name: "0.0")
    with unchanged_disk(source.parent), pytest.raises(TiedMoeError, match=r"differs in its versions: .* is '0.0'"):
        execute(plan_of(source))


def test_a_source_that_changed_meanwhile_is_refused(source):
    interrupt(source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1  # the header stays the same
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with (
        unchanged_disk(source.parent),
        pytest.raises(TiedMoeError, match=r"whose source has changed since: model.saf"),
    ):
        execute(plan_of(source))
    edit_config(source, rope_theta=5.0)
    with unchanged_disk(source.parent), pytest.raises(TiedMoeError, match="whose source has changed since"):
        execute(plan_of(source))


def test_an_error_in_a_resumed_run_leaves_nothing(source, monkeypatch):
    interrupt(source)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write", fail)
    with pytest.raises(TiedMoeError, match="is full; nothing is left"):
        execute(plan_of(source))
    assert {path.name for path in source.parent.iterdir()} == {"source"}


def test_an_error_after_ctrl_c_removes_the_parents_that_were_made(source, monkeypatch):
    output = str(source.parent / "new" / "deep" / "out")
    with pytest.raises(KeyboardInterrupt):
        execute(plan_of(source, output=output), progress=lambda *call: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (source.parent / "new" / "deep").is_dir()
    monkeypatch.setattr(writer, "_write", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(TiedMoeError, match="is full"):
        execute(plan_of(source, output=output))
    assert {path.name for path in source.parent.iterdir()} == {"source"}


def test_the_second_process_says_who_is_at_work(source):
    """The first holds the lock in another process, and is killed; then the second may."""
    partial = source.parent / ".out.partial"
    partial.mkdir()
    code = (
        "import os, sys; from filelock import FileLock; lock = FileLock(sys.argv[1] + '/lock'); lock.acquire(); "
        "open(sys.argv[1] + '/pid', 'w').write(str(os.getpid())); print('holds', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(partial)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "holds\n"
        message = rf"another process \(process {holder.pid}\) is writing .*out; .*wait until it is done"
        with unchanged_disk(source.parent), pytest.raises(TiedMoeError, match=message):
            execute(plan_of(source))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    execute(plan_of(source))


def test_two_at_once_in_one_process(tmp_path):
    with (
        pytest.raises(TiedMoeError, match=r"another process .* is writing"),
        open_work(tmp_path / "out", {}),
        open_work(tmp_path / "out", {}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_working_folder_is_not_followed(source):
    (source.parent / "elsewhere").mkdir()
    (source.parent / ".out.partial").symlink_to("elsewhere")
    with unchanged_disk(source.parent), pytest.raises(TiedMoeError, match="is a link; expected a folder of ours"):
        execute(plan_of(source))


def test_finished_but_for_the_removal_of_its_work(source, monkeypatch):
    """Killed right after the rename: the same command says it is done; another one that the output is not empty."""
    remove = workdir._remove_state
    monkeypatch.setattr(workdir, "_remove_state", lambda *args, **kwargs: None)
    first = execute(plan_of(source))
    partial = source.parent / ".out.partial"
    assert was_renamed(source.parent / "out")
    assert partial.is_dir()
    monkeypatch.setattr(workdir, "_remove_state", remove)
    again = execute(plan_of(source))
    assert again["verification"] == first["verification"]
    assert not partial.exists()
    with pytest.raises(TiedMoeError, match="is not empty"):
        plan_of(source)
