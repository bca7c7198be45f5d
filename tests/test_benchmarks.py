"""The benchmarks' arithmetic, planning and verdicts, and every line of them that needs no GPU, at tiny sizes."""

import contextlib
import itertools
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
import report
import timing
from measure import Limits, float64_layer, measure_case
from peers import Peer
from shapes import GROUP_SIZES, OLMOE, QWEN3, ROUTINGS, SHAPES, TOKENS, Case, Shape, route

CPU = torch.device("cpu")
TINY = Shape("tiny", 8, 32, 16, 2)
RATES = {"matmul_tflops": 0.5, "copy_tb_per_s": 0.01}
SHORT = Limits(seconds=0.0, least=3, most=3)
EAGER = next(peer for peer in peers.PEERS if peer.name == "eager")


def measured(case, chosen=peers.PEERS, **options):
    banned = {"grouped_mm compiled": "compiling takes longer than this test may"}
    return measure_case(case, CPU, RATES, limits=SHORT, banned=banned, peers=chosen, **options)


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


def test_quick_cases_have_every_shape_size_and_routing_and_begin_with_the_bar():
    cases = experts_gpu.quick_cases()
    assert len(cases) == len(set(cases))
    assert {case.shape for case in cases} == set(SHAPES)
    assert {case.T for case in cases} == set(TOKENS)
    assert {case.g for case in cases} == set(GROUP_SIZES)
    assert {case.routing for case in cases} == set(ROUTINGS)
    for shape in SHAPES:
        assert {case.kind for case in cases if case.shape == shape} == {"forward", "step", "decode"}
    assert all(case.shape == OLMOE for case in cases[:7])


def test_full_cases_are_the_whole_grid():
    cases = experts_gpu.full_cases()
    assert len(cases) == len(set(cases)) == len(SHAPES) * 2 * (8 * (1 + 3) + 4)
    assert set(experts_gpu.quick_cases()) <= set(cases)


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
    batched = next(peer for peer in peers.PEERS if peer.name == "batched_mm")
    reason = peers.reason_to_leave_out(batched, Case("forward", OLMOE, 8192), 80e9)
    assert reason == "its copies of the weights take 768.0 GiB"
    assert peers.reason_to_leave_out(batched, Case("decode", OLMOE, 32), 80e9) is None


def test_tasks_to_compile_ahead():
    tasks = experts_gpu.tasks(experts_gpu.quick_cases(), Limits())
    assert {cases[0].shape for peer, cases, *_ in tasks if peer == "tiedmoe"} == set(SHAPES)
    assert {cases[0].shape for peer, cases, *_ in tasks if peer != "tiedmoe"} == {OLMOE}
    assert sorted(part for peer, _, part, parts in tasks if peer == "liger") == list(range(6))
    assert {cases for peer, cases, *_ in tasks if peer == "liger"} == {(Case("step", OLMOE, 512),)}
    assert all(case.g == 1 for _, cases, *_ in tasks for case in cases)


def test_prewarm_names_what_it_did_not_finish():
    case = Case("step", TINY, 4)
    experts_gpu.prewarm_task("tiedmoe", (case,), 0, 1, "cpu")
    experts_gpu.prewarm_task("deepgemm", (case,), 0, 1, "cpu")  # has no backward: nothing to compile
    assert experts_gpu.prewarm([("tiedmoe", (case,), 0, 1)], "cpu", 0.3) == [
        "not compiled ahead in 0 s: tiedmoe for tiny"
    ]


def test_restrict_liger_leaves_each_process_its_part(monkeypatch):
    module = types.ModuleType("fused_moe_kernels")
    module.kernel = types.SimpleNamespace(configs=list(range(10)))
    ops = types.ModuleType("liger_kernel.ops")
    ops.fused_moe_kernels = module
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    assert experts_gpu.restrict_liger(1, 4)
    assert module.kernel.configs == [1, 5, 9]


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


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = next(FakeEvent.clock)

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


def test_device_clock_flushes_and_counts_in_seconds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(timing, "flush_bytes", lambda device: 64)
    FakeEvent.clock = itertools.count(step=5)
    clock = timing.DeviceClock(CPU)
    clock.flushed.fill_(1)
    assert clock.time(lambda number: clock.flushed.sum(), 0) == 5e-3
    assert not clock.flushed.any()


def test_capture_warms_up_and_replays(monkeypatch):
    class Graph:
        def replay(self):
            calls.append("replay")

    calls = []
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    replay = timing.capture(lambda: calls.append("body") or "outputs", types.SimpleNamespace(type="cuda"))
    assert replay() == "outputs"
    assert calls == ["body"] * 4 + ["replay"]


def test_what_only_a_device_has(monkeypatch):
    device = types.SimpleNamespace(type="cuda")
    allocated = iter([100, 0])
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert measure.peak_bytes(lambda number: None, device) == 250

    def waits_twice(number):
        for message in ("called a synchronizing CUDA operation", "unrelated", "called a synchronizing CUDA operation"):
            measure.warnings.warn(message, stacklevel=1)

    assert measure.host_syncs(waits_twice, device) == 2
    assert modes == ["warn", "default"]
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    if not torch.version.hip:
        assert timing.flush_bytes(device) == 256 << 20
        # 8 experts of 12.6 MB at T=1 fit the 50 MiB twice less one: two pools; at T=32 one pool is more than the cache
        assert [measure.num_pools(Case("decode", OLMOE, T), device) for T in (1, 32)] == [2, 1]


# --- the peers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "decode", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_installed_peer_is_right_and_the_others_say_why_not(kind, dtype):
    case = Case(kind, TINY, 5, g=2 if kind == "step" else 1, dtype=dtype)
    heard = []
    result = measured(case, traffic=kind == "step", say=lambda peer, stage: heard.append((peer, stage)))
    entries = result["peers"]
    assert list(entries) == [peer.name for peer in peers.PEERS]
    here = {"tiedmoe", "grouped_mm", "batched_mm", "eager", *(["tiedmoe, recompute"] if kind == "step" else [])}
    assert {name for name, entry in entries.items() if entry["status"] == "measured"} >= here
    for name in here:
        entry = entries[name]
        assert max(entry["errors"].values()) <= measure.TOLERANCE[dtype]
        assert entry["ms"]["n"] == entry["time_over_tiedmoe"]["n"] == 3
        assert (name, "first call") in heard
        if kind == "decode":
            assert entry["fraction_of_copy"] == pytest.approx(entry["tb_per_s"] / 0.01)
        else:
            assert entry["fraction_of_matmul"] == pytest.approx(entry["tflops"] / 0.5)
    assert all(entry["reason"] for entry in entries.values() if entry["status"] != "measured")
    json.dumps(result, allow_nan=False)


def test_saved_bytes_are_the_input_and_the_pre_activation():
    case = Case("step", TINY, 64, g=1, dtype=torch.float32)
    entries = measured(case)["peers"]
    both, inputs = case.activation_bytes()
    routing = 4 * (64 * 2 + 9)  # order and offsets, int32
    assert both <= entries["tiedmoe"]["saved_bytes"] <= both + routing
    assert inputs <= entries["tiedmoe, recompute"]["saved_bytes"] <= inputs + routing
    assert entries["eager"]["saved_bytes"] > both


def test_gradient_traffic_counts_a_contribution_for_every_layer_unless_deferred():
    entries = measured(Case("step", TINY, 64, g=4, dtype=torch.float32), traffic=True)["peers"]
    assert entries["grouped_mm"]["gradient_traffic"]["pool_passes_per_step"] == 8  # 4 layers, 2 microbatches
    assert entries["tiedmoe"]["gradient_traffic"]["pool_passes_per_step"] == 4  # a read and a write a microbatch
    assert entries["tiedmoe"]["gradient_traffic"]["ms_per_layer"] > 0


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

    chosen = (
        EAGER,
        Peer("wrong", wrong),
        Peer("failing", failing),
        Peer("missing", missing),
        Peer("infinite", infinite),
    )
    entries = measured(Case("forward", TINY, 8), chosen)["peers"]
    assert entries["eager"]["status"] == "measured"
    assert entries["wrong"]["status"] == "wrong"
    assert entries["wrong"]["reason"].startswith("relative error of y 5.")
    assert entries["failing"] == {"status": "failed", "reason": "RuntimeError: no kernel for this in"}
    assert entries["missing"] == {"status": "left out", "reason": "not installed: No module named 'peer'"}
    assert entries["infinite"]["status"] == "wrong"
    assert entries["infinite"]["errors"] == {"y": None}


def test_float64_layer_is_the_layer():
    index, weights = route(6, TINY, "uniform", torch.Generator().manual_seed(1))
    x, gate_up, down = (torch.randn(size, dtype=torch.float64) for size in ((6, 32), (8, 32, 32), (8, 32, 16)))
    y = float64_layer(x, index, weights.double(), lambda e: (gate_up[e], down[e]))
    for t in range(6):
        expected = torch.zeros(32, dtype=torch.float64)
        for e, w in zip(index[t].tolist(), weights[t].double()):
            gate, up = (gate_up[e] @ x[t]).split(16)
            expected += w * (down[e] @ (F.silu(gate) * up))
        torch.testing.assert_close(y[t], expected)


@pytest.mark.parametrize("capability", [9, 10])
def test_deepgemm_layer_with_a_product_that_reads_the_layout(capability, monkeypatch):
    """The layer around DeepGEMM's product: gather, padding to its alignment, both layouts, combination."""

    def product(a, b, d, layout, use_psum_layout):
        assert a.size(0) % 16 == 0
        assert use_psum_layout == (capability >= 10)
        assert layout.dtype == torch.int32
        if use_psum_layout:
            starts = [0, *layout.tolist()]
            assert all(start % 16 == 0 for start in starts)
            rows = [(e, slice(start, end)) for e, (start, end) in enumerate(itertools.pairwise(starts))]
        else:
            assert len(layout) == a.size(0)
            rows = [(e, (layout == e).nonzero().squeeze(1)) for e in range(b.size(0))]
        for e, row in rows:
            d[row] = a[row] @ b[e].T

    module = types.ModuleType("deep_gemm")
    module.m_grouped_bf16_gemm_nt_contiguous = product
    module.get_mk_alignment_for_contiguous_layout = lambda: 16
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    deepgemm = next(peer for peer in peers.PEERS if peer.name == "deepgemm")
    for T in (1, 40):
        assert measured(Case("forward", TINY, T), (deepgemm,))["peers"]["deepgemm"]["status"] == "measured"
    del module.m_grouped_bf16_gemm_nt_contiguous
    assert "sgl-deep-gemm" in measured(Case("forward", TINY, 1), (deepgemm,))["peers"]["deepgemm"]["reason"]


def test_sonicmoe_and_liger_layers_call_what_their_wheels_offer(monkeypatch):
    """Stand-ins with the signatures of sonic-moe 0.1.2.post1 and liger-kernel 0.8.5."""

    def moe_general_routing_inputs(
        x,
        router_scores,
        token_indices,
        expert_indices,
        w1,
        b1,
        w2,
        b2,
        E,
        stream_id,
        activation_type,
        is_inference_mode_enabled=False,
        concat_layout=False,
    ):
        assert (b1, b2, E, stream_id, activation_type) == (None, None, 8, 7, "swiglu")
        assert concat_layout
        assert is_inference_mode_enabled != torch.is_grad_enabled()
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        assert token_indices.diff().min() >= 0
        gate_up, down = w1.permute(2, 0, 1), w2.permute(2, 0, 1)
        index, weights = (each.view(len(x), -1) for each in (expert_indices.long(), router_scores))
        return float64_layer(x, index, weights, lambda e: (gate_up[e], down[e])), None

    sonicmoe = types.ModuleType("sonicmoe")
    sonicmoe.moe_general_routing_inputs = moe_general_routing_inputs
    sonicmoe.enums = types.ModuleType("sonicmoe.enums")
    sonicmoe.enums.ActivationType = types.SimpleNamespace(SWIGLU="swiglu")

    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x, gate_up, down, index, weights):
            assert index.dtype == torch.int32
            return float64_layer(x, index.long(), weights, lambda e: (gate_up[e], down[e]))

    liger = types.ModuleType("liger_kernel.ops")
    liger.LigerFusedMoEFunction = LigerFusedMoEFunction
    for module in (sonicmoe, sonicmoe.enums, types.ModuleType("liger_kernel"), liger):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=7))
    chosen = tuple(peer for peer in peers.PEERS if peer.name in ("sonicmoe", "liger"))
    for case in (Case("forward", TINY, 9), Case("step", TINY, 9, g=2)):
        entries = measured(case, chosen)["peers"]
        assert [entry["status"] for entry in entries.values()] == ["measured", "measured"], entries


# --- the process that works ------------------------------------------------------------------------------------------


def stand_in(connection, device_name, limits):
    """A worker whose peer liger takes the process down, and whose sonicmoe falls silent."""
    connection.send(("ready", RATES, {"device": device_name}))
    while (order := connection.recv()) is not None:
        case, left_out, _ = order
        for peer in ("liger", "sonicmoe"):
            if peer not in left_out:
                connection.send(("at", peer, "first call"))
                if peer == "liger":
                    os._exit(3)
                connection.recv()
        connection.send(("done", {"key": case.key, "left_out": left_out}))
    connection.send(("ready", RATES, {}))


def test_a_peer_that_takes_the_process_down_or_hangs_sits_out():
    worker = experts_gpu.Worker("cpu", Limits(silence_seconds=1.0, slow_peers_everywhere=True), target=stand_in)
    first = worker.execute(Case("forward", OLMOE, 1))["left_out"]
    assert first["liger"] == "broke the device: its process ended with 3, at its first call"
    assert first["sonicmoe"] == "broke the device: no answer in time, at its first call"
    worker.finish()
    assert worker.process is None
    assert len(worker.rates) == 4


def test_a_worker_past_its_deadline_says_so():
    worker = experts_gpu.Worker("cpu", Limits(), deadline=0.0, target=stand_in)
    result = worker.execute(Case("forward", OLMOE, 1))
    assert result["peers"] == {}
    assert result["error"].startswith("stopped at the end of the time")


# --- what it says ----------------------------------------------------------------------------------------------------


def result_of(case, **entries):
    described = {"kind": case.kind, "shape": case.shape._asdict(), "T": case.T, "g": case.g, "routing": case.routing}
    return {"key": case.key, **described, "active_experts": 8, "flops": case.flops, "peers": entries}


def entry_of(ratio=1.0, **fields):
    spread = {"median": ratio, "p20": ratio, "p80": ratio, "n": 5}
    base = {"status": "measured", "how": "events", "errors": {"y": 4e-3}, "host_syncs": 0, "time_over_tiedmoe": spread}
    return base | {"ms": {"median": 0.04, "p20": 0.03, "p80": 0.05, "n": 5}} | fields


def results(forward=460.0, slower=1.2):
    ours = entry_of(tflops=forward, fraction_of_matmul=0.58)
    eager = entry_of(slower, tflops=300.0, fraction_of_matmul=0.4)
    step = entry_of(
        tflops=410.0, fraction_of_matmul=0.5, saved_bytes=302_300_000, gradient_traffic={"ms_per_layer": 0.15}
    )
    recompute = entry_of(0.9, tflops=350.0, fraction_of_matmul=0.4, saved_bytes=33_900_000)
    decode = entry_of(tb_per_s=2.5, fraction_of_copy=0.8)
    missing = {"status": "left out", "reason": "not installed"}
    return [
        result_of(Case("forward", OLMOE, 8192), tiedmoe=ours, eager=eager, sonicmoe=missing),
        result_of(Case("step", OLMOE, 8192, 4), **{"tiedmoe": step, "tiedmoe, recompute": recompute}),
        result_of(Case("decode", OLMOE, 1), tiedmoe=decode),
    ]


def verdicts(found, device="NVIDIA H100 80GB HBM3"):
    return {line["line"]: line["verdict"] for line in report.bar(found, device)}


def test_bar_passes_fails_and_says_what_was_not_measured():
    good = verdicts(results())
    assert good["forward, OLMoE T=8192"] == "pass"
    assert good["decode, OLMoE T=1"] == "pass"
    assert good["decode, OLMoE T=8"] == "not measured"
    assert good["saved for the backward by one layer, tiedmoe, OLMoE T=8192"] == "pass"
    assert good["saved for the backward by one layer, tiedmoe, recompute, OLMoE T=8192"] == "pass"
    assert good["traffic of the pool's gradient, group of 4, OLMoE T=8192"] == "pass"
    assert good["sonicmoe in this run, forward, OLMoE T=8192: its time over ours"] == "not measured"
    bad = verdicts(results(forward=449.0, slower=0.99))
    assert bad["forward, OLMoE T=8192"] == "fail"
    (never_slower,) = (line for line in bad if line.startswith("never slower"))
    assert bad[never_slower] == "fail"
    assert "closest: forward OLMoE T=8192 g=1 uniform bfloat16, eager" in never_slower


def test_bar_has_liger_at_the_shape_it_publishes():
    # 2.0957 ms for 618.5 GFLOP and 28.2246 ms for 7421.7 GFLOP
    assert Case("forward", QWEN3, 8192).flops / 2.0957e-3 / 1e12 == pytest.approx(295, abs=0.5)
    assert Case("step", QWEN3, 32768, microbatches=1).flops / 28.2246e-3 / 1e12 == pytest.approx(263, abs=0.5)
    found = [result_of(Case("step", QWEN3, 32768), tiedmoe=entry_of(tflops=262.0, fraction_of_matmul=0.3))]
    lines = verdicts(found)
    assert lines["Liger's released figure, step, Qwen3-30B T=32768"] == "fail"
    assert lines["Liger's released figure, forward, Qwen3-30B T=8192"] == "not measured"


def test_bar_of_speed_is_set_for_one_device():
    assert verdicts(results(), "NVIDIA A100")["forward, OLMoE T=8192"] == "pass (set for H100, this is NVIDIA A100)"
    assert set(verdicts([]).values()) == {"not measured"}


def test_a_wrong_result_is_no_measurement():
    found = results()
    found[0]["peers"]["tiedmoe"] |= {"status": "wrong", "reason": "relative error of y 3.0e-02"}
    lines = verdicts(found)
    assert lines["forward, OLMoE T=8192"] == "not measured"
    assert lines["right against float64, 3 cases"] == "fail"


def test_markdown_has_every_case_and_every_reason():
    text = report.markdown(
        {
            "date": "2026-01-01",
            "command": "python benchmarks/experts_gpu.py",
            "smoke_test": False,
            "machine": {"device": "NVIDIA H100"},
            "versions": {"torch": "2.11"},
            "rates": [{"matmul_tflops": 798.0, "copy_tb_per_s": 3.0}],
            "minutes": 8.0,
            "remarks": ["liger: not compiled ahead"],
            "bar": report.bar(results(), "NVIDIA H100"),
            "left_out": ["decode Mixtral"],
            "cases": [*results(), {"key": "step Mixtral", "error": "out of memory", "peers": {}}],
        }
    )
    assert (
        "| forward OLMoE T=8192 g=1 uniform bfloat16 | 0.040 (0.030-0.050) | 460 TFLOP/s | 58% | eager: 1.20 |" in text
    )
    for said in (
        "sonicmoe, left out in 1 cases: not installed",
        "step Mixtral: out of memory",
        "decode Mixtral",
        "798",
    ):
        assert said in text


# --- from end to end -------------------------------------------------------------------------------------------------


def test_experts_cpu_from_end_to_end(tmp_path, monkeypatch):
    kept = tuple(peer for peer in peers.PEERS if peer.name in ("tiedmoe", "grouped_mm"))  # a process each for memory
    monkeypatch.setattr(experts_cpu, "PEERS_HERE", kept)
    output = tmp_path / "results" / "cpu.json"
    experts_cpu.main(["--tiny", "--output", str(output.with_suffix(""))])  # as the Makefile names it
    found = json.loads(output.read_text())
    assert [result["key"].split()[0] for result in found["cases"]] == ["step", "decode"]
    for result in found["cases"]:
        ours, other = result["peers"]["tiedmoe"], result["peers"]["grouped_mm"]
        assert ours["status"] == other["status"] == "measured"
        ratios = [a / b for a, b in zip(other["rounds_ms"], ours["rounds_ms"])]
        assert other["time_over_tiedmoe"] == pytest.approx(timing.spread(ratios))
        assert other["time_over_tiedmoe"]["n"] == len(ratios) >= 3
    for entry in found["peak_memory"][0]["peers"].values():
        assert entry["status"] == "measured", entry
        assert 0 <= entry["peak_bytes"] < 1 << 28
    assert found["versions"]["torch"] == torch.__version__
    assert found["left_out"] == []
    text = output.with_suffix(".md").read_text()
    assert "| step tiny T=16 g=2 uniform float32 |" in text
    assert str(tmp_path) not in text + output.read_text()


def test_experts_cpu_says_when_a_peer_disagrees_or_fails():
    def wrong(gate_up, down):
        layer = peers.transformers_layer("eager", gate_up, down)
        return lambda x, index, weights: 1.01 * layer(x, index, weights)

    def failing(gate_up, down):
        raise RuntimeError("no")

    case = Case("decode", TINY, 4, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_cpu, "PEERS_HERE", (Peer("failing", failing), Peer("wrong", wrong), EAGER))
        entries = experts_cpu.time_case(case, experts_cpu.make_cpu_pool(TINY, torch.float32), 0.0)["peers"]
    assert entries["wrong"]["status"] == "wrong"
    assert entries["wrong"]["difference"] == pytest.approx(0.01, rel=1e-2)
    assert entries["failing"] == {"status": "failed", "reason": "RuntimeError: no"}
    assert entries["eager"]["status"] == "measured"


def test_the_high_water_mark_is_that_of_the_call():
    before = experts_cpu.reset_peak()
    block = bytearray(b"x" * (64 << 20))
    del block
    assert 60 << 20 < experts_cpu.status_bytes("VmHWM") - before < 200 << 20


@pytest.mark.slow
def test_experts_gpu_from_end_to_end_on_a_cpu(tmp_path):
    output = tmp_path / "gpu.json"
    experts_gpu.main(["--device", "cpu", "--output", str(output)])
    found = json.loads(output.read_text())
    assert [result["kind"] for result in found["cases"]] == ["forward", "decode", "step"]
    for result in found["cases"]:
        for name in ("tiedmoe", "grouped_mm", "batched_mm", "eager"):
            assert result["peers"][name]["status"] == "measured", result["peers"][name]
    assert found["smoke_test"]
    assert len(found["rates"]) == 2
    assert "A smoke test on a CPU" in output.with_suffix(".md").read_text()


def test_experts_gpu_without_a_gpu_stops():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit, match="finds no GPU"):
        experts_gpu.main([])
