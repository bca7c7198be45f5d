"""What the tests that draw broken input share: how many cases, what is drawn, the time and memory of one.

A hundred cases; `TIEDMOE_FUZZ_CASES=10000` (`make fuzz`) asks for as many as it says, and other ones every time. Every
case has 20 seconds and 2 GB.
"""

import json
import os
import resource
import signal
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("TIEDMOE_FUZZ_CASES", "120"))
SECONDS, BYTES = 20, 2 << 30
EXTRA_FIELDS = (
    "quantization_config", "auto_map", "text_config", "architectures", "tie_word_embeddings", "torch_dtype", "dtype",
    "model_type",
    "rope_scaling", "rope_parameters", "layer_types", "num_experts", "num_local_experts", "head_dim",
    "per_layer_config",
    "sliding_window", "n_group", "first_k_dense_replace", "mlp_only_layers", "pad_token_id", "groups", "family",
    "_name_or_path",
)  # fmt: skip

numbers = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 4, 5, 7, 32, 33, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, 2**64, 10**30]),
    st.integers(-(2**70), 2**70),
    st.integers(0, 64),
)
words = st.one_of(
    st.sampled_from(
        [
            "mixtral",
            "olmoe",
            "gpt2",
            "tiedmoe",
            "../x",
            "/etc/passwd",
            "",
            ".",
            "bfloat16",
            "float8_e4m3fn",
            "F32",
            "BF16",
            "F4",
            "BOOL",
            "model.safetensors",
            "silu",
            "nan",
            "\ud800",
            "a" * 5000,
            "a\0b",
            "__class__",
        ]
    ),
    st.text(max_size=12),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), words),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)


def cases(share):
    """How many, and whether they are the same ones every time."""
    return settings(
        max_examples=max(round(CASES * share), 1),
        deadline=None,
        database=None,
        derandomize="TIEDMOE_FUZZ_CASES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )


class Limits:
    """Time and memory for one case."""

    def __enter__(self):
        self.soft, self.hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, self.hard))
        self.handler = signal.signal(signal.SIGALRM, self.stop)
        signal.alarm(SECONDS)

    def __exit__(self, *error):
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.handler)
        resource.setrlimit(resource.RLIMIT_AS, (self.soft, self.hard))

    @staticmethod
    def stop(*args):
        raise TimeoutError(f"the case took more than {SECONDS} s")


def tree(folder):
    """Every path below, with size and time of change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
        for path in Path(folder).rglob("*")
        if path != Path(folder) / "case"
    }


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def spliced(draw, content):
    """A few bytes of `content` replaced, left out or put in."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 16)))
    return content[:start] + draw(st.binary(max_size=16)) + content[end:]
