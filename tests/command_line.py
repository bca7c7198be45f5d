"""`tiedmoe` run in this process, and what its commands are run on."""

import pytest
from checkpoints import make_text, save_source, save_tied
from typer.testing import CliRunner

from tiedmoe_cli import app as cli


@pytest.fixture(scope="module", name="app")
def app_fixture():
    return cli.build_app()


@pytest.fixture(scope="module", name="source")
def source_fixture(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module", name="tied")
def tied_fixture(tmp_path_factory):
    return save_tied(tmp_path_factory.mktemp("tied"))


@pytest.fixture(name="text")
def text_fixture(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_text())
    return str(path)


@pytest.fixture(name="tiedmoe")
def tiedmoe_fixture(app):
    """Run a command in this process; returns the result, whose stdout and stderr are apart."""

    def invoke(*arguments, status=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
        return result

    return invoke
