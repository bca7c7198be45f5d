"""`pools.py`: which layer reads which pool."""

import pytest

from transformers_tiedmoe.pools import check_groups, default_slot_map, tie_groups


@pytest.mark.parametrize(
    ("moe_layers", "group_size", "skip_first", "skip_last", "expected"),
    [
        (range(8), 2, 2, 2, [[2, 3], [4, 5]]),
        (range(16), 5, 2, 2, [[2, 3, 4, 5, 6], [7, 8, 9, 10, 11], [12, 13]]),  # a last shorter group
        (range(12), 4, 2, 2, [[2, 3, 4, 5], [6, 7, 8, 9]]),
        (range(1, 7), 2, 0, 0, [[1, 2], [3, 4], [5, 6]]),  # layer 0 is dense, as in DeepSeek
        ([1, 3, 5, 7], 2, 1, 1, [[3, 5]]),  # every second layer is dense, as in Jamba
        (range(4), 2, 2, 2, []),  # nothing left
        (range(3), 2, 2, 2, []),  # less than nothing left
        (range(4), 1, 1, 1, [[1], [2]]),
        (range(4), 9, 0, 0, [[0, 1, 2, 3]]),
    ],
)
def test_tie_groups(moe_layers, group_size, skip_first, skip_last, expected):
    assert tie_groups(moe_layers, group_size, skip_first, skip_last) == expected


@pytest.mark.parametrize("bad", [{"group_size": 0}, {"group_size": 2.0}, {"skip_first": -1}, {"skip_last": True}])
def test_tie_groups_refuses(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        tie_groups(range(8), **bad)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[2, 3], [3, 4]], "layer 3 is in group 0 and in group 1"),
        ([[2, 4]], "skips or reorders"),
        ([[3, 2]], "skips or reorders"),
        ([[0, 1]], "layer 0, which is dense"),
        ([[6, 7]], "from 0 to 6"),
        ([[]], "non-empty"),
        ([3], "non-empty"),
        ([["2", "3"]], "expected an integer"),
        ([[2, 2]], "layer 2 is in group 0 and in group 0"),
    ],
)
def test_check_groups_refuses(groups, message):
    with pytest.raises(ValueError, match=message):
        check_groups(groups, moe_layers=range(1, 7), num_hidden_layers=7)


def test_check_groups_accepts_neighbours_among_dense_layers():
    check_groups([[1, 3], [5]], moe_layers=[1, 3, 5], num_hidden_layers=6)


def test_default_slot_map():
    assert default_slot_map(3, num_slots=4, pool_size=4) == [0, 1, 2, 3]
    assert default_slot_map(1, num_slots=4, pool_size=8) == [4, 5, 6, 7]
    assert default_slot_map(1, num_slots=4, pool_size=6) == [4, 5, 0, 1]
