"""Deferred weight gradients that the kernels add to a `.grad` that is there."""

import pytest
import torch
from deferred_models import (
    Pool,
    T,
    Tied,
    gradients,
    ledgers_fixture,  # noqa: F401
    loss_of,
    same,
    tokens,
)

from tiedmoe_kernels import experts_forward
from tiedmoe_kernels import torch_backend as backend


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
