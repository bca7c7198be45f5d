"""Tied models over several processes, for real: two CPU processes under torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_fsdp2_has_the_gradients_of_one_process():
    """Pools and layers are FSDP2 units of their own; a pool's gradient is that of all layers that read it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "fsdp2_worker.py"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert "equal gradients" in done.stdout, done.stderr[-3000:]
