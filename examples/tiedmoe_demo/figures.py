"""What the demo measures of a checkpoint: how large it is, how well it predicts, where its tokens go."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from transformers_tiedmoe.audit.routing import RoutingCounts, layer_experts
from transformers_tiedmoe.modeling_tiedmoe import ExpertPool
from transformers_tiedmoe.training.data import perplexity

from .config import DemoConfig


def measure(
    folder: Path, tokenizer: PreTrainedTokenizerBase, validation: datasets.Dataset, config: DemoConfig
) -> dict:
    """Return all figures of the checkpoint in `folder`, and a continuation of the prompt.

    Returns:
        `parameters`; `expert_parameters`; `checkpoint_bytes` (of its weight files); `loss` in nats per token and
        `perplexity` on the blocks of `validation`; `peak_training_memory_bytes`; `text`; and `routing`, by layer the
        share of the layer's tokens that each expert gets, a list of floats that sums to 1.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    with RoutingCounts(model) as routing:
        held_out = perplexity(model, validation, config.batch_size)
    batch = torch.tensor(validation[: config.batch_size]["input_ids"], device=model.device)
    return {
        "parameters": model.num_parameters(),
        "expert_parameters": expert_parameters(model),
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "perplexity": held_out["perplexity"],
        "loss": held_out["loss"],
        "text": continue_prompt(model, tokenizer, config),
        "routing": routing.shares(),
        "peak_training_memory_bytes": peak_training_memory(model, batch),  # last, as it trains the model
    }


def expert_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters in experts: untied layers', pools' and residuals; each pool once."""
    owners = [
        *layer_experts(model).values(),
        *(module for module in model.modules() if isinstance(module, ExpertPool)),
    ]
    return sum(parameter.numel() for owner in owners for parameter in owner.parameters())


def continue_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DemoConfig) -> str:
    """Return the prompt and a sampled continuation; the same seed and settings for every model."""
    set_seed(config.seed)
    prompt = tokenizer(config.prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    tokens = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=config.new_tokens,
        do_sample=True,
        temperature=0.8,
        top_k=50,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def peak_training_memory(model: PreTrainedModel, input_ids: torch.Tensor) -> int:
    """Return the most bytes that tensors take at a time in two AdamW steps of `model`, its weights included.

    Counted from every allocation and release of torch's allocator: weights, gradients, AdamW's two moments (there from
    the second step on), what the forward keeps for the backward, and temporaries. Not Python nor the libraries.

    Args:
        model: is changed by the steps.
        input_ids: int64 `[B, T]`, a batch of the size that was trained with.
    """
    gc.collect()  # else what others left in reference cycles is freed, and subtracted, while we count
    weights = sum(tensor.untyped_storage().nbytes() for tensor in [*model.parameters(), *model.buffers()])
    if input_ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _train_two_steps(model, input_ids)
        return weights + torch.cuda.max_memory_allocated() - before
    return weights + peak_bytes(lambda: _train_two_steps(model, input_ids))


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the most bytes that torch's CPU allocator holds at a time while `step` runs, beside what it held."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes to stderr when it starts and ends
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _train_two_steps(model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(2):
        gc.collect()  # so is what the step before left
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
