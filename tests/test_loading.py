"""What is checked at loading: crafted configs, damaged slot maps and pools, and what a quantiser leaves."""

import copy
import json
import logging
import shutil
import time

import pytest
import torch
from accelerate import load_checkpoint_and_dispatch
from checkpoints import save_tied
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tiedmoe_conversion.errors import ConversionError
from tiedmoe_conversion.untying import untie
from tiedmoe_conversion.verify import verify_folder
from transformers_tiedmoe import TiedMoeForCausalLM
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.loading import check_folder
from transformers_tiedmoe.training.heal import HealConfig, heal

SLOT_MAP = "model.layers.1.mlp.experts.slot_map"
POOL = "model.expert_pools.0.down_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Layers 1 and 2 of four read a pool of 6 experts through slot maps over 4 slots."""
    return save_tied(tmp_path_factory.mktemp("loading") / "tied", slot_maps=True, pool_num_experts=6)


@pytest.fixture
def folder(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "tied")
    return tmp_path / "tied"


def check_own_config(folder):
    check_folder(folder, AutoConfig.from_pretrained(folder))


def change_config(folder, fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_weights(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# Claims that the config refuses by itself, whatever the files hold
ABSURD = {
    "family list": {"family": ["olmoe"]},
    "family dict": {"family": {}},
    "groups int": {"groups": 5},
    "groups str": {"groups": "[[1, 2]]"},
    "groups of str": {"groups": ["12"]},
    "10,000 groups": {"groups": [[1, 2]] * 10_000},
    "a group of 10,000 layers": {"groups": [[1] * 10_000]},
    "group_size str": {"group_size": "2"},
    "skip_first list": {"skip_first": [1]},
    "pool 1e9": {"pool_num_experts": [10**9]},
    "pool 2**63": {"pool_num_experts": [2**63]},
    "pool str": {"pool_num_experts": ["6"]},
    "pool true": {"pool_num_experts": [True]},
    "10,000 pools": {"pool_num_experts": [6] * 10_000},
    "slot_maps int": {"slot_maps": [1]},
    "residual 1e9": {"residual_rank": [10**9]},
    "residual 2**62": {"residual_rank": [2**62]},
    "layers 1e9": {"num_hidden_layers": 10**9},
    "layers 100000": {"num_hidden_layers": 100_000},
    "layers 0": {"num_hidden_layers": 0},
    "layers -1": {"num_hidden_layers": -1},
    "layers str": {"num_hidden_layers": "4"},
    "layers null": {"num_hidden_layers": None},
    "hidden 1e12": {"hidden_size": 10**12},
    "heads 0": {"num_attention_heads": 0},
    "experts 1e9": {"num_experts": 10**9},
    "experts null": {"num_experts": None},
    "labels 1e12": {"num_labels": 10**12, "id2label": None},
    "rope str": {"rope_parameters": "x"},
    "rope type": {"rope_parameters": {"rope_type": "evil"}},
    "act": {"hidden_act": "os.system"},
    "act list": {"hidden_act": []},
    "dtype name": {"dtype": "evil"},
    "dtype int": {"dtype": 4},
    "dtype int64": {"dtype": "int64"},
    "dtype function": {"dtype": "set_default_dtype"},
    "z loss str": {"router_z_loss_coef": "a", "output_router_logits": True},
    "z loss NaN": {"router_z_loss_coef": float("nan"), "output_router_logits": True},
    "recompute str": {"recompute_experts": "yes"},
}
# Claims that a model could have, and these files do not bear out
CONTRADICTED = {
    "pool 5": {"pool_num_experts": [5]},
    "pool 60000": {"pool_num_experts": [60_000]},
    "vocab 1e12": {"vocab_size": 10**12},
    "vocab 0": {"vocab_size": 0},
    "vocab 319": {"vocab_size": 319},
    "hidden 8": {"hidden_size": 8},
    "intermediate 1e9": {"intermediate_size": 10**9},
    "experts 60000": {"num_experts": 60_000},
    "layers 300": {"num_hidden_layers": 300},
    "layers 5": {"num_hidden_layers": 5},
}


@pytest.mark.parametrize("fields", ABSURD.values(), ids=ABSURD)
def test_an_absurd_config_is_refused_before_anything_is_built(folder, fields):
    change_config(folder, fields)
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained, TiedMoeForCausalLM.from_pretrained):
        start = time.monotonic()
        with pytest.raises(TiedMoeError) as refused:
            load(folder)
        assert time.monotonic() - start < 5
        assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("fields", CONTRADICTED.values(), ids=CONTRADICTED)
def test_a_config_that_the_files_contradict_is_refused_before_memory_is_taken(folder, tmp_path, fields):
    change_config(folder, fields)
    with pytest.raises(TiedMoeError, match=r"config\.json") as refused:
        AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(refused.value, RuntimeError)  # what transformers raises for a tensor of another shape
    with pytest.raises(TiedMoeError, match=r"config\.json"):
        check_own_config(folder)
    for command in (verify_folder, lambda tied: untie(tied, tmp_path / "untied")):
        with pytest.raises(ConversionError, match=r"config\.json"):
            command(folder)
    assert not (tmp_path / "untied").exists()


@pytest.mark.parametrize(
    "fields", [ABSURD["a group of 10,000 layers"], CONTRADICTED["vocab 1e12"], {"dtype": "float64"}]
)
def test_heal_refuses_a_crafted_config_and_writes_nothing(folder, tmp_path, fields):
    change_config(folder, fields)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    config = HealConfig(
        str(folder), str(tmp_path / "text.txt"), str(tmp_path / "healed"), max_steps=1, block_size=32, batch_size=2
    )
    with pytest.raises(TiedMoeError):
        heal(config)
    assert not (tmp_path / "healed").exists()


def test_a_config_of_float64_needs_a_tensor_of_float64(folder):
    change_config(folder, {"dtype": "float64"})
    for check in (check_own_config, verify_folder):
        with pytest.raises(TiedMoeError, match="float64"):
            check(folder)
    AutoModelForCausalLM.from_pretrained(folder).double().save_pretrained(folder)
    check_folder(folder, AutoConfig.from_pretrained(folder))


def test_sizes_that_the_user_chooses_to_ignore_are_ignored(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, vocab_size=300, ignore_mismatched_sizes=True)
    assert model.get_input_embeddings().weight.shape[0] == 300


def test_the_sound_checkpoint_loads_by_every_class(sound):
    check_folder(sound, AutoConfig.from_pretrained(sound))
    for auto_class in (AutoModel, AutoModelForCausalLM):
        assert not any(auto_class.from_pretrained(sound, output_loading_info=True)[1]["missing_keys"])


# Slot maps


@pytest.mark.parametrize("row", [6, 10**6, -1, 2**62])
@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm", "tiedmoe"])
def test_a_slot_map_that_leads_outside_its_pool_is_refused(folder, row, backend):
    change_weights(folder, SLOT_MAP, lambda slot_map: slot_map.index_fill(0, torch.tensor(2), row))
    with pytest.raises(TiedMoeError, match=rf"row {row} of pool 0, which has 6 experts; expected 0 to 5"):
        AutoModelForCausalLM.from_pretrained(folder, experts_implementation=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool, torch.int8])
def test_a_slot_map_that_is_not_of_integers_is_refused(folder, dtype):
    change_weights(folder, SLOT_MAP, lambda slot_map: slot_map.to(dtype))
    for load in (AutoModelForCausalLM.from_pretrained, verify_folder, check_own_config):
        with pytest.raises(TiedMoeError, match=r"slot_map is of dtype .*; expected one of int64, int32"):
            load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_a_pool_that_is_not_of_floats_is_refused(folder, dtype):
    change_weights(folder, POOL, lambda weight: weight.to(dtype))
    for load in (AutoModelForCausalLM.from_pretrained, verify_folder, check_own_config):
        with pytest.raises(TiedMoeError, match=r"expert_pools\.0\.down_proj is of dtype"):
            load(folder)


def test_what_torch_loads_is_checked_too(sound):
    model = AutoModelForCausalLM.from_pretrained(sound)
    good = copy.deepcopy(model.state_dict())
    for name, bad, match in (
        (SLOT_MAP, torch.full((4,), 6), "row 6 of pool 0"),
        (SLOT_MAP, torch.zeros(4), "dtype float32"),
        (POOL, good[POOL].to(torch.int8), "dtype int8"),
    ):
        with pytest.raises(TiedMoeError, match=match):
            model.load_state_dict({**good, name: bad})
        with pytest.raises(TiedMoeError, match=match):
            type(model).from_pretrained(None, config=model.config, state_dict={**good, name: bad})
    model.load_state_dict(good)


def test_from_disk_a_slot_map_is_checked_when_its_values_arrive(sound, folder, tmp_path):
    tokens = torch.arange(8)[None]
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers": "disk", "model.expert_pools": "disk"}
    expected = AutoModelForCausalLM.from_pretrained(sound)(tokens).logits
    good = AutoModelForCausalLM.from_pretrained(sound, device_map=device_map, offload_folder=tmp_path / "good")
    torch.testing.assert_close(good(tokens).logits, expected)
    change_weights(folder, SLOT_MAP, lambda slot_map: slot_map + 4)
    with pytest.raises(TiedMoeError, match="row 7 of pool 0"):  # noqa: PT012
        bad = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "bad")
        bad(tokens)


def test_accelerate_sets_buffers_one_by_one_and_they_are_checked(folder):
    change_weights(folder, SLOT_MAP, lambda slot_map: slot_map + 4)
    model = TiedMoeForCausalLM(AutoConfig.from_pretrained(folder))
    model(torch.arange(8)[None])  # its own slot maps are sound
    model = load_checkpoint_and_dispatch(model, str(folder), device_map={"": "cpu"})
    with pytest.raises(TiedMoeError, match="row 7 of pool 0"):
        model(torch.arange(8)[None])


def test_a_slot_map_is_read_once_and_not_in_every_forward(sound, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(sound)
    read = []
    aminmax = torch.Tensor.aminmax
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda self: (read.append(self.shape), aminmax(self))[1])
    model(torch.arange(8)[None])
    assert not read  # the values were checked when they were loaded


# Quantisation


@register_quantization_config("tests_int8_linear")
class Int8LinearConfig(QuantizationConfigMixin):
    def __init__(self, **kwargs):
        self.quant_method = "tests_int8_linear"


class Int8Linear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


@register_quantizer("tests_int8_linear")
class Int8LinearQuantizer(HfQuantizer):
    """As the quantisers that people use: knows `nn.Linear`, and nothing of experts."""

    requires_calibration = False
    is_trainable = False

    def is_serializable(self):
        return False

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                model.set_submodule(name, Int8Linear(module))


def test_the_share_of_weights_that_a_quantiser_leaves_is_said(sound, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers_tiedmoe"), "propagate", True)
    plain = AutoModelForCausalLM.from_pretrained(sound)
    assert "unquantised" not in caplog.text
    experts = sum(p.numel() for n, p in plain.named_parameters() if "expert_pools" in n or ".experts." in n)
    share = f"{experts / plain.num_parameters():.0%} of the weights are left unquantised: {experts:,}"
    model = AutoModelForCausalLM.from_pretrained(sound, quantization_config=Int8LinearConfig())
    assert any(isinstance(module, Int8Linear) for module in model.modules())
    assert share in caplog.text
    assert "tests_int8_linear" in caplog.text
