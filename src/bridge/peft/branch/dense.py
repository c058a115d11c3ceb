"""A quantised layer that holds a merged weight: its base set aside, whole, and put back.

quantised base + branch  --merge-->  `DenseLinearAdapter`: weight = dense(base) + s · B A
                         <-unmerge-  the very tensors that were set aside
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge.peft.branch.kinds import READ_KINDS
from bridge.peft.branch.kinds.linear import LinearAdapter
from bridge.peft.branch.mixin import BRANCH_ATTRIBUTES, LoRAMixin
from bridge.peft.branch.patch import adapted_class, show_forward
from bridge.peft.branch.quantised.format import Format

#: What is not the base's on an adapted module: torch's own, the branch's, and hooks.
_NOT_THE_BASES = {
    *vars(nn.Module()),
    *BRANCH_ATTRIBUTES,
    *("on_call", "bypassed", "_hf_hook", "_old_forward"),
}


class DenseLinearAdapter(LinearAdapter):
    """A layer whose quantised base was merged: `weight`, (out_features, in_features), is the sum.

    As its base did, it takes x in any floating dtype and answers in that one; the checkpoint is
    that of an `nn.Linear`.
    """

    @classmethod
    def takes(cls, base_type: type[nn.Module]) -> bool:
        """No class as such: a merge makes layers of this kind."""
        return False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor | None = None, *, input: Tensor | None = None
    ) -> Tensor:
        """`W x + b` in the dtype of x.

        Args:
            x: (..., in_features).
            input: The same, by the name that `nn.Linear` gives it.
        """
        if x is None:
            x = self.given(input)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.base_weight.to(x.dtype), bias)


#: The classes of adapted modules that can be pickled by name; others are made anew from the base's.
_NAMED: tuple[type[nn.Module], ...] = (LinearAdapter, *READ_KINDS.values(), DenseLinearAdapter)


@dataclass(frozen=True)
class SetAside:
    """A base that is not in its layer: its class and all that it stored there.

    Attributes:
        cls: The class before adaptation; of a layer whose own class has a name, that one.
        parameters: By name.
        buffers: By name.
        attributes: Everything else.
    """

    cls: type[nn.Module]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    attributes: dict[str, Any]

    def as_module(self) -> nn.Module:
        """A module that shares the tensors, to ask a format about."""
        module = nn.Module()
        cls = self.cls
        module.__class__ = cls.base_type if issubclass(cls, LoRAMixin) else cls
        vars(module).update(self.attributes)
        module._parameters.update(self.parameters)
        module._buffers.update(self.buffers)
        return module


def base_of(layer: LoRAMixin) -> SetAside:
    """What a layer holds of its base now; nothing is copied.

    Args:
        layer: An adapted module.
    """
    return SetAside(
        cls=type(layer) if type(layer) in _NAMED else layer.base_type,
        parameters=dict(layer._parameters),
        buffers=dict(layer._buffers),
        attributes={n: v for n, v in vars(layer).items() if n not in _NOT_THE_BASES},
    )


def put_base(layer: LoRAMixin, base: SetAside) -> None:
    """Give a layer this base in place of the one that it has, in place.

    Args:
        layer: An adapted module.
        base: It goes to the device on which the layer's A is.
    """
    device = layer.lora_a.weight.device
    for name in [name for name in vars(layer) if name not in _NOT_THE_BASES]:
        del vars(layer)[name]
    layer._parameters.clear()
    layer._buffers.clear()
    cls = base.cls
    layer.__class__ = cls if cls in _NAMED else adapted_class(cls)  # pyright: ignore
    vars(layer).update(base.attributes)
    layer._parameters.update({n: _moved(p, device) for n, p in base.parameters.items()})
    layer._buffers.update({n: _moved(b, device) for n, b in base.buffers.items()})
    show_forward(layer)


def _moved(tensor: Any, device: torch.device) -> Any:
    return tensor if tensor is None or tensor.device == device else tensor.to(device)


def make_dense(layer: LoRAMixin, weight: Tensor) -> SetAside:
    """Put a dense weight in the place of a quantised base, in place.

    Args:
        layer: An adapted layer with a quantised base.
        weight: (out_features, in_features), floating.

    Returns:
        The base, to put back with `put_base`.
    """
    before = base_of(layer)
    bias: Any = getattr(layer, "bias", None)
    n_in, n_out = layer.features(layer)
    dense = SetAside(
        cls=DenseLinearAdapter,
        parameters={
            "weight": nn.Parameter(weight, requires_grad=False),
            "bias": None if bias is None else nn.Parameter(bias.detach(), requires_grad=False),
        },
        buffers={},
        attributes={"in_features": n_in, "out_features": n_out},
    )
    put_base(layer, dense)
    return before


def quantise_again(layer: LoRAMixin, form: Format, packed: Any) -> SetAside:
    """Put other packed values in the place of a quantised base's, in place.

    Args:
        layer: An adapted layer with a quantised base.
        form: Its format.
        packed: What `form.pack` gave.

    Returns:
        The base, to put back with `put_base`.
    """
    before = base_of(layer)
    form.put(layer, packed)
    return before


@contextmanager
def base_restored(layer: LoRAMixin, base: SetAside) -> Iterator[None]:
    """Within the context a merged layer holds its base again, bit for bit.

    Args:
        layer: A merged layer.
        base: What its merge set aside.
    """
    merged = base_of(layer)
    put_base(layer, base)
    try:
        yield
    finally:
        put_base(layer, merged)
