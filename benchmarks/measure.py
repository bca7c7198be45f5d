"""Measures one peer in one case, on a GPU or a CPU.

A peer's result is first compared with float64: one that is wrong is reported as wrong, whatever its speed. Then it is
timed in turn with ours, round by round, so that their ratio is one of the same minute; memory is measured apart.
"""

import functools
import gc
import re
import statistics
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peers import PEERS, TIEDMOE, Layer, Peer, reason_to_leave_out
from shapes import Case, route
from timing import clock_for, interleave, paired_ratio, spread, synchronize
from torch import Tensor, nn

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}  # relative, Frobenius norm
CHECKED_TOKENS = 8192  # compared with float64 at most: the memory ends
CHECKED = ("y", "grad x", "grad weights", "grad gate_up", "grad down")

Pools = list[tuple[nn.Parameter, nn.Parameter]]


class Inputs(NamedTuple):
    """What g layers are given: tokens for the first, routing for each."""

    x: Tensor  # [T, H]
    index: list[Tensor]  # g of [T, K] int64
    weights: list[Tensor]  # g of [T, K]


class Problem(NamedTuple):
    case: Case
    device: torch.device
    pools: Pools  # one, or for decoding as many as keep the caches cold
    sets: list[Inputs]
    grad_output: Tensor  # [T, H]

    @property
    def active_experts(self) -> float:
        """Experts with at least one token, the mean over the input sets."""
        return statistics.mean(inputs.index[0].unique().numel() for inputs in self.sets)


def make_problem(case: Case, device: torch.device, seed: int = 0, pools: Pools | None = None) -> Problem:
    """Draw tokens and routing, and pools unless they are given. Nothing is zero: zeros run faster."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    if pools is None:
        pools = [make_pool(case, device) for _ in range(num_pools(case, device))]

    def inputs() -> Inputs:
        x = torch.randn(case.T, case.shape.H, dtype=case.dtype, device=device)
        routed = [route(case.T, case.shape, case.routing, generator) for _ in range(case.g)]
        index = [index.to(device) for index, _ in routed]
        weights = [weights.to(device, case.dtype) for _, weights in routed]
        for tensor in (x, *weights) if case.kind == "step" else ():
            tensor.requires_grad_()
        return Inputs(x, index, weights)

    sets = [inputs() for _ in range(8 if case.kind == "decode" and device.type != "cpu" else 3)]
    return Problem(case, device, pools, sets, torch.randn(case.T, case.shape.H, dtype=case.dtype, device=device))


def make_pool(case: Case, device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """Draw weights that keep sizes near 1 through the layers; for a step with gradients to be added to."""
    E, H, I = case.shape.E, case.shape.H, case.shape.I
    gate_up = torch.empty(E, 2 * I, H, dtype=case.dtype, device=device).normal_(std=H**-0.5)
    down = torch.empty(E, H, I, dtype=case.dtype, device=device).normal_(std=I**-0.5)
    weights = nn.Parameter(gate_up), nn.Parameter(down)
    for weight in weights if case.kind == "step" else ():
        weight.grad = torch.zeros_like(weight)
    return weights


def num_pools(case: Case, device: torch.device) -> int:
    """Count the pools that decoding goes through, so that none is cached when its turn comes again: 8 at most."""
    if case.kind != "decode" or device.type == "cpu":
        return 1
    # An AMD accelerator's memory-side cache is not in the properties.
    cache = 512 << 20 if torch.version.hip else 2 * torch.cuda.get_device_properties(device).L2_cache_size
    active = min(case.shape.E, case.T * case.shape.K) * case.shape.expert_numbers * case.dtype.itemsize
    return min(8, 1 + cache // active)


# --- what is timed ---------------------------------------------------------------------------------------------------


def group_forward(layer: Layer, x: Tensor, index: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Run the layers of a tied group, each with its own routing, on a residual stream."""
    for index_TK, weights_TK in zip(index, weights, strict=True):
        x = x + layer(x, index_TK, weights_TK)
    return x


def training_step(peer: Peer, layer: Layer, problem: Problem, number: int) -> None:
    """Run a tied group forward and backward for each microbatch, the pool's gradients added to what is there."""
    for microbatch in range(problem.case.microbatches):
        inputs = problem.sets[(number + microbatch) % len(problem.sets)]
        with peer.scope():
            y = group_forward(layer, *inputs)
        y.backward(problem.grad_output)
        for tensor in (inputs.x, *inputs.weights):
            tensor.grad = None  # the stream's own gradients are no part of the accumulation


class Prepared(NamedTuple):
    call: Callable[[int], Any]
    layer: Layer  # on the first pool
    calls: int = 1  # of a layer in one `call`; a decode time is divided by it


def prepare(peer: Peer, problem: Problem) -> Prepared:
    case, (gate_up, down) = problem.case, problem.pools[0]
    layer = peer.build(gate_up, down)
    if case.kind == "step":
        return Prepared(lambda number: training_step(peer, layer, problem, number), layer)
    if case.kind == "forward":

        @torch.no_grad()
        def forward(number: int) -> Tensor:
            x, index, weights = problem.sets[number % len(problem.sets)]
            return layer(x, index[0], weights[0])

        return Prepared(forward, layer)
    layers = [layer, *(peer.build(*pool) for pool in problem.pools[1:])]
    calls = max(len(problem.sets), len(layers))

    @torch.no_grad()
    def decode(number: int) -> list[Tensor]:
        turns = ((layers[turn % len(layers)], problem.sets[turn % len(problem.sets)]) for turn in range(calls))
        return [layer(x, index[0], weights[0]) for layer, (x, index, weights) in turns]

    return Prepared(decode, layer, calls)


# --- is it right -----------------------------------------------------------------------------------------------------


def float64_layer(gate_up: Tensor, down: Tensor) -> Layer:
    """Return a layer, expert after expert, whose backward writes each one's gradient once, not one of all."""
    experts = list(zip(gate_up.unbind(0), down.unbind(0), strict=True))

    def layer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in index.unique().tolist():
            token, k = (index == e).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], experts[e][0]).chunk(2, dim=-1)
            y = y.index_add(0, token, F.linear(F.silu(gate) * up, experts[e][1]) * weights[token, k, None])
        return y

    return layer


FLOAT64 = Peer("float64", float64_layer)


def outcome(peer: Peer, problem: Problem, pool: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return what must be right: the output, and of a step the gradients, the pool's as they are added to `.grad`."""
    dtype, is_step = pool[0].dtype, problem.case.kind == "step"
    x, index, weights = problem.sets[0]
    index = [each[:CHECKED_TOKENS] for each in index]
    x, *weights = (t.detach()[:CHECKED_TOKENS].to(dtype).requires_grad_(is_step) for t in (x, *weights))
    layer = peer.build(*pool)
    if not is_step:
        with torch.no_grad():
            return [layer(x, index[0], weights[0])]
    for weight in pool:
        weight.grad = None if weight.grad is None else weight.grad.zero_()
    with peer.scope():
        y = group_forward(layer, x, index, weights)
    y.backward(problem.grad_output[:CHECKED_TOKENS].to(dtype))
    return [y.detach(), x.grad, torch.stack([each.grad for each in weights]), *(weight.grad for weight in pool)]


def expected_outcome(problem: Problem) -> list[Tensor]:
    """Compute the outcome in float64; it is kept in float32."""
    pool = tuple(t.detach().double().requires_grad_(problem.case.kind == "step") for t in problem.pools[0])
    return [each.float() for each in outcome(FLOAT64, problem, pool)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


# --- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(layer: Layer, problem: Problem) -> int:
    """Count bytes that one layer's forward keeps for its backward, without the pool and the routing of its caller.

    Counted twice where the device allows it, and the larger taken: storages that autograd was given to keep, and
    memory still allocated after the forward less the output, plus the input, which is kept too.
    """
    inputs = problem.sets[0]
    given = {tensor.untyped_storage().data_ptr() for tensor in (*problem.pools[0], *inputs.index, *inputs.weights)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    on_device = problem.device.type != "cpu"
    synchronize(problem.device)
    before = torch.cuda.memory_allocated() if on_device else 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(inputs.x, inputs.index[0], inputs.weights[0])
    if not on_device:
        return sum(kept.values())
    still_there = torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()
    return max(sum(kept.values()), still_there + inputs.x.untyped_storage().nbytes())


def peak_bytes(call: Callable[[int], Any], device: torch.device) -> int | None:
    """Measure device memory of one call above what was allocated before it; None on a CPU."""
    if device.type == "cpu":
        call(0)  # as a warm-up
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


# --- one row ---------------------------------------------------------------------------------------------------------


class Bench:
    """A case, and a row for each peer that is asked for: ours first, then the others have a ratio to it.

    Args:
        has_ours: our own row is there already, from a process before this one.
        limits: `seconds`, `least` and `most` of `interleave`.
    """

    def __init__(self, case: Case, device: torch.device, rates: dict, has_ours: bool = False, **limits):
        self.case, self.device, self.rates, self.has_ours = case, device, rates, has_ours
        self.limits = {"seconds": 1.5, "least": 3, "most": 9} | limits
        self.memory = 4 << 30 if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory
        self.ours: Prepared | None = None

    @functools.cached_property
    def problem(self) -> Problem:
        return make_problem(self.case, self.device)

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        return expected_outcome(self.problem)

    def row(self, peer: Peer) -> dict:
        """Return what was measured. `status`: measured, wrong, failed or left out; but for the first with a reason."""
        reason = reason_to_leave_out(peer, self.case, self.memory)
        if reason:
            return {"status": "left out", "reason": reason}
        try:
            return self._measure(peer)
        except ImportError as error:
            return {"status": "left out", "reason": f"not installed: {one_line(error)}"}
        except Exception as error:  # whatever a peer raises is its result
            found = {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}
        try:
            gc.collect()
            synchronize(self.device)
        except Exception:
            found["status"] = "broke the device"  # which takes no more work from this process
        return found

    def _measure(self, peer: Peer) -> dict:
        prepared = prepare(peer, self.problem)
        if self.has_ours and self.ours is None:
            self.ours = prepare(PEERS[0], self.problem)
        found = outcome(peer, self.problem, self.problem.pools[0])
        errors = {name: relative_error(*pair) for name, *pair in zip(CHECKED, found, self.expected)}
        del found
        wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE[self.case.dtype]]
        row: dict = {"status": "measured", "largest_error": max(errors.values())}
        if wrong:
            row = {"status": "wrong", "reason": "relative error of " + ", ".join(wrong)}
        if self.case.kind == "step":
            row["saved_bytes"] = saved_bytes(prepared.layer, self.problem)
        row["peak_bytes"] = peak_bytes(prepared.call, self.device)
        if peer.name == TIEDMOE and not wrong:
            self.ours = prepared
        return row | self._time(peer, prepared)

    def _time(self, peer: Peer, prepared: Prepared) -> dict:
        calls = {peer.name: prepared.call} | ({TIEDMOE: self.ours.call} if self.ours else {})
        in_graph = [each for each in calls.values() if self.case.kind == "decode" and self.device.type != "cpu"]
        row = {}
        if not peer.capturable and prepared.call in in_graph:
            in_graph.remove(prepared.call)
            row["no_graph"] = "it waits for the device"
        times = None
        while times is None:
            try:
                times = interleave(calls, clock_for(self.device, in_graph), **self.limits)
            except RuntimeError as error:
                if prepared.call not in in_graph:
                    raise
                in_graph.remove(prepared.call)
                row["no_graph"] = one_line(error)
        each = [seconds / prepared.calls for seconds in times[peer.name]]
        row |= {"ms": spread([seconds * 1e3 for seconds in each]), **self._rate(statistics.median(each))}
        if self.ours:
            row["time_over_tiedmoe"] = paired_ratio(each, [seconds / self.ours.calls for seconds in times[TIEDMOE]])
        return row

    def _rate(self, seconds: float) -> dict:
        if self.case.kind != "decode":
            tflops = self.case.flops / seconds / 1e12
            return {"tflops": tflops, "of_machine": tflops / self.rates["matmul_tflops"]}
        tb_per_s = self.case.decode_bytes(self.problem.active_experts) / seconds / 1e12
        return {"tb_per_s": tb_per_s, "of_machine": tb_per_s / self.rates["copy_tb_per_s"]}


def run_plan(
    cases: Iterable[Any],
    execute: Callable[[Any], dict],
    seconds: float,
    now: Callable[[], float] = time.monotonic,
    kind: Callable[[Any], Hashable] = lambda case: case.kind,
) -> tuple[list[dict], list]:
    """Execute the cases in turn; one that would not end within `seconds`, judged by its kind so far, is left out.

    Returns:
        The results, and the `key` of each case that was left out.
    """
    start, took = now(), {}
    results: list[dict] = []
    left_out: list = []
    for case in cases:
        begun = now()
        if begun - start + statistics.median(took.get(kind(case), [10.0])) > seconds:
            left_out.append(case.key)
            continue
        results.append(execute(case))
        took.setdefault(kind(case), []).append(now() - begun)
    return results, left_out


def one_line(error: BaseException) -> str:
    """Return the first line that says something, short enough for a table, without a path of the machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    return re.sub(r" ?\(?(?<!\w)/[\w./+-]+\)?", "", said)[:200].replace("|", "/")
