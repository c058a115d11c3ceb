"""The formats of quantised weights, and what everybody asks of a module through them."""

from __future__ import annotations

from torch import Tensor, nn

from bridge.peft.branch.quantised.bitsandbytes import EightBit, FourBit
from bridge.peft.branch.quantised.format import Format, byte_size
from bridge.peft.branch.quantised.opaque import Opaque
from bridge.peft.branch.quantised.scaled_float8 import BlockFloat8
from bridge.peft.branch.quantised.subclasses import Subclass
from bridge.peft.dtypes import TRAINABLE_DTYPES
from bridge.peft.errors import AdapterError
from bridge.peft.tensors import is_plain

#: Most specific first: the first that holds a module is its format.
FORMATS: tuple[Format, ...] = (FourBit(), EightBit(), Subclass(), BlockFloat8(), Opaque())


def format_of(module: nn.Module) -> Format | None:
    """The format of a module's weight; None if that is not quantised, or not whole.

    Args:
        module: Any module, adapted or not.
    """
    return next((f for f in FORMATS if f.holds(module)), None)


def dense_weight(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight that a linear computes with, the way round that it stores it.

    Args:
        module: A linear, adapted or not. Of a quantised one a new tensor is made; of another the
            weight itself comes back, detached.
        weight: The weight of one that is not quantised, if that is not at its place.

    Raises:
        AdapterError: It is packed in a way that is not known here.
    """
    if weight is None:
        own = module._parameters.get("weight")
        weight = getattr(module, "weight", None) if own is None else own
    # asked first, so that a compiler need not look further
    if weight is not None and is_plain(weight) and weight.dtype in TRAINABLE_DTYPES:
        return weight.detach()
    if (found := format_of(module)) is not None:
        return found.dense(found.packed(module))
    assert weight is not None
    if not weight.is_floating_point():
        raise AdapterError(
            f"the weight is packed as {weight.dtype} ({type(weight).__name__}), and its values are "
            "not known here; keep it unmerged and without use_dora"
        )
    return weight.detach()


def weight_bytes(module: nn.Module) -> int | None:
    """The bytes of a quantised weight, scales and tables included; None if it is not quantised.

    Args:
        module: Any module.
    """
    found = format_of(module)
    if found is None:
        return None
    return sum(map(byte_size, found.tensors(found.packed(module))))
