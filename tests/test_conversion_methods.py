"""Every conversion method on small groups in memory: by hand, on equal layers, on idle experts, in every family's
layout.
"""

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from families import tiny_config
from transformers import AutoModelForCausalLM

from tiedmoe_conversion.errors import ConversionError
from tiedmoe_conversion.layout.neurons import ExpertFunction, Experts
from tiedmoe_conversion.methods import METHODS, Group, Pool, RoutedInputs
from tiedmoe_conversion.methods.prototype import choose, replacement_costs
from tiedmoe_conversion.methods.residual import residuals
from tiedmoe_conversion.methods.widen import widen
from transformers_tiedmoe.families import expert_layers

# Why each: plain; another module; shared experts beside it; interleaved, transposed, with biases; transposed; no gate.
FAMILIES = ["olmoe", "mixtral", "deepseek_v3", "gpt_oss", "aria_text", "nemotron_h"]
CALIBRATED = [
    ("average", {"weights": "frequency"}),
    ("select", {"layer": "best"}),
    ("align", {}),
    ("least_squares", {}),
    ("least_squares", {"up": "regmean"}),
    ("prototype", {}),
    ("prefit", {"steps": 4, "batch_tokens": 32}),
    ("prefit", {"steps": 4, "batch_tokens": 32, "objective": "expert"}),
]
NUM_EXPERTS, HIDDEN, TOP_K = 4, 32, 2


@dataclass(frozen=True)
class Layer:
    """A source layer in memory."""

    index: int
    tensors: dict
    routed: RoutedInputs

    def read(self, name, first=0, last=None):
        return self.tensors[name][first:last].clone()

    def rows(self, name):
        return [(row, row + 1) for row in range(len(self.tensors[name]))]

    def inputs(self):
        return self.routed


@pytest.fixture(scope="module", params=FAMILIES)
def module(request):
    return experts_of(request.param)


@pytest.fixture(scope="module")
def olmoe():
    return experts_of("olmoe")


def experts_of(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    return model.get_submodule(next(iter(expert_layers(model).values())))


def random_tensors(module, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(each.shape, generator=generator) * 0.3).to(dtype)
        for name, each in module.named_parameters()
    }


def routed_inputs(seed, num_tokens=96, idle=()):
    """Random inputs whose tokens go to all experts but the idle ones; a quarter is held out."""
    generator = torch.Generator().manual_seed(100 + seed)
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    scores[:, list(idle)] = -1
    index = scores.topk(TOP_K).indices
    weights = torch.rand(num_tokens, TOP_K, generator=generator) + 0.1
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=generator)
    return RoutedInputs(hidden_states, index, weights, num_tokens * 3 // 4)


def many_inputs(num_layers, idle=()):
    """Enough tokens that a fit to them is better on held-out ones, too."""
    return [routed_inputs(place, 1600, idle) for place in range(num_layers)]


def make_group(module, tensors, num_pool_experts=NUM_EXPERTS, idle=(), routed=None, loss=True, calibrated=True):
    """A group of the layers 3, 4, ...; its held-out loss is the experts' own error, whatever a model would say."""
    routed = routed or [routed_inputs(place, idle=idle) for place in range(len(tensors))]
    layers = tuple(Layer(3 + place, each, inputs) for place, (each, inputs) in enumerate(zip(tensors, routed)))
    group = Group(layers, NUM_EXPERTS, num_pool_experts, tuple(tensors[0]), lambda: ExpertFunction(module), 5)
    if not calibrated:
        return group
    return dataclasses.replace(group, held_out_loss=(lambda pool: error(group, pool)) if loss is True else loss)


def build(group, name, start=None, **options):
    method = METHODS[name]
    method.check_options(options)
    if method.refines is not None:
        return method.build(group, start or build(group, method.refines), **options)
    return method.build(group, **options)


def slot_experts(group, pool, layer, factors=None):
    """What a layer's slots read, as the family's tensors: rows of the pool, plus the layer's residual."""
    slot_map = group.slot_map(pool, layer)
    tensors = {name: pool.read(name)[slot_map] for name in group.parameters}
    for name, (b, a) in (factors or {}).get(layer.index, {}).items():
        tensors[name] = tensors[name] + b @ a
    return group.family_function.neurons(tensors)


def outputs(group, pool=None, factors=None):
    """What every slot computes on its layer's inputs, `[layers, E, T, H]`; without a pool the source's."""
    return torch.stack(
        [
            group.family_function.outputs(
                group.experts(layer) if pool is None else slot_experts(group, pool, layer, factors),
                layer.inputs().hidden_states,
            )
            for layer in group.layers
        ]
    )


def error(group, pool, factors=None):
    """sum w^2 |difference|^2 over the held-out tokens' experts, relative to the source's outputs."""
    total = size = 0.0
    for layer, own, new in zip(group.layers, outputs(group), outputs(group, pool, factors)):
        inputs = layer.inputs()
        for token in range(inputs.num_fit, len(inputs.hidden_states)):
            slots, weights = inputs.top_k_index[token], inputs.top_k_weights[token]
            total += ((own - new)[slots, token] * weights[:, None]).square().sum().item()
            size += (own[slots, token] * weights[:, None]).square().sum().item()
    return total / size


def permuted(module, tensors, seed, flip=False):
    """The same experts in another order with their neurons in another order, as the family stores them."""
    function, generator = ExpertFunction(module), torch.Generator().manual_seed(seed)
    experts = function.neurons(tensors)
    width = experts.up.shape[1]
    neurons = torch.stack([torch.randperm(width, generator=generator) for _ in range(len(experts))])
    experts = experts.renumbered(neurons)
    if flip and function.can_flip:
        experts = experts.flipped(torch.where(torch.rand(len(experts), width, generator=generator) < 0.5, -1.0, 1.0))
    return function.tensors(experts[torch.randperm(len(experts), generator=generator)], torch.float32)


def read_all(group, pool):
    return {name: pool.read(name) for name in group.parameters}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), CALIBRATED)
def test_methods_in_every_layout_and_dtype(module, name, options, dtype):
    tensors = [random_tensors(module, place, dtype) for place in range(2)]
    group = make_group(module, tensors, idle=(2,))
    pool = build(group, name, **options)
    for parameter, tensor in read_all(group, pool).items():
        assert tensor.dtype == dtype
        assert tensor.shape == tensors[0][parameter].shape
        assert tensor.isfinite().all()
    assert outputs(group, pool).isfinite().all()
    again = build(make_group(module, tensors, idle=(2,)), name, **options)
    assert all(torch.equal(pool.read(each), again.read(each)) for each in group.parameters)
    assert all(torch.equal(pool.slot_maps[each], again.slot_maps[each]) for each in pool.slot_maps)


@pytest.mark.parametrize(("name", "options"), [*CALIBRATED, ("average", {}), ("align", {"on": "weights"})])
def test_equal_layers_do_not_change(module, name, options):
    tensors = random_tensors(module, 0, torch.bfloat16)
    group = make_group(module, [tensors] * 3, idle=(1,))
    pool = build(group, name, **options)
    for layer in group.layers:
        for parameter in group.parameters:
            assert torch.equal(pool.read(parameter)[group.slot_map(pool, layer)], tensors[parameter])


@pytest.mark.parametrize("name", ["align", "least_squares", "prototype", "prefit"])
def test_no_tokens_at_all(olmoe, name):
    tensors = [random_tensors(olmoe, place) for place in range(2)]
    routed = [routed_inputs(place, idle=(0, 3)) for place in range(2)]  # two experts with all tokens, two with none
    group = make_group(olmoe, tensors, routed=routed)
    assert outputs(group, build(group, name)).isfinite().all()


def test_average_by_frequency_by_hand(olmoe):
    tensors = [random_tensors(olmoe, place) for place in range(2)]
    group = make_group(olmoe, tensors, idle=(2,))
    counts = torch.stack([layer.inputs().counts(NUM_EXPERTS) for layer in group.layers]).float()
    shares = counts / counts.sum(0)
    shares[:, 2] = 0.5  # idle everywhere
    expected = sum(share[:, None, None] * each["down_proj"] for share, each in zip(shares, tensors))
    torch.testing.assert_close(build(group, "average", weights="frequency").read("down_proj"), expected)
    assert "1 of 4 experts" in group.notes[0]


def test_select_the_best_layer_by_loss(olmoe):
    tensors = [random_tensors(olmoe, place) for place in range(3)]
    loss = lambda pool: float(not torch.equal(pool.read("down_proj"), tensors[1]["down_proj"]))  # noqa: E731
    group = make_group(olmoe, tensors, loss=loss)
    assert torch.equal(build(group, "select", layer="best").read("down_proj"), tensors[1]["down_proj"])
    assert METHODS["select"].layers_read([3, 4, 5], layer="best") == [3, 4, 5]
    assert METHODS["select"].calibration(layer="best")
    assert not METHODS["select"].calibration(layer="first")


@pytest.mark.parametrize("on", ["activations", "weights"])
def test_align_finds_permuted_experts_and_neurons(module, on):
    first = random_tensors(module, 0)
    group = make_group(module, [first, permuted(module, first, 1, flip=True), permuted(module, first, 2)])
    for anchor in ("first", "last"):
        pool = build(group, "align", on=on, anchor=anchor)
        torch.testing.assert_close(outputs(group, pool), outputs(group), rtol=1e-4, atol=1e-5)


def test_align_controls(olmoe):
    first = random_tensors(olmoe, 0)
    group = make_group(olmoe, [first, permuted(olmoe, first, 1)])
    identity = torch.arange(NUM_EXPERTS)
    pool = build(group, "align", experts="identity", neurons="identity", weights="uniform")
    assert all(torch.equal(each, identity) for each in pool.slot_maps.values())
    torch.testing.assert_close(pool.read("down_proj"), build(group, "average").read("down_proj"))
    assert error(group, build(group, "align", neurons="identity")) > 0.1
    assert error(group, build(group, "align", experts="random")) > 0.1


def test_align_keeps_much_used_experts_apart(olmoe):
    # In each layer one expert has nearly all weight, with the same number: identity would average the two.
    tensors = [random_tensors(olmoe, place) for place in range(2)]
    routed = []
    for place in range(2):
        inputs = routed_inputs(place)
        weights = torch.where(inputs.top_k_index == 0, inputs.top_k_weights, 1e-3)
        routed.append(dataclasses.replace(inputs, top_k_weights=weights))
    group = make_group(olmoe, tensors, routed=routed)
    slot_maps = build(group, "align").slot_maps
    assert slot_maps[3][0] != slot_maps[4][0]


def test_least_squares_down_by_hand(module):
    tensors = [random_tensors(module, place) for place in range(2)]
    tensors[1][ExpertFunction(module).up_name] = tensors[0][
        ExpertFunction(module).up_name
    ]  # so that a fit is worth it
    group = make_group(module, tensors, routed=many_inputs(2))
    function, start = group.family_function, build(group, "select")
    pool = build(group, "least_squares", start, up="keep", ridge=0.01)
    row, new = group.pool_experts(start)[1], group.pool_experts(pool)[1]
    features, gaps = [], []
    for layer in group.layers:
        x, w = layer.inputs().of_slot(1)
        f = function.features(row, x)[0] * w[:, None]
        gaps.append((function.outputs(group.experts(layer)[1], x) - function.outputs(row, x))[0] * w[:, None])
        features.append(f if row.down_bias is None else torch.cat([f, w[:, None]], 1))
    f, y = torch.cat(features).double(), torch.cat(gaps).double()
    damped = f.T @ f + 0.01 * (f.T @ f).diagonal().mean() * torch.eye(f.shape[1])
    change = (y.T @ f @ torch.linalg.inv(damped)).float()
    width = row.down.shape[-1]
    torch.testing.assert_close(new.down[0], row.down[0] + change[:, :width], rtol=1e-3, atol=1e-4)
    if new.down_bias is not None:
        torch.testing.assert_close(new.down_bias[0], row.down_bias[0] + change[:, width], rtol=1e-3, atol=1e-4)


def test_least_squares_regmean_by_hand(olmoe):
    # Gates and ups that only differ, in neurons that are matched by their equal downs.
    first = random_tensors(olmoe, 0)
    second = {**first, "gate_up_proj": first["gate_up_proj"] + 0.1 * random_tensors(olmoe, 1)["gate_up_proj"]}
    group = make_group(olmoe, [first, second], routed=many_inputs(2))
    pool = build(group, "least_squares", build(group, "select"), up="regmean", shrink=0.8)
    numerator = denominator = 0
    for layer in group.layers:
        x, w = layer.inputs().of_slot(2)
        gram = (x * w[:, None]).T @ (x * w[:, None])
        gram = 0.8 * gram + 0.2 * torch.diag(gram.diagonal())
        numerator, denominator = numerator + layer.read("gate_up_proj")[2] @ gram, denominator + gram
    expected = numerator @ torch.linalg.inv(denominator)
    torch.testing.assert_close(pool.read("gate_up_proj")[2], expected, rtol=1e-3, atol=1e-4)


def test_least_squares_is_exact_where_half_the_neurons_are_enough(module):
    # Layer 4's expert reads other neurons than layer 3's, and both leave half of theirs without effect.
    function = ExpertFunction(module)
    halves = []
    for place in range(2):
        experts = function.neurons(random_tensors(module, place))
        half = experts.down.shape[-1] // 2
        experts.down[:, :, half:] = 0
        if experts.down_bias is not None:
            experts.down_bias.zero_()
        halves.append(experts)
    # What either layer's neurons give in the other one's tokens must not add up: inputs in different halves of H.
    routed = [routed_inputs(place, 400) for place in range(2)]
    for place, inputs in enumerate(routed):
        other = slice(HIDDEN // 2, None) if place == 0 else slice(None, HIDDEN // 2)
        inputs.hidden_states[:, other] = 0
        halves[place].up[..., other] = 0
        if halves[place].up_bias is not None:
            halves[place].up_bias[:, :, -1] = -1 if module.has_gate else 0  # gpt_oss adds 1 to up
            halves[place].up_bias[:, :, 0] = 0
    group = make_group(module, [function.tensors(each, torch.float32) for each in halves], routed=routed)
    start = build(group, "average")
    assert error(group, start) > 0.1
    assert error(group, build(group, "least_squares", start, ridge=1e-6)) < 1e-4


def test_least_squares_refines_any_start(module):
    tensors = [random_tensors(module, place) for place in range(3)]
    group = make_group(module, tensors, num_pool_experts=6, idle=(3,))
    start = build(group, "prototype")
    pool = build(group, "least_squares", start)
    assert error(group, pool) < error(group, start)
    assert pool.slot_maps is start.slot_maps
    alone = [row for row, slots in enumerate(rows_read(group, start)) if len(slots) == 1]
    assert alone
    for row in alone:  # nothing to share: the source's own
        assert torch.equal(pool.read("down_proj")[row], start.read("down_proj")[row])


@pytest.mark.parametrize("name", ["least_squares", "prefit"])
def test_a_fit_that_the_model_does_not_like_is_not_kept(olmoe, name):
    tensors = [random_tensors(olmoe, place) for place in range(2)]
    losses = itertools.count()  # each pool that is asked about is worse than the one before
    group = make_group(olmoe, tensors, routed=many_inputs(2), loss=lambda pool: float(next(losses)))
    start = build(group, "average")
    assert build(group, name, start) is start
    assert f"{name} was not kept" in group.notes[-1]


@pytest.mark.parametrize("objective", ["layer", "expert"])
def test_prefit_lowers_the_held_out_error(module, objective):
    tensors = random_tensors(module, 0)
    noise = random_tensors(module, 1)
    group = make_group(module, [tensors] * 2, routed=many_inputs(2))
    start = Pool(lambda name: iter([tensors[name] + 0.5 * noise[name]]))
    pool = build(group, "prefit", start, objective=objective, steps=60, batch_tokens=256)
    assert error(group, pool) < 0.5 * error(group, start)


def test_prefit_leaves_rows_alone_that_no_token_reaches(olmoe):
    tensors = [random_tensors(olmoe, place) for place in range(2)]
    group = make_group(olmoe, tensors, routed=many_inputs(2, idle=(1,)))
    start = build(group, "average")
    pool = build(group, "prefit", start, steps=5, batch_tokens=256)
    assert torch.equal(pool.read("down_proj")[1], start.read("down_proj")[1])
    assert not torch.equal(pool.read("down_proj")[0], start.read("down_proj")[0])


def rows_read(group, pool):
    width = len(pool.read("down_proj"))
    slots = [[] for _ in range(width)]
    for layer in group.layers:
        for slot, row in enumerate(group.slot_map(pool, layer).tolist()):
            slots[row].append((layer.index, slot))
    return slots


@pytest.mark.parametrize("width", [1, 3, 4, 7, 11])
def test_prototypes_are_the_sources_bit_for_bit(module, width):
    tensors = [random_tensors(module, place, torch.bfloat16) for place in range(3)]
    group = make_group(module, tensors, num_pool_experts=width, idle=(2,))
    pool = build(group, "prototype")
    rows = pool.read("down_proj")
    assert len(rows) == width
    everything = torch.cat([each["down_proj"] for each in tensors])
    kept = [next(k for k, own in enumerate(everything) if torch.equal(own, row)) for row in rows]
    assert sorted(set(kept)) == kept
    for row, expert in enumerate(kept):  # its own slot reads it
        assert pool.slot_maps[3 + expert // NUM_EXPERTS][expert % NUM_EXPERTS] == row


def test_all_prototypes_are_the_union(olmoe):
    tensors = [random_tensors(olmoe, place) for place in range(2)]
    group = make_group(olmoe, tensors, num_pool_experts=8)
    pool, union = build(group, "prototype"), build(group, "union")
    assert torch.equal(pool.read("gate_up_proj"), union.read("gate_up_proj"))
    assert all(torch.equal(pool.slot_maps[layer], union.slot_maps[layer]) for layer in (3, 4))


def test_replacement_costs_by_hand(module):
    tensors = [random_tensors(module, place) for place in range(2)]
    group = make_group(module, tensors)
    costs = replacement_costs(group, tokens_per_expert=1000)
    x, w = group.layers[1].inputs().of_slot(2)
    own, other = group.experts(group.layers[1])[2], group.experts(group.layers[0])[3]
    gap = (group.family_function.outputs(own, x) - group.family_function.outputs(other, x))[0] * w[:, None]
    torch.testing.assert_close(costs[NUM_EXPERTS + 2, 3].item(), gap.square().sum().item(), rtol=1e-4, atol=0)


def test_choose_is_as_good_as_trying_all():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(10, 2, generator=generator)
    costs = torch.cdist(points, points).square().double()
    for num_kept in (1, 3, 5, 9):
        best = min(costs[:, list(each)].min(1).values.sum() for each in itertools.combinations(range(10), num_kept))
        found = costs[:, choose(costs, num_kept)].min(1).values.sum()
        assert found <= best * 1.05


def test_prototype_finds_planted_clusters(module):
    # Four experts, each in three layers under another number and with noise: one of each is kept.
    first = random_tensors(module, 0)
    orders = [torch.tensor([0, 1, 2, 3]), torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2])]
    tensors = []
    for place, order in enumerate(orders):
        noise = random_tensors(module, 50 + place)
        tensors.append({name: (each + 0.02 * noise[name])[order] for name, each in first.items()})
    group = make_group(module, tensors)
    pool = build(group, "prototype")
    by_cluster = [pool.slot_maps[3 + place][torch.argsort(order)] for place, order in enumerate(orders)]
    assert torch.equal(by_cluster[0], by_cluster[1])
    assert torch.equal(by_cluster[0], by_cluster[2])
    assert by_cluster[0].unique().numel() == NUM_EXPERTS
    assert error(group, pool) < 0.05


@pytest.mark.parametrize("name", ["average", "align", "prototype"])
@pytest.mark.parametrize("width", [4, 5, 9, 12])
@pytest.mark.parametrize("calibrated", [True, False])
def test_widen_changes_nothing(module, name, width, calibrated):
    tensors = [random_tensors(module, place) for place in range(3)]
    start = build(make_group(module, tensors, idle=(2,)), name)
    group = make_group(module, tensors, idle=(2,), calibrated=calibrated)
    pool = widen(group, start, width)
    assert all(rows_read(group, pool)), "a row that no slot reads"
    for parameter, tensor in read_all(group, pool).items():
        assert len(tensor) == width
        for layer in group.layers:
            expected = start.read(parameter)[group.slot_map(start, layer)]
            assert torch.equal(tensor[pool.slot_maps[layer.index]], expected)


def test_widen_gives_neighbouring_layers_the_same_copy(olmoe):
    group = make_group(olmoe, [random_tensors(olmoe, place) for place in range(4)], calibrated=False)
    maps = widen(group, build(group, "average"), 8).slot_maps
    assert torch.equal(maps[3], torch.arange(4))
    assert torch.equal(maps[3], maps[4])
    assert torch.equal(maps[5], maps[6])
    assert not set(maps[3].tolist()) & set(maps[5].tolist())


def test_widen_clones_what_is_used(olmoe):
    group = make_group(olmoe, [random_tensors(olmoe, place) for place in range(2)], idle=(0, 2))
    maps = widen(group, build(group, "average"), 6).slot_maps
    assert (maps[3] != maps[4]).tolist() == [False, True, False, True]


@pytest.mark.parametrize("calibrated", [True, False])
def test_residual_of_full_rank_is_the_source(module, calibrated):
    # No layer's biases differ: a residual has none.
    tensors = [random_tensors(module, place) for place in range(2)]
    tensors[1] |= {name: each for name, each in tensors[0].items() if name.endswith("bias")}
    group = make_group(module, tensors, idle=(1,), calibrated=calibrated)
    start = build(group, "average")
    rank = min(min(start.read(name).shape[1:]) for name in group.parameters if not name.endswith("bias"))
    up, down = (start.read(name).shape[1:] for name in (group.family_function.up_name, "down_proj"))
    factors = residuals(group, start, rank)
    for name, shape in ((group.family_function.up_name, up), ("down_proj", down)):
        b, a = factors[4][name]
        assert b.shape == (NUM_EXPERTS, shape[0], rank)
        assert a.shape == (NUM_EXPERTS, rank, shape[1])
    if rank == min(*up, *down) == max(min(up), min(down)):
        torch.testing.assert_close(outputs(group, start, factors), outputs(group), rtol=1e-3, atol=1e-4)
    else:
        assert error(group, start, factors) < 0.5 * error(group, start)


def test_residual_improves_with_rank_and_is_zero_on_kept_experts(module):
    tensors = [random_tensors(module, place) for place in range(2)]
    group = make_group(module, tensors, routed=many_inputs(2))
    start = build(group, "prototype")
    errors = [error(group, start, residuals(group, start, rank)) for rank in (1, 4, 12)]
    assert error(group, start) > errors[0] > errors[1] > errors[2]
    factors = residuals(group, start, 2)
    for row, slots in enumerate(rows_read(group, start)):
        for layer, slot in slots:
            own = torch.equal(group.layer(layer).read("down_proj")[slot], start.read("down_proj")[row])
            b, a = factors[layer]["down_proj"]
            assert (b[slot] @ a[slot]).any().item() is not own
            for b, a in factors[layer].values():
                assert not own or not (b[slot] @ a[slot]).any()
                assert b[slot].any() or a[slot].any(), "healing would have no gradient"


def test_residual_does_no_harm_to_a_fitted_pool(module):
    tensors = [random_tensors(module, place) for place in range(3)]
    group = make_group(module, tensors, routed=many_inputs(3))
    start = build(group, "least_squares")
    assert error(group, start, residuals(group, start, 2)) < error(group, start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_keeps_the_sources_dtype(module, dtype):
    group = make_group(module, [random_tensors(module, place, dtype) for place in range(2)])
    for b, a in residuals(group, build(group, "select"), 3)[4].values():
        assert b.dtype == a.dtype == dtype
        assert b.isfinite().all()
        assert a.isfinite().all()


def test_only_some_families_may_flip_neurons():
    assert [ExpertFunction(experts_of(family)).can_flip for family in FAMILIES] == [
        True,
        True,
        True,
        False,
        True,
        False,
    ]


def test_flipped_neurons_compute_the_same(module):
    function = ExpertFunction(module)
    if not function.can_flip:
        pytest.skip("this family's neurons cannot change signs")
    experts = function.neurons(random_tensors(module, 0))
    signs = torch.where(torch.arange(experts.up.shape[1]) % 2 == 0, 1.0, -1.0).expand(len(experts), -1)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(function.outputs(experts.flipped(signs), x), function.outputs(experts, x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("align", {"on": "weight"}, "expected one of 'activations', 'weights'"),
        ("align", {"tokens_per_expert": 0}, "expected at least 1"),
        ("least_squares", {"ridge": -1}, "expected at least 0"),
        ("prefit", {"objective": "model"}, "expected one of 'layer', 'expert'"),
        ("prototype", {"tokens": 3}, "has no option 'tokens'"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ConversionError, match=message):
        METHODS[name].check_options(options)


def test_what_needs_calibration():
    needs = {name: method.calibration() for name, method in METHODS.items()}
    assert [name for name in needs if needs[name]] == ["align", "least_squares", "prefit", "prototype"]
    assert not METHODS["align"].calibration(on="weights")
    assert METHODS["average"].calibration(weights="frequency")


def test_a_sample_stands_for_all_tokens():
    inputs = routed_inputs(0, 4000)
    generator = torch.Generator().manual_seed(0)
    x, w = inputs.sample_of_slot(1, 200, generator)
    assert len(x) == len(w) == 200
    torch.testing.assert_close(w.square().sum(), inputs.of_slot(1)[1].square().sum(), rtol=0.2, atol=0)
    everything = Experts(torch.zeros(2, 3, 2, 4), torch.zeros(2, 4, 3))
    assert len(everything[-1]) == 1
