"""Run by test_distributed.py in two processes: a tied model under FSDP2 has the gradients of one process."""

import sys

import torch
import torch.distributed as dist
from families import tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), group_size=2, skip_first=1, skip_last=1)
    torch.manual_seed(0)
    alone, sharded = TiedMoeForCausalLM(config), TiedMoeForCausalLM(config)
    sharded.load_state_dict(alone.state_dict())
    for unit in (*sharded.expert_pools, *sharded.model.layers):
        fully_shard(unit, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    tokens = torch.randint(3, 90, (4, 12))
    alone(tokens, labels=tokens).loss.backward()
    mine = tokens.chunk(2)[dist.get_rank()]
    loss = sharded(mine, labels=mine).loss
    loss.backward()
    for (name, parameter), reference in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), reference.grad, rtol=1e-4, atol=1e-6, msg=name)
    if dist.get_rank() == 0:
        print("equal gradients", len(list(sharded.parameters())))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
