"""A source as its family sees it: a checked config, a model on the meta device, and its tensors mapped."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from transformers_tiedmoe.configuration_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.families import canonical_family, expert_layers
from transformers_tiedmoe.loading import check_dtype, check_headers, check_num_layers

from ..checkpoint.quantised import quantisation
from ..checkpoint.reader import Source, open_source
from ..errors import ConversionError, did_you_mean
from .keys import FamilyTensors, describe_dtype, map_tensors

POSITIVE = ("rope_theta", "rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "norm_eps", "layer_norm_epsilon")


@dataclass(frozen=True)
class SourceModel:
    """A source as its family sees it: the model on the meta device, its experts, and the place of every tensor."""

    opened: Source
    model: PreTrainedModel
    experts: dict[int, str]
    tensors: FamilyTensors

    @classmethod
    def map(cls, opened: Source, config: PreTrainedConfig) -> "SourceModel":
        """Build the family's model of `config` without memory and find every tensor's place in it."""
        model = family_model(config)
        found = cls(opened, model, expert_layers(model), map_tensors(opened, model))
        for layer in found.experts:
            for name in found.expert_names(layer):
                if not (dtype := found.tensors.meta[name].dtype).is_floating_point:
                    raise ConversionError(
                        f"{opened.name}: the experts' {name} is of {dtype}; expected floating-point weights, which "
                        "can be averaged and fitted: dequantise the checkpoint with what wrote it first"
                    )
        return found

    @property
    def name(self) -> str:
        """The source as the user calls it."""
        return self.opened.name

    def expert_names(self, layer: int) -> list[str]:
        """Return the state-dict names of a layer's expert parameters, in the model's order."""
        return [name for name in self.model.state_dict() if name.startswith(f"{self.experts[layer]}.")]

    def parameter_names(self, layer: int) -> tuple[str, ...]:
        """Name the parameters of a layer's experts, such as `("gate_up_proj", "down_proj")`."""
        return tuple(name.removeprefix(f"{self.experts[layer]}.") for name in self.expert_names(layer))

    @property
    def num_experts(self) -> int:
        """E, the rows of every expert parameter of every layer.

        Raises:
            ConversionError: they differ.
        """
        rows = {name: self.tensors.meta[name].shape[:1] for layer in self.experts for name in self.expert_names(layer)}
        if len(set(rows.values())) != 1:
            raise ConversionError(
                f"{self.name}: the experts' parameters have different numbers of experts: {rows}; expected one number "
                "for all layers, which is all that pools can be made of here"
            )
        return next(iter(rows.values()))[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights on the disk, without those that the family ignores."""
        dropped = self.tensors.dropped
        return sum(info.num_bytes for name, info in self.opened.tensors.items() if name not in dropped)

    @property
    def bytes_as_read(self) -> int:
        """Bytes of the weights in memory, the quantised ones dequantised."""
        return sum(tensor.nbytes for name, tensor in self.tensors.meta.items() if name not in self.tensors.copies)

    def describe_experts(self, layer: int) -> dict[str, str]:
        """Return the shape and dtype of a layer's expert parameters, e.g. `{"down_proj": "[8, 32, 16] bfloat16"}`."""
        found = {}
        for name in self.expert_names(layer):
            tensor = self.tensors.meta[name]
            dtype = describe_dtype(self.opened.tensors[self.tensors.units[name].keys[0]])
            found[name.removeprefix(f"{self.experts[layer]}.")] = f"{list(tensor.shape)} {dtype}"
        return found


def open_source_model(source: str, revision: str | None = None, allow_pickle: bool = False) -> SourceModel:
    """Open an untied checkpoint, read its config and find every tensor's place in its family's model."""
    opened = open_source(source, revision, allow_pickle)
    return SourceModel.map(opened, read_config(opened))


def read_config(source: Source) -> PreTrainedConfig:
    """Return the source's config, of a causal LM with experts; no code of the checkpoint is run.

    Raises:
        ConversionError: unreadable, unknown to this transformers, without experts, already tied, or quantised.
    """
    fields = source.read_json("config.json")
    family = fields.get("model_type")
    if not isinstance(family, str | None):
        raise ConversionError(
            f"{source.name} is of the unknown family {str(family)[:200]}; expected a name such as 'olmoe'"
        )
    if family == "tiedmoe":
        raise ConversionError(
            f"{source.name} is already a tiedmoe checkpoint; expected an untied one. "
            "Untie it first: tiedmoe untie SOURCE OUTPUT"
        )
    _check_numbers(fields, source.name)
    if fields.get("quantization_config"):
        method = quantisation(fields, source.name)  # refuses what is not read here
        if source.quantisation is None:
            raise ConversionError(
                f"{source.name} is quantised ({method}) by its config.json, and none of its weights has scales; "
                "expected X.weight_scale_inv beside X.weight, or X_scales beside X_blocks: remove quantization_config "
                "if the weights are plain"
            )
    try:
        canonical_family(family)
    except ValueError as error:
        if family in CONFIG_MAPPING:
            raise ConversionError(
                f"{source.name} is a {family!r} checkpoint, a family without experts that transformers can tie; "
                "expected a Mixture-of-Experts causal LM such as olmoe, mixtral, qwen3_moe or deepseek_v3"
            ) from error
        raise ConversionError(
            f"{source.name} is of the unknown family {family!r}; {did_you_mean(family, CONFIG_MAPPING)}. "
            f"transformers {transformers.__version__} is installed: a newer one may know it"
        ) from error
    try:
        config = AutoConfig.from_pretrained(source.folder)
        text_config = config.get_text_config(decoder=True)
        if text_config.dtype is None:  # a multimodal config has it at the top
            text_config.dtype = config.dtype
    except Exception as error:  # whatever a field of the wrong type makes transformers raise
        raise ConversionError(f"{source.name}: transformers cannot read config.json: {error}") from error
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config  # what is read is not quantised any more
    layers = getattr(text_config, "num_hidden_layers", None)
    if type(layers) is not int or not 0 < layers <= len(source.tensors):  # before a model of as many is built
        raise ConversionError(
            f"{source.name} has num_hidden_layers={layers!r} by config.json and {len(source.tensors)} tensors; "
            "expected a layer to have one at least: use the config.json that belongs to the weights"
        )
    try:
        family_model(text_config)
        with contextlib.suppress(ValueError):  # the default groups need not fit
            TiedMoeConfig.from_family(text_config, skip_first=0, skip_last=0)
    except Exception as error:  # whatever a field of an impossible value makes a family's modules raise
        raise ConversionError(
            f"{source.name}: transformers cannot build a model of config.json: {type(error).__name__}: {error}; use "
            "the config.json that belongs to the weights"
        ) from error
    return text_config


def _check_numbers(fields: Any, where: str, path: str = "config.json") -> None:
    """Raise `ConversionError` for a NaN, or for a number that no model can run with."""
    for name, value in fields.items() if isinstance(fields, dict) else enumerate(fields):
        place = f"{path}: {name}"
        if isinstance(value, (dict, list)):
            _check_numbers(value, where, place)
        elif isinstance(value, float) and math.isnan(value):
            raise ConversionError(
                f"{where}: {place} is NaN; expected a number: use the config.json that belongs to the weights"
            )
        elif str(name) in POSITIVE and type(value) in (int, float) and not 0 < value < math.inf:
            raise ConversionError(
                f"{where}: {place} is {value}; expected a positive number: use the config.json that belongs to the "
                "weights"
            )


def read_tied_config(source: Source) -> TiedMoeConfig:
    """Return the config of a tied checkpoint.

    Raises:
        ConversionError: unreadable, or of a checkpoint that is not tied.
    """
    fields = source.read_json("config.json")
    family = fields.get("model_type")
    _check_numbers(fields, source.name)
    if family != "tiedmoe":
        raise ConversionError(
            f"{source.name} is a {family!r} checkpoint; expected a tiedmoe one, which `tiedmoe convert` makes"
        )
    try:
        config = AutoConfig.from_pretrained(source.folder)
        check_num_layers(config.num_hidden_layers, len(source.tensors), source.name)
        headers = {name: (tuple(info.shape), info.dtype) for name, info in source.tensors.items()}
        check_dtype(config.dtype, headers, source.name)
        check_headers(family_model(config), headers, source.name)
    except TiedMoeError as error:
        raise ConversionError(str(error)) from error
    except Exception as error:  # whatever a field of the wrong type or value makes transformers raise
        raise ConversionError(f"{source.name}: cannot read config.json: {error}") from error
    return config


def family_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the causal LM of `config`, tied or not, on the meta device: names and shapes, no memory."""
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        return AutoModelForCausalLM.from_config(config)
