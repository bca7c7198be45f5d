"""Run by test_distributed.py in two processes: a tied model under FSDP2 or DDP has the gradients of one process.

Muon moves it as in one process, too.

torchrun --standalone --nproc-per-node=2 fsdp2_worker.py
"""

import contextlib
import sys

import pytest
import torch
import torch.distributed as dist
from families import tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tiedmoe_kernels import torch_backend
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.training.muon import Muon, muon_parameter_groups

ONCE_PER_POOL = [1, 1, 2, 2]  # two untied layers, two pools of two layers: how many layers each computation is of

SOFT = {"routing": "softmoe", "softmoe": {"alpha": 0.1, "threshold": 0.2}}

# wrapper, experts implementation, checkpointing, what is frozen or soft -> the weight gradients our kernels compute
CASES = {
    ("fsdp2", "grouped_mm", None, ""): [],
    ("fsdp2", "tiedmoe", None, ""): ONCE_PER_POOL,
    ("fsdp2", "tiedmoe", False, ""): ONCE_PER_POOL,
    ("fsdp2", "grouped_mm", True, ""): [],  # refused
    ("fsdp2", "tiedmoe", None, "all but experts"): ONCE_PER_POOL,  # no input of the first experts has a gradient
    ("fsdp2", "tiedmoe", None, "soft"): ONCE_PER_POOL,  # the budget's numbers are sharded, too
    ("ddp", "tiedmoe", False, "soft"): ONCE_PER_POOL,
    ("ddp", "tiedmoe", None, ""): ONCE_PER_POOL,
    ("ddp", "tiedmoe", False, ""): ONCE_PER_POOL,
    ("ddp, gradients as bucket views", "tiedmoe", None, ""): ONCE_PER_POOL,  # our kernels add into the buckets
}


def tied_model(implementation: str, what: str) -> TiedMoeForCausalLM:
    routing = SOFT if what == "soft" else {}
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), group_size=2, skip_first=1, skip_last=1, **routing)
    torch.manual_seed(0)
    model = TiedMoeForCausalLM(config).train()
    model.set_experts_implementation(implementation)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what != "all but experts" or "expert" in name)
    return model


def spread(model: TiedMoeForCausalLM, wrapper: str, mesh) -> torch.nn.Module:
    if wrapper.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view="bucket views" in wrapper)
    for unit in (*model.expert_pools, *model.model.layers):
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def check(case: tuple, expected: list[int], computed: list[int], mesh) -> None:
    wrapper, implementation, use_reentrant, what = case
    alone, mine = tied_model("grouped_mm", what), tied_model(implementation, what)
    if use_reentrant is not None:
        mine.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        mine.enable_input_require_grads()
    mine = spread(mine, wrapper, mesh)
    if wrapper == "fsdp2" and use_reentrant:
        with pytest.raises(ValueError, match="reentrant gradient checkpointing under FSDP2 gives pools a wrong grad"):
            mine(torch.full((1, 4), 3))
        return
    batches = [torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    computed.clear()
    for i, tokens in enumerate(batches):  # two microbatches, the gradient reduced at the second
        alone(tokens, labels=tokens).loss.backward()
        my_tokens = tokens.chunk(2)[dist.get_rank()]
        if wrapper == "fsdp2":
            mine.set_requires_gradient_sync(i == 1)
        with mine.no_sync() if wrapper.startswith("ddp") and i == 0 else contextlib.nullcontext():
            mine(my_tokens, labels=my_tokens).loss.backward()
    assert sorted(computed) == sorted(2 * expected), (case, computed)
    got, want = gradients(mine), gradients(alone)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=f"{case} {name}")


def check_muon(mesh) -> None:
    """Three steps of Muon on shards: pools of three experts give two and one; other matrices are gathered."""
    models = []
    for wrapper in ("alone", "fsdp2"):
        config = TiedMoeConfig.from_family(tiny_config("olmoe", num_experts=3), skip_first=1, skip_last=1)
        torch.manual_seed(0)
        model = TiedMoeForCausalLM(config)
        model = spread(model, wrapper, mesh) if wrapper == "fsdp2" else model
        optimizer = Muon(muon_parameter_groups(model))
        for seed in range(3):
            tokens = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
        models.append(model)
    for (name, want), got in zip(models[0].named_parameters(), models[1].parameters()):
        # bfloat16 rounds gradients that differ in their last bits
        torch.testing.assert_close(got.full_tensor(), want, rtol=0, atol=1e-3, msg=f"muon {name}")


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    computed: list[int] = []
    original = torch_backend.backward_weight

    def counted(segments, *args):
        computed.append(len(segments))
        return original(segments, *args)

    torch_backend.backward_weight = counted
    for case, expected in CASES.items():
        check(case, expected, computed, mesh)
        if dist.get_rank() == 0:
            print("equal gradients", *case, flush=True)
    check_muon(mesh)
    if dist.get_rank() == 0:
        print("equal weights after Muon's steps", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
