"""What llama.cpp makes of untied checkpoints: `python tests/llama_cpp_check.py LLAMA_CPP`.

LLAMA_CPP is a checkout of llama.cpp (llama-cpp-python's source holds one under vendor/). For each family a small
random source is tied by `average`, untied, and converted by llama.cpp's own convert_hf_to_gguf.py. Where
llama-cpp-python is installed its logits there are compared with the tied model's in transformers. Exit status 1 where
a family is not converted or its logits differ.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import transformers_tiedmoe  # noqa: F401  the Auto classes learn of tied models
from tiedmoe_conversion import ConversionRecipe, convert, untie
from tiedmoe_demo import DemoConfig
from tiedmoe_demo.train_source import train_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from tables import RESULTS, parser_of, write_json
from timing import versions

TEXT = "It is a truth universally acknowledged, that a single man"
TOLERANCE = 1e-4  # of a logit of size 1 to 10 in float32; the source's experts are 0.1 and more away
COMMON = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 2}
COMMON |= {"num_experts_per_tok": 2, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DEEPSEEK = {"intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1}
DEEPSEEK |= {"first_k_dense_replace": 1, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32}
DEEPSEEK |= {"v_head_dim": 32, "q_lora_rank": 32, "n_group": 1, "topk_group": 1}
QWEN = {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8}
# llama.cpp knows whether a family normalises the chosen experts' weights from the architecture, not from the file.
FAMILIES = {
    "mixtral": {"intermediate_size": 32, "num_local_experts": 8},
    "olmoe": {"intermediate_size": 32, "num_experts": 8, "norm_topk_prob": False},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 48, "norm_topk_prob": False},
    "qwen3_moe": QWEN | {"head_dim": 32, "norm_topk_prob": True},
    "deepseek_v2": DEEPSEEK | {"topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},  # as released configs say
}
# The converter knows pre-tokenizers by a hash of what they make of a text, none trained here; this one is GPT-2's.
TO_GGUF = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
sys.argv = [sys.argv[1] + "/convert_hf_to_gguf.py", *sys.argv[2:]]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_untied(family: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Make a random source in `folder`/source, tied and untied beside it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **COMMON, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms, which start at one: a norm left out or taken twice is to be seen
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    source, tied = str(folder / "source"), str(folder / "tied")
    tying = {"method": "average", "group_size": 2, "skip_first": 1, "skip_last": 1}
    convert(ConversionRecipe(source=source, output=tied, measure=False, **tying))
    untie(tied, str(folder / "untied"))


def to_gguf(checkpoint: Path, llama_cpp: Path) -> str | None:
    """Write `checkpoint`.gguf with llama.cpp's converter; returns its last line where it failed."""
    command = [sys.executable, "-c", TO_GGUF, str(llama_cpp), str(checkpoint), "--outtype", "f32"]
    done = subprocess.run([*command, "--outfile", f"{checkpoint}.gguf"], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def logits_in_llama_cpp(path: str, tokens: list[int]) -> torch.Tensor:
    """Return logits (tokens, vocabulary) in float32; the cache is float32, too."""
    from llama_cpp import GGML_TYPE_F32, Llama

    model = Llama(path, n_ctx=64, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False)
    model.eval(tokens)
    return torch.tensor(model.scores[: len(tokens)])


@torch.no_grad()
def check(family: str, tokenizer: PreTrainedTokenizerFast, llama_cpp: Path, folder: Path) -> dict:
    """Tie, untie, convert, run: the greatest difference of any logit between llama.cpp and transformers.

    The source's is what the two programs differ by; the untied checkpoint's, to the tied model, should be no more.
    """
    make_untied(family, tokenizer, folder)
    errors = {name: to_gguf(folder / name, llama_cpp) for name in ("source", "untied")}
    result = {"family": family, "converted": not errors["untied"]}
    if any(errors.values()) or not installed():
        return result | {name: error for name, error in errors.items() if error}
    tokens = tokenizer(TEXT)["input_ids"]
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name) for name in ("source", "tied")}
    logits = {name: model(torch.tensor([tokens])).logits[0] for name, model in models.items()}
    theirs = {name: logits_in_llama_cpp(f"{folder / name}.gguf", tokens) for name in ("source", "untied")}
    differences = {
        "source": theirs["source"] - logits["source"],
        "untied": theirs["untied"] - logits["tied"],
        "untied, to the source": theirs["untied"] - logits["source"],  # how wrong a wrong checkpoint would look
    }
    return result | {"tokens": len(tokens)} | {name: each.abs().max().item() for name, each in differences.items()}


def installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("llama_cpp", type=Path, help="checkout of llama.cpp")
    parser.add_argument("--output", type=Path, default=RESULTS / "untied_in_llama_cpp.json")
    options = parser.parse_args(arguments)
    if not (options.llama_cpp / "convert_hf_to_gguf.py").is_file():
        parser.error(f"{options.llama_cpp} holds no convert_hf_to_gguf.py; give a checkout of llama.cpp")
    tokenizer, results = train_tokenizer(DemoConfig().text, vocab_size=320), []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            results.append(check(family, tokenizer, options.llama_cpp.resolve(), Path(folder)))
        print(json.dumps(results[-1]), flush=True)
    write_json(options.output, {"versions": versions(), "families": results})
    if not installed():
        print("llama-cpp-python is not installed: converted, but nothing was run and no logits were compared")
    raise SystemExit(not all(each["converted"] and each.get("untied", 0.0) <= TOLERANCE for each in results))


if __name__ == "__main__":
    main()
