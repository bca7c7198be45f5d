"""`tiedmoe card`: valid metadata, an audit's results, text that others chose, and the upload to a local fake Hub."""

import base64
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoints import save_source, save_tied
from huggingface_hub import HfApi, ModelCard, ModelCardData, close_session, constants, hf_api
from transformers import AutoModelForCausalLM

from tiedmoe_cli.app import card as card_command
from tiedmoe_conversion import ConversionRecipe, convert, verify_folder
from transformers_tiedmoe import hub
from transformers_tiedmoe.audit import schema
from transformers_tiedmoe.cards import CardConfig, pick_model, write_card
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.manifest import MANIFEST

pytestmark = pytest.mark.xdist_group("cards")  # one worker makes the fixture once

EVIL = "a\n# Owned <img src=x onerror=alert(1)> [click](javascript:alert(1)) | ``` ---"


def make_audit(folder, names=("source", "tied"), domain="prose", data="text.txt", task="arc_easy", note="a note"):
    """An audit of models that were never run, with figures, and its folder."""
    quality = schema.Quality(
        loss={domain: schema.Interval(value=2.5, low=2.25, high=2.75)},
        perplexity={domain: 12.182494},
        tasks=[
            schema.Task(name=task, metric="acc", value=0.625, standard_error=0.0125, num_shots=5, num_samples=1000)
        ],
        prefill_tokens_per_second=None,
        decode_tokens_per_second=None,
        peak_memory_bytes=None,
        device="cpu",
    )
    models = [
        schema.ModelAudit(
            name=name, family="olmoe", architecture="X", routing="top_k", tying="untied", layers=[], quality=quality,
            notes=[note],
        )
        for name in names
    ]  # fmt: skip
    made = schema.Audit(
        date="2026-11-28T12:00:00+00:00", command="tiedmoe audit", settings={}, versions={}, machine={}, models=models,
        domains=[schema.Domain(name=domain, data=data, num_tokens=2048, num_blocks=4, block_size=512)],
    )  # fmt: skip
    (folder / "figures").mkdir(parents=True)
    (folder / "audit.json").write_text(made.model_dump_json())
    for name in ("2-loads.png", "pareto.png", "1-loads.png"):
        (folder / "figures" / name).write_bytes(name.encode())
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with `source`, an OLMoE with a card of its own, and `tied`, made of it."""
    folder = tmp_path_factory.mktemp("models")
    save_source(folder / "source")
    (folder / "source" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    convert(
        ConversionRecipe(
            source=str(folder / "source"),
            output=str(folder / "tied"),
            method="average",
            group_size=2,
            skip_first=1,
            skip_last=1,
        )
    )
    return folder


@pytest.fixture
def tied(models, tmp_path):
    return shutil.copytree(models / "tied", tmp_path / "tied")


def test_the_card_of_a_conversion_is_rendered_again_to_the_letter(tied):
    assert write_card(CardConfig(str(tied)))["card"] == (tied / "README.md").read_text()


def test_audit_gives_results_that_the_hub_reads(tied, tmp_path):
    """The model-index goes through huggingface_hub's classes and back; figures lie beside the card; hashes fit."""
    audit = make_audit(tmp_path / "audit")
    written = write_card(CardConfig(str(tied), audit=audit, output=str(tied)))
    assert written["files"] == ["README.md", "figures/loads.png", "figures/pareto.png"]
    assert (tied / "figures" / "loads.png").read_bytes() == b"2-loads.png"  # this model's, not the source's
    card = ModelCard.load(tied / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.model_name == "tied"
    found = {(each.dataset_type, each.metric_type): each.metric_value for each in card.data.eval_results}
    expected = {("text.txt", "loss"): 2.5, ("text.txt", "perplexity"): 12.1825, ("arc_easy", "acc"): 0.625}
    assert found == expected
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    (index,) = card.data.to_dict()["model-index"]
    assert index["results"][1]["dataset"]["args"] == {"num_few_shot": 5, "num_samples": 1000}
    assert "| **tied** |" in card.text
    assert "2.5000 (2.2500 to 2.7500)" in card.text
    assert "- a note" in card.text
    for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card.text):
        assert (tied / name).is_file()
    assert not verify_folder(str(tied))["hashes"]["edited_since"]
    again = write_card(CardConfig(str(tied), audit=audit, output=str(tied)))  # ours is replaced without being asked
    assert again == written


def test_a_model_without_files_of_ours_has_a_card_too(models, tmp_path):
    audit = make_audit(tmp_path / "audit")
    card = write_card(CardConfig(str(models / "source"), audit=audit))["card"]
    assert ModelCard(card).data.to_dict()["license"] == "apache-2.0"
    assert "tiedmoe" not in ModelCard(card).data.tags
    assert "A model of the family olmoe, 4 layers." in card
    assert "import transformers_tiedmoe" not in card
    assert "source's" not in card


def test_a_tied_model_that_was_trained_from_scratch(tmp_path):
    card = write_card(CardConfig(save_tied(tmp_path / "tied")))["card"]
    assert "Nothing beside its weights says how it was made." in card
    assert "- pool 0: 4 experts, read by layers 1, 2\n" in card
    assert "It names no licence" in card
    assert "has not been measured" in card


def test_a_card_of_somebody_else_is_not_replaced(tied):
    with (tied / "README.md").open("a") as card:
        card.write("mine")
    with pytest.raises(TiedMoeError, match=r"is not as we wrote it; .*overwrite"):
        write_card(CardConfig(str(tied), output=str(tied)))
    assert write_card(CardConfig(str(tied), output=str(tied), overwrite=True))["files"] == ["README.md"]
    assert "mine" not in (tied / "README.md").read_text()


def test_names_that_others_chose_are_text(tied, tmp_path):
    """Of models, texts, tasks and notes; in the body no Markdown and no HTML, in the metadata what the Hub takes."""
    audit = make_audit(tmp_path / "audit", ("source", EVIL), EVIL, EVIL, EVIL, EVIL)
    manifest = json.loads((tied / MANIFEST).read_text())
    manifest["source"] = {"name": EVIL, "commit": "`<b>", "headers_and_config_sha256": EVIL}
    manifest["conversion"]["methods"] = [[EVIL, EVIL]]
    manifest["versions"] = {"transformers-tiedmoe": EVIL}
    (tied / MANIFEST).write_text(json.dumps(manifest))
    card = ModelCard(write_card(CardConfig(str(tied), audit=audit, audited_as=EVIL))["card"])
    prose = card.text.partition("```")[0]
    assert "# Owned" not in re.sub(r"\\.", "", prose)
    assert not re.search(r"(?<!\\)<", prose)
    assert not re.search(r"(?<!\\)\](?=\(javascript)", prose)
    assert not re.search(r"^\| .*\| ``` ---", prose, re.MULTILINE)
    assert "<" not in card.text.partition("## Use it")[2].partition("The recipe")[0]
    assert card.data.base_model is None
    for each in card.data.eval_results:
        assert re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", each.dataset_type)  # what the Hub accepts
        assert "\n" not in each.dataset_name + each.metric_type


def test_a_manifest_of_another_form_is_refused(tied):
    manifest = json.loads((tied / MANIFEST).read_text())
    manifest["conversion"]["sizes"] = {"parameters_before": "<b>"}
    (tied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TiedMoeError, match=r"another form than we write, at conversion\.sizes"):
        write_card(CardConfig(str(tied)))


def test_audits_that_do_not_fit(tied, tmp_path):
    with pytest.raises(TiedMoeError, match=r"there is no .*audit\.json; expected a folder that `tiedmoe audit"):
        write_card(CardConfig(str(tied), audit=str(tmp_path)))
    audit = make_audit(tmp_path / "audit", ("a", "b"))
    with pytest.raises(TiedMoeError, match=r"knows no model 'tied', but \['a', 'b'\].*audited_as"):
        write_card(CardConfig(str(tied), audit=audit))
    (tmp_path / "audit" / "audit.json").write_text('{"version": 1}')
    with pytest.raises(TiedMoeError, match="is no audit of this version"):
        write_card(CardConfig(str(tied), audit=audit))


def test_models_are_found_by_the_last_part_of_their_name(tmp_path):
    folder = make_audit(tmp_path / "audit", ("runs/tied", "account/tied", "other/healed"))
    audit = schema.Audit.model_validate_json((Path(folder) / "audit.json").read_bytes())
    assert pick_model(audit, "account/tied").name == "account/tied"
    assert pick_model(audit, "healed").name == "other/healed"
    with pytest.raises(TiedMoeError, match="knows no model 'tied'"):  # which of the two?
        pick_model(audit, "tied")


def test_command_prints_the_card_or_says_where_it_is(tied, tmp_path):
    written, shown = card_command(CardConfig(str(tied)), None)
    assert shown == written["card"]
    _, shown = card_command(CardConfig(str(tied), output=str(tmp_path / "out")), None)
    assert shown == f"The card is in {tmp_path / 'out' / 'README.md'}."


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as an upload needs; `server.files` is what was committed."""

    def do_GET(self):
        self._answer(
            {"name": "account", "type": "user"} if "whoami" in self.path else {}, 404 - 204 * ("whoami" in self.path)
        )

    def do_HEAD(self):
        self._answer({}, 404)

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            paths = [each["path"] for each in json.loads(content)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{self.server.url}/account/tied/commit/{'0' * 40}", "commitOid": "0" * 40}
        elif "validate-yaml" in self.path:
            self.server.validated.append(json.loads(content)["content"])
            answer = {"errors": [], "warnings": []}
        else:
            answer = {"url": f"{self.server.url}/account/tied", "id": "account/tied"}
        self._answer(answer)

    def _answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        """Nothing."""


@pytest.fixture
def fake_hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.validated = f"http://127.0.0.1:{server.server_port}", {}, []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    close_session()  # the library's one client may hold connections to a server that has ended
    yield server
    close_session()
    server.shutdown()
    server.server_close()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_hf_upload_and_upload_folder_send_all_of_it(tied, tmp_path, fake_hub, monkeypatch):
    write_card(CardConfig(str(tied), audit=make_audit(tmp_path / "audit"), output=str(tied)))
    environment = {"HF_ENDPOINT": fake_hub.url, "HF_TOKEN": "hf_none", "HF_HOME": str(tmp_path / "home"),
                   "HF_HUB_DISABLE_XET": "1", "PATH": str(Path(sys.executable).parent)}  # fmt: skip
    subprocess.run(
        ["hf", "upload", "account/tied", str(tied)], env=environment, check=True, capture_output=True, timeout=120
    )
    assert fake_hub.files == contents(tied)
    assert set(fake_hub.validated) == {(tied / "README.md").read_text()}
    fake_hub.files.clear()
    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(fake_hub.url, token="hf_none"))
    assert hub.push_to_hub(tied, "account/tied", "upload").startswith(fake_hub.url)
    assert fake_hub.files == contents(tied)


def test_push_to_hub_of_a_model_sends_what_the_auto_classes_load(tied, tmp_path, fake_hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", fake_hub.url)
    monkeypatch.setattr(hf_api.api, "endpoint", fake_hub.url)
    # transformers 5.24 has an HfApi of its own, which keeps the address that it first saw
    monkeypatch.setattr("transformers.utils.hub._hf_api", HfApi(fake_hub.url), raising=False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake_hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    model = AutoModelForCausalLM.from_pretrained(tied)
    model.push_to_hub("account/tied", token="hf_none")
    assert hub.STUB_NAME in fake_hub.files
    for name, content in fake_hub.files.items():
        (tmp_path / name).write_bytes(content)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert all(tensor.equal(loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_file_is_neither_a_model_nor_a_folder_to_write_into(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(TiedMoeError, match="file is a file; expected the folder of a checkpoint"):
        write_card(CardConfig(model=str(tmp_path / "file")))
    save_source(tmp_path / "model")
    with pytest.raises(TiedMoeError, match=r"file cannot be made: File exists.*choose another one"):
        write_card(CardConfig(model=str(tmp_path / "model"), output=str(tmp_path / "file")))
