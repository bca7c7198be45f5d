"""What `audit.json` holds: the models of version 2, one section a kind of evidence.

`python -m transformers_tiedmoe.audit.schema` prints them as docs/audit.md has them.

Losses and divergences are in nats, sizes in bytes (a GiB is 2^30), FLOPs count a multiply-add as two. Layers are
numbered as the model numbers them. A section that was not asked for, or cannot be known, is null; `notes` say why.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION = 2  # version 1 had no quality for its cost in `ParetoPoint`; it is read, too


class Section(BaseModel):
    """A part of the audit: nothing but its fields, and none of them changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(Section):
    """A figure with its 95 % bootstrap interval, over blocks of text; `low` and `high` are null for a single block."""

    value: float
    low: float | None = None
    high: float | None = None


class Distribution(Section):
    """Of whole numbers, such as the active experts of a token."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: int


class Domain(Section):
    """A text that the models were read on."""

    name: str
    data: str = Field(description="file or dataset; only its name, never a path")
    num_tokens: int
    num_blocks: int
    block_size: int
    sha256: str | None = Field(default=None, description="of the tokens, by the first model's tokenizer")


class Layer(Section):
    """One decoder layer, as the config and the modules say."""

    index: int
    kind: Literal["dense", "untied", "tied"]
    pool: int | None = Field(default=None, description="number of the group's pool, of a tied layer")
    num_experts: int | None = Field(default=None, description="experts that the layer's router chooses among")
    pool_experts: int | None = Field(default=None, description="experts of the pool")
    top_k: int | None = Field(default=None, description="of the config; null with soft routing")
    soft_mass: float | None = Field(default=None, description="k_l, with soft routing")


# --- 1: active experts -----------------------------------------------------------------------------------------------


class LayerActive(Section):
    """How many experts a token uses in one layer."""

    layer: int
    by_domain: dict[str, Distribution]
    soft_mass: float | None = None
    by_position: list[float] = Field(description="mean in each bin of `position_bins`, all domains together")
    histogram: list[int] = Field(description="tokens that use 0, 1, 2, ... experts, all domains together")


class ActiveExperts(Section):
    """Evidence 1."""

    is_adaptive: bool = Field(description="whether tokens of one layer use different numbers of experts")
    per_token: dict[str, Distribution] = Field(description="by domain, the sum over layers")
    layers: list[LayerActive]
    position_bins: list[int] = Field(description="first position of each bin")
    flops_per_token: dict[str, float] = Field(description="by domain, of a forward pass, at the realised experts")
    domain_shift: dict[str, float] = Field(description="'a|b': total variation of the numbers used, mean over layers")


# --- 2: memory -------------------------------------------------------------------------------------------------------

COMPONENTS = ("embedding", "attention", "router", "experts", "shared_experts", "dense_mlp", "norm", "head", "other")


class Parameters(Section):
    """Numbers of one component.

    `unique` counts a pool once, `read` once for each layer that reads it (`shared` is the difference), `active` all
    but the experts that a token does not use, over all layers, as publishers count; an embedding counts whole.
    """

    unique: int
    read: int
    active: int


class LayerMemory(Section):
    """Unique parameters of a layer by component; a pool counts in the first layer of its group."""

    layer: int
    parameters: dict[str, int]


class Inference(Section):
    """What serving needs."""

    dtype: str
    context: int
    batch_size: int
    weight_bytes: int
    cache_bytes: int = Field(description="keys and values, latent of MLA, sliding windows, linear states")
    working_bytes: int = Field(description="most that a pass over the whole context takes besides")
    total_bytes: int
    fits: dict[str, bool] = Field(description="by GPU, whether one holds it")


class Training(Section):
    """What a training step needs, on each of `num_gpus`."""

    optimizer: Literal["adamw", "muon"]
    strategy: Literal["one", "ddp", "fsdp2", "expert_parallel"]
    num_gpus: int
    precision: Literal["mixed", "float32", "bfloat16"]
    gradient_checkpointing: bool
    weight_bytes: int = Field(description="with what FSDP2 gathers at a time, and copies in another dtype")
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    total_bytes: int
    communicated_bytes: int = Field(description="sent by one GPU in one step")
    fits: dict[str, bool]


class Memory(Section):
    """Evidence 2: computed from config and headers alone."""

    parameters: dict[str, Parameters] = Field(description="by component of `COMPONENTS`, and 'total'")
    layers: list[LayerMemory]
    checkpoint_bytes: int | None = Field(description="of the weight files; null for a model that was never saved")
    stored_dtypes: dict[str, int] = Field(description="bytes by dtype")
    inference: list[Inference]
    training: list[Training]
    gpus: dict[str, int] = Field(description="bytes of memory by GPU")


# --- 3: routing stability --------------------------------------------------------------------------------------------


class LayerStability(Section):
    """How evenly and how steadily one layer's router chooses."""

    layer: int
    num_experts: int
    load_cv: Interval = Field(description="standard deviation of the experts' loads over their mean")
    load_max_over_mean: Interval
    choice_entropy: Interval = Field(description="of the shares of all choices, over log E: 1 is even")
    token_entropy: Interval | None = Field(description="mean over tokens of the router's own distribution, over log E")
    num_dead: int = Field(description="experts that no token chose")
    is_collapsed: bool = Field(
        description="the K busiest experts have their even share K/E and half of all the rest, or more"
    )
    specialisation: Interval | None = Field(description="mutual information of expert and domain; null of one domain")
    source_agreement: Interval | None = Field(
        default=None, description="share of the choices that the same layer of the source makes too, with --source"
    )
    gpu_balance: Interval | None = Field(
        default=None,
        description="mean over maximum of the loads of `num_gpus` GPUs, each with as many experts, in order; null if "
        "they do not divide",
    )
    token_specialisation: float | None = Field(
        default=None, description="mutual information of expert and token, of the 256 most frequent tokens"
    )
    co_active: list[tuple[int, int, float]] = Field(
        default_factory=list,
        description="(expert, another, share of the first one's tokens that use the other too): the 10 largest",
    )
    drift: dict[str, Interval] = Field(description="'a|b': Jensen-Shannon divergence of the loads of two domains")
    loads: dict[str, list[float]] = Field(description="by domain, each expert's share of the choices")


class Agreement(Section):
    """The share of one layer's choices that another makes for the same token, in experts of one pool."""

    pool: int
    layers: tuple[int, int]
    agreement: Interval
    by_chance: float = Field(description="of two layers with these loads that choose independently")


class Flow(Section):
    """Tokens from the experts of a layer to those of the next: joint counts of first choices, largest first.

    A tied layer's experts are numbered by their pool's rows, so that a token which stays is one that stays.
    """

    layers: tuple[int, int]
    flows: list[tuple[int, int, int]] = Field(description="(expert, next layer's expert, tokens); at most 200")
    mutual_information: float


class Stability(Section):
    """Evidence 3."""

    layers: list[LayerStability]
    agreement: list[Agreement]
    flows: list[Flow]


# --- 4: layer strategy -----------------------------------------------------------------------------------------------


class Replacement(Section):
    """What a layer that uses its neighbour's part adds to the loss; experts are matched by their outputs before."""

    layer: int
    neighbour: int
    part: Literal["experts", "router", "attention"]
    loss_increase: Interval


class Similarity(Section):
    """Of two layers with experts."""

    layers: tuple[int, int]
    representation_cka: float = Field(description="linear CKA of what enters the experts, 0 to 1")
    output_similarity: float | None = Field(
        description="of neighbours, null of others: mean cosine of matched experts' outputs on the same tokens"
    )


class SuggestedPlan(Section):
    """A tying plan, as a recipe that `tiedmoe convert --recipe` takes."""

    recipe: dict
    expert_share: float = Field(description="of the expert bytes that stay")
    predicted_loss_increase: float
    measured_loss_increase: float | None = None
    reason: str


class LayerStrategy(Section):
    """Evidence 4."""

    replacements: list[Replacement]
    similarity: list[Similarity]
    plans: list[SuggestedPlan] = Field(description="by the share of expert bytes that stay, largest first")


# --- 5: cost against quality -----------------------------------------------------------------------------------------


class Task(Section):
    """A task of lm-evaluation-harness."""

    name: str
    metric: str
    value: float
    standard_error: float | None
    num_shots: int | None
    num_samples: int
    is_higher_better: bool = True


class Quality(Section):
    """Evidence 5, of one model."""

    loss: dict[str, Interval] = Field(description="by domain, nats per token")
    perplexity: dict[str, float]
    bits_per_byte: dict[str, Interval] = Field(
        default_factory=dict,
        description="by domain, the loss over the text's bytes: compares models of different vocabularies",
    )
    tasks: list[Task]
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    peak_memory_bytes: int | None = Field(description="of the process, or of the GPU, while it was measured")
    device: str


class ParetoPoint(Section):
    """One model on one domain or task, among all that were audited."""

    model: str
    measure: str = Field(description="'loss DOMAIN', 'bits per byte DOMAIN' or 'TASK METRIC'")
    value: float
    is_lower_better: bool = Field(default=True, description="as of losses; of most tasks' metrics more is better")
    flops_per_token: float
    memory_bytes: int = Field(description="that serving needs, in the first dtype of its memory")
    quality: float | None = Field(
        default=None,
        description="of losses the bits that are saved of each byte of text, 8 less the bits per byte; of tasks their "
        "value; null where less is better, or without bits per byte",
    )
    quality_per_gib: float | None = Field(default=None, description="over `memory_bytes`")
    quality_per_gflop: float | None = Field(default=None, description="over `flops_per_token`")
    is_on_compute_front: bool
    is_on_memory_front: bool


# --- the whole -------------------------------------------------------------------------------------------------------


class ModelAudit(Section):
    """All that was found of one model."""

    name: str = Field(description="the last part of its path, or its hub id")
    family: str
    architecture: str
    routing: str = Field(description="'top_k' or 'softmoe'")
    tying: str = Field(description="in words: 'untied', or groups and pools")
    layers: list[Layer]
    active: ActiveExperts | None = None
    memory: Memory | None = None
    stability: Stability | None = None
    strategy: LayerStrategy | None = None
    quality: Quality | None = None
    notes: list[str] = Field(default_factory=list, description="what was left out or was unusual, and why")


class Audit(Section):
    """`audit.json`."""

    version: int = Field(default=VERSION, ge=1, le=VERSION)
    date: str
    command: str
    settings: dict
    versions: dict[str, str]
    machine: dict
    domains: list[Domain]
    models: list[ModelAudit]
    pareto: list[ParetoPoint] = Field(default_factory=list)


def described() -> str:
    """Return what every section means, as Markdown."""
    lines = []
    for section in Section.__subclasses__():
        lines += ["", f"**{section.__name__}.** {(section.__doc__ or '').strip().splitlines()[0]}", ""]
        for name, field in section.model_fields.items():
            if field.description:
                lines.append(f"- `{name}`: {field.description}")
    return "\n".join(each for i, each in enumerate(lines) if each or lines[i - 1]).strip() + "\n"


if __name__ == "__main__":
    print(described(), end="")
