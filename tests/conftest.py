"""What every test runs under: offline, one thread, seeded, and with NaN in uninitialised memory."""

import os
import random
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="tiedmoe-tests-")  # removed when the process ends
# Before anything imports huggingface_hub or torch: both read these once.
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=_CACHE.name, TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# `torch.empty` then gives NaN, so a weight nobody wrote shows; torch does this only in deterministic mode. For the whole
# session, not test by test: fixtures of a module would run without it.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, alone or in any order."""
    random.seed(0)
    torch.manual_seed(0)
