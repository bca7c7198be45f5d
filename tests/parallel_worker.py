"""Run by test_distributed.py: tied models under transformers' tensor and expert parallelism equal one process.

python parallel_worker.py FOLDER, which starts two processes that share its imports.
"""

import functools
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import tiny_config, transformers_before
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM

MODELS = {  # one untied layer, then two groups of two layers; two slots of a layer read one row
    "olmoe": {"slot_maps": [True, False], "pool_num_experts": [6, 4]},
    "qwen3_moe": {"groups": [[0, 1], [2, 3, 4]]},
    "deepseek_v3": {},
    "gpt_oss": {},
    "soft": {"routing": "softmoe", "softmoe": {"alpha": 0.1, "threshold": 0.2}},
    "residual": {"residual_rank": 2},
    "all tied": {"tied_components": "all"},
}
BOTH = {"tp_plan": "auto", "enable_expert_parallel": True}  # experts whole, attention split
ACROSS = {"fsdp_size": 2, "ep_size": 2}  # each process has a batch of its own, and fetches experts of the other's
CASES = [
    ("olmoe", {"tp_plan": "auto"}, "grouped_mm"),
    ("olmoe", BOTH, "grouped_mm"),
    ("olmoe", BOTH, "tiedmoe"),
    ("olmoe", ACROSS, "tiedmoe"),
    ("qwen3_moe", {"tp_size": 2}, "tiedmoe"),
    ("qwen3_moe", ACROSS, "grouped_mm"),
    ("deepseek_v3", {"tp_plan": "auto"}, "grouped_mm"),
    ("gpt_oss", BOTH, "tiedmoe"),
    ("soft", {"tp_size": 2}, "grouped_mm"),
]
REFUSED = [
    ("residual", {"tp_size": 2}, r"residual_rank=\[2, 2\]: a residual belongs to a layer's slots"),
    ("all tied", {"tp_size": 2}, r"tied_components=\['experts', 'router', 'attention'\], whose layers own no router"),
    ("gpt_oss", {"tp_plan": "auto"}, "family 'gpt_oss', whose experts transformers has no tensor-parallel plan for"),
    ("soft", ACROSS, "routing='softmoe', whose tokens leave slots inactive"),
]
if transformers_before("5.18"):  # soft routing is refused there
    del MODELS["soft"]
    CASES, REFUSED = ([case for case in cases if case[0] != "soft"] for cases in (CASES, REFUSED))
TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def make(folder: Path) -> None:
    torch.manual_seed(0)
    for name, fields in MODELS.items():
        family = "olmoe" if name in ("soft", "residual", "all tied") else name
        groups = {} if "groups" in fields else {"group_size": 2, "skip_first": 1, "skip_last": 0}
        # these two's gradients are large at the tests' usual 0.2, and rounded by as much
        initial = 0.05 if family in ("deepseek_v3", "gpt_oss") else 0.2
        tiny = tiny_config(family, num_hidden_layers=5, initializer_range=initial)
        config = TiedMoeConfig.from_family(tiny, **groups, **fields)
        model = TiedMoeForCausalLM(config)
        for module in model.modules():
            if getattr(module, "slot_map", None) is not None:
                module.slot_map.copy_(torch.tensor([5, 1, 3, 1]) - module.position)
        model.save_pretrained(folder / name)


def results(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Return the logits, what is generated, and the gradients, the last with checkpointing."""
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    generated = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(tokens, labels=tokens).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits, generated, {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


@functools.cache
def results_alone(path: Path) -> tuple[torch.Tensor, torch.Tensor, dict]:
    return results(AutoModelForCausalLM.from_pretrained(path), TOKENS)


def check(folder: Path, name: str, fields: dict, implementation: str) -> None:
    rank = dist.get_rank()
    logits, generated, gradients = results_alone(folder / name)
    mine = slice(rank, rank + 1) if "fsdp_size" in fields else slice(None)
    model = AutoModelForCausalLM.from_pretrained(
        folder / name, distributed_config=DistributedConfig(**fields), experts_implementation=implementation
    )
    for parameter in model.expert_pools.parameters():
        assert 2 * parameter.to_local().numel() == parameter.numel()
    my_logits, my_generated, my_gradients = results(model, TOKENS[mine])
    torch.testing.assert_close(my_logits, logits[mine], rtol=1e-5, atol=1e-5)
    assert my_generated.equal(generated[mine])
    assert my_gradients.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(my_gradients[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)
    if fields == BOTH:
        model.save_pretrained(folder / "saved")
        saved, first = (load_file(folder / each / "model.safetensors") for each in ("saved", name))
        assert saved.keys() == first.keys()
        assert all(saved[key].equal(first[key]) for key in first)


def work(rank: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for case in CASES:
        check(folder, *case)
        if rank == 0:
            print("equal", *case, flush=True)
    for name, fields, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(**fields))
        if rank == 0:
            print("refused", name, fields, flush=True)
    dist.destroy_process_group()


def main() -> int:
    logging.disable_progress_bar()
    folder = Path(sys.argv[1])
    os.environ["WORLD_SIZE"] = "2"
    make(folder)
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode) for process in processes)


if __name__ == "__main__":
    sys.exit(main())
