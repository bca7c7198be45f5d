"""The Triton kernels on routings that hypothesis draws, in the interpreter and by `pytest.mark.gpu` on a device.

In a file of their own, which is skipped where hypothesis is not installed: a GPU machine may lack it.
"""

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("triton")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_layers import (
    DEVICES,
    Case,
    backend_fixture,  # noqa: F401
    forward,
    in_float64,
    layer,
    relative_error,
)

from tiedmoe_kernels import experts_forward, experts_forward_reference, metadata

ROUTINGS = st.integers(1, 40).flatmap(
    lambda E: st.tuples(st.just(E), st.lists(st.lists(st.integers(-2, E + 2), min_size=3, max_size=3), max_size=70))
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(routing=ROUTINGS)
@pytest.mark.parametrize("device", DEVICES)
def test_sorts_stably_and_tiles_every_row_once(routing, device):
    E, index = routing
    index = torch.tensor(index, dtype=torch.int64).reshape(-1, 3)
    row = torch.where((index >= 0) & (index < E), index, E).flatten()

    with_sort = metadata.empty_tiles(row.numel(), E, 16, torch.device(device))
    sorts = metadata.sort_slots(index.to(device), None, E, with_sort, 16)
    order, offsets, position = (t.cpu() for t in sorts)
    assert order.tolist() == row.argsort(stable=True).tolist()
    assert offsets.tolist() == [0, *row.bincount(minlength=E + 1).cumsum(0)[:E].tolist()]
    places = torch.empty_like(order).scatter_(0, order.long(), torch.arange(len(order), dtype=torch.int32))
    assert position.tolist() == places.masked_fill(row == E, -1).tolist()
    assert metadata.invert(order.to(device), offsets.to(device)).tolist() == position.tolist()

    tiles = metadata.make_tiles(offsets.to(device), len(order), block_m=16)
    if len(order):
        assert [t.tolist() for t in tiles] == [t.tolist() for t in with_sort]
    rows = [
        (e, r) for m, (e, first_m) in enumerate(zip(*(t.tolist() for t in tiles))) if e >= 0
        for r in range(offsets[e].item() + 16 * (m - first_m), offsets[e + 1].item())[:16]
    ]  # fmt: skip
    assert rows == [(e, r) for e in range(E) for r in range(offsets[e].item(), offsets[e + 1].item())]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("device", DEVICES)
def test_any_routing_decodes_as_it_trains(data, device, backend):
    E, K, T = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    R = data.draw(st.one_of(st.none(), st.integers(1, 12)))
    case = Case(T=T, H=16, I=16, E=E, K=K, slot_map=None if R is None else [i * 7 % E for i in range(R)])
    mine = layer(case, torch.float32, device)
    width = E if R is None else R
    index = data.draw(st.lists(st.integers(0, width), min_size=T * K, max_size=T * K))
    mine = mine._replace(index=torch.tensor(index, device=device).reshape(T, K))
    expected = forward(experts_forward_reference, in_float64(mine), case)
    with torch.no_grad():
        decoded = forward(experts_forward, mine, case)
    assert relative_error(decoded, expected) < 1e-5
    assert relative_error(forward(experts_forward, mine, case), expected) < 1e-5
