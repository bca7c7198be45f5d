"""`tiedmoe audit`, from models on disk to its folder: what that holds, what a kill leaves, what bad input gets."""

import json
import re
import shutil
import sys
import types

import pytest
import torch
from checkpoints import TINY, make_text, make_tokenizer, save_source, save_tied
from test_conversion_fp8 import save_fp8
from transformers import CLIPConfig, LlamaConfig, LlamaForCausalLM

from tiedmoe_conversion import ConversionRecipe, convert
from tiedmoe_conversion.suggested import tied_by
from transformers_tiedmoe.audit import run, subject
from transformers_tiedmoe.audit.config import AuditConfig
from transformers_tiedmoe.audit.run import audit, describe_tying
from transformers_tiedmoe.audit.schema import Audit
from transformers_tiedmoe.audit.subject import open_subject
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.training.data import perplexity

pytestmark = pytest.mark.xdist_group("audit_run")  # one worker makes the fixture once

SERVING = {"context": 32, "train_block_size": 16}
QUICK = {"num_tokens": 128, "block_size": 16, "batch_size": 4, "strategy": False, **SERVING}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_source(folder / "source")
    convert(ConversionRecipe(str(folder / "source"), str(folder / "tied"), groups=[[1, 2]], method="union"))
    torch.manual_seed(0)
    dense = {name: value for name, value in TINY.items() if "expert" not in name}
    LlamaForCausalLM(LlamaConfig(**dense)).save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(make_text())
    (folder / "other.txt").write_text(make_text()[::-1])
    return folder


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Drawing takes most of the time; `found`, of the module, has them."""
    monkeypatch.setattr(run.report, "write", lambda found, folder: None)


def config(models, output, *names, **fields):
    names = names or ("source",)
    texts = [f"words={models / 'text.txt'},{models / 'other.txt'}"]
    return AuditConfig(
        models=[str(models / name) for name in names], **{"data": texts, "output": str(output), **QUICK, **fields}
    )


@pytest.fixture(scope="module")
def found(models, tmp_path_factory):
    """A tied model with its source, and a dense one."""
    output = tmp_path_factory.mktemp("audit") / "out"
    told = []
    result = audit(
        config(models, output, "tied", "dense", source=str(models / "source")), lambda *now: told.append(now)
    )
    return result, output, told


def test_the_folder_holds_what_is_returned(found, models):
    result, output, _ = found
    text = (output / "audit.json").read_text()
    assert Audit.model_validate_json(text).model_dump(mode="json") == json.loads(text) == result
    assert {"audit.json", "report.html", "report.md", "figures"} == {path.name for path in output.iterdir()}
    for path in output.rglob("*"):
        assert path.is_dir() or str(models).encode() not in path.read_bytes(), path
    assert not [path for path in output.parent.iterdir() if path != output]


def test_every_model_has_its_sections(found):
    result, _, _ = found
    assert [model["name"] for model in result["models"]] == ["source", "tied", "dense"]
    source, tied, dense = result["models"]
    assert source["tying"] == "untied"
    assert tied["tying"] == "2 of 4 layers with experts read 1 pool: layers 1 to 2"
    for model in (source, tied):
        assert all(model[name] for name in ("active", "memory", "stability", "quality"))
    agreement = [layer["source_agreement"] for layer in tied["stability"]["layers"]]
    assert [each["value"] for each in agreement] == [1] * 4  # a union is its source
    assert all(layer["source_agreement"] is None for layer in source["stability"]["layers"])
    assert dense["stability"] is None
    assert dense["memory"]
    assert dense["quality"]["loss"].keys() == {"words", "other"}
    assert dense["active"]["layers"] == []
    assert any("no experts" in note for note in dense["notes"])
    assert [(each["name"], each["data"], each["num_blocks"]) for each in result["domains"]] == [
        ("words", "text.txt", 8),
        ("other", "other.txt", 8),
    ]


def test_it_says_how_far_it_is(found):
    _, _, told = found
    shares = [done / total for done, total, _ in told]
    assert shares == sorted(shares)
    assert any(what.startswith("tied: routing") for _, _, what in told)


def test_the_command_in_it_has_names_instead_of_paths(found):
    command = found[0]["command"]
    assert command.startswith("tiedmoe audit tied dense --data words=text.txt,other=other.txt --source source ")
    assert "--no-strategy" in command
    assert "--num-tokens 128" in command


def timeless(result):
    """Without what a clock or a machine decides."""
    text = json.dumps(result)
    result = json.loads(text)
    del result["date"], result["pareto"]
    for model in result["models"]:
        for name in list(model["quality"]):
            if re.search("second|peak", name):
                del model["quality"][name]
    return result


def test_a_killed_audit_goes_on_and_gives_the_same(found, models, tmp_path, monkeypatch):
    asked = config(models, tmp_path / "out", "tied", "dense", source=str(models / "source"))
    recorded, original = [], run.record

    def record(model, *args, **kwargs):
        if len(recorded) == 3:
            raise KeyboardInterrupt
        recorded.append(type(model).__name__)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(run, "record", record)
    with pytest.raises(KeyboardInterrupt):
        audit(asked)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(run, "record", original)
    loaded = []
    monkeypatch.setattr(subject, "load_model", lambda path, *args: loaded.append(path) or original_load(path, *args))
    result = audit(asked)
    assert timeless(result) == timeless(found[0])
    assert loaded == [str(models / "tied"), str(models / "dense")]  # all of the source was kept
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


original_load = subject.load_model


def test_a_model_that_does_not_fit_into_memory(models, tmp_path, monkeypatch):
    plain = audit(config(models, tmp_path / "plain", "tied"))["models"][0]
    free = open_subject(str(models / "tied")).weight_bytes * 0.7
    memory = types.SimpleNamespace(available=free, total=free)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    result = audit(config(models, tmp_path / "out", "tied", strategy=True))["models"][0]
    assert result["stability"] == plain["stability"]
    assert result["active"] == plain["active"]
    assert result["strategy"] is None
    assert any("read from the disk" in note for note in result["notes"])
    assert any("layer strategy was left out" in note for note in result["notes"])


def test_memory_only_reads_no_weights_and_writes_nothing_unasked(models, tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "load_model", None)
    config = AuditConfig(models=[str(models / "tied"), str(models / "dense")], memory_only=True, **SERVING)
    result = audit(config)
    assert all(model["memory"]["parameters"]["total"] for model in result["models"])
    assert result["models"][0]["quality"] is None
    again = audit(AuditConfig(models=config.models, memory_only=True, output=str(tmp_path / "out"), **SERVING))
    assert (
        {**again, "date": ""}
        == {**result, "date": ""}
        == {**json.loads((tmp_path / "out" / "audit.json").read_text()), "date": ""}
    )


def test_training_at_a_precision(models):
    """Weights of a step on one GPU: as many bytes a parameter as the precision says."""
    for precision, width in (("float32", 4), ("bfloat16", 2), ("mixed", 4)):
        asked = AuditConfig(models=[str(models / "source")], memory_only=True, precision=precision, **SERVING)
        (model,) = audit(asked)["models"]
        step = next(each for each in model["memory"]["training"] if each["strategy"] == "one")
        assert step["precision"] == precision
        assert step["gradient_bytes"] == width * model["memory"]["parameters"]["total"]["unique"]
        assert ("--precision" in asked.command()) == (precision != "mixed")


def test_suggested_plans_are_converted_and_measured(models, tmp_path):
    """With --calibration: what a plan is measured to add is the loss of the model that its recipe makes."""
    fields = {"strategy": True, "calibration": str(models / "other.txt"), "calibration_tokens": 128}
    asked, made = config(models, tmp_path / "out", **fields), {}

    def keep(recipe, **more):
        assert more == {
            "source": str(models / "source"),
            "calibration": fields["calibration"],
            "calibration_tokens": 128,
        }
        return made.setdefault(json.dumps(recipe), tied_by(recipe, **more))

    (model,) = audit(asked, convert=keep)["models"]
    plans = model["strategy"]["plans"]
    assert [plan["expert_share"] for plan in plans] == [0.75, 0.5]
    blocks = run._read_texts(asked, [open_subject(str(models / "source"))])["source"]
    for plan in plans:
        tied = made[json.dumps(plan["recipe"])]
        added = [
            perplexity(tied, rows)["loss"] - model["quality"]["loss"][name]["value"] for name, rows in blocks.items()
        ]
        assert plan["measured_loss_increase"] == pytest.approx(sum(added) / 2, abs=1e-5)


# Bad input


def test_too_little_text(models, tmp_path):
    (tmp_path / "short.txt").write_text("the cat sat")
    with pytest.raises(TiedMoeError, match=r"short\.txt has 3 tokens, but block_size=16; expected a block at least"):
        audit(config(models, tmp_path / "out", data=[str(tmp_path / "short.txt")]))
    assert not (tmp_path / "out").exists()


def test_less_text_than_a_batch_has_no_intervals(models, tmp_path):
    (tmp_path / "short.txt").write_text(make_text(3))
    result = audit(config(models, tmp_path / "out", data=[str(tmp_path / "short.txt")], block_size=32))
    assert result["domains"][0]["num_blocks"] == 1
    (model,) = result["models"]
    assert model["stability"]["layers"][0]["load_cv"]["value"] > 0
    assert model["stability"]["layers"][0]["load_cv"]["low"] is None


def test_a_tokenizer_that_does_not_fit(models, tmp_path):
    folder = save_source(tmp_path / "small", vocab_size=100)
    with pytest.raises(TiedMoeError, match=r"its tokenizer gives token \d+, but its vocab_size is 100"):
        audit(config(models, tmp_path / "out", folder))


def test_no_tokenizer(models, tmp_path):
    folder = tmp_path / "source"
    save_source(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(TiedMoeError, match="has no tokenizer that knows any text"):
        audit(config(models, tmp_path / "out", folder))


def test_an_output_that_cannot_be_written(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TiedMoeError, match=r"cannot be made: .*file is a file"):
        audit(config(models, tmp_path / "file" / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(TiedMoeError, match="is not empty"):
        audit(config(models, tmp_path / "full"))
    with pytest.raises(TiedMoeError, match="lies in the model"):
        audit(config(models, models / "source" / "out"))


def test_a_full_disk(models, small_disk):
    with pytest.raises(TiedMoeError, match="is full; what is done is kept"):
        audit(config(models, small_disk / "out", num_tokens=4096))


def test_models_of_different_vocabularies(models, tmp_path):
    """Each reads the text in its own tokens; losses of a token are not compared."""
    other = tmp_path / "other"
    save_source(other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    tokenizer["model"]["vocab"] = dict(zip(names, [0, *range(2, len(names)), 1]))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = audit(config(models, tmp_path / "out", "tied", other, source=str(models / "source")))
    notes = result["models"][2]["notes"]
    assert any("its tokens are not those of source" in note for note in notes)
    assert any("were not compared with the source's" in note for note in notes)
    assert result["models"][2]["quality"]["loss"]
    compared = {point["model"] for point in result["pareto"] if point["measure"].startswith("loss")}
    assert compared == {"source", "tied"}
    assert {point["model"] for point in result["pareto"] if point["measure"].startswith("bits")} == {
        "source", "tied", "other"
    }  # fmt: skip
    assert result["models"][2]["stability"]["layers"][0]["source_agreement"] is None


def test_a_quantised_model(models, tmp_path):
    """Measured as transformers loads it: here, without a GPU, dequantised."""
    save_fp8(tmp_path / "fp8", vocab_size=320)
    make_tokenizer().save_pretrained(tmp_path / "fp8")
    (model,) = audit(config(models, tmp_path / "out", tmp_path / "fp8"))["models"]
    assert any("its weights are quantised (fp8)" in note for note in model["notes"])
    assert "F8_E4M3" in model["memory"]["stored_dtypes"]
    assert all(model[name] for name in ("active", "stability", "quality"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": []}, "models is empty"),
        ({"models": ["a", "a"]}, "models has a twice"),
        ({"output": None}, "no folder to write into"),
        ({"data": []}, "no text to run the models on"),
        ({"memory_only": True}, "leave it off, or leave data off"),
        ({"num_tokens": 0}, "num_tokens=0; expected an integer of at least 1"),
        ({"data": ["a=x.txt,a=y.txt"]}, "two texts 'a': x.txt and y.txt"),
        ({"data": ["x.txt,"]}, "data has ''"),
        ({"calibration": "t.txt", "calibration_tokens": 0}, "calibration_tokens=0; expected an integer of at least 1"),
        ({"calibration": "t.txt", "strategy": False}, "calibration measures the plans that strategy suggests"),
        ({"lm_eval_limit": 0}, "lm_eval_limit=0; expected an integer of at least 1"),
        ({"precision": "fp16"}, r"precision='fp16'; expected one of \['float32', 'bfloat16', 'mixed'\]"),
        ({"gpus": ["H101"]}, "gpus has 'H101'; expected some of"),
        ({"dtypes": ["int8"]}, "dtypes has 'int8'; expected floating dtypes"),
        ({"context": 0}, "context=0; expected an integer of at least 1"),
        ({"data": ["a|b=x.txt"]}, r"no '\|' in the name"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(TiedMoeError, match=message):
        audit(AuditConfig(**{"models": ["m"], "data": ["t.txt"], "output": "out", **fields}))


def test_tasks_without_the_harness(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"tasks \(arc_easy\) need lm-evaluation-harness"):
        audit(config(models, tmp_path / "out", lm_eval="arc_easy"))
    assert not list(tmp_path.iterdir())


def test_models_and_data_that_do_not_exist(models, tmp_path):
    with pytest.raises(TiedMoeError, match="nothing-here does not exist; expected the folder of a checkpoint"):
        audit(config(models, tmp_path / "out", "nothing-here"))
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nothing\.txt"):
        audit(config(models, tmp_path / "out", data=[str(tmp_path / "nothing.txt")]))
    nothing = {"strategy": True, "calibration": str(tmp_path / "nothing.txt")}
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nothing\.txt"):  # before the work
        audit(config(models, tmp_path / "out", **nothing), convert=lambda *args, **fields: None)
    CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(TiedMoeError, match="clip is of model type clip, of which transformers has no causal"):
        audit(config(models, tmp_path / "out", tmp_path / "clip"))
    with pytest.raises(TiedMoeError, match="knows 64 positions; lower it"):
        audit(config(models, tmp_path / "out", block_size=128))


def test_two_models_of_one_name(models, tmp_path):
    """Told apart by the folders they are in, as many as it takes."""
    save_tied(tmp_path / "mine" / "source")
    result = audit(AuditConfig(models=[str(models / "source"), str(tmp_path / "mine" / "source")], memory_only=True))
    assert [model["name"] for model in result["models"]] == [f"{models.name}/source", "mine/source"]
    for run_name in ("one", "two"):
        shutil.copytree(tmp_path / "mine", tmp_path / run_name / "mine")
    paths = [str(tmp_path / name / "mine" / "source") for name in ("one", "two")]
    result = audit(AuditConfig(models=[str(tmp_path / "mine" / "source"), *paths], memory_only=True))
    names = [model["name"] for model in result["models"]]
    assert names[1:] == ["one/mine/source", "two/mine/source"]
    assert names[0].endswith("/mine/source")
    with pytest.raises(TiedMoeError, match=r"source and .*source are the same model; give it once"):
        audit(AuditConfig(models=[paths[0], f"{tmp_path}/one/../one/mine/source"], memory_only=True))


def test_tying_in_words(models):
    layers = open_subject(str(models / "tied")).layers
    assert describe_tying(layers[1:2]) == "1 of 1 layers with experts read 1 pool: layers 1"
    assert describe_tying(open_subject(str(models / "dense")).layers) == "no experts"
