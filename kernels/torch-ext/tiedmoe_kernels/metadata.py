"""Which slots go to which expert: a stable counting sort and the map of GEMM tiles, all on the device.

Nothing here waits for the host and nothing is atomic, so the result is the same at every run and a CUDA graph can hold
it. A slot is one pair (token t, choice k), numbered t * K + k. Counts and row numbers are int32, element offsets
int64.

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
    """The row tiles of a grouped GEMM, expert by expert; those past the last one hold the expert -1."""

    expert_M: Tensor
    first_M: Tensor  # the first tile of the tile's expert


def cdiv(a: int, b: int) -> int:
    """`triton.cdiv`, which is for kernels and takes a host microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """`triton.next_power_of_2`, likewise."""
    return 1 << (n - 1).bit_length()


@triton.jit
def pool_row(index_TK, slot_map_R, slot, num_slots, R, E, HAS_SLOT_MAP: tl.constexpr):
    """Return each slot's pool row; E where it is inactive, its index lies outside [0, R), or there is no such slot."""
    router_index = tl.load(index_TK + slot, mask=slot < num_slots, other=R)
    active = (router_index >= 0) & (router_index < R)
    row = router_index
    if HAS_SLOT_MAP:
        row = tl.load(slot_map_R + router_index, mask=active, other=E)
        active = active & (row >= 0) & (row < E)
    return tl.where(active, row, E).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _count_kernel(
    index_TK, slot_map_R, row_N, count_EB, num_slots, num_blocks, R, E,
    HAS_SLOT_MAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write each slot's pool row, and how many slots of each expert this block has."""
    block = tl.program_id(0)
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = pool_row(index_TK, slot_map_R, slot, num_slots, R, E, HAS_SLOT_MAP)
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


@triton.jit
def _write_tiles(
    total, expert, expert_M, first_M, num_tiles, program, num_programs,
    BLOCK_M: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Write this program's share of the tiles of `[BLOCK_E]` experts with `total` rows."""
    tiles = (total + BLOCK_M - 1) // BLOCK_M
    end_tile = tl.cumsum(tiles, axis=0)
    first_tile = end_tile - tiles
    for first in range(program * BLOCK_TILES, num_tiles, num_programs * BLOCK_TILES):
        m = first + tl.arange(0, BLOCK_TILES)
        is_of = (m[:, None] >= first_tile[None, :]) & (m[:, None] < end_tile[None, :])
        e = tl.max(tl.where(is_of, expert[None, :], -1), axis=1)
        tl.store(expert_M + m, e, mask=m < num_tiles)
        tl.store(first_M + m, tl.sum(tl.where(is_of, first_tile[None, :], 0), axis=1), mask=m < num_tiles)


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "num_tiles"])
def _place_kernel(
    row_N, count_EB, total_E, order_N, position_N, offsets_E1, expert_M, first_M, num_slots, num_blocks, num_tiles, E,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Write each slot's place: the first of its expert, those of the blocks before, those before it in this block.

    With BLOCK_M > 0 write the tiles of as many rows, too.
    """
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
    if BLOCK_M > 0:
        _write_tiles(total, expert, expert_M, first_M, num_tiles, block, num_blocks, BLOCK_M, BLOCK_TILES)


@triton.jit(do_not_specialize=["num_slots"])
def _invert_kernel(order_N, offsets_E1, position_N, num_slots, E, BLOCK_N: tl.constexpr):
    """Write each slot's place in the order, -1 where it is inactive."""
    position = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(order_N + position, mask=position < num_slots, other=0)
    num_active = tl.load(offsets_E1 + E)
    tl.store(position_N + slot, tl.where(position < num_active, position, -1), mask=position < num_slots)


@triton.jit(do_not_specialize=["num_tiles"])
def _tiles_kernel(
    offsets_E1, expert_M, first_M, num_tiles, E,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Write the tiles of rows that were sorted before."""
    expert = tl.arange(0, BLOCK_E)
    offset = tl.load(offsets_E1 + expert, mask=expert < E, other=0)
    total = tl.load(offsets_E1 + expert + 1, mask=expert < E, other=0) - offset
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    _write_tiles(total, expert, expert_M, first_M, num_tiles, program, num_programs, BLOCK_M, BLOCK_TILES)


def sort_slots(
    index: Tensor, slot_map: Tensor | None, num_experts: int, tiles: Tiles | None = None, block_m: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the slots by pool row, stably, inactive ones last.

    Args:
        index: `[T, K]` int64 router indices; one outside `[0, R)` marks an inactive slot.
        slot_map: `[R]` int64 or None for the identity.
        num_experts: E.
        tiles: memory (`empty_tiles`) for the tiles of `block_m` rows, which are written in the same launch, or None.
        block_m: rows of a tile.

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
    block_e = next_power_of_2(E)
    block_n = min(128, max(16, _ELEMENTS // block_e))
    num_warps = min(16, max(4, block_n * block_e // (_ELEMENTS // 4)))
    num_blocks = cdiv(N, block_n)
    count = torch.empty(E, num_blocks, dtype=torch.int32, device=index.device)
    total = torch.empty(E, dtype=torch.int32, device=index.device)
    R = E if slot_map is None else slot_map.numel()
    _count_kernel[(num_blocks,)](
        index.contiguous(), slot_map, row, count, N, num_blocks, R, E,
        HAS_SLOT_MAP=slot_map is not None, BLOCK_N=block_n, BLOCK_E=block_e, num_warps=num_warps,
    )  # fmt: skip
    _scan_kernel[(E,)](count, total, num_blocks, BLOCK_B=_BLOCKS_PER_SCAN)
    _place_kernel[(num_blocks,)](
        row, count, total, order, position, offsets, *(tiles or (None, None)), N, num_blocks,
        num_row_tiles(N, E, block_m) if tiles else 0, E,
        BLOCK_N=block_n, BLOCK_E=block_e, BLOCK_M=block_m if tiles else 0, BLOCK_TILES=_tiles_of_a_program(block_e),
        num_warps=num_warps,
    )  # fmt: skip
    return order, offsets, position


def invert(order: Tensor, offsets: Tensor) -> Tensor:
    """Each slot's place in `order [N]`, int32, -1 where the slot is inactive."""
    position = torch.empty_like(order)
    N = order.numel()
    if N:
        _invert_kernel[(cdiv(N, 1024),)](order, offsets, position, N, offsets.numel() - 1, BLOCK_N=1024)
    return position


def num_row_tiles(N: int, E: int, block_m: int) -> int:
    """Return an upper bound that the host knows: an expert leaves at most one tile partly filled."""
    return N // block_m + min(N, E)


def _tiles_of_a_program(block_e: int) -> int:
    """Tiles that a program writes at once: it compares each with every expert."""
    return max(16, min(128, _ELEMENTS // 4 // block_e))


def empty_tiles(N: int, E: int, block_m: int, device: torch.device) -> Tiles:
    """Memory for `num_row_tiles` tiles."""
    M = num_row_tiles(N, E, block_m)
    return Tiles(*(torch.empty(M, dtype=torch.int32, device=device) for _ in range(2)))


def make_tiles(offsets: Tensor, N: int, block_m: int) -> Tiles:
    """Return the row tiles of the sorted rows, `block_m` rows each, `num_row_tiles` of them."""
    E = offsets.numel() - 1
    tiles, block_e = empty_tiles(N, E, block_m, offsets.device), next_power_of_2(E)
    M, block_tiles = tiles.first_M.numel(), _tiles_of_a_program(block_e)
    _tiles_kernel[(cdiv(M, block_tiles),)](
        offsets, *tiles, M, E, BLOCK_M=block_m, BLOCK_E=block_e, BLOCK_TILES=block_tiles
    )  # fmt: skip
    return tiles
