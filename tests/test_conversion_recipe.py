import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig

import tiedmoe_conversion
from tiedmoe_conversion import METHODS, ConversionError, ConversionRecipe
from tiedmoe_conversion.recipe_types import parse_size
from tiedmoe_conversion.recipes import shipped_recipes
from transformers_tiedmoe import tie_groups


def test_yaml_round_trip(tmp_path):
    recipe = ConversionRecipe(
        source="in", output="out", groups=[[2, 3], [4, 5, 6]], method="select", method_options={"layer": "last"}
    )
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert ConversionRecipe.from_yaml(tmp_path / "recipe.yaml") == recipe


def test_yaml_overrides_come_before_the_checks(tmp_path):
    (tmp_path / "recipe.yaml").write_text("output: out\ngroup_size: 0\n")
    recipe = ConversionRecipe.from_yaml(tmp_path / "recipe.yaml", source="in", group_size=4, method="average")
    assert (recipe.source, recipe.output, recipe.group_size) == ("in", "out", 4)


@pytest.mark.parametrize(
    "path", sorted(Path(tiedmoe_conversion.__file__).parent.glob("recipes/*.yaml")), ids=lambda p: p.stem
)
def test_shipped_recipes_are_recipes(path):
    recipe = ConversionRecipe.from_yaml(path)
    assert recipe.output == path.stem


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grup_size": 2}, "no field 'grup_size'; did you mean 'group_size'"),
        ({"method": "averge"}, "unknown method 'averge'; did you mean 'average'"),
        ({"method": "select", "method_options": {"lyer": 1}}, "no option 'lyer'; did you mean 'layer'"),
        ({"method": "union", "method_options": {"layer": 1}}, "method 'union' has no option 'layer'; it has none"),
        ({}, "method 'least_squares' needs calibration text; give calibration=FILE_OR_DATASET"),
        ({"group_size": 0}, "group_size=0; expected an integer of at least 1"),
        ({"group_size": "2"}, "group_size='2'; expected an integer"),
        ({"group_size": True}, "group_size=True"),
        ({"skip_first": -1}, "skip_first=-1; expected an integer of at least 0"),
        ({"groups": [2, 3]}, "expected lists of layer indices"),
        ({"groups": []}, "expected lists of layer indices"),
        ({"groups": [[2, 3], []]}, "groups[1]=(); expected lists of layer indices"),
        ({"groups": [[2, "3"]]}, "groups[0][1]='3'; expected lists of layer indices"),
        ({"groups": [[2, 3], [3, 4]]}, "layer 3 is in group 0 and in group 1"),
        ({"max_shard_size": "5 gigs"}, "max_shard_size='5 gigs'; expected a number and one of"),
        ({"max_shard_size": "0GB"}, "max_shard_size='0GB'"),
        ({"source": "a\0b"}, r"source='a\x00b'; expected a folder or a hub id"),
        ({"seed": 2**63}, "seed=9223372036854775808; expected an integer from 0, of 63 bits"),
        ({"budget": float("nan")}, "budget=nan; expected a fraction"),
        ({"budget": "0.5"}, "budget='0.5'; expected a fraction"),
        ({"max_loss": True}, "max_loss=True; expected nats"),
        ({"max_loss": math.inf}, "max_loss=inf; expected nats"),
        ({"budget": 0.5, "max_loss": 0.1}, "are both given; expected one of them"),
        ({"method": ["average"]}, "method=['average']; expected one of align, average"),
        ({"method_options": [1]}, "method_options=[1]; expected a mapping of names"),
        ({"then": [{"prefit": 3}]}, "then[0]=3; expected methods such as prefit"),
        ({"then": [{"prefit": {}, "align": {}}]}, "expected methods such as prefit"),
        ({"then": "union"}, "method 'union' makes a pool and refines none"),
        ({"pool_experts": True}, "pool_experts=True; expected a number such as 96"),
        ({"pool_experts": "1e999x"}, "pool_experts='1e999x'; expected a number such as 96"),
        ({"groups": [[2, 2]]}, "layer 2 is in group 0 and in group 0"),
        ({"source": ""}, "source=''; expected a folder or a hub id"),
        ({"output": None}, "output=None; expected a folder"),
        ({"revision": 12}, "revision=12; expected a branch"),
        ({"allow_pickle": "yes"}, "allow_pickle='yes'; expected true or false"),
    ],
)
def test_wrong_field(fields, message):
    with pytest.raises(ConversionError, match=re.escape(message)):
        ConversionRecipe.from_dict({"source": "in", "output": "out"} | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: [unclosed", "cannot read the recipe"),
        ("- source", "holds list; expected lines such as"),
        ("group_size: 2", "no source and no output"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nsource: *b", r"uses the alias \*a; write the value out"),
        ("groups: " + "[" * 10_000, "nests more than 32 deep"),
        ("then: " + "{a: " * 10_000, "nests more than 32 deep"),
        ("groups: [" + "1, " * 30_000 + "1]", "has more than 65536 bytes"),
        ("seed: " + "9" * 20_000, "Exceeds the limit"),
        ("seed: " + "1:" * 20_000 + "1", "a number of over 63 bits"),
        ("revision: 2020-13-45", "month must be in 1..12"),
        ("source: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("source: a\0b", "special characters are not allowed"),
        ("{[1]: 2}", "unhashable key"),
        ("", "holds NoneType; expected lines such as"),
    ],
)
def test_wrong_yaml(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConversionError, match=message):
        ConversionRecipe.from_yaml(path)


def test_yaml_that_is_no_utf8_or_no_file(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"source: \xff")
    for path in (tmp_path / "recipe.yaml", tmp_path, tmp_path / "missing.yaml", "a\0b.yaml"):
        with pytest.raises(ConversionError, match=r"cannot read the recipe .*expected a text file of YAML in UTF-8"):
            ConversionRecipe.from_yaml(path)


def test_paths_are_expanded_wherever_they_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    (tmp_path / "recipe.yaml").write_text("source: ~/in\noutput: ~/out\nmethod: average\nstatistics: ~/kept\n")
    recipe = ConversionRecipe.from_yaml(tmp_path / "recipe.yaml")
    assert (recipe.source, recipe.output, recipe.statistics) == ("/me/in", "/me/out", "/me/kept")


SOURCES = {
    "olmoe": OlmoeConfig(intermediate_size=1024),  # allenai/OLMoE-1B-7B-0924
    "mixtral": MixtralConfig(),  # mistralai/Mixtral-8x7B-v0.1
}


@pytest.mark.parametrize("described", shipped_recipes(), ids=lambda described: described["name"])
def test_shipped_recipes_name_the_parameters_that_come_out(described):
    config = SOURCES[described["name"].partition("-")[0]]
    recipe = ConversionRecipe.from_yaml(described["name"])
    groups = tie_groups(range(config.num_hidden_layers), recipe.group_size, recipe.skip_first, recipe.skip_last)
    layer = 3 * config.num_local_experts * config.hidden_size * config.intermediate_size
    with torch.device("meta"):
        before = AutoModelForCausalLM.from_config(config).num_parameters()
    after = before
    for p, group in enumerate(groups):
        pool = recipe.pool_num_experts(p, len(groups), config.num_local_experts, len(group))
        after -= len(group) * layer - pool * layer // config.num_local_experts
    if after == before:
        assert described["parameters"] == f"{before / 1e9:.1f} B, as before"
    else:
        assert described["parameters"] == f"{before / 1e9:.2f} B -> {after / 1e9:.2f} B ({after / before * 100:.0f} %)"


def test_yaml_holds_no_python(tmp_path):
    recipe = ConversionRecipe(source=Path("in"), output=Path("out"), groups=((0, 1),), method="average")
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["groups"] == [[0, 1]]


def test_parse_size():
    assert (parse_size("5GB"), parse_size(" 1.5kb "), parse_size(7)) == (5_000_000_000, 1500, 7)


def test_every_method_has_a_summary():
    assert all(method.summary.endswith(".") for method in METHODS.values())
