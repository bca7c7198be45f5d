"""python examples/pretrain.py olmoe-512-g2 text.txt out --tokenizer allenai/OLMoE-1B-7B-0924 --max-steps 20000
accelerate launch --multi_gpu --num_processes 8 examples/pretrain.py olmoe-512-g2 HuggingFaceFW/fineweb-edu out
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/pretrain.py olmoe-512-g2 text.txt out

Pretrain a tied model as "Tying the Loop" (arXiv 2606.16825) did: Muon and AdamW, warm-up, rates that fall to a tenth.
PRESET is a name of `transformers_tiedmoe.presets`, TEXT a text file or a dataset of the Hub, which is streamed, OUTPUT
a folder. Started again, the same command goes on from the last checkpoint: the text is read again up to there.
"""

import argparse
import itertools
import json
import resource
import shutil
import time
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_with_min_lr_schedule_with_warmup

from transformers_tiedmoe.presets import RECIPE, preset
from transformers_tiedmoe.training.muon import Muon, muon_parameter_groups


def load_stream(text, tokenizer, block_size):
    """Return a stream of packed blocks: documents joined by the end-of-text token, cut every `block_size` tokens."""
    files = {"path": "text", "data_files": text, "sample_by": "document"} if Path(text).exists() else {"path": text}
    stream = datasets.load_dataset(**files, split="train", streaming=True)

    def pack(rows):
        documents = tokenizer(rows["text"], add_special_tokens=False)["input_ids"]
        tokens = [token for document in documents for token in [*document, tokenizer.eos_token_id]]
        starts = range(0, len(tokens) - block_size + 1, block_size)
        return {"input_ids": [tokens[start : start + block_size] for start in starts]}

    return stream.map(pack, batched=True, remove_columns=list(next(iter(stream)))).shuffle(seed=0, buffer_size=1000)


def endless(stream, batch_size):
    """Yield batches of `stream` for ever, in another order each time."""
    for epoch in itertools.count():
        stream.set_epoch(epoch)
        batch = None
        for batch in DataLoader(stream.with_format("torch"), batch_size, drop_last=True):
            yield batch
        if batch is None:
            raise SystemExit(f"the text has not {batch_size} blocks for each process; give more or smaller ones")


def peak_memory_gib():
    """Return the most memory so far: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("text")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", default="allenai/OLMoE-1B-7B-0924")
    parser.add_argument("--max-steps", type=int, default=20000)
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences on one device at once")
    parser.add_argument("--sequences-per-step", type=int, default=RECIPE["sequences_per_step"])
    parser.add_argument("--block-size", type=int, default=RECIPE["block_size"])
    parser.add_argument("--learning-rate", type=float, default=RECIPE["lr"], help="of Muon; AdamW has a tenth")
    parser.add_argument("--warmup-steps", type=int, default=RECIPE["warmup_steps"])
    parser.add_argument("--fields", type=json.loads, default={}, help='of the config, as JSON: {"hidden_size": 64}')
    args = parser.parse_args()

    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    at_once = args.batch_size * accelerator.num_processes
    if args.sequences_per_step % at_once:
        parser.error(f"{args.sequences_per_step} sequences a step are no multiple of the {at_once} of all devices")
    accelerator.gradient_accumulation_steps = accumulation = args.sequences_per_step // at_once
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = preset(args.preset, **{"eos_token_id": tokenizer.eos_token_id, **args.fields})
    if len(tokenizer) > config.vocab_size:
        parser.error(f"{args.tokenizer} has {len(tokenizer)} tokens, and the model {config.vocab_size}")
    set_seed(42)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = Muon(muon_parameter_groups(model, args.learning_rate, RECIPE["weight_decay"]))
    devices = accelerator.num_processes  # accelerate advances the schedule once a process
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, args.warmup_steps * devices, args.max_steps * devices,
        min_lr_rate=RECIPE["final_lr"] / RECIPE["lr"],
    )  # fmt: skip
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    stream = load_stream(args.text, tokenizer, args.block_size)
    stream = split_dataset_by_node(stream, accelerator.process_index, accelerator.num_processes)

    checkpoints = args.output / "checkpoints"
    found = sorted(checkpoints.glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
    done = int(found[-1].name[5:]) if found else 0
    batches = itertools.islice(endless(stream, args.batch_size), done * accumulation, None)
    if found:
        accelerator.print(f"going on from {found[-1]}")
        accelerator.load_state(found[-1])
    model.train()
    tokens, start = args.sequences_per_step * args.block_size, time.perf_counter()
    for step in range(done + 1, args.max_steps + 1):
        for batch in itertools.islice(batches, accumulation):
            with accelerator.accumulate(model):
                input_ids = batch["input_ids"].to(accelerator.device)
                loss = model(input_ids=input_ids, labels=input_ids).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), RECIPE["max_grad_norm"])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if step % 10 == 0 or step == args.max_steps:
            rate = tokens * (step - done) / (time.perf_counter() - start)
            accelerator.print(
                f"step {step} of {args.max_steps}, loss {loss.item():.4f}, {rate:,.0f} tokens/s, "
                f"peak memory {peak_memory_gib():.2f} GiB a process"
            )
        if step % args.save_steps == 0:
            draft = checkpoints / f"step-{step}.partial"  # whole, or not a checkpoint
            accelerator.save_state(draft)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                draft.rename(checkpoints / f"step-{step}")
                for old in sorted(checkpoints.glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))[:-2]:
                    shutil.rmtree(old)

    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False).save_pretrained(args.output, state_dict=weights)
        tokenizer.save_pretrained(args.output)
    # DDP must not outlive the process group: freed last, it would wait for gloo's threads while it keeps them waiting.
    model, optimizer, scheduler = accelerator.free_memory(model, optimizer, scheduler)
    accelerator.end_training()


if __name__ == "__main__":
    main()
