"""Run by test_distributed.py in two processes: a tied model under FSDP2 or DDP has the gradients of one process.

FSDP2 gathers each pool once in forward and once in backward, and reduces its gradient once. Muon moves it as in one
process, too. Then a model is healed under accelerate's FSDP2.

accelerate launch --config_file ../examples/accelerate/fsdp2.yaml fsdp2_worker.py TIED TEXT, in an empty folder
"""

import contextlib
import sys

import torch
import torch.distributed as dist
import transformers
from families import tiny_config
from fsdp2_heal_worker import check_example, check_heal, check_rescue, check_states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tiedmoe_kernels import torch_backend
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.fsdp import shard_pools
from transformers_tiedmoe.training.fused_loss import FusedLoss
from transformers_tiedmoe.training.muon import Muon, muon_parameter_groups

ONCE_PER_POOL = [1, 1, 2, 2]  # two untied layers, two pools of two layers: how many layers each computation is of

SOFT = {"routing": "softmoe", "softmoe": {"alpha": 0.1, "threshold": 0.2}}

# wrapper, experts implementation, checkpointing, what is frozen or soft -> the weight gradients our kernels compute.
# In float64, to 1e-12: that they differ by more in float32 is the order of sums. grouped_mm has no float64, and a soft
# router computes in float32.
CASES = {
    ("fsdp2", "grouped_mm", None, ""): [],
    ("fsdp2", "tiedmoe", None, ""): ONCE_PER_POOL,
    ("fsdp2", "tiedmoe", False, ""): ONCE_PER_POOL,
    ("fsdp2", "eager", False, ""): [],
    ("fsdp2", "eager", True, ""): [],  # FSDP2 alone loses gradients here
    ("fsdp2, fused loss", "tiedmoe", False, ""): ONCE_PER_POOL,
    ("fsdp2, bfloat16", "grouped_mm", False, ""): [],
    ("fsdp2", "tiedmoe", None, "all but experts"): ONCE_PER_POOL,  # no input of the first experts has a gradient
    ("fsdp2", "tiedmoe", None, "soft"): ONCE_PER_POOL,  # the budget's numbers are sharded, too
    ("ddp", "tiedmoe", False, "soft"): ONCE_PER_POOL,
    ("ddp", "tiedmoe", None, ""): ONCE_PER_POOL,
    ("ddp", "tiedmoe", False, ""): ONCE_PER_POOL,
    ("ddp, gradients as bucket views", "tiedmoe", None, ""): ONCE_PER_POOL,  # our kernels add into the buckets
}
if transformers.__version__ < "5.18":  # soft routing is refused there
    CASES = {case: expected for case, expected in CASES.items() if case[-1] != "soft"}


def tied_model(implementation: str, what: str) -> TiedMoeForCausalLM:
    routing = SOFT if what == "soft" else {}
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), group_size=2, skip_first=1, skip_last=1, **routing)
    torch.manual_seed(0)
    model = TiedMoeForCausalLM(config).train()
    model.set_experts_implementation(implementation)
    model.to(torch.float32 if implementation == "grouped_mm" else torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what != "all but experts" or "expert" in name)
    return model


def spread(model: TiedMoeForCausalLM, wrapper: str, mesh) -> torch.nn.Module:
    options = {"mesh": mesh}
    if "bfloat16" in wrapper:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if wrapper.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view="bucket views" in wrapper)
    shard_pools(model, **options)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if "fused" in wrapper:  # as accelerate does
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **options)
    return fully_shard(model, **options)


class Traffic(TorchDispatchMode):
    """Counts the collectives of FSDP2 that carry `size` numbers: those of a pool."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.gathered, self.reduced = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.gathered += func is torch.ops.c10d._allgather_base_.default and args[0].numel() == self.size
        self.reduced += func is torch.ops.c10d._reduce_scatter_base_.default and args[1].numel() == self.size
        return func(*args, **(kwargs or {}))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def check(case: tuple, expected: list[int], computed: list[int], mesh) -> None:
    wrapper, implementation, use_reentrant, what = case
    of_one = "grouped_mm" if implementation == "grouped_mm" else "eager"
    alone, mine = tied_model(of_one, what), tied_model(implementation, what)
    if use_reentrant is not None:
        mine.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        mine.enable_input_require_grads()
    is_bf16 = "bfloat16" in wrapper  # compared with FSDP2 as torch has it: one process rounds elsewhere
    if is_bf16:
        for pool in alone.expert_pools:
            pool._spans_its_group = True
        spread(alone, wrapper, mesh)
    traffic = Traffic(sum(each.numel() for each in mine.expert_pools[0].parameters()))
    mine = spread(mine, wrapper, mesh)
    fused = FusedLoss(mine, chunk_size=8) if "fused" in wrapper else None
    batches = [torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    computed.clear()
    for i, tokens in enumerate(batches):  # two microbatches, the gradient reduced at the second
        my_tokens = tokens.chunk(2)[dist.get_rank()]
        if is_bf16:
            alone.set_requires_gradient_sync(i == 1)
        alone_tokens = my_tokens if is_bf16 else tokens
        alone(alone_tokens, labels=alone_tokens).loss.backward()
        if wrapper.startswith("fsdp2"):
            mine.set_requires_gradient_sync(i == 1)
        with mine.no_sync() if wrapper.startswith("ddp") and i == 0 else contextlib.nullcontext(), traffic:
            inputs = {"input_ids": my_tokens, "labels": my_tokens}
            loss = fused.training_loss(lambda each: mine(**each).loss, inputs)[0] if fused else mine(**inputs).loss
            gathered = traffic.gathered
            loss.backward()
        if wrapper.startswith(
            "fsdp2"
        ):  # two pools, in forward and in backward; none is reduced before the second microbatch
            units = 4 if what == "all but experts" else 2  # the untied layers then reduce as much as a pool
            found = (gathered, traffic.gathered, traffic.reduced)
            assert found == (4 * i + 2, 4 * i + 4, units * i), (case, found)
    assert sorted(computed) == sorted(2 * expected), (case, computed)
    got, want = gradients(mine), gradients(alone)
    assert got.keys() == want.keys()
    for name in want:
        bound = (2e-6 if of_one == "grouped_mm" or what == "soft" else 1e-12) * float(want[name].abs().max())
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=bound, msg=f"{case} {name}")


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
    tied, text = sys.argv[1:]
    check_heal(tied, text)
    check_rescue(tied, text)
    check_states(tied)
    check_example(tied, text)


if __name__ == "__main__":
    sys.exit(main())
