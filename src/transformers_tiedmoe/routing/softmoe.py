"""SoftMoE (arXiv 2606.17952): a family's router whose number of experts per token is soft and has a budget.

A `SoftRouter` is the family's own router. Its own code makes scores, biases, group limits and weights; only its final
`topk` returns more experts than it asked for, and each then counts by its membership p in the soft top-k:
`weight_i = p_i * (the family's weight)_i`, normalised where the family normalises. Experts with a small p are dropped;
their slots hold the sentinel E. Notable: whether a family's router can be so replaced, and whether it normalises, is
found by trying. How SoftMoE itself schedules alpha and truncates is not public to us: this is our design.
"""

import contextlib
import copy
import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import initialization as init
from transformers.utils import logging

from ..audit import metrics
from ..errors import TiedMoeError
from ..families import is_experts, restore_module
from ..losses import record_routing, scores_of
from .budget import layer_budgets
from .lapsum import soft_top_k
from .options import most_active

logger = logging.get_logger(__name__)

# Families whose own loop over experts knows no slot that is not used.
EAGER_WITHOUT_SENTINEL = ("gpt_oss", "nemotron_h")


class ExpertBudget(nn.Module):
    """What the layers share out, k_l: the base model's `expert_budget`.

    Its methods take `config.softmoe` anew at every call, so that a schedule may change it there.

    Args:
        num_layers: the layers with experts, L.
        learns: whether the layers compete, by numbers that are trained.
    """

    theta: Any  # `[L]`; None unless the budget is learned

    def __init__(self, num_layers: int, learns: bool):
        super().__init__()
        self.num_layers = num_layers
        self.register_parameter("theta", nn.Parameter(torch.empty(num_layers)) if learns else None)

    def init_weights(self) -> None:
        """Give every layer the same share."""
        if self.theta is not None:
            init.zeros_(self.theta)

    def forward(self, place: int, soft: Mapping[str, Any]) -> float | torch.Tensor:
        """Return k of the layer at `place` among those with experts: a number, or a float32 scalar if learned."""
        if soft["layers"] is not None:
            return soft["layers"][place]
        if self.theta is None:
            return soft["budget"] / self.num_layers
        theta = (
            self.theta.full_tensor() if hasattr(self.theta, "full_tensor") else self.theta
        )  # FSDP2's, between passes
        return layer_budgets(theta.float(), soft["budget"], soft["cap"])[place]

    def most(self, place: int, soft: Mapping[str, Any]) -> float:
        """Return the most that k of this layer can become."""
        return soft["cap"] if self.theta is not None else float(self(place, soft))


class SoftRouter(nn.Module):
    """A family's router, softened. A subclass of this and the family's class is made for each family."""

    prefix = "Soft"
    records_itself = True  # to the router losses
    _owner: Any
    place: int
    num_scores: int
    family_top_k: int
    normalises: bool
    layer: int
    expert_flops: int  # of one token in one of its experts, forward
    fixed_top_k: int | None  # see `fixed_top_k`
    counts: "Counts | None"  # None before the first token

    @staticmethod
    def of(router: nn.Module, owner: Any, layer: int, place: int, experts: Any) -> "SoftRouter":
        """Make a soft router of the family's `router`, whose parameters it takes over.

        Args:
            router: of one layer.
            owner: the base model, whose `expert_budget` is looked up at every call.
            layer: as the model numbers it.
            place: the layer's place among those with experts.
            experts: of the layer, its own or its view of a pool.

        Raises:
            TiedMoeError: the family's router cannot be softened.
        """
        soft = restore_module(SoftRouter, type(router))
        soft.__dict__.update(router.__dict__)
        soft._owner = (owner,)  # in a tuple: a reference, not a submodule
        soft.layer, soft.place, soft.family_top_k = layer, place, owner.config.experts_per_token_of(layer)
        soft.num_scores = getattr(experts, "num_slots", None) or experts.num_experts
        soft.expert_flops = _flops_of_an_expert(experts, owner)
        soft.normalises = _find_whether_it_normalises(
            router, owner.config.hidden_size, soft.num_scores, soft.family_top_k
        )
        soft.fixed_top_k = soft.counts = None
        return soft

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """Do as the family's router: `(logits [T, E], weights [T, K], index [T, K] int64, ...)`, E where not used.

        K is what any token of the layer may use, `SoftMoeOptions.max_active`; on a CPU what one of these does use.
        """
        owner = self._owner[0]
        soft = owner.config.softmoe
        if self.fixed_top_k is not None:
            with Selection([], self.num_scores, self.family_top_k, self.fixed_top_k):
                logits, weights, index, *rest = super().forward(hidden_states, *args, **kwargs)
            record_routing(logits, scores_of(self), index)
            return (logits, weights, index, *rest)
        if soft["alpha"] == 0:
            logits, weights, index, *rest = super().forward(hidden_states, *args, **kwargs)
            record_routing(logits, scores_of(self), index)
            return (logits, weights, index, *rest)
        if owner.config._experts_implementation == "eager" and owner.config.family in EAGER_WITHOUT_SENTINEL:
            raise TiedMoeError(
                f"the loop over experts of family {owner.config.family!r} takes no slots that are not used, which "
                'soft routing has; load with experts_implementation="grouped_mm"'
            )
        most = most_active(owner.expert_budget.most(self.place, soft), soft["threshold"], self.num_scores)
        width = min(most, soft["max_active"] or most)
        chosen_by: list[torch.Tensor] = []
        with Selection(chosen_by, self.num_scores, self.family_top_k, width):
            logits, weights, index, *rest = super().forward(hidden_states, *args, **kwargs)
        scores = chosen_by[-1].float()
        if not self.training:  # where the loss tells, and a GPU is still needed to save what is good
            check_finite(scores, self.place)
        k = owner.expert_budget(self.place, soft)
        if isinstance(k, torch.Tensor):
            k = k.to(scores.device)
            if not self.training:
                check_share(k, self.place)
        p = soft_top_k(scores, k, soft["alpha"])
        weights, index = combine(p, weights, index, soft["threshold"], self.normalises)
        record_routing(logits, lambda _: p / p.sum(-1, keepdim=True), index)
        watches = not torch.compiler.is_compiling()
        if watches and index.device.type == "cpu":  # nothing waits: leave columns out that no token uses
            used = int(metrics.num_active(index, self.num_scores).max()) if len(index) else 1
            weights, index = weights[:, :used], index[:, :used]
        if watches:
            self.counts = Counts.of(self.num_scores, index.device) if self.counts is None else self.counts
            self.counts.add(index, (p >= soft["threshold"]).sum(-1) if width < most else None)
        return (logits, weights, index, *rest)

    def __reduce__(self):
        return restore_module, (SoftRouter, type(self).__mro__[2]), self.__dict__


@dataclasses.dataclass
class Counts:
    """What the tokens of one layer have used, counted where they are computed.

    Attributes:
        tokens: `[E + 1]` int64, tokens by their number of active experts.
        experts: `[E]` int64, tokens by expert.
        cut: `[2]` int64: tokens that `max_active` took experts from, and the experts taken.
    """

    tokens: torch.Tensor
    experts: torch.Tensor
    cut: torch.Tensor

    @classmethod
    def of(cls, num_experts: int, device: torch.device) -> "Counts":
        """Begin to count."""
        return cls(*(torch.zeros(n, dtype=torch.int64, device=device) for n in (num_experts + 1, num_experts, 2)))

    @torch.no_grad()
    def add(self, index: torch.Tensor, num_passing: torch.Tensor | None) -> None:
        """Count tokens: `index [T, K]`, E where not used; `num_passing [T]` experts if some of them may be cut."""
        uses = index.new_zeros(len(index), len(self.tokens), dtype=torch.bool).scatter_(1, index, True)[:, :-1]
        num_active = uses.sum(-1)
        self.tokens.index_add_(0, num_active, torch.ones_like(num_active))
        self.experts += uses.sum(0)
        if num_passing is not None:
            taken = (num_passing - num_active).clamp(min=0)
            self.cut += torch.stack([(taken > 0).sum(), taken.sum()])


class Selection(TorchFunctionMode):
    """Within it a router's final `topk` returns the best `width` of its experts instead of `top_k`.

    Args:
        chosen_by: takes the scores `[T, E]` that the router chose by, biases and group limits included. (A list: what
            torch.compile sees of a mode's own attributes is gone when the mode ends.)
        num_experts: E.
        top_k: what the router asks for.
        width: what it gets.
    """

    def __init__(self, chosen_by: list[torch.Tensor], num_experts: int, top_k: int, width: int):
        self.chosen_by, self.num_experts, self.top_k, self.width = chosen_by, num_experts, top_k, width

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.topk or func is torch.Tensor.topk:
            scores, k = args[0], kwargs["k"] if "k" in kwargs else args[1]
            # [T, E]: before it, group limits choose among groups, [T, G], and within them, [T, G, E / G]
            if k == self.top_k and scores.dim() == 2 and scores.shape[1] == self.num_experts:
                self.chosen_by.append(scores)
                return torch.topk(scores, self.width, dim=-1)
        return func(*args, **kwargs)


def check_finite(scores: torch.Tensor, place: int) -> None:
    """Raise if a router's scores are not all numbers below infinity; no device is waited for.

    On a GPU torch's device-side assertion prints the message, a later call raises, and the process can use the GPU no
    more. In a compiled model it is a `RuntimeError`. -inf rules an expert out.

    Args:
        scores: `[T, E]`.
        place: of the layer among those with experts, for the message.

    Raises:
        TiedMoeError: there is a NaN or +inf among them.
    """
    _expect(
        (scores < torch.inf).all(),
        f"layer {place} with experts: the router's scores are not all finite; expected numbers: the model has "
        "diverged, or its checkpoint is damaged",
    )


def check_share(k: torch.Tensor, place: int) -> None:
    """Raise if a layer's learned share of the budget is no number, as `check_finite` does for scores."""
    _expect(
        k.isfinite(),
        f"layer {place} with experts: its share of the budget is no finite number; expected finite ones in "
        "expert_budget.theta: the model has diverged, or its checkpoint is damaged",
    )


def _expect(holds: torch.Tensor, message: str) -> None:
    """Raise `TiedMoeError` with the message, of which CUDA takes at most 254 characters."""
    try:
        torch._assert_async(holds, message)
    except RuntimeError as error:
        raise TiedMoeError(message) from error


def combine(
    p: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, threshold: float, normalises: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh a token's experts by their membership and drop those that hardly belong.

    `weight_i = p_i * w_i`, then normalised to the sum that the family's weights have. An expert with p below the
    threshold, or that the family gives no weight, is dropped; the first one stays.

    Args:
        p: `[T, E]` memberships.
        weights: `[T, K]`, the family's.
        index: `[T, K]` int64, largest p first.
        threshold: of p.
        normalises: whether the family's weights have one sum.

    Returns:
        weights `[T, K]` in the dtype of `weights`, 0 where dropped; index `[T, K]`, E where dropped.
    """
    chosen = p.gather(-1, index)
    is_first = torch.arange(index.shape[-1], device=index.device) == 0
    keeps = ((chosen >= threshold) & (weights != 0)) | is_first
    soft = torch.where(keeps, chosen * weights, 0.0)
    if normalises:
        least = torch.finfo(soft.dtype).tiny
        soft = soft * (weights.float().sum(-1, keepdim=True) / soft.sum(-1, keepdim=True).clamp(min=least))
    return soft.to(weights.dtype), index.masked_fill(~keeps, p.shape[-1])


def soften(base_model: Any, expert_paths: dict[int, str]) -> None:
    """Replace the router of every layer with experts, and give the model its `expert_budget`.

    Args:
        base_model: a tied model on the meta device, with `config.routing == "softmoe"`.
        expert_paths: by layer, the path of its experts.

    Raises:
        TiedMoeError: the family's router cannot be softened.
    """
    config = base_model.config
    base_model.expert_budget = ExpertBudget(len(expert_paths), config.softmoe["learn_budget"])
    for experts in base_model.modules():
        if is_experts(experts):
            experts._is_expert_parallel = True  # transformers' backends look for the sentinel then
    for place, (layer, path) in enumerate(expert_paths.items()):
        router_path, experts = _router_beside(base_model, path), base_model.get_submodule(path)
        router = SoftRouter.of(base_model.get_submodule(router_path), base_model, layer, place, experts)
        base_model.set_submodule(router_path, router)
        most = most_active(
            base_model.expert_budget.most(place, config.softmoe), config.softmoe["threshold"], router.num_scores
        )
        if (config.softmoe["max_active"] or most) < most:
            logger.warning_once(
                f"max_active={config.softmoe['max_active']} is below the {most} experts of a token that can pass the "
                f"threshold {config.softmoe['threshold']}: some tokens lose experts."
            )


def active_experts(model: nn.Module, reset: bool = False) -> list[dict[str, float]]:
    """Return what each soft layer has used since the last reset, over all tokens, padding included.

    Args:
        model: a tied model with `routing="softmoe"`; where FSDP2 has sharded it, all processes have to call this.
        reset: whether to start counting anew.

    Returns:
        Per layer with experts: `layer`, its number; `k`, the soft mass that it may have; of the experts that a token
        did use `mean`, `p50`, `p95` and `p99`; `flops`, of these experts for a token on average, forward, a
        multiply-add counted as two; `tokens`; `dead`, the experts that none of them used; `tokens_cut` and
        `experts_cut`, what `max_active` took away. Empty where nothing has run, or `alpha` is 0.
    """
    found = []
    for router in soft_routers(model):
        if router.counts is None:
            continue
        counts, cut = router.counts.tokens.double().cpu(), router.counts.cut.tolist()
        quantiles = {f"p{percent}": float(metrics.histogram_quantile(counts, percent)) for percent in (50, 95, 99)}
        mean = metrics.histogram_mean(counts)
        with torch.no_grad():
            owner = router._owner[0]
            k = float(owner.expert_budget(router.place, owner.config.softmoe))
        used = {"layer": router.layer, "k": k, "mean": mean, **quantiles, "flops": mean * router.expert_flops}
        dead = metrics.num_dead(router.counts.experts)
        cuts = {"tokens_cut": cut[0], "experts_cut": cut[1]}
        found.append({**used, "tokens": int(counts.sum()), "dead": dead, **cuts})
        if reset:
            router.counts = None
    return found


def soft_routers(model: nn.Module) -> list[Any]:
    """Return the soft routers of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, SoftRouter)]


@contextlib.contextmanager
def fixed_top_k(model: nn.Module, top_k: Sequence[int]) -> Iterator[None]:
    """Within it each soft layer routes by the family's own top-k, of `top_k` experts, one number a layer."""
    routers = soft_routers(model)
    assert len(routers) == len(top_k)
    try:
        for router, number in zip(routers, top_k):
            router.fixed_top_k = number
        yield
    finally:
        for router in routers:
            router.fixed_top_k = None


def _flops_of_an_expert(experts: Any, owner: Any) -> int:
    """Count two for each weight that a token meets in one expert: of its matrices, and of a residual's."""
    matrices = list(experts.parameters())
    if hasattr(experts, "pool_index"):
        matrices += owner.expert_pools[experts.pool_index].parameters()
    return 2 * sum(math.prod(matrix.shape[1:]) for matrix in matrices if matrix.dim() == 3)


def _router_beside(base_model: nn.Module, experts_path: str) -> str:
    block = experts_path.rpartition(".")[0]
    for name in ("gate", "router"):
        if isinstance(getattr(base_model.get_submodule(block), name, None), nn.Module):
            return f"{block}.{name}"
    raise _cannot(base_model, "no module 'gate' or 'router' beside its experts")


_found: dict[Any, bool] = {}  # by router class and settings


def _find_whether_it_normalises(router: nn.Module, hidden_size: int, num_experts: int, top_k: int) -> bool:
    """Try a family's router, with weights drawn at random: its top k must be found again among all its experts.

    Raises:
        TiedMoeError: it chooses otherwise, or an expert's weight depends on the others in another way than by a sum.
    """
    settings = {k: v for k, v in vars(router).items() if isinstance(v, (bool, int, float, str))}
    key = (type(router), num_experts, top_k, *sorted(settings.items()))
    if key not in _found:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            _found[key] = _try(router, hidden_size, num_experts, top_k)
    return _found[key]


def _try(router: nn.Module, hidden_size: int, num_experts: int, top_k: int) -> bool:
    trial = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    for tensor in (*trial.parameters(), *trial.buffers()):
        tensor.normal_(std=hidden_size**-0.5) if tensor.is_floating_point() else tensor.zero_()
    given = []
    for name, parameter in list(inspect.signature(type(router).forward).parameters.items())[2:]:
        if "bias" in name:
            given.append(0.1 * torch.randn(num_experts, dtype=torch.float32))
        elif parameter.default is inspect.Parameter.empty:
            raise _cannot(router, f"it routes by {name}, too")
    try:
        hidden_states = torch.randn(32, hidden_size, dtype=torch.float32)
        try:
            _, weights, index, *_ = trial(hidden_states, *given)
        except ValueError:  # a router that wants `[B, S, H]`
            hidden_states = hidden_states[None]
            _, weights, index, *_ = trial(hidden_states, *given)
        chosen_by: list[torch.Tensor] = []
        with Selection(chosen_by, num_experts, top_k, num_experts):
            _, all_weights, all_index, *_ = trial(hidden_states, *given)
    except (RuntimeError, IndexError) as error:
        raise _cannot(router, "its code takes no tokens `[T, H]`, or no other number of active experts") from error
    if len(chosen_by) != 1 or not all_index.shape == all_weights.shape == (32, num_experts):
        raise _cannot(router, "it does not choose by one top-k over its experts")
    if index.dtype != torch.int64 or index.shape != weights.shape:
        raise _cannot(router, "it does not return logits, weights and indices; a newer transformers may")
    own, hard = (torch.zeros(32, num_experts, dtype=torch.float32) for _ in range(2))
    own.scatter_(-1, index, weights.float())
    hard.scatter_(-1, index, 1.0)
    for normalises in (False, True):
        soft, _ = combine(hard, all_weights.float(), all_index, 0.5, normalises)
        if torch.allclose(torch.zeros_like(own).scatter_(-1, all_index, soft), own, rtol=1e-4, atol=1e-6):
            return normalises
    raise _cannot(router, "an expert's weight depends on the other chosen ones by more than their sum")


def _cannot(module: nn.Module, why: str) -> TiedMoeError:
    return TiedMoeError(f"{type(module).__name__} cannot be routed softly: {why}; use routing='top_k'")
