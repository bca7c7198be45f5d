"""Times one case with every peer that can take part, and says why another cannot.

A peer's result is first compared with float64: one that is wrong is reported as wrong, whatever its speed. Then all that
are left are timed in turn, round by round, and their memory, host synchronisations and gradient traffic taken apart from
the timing. On a CPU the same lines run with the host's clock and without the figures that only a device has.
"""

import contextlib
import dataclasses
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peers import PEERS, TIEDMOE, Layer, Peer, reason_to_leave_out
from shapes import Case, route
from timing import capture, clock_for, interleave, paired_ratio, spread, synchronize
from torch import Tensor, nn

from tiedmoe_kernels import backends

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-12}
CHECKED_TOKENS = 64  # of a forward, anywhere in the batch
CHECKED_STEP_TOKENS = 512  # of a training step, whose weight gradients depend on every token


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long one case may be timed, how many rounds that gives at least and at most, and who takes part where."""

    seconds: float = 2.0
    least: int = 5
    most: int = 40
    slow_peers_everywhere: bool = False
    silence_seconds: float = 150.0  # without a word from a case: it hangs


class PeerBrokeDevice(Exception):
    """After this error the device takes no more work from this process."""

    def __init__(self, peer: str, reason: str):
        super().__init__(peer, reason)
        self.peer, self.reason = peer, reason


class Inputs(NamedTuple):
    """What g layers are given: tokens for the first, routing for each."""

    x: Tensor  # [T, H]
    index: list[Tensor]  # g of [T, K] int64
    weights: list[Tensor]  # g of [T, K]


@dataclasses.dataclass
class Problem:
    case: Case
    device: torch.device
    pools: list[tuple[nn.Parameter, nn.Parameter]]  # one, or for decoding as many as keep the caches cold
    sets: list[Inputs]
    grad_output: Tensor  # [T, H]

    @property
    def active_experts(self) -> float:
        """Experts with at least one token, the mean over the input sets."""
        return statistics.mean(inputs.index[0].unique().numel() for inputs in self.sets)


Pools = list[tuple[nn.Parameter, nn.Parameter]]


def make_problem(case: Case, device: torch.device, seed: int = 0, pools: Pools | None = None) -> Problem:
    """Random tokens and routing, and random pools unless they are given. Nothing is zero: zeros run faster."""
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
    """Weights that keep the sizes near 1 through the layers; for a step with gradients that are there to be added to."""
    E, H, I = case.shape.E, case.shape.H, case.shape.I
    gate_up = torch.empty(E, 2 * I, H, dtype=case.dtype, device=device).normal_(std=H**-0.5)
    down = torch.empty(E, H, I, dtype=case.dtype, device=device).normal_(std=I**-0.5)
    weights = nn.Parameter(gate_up), nn.Parameter(down)
    for weight in weights if case.kind == "step" else ():
        weight.grad = torch.zeros_like(weight)
    return weights


def num_pools(case: Case, device: torch.device) -> int:
    """Decoding goes through as many pools as it takes that none is in the cache when its turn comes again, 8 at most."""
    if case.kind != "decode" or device.type == "cpu":
        return 1
    cache = 512 << 20 if torch.version.hip else 2 * torch.cuda.get_device_properties(device).L2_cache_size
    active = min(case.shape.E, case.T * case.shape.K) * case.shape.expert_numbers * case.dtype.itemsize
    return min(8, 1 + cache // active)


# --- what is timed ---------------------------------------------------------------------------------------------------


def group_forward(layer: Layer, x: Tensor, index: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The layers of a tied group, each with its own routing, on a residual stream."""
    for index_TK, weights_TK in zip(index, weights, strict=True):
        x = x + layer(x, index_TK, weights_TK)
    return x


def training_step(peer: Peer, layer: Layer, problem: Problem, number: int) -> None:
    """Forward and backward of a tied group for each microbatch, the pool's gradients added to what is there."""
    for microbatch in range(problem.case.microbatches):
        inputs = problem.sets[(number + microbatch) % len(problem.sets)]
        with peer.scope():
            y = group_forward(layer, *inputs)
        y.backward(problem.grad_output)
        for tensor in (inputs.x, *inputs.weights):
            tensor.grad = None  # the stream's own gradients are no part of the accumulation


class Prepared(NamedTuple):
    call: Callable[[int], object]
    layer: Layer  # on the first pool
    calls: int  # of a layer in one `call`; a decode time is divided by it
    how: str


def prepare(peer: Peer, problem: Problem) -> Prepared:
    case, (gate_up, down) = problem.case, problem.pools[0]
    layer = peer.build(gate_up, down)
    if case.kind == "step":
        return Prepared(lambda number: training_step(peer, layer, problem, number), layer, 1, "events")
    if case.kind == "forward":

        def forward(number: int) -> Tensor:
            x, index, weights = problem.sets[number % len(problem.sets)]
            with torch.no_grad():
                return layer(x, index[0], weights[0])

        return Prepared(forward, layer, 1, "events")
    layers = [layer, *(peer.build(*pool) for pool in problem.pools[1:])]
    calls = max(len(problem.sets), len(layers))

    @torch.no_grad()
    def body() -> list[Tensor]:
        turns = ((layers[turn % len(layers)], problem.sets[turn % len(problem.sets)]) for turn in range(calls))
        return [layer(x, index[0], weights[0]) for layer, (x, index, weights) in turns]

    if peer.not_capturable:
        return Prepared(lambda _: body(), layer, calls, f"no graph: {peer.not_capturable}")
    try:
        body()
        replay = capture(body, problem.device)
    except RuntimeError as error:
        synchronize(problem.device)
        return Prepared(lambda _: body(), layer, calls, f"no graph: capture failed, {one_line(error)}")
    return Prepared(lambda _: replay(), layer, calls, "events" if problem.device.type == "cpu" else "graph")


# --- is it right -----------------------------------------------------------------------------------------------------


def float64_layer(x: Tensor, index: Tensor, weights: Tensor, expert: Callable[[int], tuple[Tensor, Tensor]]) -> Tensor:
    """The layer in float64; `expert(e)` gives the two matrices of expert e."""
    y = torch.zeros_like(x)
    for e in index.unique().tolist():
        token, k = (index == e).nonzero(as_tuple=True)
        gate_up, down = expert(e)
        gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
        y = y.index_add(0, token, F.linear(F.silu(gate) * up, down) * weights[token, k, None])
    return y


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


class Judge:
    """Relative errors (Frobenius) against float64. A step is judged on its first tokens, since a weight gradient needs all.

    Where the pool's gradients in float64 do not fit beside the problem, those of the tokens and the routing are judged.
    """

    def __init__(self, problem: Problem, memory_bytes: float):
        self.problem = problem
        self.expected: list[Tensor] | None = None
        numbers = problem.case.shape.E * problem.case.shape.expert_numbers
        self.judges_pool = 4 * 8 * numbers < 0.8 * memory_bytes  # float64 weights, two copies of their gradients, ours

    def errors(self, peer: Peer, prepared: Prepared) -> dict[str, float]:
        if self.problem.case.kind == "step":
            return self._step(peer, prepared.layer)
        return {"y": self._forward(prepared)}

    def _forward(self, prepared: Prepared) -> float:
        case, (x, index, weights) = self.problem.case, self.problem.sets[0]
        out = prepared.call(0)
        y = out[0] if case.kind == "decode" else out
        rows = torch.linspace(0, case.T - 1, min(case.T, CHECKED_TOKENS)).long().to(x.device)
        if self.expected is None:
            gate_up, down = self.problem.pools[0]
            with torch.no_grad():
                arguments = x[rows].double(), index[0][rows], weights[0][rows].double()
                self.expected = [float64_layer(*arguments, lambda e: (gate_up[e].double(), down[e].double()))]
        return relative_error(y[rows], self.expected[0])

    def _step(self, peer: Peer, layer: Layer) -> dict[str, float]:
        problem = self.problem
        tokens = min(problem.case.T, CHECKED_STEP_TOKENS)
        inputs = problem.sets[0]
        x = inputs.x.detach()[:tokens].clone().requires_grad_()
        index = [index[:tokens] for index in inputs.index]
        weights = [weights.detach()[:tokens].clone().requires_grad_() for weights in inputs.weights]
        pool = problem.pools[0]
        grad_output = problem.grad_output[:tokens]
        if self.expected is None:
            self.expected = self._step_in_float64(x, index, weights, pool, grad_output)
        accumulated = [weight.grad for weight in pool]
        for weight in pool:
            weight.grad = None
        try:
            with peer.scope():
                y = group_forward(layer, x, index, weights)
            y.backward(grad_output)
            grad_weights = torch.stack([each.grad for each in weights])
            found = [y.detach(), x.grad, grad_weights, *(weight.grad for weight in pool)][: len(self.expected)]
        finally:
            for weight, grad in zip(pool, accumulated, strict=True):
                weight.grad = grad
        names = ("y", "grad x", "grad weights", "grad gate_up", "grad down")
        return {name: relative_error(*pair) for name, *pair in zip(names, found, self.expected)}

    def _step_in_float64(self, x, index, weights, pool, grad_output) -> list[Tensor]:
        x = x.detach().double().requires_grad_()
        weights = [each.detach().double().requires_grad_() for each in weights]
        gate_up, down = (weight.detach().double().requires_grad_(self.judges_pool) for weight in pool)
        experts = list(zip(gate_up.unbind(0), down.unbind(0), strict=True))  # its backward writes each gradient once
        y = group_forward(lambda *arguments: float64_layer(*arguments, experts.__getitem__), x, index, weights)
        wanted = [x, *weights, *([gate_up, down] if self.judges_pool else [])]
        grads = torch.autograd.grad(y, wanted, grad_output.double())
        g = len(weights)
        return [y.detach(), grads[0], torch.stack(grads[1 : 1 + g]), *grads[1 + g :]]


# --- what else is asked of it ----------------------------------------------------------------------------------------


def saved_bytes(layer: Layer, problem: Problem) -> int:
    """Bytes that one layer's forward keeps for its backward, without the pool and the routing that its caller made.

    Counted twice where the device allows it, and the larger taken: storages that autograd was given to keep, and memory
    still allocated after the forward less the output, plus the input, which is kept too.
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


def peak_bytes(call: Callable[[int], object], device: torch.device) -> int | None:
    """Device memory of one call above what was allocated before it."""
    if device.type == "cpu":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def host_syncs(call: Callable[[int], object], device: torch.device) -> int | None:
    """How often torch made the host wait for the device during one call."""
    if device.type == "cpu":
        return None
    synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


ELEMENTWISE = ("aten::add", "aten::add_", "aten::copy_", "aten::fill_", "aten::zero_", "aten::mul", "aten::mul_")


@contextlib.contextmanager
def own_weight_gradients(device_type: str) -> Iterator[list[int]]:
    """How often each weight gradient of our kernels made meanwhile passes over the pool: written 1, added to 2."""
    backend = backends.backend_of(device_type)
    passes, original = [], backend.backward_weight

    def counted(segments, spec, out_dtype, needs, into=(None,) * 4):
        passes.append(2 if any(gradient is not None for gradient in into) else 1)
        return original(segments, spec, out_dtype, needs, into)

    backend.backward_weight = counted
    try:
        yield passes
    finally:
        backend.backward_weight = original


def gradient_traffic(call: Callable[[int], object], problem: Problem, copy_bytes_per_s: float) -> dict:
    """Time a layer spends moving the pool's gradient about after or while it is computed.

    Measured by the profiler: every elementwise operation on a tensor of the pool's shape (autograd's sums over layers,
    the accumulation, casts, zeroing). Added, as bytes over the copy bandwidth: what the products themselves write, the
    pool once for every contribution, one for each addition; of our own kernels, which add by themselves, each call writes the
    pool and reads it too where there is a gradient to add to.
    """
    device = problem.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    shapes = {weight.numel(): sorted(weight.shape) for weight in problem.pools[0]}
    with (
        own_weight_gradients(device.type) as own_passes,
        torch.profiler.profile(activities=activities, record_shapes=True) as profile,
    ):
        call(0)
        synchronize(device)
    moved_us, additions = 0.0, 0
    for event in profile.key_averages(group_by_input_shape=True):
        shape = next((shape for shape in event.input_shapes if shape), [])
        if event.key in ELEMENTWISE and sorted(shape) == shapes.get(math.prod(shape)):
            moved_us += event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
            additions += event.count if event.key.startswith("aten::add") else 0
    written = sum(own_passes) if own_passes else additions / 2  # two parameters a contribution
    pool_bytes = problem.case.shape.pool_bytes(problem.case.dtype.itemsize)
    layers = problem.case.g * problem.case.microbatches
    return {
        "elementwise_ms_per_layer": moved_us / 1e3 / layers,
        "pool_passes_per_step": written,
        "ms_per_layer": (moved_us / 1e3 + written * pool_bytes / copy_bytes_per_s * 1e3) / layers,
    }


# --- one case --------------------------------------------------------------------------------------------------------


def measure_case(
    case: Case,
    device: torch.device,
    rates: dict,
    *,
    limits: Limits,
    banned: dict[str, str],
    traffic: bool = False,
    peers: tuple[Peer, ...] = PEERS,
    say: Callable[[str, str], None] = lambda peer, stage: None,
) -> dict:
    """Return the case with an entry for every peer: measured, wrong, failed or left out, the last three with a reason.

    Args:
        rates: what `machine_rates` returned; fractions are of it.
        banned: peers that do not take part, with the reason.
        traffic: measure `gradient_traffic` too.
        say: told who is at what, so that a crash can be laid at the right door.
    """
    memory = torch.cuda.get_device_properties(device).total_memory if device.type != "cpu" else 4 << 30
    problem = make_problem(case, device)
    judge = Judge(problem, memory)
    entries: dict[str, dict] = {}
    ready: dict[str, Prepared] = {}
    for peer in peers:
        reason = banned.get(peer.name) or reason_to_leave_out(peer, case, memory)
        if reason:
            entries[peer.name] = {"status": "left out", "reason": reason}
            continue
        with _failing_into(entries, peer.name, device):
            say(peer.name, "first call")
            prepared = prepare(peer, problem)
            prepared.call(0)  # at the size that is timed: some peers tune themselves at their first call
            errors = judge.errors(peer, prepared)
            entries[peer.name] = {"status": "measured", "errors": errors, "how": prepared.how}
            wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE[case.dtype]]
            if wrong:
                entries[peer.name] |= {"status": "wrong", "reason": "relative error of " + ", ".join(wrong)}
                entries[peer.name]["errors"] = {name: e if math.isfinite(e) else None for name, e in errors.items()}
            prepared.call(1)  # other inputs may want other code
            synchronize(device)
            ready[peer.name] = prepared
    judge.expected = None  # a float64 copy of the pool's gradients, not to lie about while memory is measured
    for name, prepared in list(ready.items()):
        with _failing_into(entries, name, device):
            say(name, "memory")
            entries[name] |= _apart_from_timing(prepared, problem, rates if traffic else None)
        if entries[name]["status"] == "failed":
            del ready[name]
    say(", ".join(ready), "timing")
    calls = {name: prepared.call for name, prepared in ready.items()}
    times = interleave(calls, clock_for(device), seconds=limits.seconds, least=limits.least, most=limits.most)
    active = problem.active_experts
    for name, seconds in times.items():
        each = [second / ready[name].calls for second in seconds]
        entries[name] |= {"ms": {k: v if k == "n" else v * 1e3 for k, v in spread(each).items()}}
        entries[name] |= _rates(case, active, statistics.median(each), rates)
        if TIEDMOE in times:
            base = [second / ready[TIEDMOE].calls for second in times[TIEDMOE]]
            entries[name]["time_over_tiedmoe"] = paired_ratio(each, base)
    described = {"kind": case.kind, "shape": case.shape._asdict(), "T": case.T, "g": case.g, "routing": case.routing}
    return {"key": case.key, **described, "active_experts": active, "flops": case.flops, "peers": entries}


def _apart_from_timing(prepared: Prepared, problem: Problem, rates: dict | None) -> dict:
    device, found = problem.device, {}
    if problem.case.kind == "step":
        found["saved_bytes"] = saved_bytes(prepared.layer, problem)
        if rates is not None:
            copy_bytes_per_s = rates["copy_tb_per_s"] * 1e12
            found["gradient_traffic"] = gradient_traffic(prepared.call, problem, copy_bytes_per_s)
    if prepared.how != "graph":
        found["peak_bytes"] = peak_bytes(prepared.call, device)
    found["host_syncs"] = host_syncs(prepared.call, device)
    return found


def _rates(case: Case, active_experts: float, seconds: float, rates: dict) -> dict:
    tflops = case.flops / seconds / 1e12
    if case.kind != "decode":
        return {"tflops": tflops, "fraction_of_matmul": tflops / rates["matmul_tflops"]}
    tb_per_s = case.decode_bytes(active_experts) / seconds / 1e12
    return {"tb_per_s": tb_per_s, "fraction_of_copy": tb_per_s / rates["copy_tb_per_s"]}


def run_plan(
    cases: Iterable[Case],
    execute: Callable[[Case], dict],
    seconds: float,
    now: Callable[[], float] = time.monotonic,
    done: Callable[[list[dict], list[str]], None] = lambda results, left_out: None,
) -> tuple[list[dict], list[str]]:
    """Execute the cases in turn; one that would not end within `seconds`, judged by its kind so far, is left out."""
    start, took = now(), {}
    results: list[dict] = []
    left_out: list[str] = []
    for case in cases:
        begun = now()
        if begun - start + statistics.median(took.get(case.kind, [10.0])) > seconds:
            left_out.append(case.key)
            continue
        results.append(execute(case))
        took.setdefault(case.kind, []).append(now() - begun)
        done(results, left_out)
    return results, left_out


@contextlib.contextmanager
def _failing_into(entries: dict[str, dict], name: str, device: torch.device):
    """An exception becomes the peer's entry; one that broke the device becomes `PeerBrokeDevice`."""
    try:
        yield
    except Exception as error:  # whatever a peer raises is its result
        missing = isinstance(error, ImportError)
        reason = f"not installed: {one_line(error)}" if missing else f"{type(error).__name__}: {one_line(error)}"
        entries[name] = {"status": "left out" if missing else "failed", "reason": reason}
    else:
        return
    try:
        synchronize(device)
        if device.type != "cpu":
            torch.cuda.empty_cache()
    except Exception as error:
        raise PeerBrokeDevice(name, entries[name]["reason"]) from error


def one_line(error: BaseException) -> str:
    """The first line that says something, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    return re.sub(r" ?\(?(?<!\w)/[\w./+-]+\)?", "", said)[:200].replace(
        "|", "/"
    )  # no path of the machine, no table cell
