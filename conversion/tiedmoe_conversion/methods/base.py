"""How a method is written: one decorated function per file that turns a group's experts into a pool.

The decorator's arguments say what the plan must know before any tensor is read (how wide the pool is, which layers are
read, whether calibration text is needed); the function itself runs once per group. Methods that only move or add whole
tensors hand the pool out in blocks, so that a pool wider than memory can still be written; the calibrated ones work on
`Experts`, neurons in float32, and never see how a family stores them.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import torch

from transformers_tiedmoe.audit.metrics import expert_counts

from ..errors import ConversionError, did_you_mean
from ..layout.neurons import ExpertFunction, Experts


@dataclass(frozen=True)
class RoutedInputs:
    """What one layer's experts were given on the calibration text, T tokens; the last ones are held out.

    Attributes:
        hidden_states: `[T, H]`, in the dtype they were computed in.
        top_k_index: `[T, K]` int64 slots of the layer's own router; E marks an inactive one.
        top_k_weights: `[T, K]` float32 routing weights.
        num_fit: so many tokens are to fit on; those after them are held out.
    """

    hidden_states: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    num_fit: int

    def of_slot(self, slot: int, held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs `[n, H]` and routing weights `[n]` of `slot`'s tokens, float32; n may be 0."""
        tokens = slice(self.num_fit, None) if held_out else slice(None, self.num_fit)
        token, place = torch.where(self.top_k_index[tokens] == slot)
        return self.hidden_states[tokens][token].float(), self.top_k_weights[tokens][token, place].float()

    def sample_of_slot(self, slot: int, limit: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `of_slot` does, of at most `limit` tokens drawn at random.

        Their weights are raised so that sums of squares keep their size.
        """
        hidden_states, weights = self.of_slot(slot)
        if len(weights) <= limit:
            return hidden_states, weights
        chosen = torch.randperm(len(weights), generator=generator)[:limit]
        return hidden_states[chosen], weights[chosen] * (len(weights) / limit) ** 0.5

    def sample(self, limit: int, generator: torch.Generator) -> torch.Tensor:
        """Return at most `limit` of the tokens to fit on, whatever their slots: `[n, H]` float32."""
        chosen = torch.randperm(self.num_fit, generator=generator)[:limit]
        return self.hidden_states[chosen].float()

    def counts(self, num_experts: int) -> torch.Tensor:
        """Count how many tokens to fit on chose each slot, int64 `[E]`."""
        return expert_counts(self.top_k_index[: self.num_fit], num_experts)


class LayerExperts(Protocol):
    """The experts of one source layer, read only when asked."""

    @property
    def index(self) -> int:
        """The layer's index in the model."""

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return the experts' parameter `name` (such as `gate_up_proj`), `[E, ...]` in the source's dtype, as a copy.

        With `first` and `last` (not included) only those experts of it.
        """

    def rows(self, name: str) -> list[tuple[int, int]]:
        """Return the blocks to read parameter `name` in, as `first` and `last`: single experts where possible."""

    def inputs(self) -> RoutedInputs:
        """Return the layer's inputs on the calibration text; only if the method was registered to need it."""


@dataclass(frozen=True)
class Pool:
    """What a method returns.

    Args:
        blocks: given a parameter's name, yields the pool's tensor `[P, ...]` as consecutive blocks along dimension 0.
        slot_maps: per layer index the int64 `[E]` map from router index to pool index; empty for the identity.
    """

    blocks: Callable[[str], Iterator[torch.Tensor]]
    slot_maps: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor of the parameter `name`, `[P, ...]`."""
        blocks = list(self.blocks(name))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


@dataclass(frozen=True)
class Group:
    """What a method is given: the layers of one group, in order, of which only `layers_read` may be read.

    Attributes:
        layers: the source's layers.
        num_experts: E, the slots of every layer's router.
        pool_num_experts: P, the experts that the pool is to have.
        parameters: the names of a pool's tensors.
        function: what the family's experts compute; calling it raises for experts that calibrated methods do not know.
        seed: of this group; `generator` makes a random generator of it.
        held_out_loss: the source's loss on held-out text (nats per token) if this group alone were tied by a pool;
            None without calibration text.
        notes: of the methods for the user, in order; `note` adds one.
    """

    layers: tuple[LayerExperts, ...]
    num_experts: int
    pool_num_experts: int
    parameters: tuple[str, ...] = ()
    function: Callable[[], ExpertFunction] | None = None
    seed: int = 0
    held_out_loss: Callable[[Pool], float] | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note for the user: printed, and put into the report."""
        self.notes.append(text)

    def layer(self, index: int) -> LayerExperts:
        """Return the layer whose index in the model is `index`."""
        return next(layer for layer in self.layers if layer.index == index)

    def generator(self) -> torch.Generator:
        """Return a random generator on the CPU that starts alike in every run of the same recipe."""
        return torch.Generator().manual_seed(self.seed)

    def experts(self, layer: LayerExperts) -> Experts:
        """Return all experts of a source layer, `[E, ...]` in float32."""
        return self.family_function.neurons(self.tensors(layer))

    def pool_experts(self, pool: Pool) -> Experts:
        """Return a pool's experts, `[P, ...]` in float32: what a method that refines a pool starts from."""
        return self.family_function.neurons({name: pool.read(name) for name in self.parameters})

    def expert(self, tensors: Mapping[str, torch.Tensor], slot: int) -> Experts:
        """Return one expert of what `tensors` gave, `[1, ...]` in float32."""
        return self.family_function.neurons({name: tensor[slot : slot + 1] for name, tensor in tensors.items()})

    def tensors(self, layer: LayerExperts) -> dict[str, torch.Tensor]:
        """Return all parameters of a source layer's experts in the source's dtype: half of float32's memory."""
        return {name: layer.read(name) for name in self.parameters}

    def pool(self, experts: Experts, slot_maps: Mapping[int, torch.Tensor]) -> Pool:
        """Make a pool of `experts [P, ...]`, in the source's dtype; `slot_maps` by layer index."""
        dtype = self.layers[0].read("down_proj").dtype
        tensors = self.family_function.tensors(experts, dtype)

        def blocks(name: str) -> Iterator[torch.Tensor]:
            yield tensors[name]

        return Pool(blocks, slot_maps)

    def slot_map(self, pool: Pool, layer: LayerExperts) -> torch.Tensor:
        """Return where a layer's slots are in the pool, int64 `[E]`; the identity where the pool has no slot maps."""
        return pool.slot_maps.get(layer.index, torch.arange(self.num_experts))

    @property
    def family_function(self) -> ExpertFunction:
        """What the family's experts compute."""
        assert self.function is not None, "the family's experts were not given"
        return self.function()


@dataclass(frozen=True)
class Sizes:
    """What a group's memory depends on beside the calibration text.

    Attributes:
        num_layers: of the group, g.
        num_experts: of each of its layers, E.
        width: neurons of an expert, I.
        hidden_size: H.
        top_k: experts of a token, K.
        num_readers: slots that may read one row of the pool that a method starts from.
        num_tokens: of the calibration text; 0 without.
    """

    num_layers: int
    num_experts: int
    width: int
    hidden_size: int
    top_k: int
    num_readers: int
    num_tokens: int


def _default_scratch(sizes: Sizes, **options: Any) -> int:
    """Return an estimate of scratch memory for a method that gives none.

    It counts one expert's inputs, activations and outputs on all of the text, twice, and two square matrices of its
    neurons.
    """
    return 8 * sizes.num_tokens * (2 * sizes.hidden_size + 3 * sizes.width) + 16 * sizes.width**2


@dataclass(frozen=True)
class Memory:
    """What a method holds while it works, for the plan's estimate; the defaults are an estimate from above for most.

    Attributes:
        float32_layers: of a method that streams: float32 buffers of one layer's size that it keeps.
        group_copies: of any other: how often it holds the group's experts, and the pool's, in float32.
        scratch_bytes: what it holds beside those copies, at most: tokens, activations, matrices of one expert. Called
            as `scratch_bytes(sizes, **options)` with `Sizes` and all of the options, defaults included.
    """

    float32_layers: int = 0
    group_copies: tuple[float, float] = (2, 4)
    scratch_bytes: Callable[..., int] = _default_scratch


@dataclass(frozen=True)
class Method:
    """A registered method; see `register_method` for the fields."""

    name: str
    summary: str
    build: Callable[..., Pool]
    pool_num_experts: Callable[[int, int], int]
    any_width: bool
    slot_maps: bool
    lossless: bool
    layers_read: Callable[..., Sequence[int]]
    calibration: Callable[..., bool]
    refines: str | None
    streams: bool
    memory: Memory

    @property
    def options(self) -> dict[str, Any]:
        """The method's options and their defaults: the keyword arguments of its function."""
        parameters = list(inspect.signature(self.build).parameters.values())[2 if self.refines else 1 :]
        return {parameter.name: parameter.default for parameter in parameters}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise `ConversionError` for an option that the method does not have, or a value of another type."""
        for name, value in options.items():
            if name not in self.options:
                hint = did_you_mean(name, self.options) if self.options else "it has none"
                raise ConversionError(f"method {self.name!r} has no option {name!r}; {hint}")
            default, choices = self.options[name], self._choices(name)
            if choices and value not in choices:
                raise ConversionError(
                    f"method {self.name!r} got {name}={value!r}; expected one of {', '.join(map(repr, choices))}"
                )
            if type(default) in (int, float) and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
            ):
                raise ConversionError(
                    f"method {self.name!r} got {name}={value!r}; expected a number such as {default}"
                )
            if isinstance(default, int) and not isinstance(default, bool) and value != int(value):
                raise ConversionError(
                    f"method {self.name!r} got {name}={value!r}; expected a whole number such as {default}"
                )
            if (
                not isinstance(default, bool)
                and isinstance(default, (int, float))
                and value < (least := 1 if isinstance(default, int) else 0)
            ):
                raise ConversionError(f"method {self.name!r} got {name}={value!r}; expected at least {least}")

    def _choices(self, name: str) -> tuple[Any, ...]:
        """Return the values that an option's `Literal` annotation lists; empty without one."""
        hint = get_type_hints(self.build)[name]
        return get_args(hint) if get_origin(hint) is Literal else ()


METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    *,
    pool_num_experts: Callable[[int, int], int] = lambda num_experts, group_size: num_experts,
    any_width: bool = False,
    slot_maps: bool = False,
    lossless: bool = False,
    layers_read: Callable[..., Sequence[int]] = lambda layers, **options: layers,
    calibration: bool | Callable[..., bool] = False,
    refines: str | None = None,
    streams: bool = False,
    memory: Memory = Memory(),  # frozen
) -> Callable[[Callable[..., Pool]], Callable[..., Pool]]:
    """Register `build(group, **options) -> Pool` under `name`; the first line of its docstring is its help.

    Args:
        pool_num_experts: P from the source's E and the number of layers in the group, if the recipe names none.
        any_width: whether the method makes a pool of any `group.pool_num_experts` itself. The pool of another method
            is widened after it, by clones that change nothing (`methods/widen.py`).
        slot_maps: whether the layers keep their own router width E and reach the pool through a slot map.
        lossless: whether the tied model computes the source's logits, bit for bit; verified when it claims so.
        layers_read: the layers of a group, by index, that the method reads; the others' experts are dropped by name.
            Called as `layers_read(layers, **options)`, and raises `ConversionError` for a bad option value.
        calibration: whether `layer.inputs()` or `group.held_out_loss` is used; may depend on the `**options`.
        refines: the function is `build(group, start, **options)`, and `start` is the pool of the method before it in
            the recipe; such a method may be named by `then`. The value names the method that runs before it if it is
            the recipe's first.
        streams: whether the pool is made a block at a time; any other method holds its whole group in float32.
        memory: needed if the defaults of `Memory` are too low, or far too high.
    """

    def register(build: Callable[..., Pool]) -> Callable[..., Pool]:
        assert name not in METHODS, f"two methods are called {name!r}"
        summary = (build.__doc__ or "").strip().splitlines()[0]
        needs_calibration = calibration if callable(calibration) else lambda **options: calibration
        METHODS[name] = Method(
            name,
            summary,
            build,
            pool_num_experts,
            any_width,
            slot_maps,
            lossless,
            layers_read,
            needs_calibration,
            refines,
            streams,
            memory,
        )
        return build

    return register
