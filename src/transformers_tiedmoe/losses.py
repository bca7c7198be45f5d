"""Router losses of models whose layers may differ in width and in how they route: balance per layer, and z-loss.

transformers' `load_balancing_loss_func` pools the layers and so needs one width, and takes every router for a softmax;
here each layer has its own loss, of the scores and the experts that its router really routes by, and the layers are
averaged, which is the recipe of "Tying the Loop" (arXiv 2606.16825, Section 4).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import CompileableContextVar, OutputRecorder

from .audit.metrics import num_active
from .errors import TiedMoeError

_recorded = CompileableContextVar("tiedmoe_router_logits")  # {"routings": [...]}: by name, as transformers' collector


class Routing(NamedTuple):
    """What one router decided in one forward.

    Attributes:
        logits: `[T, E]`.
        scores: `[T, E]` float32, what it routes by: softmax or, normalised to sum 1, sigmoid (DeepSeek-V3, arXiv
            2412.19437, equations 15 and 18).
        chosen: `[T, K]` int64, the experts that it chose, biases and group limits included.
    """

    logits: torch.Tensor
    scores: torch.Tensor
    chosen: torch.Tensor


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor | Routing], top_k: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the balance loss, averaged over layers (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    Args:
        router_logits: per layer its `Routing`, or `[T, E_l]` logits of a router that takes the `top_k` of a softmax;
            E_l may differ.
        top_k: experts active per token, K; not used for a `Routing`, which holds the chosen experts.
        attention_mask: `[B, S]`, T = B * S, 0 at padding, which does not count; by default every token counts.

    Returns:
        A float32 scalar, K if every layer is perfectly balanced.
    """
    weight = None if attention_mask is None else attention_mask.reshape(-1)
    losses: list[torch.Tensor] = []
    for given in router_logits:
        routing = given if isinstance(given, Routing) else _softmax_routing(given, top_k)
        num_experts = routing.scores.shape[-1]
        # one more for the sentinel of a slot that is not used
        counts = nn.functional.one_hot(routing.chosen, num_experts + 1).sum(dim=1)[:, :num_experts].float()
        loss = num_experts * (_mean(counts, weight) * _mean(routing.scores, weight)).sum()
        losses.append(loss if not losses else loss.to(losses[0].device))
    return torch.stack(losses).mean()


def router_z_loss(
    router_logits: Sequence[torch.Tensor | Routing], attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute ST-MoE's router z-loss, averaged over tokens and layers (arXiv 2202.08906, equation 5).

    Arguments as in `load_balancing_loss`.
    """
    weight = None if attention_mask is None else attention_mask.reshape(-1)
    logits = [given.logits if isinstance(given, Routing) else given for given in router_logits]
    squares = [each.float().logsumexp(dim=-1, keepdim=True).square() for each in logits]
    return torch.stack([_mean(square, weight).sum().to(logits[0].device) for square in squares]).mean()


def _softmax_routing(logits: torch.Tensor, top_k: int) -> Routing:
    scores = logits.float().softmax(dim=-1)
    return Routing(logits, scores, scores.topk(min(top_k, scores.shape[-1]), dim=-1).indices)


def _mean(values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Average `values [T, N]` over tokens, by `weight [T]` if there is one -> `[N]`."""
    if weight is None:
        return values.mean(dim=0)
    weight = weight.to(device=values.device, dtype=values.dtype)
    return (values * weight[:, None]).sum(dim=0) / weight.sum().clamp(min=1)


def watch_routers(base_model: PreTrainedModel) -> None:
    """Register hooks, once, on the routers of the family's `router_logits`, so that `add_router_losses` sees them."""
    if getattr(base_model, "_routers_are_watched", False):
        return
    base_model._routers_are_watched = True
    for _, module, index in router_modules(base_model):
        if not hasattr(module, "records_itself"):
            module.register_forward_hook(functools.partial(_record, index, scores_of(module)))


def router_modules(base_model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield path and module of each router of the family's `router_logits`, and which of its outputs these are."""
    recorders = (base_model._can_record_outputs or {}).get("router_logits", [])
    for recorder in recorders if isinstance(recorders, list) else [recorders]:
        if not isinstance(recorder, OutputRecorder):
            recorder = OutputRecorder(recorder, index=1)
        for name, module in base_model.named_modules():
            in_layer = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
            is_shared = name.startswith("shared_routers.")  # a group's, whose layers have views of it
            if isinstance(module, recorder.target_class) and in_layer and not is_shared:
                yield name, module, recorder.index


def record_routing(logits: torch.Tensor, scores: Callable[[torch.Tensor], torch.Tensor], chosen: torch.Tensor) -> None:
    """Report what a router decided to `add_router_losses`, if that listens; see `Routing`."""
    recorded = (_recorded.get() or {}).get("routings")
    if recorded is not None:
        recorded.append((logits.flatten(end_dim=-2), scores, chosen.flatten(end_dim=-2)))


def scores_of(router: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from a router's logits to its scores, which sum to 1.

    It is found in the source of the router's class, as families share no field for it. `tests/test_losses.py` checks
    it against the weights that each family's routers give.
    """
    score_fn = getattr(router, "score_fn", None)  # deepseek_v4: by its config's scoring_func
    # Of a softened router and of a shared one's view the family's class comes after its own and ours.
    family_class: Any = type(router).__mro__[2] if hasattr(type(router), "prefix") else type(router)
    if getattr(router, "expert_selection_fn", None) == "softmax":  # cohere2_moe, whose source has both
        score_fn = None
    elif score_fn is None and "sigmoid" in inspect.getsource(family_class.forward):
        score_fn = torch.sigmoid
    if score_fn is None:
        return functools.partial(torch.softmax, dim=-1)

    def normalised(logits: torch.Tensor) -> torch.Tensor:
        scores = score_fn(logits)
        return scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)

    return normalised


def _record(
    index: int, scores: Callable[[torch.Tensor], torch.Tensor], router: nn.Module, args: tuple, output: Any
) -> None:
    if _recorded.get():
        parts = output if isinstance(output, tuple) else (output,)
        chosen = [each for each in parts if isinstance(each, torch.Tensor) and not each.is_floating_point()]
        if len(chosen) != 1:  # jamba of transformers 5.17
            raise TiedMoeError(
                f"the router {type(router).__name__} gives {len(chosen)} integer tensors; expected one, the chosen "
                "experts: leave output_router_logits off"
            )
        # The scores are made when the forward has ended: a checkpointed layer, run again, would not make them.
        record_routing(parts[index], scores, chosen[0])


def add_router_losses(family_forward: Callable) -> Callable:
    """Wrap a family's `ForCausalLM.forward`: `output_router_logits` then adds the losses above, not the family's own.

    With soft routing the outputs also have `active_experts [L]`, the experts that a token used on average.

    Without labels there is no loss to add to. With `num_items_in_batch`, by which Trainer divides the cross-entropy of
    each micro-batch, the router losses of a micro-batch count by its share of those items, so that over a step they
    add up to their mean; transformers' own models add them in full for each micro-batch, `gradient_accumulation_steps`
    times too much.
    """
    signature = inspect.signature(family_forward)
    takes_flag = "output_router_logits" in signature.parameters
    returned = get_args(signature.return_annotation) or (signature.return_annotation,)
    fields = set().union(*(getattr(each, "__dataclass_fields__", ()) for each in returned))
    has_fields = {"router_logits", "aux_loss"} <= fields

    @functools.wraps(family_forward)
    def forward(self, *args, output_router_logits: bool | None = None, **kwargs):
        if output_router_logits is None:
            output_router_logits = getattr(self.config, "output_router_logits", False)
        # deepseek_v3 and others have no such argument and hand it on to the base model, which records the logits
        reports = "router_logits" in (self.base_model._can_record_outputs or {}) and (takes_flag or has_fields)
        if output_router_logits and not reports:
            raise TiedMoeError(
                f"family {self.config.family!r} does not report router logits (transformers' "
                f"{self._family_class.__name__} returns none, or no aux_loss); leave output_router_logits off"
            )
        recorded: list[tuple] = []
        if output_router_logits:
            watch_routers(self.base_model)
            kwargs["return_dict"], return_dict = True, kwargs.get("return_dict")
        token = _recorded.set({"routings": recorded} if output_router_logits else {})
        try:
            outputs = family_forward(self, *args, **({"output_router_logits": False} if reports else {}), **kwargs)
        finally:
            _recorded.reset(token)
        if not output_router_logits:
            return outputs
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.modules())
        if self.training and checkpointing and not recorded[-1][0].requires_grad:
            raise TiedMoeError(
                "reentrant gradient checkpointing would drop the gradient of the router losses; call "
                'gradient_checkpointing_enable({"use_reentrant": False}), or leave output_router_logits off'
            )
        given = {**dict(zip(list(signature.parameters)[1:], args)), **kwargs}  # by name, however they were given
        routings = [Routing(logits, scores(logits.float()), chosen) for logits, scores, chosen in recorded]
        mask = _padding_mask(given.get("attention_mask"), len(routings[0].logits))
        aux_loss = load_balancing_loss(routings, self.config.experts_per_token, mask)
        loss = outputs.loss
        if loss is not None:
            added = getattr(self.config, "router_aux_loss_coef", 0.0) * aux_loss.to(loss.device)  # zaya has none
            if self.config.router_z_loss_coef:
                added = added + self.config.router_z_loss_coef * router_z_loss(routings, mask).to(loss.device)
            loss = loss + _share(given) * added
        logits = tuple(routing.logits for routing in routings)
        outputs = _in_family_order(outputs, loss=loss, aux_loss=aux_loss, router_logits=logits)
        if self.config.routing == "softmoe":
            outputs["active_experts"] = _active_experts(routings, mask)
        keep_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if keep_dict else outputs.to_tuple()

    return forward


def _active_experts(routings: Sequence[Routing], mask: torch.Tensor | None) -> torch.Tensor:
    """Return the mean number of experts that a token of this forward uses, `[L]`."""
    used = [num_active(routing.chosen, routing.scores.shape[-1])[:, None].float() for routing in routings]
    weight = None if mask is None else mask.reshape(-1)
    return torch.cat([_mean(each, weight).to(used[0].device) for each in used]).detach()


def _padding_mask(mask: Any, num_tokens: int) -> torch.Tensor | None:
    """Return the `[B, S]` padding mask of this forward's tokens; None if there is none, or only attention weights."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    return mask[:, mask.shape[1] - num_tokens // mask.shape[0] :]  # with a cache it covers the tokens before, too


def _share(given: dict[str, Any]) -> torch.Tensor | float:
    """Return the share of this micro-batch's predicted tokens in Trainer's whole step; 1 if Trainer gives no count."""
    num_items, labels = given.get("num_items_in_batch"), given.get("labels")
    if num_items is None or labels is None:
        return 1.0
    shifted = given.get("shift_labels")
    return ((labels[..., 1:] if shifted is None else shifted) != -100).sum() / num_items


def _in_family_order(outputs: Any, **values: Any) -> Any:
    """Return `outputs` with `values`, in the field order of its class.

    A field that is appended would also come last in the tuple of the outputs.
    """
    names = [field.name for field in dataclasses.fields(outputs)]
    found = {**{name: getattr(outputs, name) for name in names}, **values}
    return type(outputs)(**found)
