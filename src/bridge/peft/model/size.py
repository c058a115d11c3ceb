"""How large a model is: its parameters, and the bytes that they take as they are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bridge.peft.branch.quantised.format import Format, byte_size
from bridge.peft.branch.quantised.table import format_of
from bridge.peft.parallel.megatron import whole_numel


@dataclass(frozen=True, kw_only=True)
class QuantisedPart:
    """The linears of a model that are quantised alike.

    Attributes:
        label: `"nf4, double quantised (bitsandbytes)"`.
        modules: How many.
        parameters: The weights that they stand for.
        bytes: What these take, scales and tables included.
    """

    label: str
    modules: int
    parameters: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a model takes as it is stored; what several modules share counts once.

    Attributes:
        parameters: A quantised weight counts as the matrix that it stands for, a part of one that
            Megatron splits as the whole.
        bytes: Of this process's parameters and buffers, scales and tables of quantised weights
            included.
        quantised: The quantised part of it, by label.
    """

    parameters: int
    bytes: int
    quantised: tuple[QuantisedPart, ...]


def model_size(model: nn.Module) -> ModelSize:
    """Measure a model; touches nothing, works on `meta`.

    Args:
        model: A model, not adapted.
    """
    seen: set[int] = set()
    parameters = size = 0
    parts: dict[str, list[QuantisedPart]] = {}
    for module in model.modules():
        own = {n: t for n, t in _tensors(module) if id(t) not in seen}
        seen.update(map(id, own.values()))
        form = format_of(module)
        if form is not None and own.keys() - {"bias"}:
            part = _part(module, form)
            parts.setdefault(part.label, []).append(part)
            parameters, size = parameters + part.parameters, size + part.bytes
            own = {name: tensor for name, tensor in own.items() if name == "bias"}
        parameters += sum(
            whole_numel(module, t) for t in own.values() if isinstance(t, nn.Parameter)
        )
        size += sum(map(byte_size, own.values()))
    quantised = tuple(_sum(label, group) for label, group in parts.items())
    return ModelSize(parameters=parameters, bytes=size, quantised=quantised)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _part(module: nn.Module, form: Format) -> QuantisedPart:
    widths: list[Any] = [module.in_features, module.out_features]
    size = sum(map(byte_size, form.tensors(form.packed(module))))
    return QuantisedPart(
        label=form.label(module), modules=1, parameters=math.prod(widths), bytes=size
    )


def _sum(label: str, parts: list[QuantisedPart]) -> QuantisedPart:
    return QuantisedPart(
        label=label,
        modules=len(parts),
        parameters=sum(part.parameters for part in parts),
        bytes=sum(part.bytes for part in parts),
    )
