"""Measures one peer in one case, on a GPU or a CPU.

A peer's result is first compared with float64: one that is wrong is reported as wrong, whatever its speed. Then it is
timed in turn with ours, round by round, so that their ratio is one of the same minute; memory is measured apart.
"""

import dataclasses
import functools
import gc
import re
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import timing
import torch
import torch.nn.functional as F
from peers import TIEDMOE, Layer, Peer, reason_to_leave_out
from shapes import TINY, Case, route
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # relative, Frobenius norm
CHECKED_TOKENS = 8192  # compared with float64 at most: the memory ends
CHECKED = ("y", "grad x", "grad weights", "grad gate_up", "grad down")
ALREADY = 0.25  # in the pool's `.grad` when a checked gradient is added to it
CPU, CPU_BYTES = torch.device("cpu"), 2 << 30  # what a peer may take there

Pool = tuple[nn.Parameter, nn.Parameter]


class Inputs(NamedTuple):
    x: Tensor  # [T, H], tokens for the first of g layers
    index: list[Tensor]  # g of [T, K] int64
    weights: list[Tensor]  # g of [T, K]


class Problem(NamedTuple):
    case: Case
    device: torch.device
    pools: list[Pool]  # one, or for decoding as many as keep the caches cold
    sets: list[Inputs]
    grad_output: Tensor  # [T, H]


def make_problem(case: Case, device: torch.device) -> Problem:
    """Draw pools, tokens and routing, always the same. Nothing is zero: zeros run faster."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    pools = [make_pool(case, device) for _ in range(num_pools(case, device))]
    like, is_step = {"dtype": case.dtype, "device": device}, case.kind == "step"

    def inputs() -> Inputs:
        x = torch.randn(case.T, case.shape.H, **like).requires_grad_(is_step)
        routed = [route(case.T, case.shape, case.routing, generator) for _ in range(case.g)]
        weights = [weights.to(**like).requires_grad_(is_step) for _, weights in routed]
        return Inputs(x, [index.to(device) for index, _ in routed], weights)

    sets = [inputs() for _ in range(8 if case.kind == "decode" and device.type == "cuda" else 3)]
    return Problem(case, device, pools, sets, torch.randn(case.T, case.shape.H, **like))


def make_pool(case: Case, device: torch.device) -> Pool:
    """Draw weights that keep sizes near 1 through the layers; for a step with gradients to be added to."""
    _, E, H, I, _ = case.shape
    gate_up, down = (torch.empty(E, *size, dtype=case.dtype, device=device) for size in ((2 * I, H), (H, I)))
    weights = nn.Parameter(gate_up.normal_(std=H**-0.5)), nn.Parameter(down.normal_(std=I**-0.5))
    for weight in weights if case.kind == "step" else ():
        weight.grad = torch.zeros_like(weight)
    return weights


def num_pools(case: Case, device: torch.device) -> int:
    """Count the pools that decoding goes through, so that none is cached when its turn comes again: 8 at most."""
    if case.kind != "decode" or device.type != "cuda":
        return 1
    # An AMD accelerator's memory-side cache is not in the properties.
    cache = 512 << 20 if torch.version.hip else 2 * torch.cuda.get_device_properties(device).L2_cache_size
    active = min(case.shape.E, case.T * case.shape.K) * case.shape.expert_numbers * case.dtype.itemsize
    return min(8, 1 + cache // active)


def group_step(peer: Peer, layer: Layer, inputs: Inputs, grad_output: Tensor) -> Tensor:
    """Run the layers of a tied group on a residual stream and their backward; gradients are added to those there."""
    y = inputs.x
    with peer.scope():
        for index, weights in zip(inputs.index, inputs.weights, strict=True):
            y = y + layer(y, index, weights)
    y.backward(grad_output)
    return y.detach()


class Prepared(NamedTuple):
    call: Callable[[int], Any]
    layer: Layer  # on the first pool
    calls: int = 1  # of a layer in one `call`; a time is divided by it


def prepare(peer: Peer, problem: Problem) -> Prepared:
    layers, sets = [peer.build(*pool) for pool in problem.pools], problem.sets
    calls = max(len(sets), len(layers)) if problem.case.kind == "decode" else 1

    def step(number: int) -> None:
        inputs = sets[number % len(sets)]
        group_step(peer, layers[0], inputs, problem.grad_output)
        for tensor in (inputs.x, *inputs.weights):
            tensor.grad = None  # the stream's own gradients are not accumulated

    @torch.no_grad()
    def forward(number: int) -> None:
        for turn in range(number, number + calls):
            x, index, weights = sets[turn % len(sets)]
            layers[turn % len(layers)](x, index[0], weights[0])

    return Prepared(step if problem.case.kind == "step" else forward, layers[0], calls)


def float64_layer(gate_up: Tensor, down: Tensor) -> Layer:
    """Return a layer in float64, expert after expert; its backward writes each one's gradient once, not one of all.

    An expert's weights are turned to float64 when they are used, in the backward once more: all would fill the memory.
    """
    experts = list(zip(gate_up.unbind(0), down.unbind(0), strict=True))

    def expert(x: Tensor, gate_up_e: Tensor, down_e: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up_e.double()).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down_e.double())

    def layer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in index.unique().tolist():
            token, k = (index == e).nonzero(as_tuple=True)
            y_e = checkpoint(expert, x[token], *experts[e], use_reentrant=False)
            y = y.index_add(0, token, y_e * weights[token, k, None])
        return y

    return layer


def outcome(peer: Peer, problem: Problem, pool: Pool, dtype: torch.dtype) -> list[Tensor]:
    """Return what must be right: the output and a step's gradients, the pool's as added to a `.grad` that is there."""
    is_step, layer = problem.case.kind == "step", peer.build(*pool)
    x, index, weights = problem.sets[0]
    index = [each[:CHECKED_TOKENS] for each in index]
    x, *weights = (t.detach()[:CHECKED_TOKENS].to(dtype).requires_grad_(is_step) for t in (x, *weights))
    if not is_step:
        with torch.no_grad():
            return [layer(x, index[0], weights[0])]
    for weight in pool:
        weight.grad = None if weight.grad is None else weight.grad.fill_(ALREADY)
    already = 0.0 if pool[0].grad is None else ALREADY
    y = group_step(peer, layer, Inputs(x, index, weights), problem.grad_output[:CHECKED_TOKENS].to(dtype))
    return [y, x.grad, torch.stack([each.grad for each in weights]), *(weight.grad - already for weight in pool)]


def expected_outcome(problem: Problem) -> list[Tensor]:
    """Compute the outcome in float64, gradients of the pool summed in float32; it is kept in float32."""
    pool = tuple(nn.Parameter(weight.detach().float()) for weight in problem.pools[0])
    return [each.float() for each in outcome(Peer("float64", float64_layer), problem, pool, torch.float64)]


def errors_of(peer: Peer, problem: Problem, expected: list[Tensor]) -> dict[str, float]:
    """Return the relative error of everything that must be right."""
    found = outcome(peer, problem, problem.pools[0], problem.case.dtype)
    return {name: relative_error(*pair) for name, *pair in zip(CHECKED, found, expected)}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return (torch.dist(found.float(), expected) / expected.norm()).item()


def saved_bytes(layer: Layer, problem: Problem) -> int:
    """Count bytes that one layer's forward keeps for its backward, without the pool and the routing of its caller.

    Counted twice where the device allows it, and the larger taken: storages that autograd was given to keep, and
    memory still allocated after the forward less the output, plus the input, which is kept too.
    """
    x, index, weights = problem.sets[0]
    given = {tensor.untyped_storage().data_ptr() for tensor in (*problem.pools[0], *index, *weights)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    timing.synchronize(problem.device)
    before = torch.cuda.memory_allocated()  # 0 without a GPU
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x, index[0], weights[0])
    still_there = torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()
    own = sum(size for storage, size in kept.items() if storage not in given)
    return max(own, still_there + x.untyped_storage().nbytes())


def allocated_growth(call: Callable[[int], Any]) -> int:
    """Measure device memory of one call above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_growth_of(case: Case, peer: Peer) -> int:
    """Measure, best in a process of its own, resident memory of one call above pool, gradients and inputs."""
    small = dataclasses.replace(case, shape=TINY, T=2)
    prepare(peer, make_problem(small, CPU)).call(0)  # libraries load at a first call
    call = prepare(peer, make_problem(case, CPU)).call
    return timing.resident_growth(lambda: call(0))


class Bench:
    """A case, and a row for each peer that is asked for: ours first, then the others have a ratio to it.

    `rates` are the machine's, `own_process` also measures the peak of resident memory on a CPU, `limits` are those of
    `interleave`.
    """

    def __init__(self, case, device: torch.device, rates: dict, own_process: bool = False, **limits):
        self.case, self.device, self.rates, self.own_process = case, device, rates, own_process
        self.limits = {"seconds": 1.5, "least": 3, "most": 9} | limits
        self.ours: Prepared | None = None

    def row(self, peer: Peer) -> dict:
        """Return what was measured. `status`: measured, wrong, failed or left out; but for the first with a reason."""
        if reason := self.reason(peer):
            return {"status": "left out", "reason": reason}
        try:
            return self._measure(peer)
        except ImportError as error:
            return {"status": "left out", "reason": f"not installed: {one_line(error)}"}
        except Exception as error:  # whatever a peer raises is its result
            found = {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}
        try:
            gc.collect()
            timing.synchronize(self.device)
        except Exception:
            found["status"] = "broke the device"  # which takes no more work from this process
        return found

    def _measure(self, peer: Peer) -> dict:
        prepared = self.prepare(peer)
        errors = self.errors(peer, prepared)
        wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE[self.case.dtype]]
        row = {"status": "measured", "largest_error": max(errors.values())}
        row = {"status": "wrong", "reason": "relative error of " + ", ".join(wrong)} if wrong else row
        row |= self.memory(peer, prepared)
        if peer.name == TIEDMOE and not wrong:
            self.ours = prepared
        return row | self._time(peer, prepared)

    def _time(self, peer: Peer, prepared: Prepared) -> dict:
        calls = {peer.name: prepared.call} | ({TIEDMOE: self.ours.call} if self.ours else {})
        in_graph = set(calls) if self.case.kind == "decode" and self.device.type == "cuda" else set()
        row = {"no_graph": "it waits for the device"} if in_graph and not peer.capturable else {}
        in_graph -= {peer.name} if row else set()
        try:
            times = self._rounds(calls, in_graph)
        except RuntimeError as error:
            if peer.name not in in_graph:
                raise
            row["no_graph"] = one_line(error)
            times = self._rounds(calls, in_graph - {peer.name})
        each = [seconds / prepared.calls for seconds in times[peer.name]]
        row |= {"ms": timing.spread([seconds * 1e3 for seconds in each]), **self.rate(statistics.median(each))}
        if self.ours:
            ours = [seconds / self.ours.calls for seconds in times[TIEDMOE]]
            row["time_over_tiedmoe"] = timing.paired_ratio(each, ours)
        return row

    def _rounds(self, calls: dict[str, Callable[[int], Any]], in_graph: set[str]) -> dict[str, list[float]]:
        on_cpu = self.device.type == "cpu"
        timed = {n: timing.by_clock(c) if on_cpu else timing.on_device(c, n in in_graph) for n, c in calls.items()}
        return timing.interleave(timed, **self.limits)

    # What a case of a layer is; `models.py` has that of a whole model.
    resident_growth_of = staticmethod(resident_growth_of)

    def reason(self, peer: Peer) -> str | None:
        """Return why a peer does not take part, or None."""
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.get_device_properties(self.device).total_memory if on_gpu else CPU_BYTES
        return reason_to_leave_out(peer, self.case, memory, self.rates["copy_tb_per_s"])

    @functools.cached_property
    def problem(self) -> Problem:
        return make_problem(self.case, self.device)

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        return expected_outcome(self.problem)

    def prepare(self, peer: Peer) -> Prepared:
        return prepare(peer, self.problem)

    def errors(self, peer: Peer, prepared: Prepared) -> dict[str, float]:
        return errors_of(peer, self.problem, self.expected)

    def memory(self, peer: Peer, prepared: Prepared) -> dict[str, int]:
        """Return bytes saved by a layer for its backward, and the most of a call; calls it once, as a warm-up."""
        found = {"saved_bytes": saved_bytes(prepared.layer, self.problem)} if self.case.kind == "step" else {}
        if self.device.type == "cuda":
            return found | {"peak_bytes": allocated_growth(prepared.call)}
        prepared.call(0)
        if self.own_process:
            found["peak_bytes"] = timing.in_own_process(self.resident_growth_of, self.case, peer)
        return found

    def rate(self, seconds: float) -> dict:
        """Return the rate of the work that the layer cannot do without, and its share of the machine's own."""
        if self.case.kind != "decode":
            tflops = self.case.flops / seconds / 1e12
            return {"tflops": tflops, "of_machine": tflops / self.rates["matmul_tflops"]}
        active = statistics.mean(inputs.index[0].unique().numel() for inputs in self.problem.sets)
        tb_per_s = self.case.decode_bytes(active) / seconds / 1e12
        return {"tb_per_s": tb_per_s, "of_machine": tb_per_s / self.rates["copy_tb_per_s"]}


def one_line(error: BaseException) -> str:
    """Return the first line that says something, short enough for a table, without a path of the machine."""
    said = str(error).strip().partition("\n")[0].strip() or type(error).__name__
    return re.sub(r" ?\(?(?<!\w)/[\w./+-]+\)?", "", said)[:200].replace("|", "/")
