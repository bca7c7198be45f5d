"""Router losses of models whose layers may differ in width: balance per layer, and z-loss.

transformers' `load_balancing_loss_func` pools the layers and so needs one width; here each layer has its own loss and
the layers are averaged, which is the recipe of "Tying the Loop" (arXiv 2606.16825, Section 4).
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import CompileableContextVar, OutputRecorder

from .errors import TiedMoeError

_recorded = CompileableContextVar("tiedmoe_router_logits")


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor], top_k: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Switch Transformer's balance loss (arXiv 2101.03961, equations 4 to 6) of each layer, averaged over layers.

    Args:
        router_logits: one `[B*S, E_l]` tensor per layer; E_l may differ.
        top_k: experts active per token, K.
        attention_mask: `[B, S]`, 0 at padding, which does not count; default: every token counts.

    Returns:
        A float32 scalar, K where every layer is perfectly balanced.
    """
    weight = None if attention_mask is None else attention_mask.reshape(-1)
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        num_experts = logits.shape[-1]
        chosen = probabilities.topk(min(top_k, num_experts), dim=-1).indices
        counts = nn.functional.one_hot(chosen, num_experts).sum(dim=1).float()
        losses.append(
            num_experts * (_mean(counts, weight) * _mean(probabilities, weight)).sum().to(router_logits[0].device)
        )
    return torch.stack(losses).mean()


def router_z_loss(router_logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """ST-MoE's router z-loss (arXiv 2202.08906, equation 5), averaged over tokens and layers; shapes as above."""
    weight = None if attention_mask is None else attention_mask.reshape(-1)
    squares = [logits.float().logsumexp(dim=-1, keepdim=True).square() for logits in router_logits]
    return torch.stack([_mean(square, weight).sum().to(router_logits[0].device) for square in squares]).mean()


def _mean(values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """`values [T, N]` averaged over tokens of `weight [T]` -> `[N]`."""
    if weight is None:
        return values.mean(dim=0)
    weight = weight.to(device=values.device, dtype=values.dtype)
    return (values * weight[:, None]).sum(dim=0) / weight.sum().clamp(min=1)


def watch_routers(base_model: PreTrainedModel) -> None:
    """Let the routers that the family reports `router_logits` of report them to `add_router_losses` too, once."""
    if getattr(base_model, "_routers_are_watched", False):
        return
    base_model._routers_are_watched = True
    recorders = (base_model._can_record_outputs or {}).get("router_logits", [])
    for recorder in recorders if isinstance(recorders, list) else [recorders]:
        if not isinstance(recorder, OutputRecorder):
            recorder = OutputRecorder(recorder, index=1)
        for name, module in base_model.named_modules():
            in_layer = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
            if isinstance(module, recorder.target_class) and in_layer:
                module.register_forward_hook(functools.partial(_record, recorder.index))


def _record(index: int, router: nn.Module, args: tuple, output: Any) -> None:
    recorded = _recorded.get()
    if recorded is not None:
        logits = output[index] if isinstance(output, tuple) else output
        recorded.append(logits.flatten(end_dim=-2))


def add_router_losses(family_forward: Callable) -> Callable:
    """Wrap a family's `ForCausalLM.forward`: `output_router_logits` then adds the losses above, not the family's own."""
    reports = "output_router_logits" in inspect.signature(family_forward).parameters

    @functools.wraps(family_forward)
    def forward(self, *args, output_router_logits: bool | None = None, **kwargs):
        if output_router_logits is None:
            output_router_logits = getattr(self.config, "output_router_logits", False)
        if output_router_logits and not reports:
            raise TiedMoeError(
                f"family {self.config.family!r} does not report router logits (transformers' "
                f"{self._family_class.__name__} has no output_router_logits); leave output_router_logits off"
            )
        recorded: list[torch.Tensor] = []
        if output_router_logits:
            watch_routers(self.base_model)
            kwargs["return_dict"], return_dict = True, kwargs.get("return_dict")
        token = _recorded.set(recorded if output_router_logits else None)
        try:
            outputs = family_forward(self, *args, **({"output_router_logits": False} if reports else {}), **kwargs)
        finally:
            _recorded.reset(token)
        if not output_router_logits:
            return outputs
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.modules())
        if self.training and checkpointing and not recorded[-1].requires_grad:
            raise TiedMoeError(
                "reentrant gradient checkpointing would drop the gradient of the router losses; call "
                'gradient_checkpointing_enable({"use_reentrant": False}), or leave output_router_logits off'
            )
        outputs["router_logits"] = tuple(recorded)
        outputs["aux_loss"] = load_balancing_loss(
            recorded, self.config.experts_per_token, kwargs.get("attention_mask")
        )
        if outputs.loss is not None:
            loss = outputs.loss + self.config.router_aux_loss_coef * outputs.aux_loss.to(outputs.loss.device)
            if self.config.router_z_loss_coef:
                z_loss = router_z_loss(recorded, kwargs.get("attention_mask"))
                loss = loss + self.config.router_z_loss_coef * z_loss.to(loss.device)
            outputs["loss"] = loss
        keep_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if keep_dict else outputs.to_tuple()

    return forward
