from pathlib import Path

import pytest
import yaml

import tiedmoe_conversion
from tiedmoe_conversion import METHODS, ConversionError, ConversionRecipe
from tiedmoe_conversion.recipe import parse_size


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
        ({"groups": [[2, 3], []]}, "group 1 is empty"),
        ({"groups": [[2, "3"]]}, "group 0 names layer '3'"),
        ({"groups": [[2, 3], [3, 4]]}, "layer 3 is in group 0 and in group 1"),
        ({"max_shard_size": "5 gigs"}, "max_shard_size='5 gigs'; expected a number and one of"),
        ({"max_shard_size": "0GB"}, "max_shard_size='0GB'"),
        ({"source": ""}, "source=''; expected a folder or a hub id"),
        ({"output": None}, "output=None; expected a folder"),
        ({"revision": 12}, "revision=12; expected a branch"),
        ({"allow_pickle": "yes"}, "allow_pickle='yes'; expected true or false"),
    ],
)
def test_wrong_field(fields, message):
    with pytest.raises(ConversionError, match=message.replace("[", r"\[")):
        ConversionRecipe.from_dict({"source": "in", "output": "out"} | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: [unclosed", "cannot read the recipe"),
        ("- source", "holds list; expected lines such as"),
        ("group_size: 2", "no source and no output"),
    ],
)
def test_wrong_yaml(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConversionError, match=message):
        ConversionRecipe.from_yaml(path)


def test_yaml_holds_no_python(tmp_path):
    recipe = ConversionRecipe(source=Path("in"), output=Path("out"), groups=((0, 1),), method="average")
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["groups"] == [[0, 1]]


def test_parse_size():
    assert (parse_size("5GB"), parse_size(" 1.5kb "), parse_size(7)) == (5_000_000_000, 1500, 7)


def test_every_method_has_a_summary():
    assert all(method.summary.endswith(".") for method in METHODS.values())
