import dataclasses
import gc
import importlib
import json
import weakref

import pytest
import torch
import yaml
from checkpoints import make_text, make_tokenizer
from conversions import (
    FAMILIES,
    assert_equal_tensors,
    edit_tensors,
    read_tensors,
    save_source,
    save_tokenizer,
    unchanged_disk,
)
from huggingface_hub import ModelCard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiedmoe_conversion import METHODS, ConversionRecipe, execute, make_plan, memory, verify
from tiedmoe_conversion.checkpoint.headers import read_header
from tiedmoe_conversion.methods import Pool
from transformers_tiedmoe.families import expert_layers

execute_module = importlib.import_module("tiedmoe_conversion.run")  # the package's name is the function
LAYOUTS = pytest.mark.parametrize("original", [True, False], ids=["per_expert", "fused"])
# Every family as it is on the Hub; the fused layout where it differs most from that.
SOURCES = pytest.mark.parametrize(
    ("family", "original"), [*((family, True) for family in FAMILIES), ("mixtral", False), ("deepseek_v3", False)]
)


def convert(source, output, **fields):
    fields = {"skip_first": 1, "skip_last": 0, "group_size": 2, "method": "average"} | fields
    plan = make_plan(ConversionRecipe(source=str(source), output=str(output), **fields))
    return plan, execute(plan)


def expected_tensors(model, groups, pool):
    """The state dict of the tied model, made by hand: `pool(tensors of a group's layers)` makes a pool's tensor."""
    state = {k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    paths = expert_layers(model)
    for p, group in enumerate(groups):
        names = [name.removeprefix(paths[group[0]]) for name in state if name.startswith(f"{paths[group[0]]}.")]
        for name in names:
            layers = [state.pop(f"{paths[layer]}{name}") for layer in group]
            state[f"model.expert_pools.{p}{name}"] = pool(layers)
    return state


def mean(layers):
    total = layers[0].float()
    for layer in layers[1:]:
        total = total + layer.float()
    return (total / len(layers)).to(layers[0].dtype)


@SOURCES
def test_average_is_the_mean_by_hand(tmp_path, family, original):
    model = save_source(tmp_path / "source", family, original=original)
    plan, _ = convert(tmp_path / "source", tmp_path / "out")
    expected = expected_tensors(model, plan.groups, mean)
    assert_equal_tensors(read_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize(("layer", "place"), [("first", 0), ("last", -1), (1, 1)])
def test_select_is_the_layer(tmp_path, layer, place):
    model = save_source(tmp_path / "source")
    plan, _ = convert(
        tmp_path / "source",
        tmp_path / "out",
        group_size=3,
        skip_last=2,
        method="select",
        method_options={"layer": layer},
    )
    assert plan.groups == [[1, 2, 3]]
    assert_equal_tensors(
        read_tensors(tmp_path / "out"), expected_tensors(model, plan.groups, lambda each: each[place])
    )


@SOURCES
def test_union_has_the_logits_of_the_source(tmp_path, family, original):
    save_source(tmp_path / "source", family, original=original, max_shard_size="50KB")
    plan, report = convert(tmp_path / "source", tmp_path / "out", method="union", max_shard_size="40KB")
    assert report["verification"]["lossless"] == {"compared": "logits", "tokens": 32, "equal": True}

    tied, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    model.set_experts_implementation("eager")
    tied.set_experts_implementation("eager")
    tokens = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert torch.equal(tied(tokens).logits, model(tokens).logits)
    slot_maps = [tied.get_submodule(path).slot_map.tolist() for path in _tied_paths(plan)]
    assert slot_maps[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def _tied_paths(plan):
    return [plan.source.experts[layer] for group in plan.groups for layer in group]


def test_average_differs_from_the_source(tmp_path):
    """So that equal logits above mean something."""
    save_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    tied, model = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "source"))
    tokens = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert not torch.equal(tied(tokens).logits, model(tokens).logits)


def test_a_large_model_is_compared_on_sample_layers(tmp_path, monkeypatch):
    save_source(tmp_path / "source")
    monkeypatch.setattr(verify, "MAX_BYTES_FOR_LOGITS", 0)
    _, report = convert(tmp_path / "source", tmp_path / "out", method="union")
    lossless = report["verification"]["lossless"]
    assert (lossless["compared"], lossless["layers"]) == ("experts", [1, 5])
    assert "more than the 0 that are loaded" in lossless["because"]


@pytest.mark.parametrize("limit", [0, 10**9], ids=["experts", "logits"])
def test_verification_notices_swapped_slot_maps(tmp_path, monkeypatch, limit):
    build = METHODS["union"].build

    def swapped(group):
        pool = build(group)
        return Pool(pool.blocks, dict(zip(pool.slot_maps, reversed(pool.slot_maps.values()))))

    monkeypatch.setitem(METHODS, "union", dataclasses.replace(METHODS["union"], build=swapped))
    monkeypatch.setattr(verify, "MAX_BYTES_FOR_LOGITS", limit)
    save_source(tmp_path / "source")
    with unchanged_disk(tmp_path), pytest.raises(verify.VerificationError):
        convert(tmp_path / "source", tmp_path / "out", method="union")


def test_a_lost_write_is_noticed(tmp_path, monkeypatch):
    """A file that is not what was written, by whatever mistake, never gets the output's name."""
    save_source(tmp_path / "source")
    write_weights = execute_module.write_weights

    def write_less(work, planned, make, progress):
        write_weights(work, planned[:-1], make, progress)

    monkeypatch.setattr(execute_module, "write_weights", write_less)
    with (
        unchanged_disk(tmp_path),
        pytest.raises(
            verify.VerificationError, match=r"differ from the plan: .* convert again, and report a bug if it stays"
        ),
    ):
        convert(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept(tmp_path, dtype):
    save_source(tmp_path / "source", dtype=dtype)
    convert(tmp_path / "source", tmp_path / "out")
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_mixed_dtypes_are_kept_and_aligned(tmp_path):
    """A bfloat16 model with float32 norms, in one file: every tensor starts at a multiple of its width."""
    save_source(tmp_path / "source")
    edit_tensors(tmp_path / "source", lambda t: {k: v.float() if "norm" in k else v for k, v in t.items()})
    convert(tmp_path / "source", tmp_path / "out", method="union")
    found = read_tensors(tmp_path / "out")
    assert found["model.norm.weight"].dtype == torch.float32
    assert found["model.layers.1.mlp.experts.slot_map"].dtype == torch.int64
    start, infos = read_header(tmp_path / "out" / "model.safetensors")
    assert start % 8 == 0
    assert all(info.offset % info.dtype.itemsize == 0 for info in infos.values())


def test_lm_head_beside_its_tied_embedding_is_dropped_by_name(tmp_path):
    save_source(tmp_path / "source", "qwen3_moe")
    embedding = "model.embed_tokens.weight"
    edit_tensors(tmp_path / "source", lambda t: t | {"lm_head.weight": t[embedding].clone()})
    plan, _ = convert(tmp_path / "source", tmp_path / "out")
    assert dict(plan.dropped) == {"lm_head.weight": f"the same tensor as {embedding}, to which it is tied"}
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")


def test_lm_head_instead_of_its_tied_embedding(tmp_path):
    model = save_source(tmp_path / "source", "qwen3_moe")
    edit_tensors(tmp_path / "source", lambda t: t | {"lm_head.weight": t.pop("model.embed_tokens.weight")})
    convert(tmp_path / "source", tmp_path / "out")
    assert torch.equal(read_tensors(tmp_path / "out")["model.embed_tokens.weight"], model.lm_head.weight)


def test_small_files_travel_along_and_code_does_not(tmp_path):
    save_tokenizer(tmp_path / "source")
    model = save_source(tmp_path / "source")
    model.generation_config.max_new_tokens = 7
    model.generation_config.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "source" / "tokenizer_evil.py").write_text("raise SystemExit")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Source\n")
    plan, _ = convert(tmp_path / "source", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tiedmoe_conversion.json", "tiedmoe_remote.py", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat").input_ids
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tied.generation_config.max_new_tokens == 7
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["groups"], config["dtype"]) == ("tiedmoe", plan.groups, "bfloat16")


def test_card_holds_recipe_licence_and_no_path_of_this_machine(tmp_path):
    save_source(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Source\n")
    plan, _ = convert(tmp_path / "source", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert str(tmp_path) not in card.text
    assert plan.source.opened.fingerprint() in card.text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    again = ConversionRecipe.from_dict(recipe | {"source": str(tmp_path / "source"), "output": plan.recipe.output})
    assert again == plan.recipe


def test_card_of_a_source_without_licence_says_so(tmp_path):
    save_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    assert "names no licence" in (tmp_path / "out" / "README.md").read_text()


def test_into_an_empty_folder_and_below_new_ones(tmp_path):
    save_source(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "source", tmp_path / "empty")
    convert(tmp_path / "source", tmp_path / "new" / "deep")
    assert_equal_tensors(read_tensors(tmp_path / "empty"), read_tensors(tmp_path / "new" / "deep"))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "empty", "new"}


def test_progress_counts_the_written_bytes(tmp_path):
    save_source(tmp_path / "source")
    calls = []
    plan = make_plan(ConversionRecipe(source=str(tmp_path / "source"), output=str(tmp_path / "out"), method="average"))
    execute(plan, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == plan.bytes_after
    assert {call[1] for call in calls} == {plan.bytes_after}
    assert {f"writing, {operation.target}" for operation in plan.operations} <= {call[2] for call in calls}


def test_same_recipe_same_bytes(tmp_path):
    save_source(tmp_path / "source")
    for name in ("one", "two"):
        convert(tmp_path / "source", tmp_path / name / "out", max_shard_size="40KB")
    for path in (tmp_path / "one" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "out" / path.name).read_bytes(), path.name


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that this thread holds; views of one storage count once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.owners = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._hold(tensor, storage.data_ptr(), storage.nbytes())
        return result

    def _hold(self, tensor, pointer, size):
        self.live += 0 if self.owners.get(pointer) else size
        self.owners[pointer] = self.owners.get(pointer, 0) + 1
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self._release, pointer, size)

    def _release(self, pointer, size):
        self.owners[pointer] -= 1
        self.live -= 0 if self.owners[pointer] else size


@LAYOUTS
@pytest.mark.parametrize("method", ["average", "select", "union"])
def test_memory_is_the_planned_one(tmp_path, monkeypatch, method, original):
    """An expert of every averaged layer and the block that is written, whatever the checkpoint's size."""
    save_source(tmp_path / "source", num_hidden_layers=10, intermediate_size=192, original=original)
    monkeypatch.setattr(verify, "MAX_BYTES_FOR_LOGITS", 0)  # the streaming part; the logits load whole models
    recipe = ConversionRecipe(
        source=str(tmp_path / "source"), output=str(tmp_path / "out"), group_size=6, method=method
    )
    monkeypatch.setattr(memory, "MAX_BYTES_FOR_LOGITS", 0)
    plan = make_plan(recipe)
    gc.collect()
    with LiveBytes() as counter:
        execute(plan)
    piece = 4 * 12288 if method == "average" else 0  # in float32; an expert here, 32768 elements at most
    assert counter.peak <= plan.peak_memory_bytes + piece + 16384  # slot maps, the sample's activations
    assert counter.peak > plan.peak_memory_bytes / 2
    one_group = 6 * plan.bytes_before * plan.expert_parameters_before // plan.parameters_before // 10
    assert counter.peak < 0.8 * one_group


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("align", {}),
        ("prototype", {"pool_experts": "1.5x"}),
        ("least_squares", {}),
        ("least_squares", {"method_options": {"up": "regmean"}}),
        ("prefit", {"method_options": {"steps": 10}}),
        ("prototype", {"then": ["least_squares"], "pool_experts": "1.5x"}),
        ("average", {"residual_rank": 4}),
    ],
)
def test_memory_of_calibrated_methods_is_below_the_planned_one(tmp_path, method, fields):
    """Experts are so wide that the matrices of one outweigh all of the group's."""
    save_source(tmp_path / "source", "qwen3_moe", num_hidden_layers=7, moe_intermediate_size=384, vocab_size=320)
    make_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(make_text())
    recipe = ConversionRecipe(
        source=str(tmp_path / "source"),
        output=str(tmp_path / "out"),
        group_size=3,
        method=method,
        calibration=str(tmp_path / "text.txt"),
        calibration_tokens=512,
        calibration_block_size=32,
        **fields,
    )
    plan = make_plan(recipe)
    gc.collect()
    with LiveBytes() as counter:
        execute(plan)
    assert plan.peak_memory_bytes / 6 < counter.peak <= plan.peak_memory_bytes  # scipy's copy is not counted
