"""Runs a causal LM of any family whose weights are read layer by layer: one layer's experts are in memory at a time.

The family's own model is built on the meta device and its own forward runs. A decoder layer gets its weights when it
is called and loses them afterwards, by accelerate's hooks, and takes its sequences some at a time, so that all of the
text goes through a layer before the next one is read. A model that fits into half of the free memory is read once.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import PrefixedDataset, set_module_tensor_to_device
from torch import nn
from transformers import PreTrainedModel

from transformers_tiedmoe.families import expert_layers

from ..layout.keys import Read, saved_tensors

TOKENS_AT_A_TIME = 4096  # in a layer and in the head
IN_FLOAT32 = 2  # times the bytes of bfloat16; on a GPU, which keeps the model's dtype, an estimate from above
Capture = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


class StreamedModel:
    """A causal LM that reads its weights when it needs them.

    Args:
        model: the family's, on the meta device.
        read: gives a tensor of its state dict by name.
        num_bytes: of all its weights; what decides whether they stay in memory.
        device: where layers run; the GPU where there is one.

    On a CPU everything is computed in float32, on a GPU in the model's own dtype.
    """

    def __init__(self, model: PreTrainedModel, read: Read, num_bytes: int, device: torch.device | str | None = None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self._weights = model.eval(), _Weights(read)
        self.experts = expert_layers(model)
        self._capture: Capture | None = None
        if self.device.type == "cpu":
            model.float()
        self._materialise_buffers()
        layers = {f"{path}.": self._take_in_parts(path) for path in self._find_layers()}
        streamed = {} if _fits(num_bytes) else layers
        buffers = dict(model.named_buffers())  # small, and accelerate 1.15 looks nested ones up by their last name
        self._load(n for n in saved_tensors(model) if n in buffers or not n.startswith(tuple(streamed)))
        model.tie_weights()
        for path, module in streamed.items():
            weights = PrefixedDataset(self._weights, path)
            hook = AlignDevicesHook(self.device, offload=True, weights_map=weights, place_submodules=True)
            add_hook_to_module(module, hook)
        for layer, path in self.experts.items():
            model.get_submodule(path).register_forward_pre_hook(self._watch(layer), with_kwargs=True)

    @torch.no_grad()
    def loss(self, tokens: torch.Tensor, capture: Capture | None = None) -> torch.Tensor:
        """Compute the next-token cross-entropy of each sequence, without auxiliary losses.

        Args:
            tokens: int64 `[B, T]`.
            capture: called for every call of every layer's experts with the layer's index and its arguments
                `hidden_states [t, H]`, `top_k_index [t, K]`, `top_k_weights [t, K]`, whole sequences in order.

        Returns:
            Mean loss in nats per predicted token, float64 `[B]`.
        """
        hidden_states = self._hidden_states(tokens, capture)
        base, forward = self.model.base_model, self.model.base_model.forward
        rows = max(1, TOKENS_AT_A_TIME // tokens.shape[1])
        losses = []
        try:
            for first in range(0, len(tokens), rows):
                part = tokens[first : first + rows].to(self.device)
                base.forward = _returns(hidden_states, slice(first, first + rows))
                logits = self.model(input_ids=part, use_cache=False, output_router_logits=False).logits[:, :-1]
                losses += [
                    F.cross_entropy(row.float(), target).double().cpu() for row, target in zip(logits, part[:, 1:])
                ]
        finally:
            base.forward = forward
        return torch.stack(losses)

    @contextlib.contextmanager
    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Put `tensors`, by state-dict name, in the place of the model's own within the block."""
        kept = [name for name in tensors if not self.model.get_parameter(name).is_meta]
        self._weights.overrides = tensors
        try:
            self._load(kept)
            yield
        finally:
            self._weights.overrides = {}
            self._load(kept)

    def _hidden_states(self, tokens: torch.Tensor, capture: Capture | None) -> Any:
        """Run the base model on all of `tokens`."""
        self._capture, self._rows = capture, max(1, TOKENS_AT_A_TIME // tokens.shape[1])
        try:
            return self.model.base_model(input_ids=tokens.to(self.device), use_cache=False, output_router_logits=False)
        finally:
            self._capture = None

    def _find_layers(self) -> list[str]:
        """Return the paths of all decoder layers: of the list that holds the layers with experts."""
        first = next(iter(self.experts.values()))
        match = re.match(r"(.*?)\.\d+\.", first)
        assert match, f"no layer index in {first}"
        return [f"{match[1]}.{i}" for i in range(len(self.model.get_submodule(match[1])))]

    def _materialise_buffers(self) -> None:
        """Compute what no checkpoint holds (rotary frequencies, scales), by the family's initialisation."""
        buffers = dict(self.model.named_non_persistent_buffers())
        for name, buffer in buffers.items():
            set_module_tensor_to_device(self.model, name, "cpu", torch.empty_like(buffer, device="cpu"))
        for module in self.model.modules():
            module._is_hf_initialized = False
        self.model.initialize_weights()
        for name in buffers:
            set_module_tensor_to_device(self.model, name, self.device)

    def _load(self, names: Iterable[str]) -> None:
        for name in names:
            set_module_tensor_to_device(self.model, name, self.device, self._weights[name])

    def _take_in_parts(self, path: str) -> nn.Module:
        """Make the layer at `path` take its sequences some at a time."""
        layer = self.model.get_submodule(path)
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: _in_parts(forward, self._rows, args, kwargs)
        return layer

    def _watch(self, layer: int):
        def watch(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._capture is not None:
                names = ("hidden_states", "top_k_index", "top_k_weights")
                given = dict(zip(names, args)) | kwargs
                self._capture(layer, *(given[name] for name in names))

        return watch


class _Weights:
    """Weights by state-dict name, made when they are asked for: `overrides`, or else what the checkpoint holds."""

    def __init__(self, read: Read):
        self.read = read
        self.overrides: Mapping[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.overrides[name] if name in self.overrides else self.read(name)


def held_bytes(num_bytes: int, at_a_time: int) -> int:
    """Return the bytes of weights in memory while a model of `num_bytes` runs.

    All of them if they fit, else `at_a_time`.
    """
    return IN_FLOAT32 * (num_bytes if _fits(num_bytes) else at_a_time)


def _fits(num_bytes: int) -> bool:
    return IN_FLOAT32 * num_bytes < psutil.virtual_memory().available / 2


def _returns(outputs: Any, rows: slice) -> Callable[..., Any]:
    """Make a forward of the base model that returns some sequences of outputs computed before."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(outputs)(last_hidden_state=outputs.last_hidden_state[rows])

    return forward


def _in_parts(forward: Callable, rows: int, args: tuple, kwargs: dict) -> Any:
    """Run `forward(*args, **kwargs)` on `rows` sequences at a time; values without a sequence dimension stay whole."""
    num_rows = args[0].shape[0] if args else kwargs["hidden_states"].shape[0]
    if num_rows <= rows:
        return forward(*args, **kwargs)

    def part(value: Any, chosen: slice) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == num_rows:
            return value[chosen]
        if isinstance(value, (tuple, list)):
            return type(value)(part(each, chosen) for each in value)
        if isinstance(value, dict):
            return {key: part(each, chosen) for key, each in value.items()}
        return value

    outputs = []
    for first in range(0, num_rows, rows):
        chosen = slice(first, first + rows)
        outputs.append(forward(*(part(a, chosen) for a in args), **{k: part(v, chosen) for k, v in kwargs.items()}))
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs)
    return tuple(torch.cat(each) if isinstance(each[0], torch.Tensor) else each[0] for each in zip(*outputs))
