"""What a checkpoint carries beside its weights (stub, card, manifest), and its upload, checked before the work."""

import lzma
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conversions import save_source
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from transformers import AutoConfig

import transformers_tiedmoe
from tiedmoe_conversion import ConversionRecipe, convert
from tiedmoe_demo import DemoConfig
from tiedmoe_demo.train_source import source_config
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM, __version__, hub, model_card
from transformers_tiedmoe.cards import CardConfig, write_card
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.files import file_digest
from transformers_tiedmoe.manifest import MANIFEST, read_manifest, save_manifest

CARDS = Path(__file__).parents[1] / "model_cards"


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
    with pytest.raises(TiedMoeError, match=r"does not know who you are .*hf auth login"):
        convert(recipe(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_bad_name_is_refused_before_anything(tmp_path, api):
    with pytest.raises(TiedMoeError, match=r"push_to_hub='a//b'.*expected a name such as account/model"):
        convert(recipe(tmp_path, push_to_hub="a//b"))
    assert api.calls == []


def test_a_failed_upload_leaves_the_output_and_says_how_to_go_on(tmp_path, api):
    api.fails = "upload_folder"
    with pytest.raises(TiedMoeError, match=r"is complete, but uploading it .*hf upload account/tied"):
        convert(recipe(tmp_path))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_card_shows_names_as_plain_text(tmp_path):
    """A name in Markdown, HTML, or with a fence of its own stays what it is: text on one line."""
    save_source(tmp_path / "source")
    evil = "out\n# Owned <img src=x onerror=alert(1)> [click](javascript:alert(1)) ```"
    (tmp_path / "source" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: 'javascript:alert(1)'\n---\n# Source\n"
    )
    convert(ConversionRecipe(source=str(tmp_path / "source"), output=str(tmp_path / evil), method="average"))
    text = (tmp_path / evil / "README.md").read_text()
    body = text.split("---\n", 2)[2]
    prose = body[: body.index("## Use it")]
    assert "\n# Owned" not in text
    assert "<img" not in prose.replace(r"\<", "")
    assert "](javascript:" not in prose.replace(r"\]", "")
    assert "javascript" not in text.split("---\n", 2)[1]
    assert ModelCard.load(tmp_path / evil / "README.md").data.license_name == "mine"
    (fence,) = re.findall(r"^(`{3,})yaml$", body, re.MULTILINE)
    recipe = yaml.safe_load(body.split(f"{fence}yaml\n")[1].split(f"\n{fence}\n")[0])
    assert recipe["output"] == evil


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"license": "apache-2.0"}, {"license": "apache-2.0"}),
        ({"license": "other", "license_name": "x", "license_link": "LICENSE.md"},) * 2,
        ({"license": "other", "license_link": "https://example.org/a?b"},) * 2,
        ({"license": "other", "license_link": "data:text/html,x"}, {"license": "other"}),
        ({"license": "<b>mine</b>"}, {}),
        ({"license": ["mit", "apache-2.0"]}, {}),
        ({}, {}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_licence_is_a_name_and_a_link_to_a_page_or_a_file(tmp_path, fields, kept):
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n# Source\n")
    assert model_card.read_licence(str(tmp_path)) == kept


def test_stub_refuses_a_package_older_than_what_wrote_the_checkpoint(tmp_path, monkeypatch):
    hub.write_stub(tmp_path)
    stub = (tmp_path / hub.STUB_NAME).read_text()
    exec(compile(stub, "stub", "exec"), {})
    monkeypatch.setattr(transformers_tiedmoe, "__version__", "0.0.9")
    with pytest.raises(ImportError, match=rf"written by transformers-tiedmoe {__version__}, but 0\.0\.9 is installed"):
        exec(compile(stub, "stub", "exec"), {})


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", '"x"'])
def test_manifest_of_another_type_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(TiedMoeError, match=r"expected the JSON object that a conversion wrote"):
        read_manifest(str(tmp_path))


HEALING = {
    "data": "text.txt", "teacher": None, "teacher_weight": 0.5, "steps": 20, "tokens": 5120, "learning_rate": 1e-4,
    "parameters": 72128,
    "before": {"loss": 3.5, "perplexity": 33.1, "tokens": 512},
    "after": {"loss": 3.25, "perplexity": 25.8, "tokens": 512},
}  # fmt: skip


def test_healed_folder_says_where_it_comes_from(tmp_path):
    """Source, licence and recipe of the conversion, what healing gave, and a hash of every file; no path of this
    machine.
    """
    save_source(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n# Source\n")
    convert(ConversionRecipe(source=str(tmp_path / "source"), output=str(tmp_path / "tied"), method="average"))
    made = read_manifest(str(tmp_path / "tied"))
    healed = tmp_path / "healed"
    shutil.copytree(tmp_path / "tied", healed, ignore=shutil.ignore_patterns("README.md", MANIFEST))
    text = tmp_path / "text.txt"
    text.write_text("text")
    config = AutoConfig.from_pretrained(healed)
    healing = {**HEALING, "data": str(text)}
    model_card.save_healed(healed, "healed", str(tmp_path / "tied"), config, healing, {"config.json": {"bytes": 1}})
    manifest, card = read_manifest(str(healed)), ModelCard.load(healed / "README.md")
    assert manifest["made_by"] == "tiedmoe heal"
    assert (manifest["source"], manifest["recipe"]) == (made["source"], made["recipe"])
    assert manifest["healing"] == HEALING
    assert manifest["files"] == {"README.md": file_digest(healed / "README.md"), "config.json": {"bytes": 1}}
    assert card.data.license == "mit"
    for part in (
        "# healed\n",
        "from tied.",
        "20 steps, 5,120 tokens of text.txt",
        "| 3.5000 | 3.2500 |",
        "- pool 0: ",
    ):
        assert part in card.text
    assert str(tmp_path) not in card.content
    assert "has not been trained since" not in card.text


class Vocabulary:
    """What the source's config takes from the demo's tokenizer."""

    pad_token_id = bos_token_id = eos_token_id = 0

    def __len__(self):
        return DemoConfig().vocab_size


def test_the_card_of_the_demo_is_what_the_demo_writes(tmp_path):
    """`model_cards/tiedmoe-demo.md` is `demo/healed/README.md`: rendered again from its six figures, the demo's
    settings and its audit.
    """
    settings = DemoConfig()
    card = (CARDS / "tiedmoe-demo.md").read_text()
    family = source_config(settings, Vocabulary())
    fields = {name: getattr(settings, name) for name in ("group_size", "skip_first", "skip_last")}
    config = TiedMoeConfig.from_family(family, **fields)
    with torch.device("meta"):
        parameters = TiedMoeForCausalLM(config).num_parameters()
    text = {"calibration": "austen.txt.xz", "calibration_tokens": settings.calibration_tokens, "measure": False}
    recipe = ConversionRecipe(
        source="source", output="tied", method=settings.method, seed=settings.seed, **fields, **text,
        calibration_block_size=settings.block_size,
    )  # fmt: skip
    (tmp_path / "tied").mkdir()
    save_manifest(tmp_path / "tied", "tiedmoe convert", {"recipe": recipe.to_dict(), "source": {"name": "source"}}, {})
    (tokens,) = re.findall(r"Held out, ([\d,]+) tokens", card)
    losses, perplexities = (
        re.findall(rf"\| {name}[^|]*\| ([\d.]+) \| ([\d.]+) \|", card)[0] for name in ("loss", "perplexity")
    )
    assert all(abs(math.exp(float(a)) - float(b)) < 0.01 for a, b in zip(losses, perplexities))
    before, after = (
        {"loss": float(a), "perplexity": float(b), "tokens": int(tokens.replace(",", ""))}
        for a, b in zip(losses, perplexities)
    )
    healing = {
        "data": settings.text, "teacher": "source", "teacher_weight": 0.5, "steps": settings.heal_steps,
        "tokens": settings.heal_steps * settings.batch_size * settings.block_size, "parameters": parameters,
        "learning_rate": settings.heal_learning_rate, "before": before, "after": after,
    }  # fmt: skip
    healed = tmp_path / "healed"
    healed.mkdir()
    config.save_pretrained(healed)
    model_card.save_healed(healed, "healed", str(tmp_path / "tied"), config, healing, {})
    shutil.copytree(CARDS / "figures", tmp_path / "audit" / "figures")
    for name in ("loads", "active"):  # of one model: in the audit with its number, the third
        if (path := tmp_path / "audit" / "figures" / f"{name}.png").exists():
            path.rename(path.with_name(f"3-{name}.png"))
    audit = lzma.decompress((CARDS / "tiedmoe-demo-audit.json.xz").read_bytes())
    (tmp_path / "audit" / "audit.json").write_bytes(audit)
    written = write_card(CardConfig(str(healed), audit=str(tmp_path / "audit"), output=str(healed)))
    assert {f"figures/{path.name}" for path in (CARDS / "figures").iterdir()} == {*written["files"]} - {"README.md"}
    versions = re.compile(r"\(made with .*\)|, [\d.]+ or newer")
    assert versions.sub("", card) == versions.sub("", (healed / "README.md").read_text())
