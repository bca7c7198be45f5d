"""What FSDP2 sends for the pools of a tied model: `python benchmarks/fsdp2_gathers.py > table.md`, two CPU processes.

By where a pool's unit begins and ends. A: with the pool's own call, as torch has it. B: as A, but kept until the last
layer of the group in forward. C: the pool and its layers are one unit. D: the pool's unit spans the calls of its
group, layers are units of their own, which is what `transformers_tiedmoe.fsdp` makes of A by itself.

Collectives are counted as the dispatcher sees them; memory is that of all tensors made in the step, at its peak. The
model: a tied OLMoE of ten layers, the first and the last untied, between them two groups of four.
"""

import itertools
import os
import weakref

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import OlmoeConfig

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 10, "num_experts": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, "eos_token_id": 2}
BF16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
# a step -> its microbatches, `use_reentrant` of checkpointing or None, options of `fully_shard`, explicit prefetching?
CASES = {
    "plain": (1, None, {}, False),
    "checkpointing": (1, False, {}, False),
    "reentrant checkpointing": (1, True, {}, False),
    "2 microbatches": (2, None, {}, False),
    "2 microbatches, checkpointing": (2, False, {}, False),
    "bfloat16, reduced in float32": (1, None, BF16, False),
    "checkpointing, explicit prefetch": (1, False, {}, True),
}
STRATEGIES = [("A", "grouped_mm"), ("B", "grouped_mm"), ("C", "grouped_mm"), ("D", "grouped_mm"), ("D", "tiedmoe")]
COLUMNS = (
    "step, strategy, experts, gathers forward, gathers backward, reduces, MB gathered, MB reduced, peak MB, error"
)


def tied_model(implementation: str) -> TiedMoeForCausalLM:
    config = TiedMoeConfig.from_family(OlmoeConfig(**SIZES), group_size=4, skip_first=1, skip_last=1)
    torch.manual_seed(0)
    model = TiedMoeForCausalLM(config).train()
    model.set_experts_implementation(implementation)
    return model


def shard(model: TiedMoeForCausalLM, strategy: str, options: dict, prefetch: bool) -> None:
    layers = dict(enumerate(model.model.layers))
    for pool, group in zip(model.expert_pools, model.config.groups, strict=True):
        members = [layers.pop(i) for i in group] if strategy == "C" else []
        fully_shard([pool, *members] if members else pool, **options)
        pool._spans_its_group = strategy != "D"  # if so, the package leaves the unit as it is
        if strategy == "B":
            pool.set_reshard_after_forward(False)
            free = lambda *_, pool=pool: pool.reshard() if torch._C._current_graph_task_id() == -1 else None  # noqa: E731
            layers[group[-1]].register_forward_hook(free)
    for layer in layers.values():
        fully_shard(layer, **options)
    for before, after in itertools.pairwise(layers.values()) if prefetch else ():
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])
    fully_shard(model, **options)


class Counter(TorchDispatchMode):
    """Bytes of each collective, and the peak of what live tensors take."""

    def __init__(self):
        super().__init__()
        self.gathers, self.reduces, self.storages, self.peak = [], [], {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathers.append(args[0].nbytes)
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduces.append(args[1].nbytes)
        found = [each.untyped_storage() for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        self.storages |= {storage._cdata: weakref.ref(storage) for storage in found}
        alive = {key: storage for key, ref in self.storages.items() if (storage := ref()) is not None}
        self.storages = {key: self.storages[key] for key in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))
        return out


def measure(case: str, strategy: str, implementation: str) -> list[str]:
    microbatches, use_reentrant, options, prefetch = CASES[case]
    alone, model = tied_model("grouped_mm"), tied_model(implementation)
    pool = sum(each.numel() for each in model.expert_pools[0].parameters())
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    shard(model, strategy, options, prefetch)
    batches = [torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(microbatches)]
    for tokens in batches:
        alone(tokens, labels=tokens).loss.backward()
    ends = [0]  # of the forward and backward passes, in gathers
    with Counter() as counter:
        for i, tokens in enumerate(batches):
            mine = tokens.chunk(2)[dist.get_rank()]
            model.set_requires_gradient_sync(i == microbatches - 1)
            loss = model(mine, labels=mine, use_cache=False).loss
            ends.append(len(counter.gathers))
            loss.backward()
            ends.append(len(counter.gathers))
    errors = []
    for wanted, parameter in zip(alone.parameters(), model.parameters(), strict=True):
        reduced = hasattr(parameter.grad, "full_tensor")  # else FSDP2 never came to it
        found = parameter.grad.full_tensor() if reduced else torch.full((), torch.nan)
        errors.append((found - wanted.grad).abs().max() / wanted.grad.abs().max())

    def per_pool(sizes: list[int], itemsize: int) -> float:  # the two untied layers have experts of the same size
        return (sum(size >= pool * itemsize for size in sizes) - 2) / 2

    passes = [per_pool(counter.gathers[a:b], 2 if options else 4) for a, b in itertools.pairwise(ends)]
    calls = [passes[0], passes[1], per_pool(counter.reduces, 4)]
    sizes = [sum(counter.gathers) / microbatches, sum(counter.reduces), counter.peak]
    worst = torch.stack(errors).max().item()  # NaN is the largest
    cells = [*(f"{each:g}" for each in calls), *(f"{each / 1e6:.1f}" for each in sizes)]
    return [case, strategy, implementation, *cells, "" if options else f"{worst:.0e}"]  # bfloat16 routes otherwise


def run(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for case, (strategy, implementation) in itertools.product(CASES, STRATEGIES):
        row = measure(case, strategy, implementation)
        if rank == 0:
            print(f"| {' | '.join(row)} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    print(f"| {' | '.join(COLUMNS.split(', '))} |\n|{' --- |' * 10}", flush=True)
    mp.spawn(run, (29517,), 2)
