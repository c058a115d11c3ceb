"""Plain float8 weights with a scale beside them: transformers' `FP8Linear` (DeepSeek, Qwen, …)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bridge.peft.branch.quantised.format import Format

_SCALE = "weight_scale_inv"


class ScaledFloat8(NamedTuple):
    """Values (out_features, in_features) and what to multiply them with, block by block."""

    values: Tensor
    scales: Tensor
    block_size: tuple[int, int] | None


class BlockFloat8(Format):
    """`FP8Linear`: float8 values and a scale for each block of rows and columns, or one for all."""

    library = "transformers"

    def holds(self, module: nn.Module) -> bool:
        """Whether a float8 weight and its scales are there."""
        weight, scales = module._parameters.get("weight"), module._parameters.get(_SCALE)
        return weight is not None and scales is not None and _is_float8(weight.dtype)

    def packed(self, module: nn.Module) -> ScaledFloat8:
        """Weight, scales and the size of a block."""
        size = getattr(module, "block_size", None)
        weight, scales = module._parameters["weight"], module._parameters[_SCALE]
        assert weight is not None and scales is not None
        return ScaledFloat8(weight.data, scales.data, None if size is None else tuple(size))

    def kind(self, packed: Any) -> str:
        """`"float8 in blocks of 128×128"`."""
        rows, columns = packed.block_size or packed.values.shape
        return "float8" if packed.scales.dim() == 0 else f"float8 in blocks of {rows}×{columns}"

    def tensors(self, packed: Any) -> list[Tensor]:
        """Values and scales."""
        return [packed.values, packed.scales]

    def dense(self, packed: Any) -> Tensor:
        """The weight in float32."""
        return packed.values.float() * _spread(packed.scales.float(), packed)

    def settings(self, packed: Any) -> dict[str, Any]:
        """Dtype of the values and size of a block."""
        block = packed.block_size and [*packed.block_size]
        values, scales = str(packed.values.dtype), str(packed.scales.dtype)
        return {"kind": "float8", "values": values, "scales": scales, "block_size": block}

    def pack(self, weight: Tensor, settings: Mapping[str, Any]) -> Any:
        """Scale each block to the largest value of its float8 dtype."""
        dtype = getattr(torch, settings["values"].removeprefix("torch."))
        scale_dtype = getattr(torch, settings["scales"].removeprefix("torch."))
        block, exact = settings["block_size"], weight.float()
        largest = torch.finfo(dtype).max
        if block is None:
            scales = exact.abs().max() / largest
        else:
            (rows, columns), (r, c) = exact.shape, block
            padded = nn.functional.pad(exact, (0, -columns % c, 0, -rows % r))
            scales = padded.view(-(-rows // r), r, -(-columns // c), c).abs().amax((1, 3)) / largest
        tiny = torch.finfo(torch.float32).tiny
        scales = scales.clamp_min(tiny).to(scale_dtype)
        packed = ScaledFloat8(exact, scales, block and tuple(block))
        values = (exact / _spread(scales.float(), packed)).clamp(-largest, largest).to(dtype)
        return packed._replace(values=values)

    def put(self, module: nn.Module, packed: Any) -> None:
        """Weight and scales."""
        for name, tensor in (("weight", packed.values), (_SCALE, packed.scales)):
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def _spread(scales: Tensor, packed: ScaledFloat8) -> Tensor:
    """The scales as a factor of each value; as they are where there is one."""
    if packed.block_size is None:
        return scales
    (rows, columns), (r, c) = packed.values.shape, packed.block_size
    return scales.repeat_interleave(r, 0)[:rows].repeat_interleave(c, 1)[:, :columns]
