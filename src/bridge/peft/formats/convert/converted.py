"""What a conversion between formats gives: tensors, a side file, and what was done."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.convert.layout import AttentionLayout
from bridge.peft.formats.peft.adapter_file import AdapterFile, check_adapter
from bridge.peft.formats.peft.config import alpha_for, new_config
from bridge.peft.formats.peft.names import choose_targets


@dataclass(frozen=True, kw_only=True)
class Step:
    """How one module was converted.

    Attributes:
        name: Its name in the new format.
        how: In a few words.
        error: Relative error of its update, 0 where the conversion is exact.
    """

    name: str
    how: str
    error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Converted:
    """An adapter in a foreign format.

    Attributes:
        tensors: By the format's own keys.
        side: What goes into `bridge_adapter.json`: what the tensors do not say.
        steps: What was done, module by module.
    """

    tensors: dict[str, Tensor]
    side: dict[str, Any]
    steps: list[Step]


def is_prefix(value: Any) -> bool:
    """Whether a side file's `prefix` can stand before `layers`: empty, or a name and a dot."""
    return isinstance(value, str) and re.fullmatch(r"(?:[\w-]{1,200}\.){0,9}", value) is not None


def paired(halves: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module, of one rank.

    Args:
        halves: `{"a": A, "b": B}` by module.

    Raises:
        AdapterFileError: One of the two is missing, or they do not fit each other.
    """
    for fqn, half in halves.items():
        shapes = {letter: tuple(tensor.shape) for letter, tensor in half.items()}
        match shapes:
            case {"a": (rank, _), "b": (_, columns)} if rank == columns > 0:
                pass
            case _:
                raise AdapterFileError(
                    f"{fqn}: A and B do not make a pair (shapes {shapes}); save the adapter again"
                )
    if not halves:
        raise AdapterFileError("the file holds no A and B; pass an adapter's file")
    return {fqn: (half["a"], half["b"]) for fqn, half in halves.items()}


def restored(
    tensors: dict[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    side: Mapping[str, Any],
    layout: AttentionLayout | None,
) -> AdapterFile:
    """A PEFT adapter out of a foreign file, with its old config where that still holds.

    Args:
        tensors: A and B by PEFT's names of the modules.
        scales: The factor of each branch.
        side: The side file of the foreign file; may be empty.
        layout: The model's, if known: with the number of layers the config can be short.

    Raises:
        AdapterFileError: Something does not fit.
    """
    if old := _old_adapter(tensors, scales, side):
        return old
    alphas = {fqn: alpha_for(scales[fqn], tensors[fqn][0].shape[0]) for fqn in tensors}
    config = new_config(
        {fqn: a.shape[0] for fqn, (a, _) in tensors.items()},
        alphas,
        choose_targets(tensors, _other_linears(tensors, layout)),
        lora_dropout=side.get("dropout", 0.0),
    )
    adapter = AdapterFile(config=config, tensors=tensors)
    check_adapter(adapter)
    return adapter


def _old_adapter(
    tensors: dict[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    side: Mapping[str, Any],
) -> AdapterFile | None:
    match side.get("peft"):
        case {"config": dict(config), "extra": dict(extra)}:
            pass
        case _:
            return None
    adapter = AdapterFile(config=config, tensors=tensors, extra=extra)
    try:
        check_adapter(adapter)
    except AdapterFileError:
        return None
    return adapter if all(adapter.scale(fqn) == scales[fqn] for fqn in tensors) else None


def _other_linears(tensors: Mapping[str, Any], layout: AttentionLayout | None) -> Iterator[str]:
    """Names that `target_modules` must not mean: the same linears in other layers."""
    kinds: set[tuple[str, str]] = set()
    for fqn in tensors:
        parts = fqn.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if place is not None:
            kinds.add((".".join(parts[:place]), ".".join(parts[place + 1 :])))
    # an unknown layer makes every short name mean too much, so full names are taken
    layers = range(layout.layers) if layout and layout.layers else ("unknown",)
    for prefix, end in kinds:
        for layer in layers:
            if (fqn := f"{prefix}.{layer}.{end}") not in tensors:
                yield fqn
