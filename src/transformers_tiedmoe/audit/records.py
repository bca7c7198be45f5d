"""One streaming pass over a text: what the routers of every layer do, kept per block for `active` and `stability`.

Memory does not grow with the text but by one row of counts a block; no token's choices are kept, except of a source
whose choices others are compared with.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..errors import TiedMoeError
from ..modeling_tiedmoe import TiedExperts
from . import metrics
from .routing import Choices, RoutingWatch

Progress = Callable[[int, int, str], None]
NUM_FREQUENT = 256  # tokens whose choices are counted one by one


@dataclasses.dataclass
class Records:
    """What was seen of one model on one text of B blocks of S tokens; layers are numbered as the model numbers them.

    Attributes:
        counts: by layer, choices of each expert of its router in each block, int64 `[B, E]`.
        row_counts: by tied layer, choices of each row of its pool, int64 `[P]`.
        row_tokens: by tied layer, tokens that go to each row, int64 `[P]`: fewer where two slots share a row.
        active: by layer, tokens that use 0, 1, 2, ... experts, int64 `[N]`.
        positions: by layer, experts used at each position, summed over blocks, int64 `[S]`.
        per_token: tokens by the experts that they use in all layers together, int64 `[N]`, of the only key "all".
        token_entropy: by layer whose scores are known, `metrics.token_entropy` summed over each block, float64 `[B]`.
        agreement: by pool and two layers of its group, choices that both make and all of the first, int64 `[B, 2]`.
        source_agreement: by layer, choices that the source makes too and all of the source's, int64 `[B, 2]`.
        together: by layer, tokens that use both of two experts, and on the diagonal those that use one, `[E, E]`.
        by_token: by layer, choices of each expert by each of the text's most frequent tokens, int64 `[N, E]`.
        flows: by layer and the next with experts, joint counts of first choices, by row of a pool, int64 `[E, E']`.
        choices: by layer, every choice, int16 `[B * S, K]`; of a source only.
        tokens: of each block, int64 `[B]`, of the only key "all".
    """

    counts: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    row_counts: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    row_tokens: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    active: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    positions: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    per_token: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    token_entropy: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    agreement: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    source_agreement: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    together: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    by_token: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    flows: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    choices: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    tokens: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks."""
        return int(self.tokens["all"].sum())

    def save(self, path: Path) -> None:
        """Write a safetensors file that `load` reads."""
        save_file(dict(self._named()), path)

    @classmethod
    def load(cls, path: Path) -> "Records":
        """Read what `save` wrote."""
        records = cls()
        for name, tensor in load_file(path).items():
            field, *key = name.split(".")
            numbers = tuple(int(each) if each != "all" else each for each in key)
            getattr(records, field)[numbers[0] if len(numbers) == 1 else numbers] = tensor
        return records

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        for field in dataclasses.fields(self):
            for key, tensor in getattr(self, field.name).items():
                parts = key if isinstance(key, tuple) else (key,)
                yield ".".join(map(str, (field.name, *parts))), tensor.contiguous()


@torch.no_grad()  # not inference_mode: what a model caches in its forward must stay usable
def record(
    model: PreTrainedModel,
    blocks: datasets.Dataset,
    batch_size: int = 8,
    source: Records | None = None,
    keep_choices: bool = False,
    frequent: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Records:
    """Run a model over a text once, and record what its routers do.

    Args:
        model: with experts, in eval mode, on any device; offloaded or not.
        blocks: rows of equal length with `input_ids`.
        batch_size: rows in one forward.
        source: records with `choices` of the source on the same blocks, to compare with.
        keep_choices: whether to keep every choice, for a later model's `source`.
        frequent: the tokens of `Records.by_token`, int64 `[N]`; `most_frequent` of these blocks if None.
        progress: called as `progress(done, total, what)`, in blocks.

    Raises:
        TiedMoeError: a layer's experts were not called once with every token.
    """
    recorder = _Recorder(model, source, keep_choices, most_frequent([blocks]) if frequent is None else frequent)
    device = execution_device(model)
    done = 0
    with RoutingWatch(model, recorder.see, with_scores=True) as watch:
        for batch in blocks.with_format("torch").iter(batch_size):
            input_ids = batch["input_ids"].to(device, torch.int64)
            recorder.begin(input_ids)
            model.base_model(input_ids=input_ids, use_cache=False)
            recorder.end(list(watch.experts))
            done += len(input_ids)
            if progress:
                progress(done, len(blocks), "")
    return recorder.records()


def most_frequent(texts: Iterable[datasets.Dataset], number: int = NUM_FREQUENT) -> torch.Tensor:
    """Return the most frequent tokens of blocks of text, int64 `[N]`, the most frequent first."""
    counts = torch.zeros(0, dtype=torch.int64)
    for text in texts:
        for batch in text.with_format("torch").iter(1024):
            found = torch.bincount(batch["input_ids"].flatten())
            size = max(len(counts), len(found))
            counts = torch.nn.functional.pad(counts, (0, size - len(counts)))
            counts += torch.nn.functional.pad(found, (0, size - len(found)))
    order = counts.argsort(descending=True, stable=True)[:number]
    return order[counts[order] > 0]


def execution_device(model: PreTrainedModel) -> torch.device:
    """Return the device that a model's inputs belong on: where it is, or where accelerate runs its first module."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else model.device


class _Recorder:
    """Sums up what `RoutingWatch` sees, batch by batch."""

    def __init__(self, model: PreTrainedModel, source: Records | None, keep_choices: bool, frequent: torch.Tensor):
        self.frequent = frequent.sort().values
        self.pools = {}  # by layer
        for module in model.modules():
            if isinstance(module, TiedExperts):
                self.pools[model.config.groups[module.pool_index][module.position]] = module.pool_index
        self.source, self.keep_choices = source, keep_choices
        self.by_block: dict[tuple, list[torch.Tensor]] = {}  # joined at the end
        self.summed: dict[tuple, torch.Tensor] = {}
        self.num_blocks = 0

    def begin(self, input_ids: torch.Tensor) -> None:
        """Start a batch, `[B, S]`."""
        self.shape = input_ids.shape
        self.frequent = self.frequent.to(input_ids.device)
        tokens = input_ids.flatten()
        place = torch.searchsorted(self.frequent, tokens).clamp(max=len(self.frequent) - 1)
        self.token = place.where(self.frequent[place] == tokens, -1)  # its place among the frequent ones
        self.rows: dict[int, Choices] = {}  # of the tied layers of this batch
        self.first: tuple[int, torch.Tensor, int] | None = None  # layer, first choice of each token, experts
        self.used: torch.Tensor | None = None  # experts of each token, in the layers so far
        self.seen: list[int] = []

    def end(self, layers: list[int]) -> None:
        """Finish a batch: `layers` are those with experts."""
        if self.seen != layers:
            raise TiedMoeError(
                f"layers {layers} have experts, but in a forward pass those of {self.seen} were called, in this "
                "order; expected each once: such a model cannot be audited, except by --memory-only"
            )
        num_blocks, block_size = self.shape
        assert self.used is not None
        self._add(("per_token", "all"), torch.bincount(self.used))
        self._append(("tokens", "all"), torch.full((num_blocks,), block_size))
        self.num_blocks += num_blocks

    def see(self, layer: int, choices: Choices) -> None:
        """Take what one layer's router chose for the tokens of the batch."""
        num_tokens = self.shape[0] * self.shape[1]
        if len(choices.slots) != num_tokens:
            raise TiedMoeError(
                f"the experts of layer {layer} were called with {len(choices.slots)} of {num_tokens} tokens; expected "
                "all of them: such a model cannot be audited, except by --memory-only"
            )
        self.seen.append(layer)
        used = metrics.num_active(choices.slots, choices.num_slots)
        self._append(("counts", layer), self._counts_by_block(choices.slots, choices.num_slots))
        self._add(("active", layer), torch.bincount(used))
        self._add(("positions", layer), used.reshape(self.shape).sum(0))
        self.used = used if self.used is None else self.used + used.to(self.used.device)
        if choices.scores is not None:
            self._append(("token_entropy", layer), self._by_block(metrics.token_entropy(choices.scores)))
        self._see_tokens(layer, choices)
        self._see_flow(layer, choices)
        if layer in self.pools:
            self._see_group(layer, choices)
        if self.source is not None and layer in self.source.choices:
            start = self.num_blocks * self.shape[1]
            theirs = self.source.choices[layer][start : start + num_tokens].to(choices.slots)
            self._append(("source_agreement", layer), self._agreement(theirs, choices.slots, choices.num_slots))
        if self.keep_choices:
            self._append(("choices", layer), choices.slots.to(torch.int16))

    def records(self) -> Records:
        """Return the sums over all batches."""
        records = Records()
        for (field, *key), parts in self.by_block.items():
            getattr(records, field)[key[0] if len(key) == 1 else tuple(key)] = _joined(parts)
        for (field, *key), total in self.summed.items():
            getattr(records, field)[key[0] if len(key) == 1 else tuple(key)] = total
        return records

    def _see_tokens(self, layer: int, choices: Choices) -> None:
        """Count which experts are used together, and which by which frequent token."""
        width = choices.num_slots
        uses = torch.zeros(len(choices.slots), width + 1, device=choices.slots.device)
        uses.scatter_(1, choices.slots.clamp(max=width), 1.0)  # exact: sums of ones below 2^24
        uses = uses[:, :width]
        self._add(("together", layer), (uses.T @ uses).long())
        token = self.token.to(uses.device)
        is_frequent = token >= 0
        by_token = uses.new_zeros(len(self.frequent), width).index_add_(0, token[is_frequent], uses[is_frequent])
        self._add(("by_token", layer), by_token.long())

    def _see_flow(self, layer: int, choices: Choices) -> None:
        """Count pairs of first choices, of the layer with experts before and of this one."""
        # By weight: some families leave their choices unsorted, and a bias may have chosen by other scores.
        first = choices.rows.gather(-1, choices.weights.float().abs().argmax(-1, keepdim=True)).squeeze(-1)
        if self.first is not None:
            before, theirs, num_before = self.first
            theirs = theirs.to(first.device)
            both = (theirs < num_before) & (first < choices.num_rows)
            joint = torch.bincount(
                theirs[both] * choices.num_rows + first[both], minlength=num_before * choices.num_rows
            )
            self._add(("flows", before, layer), joint.reshape(num_before, choices.num_rows))
        self.first = layer, first, choices.num_rows

    def _see_group(self, layer: int, choices: Choices) -> None:
        """Compare the layer with those of its group that came before."""
        pool, num_rows = self.pools[layer], choices.num_rows
        self._add(("row_counts", layer), metrics.expert_counts(choices.rows, num_rows))
        ordered = choices.rows.sort(-1).values
        again = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
        self._add(("row_tokens", layer), metrics.expert_counts(ordered.masked_fill(again, num_rows), num_rows))
        for other, theirs in self.rows.items():
            if self.pools[other] == pool:
                pair = self._agreement(theirs.rows.to(choices.rows.device), choices.rows, num_rows)
                self._append(("agreement", pool, other, layer), pair)
        self.rows[layer] = choices

    def _agreement(self, reference: torch.Tensor, other: torch.Tensor, num_experts: int) -> torch.Tensor:
        counted = metrics.agreeing_choices(reference, other, num_experts)
        return torch.stack([self._by_block(each) for each in counted], dim=-1)

    def _by_block(self, per_token: torch.Tensor) -> torch.Tensor:
        """Sum `[T]` over each block, `[B]`."""
        return per_token.reshape(self.shape).sum(-1)

    def _counts_by_block(self, slots: torch.Tensor, num_slots: int) -> torch.Tensor:
        """Count choices `[T, K]` in each block, `[B, E]`."""
        num_blocks, block_size = self.shape
        block = torch.arange(num_blocks, device=slots.device).repeat_interleave(block_size)[:, None]
        numbers = block * (num_slots + 1) + slots.clamp(max=num_slots)
        counts = torch.bincount(numbers.flatten(), minlength=num_blocks * (num_slots + 1))
        return counts.reshape(num_blocks, num_slots + 1)[:, :num_slots]

    def _append(self, key: tuple, part: torch.Tensor) -> None:
        self.by_block.setdefault(key, []).append(part.cpu())

    def _add(self, key: tuple, part: torch.Tensor) -> None:
        part, total = part.cpu(), self.summed.get(key)
        if total is not None and total.dim() == 1 and len(total) != len(part):  # histograms grow
            size = max(len(total), len(part))
            part, total = (torch.nn.functional.pad(each, (0, size - len(each))) for each in (part, total))
        self.summed[key] = part if total is None else total + part


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join the batches; soft routing may use another number of columns in each."""
    width = max(each.shape[-1] for each in parts) if parts[0].dim() == 2 else 0
    if width:
        highest = torch.iinfo(parts[0].dtype).max
        parts = [torch.nn.functional.pad(each, (0, width - each.shape[-1]), value=highest) for each in parts]
    return torch.cat(parts)
