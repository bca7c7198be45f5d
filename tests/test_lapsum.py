"""The soft top-k against bisection, its exact gradients, and the corners where the textbook root breaks."""

import pytest
import torch

from transformers_tiedmoe.routing import layer_budgets, soft_top_k

ALPHAS = [1e-4, 1e-2, 0.1, 1.0, 10.0]


def laplace_cdf(z):
    half = 0.5 * torch.exp(-z.abs())
    return torch.where(z < 0, half, 1 - half)


def by_bisection(scores, k, alpha):
    low = scores.min(-1, keepdim=True).values - 1000 * alpha
    high = scores.max(-1, keepdim=True).values + 1000 * alpha
    for _ in range(200):
        b = (low + high) / 2
        is_low = laplace_cdf((scores - b) / alpha).sum(-1, keepdim=True) > k
        low, high = torch.where(is_low, b, low), torch.where(is_low, high, b)
    return laplace_cdf((scores - b) / alpha)


def all_scores(num_experts, alpha):
    """Ordinary, rounded (ties), all equal, and one huge score: 1e4 alphas above the others."""
    scores = torch.randn(3, num_experts, dtype=torch.float64)
    huge = scores.clone()
    huge[:, 0] = 1e4 * alpha
    return [scores, scores.round(), torch.zeros_like(scores), huge]


def all_k(num_experts):
    found = {
        0.5,
        1,
        1 + 1e-9,
        1.5,
        2 - 1e-9,
        2,
        num_experts / 2,
        0.9 * num_experts,
        num_experts - 1,
        num_experts - 0.5,
        num_experts,  # every p is a 1
    }
    return sorted(k for k in found if 0 < k <= num_experts)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("num_experts", [2, 3, 8, 64, 129, 1024])
def test_float64_is_bisection_to_1e_10(num_experts, alpha):
    for scores in all_scores(num_experts, alpha):
        for k in all_k(num_experts):
            p = soft_top_k(scores, k, alpha)
            torch.testing.assert_close(p, by_bisection(scores, k, alpha), rtol=0, atol=1e-10)
            torch.testing.assert_close(p.sum(-1), torch.full((3,), float(k), dtype=p.dtype), rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_float32_is_as_near_as_its_scores(alpha):
    """The bound that the docstring states, with what E roundings of a sum add."""
    for num_experts in (3, 64, 1024):
        for scores in all_scores(num_experts, alpha):
            scores = scores.float()
            for k in all_k(num_experts):
                error = (soft_top_k(scores, k, alpha) - by_bisection(scores.double(), k, alpha)).abs().max()
                spread = (scores.max() - scores.min()) / alpha
                assert error <= torch.finfo(torch.float32).eps * (spread + num_experts), (num_experts, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores_are_computed_in_float32(dtype):
    scores = torch.randn(4, 64).to(dtype)
    assert soft_top_k(scores, 8, 0.1).equal(soft_top_k(scores.float(), 8, 0.1))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("k", [1.0, 1.7, 2.0, 4.5])
def test_gradients_of_scores_k_and_alpha(k, alpha):
    scores = torch.tensor([[3.0, 1.0, 0.9, 0.5, -2.0], [0.0, 0.1, 5.0, 4.9, 4.8]], dtype=torch.float64)
    k, alpha = torch.tensor([k, k + 0.2], dtype=torch.float64), torch.tensor([alpha, 0.5], dtype=torch.float64)
    inputs = [each.requires_grad_() for each in (scores, k, alpha)]
    assert torch.autograd.gradcheck(soft_top_k, inputs, eps=1e-6, atol=1e-6)


def test_gradients_where_every_density_underflows():
    """At integer k and a small alpha: p does not move with the scores, one more of k goes to nobody in particular."""
    scores = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    k = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    soft_top_k(scores, k, 1e-4).sum().backward()
    assert scores.grad.abs().max() == 0
    torch.testing.assert_close(k.grad, torch.ones_like(k))


@pytest.mark.parametrize("alpha", [1e-4, 1.0])
def test_all_of_them_belong_wholly(alpha):
    """k is the number of scores, as a number or a tensor: then p moves with k alone."""
    scores, k = torch.randn(3, 5).requires_grad_(), torch.tensor(5.0).requires_grad_()
    for p in (soft_top_k(scores, 5, alpha), soft_top_k(scores, k, alpha)):
        assert p.equal(torch.ones(3, 5))
    (p * torch.arange(5)).sum().backward()
    assert scores.grad.abs().max() == 0
    torch.testing.assert_close(k.grad, torch.tensor(3 * 2.0))
    assert soft_top_k(torch.randn(2, 1), 1, alpha).equal(torch.ones(2, 1))


def test_a_k_that_is_no_number_gives_none():
    """In training the loss tells; it is no index out of range."""
    assert soft_top_k(torch.randn(2, 5), torch.tensor(torch.nan), 0.1).isnan().all()


def test_alpha_to_zero_is_the_top_k_and_ties_share():
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    third = torch.tensor([1, 1 / 3, 1 / 3, 1 / 3, 0], dtype=torch.float64)
    torch.testing.assert_close(soft_top_k(scores, 2, 1e-4), third)
    scores = torch.randn(8, 64)
    hard = torch.zeros_like(scores).scatter(-1, scores.topk(8).indices, 1.0)
    torch.testing.assert_close(soft_top_k(scores, 8, 1e-6), hard)


def test_k_and_alpha_per_token():
    scores = torch.randn(2, 3, 16, dtype=torch.float64)
    k, alpha = 1 + 4 * torch.rand(2, 3, dtype=torch.float64), 0.1 + torch.rand(3, dtype=torch.float64)
    p = soft_top_k(scores, k, alpha)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(p[i, j], soft_top_k(scores[i, j], float(k[i, j]), float(alpha[j])))


def test_a_token_does_not_depend_on_its_batch():
    scores = torch.randn(33, 64)
    p = soft_top_k(scores, 8.3, 0.1)
    assert all(soft_top_k(scores[i : i + 1], 8.3, 0.1).equal(p[i : i + 1]) for i in range(33))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend):
    def loss(scores, k, alpha):
        return (soft_top_k(scores, k, alpha) ** 2).sum()

    found, expected = [], []
    for function, gradients in ((torch.compile(loss, fullgraph=True, backend=backend), found), (loss, expected)):
        torch.manual_seed(0)
        inputs = [torch.randn(5, 16).requires_grad_(), torch.tensor(2.5).requires_grad_()]
        inputs.append(torch.tensor(0.3).requires_grad_())
        gradients.extend(torch.autograd.grad(function(*inputs), inputs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("k", "alpha", "message"),
    [
        (0, 1.0, "k=0; expected a number above 0 and at most 4, the number of scores"),
        (4.1, 1.0, "k=4.1; expected"),
        (float("nan"), 1.0, "k=nan"),
        (2, 0.0, "alpha=0.0; expected a number above 0: for 0 take the family's own top-k"),
        (2, float("nan"), "alpha=nan"),
        (2, 1e-300, "alpha=1e-300"),
    ],
)
def test_what_is_out_of_range_is_refused(k, alpha, message):
    with pytest.raises(ValueError, match=message):
        soft_top_k(torch.randn(3, 4), k, alpha)


# The budget over layers


@pytest.mark.parametrize("budget", [4, 4.001, 8, 17.3, 31.9, 32])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_the_layers_share_the_budget_exactly(budget, scale):
    theta = scale * torch.randn(4, dtype=torch.float64)
    k = layer_budgets(theta, budget, cap=8)
    torch.testing.assert_close(k.sum(), torch.tensor(float(budget), dtype=torch.float64), rtol=0, atol=1e-9)
    assert k.min() >= 1
    assert k.max() <= 8
    if scale == 0:
        torch.testing.assert_close(k, torch.full_like(k, budget / 4))


def test_a_layer_that_asks_for_more_takes_it_from_the_others():
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    k = layer_budgets(theta, 12, cap=8)
    (gradient,) = torch.autograd.grad(k[0], theta)
    assert gradient[0] > 0
    torch.testing.assert_close(gradient[1:], -gradient[0].expand(2) / 2)
    assert torch.autograd.gradcheck(lambda t: layer_budgets(t, 12, cap=8), [theta])


@pytest.mark.parametrize(
    ("budget", "cap", "message"),
    [
        (3.9, 8, "budget=3.9 for 4 layers; expected 4, one expert each, to 32, 8 each"),
        (33, 8, "budget=33 for 4 layers"),
        (float("nan"), 8, "budget=nan"),
        (4, 1, "cap=1; expected more than 1"),
    ],
)
def test_a_budget_that_the_layers_cannot_have_is_refused(budget, cap, message):
    with pytest.raises(ValueError, match=message):
        layer_budgets(torch.zeros(4), budget, cap)
