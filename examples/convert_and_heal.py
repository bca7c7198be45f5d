"""python examples/convert_and_heal.py allenai/OLMoE-1B-7B-0924 text.txt work

Tie a checkpoint, heal it and let it write, in Python. The same in the shell: `tiedmoe convert`, then `tiedmoe heal`.
SOURCE is a folder or hub id, TEXT what `tiedmoe heal --data` takes; `work/tied` and `work/healed` are written.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from tiedmoe_cli.terminal import show_progress
from tiedmoe_conversion import ConversionRecipe, execute, make_plan
from transformers_tiedmoe.training.arguments import TiedMoeTrainingArguments
from transformers_tiedmoe.training.heal import heal

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source")
parser.add_argument("text")
parser.add_argument("work")
parser.add_argument("--group-size", type=int, default=2)
parser.add_argument("--calibration-tokens", type=int, default=32768)
parser.add_argument("--max-steps", type=int, default=200)
parser.add_argument("--block-size", type=int, default=512)
arguments = parser.parse_args()
tied, healed = f"{arguments.work}/tied", f"{arguments.work}/healed"

recipe = ConversionRecipe(
    source=arguments.source,
    output=tied,
    group_size=arguments.group_size,
    calibration=arguments.text,
    calibration_tokens=arguments.calibration_tokens,
    calibration_block_size=arguments.block_size,
)
plan = make_plan(recipe)  # reads headers only
print(plan)
config = TiedMoeTrainingArguments(
    model=tied,
    data=arguments.text,
    output_dir=healed,
    teacher=arguments.source,
    max_steps=arguments.max_steps,
    block_size=arguments.block_size,
)
with show_progress() as progress:  # a bar, or lines where there is no terminal
    execute(plan, progress)
    report = heal(config, progress)
print(f"held-out perplexity {report['before']['perplexity']:.2f} -> {report['after']['perplexity']:.2f}")

tokenizer, model = AutoTokenizer.from_pretrained(healed), AutoModelForCausalLM.from_pretrained(healed)
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=30)[0]))
