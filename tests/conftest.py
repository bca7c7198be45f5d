"""What every test runs under: offline, one thread, seeded, NaN in uninitialised memory, Triton's interpreter without a
GPU.
"""

import gc
import importlib.util
import os
import random
import subprocess
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="tiedmoe-tests-")  # removed when the process ends
# Before anything imports huggingface_hub, transformers or torch: they read these once. transformers would look for
# kernels of the Hub where the package `kernels` is there, and these tests are about ours.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=_CACHE.name,
    USE_HUB_KERNELS="NO",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# Without a GPU the Triton kernels run in Triton's interpreter, which `triton.jit` asks for when a module is imported,
# triton's own too: so this comes before anything imports triton, as the calls of torch below do. bfloat16 is wrong
# there; triton_interpreter.py repairs it, so that these tests cover it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        from triton_interpreter import remember_builtins, repair_bfloat16

        repair_bfloat16()
        remember_builtins()

# `torch.empty` then gives NaN, so a weight nobody wrote shows; torch does this only in deterministic mode. For the
# whole session, not test by test: fixtures of a module would run without it.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """No `gc.collect()` of a test looks through what is there before its file begins, the imports: 0.3 s each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or nanobind reports all of triton as leaked


def _skip_if_soft_routing_is_refused():
    """An older transformers than `SOFT_SINCE` cannot route softly: what asks it to is skipped with the refusal."""
    try:
        return (yield)
    except Exception as error:
        if "routing='softmoe' needs transformers" not in str(error):
            raise
        import transformers
        from packaging.version import Version

        from transformers_tiedmoe.configuration_tiedmoe import SOFT_SINCE

        if Version(transformers.__version__) >= Version(SOFT_SINCE):
            raise
        pytest.skip(f"soft routing needs transformers {SOFT_SINCE}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Skip a test whose fixtures route softly, where that is refused."""
    return (yield from _skip_if_soft_routing_is_refused())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test that routes softly, where that is refused."""
    return (yield from _skip_if_soft_routing_is_refused())


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, alone or in any order."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each weight gradient on the CPU was computed of."""
    from tiedmoe_kernels import torch_backend

    found, original = [], torch_backend.backward_weight

    def counted(segments, *args):
        found.append(len(segments))
        return original(segments, *args)

    monkeypatch.setattr(torch_backend, "backward_weight", counted)
    return found


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a disk of 64 KiB."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this machine does not let its user mount a tmpfs")
    yield small
    subprocess.run(["umount", small], check=True)
