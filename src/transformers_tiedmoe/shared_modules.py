"""Routers and attention shared by the layers of a group, the paper's component ablation (arXiv 2606.16825).

A group's parameters are owned once, by the base model, as `shared_routers[p]` and `shared_attentions[p]`. A layer
keeps a module of its own class in its own place, with its own number (`layer_idx`, by which KV caches are kept apart);
what holds parameters in it is a `SharedView`, which finds the shared module at call time, as `TiedExperts` its pool.
"""

import re
from typing import Any

from torch import nn

from .errors import TiedMoeError
from .families import check_alike, is_experts, restore_module
from .losses import router_modules

LAYER = re.compile(r"layers\.(\d+)\.")
OWNERS = {"router": "shared_routers", "attention": "shared_attentions"}


class SharedView(nn.Module):
    """A layer's view of a module that its group shares: the same outputs and attributes, no parameters.

    Args:
        owner: the base model.
        path: of the shared module, from the owner.
    """

    prefix = "Shared"

    def __init__(self, owner: nn.Module, path: str):
        nn.Module.__init__(self)  # a router's view is also of the family's class, whose constructor makes parameters
        self._owner = (owner,)  # in a tuple: a reference, not a submodule
        self._path = path

    @staticmethod
    def of_router(owner: nn.Module, path: str, router: nn.Module) -> "SharedView":
        """Make the view of a router: of the family's class too, by which what watches routers knows it."""
        view = restore_module(SharedView, type(router))
        SharedView.__init__(view, owner, path)
        return view

    def forward(self, *args, **kwargs):
        """Run the shared module, without its hooks: those that watch a layer are on the view."""
        return self._owner[0].get_submodule(self._path).forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_path" not in self.__dict__:  # being unpickled
                raise
            return getattr(self._owner[0].get_submodule(self._path), name)

    def __reduce__(self):
        if type(self) is SharedView:
            return super().__reduce__()
        return restore_module, (SharedView, type(self).__mro__[2]), self.__dict__

    def extra_repr(self) -> str:
        return self._path


def share(model: Any) -> None:
    """Put views of shared routers and attention into a tied base model on the meta device, as its config says.

    Raises:
        TiedMoeError: a family whose modules of that name are none to share, or layers of a group that differ in them.
    """
    for component, owner in OWNERS.items():
        if component not in model.config.tied_components:
            continue
        paths = _routers(model) if component == "router" else _attentions(model)
        shared = nn.ModuleList()
        for p, group in enumerate(model.config.groups):
            modules = {layer: model.get_submodule(paths[layer]) for layer in group if layer in paths}
            own = [name for module in modules.values() for name, _ in module.named_parameters(recurse=False)]
            if len(modules) < len(group) or (component == "attention" and own):
                raise TiedMoeError(
                    f"the {component} of layers {group} cannot be shared: family {model.config.family!r} has none in "
                    f"one of them, or one that is not made of modules; leave {component!r} out of tied_components"
                )
            check_alike(p, modules, component)
            if component == "router":
                shared.append(modules[group[0]])
                for layer, router in modules.items():
                    model.set_submodule(paths[layer], SharedView.of_router(model, f"{owner}.{p}", router))
                continue
            shared.append(_share_inside(list(modules.values()), model, f"{owner}.{p}"))
        setattr(model, owner, shared)


def _share_inside(modules: list[nn.Module], model: nn.Module, path: str) -> nn.ModuleDict:
    """Put views into `modules`, all alike, of what holds parameters in the first; return that for `path` to own."""
    shared = nn.ModuleDict()
    for name, part in modules[0].named_children():
        if dict(part.named_parameters(recurse=False)):
            shared[name] = part
            for module in modules:
                setattr(module, name, SharedView(model, f"{path}.{name}"))
        elif list(part.parameters()):  # it may know its layer, as a sparse attention's indexer with a cache does
            shared[name] = _share_inside([getattr(module, name) for module in modules], model, f"{path}.{name}")
    return shared


def _routers(model: Any) -> dict[int, str]:
    """Return the paths of the routers that are modules of their own, by layer."""
    paths = [path for path, module, _ in router_modules(model) if not any(map(is_experts, module.modules()))]
    return {int(match[1]): path for path in paths if (match := LAYER.match(path))}


def _attentions(model: Any) -> dict[int, str]:
    """Return the paths of the attention modules, by layer."""
    paths = [path for path, _ in model.named_modules() if path.endswith(".self_attn")]
    return {int(match[1]): path for path in paths if (match := LAYER.match(path))}
