"""The upload of a finished checkpoint: through huggingface_hub, asked for before hours of work, and never in the way of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from conversions import save_source
from huggingface_hub.errors import LocalTokenNotFoundError

from tiedmoe_conversion import ConversionError, ConversionRecipe, convert, hub


class Api:
    """What `HfApi` is asked for, in order."""

    calls: list
    fails = ""

    def _call(self, name, **arguments):
        self.calls.append((name, arguments))
        if self.fails == name:
            raise LocalTokenNotFoundError("no token")
        return SimpleNamespace(commit_url="https://example.org/commit/1")

    def whoami(self):
        return self._call("whoami")

    def create_repo(self, repo_id, **arguments):
        return self._call("create_repo", repo_id=repo_id, **arguments)

    def upload_folder(self, **arguments):
        assert (Path(arguments["folder_path"]) / "model.safetensors").is_file()
        return self._call("upload_folder", **arguments)


@pytest.fixture
def api(monkeypatch):
    found = type("FakeApi", (Api,), {"calls": []})
    monkeypatch.setattr(hub, "HfApi", found)
    return found


def recipe(folder, **fields):
    save_source(folder / "source")
    fields = {"method": "average", "push_to_hub": "account/tied"} | fields
    return ConversionRecipe(source=str(folder / "source"), output=str(folder / "out"), **fields)


def test_uploads_the_whole_folder_when_it_is_complete(tmp_path, api):
    report = convert(recipe(tmp_path))
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert api.calls[1][1] == {"repo_id": "account/tied", "repo_type": "model", "exist_ok": True}
    assert report["pushed_to"] == "https://example.org/commit/1"
    assert (
        "account/tied" not in (tmp_path / "out" / "README.md").read_text()
    )  # whose account it was is not the recipe's


def test_without_a_login_nothing_begins(tmp_path, api):
    api.fails = "whoami"
    with pytest.raises(ConversionError, match=r"does not know who you are .*hf auth login"):
        convert(recipe(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_bad_name_is_refused_before_anything(tmp_path, api):
    with pytest.raises(ConversionError, match=r"push_to_hub='a//b'.*expected a name such as account/model"):
        convert(recipe(tmp_path, push_to_hub="a//b"))
    assert api.calls == []


def test_a_failed_upload_leaves_the_output_and_says_how_to_go_on(tmp_path, api):
    api.fails = "upload_folder"
    with pytest.raises(ConversionError, match=r"is complete, but uploading it .*hf upload account/tied"):
        convert(recipe(tmp_path))
    assert (tmp_path / "out" / "model.safetensors").is_file()
