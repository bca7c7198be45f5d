"""Deferred weight gradients: every way of running a backward pass has the reference's gradients, in as few
computations.
"""

import contextlib
import itertools
import logging
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tiedmoe_kernels import deferred, deferred_weight_gradients, experts_forward, experts_forward_reference
from tiedmoe_kernels import torch_backend as backend

T, H, I, E, K = 5, 6, 4, 5, 2


class Pool(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I, H, dtype=dtype) * H**-0.5)
        self.down_proj = nn.Parameter(torch.randn(E, H, I, dtype=dtype) * I**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(E, 2 * I, dtype=dtype))
        self.down_proj_bias = nn.Parameter(torch.randn(E, H, dtype=dtype))

    def weights(self):
        names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
        return {name: getattr(self, name) for name in names}


class Tied(nn.Module):
    """g layers with routers of their own that read one pool, and `recompute` of them checkpointed."""

    def __init__(self, num_layers=3, dtype=torch.float64, use_reentrant=None, scoped=True):
        super().__init__()
        self.pool = Pool(dtype)
        self.routers = nn.ModuleList(nn.Linear(H, E, bias=False, dtype=dtype) for _ in range(num_layers))
        self.use_reentrant, self.scoped, self.function = use_reentrant, scoped, experts_forward

    def layer(self, x, router):
        weights, index = router(x).softmax(-1).topk(K)
        return x + self.function(x, index, weights, **self.pool.weights())

    def forward(self, x, layers=None):
        scope = deferred_weight_gradients() if self.scoped else contextlib.nullcontext()
        with scope:
            for router in itertools.islice(self.routers, layers):
                if self.use_reentrant is None:
                    x = self.layer(x, router)
                else:
                    x = checkpoint(self.layer, x, router, use_reentrant=self.use_reentrant)
        return x

    def reference(self, x, layers=None):
        self.function, self.scoped, self.use_reentrant, mine = (
            experts_forward_reference,
            False,
            None,
            (self.function, self.scoped, self.use_reentrant),
        )
        try:
            return self(x, layers)
        finally:
            self.function, self.scoped, self.use_reentrant = mine


@pytest.fixture(autouse=True)
def ledgers(monkeypatch):
    """Every test leaves its ledgers empty, and nothing holds on to them, not even a cycle."""
    alive, original = [], deferred.Ledger.__init__

    def noted(self, *args):
        original(self, *args)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(deferred.Ledger, "__init__", noted)
    yield alive
    assert not any(ledger() and ledger().segments for ledger in alive)
    assert not any(ledger() for ledger in alive)


@pytest.fixture
def warnings(caplog):
    deferred.say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="tiedmoe_kernels")
    return caplog


def tokens(dtype=torch.float64, requires_grad=True):
    return torch.randn(T, H, dtype=dtype, requires_grad=requires_grad)


def loss_of(y):
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want:
        if want[name] is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], want[name], **({"rtol": 1e-11, "atol": 1e-12} | tolerance), msg=name)


def reference_gradients(model, x, layers=None):
    loss_of(model.reference(x, layers)).backward()
    found = gradients(model) | {"x": x.grad}
    x.grad = None
    return found


def backward(model, x, **more):
    loss_of(model(x, **more)).backward()
    found = gradients(model) | {"x": x.grad}
    x.grad = None
    return found


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_layers_of_a_pool_share_one_computation(num_layers, calls):
    model, x = Tied(num_layers), tokens()
    same(backward(model, x), reference_gradients(model, x))
    assert calls == [num_layers]


def test_without_a_scope_each_layer_computes_its_own(calls):
    model, x = Tied(3, scoped=False), tokens()
    same(backward(model, x), reference_gradients(model, x))
    assert calls == [1, 1, 1]


def test_two_pools_have_a_gate_each(calls):
    first, second, x = Tied(2), Tied(3), tokens()
    first.scoped = second.scoped = False
    want = torch.autograd.grad(
        loss_of(second.reference(first.reference(x))), [*first.parameters(), *second.parameters()]
    )
    with deferred_weight_gradients():
        y = second(first(x))
    got = torch.autograd.grad(loss_of(y), [*first.parameters(), *second.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert sorted(calls) == [2, 3]


@pytest.mark.parametrize("first_layer_input_requires_grad", [True, False])
def test_nonreentrant_checkpointing_defers(first_layer_input_requires_grad, calls):
    model, x = Tied(use_reentrant=False), tokens(requires_grad=first_layer_input_requires_grad)
    same(backward(model, x), reference_gradients(model, x))
    assert calls == [3]


def test_nonreentrant_checkpointing_of_the_whole_model_defers(calls):
    model, x = Tied(), tokens()
    loss_of(checkpoint(model, x, use_reentrant=False)).backward()
    got = gradients(model) | {"x": x.grad}
    x.grad = None
    same(got, reference_gradients(model, x))
    assert calls == [3]


def test_reentrant_checkpointing_does_not_defer_and_says_so(calls, warnings):
    model, x = Tied(use_reentrant=True), tokens()
    same(backward(model, x), reference_gradients(model, x))
    assert calls == [1, 1, 1]
    backward(model, x)
    assert [r.message for r in warnings.records if "reentrant" in r.message] == [warnings.records[0].message]


def test_reentrant_checkpointing_of_the_whole_model_defers(calls):
    model, x = Tied(), tokens()
    loss_of(checkpoint(model, x, use_reentrant=True)).backward()
    got = gradients(model) | {"x": x.grad}
    x.grad = None
    same(got, reference_gradients(model, x))
    assert calls == [3]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_backward_inside_the_scope(use_reentrant, calls):
    model, x = Tied(use_reentrant=use_reentrant, scoped=False), tokens()
    with deferred_weight_gradients():
        got = backward(model, x)
    same(got, reference_gradients(model, x))
    assert calls == ([1, 1, 1] if use_reentrant else [3])


def test_gradient_accumulation_over_microbatches(calls):
    model, batches = Tied(), [tokens(requires_grad=False) for _ in range(3)]
    for x in batches:
        loss_of(model(x)).backward()
    got = gradients(model)
    for x in batches:
        loss_of(model.reference(x)).backward()
    same(got, gradients(model))
    assert calls == [3, 3, 3]


@pytest.mark.parametrize("order", [[0, 1], [1, 0], "sum"])
def test_two_forwards_before_a_backward(order, calls):
    model, batches = Tied(), [tokens(requires_grad=False) for _ in range(2)]
    losses = [loss_of(model(x)) for x in batches]
    if order == "sum":
        sum(losses).backward()
    else:
        for i in order:
            losses[i].backward()
    got = gradients(model)
    for x in batches:
        loss_of(model.reference(x)).backward()
    same(got, gradients(model))
    assert calls == [3, 3]


def test_two_forwards_in_one_scope(calls):
    model, batches = Tied(scoped=False), [tokens(requires_grad=False) for _ in range(2)]
    with deferred_weight_gradients():
        losses = [loss_of(model(x)) for x in batches]
    for loss in losses:
        loss.backward()
    got = gradients(model)
    for x in batches:
        loss_of(model.reference(x)).backward()
    same(got, gradients(model))
    assert calls == [3, 3]


def test_retain_graph_with_two_backwards(calls):
    model, x = Tied(), tokens()
    loss = loss_of(model(x))
    loss.backward(retain_graph=True)
    loss.backward()
    got = gradients(model) | {"x": x.grad}
    x.grad = None
    want = reference_gradients(model, x)
    same(got, {name: 2 * g for name, g in want.items()})
    assert calls == [3, 3]


def test_a_backward_within_a_backward(calls):
    """A hook that runs another backward pass through the same graph must not take the outer one's segments."""
    model, x = Tied(), tokens()
    y = model(x)
    inner_loss, inner = loss_of(y), []
    middle = y * 1.0
    middle.register_hook(
        lambda _: inner.append(torch.autograd.grad(inner_loss, model.pool.down_proj, retain_graph=True))
    )
    loss_of(middle).backward()
    got = gradients(model)
    x.grad = None
    want = reference_gradients(model, x)
    same(got, {name: want[name] for name in got})
    torch.testing.assert_close(inner[0][0], want["pool.down_proj"], rtol=1e-11, atol=1e-12)
    assert calls == [3, 3]


@pytest.mark.parametrize(
    ("names", "expected_calls"),
    [
        (["pool.gate_up_proj"], [3]),
        (["pool.down_proj_bias", "pool.gate_up_proj_bias"], [3]),
        (["x"], []),  # no weight is asked for: nothing is left in the ledger
        (["routers.0.weight", "x"], []),
        (["x", "pool.down_proj", "routers.1.weight"], [3]),
    ],
)
def test_autograd_grad_of_some(names, expected_calls, calls):
    model, x = Tied(), tokens()
    leaves = dict(model.named_parameters()) | {"x": x}
    got = torch.autograd.grad(loss_of(model(x)), [leaves[name] for name in names])
    assert calls == expected_calls
    want = reference_gradients(model, x)
    same(dict(zip(names, got)), {name: want[name] for name in names})


def test_backward_with_inputs(calls):
    model, x = Tied(), tokens()
    loss_of(model(x)).backward(inputs=[x, model.pool.down_proj])
    got = {"x": x.grad, "pool.down_proj": model.pool.down_proj.grad}
    x.grad = None
    model.zero_grad()
    want = reference_gradients(model, x)
    same(got, {name: want[name] for name in got})
    assert calls == [3]


@pytest.mark.parametrize(
    ("frozen", "expected_calls"),
    [(["gate_up_proj"], [3]), (["down_proj", "down_proj_bias"], [3]), ("all", [])],
)
def test_frozen_weights(frozen, expected_calls, calls):
    model, x = Tied(), tokens()
    for name, p in model.pool.named_parameters():
        p.requires_grad_(frozen != "all" and name not in frozen)
    same(backward(model, x), reference_gradients(model, x))
    assert calls == expected_calls


def test_everything_frozen_but_the_pool(calls):
    model, x = Tied(), tokens(requires_grad=False)
    model.routers.requires_grad_(False)
    same(backward(model, x), reference_gradients(model, x))
    assert calls == [3]


def test_only_some_layers_used(calls):
    model, x = Tied(4), tokens()
    same(backward(model, x, layers=2), reference_gradients(model, x, layers=2))
    assert calls == [2]


def test_a_layer_whose_output_is_not_used(calls):
    model, x = Tied(2), tokens()
    with deferred_weight_gradients():
        model.layer(x, model.routers[0])
        y = model.layer(x, model.routers[1])
    loss_of(y).backward()
    got = gradients(model) | {"x": x.grad}
    x.grad = None
    loss_of(x + (y - x).detach() * 0).backward()  # clears nothing of the model: only x has a gradient
    x.grad = None
    model.function = experts_forward_reference
    loss_of(model.layer(x, model.routers[1])).backward()
    same(got, gradients(model) | {"x": x.grad})
    assert calls == [1]


def test_no_grad_inside_the_scope_makes_no_gate(ledgers):
    model, x = Tied(), tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.reference(x))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), model.reference(x))
    assert not ledgers


def test_create_graph_is_an_error():
    for scoped in (True, False):
        model, x = Tied(scoped=scoped), tokens()
        with pytest.raises(ValueError, match=r"create_graph=True: experts_forward is differentiable once; for second"):
            torch.autograd.grad(loss_of(model(x)), x, create_graph=True)


def test_a_failing_backward_leaves_nothing_once_its_graph_is_gone(ledgers, monkeypatch):
    model, x = Tied(), tokens()

    def fail(*_):
        raise RuntimeError("out of memory")

    y = model(x)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "backward_weight", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            loss_of(y).backward(retain_graph=True)
    model.zero_grad()
    x.grad = None
    loss_of(y).backward()
    got = gradients(model) | {"x": x.grad}
    x.grad = None
    same(got, reference_gradients(model, x))


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_autocast_casts_a_pool_once_and_writes_float32(use_reentrant, calls, monkeypatch):
    model, x = Tied(dtype=torch.float32, use_reentrant=use_reentrant), tokens(torch.float32)
    dtypes, casts, forward = [], set(), backend.forward

    def noted(x, index, weights, gate_up, *rest):
        dtypes.append((x.dtype, gate_up.dtype))
        casts.add(gate_up.data_ptr())
        return forward(x, index, weights, gate_up, *rest)

    monkeypatch.setattr(backend, "forward", noted)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        if use_reentrant is None:
            assert len(casts) == 1
    loss_of(y).backward()
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}
    assert y.dtype == torch.float32
    got = gradients(model)
    wide = Tied()
    wide.load_state_dict(model.state_dict())
    want = reference_gradients(wide, x.detach().double().requires_grad_())
    for name in got:
        assert got[name].dtype == torch.float32
        assert (got[name] - want[name]).norm() < 0.1 * want[name].norm(), name  # the router is in bfloat16, too
    grad = got["pool.down_proj"]
    assert not grad.equal(grad.bfloat16().float())  # never rounded to bfloat16
    assert calls == ([1, 1, 1] if use_reentrant else [3])


def test_autocast_sees_a_step_inside_the_scope():
    model, x = Tied(1, dtype=torch.float32, scoped=False), tokens(torch.float32)
    with deferred_weight_gradients(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with torch.no_grad():
            model.pool.down_proj.mul_(2)
        assert not model(x).equal(before)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("scoped", [True, False])
def test_grad_dtype_is_written_straight_from_float32(scoped, calls):
    model, x = Tied(dtype=torch.bfloat16, scoped=scoped), tokens(torch.bfloat16)
    for p in model.pool.parameters():
        p.grad_dtype = torch.float32
    loss_of(model(x)).backward()
    for name, p in model.pool.named_parameters():
        assert p.grad.dtype == torch.float32
        assert not p.grad.equal(p.grad.bfloat16().float()), name
    assert calls == ([3] if scoped else [1, 1, 1])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_model_does_not_defer_and_is_right(compiler, calls):
    model, x = Tied(2), tokens()
    want = reference_gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    loss_of(compiled(x)).backward()
    same(gradients(model) | {"x": x.grad}, want)
    assert calls == [1, 1]


def test_a_layer_compiled_alone_inside_the_scope(calls, warnings):
    model, x = Tied(3), tokens()
    want = reference_gradients(model, x)
    eager = model.layer
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    model.layer = lambda x, router: (compiled if router is model.routers[1] else eager)(x, router)
    same(backward(model, x), want)
    assert sorted(calls) == [1, 2]
    assert [r.message for r in warnings.records] == [
        "The gradient of expert weights is not deferred under torch.compile."
    ]


class LowRank(nn.Module):
    def __init__(self, shape, dtype=torch.float64):
        super().__init__()
        E, rows, columns = shape
        self.a = nn.Parameter(torch.randn(E, 2, columns, dtype=dtype))
        self.b = nn.Parameter(torch.randn(E, rows, 2, dtype=dtype))

    def forward(self, weight):
        return weight + self.b @ self.a


def test_parametrized_weights_do_not_defer_and_say_so(calls, warnings):
    model, x = Tied(2), tokens()
    for p in model.pool.parameters():
        p.requires_grad_(False)
    for name in ("gate_up_proj", "down_proj"):
        parametrize.register_parametrization(model.pool, name, LowRank(getattr(model.pool, name).shape))
    same(backward(model, x), reference_gradients(model, x))
    assert calls == [1, 1]
    assert len([r for r in warnings.records if "LoRA on pools" in r.message]) == 1


def test_threads_have_scopes_of_their_own(calls):
    models, xs = [Tied(3), Tied(2)], [tokens(), tokens()]
    want = [reference_gradients(m, x) for m, x in zip(models, xs)]
    got, barrier = [None, None], threading.Barrier(2)

    def run(i):
        with deferred_weight_gradients():
            barrier.wait()
            y = models[i](xs[i])
            barrier.wait()
        loss_of(y).backward()
        got[i] = gradients(models[i]) | {"x": xs[i].grad}

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for found, expected in zip(got, want):
        same(found, expected)
    assert sorted(calls) == [2, 3]


def test_the_gate_saves_no_tensor():
    """Non-reentrant checkpointing counts them: the first layer of a pool must save what the others do."""
    model, x, counts = Tied(3), tokens(), []
    with deferred_weight_gradients():
        for router in model.routers:
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                model.layer(x, router)
            counts.append(len(saved))
    assert counts[0] == counts[1] == counts[2]


def test_recompute_keeps_only_the_input_and_the_routing():
    x, index = tokens(), torch.randint(E, (T, K))
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    pool = Pool()
    sizes, grads = {}, {}
    for recompute in (True, False):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = experts_forward(x, index, weights, **pool.weights(), recompute=recompute)
        own = [t for t in saved if not any(t.data_ptr() == p.data_ptr() for p in (*pool.parameters(), x, weights))]
        sizes[recompute] = sum(t.numel() * t.element_size() for t in own)
        grads[recompute] = torch.autograd.grad(loss_of(y), [x, weights, *pool.parameters()])
    routing = 4 * T * K + 4 * (E + 1)
    assert sizes[True] == routing
    assert sizes[False] == routing + 8 * T * K * 2 * I
    torch.testing.assert_close(grads[True], grads[False], rtol=0, atol=0)


class TestAddingToAGradientThatIsThere:
    """The kernels add to `.grad` themselves where nobody could tell, and nowhere else."""

    @pytest.fixture
    def added(self, monkeypatch):
        """How many of the four gradients each call of backward_weight was to add to one that is there."""
        found, original = [], backend.backward_weight

        def counted(segments, spec, dtype, needs, into=(None,) * 4):
            found.append(sum(tensor is not None for tensor in into))
            return original(segments, spec, dtype, needs, into)

        monkeypatch.setattr(backend, "backward_weight", counted)
        return found

    @pytest.mark.parametrize("scoped", [True, False])
    def test_the_sum_is_made_in_the_old_gradient_s_memory(self, added, scoped):
        model, inputs = Tied(scoped=scoped), [tokens(), tokens()]
        for x in inputs:
            loss_of(model.reference(x)).backward()
        expected = gradients(model)
        memory = {}
        for x in inputs:
            loss_of(model(x)).backward()
            memory[len(memory)] = {name: p.grad.data_ptr() for name, p in model.pool.named_parameters()}
        assert memory[0] == memory[1]
        assert added == ([0, 4] if scoped else [0, 0, 0, 4, 4, 4])
        same(gradients(model), expected)

    def test_experts_that_no_token_went_to_keep_their_gradient(self, added):
        pool, x = Pool(), tokens()
        for p in pool.parameters():
            p.grad = torch.ones_like(p)
        index = torch.zeros(T, 1, dtype=torch.int64)
        experts_forward(x, index, torch.ones(T, 1, dtype=x.dtype), **pool.weights()).sum().backward()
        assert added == [4]
        for p in pool.parameters():
            assert (p.grad[1:] == 1).all()
            assert (p.grad[0] != 1).any()

    def test_autograd_grad_neither_reads_nor_writes_it(self, added):
        model, x = Tied(), tokens()
        parameters = list(model.pool.parameters())
        expected = torch.autograd.grad(loss_of(model.reference(x)), parameters)
        for p in parameters:
            p.grad = torch.ones_like(p)
        for got, want in zip(torch.autograd.grad(loss_of(model(x)), parameters), expected):
            torch.testing.assert_close(got, want)
        loss_of(model(x)).backward(inputs=[x])
        assert added == [0]
        assert all((p.grad == 1).all() for p in parameters)

    def test_backward_with_inputs_adds_for_those_only(self, added):
        model, x = Tied(), tokens()
        loss_of(model.reference(x)).backward()
        expected = {name: grad + 1 for name, grad in gradients(model).items() if name.startswith("pool")}
        for p in model.pool.parameters():
            p.grad = torch.ones_like(p)
        loss_of(model(x)).backward(inputs=[model.pool.down_proj])
        assert added == [1]
        torch.testing.assert_close(model.pool.down_proj.grad, expected["pool.down_proj"])
        assert (model.pool.gate_up_proj.grad == 1).all()

    def test_a_hook_of_the_parameter_sees_this_pass_alone(self, added):
        model, x, seen = Tied(), tokens(), []
        loss_of(model(x)).backward()
        first = model.pool.down_proj.grad.clone()
        model.pool.down_proj.register_hook(seen.append)
        loss_of(model(x)).backward()
        assert added == [0, 3]
        torch.testing.assert_close(seen[0], first)
        torch.testing.assert_close(model.pool.down_proj.grad, 2 * first)

    def test_a_hook_after_accumulation_sees_the_sum(self, added):
        model, x, seen = Tied(), tokens(), []
        model.pool.down_proj.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        for _ in range(2):
            loss_of(model(x)).backward()
        assert added == [0, 3]  # the engine calls such a hook only where it adds itself
        torch.testing.assert_close(seen[1], 2 * seen[0])

    def test_whoever_holds_the_gradient_sees_the_sum_too(self, added):
        """An optimizer's flat buffer, DDP's buckets: autograd adds in place, and so do the kernels."""
        model, x = Tied(), tokens()
        loss_of(model(x)).backward()
        held = {name: p.grad for name, p in model.pool.named_parameters()}
        versions = {name: grad._version for name, grad in held.items()}
        for _ in range(2):
            loss_of(model(x)).backward()
        assert added == [0, 4, 4]
        for name, p in model.pool.named_parameters():
            assert p.grad is held[name]
            assert p.grad._version > versions[name]

    def test_two_forwards_and_another_use_of_a_weight_in_one_backward(self, added):
        model, x = Tied(), tokens()

        def loss(function):
            return loss_of(function(x)) + loss_of(function(2 * x)) + model.pool.down_proj.square().sum()

        loss(model.reference).backward()
        expected = {name: grad + 1 for name, grad in gradients(model).items()}
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        loss(model).backward()
        assert added == [4, 4]
        same(gradients(model), expected)

    @pytest.mark.filterwarnings("ignore:grad and param do not obey")
    def test_another_dtype_or_layout_is_left_to_autograd(self, added):
        model, x = Tied(), tokens()
        model.pool.down_proj.grad = torch.zeros_like(model.pool.down_proj).mT.contiguous().mT
        loss_of(model(x)).backward()
        assert added == [0]

    def test_a_failing_backward_leaves_the_old_gradient(self, monkeypatch):
        model, x = Tied(), tokens()
        loss_of(model(x)).backward()
        before = {name: p.grad.clone() for name, p in model.pool.named_parameters()}

        def fail(*args):
            raise RuntimeError("no memory left")

        y = loss_of(model(x))
        monkeypatch.setattr(backend, "backward_weight", fail)
        with pytest.raises(RuntimeError, match="no memory left"):
            y.backward()
        for name, p in model.pool.named_parameters():
            assert torch.equal(p.grad, before[name])
