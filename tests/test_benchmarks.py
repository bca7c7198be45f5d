"""The benchmarks' arithmetic, planning and verdicts, and every line of them that needs no GPU, at tiny sizes."""

import functools
import json
import operator
import os
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import experts
import measure
import models
import peers
import timing
from measure import Bench
from models import ModelBench, ModelCase
from peers import PEERS, Peer
from shapes import OLMOE, QUARTER, QWEN3, ROUTINGS, SHAPES, TINY, Case, route

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


def test_flops_and_bytes_against_numbers_counted_by_hand():
    # 8192 tokens * 8 experts * (2048*2048 + 1024*2048) weights * 2
    assert Case("forward", OLMOE, 8192).flops == 824_633_720_832
    assert Case("step", OLMOE, 8192, 4).flops == 3 * 4 * 824_633_720_832
    # one token reads 8 experts of 12,582,912 bytes: 48 us at 70 % of 3.0 TB/s
    assert Case("decode", OLMOE, 1).decode_bytes(8) == 8 * 12_582_912 + 2 * 4096
    assert Case("decode", OLMOE, 1).decode_bytes(8) / 3.0e12 / 0.7 * 1e6 == pytest.approx(48, abs=0.5)
    assert Case("decode", OLMOE, 32).weight_copies_bytes() == 32 * 8 * 12_582_912  # 3.2 ms at 1 TB/s written


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
    cases = experts.GPU_CASES
    assert len(cases) == len(set(cases)) == 44
    described = [(case.kind, case.T, case.g) for case in cases[:7]]
    decodes = [("decode", T, 1) for T in (1, 8, 32)]
    steps = [("step", 8192, 1), ("step", 8192, 2)]
    assert described == [("forward", 8192, 1), ("step", 8192, 4), *decodes, *steps]
    assert all(case.shape == OLMOE and case.routing == "uniform" for case in cases[:7])
    assert {(case.shape, case.T) for case in cases[7:11]} == {(QWEN3, 8192), (QWEN3, 32768)}
    assert {(case.shape, case.routing) for case in cases[11:14]} == {(OLMOE, "zipf")}
    assert {case.T for case in cases[14:21]} == {64, 512, 2048, 32768}
    assert {case.T for case in cases} == {1, 8, 32, 64, 512, 2048, 8192, 32768}
    assert {case.g for case in cases} == {1, 2, 4}
    for shape in SHAPES:
        assert {case.kind for case in cases if case.shape == shape} == {"forward", "step", "decode"}
    assert len(set(experts.CPU_CASES)) == len(experts.CPU_CASES) == 13
    assert set(experts.CPU_CASES) > experts.CPU_PEAKS


def test_cases_are_chosen_by_number():
    assert experts.parse_cases("0-2,5", 6) == [0, 1, 2, 5]
    with pytest.raises(ValueError, match="there are cases 0 to 5"):
        experts.parse_cases("4-6", 6)


def test_plan_has_peers_that_tune_themselves_after_all_others():
    tasks = experts.plan(experts.GPU_CASES, [0, 2], {"tiedmoe", "liger", "eager"})
    order = [(0, "tiedmoe"), (0, "eager"), (2, "tiedmoe"), (2, "eager"), (0, "liger"), (2, "liger")]
    assert [(task.number, task.peer.name) for task in tasks] == order
    tasks = experts.plan(experts.TINY_CASES, [3], {"tiedmoe", "liger", "eager"})
    assert [task.peer for task in tasks] == list(models.MODELS)  # whole models have peers of their own


def tasks_of(*kinds):
    return [experts.Task(n, Case(kind, TINY, n + 1), BY_NAME["tiedmoe"]) for n, kind in enumerate(kinds)]


def test_run_plan_leaves_out_what_would_not_end_in_time():
    clock, executed = [0.0], []

    def execute(task):
        clock[0] += {"forward": 4.0, "step": 30.0}[task.case.kind]
        executed.append(task)
        return {"status": "measured"}

    tasks = tasks_of("forward", "step", "step", "forward")
    left_out = experts.run_plan(tasks, execute, 50.0, now=lambda: clock[0])
    # 34 s gone after two: another step would take 30 s more, another forward 4 s
    assert executed == [tasks[0], tasks[1], tasks[3]]
    assert left_out == [tasks[2].key]
    assert clock[0] <= 50


def test_run_plan_ends_when_a_peer_has_broken_the_device():
    states = iter(["measured", "broke the device"])
    tasks = tasks_of("forward", "step", "forward")
    assert experts.run_plan(tasks, lambda task: {"status": next(states)}, 50.0) == [tasks[2].key]


def test_what_does_not_fit_or_end_is_left_out():
    reason = peers.reason_to_leave_out(BY_NAME["batched_mm"], Case("forward", OLMOE, 8192), 80e9, 3.0)
    assert reason == "its copies of the weights take 768.0 GiB"
    assert peers.reason_to_leave_out(BY_NAME["batched_mm"], Case("decode", OLMOE, 32), 80e9, 3.0) is None
    # 64 experts of 3 * 512 * 256 numbers: a gradient of 101 MB for each of 64 experts and 4 layers, moved three times
    step = Case("step", QUARTER, 64, 4, dtype=torch.float32)
    reason = peers.reason_to_leave_out(BY_NAME["eager"], step, 80e9, 0.01)
    assert reason == "its backward makes a gradient of the whole pool for each expert, 77 GB"
    assert peers.reason_to_leave_out(BY_NAME["eager"], step, 80e9, 3.0) is None


# --- how it is timed -------------------------------------------------------------------------------------------------


def test_ratios_are_taken_inside_a_round():
    # A machine that gets slower by a factor of two every round: the ratio does not see it.
    calls = {"a": lambda number: 3.0 * 2.0**number, "b": lambda number: 1.5 * 2.0**number}
    times = timing.interleave(calls, seconds=9e9, least=2, most=6)
    assert times["a"] == [3.0 * 2**number for number in range(6)]
    assert timing.paired_ratio(times["a"], times["b"]) == {"median": 2.0, "p20": 2.0, "p80": 2.0, "n": 6}


def test_interleave_rotates_the_order_and_ends_in_time():
    order = []
    calls = {name: lambda number, name=name: order.append(name) or 1.0 for name in "abc"}
    times = timing.interleave(calls, seconds=0, least=3, most=9)
    assert "".join(order) == "abcbcacab"
    assert times == {name: [1.0, 1.0, 1.0] for name in "abc"}


def test_wall_clock_times_the_call_it_is_given():
    called = []
    assert 0.01 < timing.by_clock(lambda number: called.append(number) or time.sleep(0.011))(7) < 1
    assert called == [7]


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
    assert timing.on_device(lambda number: number, in_graph=True)(7) == 2e-3
    assert timing.on_device(lambda number: -number, in_graph=False)(7) == 5e-3
    assert used == [("graph", 7, "median"), ("events", -7, "median")]


def test_what_only_a_device_has(monkeypatch):
    device = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    assert measure.allocated_growth(lambda number: None) == 250
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
    rows = rows_of(case, PEERS)
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
    assert bench.rate(2e-6) == {"tflops": 16 * 2 * 2 * 3 * 32 * 16 / 2e6, "of_machine": pytest.approx(0.098304)}
    bench = Bench(Case("decode", TINY, 1), CPU, RATES)  # two experts of 3 * 512 numbers, a token in and out
    assert bench.rate(1e-6)["tb_per_s"] == pytest.approx((2 * 3 * 512 + 2 * 32) * 2 / 1e6)


def test_saved_bytes_are_the_input_and_the_pre_activation():
    case = Case("step", TINY, 64, g=1, dtype=torch.float32)
    rows = rows_of(case, [BY_NAME[name] for name in ("tiedmoe", "tiedmoe recompute", "eager")])
    inputs = 64 * 32 * 4  # [T, H] float32
    both = inputs + 64 * 2 * 2 * 16 * 4  # and the pre-activation, [T * K, 2I]
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


def test_float64_layer_keeps_no_copy_of_the_weights():
    """OLMoE's would take 13 GB in a step of four layers."""
    problem = measure.make_problem(Case("step", TINY, 2, dtype=torch.float32), CPU)
    x, index, weights = problem.sets[0]
    inputs = measure.Inputs(x.detach().double().requires_grad_(), index, [each.double() for each in weights])
    layer = measure.float64_layer(*problem.pools[0])
    assert measure.saved_bytes(layer, problem._replace(sets=[inputs])) < 8 * TINY.expert_numbers  # of one expert


def test_decoding_that_no_graph_can_hold_is_timed_without_one(monkeypatch):
    """A device that refuses to capture one call."""

    def on_device(call, in_graph):
        def timed(number):
            if in_graph and call is refused:
                raise RuntimeError("operation not permitted when stream is capturing")
            return 1e-3 if in_graph else 2e-3

        return timed

    bench = Bench(Case("decode", TINY, 2), CPU, RATES)
    bench.ours = bench.prepare(BY_NAME["tiedmoe"])
    monkeypatch.setattr(timing, "on_device", on_device)
    for name, why in (("eager", "waits for the device"), ("batched_mm", "not permitted when stream")):
        prepared = bench.prepare(BY_NAME[name])
        refused = prepared.call
        bench.device = types.SimpleNamespace(type="cuda")
        row = bench._time(BY_NAME[name], prepared)
        bench.device = CPU
        assert why in row["no_graph"]
        assert row["time_over_tiedmoe"]["median"] == 2.0


def test_a_gradient_that_is_not_added_is_wrong():
    """As of a kernel that writes over what is in `.grad`; a gradient of its own is right all the same."""
    problem = measure.make_problem(Case("step", TINY, 8, dtype=torch.float32), CPU)
    pool, expected = problem.pools[0], measure.expected_outcome(problem)

    def forget():
        for weight in pool:
            weight.grad.zero_()
        return peers.deferred_weight_gradients()

    forgetful = Peer("forgetful", peers.tiedmoe_layer, scope=forget)
    errors = measure.errors_of(forgetful, problem, expected)
    assert {name for name, error in errors.items() if error > 0.01} == {"grad gate_up", "grad down"}
    for gradient in (torch.zeros_like, lambda weight: None):
        for weight in pool:
            weight.grad = gradient(weight)
        errors = measure.errors_of(PEERS[0], problem, expected)
        assert list(errors) == list(measure.CHECKED)
        assert all(error < 1e-5 for error in errors.values())


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
            return measure.float64_layer(gate_up, down)(x.double(), index.long(), weights.double()).to(x.dtype)

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
    row = {"case": number, "key": experts.GPU_CASES[number].key, "peer": peer, "status": "measured", "of_machine": 0.5}
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
    assert experts.bar(results()) == [
        "- case 0, >= 450 TFLOP/s: 460, pass",
        "- case 1, >= 400 TFLOP/s: 410, pass",
        "- case 2, <= 48 us: 40, pass",
        "- case 3, <= 252 us: not measured",
        "- case 4, <= 378 us: not measured",
        "- case 1, <= 302 MB saved by one layer: 302, pass",
        "- never slower than transformers' best, time over ours >= 1, 1 rows: "
        "1.20 (forward OLMoE T=8192 g=1 uniform bfloat16, eager), pass",
    ]
    bad = experts.bar(results(forward=449.0, slower=0.99))
    assert bad[0].endswith("449, fail")
    assert bad[-1].endswith("0.99 (forward OLMoE T=8192 g=1 uniform bfloat16, eager), fail")


def test_a_wrong_result_is_no_measurement():
    found = results()
    found[0] |= {"status": "wrong", "reason": "relative error of y 3.0e-02"}
    assert experts.bar(found)[0].endswith("not measured")


def test_markdown_has_every_row_and_every_reason():
    run = {"date": "2026-01-01", "command": "python", "machine": {"device": "NVIDIA H100"}, "versions": {}}
    run |= {"threads": 16, "load": 0.1, "rows": results(), "left_out": ["7: step Mixtral, liger"]}
    run["rates"] = {"matmul_tflops": 798.0, "copy_tb_per_s": 3.0}
    text = experts.markdown(run)
    key = "0: forward OLMoE T=8192 g=1 uniform bfloat16"
    assert f"| {key} | tiedmoe |  | 0.04 (0.03-0.05) | 1.00 (1.00-1.00) | 460 TFLOP/s | 50% |" in text
    for said in ("sonicmoe, left out: not installed (case 0)", "left out: 7: step Mixtral, liger", "tflops 798"):
        assert said in text


# --- from end to end -------------------------------------------------------------------------------------------------


def test_models_that_are_tied_alike_must_agree(monkeypatch):
    monkeypatch.setattr(models, "NEW_TOKENS", 4)
    monkeypatch.setattr(models, "STEP_TOKENS", 128)
    names = [peer.name for peer in models.MODELS]
    for kind in ("generate", "train"):
        bench = ModelBench(ModelCase(kind, TINY, 4), CPU, RATES, seconds=0.0, least=3, most=3)
        rows = {peer.name: bench.row(peer) for peer in models.MODELS}
        measured = names if kind == "generate" else names[:3]
        assert [name for name in names if rows[name]["status"] == "measured"] == measured
        assert all(rows[name]["time_over_tiedmoe"]["n"] == 3 for name in measured)
        assert all(rows[name]["largest_error"] < 1e-5 for name in measured)
    bench.expected[1] = bench.expected[1] * 1.01
    assert bench.row(models.MODELS[2])["reason"].startswith("relative error of logits 9.9e-03")


def test_memory_is_that_of_a_process_of_its_own():
    case = Case("step", TINY, 64, dtype=torch.float32)
    bench = Bench(case, CPU, RATES, own_process=True, seconds=0.0, least=1, most=1)
    assert 0 <= bench.row(BY_NAME["tiedmoe"])["peak_bytes"] < 1 << 30
    with pytest.raises(Exception, match="terminated abruptly"):
        timing.in_own_process(os._exit, 1)


def test_the_high_water_mark_is_that_of_the_call():
    # In a process of its own, as it is used: one that ran other tests gives memory back at any time.
    work = functools.partial(operator.mul, b"x", 64 << 20)
    assert 60 << 20 < timing.in_own_process(timing.resident_growth, work) < 100 << 20


def test_experts_from_end_to_end_on_a_cpu(tmp_path):
    prefix = tmp_path / "results" / "cpu"
    arguments = ["--device", "cpu", "--tiny", "--output", str(prefix), "--peers", "grouped_mm,batched_mm"]
    experts.main([*arguments, "--cases", "0-2"])
    written = prefix.with_suffix(".json").read_text()
    run = json.loads(written)
    rows = run["rows"]
    names = ["tiedmoe", "grouped_mm", "batched_mm"]
    assert [(row["case"], row["peer"]) for row in rows] == [(number, name) for number in (0, 1, 2) for name in names]
    assert all(row["status"] == "measured" for row in rows)
    assert run["rates"].keys() == RATES.keys()
    text = prefix.with_suffix(".md").read_text()
    assert text.count(" tiny ") == 9
    assert str(tmp_path) not in text + written
    assert written.count("\n{") == len(rows)  # a row a line


def test_a_peer_that_breaks_the_device_ends_the_run(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    def build(gate_up, down):
        monkeypatch.setattr(timing, "synchronize", broken)
        return broken()

    monkeypatch.setattr(experts, "PEERS", [BY_NAME["tiedmoe"], Peer("grouped_mm", build), BY_NAME["batched_mm"]])
    arguments = ["--device", "cpu", "--tiny", "--output", str(tmp_path / "cpu"), "--cases", "0"]
    experts.main([*arguments, "--peers", "grouped_mm,batched_mm"])
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [(row["peer"], row["status"]) for row in rows] == [
        ("tiedmoe", "measured"),
        ("grouped_mm", "broke the device"),
    ]
    assert "left out: 0: forward tiny T=16 g=1 uniform bfloat16, batched_mm" in (tmp_path / "cpu.md").read_text()


def test_experts_begins_no_row_that_would_not_end_in_time(tmp_path):
    arguments = ["--device", "cpu", "--tiny", "--output", str(tmp_path / "cpu"), "--cases", "1", "--budget-s", "1"]
    experts.main(arguments)
    assert json.loads((tmp_path / "cpu.json").read_text())["rows"] == []
    assert "left out: 1: decode tiny T=2 g=1 uniform bfloat16, tiedmoe" in (tmp_path / "cpu.md").read_text()


def test_experts_refuses_what_it_does_not_know(capsys):
    experts.main(["--list"])
    assert capsys.readouterr().out.startswith("0: forward OLMoE T=8192 g=1 uniform bfloat16\n1: step")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="finds no GPU"):
            experts.main([])
    with pytest.raises(ValueError, match="unknown \\['ligre'\\]"):
        experts.main(["--device", "cpu", "--peers", "ligre"])
