"""The benchmarks' arithmetic, planning and verdicts, and every line of them that needs no GPU, at tiny sizes."""

import functools
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import experts_cpu
import experts_gpu
import measure
import peers
import timing
from measure import Bench
from peers import PEERS, Peer
from shapes import GROUP_SIZES, OLMOE, QWEN3, ROUTINGS, SHAPES, TINY, TOKENS, Case, route

CPU = torch.device("cpu")
RATES = {"matmul_tflops": 0.5, "copy_tb_per_s": 0.01}
BY_NAME = {peer.name: peer for peer in PEERS}


def rows_of(case, chosen):
    bench = Bench(case, CPU, RATES, seconds=0.0, least=3, most=3)
    return {peer.name: bench.row(peer) for peer in chosen}


# --- what is counted -------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_issue():
    numbers = {tuple(shape[1:]) for shape in SHAPES}
    assert numbers == {
        *((64, 2048, 1024, 8), (128, 2048, 768, 8), (8, 4096, 14336, 2)),
        *((n * 60, 1536, 768, 4) for n in (1, 2, 4)),
        *((n * 64, 2048, 1024, 6) for n in (1, 2, 4)),
    }
    assert TOKENS == (1, 8, 32, 64, 512, 2048, 8192, 32768)


def test_flops_and_bytes_against_numbers_counted_by_hand():
    # 8192 tokens * 8 experts * (2048*2048 + 1024*2048) weights * 2
    assert Case("forward", OLMOE, 8192).flops == 824_633_720_832
    assert Case("step", OLMOE, 8192, 4).flops == 3 * 4 * 2 * 824_633_720_832
    assert Case("step", OLMOE, 8192, 4, microbatches=1).flops == 3 * 4 * 824_633_720_832
    # the input, 8192 * 2048 * 2 bytes, and the pre-activation, 65536 * 2048 * 2 bytes: the issue's 302 MB and 34 MB
    assert Case("step", OLMOE, 8192).activation_bytes() == (33_554_432 + 268_435_456, 33_554_432)
    # one token reads 8 experts of 12,582,912 bytes: 48 us at 70 % of 3.0 TB/s
    assert Case("decode", OLMOE, 1).decode_bytes(8) == 8 * 12_582_912 + 2 * 4096
    assert Case("decode", OLMOE, 1).decode_bytes(8) / 3.0e12 / 0.7 * 1e6 == pytest.approx(48, abs=0.5)
    assert Case("decode", OLMOE, 32).weight_copies_bytes() == 32 * 8 * 12_582_912  # 3.2 ms at 1 TB/s written
    assert OLMOE.pool_bytes(2) == 805_306_368


@pytest.mark.parametrize("routing", ROUTINGS)
def test_route_gives_every_token_different_experts(routing):
    index, weights = route(4000, OLMOE, routing, torch.Generator().manual_seed(0))
    assert index.dtype == torch.int64
    assert index.shape == weights.shape == (4000, 8)
    assert index.min() >= 0
    assert index.max() < 64
    assert all(len(set(row)) == 8 for row in index[:100].tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(4000))
    counts = index.flatten().bincount(minlength=64).sort(descending=True).values
    mean = 4000 * 8 / 64
    if routing == "uniform":
        assert 0.7 * mean < counts[-1] <= counts[0] < 1.3 * mean
    else:
        assert counts[0] > 5 * mean
        assert counts[-1] < 0.5 * mean


def test_route_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="uniform, zipf"):
        route(1, TINY, "power law", torch.Generator())


# --- what is planned -------------------------------------------------------------------------------------------------


def test_the_cases_are_those_of_the_docstring():
    cases = experts_gpu.CASES
    assert len(cases) == len(set(cases)) == len(SHAPES) * 2 * (8 * (1 + 3) + 4)  # the whole grid
    described = [(case.kind, case.T, case.g) for case in cases[:7]]
    decodes = [("decode", T, 1) for T in (1, 8, 32)]
    steps = [("step", 8192, 1), ("step", 8192, 2)]
    assert described == [("forward", 8192, 1), ("step", 8192, 4), *decodes, *steps]
    assert all(case.shape == OLMOE and case.routing == "uniform" for case in cases[:7])
    assert {(case.shape, case.T) for case in cases[7:11]} == {(QWEN3, 8192), (QWEN3, 32768)}
    assert {(case.shape, case.routing) for case in cases[11:14]} == {(OLMOE, "zipf")}
    assert {case.T for case in cases[14:21]} == {64, 512, 2048, 32768}
    quick = cases[:44]
    assert {case.T for case in quick} == set(TOKENS)
    assert {case.g for case in quick} == set(GROUP_SIZES)
    for shape in SHAPES:
        assert {case.kind for case in quick if case.shape == shape} == {"forward", "step", "decode"}


def test_cases_are_chosen_by_number():
    assert experts_gpu.parse_cases("0-2,5", 6) == [0, 1, 2, 5]
    assert experts_gpu.parse_cases("all", 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="there are cases 0 to 5"):
        experts_gpu.parse_cases("4-6", 6)


def test_plan_has_peers_that_tune_themselves_after_all_others():
    tasks = experts_gpu.plan(experts_gpu.CASES, [0, 2], {"tiedmoe", "liger", "eager"})
    order = [(0, "tiedmoe"), (0, "eager"), (2, "tiedmoe"), (2, "eager"), (0, "liger"), (2, "liger")]
    assert [(task.number, task.peer.name) for task in tasks] == order


def test_run_plan_leaves_out_what_would_not_end_in_time():
    clock = [0.0]

    def execute(case):
        clock[0] += {"forward": 4.0, "step": 30.0}[case.kind]
        return {"key": case.key}

    cases = [Case("forward", TINY, 1), Case("step", TINY, 1), Case("step", TINY, 2), Case("forward", TINY, 2)]
    results, left_out = measure.run_plan(cases, execute, 50.0, now=lambda: clock[0])
    # 34 s gone after two: another step would take 30 s more, another forward 4 s
    assert [result["key"] for result in results] == [cases[0].key, cases[1].key, cases[3].key]
    assert left_out == [cases[2].key]
    assert clock[0] <= 50


def test_batched_mm_is_left_out_where_its_copies_do_not_fit():
    reason = peers.reason_to_leave_out(BY_NAME["batched_mm"], Case("forward", OLMOE, 8192), 80e9)
    assert reason == "its copies of the weights take 768.0 GiB"
    assert peers.reason_to_leave_out(BY_NAME["batched_mm"], Case("decode", OLMOE, 32), 80e9) is None


# --- how it is timed -------------------------------------------------------------------------------------------------


def test_ratios_are_taken_inside_a_round():
    # A machine that gets slower by a factor of two every round: the ratio does not see it.
    class Slowing:
        def time(self, call, number):
            return call(number) * 2.0**number

    times = timing.interleave({"a": lambda _: 3.0, "b": lambda _: 1.5}, Slowing(), seconds=9e9, least=2, most=6)
    assert times["a"] == [3.0 * 2**number for number in range(6)]
    assert timing.paired_ratio(times["a"], times["b"]) == {"median": 2.0, "p20": 2.0, "p80": 2.0, "n": 6}


def test_interleave_rotates_the_order():
    order = []
    calls = {name: lambda number, name=name: order.append((number, name)) for name in "abc"}
    timing.interleave(calls, timing.WallClock(), seconds=0, least=3, most=3)
    assert "".join(name for _, name in order) == "abcbcacab"
    assert timing.interleave({}, timing.WallClock(), seconds=0, least=3, most=3) == {}


def test_a_slow_call_drops_out_and_the_others_go_on(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        return lambda number: now.__setitem__(0, now[0] + seconds)

    calls = {"a": takes(0.25), "slow": takes(8.0), "b": takes(0.5)}
    times = timing.interleave(calls, timing.WallClock(), seconds=6.0, least=2, most=99)
    assert times["slow"] == [8.0, 8.0]
    assert len(times["a"]) == len(times["b"]) > 6
    assert timing.paired_ratio(times["slow"], times["a"]) == {"median": 32.0, "p20": 32.0, "p80": 32.0, "n": 2}
    alone = timing.interleave(
        {"a": takes(0.25), "slow": takes(8.0)}, timing.WallClock(), seconds=6.0, least=2, most=99
    )
    assert [len(each) for each in alone.values()] == [2, 2]


def test_spread():
    assert timing.spread([float(value) for value in range(11)]) == {"median": 5.0, "p20": 2.0, "p80": 8.0, "n": 11}
    assert timing.spread([4.0]) == {"median": 4.0, "p20": 4.0, "p80": 4.0, "n": 1}


def test_machine_rates_and_descriptions():
    rates = timing.machine_rates(CPU, size=64, copy_bytes=1 << 16)
    assert all(rate > 0 for rate in rates.values())
    assert timing.versions()["torch"] == torch.__version__
    described = timing.machine(CPU)
    assert described["cores"] == os.cpu_count()
    assert os.uname().nodename not in json.dumps(described)


def test_device_clock_uses_a_graph_for_those_it_is_told(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    used = []

    def timer(name, milliseconds):
        return lambda call, *, return_mode, **options: used.append((name, call(), return_mode)) or milliseconds

    monkeypatch.setattr(testing, "do_bench", timer("events", 5.0))
    monkeypatch.setattr(testing, "do_bench_cudagraph", timer("graph", 2.0))
    decode, forward = (lambda number: number), (lambda number: -number)
    clock = timing.DeviceClock([decode])
    assert (clock.time(decode, 7), clock.time(forward, 7)) == (2e-3, 5e-3)
    assert used == [("graph", 7, "median"), ("events", -7, "median")]


def test_what_only_a_device_has(monkeypatch):
    device = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    assert measure.peak_bytes(lambda number: None, device) == 250
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    if not torch.version.hip:
        # 8 experts of 12.6 MB at T=1 fit the 50 MiB twice less one: two pools; at T=32 one pool is more than the cache
        assert [measure.num_pools(Case("decode", OLMOE, T), device) for T in (1, 32)] == [2, 1]


# --- the peers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "decode", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_installed_peer_is_right_and_the_others_say_why_not(kind, dtype):
    case = Case(kind, TINY, 5, g=2 if kind == "step" else 1, dtype=dtype)
    chosen = [peer for peer in PEERS if peer.name != "grouped_mm compiled"]  # compiling takes longer than a test may
    rows = rows_of(case, chosen)
    here = {"tiedmoe", "grouped_mm", "batched_mm", "eager", *(["tiedmoe recompute"] if kind == "step" else [])}
    assert {name for name, row in rows.items() if row["status"] == "measured"} >= here
    for name in here:
        assert rows[name]["largest_error"] <= measure.TOLERANCE[dtype]
        assert rows[name]["ms"]["n"] == rows[name]["time_over_tiedmoe"]["n"] == 3
        rate = rows[name]["tb_per_s"] / 0.01 if kind == "decode" else rows[name]["tflops"] / 0.5
        assert rows[name]["of_machine"] == pytest.approx(rate)
    assert all(row["reason"] for row in rows.values() if row["status"] != "measured")
    json.dumps(rows, allow_nan=False)


def test_a_rate_is_work_over_time():
    bench = Bench(Case("forward", TINY, 16), CPU, RATES)
    assert bench._rate(2e-6) == {"tflops": 16 * 2 * 2 * 3 * 32 * 16 / 2e6, "of_machine": pytest.approx(0.098304)}
    bench = Bench(Case("decode", TINY, 1), CPU, RATES)  # two experts of 3 * 512 numbers, a token in and out
    assert bench._rate(1e-6)["tb_per_s"] == pytest.approx((2 * 3 * 512 + 2 * 32) * 2 / 1e6)


def test_saved_bytes_are_the_input_and_the_pre_activation():
    case = Case("step", TINY, 64, g=1, dtype=torch.float32)
    rows = rows_of(case, [BY_NAME[name] for name in ("tiedmoe", "tiedmoe recompute", "eager")])
    both, inputs = case.activation_bytes()
    routing = 4 * (64 * 2 + 9)  # order and offsets, int32
    assert both <= rows["tiedmoe"]["saved_bytes"] <= both + routing
    assert inputs <= rows["tiedmoe recompute"]["saved_bytes"] <= inputs + routing
    assert rows["eager"]["saved_bytes"] > both


def test_a_wrong_a_failing_and_a_missing_peer_are_reported():
    def wrong(gate_up, down):
        layer = peers.transformers_layer("eager", gate_up, down)
        return lambda x, index, weights: 1.05 * layer(x, index, weights)

    def failing(gate_up, down):
        raise RuntimeError("no kernel for this in /usr/lib/somewhere/kernels.so\nmore")

    def missing(gate_up, down):
        raise ImportError("No module named 'peer'")

    def infinite(gate_up, down):
        return lambda x, index, weights: x / 0

    makers = {"wrong": wrong, "failing": failing, "missing": missing, "infinite": infinite}
    rows = rows_of(Case("forward", TINY, 8), [BY_NAME["eager"], *(Peer(*each) for each in makers.items())])
    assert rows["eager"]["status"] == "measured"
    assert rows["wrong"]["status"] == "wrong"
    assert rows["wrong"]["reason"].startswith("relative error of y 5.")
    assert rows["failing"] == {"status": "failed", "reason": "RuntimeError: no kernel for this in"}
    assert rows["missing"] == {"status": "left out", "reason": "not installed: No module named 'peer'"}
    assert rows["infinite"]["status"] == "wrong"
    json.dumps(rows, allow_nan=False)


def test_a_case_that_does_not_fit_is_a_failed_row(monkeypatch):
    def make_problem(case, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "make_problem", make_problem)
    row = rows_of(Case("forward", TINY, 8), [BY_NAME["tiedmoe"]])["tiedmoe"]
    assert row == {"status": "failed", "reason": "OutOfMemoryError: CUDA out of memory"}


def test_a_wrong_gradient_is_found():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    def build(gate_up, down):
        layer = peers.transformers_layer("eager", gate_up, down)
        return lambda x, index, weights: layer(x, index, Halved.apply(weights))

    row = rows_of(Case("step", TINY, 8, dtype=torch.float32), [Peer("halved", build)])["halved"]
    assert row["reason"] == "relative error of grad weights 5.0e-01"


def test_float64_layer_is_the_layer():
    index, weights = route(6, TINY, "uniform", torch.Generator().manual_seed(1))
    x, gate_up, down = (torch.randn(size, dtype=torch.float64) for size in ((6, 32), (8, 32, 32), (8, 32, 16)))
    y = measure.float64_layer(gate_up, down)(x, index, weights.double())
    for t in range(6):
        expected = torch.zeros(32, dtype=torch.float64)
        for e, w in zip(index[t].tolist(), weights[t].double()):
            gate, up = (gate_up[e] @ x[t]).split(16)
            expected += w * (down[e] @ (F.silu(gate) * up))
        torch.testing.assert_close(y[t], expected)


def test_decoding_that_no_graph_can_hold_is_timed_without_one(monkeypatch):
    """A clock that refuses to capture one call, as a device would."""

    class Clock:
        def __init__(self, in_graph):
            self.in_graph = in_graph

        def time(self, call, number):
            if len(self.in_graph) > 1:
                raise RuntimeError("operation not permitted when stream is capturing")
            return 1e-3 if call in self.in_graph else 2e-3

    bench = Bench(Case("decode", TINY, 2), CPU, RATES)
    bench.ours = measure.prepare(BY_NAME["tiedmoe"], bench.problem)
    bench.device = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(measure, "clock_for", lambda device, in_graph: Clock(in_graph))
    for name, why in (("eager", "waits for the device"), ("batched_mm", "not permitted when stream")):
        row = bench._time(BY_NAME[name], measure.prepare(BY_NAME[name], bench.problem))
        assert why in row["no_graph"]
        assert row["time_over_tiedmoe"]["median"] == 2.0


def test_liger_is_called_as_its_wheel_offers_and_compiled_before_it_is_tuned(monkeypatch):
    """A stand-in with the signatures of liger-kernel 0.8.5 and of triton's autotuner."""
    pytest.importorskip("triton")
    happened = []

    class Kernel:
        configs, keys = [1, 2], ["H_dim"]

        def warmup(self, *args, grid, **options):
            happened.append(("compiled", options["H_dim"]))

        def run(self, *args, grid, warmup, **options):
            happened.append(("run", options["H_dim"]))

    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x, gate_up, down, index, weights):
            assert index.dtype == torch.int32
            ops.fused_moe_kernels.kernel.run(x, grid=(1,), warmup=False, H_dim=x.size(1))
            return measure.float64_layer(gate_up, down)(x, index.long(), weights)

    ops = types.ModuleType("liger_kernel.ops")
    ops.LigerFusedMoEFunction, ops.fused_moe_kernels = LigerFusedMoEFunction, types.SimpleNamespace(kernel=Kernel())
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    for case in (Case("forward", TINY, 9), Case("step", TINY, 9, g=2)):
        assert rows_of(case, [BY_NAME["liger"]])["liger"]["status"] == "measured"
    assert happened[:3] == [("compiled", 32), ("run", 32), ("run", 32)]
    assert [what for what, _ in happened].count("compiled") == 1


# --- what it says ----------------------------------------------------------------------------------------------------


def row_of(number, peer="tiedmoe", ratio=1.0, **fields):
    over = {"median": ratio, "p20": ratio, "p80": ratio, "n": 5}
    row = {"case": number, "key": experts_gpu.CASES[number].key, "peer": peer, "status": "measured", "of_machine": 0.5}
    row |= {"ms": {"median": 0.04, "p20": 0.03, "p80": 0.05, "n": 5}, "time_over_tiedmoe": over, "largest_error": 4e-3}
    return row | fields


def results(forward=460.0, slower=1.2):
    return [
        row_of(0, tflops=forward),
        row_of(0, "eager", slower, tflops=300.0),
        {"case": 0, "key": "forward", "peer": "sonicmoe", "status": "left out", "reason": "not installed"},
        row_of(1, tflops=410.0, saved_bytes=302_300_000),
        row_of(2, tb_per_s=2.5),
    ]


def test_bar_passes_fails_and_says_what_was_not_measured():
    assert experts_gpu.bar(results()) == [
        "- case 0, >= 450 TFLOP/s: 460, pass",
        "- case 1, >= 400 TFLOP/s: 410, pass",
        "- case 2, <= 48 us: 40, pass",
        "- case 3, <= 252 us: not measured",
        "- case 4, <= 378 us: not measured",
        "- case 1, <= 302 MB saved by one layer: 302, pass",
        "- never slower than transformers' best, time over ours >= 1, 1 rows: "
        "1.20 (forward OLMoE T=8192 g=1 uniform bfloat16, eager), pass",
    ]
    bad = experts_gpu.bar(results(forward=449.0, slower=0.99))
    assert bad[0].endswith("449, fail")
    assert bad[-1].endswith("0.99 (forward OLMoE T=8192 g=1 uniform bfloat16, eager), fail")


def test_a_wrong_result_is_no_measurement():
    found = results()
    found[0] |= {"status": "wrong", "reason": "relative error of y 3.0e-02"}
    assert experts_gpu.bar(found)[0].endswith("not measured")


def test_markdown_has_every_row_and_every_reason():
    run = {"date": "2026-01-01", "command": "python", "machine": {"device": "NVIDIA H100"}, "versions": {}}
    run["rates"] = {"matmul_tflops": 798.0, "copy_tb_per_s": 3.0}
    text = experts_gpu.markdown(run, results(), ["7: step Mixtral, liger"])
    key = "0: forward OLMoE T=8192 g=1 uniform bfloat16"
    assert f"| {key} | tiedmoe |  | 0.04 (0.03-0.05) | 460 TFLOP/s | 50% | 1.00 (1.00-1.00) |" in text
    for said in ("sonicmoe, left out: not installed (case 0)", "no time left: 7: step Mixtral, liger", "798 TFLOP/s"):
        assert said in text


# --- from end to end -------------------------------------------------------------------------------------------------


def peaks_here(case, works):
    """As `experts_cpu.peaks` without a process for each, which takes seconds."""
    for work in works.values():
        assert work() >= 0
    return [{"case": case, "figure": "peak", "peer": n, "status": "measured", "peak_bytes": 3_000_000} for n in works]


def test_experts_cpu_from_end_to_end(tmp_path, monkeypatch):
    kept = tuple(peer for peer in PEERS if peer.name in ("tiedmoe", "grouped_mm"))
    names = ("tiedmoe", "untied, grouped_mm", "untied, eager")
    monkeypatch.setattr(experts_cpu, "PEERS_HERE", kept)
    monkeypatch.setattr(experts_cpu, "MODELS", {name: experts_cpu.MODELS[name] for name in names})
    monkeypatch.setattr(experts_cpu, "NEW_TOKENS", 4)
    monkeypatch.setattr(experts_cpu, "STEP_TOKENS", 128)
    monkeypatch.setattr(experts_cpu, "peaks", peaks_here)
    output = tmp_path / "results" / "cpu"
    experts_cpu.main(["--tiny", "--cpu-time", "--output", str(output)])
    text, table = output.with_suffix(".json").read_text(), output.with_suffix(".md").read_text()
    found = json.loads(text)
    times = {(row["case"], row["peer"]): row for row in found["rows"] if row["figure"] == "time"}
    cases = ["step tiny T=16 g=2 uniform float32", "decode tiny T=2 g=1 uniform bfloat16"]
    for case in (*cases, *experts_cpu.MODEL_CALLS):
        other = "untied, grouped_mm" if case in experts_cpu.MODEL_CALLS else "grouped_mm"
        assert times[case, "tiedmoe"]["status"] == times[case, other]["status"] == "measured"
        assert times[case, "tiedmoe"]["time_over_tiedmoe"]["median"] == 1
        assert times[case, other]["time_over_tiedmoe"]["n"] == times[case, other]["ms"]["n"] >= 3
    assert times["generate 64 tokens", "untied, eager"]["status"] == "measured"
    assert times["step of 512 tokens", "untied, eager"]["status"] == "left out"
    peaks = {(row["case"], row["peer"]) for row in found["rows"] if row["figure"] == "peak"}
    assert peaks == set(times) - {(cases[1], name) for name in ("tiedmoe", "grouped_mm")} - {
        ("step of 512 tokens", "untied, eager")
    }
    assert found["versions"]["torch"] == torch.__version__
    assert found["left_out"] == []
    assert text.count("\n{") == len(found["rows"])  # a row a line
    assert f"| {cases[0]} | 3 | 3 |" in table
    assert "| generate 64 tokens | 3 | 3 | 3 |" in table
    assert str(tmp_path) not in text + table


def test_experts_cpu_says_when_a_peer_disagrees_or_fails(monkeypatch):
    def wrong(gate_up, down):
        layer = peers.transformers_layer("eager", gate_up, down)
        return lambda x, index, weights: 1.01 * layer(x, index, weights)

    def failing(gate_up, down):
        raise RuntimeError("no")

    case = Case("decode", TINY, 4, dtype=torch.float32)
    monkeypatch.setattr(experts_cpu, "PEERS_HERE", (Peer("failing", failing), Peer("wrong", wrong), BY_NAME["eager"]))
    rows = {row["peer"]: row for row in experts_cpu.time_layer(case, timing.WallClock(), 0.0)}
    assert list(rows) == ["failing", "wrong", "eager"]
    assert rows["wrong"]["status"] == "wrong"
    assert rows["wrong"]["difference"] == pytest.approx(0.01, rel=1e-2)
    assert rows["failing"].items() >= {"status": "failed", "reason": "RuntimeError: no"}.items()
    assert rows["eager"]["status"] == "measured"
    monkeypatch.setattr(experts_cpu, "FLOAT64_BYTES", 0)  # compared with the first that runs, which is eager
    rows = {row["peer"]: row for row in experts_cpu.time_layer(case, timing.WallClock(), 0.0)}
    assert (rows["eager"]["difference"], rows["wrong"]["status"]) == (0, "wrong")


def test_peaks_are_measured_in_processes_of_their_own():
    found, died = experts_cpu.peaks("case", {"a": os.getpid, "b": functools.partial(os._exit, 1)})
    assert found["status"] == "measured"
    assert found["peak_bytes"] != os.getpid()
    assert died["status"] == "failed"
    assert "BrokenProcessPool" in died["reason"]


def test_the_high_water_mark_is_that_of_the_call():
    before = experts_cpu.reset_peak()
    block = bytearray(b"x" * (64 << 20))
    del block
    assert 60 << 20 < experts_cpu.status_bytes("VmHWM") - before < 200 << 20


def test_experts_gpu_from_end_to_end_on_a_cpu(tmp_path, monkeypatch):
    prefix = tmp_path / "results" / "gpu"
    arguments = ["--device", "cpu", "--output", str(prefix), "--peers", "grouped_mm,batched_mm"]
    experts_gpu.main([*arguments, "--cases", "0-1"])
    run, *rows = map(json.loads, prefix.with_suffix(".jsonl").read_text().splitlines())
    names = ["tiedmoe", "grouped_mm", "batched_mm"]
    assert [(row["case"], row["peer"]) for row in rows] == [(number, name) for number in (0, 1) for name in names]
    assert all(row["status"] == "measured" for row in rows)
    assert run["rates"].keys() == RATES.keys()
    text = prefix.with_suffix(".md").read_text()
    assert text.count(" tiny ") == 6 + 1  # and the closest of the bar
    assert str(tmp_path) not in text + json.dumps(run)

    # A peer breaks the device in the next case: a new process goes on, without it.
    def break_device(device):
        raise RuntimeError("an illegal memory access was encountered")

    def execv(program, command):
        raise SystemExit(json.dumps(command[2:]))

    def broken(gate_up, down):
        monkeypatch.setattr(measure, "synchronize", break_device)
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(os, "execv", execv)
        patch.setattr(experts_gpu, "PEERS", [BY_NAME["tiedmoe"], Peer("grouped_mm", broken), BY_NAME["batched_mm"]])
        with pytest.raises(SystemExit) as ended:
            experts_gpu.main([*arguments, "--resume", "--budget-s", "100"])
    monkeypatch.setattr(measure, "synchronize", timing.synchronize)
    again = json.loads(str(ended.value))
    assert again[:-1] == [*arguments, "--resume", "--budget-s", "100", "--resume", "--budget-s"]
    assert 50 < float(again[-1]) < 100
    experts_gpu.main(again)
    rows = [json.loads(line) for line in prefix.with_suffix(".jsonl").read_text().splitlines()][1:]
    assert [(row["peer"], row["status"]) for row in rows[6:]] == [
        ("tiedmoe", "measured"),
        ("grouped_mm", "broke the device"),
        ("batched_mm", "measured"),
    ]
    assert "time_over_tiedmoe" in rows[-1]


def test_a_peer_sits_out_where_it_broke_the_device_and_everywhere_the_second_time(tmp_path):
    results = experts_gpu.Results(tmp_path / "gpu", resume=False)
    results.entries = [{}, {"case": 0, "peer": "liger", "status": "broke the device"}]
    assert (results.status(0, "liger"), results.status(1, "liger")) == ("broke the device", None)
    results.entries.append({"case": 1, "peer": "liger", "status": "broke the device"})
    assert results.status(2, "liger") == "broke the device"
    assert results.status(2, "tiedmoe") is None


def test_experts_gpu_begins_no_row_that_would_not_end_in_time(tmp_path):
    experts_gpu.main(["--device", "cpu", "--output", str(tmp_path / "gpu"), "--cases", "1", "--budget-s", "1"])
    assert len((tmp_path / "gpu.jsonl").read_text().splitlines()) == 1
    assert "no time left: 1: decode tiny T=2 g=1 uniform bfloat16, tiedmoe" in (tmp_path / "gpu.md").read_text()


def test_experts_gpu_refuses_what_it_does_not_know(capsys):
    experts_gpu.main(["--list"])
    assert capsys.readouterr().out.startswith("0: forward OLMoE T=8192 g=1 uniform bfloat16\n1: step")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="finds no GPU"):
            experts_gpu.main([])
    with pytest.raises(ValueError, match="unknown \\['ligre'\\]"):
        experts_gpu.main(["--device", "cpu", "--peers", "ligre"])
