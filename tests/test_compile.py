"""Every shipped tile configuration, compiled for chips that are not here (`benchmarks/compile_table.py`, `make
compile-table`).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRITONS = {"installed": None, "3.6": Path(sys.prefix) / "triton-3.6"}  # the second is put there by the Makefile


def compile_table(triton: Path | None, *arguments: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [*([str(triton)] if triton else []), str(ROOT / "kernels" / "torch-ext"), env.get("PYTHONPATH", "")]
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "compile_table.py"), *arguments]
    return subprocess.run(
        command, env=env | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}, capture_output=True, text=True
    )


# The triton of a Hopper machine with torch 2.11 is 3.6; the other pairs are compiled by `-m minutes`.
PAIRS = [
    pytest.param(triton, [*pair], id=f"{triton}-{'+'.join(pair)}", marks=getattr(pytest.mark, mark))
    for triton, pair, mark in (
        ("3.6", ("sm_90", "sm_100"), "slow"), ("installed", ("sm_80", "gfx942"), "slow"),
        ("installed", ("sm_90", "sm_100"), "minutes"), ("3.6", ("sm_80", "gfx942"), "minutes"),
    )
]  # fmt: skip


@pytest.mark.parametrize(("triton", "architectures"), PAIRS)
def test_compiles_without_spills_and_within_shared_memory(triton, architectures, tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if triton == "3.6" and not TRITONS[triton].exists():
        pytest.skip(f"no triton 3.6 in {TRITONS[triton]}; `make test` puts it there")
    output = tmp_path / "rows.json"
    run = compile_table(TRITONS[triton], "--quick", "--output", str(output), "--architectures", *architectures)
    # stderr names every fault, and every entry of default.json that nothing used
    assert run.returncode == 0, run.stderr[-4000:]
    rows = json.loads(output.read_text())
    assert {row["architecture"] for row in rows} == set(architectures)
    assert triton == "installed" or {row["triton"] for row in rows} == {"3.6.0"}
    assert all(row["registers"] > 0 for row in rows)
    assert all(row["loop"] is None if row["architecture"] == "gfx942" else row["loop"] > 20 for row in rows)


def test_a_spill_too_much_shared_memory_and_an_unused_entry_are_faults(tmp_path, monkeypatch):
    table = compile_table_here(monkeypatch)
    rows = json.loads((ROOT / "benchmarks" / "results" / "compile_newest.json").read_text())
    rows = [row for row in rows if row["architecture"] == "sm_90" and row["kernel"] != "weight_grad"]
    rows[0]["stack"], rows[1]["shared"] = 8, 2**20
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["--table", str(tmp_path / "rows.json"), "--output", str(tmp_path / "table.md")]
    monkeypatch.setattr(sys, "argv", ["compile_table.py", *words])
    with pytest.raises(SystemExit) as ended:
        table.main()
    for fault in (
        "8 bytes of stack a thread; expected 0",
        f"{2**20} bytes of shared memory a block; sm_90 has 232448",
        "no case compiles the entry",
    ):
        assert fault in ended.value.code
    assert "| sm_90 | " in (tmp_path / "table.md").read_text()


def compile_table_here(monkeypatch):
    """The script as a module of this process, which compiles nothing."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compile_table")


def test_instructions_of_the_main_loop_are_counted(monkeypatch):
    """Not of an outer loop, of one without products, of a wait out of line, which jumps back from behind the end."""
    table = compile_table_here(monkeypatch)
    code = [
        "IADD3 R1, R1, 0x1, RZ", "@P0 BRA 0x0000", "MOV R2, R3", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24",
        "@!P1 BRA 0x00b0", "LDGSTS.E [R1], [R2.64]", "@P0 BRA 0x0030", "STG.E [R2.64], R24", "@P2 BRA 0x0020",
        "EXIT", "NOP", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2", "@!P1 BRA 0x00b0", "BRA 0x0050",
    ]  # fmt: skip
    sass = "\n".join(f"        /*{16 * n:04x}*/                   {line} ;" for n, line in enumerate(code))
    assert table.main_loop(sass) == 4
    assert table.main_loop("") == 0


REPEATED_DECODE = """
import torch, triton
import decode_host
from tiedmoe_kernels import triton_backend
from tiedmoe_kernels.spec import Spec

launched, looked_up = [], []

def of(argument):
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.dtype
    return type(argument) if "LazyDict" in str(argument) else argument  # for profilers

decode_host.stand_in_for_a_gpu(lambda kernel, *args: launched.append((kernel.name, *map(of, args))))
run = triton.runtime.jit.JITFunction.run
triton.runtime.jit.JITFunction.run = lambda kernel, *a, **k: looked_up.append(kernel.__name__) or run(kernel, *a, **k)

def decode(offset=0, T=2, dtype=torch.bfloat16):
    launched.clear(), looked_up.clear()
    x = torch.empty(T * 64 + 8, dtype=torch.bfloat16)[offset:][: T * 64].view(T, 64)
    gate_up, down = torch.empty(4, 64, 64, dtype=torch.bfloat16), torch.empty(4, 64, 32, dtype=torch.bfloat16)
    index, weights = torch.zeros(T, 2, dtype=torch.int64), torch.ones(T, 2, dtype=dtype)
    spec = Spec("silu", 1.702, 7.0, is_transposed=False, is_concatenated=True)
    triton_backend.forward(x, index, weights, gate_up, down, None, None, None, spec, False)
    return list(launched), len(looked_up)

first, lookups = decode()
assert len(first) == lookups == 3, (first, lookups)
assert decode() == (first, 0)  # the very arguments that triton's own launch passes on
for other in ({"offset": 1}, {"T": 1}, {"dtype": torch.float32}):
    assert decode(**other)[1] == 3, other
assert decode(offset=1)[1] == 3  # x is not aligned: looked up every time
assert decode() == (first, 0)

decode_host.main()
"""


def test_a_repeated_decode_is_launched_without_triton_s_lookup(tmp_path):
    pytest.importorskip("triton")
    paths = [ROOT / "benchmarks", ROOT / "kernels" / "torch-ext"]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", REPEATED_DECODE], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "experts_forward: " in run.stdout
