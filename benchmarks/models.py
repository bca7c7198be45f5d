"""Whole models on a CPU: eight layers of a quarter of OLMoE's widths, tied by four and untied, that decode and train.

Models that are tied alike must have the same logits; times and memory are measured as those of a layer are.
"""

import functools
from typing import NamedTuple

import torch
from measure import Bench, Prepared, relative_error
from peers import TIEDMOE, Peer
from shapes import QUARTER, TINY, Shape
from timing import Call, resident_growth
from torch import nn

NEW_TOKENS, STEP_TOKENS, VOCABULARY = 64, 512, 4096


class ModelCase(NamedTuple):
    """What a model does: `kind` is "generate" or "train"."""

    kind: str
    shape: Shape = QUARTER
    layers: int = 8
    dtype: torch.dtype = torch.float32

    @property
    def key(self) -> str:
        what = {"generate": f"generate {NEW_TOKENS} tokens", "train": f"step of {STEP_TOKENS} tokens"}[self.kind]
        return f"model of {self.layers} layers {self.shape.name}, {what}"


def make_model(group_size: int, implementation: str, case: ModelCase) -> nn.Module:
    """Return a causal language model of OLMoE's family with random weights, the same ones for the same tying."""
    from transformers import AutoModelForCausalLM, OlmoeConfig  # here: gpu_cache.py reads the cases alone, in a hurry

    from transformers_tiedmoe import TiedMoeConfig

    _, E, H, I, K = case.shape
    sizes = {"hidden_size": H, "intermediate_size": I, "num_experts": E, "num_experts_per_tok": K}
    sizes |= {"num_hidden_layers": case.layers, "num_attention_heads": max(1, H // 128)}
    sizes |= {"vocab_size": VOCABULARY, "eos_token_id": None}
    tied = {"family": "olmoe", "group_size": group_size, "skip_first": 0, "skip_last": 0}
    config = OlmoeConfig(**sizes) if group_size == 1 else TiedMoeConfig(**tied, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, experts_implementation=implementation)


MODELS = (
    Peer(TIEDMOE, functools.partial(make_model, 4, "tiedmoe")),
    Peer("tied, grouped_mm", functools.partial(make_model, 4, "grouped_mm")),
    Peer("untied, grouped_mm", functools.partial(make_model, 1, "grouped_mm")),
    Peer("untied, eager", functools.partial(make_model, 1, "eager"), trains=False),
)


def generate(model: nn.Module) -> Call:
    """Return what continues a prompt of 16 tokens by NEW_TOKENS."""
    prompt, number_of = torch.arange(16)[None] + 5, {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    model.eval()
    return lambda number: model.generate(prompt + number, do_sample=False, pad_token_id=1, **number_of)


def train(model: nn.Module) -> Call:
    """Return forward, backward and AdamW on STEP_TOKENS tokens, 128 a row."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(3, VOCABULARY, (STEP_TOKENS // 128, 128), generator=torch.Generator().manual_seed(0))
    model.train()

    def step(number: int) -> None:
        model(tokens.roll(number), labels=tokens.roll(number), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


CALLS = {"generate": generate, "train": train}


def resident_growth_of(case: ModelCase, peer: Peer) -> int:
    """Measure model, gradients, optimizer and activations of two calls above what a tiny one leaves behind."""
    CALLS[case.kind](peer.build(case._replace(shape=TINY, layers=4)))(0)
    return resident_growth(lambda: list(map(CALLS[case.kind](peer.build(case)), range(2))))


class ModelBench(Bench):
    """A `ModelCase`, and a row for each of `MODELS`."""

    resident_growth_of = staticmethod(resident_growth_of)

    def reason(self, peer: Peer) -> str | None:
        if self.case.kind == "train" and not peer.trains:
            return "its backward makes a gradient of the whole pool for each expert"
        return None

    @functools.cached_property
    def expected(self) -> dict[int, torch.Tensor]:
        """The logits by group size."""
        return {}

    def prepare(self, peer: Peer) -> Prepared:
        model = peer.build(self.case)
        return Prepared(CALLS[self.case.kind](model), model)

    def errors(self, peer: Peer, prepared: Prepared) -> dict[str, float]:
        with torch.no_grad():
            found = prepared.layer(torch.arange(5, 21)[None]).logits
        group_size, _ = peer.build.args
        return {"logits": relative_error(found, self.expected.setdefault(group_size, found))}

    def rate(self, seconds: float) -> dict:
        return {}
