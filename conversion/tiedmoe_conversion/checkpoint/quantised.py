"""fp8 weights with one scale per block, as DeepSeek-V3 has them, become plain ones while they are read.

`X.weight` is F8_E4M3 and `X.weight_scale_inv` F32 or BF16, with an entry per block of `weight_block_size` rows and
columns; the weight is their product in float32, rounded once to the config's dtype: what transformers computes. Blocks
at the edges may be smaller, where 128 does not divide a size (DeepSeek-V3's `kv_a_proj_with_mqa` has 576 rows).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConversionError
from .headers import TensorInfo

SUFFIX = "_scale_inv"
SCALE_DTYPES = (torch.float32, torch.bfloat16)
OUTPUT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class BlockScaled(TensorInfo):
    """A tensor that is stored as fp8 `weight` and `scale`, and read in `dtype`."""

    weight: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """The size on disk in bytes, of weight and scales."""
        return self.weight.num_bytes + self.scale.num_bytes

    @property
    def is_even(self) -> bool:
        """Whether all blocks are of one size.

        If not, transformers 5.23 scales wrongly: it takes a block to be the weight's size by the number of blocks.
        """
        return all(size % part == 0 for size, part in zip(self.shape[-2:], self.block))


def dequantise(weight: torch.Tensor, scale: torch.Tensor, info: BlockScaled) -> torch.Tensor:
    """Return the product of fp8 `weight [..., rows, columns]` and its blocks' `scale`, in `info.dtype`."""
    rows, columns = weight.shape[-2:]
    scale = scale.repeat_interleave(info.block[0], -2)[..., :rows, :]
    scale = scale.repeat_interleave(info.block[1], -1)[..., :columns]
    return weight.to(torch.float32).mul_(scale).to(info.dtype)


def fold_scales(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], where: str) -> dict[str, TensorInfo]:
    """Return `tensors` with each fp8 weight and its scales folded into one `BlockScaled`; `where` is for errors.

    Raises:
        ConversionError: a quantisation of another kind, a weight without scales, scales without a weight, or scales
            that are not one per block.
    """
    block, dtype = block_size(config, where), _output_dtype(config, where)
    folded = {name: info for name, info in tensors.items() if not name.endswith(SUFFIX)}
    for name in sorted(tensors.keys() - folded.keys()):
        weight, scale = folded.get(name.removesuffix(SUFFIX)), tensors[name]
        if weight is None:
            raise ConversionError(f"{where}: {name!r} has no weight beside it; expected {name.removesuffix(SUFFIX)!r}")
        blocks = tuple(-(-size // part) for size, part in zip(weight.shape[-2:], block))
        expected = (*weight.shape[:-2], *blocks)
        if weight.dtype != torch.float8_e4m3fn or scale.dtype not in SCALE_DTYPES or scale.shape != expected:
            raise ConversionError(
                f"{where}: {weight.name!r} is {weight.dtype} {list(weight.shape)} and {name!r} {scale.dtype} "
                f"{list(scale.shape)}; expected F8_E4M3 and F32 or BF16 {list(expected)}, one scale per block of "
                f"{list(block)}: save a dequantised copy with transformers first"
            )
        folded[weight.name] = BlockScaled(
            weight.name, weight.file, dtype, weight.shape, weight.offset, weight, scale, block
        )
    bare = sorted(name for name, info in folded.items() if info.dtype.itemsize == 1 and info.dtype.is_floating_point)
    if bare:
        raise ConversionError(
            f"{where}: the fp8 weight {bare[0]!r} ({len(bare)} of them) has no scales; expected {bare[0] + SUFFIX!r}: "
            "download the checkpoint again"
        )
    return folded


def block_size(config: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Return the rows and columns that share a scale, by a checkpoint's config.json; refuse other quantisations."""
    quantisation = config["quantization_config"]
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    block = quantisation.get("weight_block_size") if method == "fp8" else None
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ConversionError(
            f"{where} is quantised ({method}, weight_block_size={block!r}); expected plain weights (bf16, fp16 or "
            'fp32), or quant_method "fp8" with a weight_block_size such as [128, 128]: save a dequantised copy first'
        )
    return block[0], block[1]


def _output_dtype(config: Mapping[str, Any], where: str) -> torch.dtype:
    name = config.get("dtype", config.get("torch_dtype"))
    if not isinstance(name, str) or name not in OUTPUT_DTYPES:
        raise ConversionError(
            f"{where} is quantised, and its config.json has the dtype {name!r}; expected one of "
            f"{list(OUTPUT_DTYPES)}, the one to dequantise to"
        )
    return OUTPUT_DTYPES[name]
