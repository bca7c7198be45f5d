"""Tied models over several processes, for real: two CPU processes under torchrun."""

import subprocess
import sys
from pathlib import Path

import parallel_worker
import pytest
import transformers
from fsdp2_worker import CASES

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.xdist_group("two_processes")
def test_fsdp2_and_ddp_have_the_gradients_of_one_process():
    """Pools and layers are FSDP2 units of their own; a pool's gradient is that of all layers that read it.

    Each pool is gathered once in forward and once in backward, and reduced once: counted there, too.

    One process runs transformers' own experts; the two run them, or ours, which compute it once per pool.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "fsdp2_worker.py"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("equal gradients") == len(CASES), done.stdout + done.stderr[-3000:]
    assert "equal weights after Muon's steps" in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="refused before transformers 5.23")
@pytest.mark.xdist_group("two_processes")
def test_tensor_and_expert_parallelism_equal_one_process(tmp_path):
    """Logits, generation and gradients, with a slot map and without; each process holds half of every pool."""
    command = [sys.executable, "parallel_worker.py", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("equal") == len(parallel_worker.CASES), done.stdout
    assert done.stdout.count("refused") == len(parallel_worker.REFUSED), done.stdout
