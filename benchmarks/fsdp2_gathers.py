"""What FSDP2 sends for the pools of a tied model: `python benchmarks/fsdp2_gathers.py`, two CPU processes.

A pool is an FSDP2 unit of its own, as are layers. torch alone begins and ends a unit with each call of its module;
`transformers_tiedmoe.fsdp` with the first and the last layer of its group. Collectives are counted as the dispatcher
sees them; memory is that of all tensors made in the step, at its peak. The model: a tied OLMoE of ten layers, the
first and the last untied, between them two groups of four.
"""

import itertools
import weakref

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tables import table
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import OlmoeConfig

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 10, "num_experts": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, "eos_token_id": 2}
CASES = {"plain": (1, False), "checkpointing": (1, True), "2 microbatches": (2, False)}  # a step; checkpointing?
UNITS = {"as torch has it": True, "tied": False}  # does a pool's unit span its group already, and is left as it is?
COUNTS = ("gathers forward", "gathers backward", "reduces", "MB gathered", "MB reduced", "peak MB")


class Counter(TorchDispatchMode):
    """Bytes of each collective, and the peak of what live tensors take."""

    def __init__(self):
        super().__init__()
        self.gathers, self.reduces, self.storages, self.peak = [], [], weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathers.append(args[0].nbytes)
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduces.append(args[1].nbytes)
        storages = [each.untyped_storage() for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        self.storages.update({storage._cdata: storage for storage in storages})
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages.values()))
        return out


def measure(case: str, unit: str) -> list[str]:
    microbatches, has_checkpoints = CASES[case]
    torch.manual_seed(0)
    config = TiedMoeConfig.from_family(OlmoeConfig(**SIZES), group_size=4, skip_first=1, skip_last=1)
    model = TiedMoeForCausalLM(config).train()
    model.set_experts_implementation("grouped_mm")
    pool_bytes = sum(each.nbytes for each in model.expert_pools[0].parameters())
    if has_checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for pool in model.expert_pools:
        fully_shard(pool)
        pool._spans_its_group = UNITS[unit]
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    ends = [0]  # of the forward and backward passes, in gathers
    with Counter() as counter:
        for i in range(microbatches):
            tokens = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(i))
            mine = tokens.chunk(2)[dist.get_rank()]
            model.set_requires_gradient_sync(i == microbatches - 1)
            loss = model(mine, labels=mine, use_cache=False).loss
            ends.append(len(counter.gathers))
            loss.backward()
            ends.append(len(counter.gathers))
    calls = [counter.gathers[: ends[1]], counter.gathers[ends[1] : ends[2]], counter.reduces]
    # Of the two pools, without the two untied layers, whose experts are of the same size.
    per_pool = [(sum(size >= pool_bytes for size in sizes) - 2) / 2 for sizes in calls]
    sizes = [sum(counter.gathers) / microbatches, sum(counter.reduces), counter.peak]
    return [case, unit, *(f"{each:g}" for each in per_pool), *(f"{each / 1e6:.1f}" for each in sizes)]


def run(rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", "tcp://127.0.0.1:29517", rank=rank, world_size=2)
    rows = [measure(*each) for each in itertools.product(CASES, UNITS)]
    if rank == 0:
        print("\n".join(table(["step", "a pool's unit", *COUNTS], rows, left=2)))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, nprocs=2)
