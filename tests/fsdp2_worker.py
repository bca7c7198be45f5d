"""Run by test_distributed.py in two processes: a tied model under FSDP2 or DDP has the gradients of one process.

FSDP2 gathers each pool once in forward and once in backward, and reduces its gradient once. Muon moves it as in one
process, too. Then a model is healed under accelerate's FSDP2.

accelerate launch --config_file ../examples/accelerate/fsdp2.yaml fsdp2_worker.py TIED TEXT, in an empty folder
"""

import contextlib
import functools
import sys

import torch
import torch.distributed as dist
from families import tiny_config, transformers_before
from fsdp2_heal_worker import check_example, check_heal, check_rescue, check_states, check_trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tiedmoe_kernels import torch_backend
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.fsdp import shard_pools
from transformers_tiedmoe.routing import active_experts
from transformers_tiedmoe.training.fused_loss import FusedLoss
from transformers_tiedmoe.training.lora import add_lora
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
    ("fsdp2", "eager", False, "lora"): [],  # pools are frozen; adapters are not sharded with them
    ("ddp", "tiedmoe", False, "soft"): ONCE_PER_POOL,
    ("ddp", "tiedmoe", None, ""): ONCE_PER_POOL,
    ("ddp", "tiedmoe", False, ""): ONCE_PER_POOL,
    ("ddp, gradients as bucket views", "tiedmoe", None, ""): ONCE_PER_POOL,  # our kernels add into the buckets
}
if transformers_before("5.18"):  # soft routing is refused there
    CASES = {case: expected for case, expected in CASES.items() if case[-1] != "soft"}


def tied_model(implementation: str, what: str) -> TiedMoeForCausalLM:
    routing = SOFT if what == "soft" else {}
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), group_size=2, skip_first=1, skip_last=1, **routing)
    torch.manual_seed(0)
    model = TiedMoeForCausalLM(config).train()
    model.set_experts_implementation(implementation)
    model.to(torch.float32 if implementation == "grouped_mm" else torch.float64)
    if what == "lora":
        model = add_lora(model, rank=2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would give A no gradient
                torch.nn.init.normal_(parameter, std=0.1)
        return model.double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what != "all but experts" or "expert" in name)
    return model


def spread(model: torch.nn.Module, wrapper: str, mesh) -> torch.nn.Module:
    options = {"mesh": mesh}
    if "bfloat16" in wrapper:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if wrapper.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view="bucket views" in wrapper)
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    shard_pools(bare, **options)
    for layer in bare.model.layers:
        fully_shard(layer, **options)
    if "fused" in wrapper:  # as accelerate does
        fully_shard([bare.model.norm, bare.lm_head], reshard_after_forward=False, **options)
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


BATCHES = [torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


@functools.cache
def gradients_alone(implementation: str, what: str) -> dict[str, torch.Tensor]:
    model = tied_model(implementation, what)
    for tokens in BATCHES:
        model(tokens, labels=tokens).loss.backward()
    return gradients(model)


def gradients_of_torch(implementation: str, wrapper: str, mesh) -> dict[str, torch.Tensor]:
    """Return the gradients of FSDP2 as torch has it: in bfloat16 one process rounds elsewhere."""
    model = tied_model(implementation, "")
    for pool in model.expert_pools:
        pool._spans_its_group = True
    spread(model, wrapper, mesh)
    for i, tokens in enumerate(BATCHES):
        model.set_requires_gradient_sync(i == 1)
        model(mine(tokens), labels=mine(tokens)).loss.backward()
    return gradients(model)


def mine(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.chunk(2)[dist.get_rank()]


def check(case: tuple, expected: list[int], computed: list[int], mesh) -> None:
    wrapper, implementation, use_reentrant, what = case
    of_one = "grouped_mm" if implementation == "grouped_mm" else "eager"
    want = gradients_of_torch(of_one, wrapper, mesh) if "bfloat16" in wrapper else gradients_alone(of_one, what)
    model = tied_model(implementation, what)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    pool = {n: each.numel() for n, each in model.named_parameters() if "expert_pools.0." in n and "lora_" not in n}
    traffic = Traffic(sum(pool.values()))
    model = spread(model, wrapper, mesh)
    fused = FusedLoss(model, chunk_size=8) if "fused" in wrapper else None
    computed.clear()
    for i, tokens in enumerate(BATCHES):  # two microbatches, the gradient reduced at the second
        if wrapper.startswith("fsdp2"):
            model.set_requires_gradient_sync(i == 1)
        with model.no_sync() if wrapper.startswith("ddp") and i == 0 else contextlib.nullcontext(), traffic:
            inputs = {"input_ids": mine(tokens), "labels": mine(tokens)}
            loss = fused.training_loss(lambda each: model(**each).loss, inputs)[0] if fused else model(**inputs).loss
            gathered = traffic.gathered
            loss.backward()
        if wrapper.startswith("fsdp2"):
            # two pools, in forward and in backward; none is reduced before the second microbatch
            units = {"all but experts": 4, "lora": 0}.get(what, 2)  # the untied layers then reduce as much as a pool
            found = (gathered, traffic.gathered, traffic.reduced)
            assert found == (4 * i + 2, 4 * i + 4, units * i), (case, found)
    assert sorted(computed) == sorted(2 * expected), (case, computed)
    if what == "soft":  # between passes, where FSDP2 has the budget's numbers in shards
        budget = getattr(model, "module", model).config.softmoe["budget"]
        assert abs(sum(each["k"] for each in active_experts(model)) - budget) < 1e-5 * budget
    got = gradients(model)
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
    tied, text, *kinds = sys.argv[1:]
    if kinds:  # nothing but this kind of healing
        check_heal(tied, text, *kinds)
        dist.destroy_process_group()
        return
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
    check_trainer(tied)
    check_heal(tied, text)
    check_rescue(tied, text)
    check_states(tied)
    check_example(tied, text)


if __name__ == "__main__":
    sys.exit(main())
