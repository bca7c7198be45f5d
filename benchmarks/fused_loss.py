"""Peak memory and time of the loss from a teacher, from whole logits and fused with the head.

    python benchmarks/fused_loss.py --vocab 50000 --tokens 2048

The model is one small layer: what is measured is the head and the loss, forward and backward, beyond the weights.
"""

import functools
import time
from collections.abc import Callable

import torch
from tables import parser_of
from transformers import OlmoeConfig, OlmoeForCausalLM

from tiedmoe_demo.figures import peak_bytes
from transformers_tiedmoe.training.distillation import distillation_loss
from transformers_tiedmoe.training.fused_loss import FusedLoss
from transformers_tiedmoe.training.live_teacher import LiveTeacher


def steps(vocab_size: int, tokens: int, hidden_size: int, chunk_size: int | None) -> dict[str, Callable[[], object]]:
    """Return by name a forward and backward with a teacher, of the same two models and text; each gives its loss."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=32, num_hidden_layers=1, num_experts=2,
        num_experts_per_tok=1, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model, source = OlmoeForCausalLM(config), OlmoeForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(0, vocab_size, (4, tokens // 4))
    inputs, teacher = {"input_ids": ids, "labels": ids}, LiveTeacher(source, has_head=True)

    def from_whole_logits() -> torch.Tensor:
        outputs = model(**inputs)
        divergence = distillation_loss(outputs.logits[:, :-1], source(ids).logits[:, :-1], ids[:, 1:])
        return outputs.loss + divergence / ids[:, 1:].numel()

    def fused_with_the_head() -> torch.Tensor:
        fused = FusedLoss(model, chunk_size)
        targets = teacher.targets(inputs)
        losses = fused.training_loss(lambda given: model(**given).loss, inputs, teacher, targets)
        fused.remove()
        return torch.stack(losses).sum()

    def step(loss_of: Callable[[], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}

    losses = {"from whole logits": from_whole_logits, "fused with the head": fused_with_the_head}
    return {name: functools.partial(step, loss_of) for name, loss_of in losses.items()}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--vocab", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, help="tokens at a time")
    given = parser.parse_args()
    found = {}
    for name, step in steps(given.vocab, given.tokens, 64, given.chunk).items():
        step()
        start = time.perf_counter()
        found[name] = step()
        seconds = time.perf_counter() - start
        print(f"{name}: peak {peak_bytes(step) / 2**20:.0f} MiB, {seconds:.1f} s, loss {found[name][0]:.7f}")
    (one, ones), (other, others) = found.values()
    apart = [(each - others[name]).abs().max() / each.abs().max().clamp(min=1e-30) for name, each in ones.items()]
    print(f"apart: loss {abs(one - other):.1e}, gradients {max(apart):.1e} of the greatest in a tensor")


if __name__ == "__main__":
    main()
