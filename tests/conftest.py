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


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, alone or in any order."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory():
    """`torch.empty` gives NaN (torch does this only in deterministic mode), so a weight nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
