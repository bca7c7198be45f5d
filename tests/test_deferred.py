"""Deferred weight gradients: every way of running a backward pass has the reference's gradients, in as few
computations.
"""

import logging
import threading

import pytest
import torch
from deferred_models import (
    E,
    I,
    K,
    Pool,
    T,
    Tied,
    backward,
    gradients,
    ledgers_fixture,  # noqa: F401
    loss_of,
    reference_gradients,
    same,
    tokens,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tiedmoe_kernels import deferred, deferred_weight_gradients, experts_forward, experts_forward_reference
from tiedmoe_kernels import torch_backend as backend


@pytest.fixture
def warnings(caplog):
    deferred.say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="tiedmoe_kernels")
    return caplog


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
