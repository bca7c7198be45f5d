"""Flags that are made of a dataclass's fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import typer
from typer.testing import CliRunner

from tiedmoe_cli.flags import FileOption, with_flags


def run_flags(config_class, *arguments, **options):
    """What `with_flags` hands over for these arguments."""
    calls = []
    app = typer.Typer()
    app.command()(with_flags(lambda *call: calls.append(call), config_class, **options))
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return calls[0]


@dataclass
class Example:
    name: str
    count: int = 3
    share: float | None = None
    use: bool = True
    maybe: bool | None = None
    layers: Sequence[int] | None = None
    lists: list[list[int]] = field(default_factory=list)
    table: Mapping[str, Any] = field(default_factory=dict)


def test_with_flags_hands_over_what_was_given_with_its_type():
    assert run_flags(Example, "x", arguments=("name",)) == ({"name": "x"}, False, None)
    given, as_json, _ = run_flags(
        Example,
        *["--name", "y", "--count", "3", "--share", "1e-3", "--no-use", "--no-maybe", "--layers", "0,2"],
        *["--lists", "[[0, 1], [2]]", "--table", "a: 1", "--json"],
        arguments=(),
    )
    assert given == {
        "name": "y",
        "count": 3,  # the default, but given
        "share": 0.001,
        "use": False,
        "maybe": False,
        "layers": [0, 2],
        "lists": [[0, 1], [2]],
        "table": {"a": 1},
    }
    assert as_json


def test_with_flags_requires_nothing_where_a_recipe_may_give_it(tmp_path):
    recipe = FileOption("recipe", "a file")
    assert run_flags(Example, arguments=("name",), file_option=recipe) == ({}, False, None)
    assert run_flags(Example, "--recipe", "a.yaml", arguments=(), file_option=recipe)[2] == "a.yaml"


def test_with_flags_expands_the_home_folder(monkeypatch):
    """`--name ~/x` is the shell's to expand, `--name=~/x` and a quoted one are ours."""
    monkeypatch.setenv("HOME", "/me")
    given, _, file = run_flags(Example, "--name=~/x", "--recipe=~/r.yaml", file_option=FileOption("recipe", "a file"))
    assert (given, file) == ({"name": "/me/x"}, "/me/r.yaml")
    assert run_flags(Example, "a~b", arguments=("name",))[0] == {"name": "a~b"}
