"""`tiedmoe_kernels.experts_forward` on a CPU against the reference."""

import sys

import pytest
import torch

from tiedmoe_kernels import ACTIVATIONS, backends, experts_forward, experts_forward_reference, torch_backend

T, H, I, E, K = 7, 8, 4, 5, 3  # rows of 16 bytes in float32, for which the CPU backend has a path of its own


LAYOUTS = {
    "plain": {},
    "transposed": {"is_transposed": True},
    "interleaved": {"is_concatenated": False},
    "gpt_oss": {"is_transposed": True, "is_concatenated": False, "bias": True},
    "biased": {"bias": True},
}


ROUTINGS = {
    "uniform": lambda: torch.stack([torch.randperm(E)[:K] for _ in range(T)]),
    "one expert": lambda: torch.full((T, K), 2),  # K duplicates a token, and E - 1 empty experts
    "one slot": lambda: torch.randint(E, (T, 1)),  # K = 1
    "one token": lambda: torch.randint(E, (1, K)),  # T = 1 has a sum of its own
    "no token": lambda: torch.randint(E, (0, K)),
    "some inactive": lambda: torch.randint(E + 1, (T, K)).index_fill(0, torch.tensor([0, 3]), E),
    "all inactive": lambda: torch.full((T, K), E),
    "one inactive token": lambda: torch.full((1, K), E),
}


def pool(layout="plain", dtype=torch.float64, scale=1.0):
    flags = dict(LAYOUTS[layout])
    swap = flags.get("is_transposed", False)
    weights = {"gate_up_proj": torch.randn(E, 2 * I, H), "down_proj": torch.randn(E, H, I)}
    weights = {name: w.transpose(1, 2).contiguous() if swap else w for name, w in weights.items()}
    if flags.pop("bias", False):
        weights |= {"gate_up_proj_bias": torch.randn(E, 2 * I), "down_proj_bias": torch.randn(E, H)}
    return {name: (scale * w).to(dtype).requires_grad_() for name, w in weights.items()}, flags


def inputs(routing="uniform", dtype=torch.float64):
    index = ROUTINGS[routing]()
    x = torch.randn(len(index), H, dtype=dtype, requires_grad=True)
    weights = torch.rand(index.shape, dtype=dtype)
    return x, index, weights.masked_fill(index == E, torch.nan).requires_grad_()  # not read where inactive


def both(x, index, weights, matrices, **flags):
    """Outputs and gradients of the function and of the reference."""
    found = []
    leaves = [x, weights, *matrices.values()]
    for function in (experts_forward, experts_forward_reference):
        y = function(x, index, weights, **matrices, **flags)
        grad_y = (torch.arange(y.numel()) % 7 - 3).view_as(y).to(y.dtype)  # no dtype rounds it
        found.append([y, *torch.autograd.grad(y, leaves, grad_y)])
        flags.pop("recompute", None)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_reference(activation, layout):
    matrices, flags = pool(layout, scale=2.0)
    limits = {"swiglu_limit": 2.5, "swiglu_alpha": 1.3}  # small enough that the clamp acts
    got, want = both(*inputs(), matrices, activation=activation, **limits, **flags)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", ["plain", "gpt_oss"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_the_reference_at_every_routing(routing, layout, recompute):
    matrices, flags = pool(layout)
    got, want = both(*inputs(routing), matrices, recompute=recompute, **flags)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("R", [2 * E, E, 3])  # more router indices than experts (shared), as many, fewer
def test_slot_map(R):
    matrices, flags = pool("biased")
    x, _, weights = inputs()
    index = torch.randint(R + 1, weights.shape)  # R is inactive
    got, want = both(x, index, weights, matrices, slot_map=torch.randint(E, (R,)), **flags)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # in float32 torch's grouped_mm is tried
def test_views_that_are_not_contiguous(dtype):
    matrices, _ = pool(dtype=dtype)
    x = torch.randn(H, T, dtype=dtype).T.requires_grad_()
    index, weights = (t.T for t in (ROUTINGS["uniform"]().T.clone(), torch.rand(K, T, dtype=dtype)))
    matrices["gate_up_proj"] = torch.cat([matrices["gate_up_proj"].detach()] * 2, 1)[:, 2 * I :].requires_grad_()
    matrices["down_proj"] = matrices["down_proj"].detach().mT.contiguous().mT.requires_grad_()
    got, want = both(x, index, weights.requires_grad_(), matrices)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_that_of_the_dtype(dtype, recompute):
    matrices, flags = pool("gpt_oss", dtype)
    x, index, _ = inputs(dtype=dtype)
    weights = torch.rand(index.shape, requires_grad=True)  # routers often work in float32
    wide = {name: w.detach().double().requires_grad_() for name, w in matrices.items()}
    got, _ = both(x, index, weights, matrices, recompute=recompute, **flags)
    _, want = both(x.detach().double().requires_grad_(), index, weights, wide, **flags)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for a, b, leaf in zip(got, want, [x, x, weights, *matrices.values()]):
        assert a.dtype == leaf.dtype
        assert (a - b).norm() < bound * b.norm()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")
@pytest.mark.parametrize(
    "routing", ["one token", "one slot", "some inactive"]
)  # experts of one to three rows, and more
def test_experts_of_few_rows_have_a_product_of_their_own(routing, monkeypatch):
    monkeypatch.setattr(torch_backend, "_IN_CACHE", 0)
    monkeypatch.setattr(torch_backend, "_PIECES", 4)
    found, original = [], torch_backend._few_rows
    monkeypatch.setattr(torch_backend, "_few_rows", lambda x, *rest: found.append(len(x)) or original(x, *rest))
    matrices, flags = pool("biased", torch.float32)
    x, index, _ = inputs(routing, torch.float32)
    weights = torch.rand(index.shape, requires_grad=True)
    got, want = both(x, index, weights, matrices, **flags)
    rows = torch.bincount(index.flatten(), minlength=E + 1)[:E]
    assert found == 2 * [
        n for n in rows.tolist() if 0 < n <= 3
    ]  # up and down; dy through them is stored the other way
    assert found
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    again, _ = both(x, index, weights, matrices, **flags)
    assert all(map(torch.equal, got, again))


def test_an_autocast_region_does_not_round_the_float32_parts():
    matrices, flags = pool("gpt_oss", torch.bfloat16)
    x, index, _ = inputs(dtype=torch.bfloat16)
    weights = torch.rand(index.shape, requires_grad=True)
    plain, _ = both(x, index, weights, matrices, **flags)
    with torch.autocast("cpu", torch.bfloat16):
        region, _ = both(x, index, weights, matrices, **flags)
    torch.testing.assert_close(region, plain, rtol=0, atol=0)


def test_a_default_device_does_not_matter():
    matrices, _ = pool("biased")
    x, index, weights = inputs("some inactive")
    with torch.device("meta"):
        y = experts_forward(x, index, weights, **matrices)
    torch.testing.assert_close(y, experts_forward(x, index, weights, **matrices))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "unknown activation 'tanh'; choose one of silu"),
        ({"down_proj": torch.zeros(E, I, H)}, r"down_proj of \(5, 8, 4\); found down_proj \(5, 4, 8\)"),
        ({"down_proj": torch.zeros(H, I)}, "must be 3-D"),
        ({"gate_up_proj_bias": torch.zeros(E, I)}, r"gate_up_proj_bias must be \(5, 8\) to fit the pool"),
        ({"down_proj_bias": torch.zeros(H)}, r"down_proj_bias must be \(5, 8\) to fit the pool; found \(8,\)"),
        ({"hidden_states": torch.zeros(T, H + 1)}, r"must be \[T, 8\]"),
        ({"top_k_weights": torch.zeros(T, K + 1)}, r"must both be \[T, K\] with T=7"),
        ({"top_k_index": torch.zeros(T, K, dtype=torch.int32)}, "must be int64; found torch.int32"),
        ({"top_k_index": torch.full((T, K), E + 1)}, r"lie in \[0, 5\] \(5 marks an inactive slot\); found 6 to 6"),
        ({"top_k_index": torch.full((T, K), -1)}, "found -1 to -1"),
        ({"slot_map": torch.full((4,), E)}, r"slot_map must lie in \[0, 4\]; found 5 to 5"),
        ({"slot_map": torch.zeros(4, 1, dtype=torch.int64)}, r"slot_map must be \[R\], one pool row per router index"),
        ({"down_proj": torch.zeros(E, H, I, dtype=torch.bfloat16)}, "one dtype; found torch.float32 and torch.bfloat"),
        ({"gate_up_proj": torch.zeros(E, 2 * I, H, dtype=torch.int8)}, "on cpu must be one of .*; found torch.int8"),
        ({"hidden_states": torch.zeros(T, H).to(torch.float8_e4m3fn)}, "hidden_states must be bfloat16, float16"),
        ({"top_k_weights": torch.zeros(T, K, dtype=torch.int64)}, "top_k_weights must be .*; found torch.int64"),
        ({"down_proj": torch.zeros(E, H, I, device="meta")}, "must be on cpu, where hidden_states is; found .* meta"),
        (
            {"residual": (torch.zeros(E, 2, H),) * 4},
            r"residual of gate_up_proj must be b \[5, 8, r\] and a \[5, r, 8\]",
        ),
        ({"residual": (torch.zeros(E, 2 * I, 1),)}, "b and a of gate_up_proj, b and a of down_proj; found 1 tensors"),
        (
            {
                "residual": [torch.zeros(E, *shape) for shape in ((2 * I, 2), (2, H), (H, 2), (2, I))],
                "slot_map": torch.full((E,), E),
            },
            r"slot_map must lie in \[0, 4\]; found 5 to 5",
        ),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {
        "hidden_states": torch.zeros(T, H),
        "top_k_index": torch.zeros(T, K, dtype=torch.int64),
        "top_k_weights": torch.zeros(T, K),
        "gate_up_proj": torch.zeros(E, 2 * I, H),
        "down_proj": torch.zeros(E, H, I),
    }
    experts_forward(**arguments)
    with pytest.raises(ValueError, match=message):
        experts_forward(**(arguments | change))


def test_a_device_without_a_backend_is_named():
    matrices, _ = pool()
    arguments = [*inputs(), *matrices.values()]
    with pytest.raises(ValueError, match="no backend for device 'meta'; expected cpu or cuda"):
        experts_forward(
            *(t.detach().to("meta").to(torch.float32 if t.is_floating_point() else None) for t in arguments)
        )


def test_a_gpu_without_triton_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    ours = {name: module for name, module in sys.modules.items() if name.startswith("tiedmoe_kernels.")}
    for name, module in ours.items():  # an earlier test may have imported them, and triton with them
        if name == "tiedmoe_kernels.triton_backend" or hasattr(module, "triton"):
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(name, raising=False)
    backends.backend_of.cache_clear()  # another test may have been on a GPU
    with pytest.raises(ImportError, match=r"needs triton>=3.6, which is not installed; install the torch wheel"):
        backends.backend_of("cuda")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", ["plain", "gpt_oss"])
@pytest.mark.parametrize("slot_map", [None, [3, 0, 0, 4, 1, 3]], ids=["identity", "slot map"])
def test_a_residual_equals_the_reference(slot_map, layout, recompute):
    matrices, flags = pool(layout)
    R = E if slot_map is None else len(slot_map)
    for routing in ROUTINGS if recompute else ["some inactive"]:
        x, index, weights = inputs(routing)
        index = torch.where(index == E, R, index)
        factors = residual_factors(matrices, R)
        leaves = [x, weights, *matrices.values(), *factors]
        mapped = None if slot_map is None else torch.tensor(slot_map)
        found = []
        for function, more in ((experts_forward, {"recompute": recompute}), (experts_forward_reference, {})):
            y = function(x, index, weights, **matrices, **flags, slot_map=mapped, residual=factors, **more)
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def residual_factors(matrices, R, rank=2):
    shapes = [w.shape for w in (matrices["gate_up_proj"], matrices["down_proj"])]
    return tuple(
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for _, rows, columns in shapes for shape in ((R, rows, rank), (R, rank, columns))
    )  # fmt: skip


def test_a_frozen_residual_and_one_of_another_dtype():
    matrices, _ = pool(dtype=torch.float32)
    x, index, _ = inputs(dtype=torch.float32)
    weights = torch.rand(index.shape)
    factors = residual_factors(matrices, E)  # float64: computed in the pool's dtype, its gradient float64
    y = experts_forward(x, index, weights, **matrices, residual=factors)
    grads = torch.autograd.grad(y.sum(), [x, *factors])
    assert [g.dtype for g in grads] == [torch.float32] + [torch.float64] * 4
    frozen = tuple(f.detach() for f in factors)
    y_frozen = experts_forward(x, index, weights, **matrices, residual=frozen)
    assert torch.equal(y, y_frozen)
    assert torch.equal(torch.autograd.grad(y_frozen.sum(), x)[0], grads[0])


@pytest.mark.parametrize("slot_map", [None, [3, 0, 0, 4, 1, 3]], ids=["identity", "slot map"])
def test_a_residual_is_compiled(slot_map):
    matrices, _ = pool("biased")
    x, index, weights = inputs()
    mapped = None if slot_map is None else torch.tensor(slot_map)
    factors = residual_factors(matrices, E if slot_map is None else len(slot_map))

    def layer(x):
        return experts_forward(x, index, weights, **matrices, slot_map=mapped, residual=factors)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves, found = [x, weights, *matrices.values(), *factors], []
    for function in (compiled, layer):
        y = function(x)
        with torch.no_grad():
            torch.testing.assert_close(function(x), y.detach())
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*found)
    torch.library.opcheck(
        torch.ops.tiedmoe_kernels.experts,
        experts_op_arguments(x, index, weights, matrices, factors),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def experts_op_arguments(x, index, weights, matrices, factors):
    b_up, a_up, b_down, a_down = factors
    spec = ("silu", 1.702, 7.0, False, True)
    return (x, index, weights, *matrices.values(), None, *spec, True, [a_up, b_up, a_down, b_down])
