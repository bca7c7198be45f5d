"""Layers that read one pool, and what the tests of deferred weight gradients ask of a backward pass."""

import contextlib
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tiedmoe_kernels import deferred, deferred_weight_gradients, experts_forward, experts_forward_reference

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


@pytest.fixture(autouse=True, name="ledgers")
def ledgers_fixture(monkeypatch):
    """Every test leaves its ledgers empty, and nothing holds on to them, not even a cycle."""
    alive, original = [], deferred.Ledger.__init__

    def noted(self, *args):
        original(self, *args)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(deferred.Ledger, "__init__", noted)
    yield alive
    assert not any(ledger() and ledger().segments for ledger in alive)
    assert not any(ledger() for ledger in alive)


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
