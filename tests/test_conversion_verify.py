"""`verify_folder`, with and without the source: what it finds in a good folder, and each thing that can be wrong with
one.
"""

import json
import shutil

import pytest
import torch
from conversions import edit_config, edit_tensors, read_tensors, save_source
from safetensors.torch import load_file, save_file

from tiedmoe_conversion import ConversionError, ConversionRecipe, execute, make_plan, untie, verify_folder
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.files import file_digest

POOL = "model.expert_pools.0.down_proj"
SLOT_MAP = "model.layers.1.mlp.experts.slot_map"
MANIFEST = "tiedmoe_conversion.json"


def converted(folder, method, family="olmoe", **fields):
    save_source(folder / "source", family)
    recipe = {"source": str(folder / "source"), "output": str(folder / "out"), "method": method, **fields}
    execute(make_plan(ConversionRecipe(**{"skip_first": 1, "skip_last": 1, **recipe})))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A source and its union, in one file; do not change them."""
    folder = tmp_path_factory.mktemp("verify")
    converted(folder, "union")
    return folder


@pytest.fixture
def folder(tmp_path, pristine):
    """A copy of both to break, `source` and `out`."""
    for name in ("source", "out"):
        shutil.copytree(pristine / name, tmp_path / name)
    return tmp_path


def rewrite(folder, edit, manifest=True):
    """Replace the output's tensors and, as if converted so, the manifest's hash; or delete the manifest."""
    path = folder / "out" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in edit(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    edit_manifest(folder, lambda found: found["files"].update({path.name: file_digest(path)}))
    if not manifest:
        (folder / "out" / MANIFEST).unlink()


def edit_manifest(folder, edit):
    path = folder / "out" / MANIFEST
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


def change(name, edit):
    """An edit of one tensor."""

    def edited(tensors):
        tensors[name] = edit(tensors[name])
        return tensors

    return edited


def refuse(folder, message, source=True):
    with pytest.raises(ConversionError, match=message):
        verify_folder(folder / "out", str(folder / "source") if source else None)


def test_a_good_folder(pristine):
    report = verify_folder(pristine / "out", str(pristine / "source"))
    assert json.loads(json.dumps(report)) == report
    num_tensors = len(read_tensors(pristine / "out"))
    assert report["hashes"]["files"] == len(list((pristine / "out").iterdir())) - 1  # all but the manifest
    assert (report["tensors"], report["auto_class"], report["finite"]) == (num_tensors, True, True)
    assert report["config"] == {"pools": 2, "unreachable_experts": {}}
    assert report["not_checked"] == {}
    assert report["source"]["changed_tensors"] == []
    assert report["source"]["experts_relative_error"]["layers"] == {"1": 0.0, "4": 0.0}


def test_without_a_source(pristine):
    report = verify_folder(pristine / "out")
    assert report["not_checked"] == {"source": "no source was named"}
    assert "source" not in report


def test_a_method_that_loses_says_how_much(tmp_path):
    converted(tmp_path, "average")
    report = verify_folder(tmp_path / "out", str(tmp_path / "source"))
    errors = report["source"]["experts_relative_error"]["layers"]
    assert errors.keys() == {"1", "4"}
    assert all(0.3 < error < 2 for error in errors.values())  # random experts have nothing in common


def test_select_has_no_error_in_the_layer_that_it_keeps(tmp_path):
    converted(tmp_path, "select")
    layers = verify_folder(tmp_path / "out", str(tmp_path / "source"))["source"]["experts_relative_error"]["layers"]
    assert layers["1"] == 0.0
    assert layers["4"] > 0.3


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_families(tmp_path, family):
    converted(tmp_path, "union", family, skip_last=0)
    report = verify_folder(tmp_path / "out", str(tmp_path / "source"))
    assert set(report["source"]["experts_relative_error"]["layers"].values()) == {0.0}


def test_a_flipped_bit(folder):
    path = folder / "out" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuse(folder, r"model.safetensors is \{.*\}; expected \{.*it is damaged, copy or convert it again", source=False)


def test_a_missing_small_file(folder):
    (folder / "out" / "README.md").unlink()
    refuse(folder, r"README.md is missing; expected", source=False)


def test_weights_that_the_manifest_does_not_name(folder):
    edit_manifest(folder, lambda found: found["files"].pop("model.safetensors"))
    refuse(
        folder,
        r"has its weights in \['model.safetensors'\], which tiedmoe_conversion.json does not name",
        source=False,
    )


def test_a_manifest_without_files(folder):
    edit_manifest(folder, lambda found: found.pop("files"))
    refuse(folder, "names no files", source=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dropped", None), ("dropped", [None]), ("dropped", {}), ("dropped", [{"tensor": [1], "reason": ""}]),
        ("source", None), ("source", []), ("source", 3),
        ("source", {"headers_and_config_sha256": []}), ("recipe", [1]),
        ("verification", None), ("versions", []), ("made_by", 1), ("files", [1]), ("files", {"../a": {"bytes": 1}}),
        ("files", {"a": None}),
    ],
)  # fmt: skip
def test_a_manifest_that_claims_what_it_cannot(folder, field, value):
    edit_manifest(folder, lambda found: found.update({field: value}))
    message = rf"tiedmoe_conversion.json has \['{field}'\] of another form than a conversion writes"
    for source in (None, folder / "source"):
        with pytest.raises(TiedMoeError, match=message):
            verify_folder(folder / "out", source and str(source))


@pytest.mark.parametrize("row", [-1, 8, 2**40])
def test_slot_map_beyond_the_pool(folder, row):
    rewrite(folder, change(SLOT_MAP, lambda t: t.index_fill(0, torch.tensor([1]), row)))
    refuse(
        folder,
        rf"experts.slot_map names row {row} of model.expert_pools.0, which has 8 experts; expected 0 to 7",
        source=False,
    )


def test_experts_that_no_slot_reaches_are_named(folder):
    rewrite(folder, change(SLOT_MAP, lambda t: t.index_fill(0, torch.tensor([1, 3]), 0)))
    assert verify_folder(folder / "out")["config"]["unreachable_experts"] == {"0": [1, 3]}
    refuse(
        folder,
        r"expert 1 of model.layers.1.mlp.experts.gate_up_proj is not that of .*expected it, as the method loses "
        r"nothing",
    )


def test_a_weight_that_is_not_finite(folder):
    rewrite(folder, change(POOL, lambda t: t.index_fill(0, torch.tensor([5]), float("inf"))))
    refuse(folder, "'model.expert_pools.0.down_proj' holds infinity", source=False)


def test_a_missing_tensor(folder):
    rewrite(folder, lambda t: {name: tensor for name, tensor in t.items() if name != "model.norm.weight"})
    refuse(folder, r"is not what its config.json says: .*lacks 1 tensors .*model.norm.weight", source=False)


def test_a_tensor_of_another_shape(folder):
    rewrite(folder, change("lm_head.weight", lambda t: t[:90]))
    refuse(
        folder, r"lm_head\.weight has the shape \[90, 32\] in the files and \[96, 32\] by config\.json", source=False
    )


def test_config_of_other_groups(folder):
    edit_config(folder / "out", groups=[[1, 2], [4, 5]])
    edit_manifest(
        folder, lambda found: found["files"].update({"config.json": file_digest(folder / "out" / "config.json")})
    )
    refuse(folder, r"is not what its config.json says: ", source=False)


def test_a_copy_that_is_not_the_sources(folder):
    rewrite(folder, change("lm_head.weight", lambda t: t + 1))
    refuse(folder, r"\['lm_head.weight'\] are not those of .*nothing but experts is changed by a conversion")


def test_an_untied_experts_weight_that_is_not_the_sources(folder):
    rewrite(folder, change("model.layers.0.mlp.experts.down_proj", lambda t: t * 2))
    refuse(folder, r"\['model.layers.0.mlp.experts.down_proj'\] are not those of")


def test_a_pool_that_lost_something(folder):
    rewrite(folder, change(POOL, lambda t: t * 2))
    refuse(folder, r"expert 0 of model.layers.1.mlp.experts.down_proj is not that of")


def test_another_source(folder):
    save_source(folder / "other", num_local_experts=4, hidden_size=16)
    with pytest.raises(ConversionError, match=r"other has the hash .*name the source that it was made of"):
        verify_folder(folder / "out", str(folder / "other"))


def test_a_dropped_tensor_that_is_not_named(tmp_path):
    save_source(tmp_path / "source", "qwen3_moe")
    edit_tensors(tmp_path / "source", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    recipe = ConversionRecipe(source=str(tmp_path / "source"), output=str(tmp_path / "out"), method="select")
    execute(make_plan(recipe))
    verify_folder(tmp_path / "out", str(tmp_path / "source"))
    edit_manifest(tmp_path, lambda found: found["dropped"].clear())
    refuse(tmp_path, r"holds \['lm_head.weight'\], which the output neither has nor names as dropped")


def test_healed_since(folder):
    """Other weights and no manifest: says what it cannot know, and checks the rest."""
    rewrite(folder, lambda t: {n: v if v.dtype == torch.int64 else v * 1.01 for n, v in t.items()}, manifest=False)
    report = verify_folder(folder / "out", str(folder / "source"))
    assert report["not_checked"].keys() == {"hashes", "copies"}
    assert "may have been trained" in report["not_checked"]["copies"]
    assert len(report["source"]["changed_tensors"]) > 20
    assert 0 < report["source"]["experts_relative_error"]["layers"]["1"] < 0.2


def test_healed_into_the_same_folder(folder):
    rewrite(folder, lambda t: {n: v if v.dtype == torch.int64 else v * 1.01 for n, v in t.items()})
    edit_manifest(folder, lambda found: found["files"]["model.safetensors"].update(xxh3_128="0"))
    refuse(folder, r"if it was changed on purpose, such as by a healing, delete tiedmoe_conversion.json", source=False)


def test_an_untied_checkpoint(pristine, tmp_path):
    untie(pristine / "out", tmp_path / "out")
    refuse(tmp_path, "is a 'olmoe' checkpoint; expected a tiedmoe one", source=False)


def test_manifest_names_no_path_of_this_machine_and_no_time(pristine):
    text = (pristine / "out" / MANIFEST).read_text()
    assert str(pristine) not in text
    manifest = json.loads(text)
    assert manifest["recipe"]["method"] == "union"
    assert manifest["versions"].keys() == {"transformers-tiedmoe", "transformers", "torch"}
    assert manifest["verification"]["lossless"]["equal"] is True
    assert manifest["dropped"] == []


@pytest.mark.parametrize("file", ["README.md"])
def test_an_edited_card_is_told_and_no_damage(folder, file):
    path = folder / "out" / file
    path.write_text(path.read_text() + "\nOur own words.\n")
    assert verify_folder(folder / "out")["hashes"]["edited_since"] == [file]
    config = folder / "out" / "config.json"
    config.write_text(config.read_text() + " ")
    refuse(folder, r"config.json is .*; expected .* it is damaged", source=False)


@pytest.mark.parametrize(
    "file",
    ["modeling_evil.py", "pytorch_model.bin", "chat_template.jinja", "additional_chat_templates/x.jinja",
     "tokenizer.model",
     "model-00002-of-00002.safetensors", "sub/adapter_config.json", "preprocessor_config.json"],
)  # fmt: skip
def test_an_added_file_that_programs_load(folder, file):
    path = folder / "out" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    refuse(
        folder,
        rf"holds \['{file}'\], which tiedmoe_conversion.json does not name and programs would load",
        source=False,
    )


def test_what_nothing_vouches_for_is_told(folder):
    (folder / "out" / "notes.txt").write_text("mine")
    (folder / "out" / "images").mkdir()
    (folder / "out" / "images" / "a.png").write_text("x")
    assert verify_folder(folder / "out")["hashes"]["not_covered"] == ["images/a.png", "notes.txt"]


def test_a_manifest_whose_files_are_emptied(folder):
    edit_manifest(folder, lambda found: found["files"].clear())
    refuse(folder, r"tiedmoe_conversion.json names no files; expected their hashes", source=False)


def test_the_error_of_an_expert_says_what_it_means(folder):
    report = verify_folder(folder / "out", str(folder / "source"))
    assert "on random input" in report["source"]["experts_relative_error"]["means"]


def test_a_healed_folder_is_no_conversion_of_the_source(folder, tmp_path):
    """Its weights were trained: other copies are no damage, other files than those healed are."""
    edit_manifest(folder, lambda found: found.update(made_by="tiedmoe heal", verification={}))
    rewrite(folder, lambda t: {n: v if v.dtype == torch.int64 else v * 1.01 for n, v in t.items()})
    report = verify_folder(folder / "out", str(folder / "source"))
    assert "it was healed" in report["not_checked"]["copies"]
