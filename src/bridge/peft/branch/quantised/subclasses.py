"""Weights that are tensor subclasses inside an ordinary linear: torchao's, quanto's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft._optional import quantiser_library
from bridge.peft.branch.quantised.format import Format, of_library
from bridge.peft.dtypes import dtype_name
from bridge.peft.errors import AdapterError

_AO = "torchao.quantization"


class Subclass(Format):
    """A weight that is a tensor subclass with tensors inside; packed is the parameter.

    Its `dtype` is nominal: that in which it multiplies. Whoever made it wrote `dequantize`.
    """

    library = "torchao"

    def holds(self, module: nn.Module) -> bool:
        """Whether the weight is a subclass that can be read densely, and not a sharded tensor."""
        weight = module._parameters.get("weight")
        if not isinstance(module, nn.Linear) or weight is None or hasattr(weight, "device_mesh"):
            return False
        return hasattr(weight, "__tensor_flatten__") and _reader(weight) is not None

    def packed(self, module: nn.Module) -> Any:
        """The parameter."""
        return module._parameters["weight"]

    def label(self, module: nn.Module) -> str:
        """As a format's, with the weight's own library."""
        return _label(self, self.packed(module))

    def told(self, module: nn.Module) -> tuple[str, dict[str, Any] | None] | None:
        """Label and settings, those of this rank's part where the weight is sharded."""
        weight = module._parameters.get("weight")
        local: Any = getattr(weight, "_local_tensor", None)
        if hasattr(local, "__tensor_flatten__") and _reader(local) is not None:
            return _label(self, local), self.settings(local)
        return super().told(module)

    def kind(self, packed: Any) -> str:
        """The values' dtype, the weight's class, and whether the input is quantised too."""
        name = type(packed).__name__
        kind = _VALUES[name](packed) if name in _VALUES else name
        return kind + (", inputs quantised too" if _quantises_inputs(packed) else "")

    def tensors(self, packed: Any) -> list[Tensor]:
        """The tensors inside, those inside of these included."""
        return list(_inside(packed))

    def dense(self, packed: Any) -> Tensor:
        """The weight in its nominal dtype."""
        read = _reader(packed)
        assert read is not None
        return read(packed.detach()).detach()

    def settings(self, packed: Any) -> dict[str, Any] | None:
        """Class, dtype and blocks of torchao's; None of another, which cannot be packed again."""
        name = type(packed).__name__
        if name not in _SETTINGS or of_library(packed) != "torchao" or _quantises_inputs(packed):
            return None
        own = _SETTINGS[name](packed)
        return {"kind": self.kind(packed), "class": name, "dtype": dtype_name(packed.dtype), **own}

    def makes(self, settings: Mapping[str, Any]) -> bool:
        """Whether this is a class of torchao that is made again."""
        return settings.get("class") in _PACKERS

    def pack(self, weight: Tensor, settings: Mapping[str, Any]) -> Any:
        """Quantise as torchao's weight-only configurations do."""
        if settings.get("class") not in _PACKERS:
            return super().pack(weight, settings)
        dense = weight.to(getattr(torch, settings["dtype"]))
        packed = _PACKERS[settings["class"]](dense, settings)
        return nn.Parameter(packed, requires_grad=False)

    def put(self, module: nn.Module, packed: Any) -> None:
        """The parameter is all that there is."""
        module._parameters["weight"] = packed


def _label(form: Format, weight: Tensor) -> str:
    return f"{form.kind(weight)} ({of_library(weight)})"


def _reader(weight: Tensor) -> Callable[[Any], Tensor] | None:
    """How a weight is read densely; None if its class does not say."""
    cls = type(weight)
    if hasattr(cls, "get_original_weight"):  # torchao's NF4Tensor, whose `dequantize` is another
        return cls.get_original_weight  # pyright: ignore[reportAttributeAccessIssue]
    own = getattr(cls, "dequantize", None)
    return None if own is None or own is Tensor.dequantize else own


def _inside(tensor: Any) -> Any:
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if hasattr(part, "__tensor_flatten__"):
            yield from _inside(part)
        else:
            yield part


def _quantises_inputs(weight: Any) -> bool:
    names = ("act_quant_kwargs", "activation_quantization", "activation_qtype")
    return any(getattr(weight, name, None) is not None for name in names)


def _rows_or_blocks(weight: Any) -> dict[str, Any]:
    return {"block_size": [*map(int, weight.block_size)]}


#: What the values of torchao's classes are called.
_VALUES: dict[str, Callable[[Any], str]] = {
    "Int8Tensor": lambda w: "int8",
    "Float8Tensor": lambda w: dtype_name(w.qdata.dtype),
    "IntxUnpackedToInt8Tensor": lambda w: f"{dtype_name(w.target_dtype)} in int8",
    "NF4Tensor": lambda w: "nf4",
}
_SETTINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Int8Tensor": _rows_or_blocks,
    "Float8Tensor": lambda w: {**_rows_or_blocks(w), "values": dtype_name(w.qdata.dtype)},
    "IntxUnpackedToInt8Tensor": lambda w: {
        **_rows_or_blocks(w),
        "values": dtype_name(w.target_dtype),
        "symmetric": not bool(w.zero_point.any()),
    },
    "NF4Tensor": lambda w: {
        "block_size": w.block_size,
        "scaler_block_size": w.scaler_block_size,
    },
}


def _granularity(weight: Tensor, settings: Mapping[str, Any]) -> Any:
    ao, (rows, columns) = quantiser_library(_AO), settings["block_size"]
    if (rows, columns) == tuple(weight.shape):
        return ao.PerTensor()
    if rows == 1 and columns == weight.shape[1]:
        return ao.PerRow()
    if rows == 1:
        return ao.PerGroup(columns)
    raise AdapterError(f"blocks of {rows}×{columns} cannot be quantised again here; merge dense")


def _pack_int8(weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
    return quantiser_library(_AO).Int8Tensor.from_hp(
        weight, granularity=_granularity(weight, settings)
    )


def _pack_float8(weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
    return quantiser_library(_AO).Float8Tensor.from_hp(
        weight,
        float8_dtype=getattr(torch, settings["values"]),
        granularity=_granularity(weight, settings),
    )


def _pack_intx(weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
    ao = quantiser_library(f"{_AO}.quant_primitives")
    return quantiser_library(_AO).IntxUnpackedToInt8Tensor.from_hp(
        weight,
        tuple(settings["block_size"]),
        getattr(torch, settings["values"]),
        mapping_type=ao.MappingType.SYMMETRIC
        if settings["symmetric"]
        else ao.MappingType.ASYMMETRIC,
    )


def _pack_nf4(weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
    nf4 = quantiser_library(f"{_AO}.quantize_.workflows.nf4.nf4_tensor")
    return nf4.to_nf4(weight, settings["block_size"], settings["scaler_block_size"])


_PACKERS: dict[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] = {
    "Int8Tensor": _pack_int8,
    "Float8Tensor": _pack_float8,
    "IntxUnpackedToInt8Tensor": _pack_intx,
    "NF4Tensor": _pack_nf4,
}
