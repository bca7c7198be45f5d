"""Which slots go to which expert: a stable counting sort and the map of GEMM tiles, all on the device.

Nothing here waits for the host and nothing is atomic, so the result is the same at every run and a CUDA graph can hold it.
A slot is one pair (token t, choice k), numbered t * K + k. Counts and row numbers are int32, element offsets int64.

Shape suffixes: N slots, E experts in the pool, R router width, B blocks of slots, M tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2**14  # of the [slots, experts] blocks that count and place: 128 registers a thread of four warps
_BLOCKS_PER_SCAN = 1024
_MAX_SLOTS = 2**31 - 1


class Tiles(NamedTuple):
    """The row tiles of a grouped GEMM; tiles past the last one hold the expert -1."""

    expert_M: Tensor
    row_M: Tensor  # first row of the tile, among all the sorted rows


@triton.jit
def pool_row(index, slot_map, slot, num_slots, R, E, HAS_SLOT_MAP: tl.constexpr):
    """The pool row of each slot, E where the slot is inactive, its index lies outside [0, R) or there is no such slot."""
    router_index = tl.load(index + slot, mask=slot < num_slots, other=R)
    active = (router_index >= 0) & (router_index < R)
    row = router_index
    if HAS_SLOT_MAP:
        row = tl.load(slot_map + router_index, mask=active, other=E)
        active = active & (row >= 0) & (row < E)
    return tl.where(active, row, E).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _count_kernel(
    index, slot_map, row_N, count_EB, num_slots, num_blocks, R, E,
    HAS_SLOT_MAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = pool_row(index, slot_map, slot, num_slots, R, E, HAS_SLOT_MAP)
    tl.store(row_N + slot, row, mask=slot < num_slots)
    expert = tl.arange(0, BLOCK_E)
    count = tl.sum((row[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(count_EB + expert.to(tl.int64) * num_blocks + block, count, mask=expert < E)


@triton.jit(do_not_specialize=["num_blocks"])
def _scan_kernel(count_EB, total_E, num_blocks, BLOCK_B: tl.constexpr):
    """Expert by expert: the counts of its blocks become the counts before each block, in place."""
    expert = tl.program_id(0)
    counts = count_EB + expert.to(tl.int64) * num_blocks
    total = tl.full((), 0, tl.int32)
    for start in range(0, num_blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        count = tl.load(counts + block, mask=block < num_blocks, other=0)
        tl.store(counts + block, total + tl.cumsum(count, axis=0) - count, mask=block < num_blocks)
        total += tl.sum(count, axis=0)
    tl.store(total_E + expert, total)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _place_kernel(
    row_N, count_EB, total_E, order_N, position_N, offsets_E1, num_slots, num_blocks, E,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A slot's place: the first of its expert, those of the blocks before, those before it in this block."""
    block = tl.program_id(0)
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(row_N + slot, mask=slot < num_slots, other=E)
    expert = tl.arange(0, BLOCK_E)
    total = tl.load(total_E + expert, mask=expert < E, other=0)
    offset = tl.cumsum(total, axis=0) - total
    num_active = tl.sum(total, axis=0)
    if block == 0:
        tl.store(offsets_E1 + expert, offset, mask=expert < E)
        tl.store(offsets_E1 + E, num_active)
    before = tl.load(count_EB + expert.to(tl.int64) * num_blocks + block, mask=expert < E, other=0)
    is_expert = (row[:, None] == expert[None, :]).to(tl.int32)
    rank = tl.cumsum(is_expert, axis=0) - 1 + (offset + before)[None, :]
    place = tl.sum(rank * is_expert, axis=1)
    is_active = (row < E).to(tl.int32)
    active_before = tl.sum(before, axis=0) + tl.cumsum(is_active, axis=0) - is_active
    place = tl.where(row < E, place, num_active + slot - active_before)
    tl.store(order_N + place, slot, mask=slot < num_slots)
    tl.store(position_N + slot, tl.where(row < E, place, -1), mask=slot < num_slots)


@triton.jit(do_not_specialize=["num_slots"])
def _invert_kernel(order_N, offsets_E1, position_N, num_slots, E, BLOCK_N: tl.constexpr):
    position = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(order_N + position, mask=position < num_slots, other=0)
    num_active = tl.load(offsets_E1 + E)
    tl.store(position_N + slot, tl.where(position < num_active, position, -1), mask=position < num_slots)


@triton.jit(do_not_specialize=["num_tiles"])
def _tiles_kernel(
    offsets_E1, expert_M, row_M, num_tiles, E,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Program e writes the tiles of expert e, program E marks the unused ones."""
    e = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_E1 + expert, mask=expert < E, other=0)
    end = tl.load(offsets_E1 + expert + 1, mask=expert < E, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.sum(tl.where(expert < e, tiles, 0), axis=0)
    last_tile = first_tile + tl.sum(tl.where(expert == e, tiles, 0), axis=0)
    first_row = tl.sum(tl.where(expert == e, start, 0), axis=0)
    value = e
    if e == E:
        last_tile = num_tiles
        value = -1
    for tile in range(first_tile, last_tile, BLOCK_TILES):
        m = tile + tl.arange(0, BLOCK_TILES)
        tl.store(expert_M + m, tl.zeros_like(m) + value, mask=m < last_tile)
        tl.store(row_M + m, first_row + (m - first_tile) * BLOCK_M, mask=m < last_tile)


def sort_slots(index: Tensor, slot_map: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the slots by pool row, stably, inactive ones last.

    Args:
        index: `[T, K]` int64 router indices; one outside `[0, R)` marks an inactive slot.
        slot_map: `[R]` int64 or None for the identity.
        num_experts: E.

    Returns:
        `order [N]` int32, the slots in sorted order; `offsets [E + 1]` int32, where expert e has the places
        `offsets[e]:offsets[e + 1]`; `position [N]` int32, each slot's place, -1 where it is inactive.
    """
    N, E = index.numel(), num_experts
    if N > _MAX_SLOTS:
        raise ValueError(f"T * K = {N} slots; the kernels number them in int32: pass at most {_MAX_SLOTS} at once")
    order, position, row = (torch.empty(N, dtype=torch.int32, device=index.device) for _ in range(3))
    offsets = torch.empty(E + 1, dtype=torch.int32, device=index.device)
    if N == 0:
        return order, offsets.zero_(), position
    block_e = triton.next_power_of_2(E)
    block_n = min(128, max(16, _ELEMENTS // block_e))
    num_warps = min(16, max(4, block_n * block_e // (_ELEMENTS // 4)))
    num_blocks = triton.cdiv(N, block_n)
    count = torch.empty(E, num_blocks, dtype=torch.int32, device=index.device)
    total = torch.empty(E, dtype=torch.int32, device=index.device)
    R = E if slot_map is None else slot_map.numel()
    _count_kernel[(num_blocks,)](
        index.contiguous(), slot_map, row, count, N, num_blocks, R, E,
        HAS_SLOT_MAP=slot_map is not None, BLOCK_N=block_n, BLOCK_E=block_e, num_warps=num_warps,
    )  # fmt: skip
    _scan_kernel[(E,)](count, total, num_blocks, BLOCK_B=_BLOCKS_PER_SCAN)
    _place_kernel[(num_blocks,)](
        row, count, total, order, position, offsets, N, num_blocks, E,
        BLOCK_N=block_n, BLOCK_E=block_e, num_warps=num_warps,
    )  # fmt: skip
    return order, offsets, position


def invert(order: Tensor, offsets: Tensor) -> Tensor:
    """Each slot's place in `order [N]`, int32, -1 where the slot is inactive."""
    position = torch.empty_like(order)
    N = order.numel()
    if N:
        _invert_kernel[(triton.cdiv(N, 1024),)](order, offsets, position, N, offsets.numel() - 1, BLOCK_N=1024)
    return position


def num_row_tiles(N: int, E: int, block_m: int) -> int:
    """An upper bound that the host knows: an expert leaves at most one tile partly filled."""
    return N // block_m + min(N, E)


def make_tiles(offsets: Tensor, N: int, block_m: int) -> Tiles:
    """The row tiles of the sorted rows, `block_m` rows each, `num_row_tiles` of them."""
    E = offsets.numel() - 1
    M = num_row_tiles(N, E, block_m)
    tiles = Tiles(*(torch.empty(M, dtype=torch.int32, device=offsets.device) for _ in range(2)))
    _tiles_kernel[(E + 1,)](
        offsets, *tiles, M, E, BLOCK_M=block_m, BLOCK_E=triton.next_power_of_2(E), BLOCK_TILES=128
    )  # fmt: skip
    return tiles
