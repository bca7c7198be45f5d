"""`losses.py` against sums written out by hand and against transformers' own function where that applies."""

import torch
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from transformers_tiedmoe.losses import load_balancing_loss, router_z_loss


def test_balance_loss_of_one_layer_is_transformers():
    logits, mask = torch.randn(12, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    for m in (None, mask):
        expected = load_balancing_loss_func((logits,), num_experts=6, top_k=2, attention_mask=m)
        torch.testing.assert_close(load_balancing_loss([logits], top_k=2, attention_mask=m), expected)


def test_layers_of_unequal_width_are_averaged():
    layers = [torch.randn(12, 6), torch.randn(12, 9)]
    alone = [load_balancing_loss([logits], top_k=2) for logits in layers]
    torch.testing.assert_close(load_balancing_loss(layers, top_k=2), torch.stack(alone).mean())


def test_balance_loss_is_top_k_when_balanced_and_more_otherwise():
    balanced = torch.eye(4).repeat(5, 1) * 20
    torch.testing.assert_close(load_balancing_loss([balanced], top_k=1), torch.tensor(1.0))
    collapsed = torch.tensor([20.0, 0, 0, 0]).repeat(20, 1)
    torch.testing.assert_close(load_balancing_loss([collapsed], top_k=1), torch.tensor(4.0))


def test_z_loss():
    first, second = torch.randn(8, 4), torch.randn(8, 5)
    expected = (torch.logsumexp(first, 1).pow(2).mean() + torch.logsumexp(second, 1).pow(2).mean()) / 2
    torch.testing.assert_close(router_z_loss([first, second]), expected)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    kept = first[mask.flatten().bool()]
    torch.testing.assert_close(router_z_loss([first], mask), torch.logsumexp(kept, 1).pow(2).mean())


def test_gradients_reach_the_logits():
    logits = torch.randn(10, 4, requires_grad=True)
    (load_balancing_loss([logits], top_k=2) + router_z_loss([logits])).backward()
    assert logits.grad.abs().sum() > 0
