"""`Subject`: a model that is audited, local or on the Hub; its weights are read when they are asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from ..configuration_tiedmoe import NUM_EXPERTS_FIELDS, TOP_K_FIELDS
from ..errors import TiedMoeError
from ..families import expert_layers
from ..hub import public_name
from ..modeling_tiedmoe import TiedExperts
from ..training.pretrained import load_config, load_model
from .routing import layer_experts
from .schema import Layer

HELD_SHARE = 0.8  # of the free memory that weights may take; the rest is for activations


@dataclass(frozen=True)
class Subject:
    """What is known of a model before its weights are read.

    Attributes:
        name: the folder's own name, or its hub id; unique among the models of an audit.
        path: folder or hub id.
        config: of the text model.
        layers: every decoder layer.
        notes: what is unusual; evidence adds to it.
    """

    name: str
    path: str
    config: PreTrainedConfig
    layers: tuple[Layer, ...]
    trust_remote_code: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts; of a dense model only memory and quality can be told."""
        return any(layer.kind != "dense" for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in the config's dtype, pools once; more than a quantised checkpoint has."""
        return sum(each.nbytes for each in self.skeleton().parameters())

    def load(self, offload_folder: Path | None = None) -> PreTrainedModel:
        """Load the model in eval mode: on the GPU or in memory if it fits there, else spread by accelerate.

        Args:
            offload_folder: where weights are laid that fit neither on a GPU nor in memory.

        Raises:
            TiedMoeError: weights are missing, or it does not fit and there is no such folder.
        """
        num_bytes = self.weight_bytes
        if torch.cuda.is_available() and num_bytes < HELD_SHARE * torch.cuda.mem_get_info()[0]:
            return load_model(self.path, self.trust_remote_code).eval().to("cuda")
        if num_bytes < HELD_SHARE * psutil.virtual_memory().available:
            return load_model(self.path, self.trust_remote_code).eval()
        if offload_folder is None:
            raise TiedMoeError(
                f"{self.name} has {num_bytes / 2**30:.1f} GiB of weights, for which the memory of this machine does "
                "not suffice; expected a folder for those that do not fit (offload_folder)"
            )
        self.notes.append(
            f"its {num_bytes / 2**30:.1f} GiB of weights do not fit into this machine's memory: they were read from "
            "the disk as they were needed"
        )
        return load_model(
            self.path, self.trust_remote_code, device_map="auto", offload_folder=str(offload_folder)
        ).eval()

    def skeleton(self) -> PreTrainedModel:
        """Build the model on the meta device: modules and shapes, no memory."""
        return build_skeleton(self.config, self.trust_remote_code)


def open_subject(path: str, name: str | None = None, trust_remote_code: bool = False) -> Subject:
    """Open a model by its config.

    Raises:
        OSError: no such model.
        TiedMoeError: a config that cannot be read, or of no causal language model.
    """
    config = load_config(path, trust_remote_code)
    try:
        skeleton = build_skeleton(config, trust_remote_code)
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):  # followed by hundreds of names
            raise
        raise TiedMoeError(
            f"{path} is of model type {config.model_type}, of which transformers has no causal language model; of a "
            "multimodal model, save the language model as a checkpoint of its own and audit that"
        ) from error
    layers = layers_of(skeleton)
    return Subject(name or public_name(path), path, config, layers, trust_remote_code)


def build_skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the causal language model of `config` on the meta device."""
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def layers_of(model: PreTrainedModel) -> tuple[Layer, ...]:
    """Describe every decoder layer of a model, on any device."""
    config: Any = model.config.get_text_config()
    experts = layer_experts(model) if expert_layers(model) or getattr(config, "groups", None) else {}
    found = []
    for index in range(config.num_hidden_layers):
        module: Any = experts.get(index)
        if module is None:
            found.append(Layer(index=index, kind="dense"))
            continue
        is_tied = isinstance(module, TiedExperts)
        is_soft = getattr(config, "routing", "top_k") == "softmoe"
        found.append(
            Layer(
                index=index,
                kind="tied" if is_tied else "untied",
                pool=module.pool_index if is_tied else None,
                num_experts=(module.num_slots if is_tied else None) or _field(config, NUM_EXPERTS_FIELDS),
                pool_experts=module.pool_size if is_tied else None,
                top_k=None if is_soft else _field(config, TOP_K_FIELDS),
            )
        )
    return tuple(found)


def _field(config: Any, names: tuple[str, ...]) -> int | None:
    return next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None)
