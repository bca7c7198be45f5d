"""Input that nobody made on purpose: configs, headers, recipes and text give an error or a result, whatever they hold.

Whatever raises anything but a `ValueError`, or changes a file, fails; so does what takes too long or too much
(fuzzing.py).
"""

import contextlib
import gzip
import io
import json
import lzma
import shutil
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import make_text, make_tokenizer
from conversions import save_source
from fuzzing import EXTRA_FIELDS, Limits, anything, cases, numbers, spliced, tree, words, write_json
from hypothesis import given
from hypothesis import strategies as st
from test_conversion_mxfp4 import save_mxfp4

from tiedmoe_conversion import ConversionRecipe, execute, make_plan
from tiedmoe_conversion.checkpoint.quantised import SUFFIXES
from tiedmoe_conversion.plan import Plan
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.journal import append
from transformers_tiedmoe.manifest import check_manifest
from transformers_tiedmoe.training import text_files
from transformers_tiedmoe.training.data import load_blocks
from transformers_tiedmoe.workdir import open_work

FAMILIES = ("olmoe", "mixtral", "deepseek_v3", "qwen2_moe")
QUANTISED = "gpt_oss"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By family a tiny source in shards, and one in mxfp4 in a single file; do not change them."""
    folder = tmp_path_factory.mktemp("fuzz")
    for family in FAMILIES:
        save_source(folder / family, family, num_hidden_layers=4, max_shard_size="60KB")
    save_mxfp4(folder / QUANTISED, num_hidden_layers=4)
    return folder


def attempt(sources, family, edit, run=False):
    """Edit a copy of the family's source; the plan, or the conversion, succeeds or raises a ValueError with a text."""
    folder = sources / "case"
    shutil.rmtree(folder, ignore_errors=True)
    source = shutil.copytree(sources / family, folder / "source")
    edit(source)
    before = tree(sources)
    plan: Plan | None = None
    recipe = ConversionRecipe(
        source=str(source), output=str(folder / "out"), method="select", skip_first=1, skip_last=0, groups=None
    )
    with Limits():
        try:
            plan = make_plan(recipe)
            if run:
                execute(plan)
        except ValueError as error:
            text = str(error)
        else:
            text = ""
    assert not text or len(text) > 20, text
    if plan is not None:
        assert isinstance(plan, Plan)
        assert plan.bytes_after > 0
        str(plan)
    shutil.rmtree(folder / "out", ignore_errors=True)
    assert tree(sources) == before


@cases(0.4)
@given(data=st.data())
def test_config(sources, data):
    family = data.draw(st.sampled_from([*FAMILIES, QUANTISED]))

    def edit(source):
        path = source / "config.json"
        config = json.loads(path.read_text())
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.one_of(st.sampled_from(sorted(config)), st.sampled_from(EXTRA_FIELDS), words))
            if data.draw(st.integers(0, 5)) == 0:
                config.pop(name, None)
            else:
                config[name] = data.draw(anything)
        write_json(path, config)
        if data.draw(st.integers(0, 9)) == 0:
            path.write_bytes(spliced(data.draw, path.read_bytes()))

    attempt(sources, family, edit, run=data.draw(st.integers(0, 9)) == 0)


@cases(0.3)
@given(data=st.data())
def test_header(sources, data):
    family = data.draw(st.sampled_from([*FAMILIES, QUANTISED]))

    def edit(source):
        path = data.draw(st.sampled_from(sorted(source.glob("*.safetensors"))))
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        text, rest = content[8 : 8 + length], content[8 + length :]
        header = json.loads(text)
        kind = data.draw(
            st.sampled_from(["entry", "field", "name", "swap", "offsets", "splice", "length", "cut", "twice"])
        )
        name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        if kind == "entry":
            header[data.draw(st.one_of(st.just(name), words))] = data.draw(anything)
        elif kind == "field":
            header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = data.draw(anything)
        elif kind == "name":
            others = ["x." + name, *(name.removesuffix("_blocks") + suffix for suffix in ("", *SUFFIXES))]
            header[data.draw(st.one_of(words, st.sampled_from(others)))] = header.pop(name)
        elif kind == "swap":
            other = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
            header[name], header[other] = header[other], header[name]
        elif kind == "offsets":
            header[name]["data_offsets"] = [data.draw(numbers), data.draw(numbers)]
            header[name]["shape"] = data.draw(st.lists(numbers, max_size=70))
        text = json.dumps(header).encode() if kind in ("entry", "field", "name", "swap", "offsets") else text
        if kind == "twice":
            text = text[:-1].rstrip() + b"," + json.dumps({name: header[name]}).encode()[1:]
        if kind == "splice":
            text = spliced(data.draw, text)
        length = data.draw(st.one_of(numbers, st.just(len(text) - 1))) % 2**64 if kind == "length" else len(text)
        content = length.to_bytes(8, "little") + text + rest
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if kind == "cut" else content)

    attempt(sources, family, edit, run=data.draw(st.integers(0, 9)) == 0)


@cases(0.3)
@given(data=st.data())
def test_index(sources, data):
    family = data.draw(st.sampled_from(FAMILIES))

    def edit(source):
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        names = sorted(index["weight_map"])
        kind = data.draw(st.sampled_from(["file", "files", "name", "map", "whole", "splice", "gone", "shard"]))
        if kind == "file":
            index["weight_map"][data.draw(st.sampled_from(names))] = data.draw(anything)
        elif kind == "files":
            file = data.draw(words)
            index["weight_map"] = dict.fromkeys(index["weight_map"], file)
        elif kind == "name":
            index["weight_map"][data.draw(words)] = index["weight_map"].pop(data.draw(st.sampled_from(names)))
        elif kind == "map":
            index["weight_map"] = data.draw(anything)
        elif kind == "whole":
            index = data.draw(anything)
        elif kind == "gone":
            del index["weight_map"][data.draw(st.sampled_from(names))]
        elif kind == "shard":
            shard = data.draw(st.sampled_from(sorted(source.glob("*.safetensors"))))
            with contextlib.suppress(OSError, ValueError):
                shard.rename(source / data.draw(st.sampled_from(["model.safetensors", "x", shard.name])))
        write_json(path, index)
        if kind == "splice":
            path.write_bytes(spliced(data.draw, path.read_bytes()))

    attempt(sources, family, edit, run=data.draw(st.integers(0, 9)) == 0)


deep = st.sampled_from(["[" * 5000, "{a: " * 5000, "- " * 5000, "&a [*a]", "&a [1, 1], &b [*a, *a], &c [*b, *b]",
                        "9" * 5000,
                        "1:" * 999 + "1", "2020-99-99", "!!python/name:os.system", "!!binary x", "~", "\ud800", "\0",
                        "? x",
                        "!!set {a}", ".nan", "1e999", "0x" + "f" * 5000, "<<: 1", "---", "%x", "'"])  # fmt: skip


@cases(0.3)
@given(data=st.data())
def test_recipe(tmp_path_factory, data):
    """A recipe file gives a recipe that stands in YAML as it is, or an error."""
    recipe = ConversionRecipe("in", "out", method="prefit", then=["least_squares"], calibration="austen")
    fields = recipe.to_dict()
    for _ in range(data.draw(st.integers(1, 3))):
        fields[data.draw(st.one_of(st.sampled_from(sorted(fields)), words))] = data.draw(anything)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    if data.draw(st.booleans()):
        lines[data.draw(st.integers(0, len(lines) - 1))] = (
            data.draw(st.sampled_from(sorted(fields))) + ": " + data.draw(deep)
        )
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if data.draw(st.integers(0, 4)) == 0:
        content = spliced(data.draw, content)
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(content)
    with Limits(), contextlib.suppress(TiedMoeError):
        found = ConversionRecipe.from_yaml(path)
        found.to_yaml(path)
        assert ConversionRecipe.from_yaml(path) == found


TEXT = make_text(30)
ROWS = [{"text": line, "n": i} for i, line in enumerate(TEXT.splitlines())]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": partial(lzma.compress, preset=0),
            ".zst": partial(pa.Codec("zstd").compress, asbytes=True)}  # fmt: skip


def parquet_bytes():
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


WHOLE = {
    "txt": TEXT.encode(),
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "json": json.dumps(ROWS).encode(),
    "parquet": parquet_bytes(),
}


@cases(0.3)
@given(data=st.data())
def test_training_text(tmp_path_factory, data):
    """A file of text gives blocks of its own tokens, or an error."""
    kind, compression = data.draw(st.sampled_from(sorted(WHOLE))), data.draw(st.sampled_from(sorted(COMPRESS)))
    content = WHOLE[kind]
    edit = data.draw(st.sampled_from(["splice", "cut", "rows", "bomb", "bytes", "packed"]))
    if edit == "rows" and kind in ("json", "jsonl"):
        rows = [*ROWS, data.draw(anything), {"text": data.draw(anything)}]
        content = json.dumps(rows).encode() if kind == "json" else b"\n".join(json.dumps(row).encode() for row in rows)
    elif edit == "bomb" and compression:
        content = data.draw(st.sampled_from([b"a", b"a\n", b"[", b'{"text": ', b"\0"])) * (16 << 20)
    elif edit == "bytes":
        content = data.draw(st.binary(max_size=99))
    elif edit == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif edit == "splice":
        content = spliced(data.draw, content)
    packed = COMPRESS[compression](content)
    if edit == "packed":
        packed = spliced(data.draw, packed)
    path = tmp_path_factory.getbasetemp() / f"t.{kind}{compression}"
    path.write_bytes(packed)
    with Limits(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "SMALL_BYTES", 1 << 16)
        patch.setattr(text_files, "MAX_EXPANSION", 9)  # rows of two bytes, up to the limit, take long
        with contextlib.suppress(TiedMoeError):
            train, validation = load_blocks(path, TOKENIZER, block_size=8)
            assert all(len(row["input_ids"]) == 8 for part in (train, validation) for row in part)


TOKENIZER = make_tokenizer()


@cases(0.2)
@given(data=st.data())
def test_journal(tmp_path_factory, data):
    """A journal of unfinished work: an error that says so, or the whole output and nothing else."""
    folder = tmp_path_factory.getbasetemp() / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    output, state = folder / "out", folder / ".out.partial"
    with contextlib.suppress(KeyboardInterrupt), open_work(output, {"recipe": {"steps": 3}}) as work:
        work.write_text("sub/a.txt", "a")
        work.store("long", lambda path: path.write_text("long"))
        work.path("b.txt").write_text("b")
        raise KeyboardInterrupt
    (folder / "mine.txt").write_text("mine")
    journal = state / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    kind = data.draw(st.sampled_from(["splice", "field", "entry", "drop", "twice", "cut"]))
    at = data.draw(st.integers(0, len(lines) - 1))
    if kind == "drop":
        del lines[at]
    elif kind == "twice":
        lines.insert(data.draw(st.integers(0, len(lines))), lines[at])
    journal.write_bytes(b"".join(lines))
    if kind == "splice":
        journal.write_bytes(spliced(data.draw, journal.read_bytes()))
    elif kind == "cut":
        journal.write_bytes(journal.read_bytes()[: data.draw(st.integers(0, journal.stat().st_size))])
    elif kind in ("field", "entry"):  # with its right hash
        entry = json.loads(lines[at])
        del entry["check"]
        if kind == "field":
            entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(st.one_of(anything, st.lists(words)))
        else:
            entry = {data.draw(st.sampled_from(["file", "begun", "owned", "deleted", "x"])): data.draw(anything)}
        append(journal, entry)
    with Limits(), contextlib.suppress(TiedMoeError):
        with open_work(output, {"recipe": {"steps": 3}}) as work:
            if work.report is None:
                for name, text in (("sub/a.txt", "a"), ("b.txt", "b")):
                    work.write_text(name, text)
                work.complete({})
        found = {path.relative_to(output).as_posix(): path.read_text() for path in output.rglob("*") if path.is_file()}
        assert found == {"sub/a.txt": "a", "b.txt": "b"}
        assert not state.exists()
    assert (folder / "mine.txt").read_text() == "mine"


@cases(0.5)
@given(data=st.data())
def test_manifest(data):
    """What a manifest claims has the type that its readers count on, or is refused."""
    digest = {"bytes": 1, "xxh3_128": "0" * 32}
    manifest = {"made_by": "x", "recipe": {}, "source": {"name": "x"}, "dropped": [{"tensor": "x", "reason": "y"}],
                "verification": {}, "versions": {}, "files": {"a": digest}}  # fmt: skip
    manifest[data.draw(st.sampled_from(sorted(manifest)))] = data.draw(anything)
    with contextlib.suppress(TiedMoeError):
        found = check_manifest(manifest, "folder/tiedmoe_conversion.json")
        assert isinstance(found["source"].get("name"), str | None)
        assert all(isinstance(each["tensor"] + each["reason"], str) for each in found["dropped"])
        assert all(isinstance(each, dict) and ".." not in Path(name).parts for name, each in found["files"].items())
        assert isinstance(found["recipe"], dict | None)
        assert isinstance(found["verification"], dict)
