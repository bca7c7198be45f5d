"""Quantised weights become plain ones while they are read, with the bits that transformers gives them.

fp8, as in DeepSeek-V3: `X.weight` is F8_E4M3 and `X.weight_scale_inv` F32 or BF16, with an entry per block of
`weight_block_size` rows and columns; the weight is their product in float32, rounded once to the config's dtype.
Blocks at the edges may be smaller, where 128 does not divide a size (DeepSeek-V3's `kv_a_proj_with_mqa` has 576 rows).

mxfp4, as in gpt-oss: `X_blocks` is U8 `[E, columns, rows / 32, 16]`, two values of 4 bits in a byte, and `X_scales` U8
`[E, columns, rows / 32]`, the exponent of what 32 values are multiplied by; the weight `X` is `[E, rows, columns]`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ..errors import ConversionError
from .headers import TensorInfo

FP8_SCALE, MXFP4_BLOCKS, MXFP4_SCALES = "_scale_inv", "_blocks", "_scales"
SUFFIXES = (FP8_SCALE, MXFP4_BLOCKS, MXFP4_SCALES)
MXFP4_SIZE = 32  # values that share a scale
SCALE_DTYPES = (torch.float32, torch.bfloat16)
OUTPUT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ReadRows = Callable[..., torch.Tensor]  # of a stored tensor: its info, and the first and last row


@dataclass(frozen=True)
class Quantised(TensorInfo):
    """A tensor that is stored as `values` and their `scales`, and read in `dtype` and `shape`."""

    method: ClassVar[str]  # as config.json calls it
    values: TensorInfo
    scales: TensorInfo

    @property
    def num_bytes(self) -> int:
        """The size on disk in bytes, of values and scales."""
        return self.values.num_bytes + self.scales.num_bytes

    @property
    def stored_as(self) -> str:
        """What is on the disk, for people."""
        raise NotImplementedError

    @property
    def scratch_bytes(self) -> int:
        """The most bytes in memory while the tensor is read, beside the tensor itself."""
        raise NotImplementedError

    def read(self, read: ReadRows, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return rows `first` to `last` (not included) along dimension 0, dequantised."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlockScaled(Quantised):
    """A matrix that is stored as fp8 values, with a scale per `block` of rows and columns."""

    method = "fp8"
    block: tuple[int, int]

    @property
    def is_even(self) -> bool:
        """Whether all blocks are of one size.

        If not, transformers 5.23 scales wrongly: it takes a block to be the weight's size by the number of blocks.
        """
        return all(size % part == 0 for size, part in zip(self.shape[-2:], self.block))

    @property
    def stored_as(self) -> str:
        return f"{str(self.values.dtype).removeprefix('torch.')} in blocks of {list(self.block)}"

    @property
    def scratch_bytes(self) -> int:
        return 9 * self.meta().numel() + self.scales.num_bytes  # the values, as float32 too, and as many scales

    def read(self, read: ReadRows, first: int = 0, last: int | None = None) -> torch.Tensor:
        rows, columns = self.shape[-2:]
        scales = read(self.scales).repeat_interleave(self.block[0], -2)[..., :rows, :]
        scales = scales.repeat_interleave(self.block[1], -1)[..., :columns]
        return read(self.values).to(torch.float32).mul_(scales).to(self.dtype)[first:last]


@dataclass(frozen=True)
class Mxfp4(Quantised):
    """The experts of a layer, stored as mxfp4 and read by transformers' own function, one expert at a time."""

    method = "mxfp4"

    @property
    def stored_as(self) -> str:
        return f"mxfp4 in blocks of {MXFP4_SIZE}"

    @property
    def scratch_bytes(self) -> int:
        # As transformers 5.17 and 5.23 work: stored, as int32, and two copies in float32 or in the dtype.
        return (9 + self.dtype.itemsize) * self.meta()[:1].numel()

    def read(self, read: ReadRows, first: int = 0, last: int | None = None) -> torch.Tensor:
        experts = range(self.shape[0])[first:last]
        if len(experts) == 1:
            return self._read_expert(read, experts[0])
        tensor = torch.empty((len(experts), *self.shape[1:]), dtype=self.dtype)
        for place, expert in enumerate(experts):
            tensor[place] = self._read_expert(read, expert)[0]
        return tensor

    def _read_expert(self, read: ReadRows, expert: int) -> torch.Tensor:
        blocks, scales = (read(each, expert, expert + 1) for each in (self.values, self.scales))
        return convert_moe_packed_tensors(blocks, scales, dtype=self.dtype)


def fold_scales(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], where: str) -> dict[str, TensorInfo]:
    """Return `tensors` with the values and scales of every quantised weight as one `Quantised`.

    Args:
        tensors: from the headers, by name.
        config: the checkpoint's config.json.
        where: names the checkpoint in errors.

    Raises:
        ConversionError: a quantisation of another kind, values without scales, scales without values, or scales that
            are not one per block.
    """
    if quantisation(config, where) == "mxfp4":
        return _fold_mxfp4(tensors, _mxfp4_dtype(tensors, config, where), where)
    return _fold_fp8(tensors, config["quantization_config"]["weight_block_size"], _config_dtype(config, where), where)


def quantisation(config: Mapping[str, Any], where: str) -> str:
    """Return "fp8" or "mxfp4", by the `quantization_config` of a checkpoint's config.json; refuse any other."""
    fields = config["quantization_config"]
    method = fields.get("quant_method") if isinstance(fields, dict) else None
    if method == "mxfp4" and config.get("model_type") == "gpt_oss":  # all that transformers reads mxfp4 of
        return method
    block = fields.get("weight_block_size") if method == "fp8" else None
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return "fp8"
    raise ConversionError(
        f"{where} is quantised ({method}, weight_block_size={block!r}); expected plain weights (bf16, fp16 or fp32), "
        'quant_method "fp8" with a weight_block_size such as [128, 128], or "mxfp4" of a gpt_oss: save a dequantised '
        "copy first"
    )


def _fold_fp8(
    tensors: Mapping[str, TensorInfo], block: list[int], dtype: torch.dtype, where: str
) -> dict[str, TensorInfo]:
    folded = {name: info for name, info in tensors.items() if not name.endswith(FP8_SCALE)}
    for name in sorted(tensors.keys() - folded.keys()):
        weight, scale = folded.get(name.removesuffix(FP8_SCALE)), tensors[name]
        if weight is None:
            raise ConversionError(
                f"{where}: {name!r} has no weight beside it; expected {name.removesuffix(FP8_SCALE)!r}"
            )
        blocks = tuple(-(-size // part) for size, part in zip(weight.shape[-2:], block))
        expected = (*weight.shape[:-2], *blocks)
        if weight.dtype != torch.float8_e4m3fn or scale.dtype not in SCALE_DTYPES or scale.shape != expected:
            raise ConversionError(
                f"{where}: {weight.name!r} is {weight.dtype} {list(weight.shape)} and {name!r} {scale.dtype} "
                f"{list(scale.shape)}; expected F8_E4M3 and F32 or BF16 {list(expected)}, one scale per block of "
                f"{list(block)}: save a dequantised copy with transformers first"
            )
        folded[weight.name] = BlockScaled(
            weight.name, weight.file, dtype, weight.shape, weight.offset, weight, scale, (block[0], block[1])
        )
    bare = sorted(name for name, info in folded.items() if info.dtype.itemsize == 1 and info.dtype.is_floating_point)
    if bare:
        raise ConversionError(
            f"{where}: the fp8 weight {bare[0]!r} ({len(bare)} of them) has no scales; expected "
            f"{bare[0] + FP8_SCALE!r}: download the checkpoint again"
        )
    return folded


def _fold_mxfp4(tensors: Mapping[str, TensorInfo], dtype: torch.dtype, where: str) -> dict[str, TensorInfo]:
    folded = {name: info for name, info in tensors.items() if not name.endswith((MXFP4_BLOCKS, MXFP4_SCALES))}
    for stored in sorted(tensors.keys() - folded.keys()):
        name = stored.removesuffix(MXFP4_BLOCKS).removesuffix(MXFP4_SCALES)
        blocks, scales = tensors.get(name + MXFP4_BLOCKS), tensors.get(name + MXFP4_SCALES)
        if blocks is None or scales is None:
            missing = name + (MXFP4_SCALES if scales is None else MXFP4_BLOCKS)
            raise ConversionError(
                f"{where}: {stored!r} has no {missing!r} beside it; expected both: download the checkpoint again"
            )
        if name in tensors:
            raise ConversionError(f"{where}: {name!r} is there twice, as it is and in mxfp4; expected one: remove one")
        if (
            (blocks.dtype, scales.dtype) != (torch.uint8, torch.uint8)
            or len(blocks.shape) != 4
            or blocks.shape != (*scales.shape, MXFP4_SIZE // 2)
        ):
            raise ConversionError(
                f"{where}: {blocks.name!r} is {blocks.dtype} {list(blocks.shape)} and {scales.name!r} {scales.dtype} "
                f"{list(scales.shape)}; expected U8 [experts, columns, blocks, {MXFP4_SIZE // 2}] and U8 [experts, "
                "columns, blocks]: download the checkpoint again"
            )
        experts, columns, num_blocks = scales.shape
        shape = (experts, num_blocks * MXFP4_SIZE, columns)
        folded[name] = Mxfp4(name, blocks.file, dtype, shape, blocks.offset, blocks, scales)
    return folded


def _mxfp4_dtype(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], where: str) -> torch.dtype:
    """Return the config's dtype, or else, as transformers does, the other weights': released configs name none."""
    plain = [info for name, info in tensors.items() if not name.endswith((MXFP4_BLOCKS, MXFP4_SCALES))]
    dtypes = {info.dtype for info in plain if info.dtype.is_floating_point}
    if config.get("dtype", config.get("torch_dtype")) is None and len(dtypes) == 1:
        return next(iter(dtypes))
    return _config_dtype(config, where)


def _config_dtype(config: Mapping[str, Any], where: str) -> torch.dtype:
    name = config.get("dtype", config.get("torch_dtype"))
    if not isinstance(name, str) or name not in OUTPUT_DTYPES:
        raise ConversionError(
            f"{where} is quantised, and its config.json has the dtype {name!r}; expected one of "
            f"{list(OUTPUT_DTYPES)}, the one to dequantise to"
        )
    return OUTPUT_DTYPES[name]
