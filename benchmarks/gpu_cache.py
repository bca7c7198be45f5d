"""Triton's compile cache for `gpu_check.py`, made without a GPU: `make gpu-cache` writes `.gpu-cache.tar.xz`.

    python benchmarks/gpu_cache.py build     # compile for sm_90 what stages a and b launch, and pack it
    python benchmarks/gpu_cache.py unpack    # there; where it is of other sources, compile on all cores
    python benchmarks/gpu_cache.py verify    # launches with real tensors must find every kernel

The launches are the checks', the tuner's and the tests' own, on the meta device or the CPU under a driver that names
the chip. Triton's keys count its compiled library in, which differs between Pythons: unpacking makes them anew for the
triton that is there, of the same version, and writes the place's paths into the files that group a kernel's others.
"""

import base64
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # no intermediate code: cubin and json are what a launch needs

import pytest
import torch
import triton
from compile_table import compiling
from experts import CHECKED_CASES, GPU_CASES, parse_cases
from gpu_check import BAR_CASES, CACHE, MORE_CASES, ROOT, TESTS, gpu_tests
from measure import make_problem, outcome, prepare
from peers import PEERS
from shapes import Case
from tables import parser_of
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import cache

from tiedmoe_kernels import tune, tuning

ARCHIVE = ROOT / ".gpu-cache.tar.xz"


def launch(case: Case, device: torch.device) -> None:
    """Make the launches of a case: those that are timed, and those that are checked, without a gradient there, too."""
    problem = make_problem(case, device)
    prepare(PEERS[0], problem).call(0)
    for _ in range(2):
        outcome(PEERS[0], problem, problem.pools[0], case.dtype)
        for weight in problem.pools[0]:
            weight.grad = None


def jobs(tma: bool) -> list[Callable[[], object]]:
    """Return what makes the launches of stages a and b: checks, benchmarks, then the tuner's candidates."""
    timed = [GPU_CASES[number] for number in parse_cases(f"{BAR_CASES},{MORE_CASES}", len(GPU_CASES))]
    found: list[Callable] = [partial(launch, case, torch.device("meta")) for case in (*CHECKED_CASES, *timed)]
    found += [partial(tune.time_defaults, "meta", tune.OLMOE, [tokens], None) for tokens in tune.DEFAULTS_AT]
    for problem in tune.PROBLEMS:
        tried = tune.candidates(problem, tma)
        found += [partial(try_once, problem.kernel, problem.tokens, config) for config in tried]
    return found


def try_once(kernel: str, tokens: int, config: tuning.Config) -> None:
    call, _ = tune.calls(kernel, tokens, tune.OLMOE, "meta")
    with tune.forced(kernel, config):
        call()


class OnCpu(TorchFunctionMode):
    """What asks for a CUDA device gets the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def here(value):
            return "cpu" if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value

        if function is torch.Tensor.cuda:
            return args[0]
        return function(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


def launch_tests(share: slice) -> None:
    """Make the launches of a share of stage a's tests. They fail, as nothing is computed: after what they launch."""
    sys.path.insert(0, str(ROOT / "tests"))  # `tests/conftest.py` imports from there
    selected = f"{TESTS} and not compile"  # dynamo does not look through the mode
    options = ["-m", "gpu", "-k", selected, "-p", "no:cacheprovider", "--tb=no", "-q", "--no-header", "--no-summary"]

    class Share:
        def pytest_collection_modifyitems(self, items: list) -> None:
            items[:] = items[share]

    with mock.patch.object(torch.cuda, "is_available", return_value=True), OnCpu():
        pytest.main([*options, *gpu_tests()], plugins=[Share()])


@contextlib.contextmanager
def keys_kept() -> Iterator[None]:
    """Leave in a kernel's folder of triton's cache what its key is made of besides `triton_key()`."""
    key_of = compiler.get_cache_key

    def keeping(*arguments, **options) -> str:
        key = key_of(*arguments, **options)
        place = folder_of(key)
        place.mkdir(parents=True, exist_ok=True)
        (place / "key").write_text(key.removeprefix(cache.triton_key()))
        return key

    with mock.patch.object(compiler, "get_cache_key", keeping):
        yield


def folder_of(key: str, folder: Path | None = None) -> Path:
    """Return where triton keeps the kernel of a key: as `triton.compile` and `get_cache_manager` name it."""
    name = base64.b32encode(hashlib.sha256(key.encode()).digest()).decode().rstrip("=")
    return (folder or Path(triton.knobs.cache.dir)) / name


def compile_share(folder: str, target: GPUTarget, share: slice) -> None:
    """Compile a share of the jobs into the folder, and say how many kernels there were."""
    triton.knobs.cache.dir = folder
    with compiling(target), keys_kept(), tune.counted():
        for job in jobs(tma=target.backend == "cuda" and target.arch >= 90)[share]:
            job()
        launch_tests(share)


def compile_all(folder: Path, target: GPUTarget, seconds: float = 1e6) -> bool:
    """Compile every job, on all cores; whether all ended well in time. What was compiled by then is kept."""
    context, end, cores = multiprocessing.get_context("spawn"), time.monotonic() + seconds, os.cpu_count() or 1
    shares = [(str(folder), target, slice(part, None, cores)) for part in range(cores)]
    running = [context.Process(target=compile_share, args=share, daemon=True) for share in shares]
    for process in running:
        process.start()
    for process in running:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()
    return all(process.exitcode == 0 for process in running)


def pack(folder: Path, archive: Path, target: GPUTarget) -> dict:
    """Pack the kernels of a cache that was filled under `keys_kept`; what is in it."""
    compiled = {path.parent for path in folder.glob("*/*.json")}  # others have failed
    keys = sorted(key for key in folder.glob("*/key") if key.parent in compiled)
    about = facts(target) | {"kernels": len(keys)}
    (folder / "about.json").write_text(json.dumps(about))
    files = [path for key in keys for path in sorted(key.parent.iterdir()) if not path.name.startswith("__grp__")]
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in [folder / "about.json", *files]:
            if path.suffix in (".cubin", ".hsaco", ".json", ""):
                tar.add(path, path.relative_to(folder))
    return about | {"kilobytes": round(archive.stat().st_size / 1e3)}


def facts(target: GPUTarget) -> dict:
    """Return what an archive must agree in to be of use."""
    return {"sources": sources(), "triton": triton.__version__, "target": f"{target.backend} {target.arch}"}


def unpack(archive: Path, folder: Path) -> dict:
    """Unpack an archive into triton's cache under the keys of the triton that is here; what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # none in Python before 3.11.4
        tar.extractall(scratch)
        for key in Path(scratch).glob("*/key"):
            place = folder_of(cache.triton_key() + key.read_text(), folder)
            files = [path.name for path in key.parent.iterdir() if path.suffix]
            group = {"child_paths": {name: str(place / name) for name in files}}
            metadata = next(name for name in files if name.endswith(".json"))
            (key.parent / f"__grp__{metadata}").write_text(json.dumps(group))
            if not place.exists():
                key.parent.rename(place)
        return json.loads((Path(scratch) / "about.json").read_text())


def sources() -> str:
    """Return a digest of the kernels' package, on which triton's keys depend."""
    files = sorted(path for path in tuning.CONFIGS.parent.rglob("*") if path.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def verify(folder: Path, target: GPUTarget) -> bool:
    """Whether launches with tensors that have memory find every kernel in the folder, in this fresh process."""
    triton.knobs.cache.dir = str(folder)
    with compiling(target), tune.counted() as (hits, misses):
        for case in [case for case in CHECKED_CASES if case.T <= 512]:
            launch(case, torch.device("cpu"))
    return bool(hits) and not misses


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=("build", "unpack", "verify"))
    parser.add_argument("--arch", type=int, default=90, help="build: of a CUDA chip")
    parser.add_argument("--stand-in", action="store_true", help="unpack: there is no GPU to compile for")
    options = parser.parse_args()
    target = GPUTarget("cuda", options.arch, 32)
    if options.what == "verify":
        return int(not verify(CACHE, target))
    if options.what == "build":
        if not compile_all(CACHE, target):
            return 1
        print(json.dumps(pack(CACHE, ARCHIVE, target)))
        return 0
    about = unpack(ARCHIVE, CACHE) if ARCHIVE.exists() else {"missing": f"{ARCHIVE.name}: `make gpu-cache`"}
    print(json.dumps({"unpacked": about, "sources_here": sources()}), flush=True)
    if not options.stand_in:
        here = triton.runtime.driver.active.get_current_target()
        if not facts(here).items() <= about.items():  # else what is not there compiles when it is launched
            compile_all(CACHE, here, seconds=15)
    return 0


if __name__ == "__main__":
    sys.exit(main())
