"""python examples/heal_accelerate.py tied text.txt out --max-steps 500
accelerate launch --multi_gpu --num_processes 2 examples/heal_accelerate.py tied text.txt out
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/heal_accelerate.py tied text.txt out

Heal a tied model with a plain accelerate loop: what `tiedmoe heal` does, without Trainer. On one device, on two GPUs,
and in two processes on the CPU (accelerate calls the launcher of several processes so). MODEL is a folder or hub id,
TEXT what `tiedmoe heal --data` takes, OUTPUT a folder that does not exist yet.
"""

import argparse
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import transformers_tiedmoe  # noqa: F401  the Auto classes learn of tied models
from transformers_tiedmoe.audit.metrics import perplexity
from transformers_tiedmoe.training.data import load_blocks, sequence_losses
from transformers_tiedmoe.training.parameter_groups import pool_parameter_groups


@torch.no_grad()
def evaluate(model, loader, accelerator):
    """Return the mean cross-entropy per token over all processes' held-out blocks, each block counted once."""
    model.eval()
    losses, tokens = 0.0, 0
    for batch in loader:
        sums, counts = accelerator.gather_for_metrics(sequence_losses(model, batch["input_ids"], batch["labels"]))
        losses += sums.sum().item()
        tokens += counts.sum().item()
    model.train()
    return losses / tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("output")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences on one device")
    parser.add_argument("--block-size", type=int, default=512)
    args = parser.parse_args()
    if Path(args.output).exists():
        parser.error(f"output {args.output} exists; give a folder that does not")

    set_seed(42)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with accelerator.main_process_first():
        datasets = load_blocks(args.text, tokenizer, args.block_size)
    train, held_out = (
        DataLoader(data.with_format("torch"), args.batch_size, shuffle=data is datasets[0]) for data in datasets
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    for module in model.modules():
        if "Norm" in type(module).__name__:  # healing leaves the norms as they are
            module.requires_grad_(False)
    optimizer = torch.optim.AdamW(pool_parameter_groups(model, args.learning_rate))
    steps = args.max_steps * accelerator.num_processes  # accelerate advances the schedule once a process
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.05 * steps), steps)
    model, optimizer, scheduler, train, held_out = accelerator.prepare(model, optimizer, scheduler, train, held_out)

    accelerator.print(f"{len(datasets[0])} blocks to train on, {len(datasets[1])} held out; evaluating")
    before, step = evaluate(model, held_out, accelerator), 0
    while step < args.max_steps:
        for batch in train:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:
                accelerator.print(f"step {step} of {args.max_steps}, loss {loss.item():.3f}")
            if step == args.max_steps:
                break
    accelerator.print("evaluating")
    after = evaluate(model, held_out, accelerator)
    accelerator.print(f"held-out perplexity {perplexity(before):.2f} -> {perplexity(after):.2f}")

    weights = accelerator.get_state_dict(model)  # every process takes part where the weights are sharded
    if accelerator.is_main_process:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False).save_pretrained(args.output, state_dict=weights)
        tokenizer.save_pretrained(args.output)
    # DDP must not outlive the process group: freed last, it would wait for gloo's threads while it keeps them waiting.
    model, optimizer, scheduler = accelerator.free_memory(model, optimizer, scheduler)
    accelerator.end_training()


if __name__ == "__main__":
    main()
